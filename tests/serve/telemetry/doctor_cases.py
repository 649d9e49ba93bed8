"""What the doctor's tests share: settings, keys, and an endpoint that answers as a test chooses."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from serve.settings import load_settings
from serve.telemetry.backends import Backend
from serve.telemetry.finding import Finding, Severity
from serve.telemetry.settings_checks import check_settings
from serve.telemetry.trial_export import send_trial_trace

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

PROTOBUF = "application/x-protobuf"


def clean_environment_of_settings(monkeypatch: pytest.MonkeyPatch) -> None:
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


class Answering(ThreadingHTTPServer):
    """Answers every request in the same way, and keeps the requests."""

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


def partial(rejected: int, message: str) -> bytes:
    partial = ExportTracePartialSuccess(rejected_spans=rejected, error_message=message)
    return ExportTraceServiceResponse(partial_success=partial).SerializeToString()
