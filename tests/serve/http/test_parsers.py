"""Every parser of what a client sends: any input gives a value or the documented error, and no
error repeats the input."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any

import h11
import httpx
import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from metrics.tracing import drawn_identity
from serve.engine.call import Call
from serve.engine.images import CONTENT_TYPES
from serve.errors import (
    HeadTooLarge,
    InvalidRequest,
    MalformedHttp,
    NotAcceptable,
    RequestError,
)
from serve.http.error_responses import error_body, field_problems
from serve.http.gateway.image_app_errors import MAX_ERROR_BYTES, error_type_of, explain
from serve.http.image_responses import as_image_request, wants_image
from serve.http.middleware import _trace_carrier
from serve.http.openai.schema import ImageGenerationRequest
from serve.http.sockets.parser import BYTES_A_CHUNK, FREE_CHUNKS, MAX_HEAD_FIELDS, CheckedParser
from serve.schema import ImageFormat, ImageToImageRequest, PromptRequest, TextToImageRequest

pytestmark = pytest.mark.parser

MARK = "Zq7pXw"
"""In every value that is sent, and in no answer."""


def marked(text: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(text, text).map(lambda pair: pair[0] + MARK + pair[1])


# Requests


def shown(error: RequestError, path: str) -> str:
    """The body of an error's answer."""
    return json.dumps(error_body(error, Call(path, "POST", drawn_identity())))


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | marked(st.text(max_size=20))
    | st.sampled_from(["square", "jpeg", "auto", "1024x1024", "768 x 768", "v1", "low", "url"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["width", "path", "scale", "height"]), inner)
    ),
    max_leaves=5,
)


def bodies(model: type[BaseModel]) -> st.SearchStrategy[dict[str, Any]]:
    """Bodies of fields that the model has, each with any value, and of one that it has not."""
    names = st.sampled_from([*model.model_fields, "nonsense"])
    good = {"prompt": "a circle", "image_url": "data:"}
    return st.tuples(st.dictionaries(names, VALUES, max_size=4), st.booleans()).map(
        lambda drawn: (
            ({k: v for k, v in good.items() if k in model.model_fields} if drawn[1] else {})
            | drawn[0]
        )
    )


@pytest.mark.parametrize("model", [TextToImageRequest, ImageToImageRequest, PromptRequest])
@given(data=st.data())
def test_any_fields_are_a_request_or_an_error_without_their_values(
    model: type[TextToImageRequest], data: st.DataObject
) -> None:
    body = data.draw(bodies(model))
    try:
        request = model.model_validate(body)
    except ValidationError as error:
        problem = InvalidRequest(field_problems(error.errors(), ("body",)))
        assert MARK not in shown(problem, "/")
    else:
        again = model.model_validate_json(request.model_dump_json())
        assert again == request
        assert len(request.size) == 2


@given(bodies(ImageGenerationRequest), st.integers(1, 100), st.booleans())
def test_any_fields_of_openais_api_are_a_request_or_an_error_without_their_values(
    body: dict[str, Any], model_steps: int, fixed_steps: bool
) -> None:
    problems: Sequence[Any]
    try:
        request = ImageGenerationRequest.model_validate(body)
        ours = request.text_to_image(model_steps, fixed_steps)
    except (ValidationError, RequestValidationError) as error:
        problems = error.errors()
        answer = shown(InvalidRequest(field_problems(problems)), "/v1/images/generations")
        assert MARK not in answer
    else:
        assert ours.prompt == request.prompt
        assert request.response_quality


@given(st.integers(0, 100), st.sampled_from(["jpeg", "webp"]))
def test_every_compression_of_openais_api_is_a_quality(value: int, image_format: str) -> None:
    request = ImageGenerationRequest.model_validate(
        {"prompt": "a circle", "output_format": image_format, "output_compression": value}
    )
    assert request.text_to_image(20).image_quality == max(1, value)


# Headers

TYPES = st.sampled_from(
    [
        "image/png",
        "image/*",
        "IMAGE/WebP",
        "application/json",
        "*/*",
        "q=0",
        ";q=0.0",
        ",",
        "; ",
        "=",
    ]
)
ACCEPT = st.lists(TYPES | st.text(max_size=5), max_size=6).map("".join)


@given(ACCEPT)
def test_any_accept_header_means_json_an_image_or_an_error(accept: str) -> None:
    request = TextToImageRequest(prompt="a circle")
    if wants_image(accept):
        with contextlib.suppress(RequestError):  # not acceptable
            chosen = as_image_request(request, accept)
            assert f"image/{chosen.format}" in accept.lower() or "*" in accept


RANGES = ["image/jpeg", "image/png", "image/webp", "image/avif", "image/*", "*/*", "text/html"]
JSON_RANGES = ["application/json", "application/*"]
QUALITIES = st.dictionaries(
    st.sampled_from(RANGES + JSON_RANGES), st.sampled_from([0.0, 0.001, 0.5, 1.0])
)


