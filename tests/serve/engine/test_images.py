from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from serve.engine.images import CONTENT_TYPES, data_uri, encode_image
from serve.http.responses import response_body
from serve.schema import GeneratedImage, ImageFormat, TextToImageResponse, Timings


@pytest.fixture
def pixels() -> np.ndarray:
    y, x = np.mgrid[0:96, 0:160]
    return np.stack([x, y, x + y], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
def test_formats_read_back(pixels: np.ndarray, image_format: ImageFormat) -> None:
    data = encode_image(pixels, image_format)
    with Image.open(io.BytesIO(data)) as image:
        assert image.get_format_mimetype() == CONTENT_TYPES[image_format]
        assert image.size == (160, 96)
        difference = np.abs(np.asarray(image).astype(int) - pixels.astype(int))
    assert difference.mean() < (1 if image_format == "png" else 6)
    assert encode_image(pixels, image_format) == data


def test_png_is_exact(pixels: np.ndarray) -> None:
    with Image.open(io.BytesIO(encode_image(pixels, "png"))) as image:
        assert np.array_equal(np.asarray(image), pixels)


def test_data_uri() -> None:
    uri = data_uri(b"abc", "webp")
    head, body = uri.split(",")
    assert head == "data:image/webp;base64"
    assert base64.b64decode(body) == b"abc"


@pytest.mark.parametrize(
    "url",
    [
        data_uri(bytes(range(256)), "jpeg"),
        data_uri(b"", "jpeg"),
        "https://storage.example/a.jpg?name=%22",
        'data:text/plain,"url":""',
        "data:image/png;base64,AAAA",  # not what the response says it is
    ],
)
def test_the_response_is_the_json_of_pydantics_own_encoder(url: str) -> None:
    image = GeneratedImage(url=url, width=1, height=1, content_type="image/jpeg", seed=1)
    response = TextToImageResponse(
        image=image,
        images=[image, image],
        seed=1,
        prompt='"url":""',
        timings=Timings(clock='"url":""', inference=0.5, steps_ms=[30.25]),
        trace_id="ü",
        prompt_truncated=False,
        prompt_tokens=5,
    )
    assert response_body(response) == response.model_dump_json().encode()
    in_ascii = response.model_dump_json(ensure_ascii=True).encode()
    assert response_body(response, ascii_only=True) == in_ascii
    assert response.image.url == url
