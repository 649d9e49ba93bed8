"""Recognises the scene in a picture: its background, and each object's shape, colour and place.

A colour is the nearest one of the palette. A shape is recognised by the distance of its outline
from its centre: in one turn it oscillates three times for a triangle, four for a square, five for a
star, and not for a circle. The classifier uses the pixels only, neither prompts nor models.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.demo_model.scenes import (
    COLOURS,
    CORNER_SCALE,
    PLACE_CENTRES,
    RADIUS_ALONE,
    RADIUS_PAIRED,
    STAR_INNER,
    Pixels,
)

Mask = NDArray[np.bool_]

# A pixel belongs to an object if a channel differs from the background by more levels than this.
_CONTRAST = 30
# Smaller regions, as a share of the picture, are ignored.
_SMALLEST_OBJECT = 0.005
# How much the outline must oscillate, as a share of the mean radius, not to be a circle.
_LEAST_SWING = 0.06
_DIRECTIONS = 120
_SHAPE_OF_SWINGS = {3: "triangle", 4: "square", 5: "star"}
# Area of each shape, divided by the square of its radius.
_AREA = {
    "circle": math.pi,
    "square": 2 * CORNER_SCALE["square"] ** 2,
    "triangle": 0.75 * math.sqrt(3) * CORNER_SCALE["triangle"] ** 2,
    "star": 5 * STAR_INNER * math.sin(math.radians(36)) * CORNER_SCALE["star"] ** 2,
}


@dataclass(frozen=True)
class SeenThing:
    """A recognised object; its centre in shares of the width and the height."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Reading:
    """A recognised scene, its objects from the largest to the smallest."""

    background: str
    things: tuple[SeenThing, ...]


def read(pixels: Pixels) -> Reading:
    """Recognise the scene in (height, width, 3) bytes."""
    height, width, _ = pixels.shape
    ground = border_colour(pixels)
    away = np.abs(pixels.astype(np.int16) - ground.astype(np.int16)).max(axis=2)
    found = _components(away > _CONTRAST)
    found = [mask for mask in found if mask.sum() >= _SMALLEST_OBJECT * height * width]
    found.sort(key=lambda mask: -int(mask.sum()))
    things = tuple(_look_at(pixels, away, mask, alone=len(found) == 1) for mask in found)
    return Reading(nearest_colour(ground), things)


def place_of(thing: SeenThing) -> str:
    """The named place nearest to the object's centre."""
    return min(
        PLACE_CENTRES,
        key=lambda place: math.dist(PLACE_CENTRES[place], (thing.x, thing.y)),
    )


def nearest_colour(rgb: NDArray[np.generic]) -> str:
    """The palette's name for a colour."""
    levels = [float(level) for level in rgb]
    return min(COLOURS, key=lambda name: math.dist(COLOURS[name], levels))


def border_colour(pixels: Pixels) -> NDArray[np.generic]:
    """The background's (red, green, blue): the median of the two outermost rows and columns."""
    border = [pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]]
    return np.asarray(np.median(np.concatenate([side.reshape(-1, 3) for side in border]), axis=0))


def _look_at(pixels: Pixels, away: NDArray[np.int16], mask: Mask, *, alone: bool) -> SeenThing:
    height, width = mask.shape
    # The edge is where a pixel is half object and half background.
    body = mask & (away > np.median(away[mask]) / 2)
    rows, columns = np.nonzero(body)
    y, x = float(rows.mean()), float(columns.mean())
    inner = _eroded(body)
    colour = nearest_colour(np.median(pixels[inner if inner.any() else body], axis=0))
    shape = _shape(body, x, y)
    radius = math.sqrt(len(rows) / _AREA[shape]) / min(height, width)
    radii = RADIUS_ALONE if alone else RADIUS_PAIRED
    size = min(radii, key=lambda name: abs(radii[name] - radius))
    return SeenThing(shape, colour, size, (x + 0.5) / width, (y + 0.5) / height)


def _shape(body: Mask, x: float, y: float) -> str:
    height, width = body.shape
    angles = np.arange(_DIRECTIONS) * (2 * np.pi / _DIRECTIONS)
    distances = np.arange(0.0, math.hypot(height, width), 0.25)
    columns = np.rint(x + np.outer(np.cos(angles), distances)).astype(np.intp)
    rows = np.rint(y + np.outer(np.sin(angles), distances)).astype(np.intp)
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    on = np.zeros(inside.shape, dtype=bool)
    on[inside] = body[rows[inside], columns[inside]]
    outline = (on * distances).max(axis=1)
    swings = 2 * np.abs(np.fft.rfft(outline)) / max(float(outline.sum()), 1e-9)
    strongest = max(_SHAPE_OF_SWINGS, key=lambda count: float(swings[count]))
    return _SHAPE_OF_SWINGS[strongest] if swings[strongest] > _LEAST_SWING else "circle"


def _eroded(mask: Mask) -> Mask:
    """The mask without its outermost pixels, which mix two colours."""
    padded = np.pad(mask, 1)
    return np.asarray(
        mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    )


def _components(mask: Mask) -> list[Mask]:
    """The connected regions: each pixel takes its neighbours' largest label until none changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        before = labels
        padded = np.pad(labels, 1)
        labels = np.maximum.reduce(
            [labels, padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        )
        labels = np.where(mask, labels, 0)
        # A label is a pixel's index; taking that pixel's label doubles the reach each turn.
        followed = np.concatenate([[0], labels.ravel()])[labels]
        labels = np.maximum(labels, followed)
        if np.array_equal(labels, before):
            return [labels == label for label in np.unique(labels) if label]
