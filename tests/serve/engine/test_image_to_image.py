"""Image to image through the runtime, on the real demo model."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from kernels_warmup.shapes import CompiledShape
from metrics.spans import request_tree
from serve.engine.call import Call
from serve.engine.pictures import fetching, reading
from serve.engine.runtime import Runtime
from serve.errors import (
    ClientGone,
    DeadlineExceeded,
    Draining,
    InvalidRequest,
    QueueFull,
    RequestError,
    UnusablePicture,
)
from serve.schema import GeneratedImage, ImageToImageRequest, TextToImageResponse
from serve.settings import ServeSettings
from tests.serve.conftest import request
from tests.support.engine import Gate, NewCall

LARGEST_DIFFERENCE = 1
"""As in test_batching.py."""


def data_uri(colour: str, size: tuple[int, int] = (128, 128)) -> str:
    """A PNG of a circle on white."""
    image = Image.new("RGB", size, "white")
    left, top = size[0] // 4, size[1] // 4
    ImageDraw.Draw(image).ellipse((left, top, size[0] - left, size[1] - top), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


RED, BLUE = data_uri("red"), data_uri("blue", (200, 130))


def wanted(**changes: Any) -> ImageToImageRequest:
    fields: dict[str, Any] = {
        "prompt": "a red circle on a white background",
        "image_url": RED,
        "strength": 0.5,
        "num_inference_steps": 4,
        "seed": 1,
        "format": "png",
    }
    return ImageToImageRequest.model_validate(fields | changes)


def generate(runtime: Runtime, call: Call, **changes: Any) -> TextToImageResponse:
    return asyncio.run(runtime.generate(wanted(**changes), call))


def pixels(image: GeneratedImage) -> np.ndarray[Any, Any]:
    data = base64.b64decode(image.url.split(",")[1])
    return np.asarray(Image.open(io.BytesIO(data))).astype(np.int16)


def assert_equal(one: GeneratedImage, other: GeneratedImage) -> None:
    assert int(np.abs(pixels(one) - pixels(other)).max()) <= LARGEST_DIFFERENCE


def counted(runtime: Runtime, stage: str) -> float:
    name = "sdxl_stage_duration_seconds_count"
    return runtime.metrics.registry.get_sample_value(name, {"stage": stage}) or 0.0


def test_the_last_steps_run_and_everything_says_so(runtime: Runtime, new_call: NewCall) -> None:
    call, told = new_call(), list[int]()
    before = {stage: counted(runtime, stage) for stage in ("image_decode", "vae_encode")}

    async def story() -> TextToImageResponse:
        return await runtime.generate(wanted(), call, on_step=lambda index, *_: told.append(index))

    call.timeline.end()
    answer = asyncio.run(story())
    assert told == [0, 1]
    assert call.total_steps == 2
    timings = answer.timings
    assert len(timings.steps_ms) == 2
    assert timings.image_decode_ms is not None
    assert timings.vae_encode_ms is not None
    assert (answer.image.width, answer.image.height) == pixels(answer.image).shape[1::-1]

    timing = call.finish(200)
    tree = request_tree(timing)
    assert tree.attributes["strength"] == 0.5
    assert tree.attributes["num_inference_steps"] == 4
    names = [child.name for child in sorted(tree.children, key=lambda child: child.start_ns)]
    assert names[:4] == ["receive", "image_decode", "queue", "inference"]
    (inference,) = (child for child in tree.children if child.name == "inference")
    assert inference.attributes["inference.strength"] == 0.5
    assert inference.attributes["inference.steps_to_run"] == 2
    stages = [child.name for child in inference.children]
    assert stages == ["text_encode", "vae_encode", "denoise", "vae_decode"]
    assert len(inference.children[2].children) == 2
    assert timing.facts is not None
    assert timing.facts.steps_to_run == 2

    runtime.recorder.record(timing, call.identity)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and counted(runtime, "vae_encode") == before["vae_encode"]:
        time.sleep(0.01)
    assert {stage: counted(runtime, stage) - 1 for stage in before} == before


def test_text_to_image_has_none_of_it(runtime: Runtime, new_call: NewCall) -> None:
    call = new_call()
    answer = asyncio.run(runtime.generate(request(), call))
    assert answer.timings.image_decode_ms is None
    assert answer.timings.vae_encode_ms is None
    tree = request_tree(call.finish(200))
    assert "strength" not in tree.attributes
    (inference,) = (child for child in tree.children if child.name == "inference")
    assert "inference.strength" not in inference.attributes
    assert len(inference.children) == 3


def test_a_low_strength_stays_close_to_the_picture(runtime: Runtime, new_call: NewCall) -> None:
    drawn = generate(runtime, new_call(), strength=1.0, num_inference_steps=8).image
    picture = pixels(drawn)

    def distance(strength: float) -> float:
        answer = generate(
            runtime,
            new_call(),
            image_url=drawn.url,
            strength=strength,
            num_inference_steps=8,
            prompt="a blue square on a black background",
            seed=5,
        )
        return float(np.abs(pixels(answer.image) - picture).mean())

    assert distance(0.125) < 0.5 * distance(1.0)


def test_images_of_one_picture_are_those_drawn_alone(runtime: Runtime, new_call: NewCall) -> None:
    call = new_call()
    answer = generate(runtime, call, num_images=3)
    assert [run.batch_size for run in call.runs] == [3]
    for image in answer.images:
        assert_equal(image, generate(runtime, new_call(), seed=image.seed).image)


def test_requests_with_a_picture_share_a_run_with_their_like(
    runtime: Runtime, new_call: NewCall
) -> None:
    """Not with text to image, nor with another number of steps; and each with its own picture."""
    requests = [
        wanted(),
        wanted(image_url=BLUE, strength=0.74, seed=2),
        wanted(strength=0.75),
        request(num_inference_steps=4),
        request(num_inference_steps=2),
    ]
    calls = [new_call() for _ in requests]

    async def story() -> list[TextToImageResponse]:
        gate = Gate(runtime)
        tasks = [
            asyncio.create_task(runtime.generate(each, call))
            for each, call in zip(requests, calls, strict=True)
        ]
        while len(runtime.queue.state().waiting) < len(requests):
            await asyncio.sleep(0.005)
        gate.open()
        return await asyncio.gather(*tasks)

    first, second, *_ = asyncio.run(story())
    assert [call.runs[0].batch_size for call in calls] == [2, 2, 1, 1, 1]
    assert calls[0].runs[0].run_id == calls[1].runs[0].run_id
    assert_equal(first.image, generate(runtime, new_call()).image)
    alone = generate(runtime, new_call(), image_url=BLUE, strength=0.74, seed=2)
    assert_equal(second.image, alone.image)
    assert int(np.abs(pixels(first.image) - pixels(second.image)).max()) > 50


def test_guidance_ends_within_the_steps_that_run(runtime: Runtime, new_call: NewCall) -> None:
    call = new_call()
    generate(runtime, call, guidance_end=0.5)
    (run,) = call.runs
    assert [run.has_guidance(step) for step in run.steps] == [True, False]


def test_a_picture_is_part_of_the_estimate(runtime: Runtime, new_call: NewCall) -> None:
    call, text = new_call(), new_call()
    generate(runtime, call, strength=1)
    asyncio.run(runtime.generate(request(num_inference_steps=4), text))
    assert call.estimate is not None
    assert text.estimate is not None
    planned = runtime._plan(wanted(strength=1), new_call())
    of_text = runtime._plan(request(num_inference_steps=4), new_call())
    with_picture = runtime.estimates.run_estimate(planned, 1)
    without = runtime.estimates.run_estimate(of_text, 1)
    assert with_picture is not None
    assert without is not None
    assert with_picture.before > without.before
    assert with_picture.guided_step == without.guided_step
    half = runtime.estimates.run_estimate(runtime._plan(wanted(), new_call()), 1)
    assert half is not None
    assert half.steps == 2


def test_a_strength_without_a_step_is_refused(runtime: Runtime, new_call: NewCall) -> None:
    with pytest.raises(InvalidRequest) as caught:
        generate(runtime, new_call(), strength=0.2)
    (problem,) = caught.value.problems
    assert problem.location == ("body", "strength")
    assert len(generate(runtime, new_call(), strength=0.25).timings.steps_ms) == 1
    assert len(generate(runtime, new_call(), strength=1).timings.steps_ms) == 4


def test_an_unusable_picture_is_a_failure_of_its_stage(runtime: Runtime, new_call: NewCall) -> None:
    call = new_call()
    with pytest.raises(UnusablePicture):
        generate(runtime, call, image_url="data:image/png;base64,AAAA")
    tree = request_tree(call.finish(422))
    assert [child.name for child in tree.children] == ["receive", "image_decode"]
    assert tree.attributes["error.type"] == "invalid_request"
    assert call.outcome == "invalid"


@pytest.fixture
def slow_host(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL that is allowed and whose host takes its time."""

    async def get(_url: str) -> bytes:
        await asyncio.sleep(30)
        return b""

    monkeypatch.setattr(fetching, "_get", get)
    monkeypatch.setattr(runtime, "_pictures", reading.PictureReader(["slow.example"]))
    return "https://slow.example/a.png"


