"""Several images a request and several requests a run, on the real demo model."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kernels_warmup.shapes import CompiledShape
from metrics.spans import request_tree
from serve.engine.call import Call
from serve.engine.runtime import Runtime
from serve.errors import ClientGone, InvalidRequest, OutOfMemory
from serve.schema import MAX_SEED, GeneratedImage, TextToImageResponse
from tests.serve.conftest import request
from tests.support.engine import Gate, NewCall, generate

LARGEST_DIFFERENCE = 1
"""Of 255 levels, between an image of a shared run and the same image drawn alone; docs/http.md
states it."""


def pixels(image: GeneratedImage) -> np.ndarray[Any, Any]:
    data = base64.b64decode(image.url.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data))).astype(np.int16)


def assert_equal(one: GeneratedImage, other: GeneratedImage) -> None:
    assert one.seed == other.seed
    assert int(np.abs(pixels(one) - pixels(other)).max()) <= LARGEST_DIFFERENCE


@pytest.fixture
def small_runs(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a compiled model with two warm sizes."""
    monkeypatch.setattr(
        runtime.readiness,
        "batch_sizes",
        {**runtime.readiness.batch_sizes, CompiledShape(128, 128): (1, 2)},
    )


# Several images a request


def test_image_i_has_the_seed_plus_i_and_is_the_image_drawn_alone(
    runtime: Runtime, new_call: NewCall
) -> None:
    call = new_call()
    answer = generate(runtime, call, num_images=4, seed=7, format="png")
    assert [image.seed for image in answer.images] == [7, 8, 9, 10]
    assert answer.image == answer.images[0]
    assert answer.seed == 7
    for image in answer.images:
        assert_equal(image, generate(runtime, new_call(), seed=image.seed, format="png").image)
    assert [run.batch_size for run in call.runs] == [4]
    assert call.facts is not None
    assert call.facts.num_images == 4
    assert len(call.image_bytes) == 4


def test_the_seed_of_several_images_is_drawn_once(runtime: Runtime, new_call: NewCall) -> None:
    seeds = [i.seed for i in generate(runtime, new_call(), num_images=3, seed=None).images]
    assert seeds == [seeds[0], seeds[0] + 1, seeds[0] + 2]


@pytest.mark.usefixtures("small_runs")
def test_images_that_no_warm_run_holds_are_drawn_in_several(
    runtime: Runtime, new_call: NewCall
) -> None:
    call, told = new_call(), list[int]()

    async def story() -> TextToImageResponse:
        wanted = request(num_images=3, num_inference_steps=2, format="png")
        return await runtime.generate(wanted, call, on_step=lambda index, *_: told.append(index))

    answer = asyncio.run(story())
    assert [run.batch_size for run in call.runs] == [2, 1]
    assert len({run.run_id for run in call.runs}) == 2
    assert told == [0, 1, 2, 3]
    assert call.total_steps == 4
    assert len(answer.timings.steps_ms) == 4
    for image in answer.images:
        assert_equal(image, generate(runtime, new_call(), seed=image.seed, format="png").image)

    timing = call.finish(200)
    assert timing.observed_runs == timing.runs
    tree = request_tree(timing)
    names = Counter(child.name for child in tree.children)
    assert names["inference"] == names["queue"] == 2
    assert [
        c.attributes["inference.batch.size"] for c in tree.children if c.name == "inference"
    ] == [2, 1]
    ends = sorted(((c.start_ns, c.end_ns) for c in tree.children), key=lambda each: each[0])
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


@pytest.mark.usefixtures("small_runs")
def test_a_client_that_leaves_between_runs_gets_no_further_one(
    runtime: Runtime, new_call: NewCall
) -> None:
    call = new_call()

    def on_step(index: int, *_: object) -> None:
        if index == 2:  # of the second run
            call.cancellation.cancel(ClientGone())

    with pytest.raises(ClientGone):
        asyncio.run(
            runtime.generate(request(num_images=4, num_inference_steps=2), call, on_step=on_step)
        )
    assert len(call.runs) == 2
    assert runtime.queue.idle


