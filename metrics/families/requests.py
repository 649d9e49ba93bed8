"""Metrics of requests: durations, images, failures, the latency budget."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from metrics.buckets import ESTIMATE_RATIO, BucketFamilies
from metrics.families.budget import Budget
from metrics.families.observing import CountFault, Exemplar, labelled, observe
from metrics.records import RequestTiming
from metrics.slow_reason import SLOW_REASONS, slow_reason

OTHER_ENDPOINT = "other"
"""The label of an endpoint that the server did not declare."""

CANCELLED_DURING = ("waiting", "running", "answering")
"""When a client disconnected: before its run, during it, or after the image was drawn."""

BUDGET_RESULTS = ("within", "over")


class RequestMetrics:
    """Durations, results and failures of requests."""

    def __init__(
        self,
        registry: CollectorRegistry,
        families: BucketFamilies,
        count_fault: CountFault,
        endpoints: Sequence[str],
        outcomes: Sequence[str],
        error_types: Sequence[str],
        rejections: Sequence[str],
        loras: Sequence[str] = (),
        api_keys: Sequence[str] = (),
    ) -> None:
        self._count_fault = count_fault
        self._error_types = frozenset(error_types)
        self._rejections = frozenset(rejections)
        self.budget: Budget | None = None

        duration = Histogram(
            "sdxl_request_duration_seconds",
            "Time from when a request's head was read to its response's last byte written.",
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
        self._estimate_ratio = Histogram(
            "sdxl_estimate_ratio",
            "Time of an answered request from being queued until its images were stored, over the "
            "time that was estimated when it was queued.",
            registry=registry,
            buckets=ESTIMATE_RATIO,
        )
        self._image_bytes = Histogram(
            "sdxl_image_bytes",
            "Size of an encoded image that was returned.",
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
        self._images = Counter("sdxl_images", "Images returned.", registry=registry)
        self._errors = labelled(
            Counter(
                "sdxl_errors",
                "Requests that failed, by type of error.",
                ("error_type",),
                registry=registry,
            ),
            (*error_types, "internal"),
        )
        self._rejected = labelled(
            Counter(
                "sdxl_rejections",
                "Requests refused before any work was done for them, by reason.",
                ("reason",),
                registry=registry,
            ),
            rejections,
        )
        self._cancelled = labelled(
            Counter(
                "sdxl_cancelled",
                "Requests whose client disconnected, by when.",
                ("during",),
                registry=registry,
            ),
            CANCELLED_DURING,
        )
        self._slow = labelled(
            Counter(
                "sdxl_slow_requests",
                "Requests that were slow for a reason that the service knows, by reason.",
                ("reason",),
                registry=registry,
            ),
            SLOW_REASONS,
        )
        self._budgeted = labelled(
            Counter(
                "sdxl_request_budget",
                "Answered requests within and over the latency budget for their shape and steps.",
                ("result",),
                registry=registry,
            ),
            BUDGET_RESULTS,
        )
        self._non_finite_outputs = Counter(
            "sdxl_non_finite_outputs",
            "Requests that failed because their pixels were not finite.",
            registry=registry,
        )
        self.upload_fallbacks = Counter(
            "sdxl_upload_fallbacks",
            "Images returned inline because their upload failed.",
            registry=registry,
        )
        self._loras = labelled(
            Counter(
                "sdxl_lora_requests",
                "Valid requests that asked for a LoRA, by its name.",
                ("lora",),
                registry=registry,
            ),
            loras,
        )
        by_key = Counter(
            "sdxl_api_key_requests",
            "Requests with an API key, by the key's name and by how they ended.",
            ("api_key", "outcome"),
            registry=registry,
        )
        self._by_key = {
            (name, outcome): by_key.labels(name, outcome)
            for name in dict.fromkeys(api_keys)
            for outcome in outcomes
        }
        self._in_flight_by_key = labelled(
            Gauge(
                "sdxl_api_key_requests_in_flight",
                "Requests with an API key received and not yet answered, by the key's name.",
                ("api_key",),
                registry=registry,
            ),
            api_keys,
        )
        self.truncated_prompts = Counter(
            "sdxl_truncated_prompts",
            "Requests whose prompt a text encoder cut.",
            registry=registry,
        )
        self.flagged_images = Counter(
            "sdxl_flagged_images",
            "Images that the safety checker flagged; they were returned black.",
            registry=registry,
        )

    def set_key_in_flight(self, name: str, count: int) -> None:
        if name in self._in_flight_by_key:
            self._in_flight_by_key[name].set(count)

    def count(self, request: RequestTiming) -> None:
        by_key = self._by_key.get((request.api_key or "", request.outcome))
        if by_key is not None:
            by_key.inc()
        for name, _ in () if request.facts is None else request.facts.loras:
            if name in self._loras:
                self._loras[name].inc()
        if request.failure is not None:
            self._count_failure(request, request.failure.error_type)
        elif request.outcome == "ok" and request.runs:
            self._images.inc(1 if request.facts is None else request.facts.num_images)

    def observe(self, request: RequestTiming, exemplar: Exemplar) -> None:
        seconds = request.duration_ns / 1e9
        duration = self._durations.get((request.endpoint, request.outcome))
        if duration is None:
            known = (request.endpoint, "error") in self._durations
            endpoint = request.endpoint if known else OTHER_ENDPOINT
            duration = self._durations.get((endpoint, request.outcome))
            duration = duration or self._durations[endpoint, "error"]
        observe(duration, seconds, exemplar, self._count_fault)
        if (queue_ns := request.stage_ns("queue")) is not None:
            observe(self._queue_duration, queue_ns / 1e9, exemplar, self._count_fault)
        if (reason := slow_reason(request)) is not None:
            self._slow[reason].inc(1, exemplar)
        if request.failure is None and request.outcome == "ok" and request.runs:
            for size in request.image_bytes:
                observe(self._image_bytes, size, exemplar, self._count_fault)
            self._count_budget(request, seconds, exemplar)
            self._observe_estimate(request, exemplar)

    def _count_failure(self, request: RequestTiming, error_type: str) -> None:
        known = error_type in self._error_types
        self._errors[error_type if known else "internal"].inc()
        if error_type in self._rejections and not request.runs:
            self._rejected[error_type].inc()
        if error_type == "non_finite_output":
            self._non_finite_outputs.inc()
        if request.outcome == "cancelled":
            self._cancelled[_cancelled_during(request)].inc()

    def _count_budget(self, request: RequestTiming, seconds: float, exemplar: Exemplar) -> None:
        facts = request.facts
        if self.budget is None or facts is None:
            return
        steps = facts.steps_to_run * facts.num_images
        allowed = self.budget.seconds(facts.width, facts.height, steps)
        # NaN is over.
        self._budgeted["within" if seconds <= allowed else "over"].inc(1, exemplar)

    def _observe_estimate(self, request: RequestTiming, exemplar: Exemplar) -> None:
        estimate, upload = request.estimate, request.stage("upload")
        if estimate is not None and upload is not None and estimate.seconds > 0:
            ratio = (upload.end_ns - estimate.at_ns) / 1e9 / estimate.seconds
            observe(self._estimate_ratio, ratio, exemplar, self._count_fault)


def _cancelled_during(request: RequestTiming) -> str:
    if not request.runs:
        return "waiting"
    return "running" if request.stage("image_encode") is None else "answering"
