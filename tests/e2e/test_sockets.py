"""Clients that are silent, slow, greedy or malformed, as raw sockets against a real server."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import psutil
import pytest

from metrics.catalogue import DROPPED_CONNECTIONS
from serve.http.sockets.connections import MAX_PIPELINED_BYTES
from serve.http.sockets.listener import OTHER_DESCRIPTORS, RESERVED_CONNECTIONS
from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body
from tests.support.forked import self_hosted
from tests.support.otlp_endpoint import otlp_endpoint
from tests.support.processes import ServerProcess, read, wait_until
from tests.support.raw_client import GET_HEALTH, PATIENCE, Answer, Client, connected, post

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SETTINGS = {
    "SDXL_DEVICE": "cpu",
    "SDXL_MODEL": "demo",
    "OMP_NUM_THREADS": "1",
    "SDXL_SHAPES": "64x64",
    "SDXL_HEADER_SECONDS": "1",
    "SDXL_KEEP_ALIVE_SECONDS": "1",
    "SDXL_SEND_SECONDS": "1",
}
OPEN_FILES = 128

EXIT_SECONDS = 4.5
"""From SIGTERM to the process's end, if no request runs."""


def generate(path: str = "/", **fields: Any) -> bytes:
    return post(path, json.dumps(body(**fields)).encode())


def send_head(asking: Client, length: int) -> None:
    """Send a request's head, and wait until the app asks for its body.

    Before that the connection may be closed for a further one, as one that waits.
    """
    asking.send(post("/", b"", "Expect: 100-continue", length=length))
    asking.socket.settimeout(PATIENCE)
    assert asking.socket.recv(1024).startswith(b"HTTP/1.1 100 ")


@contextmanager
def client(server: ServerProcess, receive_buffer: int | None = None) -> Iterator[Client]:
    with connected(server.url, receive_buffer) as opened:
        yield opened


def value(server: ServerProcess, sample: str) -> float:
    for line in read(server.metrics_url).splitlines():
        if line.startswith(sample + " "):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"{sample} is not in the metrics")


def dropped(server: ServerProcess, reason: str) -> float:
    assert reason in DROPPED_CONNECTIONS
    return value(server, f'sdxl_connections_dropped_total{{reason="{reason}"}}')


def is_reached(server: ServerProcess) -> bool:
    try:
        return httpx.get(server.url + "/health", timeout=PATIENCE).status_code == 200
    except httpx.TransportError:  # no place for the connection
        return False


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """One server for every test that does not end it."""
    with self_hosted(SETTINGS, OPEN_FILES) as started:
        started.wait_until_ready(START_SECONDS)
        yield started


@pytest.fixture(scope="module")
def limited() -> Iterator[ServerProcess]:
    """One with few connections. The test of SIGHUP, the last to use it, ends it."""
    with server_of_its_own(SDXL_MAX_CONNECTIONS="4", SDXL_SEND_SECONDS="60") as started:
        yield started


@contextmanager
def server_of_its_own(**settings: str) -> Iterator[ServerProcess]:
    with self_hosted(SETTINGS | {"SDXL_SHAPES": "64x64"} | settings) as started:
        started.wait_until_ready(START_SECONDS)
        yield started


# How many connections there may be


def test_silent_clients_beyond_the_descriptors_leave_the_server_reachable(
    server: ServerProcess,
) -> None:
    before = len(server.output())
    assert psutil.Process(server.process.pid).num_fds() < OTHER_DESCRIPTORS
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(client(server))
        start = time.monotonic()
        for path in ("/health", "/metrics"):
            assert httpx.get(server.url + path, timeout=PATIENCE).status_code == 200
        answered = httpx.post(server.url, json=body(width=64, height=64), timeout=ANSWER_SECONDS)
        assert answered.status_code == 200
        assert time.monotonic() - start < PATIENCE
        assert psutil.Process(server.process.pid).num_fds() < OPEN_FILES
    assert dropped(server, "too_many_connections") > 100
    written = server.output()[before:]
    assert "Traceback" not in written
    assert len(written) < 5_000


