"""A tiny SDXL checkpoint, the program that trains it, and the scenes it learns.

Importing this package loads neither torch nor diffusers: the checkpoint is a directory in the
diffusers layout, and it is loaded like any other local SDXL directory.
"""

from pathlib import Path

# Sizes the checkpoint was trained at, as (width, height); the first is its default.
DEMO_SIZES: tuple[tuple[int, int], ...] = ((128, 128), (160, 96))


def checkpoint_path() -> Path:
    """The directory that holds the demo checkpoint, in the diffusers layout."""
    return Path(__file__).resolve().parent / "checkpoint"


def loras_path() -> Path:
    """The directory that holds the LoRAs for the demo checkpoint, each a safetensors file."""
    return Path(__file__).resolve().parent / "loras"
