"""The doctor: its rules on settings with the backends' real hosts, unsent; its words for answers
on loopback endpoints that answer as the backends do."""

from __future__ import annotations

import base64
import gzip
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from serve.errors import ConfigurationError
from serve.settings import load_settings
from serve.telemetry.backends import BACKENDS, DATADOG, GRAFANA, HONEYCOMB, NEW_RELIC, Backend
from serve.telemetry.doctor import run
from serve.telemetry.finding import Finding, Severity
from serve.telemetry.settings_checks import check_settings
from serve.telemetry.trace_endpoint import trace_endpoint
from serve.telemetry.trial_export import send_trial_trace
from tests.support.otlp_endpoint import otlp_endpoint, tree
from tests.support.processes import clean_environment

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"

KEYS = {
    "New Relic": "0123456789abcdef0123456789abcdefFFFFNRAL",
    "New Relic EU": "eu01xx6789abcdef0123456789abcdefFFFFNRAL",
    "Datadog": "0123456789abcdef0123456789abcdef",
    "Honeycomb": "hcaik_01j0123456789abcdef0123456789abcdef0123456789abcdef0123456",
}
GRAFANA_TOKEN = "glc_eyJvIjoiMTIzNDU2IiwibiI6InRva2VuIn0="
GRAFANA_BASIC = base64.b64encode(f"123456:{GRAFANA_TOKEN}".encode()).decode()

GOOD = {
    "otlp.nr-data.net": f"api-key={KEYS['New Relic']}",
    "otlp.eu01.nr-data.net": f"api-key={KEYS['New Relic EU']}",
    "otlp.jp.nr-data.net": f"api-key={KEYS['New Relic']}",
    "gov-otlp.nr-data.net": f"api-key={KEYS['New Relic']}",
    "otlp-gateway-prod-eu-west-2.grafana.net": f"Authorization=Basic%20{GRAFANA_BASIC}",
    "api.honeycomb.io": f"x-honeycomb-team={KEYS['Honeycomb']}",
    "api.eu1.honeycomb.io": f"x-honeycomb-team={KEYS['Honeycomb']}",
}
DATADOG_HEADERS = f"dd-api-key={KEYS['Datadog']},compute_stats=true"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SDXL_", "OTEL_")) or name == "ENABLE_TRACING":
            monkeypatch.delenv(name)


def examined(
    monkeypatch: pytest.MonkeyPatch, backend: Backend | None = None, **environment: str
) -> list[Finding]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return check_settings(load_settings(), backend)


def problems(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity is Severity.PROBLEM]


def said(findings: list[Finding]) -> str:
    return "\n".join(f"{f.severity} {f.subject} {f.text} -> {f.advice}" for f in findings)


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


def test_any_other_endpoint_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
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
            "which ends in it, so the path has it twice",
            "OTEL_EXPORTER_OTLP_ENDPOINT=https://otlp.nr-data.net:4318",
        ),
        (
            {TRACES_ENDPOINT: "https://otlp.nr-data.net:4318"},
            "is used unchanged, and does not end in /v1/traces",
            "Append /v1/traces",
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
            "",
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
            {ENDPOINT: "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_CERTIFICATE": "/no/such/ca.pem"},
            "there is no file /no/such/ca.pem",
            "certificate authority",
        ),
        (
            {
                ENDPOINT: "https://127.0.0.1:1",
                "OTEL_EXPORTER_OTLP_CERTIFICATE": __file__,
                "REQUESTS_CA_BUNDLE": "/etc/ca.pem",
            },
            "REQUESTS_CA_BUNDLE is set as well, and wins over",
            "Unset it",
        ),
        (
            {
                ENDPOINT: "https://otlp.nr-data.net",
                HEADERS: GOOD["otlp.nr-data.net"],
                "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4000",
            },
            "can have 1.6 MB; New Relic accepts 1 MB",
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE to 2500 or less",
        ),
    ],
)
def test_what_is_wrong_is_told_with_what_to_do(
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
        ({ENDPOINT: "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "has no effect"),
    ],
)
def test_what_may_be_meant_is_noted_and_no_problem(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], note: str
) -> None:
    findings = examined(monkeypatch, **environment)
    assert any(f.severity is Severity.NOTE and note in f.text for f in findings), said(findings)
    assert not problems(findings), said(findings)


