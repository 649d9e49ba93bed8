"""Whether what a process holds grows: slope, interval and verdict, on made-up samples."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.endurance.growth import BLOCKS, Held, growth, held, slope

FLAT = Held(0, 600.0, 13, 17, 2000)


def samples(per_thousand: float, noise: float = 0.3, warm: float = 40.0) -> list[Held]:
    """5,000 requests of a process whose memory grows so many MiB in 1,000 of them, after it has
    taken `warm` MiB in the first tenth."""
    draw = random.Random(0)
    made = []
    for number in range(0, 5000, 50):
        filled = warm * min(1.0, number / 500)
        memory = 600 + filled + per_thousand * number / 1000 + draw.gauss(0, noise)
        made.append(replace(FLAT, requests=number, memory_mib=memory))
    return made


@pytest.mark.parametrize(
    ("per_thousand", "verdict"), [(0.0, "flat"), (-5.0, "flat"), (0.2, "flat"), (1.9, "grows")]
)
def test_growth_is_told_from_noise_and_from_filling_pools(
    per_thousand: float, verdict: str
) -> None:
    found = growth(samples(per_thousand), "memory_mib")
    assert found.verdict == verdict
    assert found.slope.low < per_thousand < found.slope.high


def test_too_much_noise_decides_nothing() -> None:
    assert growth(samples(0.0, noise=40.0), "memory_mib").verdict == "undecided"


def test_one_thread_more_in_each_thousand_requests_grows() -> None:
    leaking = [replace(each, threads=13 + each.requests // 1000) for each in samples(0)]
    assert growth(leaking, "threads").verdict == "grows"
    assert growth(leaking, "files").verdict == "flat"
    assert growth(leaking, "files").slope.high == 0


def test_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        growth(samples(0)[: BLOCKS - 1], "memory_mib")


@given(st.floats(-100, 100), st.floats(-1000, 1000))
def test_the_slope_of_a_line_is_exact(steepness: float, height: float) -> None:
    places = [float(place) for place in range(BLOCKS)]
    found = slope(places, [height + steepness * place for place in places])
    assert found.point == pytest.approx(steepness, abs=1e-9)
    assert found.high - found.low == pytest.approx(0, abs=1e-9)


def test_this_process_is_measured() -> None:
    now = held(os.getpid(), 7, "# HELP a\n# TYPE a gauge\na 1\nb 2\n")
    assert (now.requests, now.series) == (7, 2)
    assert now.memory_mib > 10
    assert now.threads >= 1
    assert now.files >= 3
