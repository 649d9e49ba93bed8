"""Counting launches without a GPU, on small configurations: nothing is compiled or run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.__main__ import main
from bench.errors import BenchError
from bench.harness.scenarios import Scenario
from bench.kernels.hopper_code import FP8_PRODUCTS, Launch, Lowered
from bench.kernels.launches import CountedModel, lower_part, summarise
from kernels_warmup.attention import transformer_blocks
from kernels_warmup.flops import count_step
from kernels_warmup.shapes import CompiledShape
from tests.kernels_warmup.tiny import tiny_unet, tiny_vae
from tests.kernels_warmup.triton_here import require_triton

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's compiler warns about its own internals

SHAPE = CompiledShape(128, 128)
SMALL = ["--model", "demo", "--shape", "64x64", "--top", "3"]


SMALLER = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (2, 4),
}
"""Than `tiny_unet`: every kind of block once, for tests that count nothing."""


def count(scenario: Scenario, part: str = "step", **smaller: object) -> Lowered:
    unet, vae = (dict(module.config) for module in (tiny_unet(), tiny_vae()))
    unet |= smaller
    return lower_part(scenario, part, CountedModel(unet, vae, SHAPE, images=1))


def calls(lowered: Lowered, kind: str) -> int:
    return sum(launch.kind == kind for launch in lowered.launches)


def whole(**fields: bool) -> Scenario:
    return Scenario("made-up", "of this test", recipe={"scope": "whole", **fields})


@pytest.fixture(scope="module")
def plain() -> Lowered:
    return count(whole())


@pytest.mark.slow
def test_every_attention_and_convolution_is_one_launch(plain: Lowered) -> None:
    unet = tiny_unet()
    convolutions = [module for module in unet.modules() if isinstance(module, nn.Conv2d)]
    assert calls(plain, "attention") == 2 * len(transformer_blocks(unet))
    assert calls(plain, "conv") == len(convolutions)


@pytest.mark.slow
def test_flops_are_those_of_the_unmodified_model(plain: Lowered) -> None:
    assert sum(plain.flops.values()) == count_step(dict(tiny_unet().config), SHAPE)


@pytest.mark.slow
def test_what_a_rewrite_saves_is_seen(plain: Lowered) -> None:
    both = count(whole(fuse_qkv=True, text_once=True))
    blocks = calls(plain, "attention") // 2
    # Query, key and value of self-attention in one; the text's keys and values, and the added
    # condition's two products, before the loop.
    assert calls(plain, "gemm") - calls(both, "gemm") == 2 * blocks + 2 * blocks + 2
    assert both.flops["gemm"] < plain.flops["gemm"]
    assert both.flops["conv"] == plain.flops["conv"]


@pytest.mark.slow
def test_sums_by_products_leave_the_norms_one_tensor_to_read_and_one_to_write() -> None:
    require_triton()
    fields = {"fuse_qkv": True, "text_once": True, "layer_norm": True}
    norms, products = count(whole(**fields)), count(whole(**fields, residual_products=True))
    assert sum(products.flops.values()) == sum(norms.flops.values())
    assert calls(products, "own") == calls(norms, "own")
    assert calls(products, "gemm") == calls(norms, "gemm")
    sums = [launch for launch in products.launches if "add_product" in launch.name]
    shifted = [launch for launch in products.launches if "shifted_layer_norm" in launch.name]
    blocks = transformer_blocks(tiny_unet())
    assert len(sums) == 3 * len(blocks)
    # None after each transformer's last sum; SHAPE has 8 x 8 tokens of 64, and 4 x 4 of 128.
    assert len(shifted) == 3 * len(blocks) - 7
    hidden = [2 * 2 * tokens * width for tokens, width in ((64, 64), (16, 128))]
    least = {2 * size for size in hidden}
    for launch in shifted:
        # Apart from the hidden state only a few numbers a channel.
        assert any(size <= launch.bytes < size + 4096 for size in least), launch


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_fp8_norms_save_a_pass_a_product_and_static_scales_the_reduction_before_the_last() -> None:
    def fp8(**fields: bool) -> Lowered:
        scenario = whole(fuse_qkv=True, text_once=True, layer_norm=True, **fields)
        return count(replace(scenario, quantize="fp8"))

    apart, fused, static = fp8(), fp8(fp8_norms=True), fp8(fp8_norms=True, fp8_static=True)
    blocks = len(transformer_blocks(tiny_unet()))
    assert calls(apart, FP8_PRODUCTS) == 3 * blocks
    assert apart.flops[FP8_PRODUCTS] == fused.flops[FP8_PRODUCTS] == static.flops[FP8_PRODUCTS]
    # What reads a norm is rounded by a reduction of its own, unless the norm's kernel does it.
    reductions = [calls(each, "generated: reduction") for each in (apart, fused, static)]
    assert reductions[0] - reductions[1] == 2 * blocks
    # The gating finds its rows' largest values as it goes; of one scale it needs none.
    assert reductions[1] - reductions[2] == blocks
    assert len(apart.launches) - len(fused.launches) == 2 * blocks


@pytest.fixture(scope="module")
def decode() -> Lowered:
    return count(whole(channels_last=True), "decode")


@pytest.mark.slow
def test_group_norm_in_channels_last_is_read_in_short_runs(decode: Lowered) -> None:
    """This made the H200's decode slow (bench/results/notes.md)."""
    reductions = [x for x in decode.launches if x.kind == "generated: reduction"]
    short = sum(launch.short_bytes for launch in reductions)
    assert 0.5 * sum(launch.bytes for launch in reductions) < short


