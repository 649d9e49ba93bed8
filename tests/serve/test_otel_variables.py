"""docs/otel-variables.md against the code: each standard variable is honoured, refused, or has no
effect and is said to have none."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import opentelemetry.environment_variables
import opentelemetry.sdk.environment_variables
import pytest
from prometheus_client import CollectorRegistry

from metrics.catalogue import GenerationMetrics
from serve.errors import ConfigurationError
from serve.settings import (
    ServeSettings,
    environment,
    environment_name,
    load_settings,
    variables_without_effect,
)
from serve.telemetry.finding import Severity
from serve.telemetry.settings_checks import check_settings
from serve.telemetry.setup import build_push, build_resource, build_sampling, build_tracing
from tests.serve.telemetry.doctor_cases import clean_environment_of_settings
from tests.support.certificates import client_certificate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "otel-variables.md"

STATES = ("honoured", "refused", "not applicable")


def documented() -> dict[str, tuple[str, str]]:
    """Each variable of the page: its state and the words about it."""
    table = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[1] in STATES:
            for name in re.findall(r"`(OTEL_\w+)`", cells[0]):
                assert name not in table
                table[name] = (cells[1], cells[2])
    return table


TABLE = documented()


def named(state: str) -> list[str]:
    return [name for name, (its_state, _) in TABLE.items() if its_state == state]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    clean_environment_of_settings(monkeypatch)
    sdks_own = logging.getLogger("opentelemetry")
    before = sdks_own.level
    yield
    sdks_own.setLevel(before)


# The list is complete


@pytest.mark.docs
def test_every_variable_of_the_installed_sdk_is_in_the_table() -> None:
    modules = (opentelemetry.environment_variables, opentelemetry.sdk.environment_variables)
    names = {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, str) and re.fullmatch(r"OTEL_[A-Z_]+", value)
    }
    assert len(names) > 80
    assert names <= TABLE.keys(), names - TABLE.keys()


@pytest.mark.docs
def test_every_variable_that_the_installed_sdk_names_is_in_the_table() -> None:
    """The modules above lack some that the SDK's code reads."""
    package = Path(opentelemetry.sdk.environment_variables.__file__).parents[2]
    code = "\n".join(
        path.read_text()
        for folder in ("sdk", "exporter", "context", "propagate", "trace", "metrics", "util")
        for path in (package / folder).rglob("*.py")
    )
    read = set(re.findall(r"environ\w*\W+(?:get\()?\"?(OTEL_[A-Z_]+)", code))
    assert len(read) > 20
    assert read <= TABLE.keys(), read - TABLE.keys()


@pytest.mark.docs
def test_the_table_is_what_the_code_knows() -> None:
    settings = {environment_name(field) for field in ServeSettings.model_fields}
    honoured = {name for name in settings if name.startswith("OTEL_")}
    # A switch that the SDK reads by itself; only its form is checked here.
    honoured.add("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED")
    assert set(named("honoured")) == honoured
    from serve.settings import otel_variables

    assert set(named("not applicable")) == set(otel_variables.NOT_APPLICABLE)
    assert set(named("refused")) == set(otel_variables.RESTRICTED) - honoured


# Honoured: another value makes another telemetry


