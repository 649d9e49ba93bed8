"""Whether a lossless scenario is distinguished from one that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.harness import drive
from bench.harness.scenarios import SCENARIOS, chosen
from bench.kernels.numerics import PARTS, half_zero, to_check

SMALL = ["numerics", "--model", "demo", "--device", "cpu", "--shape", "64x64"]


@pytest.mark.slow
def test_each_lossless_scenario_is_compared_with_eager(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "numerics.json"
    names = ["served", "fused-qkv", "compiled", "attention-cudnn", "int8", "batch-2"]
    command = [*SMALL, "--scenario", *names, "--uncompiled", "--no-worse", "1.1"]
    assert main([*command, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert set(found["eager"]) == set(PARTS)
    assert all(0 < error < 0.1 for error in found["eager"].values())
    checked = {one["name"]: one for one in found["scenarios"]}
    # int8 is lossy by design, and a batch computes what one image does.
    assert list(checked) == ["served", "fused-qkv", "compiled"]
    assert list(found["not_run"]) == ["attention-cudnn"]
    assert checked["served"]["errors"] == found["eager"]
    assert checked["compiled"]["settings"]["recipe.scope"] == "none"
    assert all(one["passed"] and one["again"] for one in checked.values())
    assert "as close" in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_further_away_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare = drive.prepare

    def spoil(scenario: Any, model: Any) -> Any:
        made = prepare(scenario, model)
        weight = model.pipeline.vae.decoder.conv_out.weight
        weight.data.mul_(1.1)
        return made

    monkeypatch.setattr(drive, "prepare", spoil)
    assert main([*SMALL, "--scenario", "channels-last", "--uncompiled"]) == 1
    assert "FURTHER AWAY" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_to_check_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--scenario", "graph"]) == 2
    assert "graph: it needs a CUDA device" in capsys.readouterr().err


def test_what_computes_the_same_is_checked_once() -> None:
    names = [scenario.name for scenario in to_check(SCENARIOS, "cuda", uncompiled=True)]
    assert "vae-attention" in names
    # The graph, the compiler and the served pipeline do not change that by themselves.
    assert not {"graph", "documented", "pdl", "launched", "default", "fp8"} & set(names)
    # On a CPU the default differs from every other scenario.
    assert "default" in [s.name for s in to_check(SCENARIOS, "cpu", uncompiled=True)]
    compiled = [scenario.name for scenario in to_check(SCENARIOS, "cuda", uncompiled=False)]
    assert {"graph", "compiled", "pdl", "max"} <= set(compiled)
    assert not {"served", "bf16", "diffusers", "fp8", "batch-8", "offline"} & set(compiled)
    (served,) = to_check(chosen(["served"]), "cpu", uncompiled=True)
    assert served.name == "served"


def test_an_empty_negative_prompt_is_zero() -> None:
    halves = half_zero(torch.ones(4, 2))
    assert halves[:2].abs().sum() == 0
    assert halves[2:].sum() == 4