def test_served_clients_at_the_limit_leave_room_to_watch(limited: ServerProcess) -> None:
    with ExitStack() as stack:
        readers = [stack.enter_context(client(limited)) for _ in range(4)]
        for reader in readers:
            send_head(reader, 100)
        wait_until(lambda: value(limited, "sdxl_requests_in_flight") == 4, PATIENCE)
        for path in ("/health", "/ready", "/metrics"):
            assert httpx.get(limited.url + path, timeout=PATIENCE).status_code == 200
        with client(limited) as beyond:
            beyond.send(GET_HEALTH)
            assert beyond.answer().headers["connection"] == "close"
            assert beyond.read() == b""
        refused = httpx.get(limited.url + "/stats", timeout=PATIENCE)
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        with client(limited) as beyond:
            beyond.send(generate(width=64, height=64))
            refused = beyond.answer()
            assert (refused.status, refused.error_type()) == (503, "too_many_connections")
            assert refused.headers["retry-after"]
            assert beyond.is_closed()
        for _ in range(RESERVED_CONNECTIONS):  # that ask for much, and take nothing
            greedy = stack.enter_context(client(limited, receive_buffer=4096))
            greedy.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        wait_until(lambda: is_reached(limited), PATIENCE)
        for reader in readers:
            reader.send(b"{" + b" " * 99)
            assert reader.answer().status == 422

    def draws() -> bool:
        answered = httpx.post(limited.url, json=body(width=64, height=64), timeout=ANSWER_SECONDS)
        assert answered.status_code in (200, 503)
        return answered.status_code == 200

    wait_until(draws, PATIENCE)  # the server has seen that the others are gone


