"""Between the prompt and the first step: nothing waits, nothing is computed twice, and the result
equals the unprepared pipeline's bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_lcm
from torch.utils._python_dispatch import TorchDispatchMode

from kernels_warmup.compile import compile_model
from kernels_warmup.recipes import Recipe
from kernels_warmup.rewrites.prepared_loop import SCHEDULERS, SET_BY_TIMESTEPS, prepare_loop
from kernels_warmup.shapes import CompiledShape
from serve.model.loading import load_model
from serve.model.prompt_tokens import PromptRules, tokenise
from serve.model.sdxl import Conditioning, SdxlModel
from tests.serve.schedulers import SERVED, TRAILING

SHAPE = CompiledShape(128, 128)
WIDE = CompiledShape(160, 96)
META = torch.device("meta")


@pytest.fixture(scope="module")
def demo() -> SdxlModel:
    return load_model("demo", device_name="cpu")


def denoise(
    model: SdxlModel,
    conditioning: Conditioning,
    *,
    shape: CompiledShape = SHAPE,
    steps: int = 2,
    guidance: float = 5.0,
) -> torch.Tensor:
    return model.denoise(
        conditioning,
        shape=shape,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seeds=[3],
        on_loop_begins=lambda: None,
        on_step_enqueued=lambda *_: None,
    )


def unprepared(
    pipeline: Any, scheduler: Any, conditioning: Conditioning, steps: int, guidance: float = 5.0
) -> torch.Tensor:
    """diffusers' own call, with a new scheduler."""
    plain = diffusers.StableDiffusionXLPipeline(
        **pipeline.components | {"scheduler": scheduler}, add_watermarker=False
    )
    plain.set_progress_bar_config(disable=True)
    # A stochastic scheduler draws from the generator that the latents' noise came from.
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn((1, 4, *SHAPE.latent), generator=generator)
    result: torch.Tensor = plain(
        prompt_embeds=conditioning.prompt,
        pooled_prompt_embeds=conditioning.pooled,
        negative_prompt_embeds=conditioning.negative,
        negative_pooled_prompt_embeds=conditioning.negative_pooled,
        height=SHAPE.height,
        width=SHAPE.width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise,
        generator=[generator],
        output_type="latent",
        return_dict=False,
    )[0]
    return result


@pytest.mark.parametrize("name", SERVED)
def test_every_scheduler_gives_the_unprepared_pipelines_result(demo: SdxlModel, name: str) -> None:
    """Bit for bit, in repeated runs, with other step counts in between."""
    pipeline = copy.copy(demo.pipeline)
    pipeline.scheduler = SERVED[name]
    model = SdxlModel(pipeline, "demo", torch.device("cpu"), (SHAPE,))
    guided = demo.encode_prompts(["a red circle"], ["blue"], guided=True)
    alone = demo.encode_prompts(["a red circle"], [""], guided=False)
    for steps in (2, 3, 2):
        for conditioning, guidance in ((guided, 5.0), (alone, 1.0)):
            scheduler = type(SERVED[name]).from_config(SERVED[name].config)
            expected = unprepared(pipeline, scheduler, conditioning, steps, guidance)
            result = denoise(model, conditioning, steps=steps, guidance=guidance)
            assert torch.equal(result, expected), (steps, guidance)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_cached_timesteps_are_all_state_that_set_timesteps_sets(kind: Any) -> None:
    """If diffusers gives a scheduler more state, this fails, as a second request would."""
    written: set[str] = set()

    class Watched(kind):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            written.add(name)
            super().__setattr__(name, value)

    scheduler = Watched.from_config(TRAILING)
    written.clear()
    scheduler.set_timesteps(4, device="cpu")
    assert written <= set(SET_BY_TIMESTEPS)
    assert {"timesteps", "num_inference_steps"} <= written
    for name in written:
        value = getattr(scheduler, name)
        assert value is None or isinstance(value, int | torch.Tensor), name
    tensors = {n: getattr(scheduler, n) for n in written}
    before = {n: v.clone() for n, v in tensors.items() if isinstance(v, torch.Tensor)}
    written.clear()
    for timestep in scheduler.timesteps:
        sample = scheduler.scale_model_input(torch.ones(1, 4, 8, 8), timestep)
        scheduler.step(torch.ones(1, 4, 8, 8), timestep, sample, generator=torch.Generator())
    assert written & set(SET_BY_TIMESTEPS) == ({"_step_index"} & written)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())


def test_a_scheduler_with_a_history_computes_its_timesteps_each_time(
    demo: SdxlModel,
) -> None:
    pipeline = copy.copy(demo.pipeline)
    pipeline.scheduler = SERVED["dpm++"]
    assert "set_timesteps" not in vars(prepare_loop(pipeline).scheduler)
    pipeline.scheduler = SERVED["euler"]
    assert "set_timesteps" in vars(prepare_loop(pipeline).scheduler)


def test_the_loaded_pipeline_is_unchanged(demo: SdxlModel) -> None:
    """The bench's baselines run it, and they must run no code of this project."""
    denoise(demo, demo.encode_prompts(["a red circle"], ["blue"], guided=True))
    assert type(demo.pipeline) is diffusers.StableDiffusionXLPipeline
    scheduler = vars(demo.pipeline.scheduler)
    assert not {"set_timesteps", "set_begin_index", "step"} & scheduler.keys()


