"""Every metric of the service behind one object, `GenerationMetrics`.

`families/` declares the metrics, in a registry of their own. The process's registry shows that
registry; each test uses its own. Label values come from closed sets given at construction or by
the caller's types (warm shape, stage, outcome, error type), never from a request's content. Every
series exists from the start, so the number of series does not depend on requests, and a rate has a
zero to rise from.

Nothing here raises for a value that cannot be exported (a negative time, NaN, an exemplar over
OpenMetrics' limit, a name declared twice, a driver that stops answering). Such a value is left out
and counted by `sdxl_telemetry_faults_total{fault}`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from metrics.buckets import BucketFamilies
from metrics.families.budget import Budget
from metrics.families.observing import Exemplar
from metrics.families.process import (
    DROPPED_CONNECTIONS,
    PUSH_RESULTS,
    SPAN_RESULTS,
    ProcessMetrics,
)
from metrics.families.requests import RequestMetrics
from metrics.families.runs import RunFlops, RunMetrics
from metrics.records import RequestTiming, RunTiming

__all__ = [
    "DROPPED_CONNECTIONS",
    "FAULTS",
    "PUSH_RESULTS",
    "SPAN_RESULTS",
    "BucketFamilies",
    "GenerationMetrics",
    "RunFlops",
    "render",
]

logger = logging.getLogger(__name__)

FAULTS = (
    "negative_value",  # a clock stepped backwards
    "not_a_number",
    "exemplar_too_long",
    "declared_twice",
    "nvml",  # the GPU's driver did not answer
    "collector",  # a collector raised during a scrape
)
"""What telemetry had to leave out: the values of `sdxl_telemetry_faults_total{fault}`."""

# OpenMetrics' limit for the names and values of an exemplar's labels together. Above it,
# prometheus_client raises, but only after it has counted the bucket.
_EXEMPLAR_CHARACTERS = 128

_OPENMETRICS = "application/openmetrics-text"
_QUALITY = re.compile(r"0(\.[0-9]*)?|1(\.0*)?")


class GenerationMetrics:
    """Declares the service's metrics and observes finished timings.

    Args:
        registry: shows the metrics. If it already holds metrics of these names, from another
            service in this process, those stay and these get a registry of their own: see the
            attribute `registry`.
        endpoints, outcomes, error_types: the closed sets of label values the server uses.
        rejections: the error types that refuse a request before any work is done for it.
        loras: the names of the LoRAs that requests may use.
        api_keys: the names of the callers' keys.
        build: labels of `sdxl_build_info`.

    Attributes:
        registry: the registry that a scrape of this service renders.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        endpoints: Sequence[str],
        outcomes: Sequence[str],
        error_types: Sequence[str],
        rejections: Sequence[str] = (),
        loras: Sequence[str] = (),
        api_keys: Sequence[str] = (),
        build: Mapping[str, str],
        bucket_families: BucketFamilies | None = None,
    ) -> None:
        families = bucket_families or BucketFamilies()
        self._own = _OwnRegistry()
        self._peak_flops = 0.0
        self._faults = Counter(
            "sdxl_telemetry_faults",
            "Values that telemetry left out, by reason.",
            ("fault",),
            registry=self._own,
        )
        self._requests = RequestMetrics(
            self._own,
            families,
            self.fault,
            endpoints,
            outcomes,
            error_types,
            rejections,
            loras,
            api_keys,
        )
        self._runs = RunMetrics(self._own, families, self.fault)
        self._process = ProcessMetrics(self._own, build)
        for fault in FAULTS:
            self._faults.labels(fault)
        self.registry = registry
        try:
            registry.register(self._own)
        except ValueError:
            logger.warning(
                "another service of this process already shows metrics of these names; "
                "this service's metrics are on its own endpoint only"
            )
            self.fault("declared_twice")
            self.registry = self._own

    # The process

    def set_warm_shapes(self, shapes: Sequence[str], max_batch: int = 1) -> None:
        """Declare the label values of steps; every other shape is counted as `cold`.

        Args:
            max_batch: the most images of a run.
        """
        self._runs.declare(shapes, max_batch)

    def set_ready(self, ready: bool) -> None:
        self._process.ready.set(1 if ready else 0)

    def set_warmup_phase(self, phase: str, seconds: float) -> None:
        """`phase` must come from the warm-up's own closed set."""
        self._process.warmup_duration.labels(phase).set(seconds)

    def set_budget(self, budget: Budget) -> None:
        """From now on, count answered requests as within or over `budget`."""
        self._requests.budget = budget

    def set_flops(self, shape: str, flops: RunFlops) -> None:
        """From now on, count the FLOPs and the seconds of runs at a warm shape."""
        self._runs.flops[shape] = flops

    def set_peak_flops(self, flops_per_second: float) -> None:
        """Set the GPU's rated peak, dense bf16: the 100% of utilisation."""
        self._process.peak_flops(self._own).set(flops_per_second)
        self._peak_flops = flops_per_second

    @property
    def budget(self) -> Budget | None:
        """The latency budget; None before the model is warm."""
        return self._requests.budget

    @property
    def in_flight(self) -> int:
        """Requests received and not yet answered."""
        [family] = self._requests.in_flight.collect()
        return int(family.samples[0].value)

    def utilisation(self, run: RunTiming) -> float | None:
        """The share of the GPU's rated peak that the run's nominal FLOPs are; None: not known."""
        flops, seconds = self._runs.flops_of(run)
        return flops / seconds / self._peak_flops if self._peak_flops and seconds > 0 else None

    def show(self, collector: Collector) -> None:
        """Show the metrics of another collector of this service.

        A collector that raises is counted and left out of that scrape. One with names that exist
        already is counted and refused.
        """
        try:
            self._own.register(_Guarded(collector, lambda: self.fault("collector")))
        except ValueError:
            logger.warning("%s has metrics that are already declared", type(collector).__name__)
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

    # Connections, where this process listens by itself

    def set_connections(self, count: int) -> None:
        self._process.connections.set(count)

    def connection_dropped(self, reason: str) -> None:
        """Count a connection that the server closed; `reason` is one of `DROPPED_CONNECTIONS`."""
        self._process.connections_dropped.labels(reason).inc()

    # Requests, as they happen

    def request_received(self) -> None:
        self._requests.in_flight.inc()

    def request_answered(self) -> None:
        self._requests.in_flight.dec()

    def set_key_in_flight(self, name: str, count: int) -> None:
        """`name` is one of `api_keys`; any other is left out."""
        self._requests.set_key_in_flight(name, count)

    def set_waiting(self, count: int) -> None:
        self._requests.waiting.set(count)

    def upload_fell_back(self) -> None:
        self._requests.upload_fallbacks.inc()

    def prompt_truncated(self) -> None:
        self._requests.truncated_prompts.inc()

    def images_flagged(self, count: int) -> None:
        self._requests.flagged_images.inc(count)

    # Telemetry's own health

    def record_failed(self) -> None:
        self._process.record_failures.inc()

    def spans_ended(self, count: int) -> None:
        self._process.spans_ended.inc(count)

    def span_results(self, result: str, count: int) -> None:
        """Count spans by result, one of `SPAN_RESULTS`."""
        self._process.spans.labels(result).inc(count)

    def pushed(self, result: str) -> None:
        """Count a push of all metrics over OTLP by result, one of `PUSH_RESULTS`."""
        self._process.pushes.labels(result).inc()

    def fault(self, fault: str) -> None:
        """Count a value that telemetry left out; `fault` is one of `FAULTS`."""
        self._faults.labels(fault).inc()

    # Requests, after their end

    def observe_request(self, request: RequestTiming, exemplar: Exemplar) -> None:
        """Observe one request, and those of its runs that no other request observes.

        A profiled request is counted, but neither its times nor those of its profiled runs are
        observed: the profiler slows them down.

        Args:
            exemplar: `trace_id` and `span_id` if the trace was handed to the exporter, else None:
                an exemplar must lead to a trace.
        """
        if exemplar is not None and _characters(exemplar) > _EXEMPLAR_CHARACTERS:
            self.fault("exemplar_too_long")
            exemplar = None
        self._requests.count(request)
        if not any(run.profiled for run in request.runs):
            self._requests.observe(request, exemplar)
            for stage in request.stages:
                if stage.name != "queue":
                    self._runs.observe_stage(stage.name, stage.duration_ns, exemplar)
        for run in request.observed_runs:
            if not run.profiled:  # each run by itself: others may share it
                self._runs.observe(run, exemplar)


