"""A finished image as a JSON response."""

from __future__ import annotations

import json

from starlette.responses import Response

from serve.schema import GeneratedImage, TextToImageResponse


def json_response(response: TextToImageResponse) -> Response:
    """The HTTP response of `POST /`."""
    return Response(response_body(response), media_type="application/json")


def response_body(response: TextToImageResponse, ascii_only: bool = False) -> bytes:
    """Encode the response as JSON.

    An inline image is a data URI of about a megabyte, and base64 has no character that JSON
    escapes. So the URIs are inserted as they are, instead of being scanned by an encoder (the
    framework's own scans them twice).

    Args:
        ascii_only: escape every other character.
    """
    images = (response.image, *response.images)
    if not any(image.url.startswith(_inline(image)) for image in images):
        return response.model_dump_json(ensure_ascii=ascii_only).encode()
    without = response.model_copy(
        update={
            "image": response.image.model_copy(update={"url": ""}),
            "images": [image.model_copy(update={"url": ""}) for image in response.images],
        }
    )
    encoded = without.model_dump_json(ensure_ascii=ascii_only).encode()
    first, *rest = encoded.split(b'"url":""')
    parts = [first]
    for image, after in zip(images, rest, strict=True):
        inline = image.url.startswith(_inline(image))
        url = f'"{image.url}"' if inline else json.dumps(image.url)
        parts += [b'"url":', url.encode(), after]
    return b"".join(parts)


def _inline(image: GeneratedImage) -> str:
    return f"data:{image.content_type};base64,"
