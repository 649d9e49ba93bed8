"""Guidance that ends within a run: the result is that of diffusers' own loop with a callback, and
every record says which step had guidance."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from kernels_warmup.compile import compile_model
from kernels_warmup.recipes import Recipe
from kernels_warmup.shapes import CompiledShape
from serve.engine.call import Call
from serve.engine.planning import PlannedRequest
from serve.engine.runtime import Runtime
from serve.model.loading import load_model
from serve.model.sdxl import SdxlModel
from serve.schema import TextToImageRequest
from tests.serve.conftest import request
from tests.serve.engine.demo_runtime import counted, pixels

SHAPE = CompiledShape(128, 128)
STEPS = 3
SEEDS = (3, 4, 5)
PROMPTS = ("a red circle", "a blue square", "a green star")
NEGATIVES = {"empty": ("", "", ""), "all": ("blue", "red", "dark"), "some": ("", "red", "")}

NewCall = Callable[[], Call]


@pytest.fixture(scope="module")
def plain() -> SdxlModel:
    return load_model("demo", device_name="cpu")


@pytest.fixture(scope="module")
def rewritten() -> SdxlModel:
    """With the text computed once a run, and a function for runs without a negative prompt."""
    model = load_model("demo", device_name="cpu")
    recipe = Recipe(scope="none", replay="none", zero_text=True)
    model.text = compile_model(model.pipeline, recipe=recipe).text
    return model


def draw(
    model: SdxlModel,
    guided_steps: int | None,
    negatives: tuple[str, ...] = ("",),
    scale: float = 5.0,
    on_loop_begins: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Latents of as many images as there are negative prompts."""
    images = len(negatives)
    guided = scale > 1 and guided_steps != 0
    conditioning = model.encode_prompts(
        PROMPTS[:images], negatives, guided, SHAPE, guidance_ends=guided_steps is not None
    )
    return model.denoise(
        conditioning,
        shape=SHAPE,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        seeds=SEEDS[:images],
        on_loop_begins=on_loop_begins,
        on_step_enqueued=lambda *_: None,
        guided_steps=guided_steps,
    )


