"""The verdicts of `bench overload` and `bench soak`, on made-up outcomes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.endurance.growth import Held
from bench.endurance.overload import (
    LEAST_BUSY,
    WAITING,
    Answered,
    Overload,
    Phase,
    busy_share,
    full_queue_seconds,
    goodput,
)
from bench.endurance.soak import KINDS, Soak
from bench.errors import BenchError

PHASE = Phase(
    4.0, 12.0, {"200": 90, "429": 300, "504": 9}, 3.0, 4.0, 6.0, 0.98, 50.0, 600.0, 12, 14
)
PHASES = (
    PHASE,
    replace(PHASE, multiple=0.5, rate=1.5, goodput=1.5, busy=None),
    replace(PHASE, multiple=1.5, rate=4.5, goodput=3.1),
    PHASE,
)


def problems(*phases: Phase) -> list[str]:
    return Overload(1, 3.0, phases).problems()


def test_a_server_that_holds_has_no_problems() -> None:
    assert not problems(*PHASES)


@pytest.mark.parametrize(
    "changed",
    [
        replace(PHASE, outcomes={"200": 1, "500": 1}),
        replace(PHASE, outcomes={"200": 1, "429 without Retry-After": 1}),
        replace(PHASE, outcomes={"200": 1, "ReadTimeout": 1}),
        replace(PHASE, p99_seconds=6.1),
        replace(PHASE, goodput=2.9),
        replace(PHASE, busy=0.96),
        replace(PHASE, step_ms=51.1),
        replace(PHASE, step_ms=48.9),
        replace(PHASE, memory_mib=613.0),
        replace(PHASE, threads=13),
    ],
)
def test_each_thing_that_does_not_hold_is_a_problem(changed: Phase) -> None:
    assert len(problems(*PHASES[:-1], changed)) == 1


def test_memory_and_threads_are_those_after_the_first_phase_throughout() -> None:
    for grown in (replace(PHASE, memory_mib=613.0), replace(PHASE, threads=13)):
        assert len(problems(PHASE, grown, PHASE)) == 1
    assert not problems(replace(PHASE, memory_mib=613.0, threads=13), PHASE, PHASE)


@pytest.mark.parametrize(("batch", "images"), [(1, 17), (8, 24)])
def test_a_full_queue_is_the_run_in_progress_and_those_that_wait(batch: int, images: int) -> None:
    assert WAITING == 16
    drawn = answers(0.5, 0.0, batch=1)
    assert full_queue_seconds(drawn, batch) == pytest.approx(images * 0.5 / LEAST_BUSY, abs=1e-4)


def test_a_full_queue_takes_as_long_as_its_slowest_row_of_runs() -> None:
    runs = answers(0.5, 0.0, batch=4)
    slow = replace(runs[-1], run_ms=(0.1, 1000.0, 0.1))
    changed = [replace(each, run_ms=slow.run_ms) if each.ended > 11.9 else each for each in runs]
    # 24 images are six runs of four, and the last one takes a second.
    assert full_queue_seconds(runs, 8) == pytest.approx(6 * 0.5 / LEAST_BUSY, abs=1e-3)
    assert full_queue_seconds(changed, 8) == pytest.approx((5 * 0.5 + 1) / LEAST_BUSY, abs=1e-3)


def answers(run_seconds: float, gap_seconds: float, batch: int = 2) -> list[Answered]:
    """Runs one after the other, with a gap; both answers of a run have its times."""
    made = []
    for run in range(20):
        end = 2.0 + (run + 1) * (run_seconds + gap_seconds)
        stages = (0.1, 1000 * run_seconds - 0.2 + run * 1e-6, 0.1)
        made += [Answered(0.0, end + late / 1000, "200", stages) for late in range(batch)]
    return made


def test_the_busy_share_counts_each_run_once_and_the_gaps_between_them() -> None:
    assert busy_share(answers(0.5, 0.0), 30) == pytest.approx(1, abs=1e-4)
    assert busy_share(answers(0.5, 0.05), 30) == pytest.approx(0.5 / 0.55, abs=1e-4)


def test_goodput_counts_whole_runs_and_the_gaps_between_them() -> None:
    assert goodput(answers(0.5, 0.0), 30) == pytest.approx(4)
    assert goodput(answers(0.5, 0.05, batch=8), 30) == pytest.approx(8 / 0.55)
    # A run that ends a moment before or after the last arrival changes nothing.
    assert goodput(answers(0.5, 0.0), 9.99) == pytest.approx(goodput(answers(0.5, 0.0), 10.01))


def test_a_gap_at_the_end_of_a_phase_counts() -> None:
    stalled = [
        replace(each, ended=each.ended + 4) if each.ended > 9.9 else each
        for each in answers(0.5, 0.0)
    ]
    # From 2.5 to 9.5 fourteen runs after the first, and one that should have ended at 10.
    assert goodput(stalled, 12) == pytest.approx(2 * 15 / 11.5)
    assert busy_share(stalled, 12) == pytest.approx(0.5 * 15 / 11.5, abs=1e-3)


def test_a_phase_of_too_few_runs_is_refused() -> None:
    with pytest.raises(BenchError):
        goodput(answers(0.5, 0.0), 2.6)


def soak(**changed: object) -> Soak:
    samples = [Held(number, 600.0, 13, 17, 2000) for number in range(0, 1000, 10)]
    return replace(Soak(1000, 8, {}, {"text": {"200": 9}}, samples), **changed)  # type: ignore[arg-type]


def test_a_soak_holds_without_wrong_answers_growth_or_anything_left() -> None:
    assert soak().holds
    assert not soak(outcomes={"text": {"200": 9, "500": 1}}).holds
    assert not soak(in_flight=1.0).holds
    assert not soak(tracebacks=1).holds
    leaking = [replace(each, files=17 + each.requests // 100) for each in soak().samples]
    assert not soak(samples=leaking).holds


def test_no_kind_may_be_answered_with_a_server_error() -> None:
    allowed = {outcome for kind in KINDS.values() for outcome in kind.allowed}
    assert {each for each in allowed if each.startswith("5")} == {"504"}
