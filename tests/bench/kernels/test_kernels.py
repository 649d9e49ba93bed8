from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.errors import BenchError
from bench.harness.result_file import Ceilings
from bench.kernels.operator_times import time_operators
from bench.kernels.profile import by_kind, covered, kind_of, memset_owners, rate_text
from bench.kernels.roofline import FlopsAndBytes, count, read_launches
from kernels_warmup.flops import count_decode, count_step
from kernels_warmup.numerical_error import StepInputs
from kernels_warmup.shapes import CompiledShape
from tests.kernels_warmup.tiny import tiny_unet, tiny_vae

SMALL = ["--model", "demo", "--device", "cpu", "--shape", "64x64"]


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", "gemm"),
        ("triton_tem_fused_addmm_view_3", "gemm"),
        ("triton_poi_fused_convolution_silu_4", "generated: pointwise"),
        ("triton_red_fused_native_group_norm_2", "generated: reduction"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "conv"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("_few_keys_kernel", "attention"),
        ("_self_attention_kernel", "attention"),
        ("_geglu_kernel", "gemm"),
        ("_add_layer_norm_kernel", "norm"),
        ("mystery", "other"),
    ],
)
def test_kernels_are_grouped_by_what_they_do(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_overlapping_kernels_are_counted_once() -> None:
    assert covered([(4, 6), (0, 2), (1, 3)]) == 5


def traced(category: str, name: str, ts: float, stream: int = 7, **args: object) -> dict[str, Any]:
    """One event of the device, as kineto writes it into a Chrome trace."""
    common = {"External id": 5, "device": 0, "context": 1, "stream": stream, "correlation": 9}
    event = {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": stream, "ts": ts}
    return event | {"dur": 2.0, "args": common | args}


def test_a_memset_belongs_to_the_kernel_that_follows_on_its_stream() -> None:
    product, attention = "nvjet_sm90_tst_128x160_64x5_splitK_TNT", "cudnn_sdpa_sm90_flash_fprop"
    one = [
        traced("gpu_memset", "Memset (Unknown)", 10, bytes=512),
        traced("kernel", "triton_poi_fused_add_0", 11, stream=20),
        traced("gpu_memset", "Memset (Unknown)", 12, bytes=512),
        traced("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 13, bytes=4096),
        traced("kernel", product, 14, grid=[128, 1, 1]),
        traced("kernel", product, 16, grid=[128, 1, 1]),
        traced("gpu_memset", "Memset (Unknown)", 18, bytes=64),
        traced("kernel", attention, 20),
    ]
    two = [event | {"ts": event["ts"] + 100} for event in one]
    last = traced("gpu_memset", "Memset (Unknown)", 300, bytes=64)
    others = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
        {
            "ph": "X",
            "cat": "cuda_runtime",
            "name": "cudaGraphLaunch",
            "ts": 1,
            "dur": 1,
            "args": {},
        },
    ]
    # In no order: a trace's is not the timeline's.
    rows = memset_owners([*others, last, *reversed(two), *one], 2)
    assert rows == [
        {"kernel": product, "bytes": 512, "calls": 2, "kernel_calls": 2, "ms": 0.004},
        {"kernel": attention, "bytes": 64, "calls": 1, "kernel_calls": 1, "ms": 0.002},
        {"kernel": "", "bytes": 64, "calls": 0.5, "kernel_calls": 0, "ms": 0.001},
    ]


def test_a_profile_gives_the_time_by_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    parts = ["--part", "step", "decode"]
    assert main(["kernels", "--scenario", "served", *parts, *SMALL, "--out", str(out)]) == 0
    profiles = json.loads(out.read_text())["parts"]
    assert list(profiles) == ["step", "decode"]
    for found in profiles.values():
        assert found["by_kind_ms"]["conv"] > 0
        conv = found["by_kind"]["conv"]
        assert conv["tflops"] == pytest.approx(conv["gflop"] / conv["ms"], rel=0.01)
        assert conv["bound_ms"] > 0
        assert found["by_kind"]["attention"]["gb_per_second"] > 0
        # Operators' own times fill the forward without exceeding it.
        own = sum(found["by_kind_ms"].values())
        assert 0.3 * found["timeline_ms"] < own < 1.5 * found["timeline_ms"]
    assert "conv" in capsys.readouterr().out


def test_every_operator_of_a_step_is_timed_by_itself() -> None:
    unet = tiny_unet().bfloat16()
    device = torch.device("cpu")
    inputs = StepInputs.draw(unet, CompiledShape(64, 64), 1, device, torch.bfloat16)
    with torch.no_grad():
        rows = time_operators(unet, inputs, device)
    kinds = {row["kind"] for row in rows}
    assert kinds == {"linear", "conv", "attention", "norm", "geglu"}
    done = [row for row in rows if "failed" not in row]
    assert all(row["us"] > 0 and row["count"] > 0 for row in done)
    assert {row["how"] for row in done} >= {"bf16", "channels last", "auto", "eager"}
    counts = {row["kind"]: 0 for row in done}
    for row in done:
        if row["how"] == "eager":
            counts[row["kind"]] += row["count"]
    # Of 11 blocks: three norms and one gated product each.
    assert (counts["norm"], counts["geglu"]) == (33, 11)
    assert all(row["gb_s"] > 0 for row in done if row["kind"] == "norm")
    # What cannot run here says so instead of ending the others.
    assert all("failed" in row for row in rows if row["how"] == "cudnn")
    assert not any(module._forward_hooks for module in unet.modules())


def test_the_counted_flops_of_a_step_equal_the_flop_counters() -> None:
    pipeline = SimpleNamespace(unet=tiny_unet(), vae=tiny_vae())
    shape = CompiledShape(64, 64)
    step, decode = count(pipeline, shape, "step"), count(pipeline, shape, "decode")
    assert set(step) == set(decode) == {"gemm", "conv", "attention"}
    assert sum(a.flops or 0 for a in step.values()) == count_step(pipeline.unet.config, shape)
    assert sum(a.flops or 0 for a in decode.values()) == count_decode(pipeline.vae.config, shape)
    without_text = count(pipeline, shape, "step", text_once=True)
    assert without_text["conv"] == step["conv"]
    assert (without_text["gemm"].flops or 0) < (step["gemm"].flops or 0)
    assert (without_text["gemm"].bytes or 0) < (step["gemm"].bytes or 0)


def test_a_kind_is_compared_with_its_roofline(tmp_path: Path) -> None:
    ceilings = Ceilings({"bfloat16": 700.0}, 4000.0)
    launches = tmp_path / "launches.json"
    row = {"launches": 300, "bytes": 4e9, "flops": 0}
    counted = {"scenario": "compiled", "part": "step", "shape": "1024x1024"}
    counted |= {"by_kind": {"generated: pointwise": row}}
    launches.write_text(json.dumps({"counted": [counted]}))
    amounts = {"gemm": FlopsAndBytes(7e12, 1e9)}
    amounts |= read_launches(launches, "compiled", "step", "1024x1024")
    milliseconds = {"gemm": 20.0, "generated: pointwise": 2.0, "other": 1.0}
    rows = by_kind(milliseconds, amounts, "bfloat16", ceilings)
    assert rows["gemm"]["tflops"] == 350
    assert rows["gemm"]["bound_ms"] == 10
    assert "2.00 times its bound of 10 ms" in rate_text(rows["gemm"])
    assert rows["generated: pointwise"]["gb_per_second"] == 2000
    assert rows["generated: pointwise"]["bound_ms"] == 1
    assert rows["generated: pointwise"]["tflops"] is None
    assert rate_text(rows["other"]) == ""
    with pytest.raises(BenchError, match="counts no decode of compiled at 1024x1024"):
        read_launches(launches, "compiled", "decode", "1024x1024")
    launches.write_text("[]")
    with pytest.raises(BenchError, match=launches.name):
        read_launches(launches, "compiled", "step", "1024x1024")