def reference(model: SdxlModel, guided_steps: int, negatives: tuple[str, ...]) -> torch.Tensor:
    """diffusers' pipeline with the callback that its documentation shows for dynamic guidance."""
    pipeline = diffusers.StableDiffusionXLPipeline(
        **model.pipeline.components
        | {
            "scheduler": type(model.pipeline.scheduler).from_config(model.pipeline.scheduler.config)
        },
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]

    def end_guidance(pipeline: Any, index: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index + 1 == guided_steps:
            pipeline._guidance_scale = 0.0
            return {name: tensors[name].chunk(2)[1] for name in names}
        return {}

    images = len(negatives)
    conditioning = model.encode_prompts(PROMPTS[:images], negatives, True)
    noise = [
        torch.randn((1, 4, *SHAPE.latent), generator=torch.Generator().manual_seed(seed))
        for seed in SEEDS[:images]
    ]
    result: torch.Tensor = pipeline(
        prompt_embeds=conditioning.prompt,
        pooled_prompt_embeds=conditioning.pooled,
        negative_prompt_embeds=conditioning.negative,
        negative_pooled_prompt_embeds=conditioning.negative_pooled,
        height=SHAPE.height,
        width=SHAPE.width,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        latents=torch.cat(noise),
        output_type="latent",
        return_dict=False,
        callback_on_step_end=end_guidance,
        callback_on_step_end_tensor_inputs=names,
    )[0]
    return result


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize(("images", "guided_steps"), [(1, 1), (3, 2)])
def test_a_mixed_run_is_diffusers_loop_with_a_callback(
    plain: SdxlModel, rewritten: SdxlModel, negatives: str, images: int, guided_steps: int
) -> None:
    texts = NEGATIVES[negatives][:images]
    expected = reference(plain, guided_steps, texts)
    assert torch.equal(draw(plain, guided_steps, texts), expected)
    result = draw(rewritten, guided_steps, texts)
    assert (result - expected).abs().max() < 2e-3  # the rewrites round at other places
    # Neither all of the steps nor none of them.
    assert (result - draw(rewritten, None, texts)).abs().max() > 0.01
    assert (result - draw(rewritten, 0, texts)).abs().max() > 0.01


@pytest.mark.parametrize("model_name", ["plain", "rewritten"])
def test_all_steps_and_none_are_a_guided_and_an_unguided_run(
    model_name: str, rewritten: SdxlModel, request: pytest.FixtureRequest
) -> None:
    model: SdxlModel = request.getfixturevalue(model_name)
    for negatives in (("",), ("blue",)):
        guided = draw(model, None, negatives)
        assert torch.equal(draw(model, STEPS, negatives), guided)
        unguided = draw(model, None, negatives, scale=1.0)
        assert torch.equal(draw(model, 0, negatives), unguided)
        assert torch.equal(draw(model, 2, negatives, scale=1.0), unguided)


def test_both_texts_are_in_their_buffers_before_the_first_step(
    rewritten: SdxlModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The switch fills no buffer and allocates none, and a cancelled run leaves nothing behind."""
    text = rewritten.text
    assert text is not None
    expected = {negative: draw(rewritten, 2, (negative,)) for negative in ("", "blue")}
    assert not torch.equal(*expected.values())
    events: list[object] = []
    fill, attach = text._fill, text._attach
    monkeypatch.setattr(text, "_fill", lambda *a: (events.append("fill"), fill(*a))[1])
    monkeypatch.setattr(text, "_allocate", lambda *_: pytest.fail("allocated"))
    monkeypatch.setattr(
        text,
        "_attach",
        lambda condition: (events.append(len(condition.added)), attach(condition))[1],
    )
    for negative in ("", "blue", ""):
        events.clear()
        result = draw(rewritten, 2, (negative,), on_loop_begins=lambda: events.append("loop"))
        assert torch.equal(result, expected[negative])
        loop = events.index("loop")
        assert events[:loop].count("fill") == 2
        assert events[loop + 1 :] == [2, 2, 1]  # each step reads the buffers of its batch
        with pytest.raises(RuntimeError, match="cancelled"):
            draw(rewritten, 2, ("red",), on_loop_begins=cancelled)


def cancelled() -> None:
    raise RuntimeError("cancelled")


@pytest.mark.parametrize(
    ("share", "steps", "guided"),
    [(1, 20, 20), (0.6, 20, 12), (0.5, 5, 3), (0.29, 100, 29), (0.01, 20, 0), (0, 20, 0)],
)
def test_the_share_is_rounded_to_whole_steps(share: float, steps: int, guided: int) -> None:
    planned = PlannedRequest(request(guidance_end=share), SHAPE, steps, 5.0, 1)
    assert planned.guided_steps == guided
    assert planned.guided == (guided > 0)
    assert planned.facts("demo", False).guidance_end == share


def test_requests_with_the_same_guided_steps_may_share_a_run() -> None:
    def key(scale: float = 5.0, **fields: Any) -> object:
        return PlannedRequest(request(**fields), SHAPE, 20, scale, 1).run_key

    assert key(guidance_end=0.6) == key(guidance_end=0.61)
    assert key(guidance_end=0.6) != key(guidance_end=0.5) != key()
    # Without guidance its end changes nothing.
    assert key(1.0, guidance_end=0.6) == key(1.0) == key(guidance_end=0)


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", True, float("nan"), None])
def test_a_share_is_a_number_from_0_to_1(value: object) -> None:
    with pytest.raises(ValueError, match="guidance_end"):
        TextToImageRequest.model_validate({"prompt": "a red circle", "guidance_end": value})


def test_a_request_is_recorded_by_the_guidance_of_each_step(
    runtime: Runtime, new_call: NewCall
) -> None:
    def served(**fields: Any) -> tuple[Any, Call]:
        call = new_call()
        wanted = request(num_inference_steps=4, format="png", **fields)
        response = asyncio.run(runtime.generate(wanted, call))
        runtime.metrics.observe_request(call.finish(200), None)
        return response, call

    def steps(guidance: str) -> float:
        labels = {"shape": "128x128", "guidance": guidance, "batch": "1"}
        return counted(runtime, "sdxl_denoise_step_duration_seconds_count", **labels)

    whole, _ = served()
    before = {guidance: steps(guidance) for guidance in ("on", "off")}
    half, call = served(guidance_end=0.5)
    assert {guidance: steps(guidance) - before[guidance] for guidance in before} == {
        "on": 2,
        "off": 2,
    }
    assert call.run is not None
    assert not call.run.eager_fallback
    assert [call.run.has_guidance(step) for step in call.run.steps] == [True, True, False, False]
    assert len(half.timings.steps_ms) == 4
    assert served(guidance_end=1)[0].image.url == whole.image.url != half.image.url
    none, call = served(guidance_end=0)
    assert call.run is not None
    assert not call.run.guidance
    assert none.image.url == served(guidance_scale=1)[0].image.url
    assert pixels(none).shape == (128, 128, 3)


def test_only_requests_that_end_guidance_together_share_a_run(
    runtime: Runtime, new_call: NewCall
) -> None:
    ends = (0.5, 0.5, 1.0)
    calls = [new_call() for _ in ends]
    wanted = [request(guidance_end=end, seed=seed) for seed, end in enumerate(ends)]
    asyncio.run(runtime.generate_together(wanted, calls))
    runs = [call.run.run_id for call in calls if call.run is not None]
    assert runs[0] == runs[1] != runs[2]
