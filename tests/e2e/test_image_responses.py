"""An image as the response itself, and `Server-Timing`, on both servers."""

from __future__ import annotations

import base64
import io
import re

import httpx
import pytest
from PIL import Image

from tests.e2e.conftest import Server, body

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def ask(server: Server, accept: str, **fields: object) -> httpx.Response:
    return server.client.post("/", json=body(**fields), headers={"accept": accept})


@pytest.mark.parametrize(
    ("accept", "fields", "drawn"),
    [
        ("image/*", {}, "JPEG"),
        ("image/png", {}, "PNG"),
        ("image/webp, image/*;q=0.5", {"format": "png"}, "PNG"),
        ("image/webp;q=0.9, text/html", {}, "WEBP"),
    ],
)
def test_the_image_itself(
    server: Server, accept: str, fields: dict[str, object], drawn: str
) -> None:
    response = ask(server, accept, **fields)
    assert response.status_code == 200
    image = Image.open(io.BytesIO(response.content))
    assert image.format == drawn
    assert response.headers["content-type"] == f"image/{drawn.lower()}"
    assert response.headers["x-seed"] == "1"
    assert response.headers["x-prompt-truncated"] == "false"
    ours = server.generate(format=drawn.lower()).json()
    assert base64.b64decode(ours["image"]["url"].split(",")[1]) == response.content


@pytest.mark.parametrize("accept", ["*/*", "application/json", "image/*, application/json", ""])
def test_json_is_the_default(server: Server, accept: str) -> None:
    assert ask(server, accept).json()["image"]


def test_what_cannot_be_drawn_is_refused(server: Server) -> None:
    assert ask(server, "image/avif").json()["error_type"] == "not_acceptable"
    assert ask(server, "image/png", format="webp").status_code == 406
    refused = ask(server, "image/*", num_images=2)
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["body", "num_images"]


def test_server_timing_has_the_stages_that_ended(server: Server) -> None:
    response = server.generate()
    timing = response.headers["server-timing"]
    found = {name: float(ms) for name, ms in re.findall(r"([a-z_]+);dur=([0-9.]+)", timing)}
    stages = ["receive", "queue", "text_encode", "denoise", "vae_decode", "image_encode", "upload"]
    assert list(found) == stages
    timings = response.json()["timings"]
    for stage, milliseconds in found.items():
        assert milliseconds == pytest.approx(timings[f"{stage}_ms"], abs=0.01)
    invalid = server.generate(width=7)
    assert "receive;dur=" in invalid.headers["server-timing"]
