"""`python -m bench capacity`: from a result file to a number of replicas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.capacity.service_times import read
from bench.capacity.trace_volume import trace_volume
from tests.bench.made_up import result, scenario
from tests.support.processes import ROOT

H200 = ROOT / "bench" / "results" / "h200-2026-11-22-requests.json"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Runs of one image take about 90 ms, of four 180 ms."""
    file = tmp_path / "made-up.json"
    result(
        scenario("default", [10.0] * 12),
        scenario("batch-4", [20.0] * 12, images=4),
        scenario("eager", [50.0] * 12),
    ).write(file)
    return file


def plan(*arguments: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["capacity", *map(str, arguments), "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_more_traffic_and_less_time_need_more_replicas(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def enough(rate: float, p95: float, *more: object) -> int:
        arguments = ("--rate", rate, "--p95", p95, "--results", results, "--requests", 1000, *more)
        found = plan(*arguments, capsys=capsys)
        rows = {row["replicas"]: row for row in found["tried"]}
        count = int(found["enough"])
        assert rows[count]["p95"] <= p95
        one = found["images_per_second"]
        assert rate <= 0.9 * count * one
        fewer = rows.get(count - 1)
        assert fewer is None or fewer["p95"] > p95 or rate > 0.9 * (count - 1) * one
        return count

    relaxed = enough(40, 0.5)
    assert relaxed >= 4  # 40 a second at 90 ms keep 3.6 busy
    assert enough(80, 0.5) > relaxed
    assert enough(40, 0.12) > relaxed
    assert enough(40, 0.5, "--max-batch", 4) < relaxed


def test_cost_traces_and_cold_start_follow_from_the_figures(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(
        "--rate", 40, "--p95", 0.5, "--results", results, "--price-per-hour", 3.6,
        "--sample-rate", 0.1, "--cold-start", 60, "--rise", 2, "--requests", 1000, capsys=capsys,
    )  # fmt: skip
    row = next(row for row in found["tried"] if row["replicas"] == found["enough"])
    # A replica costs 0.1 cents a second, and 40 images come in it.
    assert row["cost_per_thousand"] == pytest.approx(0.001 * row["replicas"] / 40 * 1000)
    steps = 6  # of the made-up workload
    assert found["spans_per_request"] == 10 + steps
    assert found["spans_per_second"] == pytest.approx(0.1 * 40 * (10 + steps))
    cold = found["cold_start"]
    drawn = found["enough"] * found["images_per_second"]
    assert cold["excess"] == pytest.approx(60 * (80 - drawn))
    assert cold["refused"] == pytest.approx(cold["excess"] - 32 * found["enough"])
    assert cold["replicas_at_once"] > found["enough"]


def test_numbers_of_replicas_can_be_named(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(
        "--rate", 40, "--p95", 0.5, "--results", results, "--replicas", 2, 6,
        "--price-per-hour", 3.6, capsys=capsys,
    )  # fmt: skip
    # Two cannot draw 40 a second.
    overloaded, calm = found["tried"]
    assert (overloaded["replicas"], calm["replicas"]) == (2, 6)
    assert (overloaded["overloaded"], calm["overloaded"]) == (True, False)
    assert overloaded["refused"] > 0.3
    assert overloaded["mdc_p95"] is overloaded["cost_per_thousand"] is None
    assert calm["refused"] == 0
    assert found["enough"] is None


def test_other_scenarios_can_be_named(results: Path) -> None:
    assert set(read(results).runs) == {1, 4}
    assert read(results, ["eager"]).mean_run() > 4 * read(results).mean_run()


def test_the_h200s_recorded_requests_are_read() -> None:
    times = read(H200)
    # docs/performance.md: a request of 30 steps took 1.00 s.
    assert times.steps == 30
    assert times.mean_run() + times.outside.mean() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--p95", "0.01"],  # shorter than a request
        ["--p95", "1", "--max-batch", "8"],  # not measured
        ["--p95", "1", "--scenario", "unknown"],
        ["--p95", "1", "--scenario", "default", "eager"],  # both of one image
        ["--p95", "1", "--scenario", "batch-4"],  # none of one image
        ["--p95", "1", "--replicas", "2", "--cold-start", "60"],  # for the number that is enough
    ],
)
def test_what_cannot_be_answered_is_refused(
    wrong: list[str], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["capacity", "--rate", "4", "--results", str(results), *wrong]) == 2
    assert capsys.readouterr().err


def test_a_file_without_times_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("a.json", "[]"), ("b.json", "{}"), ("c.json", "no json")):
        (tmp_path / name).write_text(content)
        arguments = ["--rate", "1", "--p95", "9", "--results", str(tmp_path / name)]
        assert main(["capacity", *arguments]) == 2
        assert capsys.readouterr().err


def test_the_trace_is_that_of_a_request() -> None:
    few, many = trace_volume(4), trace_volume(30)
    assert (few.spans, many.spans) == (14, 40)
    assert few.spans_without_steps == many.spans_without_steps == 10
    # The ids, two times and a name alone are some 80 bytes.
    assert 100 < many.span_bytes < 1000
