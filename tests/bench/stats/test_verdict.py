"""The verdict's error rates, and its result for samples that cannot decide."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest

from bench.harness.result_file import BenchResult
from bench.report.table import in_place
from bench.stats import error_rates
from bench.stats.error_rates import (
    NO_CHANGE,
    WORLDS,
    Rates,
    interleaved,
    of_a_real_run,
    of_steps,
    separate,
)
from bench.stats.verdict import (
    by_round,
    judge,
    judge_separate,
    judge_unpaired,
    middle_mean,
    student,
)
from tests.bench.made_up import noisy, request, scenario

ALLOWED = 0.05
TRIALS = 400


def rounds(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


# Error rates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [6, 20])
@pytest.mark.parametrize("world", WORLDS)
def test_equal_programs_are_called_different_at_most_5_times_in_100(world: str, count: int) -> None:
    assert interleaved(world, count, TRIALS, seed=1).false_alarm <= ALLOWED


@pytest.mark.parametrize("world", ["1% noise", "drift"])
def test_a_change_of_3_percent_is_found_9_times_in_10(world: str) -> None:
    rates = interleaved(world, 20, TRIALS, seed=2)
    assert rates.found >= 0.9
    assert rates.wrong_way == 0


def test_separate_runs_need_the_calibration() -> None:
    """Two runs whose speeds differ by 1% are called different every other time without it."""
    assert separate(20, TRIALS, seed=3, calibrated=False).false_alarm > 0.3
    rates = separate(20, TRIALS, seed=3)
    assert rates.false_alarm <= ALLOWED
    assert rates.wrong_way == 0
    assert rates.found > 0.5


def test_steps_are_not_independent_and_medians_of_requests_are() -> None:
    assert of_steps(20, 20, seed=4, pooled=True).false_alarm > 0.3
    assert of_steps(20, TRIALS, seed=4, pooled=False).false_alarm <= ALLOWED


def test_one_commit_against_itself_on_a_machine_that_others_used() -> None:
    """Real processes, while other work made requests take up to three times as long."""
    rates = of_a_real_run(BenchResult.read(NO_CHANGE), 20, TRIALS, seed=5)
    assert rates.false_alarm <= ALLOWED
    assert rates.wrong_way == 0


@pytest.mark.docs
def test_the_documented_rates_are_those_on_record() -> None:
    recorded = [Rates(**row) for row in json.loads(error_rates.OUT.read_text())["rates"]]
    page = (error_rates.OUT.parents[2] / "docs" / "bench.md").read_text()
    assert in_place(page, "error rates")[1] == error_rates.render(recorded)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_error_rates_on_record_are_those_of_this_code() -> None:
    """All worlds, 2,000 pairs each: the same seeds give the same rates again, but for a verdict on
    the edge that another machine's rounding tips."""
    recorded = [Rates(**row) for row in json.loads(error_rates.OUT.read_text())["rates"]]
    again = error_rates.all_rates(recorded[0].trials)
    for now, then in zip(again, recorded, strict=True):
        assert (now.world, now.rounds, now.trials) == (then.world, then.rounds, then.trials)
        for rate in ("false_alarm", "found", "wrong_way"):
            assert getattr(now, rate) == pytest.approx(getattr(then, rate), abs=0.003)


def test_the_error_rates_on_record_are_good_enough() -> None:
    recorded = [Rates(**row) for row in json.loads(error_rates.OUT.read_text())["rates"]]
    worlds = {*WORLDS, "a real run", "separate runs, calibrated"}
    judged = [row for row in recorded if row.world in worlds]
    assert {row.world for row in judged} == worlds
    assert all(row.false_alarm <= ALLOWED and row.trials >= 2000 for row in judged)
    assert all(row.wrong_way <= 0.002 for row in judged)
    chosen_rows = [row for row in judged if row.world in ("1% noise", "drift") and row.rounds == 20]
    assert len(chosen_rows) == 2
    assert all(row.found >= 0.9 and row.wrong_way == 0 for row in chosen_rows)


# Verdicts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "noise", "verdict"),
    [
        (0.95, 0.01, "improved"),
        (1.05, 0.01, "regressed"),
        (1.0, 0.001, "no difference"),
        (1.004, 0.001, "no difference"),
        (1.0, 0.05, "inconclusive"),
    ],
)
def test_verdicts(factor: float, noise: float, verdict: str) -> None:
    base = rounds(noisy(25, 20, noise, seed=5))
    head = rounds(noisy(25 * factor, 20, noise, seed=6))
    found = judge(base, head)
    assert found.verdict == verdict
    assert found.ratio is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.ratio < found.high
    assert found.ratio == pytest.approx(factor, abs=4 * noise / math.sqrt(10))


def test_the_number_of_requests_in_the_reason_decides() -> None:
    base, head = noisy(25, 20, 0.05, seed=7), noisy(25, 20, 0.05, seed=8)
    found = judge(rounds(base), rounds(head))
    assert found.verdict == "inconclusive"
    needed = int(found.reason.split("about ")[1].split()[0])
    assert 100 < needed < 10_000
    many = (noisy(25, needed, 0.05, seed=seed) for seed in (9, 10))
    assert judge(*map(rounds, many)).verdict == "no difference"


