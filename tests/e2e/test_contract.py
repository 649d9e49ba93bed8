"""One contract for the self-hosted server and `fal run --local sdxl`, checked on real processes.

What fal's runtime forces to be different is at the end, a test for each row of the table in
docs/fal.md.
"""

from __future__ import annotations

import base64
import io
import json
import re
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from tests.e2e.conftest import ANSWER_SECONDS, STARTS, Server, body
from tests.e2e.differences import row
from tests.support.otlp_endpoint import ReceivedSpan, tree
from tests.support.processes import wait_until
from tests.support.raw_client import Answer, connected, post

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SLOW = {"num_inference_steps": 100}
"""Some seconds of work: long enough to be met while it runs."""

TREE = """\
text-to-image
  receive
  queue
  inference
    text_encode
    denoise
      denoise_step
      denoise_step
    vae_decode
  image_encode
  upload
  respond"""


def events(text: str) -> list[tuple[str, Any]]:
    """Server-sent events as (name, data)."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


def shape_of(value: Any) -> Any:
    """A JSON value with its leaves replaced by their types."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(item) for item in value]
    return type(value).__name__


def metric(server: Server, sample: str) -> float:
    for line in server.metrics().splitlines():
        if line.startswith(sample + " "):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"{sample} is not in the metrics")


# The response


@pytest.mark.parametrize("image_format", ["jpeg", "png", "webp"])
def test_the_same_request_gives_the_same_image(
    servers: dict[str, Server], image_format: str
) -> None:
    answers = [
        server.generate(format=image_format, width=160, height=96, guidance_scale=4.0)
        for server in servers.values()
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    first, second = (answer.json() for answer in answers)
    assert first["image"] == second["image"]
    header, data = first["image"]["url"].split(",")
    assert header == f"data:image/{image_format};base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert (image.format, image.size) == (image_format.upper(), (160, 96))
    assert shape_of(first) == shape_of(second)
    assert first["seed"] == second["seed"] == 1


def test_answers_have_the_same_headers(servers: dict[str, Server]) -> None:
    # What fal's uvicorn adds is a row of the table below.
    ours, fals = (set(server.generate().headers) - {"server"} for server in servers.values())
    assert ours == fals
    assert "x-fal-billable-units" not in ours


def test_a_drawn_seed_is_returned_and_repeats_the_image(server: Server) -> None:
    first = server.generate(seed=None).json()
    assert server.generate(seed=first["seed"]).json()["image"] == first["image"]


# Refusals


@pytest.mark.parametrize(
    ("fields", "location"),
    [
        ({"prompt": 31337}, ["body", "prompt"]),
        ({"num_inference_steps": "31337"}, ["body", "num_inference_steps"]),
        ({"xylograph": 31337}, ["body", "xylograph"]),
        ({"width": 31337}, ["body", "width"]),
        ({"prompt": "31337" * 1000}, ["body", "prompt"]),
    ],
)
@pytest.mark.parametrize("path", ["/", "/stream"])
def test_a_wrong_field_is_422_naming_it_without_echo(
    server: Server, path: str, fields: dict[str, Any], location: list[str]
) -> None:
    answer = server.generate(path, **fields)
    assert answer.status_code == 422
    assert answer.headers["x-fal-billable-units"] == "0"
    assert [problem["loc"] for problem in answer.json()["detail"]] == [location]
    assert "31337" not in answer.text


def test_what_is_no_json_is_422_without_echo(server: Server) -> None:
    answer = server.client.post("/", content=b'{"prompt": xylograph', headers=JSON)
    assert answer.status_code == 422
    assert "xylograph" not in answer.text


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "path", "status", "error_type"),
    [
        ("GET", "/xylograph", 404, "not_found"),
        ("POST", "/xylograph", 404, "not_found"),
        ("PUT", "/", 405, "method_not_allowed"),
        ("DELETE", "/stream", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("POST", "/", 422, "invalid_request"),
        ("POST", "/debug/profile", 404, "not_found"),
    ],
)
def test_every_error_has_one_shape_and_an_id_that_the_log_has(
    server: Server, method: str, path: str, status: int, error_type: str
) -> None:
    trace_id, _, traceparent = a_context()
    for headers in ({}, {"traceparent": traceparent}):
        answer = server.client.request(method, path, headers=headers)
        body = answer.json()
        assert (answer.status_code, body["error_type"]) == (status, error_type)
        assert set(body) == {"detail", "error_type", "trace_id"}
        assert "xylograph" not in answer.text
        assert answer.headers["x-trace-id"] == body["trace_id"]
        assert answer.headers["x-fal-billable-units"] == "0"
        assert ("allow" in answer.headers) == (status == 405)
        if headers:
            assert body["trace_id"] == trace_id
        wait_until(lambda said=body["trace_id"]: said in server.process.output())  # type: ignore[misc]