@given(QUALITIES, st.sampled_from([None, *CONTENT_TYPES]), st.sampled_from([";q=", " ; Q = "]))
def test_the_image_is_of_a_type_that_the_accept_header_likes_best(
    qualities: dict[str, float], image_format: ImageFormat | None, before: str
) -> None:
    accept = ", ".join(f"{name.upper()}{before}{value}" for name, value in qualities.items())

    def liked(*ranges: str) -> float:
        return next((qualities[each] for each in ranges if each in qualities), 0.0)

    images = {each: liked(f"image/{each}", "image/*", "*/*") for each in CONTENT_TYPES}
    json_liked = liked(*JSON_RANGES)
    names_images = any(qualities.get(each, 0.0) for each in RANGES[:5])
    wanted = names_images and (json_liked == 0.0 or max(images.values()) > json_liked)
    assert wants_image(accept) == wanted
    fields = {} if image_format is None else {"format": image_format}
    request = TextToImageRequest.model_validate({"prompt": "a circle"} | fields)
    best = max(images.values()) if image_format is None else images[image_format]
    if best == 0.0:
        with pytest.raises(NotAcceptable):
            as_image_request(request, accept)
    else:
        chosen = as_image_request(request, accept).format
        assert images[chosen] == best
        assert chosen == (image_format or chosen)


@pytest.mark.parametrize(
    ("accept", "fields", "chosen"),
    [
        ("image/webp, */*", {"format": "png"}, "png"),
        ("image/webp, */*", {}, "webp"),
        ("image/png;q=0.1, image/webp;q=0.9", {}, "webp"),
        ("image/webp, image/png", {}, "webp"),
        ("image/*, image/jpeg;q=0", {}, "png"),
        ("image/*;q=0.2, application/json;q=0.1", {}, "jpeg"),
        ("image/avif, image/webp, image/*, */*;q=0.8", {"format": "jpeg"}, "jpeg"),
    ],
)
def test_an_accept_header_chooses_a_format(
    accept: str, fields: dict[str, str], chosen: str
) -> None:
    assert wants_image(accept)
    request = TextToImageRequest.model_validate({"prompt": "a circle"} | fields)
    assert as_image_request(request, accept).format == chosen


@pytest.mark.parametrize(
    "accept", ["image/png, application/json", "image/avif, application/*;q=0.1"]
)
def test_json_is_answered_where_it_is_liked_as_much(accept: str) -> None:
    assert not wants_image(accept)


@given(st.lists(st.tuples(st.sampled_from(["traceparent", "tracestate"]), st.text(max_size=60))))
def test_any_trace_headers_are_a_carrier(pairs: list[tuple[str, str]]) -> None:
    from starlette.datastructures import Headers

    raw = [(name.encode(), value.encode()) for name, value in pairs]
    carrier = _trace_carrier(Headers(raw=raw))
    assert bool(carrier) == (sum(name == "traceparent" for name, _ in pairs) == 1)


# Heads and chunks of a body, as bytes

PIECES = st.sampled_from(
    [
        *(b"GET ", b"POST ", b"/", b" HTTP/1.1", b" HTTP/1.0", b" HTTP/2", b"\r\n", b"\n", b"\r"),
        *(
            b"Host: x\r\n",
            b"Content-Length: ",
            b"Transfer-Encoding: chunked\r\n",
            b"0",
            b"5",
            b"-1",
        ),
        *(b"\r\n\r\n", b"ffffffffffffffffff", b";a=b", b" ", b"\t", b"\0", b"\xff", b"X: "),
        *(
            MARK.encode(),
            b"Expect: 100-continue\r\n",
            b"hello",
            b"Connection: close\r\n",
            b"A" * 9000,
        ),
    ]
)
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


def parsed(chunks: Sequence[bytes]) -> tuple[list[str], bytes, RequestError | None]:
    """The events of one request, its body, and why it is refused."""
    parser = CheckedParser()
    events, body = [], b""
    for chunk in chunks:
        parser.receive_data(chunk)
        while (event := parser.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            if isinstance(event, h11.Data):
                body += event.data
            else:
                events.append(type(event).__name__)
    return events, body, parser.problem


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places})
    starts = [0, *ends]
    chunks = [data[start:end] for start, end in zip(starts, [*ends, len(data)], strict=True)]
    return [chunk for chunk in chunks if chunk]  # empty would mean the end


@given(st.lists(PIECES, max_size=12), st.booleans(), st.lists(st.integers(0, 500), max_size=4))
def test_any_bytes_are_parsed_the_same_however_they_arrive(
    pieces: list[bytes], begun: bool, places: list[int]
) -> None:
    data = (HEAD if begun else b"") + b"".join(pieces)
    whole = parsed([data] if data else [])
    *events, problem = parsed(cut(data, places))
    assert type(problem) is type(whole[2])
    assert events[0] == whole[0]
    if problem is not None:
        assert 400 <= problem.status < 500
        assert MARK not in problem.message + str(dict(problem.headers))
    else:
        assert events[1] == whole[1]


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=5), st.lists(st.integers(0, 300)))
def test_a_chunked_body_is_its_chunks(chunks: list[bytes], places: list[int]) -> None:
    data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    for chunk in chunks:
        data += b"%x;name=value\r\n%b\r\n" % (len(chunk), chunk)
    data += b"0\r\nTrailer-Field: 1\r\n\r\n"
    events, body, problem = parsed(cut(data, places))
    assert problem is None
    assert body == b"".join(chunks)
    assert events == ["Request", "EndOfMessage"]


