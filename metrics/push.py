"""Pushes the metrics over OTLP, for a runner that nothing can scrape.

A push reads the registry as a scrape does, with exemplars, and converts it to OTLP. A thread of its
own pushes periodically, and once more at the end. A failed push is counted and has no other effect.

With delta temporality (Datadog accepts no other) a push contains what happened since the last push
that arrived, so a failed push loses nothing.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Metric as OtlpMetric
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

logger = logging.getLogger(__name__)

# Prometheus has the unit in the name, OTLP in a field of its own, in UCUM.
_UNITS = {
    "_seconds": "s",
    "_bytes": "By",
    "_ratio": "1",
    "_celsius": "Cel",
    "_watts": "W",
    "_hertz": "Hz",
}

_Labels = tuple[tuple[str, str], ...]
_Series = tuple[str, _Labels]


@dataclass(frozen=True, slots=True)
class _Total:
    """The total of a counter or a histogram; `buckets` are counts between bounds."""

    value: float
    buckets: tuple[float, ...] = ()

    def since(self, before: _Total | None) -> _Total:
        """The difference; the whole total if the series is new or was reset."""
        if before is None or self.value < before.value or len(self.buckets) != len(before.buckets):
            return self
        pairs = zip(self.buckets, before.buckets, strict=True)
        return _Total(self.value - before.value, tuple(now - then for now, then in pairs))


class MetricsPush:
    """Pushes a registry's metrics with an OTLP exporter.

    Args:
        registry: the registry to push.
        exporter: an `OTLPMetricExporter`; it reads the standard `OTEL_EXPORTER_OTLP_*` variables.
        resource: describes the process; the same as the spans'.
        delta: push differences instead of totals.
        period_seconds: time between pushes.
        on_pushed: called with a value of `catalogue.PUSH_RESULTS` for every push.
        take_rejected: returns how many points of accepted pushes the backend refused since the last
            call. They are not pushed again: it would refuse them again.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        exporter: MetricExporter,
        resource: Resource,
        *,
        delta: bool,
        period_seconds: float,
        on_pushed: Callable[[str], None],
        take_rejected: Callable[[], int] = lambda: 0,
        unix_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._registry = registry
        self._exporter = exporter
        self._resource = resource
        self._delta = delta
        self._period_seconds = period_seconds
        self._on_pushed = on_pushed
        self._take_rejected = take_rejected
        self._unix_ns = unix_ns
        self._began_ns = unix_ns()
        self._arrived_ns = self._began_ns
        self._last_totals: dict[_Series, _Total] = {}
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="metrics-push", daemon=True)
        self._thread.start()

    def push(self) -> bool:
        """Push once; returns whether it arrived. Never raises."""
        reading = _Reading(
            self._began_ns,
            self._arrived_ns,
            # If the wall clock stepped back, the interval must still end after its start.
            max(self._unix_ns(), self._arrived_ns + 1),
            self._last_totals if self._delta else None,
        )
        try:
            data = MetricsData(
                [
                    ResourceMetrics(
                        resource=self._resource,
                        scope_metrics=[
                            ScopeMetrics(
                                scope=InstrumentationScope("stepspan"),
                                metrics=list(reading.metrics(self._registry.collect())),
                                schema_url="",
                            )
                        ],
                        schema_url="",
                    )
                ]
            )
            arrived = self._exporter.export(data) is MetricExportResult.SUCCESS
        except Exception:
            logger.exception("the metrics could not be pushed")
            arrived = False
        if arrived:
            self._arrived_ns = reading.now_ns
            self._last_totals = reading.totals
            self._on_pushed("partial" if self._take_rejected() else "exported")
        else:
            self._on_pushed("failed")
        return arrived

    def begin_end(self) -> None:
        """Push a last time, then stop. Returns at once."""
        self._ending.set()

    def end(self, budget_seconds: float) -> None:
        """Wait for the last push, for at most the budget."""
        self._ending.set()
        if self._thread is None:
            return
        self._thread.join(budget_seconds)
        if self._thread.is_alive():
            logger.warning("the last metrics were not pushed within the time allowed at shutdown")

    def _work(self) -> None:
        while not self._ending.wait(self._period_seconds):
            self.push()
        self.push()
        self._exporter.shutdown()