@pytest.mark.parametrize("count", [0, -1, 5, 10**9])
def test_too_many_or_no_images_are_refused(runtime: Runtime, new_call: NewCall, count: int) -> None:
    with pytest.raises((InvalidRequest, ValueError)) as caught:
        generate(runtime, new_call(), num_images=count)
    if isinstance(caught.value, InvalidRequest):
        assert caught.value.problems[0].location == ("body", "num_images")
        assert "at most 4" in caught.value.message


def test_every_image_needs_a_seed(runtime: Runtime, new_call: NewCall) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate(runtime, new_call(), num_images=4, seed=MAX_SEED - 2)
    assert caught.value.problems[0].location == ("body", "seed")
    assert str(MAX_SEED - 3) in caught.value.message
    last = generate(runtime, new_call(), num_images=2, seed=MAX_SEED - 1, num_inference_steps=1)
    assert last.images[1].seed == MAX_SEED


# Several requests a run


def test_waiting_requests_share_a_run_and_keep_what_is_theirs(
    runtime: Runtime, new_call: NewCall
) -> None:
    formats = ("png", "jpeg", "webp", "png")
    calls = [new_call() for _ in formats]

    async def story() -> list[Any]:
        tasks = [
            asyncio.create_task(
                runtime.generate(request(seed=seed, format=each, num_images=1 + seed % 2), call)
            )
            for seed, (each, call) in enumerate(zip(formats, calls, strict=True))
        ]
        await asyncio.sleep(0.05)
        gate.open()
        return await asyncio.gather(*tasks)

    gate = Gate(runtime)
    answers = asyncio.run(story())
    assert len({call.runs[0].run_id for call in calls}) == 1
    assert {call.runs[0].batch_size for call in calls} == {6}
    assert [answer.image.content_type for answer in answers] == [
        f"image/{each}" for each in formats
    ]
    timings = [call.finish(200) for call in calls]
    assert sum(len(timing.observed_runs) for timing in timings) == 1
    for timing, answer in zip(timings, answers, strict=True):
        tree = request_tree(timing)
        [inference] = [child for child in tree.children if child.name == "inference"]
        assert inference.attributes["run.id"] == calls[0].runs[0].run_id
        assert inference.attributes["gen_ai.request.seed"] == answer.seed


def test_mixed_clients_at_once_each_get_the_image_they_get_alone(
    runtime: Runtime, new_call: NewCall
) -> None:
    chance = random.Random(3)
    wanted = [
        {
            "prompt": f"a {chance.choice(['red', 'blue', 'green'])} circle {number}",
            "negative_prompt": chance.choice(["", "", "blurry"]),
            "seed": chance.choice([number, MAX_SEED - number - 4]),
            "num_inference_steps": chance.choice([1, 2]),
            "guidance_scale": chance.choice([1.0, 5.0, 9.0]),
            "num_images": chance.choice([1, 1, 1, 2]),
            "format": "png",
            **chance.choice([{}, {"width": 160, "height": 96}]),
        }
        for number in range(32)
    ]
    calls = [new_call() for _ in wanted]

    async def story() -> list[TextToImageResponse]:
        tasks = [
            asyncio.create_task(runtime.generate(request(**fields), call))
            for fields, call in zip(wanted, calls, strict=True)
        ]
        return await asyncio.gather(*tasks)

    answers = asyncio.run(story())
    runs = {run.run_id: run for call in calls for run in call.runs}
    assert len(runs) < len(wanted)
    assert max(run.batch_size for run in runs.values()) > 1
    for fields, answer in zip(wanted, answers, strict=True):
        for image in answer.images:
            alone = generate(runtime, new_call(), **{**fields, "num_images": 1, "seed": image.seed})
            assert_equal(image, alone.image)
    assert runtime.queue.idle


