"""Bodies of every kind that no client should send, and connections that are left half open, as raw
sockets against a real server. None is a 500, none hangs, and no text of one is in the log."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from metrics.catalogue import DROPPED_CONNECTIONS
from serve.http.request_body import (
    MAX_BODY_BYTES,
    MAX_BODY_SECONDS,
    MAX_NESTING,
    MAX_PICTURE_BODY_BYTES,
)
from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body
from tests.support.forked import self_hosted
from tests.support.processes import ServerProcess
from tests.support.raw_client import GET_HEALTH, PATIENCE, Answer, Client, connected, post

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TEXT = "Zq7pXw"
"""A part of every body here."""


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    settings = {
        "SDXL_DEVICE": "cpu",
        "SDXL_SHAPES": "64x64",
        "SDXL_KEEP_ALIVE_SECONDS": "1",
        "OMP_NUM_THREADS": "1",
    }
    with self_hosted(settings) as started:
        started.wait_until_ready(START_SECONDS)
        yield started


@pytest.fixture(autouse=True)
def _nothing_of_a_body_is_logged(server: ServerProcess) -> Iterator[None]:
    before = len(server.output())
    yield
    assert httpx.get(server.url + "/health", timeout=PATIENCE).status_code == 200
    written = server.output()[before:]
    assert TEXT not in written
    assert "Traceback" not in written


def chunked(*chunks: bytes, path: str = "/", end: bytes = b"0\r\n\r\n", length: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    framed = b"".join(b"%s\r\n%b\r\n" % ((length or f"{len(c):x}").encode(), c) for c in chunks)
    return (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + framed + end


def wanted(**fields: object) -> bytes:
    return json.dumps(body(prompt=TEXT, width=64, height=64, **fields)).encode()


def answer_to(server: ServerProcess, data: bytes, seconds: float = PATIENCE) -> Answer:
    with connected(server.url) as client:
        client.send(data)
        return client.answer(seconds)


# Chunked bodies


def test_a_body_in_many_chunks_with_extensions_and_trailers_is_one_body(
    server: ServerProcess,
) -> None:
    pieces = [wanted()[at : at + 7] for at in range(0, len(wanted()), 7)]
    data = chunked(*pieces, end=b"0;last=1\r\nX-Trailer: 1\r\n\r\n").replace(b"7\r\n", b"7;a=b\r\n")
    assert answer_to(server, data, ANSWER_SECONDS).status == 200


def test_trailers_add_no_header(server: ServerProcess) -> None:
    """One that names a trace is not followed, and none declares the body's type."""
    trailer = b"0\r\nContent-Type: text/plain\r\nX-Request-Id: trailing\r\n\r\n"
    answer = answer_to(server, chunked(wanted(), end=trailer), ANSWER_SECONDS)
    assert answer.status == 200
    assert answer.headers["x-request-id"] != "trailing"


