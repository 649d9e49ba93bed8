"""Image sizes, the sizes that each model family was trained for, and the longest prompt.

The operator chooses which of them a process keeps warm (`SDXL_SHAPES`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

SMALLEST_SIDE = 64
LARGEST_SIDE = 2048
PIXELS_PER_LATENT = 8
"""The VAE halves an image three times, so a side must be a multiple of this."""

MOST_CHUNKS = 4
"""The most chunks of 75 tokens that a prompt may be encoded in."""

ALLOWED_SIDES = f"sides of a multiple of {PIXELS_PER_LATENT} from {SMALLEST_SIDE} to {LARGEST_SIDE}"

_PATTERN = re.compile(r"(?P<width>[0-9]{1,6})[xX×](?P<height>[0-9]{1,6})")


@dataclass(frozen=True, order=True)
class CompiledShape:
    """One image size in pixels, width first, as `1024x768` is written."""

    width: int
    height: int

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("height", self.height)):
            if not SMALLEST_SIDE <= value <= LARGEST_SIDE or value % PIXELS_PER_LATENT:
                raise ValueError(
                    f"{name} {value} is not a multiple of {PIXELS_PER_LATENT} "
                    f"from {SMALLEST_SIDE} to {LARGEST_SIDE}"
                )

    @classmethod
    def parse(cls, text: str) -> CompiledShape:
        """Parse `1024x768`. Raises ValueError, saying what is allowed."""
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not an image size; write WIDTHxHEIGHT, like 1024x768")
        try:
            return cls(int(match["width"]), int(match["height"]))
        except ValueError as error:
            raise ValueError(f"{text!r} is not an image size: {error}") from None

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def latent(self) -> tuple[int, int]:
        """(height, width) of the latent, in torch's order."""
        return self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT

    @property
    def pixels(self) -> int:
        return self.width * self.height


SDXL_SHAPES = tuple(
    CompiledShape.parse(text)
    for text in (
        "1024x1024",
        "1152x896",
        "896x1152",
        "1216x832",
        "832x1216",
        "1344x768",
        "768x1344",
        "1536x640",
        "640x1536",
    )
)
"""The sizes SDXL base was trained for, about one megapixel each; the first is its default."""

DEMO_SHAPES = (CompiledShape(128, 128), CompiledShape(160, 96))
"""The sizes the demo checkpoint was trained for; the first is its default."""
