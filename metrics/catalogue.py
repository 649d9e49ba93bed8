"""Every metric of the service, declared and observed in one place.

The metrics live in a registry of their own, which is shown in the one given: the servers give the
process-wide one, each test its own. Label values come from closed sets given at construction or by
the caller's types (warm shape, stage, outcome, error type), never from a request's content, and
every series exists from the start: their number does not depend on what is requested, and a rate
has a zero to rise from.

What cannot be told (a time that is negative or no number, an exemplar over OpenMetrics' limit, a
name declared twice, a driver that stops answering) raises nowhere; it is left out and counted by
`sdxl_telemetry_faults_total{fault}`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from metrics import buckets
from metrics.budget import Budget
from metrics.records import REQUEST_STAGES, RUN_STAGES, RequestTiming, RunTiming
from metrics.slow_reason import SLOW_REASONS, slow_reason

logger = logging.getLogger(__name__)

SPAN_RESULTS = ("exported", "rejected", "failed", "queue_full", "shutdown")
"""What became of a finished span, the values of `sdxl_spans_total{result}`: taken by the backend;
refused by it in a batch that it took; in a batch that did not arrive or was refused; given up for
want of room; not gone when the time at shutdown was over. With those that still wait
(`otel_sdk_processor_span_queue_size` and the batch on its way) they add up to
`sdxl_spans_ended_total`."""

COLD_SHAPE = "cold"
"""The label of every shape that was not warm: one series for all of them."""

OTHER_ENDPOINT = "other"
"""The label of an endpoint that the server did not name at the start."""

CANCELLED_DURING = ("waiting", "running", "answering")
"""Where a client that left has left: before its run, during it, or when the image was drawn."""

BUDGET_RESULTS = ("within", "over")

PUSH_RESULTS = ("exported", "partial", "failed")
"""What became of a push: taken; taken but for some points; not arrived, or refused."""

FAULTS = (
    "negative_value",  # a clock that stepped backwards
    "not_a_number",
    "exemplar_too_long",
    "declared_twice",
    "nvml",  # the GPU's driver did not answer
    "collector",  # a collector raised in a scrape
)
"""What telemetry itself got wrong: the values of `sdxl_telemetry_faults_total{fault}`."""

# OpenMetrics: names and values of an exemplar's labels together. prometheus_client raises past it,
# and only after the bucket has been counted.
_EXEMPLAR_CHARACTERS = 128

# Stages with a histogram of their own are left out of the common one.
_STAGES = tuple(stage for stage in (*REQUEST_STAGES, *RUN_STAGES) if stage != "queue")

_GUIDANCE = {True: "on", False: "off"}

Exemplar = dict[str, str] | None
Labelled = TypeVar("Labelled", Counter, Histogram)


@dataclass(frozen=True, slots=True)
class BucketFamilies:
    """The bucket bounds of each family of histograms, in seconds and bytes."""

    request: Sequence[float] = field(default=buckets.REQUEST)
    queue: Sequence[float] = field(default=buckets.QUEUE)
    stage: Sequence[float] = field(default=buckets.STAGE)
    step: Sequence[float] = field(default=buckets.STEP)
    gpu_queue: Sequence[float] = field(default=buckets.GPU_QUEUE)
    image_bytes: Sequence[float] = field(default=buckets.IMAGE_BYTES)


@dataclass(frozen=True, slots=True)
class RunFlops:
    """Nominal FLOPs of a run at one shape: what the unmodified model does, however it is computed.

    `guided_step` and `guided_text_encode` are for guidance on; off is half of each.
    """

    guided_text_encode: int
    guided_step: int
    vae_decode: int

    def of(self, run: RunTiming) -> float:
        """For as much of the run as was done."""
        share = run.batch_size * (1.0 if run.guidance else 0.5)
        flops = share * self.guided_step * len(run.steps)
        if run.stage("text_encode") is not None:
            flops += share * self.guided_text_encode
        if run.stage("vae_decode") is not None:
            flops += run.batch_size * self.vae_decode
        return flops


class GenerationMetrics:
    """Declares the service's metrics and observes finished timings.

    Args:
        registry: where the metrics are shown. If it holds metrics of these names already, another
            service's in this process, they stay there and these are shown by their own: see
            `registry`.
        endpoints, outcomes, error_types: the closed sets of label values the server uses.
        rejections: which of the error types turn a request away before any work was done for it.
        build: labels of `sdxl_build_info`.

    Attributes:
        registry: what a scrape of this service renders.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        endpoints: Sequence[str],
        outcomes: Sequence[str],
        error_types: Sequence[str],
        rejections: Sequence[str] = (),
        build: Mapping[str, str],
        bucket_families: BucketFamilies | None = None,
    ) -> None:
        families = bucket_families or BucketFamilies()
        self._own = _OwnRegistry()
        self._faults = Counter(
            "sdxl_telemetry_faults",
            "What telemetry could not tell and left out, by why.",
            ("fault",),
            registry=self._own,
        )
        self._requests = _RequestMetrics(
            self._own, families, self.fault, endpoints, outcomes, error_types, rejections
        )
        self._runs = _RunMetrics(self._own, families, self.fault)
        self._process = _ProcessMetrics(self._own, build)
        for fault in FAULTS:
            self._faults.labels(fault)
        self.registry = registry
        try:
            registry.register(self._own)
        except ValueError:
            logger.warning(
                "metrics of these names are shown by another service of this process; "
                "this one's are served by itself alone"
            )
            self.fault("declared_twice")
            self.registry = self._own

    # The process

    def set_warm_shapes(self, shapes: Sequence[str], max_batch: int = 1) -> None:
        """Say which shapes may be label values; all others are counted as `cold`."""
        self._runs.declare(shapes, max_batch)

    def set_ready(self, ready: bool) -> None:
        self._process.ready.set(1 if ready else 0)

    def set_warmup_phase(self, phase: str, seconds: float) -> None:
        """`phase` must come from the warm-up's own closed set."""
        self._process.warmup_duration.labels(phase).set(seconds)

    def set_budget(self, budget: Budget) -> None:
        """Count answered requests as within or over `budget` from now on."""
        self._requests.budget = budget

    def set_flops(self, shape: str, flops: RunFlops) -> None:
        """Count the FLOPs of runs at a warm shape, and their seconds, from now on."""
        self._runs.flops[shape] = flops

    def set_peak_flops(self, flops_per_second: float) -> None:
        """The rate that utilisation is a share of: rated, dense, bf16."""
        self._process.peak_flops(self._own).set(flops_per_second)

    def show(self, collector: Collector) -> None:
        """Show what another collector of this service tells. One that raises in a scrape is
        counted and left out of it; names that are there already are counted and refused."""
        try:
            self._own.register(_Guarded(collector, lambda: self.fault("collector")))
        except ValueError:
            logger.warning("%s tells metrics that are told already", type(collector).__name__)
            self.fault("declared_twice")

    def recompiled(self) -> None:
        self._runs.recompiles.inc()

    def cold_shape_served(self) -> None:
        self._runs.cold_runs.inc()

    def graph_breaks(self, count: int) -> None:
        self._process.graph_breaks.set(count)

    def compile_cache(self, result: str) -> None:
        """`result` must come from the cache's own closed set."""
        self._process.compile_cache.labels(result).inc()

    # Requests, as they happen

    def request_received(self) -> None:
        self._requests.in_flight.inc()

    def request_answered(self) -> None:
        self._requests.in_flight.dec()

    def set_waiting(self, count: int) -> None:
        self._requests.waiting.set(count)

    def upload_fell_back(self) -> None:
        self._requests.upload_fallbacks.inc()

    def prompt_truncated(self) -> None:
        self._requests.truncated_prompts.inc()

    # Telemetry's own health

    def record_failed(self) -> None:
        self._process.record_failures.inc()

    def spans_ended(self, count: int) -> None:
        self._process.spans_ended.inc(count)

    def spans_settled(self, result: str, count: int) -> None:
        """Count spans by what became of them; `result` is one of `SPAN_RESULTS`."""
        self._process.spans.labels(result).inc(count)

    def pushed(self, result: str) -> None:
        """Count a push of all metrics over OTLP; `result` is one of `PUSH_RESULTS`."""
        self._process.pushes.labels(result).inc()

    def fault(self, fault: str) -> None:
        """Count something that telemetry could not tell; `fault` is one of `FAULTS`."""
        self._faults.labels(fault).inc()

    # Requests, when they have ended

    def observe_request(self, request: RequestTiming, exemplar: Exemplar) -> None:
        """Observe one request, and its run if the request was the first of it.

        One whose run was profiled is counted, and its times are observed nowhere: a profiler at
        work makes latencies that nobody else sees.

        Args:
            exemplar: `trace_id` and `span_id` of a trace handed to the exporter, else None: an
                exemplar that leads nowhere is worse than none.
        """
        if exemplar is not None and _characters(exemplar) > _EXEMPLAR_CHARACTERS:
            self.fault("exemplar_too_long")
            exemplar = None
        self._requests.count(request)
        if request.run is not None and request.run.profiled:
            return
        self._requests.observe(request, exemplar)
        for stage in request.stages:
            if stage.name != "queue":
                self._runs.observe_stage(stage.name, stage.duration_ns, exemplar)
        if request.run is not None and request.observes_run:
            self._runs.observe(request.run, exemplar)


