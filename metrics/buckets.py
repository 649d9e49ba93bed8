"""Histogram bucket families, each with its reason.

Upper bounds in seconds unless said otherwise, without the +Inf that every histogram adds. A bucket
list is refused rather than sorted: a list in the wrong order is a mistake, not a preference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

# A family's bounds times its label sets are lines of every scrape. Sixty keep the largest family
# (steps: nine shapes, guided and not) near a thousand lines.
MOST_BOUNDS = 60


def geometric(first: float, last: float, ratio: float) -> tuple[float, ...]:
    """Bounds from `first` until `last` is reached, neighbours at most `ratio` apart.

    The last bound is exactly `last`; values are rounded to four significant digits, so that they
    read well as label values.
    """
    if not (0 < first < last and ratio > 1):
        raise ValueError("geometric buckets need 0 < first < last and a ratio above 1")
    steps = math.ceil(math.log(last / first) / math.log(ratio) - 1e-9)
    exact = (last / first) ** (1 / steps)
    return tuple(_significant(first * exact**i) for i in range(steps + 1))


def checked(bounds: Sequence[float]) -> tuple[float, ...]:
    """The same bounds, or ValueError when they are empty, not finite or not rising."""
    values = tuple(float(bound) for bound in bounds)
    if not values:
        raise ValueError("a bucket list may not be empty")
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError("every bucket bound must be a positive finite number")
    if any(later <= earlier for earlier, later in itertools.pairwise(values)):
        raise ValueError("bucket bounds must rise from each to the next")
    return values


def parse(text: str) -> tuple[float, ...]:
    """Bounds from `0.1,0.2,0.5`. Raises ValueError for all that `checked` refuses, and for more
    than `MOST_BOUNDS`."""
    bounds = checked([float(part) for part in text.split(",")])
    if len(bounds) > MOST_BOUNDS:
        raise ValueError(f"a bucket list may hold at most {MOST_BOUNDS} bounds")
    return bounds


def _significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


# A whole request: from a demo image (0.2 s) to 100 steps behind a full queue. Ratio 1.5 keeps the
# error of an interpolated quantile under a quarter, enough to page on.
REQUEST = checked(geometric(0.05, 120, 1.5))

# Waiting: most requests wait for nothing, so the first bound is where a hand-over between threads
# ends and waiting begins; the last is past the default deadline of 60 s.
QUEUE = checked((0.001, *geometric(0.005, 90, 1.8)))

# Stages span three decades: a text encode of a few milliseconds on a GPU, a denoise of seconds.
STAGE = checked(geometric(0.001, 90, 1.6))

# One denoising step. Published H100-class figures at 1024x1024 lie between 15 and 70 ms, and there
# a regression of a tenth is an incident: ratio 1.1. Elsewhere (a CPU demo at 15 ms and below, an
# eager CPU model at seconds) 1.5 locates the decade.
STEP = checked(
    (
        *geometric(0.001, 0.015, 1.5)[:-1],
        *geometric(0.015, 0.070, 1.1)[:-1],
        *geometric(0.070, 20, 1.5),
    )
)

# How long a step lay in the GPU's queue. Under a millisecond the GPU has waited for the host or is
# about to; two steps ahead, where the host is held, is twice a step: 30 to 140 ms. Doubling tells
# the three apart.
GPU_QUEUE = checked(geometric(0.0005, 0.512, 2))

# Bytes of an encoded image: 3 kB for a demo JPEG, 100 to 500 kB for one at 1024x1024, 1.5 MB for
# its PNG, 8 MB for the largest allowed. What matters is which of these it is: powers of two.
IMAGE_BYTES = checked([2.0**exponent for exponent in range(10, 25)])
