"""Reading a request's body: limited in size, in time and by the end of the process, and checked to
be a JSON object.

The framework would parse the body by itself, but its errors do not name the cause, and it accepts
what is not JSON (`NaN`) or means two things (a repeated key).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive

from serve.engine.readiness import Readiness
from serve.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ClientGone,
    Draining,
    FieldProblem,
    InvalidRequest,
    UnsupportedMediaType,
)

# Two prompts of 2,000 characters, each escaped to twelve bytes, and a tracestate fit well within.
MAX_BODY_BYTES = 64 * 1024
MAX_PICTURE_BODY_BYTES = 10 * 1024 * 1024
"""Of a request of image to image: a picture of `MAX_PICTURE_BYTES` in base64 fits."""
MAX_GATEWAY_BODY_BYTES = 256 * 1024
"""Of a request to the gateway: two prompts of `MAX_UNTIDY_CHARACTERS`, each character escaped to
twelve bytes, a tracestate and `MAX_LORAS` fit."""
MAX_BODY_SECONDS = 10.0

MAX_NESTING = 16
"""Levels of objects and lists. The deepest field of a request needs three."""

MAX_VALUES = 1000
"""Values in a body, at all levels. A request has about 40 fields. Checking a value costs the event
loop some microseconds, and more where it is wrong."""

_MOST_BESIDE_A_PICTURE = {b",": 24 * 1024, b'"': 24 * 1024, b"\\": 1024 * 1024}
"""How often a body above `MAX_BODY_BYTES` may have a character. Parsing takes as long as a body has
values and escapes, and holds the interpreter; the picture itself is one long text, in which some
encoders escape each slash. Two prompts of commas and quotes fit, also the gateway's longer ones."""

MAX_DIGITS = 300
"""Of a whole number. More do not fit a double, and Python itself refuses to parse 4,300."""

_JSON = re.compile(r"application/([\w.+-]+\+)?json", re.ASCII | re.IGNORECASE)


async def read_body(
    receive: Receive,
    headers: Mapping[str, str],
    readiness: Readiness,
    limit_bytes: int = MAX_BODY_BYTES,
) -> bytes:
    """Read the whole body.

    Args:
        headers: the request's, by lower-case name.

    Raises:
        BodyTooLarge: it has more than `limit_bytes`. If it says so itself, none of it is read.
        BodyTooSlow: it did not arrive within `MAX_BODY_SECONDS`.
        ClientGone: the client disconnected before its end.
        Draining: the process began to shut down before its end.
    """
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(MAX_BODY_SECONDS) as limit:

            def stop() -> None:  # called by whoever drains, on any thread
                loop.call_soon_threadsafe(end_within, limit, 0.0)

            with readiness.when_draining(stop):
                return await _read_chunks(receive, limit_bytes)
    except TimeoutError:
        raise Draining if readiness.draining else BodyTooSlow(MAX_BODY_SECONDS) from None


def end_within(limit: asyncio.Timeout, seconds: float) -> None:
    """Leave a timeout at most `seconds`, if its block has not ended."""
    soon = asyncio.get_running_loop().time() + seconds
    with suppress(RuntimeError):  # it has ended
        limit.reschedule(min(soon, limit.when() or soon))


async def _read_chunks(receive: Receive, limit_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


@dataclass(frozen=True, slots=True)
class _Bad:
    """Stands in parsed JSON for a value that is refused."""

    message: str
    kind: str


def json_object(headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """Parse a body as the JSON object that it must be.

    Args:
        headers: the request's, by lower-case name.

    Raises:
        UnsupportedMediaType: it is not declared as JSON, or is compressed.
        InvalidRequest: it is not JSON as RFC 8259 defines it, is no object, repeats a key, is
            nested too deep, or has too many values. The message names the cause and never quotes
            the body.
    """
    if not body:
        raise _invalid("is empty; a JSON object is needed", "missing")
    _check_media_type(headers)
    if len(body) > MAX_BODY_BYTES and any(
        body.count(character) > most for character, most in _MOST_BESIDE_A_PICTURE.items()
    ):
        raise _too_many_values()
    try:
        value = json.loads(
            body.decode("utf-8-sig"),  # RFC 8259 allows to ignore a byte order mark
            object_pairs_hook=_object,
            parse_constant=lambda name: _Bad(f"{name} is not a JSON number", "not_finite"),
            parse_int=_integer,
        )
    except UnicodeDecodeError as error:
        raise _invalid(f"is not UTF-8 at byte {error.start}", "not_utf8") from None
    except json.JSONDecodeError as error:
        raise _invalid(f"is not valid JSON at character {error.pos}", "json_invalid") from None
    except RecursionError:
        raise _nested_too_deep() from None
    if not isinstance(value, dict):
        raise _invalid("must be a JSON object", "not_an_object")
    _check_values(value)
    return value


def _check_media_type(headers: Mapping[str, str]) -> None:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(
            "The body is compressed; it must have no Content-Encoding.",
            {"Accept-Encoding": "identity"},
        )
    media_type = headers.get("content-type", "").split(";")[0].strip()
    if not _JSON.fullmatch(media_type):
        raise UnsupportedMediaType(
            "The body must be sent as Content-Type: application/json.",
            {"Accept": "application/json"},
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        found[key] = _Bad("is there twice", "repeated_key") if key in found else value
    return found


def _integer(text: str) -> int | _Bad:
    digits = len(text.removeprefix("-"))
    if digits <= MAX_DIGITS:
        return int(text)
    message = f"is a number of {digits} digits, more than the {MAX_DIGITS} allowed"
    return _Bad(message, "too_many_digits")


def _check_values(body: dict[str, Any]) -> None:
    """Refuse what `json_object` marked in the parsed body, deep nesting, and many values."""
    waiting: list[tuple[tuple[str | int, ...], Any]] = [(("body",), body)]
    values = 0
    while waiting:
        location, value = waiting.pop()
        if len(location) > MAX_NESTING:
            raise _nested_too_deep()
        values += len(value)
        if values > MAX_VALUES:
            raise _too_many_values()
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, _Bad):
                raise InvalidRequest([FieldProblem((*location, key), item.message, item.kind)])
            if item and isinstance(item, dict | list):
                waiting.append(((*location, key), item))


def _nested_too_deep() -> InvalidRequest:
    return _invalid(f"is nested deeper than the {MAX_NESTING} levels allowed", "nested_too_deep")


def _too_many_values() -> InvalidRequest:
    return _invalid(f"has more than the {MAX_VALUES} values allowed", "too_many_values")


def _invalid(what: str, kind: str) -> InvalidRequest:
    return InvalidRequest([FieldProblem(("body",), f"the body {what}", kind)])
