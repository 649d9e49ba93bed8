"""The gateway's client with image apps on loopback that fail, stall and send wrong responses."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry, generate_latest

from metrics.sampling import TraceSampling
from serve.http.endpoints import install
from serve.http.gateway import client as gateway_client
from serve.http.gateway.client import GatewayClient, ImageAppAddress
from serve.http.gateway.trace import sampling_threshold
from serve.schema import MAX_PROMPT_CHARACTERS, PromptRequest
from serve.settings import load_settings
from tests.support.otlp_endpoint import OtlpEndpoint, otlp_endpoint, tree

PROMPT = "a xylograph that no error may mention"

# The image app's own error types and headers, by status.
REFUSALS = {
    422: ("invalid_request", {}),
    429: ("queue_full", {"Retry-After": "7"}),
    500: ("out_of_memory", {"X-Fal-Needs-Retry": "0"}),
    504: ("deadline_exceeded", {"X-Fal-Needs-Retry": "0"}),
}


class ImageApp:
    """A loopback server that answers as a test chooses, and keeps the requests."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.content = b'{"image": "drawn"}'
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.behave: Callable[[asyncio.StreamWriter], Coroutine[Any, Any, None]] | None = None
        self.reached = threading.Event()
        self.left = threading.Event()
        self.url = ""

    def refuse(self, status: int, error_type: str | None, **headers: str) -> None:
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        error = {"detail": "so it is", "trace_id": "0" * 32}
        self.content = json.dumps(
            error if error_type is None else error | {"error_type": error_type}
        ).encode()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except asyncio.IncompleteReadError:
            return
        named = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        original = dict(line.split(": ", 1) for line in head[1:] if line)
        body = json.loads(await reader.readexactly(int(named["content-length"])))
        self.requests.append(({k.lower(): v for k, v in original.items()}, body))
        self.reached.set()
        if self.behave is not None:
            await self.behave(writer)
            if not await reader.read():
                self.left.set()
        else:
            lines = [f"HTTP/1.1 {self.status} X"]
            sent = {"Content-Type": "application/json"} | self.headers
            sent |= {"Content-Length": str(len(self.content)), "Connection": "close"}
            lines += [f"{name}: {value}" for name, value in sent.items()]
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + self.content)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def served(app: ImageApp) -> AsyncIterator[None]:
    server = await asyncio.start_server(app.handle, "127.0.0.1", 0)
    app.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield
    finally:
        server.close()


@pytest.fixture
def image_app() -> ImageApp:
    return ImageApp()


@pytest.fixture
def otlp(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpEndpoint]:
    with otlp_endpoint() as endpoint:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.url)
        yield endpoint


@asynccontextmanager
async def gateway(url: str) -> AsyncIterator[tuple[GatewayClient, httpx.AsyncClient]]:
    """A gateway's client in the app that fal would build around it, and an HTTP client of it."""
    service = GatewayClient(load_settings(), ImageAppAddress(url), CollectorRegistry())
    app = FastAPI()
    install(app, lambda: service)

    @app.post("/")
    async def generate(request: PromptRequest) -> Any:
        return await service.generate(request)

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield service, client
    await service.close(5)


def ask(image_app: ImageApp, body: dict[str, Any] | None = None, **headers: str) -> httpx.Response:
    """Start a gateway before `image_app`, send it one request, and end it."""

    async def once() -> httpx.Response:
        async with served(image_app), gateway(image_app.url) as (_, client):
            return await client.post("/", json={"prompt": PROMPT} | (body or {}), headers=headers)

    return asyncio.run(once())


# The request to the image app


def test_only_the_fields_that_the_caller_set_are_sent(image_app: ImageApp) -> None:
    answer = ask(image_app, {"prompt": "  a\tred\x00 circle ", "seed": 3, "negative_prompt": "b "})
    assert (answer.status_code, answer.content) == (200, image_app.content)
    [(headers, body)] = image_app.requests
    assert 59 < body.pop("deadline_seconds") <= 60
    assert body == {"prompt": "a red circle", "seed": 3, "negative_prompt": "b"}
    assert "authorization" not in headers


def test_loras_are_passed_on_as_they_were_sent(image_app: ImageApp) -> None:
    wanted = [{"path": "ink", "scale": 0.5}, {"path": "chalk"}]
    assert ask(image_app, {"loras": wanted}).status_code == 200
    assert image_app.requests[0][1]["loras"] == wanted


