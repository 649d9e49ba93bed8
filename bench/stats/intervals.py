"""The bootstrap, and 95% intervals made with it.

Everything is seeded: the same values give the same interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

PERCENTILE_RESAMPLES = 4_000
"""The ends of an interval need more resamples than a standard error."""
MOST_DRAWN = 2_000_000
"""Values that one bootstrap draws, where that still makes FEWEST_RESAMPLES."""
FEWEST_RESAMPLES = 400

Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95% interval."""

    point: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.point:.3f} ({self.low:.3f} to {self.high:.3f})"


def bootstrap(values: ArrayLike, statistic: Statistic, resamples: int) -> NDArray[np.float64]:
    """The statistic of resamples drawn with replacement.

    Args:
        values: independent values, (count,), or rows of values that belong together,
            (count, columns).
        statistic: reduces axis 1 of all resamples, (resamples, count) or
            (resamples, count, columns), to one figure each.
        resamples: how many; fewer where there are very many values.
    """
    array = np.asarray(values, dtype=float)
    count = len(array)
    resamples = min(resamples, max(FEWEST_RESAMPLES, MOST_DRAWN // count))
    return statistic(array[_indices(count, resamples)])


@lru_cache(maxsize=8)
def _indices(count: int, resamples: int) -> NDArray[np.intp]:
    return np.random.default_rng(0).integers(0, count, (resamples, count), dtype=np.intp)


def interval(values: Sequence[float], of: Literal["mean", "median"] = "median") -> Interval:
    """The mean or median of independent values. Raises ValueError if there are none."""
    if not values:
        raise ValueError("there is no interval of no values")
    middle = np.median if of == "median" else np.mean
    return _percentiles(np.asarray(values, dtype=float), lambda drawn: middle(drawn, axis=1))


def ratio_interval(base: Sequence[float], head: Sequence[float]) -> Interval:
    """The ratio of medians head / base; rounds are resampled in pairs.

    Raises:
        ValueError: the two differ in length.
    """

    def ratio(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        medians = np.median(drawn, axis=1)
        return np.asarray(medians[:, 1] / medians[:, 0])

    return _percentiles(np.array(list(zip(base, head, strict=True))), ratio)


def _percentiles(values: NDArray[np.float64], statistic: Statistic) -> Interval:
    """The statistic of the values, and the middle 95% of it over resamples."""
    estimates = bootstrap(values, statistic, PERCENTILE_RESAMPLES)
    low, high = np.quantile(estimates, [0.025, 0.975])
    return Interval(float(statistic(values[None])[0]), float(low), float(high))