def test_datadogs_metrics_are_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    datadog = {
        ENDPOINT: "https://otlp.datadoghq.com",
        HEADERS: DATADOG_HEADERS,
        "SDXL_OTLP_METRICS": "true",
    }
    cumulative = examined(monkeypatch, **datadog)
    assert "accepts metrics only as deltas" in said(problems(cumulative))
    preference = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
    assert not problems(examined(monkeypatch, **datadog, **{preference: "DELTA"}))


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
def test_the_share_that_is_exported_is_told(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], share: str
) -> None:
    findings = examined(monkeypatch, **{ENDPOINT: "http://127.0.0.1:1"}, **environment)
    assert any(share in finding.text for finding in findings if finding.subject == "sampling")


# Answers


class Answering(ThreadingHTTPServer):
    """Answers every request with the same; keeps what it was sent."""

    daemon_threads = True

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = (status, headers, body)
        self.received: list[tuple[str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Answering

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(
            (self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        )
        status, headers, answer = self.server.answer
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(answer))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def answering(
    status: int, body: bytes | str = b"", content_type: str = "", **headers: str
) -> Iterator[Answering]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if content_type:
        named["Content-Type"] = content_type
    server = Answering(status, named, body.encode() if isinstance(body, str) else body)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sent(
    monkeypatch: pytest.MonkeyPatch, url: str, backend: Backend | None = None, **environment: str
) -> Finding:
    monkeypatch.setenv(ENDPOINT, url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    [finding] = send_trial_trace(load_settings(), backend)
    return finding


def test_a_small_trace_arrives_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with otlp_endpoint() as otlp:
        monkeypatch.setenv("OTEL_SERVICE_NAME", "patient")
        finding = sent(monkeypatch, otlp.url, **{HEADERS: "api-key=0123456789"})
        spans = otlp.wait_for(lambda spans: len(spans) == 2)
    assert finding.severity is Severity.OK
    assert "200 after" in finding.text
    assert finding.text.endswith(f"2 spans were accepted; look for trace {spans[0].trace_id}")
    assert tree(spans) == "doctor\n  checkup"
    assert spans[0].resource["service.name"] == "patient"
    assert otlp.headers[0]["api-key"] == "0123456789"


PROTOBUF = "application/x-protobuf"


def partial(rejected: int, message: str) -> bytes:
    told = ExportTracePartialSuccess(rejected_spans=rejected, error_message=message)
    return ExportTraceServiceResponse(partial_success=told).SerializeToString()


@pytest.mark.parametrize(
    ("backend", "answer", "severity", "words", "advice"),
    [
        # Datadog accepts with 202 and an empty body.
        (DATADOG, (202, b"", ""), Severity.OK, "202 after", ""),
        (NEW_RELIC, (200, b"{}", "application/json"), Severity.OK, "2 spans were accepted", ""),
        (HONEYCOMB, (200, partial(0, ""), PROTOBUF), Severity.OK, "2 spans were accepted", ""),
        (
            HONEYCOMB,
            (200, partial(0, "attribute `a` is deprecated"), PROTOBUF),
            Severity.NOTE,
            'with a warning ("attribute `a` is deprecated")',
            "",
        ),
        (
            HONEYCOMB,
            (200, partial(1, "too old"), PROTOBUF),
            Severity.PROBLEM,
            '1 of 2 spans were refused ("too old")',
            "",
        ),
        (
            GRAFANA,
            (
                200,
                b'{"partialSuccess": {"rejectedSpans": "2", "errorMessage": "ingestion limit"}}',
                "application/json",
            ),
            Severity.PROBLEM,
            '2 of 2 spans were refused ("ingestion limit")',
            "",
        ),
        (None, (200, b"\xff\xff", PROTOBUF), Severity.OK, "2 spans were accepted", ""),
        (None, (200, b"[1]", "application/json"), Severity.OK, "2 spans were accepted", ""),
        (
            None,
            (200, b"<html>Welcome</html>", "text/html; charset=utf-8"),
            Severity.PROBLEM,
            "a web page, so this is not an OTLP endpoint",
            "OTEL_EXPORTER_OTLP_ENDPOINT",
        ),
        (
            None,
            (302, b"", ""),
            Severity.PROBLEM,
            "a redirect to https://login.example.test, which is not followed",
            "",
        ),
        (None, (400, b"", ""), Severity.PROBLEM, "was not understood", "OTLP/HTTP"),
        (None, (401, b"", ""), Severity.PROBLEM, "the key is missing, wrong", HEADERS),
        (
            None,
            (404, b"404 page not found", "text/plain"),
            Severity.PROBLEM,
            "no OTLP endpoint at that path",
            "",
        ),
        (None, (415, b"", ""), Severity.PROBLEM, "does not accept protobuf", ""),
        (None, (418, b"", ""), Severity.PROBLEM, "418 after", "documentation"),
        (None, (500, b"", ""), Severity.PROBLEM, "the backend failed", "later"),
        (NEW_RELIC, (403, b"", ""), Severity.PROBLEM, "no ingest license key", "nr-data.net:4318"),
        (
            DATADOG,
            (403, b'{"errors":["Forbidden"]}', "application/json"),
            Severity.PROBLEM,
            "not of the key's site",
            "https://otlp.us5.datadoghq.com (US5)",
        ),
        (DATADOG, (413, b"", ""), Severity.PROBLEM, "too large", "Datadog accepts 3.2 MB"),
        (GRAFANA, (401, b"", ""), Severity.PROBLEM, "do not belong together", "Basic%20"),
        (GRAFANA, (403, b"", ""), Severity.PROBLEM, "traces:write", ""),
        (GRAFANA, (404, b"", ""), Severity.PROBLEM, "below /otlp", "/otlp"),
        (
            HONEYCOMB,
            (401, b'{"error":"unknown API key - check your credentials"}', "application/json"),
            Severity.PROBLEM,
            "unknown in this region",
            "https://api.eu1.honeycomb.io (EU)",
        ),
    ],
)
def test_an_answer_is_put_into_words(
    monkeypatch: pytest.MonkeyPatch,
    backend: Backend | None,
    answer: tuple[int, bytes, str],
    severity: Severity,
    words: str,
    advice: str,
) -> None:
    status, body, content_type = answer
    location = "https://login.example.test/?next=secret" if status == 302 else ""
    with answering(status, body, content_type, Location=location) as server:
        finding = sent(monkeypatch, server.url, backend)
    assert (finding.severity, finding.subject) == (severity, "answer")
    assert finding.text.startswith(str(status))
    assert words in finding.text
    assert advice in finding.advice
    [(path, headers, body)] = server.received
    assert path == "/v1/traces"
    assert headers["content-type"] == PROTOBUF
    assert ExportTraceServiceRequest.FromString(body).resource_spans


def test_a_backend_that_wants_us_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(429, Retry_After="120") as server:
        finding = sent(monkeypatch, server.url)
    assert finding.text.startswith("429 after")
    assert "accepts no more for 120 s" in finding.text
    assert "OTEL_SAMPLE_RATE" in finding.advice


def test_one_answer_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter would ask again until its time is over."""
    with answering(503) as server:
        finding = sent(monkeypatch, server.url)
    assert len(server.received) == 1
    assert finding.text.startswith("503 after ")


def test_what_is_sent_is_compressed_as_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200) as server:
        sent(monkeypatch, server.url, OTEL_EXPORTER_OTLP_COMPRESSION="gzip")
    [(_, headers, body)] = server.received
    assert headers["content-encoding"] == "gzip"
    assert ExportTraceServiceRequest.FromString(gzip.decompress(body)).resource_spans


# No answer


def test_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        finding = sent(monkeypatch, f"http://127.0.0.1:{port}")
    assert finding.text == f"none: nothing listens at 127.0.0.1 port {port}"


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", _no_such_host)
    finding = sent(monkeypatch, "https://collector.invalid")
    assert finding.text == "none: there is no host collector.invalid"


def _no_such_host(*_: Any, **__: Any) -> Any:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@contextmanager
def speaking(speak: Callable[[socket.socket], None]) -> Iterator[int]:
    """Something that listens and is no HTTP server; the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                speak(connection)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    with speaking(lambda _: over.wait(10) and None) as port:
        finding = sent(monkeypatch, f"http://127.0.0.1:{port}", OTEL_EXPORTER_OTLP_TIMEOUT="0.5")
        over.set()
    assert "accepted the spans and sent no response" in finding.text
    assert "OTEL_EXPORTER_OTLP_TIMEOUT" in finding.advice


@pytest.mark.parametrize("reply", [b"", b"SSH-2.0-OpenSSH_9\r\n"])
def test_what_speaks_no_http(monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
    def speak(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(reply)

    with speaking(speak) as port:
        finding = sent(monkeypatch, f"http://127.0.0.1:{port}")
    assert "closed the connection or does not speak HTTP" in finding.text


def test_https_to_a_server_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200) as server:
        finding = sent(monkeypatch, server.url.replace("http://", "https://"))
    assert "no trusted connection" in finding.text
    assert "http://" in finding.advice


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_nobody_vouches_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with answering(200) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = server.url.replace("http://", "https://")
        refused = sent(monkeypatch, url)
        vouched = sent(monkeypatch, url, OTEL_EXPORTER_OTLP_CERTIFICATE=str(certificate))
    assert "no trusted connection" in refused.text
    assert "self-signed certificate" in refused.text
    assert "OTEL_EXPORTER_OTLP_CERTIFICATE" in refused.advice
    assert vouched.severity is Severity.OK


def test_a_proxy_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://collector.example.com:4318")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://someone:hunter2hunter2@127.0.0.1:9")
    [finding] = send_trial_trace(load_settings())
    assert "the proxy made no connection" in finding.text
    assert finding.advice.endswith("through the proxy 127.0.0.1.")


# Secrets

SECRET = "s3cr3t/Sh0uld+Never=BeSeen"


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **more: Any) -> str:
    """All that the doctor says, and all that a library says beside it."""
    lines: list[str] = []
    run(load_settings(), lines.append, **more)
    captured = capsys.readouterr()
    return "\n".join(lines) + captured.out + captured.err


def pieces(secret: str, length: int = 6) -> list[str]:
    return [secret[at : at + length] for at in range(len(secret) - length + 1)]


@pytest.mark.parametrize("status", [200, 400, 401, 500])
@pytest.mark.parametrize(
    "echo",
    [
        "key {value} is unknown",
        '{{"error": "unknown key {value}", "header": "{raw}"}}',
        "credentials {decoded} do not match",
        "key {start}... is unknown, it ends in {end}",
        "{escaped}",
        "\x1b[2J{value}\n\n{value}",
    ],
)
def test_a_backend_that_quotes_the_key_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    echo: str,
    status: int,
) -> None:
    caplog.set_level("DEBUG")
    encoded = base64.b64encode(f"12345:{SECRET}".encode()).decode()
    raw = f"Basic%20{encoded}"
    body = echo.format(
        value=encoded,
        raw=raw,
        decoded=f"12345:{SECRET}",
        start=encoded[:9],
        end=encoded[-9:],
        escaped=encoded.replace("/", "\\/"),
    )
    kind = "application/json" if body.startswith("{") else "text/plain"
    answer: bytes | str = body
    if status == 200:
        answer, kind = partial(2, body), PROTOBUF
    with answering(status, answer, kind) as server:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv(ENDPOINT, server.url)
        monkeypatch.setenv(HEADERS, f"Authorization={raw},x-scope={SECRET}")
        shown = told(monkeypatch, capsys, width=10_000) + caplog.text
    for piece in [*pieces(SECRET), *pieces(encoded)]:
        assert piece not in shown, shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    "headers",
    [
        f"api-key={SECRET}",
        f"api-key='{SECRET}'",
        f"Authorization=Bearer {SECRET}%3D",
        f"{SECRET.replace('/', '').replace('+', '')}=",  # a key where a name is to be
        "c2VjcmV0U2hvdWxkTmV2ZXJCZVNlZW4=",
        "c2VjcmV0U2hvdWxkTmV2ZXJCZVNlZW==",
    ],
)
def test_no_header_is_shown_whatever_is_wrong_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], headers: str
) -> None:
    monkeypatch.setenv(ENDPOINT, "https://otlp.nr-data.net:4318")
    monkeypatch.setenv(HEADERS, headers)
    shown = told(monkeypatch, capsys, sends=False).lower()
    for piece in [*pieces("s3cr3t/sh0uld+never"), *pieces("c2vjcmv0u2hvdwxktmv2zxjczvnlzw")]:
        assert piece not in shown, shown


