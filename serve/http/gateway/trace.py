"""The gateway's part of a trace: its spans, and the context it sends to the image app.

The gateway exports two spans for a request: its own, and one for the call to the image app. The
image app continues the second one, so that both apps' spans form one tree.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from metrics.catalogue import GenerationMetrics
from metrics.recorder import Recorder
from metrics.records import RequestTiming
from metrics.sampling import TraceIdentity
from metrics.spans import call_node, gateway_tree
from metrics.tracing import Tracing

MAX_TRACE_STATE_ENTRIES = 32

_ids = RandomIdGenerator()
_propagator = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class ClientSpan:
    """The span of one call to the image app, while the call runs: its identity and attributes."""

    identity: TraceIdentity
    attributes: dict[str, str | int | float | bool]


def client_span(identity: TraceIdentity, url: str) -> ClientSpan:
    """Draw the identity of a call to `url`, a child of the request with `identity`."""
    request = SpanContext(
        identity.trace_id,
        identity.span_id,
        is_remote=False,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
        trace_state=identity.parent.trace_state if identity.parent else None,
    )
    address = urlsplit(url)
    attributes: dict[str, str | int | float | bool] = {
        "http.request.method": "POST",
        "server.address": address.hostname or "",
        "server.port": address.port or (443 if address.scheme == "https" else 80),
        # Without the user name and password that a URL may contain.
        "url.full": f"{address.scheme}://{address.netloc.rpartition('@')[2]}{address.path}",
    }
    child = dataclasses.replace(identity, span_id=_ids.generate_span_id(), parent=request)
    return ClientSpan(child, attributes)


def propagated_context(
    identity: TraceIdentity, client: ClientSpan, *, exporting: bool
) -> dict[str, str]:
    """The trace context for the image app: `traceparent` and `tracestate`, or nothing.

    Args:
        identity: the request's.
        client: the span that the image app continues.
        exporting: whether the gateway exports spans. If it does not, it is no part of the trace,
            and passes its caller's context on unchanged.
    """
    span = identity.parent or identity.caller
    if exporting:
        flags = TraceFlags(TraceFlags.SAMPLED if identity.exported else TraceFlags.DEFAULT)
        state = identity.parent.trace_state if identity.parent else TraceState()
        if identity.exported:
            randomness = None if identity.parent else sampling_randomness(identity.trace_id)
            state = with_probability(state, identity.probability, randomness)
        span = SpanContext(client.identity.trace_id, client.identity.span_id, False, flags, state)
    carrier: dict[str, str] = {}
    if span is not None:
        _propagator.inject(carrier, set_span_in_context(NonRecordingSpan(span), Context()))
    return carrier


def with_probability(
    state: TraceState, probability: float, randomness: str | None = None
) -> TraceState:
    """The trace state with our sampling probability in its `ot` entry.

    As W3C requires, the changed entry moves to the front and the others keep their order. The
    entry's other fields stay. A full list loses its last entry. Probability 1 is only written where
    the caller's threshold has to be replaced.

    Args:
        randomness: the field that goes with our own decision; None: a caller decided.
    """
    fields = [field for field in (state.get("ot") or "").split(";") if field]
    others = [field for field in fields if not field.startswith("th:")]
    if probability == 1 and others == fields:
        return state
    own = () if randomness is None else (randomness,)
    value = ";".join((sampling_threshold(probability), *own, *others))
    rest = [(key, value) for key, value in state.items() if key != "ot"]
    return TraceState([("ot", value), *rest[: MAX_TRACE_STATE_ENTRIES - 1]])


def sampling_threshold(probability: float) -> str:
    """A sampling probability as OpenTelemetry's tracestate carries it: `th:` and up to 14
    hexadecimal digits, without the zeros at the end. With it the image app's spans are weighted
    like the gateway's."""
    # Subtracted as integers: 1 minus a very small probability, as floats, would be 1.
    threshold = 16**14 - (round(probability * 16**14) or 1)
    return "th:" + (format(threshold, "014x").rstrip("0") or "0")


def sampling_randomness(trace_id: int) -> str:
    """The `rv:` with which every participant decides on a trace as our ratio did.

    With a threshold alone they would compare the trace id's last 56 bits, and keep the highest. Our
    ratio (`TraceIdRatioBased`) keeps the lowest of 64, so most of our traces would look as if they
    had not been sampled, and OpenTelemetry's collector drops spans of which that is so.
    """
    lowest_first = trace_id & (2**64 - 1)
    return f"rv:{(2**64 - 1 - lowest_first) >> 8:014x}"


class GatewayRecorder:
    """Records the gateway's finished requests as spans, then as metrics.

    The work is done on the thread of a `Recorder`, off the event loop.
    """

    def __init__(self, tracing: Tracing, metrics: GenerationMetrics) -> None:
        self._tracing = tracing
        self._metrics = metrics
        self._recorder = Recorder(tracing, metrics)
        self._client_spans: dict[int, ClientSpan] = {}  # by the span id of their request

    def begin_client_span(self, identity: TraceIdentity, url: str) -> ClientSpan:
        """Begin the span of a call to the image app; it is recorded with its request."""
        span = self._client_spans[identity.span_id] = client_span(identity, url)
        return span

    def record(self, request: RequestTiming, identity: TraceIdentity) -> None:
        """Hand over a finished request; returns at once."""
        client = self._client_spans.pop(identity.span_id, None)
        self._recorder.submit(lambda: self._record(request, identity, client))

    def close(self, budget_seconds: float) -> int:
        """Record what was handed over and shut tracing down, in at most `budget_seconds`.

        Returns how many spans were lost.
        """
        return self._recorder.close(budget_seconds)

    def _record(
        self, request: RequestTiming, identity: TraceIdentity, client: ClientSpan | None
    ) -> None:
        exemplar = None
        if self._emit(request, identity, client):
            exemplar = {"trace_id": identity.trace_id_hex, "span_id": identity.span_id_hex}
        # `tidy` and `call` are not values of the stage label; they are on the spans only.
        labelled = tuple(stage for stage in request.stages if stage.name in ("receive", "respond"))
        self._metrics.observe_request(dataclasses.replace(request, stages=labelled), exemplar)

    def _emit(
        self, request: RequestTiming, identity: TraceIdentity, client: ClientSpan | None
    ) -> bool:
        """Emit the request's spans; returns whether they were queued for export."""
        kept_for = self._tracing.keep_reason(request)
        settled = self._tracing.decide_at_end(identity, keep=kept_for is not None)
        if not settled.exported:
            return False
        call = request.stage("call")
        own = dataclasses.replace(request, stages=tuple(s for s in request.stages if s is not call))
        queued = self._tracing.emit(settled, gateway_tree(own, settled.caller))
        if queued and client is not None and call is not None:
            child = dataclasses.replace(
                settled,
                span_id=client.identity.span_id,
                parent=client.identity.parent,
                caller=None,
            )
            self._tracing.emit(child, call_node(call, request.failure, client.attributes))
        return queued