def test_what_makes_no_image_is_in_no_metric_and_no_trace(server: Server) -> None:
    def counted() -> float:
        lines = server.metrics().splitlines()
        names = ("sdxl_request_duration_seconds_count", "sdxl_errors_total")
        return sum(float(line.split(" ")[1]) for line in lines if line.startswith(names))

    server.otlp.wait_for_trace(server.generate().json()["trace_id"])
    before = counted()
    lost = server.client.get("/xylograph").json()["trace_id"]
    for path in ("/health", "/ready", "/openapi.json"):
        answer = server.client.get(path)
        assert answer.status_code == 200
        assert "x-trace-id" not in answer.headers  # neither a trace nor the log would have it
    server.otlp.wait_for_trace(server.generate().json()["trace_id"])
    wait_until(lambda: counted() == before + 1)
    assert server.otlp.trace(lost) == []


@pytest.mark.parametrize("size", [64 * 1024 + 1, 4 * 1024 * 1024])
def test_a_large_body_is_413(server: Server, size: int) -> None:
    answer = server.client.post("/", content=b" " * size, headers=JSON)
    assert answer.status_code == 413
    assert answer.json()["error_type"] == "body_too_large"


@pytest.mark.parametrize("path", ["/", "/stream"])
def test_a_large_declared_length_is_413_before_any_of_it(server: Server, path: str) -> None:
    with connected(server.process.url) as asking:
        asking.send(post(path, b"", "Expect: 100-continue", length=10_000_000_000))
        received = asking.read()
    assert received.startswith(b"HTTP/1.1 413 ")  # and no 100 before it
    answer = Answer.parse(received)
    assert answer.error_type() == "body_too_large"
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("path", ["/stream/", "/health/", "/ready/"])
def test_no_redirect_to_the_host_header(server: Server, path: str) -> None:
    for method in ("GET", "POST"):
        answer = server.client.request(method, path, headers={"host": "evil.test"})
        assert answer.status_code == 404
        assert "location" not in answer.headers
        assert answer.json()["error_type"] == "not_found"


@pytest.mark.parametrize("path", ["/health", "/ready", "/openapi.json"])
def test_head_is_answered_like_get(server: Server, path: str) -> None:
    get, head = (server.client.request(method, path) for method in ("GET", "HEAD"))
    assert (head.status_code, head.content) == (200, b"")
    for header in ("content-length", "content-type"):
        assert head.headers[header] == get.headers[header]


def test_a_third_request_is_429_with_retry_after(server: Server) -> None:
    # Of different numbers of steps, so that no two share a run.
    slow = [body(num_inference_steps=steps) for steps in (60, 61, 62)]
    # One client, because making one may take longer than the requests on a busy machine.
    with httpx.Client(timeout=300) as client, ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(client.post, server.process.url, json=each) for each in slow]
        answers = [each.result() for each in asked]
    refused, *served = sorted(answers, key=lambda answer: -answer.status_code)
    assert [answer.status_code for answer in served] == [200, 200]
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error_type"] == "queue_full"


def test_a_passed_deadline_is_504_and_not_retried(server: Server) -> None:
    answer = server.generate(deadline_seconds=0.2, **SLOW)
    assert answer.status_code == 504
    assert answer.headers["x-fal-needs-retry"] == "0"
    assert answer.json()["error_type"] == "deadline_exceeded"
    root = server.otlp.wait_for_trace(answer.json()["trace_id"])[-1]
    assert root.trace_id == answer.headers["x-trace-id"]