class _RequestMetrics:
    """What happens to requests."""

    def __init__(
        self,
        registry: CollectorRegistry,
        families: BucketFamilies,
        fault: Callable[[str], None],
        endpoints: Sequence[str],
        outcomes: Sequence[str],
        error_types: Sequence[str],
        rejections: Sequence[str],
    ) -> None:
        self._fault = fault
        self._error_types = frozenset(error_types)
        self._rejections = frozenset(rejections)
        self.budget: Budget | None = None

        duration = Histogram(
            "sdxl_request_duration_seconds",
            "Time from a request's first byte read to its response's last byte written.",
            ("endpoint", "outcome"),
            registry=registry,
            buckets=families.request,
        )
        self._durations = {
            (endpoint, outcome): duration.labels(endpoint, outcome)
            for endpoint in (*endpoints, OTHER_ENDPOINT)
            for outcome in dict.fromkeys((*outcomes, "error"))
        }
        self._queue_duration = Histogram(
            "sdxl_queue_duration_seconds",
            "Time a request waited for the thread that owns the model.",
            registry=registry,
            buckets=families.queue,
        )
        self._image_bytes = Histogram(
            "sdxl_image_bytes",
            "Size of an answered image, encoded.",
            registry=registry,
            buckets=families.image_bytes,
        )
        self.in_flight = Gauge(
            "sdxl_requests_in_flight",
            "Requests received and not yet answered.",
            registry=registry,
        )
        self.waiting = Gauge(
            "sdxl_requests_waiting",
            "Requests waiting for the thread that owns the model.",
            registry=registry,
        )
        self._images = Counter("sdxl_images", "Images answered.", registry=registry)
        self._errors = _children(
            Counter(
                "sdxl_errors",
                "Requests that failed, by type of error.",
                ("error_type",),
                registry=registry,
            ),
            (*error_types, "internal"),
        )
        self._rejected = _children(
            Counter(
                "sdxl_rejections",
                "Requests turned away before any work was done for them, by why.",
                ("reason",),
                registry=registry,
            ),
            rejections,
        )
        self._cancelled = _children(
            Counter(
                "sdxl_cancelled",
                "Requests whose client left, by what was going on.",
                ("during",),
                registry=registry,
            ),
            CANCELLED_DURING,
        )
        self._slow = _children(
            Counter(
                "sdxl_slow_requests",
                "Requests that were slow for a reason that the service can tell, by which.",
                ("reason",),
                registry=registry,
            ),
            SLOW_REASONS,
        )
        self._budgeted = _children(
            Counter(
                "sdxl_request_budget",
                "Answered requests within and over the time that their shape and steps may take.",
                ("result",),
                registry=registry,
            ),
            BUDGET_RESULTS,
        )
        self._non_finite_outputs = Counter(
            "sdxl_non_finite_outputs",
            "Runs whose pixels were not finite.",
            registry=registry,
        )
        self.upload_fallbacks = Counter(
            "sdxl_upload_fallbacks",
            "Images answered inline because their upload failed.",
            registry=registry,
        )
        self.truncated_prompts = Counter(
            "sdxl_truncated_prompts",
            "Requests whose prompt a text encoder cut.",
            registry=registry,
        )

    def count(self, request: RequestTiming) -> None:
        if request.failure is not None:
            self._count_failure(request, request.failure.error_type)
        elif request.outcome == "ok" and request.run is not None:
            self._images.inc()

    def observe(self, request: RequestTiming, exemplar: Exemplar) -> None:
        seconds = request.duration_ns / 1e9
        duration = self._durations.get((request.endpoint, request.outcome))
        if duration is None:
            known = (request.endpoint, "error") in self._durations
            endpoint = request.endpoint if known else OTHER_ENDPOINT
            duration = self._durations.get((endpoint, request.outcome))
            duration = duration or self._durations[endpoint, "error"]
        _observe(duration, seconds, exemplar, self._fault)
        if (queue := request.stage("queue")) is not None:
            _observe(self._queue_duration, queue.duration_ns / 1e9, exemplar, self._fault)
        if (reason := slow_reason(request)) is not None:
            self._slow[reason].inc(1, exemplar)
        if request.failure is None and request.outcome == "ok" and request.run is not None:
            if request.image_bytes is not None:
                _observe(self._image_bytes, request.image_bytes, exemplar, self._fault)
            self._count_budget(request, seconds, exemplar)

    def _count_failure(self, request: RequestTiming, error_type: str) -> None:
        known = error_type in self._error_types
        self._errors[error_type if known else "internal"].inc()
        if error_type in self._rejections and request.run is None:
            self._rejected[error_type].inc()
        if error_type == "non_finite_output":
            self._non_finite_outputs.inc()
        if request.outcome == "cancelled":
            self._cancelled[_cancelled_during(request)].inc()

    def _count_budget(self, request: RequestTiming, seconds: float, exemplar: Exemplar) -> None:
        facts = request.facts
        if self.budget is None or facts is None:
            return
        allowed = self.budget.seconds(facts.width, facts.height, facts.num_inference_steps)
        # No number is not within.
        self._budgeted["within" if seconds <= allowed else "over"].inc(1, exemplar)


