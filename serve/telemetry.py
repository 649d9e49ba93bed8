"""The settings' tracing, built: sampler, exporter and what the spans are said to come from."""

from __future__ import annotations

import os
import uuid
from importlib.metadata import version

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    ParentBased,
    Sampler,
    TraceIdRatioBased,
)

from metrics.gpu import Gpu
from metrics.tracing import SettledSpans, Tracing, otlp_exporter, ratio_sampler
from serve.settings import ServeSettings


def build_tracing(settings: ServeSettings, on_settled: SettledSpans) -> Tracing:
    """Tracing as configured; without an endpoint nothing is exported and nothing complains."""
    return Tracing(
        sampler=build_sampler(settings),
        exporter=otlp_exporter() if settings.tracing_enabled else None,
        resource=build_resource(settings),
        on_settled=on_settled,
        version=version("stepspan"),
    )


def build_sampler(settings: ServeSettings) -> Sampler:
    """The head decision: `OTEL_TRACES_SAMPLER` where it is set, else parent-based at the rate."""
    rate = settings.sample_rate
    if rate is None:
        rate = settings.traces_sampler_arg
    if rate is None:
        rate = 1.0
    match settings.traces_sampler:
        case None | "parentbased_traceidratio":
            return ratio_sampler(rate)
        case "traceidratio":
            return TraceIdRatioBased(rate)
        case "always_on":
            return ALWAYS_ON
        case "always_off":
            return ALWAYS_OFF
        case "parentbased_always_on":
            return ParentBased(ALWAYS_ON)
        case "parentbased_always_off":
            return ParentBased(ALWAYS_OFF)


def build_resource(settings: ServeSettings) -> Resource:
    """Service name, version and instance; the runner where fal names one.

    The SDK merges `OTEL_RESOURCE_ATTRIBUTES` in; what is set here stands, and a service name is
    set here only where `OTEL_SERVICE_NAME` or nothing at all names one.
    """
    attributes = {
        "service.version": version("stepspan"),
        "service.instance.id": str(uuid.uuid4()),
    }
    named_elsewhere = "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if settings.service_name or not named_elsewhere:
        attributes["service.name"] = settings.service_name or "stepspan"
    # What fal's documentation says it sets on a runner.
    for name, variable in (("fal.runner.id", "FAL_JOB_ID"), ("fal.app.name", "FAL_APP_NAME")):
        if value := os.environ.get(variable):
            attributes[name] = value
    if (gpu := Gpu.open(settings.device)) is not None:
        attributes |= gpu.identity
    return Resource.create(attributes)