class _OwnRegistry(CollectorRegistry):
    """A registry that another registry can hold as a collector; it lists its names when added."""

    def describe(self) -> Iterable[Metric]:
        return self.collect()


class _Guarded:
    """A collector whose exceptions do not break a scrape."""

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
            logger.exception("%s failed during a scrape", type(self._collector).__name__)
            return []


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """Render the registry; returns the text and its content type.

    The format is OpenMetrics 1.0 if the Accept header likes it at least as well as text, else
    Prometheus text. Only OpenMetrics carries exemplars. Rendering takes milliseconds: call it off
    the event loop.
    """
    if _prefers_openmetrics(accept):
        text = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
        return text, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def _prefers_openmetrics(accept: str) -> bool:
    """Whether an Accept header asks for OpenMetrics rather than text.

    prometheus_client's own reading raises for a version that is quoted or no number, answers in a
    version that it does not write, and passes over the qualities.
    """
    qualities = {_OPENMETRICS: 0.0, "text/plain": 0.0}
    for part in accept.lower().split(","):
        media_type, *rest = (each.strip() for each in part.split(";"))
        parameters = {
            name.strip(): value.strip().strip('"')
            for name, _, value in (each.partition("=") for each in rest)
        }
        if media_type == _OPENMETRICS and parameters.get("version", "1.0.0") != "1.0.0":
            continue
        if media_type in qualities:
            quality = parameters.get("q", "")
            given = float(quality) if _QUALITY.fullmatch(quality) else 1.0
            qualities[media_type] = max(qualities[media_type], given)
    return 0 < qualities[_OPENMETRICS] >= qualities["text/plain"]


def _characters(exemplar: Mapping[str, str]) -> int:
    return sum(len(name) + len(value) for name, value in exemplar.items())
