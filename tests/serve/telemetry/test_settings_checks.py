"""The doctor's checks of the settings, with the backends' real hosts, without sending."""

from __future__ import annotations

import base64

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

from serve.settings import load_settings
from serve.telemetry.backends import BACKENDS, Backend
from serve.telemetry.finding import Severity
from serve.telemetry.trace_endpoint import trace_endpoint
from tests.serve.telemetry.doctor_cases import (
    DATADOG_HEADERS,
    ENDPOINT,
    GOOD,
    GRAFANA_BASIC,
    HEADERS,
    KEYS,
    TRACES_ENDPOINT,
    clean_environment_of_settings,
    examined,
    problems,
    said,
)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    clean_environment_of_settings(monkeypatch)


# Settings that are right


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_every_region_as_its_documentation_writes_it_is_right(
    monkeypatch: pytest.MonkeyPatch, backend: Backend
) -> None:
    for region in backend.regions:
        host = region.host.replace("*", "prod-eu-west-2")
        headers = GOOD.get(host, DATADOG_HEADERS)
        findings = examined(monkeypatch, **{ENDPOINT: backend.base_url(host), HEADERS: headers})
        assert {finding.severity for finding in findings} == {Severity.OK}, said(findings)
        [named] = [finding for finding in findings if finding.subject == "backend"]
        assert named.text == ", ".join(part for part in (backend.name, region.name) if part)


def test_the_seven_endpoints_of_fals_documentation_are_known() -> None:
    hosts = {
        "otlp.nr-data.net": ("New Relic", "US"),
        "otlp.eu01.nr-data.net": ("New Relic", "EU"),
        "otlp.datadoghq.com": ("Datadog", "US1"),
        "otlp.datadoghq.eu": ("Datadog", "EU"),
        "otlp-gateway-prod-us-east-0.grafana.net": ("Grafana Cloud", ""),
        "api.honeycomb.io": ("Honeycomb", "US"),
        "api.eu1.honeycomb.io": ("Honeycomb", "EU"),
    }
    for host, expected in hosts.items():
        [backend] = [backend for backend in BACKENDS if backend.owns(host)]
        region = backend.region_of(host)
        assert region is not None
        assert (backend.name, region.name) == expected


def test_any_other_endpoint_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = examined(monkeypatch, **{ENDPOINT: "http://127.0.0.1:4318"})
    assert {finding.severity for finding in findings} == {Severity.OK}
    assert "spans go to http://127.0.0.1:4318/v1/traces" in said(findings)


