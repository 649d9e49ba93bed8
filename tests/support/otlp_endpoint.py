"""A real OTLP/HTTP protobuf endpoint on loopback. It keeps the spans and metrics it receives, or
fails as a test chooses."""

from __future__ import annotations

import itertools
import math
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue

from bench.service.loopback import LoopbackHandler, serving
from tests.support.certificates import self_signed


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it crossed the wire."""

    name: str
    trace_id: str
    span_id: str
    parent_span_id: str
    start_ns: int
    end_ns: int
    kind: int
    status_code: int
    status_message: str
    attributes: dict[str, Any]
    events: tuple[tuple[str, dict[str, Any]], ...]
    resource: dict[str, Any]
    trace_state: str


@dataclass(frozen=True)
class Answer:
    """How an endpoint answers an export."""

    status: int = 200
    """With any other than 200 the endpoint keeps nothing of the export."""
    headers: Mapping[str, str] = field(default_factory=dict)
    rejected: int = 0
    """How many spans of every export it rejects."""
    seconds: float = 0.0
    """How long it takes to answer. Infinite: it sends no answer until it is closed, nor then."""


HEALTHY = Answer()
PROTOBUF = "application/x-protobuf"


@dataclass(frozen=True)
class ReceivedPoint:
    """One series of a metric as it crossed the wire. A histogram's `value` is its sum."""

    name: str
    unit: str
    kind: str
    attributes: dict[str, Any]
    value: float
    start_ns: int
    end_ns: int
    temporality: int
    resource: dict[str, Any]
    count: int = 0
    bucket_counts: tuple[int, ...] = ()
    bounds: tuple[float, ...] = ()
    exemplars: tuple[tuple[str, str, float], ...] = ()
    """Trace id, span id and value of each."""


@dataclass
class OtlpEndpoint:
    """What the endpoint has received, for a test to read."""

    url: str
    spans: list[ReceivedSpan] = field(default_factory=list)
    pushes: list[list[ReceivedPoint]] = field(default_factory=list)
    """What `/v1/metrics` received, one push after the other."""
    headers: list[dict[str, str]] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        with self.arrived:
            return [span for span in self.spans if span.trace_id == trace_id]

    def wait_for(
        self, found: Callable[[list[ReceivedSpan]], bool], timeout_seconds: float = 20
    ) -> list[ReceivedSpan]:
        """All spans received, once `found(spans)` is true; fails the test after the timeout."""
        deadline = time.monotonic() + timeout_seconds
        with self.arrived:
            while not found(self.spans):
                left = deadline - time.monotonic()
                if left <= 0:
                    names = sorted({span.name for span in self.spans})
                    raise AssertionError(f"not received in {timeout_seconds} s; have {names}")
                self.arrived.wait(left)
            return list(self.spans)

    def wait_for_points(
        self, name: str, timeout_seconds: float = 20, **attributes: str
    ) -> list[ReceivedPoint]:
        """All points of one series pushed so far, once there is at least one."""

        def received() -> list[ReceivedPoint]:
            points = itertools.chain.from_iterable(self.pushes)
            return [
                p for p in points if p.name == name and attributes.items() <= p.attributes.items()
            ]

        deadline = time.monotonic() + timeout_seconds
        with self.arrived:
            while not (points := received()):
                left = deadline - time.monotonic()
                assert left > 0, f"{name} was not pushed in {timeout_seconds} s"
                self.arrived.wait(left)
            return points

    def wait_for_trace(self, trace_id: str, timeout_seconds: float = 20) -> list[ReceivedSpan]:
        """The spans of a trace, once its root has arrived; a tree is exported in one piece."""

        def has_root(spans: list[ReceivedSpan]) -> bool:
            return any(s.trace_id == trace_id and s.name == "text-to-image" for s in spans)

        self.wait_for(has_root, timeout_seconds)
        return self.trace(trace_id)


