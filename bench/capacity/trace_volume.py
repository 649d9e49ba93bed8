"""How many spans and bytes a request's trace has, as the exporter would send it."""

from __future__ import annotations

from dataclasses import dataclass

IN_AN_EXPORT = 512
"""Spans; they share one resource."""


@dataclass(frozen=True)
class TraceVolume:
    """Of one request.

    Attributes:
        spans: with a span for each step.
        spans_without_steps: as with SDXL_TRACE_STEPS=summary.
        span_bytes: one span's share of an export, as OTLP protobuf and not compressed.
    """

    spans: int
    spans_without_steps: int
    span_bytes: float


def trace_volume(steps: int) -> TraceVolume:
    """Build traces of requests of this many steps and encode them as the exporter does."""
    from opentelemetry.context import Context
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from bench.micro.pieces import recorded_request
    from metrics.spans import emit, request_tree

    request = recorded_request("1024x1024", steps=steps)
    tree = request_tree(request)
    kept = InMemorySpanExporter()
    provider = TracerProvider(
        resource=Resource({"service.name": "stepspan"}), shutdown_on_exit=False
    )
    provider.add_span_processor(SimpleSpanProcessor(kept))
    while len(kept.get_finished_spans()) < IN_AN_EXPORT:
        emit(provider.get_tracer("bench"), Context(), tree)
    spans = kept.get_finished_spans()
    encoded = encode_spans(spans).SerializeToString()
    return TraceVolume(
        tree.size,
        request_tree(request, steps=False).size,
        len(encoded) / len(spans),
    )