class Crossings(TorchDispatchMode):
    """Copies between the host and a device that replaces a GPU: `waited` for the enqueued work,
    or `sent` without waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []
        self.sent: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default and args[0].device == META:
            self.waited.append("a value is read")
            return 0.0
        if func is aten.copy_.default:
            source, target, blocks = args[1], args[0].device, not (len(args) > 2 and args[2])
        elif func is aten._to_copy.default:
            source, blocks = args[0], not kwargs.get("non_blocking")
            target = torch.device(kwargs.get("device") or source.device)
        else:
            return func(*args, **kwargs)
        if source.device != META and target == META:
            if blocks:
                self.waited.append(f"to the device: {tuple(source.shape)}")
            else:
                self.sent.append(tuple(source.shape))
        if source.device == META and target != META:
            self.waited.append(f"to the host: {tuple(source.shape)}")
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return func(*args, **kwargs)


class Reached(Exception):
    """Raised at the first UNet call."""


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> SdxlModel:
    """The demo on the meta device, whose UNet ends the loop where it begins."""

    def reached(*_: object, **__: object) -> None:
        raise Reached

    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))
    pinned: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: pinned.append(tuple(tensor.shape)) or tensor
    )
    pipeline = load_model("demo", device_name="cpu").pipeline.to(META)
    model = SdxlModel(pipeline, "demo", META, (SHAPE,))
    model.pipeline.unet.forward = reached
    vars(model)["pinned"] = pinned
    return model


def crossings(work: Callable[[], object]) -> Crossings:
    with Crossings() as seen:
        try:
            work()
        except Reached:
            seen.sent.append(())
    return seen


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_nothing_waits_for_the_device_before_the_first_step(
    on_a_device: SdxlModel, guidance: float
) -> None:
    model = on_a_device
    conditioning: list[Conditioning] = []

    def encode() -> None:
        guided = guidance > 1
        conditioning[:] = [model.encode_prompts(["a red circle"], ["blue"], guided, SHAPE)]

    def begin() -> None:
        denoise(model, conditioning[0], guidance=guidance)

    encode()
    crossings(begin)  # a warm-up, which fills the caches
    pinned = vars(model)["pinned"]
    pinned.clear()
    texts = 2 if guidance > 1 else 1
    encoding, beginning = crossings(encode), crossings(begin)
    assert encoding.waited == []
    assert encoding.sent == [(texts, 77), (texts, 77)]
    assert beginning.waited == []
    assert beginning.sent == [(1, 4, 16, 16), ()]  # the noise, and the first step is reached
    # A copy from memory that is not pinned waits, even with non_blocking.
    assert pinned == [(texts, 77), (texts, 77), (1, 4, 16, 16)]


@pytest.mark.parametrize("name", [name for name in SERVED if name != "dpm++"])
def test_nothing_waits_for_the_device_in_the_loop(
    on_a_device: SdxlModel, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the scheduler's steps, nor where guidance ends."""
    pipeline = on_a_device.pipeline
    pipeline.scheduler = SERVED[name]
    batches: list[int] = []

    def unet(sample: torch.Tensor, timestep: torch.Tensor, **_: object) -> tuple[torch.Tensor]:
        assert timestep.device == META
        batches.append(len(sample))
        return (torch.empty_like(sample),)

    # The noise of a step is drawn on the device; on this one it cannot be.
    for module in (scheduling_lcm, scheduling_euler_ancestral_discrete):
        monkeypatch.setattr(
            module, "randn_tensor", lambda shape, **_: torch.empty(shape, device=META)
        )
    pipeline.unet.forward = unet
    model = SdxlModel(pipeline, "demo", META, (SHAPE,))
    conditioning = model.encode_prompts(["a red circle"], ["blue"], True, SHAPE)

    def run() -> None:
        model.denoise(
            conditioning,
            shape=SHAPE,
            num_inference_steps=4,
            guidance_scale=5.0,
            seeds=[3],
            on_loop_begins=lambda: None,
            on_step_enqueued=lambda *_: None,
            guided_steps=2,
        )

    crossings(run)  # a warm-up, which fills the caches
    batches.clear()
    seen = crossings(run)
    assert batches == [2, 2, 1, 1]
    assert seen.waited == []


def test_the_unprepared_pipeline_waits_for_each_copy(on_a_device: SdxlModel) -> None:
    """Shows that the test above can see each wait."""
    model = on_a_device
    conditioning = model.encode_prompts(["a red circle"], ["blue"], True)
    begin = crossings(
        lambda: unprepared(model.pipeline, SERVED["euler"], conditioning, 4)  # type: ignore[arg-type]
    )
    assert begin.sent == [()]
    assert begin.waited == [
        "to the device: (5,)",  # sigmas
        "to the device: (4,)",  # timesteps
        "to the host: (5,)",  # sigmas back
        "to the device: (1, 4, 16, 16)",
        "to the device: (2, 6)",  # the size condition
    ]