def test_an_endpoints_password_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENDPOINT, "http://someone:hunter2hunter2@127.0.0.1:9/?token=hunter2hunter2")
    assert "hunter2" not in told(monkeypatch, capsys)


@pytest.mark.parametrize("host", ["127.0.0.1:9", "api.honeycomb.io"])
def test_a_key_in_an_endpoints_path_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    monkeypatch.setenv(ENDPOINT, f"https://{host}/in/0123456789abcdef")
    shown = told(monkeypatch, capsys, sends=False)
    assert "/in/***" in shown
    assert "456789" not in shown


@pytest.mark.parametrize("url", ["http://host:99999", "https://[::1", "http://host:port"])
def test_what_is_no_url_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_ENDPOINT is no URL"):
        examined(monkeypatch, **{ENDPOINT: url})


# A host of every backend and none, with what may be typed around it.
HOSTS = st.sampled_from(
    [r.host.replace("*", "a") for b in BACKENDS for r in b.regions] + ["localhost", "grafana.net"]
)
ENDPOINTS = st.builds(
    "{}://{}{}{}".format,
    st.sampled_from(["http", "https"]),
    HOSTS,
    st.sampled_from(["", ":4317", ":443", ":99999", ":"]),
    st.text("/v1tracesotlp?#%@:[]", max_size=12),
)
SOME_HEADERS = st.dictionaries(
    st.sampled_from([backend.header for backend in BACKENDS] + ["a", "x-b"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60),
    max_size=3,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(endpoint=ENDPOINTS, headers=SOME_HEADERS, traces=st.booleans())
def test_whatever_is_set_is_examined_or_refused_and_nothing_of_a_key_shown(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, headers: dict[str, str], traces: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(TRACES_ENDPOINT if traces else ENDPOINT, endpoint)
        patch.setenv(HEADERS, ",".join(f"{name}={value}" for name, value in headers.items()))
        lines: list[str] = []
        try:
            status = run(load_settings(), lines.append, sends=False)
        except ConfigurationError as refused:
            lines.append(str(refused))
        else:
            assert status in (0, 1)
            assert (status == 1) == any(line.startswith("problem") for line in lines)
        shown = "\n".join(lines)
        for value in headers.values():
            for piece in pieces(value.strip(), 9):
                assert piece in endpoint or piece not in shown or not piece.strip("= ")


@pytest.mark.parametrize("header", ['a="quoted"', "a=x;y", "a=ü", "key:hunter2", "a b=hunter2"])
def test_what_the_exporter_would_leave_out_is_refused_at_the_start(
    header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = doctor({ENDPOINT: "http://127.0.0.1:9", HEADERS: header})
    assert result.returncode == 2
    assert "OTEL_EXPORTER_OTLP_HEADERS is not allowed as it is" in result.stderr
    assert header.partition("=")[2] not in result.stdout + result.stderr or "=" not in header


# The command


def doctor(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=clean_environment({"COLUMNS": "100", "NO_PROXY": "127.0.0.1", **environment}),
    )


def test_the_command_says_ok_problem_or_wrong_settings() -> None:
    with answering(202) as server:
        ok = doctor({ENDPOINT: server.url, HEADERS: DATADOG_HEADERS}, "--backend", "datadog")
    assert ok.returncode == 0, ok.stdout + ok.stderr
    assert ok.stdout.endswith("\nSpans arrive.\n")
    assert "127.0.0.1 is treated as Datadog" in ok.stdout

    with answering(403) as server:
        refused = doctor({ENDPOINT: server.url}, "--backend", "grafana cloud")
        unsent = doctor({ENDPOINT: server.url}, "--no-send")
    assert refused.returncode == 1
    assert "Spans will not arrive as they should: 3 problems." in refused.stdout
    assert unsent.returncode == 0
    assert unsent.stdout.endswith("\nNothing is wrong with the settings. Nothing was sent.\n")
    assert len(server.received) == 1

    wrong = doctor({"OTEL_EXPORTER_OTLP_TIMEOUT": "10000"})
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "not milliseconds" in wrong.stderr
    unknown = doctor({}, "--backend", "nagios")
    assert unknown.returncode == 2
    assert "New Relic, Datadog, Grafana Cloud, Honeycomb are." in unknown.stderr
    for result in (ok, refused, unsent):
        assert result.stderr == ""
        assert all(len(line) <= 100 for line in result.stdout.splitlines())


README = Path(__file__).resolve().parents[3] / "README.md"


def test_the_readme_shows_what_the_doctor_says() -> None:
    block = README.read_text().split("<!-- doctor: begin -->\n```console\n")[1]
    *lines, _ = block.split("```\n<!-- doctor: end -->")[0].split("\n")
    exports = [line.removeprefix("$ export ") for line in lines if line.startswith("$ export ")]
    environment = {
        name: value.strip('"') for name, _, value in (line.partition("=") for line in exports)
    }
    command = lines.index("$ python -m serve doctor --no-send")
    assert "\n".join(lines[command + 1 :]) == doctor(environment, "--no-send").stdout.rstrip("\n")