def test_a_client_that_leaves_while_its_picture_is_fetched(
    runtime: Runtime, new_call: NewCall, slow_host: str
) -> None:
    call = new_call()

    async def story() -> None:
        task = asyncio.create_task(runtime.generate(wanted(image_url=slow_host), call))
        await asyncio.sleep(0.05)
        call.cancellation.cancel(ClientGone())
        await task

    began = time.monotonic()
    with pytest.raises(ClientGone):
        asyncio.run(story())
    assert time.monotonic() - began < 5
    assert call.runs == []


def test_a_deadline_that_passes_while_the_picture_is_fetched(
    runtime: Runtime, new_call: NewCall, slow_host: str
) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        generate(runtime, new_call(), image_url=slow_host, deadline_seconds=0.2)
    assert time.monotonic() - began < 5


def test_a_drain_that_begins_while_the_picture_is_fetched(
    runtime: Runtime, new_call: NewCall, slow_host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    readiness = replace(runtime.readiness, _on_drain=[])
    monkeypatch.setattr(runtime, "readiness", readiness)
    call = new_call()

    async def story() -> None:
        task = asyncio.create_task(runtime.generate(wanted(image_url=slow_host), call))
        await asyncio.sleep(0.05)
        readiness.drain()
        await task

    began = time.monotonic()
    with pytest.raises(Draining):
        asyncio.run(story())
    assert time.monotonic() - began < 5
    assert (call.outcome, call.runs) == ("rejected", [])
    assert readiness._on_drain == []


def test_a_decoding_that_goes_on_is_left_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread cannot be interrupted, and the process must not wait for it."""
    begun, goes_on = threading.Event(), threading.Event()

    def decode_forever(*_: object) -> None:
        begun.set()
        goes_on.wait(30)

    monkeypatch.setattr(reading, "decode_picture", decode_forever)
    reader = reading.PictureReader(())

    async def story() -> None:
        task = asyncio.create_task(reader.read(RED, CompiledShape(64, 64)))
        await asyncio.to_thread(begun.wait, 10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(story())
    assert not reader.close()
    goes_on.set()
    reader._threads.shutdown()
    assert reader.close()


def test_a_full_queue_refuses_before_the_picture_is_read(
    runtime: Runtime, new_call: NewCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.queue, "_max_waiting", 0)

    async def story() -> RequestError | None:
        gate = Gate(runtime)
        running = asyncio.create_task(runtime.generate(request(), new_call()))
        while runtime.queue.idle:
            await asyncio.sleep(0.005)
        refused = None
        try:
            await runtime.generate(wanted(image_url="data:nonsense"), new_call())
        except RequestError as error:
            refused = error
        gate.open()
        await running
        return refused

    monkeypatch.setattr(type(runtime.queue), "full", property(lambda queue: not queue.idle))
    assert isinstance(asyncio.run(story()), QueueFull)


def test_the_hosts_of_pictures_are_a_setting(runtime: Runtime) -> None:
    assert ServeSettings().image_hosts == ()
    given = ServeSettings(image_hosts="Images.Example:443, b.example:8443")  # type: ignore[arg-type]
    assert given.image_hosts == ("images.example", "b.example:8443")
