"""Start and end of both servers: their responses, their exports and how long they take."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

import tests.e2e.test_contract  # noqa: F401 - its rows count too
from serve.app import UPLOAD_SECONDS
from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, STARTS, body, environment
from tests.e2e.differences import ROWS, documented_rows, row
from tests.support.otlp_endpoint import otlp_endpoint, tree
from tests.support.processes import ServerProcess, read
from tests.support.raw_client import Answer, connected, post

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

KINDS = pytest.mark.parametrize("kind", list(STARTS))

# Three seconds to export the last spans; the rest is for a busy machine.
ENDING_SECONDS = 15.0

# `termination_grace_period_seconds` of pyproject.toml.
GRACE_SECONDS = 80.0

# fal raises the signal again at the end, so its process has no exit status of its own.
EXIT_STATUS = {"self-hosted": 0, "fal": -signal.SIGTERM}

# Shapes whose warm-up takes a CPU some time.
LONG_WARM_UP = {"SDXL_SHAPES": "1024x1024,768x768,512x512"}


def wait_for_output(process: ServerProcess, text: str, seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while text not in process.output():
        assert process.process.poll() is None, process.output()
        assert time.monotonic() < deadline, process.output()
        time.sleep(0.05)


@pytest.mark.docs
def test_the_documents_table_is_what_is_asserted() -> None:
    assert sorted(documented_rows()) == sorted(ROWS)


def self_hosted_answers_not_ready(process: ServerProcess) -> None:
    assert httpx.get(process.url + "/health", timeout=30).status_code == 200
    ready = httpx.get(process.url + "/ready", timeout=30)
    assert (ready.status_code, ready.json()["state"]) == (503, "starting")
    assert ready.json()["phase"].startswith("compile")
    answer = httpx.post(process.url, json=body(), timeout=30)
    assert (answer.status_code, answer.json()["error_type"]) == (503, "not_ready")
    assert answer.headers["retry-after"] == "5"


def fal_opens_no_port(process: ServerProcess) -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get(process.url + "/ready", timeout=30)


@row("Before it is ready")
@row("The exit status after SIGTERM")
@pytest.mark.parametrize(
    ("kind", "check"), [("self-hosted", self_hosted_answers_not_ready), ("fal", fal_opens_no_port)]
)
def test_sigterm_in_warm_up(kind: str, check: Callable[[ServerProcess], None]) -> None:
    with otlp_endpoint() as otlp, STARTS[kind](environment(otlp, **LONG_WARM_UP)) as process:
        wait_for_output(process, "start-up: compile")
        check(process)
        assert "\nsdxl_ready 0.0\n" in httpx.get(process.metrics_url, timeout=30).text
        seconds = process.terminate(GRACE_SECONDS)
        assert seconds < ENDING_SECONDS
        (warmup,) = otlp.wait_for(lambda spans: any(s.name == "warmup" for s in spans))[-1:]
        assert (warmup.name, warmup.attributes["error.type"]) == ("warmup", "draining")
        assert process.process.returncode == EXIT_STATUS[kind], process.output()


@KINDS
def test_sigterm_in_mid_request(kind: str) -> None:
    """The running request is answered, the waiting one is refused, and both are exported."""
    with otlp_endpoint() as otlp, STARTS[kind](environment(otlp)) as process:
        process.wait_until_ready(START_SECONDS)
        waiting: list[httpx.Response] = []

        def wait() -> None:
            waiting.append(httpx.post(process.url, json=body(), timeout=ANSWER_SECONDS))

        waiter = threading.Thread(target=wait)
        running = body(num_inference_steps=50)
        with httpx.stream(
            "POST", process.url + "/stream", json=running, timeout=ANSWER_SECONDS
        ) as answer:
            lines = answer.iter_lines()
            while next(lines) != "event: step":
                pass
            waiter.start()
            while "\nsdxl_requests_waiting 1.0\n" not in read(process.metrics_url):
                time.sleep(0.02)
            signalled = time.monotonic()
            process.process.terminate()
            rest = list(lines)
        waiter.join()
        process.process.wait(GRACE_SECONDS)
        assert time.monotonic() - signalled < GRACE_SECONDS
        assert process.process.returncode == EXIT_STATUS[kind], process.output()

        assert "event: image" in rest
        assert (waiting[0].status_code, waiting[0].json()["error_type"]) == (503, "draining")
        spans = otlp.wait_for_trace(answer.headers["x-trace-id"])
        assert tree(spans).count("denoise_step") == 50
        refused = otlp.wait_for_trace(waiting[0].json()["trace_id"])
        assert "inference" not in tree(refused)


@contextmanager
def silent_storage() -> Iterator[str]:
    """An address that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@row("Where images are")
@KINDS
def test_billing_a_silent_cdn_and_sigterm_at_rest(kind: str) -> None:
    """One test, because starting a process with these settings takes longer than the rest."""
    with otlp_endpoint() as otlp, silent_storage() as storage:
        settings = environment(
            otlp, SDXL_FAL_BILLING="true", FAL_KEY="id:secret", FAL_REST_HOST=storage
        )
        with STARTS[kind](settings) as process:
            process.wait_until_ready(START_SECONDS)

            fields = body(width=160, height=96, num_inference_steps=5)
            answers = [
                httpx.post(process.url + path, json=fields, timeout=ANSWER_SECONDS)
                for path in ("/", "/stream")
            ]
            # 160 x 96 x 5 / 1e6 megapixel-steps.
            assert [answer.headers["x-fal-billable-units"] for answer in answers] == [
                "0.076800",
                "0.076800",
            ]
            refused = httpx.post(process.url, json={}, timeout=ANSWER_SECONDS)
            assert refused.headers["x-fal-billable-units"] == "0"

            answer = answers[0].json()
            assert answer["image"]["url"].startswith("data:image/jpeg;base64,")
            fallbacks = "\nsdxl_upload_fallbacks_total "
            fell_back = httpx.get(process.metrics_url, timeout=30).text.split(fallbacks)[1]
            upload_seconds = answer["timings"]["upload_ms"] / 1e3
            if kind == "fal":
                assert UPLOAD_SECONDS <= upload_seconds < UPLOAD_SECONDS + 2
                assert fell_back.startswith("2.0\n")
            else:
                assert upload_seconds < 1
                assert fell_back.startswith("0.0\n")

            with connected(process.url) as reading:
                reading.send(post(content=b"{", length=1000))
                in_flight = "\nsdxl_requests_in_flight 1.0\n"
                while in_flight not in read(process.metrics_url):
                    time.sleep(0.02)
                assert process.terminate(GRACE_SECONDS) < ENDING_SECONDS
                half_sent = Answer.parse(reading.read())
            assert (half_sent.status, half_sent.error_type()) == (503, "draining")
            assert process.process.returncode == EXIT_STATUS[kind], process.output()
        otlp.wait_for_trace(half_sent.headers["x-trace-id"])
        for answered in (*answers, refused):
            otlp.wait_for_trace(answered.headers["x-trace-id"])
