"""Is head faster than base, by how much, and is the difference real?

**One figure a request.** The steps of one request share its clock, its temperature and its
neighbours, so they are not independent. Taken together as one sample they make an interval that is
far too narrow: with as much noise common to a request's steps as there is in each step, half of all
comparisons of two equal programs report a change. The median of a request's steady steps is one
independent figure, and then 3 in 100 such comparisons report a change.
`python -m bench.stats.error_rates` measures both.

**Rounds in pairs.** Where base and head were interleaved, each round gives one ratio. Whatever
lasts longer than a round (drift, another process that comes and goes) is in both of its halves and
cancels. The estimate is the mean of the middle half of the rounds' log ratios, so that a round
disturbed on one side only cannot move it far. Its standard error is bootstrapped over rounds. The
interval is Student's, with the rounds in the middle half as degrees of freedom, because percentiles
of so few resampled rounds would be too narrow.

**Two conditions.** `improved` and `regressed`: the interval excludes 1, and the estimate is at
least the smallest change that matters. `no difference`: the whole interval is within that change.
Otherwise `inconclusive`, with the number of requests that would decide.

**Separate runs** are of two states of the machine, and neither run knows the other's. They are
judged only if both timed a calibration scenario, which runs no code of this project, in the same
rounds, and only if the calibration agrees between the runs. Each side is then taken relative to the
calibration, whose uncertainty is added. Otherwise the verdict is `not interleaved`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bench.harness.result_file import MeasuredScenario, RequestSample
from bench.stats.intervals import bootstrap

Verdict = Literal[
    "improved", "regressed", "no difference", "inconclusive", "not interleaved", "not comparable"
]

SMALLEST_CHANGE = 0.01
ERROR_RATE = 0.05
"""How often two equal programs may be called different."""
FEWEST_ROUNDS = 6
"""Of five rounds that all point one way, one in sixteen does so by chance."""
CALIBRATION_TOLERANCE = 2.0
"""How far the calibration may differ between two runs, in smallest changes. Beyond that, the
difference between the runs could be larger than the change that is looked for."""
RESAMPLES = 2_000
"""Enough for a standard error within 2% of itself."""

Rounds = Mapping[int, float]
"""One figure for each round in which something was measured."""


@dataclass(frozen=True)
class Judgement:
    """The verdict on one quantity of one scenario; ratios are head over base."""

    verdict: Verdict
    reason: str = ""
    """Why the verdict is not more definite; empty if it is."""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    """The smaller of the two sides' numbers of independent figures."""
    interleaved: bool = True


# Figures -----------------------------------------------------------------------------------------


def figure(request: RequestSample, quantity: str) -> float | None:
    """`step`, `request`, `cpu` or a stage by name, in milliseconds; None if it was not timed."""
    if quantity == "step":
        return request.step_ms
    if quantity == "request":
        return request.total_ms
    if quantity == "cpu":
        return request.cpu_ms
    return request.stages_ms.get(quantity)


def by_round(scenario: MeasuredScenario, quantity: str) -> dict[int, float]:
    """The median over each round's requests, in milliseconds; a figure of 0 counts as not timed."""
    values: dict[int, list[float]] = {}
    for request in scenario.requests:
        value = figure(request, quantity)
        if value:
            values.setdefault(request.round, []).append(value)
    return {index: statistics.median(of_round) for index, of_round in values.items()}


# Judging -----------------------------------------------------------------------------------------


def judge(
    base: Rounds,
    head: Rounds,
    *,
    smallest_change: float = SMALLEST_CHANGE,
    error_rate: float = ERROR_RATE,
) -> Judgement:
    """Judge interleaved figures, of the rounds that both sides have. Smaller is better."""
    shared = sorted(base.keys() & head.keys())
    if len(shared) < FEWEST_ROUNDS:
        return _too_few(len(shared), interleaved=True)
    estimate = _estimate(_log_ratios(base, head, shared))
    return _judge(estimate, smallest_change, error_rate, interleaved=True)


def judge_separate(
    base: Rounds,
    head: Rounds,
    base_calibration: Rounds,
    head_calibration: Rounds,
    *,
    smallest_change: float = SMALLEST_CHANGE,
    error_rate: float = ERROR_RATE,
) -> Judgement:
    """Judge figures of two runs, each relative to the calibration in the rounds of its own run."""
    shared_base = sorted(base.keys() & base_calibration.keys())
    shared_head = sorted(head.keys() & head_calibration.keys())
    fewest = min(len(shared_base), len(shared_head))
    if fewest < FEWEST_ROUNDS:
        return _too_few(fewest, interleaved=False)

    machine = _difference(
        _estimate(_logs(head_calibration, shared_head)),
        _estimate(_logs(base_calibration, shared_base)),
    )
    tolerance = CALIBRATION_TOLERANCE * smallest_change
    low, high = machine.interval(error_rate)
    if max(-low, high) > math.log1p(tolerance):
        return Judgement(
            "not interleaved",
            f"the calibration, which runs no code of this project, differs by {_percent(low)} to "
            f"{_percent(high)} between the two runs, and {100 * tolerance:.3g}% is allowed: "
            f"measure both in one run with --base",
            rounds=fewest,
            interleaved=False,
        )
    estimate = _difference(
        _estimate(_log_ratios(head_calibration, head, shared_head)),
        _estimate(_log_ratios(base_calibration, base, shared_base)),
    )
    return _judge(estimate, smallest_change, error_rate, interleaved=False)