def test_accepting_fails_seldom_in_the_log(server: ServerProcess) -> None:
    """Something else uses up the descriptors; here the limit is lowered under the server."""
    process = psutil.Process(server.process.pid)
    before = len(server.output())
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds(), OPEN_FILES))
    try:
        with ExitStack() as stack:
            for _ in range(50):
                stack.enter_context(client(server))
            time.sleep(1)
            assert len(server.output()[before:]) < 2_000
            process.rlimit(psutil.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
            assert httpx.get(server.url + "/health", timeout=PATIENCE).status_code == 200
    finally:
        process.rlimit(psutil.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


# The head


def test_a_silent_client_is_closed(server: ServerProcess) -> None:
    before = dropped(server, "head_too_slow")
    with client(server) as silent:
        start = time.monotonic()
        assert silent.read() == b""
        assert time.monotonic() - start > 0.8
    assert dropped(server, "head_too_slow") == before + 1


def test_a_head_in_drips_is_408(server: ServerProcess) -> None:
    with client(server) as dripping:
        start = time.monotonic()
        dripping.socket.settimeout(0.1)
        received = b""
        for byte in GET_HEALTH + GET_HEALTH:
            try:
                dripping.send(bytes([byte]))
                if received := dripping.socket.recv(65536):
                    break
            except TimeoutError:
                pass
        answer = Answer.parse(received + dripping.read())
        assert time.monotonic() - start < PATIENCE
    assert (answer.status, answer.error_type()) == (408, "head_too_slow")
    assert answer.headers["connection"] == "close"


def test_a_kept_connection_has_limits_too(server: ServerProcess) -> None:
    with client(server) as idle, client(server) as dripping:
        for kept in (idle, dripping):
            kept.send(GET_HEALTH)
            assert kept.answer().status == 200
        dripping.send(b"GET ")
        assert idle.read() == b""
        assert Answer.parse(dripping.read()).status == 408


@pytest.mark.parametrize(
    "lines",
    [["X: " + "x" * 100_000], [f"X-{number}: 1" for number in range(200)], ["X: " + "x" * 20_000]],
    ids=["longer than is read at once", "many", "complete when it is read"],
)
def test_a_large_head_is_431(server: ServerProcess, lines: list[str]) -> None:
    with client(server) as greedy:
        greedy.send("\r\n".join(["GET /health HTTP/1.1", "Host: x", *lines, "", ""]))
        answer = Answer.parse(greedy.read())
    assert (answer.status, answer.error_type()) == (431, "head_too_large")


MALFORMED = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
    "HTTP/2 with prior knowledge": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a signed length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\nx",
    "chunks beside a length": (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"
        b"0\r\n\r\n" + GET_HEALTH
    ),
    "chunks before HTTP/1.1": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "a space before the colon": b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n",
    "a chunk without a length": (
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nsecret\r\n"
    ),
}


@pytest.mark.parametrize("request_bytes", MALFORMED.values(), ids=MALFORMED)
def test_what_is_malformed_is_400_and_closes(server: ServerProcess, request_bytes: bytes) -> None:
    before = len(server.output())
    with client(server) as malformed:
        malformed.send(request_bytes)
        received = malformed.read()
    answer = Answer.parse(received)
    assert (answer.status, answer.error_type()) == (400, "malformed_http")
    assert received.count(b"HTTP/1.1 ") == 1  # nothing behind it is taken for a request
    assert b"secret" not in received
    assert "Traceback" not in server.output()[before:]


def test_a_malformed_chunk_after_the_answer_began_closes(server: ServerProcess) -> None:
    before = len(server.output())
    with client(server) as malformed:
        head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        malformed.send(head + b"1\r\nx\r\n")
        assert malformed.answer().status == 404
        malformed.send(b"nonsense\r\n")
        assert malformed.is_closed()
    assert "Traceback" not in server.output()[before:]


CHUNKED = b"Transfer-Encoding: chunked\r\n"
REFUSED_HEADS = {
    "chunks beside a length": (400, CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n"),
    "a chunk without a length": (400, CHUNKED + b"\r\nsecret\r\n"),
    "a space before the colon": (400, b"X : 1\r\n\r\n"),
    "complete when it is read": (431, b"X: " + b"x" * 20_000 + b"\r\n\r\n"),
    "longer than is read at once": (431, b"X: " + b"x" * 100_000 + b"\r\n\r\n"),
    "many": (431, b"X: 1\r\n" * 200 + b"\r\n"),
    "incomplete": (408, b"X: "),
}


@pytest.mark.parametrize("kept", [b"", GET_HEALTH], ids=["first", "second"])
@pytest.mark.parametrize(
    ("status", "request_bytes"),
    [
        *(
            (status, b"HEAD /health HTTP/1.1\r\nHost: x\r\n" + r)
            for status, r in REFUSED_HEADS.values()
        ),
        (400, b"HEAD /health HTTP/2.0\r\nHost: x\r\n\r\n"),
        (400, b"HEAD /health HTTP/1.1\r\n\r\n"),
    ],
    ids=[*REFUSED_HEADS, "HTTP/2", "no host"],
)
def test_a_refused_head_is_answered_by_a_head(
    server: ServerProcess, kept: bytes, status: int, request_bytes: bytes
) -> None:
    before = len(server.output())
    with client(server) as asking:
        if kept:
            asking.send(kept)
            assert asking.answer().status == 200
        asking.send(request_bytes)
        answer = Answer.parse(asking.read())
    assert (answer.status, answer.content) == (status, b"")
    assert int(answer.headers["content-length"]) > 0  # as for GET
    assert answer.headers["connection"] == "close"
    assert "Traceback" not in server.output()[before:]


def test_a_refusal_after_an_answered_head_has_its_content(server: ServerProcess) -> None:
    with client(server) as asking:
        asking.send(b"HEAD /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\n\r\n")
        received = asking.read()
    head, _, rest = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    refused = Answer.parse(rest)
    assert (refused.status, refused.error_type()) == (400, "malformed_http")


def test_mutated_requests_leave_no_traceback(server: ServerProcess) -> None:
    """Requests with bytes changed, lost, doubled and cut, each on a connection of its own."""
    draw = random.Random(16)
    whole = (
        generate(prompt="") + GET_HEALTH,
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\nExpect: 100-continue\r\n\r\n",
        b"HEAD /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    )
    before = len(server.output())
    for _ in range(300):
        mutated = bytearray(draw.choice(whole))
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(mutated))
            match draw.randrange(4):
                case 0:
                    mutated[place] = draw.randrange(256)
                case 1:
                    del mutated[place : place + draw.randint(1, 20)]
                case 2:
                    mutated[place:place] = mutated[place : place + 20]
                case 3:
                    mutated[place:place] = draw.choice([b"\r\n", b"\0", b":", b" ", b"\xff"])
            if not mutated:
                break
        with client(server) as sending:
            sending.send(bytes(mutated))
            sending.socket.shutdown(socket.SHUT_WR)
            assert sending.is_closed()
    assert httpx.get(server.url + "/health", timeout=PATIENCE).status_code == 200
    written = server.output()[before:]
    assert "Traceback" not in written
    assert '"level": "error"' not in written


def test_pipelined_requests_are_answered_in_order(server: ServerProcess) -> None:
    with client(server) as pipelining:
        refused = generate(prompt="")
        pipelining.send(GET_HEALTH + refused + GET_HEALTH + b"GET ")
        statuses = [pipelining.answer().status for _ in range(3)]
        assert statuses == [200, 422, 200]
        assert Answer.parse(pipelining.read()).status == 408  # for the half of the fourth


def test_a_wish_for_another_protocol_is_passed_over(server: ServerProcess) -> None:
    before = len(server.output())
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with client(server) as wishing:
        for _ in range(20):
            wishing.send(f"GET /health HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n")
            assert wishing.answer().status == 200
    assert "pgrade" not in server.output()[before:]


def test_one_that_closes_its_side_gets_a_state_but_no_image(server: ServerProcess) -> None:
    for _ in range(5):
        with client(server) as asking:
            asking.send(GET_HEALTH)
            asking.socket.shutdown(socket.SHUT_WR)
            assert Answer.parse(asking.read()).status == 200
    gone = 'sdxl_errors_total{error_type="client_gone"}'
    before = value(server, gone)
    with client(server) as leaving:
        leaving.send(generate(num_inference_steps=100, width=64, height=64))
        wait_until(lambda: value(server, "sdxl_requests_in_flight") == 1, PATIENCE)
        leaving.socket.shutdown(socket.SHUT_WR)
        assert leaving.read() == b""
    wait_until(lambda: value(server, gone) == before + 1, PATIENCE)


@pytest.mark.parametrize("more", [b"G", GET_HEALTH * 3, GET_HEALTH * 1000], ids=len)
def test_one_that_leaves_is_noticed_whatever_it_sent_ahead(
    server: ServerProcess, more: bytes
) -> None:
    gone = 'sdxl_errors_total{error_type="client_gone"}'
    before = value(server, gone)
    with client(server) as leaving:
        leaving.send(generate(num_inference_steps=100, width=64, height=64))
        wait_until(lambda: value(server, "sdxl_requests_in_flight") == 1, PATIENCE)
        leaving.send(more)
    wait_until(lambda: value(server, gone) == before + 1, PATIENCE)


def test_too_much_ahead_of_the_answer_is_refused(server: ServerProcess) -> None:
    with client(server) as greedy:
        drawn = generate(num_inference_steps=100, width=64, height=64)
        greedy.send(drawn + GET_HEALTH * (2 * MAX_PIPELINED_BYTES // len(GET_HEALTH)))
        answer = Answer.parse(greedy.read())
    assert (answer.status, answer.error_type()) == (400, "malformed_http")
    wait_until(lambda: value(server, "sdxl_requests_in_flight") == 0, PATIENCE)


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://x/health", "x", 200),
        ("http://127.0.0.1/debug/requests", "evil.test", 200),
        ("http://evil.test/debug/requests", "127.0.0.1", 403),
        ("http://127.0.0.1/debug/requests%0A", "127.0.0.1", 404),
        ("http://127.0.0.1//health", "127.0.0.1", 404),
        ("http://user@127.0.0.1/health", "127.0.0.1", 404),
    ],
)
def test_a_url_as_the_target_is_its_path_at_its_host(
    server: ServerProcess, target: str, host: str, status: int
) -> None:
    with client(server) as asking:
        asking.send(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n")
        assert asking.answer().status == status


# The body


def test_a_large_body_is_not_read_for_ever(server: ServerProcess) -> None:
    with client(server) as sending:
        start = time.monotonic()
        sending.send(post(length=10_000_000_000))
        assert sending.answer().status == 413
        closed = False
        while not closed and time.monotonic() - start < PATIENCE:
            try:
                sending.send(b" " * 100)
            except ConnectionError:
                closed = True
            time.sleep(0.01)
        assert closed  # the rest is dropped for a while only


def test_a_client_that_closes_after_each_answer_reads_why_its_body_was_refused(
    server: ServerProcess,
) -> None:
    size = 3_000_000
    with client(server) as sending:
        sending.send(post("/", b" " * size, "Connection: close"))
        assert Answer.parse(sending.read()).error_type() == "body_too_large"


def test_a_body_that_is_expected_is_asked_for(server: ServerProcess) -> None:
    content = json.dumps(body(prompt="")).encode()
    with client(server) as asking:
        send_head(asking, len(content))
        asking.send(content)
        assert asking.answer().status == 422


def test_head_of_the_metrics(server: ServerProcess) -> None:
    head = httpx.head(server.url + "/metrics")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/plain")


# The answer


def test_an_answer_that_is_not_read_is_given_up(server: ServerProcess) -> None:
    before = dropped(server, "answer_not_taken")
    with ExitStack() as stack:
        for _ in range(2):
            stalled = stack.enter_context(client(server, receive_buffer=4096))
            # Answers until the system's buffers are full.
            stalled.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        wait_until(lambda: dropped(server, "answer_not_taken") == before + 2, PATIENCE)
    assert httpx.get(server.url + "/health", timeout=PATIENCE).status_code == 200


def test_a_stream_that_is_not_read_delays_nobody(server: ServerProcess) -> None:
    with client(server, receive_buffer=4096) as stalled:
        stalled.send(generate("/stream", num_inference_steps=100, preview=True))
        wait_until(lambda: value(server, "sdxl_requests_in_flight") == 1, PATIENCE)
        answer = httpx.post(server.url, json=body(), timeout=ANSWER_SECONDS)
        assert answer.status_code == 200
        # It waited for the other's run, and neither waited for a reader.
        wait_until(lambda: value(server, "sdxl_requests_in_flight") == 0, PATIENCE)


# The end


def ends_within(server: ServerProcess, seconds: float, number: int = signal.SIGTERM) -> None:
    start = time.monotonic()
    server.process.send_signal(number)
    server.process.wait(ANSWER_SECONDS)
    assert time.monotonic() - start < seconds, server.output()
    assert server.process.returncode == 0, server.output()
    assert "Traceback" not in server.output()


def test_no_client_delays_the_end() -> None:
    """Each kind of client at once: silent, kept, half a head, half a body, a stalled answer."""
    patient = {f"SDXL_{name}_SECONDS": "60" for name in ("HEADER", "KEEP_ALIVE", "SEND")}
    with server_of_its_own(**patient) as server, ExitStack() as stack:
        clients = [stack.enter_context(client(server, receive_buffer=4096)) for _ in range(5)]
        _silent, kept, half_a_head, half_a_body, stalled = clients
        kept.send(GET_HEALTH)
        assert kept.answer().status == 200
        half_a_head.send(b"POST / HTTP/1.1\r\nHost: ")
        half_a_body.send(post(content=b"{", length=1000))
        stalled.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        wait_until(lambda: value(server, "sdxl_requests_in_flight") == 1, PATIENCE)
        time.sleep(0.5)
        ends_within(server, EXIT_SECONDS)
        for refused in (half_a_head, half_a_body):
            answer = Answer.parse(refused.read())
            assert (answer.status, answer.error_type()) == (503, "draining")
            assert answer.headers["connection"] == "close"
        assert "503 rejected" in server.output()


def test_sighup_drains_like_sigterm(limited: ServerProcess) -> None:
    server = limited
    with client(server) as asking:
        asking.send(generate("/", num_inference_steps=100, width=64, height=64))
        wait_until(lambda: value(server, "sdxl_requests_in_flight") == 1, PATIENCE)
        server.process.send_signal(signal.SIGHUP)
        answer = asking.answer(ANSWER_SECONDS)
        assert answer.status == 200
        assert answer.headers["connection"] == "close"
        server.process.wait(ANSWER_SECONDS)
        assert server.process.returncode == 0, server.output()


def test_sigint_twice_answers_by_the_error_table() -> None:
    with otlp_endpoint() as otlp:
        settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": otlp.url, "SDXL_SHAPES": "128x128"}
        with server_of_its_own(**settings) as server, ExitStack() as stack:
            clients = [stack.enter_context(client(server)) for _ in range(3)]
            streaming, waiting, reading = clients
            streaming.send(generate("/stream", num_inference_steps=100))
            streaming.socket.settimeout(ANSWER_SECONDS)
            received = b""
            while b"event: step" not in received:
                received += streaming.socket.recv(65536)
            waiting.send(generate(num_inference_steps=100))
            reading.send(post(content=b"{", length=1000))
            wait_until(lambda: value(server, "sdxl_requests_in_flight") == 3, PATIENCE)
            server.process.send_signal(signal.SIGINT)
            for refused in (waiting, reading):
                answer = Answer.parse(refused.read())
                assert (answer.status, answer.error_type()) == (503, "draining")
            start = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            received += streaming.read()
            server.process.wait(ANSWER_SECONDS)
            assert time.monotonic() - start < EXIT_SECONDS + 1
            assert server.process.returncode == 0, server.output()
            assert "Traceback" not in server.output()
        last = received.split(b"event: ")[-1]
        assert last.startswith(b"error\n")
        assert b'"error_type": "draining"' in last
        trace_id = re.search(rb"x-trace-id: ([0-9a-f]{32})", received)
        assert trace_id is not None
        spans = otlp.wait_for_trace(trace_id[1].decode())
        root = next(span for span in spans if span.name == "text-to-image")
        assert root.attributes["error.type"] == "draining"