def test_no_module_tree_is_walked_between_the_prompt_and_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SDXL has 2,700 modules; diffusers walks them all for a device or a type, 4 ms a time."""
    model = load_model("demo", device_name="cpu")
    model.text = compile_model(model.pipeline, recipe=Recipe(scope="none", replay="none")).text
    real = torch.nn.Module.named_modules
    walked = 0

    def watched(self: Any, memo: Any = None, prefix: str = "", *rest: Any, **more: Any) -> Any:
        nonlocal walked
        for found in real(self, memo, prefix, *rest, **more):
            walked += prefix == ""  # modules of a submodule's walk come through its parent's
            yield found

    conditioning = model.encode_prompts(["a red circle"], ["blue"], True, SHAPE)
    denoise(model, conditioning)
    monkeypatch.setattr(torch.nn.Module, "named_modules", watched)
    modules = len(list(model.pipeline.unet.modules()))
    assert walked == modules > 100  # the count works
    walked = 0
    for ahead in (SHAPE, None):
        conditioning = model.encode_prompts(["a blue circle"], ["red"], True, ahead)
        denoise(model, conditioning)
        assert walked < 20
    model.pipeline._execution_device  # noqa: B018 - the property that diffusers reads
    assert walked > 200


def with_text_once() -> SdxlModel:
    model = load_model("demo", device_name="cpu")
    model.text = compile_model(model.pipeline, recipe=Recipe(scope="none", replay="none")).text
    return model


def test_a_run_uses_the_text_that_was_filled_before_its_steps() -> None:
    model = with_text_once()
    prompts = ("a red circle", "a blue square")

    def encode(prompt: str, ahead: bool, guided: bool = True) -> Conditioning:
        shape = SHAPE if ahead else None
        return model.encode_prompts([prompt], ["green"], guided, shape)

    expected = [denoise(model, encode(prompt, ahead=False)) for prompt in prompts]
    assert not torch.equal(*expected)
    fills: list[int] = []
    real = model.text._fill  # type: ignore[union-attr]
    model.text._fill = lambda *a: (fills.append(1), real(*a))[1]  # type: ignore

    def filled(work: Callable[[], object]) -> int:
        fills.clear()
        work()
        return len(fills)

    # As requests come: filled once, before the steps.
    for prompt, latents in zip(prompts, expected, strict=True):
        conditioning = encode(prompt, ahead=True)
        result: list[torch.Tensor] = []
        assert filled(lambda c=conditioning, r=result: r.append(denoise(model, c))) == 0  # type: ignore[misc]
        assert torch.equal(result[0], latents)
        assert torch.equal(denoise(model, conditioning), latents)
    # Another text came between: the buffers hold that one's.
    first, second = (encode(prompt, ahead=True) for prompt in prompts)
    assert torch.equal(denoise(model, first), expected[0])
    assert torch.equal(denoise(model, second), expected[1])
    assert torch.equal(denoise(model, first), expected[0])
    # Another size, or without guidance, is another condition.
    conditioning = encode(prompts[0], ahead=True)
    assert filled(lambda: denoise(model, conditioning, shape=WIDE)) == 1
    conditioning = encode(prompts[0], ahead=True)
    assert filled(lambda: denoise(model, conditioning, guidance=1.0)) == 1
    # A cancelled run leaves no text behind for another run's steps.
    conditioning = encode(prompts[0], ahead=True)
    with pytest.raises(RuntimeError, match="cancelled"):
        model.denoise(
            conditioning,
            shape=SHAPE,
            num_inference_steps=2,
            guidance_scale=5.0,
            seeds=[3],
            on_loop_begins=cancelled,
            on_step_enqueued=lambda *_: None,
        )
    others = torch.randn(2, 77, conditioning.prompt.shape[-1])
    added = {"text_embeds": conditioning.pooled.repeat(2, 1), "time_ids": torch.zeros(2, 6)}
    assert filled(lambda: model.text.prepare(others, added)) == 1  # type: ignore[union-attr]
    assert torch.equal(denoise(model, conditioning), expected[0])


def cancelled() -> None:
    raise RuntimeError("cancelled")


def test_texts_are_truncated_and_padded_as_diffusers_does(demo: SdxlModel) -> None:
    texts = ["", "a red circle", "circle " * 74, "circle " * 75, "circle " * 76, "a blue " * 300]
    for tokenizer in (demo.pipeline.tokenizer, demo.pipeline.tokenizer_2):
        tokenizer = copy.deepcopy(tokenizer)
        for pad in (tokenizer.pad_token, "!"):  # SDXL's second tokenizer pads with another token
            tokenizer.pad_token = pad
            tokens = tokenise(tokenizer, PromptRules().read(texts))
            expected = tokenizer(
                texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            assert torch.equal(tokens.ids, expected)
            assert tokens.ids.dtype == expected.dtype
    whole = demo.pipeline.tokenizer(texts, verbose=False).input_ids
    assert tokens.counts == tuple(map(len, whole))
    assert tokens.cut == tuple(count > 77 for count in tokens.counts)
    assert True in tokens.cut
    assert False in tokens.cut