def built_telemetry(registry: CollectorRegistry) -> dict[str, Any]:
    """Everything about the telemetry that the environment's settings build."""
    settings = load_settings()
    metrics = GenerationMetrics(
        registry, endpoints=(), outcomes=(), error_types=(), build={"version": "1"}
    )
    tracing = build_tracing(settings, metrics)
    resource = build_resource(settings)
    push = build_push(settings, metrics, resource)
    attributes = dict(resource.attributes)
    if len(str(attributes["service.instance.id"])) == 36:
        del attributes["service.instance.id"]  # drawn
    found: dict[str, Any] = {
        "sampling": build_sampling(settings).sampler.get_description(),
        "resource": attributes,
        "exporting": tracing.exporting,
        "level": logging.getLogger("opentelemetry").getEffectiveLevel(),
        "pushes": push is not None,
    }
    if push is not None:
        found["metrics"] = (push._delta, push._period_seconds, *exporter_parts(push._exporter))
    if tracing._provider is not None:
        processor = tracing._provider._active_span_processor._span_processors[1]
        batches: Any = processor._batch_processor  # type: ignore[attr-defined]
        exporter = batches._exporter._exporter
        found |= {
            "limits": str(vars(tracing._provider._span_limits)),
            "batches": (
                batches._queue.maxlen,
                batches._max_export_batch_size,
                batches._schedule_delay,
            ),
            "exporter": type(exporter).__name__,
            "of itself": registry.get_sample_value("otel_sdk_processor_span_queue_capacity"),
            "of itself in all": sum(
                name.startswith("otel_sdk")
                for name in (family.name for family in registry.collect())
            ),
        }
        if hasattr(exporter, "_client"):
            found["spans"] = exporter_parts(exporter)
    tracing.shutdown(0.1)
    return found


def exporter_parts(exporter: Any) -> tuple[Any, ...]:
    client = exporter._client
    session = client._transport._session
    return (
        client._endpoint,
        sorted(client._headers.items()),
        client._timeout,
        client._compression,
        session.verify,
        session.cert or None,
    )


BASE = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
    "SDXL_OTLP_METRICS": "true",
}

# Another value than the default's, and what has to be set beside it.
SAMPLES: dict[str, tuple[str, dict[str, str]]] = {
    "OTEL_SDK_DISABLED": ("true", {}),
    "OTEL_TRACES_EXPORTER": ("console", {}),
    "OTEL_METRICS_EXPORTER": ("otlp,prometheus", {"SDXL_OTLP_METRICS": ""}),
    "OTEL_LOG_LEVEL": ("error", {}),
    "OTEL_TRACES_SAMPLER": ("always_off", {}),
    "OTEL_TRACES_SAMPLER_ARG": ("0.25", {}),
    "OTEL_SAMPLE_RATE": ("0.25", {}),
    "OTEL_SERVICE_NAME": ("mine", {}),
    "OTEL_RESOURCE_ATTRIBUTES": ("service.version=7", {}),
    "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": ("process", {}),
    "OTEL_BSP_MAX_QUEUE_SIZE": ("777", {}),
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": ("77", {}),
    "OTEL_BSP_SCHEDULE_DELAY": ("77", {}),
    "OTEL_BSP_EXPORT_TIMEOUT": ("777", {}),
    "OTEL_METRIC_EXPORT_INTERVAL": ("7777", {}),
    "OTEL_METRIC_EXPORT_TIMEOUT": ("777", {}),
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": ("delta", {}),
    "OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED": ("false", {}),
}
for name in named("honoured"):
    if name.endswith("_LIMIT"):
        SAMPLES[name] = ("7", {})
    elif name.endswith("_ENDPOINT"):
        SAMPLES[name] = ("http://127.0.0.1:10/x", {})
    elif name.endswith("_HEADERS"):
        SAMPLES[name] = ("a-key=b%20c", {})
    elif name.endswith("OTLP_TIMEOUT") or re.search(r"OTLP_(TRACES|METRICS)_TIMEOUT", name):
        SAMPLES[name] = ("7", {})
    elif name.endswith("_COMPRESSION"):
        SAMPLES[name] = ("GZIP", {})
    elif name.endswith("_CERTIFICATE"):
        SAMPLES[name] = ("CERTIFICATE", {})
    elif name.endswith("_CLIENT_KEY"):
        SAMPLES[name] = ("KEY", {name.replace("KEY", "CERTIFICATE"): "CERTIFICATE"})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    certificate, key = client_certificate(tmp_path_factory.mktemp("tls"))
    return {"CERTIFICATE": str(certificate), "KEY": str(key)}


