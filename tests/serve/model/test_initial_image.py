"""Image to image in the model: equal to diffusers' own pipeline, with every scheduler."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from kernels_warmup.shapes import CompiledShape
from serve.model.initial_image import InitialLatents
from serve.model.loading import load_model
from serve.model.schedulers import Schedule
from serve.model.sdxl import Conditioning, SdxlModel
from tests.serve.schedulers import SERVED

SHAPE = CompiledShape(96, 64)
STEPS = 4


@pytest.fixture(scope="module")
def demo() -> SdxlModel:
    return load_model("demo", device_name="cpu")


@pytest.fixture(scope="module")
def text(demo: SdxlModel) -> Conditioning:
    return demo.encode_prompts(["a red circle"], ["blue"], guided=True)


@pytest.fixture(scope="module")
def picture() -> np.ndarray[Any, Any]:
    """A red circle on white, (height, width, 3)."""
    image = Image.new("RGB", (SHAPE.width, SHAPE.height), "white")
    ImageDraw.Draw(image).ellipse((20, 10, 64, 54), fill="red")
    return np.array(image)


def denoise(
    model: SdxlModel,
    text: Conditioning,
    initial: InitialLatents | None,
    shape: CompiledShape = SHAPE,
    indices: list[int] | None = None,
) -> torch.Tensor:
    return model.denoise(
        text,
        shape=shape,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        seeds=[3],
        on_loop_begins=lambda: None if indices is None else indices.append(-1),
        on_step_enqueued=lambda index, _: None if indices is None else indices.append(index),
        initial=initial,
    )


def diffusers_own(
    pipeline: Any,
    scheduler: Any,
    text: Conditioning,
    latents: torch.Tensor,
    strength: float,
    timesteps: list[int] | None = None,
) -> torch.Tensor:
    """diffusers' image-to-image pipeline, given a picture's latents."""
    plain = diffusers.StableDiffusionXLImg2ImgPipeline(
        **pipeline.components | {"scheduler": scheduler}, add_watermarker=False
    )
    plain.set_progress_bar_config(disable=True)
    result: torch.Tensor = plain(
        image=latents,
        strength=strength,
        prompt_embeds=text.prompt,
        pooled_prompt_embeds=text.pooled,
        negative_prompt_embeds=text.negative,
        negative_pooled_prompt_embeds=text.negative_pooled,
        num_inference_steps=STEPS,
        timesteps=timesteps,
        guidance_scale=5.0,
        generator=[torch.Generator().manual_seed(3)],
        output_type="latent",
        return_dict=False,
    )[0]
    return result


@pytest.mark.parametrize("name", SERVED)
def test_every_scheduler_gives_the_result_of_diffusers_own_pipeline(
    demo: SdxlModel, text: Conditioning, picture: np.ndarray[Any, Any], name: str
) -> None:
    """Bit for bit, also after other strengths, and without an effect on text to image."""
    pipeline = copy.copy(demo.pipeline)
    pipeline.scheduler = SERVED[name]
    model = SdxlModel(pipeline, "demo", torch.device("cpu"), (SHAPE,))
    initial = model.initial_latents([picture], [1], 0)
    from_text = denoise(model, text, None)
    for strength, steps in ((1.0, 4), (0.5, 2), (0.3, 1), (0.5, 2)):
        scheduler = type(SERVED[name]).from_config(SERVED[name].config)
        expected = diffusers_own(pipeline, scheduler, text, initial.latents, strength)
        indices: list[int] = []
        result = denoise(model, text, replace(initial, first_step=STEPS - steps), indices=indices)
        assert torch.equal(result, expected), strength
        assert indices == list(range(-1, steps))
        assert not torch.equal(result, from_text)
    assert torch.equal(denoise(model, text, None), from_text)


def test_fixed_timesteps_give_the_result_of_diffusers_own_pipeline(
    demo: SdxlModel, text: Conditioning, picture: np.ndarray[Any, Any]
) -> None:
    fixed = [999, 749, 499, 249]
    pipeline = copy.copy(demo.pipeline)
    pipeline.scheduler = SERVED["lcm"]
    model = SdxlModel(
        pipeline, "demo", torch.device("cpu"), (SHAPE,), Schedule(timesteps=tuple(fixed))
    )
    initial = model.initial_latents([picture], [1], 2)
    scheduler = type(SERVED["lcm"]).from_config(SERVED["lcm"].config)
    expected = diffusers_own(pipeline, scheduler, text, initial.latents, 0.5, fixed)
    for _ in range(2):
        assert torch.equal(denoise(model, text, initial), expected)


def test_a_picture_is_encoded_to_the_mode_of_the_encoders_distribution(
    demo: SdxlModel, picture: np.ndarray[Any, Any]
) -> None:
    """Alone or beside others."""
    other = 255 - picture
    latents = demo.initial_latents([picture, other], [2, 1], 0).latents
    assert latents.shape == (3, 4, *SHAPE.latent)
    assert torch.equal(latents[0], latents[1])
    assert torch.equal(latents[2:], demo.initial_latents([other], [1], 0).latents)
    vae = demo.pipeline.vae
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    assert torch.equal(latents[:1], expected)


def test_a_picture_that_the_model_has_drawn_is_decoded_to_itself(demo: SdxlModel) -> None:
    text = demo.encode_prompts(["a red circle on a white background"], [""], guided=True)
    drawn = demo.decode(denoise(demo, text, None, CompiledShape(128, 128))).pixels[0]
    decoded = demo.decode(demo.initial_latents([drawn.numpy()], [1], 0).latents).pixels[0]
    assert float((decoded.float() - drawn.float()).abs().mean()) < 3


def test_the_pipeline_and_its_scheduler_are_restored_after_a_failed_run(
    demo: SdxlModel, text: Conditioning, picture: np.ndarray[Any, Any]
) -> None:
    initial = demo.initial_latents([picture], [1], 2)
    scheduler = demo._loop.scheduler
    denoise(demo, text, None)
    before = {name: vars(scheduler).get(name) for name in ("set_timesteps", "set_begin_index")}

    def failing() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        demo.denoise(
            text,
            shape=SHAPE,
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            seeds=[3],
            on_loop_begins=failing,
            on_step_enqueued=lambda *_: None,
            initial=initial,
        )
    assert {n: vars(scheduler).get(n) for n in before} == before
    assert "prepare_latents" not in vars(demo._loop)