def test_a_caller_that_leaves_stops_the_work(server: Server) -> None:
    gone = 'sdxl_errors_total{error_type="client_gone"}'
    before = metric(server, gone)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.process.url, json=body(**SLOW), timeout=0.3)
    wait_until(lambda: metric(server, gone) == before + 1)
    with httpx.stream("POST", server.process.url + "/stream", json=body(**SLOW)) as stream:
        trace_id = stream.headers["x-trace-id"]
        lines = stream.iter_lines()
        while next(lines) != "event: step":
            pass
    spans = server.otlp.wait_for_trace(trace_id, ANSWER_SECONDS)
    assert by_name(spans, "text-to-image").attributes["error.type"] == "client_gone"
    assert tree(spans).count("denoise_step") < 100
    wait_until(lambda: metric(server, gone) == before + 2)
    assert metric(server, "sdxl_requests_in_flight") == 0


def test_no_other_origin_is_allowed(server: Server) -> None:
    origin = {"origin": "https://elsewhere.test"}
    answer = server.client.post("/", json=body(), headers=origin)
    asked = origin | {"access-control-request-method": "POST"}
    preflight = server.client.request("OPTIONS", "/", headers=asked)
    assert (answer.status_code, preflight.status_code) == (200, 405)
    for headers in (answer.headers, preflight.headers):
        assert not [name for name in headers if name.startswith("access-control-")]


# Health


def test_health_and_readiness(servers: dict[str, Server]) -> None:
    healths = [server.client.get("/health") for server in servers.values()]
    assert [(answer.status_code, answer.json()) for answer in healths] == [
        (200, {"status": "ok"})
    ] * 2
    ours, fals = (server.client.get("/ready") for server in servers.values())
    assert (ours.status_code, fals.status_code) == (200, 200)
    assert ours.json()["state"] == "ready"
    threads = ours.json()["cpu_threads"]
    assert (threads["threads"], threads["set_by_user"]) == (1, {"OMP_NUM_THREADS": "1"})
    assert threads["cores"] >= 1
    assert shape_of(ours.json()) == shape_of(fals.json())
    assert {k: v for k, v in ours.json().items() if k != "warmup_ms"} == {
        k: v for k, v in fals.json().items() if k != "warmup_ms"
    }


def test_health_answers_while_a_request_runs(server: Server) -> None:
    with server.client.stream("POST", "/stream", json=body(**SLOW)) as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: queued"
        assert httpx.get(server.process.url + "/health", timeout=30).status_code == 200
        assert httpx.get(server.process.metrics_url, timeout=30).status_code == 200
        for _ in lines:
            pass


def test_an_answer_on_a_kept_connection_leaves_at_once(server: Server) -> None:
    """With Nagle's algorithm on, each waits 40 ms for a delayed acknowledgement."""
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        server.generate(prompt="")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.03


# Streaming


def test_a_stream_reports_each_step_and_ends_with_the_same_image(server: Server) -> None:
    answer = server.generate("/stream")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    received = events(answer.text)
    assert [name for name, _ in received] == ["queued", "step", "step", "image"]
    assert [data["index"] for name, data in received if name == "step"] == [0, 1]
    image = received[-1][1]
    assert image["image"] == server.generate().json()["image"]
    assert image["trace_id"] == answer.headers["x-trace-id"] == received[0][1]["trace_id"]


def test_steps_are_reported_as_they_end(server: Server) -> None:
    arrivals = []
    with server.client.stream("POST", "/stream", json=body(**SLOW)) as stream:
        for line in stream.iter_lines():
            if line == "event: step":
                arrivals.append(time.monotonic())
    assert len(arrivals) == 100
    # In one burst, or held back by a proxy's buffer, they would come within milliseconds.
    assert arrivals[-1] - arrivals[0] > 0.3


