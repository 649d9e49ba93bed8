"""A fault in each stage of a request, in one real server: what its caller, the log, the trace and
the metrics get, and that the next request is served. docs/reliability.md has the outcomes."""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from serve.engine.gpu_thread import STEPS_AHEAD
from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, body, environment, picture_body
from tests.support import forked, tiny_checker
from tests.support.faults import SECRET, STEP, Faults
from tests.support.otlp_endpoint import OtlpEndpoint, ReceivedSpan, otlp_endpoint
from tests.support.processes import ServerProcess
from tests.support.raw_client import connected, post

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SILENCE_SECONDS = 6.0
DEADLINE_SECONDS = 4.0
"""Later than a cancelled request may be silent, and earlier than the watchdog."""

IMAGE_TO_IMAGE = "/image-to-image"

ERROR = 2
"""The status code of a span that failed."""


@dataclass
class Faulty:
    """A ready server, and what switches its faults."""

    process: ServerProcess
    otlp: OtlpEndpoint
    faults: Faults
    _seen: int = field(default=0)

    def post(self, path: str = "/", **fields: Any) -> httpx.Response:
        wanted = picture_body if path.startswith("/image-to-image") else body
        return httpx.post(self.process.url + path, json=wanted(**fields), timeout=ANSWER_SECONDS)

    def errors(self, error_type: str) -> float:
        return self.metric(f'sdxl_errors_total{{error_type="{error_type}"}}')

    def metric(self, series: str) -> float:
        text = httpx.get(self.process.metrics_url, timeout=60).text
        found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
        assert found is not None, series
        return float(found[1])

    def new_lines(self) -> list[dict[str, Any]]:
        """The log since the last call."""
        text = self.process.output()[self._seen :]
        self._seen += len(text)
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def is_ready(self) -> bool:
        return httpx.get(self.process.url + "/ready", timeout=30).status_code == 200

    def serves(self) -> bool:
        return self.post().status_code == 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    faults = Faults(tmp_path_factory.mktemp("faults"), SILENCE_SECONDS)
    checker = tiny_checker.save(tiny_checker.tiny_checker(), tmp_path_factory.mktemp("checker"))
    with (
        otlp_endpoint() as otlp,
        forked.self_hosted(
            environment(
                otlp, SDXL_SHAPES="64x64", SDXL_SAFETY_CHECKER=str(checker), WEB_CONCURRENCY="four"
            ),
            faults=faults,
        ) as process,
    ):
        process.wait_until_ready(START_SECONDS)
        yield Faulty(process, otlp, faults)


@dataclass(frozen=True)
class Case:
    """A fault and the row of the failure table that it is."""

    place: str
    kind: str
    error_type: str = "generation_failed"
    retry: dict[str, str] = field(default_factory=dict)
    stage: str = ""
    """The span that has failed; empty: named as the place."""
    path: str = "/"


NO_RETRY = {"x-fal-needs-retry": "0"}

CASES = (
    Case("image_decode", "RuntimeError", path=IMAGE_TO_IMAGE),
    Case("image_decode", "MemoryError", path=IMAGE_TO_IMAGE),
    Case("text_encode", "KeyError"),
    Case("text_encode", "OutOfMemoryError", "out_of_memory", NO_RETRY),
    Case("vae_encode", "RuntimeError", path=IMAGE_TO_IMAGE),
    Case("vae_encode", "OutOfMemoryError", "out_of_memory", NO_RETRY, path=IMAGE_TO_IMAGE),
    Case("step", "ValueError", stage="denoise"),
    Case("denoise", "OutOfMemoryError", "out_of_memory", NO_RETRY),
    Case("denoise", "nan", "non_finite_output", NO_RETRY, stage="inference"),
    Case("vae_decode", "RuntimeError"),
    Case("vae_decode", "OutOfMemoryError", "out_of_memory", NO_RETRY),
    Case("safety_check", "ValueError"),
    Case("image_encode", "OSError"),
    Case("image_encode", "MemoryError"),
    Case("receive", "RuntimeError"),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.place}-{case.kind}")
def test_a_stage_that_fails(server: Faulty, case: Case) -> None:
    server.new_lines()
    before = server.errors(case.error_type)
    server.faults.on(case.place, case.kind)
    answer = server.post(case.path, num_inference_steps=4)
    server.faults.off(case.place)
    assert (answer.status_code, answer.json()["error_type"]) == (500, case.error_type)
    assert case.retry.items() <= dict(answer.headers).items()
    assert ("x-fal-needs-retry" in answer.headers) == bool(case.retry)

    assert server.serves()
    assert server.errors(case.error_type) == before + 1

    trace_id = answer.json()["trace_id"]
    lines = [line for line in server.new_lines() if line.get("trace_id") == trace_id]
    assert [line["level"] for line in lines] == ["error", "info"], lines
    assert not any("".join(SECRET) in json.dumps(line) for line in lines)

    spans = server.otlp.wait_for_trace(trace_id)
    failed = {span.name: span for span in spans if span.status_code == ERROR}
    assert failed["text-to-image"].attributes["error.type"] == case.error_type
    assert (case.stage or case.place) in failed