def test_a_summary_adds_up_and_is_bound_by_bytes_or_products() -> None:
    lowered = Lowered(
        (
            Launch("gemm", "a", 10_000_000),
            Launch("gemm", "b", 10_000_000),
            Launch("own", "c", 4_000),
        ),
        {"gemm": 30_000_000_000},
    )
    summary = summarise(lowered, tflops=100, gbps=1000)
    assert summary["gemm"]["launches"] == 2
    assert summary["gemm"]["floor_ms"] == pytest.approx(0.3)
    assert summary["own"]["floor_ms"] == pytest.approx(4e-6, abs=1e-4)
    assert summary["all"]["launches"] == 3
    narrow = Lowered((Launch(FP8_PRODUCTS, "a", 8_000),), {FP8_PRODUCTS: 30_000_000_000})
    assert summarise(narrow, 100, 1000)[FP8_PRODUCTS]["floor_ms"] == pytest.approx(0.15)
    assert summarise(lowered, tflops=1e9, gbps=1000)["gemm"]["floor_ms"] == pytest.approx(0.02)


@pytest.mark.slow
def test_the_command_counts_scenarios_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert (
        main(["launches", "--scenario", "compiled", "--part", "decode", *SMALL, "--out", str(out)])
        == 0
    )
    (counted,) = json.loads(out.read_text())["counted"]
    assert counted["scenario"] == "compiled"
    assert counted["by_kind"]["all"]["launches"] > counted["by_kind"]["conv"]["launches"] > 20
    printed = capsys.readouterr().out
    assert "generated: reduction" in printed


def test_what_is_not_compiled_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launches", "--scenario", "documented", *SMALL]) == 2
    assert "documented is not compiled whole" in capsys.readouterr().err


def test_kernels_of_our_own_are_not_counted_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels_warmup.triton.find_spec", lambda _: None)
    with pytest.raises(BenchError, match="triton is not installed"):
        count(whole(text_once=True, layer_norm=True))


def test_torch_reports_no_gpu_afterwards() -> None:
    lowered = count(whole(), **SMALLER)
    assert {"attention", "conv", "gemm"} <= set(lowered.flops)
    assert lowered.launches
    assert torch.cuda.is_available() == (torch.cuda.device_count() > 0)
    if not torch.backends.cuda.is_built():
        with pytest.raises((AssertionError, RuntimeError)):
            torch.empty(1, device="cuda")