def test_a_failure_midway_is_the_streams_last_event(server: Server) -> None:
    # A deadline that passes midway, and is not so short that the request is refused at once.
    refused = server.generate(deadline_seconds=0.2, **SLOW)
    eta_ms = refused.json().get("eta_ms", 3000)
    for share in (0.7, 0.5, 0.35, 0.25):  # the estimate may come from a time when all was slower
        answer = server.generate("/stream", deadline_seconds=share * eta_ms / 1000, **SLOW)
        name, data = events(answer.text)[-1]
        if name == "error":
            break
    assert (answer.status_code, name) == (200, "error")
    assert data["error_type"] == "deadline_exceeded"


# Telemetry


def test_the_trace_is_exported_under_the_responses_id(server: Server) -> None:
    answer = server.generate()
    trace_id = answer.json()["trace_id"]
    spans = server.otlp.wait_for_trace(trace_id)
    assert tree(spans) == TREE
    assert answer.headers["x-trace-id"] == trace_id
    root = by_name(spans, "text-to-image")
    assert root.attributes["http.route"] == "/"
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["num_inference_steps"] == 2


def test_both_servers_emit_the_same_spans(servers: dict[str, Server]) -> None:
    def names_of_spans(server: Server) -> list[tuple[str, list[str]]]:
        spans = server.otlp.wait_for_trace(server.generate().json()["trace_id"])
        return sorted((span.name, sorted(span.attributes)) for span in spans)

    ours, fals = map(names_of_spans, servers.values())
    assert ours == fals


def test_the_start_is_a_trace_of_its_own(server: Server) -> None:
    spans = server.otlp.wait_for(lambda spans: any(s.name == "warmup" for s in spans))
    warmup = by_name(spans, "warmup")
    children = [s.name.split(" ")[0] for s in spans if s.parent_span_id == warmup.span_id]
    assert set(children) == {
        "load_model",
        "prepare",
        "compile",
        "verify",
        "count_flops",
        "collect_garbage",
    }
    assert not warmup.parent_span_id


def test_the_garbage_collector_leaves_out_what_the_start_built(server: Server) -> None:
    spans = server.otlp.wait_for(lambda spans: any(s.name == "warmup" for s in spans))
    assert by_name(spans, "collect_garbage").attributes["objects"] > 300_000


def by_name(spans: list[ReceivedSpan], name: str) -> ReceivedSpan:
    (found,) = (span for span in spans if span.name == name)
    return found


def a_context(flags: str = "01") -> tuple[str, str, str]:
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return trace_id, span_id, f"00-{trace_id}-{span_id}-{flags}"


@pytest.mark.parametrize("path", ["/", "/stream"])
def test_a_callers_context_comes_by_header_or_by_body(server: Server, path: str) -> None:
    for carrier in ("header", "body", "both"):
        trace_id, span_id, traceparent = a_context()
        headers = {"traceparent": traceparent}
        fields: dict[str, Any] = {}
        if carrier != "header":
            headers = {"traceparent": a_context()[2]} if carrier == "both" else {}
            fields = {"trace_context": {"traceparent": traceparent}}
        answer = server.client.post(path, json=body(**fields), headers=headers)
        root = by_name(server.otlp.wait_for_trace(trace_id), "text-to-image")
        assert (carrier, root.parent_span_id) == (carrier, span_id)
        # The body's context decides before the header is sent, so the header has it too.
        assert answer.headers["x-trace-id"] == trace_id


def test_repeated_headers_of_a_callers_trace(server: Server) -> None:
    """`tracestate` is a list over all headers; of `traceparent` there is one."""
    trace_id, _, traceparent = a_context()
    states = [("tracestate", "vendor=1"), ("tracestate", "ot=th:8")]
    server.client.post("/", json=body(), headers=[("traceparent", traceparent), *states])
    spans = server.otlp.wait_for_trace(trace_id)
    assert {span.attributes["sampling.probability"] for span in spans} == {0.5}
    other, _, another = a_context()
    parents = [("traceparent", traceparent), ("traceparent", another)]
    answer = server.client.post("/", json=body(), headers=[*parents, *states])
    assert answer.headers["x-trace-id"] not in (trace_id, other)
    root = by_name(server.otlp.wait_for_trace(answer.headers["x-trace-id"]), "text-to-image")
    assert not root.parent_span_id


