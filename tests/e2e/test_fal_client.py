"""fal's own client against both servers, with fal-ai/fast-sdxl's fields."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from typing import Any

import fal_client
import pytest
from PIL import Image

from tests.e2e.conftest import ANSWER_SECONDS, Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ARGUMENTS: dict[str, Any] = {
    "prompt": "a red circle on a white background",
    "negative_prompt": "",
    "image_size": {"width": 128, "height": 128},
    "num_inference_steps": 3,
    "guidance_scale": 7.5,
    "num_images": 2,
    "seed": 5,
    "loras": [],
    "embeddings": [],
    "enable_safety_checker": True,
    "safety_checker_version": "v1",
    "expand_prompt": False,
    "format": "png",
    "sync_mode": True,
    "request_id": "named-by-the-caller",
}
"""Every field of fast-sdxl."""


@pytest.fixture
def client(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[fal_client.SyncClient]:
    # The client puts the app's name behind this address; here the app is the address.
    monkeypatch.setattr(fal_client.client, "RUN_URL_FORMAT", server.process.url)
    client = fal_client.SyncClient(key="unused", default_timeout=ANSWER_SECONDS)
    yield client
    client._client.close()


def image(found: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(found["url"].split(",", 1)[1])))


def test_the_fields_of_fast_sdxl(client: fal_client.SyncClient) -> None:
    result = client.run("", arguments=ARGUMENTS)
    assert len(result["images"]) == 2
    assert result["images"][0] == result["image"]
    for found in result["images"]:
        assert image(found).size == (found["width"], found["height"]) == (128, 128)
        assert found["content_type"] == "image/png"
    assert result["seed"] == 5
    assert result["prompt"] == ARGUMENTS["prompt"]
    assert result["timings"]["inference"] > 0
    assert "has_nsfw_concepts" not in result


def test_the_async_client(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fal_client.client, "RUN_URL_FORMAT", server.process.url)

    async def run() -> dict[str, Any]:
        client = fal_client.AsyncClient(key="unused", default_timeout=ANSWER_SECONDS)
        result: dict[str, Any] = await client.run("", arguments=ARGUMENTS | {"num_images": 1})
        await (await client._client).aclose()
        return result

    assert len(asyncio.run(run())["images"]) == 1


def test_a_stream_says_what_each_event_is(client: fal_client.SyncClient) -> None:
    events = list(client.stream("", arguments=ARGUMENTS | {"num_images": 1}))
    assert [event["type"] for event in events] == ["queued", "step", "step", "step", "image"]
    assert events[-1]["images"][0]["seed"] == 5


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"image_size": "square_hd"}, ["body", "image_size"]),
        ({"image_size": "huge"}, ["body", "image_size"]),
        ({"width": 128}, ["body", "image_size"]),
        ({"loras": [{"path": "nobody", "scale": 1}]}, ["body", "loras"]),
        ({"embeddings": [{"path": "nobody"}]}, ["body", "embeddings"]),
        ({"expand_prompt": True}, ["body", "expand_prompt"]),
        ({"num_images": 0}, ["body", "num_images"]),
        ({"num_images": 40}, ["body", "num_images"]),
        ({"format": "gif"}, ["body", "format"]),
        ({"seed": 2**63 - 1}, ["body", "seed"]),
        ({"request_id": "a b"}, ["body", "request_id"]),
    ],
)
def test_a_wrong_field_is_named(
    client: fal_client.SyncClient, fields: dict[str, Any], place: list[str]
) -> None:
    with pytest.raises(fal_client.FalClientHTTPError) as caught:
        client.run("", arguments=ARGUMENTS | fields)
    assert caught.value.status_code == 422
    problem = caught.value.response.json()["detail"][0]
    assert problem["loc"][: len(place)] == place


def test_a_named_request(server: Server) -> None:
    response = server.generate(request_id="from.the:body")
    assert response.headers["x-request-id"] == "from.the:body"
    response = server.client.post(
        "/", json=ARGUMENTS | {"request_id": ""}, headers={"x-request-id": "from-the-header"}
    )
    assert response.headers["x-request-id"] == "from-the-header"
    drawn = server.client.post(
        "/", json=ARGUMENTS | {"request_id": ""}, headers={"x-request-id": "no spaces"}
    )
    assert drawn.headers["x-request-id"] not in ("", "no spaces")
    failed = server.client.post("/nothing", json={}, headers={"x-request-id": "lost"})
    assert (failed.status_code, failed.headers["x-request-id"]) == (404, "lost")
