"""The bench on a GPU: its result files contain the device's clock, memory and state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.harness.result_file import BenchResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ["documented", "diffusers", "served", "bf16", "graph", "attention-flash"]


def test_eager_and_captured_scenarios_side_by_side(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["run", "--scenario", *NAMES, "--device", "cuda", "--model", "demo"]
    assert main([*command, "--steps", "6", "--requests", "3", "--out", str(out)]) == 0
    result = BenchResult.read(out)
    measured = result.of_side("head")
    missing = {n.name for n in result.not_run}
    assert {"documented", "served", "graph"} <= set(measured), result.not_run
    assert missing <= {"attention-flash"}
    assert result.environment.gpu
    assert result.environment.driver
    (session,) = result.sessions
    assert session.start.power_watts
    assert session.ceilings is not None
    assert session.ceilings.matmul_tflops["bfloat16"] > session.ceilings.matmul_tflops["float32"]
    for scenario in measured.values():
        assert scenario.peak_memory_bytes
        for request in scenario.requests:
            assert len(request.gpu_queue_ms) == 6
            assert request.stages_ms["denoise"] < request.total_ms
    assert measured["documented"].dtype == "float16"
    bf16, graph = measured["bf16"].error_vs_fp32, measured["graph"].error_vs_fp32
    assert bf16 is not None
    assert graph == pytest.approx(bf16, rel=0.05)


def test_a_batch_is_one_run(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["run", "--scenario", "batch-2", "--device", "cuda", "--model", "demo"]
    assert main([*command, "--steps", "3", "--requests", "2", "--out", str(out)]) == 0
    (scenario,) = BenchResult.read(out).scenarios
    assert scenario.images == 2


def test_kernels_of_a_captured_step_are_seen(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    command = ["kernels", "--scenario", "graph", "--device", "cuda", "--model", "demo"]
    assert main([*command, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    gemm = found["parts"]["step"]["by_kind"]["gemm"]
    assert gemm["tflops"] > 0
    assert gemm["bound_ms"] > 0
    assert found["ceilings"]["matmul_tflops"]["bfloat16"] > gemm["tflops"]


def test_micro_times_the_clock_calls_of_a_step(tmp_path: Path) -> None:
    out = tmp_path / "micro.json"
    assert main(["micro", "--device", "cuda", "--series", "20", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    costs = {cost["name"]: cost["median_us"] for cost in found["costs"]}
    assert found["environment"]["gpu"]
    # Recording an event takes microseconds; 100 us would mean that it waits for the device.
    assert 0 < costs["mark"] < 100
    assert 0 < costs["poll"] < 100


def test_a_captured_scenario_is_as_near_to_float32_as_eager(tmp_path: Path) -> None:
    out = tmp_path / "numerics.json"
    command = ["numerics", "--device", "cuda", "--model", "demo", "--no-worse", "1.2"]
    names = ["--scenario", "graph", "vae-attention"]
    assert main([*command, *names, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [one["name"] for one in found["scenarios"]] == ["graph", "vae-attention"]
    assert all(one["again"] for one in found["scenarios"]), found


def test_a_scenario_that_was_compiled_beside_others_is_found(tmp_path: Path) -> None:
    out = tmp_path / "precompile.json"
    command = ["precompile", "--device", "cuda", "--model", "demo", "--scenario"]
    assert main([*command, "vae-compiled", "regional", "--out", str(out)]) == 0
    outcomes = json.loads(out.read_text())["scenarios"]
    assert all(one.startswith("compiled in") for one in outcomes.values()), outcomes