def test_a_chunked_body_without_end_is_413_at_its_limit(server: ServerProcess) -> None:
    piece = TEXT.encode() * 1000
    with connected(server.url) as client:
        client.send(chunked(*[piece] * (MAX_BODY_BYTES // len(piece) + 1), end=b""))
        answer = client.answer()
    assert (answer.status, answer.error_type()) == (413, "body_too_large")


@pytest.mark.parametrize("path", ["/", "/image-to-image/stream"])
def test_a_body_of_tiny_chunks_is_refused(server: ServerProcess, path: str) -> None:
    """Each costs as much as a large one, and they would hold up every other client."""
    with connected(server.url) as client:
        client.send(chunked(*[b" "] * 40_000, path=path))
        answer = Answer.parse(client.read())
    assert (answer.status, answer.error_type()) == (400, "malformed_http")


def test_an_early_answer_is_not_for_tiny_chunks_either(server: ServerProcess) -> None:
    """They are dropped after the 404, but not for as long as other bodies."""
    data = chunked(*[b" "] * 2000, path="/nowhere", end=b"")
    with connected(server.url) as client:
        client.send(data)
        assert client.is_closed(1.0)


@pytest.mark.parametrize("length", ["-5", "0x5", "5 5", "+5", "f" * 30, "١", TEXT], ids=ascii)
def test_a_wrong_size_of_a_chunk_is_refused(server: ServerProcess, length: str) -> None:
    with connected(server.url) as client:
        client.send(chunked(b"hello", length=length))
        answer = Answer.parse(client.read())
    # One that is a number, if a large one, is a body that is too large or that never ends.
    assert (answer.status, answer.error_type()) == (400, "malformed_http")


def test_a_chunk_longer_than_it_says_is_refused(server: ServerProcess) -> None:
    with connected(server.url) as client:
        client.send(chunked(TEXT.encode(), length="3"))
        assert Answer.parse(client.read()).status == 400


def test_a_body_longer_than_its_length_is_no_second_request(server: ServerProcess) -> None:
    """What follows the declared length is parsed as a request, and is none."""
    smuggled = f"{TEXT} /health HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with connected(server.url) as client:
        client.send(post(content=b"{}" + smuggled, length=2))
        assert client.answer().status == 422
        rest = client.read()
    assert not rest or Answer.parse(rest).status in (400, 404, 405)


# Slow, deep, repeated


def test_a_body_in_drips_is_408(server: ServerProcess) -> None:
    with connected(server.url) as client:
        start = time.monotonic()
        client.send(post(content=b"{", length=1000))
        client.socket.settimeout(0.3)
        received = b""
        while not received and time.monotonic() - start < 2 * MAX_BODY_SECONDS:
            try:
                client.send(b" ")
                received = client.socket.recv(65536)
            except TimeoutError:
                continue
        took = time.monotonic() - start
        answer = Answer.parse(received + client.read())  # the head may come first
    assert (answer.status, answer.error_type()) == (408, "body_too_slow")
    assert MAX_BODY_SECONDS - 1 < took < MAX_BODY_SECONDS + PATIENCE


@pytest.mark.parametrize("path", ["/", "/stream", "/image-to-image", "/v1/images/generations"])
@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt":' + b"[" * 30_000,
        b'{"a":' * (MAX_NESTING + 1) + b"1" + b"}" * (MAX_NESTING + 1),
        b'{"prompt": "' + TEXT.encode() + b'", "prompt": "b"}',
        b'{"prompt": "b", "loras": [{"path": "a", "path": "' + TEXT.encode() + b'"}]}',
        b'{"seed": ' + b"1" * 5000 + b"}",
        b'{"prompt": "\\ud800' + TEXT.encode() + b'"}',
        b"\xff\xfe" + TEXT.encode("utf-16-le"),
        b'"' + TEXT.encode() + b'"',
        b'{"prompt": "' + TEXT.encode() + b'", "loras": [{}' + b",{}" * 20_000 + b"]}",
        b"{" + b",".join(b'"%s%d": 0' % (TEXT.encode(), key) for key in range(3000)) + b"}",
    ],
    ids=[
        *("deep", "nested", "repeated", "repeated inside", "digits", "surrogate", "utf-16", "text"),
        *("many items", "many keys"),
    ],
)
def test_json_that_means_nothing_is_refused_at_every_endpoint(
    server: ServerProcess, path: str, content: bytes
) -> None:
    answer = answer_to(server, post(path, content))
    assert answer.status == (400 if path.startswith("/v1/") else 422)
    assert TEXT.encode() not in answer.content


def test_a_picture_without_an_end_of_items_delays_nobody(server: ServerProcess) -> None:
    """10 MiB are for the picture. An error for each item would take the event loop minutes."""
    start = b'{"prompt": "' + TEXT.encode() + b'", "image_url": "data:,", "loras": [{}'
    content = start + b",{}" * ((MAX_PICTURE_BODY_BYTES - 200) // 3) + b"]}"
    with connected(server.url) as client:
        began = time.monotonic()
        client.send(post("/image-to-image", content))
        answer = client.answer(ANSWER_SECONDS)
        took = time.monotonic() - began
    assert (answer.status, answer.error_type()) == (422, "invalid_request")
    assert took < PATIENCE


# Many at once, and halves


def test_pipelined_requests_of_every_end_are_answered_in_order(server: ServerProcess) -> None:
    refused, drawn = post(content=b"{}"), post(content=wanted())
    with connected(server.url) as client:
        client.send(drawn + refused + GET_HEALTH + chunked(wanted()) + GET_HEALTH)
        statuses = [client.answer(ANSWER_SECONDS).status for _ in range(5)]
    assert statuses == [200, 422, 200, 200, 200]


def test_many_idle_connections_are_closed_and_cost_no_request(server: ServerProcess) -> None:
    assert "keep_alive" not in DROPPED_CONNECTIONS  # their end is no fault of the client
    with ExitStack() as stack:
        idle: list[Client] = [stack.enter_context(connected(server.url)) for _ in range(100)]
        for client in idle:
            client.send(GET_HEALTH)
            assert client.answer().status == 200
        answered = httpx.post(server.url, content=wanted(), headers=JSON, timeout=ANSWER_SECONDS)
        assert answered.status_code == 200
        assert all(client.is_closed() for client in idle)


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize("path", ["/stream", "/v1/images/generations"])
def test_a_stream_whose_reader_closes_its_side_ends(server: ServerProcess, path: str) -> None:
    """The client has left, whatever its other side says: the work stops."""
    openai = {"prompt": TEXT, "stream": True, "num_inference_steps": 100}
    content = wanted(num_inference_steps=100) if path == "/stream" else json.dumps(openai).encode()
    with connected(server.url) as client:
        client.send(post(path, content))
        client.socket.settimeout(ANSWER_SECONDS)
        assert client.socket.recv(65536).startswith(b"HTTP/1.1 200")
        client.socket.shutdown(1)  # SHUT_WR
        received = client.read(ANSWER_SECONDS)
    assert b"base64" not in received
    assert b"completed" not in received
    deadline = time.monotonic() + PATIENCE
    while "sdxl_requests_in_flight 0.0" not in httpx.get(server.metrics_url, timeout=60).text:
        assert time.monotonic() < deadline
        time.sleep(0.1)
