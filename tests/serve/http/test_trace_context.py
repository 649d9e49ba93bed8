"""A caller's trace context, by headers and by body, and what the gateway passes on of it.

The cases are those of W3C's own test suite for implementations of Trace Context, and its text.
"""

from __future__ import annotations

import asyncio
import re
from random import getrandbits
from typing import Any

import httpx
import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import TraceState, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from metrics.sampling import TraceSampling
from metrics.tracing import MAX_TRACE_STATE_CHARACTERS, Tracing, shortened
from serve.http.gateway.trace import client_span, propagated_context, with_probability
from tests.serve.http.test_gateway_client import PROMPT, ImageApp, gateway, image_app, otlp, served

__all__ = ["image_app", "otlp"]  # fixtures

TRACE = "12345678901234567890123456789012"
OTHER = "12345678901234567890123456789011"
PARENT = f"00-{TRACE}-1234567890123456-01"

Headers = list[tuple[str, str]]


def ask(
    image_app: ImageApp, headers: Headers, trace_context: Any = None
) -> tuple[httpx.Response, dict[str, str]]:
    """One request through a gateway; returns the answer, and the context that was passed on."""
    body: dict[str, Any] = {"prompt": PROMPT}
    if trace_context is not None:
        body["trace_context"] = trace_context

    async def once() -> httpx.Response:
        async with served(image_app), gateway(image_app.url) as (_, client):
            return await client.post("/", json=body, headers=headers)

    answer = asyncio.run(once())
    return answer, image_app.requests[-1][1].get("trace_context", {})


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], ""),
        ([("tracestate", "foo=1,bar=2")], "foo=1,bar=2"),
        ([("TraceState", "foo=1")], "foo=1"),
        # several headers are one list, in their order
        (
            [("tracestate", "foo=1,bar=2"), ("tracestate", "rojo=1"), ("tracestate", "baz=3")],
            "foo=1,bar=2,rojo=1,baz=3",
        ),
        ([("tracestate", "foo=1"), ("tracestate", "")], "foo=1"),
        ([("tracestate", ""), ("tracestate", "foo=1")], "foo=1"),
        ([("tracestate", "foo=1 \t , \t bar=2"), ("tracestate", "\t baz=3 ")], "foo=1,bar=2,baz=3"),
        # at most 32 members, over all headers; more are malformed
        (
            [("tracestate", f"k{i}=1,k{i + 16}=2") for i in range(16)],
            ",".join(f"k{i}=1,k{i + 16}=2" for i in range(16)),
        ),
        ([("tracestate", f"k{i}=1") for i in range(33)], ""),
        # one malformed or repeated member makes the whole list malformed
        ([("tracestate", "foo=1"), ("tracestate", "FOO=1")], ""),
        ([("tracestate", "foo=1"), ("tracestate", "bar=2=3")], ""),
        ([("tracestate", "foo=1"), ("tracestate", "foo=2")], ""),
        ([("tracestate", "z" * 257 + "=1"), ("tracestate", "foo=1")], ""),
    ],
)
@pytest.mark.parametrize("by", ["header", "body"])
def test_tracestates_are_combined_in_order(
    image_app: ImageApp, otlp: Any, by: str, headers: Headers, expected: str
) -> None:
    if by == "header":
        answer, passed_on = ask(image_app, [("traceparent", PARENT), *headers])
    else:
        context = {"traceparent": PARENT, "tracestate": [value for _, value in headers]}
        answer, passed_on = ask(image_app, [], context)
    # What is wrong with a tracestate does not touch the trace.
    assert answer.headers["x-trace-id"] == passed_on["traceparent"].split("-")[1] == TRACE
    assert passed_on.get("tracestate", "") == expected


def test_the_sampling_probability_may_be_in_any_tracestate(image_app: ImageApp, otlp: Any) -> None:
    headers = [("tracestate", "foo=1"), ("tracestate", "ot=rv:6e6d1a75832a2f;th:8")]
    ask(image_app, [("traceparent", PARENT), *headers])
    assert {span.attributes["sampling.probability"] for span in otlp.spans} == {0.5}


@pytest.mark.parametrize(
    "traceparents",
    [
        [PARENT, PARENT.replace(TRACE, OTHER)],
        # Combined, as repeated headers are, two equal ones are malformed too.
        [PARENT, PARENT],
        ["cc" + PARENT[2:] + "-x", "cc" + PARENT[2:].replace(TRACE, OTHER)],
        [PARENT, "nonsense"],
        [PARENT, ""],
        [f"{PARENT}, {PARENT}"],
        [PARENT + "-future"],
        ["ff" + PARENT[2:]],
        [PARENT.replace(TRACE, "ABCDEF" + TRACE[6:])],
        [PARENT.replace("1234567890123456-", "0" * 16 + "-")],
    ],
)
def test_any_but_one_well_formed_traceparent_is_a_new_trace(
    image_app: ImageApp, otlp: Any, traceparents: list[str]
) -> None:
    headers = [("traceparent", value) for value in traceparents]
    answer, passed_on = ask(image_app, [*headers, ("tracestate", "foo=1")])
    assert answer.headers["x-trace-id"] == passed_on["traceparent"].split("-")[1]
    assert answer.headers["x-trace-id"] not in (TRACE, OTHER)
    # Without a parent there is no state either.
    assert "tracestate" not in passed_on