class _RunMetrics:
    """What the model does: stages, steps, FLOPs."""

    def __init__(
        self, registry: CollectorRegistry, families: BucketFamilies, fault: Callable[[str], None]
    ) -> None:
        self._fault = fault
        self._max_batch = 1
        self.flops: dict[str, RunFlops] = {}
        self._stages = _children(
            Histogram(
                "sdxl_stage_duration_seconds",
                "Time of one stage; those of the model on the GPU's clock, once a run.",
                ("stage",),
                registry=registry,
                buckets=families.stage,
            ),
            _STAGES,
        )
        self._step_duration = Histogram(
            "sdxl_denoise_step_duration_seconds",
            "Time of one denoising step on the GPU's clock.",
            ("shape", "guidance", "batch"),
            registry=registry,
            buckets=families.step,
        )
        self._step_durations: dict[tuple[str, bool, int], Histogram] = {}
        self._gpu_queue = Histogram(
            "sdxl_denoise_step_gpu_queue_seconds",
            "Time a step lay in the GPU's queue before it started; near 0 the GPU had waited for "
            "the host. Without a GPU nothing is observed.",
            registry=registry,
            buckets=families.gpu_queue,
        )
        self.recompiles = Counter(
            "sdxl_recompiles",
            "Runs after warm-up that would have compiled something again; they ran eagerly.",
            registry=registry,
        )
        self.cold_runs = Counter(
            "sdxl_cold_shape_runs",
            "Runs at a shape that was not warm, served eagerly.",
            registry=registry,
        )
        self._flops_done = Counter(
            "sdxl_model_flops",
            "Nominal FLOPs of the model in runs at warm shapes, however they are computed.",
            registry=registry,
        )
        self._run_seconds = Counter(
            "sdxl_run_seconds",
            "Time on the GPU's clock of the runs that sdxl_model_flops_total counts.",
            registry=registry,
        )
        self.declare((), 1)

    def declare(self, shapes: Sequence[str], max_batch: int) -> None:
        self._max_batch = max_batch
        self._step_durations = {
            (shape, guidance, batch): self._step_duration.labels(
                shape, _GUIDANCE[guidance], str(batch)
            )
            for shape in (*shapes, COLD_SHAPE)
            for guidance in _GUIDANCE
            for batch in range(1, max_batch + 1)
        }

    def observe_stage(self, name: str, duration_ns: float, exemplar: Exemplar) -> None:
        _observe(self._stages[name], duration_ns / 1e9, exemplar, self._fault)

    def observe(self, run: RunTiming, exemplar: Exemplar) -> None:
        for stage in run.stages:
            self.observe_stage(stage.name, stage.duration_ns, exemplar)
        steps = self._step_durations.get((run.shape, run.guidance, run.batch_size))
        if steps is None:
            # A batch that was not declared has no warm graph either, whatever its shape.
            batch = min(run.batch_size, self._max_batch)
            steps = self._step_durations[COLD_SHAPE, run.guidance, batch]
        for step in run.steps:
            _observe(steps, step.duration_ns / 1e9, exemplar, self._fault)
        if run.clock != "host":
            for step in run.steps:
                _observe(self._gpu_queue, step.gpu_queue_ns / 1e9, exemplar, self._fault)
        self._count_flops(run)

    def _count_flops(self, run: RunTiming) -> None:
        flops = self.flops.get(run.shape)
        if flops is None or not run.stages:
            return
        seconds = (run.stages[-1].end_ns - run.stages[0].start_ns) / 1e9
        # Both or none: a share of two sums that count different runs means nothing.
        if _holds(seconds, self._fault):
            self._flops_done.inc(flops.of(run))
            self._run_seconds.inc(seconds)