@pytest.mark.parametrize(
    "environment",
    [
        {ENDPOINT: "http://127.0.0.1:4318"},
        {ENDPOINT: "http://127.0.0.1:4318/"},
        {ENDPOINT: "http://127.0.0.1:4318/otlp"},
        {TRACES_ENDPOINT: "http://127.0.0.1:4318/anywhere"},
        {ENDPOINT: "http://127.0.0.1:1", TRACES_ENDPOINT: "http://127.0.0.1:2/v1/traces"},
        {ENDPOINT: "http://127.0.0.1:1", HEADERS: "a=1,b=Basic%20x%3D%3D"},
        {ENDPOINT: "http://127.0.0.1:1", HEADERS: "a=Basic x%3D%3D, b = 2 "},
        {
            ENDPOINT: "http://127.0.0.1:1",
            HEADERS: "a=1",
            "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "b=2",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "3",
            "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "4",
        },
    ],
)
def test_the_destination_is_the_exporters_own(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    exporter = OTLPSpanExporter()
    client = exporter._client
    destination = trace_endpoint(load_settings())
    assert destination is not None
    assert destination.url == exporter._endpoint
    assert destination.headers.items() <= client._headers.items()
    assert destination.timeout_seconds == client._timeout
    exporter.shutdown()


# Settings that are wrong


@pytest.mark.parametrize(
    ("environment", "problem", "advice"),
    [
        # The endpoint's form.
        (
            {ENDPOINT: "https://otlp.nr-data.net:4318/v1/traces"},
            "the path has /v1/traces twice",
            "OTEL_EXPORTER_OTLP_ENDPOINT=https://otlp.nr-data.net:4318",
        ),
        (
            {TRACES_ENDPOINT: "https://otlp.nr-data.net:4318"},
            "is used unchanged, and does not end in /v1/traces",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=https://otlp.nr-data.net:4318/v1/traces",
        ),
        (
            {ENDPOINT: "http://otlp.nr-data.net:4318"},
            "this host accepts https:// only",
            "=https://otlp.nr-data.net:4318",
        ),
        (
            {ENDPOINT: "https://otlp.datadoghq.com:4318"},
            "this host accepts OTLP/HTTP on port 443, not on 4318",
            "=https://otlp.datadoghq.com",
        ),
        (
            {TRACES_ENDPOINT: "https://api.honeycomb.io/v1/traces/v1/traces"},
            "the path has /v1/traces twice",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=https://api.honeycomb.io/v1/traces",
        ),
        (
            {ENDPOINT: "https://otlp-gateway-prod-us-east-0.grafana.net"},
            "before /v1/traces the path has nothing; Grafana Cloud needs /otlp",
            "=https://otlp-gateway-prod-us-east-0.grafana.net/otlp",
        ),
        (
            {ENDPOINT: "https://api.honeycomb.io/otlp"},
            "before /v1/traces the path has /otlp; Honeycomb needs nothing",
            "=https://api.honeycomb.io",
        ),
        (
            {ENDPOINT: "http://127.0.0.1:4317"},
            "port 4317 is by convention OTLP over gRPC",
            "4318",
        ),
        (
            {ENDPOINT: "http://me:hunter2hunter2@127.0.0.1:4318"},
            "contains a user name or password",
            "Authorization=Basic%20",
        ),
        # The backend's other hosts.
        (
            {ENDPOINT: "https://api.datadoghq.com"},
            "api.datadoghq.com belongs to Datadog and does not accept OTLP",
            "https://otlp.us3.datadoghq.com (US3)",
        ),
        (
            {ENDPOINT: "https://log-api.eu.newrelic.com"},
            "belongs to New Relic and does not accept OTLP",
            "https://otlp.eu01.nr-data.net:4318 (EU)",
        ),
        (
            {ENDPOINT: "https://mystack.grafana.net/tempo"},
            "belongs to Grafana Cloud and does not accept OTLP",
            "https://otlp-gateway-<zone>.grafana.net/otlp",
        ),
        # Keys.
        (
            {ENDPOINT: "https://otlp.nr-data.net:4318"},
            "there is no api-key",
            "OTEL_EXPORTER_OTLP_HEADERS=api-key=<ingest license key>",
        ),
        (
            {ENDPOINT: "https://otlp.nr-data.net:4318", HEADERS: DATADOG_HEADERS},
            "dd-api-key is the header of Datadog's key, not of New Relic's",
            "api-key=<ingest license key>",
        ),
        (
            {ENDPOINT: "https://otlp.nr-data.net", HEADERS: "api-key=NRAK-0123456789"},
            "is a user key",
            "api-key=<ingest license key>",
        ),
        (
            {
                ENDPOINT: "https://otlp.nr-data.net",
                HEADERS: GOOD["otlp.eu01.nr-data.net"],
            },
            "is of the EU region and the endpoint of US",
            "",
        ),
        (
            {ENDPOINT: "https://otlp.eu01.nr-data.net", HEADERS: GOOD["otlp.nr-data.net"]},
            "is not of the EU region",
            "",
        ),
        (
            {ENDPOINT: "https://otlp.datadoghq.com", HEADERS: f"dd-api-key={'0a' * 20}"},
            "has the form of an application key",
            "dd-api-key=<API key>",
        ),
        (
            {ENDPOINT: "https://api.honeycomb.io", HEADERS: "x-honeycomb-team=hcamk_0123456789"},
            "is a management key",
            "<ingest key>",
        ),
        (
            {ENDPOINT: "https://api.honeycomb.io", HEADERS: f"x-honeycomb-team={'0a' * 16}"},
            "needs x-honeycomb-dataset",
            "Append ,x-honeycomb-dataset=<dataset> to OTEL_EXPORTER_OTLP_HEADERS",
        ),
        *(
            (
                {
                    ENDPOINT: "https://otlp-gateway-prod-us-east-0.grafana.net/otlp",
                    HEADERS: f"Authorization={value}",
                },
                problem,
                "Authorization=Basic%20".lower(),
            )
            for value, problem in (
                (GRAFANA_BASIC, "is not of the form `Basic `"),
                ("Basic%20not-base64", "is not base64"),
                (f"Basic%20{base64.b64encode(b'no-colon-12345').decode()}", "instance id"),
                (f"Basic%20{base64.b64encode(b'me@x.test:glc_1').decode()}", "instance id"),
                (f"Basic%20{base64.b64encode(b'123:glsa_12345').decode()}", "service account"),
            )
        ),
        *(
            (
                {ENDPOINT: endpoint, HEADERS: f"Authorization=Basic%20{encoded}"},
                "the credentials inside the base64 of authorization have a line break",
                "printf",
            )
            for endpoint in (
                "https://otlp-gateway-prod-us-east-0.grafana.net/otlp",
                "http://127.0.0.1:1",
            )
            for encoded in (
                base64.b64encode(b"123:glc_12345\n").decode(),
                base64.b64encode(b"123\r\n:glc_12345").decode(),
            )
        ),
        # Headers of any backend.
        (
            {ENDPOINT: "http://127.0.0.1:1", HEADERS: f"Authorization=Basic {'abc' * 9}%3D"},
            "authorization is sent without decoding",
            "%20",
        ),
        (
            {ENDPOINT: "http://127.0.0.1:1", HEADERS: "api-key='0123456789'"},
            "api-key is sent with the quotation marks",
            "Remove",
        ),
        ({ENDPOINT: "http://127.0.0.1:1", HEADERS: "a=<API_KEY>"}, "a contains a placeholder", ""),
        ({ENDPOINT: "http://127.0.0.1:1", HEADERS: "a=${DD_API_KEY}"}, "a placeholder", ""),
        ({ENDPOINT: "http://127.0.0.1:1", HEADERS: "api-key="}, "has no value", "NAME=VALUE"),
        # The rest.
        ({}, "none is set, so no span is exported", "New Relic https://otlp.nr-data.net:4318;"),
        (
            {ENDPOINT: "http://127.0.0.1:1", "ENABLE_TRACING": "false"},
            "ENABLE_TRACING=false turns it off",
            "Unset",
        ),
        (
            {ENDPOINT: "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
            "OTEL_SDK_DISABLED=true turns it off",
            "Unset OTEL_SDK_DISABLED",
        ),
        (
            {ENDPOINT: "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
            "OTEL_TRACES_EXPORTER=none turns it off",
            "Unset OTEL_TRACES_EXPORTER",
        ),
        (
            {
                ENDPOINT: "https://otlp.nr-data.net",
                HEADERS: GOOD["otlp.nr-data.net"],
                "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4000",
            },
            "can have 1.6 MB; New Relic accepts 1 MB",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE=2500 or less",
        ),
    ],
)
def test_a_wrong_setting_is_a_problem_with_advice(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], problem: str, advice: str
) -> None:
    findings = examined(monkeypatch, **environment)
    found = [finding for finding in problems(findings) if problem in finding.text]
    assert found, said(findings)
    assert any(advice.lower() in finding.advice.lower() for finding in found), said(found)


@pytest.mark.parametrize(
    ("environment", "note"),
    [
        (
            {
                ENDPOINT: "https://otlp.datadoghq.com",
                HEADERS: f"dd-api-key={KEYS['Datadog']}",
            },
            "without compute_stats=true no trace metrics",
        ),
        (
            {
                ENDPOINT: "https://otlp.datadoghq.com",
                HEADERS: f"dd-api-key={'x' * 31},compute_stats=true",
            },
            "has 31 characters; an API key has 32",
        ),
        (
            {
                ENDPOINT: "https://otlp-gateway-prod-us-east-0.grafana.net/otlp",
                HEADERS: f"Authorization=Basic {GRAFANA_BASIC}",
            },
            "authorization has a space in its value",
        ),
        ({ENDPOINT: "http://collector.example.com:4318", HEADERS: "a=1234567"}, "in the clear"),
        ({TRACES_ENDPOINT: "http://127.0.0.1:4318/spans"}, "does not end in /v1/traces"),
        ({ENDPOINT: "http://127.0.0.1:1", "OTEL_SAMPLE_RATE": "0"}, "no trace is exported"),
        ({ENDPOINT: "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5"}, "takes longer"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "spans are written to standard output"),
    ],
)
def test_a_questionable_setting_is_a_note_and_no_problem(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], note: str
) -> None:
    findings = examined(monkeypatch, **environment)
    assert any(f.severity is Severity.NOTE and note in f.text for f in findings), said(findings)
    assert not problems(findings), said(findings)


@pytest.mark.parametrize("deltas", ["DELTA", "lowmemory"])
def test_datadog_needs_delta_temporality(monkeypatch: pytest.MonkeyPatch, deltas: str) -> None:
    datadog = {
        ENDPOINT: "https://otlp.datadoghq.com",
        HEADERS: DATADOG_HEADERS,
        "SDXL_OTLP_METRICS": "true",
    }
    cumulative = examined(monkeypatch, **datadog)
    assert "accepts metrics only as deltas" in said(problems(cumulative))
    preference = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
    assert not problems(examined(monkeypatch, **datadog, **{preference: deltas}))


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, "every trace is exported, unless its caller decided"),
        ({"OTEL_SAMPLE_RATE": "0.1"}, "one trace in 10 is exported, unless"),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, "every trace is exported"),
        (
            {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"},
            "one trace in 4 is exported",
        ),
    ],
)
def test_the_exported_share_is_reported(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], share: str
) -> None:
    findings = examined(monkeypatch, **{ENDPOINT: "http://127.0.0.1:1"}, **environment)
    assert any(share in finding.text for finding in findings if finding.subject == "sampling")
