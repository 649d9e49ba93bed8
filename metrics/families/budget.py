"""How long a request may take, by its shape and steps.

With a fixed threshold in seconds, a change of the traffic would alert: a hundred steps at twice the
area take long, and nothing is wrong. The budget grows with the request, so the share of requests
over it changes only if the service changes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """The latency budget of an answered request, counted from when its head was read.

    Attributes:
        base_seconds: for everything but the steps: waiting, text, decoding, encoding, the response.
        step_seconds: for one step with guidance of an image of `pixels`; other areas in proportion.
        pixels: the area of the default shape, which `step_seconds` is for.
    """

    base_seconds: float
    step_seconds: float
    pixels: int

    def seconds(self, width: int, height: int, steps: int) -> float:
        """The budget in seconds of a request of this size and step count."""
        return self.base_seconds + steps * self.step_seconds * (width * height / self.pixels)
