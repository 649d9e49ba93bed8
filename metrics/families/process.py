"""Metrics of the process: what runs, whether it is ready, the health of its telemetry."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from metrics.families.observing import labelled

SPAN_RESULTS = ("exported", "rejected", "failed", "queue_full", "shutdown")
"""What happened to a finished span, the values of `sdxl_spans_total{result}`.

- `exported`: the backend accepted it.
- `rejected`: the backend accepted its batch except for this span and others.
- `failed`: its batch did not arrive, or the backend refused it.
- `queue_full`: it was dropped because the queue had no room.
- `shutdown`: it was not exported within the time allowed at shutdown.

Together with the spans that still wait (`otel_sdk_processor_span_queue_size` and the batch on its
way) they add up to `sdxl_spans_ended_total`.
"""

PUSH_RESULTS = ("exported", "partial", "failed")
"""What happened to a push: accepted; accepted except for some points; not arrived or refused."""

DROPPED_CONNECTIONS = (
    "too_many_connections",  # to make room for another, or because there was no room for it
    "head_too_slow",
    "head_too_large",
    "malformed_http",
    "draining",  # half a request had come when the process began to shut down
    "answer_not_taken",
)
"""Why the server closed a client's connection: the values of
`sdxl_connections_dropped_total{reason}`."""


class ProcessMetrics:
    """What runs, whether it is ready, and the health of its telemetry."""

    def __init__(self, registry: CollectorRegistry, build: Mapping[str, str]) -> None:
        self.ready = Gauge(
            "sdxl_ready", "1 when warm and able to serve, else 0.", registry=registry
        )
        self.warmup_duration = Gauge(
            "sdxl_warmup_duration_seconds",
            "Time of each phase of the start-up.",
            ("phase",),
            registry=registry,
        )
        self.graph_breaks = Gauge(
            "sdxl_graph_breaks",
            "Places where the compiler fell back to Python; 0 unless something is wrong.",
            registry=registry,
        )
        self.compile_cache = Counter(
            "sdxl_compile_cache",
            "Reads and writes of the archive of compiled kernels, by result.",
            ("result",),
            registry=registry,
        )
        self.spans_ended = Counter(
            "sdxl_spans_ended",
            "Finished spans of traces chosen for export.",
            registry=registry,
        )
        self.spans = Counter(
            "sdxl_spans",
            "Finished spans of traces chosen for export, by result.",
            ("result",),
            registry=registry,
        )
        self.pushes = Counter(
            "sdxl_otlp_pushes",
            "Pushes of all metrics over OTLP, by result.",
            ("result",),
            registry=registry,
        )
        self.connections = Gauge(
            "sdxl_connections", "Open connections of clients.", registry=registry
        )
        self.connections_dropped = Counter(
            "sdxl_connections_dropped",
            "Connections that the server closed because of the client, by reason.",
            ("reason",),
            registry=registry,
        )
        self.record_failures = Counter(
            "sdxl_record_failures",
            "Finished requests whose spans or metrics could not be recorded.",
            registry=registry,
        )
        labelled(self.spans, SPAN_RESULTS)
        labelled(self.pushes, PUSH_RESULTS)
        labelled(self.connections_dropped, DROPPED_CONNECTIONS)
        Gauge(
            "sdxl_build_info",
            "Always 1; the labels say what runs.",
            tuple(build),
            registry=registry,
        ).labels(*build.values()).set(1)
        self._peak_flops: Gauge | None = None

    def peak_flops(self, registry: CollectorRegistry) -> Gauge:
        """The gauge of the rated peak, declared once the peak is known: never 0."""
        if self._peak_flops is None:
            self._peak_flops = Gauge(
                "sdxl_peak_flops_per_second",
                "Rated dense bf16 FLOPs a second of the GPU, or the value of SDXL_PEAK_TFLOPS.",
                registry=registry,
            )
        return self._peak_flops