def test_a_caller_that_does_not_sample_is_not_exported(server: Server) -> None:
    trace_id, _, traceparent = a_context(flags="00")
    unsampled = server.client.post("/", json=body(), headers={"traceparent": traceparent})
    assert unsampled.json()["trace_id"] == trace_id
    server.otlp.wait_for_trace(server.generate().json()["trace_id"])
    assert server.otlp.trace(trace_id) == []


def families(text: str) -> list[str]:
    return re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)


def test_each_metric_is_exposed_once(servers: dict[str, Server]) -> None:
    for server in servers.values():
        server.generate()
    ours, fals = (
        [family for family in families(server.metrics()) if family.startswith("sdxl_")]
        for server in servers.values()
    )
    assert ours == fals
    assert len(set(ours)) == len(ours)


def test_a_request_is_counted_once(server: Server) -> None:
    before = metric(server, "sdxl_images_total")
    server.generate()
    wait_until(lambda: metric(server, "sdxl_images_total") == before + 1)
    assert metric(server, "sdxl_ready") == 1


# What fal's runtime forces to be different


@row("Metrics")
def test_fals_metrics_have_their_own_port_and_no_exemplars(servers: dict[str, Server]) -> None:
    openmetrics = "application/openmetrics-text; version=1.0.0"
    for server in servers.values():
        server.otlp.wait_for_trace(server.generate().json()["trace_id"])
    assert 'trace_id="' in servers["self-hosted"].metrics(openmetrics)
    on_fal = servers["fal"].metrics(openmetrics)
    assert 'trace_id="' not in on_fal
    assert {"fal_app_info", "http_requests_total", "http_request_duration_seconds"} <= set(
        families(on_fal)
    )
    assert servers["fal"].client.get("/metrics").status_code == 404
    assert not [f for f in families(servers["self-hosted"].metrics()) if f.startswith("http_")]


@row("OpenAI's images API")
def test_openais_api_is_self_hosted_only(servers: dict[str, Server]) -> None:
    found = {kind: server.client.get("/v1/models") for kind, server in servers.items()}
    assert found["self-hosted"].json()["object"] == "list"
    assert (found["fal"].status_code, found["fal"].json()["error"]["code"]) == (404, "not_found")


@row("The playground")
def test_the_playground_is_self_hosted_only(servers: dict[str, Server]) -> None:
    for path, on_fal in (("/", 405), ("/stats", 404), ("/debug/requests", 404)):
        statuses = [server.client.get(path).status_code for server in servers.values()]
        assert statuses == [200, on_fal]
    assert servers["fal"].client.get("/timeline/" + "0" * 32).status_code == 404


@row("API pages")
def test_fal_serves_pages_about_the_api(servers: dict[str, Server]) -> None:
    for page in ("/docs", "/redoc"):
        statuses = [server.client.get(page).status_code for server in servers.values()]
        assert statuses == [404, 200]


@row("The `server` header")
def test_fal_names_its_server(servers: dict[str, Server]) -> None:
    ours, fals = (server.client.get("/health").headers.get("server") for server in servers.values())
    assert (ours, fals) == (None, "uvicorn")


@row("The address listened on")
def test_fal_listens_on_every_interface(servers: dict[str, Server]) -> None:
    def addresses(server: Server) -> set[str]:
        process = psutil.Process(server.process.process.pid)
        listening = process.net_connections("tcp")
        return {c.laddr.ip for c in listening if c.status == psutil.CONN_LISTEN}

    assert addresses(servers["self-hosted"]) == {"127.0.0.1"}
    assert addresses(servers["fal"]) == {"0.0.0.0"}


@row("A wrong setting")
def test_both_name_a_wrong_setting_and_fal_adds_a_traceback() -> None:
    outputs = {}
    for kind, start in STARTS.items():
        with start({"SDXL_DEVICE": "tpu"}) as process:
            process.process.wait(120)
            outputs[kind] = (process.process.returncode, process.output())
    sentence = "SDXL_DEVICE='tpu' is not allowed"
    assert all(sentence in output for _, output in outputs.values())
    assert (outputs["self-hosted"][0], outputs["fal"][0]) == (2, 3)
    assert "Traceback" not in outputs["self-hosted"][1]
    assert "Traceback" in outputs["fal"][1]
