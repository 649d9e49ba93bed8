from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metrics import buckets


@pytest.mark.parametrize(
    "family", ["REQUEST", "QUEUE", "STAGE", "STEP", "GPU_QUEUE", "IMAGE_BYTES"]
)
def test_every_family_is_ascending(family: str) -> None:
    bounds = getattr(buckets, family)
    assert bounds == buckets.checked(bounds)
    assert len(bounds) <= 40


def test_step_buckets_are_fine_where_a_tenth_matters() -> None:
    for lower, upper in pairwise(buckets.STEP):
        ratio = upper / lower
        if lower >= 0.015 and upper <= 0.070:
            assert ratio <= 1.1 + 1e-3
        else:
            assert ratio <= 1.5 + 1e-3
    assert 0.015 in buckets.STEP
    assert 0.070 in buckets.STEP


@given(
    first=st.floats(1e-4, 1),
    factor=st.floats(1.5, 1e5),
    ratio=st.floats(1.01, 3),
)
def test_geometric_reaches_its_ends_within_the_ratio(
    first: float, factor: float, ratio: float
) -> None:
    bounds = buckets.geometric(first, first * factor, ratio)
    assert bounds[0] == pytest.approx(first, rel=1e-3)
    assert bounds[-1] == pytest.approx(first * factor, rel=1e-3)
    assert all(later / earlier <= ratio * 1.002 for earlier, later in pairwise(bounds))


@pytest.mark.parametrize(
    "wrong", [[], [0.2, 0.1], [0.1, 0.1], [0.0, 1.0], [-1.0], [float("inf")], [float("nan")]]
)
def test_wrong_lists_are_refused_rather_than_sorted(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="bucket"):
        buckets.checked(wrong)


def test_geometric_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="0 < first < last"):
        buckets.geometric(1, 1, 2)


def test_a_list_is_parsed() -> None:
    assert buckets.parse("0.1, 0.25,1") == (0.1, 0.25, 1.0)


@pytest.mark.parametrize("wrong", ["", "a", "0.1,", "0.2,0.1", "1e999", "nan"])
def test_a_wrong_text_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"bucket|convert"):
        buckets.parse(wrong)


def test_a_list_has_a_largest_length() -> None:
    most = ",".join(str(bound) for bound in range(1, buckets.MOST_BOUNDS + 1))
    assert len(buckets.parse(most)) == buckets.MOST_BOUNDS
    with pytest.raises(ValueError, match="at most 60"):
        buckets.parse(most + ",1000")