def test_a_stream_that_fails_midway(server: Faulty) -> None:
    before = server.errors("generation_failed")
    server.faults.on("step", "ValueError")
    answer = server.post("/stream", num_inference_steps=4)
    server.faults.off("step")
    assert answer.status_code == 200
    last = answer.text.strip().split("\n\n")[-1].splitlines()
    assert last[0] == "event: error"
    assert json.loads(last[1].removeprefix("data: "))["error_type"] == "generation_failed"
    assert server.serves()
    assert server.errors("generation_failed") == before + 1
    spans = server.otlp.wait_for_trace(answer.headers["x-trace-id"])
    assert "denoise" in {span.name for span in spans if span.status_code == ERROR}


def test_an_upload_that_fails_costs_no_image(server: Faulty) -> None:
    server.new_lines()
    before = server.metric("sdxl_upload_fallbacks_total")
    server.faults.on("upload", "ConnectionError")
    answer = server.post()
    server.faults.off("upload")
    assert answer.status_code == 200
    assert answer.json()["image"]["url"].startswith("data:image/jpeg;base64,")
    assert server.metric("sdxl_upload_fallbacks_total") == before + 1
    lines = [
        line
        for line in server.new_lines()
        if line.get("trace_id") == answer.json()["trace_id"] and line["level"] != "info"
    ]
    assert [line["level"] for line in lines] == ["warning"]


@pytest.mark.parametrize("path", ["/", "/stream"])
def test_a_client_that_leaves_costs_two_further_steps_at_most(server: Faulty, path: str) -> None:
    """A step is held until the server has read the end of the connection."""
    trace_id = secrets.token_hex(16)
    content = json.dumps(body(num_inference_steps=50)).encode()
    server.faults.on("step", "hold")
    with connected(server.process.url) as client:
        client.send(post(path, content, f"traceparent: 00-{trace_id}-{'1' * 16}-01"))
        server.faults.wait_until_held("step")
    time.sleep(1)
    server.faults.off("step")
    spans = server.otlp.wait_for_trace(trace_id)
    (root,) = (span for span in spans if span.name == "text-to-image")
    assert root.attributes["error.type"] == "client_gone"
    steps = sum(span.name == "denoise_step" for span in spans)
    print(f"{path}: the client left in step {STEP + 1}, {steps} steps ran")
    assert STEP + 1 <= steps <= STEP + 1 + STEPS_AHEAD
    assert server.serves()


@pytest.mark.parametrize("seconds", [-3600, 3600])
def test_a_clock_that_steps_in_mid_request(server: Faulty, seconds: int) -> None:
    """The trace stays whole, and no duration is measured by that clock."""
    server.faults.on("vae_decode", "hold")
    answers: list[httpx.Response] = []
    client = threading.Thread(target=lambda: answers.append(server.post(num_inference_steps=3)))
    client.start()
    server.faults.wait_until_held("vae_decode")
    server.faults.on("clock", str(seconds))
    server.faults.off("vae_decode")
    client.join()
    after = server.post()
    server.faults.off("clock")
    (answer,) = answers
    assert answer.status_code == after.status_code == 200
    for each in (answer, after):
        timings = each.json()["timings"]
        parts = [value for name, value in timings.items() if name.endswith("_ms")]
        assert all(0 <= value < 60_000 for value in parts if isinstance(value, float)), timings
        check_tree(server.otlp.wait_for_trace(each.json()["trace_id"]))
    # The next request's trace is placed by the stepped clock.
    roots = [server.otlp.trace(each.json()["trace_id"]) for each in (answer, after)]
    starts = [next(s for s in spans if s.name == "text-to-image").start_ns for spans in roots]
    assert (starts[1] - starts[0]) / 1e9 == pytest.approx(seconds, abs=60)


def check_tree(spans: list[ReceivedSpan]) -> None:
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        assert 0 <= span.end_ns - span.start_ns < 60e9
        parent = by_id.get(span.parent_span_id)
        if parent is not None:
            assert parent.start_ns <= span.start_ns <= span.end_ns <= parent.end_ns, span.name


# These come last: they make the process unhealthy.


