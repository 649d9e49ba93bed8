"""How every family observes values: closed label values, and no value that would spoil a sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

from prometheus_client import Counter, Gauge, Histogram

Exemplar = dict[str, str] | None
CountFault = Callable[[str], None]
"""Counts one of `catalogue.FAULTS`."""

Labelled = TypeVar("Labelled", Counter, Gauge, Histogram)


def labelled(metric: Labelled, values: Iterable[str]) -> dict[str, Labelled]:
    """Create a metric's series, one for each value of its only label."""
    return {value: metric.labels(value) for value in values}


def observe(
    histogram: Histogram, value: float, exemplar: Exemplar, count_fault: CountFault
) -> None:
    """Observe a value, or count a fault if a sum cannot hold it."""
    if is_countable(value, count_fault):
        histogram.observe(value, exemplar)


def is_countable(value: float, count_fault: CountFault) -> bool:
    """Whether a value may be added to a sum, which one NaN or negative value would ruin."""
    if 0 <= value < math.inf:
        return True
    count_fault("negative_value" if value < 0 else "not_a_number")
    return False
