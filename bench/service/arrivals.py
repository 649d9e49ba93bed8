"""Random arrivals of requests for a load test: when each is sent, and what it requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.errors import BenchError

PROMPT = "a small red circle left of a large blue square on a white background"


@dataclass(frozen=True)
class Mix:
    """The sizes and steps that are requested, and the share of each."""

    shapes: tuple[tuple[str, float], ...]
    """WIDTHxHEIGHT and its share; if empty, the server's default size."""
    steps: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, shapes: Sequence[tuple[str, float]], steps: Sequence[tuple[str, float]]) -> Mix:
        for shape, _ in shapes:
            if not re.fullmatch("[0-9]{1,6}x[0-9]{1,6}", shape):
                raise BenchError(f"--shape {shape} is not allowed. Allowed: WIDTHxHEIGHT")
        for count, _ in steps:
            if not re.fullmatch("[0-9]{1,6}", count) or int(count) < 1:
                raise BenchError(f"--steps {count} is not allowed. Allowed: a whole number above 0")
        return cls(tuple(shapes), tuple((int(count), share) for count, share in steps))

    def bodies(self) -> list[tuple[dict[str, Any], float]]:
        """Every combination as a request's body, with its share of all requests."""
        combinations = []
        for shape, shape_share in self.shapes or (("", 1.0),):
            size = {}
            if shape:
                width, height = shape.split("x")
                size = {"width": int(width), "height": int(height)}
            for steps, steps_share in self.steps:
                body = {"prompt": PROMPT, "num_inference_steps": steps, **size}
                combinations.append((body, shape_share * steps_share))
        total = sum(share for _, share in combinations)
        return [(body, share / total) for body, share in combinations]


@dataclass(frozen=True)
class Arrival:
    """A request, and when to send it."""

    at: float
    """Seconds from the start."""
    body: dict[str, Any]


def arrivals(mix: Mix, rate: float, seconds: float, most: int, seed: int) -> list[Arrival]:
    """A Poisson process: `rate` requests a second for `seconds`, at most `most` requests.

    The same arguments give the same arrivals.
    """
    generator = np.random.default_rng([seed, round(1000 * rate)])
    at = np.cumsum(generator.exponential(1 / rate, most))
    at = at[at < seconds]
    bodies = mix.bodies()
    which = generator.choice(len(bodies), len(at), p=[share for _, share in bodies])
    seeds = generator.integers(0, 2**31, len(at))
    return [
        Arrival(float(moment), bodies[index][0] | {"seed": int(seed_of)})
        for moment, index, seed_of in zip(at, which, seeds, strict=True)
    ]
