"""The host's time for a request outside its steps and its decode: rows of `python -m bench micro`.

The service runs unchanged on the demo model and a CPU, except for two replacements that return at
once: the UNet where the loop is timed, and the model where the thread's turns are timed.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bench.micro.timing import CallTime, summary, time_call

if TYPE_CHECKING:
    from serve.engine.runtime import Runtime
    from serve.model.sdxl import SdxlModel

LOOP_STEPS = 20
SIDE = 1024
"""Pixels of a picture's side; latents have an eighth."""
PROMPTS = (
    "a red circle on the left and a big blue square, photograph, 35mm, golden hour",
    "blurry, low quality, deformed",
)
QUEUED = 8
"""Requests in the queue when the thread's turns are timed."""


def measure(series: int) -> list[CallTime]:
    """Every piece, in the order in which a request runs them."""
    from prometheus_client import CollectorRegistry

    from kernels_warmup.shapes import CompiledShape
    from serve.engine.build import build_runtime
    from serve.settings import ServeSettings

    settings = ServeSettings.model_validate(
        {
            "model": "demo",
            "device": "cpu",
            "shapes": (CompiledShape(128, 128),),
            "compile": "off",
            "cache_dir": None,
            "ENABLE_TRACING": False,
        }
    )
    runtime = build_runtime(settings, CollectorRegistry())
    with asyncio.Runner() as runner:
        try:
            runner.run(runtime.start())
            model = runtime.on_model(lambda model: model).result()
            return [
                _tokens(model, series),
                *_loop(model, series),
                _turn(runtime, model, runner, series),
                *_pictures(model, series),
                _answer(runtime, runner, series),
            ]
        finally:
            runtime.close(1)


def _tokens(model: SdxlModel, series: int) -> CallTime:
    from serve.model.prompt_tokens import PromptRules, tokenise

    tokenizers = (model.pipeline.tokenizer, model.pipeline.tokenizer_2)

    def both() -> None:
        for tokenizer in tokenizers:
            tokenise(tokenizer, PromptRules().read(PROMPTS))

    return time_call("tokens", "a prompt and a negative one, by both tokenizers", both, series, 1)


def _loop(model: SdxlModel, series: int) -> list[CallTime]:
    """From the entry of `denoise` to the first UNet call, and then a step outside the UNet."""
    from kernels_warmup.shapes import CompiledShape

    calls: list[int] = []

    def at_once(sample: Any, *_: object, **__: object) -> tuple[Any]:
        calls.append(time.perf_counter_ns())
        return (sample,)

    conditioning = model.encode_prompts([PROMPTS[0]], [PROMPTS[1]], True)

    def once() -> tuple[float, float]:
        calls.clear()
        start = time.perf_counter_ns()
        model.denoise(
            conditioning,
            shape=CompiledShape(SIDE, SIDE),
            num_inference_steps=LOOP_STEPS,
            guidance_scale=5.0,
            seeds=[1],
            on_loop_begins=lambda: None,
            on_step_enqueued=lambda *_: None,
        )
        return calls[0] - start, (calls[-1] - calls[0]) / (LOOP_STEPS - 1)

    unet = model.pipeline.unet
    unet.forward = at_once
    try:
        once()
        enter, step = zip(*(once() for _ in range(series)), strict=True)
    finally:
        del unet.forward
    return [
        summary("enter", f"from denoise() to the first UNet call, {SIDE}x{SIDE}", enter),
        summary("outside", "a step outside the UNet", step),
    ]


def _turn(runtime: Runtime, model: SdxlModel, runner: asyncio.Runner, series: int) -> CallTime:
    """The model's thread between two queued requests, outside the model."""
    from serve.engine.call import Call
    from serve.schema import TextToImageRequest

    # Guidance scales of their own, so that no two share a run.
    requests = [
        TextToImageRequest(
            prompt=PROMPTS[0], num_inference_steps=LOOP_STEPS, seed=1, guidance_scale=2 + index / 10
        )
        for index in range(QUEUED)
    ]

    async def queued() -> None:
        await asyncio.gather(
            *(
                runtime.generate(request, Call("/", "POST", runtime.tracing.identify()))
                for request in requests
            )
        )

    gaps: list[float] = []
    with _instant(model) as turns:
        while len(gaps) < series:
            turns.clear()
            runner.run(queued())
            gaps += [begun - ended for (_, ended), (begun, _) in itertools.pairwise(turns)]
    return summary("turn", "the model's thread between two queued requests", gaps)


