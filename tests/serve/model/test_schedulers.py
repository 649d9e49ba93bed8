"""The chosen scheduler and timesteps, and the check of few-step checkpoints."""

from __future__ import annotations

import asyncio
import copy
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import diffusers
import pytest
import torch

from kernels_warmup.rewrites.prepared_loop import SCHEDULERS
from kernels_warmup.shapes import CompiledShape
from serve.demo_model import checkpoint_path
from serve.engine.planning import plan_request
from serve.errors import InvalidRequest, ModelError
from serve.http.openai.schema import ImageGenerationRequest
from serve.model.loading import load_model
from serve.model.schedulers import FAMILIES, KINDS, Schedule, describe, misfit
from serve.model.sdxl import SdxlModel
from serve.model.sdxl_base import SCHEDULER_CONFIG
from serve.settings import SchedulerName
from tests.serve.conftest import request
from tests.serve.engine.demo_runtime import build, generate, new_call, settings

SHAPE = CompiledShape(128, 128)
DMD2 = (999, 749, 499, 249)


@pytest.fixture(scope="module")
def loaded() -> SdxlModel:
    return load_model("demo", device_name="cpu")


def scheduler_of(name: SchedulerName, **config: Any) -> Any:
    kind, changes = KINDS[name]
    return kind.from_config({**SCHEDULER_CONFIG, **config, **changes})  # type: ignore[attr-defined]


def demo(schedule: Schedule) -> SdxlModel:
    return load_model("demo", device_name="cpu", schedule=schedule)


def draw(model: SdxlModel, steps: int) -> torch.Tensor:
    return model.denoise(
        model.encode_prompts(["a red circle"], [""], True),
        shape=SHAPE,
        num_inference_steps=steps,
        guidance_scale=5.0,
        seeds=[3],
        on_loop_begins=lambda: None,
        on_step_enqueued=lambda *_: None,
    )


def test_every_scheduler_costs_no_wait_in_the_loop() -> None:
    assert set(KINDS) == set(get_args(SchedulerName))
    assert {kind for kind, _ in KINDS.values()} == set(SCHEDULERS)


