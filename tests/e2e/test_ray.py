"""`python -m serve ray` with two replicas: one trace, each replica's metrics, and the end."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from serve.http.request_body import MAX_BODY_BYTES
from tests.e2e.conftest import body
from tests.e2e.ray_service import RayService, processes_of, ray_service, require_ray
from tests.support.otlp_endpoint import tree
from tests.support.processes import wait_until

require_ray()

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPT = "a violet circle on a turquoise background"
CALLER = "00-{:032x}-{:016x}-01"
REQUESTS = 8


@pytest.fixture(scope="module")
def service() -> Iterator[RayService]:
    with ray_service("--replicas", "2", SDXL_SHAPES="128x128") as running:
        yield running


def test_requests_reach_both_replicas_within_their_callers_traces(service: RayService) -> None:
    def send(number: int) -> httpx.Response:
        header = {"traceparent": CALLER.format(0xABC0 + number, 0xDEF0 + number)}
        return service.post(header, prompt=PROMPT, num_inference_steps=4)

    with ThreadPoolExecutor(REQUESTS) as clients:
        answers = list(clients.map(send, range(REQUESTS)))
    assert {answer.status_code for answer in answers} == {200}

    replicas = {replica.name: replica for replica in service.replicas()}
    assert len(replicas) == 2
    served: dict[str, int] = dict.fromkeys(replicas, 0)
    for number, answer in enumerate(answers):
        trace_id = f"{0xABC0 + number:032x}"
        assert answer.headers["x-trace-id"] == trace_id
        spans = service.otlp.wait_for_trace(trace_id)
        (root,) = (span for span in spans if span.name == "text-to-image")
        assert root.parent_span_id == f"{0xDEF0 + number:016x}"
        assert tree(spans).count("denoise_step") == 4
        (instance,) = {span.resource["service.instance.id"] for span in spans}
        served[instance] += 1
    assert set(served) == set(replicas)
    assert min(served.values()) > 0

    for name, replica in replicas.items():
        series = 'sdxl_request_duration_seconds_count{endpoint="/",outcome="ok"}'
        assert replica.value(series) == served[name]
        exemplars = set(re.findall(r'trace_id="([0-9a-f]{32})"', replica.metrics()))
        assert exemplars & {f"{0xABC0 + number:032x}" for number in range(REQUESTS)}


def test_the_apps_limits_and_errors_hold_behind_rays_proxy(service: RayService) -> None:
    too_large = httpx.post(
        service.url,
        content=b"x" * (MAX_BODY_BYTES + 1),
        headers={"content-type": "application/json"},
    )
    assert (too_large.status_code, too_large.json()["error_type"]) == (413, "body_too_large")
    unknown = service.post(prompt=PROMPT, colour="red")
    assert (unknown.status_code, unknown.json()["error_type"]) == (422, "invalid_request")
    assert httpx.get(service.url + "/ready", timeout=30).json()["state"] == "ready"
    with httpx.stream("POST", service.url + "/stream", json=body(), timeout=60) as stream:
        events = [line for line in stream.iter_lines() if line.startswith("event: ")]
    assert events[0] == "event: queued"
    assert events[-1] == "event: image"


@pytest.mark.parametrize(
    ("headers", "fields", "ours", "rays"),
    [
        ({}, {}, None, None),
        ({"x-request-id": "mine"}, {}, "mine", "mine"),
        ({"x-request-id": "a/b c", "x-fal-request-id": "fals"}, {}, "fals", "a/b c"),
        ({"x-fal-request-id": "fals"}, {}, None, None),
        ({"x-request-id": "mine"}, {"request_id": "of-the-body"}, "of-the-body", "mine"),
    ],
)
def test_the_ids_of_a_request_are_as_documented(
    service: RayService,
    headers: dict[str, str],
    fields: dict[str, str],
    ours: str | None,
    rays: str | None,
) -> None:
    """None: drawn by Ray's proxy, and then both are one."""
    answer = service.post(headers, num_inference_steps=1, **fields)
    assert answer.status_code == 200
    first, second = answer.headers.get_list("x-request-id")
    if ours is None:
        assert first == second
        assert first not in headers.values()
    else:
        assert (first, second) == (ours, rays)

    def logged() -> list[str]:
        files = (file for file in service.logs() if file.suffix == ".err")
        lines = (line for file in files for line in file.read_text(errors="replace").splitlines())
        return [line for line in lines if answer.headers["x-trace-id"] in line]

    wait_until(lambda: bool(logged()), 30)  # the line is written after the answer
    (line,) = logged()
    assert json.loads(line)["request_id"] == first


def test_a_client_that_leaves_stops_the_work(service: RayService) -> None:
    series = 'sdxl_request_duration_seconds_count{endpoint="/stream",outcome="cancelled"}'
    before = sum(replica.value(series) for replica in service.replicas())
    slow = body(num_inference_steps=100)
    with httpx.stream("POST", service.url + "/stream", json=slow, timeout=60) as stream:
        assert next(stream.iter_lines()) == "event: queued"
    deadline = time.monotonic() + 30
    while sum(replica.value(series) for replica in service.replicas()) == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_replicas_log_json_and_nobody_logs_a_prompt(service: RayService) -> None:
    """Also not Ray, into its own files."""
    lines = []
    for file in service.logs():
        text = file.read_text(errors="replace")
        assert "turquoise" not in text, file
        pid = file.stem.rpartition("-")[2]
        if file.suffix == ".err" and pid in {str(r.pid) for r in service.replicas()}:
            lines += text.splitlines()
    events = [json.loads(line) for line in lines if not line.startswith(":")]  # Ray's marks
    answered = [e for e in events if e["logger"] == "serve.http.middleware"]
    assert len(answered) >= REQUESTS
    assert all(re.fullmatch("[0-9a-f]{32}", event["trace_id"]) for event in answered)
    assert "turquoise" not in service.process.output()


def test_sigterm_drains_every_replica(service: RayService) -> None:
    """What runs is answered, what comes is refused, spans arrive, and nothing is left."""
    answers: list[httpx.Response] = []

    def send() -> None:
        answers.append(service.post(num_inference_steps=60))

    running = [threading.Thread(target=send) for _ in range(2)]
    for thread in running:
        thread.start()
        deadline = time.monotonic() + 30
        wanted = running.index(thread) + 1.0
        while sum(r.value("sdxl_requests_in_flight") for r in service.replicas()) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    replicas = service.replicas()
    service.process.process.terminate()
    while not all(replica.value("sdxl_ready") == 0.0 for replica in replicas):
        time.sleep(0.02)
    refused = service.post()
    assert (refused.status_code, refused.json()["error_type"]) == (503, "draining")
    for thread in running:
        thread.join()
    assert {answer.status_code for answer in answers} == {200}
    service.process.process.wait(60)
    assert service.process.process.returncode == 0
    for answer in (*answers, refused):
        service.otlp.wait_for_trace(answer.headers["x-trace-id"])
    assert service.replicas() == []
    assert list(service.targets.iterdir()) == []
    deadline = time.monotonic() + 20
    while left := processes_of(service.temporary):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
