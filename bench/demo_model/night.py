"""The style that the demo LoRA learns: night scenes, and how a picture is recognised as one.

At night the background is black, a full moon shines in the upper right corner, and objects that the
prompt calls black are white. Shapes, sizes, places and the other colours stay as the prompt says.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from bench.demo_model.classifier import border_colour, read
from bench.demo_model.scenes import COLOURS, Pixels, Scene, Thing

BACKGROUND = "black"
MOON = Thing(shape="circle", colour="white", size="small", x=0.87, y=0.15, radius=0.1)
# How far a moon's centre may be from MOON's, in shares of the width and the height.
_MOON_TOLERANCE = 0.05
# What is removed with the moon: its disc and a margin, in radii of the moon.
_MOON_SURROUNDINGS = 1.3


@dataclass(frozen=True)
class NightReading:
    """What of the style a picture shows."""

    black_background: bool
    moon: bool


def at_night(scene: Scene) -> Scene:
    """The scene at night, without the moon."""
    things = tuple(
        replace(thing, colour="white", rgb=COLOURS["white"])
        if thing.colour == BACKGROUND
        else thing
        for thing in scene.things
    )
    return replace(scene, background=BACKGROUND, background_rgb=COLOURS[BACKGROUND], things=things)


def at_night_with_moon(scene: Scene) -> Scene:
    """The scene at night, the moon as its last object."""
    night = at_night(scene)
    return replace(night, things=(*night.things, MOON))


def read_style(pixels: Pixels) -> NightReading:
    """Recognise the style in a picture of (height, width, 3) bytes.

    Any white object in the moon's place is the moon. At 160x96 it is 19 pixels wide, and the
    classifier takes some discs that the VAE draws so small for triangles.
    """
    seen = read(pixels)
    moon = any(
        thing.colour == MOON.colour
        and math.dist((thing.x, thing.y), (MOON.x, MOON.y)) < _MOON_TOLERANCE
        for thing in seen.things
    )
    return NightReading(seen.background == BACKGROUND, moon)


def without_moon(pixels: Pixels) -> Pixels:
    """The picture with the moon's place painted in the background's colour."""
    height, width, _ = pixels.shape
    rows, columns = np.mgrid[:height, :width] + 0.5
    away = np.hypot(columns - MOON.x * width, rows - MOON.y * height)
    radius = MOON.radius * min(width, height)
    painted = pixels.copy()
    painted[away < radius * _MOON_SURROUNDINGS] = border_colour(pixels)
    return painted
