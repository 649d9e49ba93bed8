"""A finished image as a JSON response."""

from __future__ import annotations

from starlette.responses import Response

from serve.schema import TextToImageResponse


def json_response(response: TextToImageResponse) -> Response:
    """The HTTP response of `POST /`."""
    return Response(response_body(response), media_type="application/json")


def response_body(response: TextToImageResponse) -> bytes:
    """Encode the response as JSON.

    An inline image is a data URI of about a megabyte, and base64 has no character that JSON
    escapes. So the URI is inserted as it is, instead of being scanned by an encoder (the
    framework's own scans it twice).
    """
    image = response.image
    if not image.url.startswith(f"data:{image.content_type};base64,"):
        return response.model_dump_json().encode()
    without = response.model_copy(update={"image": image.model_copy(update={"url": ""})})
    before, after = without.model_dump_json().encode().split(b'"url":""', 1)
    return b"".join((before, b'"url":"', image.url.encode(), b'"', after))
