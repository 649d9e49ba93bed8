"""The evaluation itself: right pictures get full scores, and each mistake lowers its own score."""

from dataclasses import replace

import pytest
import torch

from bench.demo_model.architecture import build_pipeline
from bench.demo_model.evaluate import (
    DrawSettings,
    HeldOutPrompt,
    Scores,
    as_table,
    as_text,
    draw,
    held_out_prompts,
    reconstruction_psnr,
    score,
)
from bench.demo_model.scenes import COLOURS, SHAPES, Scene, is_held_out, render
from serve.demo_model import DEMO_SIZES

# diffusers' schedulers hand tensors to numpy the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def shown(prompts: list[HeldOutPrompt], scenes: list[Scene]) -> Scores:
    return score(prompts, [render(scene) for scene in scenes])


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize(("width", "height"), DEMO_SIZES)
def test_a_picture_of_its_prompt_scores_full_marks(objects: int, width: int, height: int) -> None:
    prompts = held_out_prompts(40, objects, width, height)
    assert shown(prompts, [prompt.scene for prompt in prompts]) == Scores(40, 1, 1, 1, 1, 1, 1)


def test_held_out_prompts_are_the_same_in_every_run() -> None:
    assert held_out_prompts(10, 1, 128, 128) == held_out_prompts(10, 1, 128, 128)
    assert all(is_held_out(prompt.scene) for prompt in held_out_prompts(30, 2, 128, 128))


def test_a_wrong_background_costs_the_background() -> None:
    (prompt,) = held_out_prompts(1, 1, 128, 128)
    scene = prompt.scene
    taken = {scene.background, scene.things[0].colour}
    other = next(colour for colour in COLOURS if colour not in taken)
    scores = shown([prompt], [replace(scene, background=other, background_rgb=None)])
    assert (scores.background, scores.colour, scores.shape, scores.place) == (0, 1, 1, 1)
    assert scores.everything == 0


def test_a_wrong_shape_costs_the_shape() -> None:
    (prompt,) = held_out_prompts(1, 1, 128, 128)
    thing = prompt.scene.things[0]
    other = replace(thing, shape=next(shape for shape in SHAPES if shape != thing.shape))
    scores = shown([prompt], [replace(prompt.scene, things=(other,))])
    assert (scores.background, scores.colour, scores.shape, scores.place) == (1, 1, 0, 1)


def test_exchanged_colours_of_two_objects_are_wrong() -> None:
    prompt = next(
        prompt
        for prompt in held_out_prompts(20, 2, 128, 128)
        if len({thing.colour for thing in prompt.scene.things}) == 2
    )
    first, second = prompt.scene.things
    exchanged = (
        replace(first, colour=second.colour, rgb=second.rgb),
        replace(second, colour=first.colour, rgb=first.rgb),
    )
    scores = shown([prompt], [replace(prompt.scene, things=exchanged)])
    assert (scores.background, scores.colour, scores.shape, scores.place) == (1, 0, 1, 1)


def test_an_object_too_few_is_wrong_in_everything_but_the_background() -> None:
    (prompt,) = held_out_prompts(1, 2, 128, 128)
    scene = replace(prompt.scene, things=prompt.scene.things[:1])
    scores = shown([prompt], [scene])
    assert (scores.background, scores.colour, scores.shape, scores.place) == (1, 0, 0, 0)


def test_the_same_seed_draws_the_same_picture_alone_or_in_a_batch() -> None:
    torch.set_num_threads(1)
    pipeline = build_pipeline(0)
    prompts = held_out_prompts(3, 1, 128, 128)
    together = draw(pipeline, prompts, DrawSettings(steps=2, batch=3))
    alone = draw(pipeline, prompts, DrawSettings(steps=2, batch=1))
    for one, other in zip(together, alone, strict=True):
        assert abs(one.astype(int) - other.astype(int)).max() <= 1
    assert (together[0] != together[1]).any()


def test_random_weights_reconstruct_badly() -> None:
    assert reconstruction_psnr(build_pipeline(0).vae, 128, 128, 2) < 20


def test_figures_read_as_lines() -> None:
    text = as_text({"128x128 vae": {"psnr_db": 31.25}, "one": {"pictures": 4, "shape": 0.5}})
    assert text.splitlines()[0].endswith("psnr_db 31.25")
    assert "pictures 4, shape 50.0%" in text


def test_the_table_has_a_row_for_each_share_and_a_sentence_for_the_vae() -> None:
    one = {"pictures": 4, "shape": 0.5}
    table = as_table({"128x128 vae": {"psnr_db": 31.25}, "128x128 one object": one})
    assert table.splitlines() == [
        "| | pictures | shape |",
        "|---|---|---|",
        "| 128x128 one object | 4 | 50.0% |",
        "",
        "The VAE gives held-out scenes back with 31.2 dB at 128x128.",
    ]
