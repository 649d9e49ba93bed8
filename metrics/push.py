"""The metrics pushed over OTLP, for a runner that nothing can scrape.

One declaration serves both ways: a push reads the registry as a scrape does, exemplars included,
and says the same in OTLP's words. It happens on a thread of its own every so often and once more at
the end; a backend that is down costs a count and nothing else.

Delta temporality (Datadog takes no other) tells what happened since the last push that arrived: one
that fails is not lost but told by the next.
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

# Prometheus has the unit in the name, OTLP beside it, in UCUM.
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
    """What a counter or a histogram has come to; `buckets` are counts between bounds."""

    value: float
    buckets: tuple[float, ...] = ()

    def since(self, before: _Total | None) -> _Total:
        """The difference; all of it where the series is new or has begun again."""
        if before is None or self.value < before.value or len(self.buckets) != len(before.buckets):
            return self
        pairs = zip(self.buckets, before.buckets, strict=True)
        return _Total(self.value - before.value, tuple(now - then for now, then in pairs))


class MetricsPush:
    """Pushes a registry's metrics with an OTLP exporter.

    Args:
        registry: what a scrape would render.
        exporter: an `OTLPMetricExporter`; it reads the standard `OTEL_EXPORTER_OTLP_*` variables.
        resource: what the metrics are said to come from; the same as the spans'.
        delta: tell differences instead of totals.
        period_seconds: from one push to the next.
        on_pushed: told a value of `catalogue.PUSH_RESULTS` for every push.
        take_rejected: how many points the backend has refused of the pushes it took, since last
            asked. They are not told again: it would refuse them again.
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
        self._told: dict[_Series, _Total] = {}
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="metrics-push", daemon=True)
        self._thread.start()

    def push(self) -> bool:
        """Push once. Never raises; whether it arrived."""
        reading = _Reading(
            self._began_ns,
            self._arrived_ns,
            # A wall clock that stepped back must not make an interval end before it began.
            max(self._unix_ns(), self._arrived_ns + 1),
            self._told if self._delta else None,
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
            self._told = reading.totals
            self._on_pushed("partial" if self._take_rejected() else "exported")
        else:
            self._on_pushed("failed")
        return arrived

    def begin_end(self) -> None:
        """Everything has been counted: push a last time, then no more. Returns at once."""
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
    """One look at the registry, in OTLP's words.

    Args:
        told: what the last push that arrived came to, for differences; None for totals.
    """

    def __init__(
        self,
        began_ns: int,
        arrived_ns: int,
        now_ns: int,
        told: Mapping[_Series, _Total] | None,
    ) -> None:
        self.now_ns = now_ns
        self.totals: dict[_Series, _Total] = {}
        # Of what happened before the first push, all exemplars are news.
        self._exemplars_after_ns = 0 if arrived_ns == began_ns else arrived_ns
        self._told = told
        self._start_ns = began_ns if told is None else arrived_ns
        self._temporality = (
            AggregationTemporality.CUMULATIVE if told is None else AggregationTemporality.DELTA
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
        """One point for each set of labels; a family's samples of one set stand together."""
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
                # Not known, which the protocol allows and the SDK's types do not.
                min=None,  # type: ignore[arg-type]
                max=None,  # type: ignore[arg-type]
                exemplars=self._exemplars(buckets),
            )

    def _difference(self, series: _Series, total: _Total) -> _Total:
        self.totals[series] = total
        return total if self._told is None else total.since(self._told.get(series))

    def _exemplars(self, samples: Sequence[Sample]) -> list[Exemplar]:
        """Those that no push has told yet."""
        return [
            exemplar
            for sample in samples
            if (exemplar := _exemplar(sample.exemplar)) is not None
            and exemplar.time_unix_nano > self._exemplars_after_ns
        ]


def _key(labels: Mapping[str, str], without: str | None = None) -> _Labels:
    return tuple((name, value) for name, value in labels.items() if name != without)


def _exemplar(exemplar: Any) -> Exemplar | None:
    """prometheus_client's exemplar as the SDK's; None where it names no trace."""
    if exemplar is None or not {"trace_id", "span_id"} <= exemplar.labels.keys():
        return None
    return Exemplar(
        filtered_attributes={},
        value=float(exemplar.value),
        time_unix_nano=round((exemplar.timestamp or 0) * 1e9),
        trace_id=int(exemplar.labels["trace_id"], 16),
        span_id=int(exemplar.labels["span_id"], 16),
    )
