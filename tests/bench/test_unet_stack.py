import json
import os
from pathlib import Path

import pytest
import torch

from bench import unet_stack
from bench.unet_stack import (
    SCENARIOS,
    PipelineSteps,
    StepInputs,
    Weights,
    WholeSteps,
    kind_of,
    main,
    relative_error,
)
from kernels_warmup.compile import RECIPES, compile_unet
from kernels_warmup.shapes import CompiledShape

EAGER = ["bf16-eager", "captured-last", "captured-text", "vae-captured"]


@pytest.fixture(autouse=True)
def _one_thread():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(out: Path, *arguments: str) -> dict:  # type: ignore[type-arg]
    common = ["--tiny", "--shape", "64x64", "--steps", "3", "--rounds", "2", "--out", str(out)]
    assert main([*common, *arguments]) == 0
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def test_the_whole_program_runs_and_writes_down_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(tmp_path / "out.json", "--scenario", *EAGER, "--profile", "captured-text")
    for name in EAGER:
        row = results["scenarios"][name]
        assert len(row["runs_ms"]) == 2
        assert row["median_ms"] > 0
        assert 0 < row["error_vs_fp32"] < 0.05
    session = results["sessions"][0]
    assert session["environment"]["torch"] == torch.__version__
    assert session["ceilings"]["bf16_matmul_tflops"] > 0
    assert results["profiles"]["captured-text"]["kernels_a_step"] > 0
    assert "captured-text" in capsys.readouterr().out


def test_a_later_command_continues_the_file(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run(out, "--scenario", "captured-last")
    results = run(out, "--scenario", "vae-captured")
    assert {"captured-last", "vae-captured"} == results["scenarios"].keys()
    assert len(results["sessions"]) == 2


def test_a_failing_scenario_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(unet_stack, "compile_unet", broken)
    results = run(tmp_path / "out.json", "--scenario", "captured", "whole-step", "vae-captured")
    rows = results["scenarios"]
    assert rows["captured"]["failed"] == "RuntimeError: no such kernel"
    assert "needs 'whole'" in rows["whole-step"]["failed"]
    assert rows["vae-captured"]["median_ms"] > 0


def test_nothing_is_started_that_cannot_end_in_time(tmp_path: Path) -> None:
    results = run(tmp_path / "out.json", "--scenario", "captured", "--seconds-limit", "20")
    assert "needed" in results["scenarios"]["captured"]["skipped"]


def test_the_whole_step_gives_the_pipelines_latents() -> None:
    weights = Weights(torch.device("cpu"), tiny=True)
    with torch.no_grad():
        unet = weights.unet(torch.float32)
        recipe = unet_stack.TEXT
        step = compile_unet(unet, recipe, "auto")
        shape = CompiledShape(64, 64)
        inputs = StepInputs.draw(unet, shape, 1, torch.device("cpu"), torch.float32)
        pipeline = PipelineSteps(unet, inputs)
        whole = WholeSteps(unet, step, inputs, 4)
        pipeline.run(4)
        for _ in range(2):
            whole.run(4)
            assert relative_error(whole.latents, pipeline.latents) < 1e-5
    with pytest.raises(ValueError, match="captured for 4 steps"):
        whole.run(5)


def test_scenarios_have_names_of_their_own_and_build_on_earlier_ones() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)
    for scenario in SCENARIOS:
        if scenario.of is not None:
            assert names.index(scenario.of) < names.index(scenario.name)
    assert {"default", "max"} <= RECIPES.keys()


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
        ("mystery", "other"),
    ],
)
def test_kernels_are_grouped_by_what_they_do(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(os.cpu_count() == 1, reason="compiling takes most of an hour on one core")
def test_every_compiled_scenario_runs(tmp_path: Path) -> None:
    chosen = ["whole", "whole-launched", "whole-step", "blocks", "blocks-fp8", "vae-whole"]
    results = run(tmp_path / "out.json", "--scenario", *chosen)
    assert all(results["scenarios"][name]["median_ms"] > 0 for name in chosen)