def request_of(target: str, host: bytes = b"there") -> h11.Request:
    parser = CheckedParser()
    parser.receive_data(b"GET %b HTTP/1.1\r\nHost: %b\r\nX: 1\r\n\r\n" % (target.encode(), host))
    event = parser.next_event()
    assert isinstance(event, h11.Request)
    return event


PATHS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20)


@given(
    st.sampled_from(["http", "HTTPS"]),
    st.sampled_from(["x", "127.0.0.1:80", "[::1]:8080", "evil.test", "a:"]),
    PATHS.map("/".__add__) | PATHS.map("?".__add__) | st.just(""),
)
def test_a_url_is_its_path_and_its_host(scheme: str, host: str, path: str) -> None:
    found = request_of(f"{scheme}://{host}{path}")
    same = request_of(path if path.startswith("/") else "/" + path, host.encode())
    assert found.target == same.target
    assert sorted(found.headers) == sorted(same.headers)


@given(st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1))
def test_no_path_is_taken_for_a_url(path: str) -> None:
    for target in ("/" + path, "//" + path, "http:/x/" + path, "http://u@" + path, "ftp://" + path):
        found = request_of(target)
        assert found.target == target.encode()
        assert dict(found.headers)[b"host"] == b"there"


def test_a_body_of_tiny_chunks_is_refused_before_all_are_parsed() -> None:
    tiny = b"1\r\nx\r\n"
    data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + tiny * 40_000
    _, body, problem = parsed([data])
    assert isinstance(problem, MalformedHttp)
    assert len(body) <= 1.01 * FREE_CHUNKS
    few = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + tiny * FREE_CHUNKS + b"0\r\n\r\n"
    _, body, problem = parsed([few])
    assert (body, problem) == (b"x" * FREE_CHUNKS, None)


def test_a_large_body_may_have_many_chunks() -> None:
    chunk = b"%x\r\n%b\r\n" % (BYTES_A_CHUNK, b"x" * BYTES_A_CHUNK)
    data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 4000 + b"0\r\n\r\n"
    _, body, problem = parsed([data])
    assert (len(body), problem) == (4000 * BYTES_A_CHUNK, None)


@pytest.mark.parametrize("before", [HEAD, HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"])
def test_lines_are_counted_before_they_are_parsed(before: bytes) -> None:
    """In a head and in a body's trailers; nonsense behind the limit is not reached."""
    lines = b"X: 1\r\n" * MAX_HEAD_FIELDS
    _, _, problem = parsed([before + lines + b"nonsense\r\n" * 50_000 + b"\r\n"])
    assert isinstance(problem, HeadTooLarge)
    _, _, problem = parsed([before + lines[: len(lines) // 2] + b"\r\n"])
    assert problem is None


# What the gateway gets from the image app's address


@given(
    st.integers(200, 599),
    st.binary(max_size=40)
    | VALUES.map(lambda value: json.dumps({"error_type": value}).encode())
    | VALUES.map(lambda value: json.dumps(value).encode()),
    st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=8),
)
def test_any_answer_of_the_image_app_is_explained_without_its_text(
    status: int, content: bytes, retry_after: str
) -> None:
    headers = [(b"retry-after", retry_after.encode("latin-1"))]
    answer = httpx.Response(status, content=content, headers=headers)
    kind = error_type_of(answer)
    assert kind is None or (kind.isidentifier() and kind == kind.lower())
    error = explain(answer)
    assert error.status in (429, 502, 504)
    assert MARK not in error.message
    assert dict(error.headers).get("Retry-After", "0").isdecimal()


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_an_answer_that_is_nested_deeply_is_not_the_image_apps(opening: bytes) -> None:
    deep = opening * (MAX_ERROR_BYTES // len(opening))
    assert error_type_of(httpx.Response(500, content=deep)) is None


def test_a_large_error_is_not_parsed() -> None:
    error = b'{"error_type": "queue_full"}'
    largest = error.ljust(MAX_ERROR_BYTES)
    assert error_type_of(httpx.Response(429, content=largest)) == "queue_full"
    assert error_type_of(httpx.Response(429, content=largest + b" ")) is None


def test_a_digit_that_is_no_number_is_no_time_to_retry_after() -> None:
    answer = httpx.Response(429, headers=[(b"retry-after", "²".encode("latin-1"))])
    assert "Retry-After" not in explain(answer).headers