@pytest.mark.parametrize(
    ("place", "stage", "step"),
    [
        pytest.param("text_encode", "text_encode", None, marks=pytest.mark.slow),
        ("step", "denoise", STEP),
        pytest.param("vae_decode", "vae_decode", None, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_hangs(server: Faulty, place: str, stage: str, step: int | None) -> None:
    """The hung request is answered at its deadline; the process becomes unhealthy, says where, and
    serves again if the run ends after all."""
    server.new_lines()
    before = {name: server.errors(name) for name in ("deadline_exceeded", "device_lost")}
    server.faults.on(place, "hold")
    begin = time.monotonic()
    hung = server.post(num_inference_steps=4, deadline_seconds=DEADLINE_SECONDS)
    seconds = time.monotonic() - begin
    assert (hung.status_code, hung.json()["error_type"]) == (504, "deadline_exceeded")
    assert hung.headers["x-fal-needs-retry"] == "0"
    assert DEADLINE_SECONDS <= seconds < DEADLINE_SECONDS + 3
    print(f"hung in {stage}: answered after {seconds:.2f} s")

    # The next waits behind it, until the watchdog finds the hang.
    waiting = server.post()
    assert (waiting.status_code, waiting.json()["error_type"]) == (503, "device_lost")
    assert waiting.headers["x-fal-stop-runner"] == "1"
    found = time.monotonic() - begin
    assert SILENCE_SECONDS - 1 <= found < SILENCE_SECONDS + 5
    print(f"hung in {stage}: found after {found:.2f} s")

    health = httpx.get(server.process.url + "/health", timeout=30)
    assert (health.status_code, health.json()["status"]) == (503, "unhealthy")
    assert health.json()["error_type"] == "device_lost"
    hang = health.json()["hang"]
    assert (hang["stage"], hang["step"]) == (stage, step)
    assert hang["silent_seconds"] >= SILENCE_SECONDS
    assert server.metric("sdxl_ready") == 0
    assert not server.is_ready()
    refused = server.post()
    assert (refused.status_code, refused.json()["error_type"]) == (503, "device_lost")
    lines = [line for line in server.new_lines() if line["level"] == "error"]
    assert len(lines) == 1
    assert stage in lines[0]["event"]
    assert lines[0]["trace_id"] == hung.json()["trace_id"]

    server.faults.off(place)
    deadline = time.monotonic() + 20
    while not (server.is_ready() and server.metric("sdxl_ready") == 1):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.serves()
    assert server.errors("deadline_exceeded") == before["deadline_exceeded"] + 1
    assert server.errors("device_lost") == before["device_lost"] + 2
    spans = server.otlp.wait_for_trace(hung.json()["trace_id"])
    (root,) = (span for span in spans if span.name == "text-to-image")
    assert (root.status_code, root.attributes["error.type"]) == (ERROR, "deadline_exceeded")


def test_a_hung_stream_ends_at_its_deadline(server: Faulty) -> None:
    server.faults.on("step", "hold")
    begin = time.monotonic()
    answer = server.post("/stream", num_inference_steps=4, deadline_seconds=DEADLINE_SECONDS)
    seconds = time.monotonic() - begin
    server.faults.off("step")
    last = answer.text.strip().split("\n\n")[-1].splitlines()
    assert json.loads(last[1].removeprefix("data: "))["error_type"] == "deadline_exceeded"
    assert DEADLINE_SECONDS <= seconds < DEADLINE_SECONDS + 3
    deadline = time.monotonic() + 20
    while not server.serves():
        assert time.monotonic() < deadline


def test_a_device_that_is_lost(server: Faulty) -> None:
    """A sticky error: the process is unhealthy for good, and ends with status 1."""
    server.new_lines()
    before = server.errors("device_lost")
    server.faults.on("denoise", "RuntimeError")
    server.faults.on("device", "true")
    answer = server.post()
    server.faults.off("denoise")
    server.faults.off("device")
    for each in (answer, server.post()):
        assert (each.status_code, each.json()["error_type"]) == (503, "device_lost")
        assert each.headers["x-fal-stop-runner"] == "1"
    assert server.errors("device_lost") == before + 2
    assert server.metric("sdxl_ready") == 0
    health = httpx.get(server.process.url + "/health", timeout=30)
    assert (health.status_code, health.json()["error_type"]) == (503, "device_lost")
    lines = [line for line in server.new_lines() if line["level"] == "error"]
    assert len(lines) == 1
    spans = server.otlp.wait_for_trace(answer.json()["trace_id"])
    assert "denoise" in {span.name for span in spans if span.status_code == ERROR}
    server.process.terminate()
    assert server.process.process.returncode == 1