def judge_unpaired(
    base: Sequence[float],
    head: Sequence[float],
    *,
    smallest_change: float = SMALLEST_CHANGE,
    error_rate: float = ERROR_RATE,
) -> Judgement:
    """Judge two samples as if one machine in one state had given both.

    Only for `bench.stats.error_rates`, which shows how often that errs.
    """
    fewest = min(len(base), len(head))
    if fewest < FEWEST_ROUNDS:
        return _too_few(fewest, interleaved=False)
    estimate = _difference(_estimate(np.log(head)), _estimate(np.log(base)))
    return _judge(estimate, smallest_change, error_rate, interleaved=False)


def _too_few(rounds: int, *, interleaved: bool) -> Judgement:
    return Judgement(
        "inconclusive",
        f"{rounds} round{'' if rounds == 1 else 's'}, and at least {FEWEST_ROUNDS} are needed",
        rounds=rounds,
        interleaved=interleaved,
    )


@dataclass(frozen=True)
class _Estimate:
    """A log ratio or a log duration, and its standard error."""

    value: float
    error: float
    freedom: int
    """Degrees of freedom."""
    rounds: int

    def interval(self, error_rate: float) -> tuple[float, float]:
        reach = student(1 - error_rate / 2, self.freedom) * self.error
        return self.value - reach, self.value + reach


def _judge(
    estimate: _Estimate, smallest_change: float, error_rate: float, *, interleaved: bool
) -> Judgement:
    low, high = estimate.interval(error_rate)
    matters = math.log1p(smallest_change)
    verdict: Verdict
    reason = ""
    if estimate.error == 0:
        verdict, reason = "inconclusive", "every round gave the same figure, which no clock does"
    elif low > 0 and estimate.value >= matters:
        verdict = "regressed"
    elif high < 0 and estimate.value <= -matters:
        verdict = "improved"
    elif -matters < low and high < matters:
        verdict = "no difference"
    else:
        verdict = "inconclusive"
        # The error falls with the root of the number of rounds. An interval as wide as the smallest
        # change decides, unless the true change is the smallest change itself.
        needed = math.ceil(estimate.rounds * ((high - low) / matters) ** 2)
        reason = (
            f"{_percent(low)} to {_percent(high)}: about "
            f"{max(needed, estimate.rounds + 1)} requests a side would decide"
        )
    return Judgement(
        verdict,
        reason,
        ratio=math.exp(estimate.value),
        low=math.exp(low),
        high=math.exp(high),
        rounds=estimate.rounds,
        interleaved=interleaved,
    )


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f}%"


# Statistics --------------------------------------------------------------------------------------


def _logs(figures: Rounds, rounds: Iterable[int]) -> NDArray[np.float64]:
    return np.log([figures[index] for index in rounds])


def _log_ratios(base: Rounds, head: Rounds, rounds: list[int]) -> NDArray[np.float64]:
    return _logs(head, rounds) - _logs(base, rounds)


def middle_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of the middle half along the last axis."""
    cut = values.shape[-1] // 4
    middle = np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut]
    return np.asarray(middle.mean(axis=-1))


def _estimate(values: NDArray[np.float64]) -> _Estimate:
    """The middle mean of at least FEWEST_ROUNDS independent values."""
    count = len(values)
    # Resamples vary around the sample, which is itself one of many: their spread is too small by
    # this factor.
    error = float(bootstrap(values, middle_mean, RESAMPLES).std()) * math.sqrt(count / (count - 1))
    spread = float(np.ptp(values))
    return _Estimate(
        value=float(middle_mean(values)),
        error=error if spread > _ROUNDING else 0.0,
        freedom=count - 2 * (count // 4) - 1,
        rounds=count,
    )


_ROUNDING = 1e-12
"""The logarithms of equal figures differ by no more than this."""


def _difference(head: _Estimate, base: _Estimate) -> _Estimate:
    """Head minus base, two independent estimates, with Welch's degrees of freedom."""
    head_share, base_share = head.error**2, base.error**2
    total = head_share + base_share
    freedom = min(head.freedom, base.freedom)
    if total > 0:
        welch = total**2 / (head_share**2 / head.freedom + base_share**2 / base.freedom)
        freedom = max(freedom, math.floor(welch))
    return _Estimate(
        head.value - base.value, math.sqrt(total), freedom, min(head.rounds, base.rounds)
    )


def student(probability: float, freedom: int) -> float:
    """The quantile of Student's distribution at a probability above one half."""
    low, high = 0.0, 2.0
    while _student_within(high, freedom) < 2 * probability - 1:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        if _student_within(middle, freedom) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _student_within(t: float, freedom: int) -> float:
    """The probability between -t and t.

    A finite series for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