@contextmanager
def _instant(model: Any) -> Iterator[list[tuple[int, int]]]:
    """A block in which the model's methods return at once.

    Yields a list of (start of a request's first call, end of its last call), in nanoseconds.
    """
    conditioning = model.encode_prompts([PROMPTS[0]], [""], True)
    pixels = model.decode(_latents(model))
    turns: list[tuple[int, int]] = []
    begun = 0

    def encode_prompts(*_: object) -> Any:
        nonlocal begun
        begun = time.perf_counter_ns()
        return conditioning

    def denoise(
        *_: object,
        num_inference_steps: int,
        on_loop_begins: Callable[[], None],
        on_step_enqueued: Callable[[int, Any], None],
        **__: object,
    ) -> None:
        on_loop_begins()
        for index in range(num_inference_steps):
            on_step_enqueued(index, None)

    def decode(_: object) -> Any:
        turns.append((begun, time.perf_counter_ns()))
        return pixels

    replacements = {"encode_prompts": encode_prompts, "denoise": denoise, "decode": decode}
    vars(model).update(replacements)
    try:
        yield turns
    finally:
        for name in replacements:
            del vars(model)[name]


def _latents(model: SdxlModel) -> Any:
    import torch

    channels = model.pipeline.unet.config.in_channels
    return torch.randn((1, channels, 16, 16), generator=torch.Generator().manual_seed(1))


def _pictures(model: SdxlModel, series: int) -> list[CallTime]:
    from serve.engine.images import data_uri, encode_image
    from serve.http.responses import response_body
    from serve.schema import GeneratedImage, TextToImageResponse, Timings

    noise, drawn = _noise(), _drawn(model)
    jpeg = encode_image(noise, "jpeg")
    url = data_uri(jpeg, "jpeg")
    image = GeneratedImage(url=url, width=SIDE, height=SIDE, content_type="image/jpeg", seed=1)
    response = TextToImageResponse(
        image=image,
        images=[image],
        seed=1,
        prompt=PROMPTS[0],
        timings=Timings(clock="cuda", inference=0.9, steps_ms=[30.4] * LOOP_STEPS),
        trace_id="0" * 32,
        prompt_truncated=False,
        prompt_tokens=9,
    )
    size = f"{SIDE}x{SIDE}"
    kilobytes = len(jpeg) // 1000
    few = max(1, series // 10)
    return [
        time_call(
            "jpeg", f"a picture of {size} as JPEG", lambda: encode_image(drawn, "jpeg"), few, 1
        ),
        time_call("jpegnoise", "noise as JPEG", lambda: encode_image(noise, "jpeg"), few, 1),
        time_call("png", "the picture as PNG", lambda: encode_image(drawn, "png"), few, 1),
        time_call("webp", "the picture as WebP", lambda: encode_image(drawn, "webp"), few, 1),
        time_call(
            "uri", f"{kilobytes} kB as a data URI", lambda: data_uri(jpeg, "jpeg"), series, 1
        ),
        time_call(
            "body", "the response with it as JSON", lambda: response_body(response), series, 1
        ),
    ]


def _answer(runtime: Runtime, runner: asyncio.Runner, series: int) -> CallTime:
    """From pixels to the response's bytes, including the switches between threads."""
    from serve.engine.call import Call
    from serve.engine.gpu_run import GeneratedPixels
    from serve.http.responses import response_body
    from serve.schema import TextToImageRequest

    request = TextToImageRequest(prompt=PROMPTS[0], num_inference_steps=1, seed=1)
    call = Call("/", "POST", runtime.tracing.identify())
    generated = GeneratedPixels(_noise(), prompt_truncated=False, prompt_tokens=9)

    async def once() -> float:
        start = time.perf_counter_ns()
        response_body(await runtime._answer(planned, call, [generated]))
        return time.perf_counter_ns() - start

    async def all_of_them() -> list[float]:
        return [await once() for _ in range(max(1, series // 10))]

    runner.run(runtime.generate(request, call))
    planned = runtime._plan(request, call)
    return summary(
        "answer", "noise, from pixels to the response's bytes", runner.run(all_of_them())
    )


def _noise() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def _drawn(model: SdxlModel) -> Any:
    """A picture of the demo model, enlarged."""
    import numpy as np
    from PIL import Image

    from kernels_warmup.shapes import CompiledShape

    latents = model.denoise(
        model.encode_prompts([PROMPTS[0]], [""], True),
        shape=CompiledShape(128, 128),
        num_inference_steps=8,
        guidance_scale=5.0,
        seeds=[1],
        on_loop_begins=lambda: None,
        on_step_enqueued=lambda *_: None,
    )
    small = Image.fromarray(model.decode(latents).pixels[0].numpy())
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
