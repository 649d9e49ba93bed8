"""OpenAI's own client against the self-hosted server."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from typing import Any, get_type_hints

import numpy as np
import openai
import pytest
from openai.types.image_generate_params import ImageGenerateParamsNonStreaming
from PIL import Image

from serve.http.openai.schema import ImageGenerationRequest
from tests.e2e.conftest import ANSWER_SECONDS, Server, body

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPT = "a red circle on a white background"
FEW: dict[str, Any] = {"num_inference_steps": 4, "seed": 1}


@pytest.fixture(scope="module")
def server(servers: dict[str, Server]) -> Server:
    return servers["self-hosted"]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.process.url}/v1", api_key="unused", timeout=ANSWER_SECONDS, max_retries=0
    ) as client:
        yield client


def pixels(b64_json: str | None) -> np.ndarray[Any, Any]:
    assert b64_json is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB"), int)


def test_an_image_equals_that_of_our_own_endpoint(client: openai.OpenAI, server: Server) -> None:
    response = client.images.generate(prompt=PROMPT, extra_body=FEW)
    ours = server.generate(**FEW, format="png").json()
    assert response.data is not None
    drawn = pixels(response.data[0].b64_json)
    assert np.array_equal(drawn, pixels(ours["image"]["url"].split(",")[1]))
    assert response.size == "128x128"
    assert response.output_format == "png"
    assert response.background == "opaque"
    assert response.usage is not None
    assert response.usage.input_tokens == response.usage.total_tokens > 2


def test_every_accepted_field(client: openai.OpenAI) -> None:
    response = client.images.generate(
        prompt=PROMPT,
        model=client.models.list().data[0].id,
        n=2,
        size="128x128",
        quality="low",
        background="opaque",
        moderation="low",
        output_format="jpeg",
        output_compression=60,
        response_format="b64_json",
        user="somebody",
        extra_body={"negative_prompt": "blue", "guidance_scale": 3.0, "seed": 5},
    )
    assert response.data is not None
    first, second = (pixels(image.b64_json) for image in response.data)
    assert first.shape == second.shape == (128, 128, 3)
    assert not np.array_equal(first, second)
    assert response.quality == "low"
    assert response.output_format == "jpeg"


def test_every_field_of_the_client_is_declared_and_may_be_null() -> None:
    names = get_type_hints(ImageGenerateParamsNonStreaming).keys() - {"prompt"}
    ImageGenerationRequest.model_validate({"prompt": PROMPT, **dict.fromkeys(names)})


@pytest.mark.parametrize(("quality", "steps"), [("low", 10), ("hd", 30)])
def test_quality_is_a_number_of_steps(server: Server, quality: str, steps: int) -> None:
    response = server.client.post(
        "/v1/images/generations", json={"prompt": PROMPT, "quality": quality}
    )
    spans = server.otlp.wait_for_trace(response.json()["trace_id"])
    assert sum(span.name == "denoise_step" for span in spans) == steps


def test_several_images_have_the_next_seeds(client: openai.OpenAI) -> None:
    both = client.images.generate(prompt=PROMPT, n=2, extra_body=FEW).data
    second = client.images.generate(prompt=PROMPT, extra_body=FEW | {"seed": 2}).data
    assert both is not None
    assert second is not None
    assert np.abs(pixels(both[1].b64_json) - pixels(second[0].b64_json)).max() <= 2


def test_the_async_client(server: Server) -> None:
    async def generate() -> openai.types.ImagesResponse:
        async with openai.AsyncOpenAI(
            base_url=f"{server.process.url}/v1", api_key="unused", timeout=ANSWER_SECONDS
        ) as client:
            return await client.images.generate(prompt=PROMPT, extra_body=FEW)

    response = asyncio.run(generate())
    assert response.data is not None
    assert pixels(response.data[0].b64_json).shape == (128, 128, 3)


@pytest.mark.parametrize(
    ("partial_images", "decoded"), [(0, False), (1, True), (3, False), (3, True)]
)
def test_a_stream(client: openai.OpenAI, partial_images: int, decoded: bool) -> None:
    more = FEW | ({"decoded_partial_images": True} if decoded and partial_images else {})
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=partial_images, extra_body=more
    )
    *partial, completed = list(stream)
    assert [event.type for event in partial] == ["image_generation.partial_image"] * partial_images
    assert [event.partial_image_index for event in partial] == list(range(partial_images))
    assert completed.type == "image_generation.completed"
    alone = client.images.generate(prompt=PROMPT, extra_body=FEW).data
    assert alone is not None
    final = pixels(completed.b64_json)
    assert np.array_equal(final, pixels(alone[0].b64_json))
    distances = [float(np.abs(pixels(event.b64_json) - final).mean()) for event in partial]
    assert all(pixels(event.b64_json).shape == final.shape for event in partial)
    assert distances == sorted(distances, reverse=True), "each is closer to the image"


def test_a_stream_of_several_images_completes_each(client: openai.OpenAI) -> None:
    stream = client.images.generate(prompt=PROMPT, stream=True, n=2, extra_body=FEW)
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert events[0].b64_json != events[1].b64_json


def test_the_models(client: openai.OpenAI) -> None:
    (model, *_) = client.models.list().data
    assert model.object == "model"
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("dall-e-3")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": "2"}, "n"),
        ({"n": 9}, "n"),
        ({"size": "1024X1024"}, "size"),
        ({"size": "1025x1024"}, "size"),
        ({"size": "1024x"}, "size"),
        ({"size": "200x500"}, "size"),
        ({"size": "99999x99999"}, "size"),
        ({"size": "9216x9216"}, "size"),
        ({"response_format": "jpeg"}, "response_format"),
        ({"response_format": "url"}, "response_format"),
        ({"partial_images": 1}, "partial_images"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"partial_images": 1, "stream": True, "n": 2}, "partial_images"),
        ({"decoded_partial_images": True}, "decoded_partial_images"),
        ({"quality": "best"}, "quality"),
        ({"style": "vivid"}, "style"),
        ({"background": "transparent"}, "background"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression"),
        ({"frame_count": 2}, "frame_count"),
        ({"complexity": "high"}, "complexity"),
        ({"svg": {"model": "gpt-5"}}, "svg"),
        ({"seed": 2**63 - 2, "n": 4}, "seed"),
        ({"guidance_scale": 21}, "guidance_scale"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"prompt": " "}, "prompt"),
        ({"loras": [{"path": "nobody", "scale": 1}]}, "loras"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_wrong_field_is_named(
    client: openai.OpenAI, fields: dict[str, Any], parameter: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, extra_body=fields)
    error = caught.value
    assert error.param == parameter
    assert error.type == "invalid_request_error"
    assert error.code
    assert error.response.headers["x-trace-id"]
    assert isinstance(error.body, dict)
    assert parameter in error.body["message"]


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    assert caught.value.param == "model"
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/nonsense", "/v1/images/edits"])
def test_an_unknown_path_keeps_the_shape(server: Server, path: str) -> None:
    response = server.client.post(path, json=body())
    assert response.status_code == 404
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