@pytest.mark.parametrize(
    ("kind", "left_out", "evaluations"),
    [
        (diffusers.DPMSolverMultistepScheduler, 0, 4),
        (diffusers.HeunDiscreteScheduler, 0, 7),
        (diffusers.HeunDiscreteScheduler, 1, 5),
        (diffusers.KDPM2AncestralDiscreteScheduler, 0, 7),
        (diffusers.PNDMScheduler, 0, 5),
        (diffusers.PNDMScheduler, 1, 4),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, in diffusers
def test_a_step_may_evaluate_the_unet_twice(
    loaded: SdxlModel, kind: Any, left_out: int, evaluations: int
) -> None:
    """As a checkpoint may bring these. Progress, metrics and the end of guidance count steps."""
    pipeline = copy.copy(loaded.pipeline)
    pipeline.scheduler = kind.from_config({**SCHEDULER_CONFIG, "skip_prk_steps": True})
    model = SdxlModel(pipeline, "demo", torch.device("cpu"), (SHAPE,))
    initial = None
    if left_out:
        picture = torch.zeros(SHAPE.height, SHAPE.width, 3, dtype=torch.uint8).numpy()
        initial = model.initial_latents([picture], [1], left_out)
    batches: list[int] = []
    ends: list[tuple[int, int]] = []
    watched = pipeline.unet.register_forward_pre_hook(
        lambda _, arguments: batches.append(len(arguments[0]))
    )
    model.denoise(
        model.encode_prompts(["a red circle"], ["blue"], True, guidance_ends=True),
        shape=SHAPE,
        num_inference_steps=4,
        guidance_scale=5.0,
        guided_steps=2,
        seeds=[3],
        on_loop_begins=lambda: None,
        on_step_enqueued=lambda index, _: ends.append((index, len(batches))),
        initial=initial,
    )
    watched.remove()
    assert [index for index, _ in ends] == list(range(4 - left_out))
    assert len(batches) == ends[-1][1] == evaluations
    guided = ends[1][1]
    assert batches == [2] * guided + [1] * (evaluations - guided)


@pytest.mark.parametrize("name", KINDS)
def test_a_chosen_scheduler_keeps_the_checkpoints_noise(name: SchedulerName) -> None:
    pipeline = SimpleNamespace(scheduler=None)
    own = diffusers.EulerDiscreteScheduler(**SCHEDULER_CONFIG | {"prediction_type": "v_prediction"})
    pipeline.scheduler = own
    with pytest.MonkeyPatch.context() as patch:
        logged: list[str] = []
        patch.setattr(logging.Logger, "warning", lambda _, text, *__: logged.append(text))
        Schedule(name).apply(pipeline)
    assert logged == []
    chosen = pipeline.scheduler
    assert type(chosen) is KINDS[name][0]
    assert chosen.config.prediction_type == "v_prediction"
    assert torch.equal(chosen.alphas_cumprod, own.alphas_cumprod)
    if name.endswith("trailing"):
        assert chosen.config.timestep_spacing == "trailing"
    elif name != "lcm":
        assert chosen.config.timestep_spacing == "leading"
    assert not chosen.config.get("clip_sample")


def test_the_checkpoints_own_scheduler_stays_without_a_choice() -> None:
    pipeline = SimpleNamespace(scheduler=None)
    pipeline.scheduler = own = diffusers.EulerDiscreteScheduler(**SCHEDULER_CONFIG)
    Schedule().apply(pipeline)
    assert pipeline.scheduler is own


@pytest.mark.parametrize("name", ["lcm", "euler"])
def test_fixed_timesteps_are_those_of_diffusers_call(name: SchedulerName) -> None:
    model = demo(Schedule(name, DMD2))
    scheduler = type(model.pipeline.scheduler).from_config(model.pipeline.scheduler.config)
    plain = diffusers.StableDiffusionXLPipeline(
        **model.pipeline.components | {"scheduler": scheduler}, add_watermarker=False
    )
    plain.set_progress_bar_config(disable=True)
    conditioning = model.encode_prompts(["a red circle"], [""], True)
    generator = torch.Generator().manual_seed(3)
    expected = plain(
        prompt_embeds=conditioning.prompt,
        pooled_prompt_embeds=conditioning.pooled,
        negative_prompt_embeds=conditioning.negative,
        negative_pooled_prompt_embeds=conditioning.negative_pooled,
        height=SHAPE.height,
        width=SHAPE.width,
        timesteps=list(DMD2),
        guidance_scale=5.0,
        latents=torch.randn((1, 4, *SHAPE.latent), generator=generator),
        generator=[generator],
        output_type="latent",
        return_dict=False,
    )[0]
    assert torch.equal(draw(model, 4), expected)
    scheduler = model._loop.scheduler
    assert scheduler.timesteps.tolist() == list(DMD2)
    with pytest.MonkeyPatch.context() as patch:
        # They are computed once: computing them again would wait for the device.
        patch.setattr(type(scheduler), "set_timesteps", lambda *_, **__: pytest.fail("computed"))
        assert torch.equal(draw(model, 4), expected)


@pytest.mark.parametrize(
    ("scheduler", "timesteps", "sentence"),
    [
        ("ddim", DMD2, "takes no timesteps"),
        ("euler-ancestral", DMD2, "takes no timesteps"),
        ("lcm", (1000, 500), "0 to 999"),
    ],
)
def test_timesteps_that_the_scheduler_cannot_run_stop_the_start(
    scheduler: SchedulerName, timesteps: tuple[int, ...], sentence: str
) -> None:
    pipeline = SimpleNamespace(scheduler=None)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler(**SCHEDULER_CONFIG)
    with pytest.raises(ModelError, match=f"SDXL_TIMESTEPS={timesteps[0]},.*{sentence}"):
        Schedule(scheduler, timesteps).apply(pipeline)
    pipeline.scheduler = diffusers.EulerDiscreteScheduler(
        **SCHEDULER_CONFIG | {"use_karras_sigmas": True}
    )
    with pytest.raises(ModelError, match="by a rule of its own"):
        Schedule(None, DMD2).apply(pipeline)


def test_a_model_at_fixed_timesteps_serves_their_number_of_steps() -> None:
    runtime = build(scheduler="lcm", timesteps=DMD2, shapes=(SHAPE,), guidance_scale=1.0)
    asyncio.run(runtime.start())
    assert runtime.readiness.as_json()["scheduler"] == {"kind": "LCMScheduler"}
    for steps in (None, 4):
        call = new_call(runtime)
        generate(runtime, call, num_inference_steps=steps)
        assert call.run is not None
        assert len(call.run.steps) == 4
    with pytest.raises(InvalidRequest, match="must be 4"):
        generate(runtime, num_inference_steps=5)
    runtime.close(1)


def test_quality_does_not_change_a_fixed_number_of_steps() -> None:
    wanted = ImageGenerationRequest(prompt="a red circle", quality="low")
    assert wanted.text_to_image(20).num_inference_steps == 10
    assert wanted.text_to_image(20, fixed_steps=True).num_inference_steps is None
    fixed = settings(timesteps=tuple(range(950, 0, -50)))
    planned = plan_request(request(num_inference_steps=None), fixed, [SHAPE], [SHAPE])
    assert planned.num_inference_steps == 19


FITTING: dict[str, tuple[SchedulerName, tuple[int, ...] | None]] = {
    "sdxl-turbo": ("euler-ancestral-trailing", None),
    "SDXL_Lightning_4step": ("euler-trailing", None),
    "Hyper-SD": ("ddim-trailing", None),
    "sdxl-dmd2-4step": ("lcm", DMD2),
    "lcm-sdxl": ("lcm", None),
}


@pytest.mark.parametrize("model", FITTING)
def test_a_family_is_known_by_its_name_and_its_scheduler_fits_or_is_named(model: str) -> None:
    name, timesteps = FITTING[model]
    few = settings(steps=len(timesteps or range(4)), guidance_scale=0.0, timesteps=timesteps)
    assert misfit(model, scheduler_of(name), few) is None
    own = misfit(model, scheduler_of("euler"), few)  # as SDXL base has it
    assert own is not None
    assert f"SDXL_SCHEDULER={name}" in own
    for other in KINDS:
        fits = other == name
        assert (misfit(model, scheduler_of(other), few) is None) == fits, other


def test_a_family_at_fixed_timesteps_needs_them() -> None:
    few = settings(steps=4, guidance_scale=0.0)
    sentence = misfit("sdxl-dmd2-4step", scheduler_of("lcm"), few)
    assert sentence is not None
    assert "SDXL_TIMESTEPS=999,749,499,249" in sentence
    assert len(FITTING) == len(FAMILIES)


@pytest.mark.parametrize("name", ["euler", "euler-ancestral"])
def test_few_steps_without_guidance_need_trailing_timesteps_in_any_checkpoint(
    name: SchedulerName,
) -> None:
    few = {"steps": 4, "guidance_scale": 1.0}
    sentence = misfit("mine", scheduler_of(name), settings(**few))
    assert sentence is not None
    assert f"SDXL_SCHEDULER={name}-trailing" in sentence
    trailing = scheduler_of(name, timestep_spacing="trailing")
    assert misfit("mine", trailing, settings(**few)) is None
    assert misfit("mine", scheduler_of(name), settings(guidance_scale=1.0)) is None
    assert misfit("mine", scheduler_of(name), settings(steps=4)) is None
    assert misfit("demo", scheduler_of(name), settings()) is None
    for harmless in ("stable-diffusion-xl-base-1.0", "calcmodel", "admdesign"):
        assert misfit(harmless, scheduler_of(name), settings()) is None


def test_a_wrong_scheduler_is_logged_and_on_ready_and_the_model_is_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "demo-turbo"
    shutil.copytree(checkpoint_path(), directory)
    runtime = build(model=str(directory), shapes=(SHAPE,), guidance_scale=0.0, steps=1)
    asyncio.run(runtime.start())
    reported = runtime.readiness.as_json()["scheduler"]
    assert reported["kind"] == "EulerDiscreteScheduler"
    assert reported["spacing"] == "leading"
    assert "SDXL_SCHEDULER=euler-ancestral-trailing" in reported["wrong"]
    assert caplog.text.count(reported["wrong"]) == 1
    generate(runtime, num_inference_steps=1)
    runtime.close(1)


def test_a_spacing_that_is_not_read_is_not_reported() -> None:
    assert describe(scheduler_of("lcm")) == {"kind": "LCMScheduler"}
    assert describe(scheduler_of("ddim-trailing"))["spacing"] == "trailing"
