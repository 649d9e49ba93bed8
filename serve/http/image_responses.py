"""An image as the response itself, for clients whose Accept header names an image type."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping

from starlette.responses import Response

from serve.engine.images import CONTENT_TYPES
from serve.errors import FieldProblem, InvalidRequest, NotAcceptable
from serve.schema import TextToImageRequest, TextToImageResponse

_FORMATS = {content_type: image_format for image_format, content_type in CONTENT_TYPES.items()}
_QUALITY = re.compile(r"q\s*=\s*(0(?:\.[0-9]*)?|1(?:\.0*)?)")


def wants_image(accept: str) -> bool:
    """Whether the Accept header names an image type, and not JSON as one that is as good."""
    qualities = _qualities(accept)
    if not any(each.startswith("image/") and quality for each, quality in qualities.items()):
        return False
    json = qualities.get("application/json", qualities.get("application/*", 0.0))
    return not json or any(_quality(each, qualities) > json for each in _FORMATS)


def as_image_request(request: TextToImageRequest, accept: str) -> TextToImageRequest:
    """The request with the body's format, or else the one that the Accept header likes best, and
    without an upload.

    Of several that it likes equally, the first one that it names is drawn, or else the default.

    Raises:
        NotAcceptable: the body's format is not accepted, or none that can be drawn is.
        InvalidRequest: it asks for several images.
    """
    if request.num_images > 1:
        message = "must be 1 where the Accept header asks for an image"
        raise InvalidRequest([FieldProblem(("body", "num_images"), message, "one_image")])
    qualities = _qualities(accept)
    types = [CONTENT_TYPES[request.format]]
    if "format" not in request.model_fields_set:
        types = [*(each for each in qualities if each in _FORMATS), *types, *_FORMATS]
    best = max(types, key=lambda each: _quality(each, qualities))
    if not _quality(best, qualities):
        raise NotAcceptable(CONTENT_TYPES.values())
    return request.model_copy(update={"format": _FORMATS[best], "sync_mode": True})


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


def _quality(image_type: str, qualities: Mapping[str, float]) -> float:
    """The quality of an image type, by the most specific range that has it (RFC 9110, 12.5.1)."""
    for each in (image_type, "image/*", "*/*"):
        if each in qualities:
            return qualities[each]
    return 0.0


def _qualities(accept: str) -> dict[str, float]:
    """The ranges of an Accept header in their order, and the quality of each. Parameters of a type
    are passed over, and so is what is no quality."""
    qualities = {}
    for part in accept.lower().split(","):
        media_type, *parameters = (each.strip() for each in part.split(";"))
        if media_type:
            given = [match[1] for each in parameters if (match := _QUALITY.fullmatch(each))]
            qualities[media_type] = float(given[0]) if given else 1.0
    return qualities
