"""How argparse reads numbers of the commands, and what it says is wrong with one.

Each raises ValueError; argparse shows the function's name in its error.
"""

from __future__ import annotations

import math


def positive(text: str) -> float:
    """A number above 0, and finite."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


positive.__name__ = "number above 0"


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


share.__name__ = "number from 0 to 1"


def count(text: str) -> int:
    """A whole number above 0."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


count.__name__ = "whole number above 0"


def from_zero(text: str) -> int:
    """A whole number from 0."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


from_zero.__name__ = "whole number from 0"
