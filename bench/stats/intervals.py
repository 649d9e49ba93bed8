"""Bootstrap intervals of one sample's middle, seeded: the same samples, the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the 95% interval around it."""

    point: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.point:.3f} ({self.low:.3f} to {self.high:.3f})"


def interval(values: Sequence[float], of: Literal["mean", "median"] = "median") -> Interval:
    """Of independent values; at least one."""
    if not values:
        raise ValueError("there is no interval of no values")
    sample = np.asarray(values, dtype=float)
    middle = np.median if of == "median" else np.mean
    drawn = np.random.default_rng(0).integers(0, len(sample), (RESAMPLES, len(sample)))
    low, high = np.quantile(middle(sample[drawn], axis=1), [0.025, 0.975])
    return Interval(float(middle(sample)), float(low), float(high))
