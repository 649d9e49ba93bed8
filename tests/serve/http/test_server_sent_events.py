"""Streams in process: their events, failures, and clients that read slowly or not at all."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI

from metrics.records import RequestTiming
from serve.engine.call import the_call
from serve.engine.runtime import Runtime
from serve.http.server_sent_events import MAX_WAITING_PREVIEWS
from serve.settings import ServeSettings
from tests.support.app_client import PROMPT, call_app, events, post, valid


def test_a_stream(app: FastAPI) -> None:
    response = post(app, valid(num_inference_steps=4, preview=True), "/stream")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    received = events(response.text)
    assert [name for name, _ in received] == ["queued", *["step"] * 4, "image"]
    assert received[0][1]["eta_ms"] > 0
    assert [data["index"] for name, data in received if name == "step"] == [0, 1, 2, 3]
    for name, data in received:
        if name == "step":
            assert data["total"] == 4
            assert data["gpu_ms"] > 0
            assert data["preview"].startswith("data:image/jpeg")
    assert received[-1][1]["seed"] == 1
    direct = post(app, valid(num_inference_steps=4))
    assert received[-1][1]["image"] == direct.json()["image"]


@pytest.mark.parametrize("path", ["/stream", "/v1/images/generations"])
def test_no_prompt_ends_a_line_of_a_stream(app: FastAPI, path: str) -> None:
    body = {"prompt": "a\u2028b\u2029c\u0085d \x0b\x0c\x1c ü", "num_inference_steps": 1}
    response = post(app, body | ({"stream": True} if path != "/stream" else {}), path)
    assert response.content.isascii()
    # As httpx, requests and many others split lines.
    lines = response.text.splitlines()
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert data[-1]["type"] in ("image", "image_generation.completed")
    assert data[-1].get("prompt", body["prompt"]) == body["prompt"]


def test_a_stream_that_fails_ends_with_an_error_event(
    app: FastAPI,
    runtime: Runtime,
    recorded: list[RequestTiming],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise KeyError(PROMPT)

    monkeypatch.setattr(runtime.loaded.model, "decode", broken)
    response = post(app, valid(), "/stream")
    assert response.status_code == 200
    name, data = events(response.text)[-1]
    assert name == "error"
    assert data["error_type"] == "generation_failed"
    assert "zebra" not in response.text
    [timing] = recorded
    assert timing.stage("respond") is not None


def test_a_stream_that_is_not_taken_stops_its_work(
    app: FastAPI,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
    recorded: list[RequestTiming],
) -> None:
    monkeypatch.setattr(runtime, "settings", ServeSettings(device="cpu", send_seconds=0.2))
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if b"event: step" in sent[-1]:
            await asyncio.sleep(60)  # as a server does whose client does not read

    asyncio.run(call_app(app, send, preview=True))
    [timing] = recorded
    assert (timing.outcome, timing.status_code) == ("cancelled", 499)
    assert timing.run is not None
    assert len(timing.run.steps) < 100
    assert len(sent) == 3  # the head, `queued`, and the step that was not taken


def test_a_client_that_reads_slowly_gets_few_old_previews(
    app: FastAPI, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "settings", ServeSettings(device="cpu", send_seconds=600))
    told: list[str] = []

    async def send(message: Any) -> None:
        text = message.get("body", b"").decode()
        told.append(text)
        while len(told) == 3 and the_call().run is None:
            await asyncio.sleep(0.05)  # until the run has ended

    asyncio.run(call_app(app, send, num_inference_steps=30, preview=True))
    steps = [data for name, data in events("".join(told)) if name == "step"]
    assert [step["index"] for step in steps] == list(range(30))
    with_preview = [step["index"] for step in steps if "preview" in step]
    assert len(with_preview) <= MAX_WAITING_PREVIEWS + 2  # one on its way, one in a race
    assert with_preview[0] == 0


def test_the_time_of_a_client_that_reads_slowly_is_in_respond(
    app: FastAPI, recorded: list[RequestTiming]
) -> None:
    held_seconds = 0.3
    sent = 0

    async def send(_message: Any) -> None:
        nonlocal sent
        sent += 1
        if sent == 3:  # the first step
            while the_call().timeline.stage_ms("upload") is None:
                await asyncio.sleep(0.01)
            await asyncio.sleep(held_seconds)

    asyncio.run(call_app(app, send, num_inference_steps=4))
    [timing] = recorded
    upload, respond = timing.stage("upload"), timing.stage("respond")
    assert upload is not None
    assert respond is not None
    assert respond.duration_ns > held_seconds * 1e9
    assert respond.start_ns - upload.end_ns < held_seconds * 1e9 / 3
