"""The classifier on known scenes: a mistake there would be a wrong figure in the model card."""

import numpy as np
import pytest

from bench.demo_model.classifier import nearest_colour, place_of, read
from bench.demo_model.scenes import (
    COLOURS,
    PLACE_CENTRES,
    RADIUS_ALONE,
    SHAPES,
    Pixels,
    Scene,
    Thing,
    draw_scene,
    render,
)
from serve.demo_model import DEMO_SIZES


@pytest.mark.parametrize(("width", "height"), DEMO_SIZES)
def test_single_objects_are_read_without_a_mistake(width: int, height: int) -> None:
    rng = np.random.default_rng(11)
    for _ in range(100):
        scene = draw_scene(rng, width, height, objects=1)
        seen, truth = read(render(scene)), scene.things[0]
        assert seen.background == scene.background
        (thing,) = seen.things
        assert (thing.shape, thing.colour, thing.size) == (truth.shape, truth.colour, truth.size)
        assert place_of(thing) == scene.place


@pytest.mark.parametrize(("width", "height"), DEMO_SIZES)
def test_two_objects_are_read_without_a_mistake(width: int, height: int) -> None:
    rng = np.random.default_rng(12)
    for _ in range(100):
        scene = draw_scene(rng, width, height, objects=2)
        seen = read(render(scene))
        assert seen.background == scene.background
        assert sorted((t.shape, t.colour, t.size) for t in seen.things) == sorted(
            (t.shape, t.colour, t.size) for t in scene.things
        )


@pytest.mark.parametrize("ground", COLOURS)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_pair_of_colours_is_distinguished(ground: str, colour: str) -> None:
    if ground == colour:
        return
    thing = Thing("star", colour, "small", *PLACE_CENTRES["top"], RADIUS_ALONE["small"])
    seen = read(render(Scene(128, 128, ground, (thing,), place="top")))
    assert seen.background == ground
    assert [thing.colour for thing in seen.things] == [colour]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("angle", [-8.0, -3.0, 0.0, 5.0, 8.0])
def test_shapes_are_known_at_any_small_turn(shape: str, angle: float) -> None:
    thing = Thing(shape, "blue", "small", 0.5, 0.5, RADIUS_ALONE["small"], angle=angle)
    (seen,) = read(render(Scene(160, 96, "white", (thing,), place="centre"))).things
    assert seen.shape == shape


def test_noise_and_blur_of_a_generated_picture_change_nothing() -> None:
    rng = np.random.default_rng(13)
    for _ in range(40):
        scene = draw_scene(rng, 128, 128, objects=1)
        pixels = _blurred(render(scene)) + rng.normal(0, 4, (128, 128, 3))
        (seen,) = read(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)).things
        truth = scene.things[0]
        assert (seen.shape, seen.colour) == (truth.shape, truth.colour), scene


def test_an_empty_picture_holds_nothing() -> None:
    seen = read(np.full((128, 128, 3), COLOURS["green"], dtype=np.uint8))
    assert (seen.background, seen.things) == ("green", ())


def test_noise_alone_is_not_taken_for_a_scene() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    things = read(pixels).things
    assert not any(thing.shape == "circle" and thing.size == "small" for thing in things)


def test_colours_are_named_by_the_nearest() -> None:
    for name, rgb in COLOURS.items():
        assert nearest_colour(np.array(rgb) + 10) == name


def _blurred(pixels: Pixels) -> np.ndarray:
    padded = np.pad(pixels.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
