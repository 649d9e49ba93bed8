"""The bench on a GPU: the device's clock, its memory and its state reach the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.__main__ import main
from bench.result_file import BenchResult

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
            assert len(request.leads_ms) == 6
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
    assert '"gemm"' in out.read_text()
