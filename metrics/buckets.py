"""Histogram bucket families, each with its reason.

Upper bounds are in seconds unless stated otherwise, without the +Inf that every histogram adds. A
list in the wrong order is refused, not sorted: it is a mistake.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# A family has a line in every scrape for each bound and label set. With sixty bounds the largest
# family (steps: nine shapes, with and without guidance) has about a thousand lines.
MOST_BOUNDS = 60


MOST_IMAGES = 32
"""The most images of one run, and of one request."""


def geometric(first: float, last: float, ratio: float) -> tuple[float, ...]:
    """Bounds from `first` to `last`, each at most `ratio` times the one before.

    The last bound is exactly `last`. Values are rounded to four significant digits, because they
    are label values.
    """
    if not (0 < first < last and ratio > 1):
        raise ValueError("geometric buckets need 0 < first < last and a ratio above 1")
    steps = math.ceil(math.log(last / first) / math.log(ratio) - 1e-9)
    exact = (last / first) ** (1 / steps)
    return tuple(_significant(first * exact**i) for i in range(steps + 1))


def checked(bounds: Sequence[float]) -> tuple[float, ...]:
    """The same bounds. Raises ValueError if they are empty, not finite or not ascending."""
    values = tuple(float(bound) for bound in bounds)
    if not values:
        raise ValueError("a bucket list must not be empty")
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError("every bucket bound must be a positive finite number")
    if any(later <= earlier for earlier, later in itertools.pairwise(values)):
        raise ValueError("bucket bounds must be ascending")
    return values


def parse(text: str) -> tuple[float, ...]:
    """Bounds from a text such as `0.1,0.2,0.5`. Raises ValueError as `checked` does, and for more
    than `MOST_BOUNDS` bounds."""
    bounds = checked([float(part) for part in text.split(",")])
    if len(bounds) > MOST_BOUNDS:
        raise ValueError(f"a bucket list may hold at most {MOST_BOUNDS} bounds")
    return bounds


def _significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


# A whole request: from a demo image (0.2 s) to 100 steps behind a full queue. The ratio 1.5 keeps
# the error of an interpolated quantile under a quarter, which is enough for an alert.
REQUEST = checked(geometric(0.05, 120, 1.5))

# Waiting in the queue: most requests do not wait, so the first bound separates a hand-over between
# threads from waiting. The last bound is beyond the default deadline of 60 s.
QUEUE = checked((0.001, *geometric(0.005, 90, 1.8)))

# Stages span three decades: a text encode of a few milliseconds on a GPU, a denoise of seconds.
STAGE = checked(geometric(0.001, 90, 1.6))

# One denoising step. Published H100-class figures at 1024x1024 are between 15 and 70 ms, and a
# regression of a tenth matters there: ratio 1.1. Outside that range (the demo on a CPU at 15 ms and
# below, an eager CPU model at seconds) a ratio of 1.5 is enough.
STEP = checked(
    (
        *geometric(0.001, 0.015, 1.5)[:-1],
        *geometric(0.015, 0.070, 1.1)[:-1],
        *geometric(0.070, 20, 1.5),
    )
)

# How long a step waited in the GPU's queue. Below a millisecond the GPU waits for the host, or soon
# will. The host is at most two steps ahead, which is 30 to 140 ms. Doubling separates these cases.
GPU_QUEUE = checked(geometric(0.0005, 0.512, 2))

# Bytes of an encoded image: 3 kB for a demo JPEG, 100 to 500 kB for one at 1024x1024, 1.5 MB for
# its PNG, 8 MB for the largest allowed. Powers of two separate these cases.
IMAGE_BYTES = checked([2.0**exponent for exponent in range(10, 25)])


# Actual over estimated time of a request: 1 is right. The target is within a tenth for nine
# requests of ten; the outer bounds separate a wrong estimate from one that is useless.
ESTIMATE_RATIO = checked((0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.2, 1.3, 1.5, 2, 4))


@dataclass(frozen=True, slots=True)
class BucketFamilies:
    """The bucket bounds of each histogram family, in seconds and bytes."""

    request: Sequence[float] = field(default=REQUEST)
    queue: Sequence[float] = field(default=QUEUE)
    stage: Sequence[float] = field(default=STAGE)
    step: Sequence[float] = field(default=STEP)
    gpu_queue: Sequence[float] = field(default=GPU_QUEUE)
    image_bytes: Sequence[float] = field(default=IMAGE_BYTES)
