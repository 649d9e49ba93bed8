"""The endpoints: `POST /v1/images/generations`, `GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from serve.engine.call import Call
from serve.engine.gpu_run import Previews
from serve.engine.images import encode_image, enlarge
from serve.engine.runtime import OPENAI_IMAGES, Runtime
from serve.errors import FieldProblem, InvalidRequest, ModelNotFound, RequestError
from serve.http.error_responses import error_body
from serve.http.openai.schema import (
    CompletedImage,
    Image,
    ImageGenerationRequest,
    Images,
    Model,
    Models,
    PartialImage,
    Usage,
)
from serve.http.routes import add_get_route
from serve.http.server_sent_events import encoded_event, event, stream
from serve.http.service import received_call
from serve.schema import GeneratedImage, TextToImageResponse


def install_openai(app: FastAPI, runtime: Runtime) -> None:
    """Put the endpoints into an app."""
    started = int(time.time())

    @app.post(OPENAI_IMAGES, response_model=Images)
    async def generate(request: ImageGenerationRequest) -> Response:
        """OpenAI's image generation; with `stream` as server-sent events."""
        return await create_images(runtime, request)

    async def models() -> Models:
        """The names that a request's `model` may have."""
        return Models(data=[Model(id=name, created=started) for name in _model_names(runtime)])

    async def model(name: str) -> Model:
        """One of them."""
        _check_model(runtime, name)
        return Model(id=name, created=started)

    add_get_route(app, "/v1/models", models)
    add_get_route(app, "/v1/models/{name:path}", model)


async def create_images(runtime: Runtime, request: ImageGenerationRequest) -> Response:
    """The handler of `POST /v1/images/generations`."""
    if request.model is not None:
        _check_model(runtime, request.model)
    if request.response_format == "url" and not runtime.uploads:
        message = "must be b64_json: this server does not upload its images"
        raise InvalidRequest([FieldProblem(("body", "response_format"), message, "no_upload")])
    settings = runtime.settings
    wanted = request.text_to_image(
        settings.default_steps, fixed_steps=settings.timesteps is not None
    )
    call = received_call()
    if request.stream:
        steps = wanted.num_inference_steps or settings.default_steps
        previews = _previews(request, steps)
        return await stream(runtime, wanted, call, _Events(request, call), previews)
    response = await runtime.generate(wanted, call)
    call.timeline.begin("respond")
    # pydantic's encoder, which takes a fifth of the standard library's time on the event loop for
    # an image of megabytes.
    body = _images(request, response).model_dump_json(exclude_none=True)
    return Response(body, media_type="application/json")


def _model_names(runtime: Runtime) -> tuple[str, ...]:
    """The names that a request's `model` may have.

    Raises:
        NotReady: the model has no name yet, or could not be loaded.
        Draining: the process ends before it has loaded the model.
    """
    # Read before the name, because the start-up sets the name before requests are served.
    refusal = runtime.refusal()
    if refusal is not None and not runtime.readiness.model:
        raise refusal
    return runtime.model_names


def _check_model(runtime: Runtime, name: str) -> None:
    """Raises ModelNotFound unless the model has this name, and what `_model_names` raises."""
    if name not in (names := _model_names(runtime)):
        raise ModelNotFound(names)


def _previews(request: ImageGenerationRequest, steps: int) -> Previews | None:
    """Evenly spread over the steps; none of the last, whose image is the result."""
    count = request.partial_images or 0
    shown = {steps * part // (count + 1) - 1 for part in range(1, count + 1)}
    shown = {step for step in shown if 0 <= step < steps - 1}
    return Previews(frozenset(shown), request.decoded_partial_images) if shown else None


class _Events:
    """A stream's events. OpenAI's API has none for a request that waits, nor for a step."""

    def __init__(self, request: ImageGenerationRequest, call: Call) -> None:
        self._request = request
        self._call = call
        self._partial_images = 0

    def queued(self, waiting: int) -> bytes:
        # A comment: the response begins, and a client that waits knows it.
        return b": queued\n\n"

    async def step(self, index: int, gpu_ms: float, preview: Any) -> bytes:
        facts = self._call.facts
        if preview is None or facts is None:
            return b""
        data = await asyncio.to_thread(self._encode, preview, facts.width, facts.height)
        common = self._common(data, f"{facts.width}x{facts.height}")
        partial = PartialImage(**common, partial_image_index=self._partial_images)
        self._partial_images += 1
        return _event(partial)

    def done(self, response: TextToImageResponse) -> bytes:
        flagged = response.has_nsfw_concepts
        return b"".join(
            _event(
                CompletedImage(
                    **self._common(_base64(image), _size(image)),
                    usage=Usage.of_prompt(response.prompt_tokens),
                    seed=image.seed,
                    has_nsfw_concepts=None if flagged is None else [flagged[index]],
                )
            )
            for index, image in enumerate(response.images)
        )

    def failed(self, error: RequestError) -> bytes:
        return event("error", error_body(error, self._call))

    def _encode(self, preview: Any, width: int, height: int) -> str:
        pixels = enlarge(preview, width, height)
        quality = self._request.image_quality
        return base64.b64encode(encode_image(pixels, self._request.image_format, quality)).decode()

    def _common(self, b64_json: str, size: str) -> dict[str, Any]:
        return {
            "b64_json": b64_json,
            "created_at": int(time.time()),
            "size": size,
            "output_format": self._request.image_format,
            "quality": self._request.response_quality,
        }


def _event(content: PartialImage | CompletedImage) -> bytes:
    return encoded_event(content.type, content.model_dump_json(exclude_none=True).encode())


def _images(request: ImageGenerationRequest, response: TextToImageResponse) -> Images:
    as_url = request.response_format == "url"
    return Images(
        created=int(time.time()),
        data=[
            Image(url=image.url) if as_url else Image(b64_json=_base64(image))
            for image in response.images
        ],
        size=_size(response.image),
        output_format=request.image_format,
        quality=request.response_quality,
        usage=Usage.of_prompt(response.prompt_tokens),
        seeds=[image.seed for image in response.images],
        trace_id=response.trace_id,
        prompt_truncated=response.prompt_truncated,
        has_nsfw_concepts=response.has_nsfw_concepts,
    )


def _size(image: GeneratedImage) -> str:
    return f"{image.width}x{image.height}"


def _base64(image: GeneratedImage) -> str:
    """The bytes of an image that was answered as a data URI."""
    return image.url.split(",", 1)[1]
