"""Every metric of the service, declared and observed in one place.

The registry is an argument: the servers pass the process-wide one, each test its own. Label values
come from closed sets given at construction or by the caller's types (warm shape, stage, outcome,
error type), never from a request's content, so the number of series is bounded by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

from metrics import buckets
from metrics.timeline import REQUEST_STAGES, RUN_STAGES, RequestTiming, RunTiming

SPAN_RESULTS = ("exported", "rejected", "failed", "queue_full", "shutdown")
"""What became of a finished span, the values of `sdxl_spans_total{result}`: taken by the backend;
refused by it in a batch that it took; in a batch that did not arrive or was refused; given up for
want of room; not gone when the time at shutdown was over. With those that still wait
(`otel_sdk_processor_span_queue_size` and the batch on its way) they add up to
`sdxl_spans_ended_total`."""

COLD_SHAPE = "cold"
"""The label of every shape that was not warm: one series for all of them."""

# Stages with a histogram of their own are left out of the common one.
_STAGES = tuple(stage for stage in (*REQUEST_STAGES, *RUN_STAGES) if stage != "queue")


@dataclass(frozen=True, slots=True)
class BucketFamilies:
    """The bucket bounds of each family of histograms, in seconds."""

    request: Sequence[float] = field(default=buckets.REQUEST)
    queue: Sequence[float] = field(default=buckets.QUEUE)
    stage: Sequence[float] = field(default=buckets.STAGE)
    step: Sequence[float] = field(default=buckets.STEP)


class GenerationMetrics:
    """Declares the service's metrics on `registry` and observes finished timings.

    Args:
        registry: where the metrics are declared. Declaring twice on one registry raises
            `ValueError`, as prometheus_client does: two services in one process need two.
        endpoints, outcomes, error_types: the closed sets of label values the server uses.
        build: labels of `sdxl_build_info`.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        endpoints: Sequence[str],
        outcomes: Sequence[str],
        error_types: Sequence[str],
        build: Mapping[str, str],
        bucket_families: BucketFamilies | None = None,
    ) -> None:
        families = bucket_families or BucketFamilies()
        self.registry = registry
        self._endpoints = frozenset(endpoints)
        self._outcomes = frozenset(outcomes)
        self._error_types = frozenset(error_types)
        self._warm_shapes: frozenset[str] = frozenset()

        self._request_duration = Histogram(
            "sdxl_request_duration_seconds",
            "Time from a request's first byte read to its response's last byte written.",
            ("endpoint", "outcome"),
            registry=registry,
            buckets=families.request,
        )
        self._queue_duration = Histogram(
            "sdxl_queue_duration_seconds",
            "Time a request waited for the thread that owns the model.",
            registry=registry,
            buckets=families.queue,
        )
        self._stage_duration = Histogram(
            "sdxl_stage_duration_seconds",
            "Time of one stage; those of the model on the GPU's clock, once a run.",
            ("stage",),
            registry=registry,
            buckets=families.stage,
        )
        self._step_duration = Histogram(
            "sdxl_denoise_step_duration_seconds",
            "Time of one denoising step on the GPU's clock.",
            ("shape", "guidance", "batch"),
            registry=registry,
            buckets=families.step,
        )
        self._requests_in_flight = Gauge(
            "sdxl_requests_in_flight",
            "Requests received and not yet answered.",
            registry=registry,
        )
        self._requests_waiting = Gauge(
            "sdxl_requests_waiting",
            "Requests waiting for the thread that owns the model.",
            registry=registry,
        )
        self._images = Counter("sdxl_images", "Images answered.", registry=registry)
        self._errors = Counter(
            "sdxl_errors",
            "Requests that failed, by type of error.",
            ("error_type",),
            registry=registry,
        )
        self._upload_fallbacks = Counter(
            "sdxl_upload_fallbacks",
            "Images answered inline because their upload failed.",
            registry=registry,
        )
        self._truncated_prompts = Counter(
            "sdxl_truncated_prompts",
            "Requests whose prompt a text encoder cut.",
            registry=registry,
        )
        self._recompiles = Counter(
            "sdxl_recompiles",
            "Runs after warm-up that would have compiled something again; they ran eagerly.",
            registry=registry,
        )
        self._graph_breaks = Gauge(
            "sdxl_graph_breaks",
            "Places where the compiler gave up and went on in Python; 0 unless something is wrong.",
            registry=registry,
        )
        self._cold_runs = Counter(
            "sdxl_cold_shape_runs",
            "Runs at a shape that was not warm, served eagerly.",
            registry=registry,
        )
        self._compile_cache = Counter(
            "sdxl_compile_cache",
            "What became of the archive of compiled kernels, when it was read and written.",
            ("result",),
            registry=registry,
        )
        self._record_failures = Counter(
            "sdxl_record_failures",
            "Finished requests whose spans or metrics could not be recorded.",
            registry=registry,
        )
        self._spans_ended = Counter(
            "sdxl_spans_ended",
            "Finished spans of traces chosen for export.",
            registry=registry,
        )
        self._spans = Counter(
            "sdxl_spans",
            "Finished spans of traces chosen for export, by what became of them.",
            ("result",),
            registry=registry,
        )
        self._ready = Gauge(
            "sdxl_ready", "1 when warm and able to serve, else 0.", registry=registry
        )
        self._warmup_duration = Gauge(
            "sdxl_warmup_duration_seconds",
            "Time each phase of the start took.",
            ("phase",),
            registry=registry,
        )
        Gauge(
            "sdxl_build_info",
            "Always 1; the labels say what is running.",
            tuple(build),
            registry=registry,
        ).labels(*build.values()).set(1)

        # Children that exist from the start: a counter that appears with its first error cannot
        # be alerted on by its rate.
        for error_type in error_types:
            self._errors.labels(error_type)
        for result in SPAN_RESULTS:
            self._spans.labels(result)
        self._stages = {stage: self._stage_duration.labels(stage) for stage in _STAGES}

    def set_warm_shapes(self, shapes: Sequence[str]) -> None:
        """Say which shapes may be label values; all others are counted as `cold`."""
        self._warm_shapes = frozenset(shapes)

    def set_ready(self, ready: bool) -> None:
        self._ready.set(1 if ready else 0)

    def set_warmup_phase(self, phase: str, seconds: float) -> None:
        """`phase` must come from the warm-up's own closed set."""
        self._warmup_duration.labels(phase).set(seconds)

    def request_received(self) -> None:
        self._requests_in_flight.inc()

    def request_answered(self) -> None:
        self._requests_in_flight.dec()

    def set_waiting(self, count: int) -> None:
        self._requests_waiting.set(count)

    def upload_fell_back(self) -> None:
        self._upload_fallbacks.inc()

    def recompiled(self) -> None:
        self._recompiles.inc()

    def graph_breaks(self, count: int) -> None:
        self._graph_breaks.set(count)

    def cold_shape_served(self) -> None:
        self._cold_runs.inc()

    def compile_cache(self, result: str) -> None:
        """`result` must come from the cache's own closed set."""
        self._compile_cache.labels(result).inc()

    def prompt_truncated(self) -> None:
        self._truncated_prompts.inc()

    def record_failed(self) -> None:
        self._record_failures.inc()

    def spans_ended(self, count: int) -> None:
        self._spans_ended.inc(count)

    def spans_settled(self, result: str, count: int) -> None:
        """Count spans by what became of them; `result` is one of `SPAN_RESULTS`."""
        self._spans.labels(result).inc(count)

    def observe_request(self, request: RequestTiming, exemplar: dict[str, str] | None) -> None:
        """Observe one request, and its run if the request was the first of it.

        One whose run was profiled is counted, and in no histogram.

        Args:
            exemplar: `trace_id` and `span_id` of a trace handed to the exporter, else None: an
                exemplar that leads nowhere is worse than none.
        """
        if request.failure is not None:
            known = request.failure.error_type in self._error_types
            self._errors.labels(request.failure.error_type if known else "internal").inc()
        elif request.outcome == "ok" and request.run is not None:
            self._images.inc()
        if request.run is not None and request.run.profiled:
            return  # a profiler at work makes latencies that nobody else sees
        endpoint = request.endpoint if request.endpoint in self._endpoints else "other"
        outcome = request.outcome if request.outcome in self._outcomes else "error"
        self._request_duration.labels(endpoint, outcome).observe(
            request.duration_ns / 1e9, exemplar
        )
        for stage in request.stages:
            if stage.name == "queue":
                self._queue_duration.observe(stage.duration_ns / 1e9, exemplar)
            else:
                self._stages[stage.name].observe(stage.duration_ns / 1e9, exemplar)
        if request.run is not None and request.observes_run:
            self._observe_run(request.run, exemplar)

    def _observe_run(self, run: RunTiming, exemplar: dict[str, str] | None) -> None:
        for stage in run.stages:
            self._stages[stage.name].observe(stage.duration_ns / 1e9, exemplar)
        steps = self._step_duration.labels(
            run.shape if run.shape in self._warm_shapes else COLD_SHAPE,
            "on" if run.guidance else "off",
            str(run.batch_size),
        )
        for step in run.steps:
            steps.observe(step.duration_ns / 1e9, exemplar)


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The registry as text, and its content type: OpenMetrics, which alone carries exemplars, when
    the Accept header asks for it, else Prometheus text. Milliseconds of work: call it off the
    event loop."""
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type
