"""The bootstrap and its intervals, on values whose truth is known."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest

from bench.stats.intervals import (
    FEWEST_RESAMPLES,
    MOST_DRAWN,
    bootstrap,
    interval,
    ratio_interval,
)


def test_a_ratio_lies_in_its_interval() -> None:
    generator = random.Random(1)
    base = [100 + generator.gauss(0, 1) for _ in range(20)]
    head = [90 + generator.gauss(0, 1) for _ in range(20)]
    found = ratio_interval(base, head)
    assert found.low <= found.point <= found.high
    assert found.low < 0.9 < found.high < 1
    assert found.point == statistics.median(head) / statistics.median(base)


def test_no_change_is_not_called_one() -> None:
    generator = random.Random(2)
    base, head = ([50 + generator.gauss(0, 0.5) for _ in range(20)] for _ in range(2))
    found = ratio_interval(base, head)
    assert found.low < 1 < found.high


def test_unpaired_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio_interval([1.0], [1.0, 2.0])


def test_rounds_are_resampled_in_pairs() -> None:
    """What doubles a whole round cancels in its ratio."""
    base = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    found = ratio_interval(base, [2 * value for value in base])
    assert found.low == found.point == found.high == 2


def test_the_bootstrap_of_a_mean_has_its_standard_error() -> None:
    values = np.random.default_rng(3).normal(10, 2, 100)
    error = bootstrap(values, lambda drawn: np.asarray(drawn.mean(axis=1)), 2_000).std()
    assert error == pytest.approx(values.std() / 10, rel=0.05)


def test_very_many_values_are_resampled_less_often() -> None:
    def count(drawn: np.ndarray) -> np.ndarray:
        return np.full(len(drawn), drawn.shape[1])

    assert len(bootstrap([1.0] * 10, count, 3_000)) == 3_000
    assert len(bootstrap([1.0] * 1_000, count, 3_000)) == MOST_DRAWN // 1_000
    assert len(bootstrap([1.0] * 10_000, count, 3_000)) == FEWEST_RESAMPLES


@pytest.mark.parametrize("of", ["mean", "median"])
def test_an_interval_holds_the_truth_about_95_times_in_100(of: str) -> None:
    generator = np.random.default_rng(4)
    samples = [list(generator.normal(5, 1, 60)) for _ in range(300)]
    found = [interval(values, of) for values in samples]  # type: ignore[arg-type]
    held = sum(one.low <= 5 <= one.high for one in found) / len(found)
    assert 0.9 <= held <= 0.99