def test_the_image_apps_deadline_is_the_callers_remaining_time(image_app: ImageApp) -> None:
    ask(image_app, {"deadline_seconds": 2})
    assert 1.5 < image_app.requests[0][1]["deadline_seconds"] <= 2


def test_a_long_prompt_is_cut_and_a_longer_one_refused(image_app: ImageApp) -> None:
    assert ask(image_app, {"prompt": "word " * 1000}).status_code == 200
    sent = image_app.requests[0][1]["prompt"]
    assert len(sent) <= MAX_PROMPT_CHARACTERS
    assert sent.endswith("word")
    assert ask(image_app, {"prompt": "x" * 10_001}).status_code == 422
    assert len(image_app.requests) == 1


@pytest.mark.parametrize("prompt", ["", " ", "\x00\x01", "\u200b\ufeff", " \x07\n"])
def test_a_prompt_that_tidying_empties_is_refused(image_app: ImageApp, prompt: str) -> None:
    answer = ask(image_app, {"prompt": prompt})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "prompt"]
    assert image_app.requests == []


def test_a_cookie_of_one_answer_is_not_sent_with_the_next_request(image_app: ImageApp) -> None:
    image_app.headers = {"Set-Cookie": "replica=1; Path=/"}

    async def twice() -> list[httpx.Response]:
        async with served(image_app), gateway(image_app.url) as (_, client):
            return [await client.post("/", json={"prompt": PROMPT}) for _ in range(2)]

    answers = asyncio.run(twice())
    assert [(each.status_code, "set-cookie" in each.headers) for each in answers] == [
        (200, False),
        (200, False),
    ]
    assert ["cookie" in headers for headers, _ in image_app.requests] == [False, False]


# The trace


def test_the_propagated_trace_context_is_that_of_the_exported_span(
    image_app: ImageApp, otlp: OtlpEndpoint
) -> None:
    answer = ask(image_app)
    [(headers, body)] = image_app.requests
    propagated = body["trace_context"]["traceparent"]
    assert headers["traceparent"] == propagated
    spans = {s.name: s for s in otlp.trace(answer.headers["x-trace-id"])}
    call = spans["call"]
    assert propagated == f"00-{call.trace_id}-{call.span_id}-01"
    assert tree(list(spans.values())) == "prompt-gateway\n  receive\n  tidy\n  call\n  respond"
    assert call.attributes["server.address"] == "127.0.0.1"
    assert "xylograph" not in json.dumps([vars(s) for s in otlp.spans], default=str)


