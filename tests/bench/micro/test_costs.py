"""Telemetry overhead, cold starts, our own pieces, and throughput of the documented example."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.micro import harness_check
from bench.service import overhead
from bench.service.coldstart import cache_settings
from bench.service.overhead import Samples
from bench.stats.intervals import interval


def test_an_interval_holds_its_point_and_is_the_same_each_time() -> None:
    values = [10.0 + 0.1 * index for index in range(40)]
    found = interval(values)
    assert found.low < found.point < found.high
    assert found == interval(values)
    assert interval(values, "mean").point == pytest.approx(sum(values) / 40)
    with pytest.raises(ValueError, match="no values"):
        interval([])


@pytest.mark.timing
def test_the_small_pieces_are_each_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "micro.json"
    assert main(["micro", "--series", "5", "--device", "cpu", "--out", str(out)]) == 0
    costs = {cost["name"]: cost for cost in json.loads(out.read_text())["costs"]}
    assert list(costs) == [
        "mark",
        "step",
        "poll",
        "resolve",
        "record",
        "emit",
        "export",
        "scrape1",
        "scrape9",
        "tokens",
        "enter",
        "outside",
        "turn",
        "jpeg",
        "jpegnoise",
        "png",
        "webp",
        "uri",
        "body",
        "answer",
    ]
    for cost in costs.values():
        assert 0 < cost["low_us"] <= cost["median_us"] <= cost["high_us"]
    # A mark on the model's thread is far cheaper than the telemetry on other threads.
    assert json.loads(out.read_text())["clock_calls_a_step"] == {"mark": 1, "poll": 3, "wait": 1}
    assert costs["mark"]["median_us"] < costs["step"]["median_us"] < costs["record"]["median_us"]
    assert costs["mark"]["median_us"] < costs["record"]["median_us"] < costs["scrape1"]["median_us"]
    # The response contains the picture unescaped: scanning it takes as long as encoding it.
    assert costs["body"]["median_us"] < costs["uri"]["median_us"] < costs["answer"]["median_us"]
    # The model's thread does nothing but its bookkeeping between two requests.
    assert costs["turn"]["median_us"] < 2000
    assert "one mark of the host clock" in capsys.readouterr().out


def samples(on_ms: float, on_cpu_ms: float) -> Samples:
    spread = [0.1 * (index % 7) for index in range(40)]
    return Samples(
        wall_ms={
            "off": [100 + s for s in spread],
            "sampled out": [100 + s for s in spread],
            "on": [on_ms + s for s in spread],
        },
        cpu_ms_a_request={
            "off": [90.0, 91.0],
            "sampled out": [90.0, 91.0],
            "on": [90.0 + on_cpu_ms, 91.0 + on_cpu_ms],
        },
        spans_received=100,
        steps=20,
        model="demo",
        model_threads=1,
        scraped_wall_ms={"alone": [100.0] * 20, "scraped": [103.0] * 20},
    )


def test_the_overhead_is_a_ratio_and_a_difference() -> None:
    figures = overhead.summarise(samples(on_ms=102, on_cpu_ms=1.5))
    assert figures["on"]["wall_ratio"]["point"] == pytest.approx(1.02, abs=0.001)
    assert figures["on"]["cpu_ms_more_a_request"]["point"] == pytest.approx(1.5)
    assert figures["sampled out"]["wall_ratio"]["point"] == 1
    assert figures["scraped every second"]["wall_ratio"]["point"] == pytest.approx(1.03)
    assert any("CPU +1.50 ms" in line for line in overhead.report(samples(102, 1.5), figures))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["overhead", "--pairs", "1"], "--pairs and --blocks: 2 and more"),
        (["coldstart", "--set", "NONSENSE"], "--set takes NAME=VALUE"),
        (["coldstart", "--repeats", "0"], "--repeats and --steps: 1 and more"),
        (["micro", "--series", "0"], "--series: 1 and more"),
        (["micro", "--device", "cuda:99"], "CUDA"),
        (["bare", "--scenario", "batch-2"], "no batch is allowed"),
        (["bare", "--scenario", "graph", "--device", "cpu"], "graph cannot run here"),
        (["kernels", "--scenario", "nothing"], "there is no scenario 'nothing'"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_cold_start_has_caches_of_its_own(tmp_path: Path) -> None:
    assert all(str(tmp_path) in value for value in cache_settings(tmp_path).values())


@pytest.mark.slow
def test_reported_and_minimal_times_are_compared_on_one_loaded_model(tmp_path: Path) -> None:
    out = tmp_path / "harness_check.json"
    command = ["bare", "--model", "demo", "--device", "cpu", "--steps", "2", "--pairs", "4"]
    assert main([*command, "--out", str(out)]) in (0, 1)  # a busy machine may differ by more
    found = {row["scenario"]: row for row in json.loads(out.read_text())}
    assert found["diffusers"]["of"] == "the whole request"
    assert found["default"]["of"] == "the denoising steps"
    assert all(0.5 < row["ratio"] < 2 for row in found.values())


def test_a_certain_difference_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off_by(ratio: float) -> object:
        return lambda scenario, *_: [
            harness_check.ReportedRatio(scenario.name, "", ratio, ratio, ratio, 9)
        ]

    for ratio, status in ((1.004, 0), (0.994, 1), (1.006, 1)):
        monkeypatch.setattr(harness_check, "compare", off_by(ratio))
        assert main(["bare", "--device", "cpu", "--model", "demo"]) == status
    assert "1.0060" in capsys.readouterr().out


# Real servers ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.e2e
def test_what_is_reported_is_what_a_minimal_loop_takes(tmp_path: Path) -> None:
    out = tmp_path / "harness_check.json"
    command = ["bare", "--model", "demo", "--device", "cpu", "--pairs", "60"]
    # On a busy machine the interval is wide; what may not be is a difference that is certain.
    assert main([*command, "--out", str(out)]) == 0
    for row in json.loads(out.read_text()):
        assert row["low"] <= 1 + harness_check.ALLOWED
        assert row["high"] >= 1 - harness_check.ALLOWED


@pytest.mark.slow
@pytest.mark.e2e
def test_the_overhead_of_real_servers(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    command = ["overhead", "--pairs", "20", "--blocks", "2", "--steps", "2", "--scrape"]
    assert main([*command, "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    # The first 5, 20 in rounds, 20 in blocks and 20 around the scraper are each a root, nine parts
    # and two steps; no other request has telemetry.
    assert 65 * 12 <= written["spans_received"] <= 65 * 12 + 20
    assert {len(values) for values in written["wall_ms"].values()} == {20}
    assert {len(values) for values in written["cpu_ms_a_request"].values()} == {2}
    assert all(cpu > 0 for values in written["cpu_ms_a_request"].values() for cpu in values)
    assert len(written["scraped_wall_ms"]["scraped"]) == 10


@pytest.mark.slow
@pytest.mark.e2e
def test_a_cold_start_and_one_from_cache(tmp_path: Path) -> None:
    out = tmp_path / "starts.json"
    assert main(["coldstart", "--steps", "2", "--out", str(out)]) == 0
    starts = json.loads(out.read_text())["starts"]
    assert [start["case"] for start in starts] == ["cold", "from cache"]
    for start in starts:
        assert 0 < start["answers_s"] < start["ready_s"] < start["first_image_s"]
        assert start["phases_ms"]["load_model"] > 0
