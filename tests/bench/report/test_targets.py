"""The table of targets shows only figures measured on a GPU at full size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench.harness.result_file import BenchResult, MeasuredScenario
from bench.report import targets
from bench.report.targets import NOT_MEASURED, TARGETS, render
from serve.settings import SDXL_BASE
from tests.bench.made_up import GPU, STEPS, result, scenario


def measured(*scenarios: MeasuredScenario) -> BenchResult:
    found = result(*scenarios, environment=GPU)
    work = replace(found.workload, model="random:sdxl-base", shape="1024x1024")
    return replace(found, workload=work)


def rows(folder: Path) -> dict[str, str]:
    table = [line.split(" | ") for line in render(folder).splitlines() if line.startswith("| ")]
    return {cells[0].removeprefix("| "): cells[2].removesuffix(" |") for cells in table[1:]}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(targets, "OFFLINE_STEPS", STEPS)
    monkeypatch.setattr(targets, "REQUEST_STEPS", STEPS)
    stem = tmp_path / "h200-2026-12-01-random-sdxl-base-1024x1024"
    fp8 = {"quantize": "fp8"}
    measured(
        scenario("documented", [10.0] * 4, calibration=True),
        scenario("compiled", [30.0, 30.1, 30.2, 30.3]),
        scenario("all-lossless", [26.0, 26.1, 26.2, 26.3]),
        scenario("upsample-phases", [18.0] * 4, lossy=True),
        scenario("fp8", [20.0] * 4, lossy=True, settings=fp8),
        scenario("int8", [19.0] * 4, lossy=True, settings={"quantize": "int8"}),
        scenario("batch-8", [200.0] * 4, images=8),
        scenario("fp8-offline", [160.0] * 4, images=8, steps=STEPS, lossy=True, settings=fp8),
    ).write(f"{stem}-bench.json")
    costs = [
        {"name": "mark", "median_us": 5.0, "low_us": 4.0, "high_us": 6.0},
        {"name": "poll", "median_us": 2.0, "low_us": 2.0, "high_us": 2.0},
    ]
    micro = {
        "device": "cuda",
        "costs": costs,
        "clock_calls_a_step": {"mark": 1, "poll": 3, "wait": 1},
    }
    Path(f"{stem}-micro.json").write_text(json.dumps(micro))
    for mode, seconds in (("default", 80.0), ("regional", 40.0)):
        phases = {"load_model": 9000.0, "compile 1024x1024": 1000 * seconds - 20_000}
        starts = [
            {"case": "cold", "first_image_s": seconds, "phases_ms": phases},
            {"case": "from cache", "first_image_s": 30.0, "phases_ms": {"compile x": 9000.0}},
        ]
        Path(f"{stem}-coldstart-{mode}.json").write_text(json.dumps({"starts": starts}))
    return tmp_path


def test_each_target_is_shown_with_its_best_scenario(files: Path) -> None:
    found = rows(files)
    assert found["a step, batch 1, lossless"] == "26.15 (26.00 to 26.30) ms, `all-lossless`"
    assert found["a step, batch 1, fp8"] == "20.00 (20.00 to 20.00) ms, `fp8`"
    assert found["an image's step, batch 8, lossless"] == "25.00 (25.00 to 25.00) ms, `batch-8`"
    assert found["an image's step, batch 8, fp8"] == NOT_MEASURED
    assert found["images a second offline, 20 steps, lossless"] == NOT_MEASURED
    assert "`fp8-offline`" in found["images a second offline, 20 steps, fp8"]
    for name in ("VAE decode", "a request of 30 steps, with its JPEG"):
        assert "`all-lossless`" in found[name]
    # A mark and three polls, not the wait for the device itself.
    assert found["tracing on the model's thread, a step"].startswith(
        "11.0 (10.0 to 12.0) us, 0.04%"
    )
    assert found["warm-up of one shape, cold"] == "60.00 s, `SDXL_COMPILE=default`"
    assert found["warm-up of one shape, from cache"] == "9.000 s, `SDXL_COMPILE=default`"
    assert found["process start to first image, cold"] == "40.00 s, `SDXL_COMPILE=regional`"
    assert "NVIDIA H200" in render(files)


def test_nothing_is_shown_of_another_machine_size_or_model(files: Path) -> None:
    (path,) = files.glob("*-bench.json")
    whole = BenchResult.read(path)
    for other in (
        replace(whole, workload=replace(whole.workload, shape="256x256")),
        replace(whole, workload=replace(whole.workload, model="demo")),
        replace(whole, workload=replace(whole.workload, model="someone/sdxl-turbo")),
        replace(whole, environment=replace(whole.environment, device="cpu")),
    ):
        other.write(path)
        assert set(rows(files).values()) == {NOT_MEASURED}
    path.write_text("no result")
    assert len(rows(files)) == len(TARGETS)
    whole.write(path)
    assert NOT_MEASURED not in rows(files)["a step, batch 1, lossless"]


def test_a_session_of_other_steps_has_no_request_of_thirty(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "REQUEST_STEPS", STEPS + 1)
    found = rows(files)
    assert found["a request of 30 steps, with its JPEG"] == NOT_MEASURED
    assert found["a step, batch 1, lossless"] != NOT_MEASURED


def test_the_sessions_default_model_is_sdxl_base(files: Path) -> None:
    (path,) = files.glob("*-bench.json")
    whole = BenchResult.read(path)
    replace(whole, workload=replace(whole.workload, model=SDXL_BASE)).write(path)
    assert rows(files)["a step, batch 1, lossless"] != NOT_MEASURED