class _ProcessMetrics:
    """The process: what runs, whether it is ready, how its telemetry does."""

    def __init__(self, registry: CollectorRegistry, build: Mapping[str, str]) -> None:
        self.ready = Gauge(
            "sdxl_ready", "1 when warm and able to serve, else 0.", registry=registry
        )
        self.warmup_duration = Gauge(
            "sdxl_warmup_duration_seconds",
            "Time each phase of the start took.",
            ("phase",),
            registry=registry,
        )
        self.graph_breaks = Gauge(
            "sdxl_graph_breaks",
            "Places where the compiler gave up and went on in Python; 0 unless something is wrong.",
            registry=registry,
        )
        self.compile_cache = Counter(
            "sdxl_compile_cache",
            "What became of the archive of compiled kernels, when it was read and written.",
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
            "Finished spans of traces chosen for export, by what became of them.",
            ("result",),
            registry=registry,
        )
        self.pushes = Counter(
            "sdxl_otlp_pushes",
            "Pushes of all metrics over OTLP, by what became of them.",
            ("result",),
            registry=registry,
        )
        self.record_failures = Counter(
            "sdxl_record_failures",
            "Finished requests whose spans or metrics could not be recorded.",
            registry=registry,
        )
        _children(self.spans, SPAN_RESULTS)
        _children(self.pushes, PUSH_RESULTS)
        Gauge(
            "sdxl_build_info",
            "Always 1; the labels say what is running.",
            tuple(build),
            registry=registry,
        ).labels(*build.values()).set(1)
        self._peak_flops: Gauge | None = None

    def peak_flops(self, registry: CollectorRegistry) -> Gauge:
        """Declared when it is known: a share of a peak of 0 is no share."""
        if self._peak_flops is None:
            self._peak_flops = Gauge(
                "sdxl_peak_flops_per_second",
                "Rated dense bf16 FLOPs a second of the GPU, or what SDXL_PEAK_TFLOPS says.",
                registry=registry,
            )
        return self._peak_flops


