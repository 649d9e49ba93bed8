"""The architecture with random weights: a real SDXL that saves, loads and draws."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from bench.demo_model.architecture import MAX_TOKENS, build_pipeline, build_tokenizer, save
from bench.demo_model.scenes import vocabulary
from serve.demo_model import DEMO_SIZES, checkpoint_path

# diffusers' schedulers hand tensors to numpy the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    save(build_pipeline(0), directory)
    return directory


def weights_of(pipeline: StableDiffusionXLPipeline) -> torch.Tensor:
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    return torch.cat([weight.flatten() for part in parts for weight in part.parameters()])


def test_a_seed_gives_the_same_weights_and_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second, other = (weights_of(build_pipeline(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_word_of_the_scenes_is_one_token() -> None:
    tokenizer = build_tokenizer()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for word in vocabulary():
        tokens = tokenizer(word).input_ids
        assert [tokens[0], tokens[-1], len(tokens)] == [start, end, 3], word


@pytest.mark.parametrize("prompt", ["", "ünïcode 猫 🦊", "A RED Circle!!", "x" * 5000, "\x00\n\t"])
def test_any_prompt_becomes_tokens(prompt: str) -> None:
    encoded = build_tokenizer()(
        prompt, padding="max_length", max_length=MAX_TOKENS, truncation=True
    )
    assert len(encoded.input_ids) == MAX_TOKENS


def test_an_unknown_word_falls_to_bytes_and_comes_back() -> None:
    tokenizer = build_tokenizer()
    tokens = tokenizer("a 猫 circle").input_ids
    assert len(tokens) == 1 + 1 + 3 + 1 + 1
    assert tokenizer.decode(tokens, skip_special_tokens=True).split() == ["a", "猫", "circle"]


def test_case_does_not_matter() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer("A Red CIRCLE").input_ids == tokenizer("a red circle").input_ids


def test_the_saved_checkpoint_is_float16_safetensors_of_at_most_12_megabytes(saved: Path) -> None:
    assert sum(file.stat().st_size for file in saved.rglob("*") if file.is_file()) <= 12_000_000
    assert len(list(saved.rglob("*.safetensors"))) == 4
    assert not list(saved.rglob("*.bin"))


def test_it_loads_like_any_local_sdxl_directory(saved: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        saved, dtype=torch.float32, local_files_only=True
    )
    built = weights_of(build_pipeline(0))
    assert torch.allclose(weights_of(pipeline), built.half().float())
    assert pipeline.tokenizer("a red circle").input_ids == (
        build_tokenizer()("a red circle").input_ids
    )
    assert pipeline.tokenizer.model_max_length == MAX_TOKENS
    assert pipeline.config.force_zeros_for_empty_prompt
    assert pipeline.default_sample_size * pipeline.vae_scale_factor == DEMO_SIZES[0][0]


@pytest.mark.parametrize(("width", "height"), DEMO_SIZES)
def test_it_draws_at_both_sizes(width: int, height: int) -> None:
    pipeline = build_pipeline(0)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "a red circle", width=width, height=height, num_inference_steps=2, output_type="np"
    ).images
    assert images.shape == (1, height, width, 3)
    assert np.isfinite(images).all()


def test_the_checkpoint_has_one_place_inside_the_package() -> None:
    assert checkpoint_path().name == "checkpoint"
    assert checkpoint_path().parent.name == "demo_model"
