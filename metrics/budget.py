"""How long a request may take, from its shape and steps.

A threshold in seconds would alert when the traffic changes: a hundred steps at twice the area are
slow and in order. A budget grows with what was asked for, so the share of requests over it moves
only when the service does.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """A promise for answered requests, counted from their first byte.

    Attributes:
        base_seconds: for all that is no step: waiting, text, decoding, encoding, answering.
        step_seconds: for one guided step of an image of `pixels`; other areas in proportion.
        pixels: the area that `step_seconds` is for, the default shape's.
    """

    base_seconds: float
    step_seconds: float
    pixels: int

    def seconds(self, width: int, height: int, steps: int) -> float:
        """What a request of this size and step count may take."""
        return self.base_seconds + steps * self.step_seconds * (width * height / self.pixels)
