"""A real OTLP/HTTP protobuf endpoint on loopback that keeps the spans it receives."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue


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


@dataclass
class OtlpEndpoint:
    """What a test sees of the endpoint."""

    url: str
    spans: list[ReceivedSpan] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        with self.arrived:
            return [span for span in self.spans if span.trace_id == trace_id]

    def wait_for(
        self, found: Callable[[list[ReceivedSpan]], bool], timeout_seconds: float = 20
    ) -> list[ReceivedSpan]:
        """All spans received once `found` holds of them; fails the test after the timeout."""
        deadline = time.monotonic() + timeout_seconds
        with self.arrived:
            while not found(self.spans):
                left = deadline - time.monotonic()
                if left <= 0:
                    names = sorted({span.name for span in self.spans})
                    raise AssertionError(f"not received in {timeout_seconds} s; have {names}")
                self.arrived.wait(left)
            return list(self.spans)

    def wait_for_trace(self, trace_id: str, timeout_seconds: float = 20) -> list[ReceivedSpan]:
        """The spans of a trace once its root has arrived; a tree is exported in one piece."""

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
def otlp_endpoint() -> Iterator[OtlpEndpoint]:
    """Listen on a free loopback port until the block ends."""
    endpoint = OtlpEndpoint(url="")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = ExportTraceServiceRequest.FromString(body)
            with endpoint.arrived:
                endpoint.headers.append(dict(self.headers))
                endpoint.spans.extend(_received(request))
                endpoint.arrived.notify_all()
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


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


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    return getattr(value, kind) if kind else None