def tree(spans: list[ReceivedSpan]) -> str:
    """The spans of one trace as an indented tree, children in the order of their start."""
    ids = {span.span_id for span in spans}
    lines: list[str] = []

    def add(span: ReceivedSpan, depth: int) -> None:
        lines.append("  " * depth + span.name)
        children = [s for s in spans if s.parent_span_id == span.span_id]
        for child in sorted(children, key=lambda s: (s.start_ns, s.end_ns)):
            add(child, depth + 1)

    for root in (s for s in spans if s.parent_span_id not in ids):
        add(root, 0)
    return "\n".join(lines)


@contextmanager
def otlp_endpoint(answer: Answer = HEALTHY, tls: bool = False) -> Iterator[OtlpEndpoint]:
    """Listen on a free loopback port until the block ends.

    Args:
        tls: use HTTPS, with a self-signed certificate.
    """
    endpoint = OtlpEndpoint(url="")
    closing = threading.Event()

    class Handler(LoopbackHandler):
        def respond(self) -> None:
            body = self.read_body()
            if answer.seconds and closing.wait(
                None if math.isinf(answer.seconds) else answer.seconds
            ):
                return
            response = self._keep(body) if answer.status == 200 else b""
            self.send(response, {"Content-Type": PROTOBUF} | dict(answer.headers), answer.status)

        def _keep(self, body: bytes) -> bytes:
            with endpoint.arrived:
                endpoint.headers.append(dict(self.headers))
                endpoint.arrived.notify_all()
                if self.path.endswith("/v1/metrics"):
                    metrics = ExportMetricsServiceRequest.FromString(body)
                    endpoint.pushes.append(list(_received_points(metrics)))
                    metrics_response = ExportMetricsServiceResponse()
                    metrics_response.partial_success.rejected_data_points = answer.rejected
                    return metrics_response.SerializeToString()
                spans = list(_received(ExportTraceServiceRequest.FromString(body)))
                endpoint.spans.extend(spans[answer.rejected :])
            trace_response = ExportTraceServiceResponse()
            trace_response.partial_success.rejected_spans = min(answer.rejected, len(spans))
            return trace_response.SerializeToString()

    with serving(Handler, _self_signed() if tls else None) as endpoint.url:
        try:
            yield endpoint
        finally:
            closing.set()


def _self_signed() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.writelines(self_signed())
        file.flush()
        context.load_cert_chain(file.name)
    return context


def _received(request: ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for resource_spans in request.resource_spans:
        resource = {a.key: _value(a.value) for a in resource_spans.resource.attributes}
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield ReceivedSpan(
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_span_id=span.parent_span_id.hex(),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    kind=span.kind,
                    status_code=span.status.code,
                    status_message=span.status.message,
                    attributes={a.key: _value(a.value) for a in span.attributes},
                    events=tuple(
                        (event.name, {a.key: _value(a.value) for a in event.attributes})
                        for event in span.events
                    ),
                    resource=resource,
                    trace_state=span.trace_state,
                )


def _received_points(request: ExportMetricsServiceRequest) -> Iterator[ReceivedPoint]:
    for resource_metrics in request.resource_metrics:
        resource = {a.key: _value(a.value) for a in resource_metrics.resource.attributes}
        for scope_metrics in resource_metrics.scope_metrics:
            for metric in scope_metrics.metrics:
                kind = metric.WhichOneof("data")
                assert kind is not None
                data = getattr(metric, kind)
                for point in data.data_points:
                    histogram = kind == "histogram"
                    yield ReceivedPoint(
                        name=metric.name,
                        unit=metric.unit,
                        kind=kind,
                        attributes={a.key: _value(a.value) for a in point.attributes},
                        value=point.sum if histogram else point.as_double,
                        start_ns=point.start_time_unix_nano,
                        end_ns=point.time_unix_nano,
                        temporality=getattr(data, "aggregation_temporality", 0),
                        resource=resource,
                        count=point.count if histogram else 0,
                        bucket_counts=tuple(point.bucket_counts) if histogram else (),
                        bounds=tuple(point.explicit_bounds) if histogram else (),
                        exemplars=tuple(
                            (e.trace_id.hex(), e.span_id.hex(), e.as_double)
                            for e in point.exemplars
                        ),
                    )


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind else None