def test_a_smaller_smallest_change_finds_smaller_changes() -> None:
    base, head = rounds(noisy(25, 40, 0.002, seed=1)), rounds(noisy(25.125, 40, 0.002, seed=2))
    assert judge(base, head).verdict == "no difference"
    assert judge(base, head, smallest_change=0.002).verdict == "regressed"


def test_swapping_the_sides_inverts_the_verdict() -> None:
    base, head = rounds(noisy(25, 20, 0.01, seed=1)), rounds(noisy(24, 20, 0.01, seed=2))
    one, other = judge(base, head), judge(head, base)
    assert (one.verdict, other.verdict) == ("improved", "regressed")
    assert one.ratio is not None
    assert other.ratio == pytest.approx(1 / one.ratio)


def test_drift_much_larger_than_the_change_cancels_in_pairs() -> None:
    """The machine gets slower by half through the run; base is 3% slower."""
    drift = np.linspace(1, 1.5, 20)
    base = rounds(list(drift * 1.03 * np.array(noisy(25, 20, 0.01, seed=1))))
    head = rounds(list(drift * np.array(noisy(25, 20, 0.01, seed=2))))
    assert judge(base, head).verdict == "improved"
    assert judge_unpaired(list(base.values()), list(head.values())).verdict == "inconclusive"


def test_only_rounds_that_both_sides_have_are_compared() -> None:
    base, head = noisy(25, 30, 0.01, seed=1), noisy(24, 20, 0.01, seed=2)
    found = judge(rounds(base), rounds(head))
    assert found.rounds == 20
    assert found == judge(rounds(base[:20]), rounds(head))


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_too_few_rounds_carry_no_verdict(count: int) -> None:
    base, head = rounds(noisy(25, count, 0.01, seed=1)), rounds(noisy(15, count, 0.01, seed=2))
    found = judge(base, head)
    assert found.verdict == "inconclusive"
    assert found.reason.endswith("and at least 6 are needed")
    assert found.rounds == count
    assert judge_separate(base, head, base, head).verdict == "inconclusive"
    assert judge_unpaired(list(base.values()), list(head.values())).verdict == "inconclusive"


@pytest.mark.parametrize("head", [25.0, 20.0])
def test_samples_without_variance_carry_no_verdict(head: float) -> None:
    found = judge(rounds([25.0] * 20), rounds([head] * 20))
    assert found.verdict == "inconclusive"
    assert "no clock does" in found.reason


def test_the_same_samples_give_the_same_verdict() -> None:
    base, head = rounds(noisy(25, 20, 0.01, seed=1)), rounds(noisy(24, 20, 0.01, seed=2))
    assert judge(base, head) == judge(base, head)


# Separate runs -----------------------------------------------------------------------------------


def test_a_calibration_that_moved_stops_the_judging() -> None:
    base, head = rounds(noisy(25, 20, 0.005, seed=1)), rounds(noisy(20, 20, 0.005, seed=2))
    still = rounds(noisy(50, 20, 0.005, seed=3))
    moved = rounds(noisy(52.5, 20, 0.005, seed=4))
    found = judge_separate(base, head, still, moved)
    assert found.verdict == "not interleaved"
    assert "2% is allowed" in found.reason
    assert judge_separate(base, head, still, still).verdict == "improved"


def test_a_calibration_too_noisy_to_agree_stops_the_judging() -> None:
    base, head = rounds(noisy(25, 20, 0.005, seed=1)), rounds(noisy(20, 20, 0.005, seed=2))
    noise = [rounds(noisy(50, 20, 0.1, seed=seed)) for seed in (3, 4)]
    assert judge_separate(base, head, *noise).verdict == "not interleaved"


# Pieces ------------------------------------------------------------------------------------------


def test_a_round_counts_once_however_many_requests_it_had() -> None:
    one = scenario("a", [25.0, 26.0])
    more = [request(0, 35.0), request(0, 27.0), *one.requests]
    assert by_round(scenario("a", [1.0], requests=tuple(more)), "step") == {0: 27.0, 1: 26.0}
    assert by_round(one, "vae_decode") == {0: 37.5, 1: 39.0}
    assert by_round(one, "upload") == {}


def test_the_middle_half_ignores_what_lies_outside() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 1000.0])
    assert middle_mean(values) == statistics.mean([3, 4, 5, 6])


@pytest.mark.parametrize(
    ("freedom", "probability", "quantile"),
    [
        (1, 0.975, 12.7062),
        (2, 0.975, 4.30265),
        (3, 0.975, 3.18245),
        (4, 0.995, 4.60409),
        (10, 0.975, 2.22814),
        (11, 0.99, 2.71808),
        (30, 0.975, 2.04227),
        (5, 0.9995, 6.86883),
        (100_000, 0.975, 1.95998),
    ],
)
def test_student(freedom: int, probability: float, quantile: float) -> None:
    """Against printed tables."""
    assert student(probability, freedom) == pytest.approx(quantile, abs=1e-4)