@pytest.mark.parametrize("name", named("honoured"))
def test_an_honoured_variable_changes_the_telemetry(
    name: str, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> None:
    value, beside = SAMPLES[name]
    for each, its_value in (BASE | beside).items():
        monkeypatch.setenv(each, files.get(its_value, its_value))
    if name.endswith("_CLIENT_KEY"):
        # The certificate's file is not enough without a key: take a file that has both.
        both = Path(files["KEY"]).with_name("both.pem")
        both.write_text(Path(files["CERTIFICATE"]).read_text() + Path(files["KEY"]).read_text())
        monkeypatch.setenv(name.replace("KEY", "CERTIFICATE"), str(both))
        value = str(both)
    elif name.endswith("_CLIENT_CERTIFICATE"):
        monkeypatch.setenv(name.replace("CERTIFICATE", "KEY"), files["KEY"])
        monkeypatch.setattr(environment, "refuse_unusable_certificates", lambda _: None)
    before = built_telemetry(CollectorRegistry())
    monkeypatch.setenv(name, files.get(value, value))
    assert built_telemetry(CollectorRegistry()) != before
    assert name not in dict(variables_without_effect())


WRONG = {
    "OTEL_SERVICE_NAME": None,  # any text
    "OTEL_RESOURCE_ATTRIBUTES": "no-value",
    "OTEL_EXPORTER_OTLP_HEADERS": "a=b%0Ac",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "a=b%0Ac",
    "OTEL_EXPORTER_OTLP_METRICS_HEADERS": "a=b%0Ac",
}


@pytest.mark.parametrize("name", [n for n in named("honoured") if WRONG.get(n, "") is not None])
def test_a_wrong_value_of_an_honoured_variable_stops_the_start(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (WRONG.get(name) or "no-such-value", WRONG.get(name) or "-1"):
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigurationError, match=name):
            load_settings()


@pytest.mark.parametrize("name", TABLE)
def test_an_empty_value_is_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each, value in BASE.items():
        monkeypatch.setenv(each, value)
    if name in BASE:
        monkeypatch.delenv("SDXL_OTLP_METRICS")
    before = built_telemetry(CollectorRegistry())
    monkeypatch.setenv(name, "")
    after = built_telemetry(CollectorRegistry())
    if name in BASE:
        assert not after["exporting"]
    elif name != "OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED":
        assert after == before
    assert name not in dict(variables_without_effect())


# Refused, except for what is named


@pytest.mark.parametrize("name", named("refused"))
def test_a_refused_variable_stops_the_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "no-such-value")
    with pytest.raises(ConfigurationError, match=name):
        load_settings()
    words = TABLE[name][1]
    if words.startswith("except"):
        allowed = re.findall(r"`([\w/]+)`", words.partition(":")[0].partition(";")[0])
        monkeypatch.setenv(name, ",".join(allowed))
        load_settings()
        assert name not in dict(variables_without_effect())


# Not applicable: it starts, and says so


@pytest.mark.parametrize("name", [*named("not applicable"), "OTEL_NO_SUCH_VARIABLE"])
def test_a_variable_without_effect_is_logged_and_noted_without_its_value(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    before = built_telemetry(CollectorRegistry())
    monkeypatch.setenv(name, "hunter2")
    caplog.clear()
    assert built_telemetry(CollectorRegistry()) == before
    [record] = [record for record in caplog.records if name in record.getMessage()]
    assert record.levelno == logging.WARNING
    [finding] = [f for f in check_settings(load_settings()) if name in f.text]
    assert finding.severity is Severity.NOTE
    assert "hunter2" not in record.getMessage() + finding.text + finding.advice


def test_a_misspelt_variable_is_told_with_the_one_that_may_be_meant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADRES", "api-key=hunter2")
    [(name, reason)] = variables_without_effect()
    assert name == "OTEL_EXPORTER_OTLP_HEADRES"
    assert "OTEL_EXPORTER_OTLP_HEADERS" in reason


@pytest.mark.parametrize("name", ["otel_service_name", "Otel_Propagators", "otel_config_file"])
def test_a_standard_name_in_lower_case_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigurationError, match=name.upper()):
        load_settings()
    assert name in os.environ
