"""An image as the response itself, for clients whose Accept header names an image type."""

from __future__ import annotations

import base64

from starlette.responses import Response

from serve.engine.images import CONTENT_TYPES
from serve.errors import FieldProblem, InvalidRequest, NotAcceptable
from serve.schema import ImageFormat, TextToImageRequest, TextToImageResponse

_FORMATS = {content_type: image_format for image_format, content_type in CONTENT_TYPES.items()}


def wants_image(accept: str) -> bool:
    """Whether the Accept header names an image type, and not JSON."""
    ranges = _ranges(accept)
    return any(each.startswith("image/") for each in ranges) and "application/json" not in ranges


def as_image_request(request: TextToImageRequest, accept: str) -> TextToImageRequest:
    """The request with the format that the Accept header names, and without an upload.

    Raises:
        NotAcceptable: no accepted type is the body's format, or none can be drawn.
        InvalidRequest: it asks for several images.
    """
    if request.num_images > 1:
        message = "must be 1 where the Accept header asks for an image"
        raise InvalidRequest([FieldProblem(("body", "num_images"), message, "one_image")])
    ranges = _ranges(accept)
    named = [_FORMATS[each] for each in ranges if each in _FORMATS]
    image_format: ImageFormat = request.format
    if "image/*" not in ranges and image_format not in named:
        if not named or "format" in request.model_fields_set:
            raise NotAcceptable(CONTENT_TYPES.values())
        image_format = named[0]
    return request.model_copy(update={"format": image_format, "sync_mode": True})


def image_response(response: TextToImageResponse) -> Response:
    """The image's bytes. What the JSON would say of it is in headers."""
    data = base64.b64decode(response.image.url.split(",", 1)[1])
    headers = {
        "x-seed": str(response.seed),
        "x-prompt-truncated": str(response.prompt_truncated).lower(),
    }
    if response.has_nsfw_concepts is not None:
        headers["x-has-nsfw-concepts"] = str(response.has_nsfw_concepts[0]).lower()
    return Response(data, media_type=response.image.content_type, headers=headers)


def _ranges(accept: str) -> list[str]:
    """The media types of an Accept header, those of quality 0 left out."""
    ranges = []
    for part in accept.lower().split(","):
        media_type, *parameters = (each.strip() for each in part.split(";"))
        if media_type and not any(_is_zero(each) for each in parameters):
            ranges.append(media_type)
    return ranges


def _is_zero(parameter: str) -> bool:
    name, _, value = parameter.partition("=")
    return name.strip() == "q" and value.strip().rstrip("0").rstrip(".") in ("", "0")
