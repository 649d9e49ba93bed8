from __future__ import annotations

import random

import pytest

from bench.table import README, in_place, ratio_interval, tables


@pytest.mark.parametrize("name", ["gpu table", "cpu table"])
def test_the_readme_shows_what_the_results_say(name: str) -> None:
    assert in_place(README.read_text(), name)[1] == tables()[name]


def test_a_ratio_lies_in_its_interval() -> None:
    generator = random.Random(1)
    base = [100 + generator.gauss(0, 1) for _ in range(20)]
    head = [90 + generator.gauss(0, 1) for _ in range(20)]
    point, low, high = ratio_interval(base, head)
    assert low <= point <= high
    assert low < 0.9 < high
    assert high < 1


def test_no_change_is_not_called_one() -> None:
    generator = random.Random(2)
    samples = [[50 + generator.gauss(0, 0.5) for _ in range(20)] for _ in range(2)]
    _, low, high = ratio_interval(*samples)
    assert low < 1 < high


def test_unpaired_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs"):
        ratio_interval([1.0], [1.0, 2.0])
