"""The gateway and the image app as two processes under fal's local runtime: one tree of spans."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import httpx
import pytest

from tests.e2e.conftest import ANSWER_SECONDS, START_SECONDS, Server, body, environment
from tests.support.otlp_endpoint import OtlpEndpoint, ReceivedSpan, otlp_endpoint, tree
from tests.support.processes import ServerProcess, fal_local

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CLIENT, SERVER = 3, 2  # SpanKind as OTLP counts it

UNTIDY = "  a red\tcircle\x00 on a\u200b white\n\nbackground "
TIDY = "a red circle on a white background"

TREE = """\
prompt-gateway
  receive
  tidy
  call
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
      respond
  respond"""


@dataclass
class Pair:
    gateway: ServerProcess
    image_app: Server
    otlp: OtlpEndpoint


@pytest.fixture(scope="module")
def pair(servers: dict[str, Server]) -> Iterator[Pair]:
    """A gateway before the image app that all tests of this folder share."""
    image_app = servers["fal"]
    with ExitStack() as stack:
        gateway = stack.enter_context(
            fal_local(
                environment(
                    image_app.otlp,
                    SDXL_GATEWAY_TARGET=image_app.process.url,
                    SDXL_TRACE_PROMPTS="true",
                ),
                app="gateway",
            )
        )
        gateway.wait_until_ready(START_SECONDS)
        yield Pair(gateway, image_app, image_app.otlp)


def whole_tree(otlp: OtlpEndpoint, trace_id: str) -> dict[str, ReceivedSpan]:
    """The spans of a trace by name, once both apps have exported theirs."""
    roots = {"prompt-gateway", "call", "text-to-image"}
    otlp.wait_for(lambda spans: roots <= {s.name for s in spans if s.trace_id == trace_id})
    spans = otlp.trace(trace_id)
    assert tree(spans) == TREE
    return {span.name: span for span in spans}


def test_both_apps_spans_are_one_tree(pair: Pair) -> None:
    answer = httpx.post(pair.gateway.url, json=body(prompt=UNTIDY), timeout=ANSWER_SECONDS)
    assert answer.status_code == 200, answer.text
    trace_id = answer.headers["x-trace-id"]
    assert answer.json()["trace_id"] == trace_id

    spans = whole_tree(pair.otlp, trace_id)
    root, call, image = spans["prompt-gateway"], spans["call"], spans["text-to-image"]
    assert (root.parent_span_id, call.parent_span_id) == ("", root.span_id)
    assert image.parent_span_id == call.span_id
    assert (root.kind, call.kind, image.kind) == (SERVER, CLIENT, SERVER)
    assert root.resource["service.name"] == call.resource["service.name"] == "stepspan-gateway"
    assert image.resource["service.name"] == "stepspan"
    assert call.attributes["url.full"].rstrip("/") == pair.image_app.process.url
    assert call.attributes["http.response.status_code"] == 200
    # Both processes share the machine's clock. The image app's span ends when its last byte is
    # sent, and the gateway may have read that byte before.
    assert root.start_ns <= call.start_ns <= image.start_ns < call.end_ns <= root.end_ns
    assert spans["upload"].end_ns < call.end_ns

    # The image app draws the same picture for the tidy prompt.
    direct = pair.image_app.generate(prompt=TIDY)
    assert answer.json()["image"] == direct.json()["image"]


@pytest.mark.parametrize("where", ["header", "body"])
def test_a_callers_trace_goes_through_both(pair: Pair, where: str) -> None:
    trace_id = {"header": "0af7651916cd43dd8448eb211c80319c", "body": "1" * 32}[where]
    context = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01", "tracestate": "vendor=x"}
    answer = httpx.post(
        pair.gateway.url,
        json=body(trace_context=context) if where == "body" else body(),
        headers=context if where == "header" else {},
        timeout=ANSWER_SECONDS,
    )
    assert answer.headers["x-trace-id"] == trace_id
    spans = whole_tree(pair.otlp, trace_id)
    assert spans["prompt-gateway"].parent_span_id == "b7ad6b7169203331"
    assert spans["text-to-image"].trace_state == "vendor=x"


def test_a_caller_that_is_not_sampled_is_exported_by_neither(pair: Pair) -> None:
    trace_id = "2" * 32
    unsampled = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-00"}
    answer = httpx.post(pair.gateway.url, json=body(), headers=unsampled, timeout=ANSWER_SECONDS)
    assert answer.json()["trace_id"] == trace_id
    # A later request has been exported, so this one would have been, too.
    later = httpx.post(pair.gateway.url, json=body(), timeout=ANSWER_SECONDS)
    whole_tree(pair.otlp, later.json()["trace_id"])
    assert pair.otlp.trace(trace_id) == []


def test_the_image_apps_refusal_is_passed_on(pair: Pair) -> None:
    answer = httpx.post(pair.gateway.url, json=body(width=72, height=72), timeout=ANSWER_SECONDS)
    direct = pair.image_app.generate(width=72, height=72)
    assert answer.status_code == direct.status_code == 422
    assert answer.json()["detail"] == direct.json()["detail"]
    trace_id = answer.json()["trace_id"]
    pair.otlp.wait_for(
        lambda spans: {"call", "text-to-image"} <= {s.name for s in spans if s.trace_id == trace_id}
    )
    spans = {span.name: span for span in pair.otlp.trace(trace_id)}
    assert spans["text-to-image"].parent_span_id == spans["call"].span_id
    assert spans["call"].attributes["error.type"] == "invalid_request"
    assert spans["prompt-gateway"].attributes["http.response.status_code"] == 422


def test_its_own_metrics_are_on_fals_port(pair: Pair) -> None:
    httpx.post(pair.gateway.url, json=body(prompt=" "), timeout=ANSWER_SECONDS)
    shown = httpx.get(pair.gateway.metrics_url, timeout=60).text
    assert 'sdxl_request_duration_seconds_count{endpoint="/",outcome="invalid"}' in shown
    assert 'sdxl_spans_total{result="exported"}' in shown


def test_it_exports_the_remaining_spans_at_sigterm() -> None:
    with otlp_endpoint() as otlp:
        nowhere = environment(otlp, SDXL_GATEWAY_TARGET="http://127.0.0.1:9")
        with fal_local(nowhere, app="gateway") as gateway:
            gateway.wait_until_ready(START_SECONDS)
            answer = httpx.post(gateway.url, json=body(), timeout=ANSWER_SECONDS)
            assert (answer.status_code, answer.json()["error_type"]) == (
                502,
                "image_app_unreachable",
            )
            assert gateway.terminate(30) < 15
        spans = otlp.trace(answer.json()["trace_id"])
        assert {span.name for span in spans} >= {"prompt-gateway", "call"}


def test_without_a_target_it_does_not_start() -> None:
    with fal_local(app="gateway") as gateway:
        assert gateway.process.wait(START_SECONDS) != 0
        assert "SDXL_GATEWAY_TARGET is not set" in gateway.output()