@pytest.mark.parametrize(
    "traceparent", [f" \t{PARENT}\t ", "cc" + PARENT[2:], "cc" + PARENT[2:] + "-what-the-future"]
)
def test_a_later_version_is_read_and_passed_on_as_ours(
    image_app: ImageApp, otlp: Any, traceparent: str
) -> None:
    answer, passed_on = ask(image_app, [("traceparent", traceparent)])
    assert answer.headers["x-trace-id"] == TRACE
    assert passed_on["traceparent"].startswith(f"00-{TRACE}-")


def test_a_long_state_loses_long_entries_first_and_then_the_last_ones() -> None:
    entries = [("a", "1" * 100), ("long", "2" * 200), ("b", "3" * 100), ("c", "4" * 100)]
    entries += [("d", "5" * 100), ("ot", "th:8"), ("e", "6" * 100), ("f", "7" * 100)]
    kept = shortened(TraceState(entries))
    assert list(kept) == ["a", "b", "c", "d", "ot"]
    assert len(kept.to_header()) <= MAX_TRACE_STATE_CHARACTERS
    assert list(shortened(TraceState(entries[:3]))) == ["a", "long", "b"]


@pytest.mark.parametrize("length", [512, 513, 5000, 9000])
def test_512_characters_are_passed_on_and_no_more(
    image_app: ImageApp, otlp: Any, length: int
) -> None:
    names = [f"k{i:02}" for i in range(32)]
    each = (length + 1) // 32 - 5  # "k00=" and a comma
    state = [f"{name}={'x' * each}" for name in names]
    state[0] += "x" * (length - len(",".join(state)))
    assert len(",".join(state)) == length
    answer, passed_on = ask(
        image_app, [("traceparent", PARENT), *[("tracestate", s) for s in state]]
    )
    assert answer.headers["x-trace-id"] == TRACE
    told = passed_on.get("tracestate", "")
    assert len(told) <= MAX_TRACE_STATE_CHARACTERS
    if length == 512:
        assert told == ",".join(state)


@pytest.mark.parametrize(
    ("state", "probability", "expected"),
    [
        ("", 1.0, ""),
        ("", 0.5, "ot=th:8"),
        ("a=1,b=2", 0.5, "ot=th:8,a=1,b=2"),
        # a changed entry moves to the front, and its other fields stay
        ("a=1,ot=rv:6e6d1a75832a2f;th:4,b=2", 0.5, "ot=th:8;rv:6e6d1a75832a2f,a=1,b=2"),
        ("a=1,ot=th:8", 1.0, "ot=th:0,a=1"),
        ("a=1,ot=rv:6e6d1a75832a2f", 1.0, "a=1,ot=rv:6e6d1a75832a2f"),
        (
            ",".join(f"k{i}=1" for i in range(32)),
            0.5,
            "ot=th:8," + ",".join(f"k{i}=1" for i in range(31)),
        ),
    ],
)
def test_our_probability_takes_the_first_place_of_the_state(
    state: str, probability: float, expected: str
) -> None:
    told = with_probability(TraceState.from_header([state]), probability).to_header()
    assert told == expected
    carrier = {"traceparent": PARENT, "tracestate": told}
    read = TraceContextTextMapPropagator().extract(carrier, context=Context())
    assert get_current_span(read).get_span_context().trace_state.to_header() == expected


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.999])
def test_what_we_sampled_is_sampled_by_the_threshold_that_we_pass_on(rate: float) -> None:
    """As OpenTelemetry defines it: a trace is sampled if its randomness reaches the threshold."""
    sampling = TraceSampling(rate)
    chosen = 0
    while chosen < 50:
        identity = sampling.decide_at_start(getrandbits(128), getrandbits(64), None)
        if not identity.exported:
            continue
        chosen += 1
        client = client_span(identity, "http://image-app")
        passed_on = propagated_context(identity, client, exporting=True)
        [ours] = re.findall(r"^ot=th:([0-9a-f]{1,14});rv:([0-9a-f]{14})$", passed_on["tracestate"])
        threshold, randomness = int(ours[0].ljust(14, "0"), 16), int(ours[1], 16)
        assert randomness >= threshold
        read = Tracing(
            TraceSampling(), None, Resource({}), on_ended=print, on_result=print
        ).identify(passed_on)
        assert read.probability == pytest.approx(rate)


def test_a_gateway_that_exports_nothing_answers_with_the_image_apps_trace(
    image_app: ImageApp,
) -> None:
    image_app.refuse(500, "out_of_memory", x_trace_id=OTHER)
    answer, passed_on = ask(image_app, [])
    assert passed_on == {}
    assert answer.headers["x-trace-id"] == OTHER
