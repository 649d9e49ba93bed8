"""The LoRA that ships with the demo model: its file, its pictures, its training and its judge."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open

from bench.demo_model.evaluate import DrawSettings, draw, held_out_prompts, load, score
from bench.demo_model.evaluate_lora import (
    ScaleFigures,
    StyleScores,
    as_table,
    evaluate_lora,
    overall,
    read_lora,
    score_style,
    with_lora,
)
from bench.demo_model.lossless import Distance
from bench.demo_model.night import MOON, at_night, at_night_with_moon, read_style, without_moon
from bench.demo_model.scenes import render
from bench.demo_model.train_lora import train_lora
from bench.demo_model.training_plan import Limit, TrainingPlan
from serve.demo_model import DEMO_SIZES, checkpoint_path, loras_path

# diffusers' schedulers hand tensors to numpy the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FILE = loras_path() / "night.safetensors"


@pytest.fixture(scope="module")
def pipeline() -> Iterator[StableDiffusionXLPipeline]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load(checkpoint_path(), "cpu")
    torch.set_num_threads(threads)


# The file ----------------------------------------------------------------------------------------


def test_the_file_is_small_and_says_how_it_was_made() -> None:
    assert FILE.stat().st_size < 500_000
    with safe_open(FILE, framework="pt") as tensors:
        metadata = tensors.metadata()
        kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        ranks = {
            tensors.get_slice(key).get_shape()[0]
            for key in tensors.keys()  # noqa: SIM118
            if ".lora_A." in key
        }
    unet = checkpoint_path() / "unet" / "diffusion_pytorch_model.safetensors"
    assert metadata["base_model_unet_sha256"] == hashlib.sha256(unet.read_bytes()).hexdigest()
    assert f"--seed {metadata['seed']} " in metadata["command"]
    assert metadata["rank"] == metadata["alpha"]
    assert ranks == {int(metadata["rank"])}
    assert kinds == {"F16"}


def test_the_recorded_figures_are_of_this_file() -> None:
    results = Path(__file__).parents[3] / "bench" / "results"
    [record] = [json.loads(path.read_text()) for path in results.glob("*-demo-lora.json")]
    assert record["lora_sha256"] == hashlib.sha256(FILE.read_bytes()).hexdigest()


def test_the_file_is_what_diffusers_reads_as_its_own(pipeline: StableDiffusionXLPipeline) -> None:
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(
        FILE, unet_config=pipeline.unet.config
    )
    with safe_open(FILE, framework="pt") as tensors:
        assert set(state) == set(tensors.keys())
    assert not alphas


def test_every_key_fits_a_layer_of_the_demo_unet(pipeline: StableDiffusionXLPipeline) -> None:
    products = read_lora(FILE)
    with safe_open(FILE, framework="pt") as tensors:
        assert len(tensors.keys()) == 2 * len(products)
    for name, product in products.items():
        assert product.shape == pipeline.unet.get_submodule(name).weight.shape, name
        assert product.isfinite().all()
        assert product.abs().max() > 0


# The pictures ------------------------------------------------------------------------------------


def test_pictures_follow_the_style_and_base_pictures_are_untouched(
    pipeline: StableDiffusionXLPipeline,
) -> None:
    prompts = held_out_prompts(3, 1, 128, 128)
    settings = DrawSettings(steps=6, batch=3)
    products = read_lora(FILE)
    weights = {name: weight.clone() for name, weight in pipeline.unet.state_dict().items()}
    base = draw(pipeline, prompts, settings)
    drawn = {}
    for scale in (0.0, 1.0):
        with with_lora(pipeline.unet, products, scale):
            drawn[scale] = draw(pipeline, prompts, settings)
    assert np.array_equal(base, drawn[0.0])
    after = pipeline.unet.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in weights.items())
    assert score_style(prompts, base).night == 0
    scores = score_style(prompts, drawn[1.0])
    assert scores.night == 1, scores
    assert min(scores.shape, scores.place) >= 0.6, scores


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_evaluation_reaches_its_targets(pipeline: StableDiffusionXLPipeline) -> None:
    products = read_lora(FILE)
    figures = evaluate_lora(pipeline, products, (0.0, 0.5, 1.0), DrawSettings(), 25)
    for row, base in figures["0"].items():
        half, whole = figures["0.5"][row], figures["1"][row]
        assert base.from_base.differing == 0
        assert base.scores.night == 0
        assert base.scores.night <= half.scores.night <= whole.scores.night
        assert base.from_base.mean < half.from_base.mean < whole.from_base.mean
        assert whole.scores.night >= 0.8, row
        assert min(whole.scores.colour, whole.scores.shape, whole.scores.place) >= 0.8, row


# The style and its judge -------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), DEMO_SIZES)
def test_a_night_scene_is_recognised_and_its_plain_scene_is_not(width: int, height: int) -> None:
    for objects in (1, 2):
        prompts = held_out_prompts(4, objects, width, height)
        nights = [render(at_night_with_moon(prompt.scene)) for prompt in prompts]
        scores = score_style(prompts, nights)
        assert (scores.night, scores.everything) == (1, 1)
        plain = score_style(prompts, [render(prompt.scene) for prompt in prompts])
        assert (plain.moon, plain.night, plain.everything) == (0, 0, 0)
        assert plain.as_prompted == 1


def test_a_moon_elsewhere_is_not_the_moon_but_an_object_too_many() -> None:
    (prompt,) = held_out_prompts(1, 1, 128, 128)
    night = at_night(prompt.scene)
    picture = render(replace(night, things=(*night.things, replace(MOON, x=1 - MOON.x))))
    assert not read_style(picture).moon
    assert score([replace(prompt, scene=night)], [without_moon(picture)]).everything == 0


def test_black_objects_are_white_at_night_and_others_keep_their_colour() -> None:
    for prompt in held_out_prompts(40, 2, 128, 128):
        for before, after in zip(prompt.scene.things, at_night(prompt.scene).things, strict=True):
            assert after.colour == ("white" if before.colour == "black" else before.colour)
            assert (after.shape, after.x, after.y) == (before.shape, before.x, before.y)


def test_the_table_has_a_row_for_all_pictures_of_a_scale() -> None:
    nothing = StyleScores(4, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    everything = StyleScores(4, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    rows = {
        "128x128 one object": ScaleFigures(nothing, Distance(1.0, 9, 0.5)),
        "160x96 one object": ScaleFigures(everything, Distance(2.0, 4, 1.0)),
    }
    assert overall(rows).from_base == Distance(1.5, 9, 0.75)
    lines = as_table({"0.5": rows}).splitlines()
    assert len(lines) == 2 + 1 + len(rows)
    assert lines[2] == "| 0.5 | all | 8 |" + " 50% |" * 9 + " 1.5 |"


# The training ------------------------------------------------------------------------------------


def plan(**changes: object) -> TrainingPlan:
    values: dict[str, object] = {
        "seed": 0,
        "scenes": 3,
        "vae": Limit(0, None),
        "vae_batch": 1,
        "diffusion": Limit(2, None),
        "diffusion_batch": 2,
    }
    return TrainingPlan(**(values | changes))  # type: ignore[arg-type]


def run(out: Path, rank: int = 2) -> dict[str, torch.Tensor]:
    out.mkdir(exist_ok=True)
    pipeline = load(checkpoint_path(), "cpu")
    file = train_lora(pipeline, plan(), out, rank=rank, workers=1, save_seconds=math.inf)
    return read_lora(file)


def test_training_repeats_and_refuses_the_states_of_another_rank(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    first, second = run(tmp_path / "first"), run(tmp_path / "second")
    assert set(first) == set(read_lora(FILE))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(product.abs().max() > 0 for product in first.values())
    with pytest.raises(SystemExit, match="another plan"):
        run(tmp_path / "first", rank=3)