def test_a_shared_run_without_memory_costs_no_request(
    runtime: Runtime,
    new_call: NewCall,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = runtime.loaded.model
    denoise = model.denoise
    drawn: list[int] = []

    def without_memory(*args: Any, seeds: list[int], **options: Any) -> torch.Tensor:
        drawn.append(len(seeds))
        if len(seeds) > 2:
            raise torch.OutOfMemoryError("ze" + "bra")
        return denoise(*args, seeds=seeds, **options)

    monkeypatch.setattr(model, "denoise", without_memory)
    monkeypatch.setattr(runtime.readiness, "batch_sizes", dict(runtime.readiness.batch_sizes))
    calls = [new_call() for _ in range(3)]
    wanted = [request(seed=seed, num_images=1 + (seed == 2), format="png") for seed in range(3)]
    answers = asyncio.run(runtime.generate_together(wanted, calls))
    assert drawn == [4, 1, 1, 1, 1]
    assert [len(answer.images) for answer in answers] == [1, 1, 2]
    assert [call.failure for call in calls] == [None] * 3
    assert [run.error_type for run in calls[0].runs] == ["out_of_memory", None]
    assert runtime.readiness.as_json()["batch_sizes"]["128x128"] == (1, 2, 3)
    assert [record.name for record in caplog.records if "zebra" in record.getMessage()] == []
    # The process has learnt how many images fit.
    drawn.clear()
    again = [new_call() for _ in range(4)]
    asyncio.run(runtime.generate_together([request(seed=seed) for seed in range(4)], again))
    assert drawn == [3, 1, 1, 1, 1]


def test_a_single_image_without_memory_fails_alone(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = runtime.loaded.model
    denoise = model.denoise

    def without_memory(*args: Any, seeds: list[int], **options: Any) -> torch.Tensor:
        if len(seeds) > 1 or seeds == [1]:
            raise torch.OutOfMemoryError
        return denoise(*args, seeds=seeds, **options)

    monkeypatch.setattr(model, "denoise", without_memory)
    monkeypatch.setattr(runtime.readiness, "batch_sizes", dict(runtime.readiness.batch_sizes))
    calls = [new_call(), new_call()]

    async def story() -> list[Any]:
        tasks = [
            asyncio.create_task(runtime.generate(request(seed=seed), call))
            for seed, call in enumerate(calls)
        ]
        await asyncio.sleep(0.05)
        gate.open()
        return await asyncio.gather(*tasks, return_exceptions=True)

    gate = Gate(runtime)
    good, bad = asyncio.run(story())
    assert isinstance(good, TextToImageResponse)
    assert isinstance(bad, OutOfMemory)
    assert calls[1].failure is not None
    assert len(calls[1].runs) == 2


def test_a_run_logs_with_its_own_requests_ids(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU thread was woken by one request and draws another."""
    from serve.engine.call import current_call

    model = runtime.loaded.model
    denoise = model.denoise
    seen: list[tuple[list[int], Call | None]] = []

    def watched(*args: Any, seeds: list[int], **options: Any) -> torch.Tensor:
        seen.append((seeds, current_call.get()))
        return denoise(*args, seeds=seeds, **options)

    monkeypatch.setattr(model, "denoise", watched)
    calls = [new_call() for _ in range(3)]

    async def one(seed: int) -> TextToImageResponse:
        current_call.set(calls[seed])
        return await runtime.generate(
            request(seed=seed, num_inference_steps=1 + seed % 2), calls[seed]
        )

    async def story() -> None:
        tasks = [asyncio.create_task(one(seed)) for seed in range(3)]
        await asyncio.sleep(0.05)
        gate.open()
        await asyncio.gather(*tasks)

    gate = Gate(runtime)
    asyncio.run(story())
    assert seen == [([0, 2], calls[0]), ([1], calls[1])]