class _Reading:
    """One reading of the registry, converted to OTLP.

    Args:
        last_totals: the totals of the last push that arrived, for differences; None: push totals.
    """

    def __init__(
        self,
        began_ns: int,
        arrived_ns: int,
        now_ns: int,
        last_totals: Mapping[_Series, _Total] | None,
    ) -> None:
        self.now_ns = now_ns
        self.totals: dict[_Series, _Total] = {}
        # Before the first push, all exemplars are new.
        self._exemplars_after_ns = 0 if arrived_ns == began_ns else arrived_ns
        self._last_totals = last_totals
        self._start_ns = began_ns if last_totals is None else arrived_ns
        self._temporality = (
            AggregationTemporality.CUMULATIVE
            if last_totals is None
            else AggregationTemporality.DELTA
        )

    def metrics(self, families: Iterable[Metric]) -> Iterator[OtlpMetric]:
        for family in families:
            data: Sum | Gauge | Histogram
            if family.type == "counter":
                points = [
                    self._sum(family, sample)
                    for sample in family.samples
                    if sample.name.endswith("_total")
                ]
                data = Sum(points, self._temporality, is_monotonic=True)
            elif family.type == "histogram":
                data = Histogram(list(self._histograms(family)), self._temporality)
            else:
                data = Gauge([self._gauge(sample) for sample in family.samples])
            if not data.data_points:
                continue  # nothing has happened yet
            unit = next((u for end, u in _UNITS.items() if family.name.endswith(end)), "")
            yield OtlpMetric(family.name, family.documentation, unit, data)

    def _gauge(self, sample: Sample) -> NumberDataPoint:
        return NumberDataPoint(sample.labels, 0, self.now_ns, float(sample.value))

    def _sum(self, family: Metric, sample: Sample) -> NumberDataPoint:
        total = self._difference((family.name, _key(sample.labels)), _Total(float(sample.value)))
        return NumberDataPoint(
            sample.labels, self._start_ns, self.now_ns, total.value, self._exemplars([sample])
        )

    def _histograms(self, family: Metric) -> Iterator[HistogramDataPoint]:
        """One point for each label set. A family's samples are grouped by label set."""
        for labels, group in itertools.groupby(family.samples, lambda s: _key(s.labels, "le")):
            samples = list(group)
            buckets = [sample for sample in samples if sample.name.endswith("_bucket")]
            sums = [sample.value for sample in samples if sample.name.endswith("_sum")]
            if not buckets:
                continue
            counts = [float(sample.value) for sample in buckets]
            between = tuple(
                now - before for before, now in itertools.pairwise(itertools.chain([0.0], counts))
            )
            total = self._difference(
                (family.name, labels), _Total(sums[0] if sums else 0.0, between)
            )
            bounds = [float(sample.labels["le"]) for sample in buckets]
            yield HistogramDataPoint(
                attributes=dict(labels),
                start_time_unix_nano=self._start_ns,
                time_unix_nano=self.now_ns,
                count=round(sum(total.buckets)),
                sum=total.value,
                bucket_counts=[round(count) for count in total.buckets],
                explicit_bounds=[bound for bound in bounds if math.isfinite(bound)],
                # Unknown: the protocol allows it, the SDK's types do not.
                min=None,  # type: ignore[arg-type]
                max=None,  # type: ignore[arg-type]
                exemplars=self._exemplars(buckets),
            )

    def _difference(self, series: _Series, total: _Total) -> _Total:
        self.totals[series] = total
        return total if self._last_totals is None else total.since(self._last_totals.get(series))

    def _exemplars(self, samples: Sequence[Sample]) -> list[Exemplar]:
        """The exemplars that no push has contained yet."""
        return [
            exemplar
            for sample in samples
            if (exemplar := _exemplar(sample.exemplar)) is not None
            and exemplar.time_unix_nano > self._exemplars_after_ns
        ]


def _key(labels: Mapping[str, str], without: str | None = None) -> _Labels:
    return tuple((name, value) for name, value in labels.items() if name != without)


def _exemplar(exemplar: Any) -> Exemplar | None:
    """Convert prometheus_client's exemplar to the SDK's; None if it has no trace."""
    if exemplar is None or not {"trace_id", "span_id"} <= exemplar.labels.keys():
        return None
    return Exemplar(
        filtered_attributes={},
        value=float(exemplar.value),
        time_unix_nano=round((exemplar.timestamp or 0) * 1e9),
        trace_id=int(exemplar.labels["trace_id"], 16),
        span_id=int(exemplar.labels["span_id"], 16),
    )
