"""The doctor's trial export, to loopback endpoints that respond as backends do, or not at all."""

from __future__ import annotations

import gzip
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
)

from serve.settings import load_settings
from serve.telemetry.backends import DATADOG, GRAFANA, HONEYCOMB, NEW_RELIC, Backend
from serve.telemetry.finding import Severity
from serve.telemetry.trial_export import send_trial_trace
from tests.serve.telemetry.doctor_cases import (
    ENDPOINT,
    HEADERS,
    PROTOBUF,
    answering,
    clean_environment_of_settings,
    partial,
    sent,
)
from tests.support.otlp_endpoint import otlp_endpoint, tree


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    clean_environment_of_settings(monkeypatch)


def test_a_small_trace_arrives_and_its_id_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_each_response_has_a_finding(
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


def test_a_backend_that_asks_for_a_later_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(429, Retry_After="120") as server:
        finding = sent(monkeypatch, server.url)
    assert finding.text.startswith("429 after")
    assert "accepts no more for 120 s" in finding.text
    assert "OTEL_SAMPLE_RATE" in finding.advice


def test_the_trial_export_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter would retry until its time limit."""
    with answering(503) as server:
        finding = sent(monkeypatch, server.url)
    assert len(server.received) == 1
    assert finding.text.startswith("503 after ")


def test_the_trial_export_is_compressed_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """A listener that is no HTTP server; yields its port."""
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
def test_a_server_that_speaks_no_http(monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
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
def test_an_untrusted_certificate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_an_absent_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://collector.example.com:4318")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://someone:hunter2hunter2@127.0.0.1:9")
    [finding] = send_trial_trace(load_settings())
    assert "the proxy made no connection" in finding.text
    assert finding.advice.endswith("through the proxy 127.0.0.1.")
