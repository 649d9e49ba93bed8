import re
from dataclasses import replace

import numpy as np
import pytest

from bench.demo_model.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    draw_scene,
    full_caption,
    is_held_out,
    meaningful_words,
    render,
    vocabulary,
    words_by_kind,
)
from serve.demo_model import DEMO_SIZES


def scenes(count: int, **options: object) -> list[Scene]:
    rng = np.random.default_rng(5)
    return [draw_scene(rng, 128, 128, **options) for _ in range(count)]  # type: ignore[arg-type]


def plain(scene: Scene) -> Scene:
    """The scene without its random tints: exactly the named colours."""
    things = tuple(replace(thing, rgb=None) for thing in scene.things)
    return replace(scene, things=things, background_rgb=None)


def test_the_same_seed_draws_the_same_scene() -> None:
    first, second = (draw_scene(np.random.default_rng(7), 128, 128) for _ in range(2))
    assert first == second
    assert np.array_equal(render(first), render(second))


@pytest.mark.parametrize(("width", "height"), DEMO_SIZES)
def test_pixels_have_the_requested_size(width: int, height: int) -> None:
    pixels = render(draw_scene(np.random.default_rng(0), width, height))
    assert pixels.shape == (height, width, 3)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize(("width", "height"), DEMO_SIZES)
def test_objects_stay_inside_the_picture_and_apart(width: int, height: int) -> None:
    rng = np.random.default_rng(2)
    for _ in range(60):
        scene = plain(draw_scene(rng, width, height))
        pixels = render(scene)
        ground = np.array(COLOURS[scene.background])
        for side in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert (side == ground).all(), scene


def test_plain_scenes_hold_exactly_the_named_colours() -> None:
    scene = Scene(128, 128, "white", (Thing("square", "red", "large", 0.5, 0.5, 0.185),))
    pixels = render(scene)
    assert tuple(pixels[0, 0]) == COLOURS["white"]
    assert tuple(pixels[64, 64]) == COLOURS["red"]


def test_edges_are_anti_aliased() -> None:
    scene = Scene(128, 128, "black", (Thing("circle", "white", "large", 0.5, 0.5, 0.185),))
    levels = np.unique(render(scene)[..., 0])
    assert len(levels) > 10


def test_every_value_occurs() -> None:
    drawn = scenes(400, objects=1)
    assert {scene.background for scene in drawn} == set(COLOURS)
    assert {scene.place for scene in drawn} == set(PLACES)
    things = [scene.things[0] for scene in drawn]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.size for thing in things} == set(SIZES)
    assert {thing.colour for thing in things} == set(COLOURS)


def test_an_object_never_has_the_colour_of_its_background() -> None:
    for scene in scenes(300):
        assert scene.background not in {thing.colour for thing in scene.things}


def test_held_out_combinations_are_never_drawn_for_training() -> None:
    training = scenes(300, objects=1)
    held_out = scenes(100, objects=1, held_out=True)
    assert not any(is_held_out(scene) for scene in training)
    assert all(is_held_out(scene) for scene in held_out)
    assert not {scene.key for scene in training} & {scene.key for scene in held_out}


def test_full_captions_name_everything() -> None:
    rng = np.random.default_rng(3)
    for scene in scenes(100):
        words = set(full_caption(scene, rng).replace(",", " ").split())
        assert scene.background in words
        for thing in scene.things:
            assert {thing.colour, thing.shape} <= words


def test_captions_vary_and_leave_things_out() -> None:
    rng = np.random.default_rng(3)
    scene = scenes(1, objects=1)[0]
    captions = {caption(scene, rng) for _ in range(200)}
    assert len(captions) > 80
    assert any(scene.background not in text for text in captions)
    assert any(not text.startswith(("a ", "an ")) for text in captions)


def test_the_vocabulary_covers_every_full_caption() -> None:
    rng = np.random.default_rng(4)
    known = set(vocabulary())
    for scene in scenes(200):
        assert set(full_caption(scene, rng).replace(",", " ").split()) <= known


def test_meaningful_words_are_part_of_the_vocabulary() -> None:
    assert set(meaningful_words()) <= set(vocabulary())
    assert {"red", "star", "centre", "small"} <= set(meaningful_words())


def test_words_by_kind_hold_every_meaningful_word() -> None:
    words = set(re.findall(r"\w+", " ".join(words_by_kind().values())))
    assert set(meaningful_words()) - words == {"background"}
