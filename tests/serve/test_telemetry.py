from __future__ import annotations

import pytest
from opentelemetry.sdk.trace.sampling import Decision

from serve.settings import ServeSettings
from serve.telemetry import build_resource, build_sampler


@pytest.mark.parametrize(
    ("sampler", "argument", "description"),
    [
        (None, None, "ParentBased{root:TraceIdRatioBased{1.0}"),
        (None, 0.5, "ParentBased{root:TraceIdRatioBased{0.5}"),
        ("parentbased_traceidratio", 0.5, "ParentBased{root:TraceIdRatioBased{0.5}"),
        ("traceidratio", 0.5, "TraceIdRatioBased{0.5}"),
        ("always_on", None, "AlwaysOnSampler"),
        ("always_off", None, "AlwaysOffSampler"),
        ("parentbased_always_on", None, "ParentBased{root:AlwaysOnSampler"),
        ("parentbased_always_off", None, "ParentBased{root:AlwaysOffSampler"),
    ],
)
def test_the_standard_samplers(
    sampler: str | None, argument: float | None, description: str
) -> None:
    values = {"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument}
    settings = ServeSettings.model_validate(values)
    assert build_sampler(settings).get_description().startswith(description)


def test_fals_rate_is_the_ratio() -> None:
    settings = ServeSettings.model_validate({"OTEL_SAMPLE_RATE": 0.0})
    decision = build_sampler(settings).should_sample(None, 1, "text-to-image")
    assert decision.decision is Decision.DROP


def test_the_resource_says_who_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAL_JOB_ID", "runner-7")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    first = build_resource(ServeSettings(device="cpu")).attributes
    second = build_resource(ServeSettings(device="cpu")).attributes
    assert first["service.name"] == "stepspan"
    assert first["service.version"]
    assert first["fal.runner.id"] == "runner-7"
    assert first["deployment.environment.name"] == "test"
    assert first["service.instance.id"] != second["service.instance.id"]


@pytest.mark.parametrize(
    ("explicit", "attributes", "expected"),
    [
        (None, "", "stepspan"),
        (None, "service.name=foo", "foo"),
        ("bar", "service.name=foo", "bar"),
    ],
)
def test_whoever_names_the_service_is_heard(
    monkeypatch: pytest.MonkeyPatch, explicit: str | None, attributes: str, expected: str
) -> None:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", attributes)
    settings = ServeSettings.model_validate({"OTEL_SERVICE_NAME": explicit, "device": "cpu"})
    assert build_resource(settings).attributes["service.name"] == expected