def test_an_unsampled_decision_is_propagated(
    image_app: ImageApp, otlp: OtlpEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SAMPLE_RATE", "0")
    answer = ask(image_app)
    propagated = image_app.requests[0][1]["trace_context"]["traceparent"]
    assert propagated.split("-")[1] == answer.headers["x-trace-id"]
    assert propagated.endswith("-00")
    assert otlp.spans == []


def test_the_sampling_probability_is_propagated(
    image_app: ImageApp, otlp: OtlpEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the image app's spans would have another weight than the gateway's."""
    monkeypatch.setenv("OTEL_SAMPLE_RATE", "0.75")
    propagated: dict[str, Any] = {"traceparent": "-00"}
    for _ in range(60):  # one chance in 4^60 that none of them is sampled
        if propagated["traceparent"].endswith("-01"):
            break
        ask(image_app)
        propagated = image_app.requests[-1][1]["trace_context"]
    assert re.fullmatch(r"ot=th:4;rv:[0-9a-f]{14}", propagated["tracestate"])
    caller = TraceSampling(1.0).decide_at_start(0, 0, _span_context(propagated))
    assert caller.probability == 0.75
    probabilities = {span.attributes["sampling.probability"] for span in otlp.spans}
    assert probabilities == {0.75}


def _span_context(carrier: dict[str, str]) -> SpanContext:
    context = TraceContextTextMapPropagator().extract(carrier, context=Context())
    return get_current_span(context).get_span_context()


@pytest.mark.parser
@given(st.floats(0, 1, exclude_min=True))
@example(2**-56)
@example(2**-57)
def test_a_probability_survives_its_encoding_in_tracestate(probability: float) -> None:
    state = {"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01"}
    state["tracestate"] = "ot=" + sampling_threshold(probability)
    decoded = TraceSampling(1.0).decide_at_start(0, 0, _span_context(state)).probability
    assert decoded == pytest.approx(probability, abs=2**-56, rel=0)


def test_a_caller_that_is_not_trusted_becomes_a_link_and_no_parent(
    image_app: ImageApp, otlp: OtlpEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDXL_TRACE_TRUST_PARENT", "false")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    answer = ask(image_app, traceparent=parent)
    trace_id = answer.headers["x-trace-id"]
    assert trace_id != parent.split("-")[1]
    assert image_app.requests[0][1]["trace_context"]["traceparent"].split("-")[1] == trace_id
    spans = {span.name: span for span in otlp.trace(trace_id)}
    assert spans["prompt-gateway"].parent_span_id == ""


def test_a_request_that_failed_is_kept_past_the_ratio(
    image_app: ImageApp, otlp: OtlpEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SAMPLE_RATE", "0")
    image_app.refuse(500, "out_of_memory")
    spans = otlp.trace(ask(image_app).headers["x-trace-id"])
    assert tree(spans) == "prompt-gateway\n  receive\n  tidy\n  call\n  respond"
    assert {span.attributes["sampling.probability"] for span in spans} == {1.0}


def test_a_gateway_that_exports_nothing_is_no_part_of_the_trace(image_app: ImageApp) -> None:
    ask(image_app)
    assert "trace_context" not in image_app.requests[0][1]
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    ask(image_app, traceparent=parent, tracestate="vendor=x")
    assert image_app.requests[1][1]["trace_context"] == {
        "traceparent": parent,
        "tracestate": "vendor=x",
    }


# The image app's responses


@pytest.mark.parametrize("status", REFUSALS)
def test_the_image_apps_refusals_are_passed_on(
    image_app: ImageApp, otlp: OtlpEndpoint, status: int
) -> None:
    error_type, headers = REFUSALS[status]
    image_app.refuse(status, error_type, **headers)
    answer = ask(image_app)
    assert (answer.status_code, answer.content) == (status, image_app.content)
    expected = {name.lower(): value for name, value in headers.items()}
    assert expected.items() <= answer.headers.items()
    assert answer.headers["x-fal-billable-units"] == "0"
    spans = {s.name: s for s in otlp.trace(answer.headers["x-trace-id"])}
    assert spans["call"].attributes["error.type"] == error_type
    assert spans["call"].attributes["http.response.status_code"] == status
    assert spans["call"].status_code == 2  # to a client, a refusal is an error
    assert spans["prompt-gateway"].status_code == (2 if status >= 500 else 0)


@pytest.mark.parametrize(
    ("headers", "retry"),
    [({}, "1"), ({"x_fal_stop_runner": "1"}, "1"), ({"X_Fal_Needs_Retry": "0"}, "0")],
)
def test_the_image_apps_503_never_ends_the_gateways_runner(
    image_app: ImageApp, headers: dict[str, str], retry: str
) -> None:
    image_app.refuse(503, "device_lost", Retry_After="5", **headers)
    answer = ask(image_app)
    assert (answer.status_code, answer.content) == (502, image_app.content)
    assert answer.headers["x-fal-needs-retry"] == retry
    assert answer.headers["retry-after"] == "5"
    assert "x-fal-stop-runner" not in answer.headers


@pytest.mark.parametrize(
    ("status", "error_type"), [(404, "not_found"), (405, "method_not_allowed")]
)
def test_an_address_with_a_wrong_path_is_no_fault_of_the_caller(
    image_app: ImageApp, status: int, error_type: str
) -> None:
    """Also if it is the image app itself that has nothing there."""
    image_app.refuse(status, error_type)
    answer = ask(image_app)
    assert (answer.status_code, answer.json()["error_type"]) == (502, "image_app_failed")


@pytest.mark.parametrize(
    ("status", "error_type", "expected"),
    [
        (401, "unauthorized", (502, "image_app_failed")),
        (429, "key_limit_reached", (429, "image_app_busy")),
    ],
)
def test_what_the_image_app_says_of_the_gateways_key_is_not_of_the_callers(
    image_app: ImageApp, status: int, error_type: str, expected: tuple[int, str]
) -> None:
    image_app.refuse(status, error_type, Retry_After="1")
    answer = ask(image_app)
    assert (answer.status_code, answer.json()["error_type"]) == expected
    assert (answer.headers.get("retry-after") == "1") == (status == 429)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, (502, "image_app_failed", "refuses the gateway's key")),
        (403, (502, "image_app_failed", "refuses the gateway's key")),
        (404, (502, "image_app_failed", "There is no image app at its address")),
        (429, (429, "image_app_busy", "takes no more requests")),
        (500, (502, "image_app_failed", "answered 500")),
        (503, (502, "image_app_failed", "answered 503")),
        (504, (504, "image_app_timed_out", "did not answer in time")),
        (302, (502, "image_app_failed", "answered 302")),
        (204, (502, "image_app_failed", "answered 204")),
    ],
)
def test_errors_of_a_proxy_are_errors_of_the_gateway(
    image_app: ImageApp, status: int, expected: tuple[int, str, str]
) -> None:
    image_app.refuse(status, None, Retry_After="9", Location="http://elsewhere.test/")
    answer = ask(image_app)
    expected_status, error_type, said = expected
    assert answer.status_code == expected_status
    assert answer.json()["error_type"] == error_type
    assert said in answer.json()["detail"]
    assert (answer.headers.get("retry-after") == "9") == (status == 429)


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"[]", b'{"error_type": 3}', b'{"error_type": "Not One\\n"}']
)
def test_an_error_of_another_form_is_not_the_image_apps(
    image_app: ImageApp, content: bytes
) -> None:
    image_app.refuse(500, None)
    image_app.content = content
    assert ask(image_app).json()["error_type"] == "image_app_failed"


@pytest.mark.parametrize("accept", ["image/*", "image/png", "image/avif"])
def test_an_accept_header_changes_no_answer(image_app: ImageApp, accept: str) -> None:
    answer = ask(image_app, accept=accept)
    assert (answer.status_code, answer.content) == (200, image_app.content)
    assert image_app.requests[0][0]["accept"] == "application/json"


@pytest.mark.parametrize(
    ("name", "value"), [("content-type", "application/json; a=\u4e2d"), ("retry-after", "\xe9")]
)
@pytest.mark.parametrize("status", [200, 429])
def test_a_header_that_is_not_ascii_is_passed_on_as_it_came(
    image_app: ImageApp, name: str, value: str, status: int
) -> None:
    image_app.status, image_app.headers = status, {name.title(): value, "X-Trace-Id": value}
    image_app.content = b'{"error_type": "queue_full"}'
    answer = ask(image_app)
    assert (answer.status_code, answer.content) == (status, image_app.content)
    assert (name.encode(), value.encode()) in answer.headers.raw
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-trace-id"])


def test_an_answer_that_is_nested_deeply_is_explained(image_app: ImageApp) -> None:
    image_app.status, image_app.content = 500, b"[" * 60_000
    answer = ask(image_app)
    assert (answer.status_code, answer.json()["error_type"]) == (502, "image_app_failed")


def test_a_web_page_is_not_passed_on_as_an_image(image_app: ImageApp) -> None:
    image_app.headers = {"Content-Type": "text/html"}
    image_app.content = b"<html>Sign in</html>"
    answer = ask(image_app)
    assert (answer.status_code, answer.json()["error_type"]) == (502, "image_app_failed")


def test_an_image_app_that_refuses_connections_is_unreachable(image_app: ImageApp) -> None:
    async def once() -> httpx.Response:
        async with gateway("http://someone:hunter2hunter2@127.0.0.1:9") as (_, client):
            return await client.post("/", json={"prompt": PROMPT})

    answer = asyncio.run(once())
    assert (answer.status_code, answer.json()["error_type"]) == (502, "image_app_unreachable")
    assert answer.headers["x-fal-needs-retry"] == "1"
    assert "hunter2" not in answer.text


def test_a_response_that_breaks_off(image_app: ImageApp) -> None:
    async def half(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
        await writer.drain()
        writer.write_eof()

    image_app.behave = half
    answer = ask(image_app)
    assert (answer.status_code, answer.json()["error_type"]) == (502, "image_app_failed")
    assert "broke off" in answer.json()["detail"]


def test_an_endless_response_is_cut(image_app: ImageApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_client, "MAX_ANSWER_BYTES", 10)
    answer = ask(image_app)
    assert (answer.status_code, answer.json()["error_type"]) == (502, "image_app_failed")
    assert "larger than 10 bytes" in answer.json()["detail"]


def test_silence_is_bounded_by_the_deadline(
    image_app: ImageApp, otlp: OtlpEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def say_nothing(_: asyncio.StreamWriter) -> None:
        pass

    monkeypatch.setattr(gateway_client, "ANSWER_SECONDS", 0.1)
    image_app.behave = say_nothing
    start = time.monotonic()
    answer = ask(image_app, {"deadline_seconds": 0.2})
    assert time.monotonic() - start < 3
    assert (answer.status_code, answer.json()["error_type"]) == (504, "deadline_exceeded")
    assert answer.headers["x-fal-needs-retry"] == "0"
    spans = {s.name: s for s in otlp.trace(answer.headers["x-trace-id"])}
    assert spans["call"].attributes["error.type"] == "deadline_exceeded"


def test_a_caller_that_leaves_cancels_the_call_to_the_image_app(
    image_app: ImageApp, otlp: OtlpEndpoint
) -> None:
    async def say_nothing(_: asyncio.StreamWriter) -> None:
        pass

    image_app.behave = say_nothing

    async def once() -> None:
        async with served(image_app), gateway(image_app.url) as (service, _):
            app = FastAPI()
            install(app, lambda: service)

            @app.post("/")
            async def generate(request: PromptRequest) -> Any:
                return await service.generate(request)

            body = json.dumps({"prompt": PROMPT}).encode()
            messages: list[dict[str, Any]] = [{"type": "http.request", "body": body}]

            async def receive() -> Any:
                if messages:
                    return messages.pop()
                while not image_app.reached.is_set():
                    await asyncio.sleep(0.01)
                return {"type": "http.disconnect"}

            async def send(_: Any) -> None:
                pass

            headers = [(b"content-type", b"application/json")]
            scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
            scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http"}
            scope |= {"raw_path": b"/", "server": ("test", 80), "client": ("test", 1)}
            await asyncio.wait_for(app(scope, receive, send), 5)
            while not image_app.left.is_set():  # the image app sees the connection close
                await asyncio.sleep(0.01)
            assert service.recorder._client_spans == {}
        shown = generate_latest(service.metrics.registry).decode()
        assert 'sdxl_errors_total{error_type="client_gone"} 1.0' in shown

    asyncio.run(asyncio.wait_for(once(), 20))
    assert {s.name for s in otlp.spans} >= {"prompt-gateway", "call"}


def test_metrics_count_requests_by_outcome(image_app: ImageApp) -> None:
    image_app.refuse(429, "queue_full")

    async def once() -> str:
        async with served(image_app), gateway(image_app.url) as (service, client):
            await client.post("/", json={"prompt": PROMPT})
            image_app.refuse(404, None)
            await client.post("/", json={"prompt": PROMPT})
        return generate_latest(service.metrics.registry).decode()

    shown = asyncio.run(once())
    duration = "sdxl_request_duration_seconds_count"
    assert f'{duration}{{endpoint="/",outcome="rejected"}} 1.0' in shown
    assert f'{duration}{{endpoint="/",outcome="error"}} 1.0' in shown
    assert 'sdxl_errors_total{error_type="queue_full"} 1.0' in shown
    assert 'sdxl_errors_total{error_type="image_app_failed"} 1.0' in shown
    assert "sdxl_requests_in_flight 0.0" in shown


def test_the_key_is_only_in_the_call_to_the_image_app(
    image_app: ImageApp, otlp: OtlpEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    key = "Key id:" + base64.b64encode(b"a secret of the account").decode()

    async def once() -> list[httpx.Response]:
        async with served(image_app):
            address = ImageAppAddress(image_app.url, {"Authorization": key})
            service = GatewayClient(load_settings(), address, CollectorRegistry())
            app = FastAPI()
            install(app, lambda: service)

            @app.post("/")
            async def generate(request: PromptRequest) -> Any:
                return await service.generate(request)

            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            answers = []
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                for status in (200, 401, 503):
                    image_app.refuse(status, None)
                    answers.append(await client.post("/", json={"prompt": PROMPT}))
            await service.close(5)
            return answers

    answers = asyncio.run(once())
    assert [headers["authorization"] for headers, _ in image_app.requests] == [key] * 3
    shown = "".join(answer.text + str(answer.headers) for answer in answers) + caplog.text
    shown += json.dumps([vars(span) for span in otlp.spans], default=str)
    assert key.split(":")[1] not in shown
    assert "xylograph" not in shown
