"""`POST /image-to-image` of the self-hosted app: answers, refusals, limits, the document."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve.engine.call import the_call
from serve.engine.runtime import Runtime
from serve.errors import MAX_PICTURE_BYTES
from serve.http.middleware import PICTURES_BESIDE_WAITING, RequestMiddleware
from serve.http.request_body import MAX_BODY_BYTES, MAX_PICTURE_BODY_BYTES
from serve.schema import EXAMPLE_PICTURE
from serve.server import create_app

SECRET = "xylograph"


@pytest.fixture(scope="module")
def app(runtime: Runtime) -> FastAPI:
    return create_app(runtime)


def post(app: FastAPI, path: str = "/image-to-image", **fields: Any) -> httpx.Response:
    body = {"prompt": "a red circle", "image_url": EXAMPLE_PICTURE, "num_inference_steps": 2}

    async def once() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post(path, json=body | fields)

    return asyncio.run(once())


def test_a_request_is_answered(app: FastAPI) -> None:
    response = post(app, strength=0.5, seed=3)
    assert response.status_code == 200, response.text
    body = response.json()
    assert len(body["timings"]["steps_ms"]) == 1
    assert body["timings"]["image_decode_ms"] > 0
    assert body["timings"]["vae_encode_ms"] > 0
    stages = [part.split(";")[0].strip() for part in response.headers["server-timing"].split(",")]
    assert stages.index("image_decode") < stages.index("vae_encode") < stages.index("denoise")
    assert post(app, strength=0.5, seed=3).json()["image"] == body["image"]


def test_a_stream_reports_the_steps_that_run(app: FastAPI) -> None:
    response = post(app, "/image-to-image/stream", strength=0.5, num_inference_steps=4)
    assert response.status_code == 200
    lines = response.text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data")]
    assert [event["type"] for event in events] == ["queued", "step", "step", "image"]
    assert [event["total"] for event in events[1:3]] == [2, 2]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"image_url": SECRET}, "image_url"),
        ({"image_url": f"http://{SECRET}.example/"}, "image_url"),
        ({"image_url": f"https://{SECRET}.example/"}, "image_url"),
        ({"image_url": f"file:///{SECRET}"}, "image_url"),
        ({"image_url": f"data:image/png;base64,{SECRET}"}, "image_url"),
        ({"image_url": "data:image/png;base64,AAAA"}, "image_url"),
        ({"image_url": EXAMPLE_PICTURE[:-40]}, "image_url"),
        ({"image_url": ""}, "image_url"),
        ({"image_url": None}, "image_url"),
        ({"image_url": [EXAMPLE_PICTURE]}, "image_url"),
        ({"strength": 0.4}, "strength"),
        ({"strength": -1}, "strength"),
        ({"strength": 1.01}, "strength"),
        ({"strength": "1"}, "strength"),
        ({"mask_url": SECRET}, "mask_url"),
    ],
)
@pytest.mark.parametrize("path", ["/image-to-image", "/image-to-image/stream"])
def test_what_is_wrong_is_a_422_that_repeats_nothing(
    app: FastAPI, caplog: pytest.LogCaptureFixture, path: str, fields: dict[str, Any], field: str
) -> None:
    caplog.set_level("DEBUG")
    response = post(app, path, **fields)
    assert response.status_code == 422, response.text
    problems = response.json()["detail"]
    assert {problem["loc"][-1] for problem in problems} == {field}
    assert len(response.content) < 600
    assert SECRET not in response.text + caplog.text


def test_text_to_image_takes_no_picture(app: FastAPI) -> None:
    response = post(app, "/")
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["body", "image_url"]


def test_a_body_may_hold_the_largest_picture(app: FastAPI) -> None:
    """Only here: it is refused for what it holds, not for its size."""
    picture = "data:image/png;base64," + "A" * (MAX_PICTURE_BYTES // 3 * 4)
    assert MAX_BODY_BYTES < len(picture) < MAX_PICTURE_BODY_BYTES - MAX_BODY_BYTES
    response = post(app, image_url=picture)
    assert response.json()["detail"][0]["type"] == "not_an_image"
    too_large = post(app, image_url="A" * MAX_PICTURE_BODY_BYTES)
    assert too_large.status_code == 413
    assert str(MAX_PICTURE_BODY_BYTES) in too_large.json()["detail"]
    assert post(app, "/", image_url="A" * MAX_BODY_BYTES).status_code == 413


@pytest.mark.parametrize("what", ["its answer", "its work"])
def test_pictures_in_progress_are_limited_before_they_are_read(runtime: Runtime, what: str) -> None:
    """The run of a stream that its client has left goes on for some steps."""
    limit = runtime.settings.max_waiting + PICTURES_BESIDE_WAITING

    async def story() -> list[int]:
        statuses: list[int] = []
        read = begun = 0
        held = asyncio.Event()

        async def answers(_scope: Any, _receive: Any, send: Any) -> None:
            nonlocal begun
            begun += 1
            if what == "its work":
                the_call().work = asyncio.create_task(held.wait())
            else:
                await held.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        middleware = RequestMiddleware(answers, lambda: runtime, ["/image-to-image"])

        async def request() -> None:
            messages = [{"type": "http.request", "body": b"{}", "more_body": False}]

            async def receive() -> Any:
                nonlocal read
                read += 1
                if not messages:
                    await asyncio.sleep(30)  # the client stays
                return messages.pop()

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])

            headers = [(b"content-type", b"application/json")]
            scope = {
                "type": "http",
                "method": "POST",
                "path": "/image-to-image",
                "headers": headers,
            }
            await middleware(scope, receive, send)

        tasks = [asyncio.create_task(request()) for _ in range(limit)]
        while begun < limit:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)  # those without an answer to wait for end, but for their work
        before = read
        already = len(statuses)
        await request()
        assert read == before
        assert statuses[already:] == [429]
        held.set()
        await asyncio.gather(*tasks)
        await request()
        return statuses

    statuses = asyncio.run(story())
    assert sorted(statuses) == [*[200] * (limit + 1), 429]


def test_the_document_has_the_endpoint(app: FastAPI) -> None:
    document = app.openapi()
    operation = document["paths"]["/image-to-image"]["post"]
    content = operation["responses"]["200"]["content"]
    assert {"application/json", "image/png"} <= set(content)
    assert {"422", "413", "429", "504"} <= set(operation["responses"])
    fields = document["components"]["schemas"]["ImageToImageRequest"]["properties"]
    assert fields["strength"]["maximum"] == 1
    assert fields["width"]["anyOf"][0].get("enum") or fields["width"].get("enum")
    stream = document["paths"]["/image-to-image/stream"]["post"]
    assert set(stream["responses"]["200"]["content"]) == {"text/event-stream"}