class _OwnRegistry(CollectorRegistry):
    """A registry that another can hold as a collector, and that says its names when it is added."""

    def describe(self) -> Iterable[Metric]:
        return self.collect()


class _Guarded:
    """A collector that cannot break a scrape."""

    def __init__(self, collector: Collector, failed: Callable[[], None]) -> None:
        self._collector = collector
        self._failed = failed

    def describe(self) -> Iterable[Metric]:
        describe = getattr(self._collector, "describe", self._collector.collect)
        return list(describe())

    def collect(self) -> Iterable[Metric]:
        try:
            return list(self._collector.collect())
        except Exception:
            self._failed()
            logger.exception("%s failed in a scrape", type(self._collector).__name__)
            return []


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The registry as text, and its content type: OpenMetrics, which alone carries exemplars, when
    the Accept header asks for it, else Prometheus text. Milliseconds of work: call it off the
    event loop."""
    encoder, content_type = choose_encoder(accept)
    return encoder(registry), content_type


def _children(metric: Labelled, values: Iterable[str]) -> dict[str, Labelled]:
    """The metric's series by their one label's value; each exists from now on."""
    return {value: metric.labels(value) for value in values}


def _observe(
    histogram: Histogram, value: float, exemplar: Exemplar, fault: Callable[[str], None]
) -> None:
    if _holds(value, fault):
        histogram.observe(value, exemplar)


def _holds(value: float, fault: Callable[[str], None]) -> bool:
    """Whether a sum can hold the value; one NaN or step backwards would spoil it for good."""
    if 0 <= value < math.inf:
        return True
    fault("negative_value" if value < 0 else "not_a_number")
    return False


def _characters(exemplar: Mapping[str, str]) -> int:
    return sum(len(name) + len(value) for name, value in exemplar.items())


def _cancelled_during(request: RequestTiming) -> str:
    if request.run is None:
        return "waiting"
    return "running" if request.stage("image_encode") is None else "answering"
