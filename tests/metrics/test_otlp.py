"""How the exporter handles a backend's answers, over real connections."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SpanExportResult

from metrics.otlp import otlp_exporter
from metrics.sampling import TraceSampling
from metrics.tracing import Tracing, otlp_destination
from tests.metrics.test_tracing import TWO_SPANS
from tests.support.otlp_endpoint import Answer, otlp_endpoint

Export = Callable[..., Counter[str]]


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch) -> Export:
    """Export two spans to an endpoint with this answer; returns spans by result."""

    def export(answer: Answer, seconds: float = 10, tls: bool = False) -> Counter[str]:
        counts: Counter[str] = Counter()
        with otlp_endpoint(answer, tls) as endpoint:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.url)
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(seconds))
            pipeline = Tracing(
                TraceSampling(),
                otlp_destination(honeycomb=False, meter_provider=None),
                Resource.get_empty(),
                on_ended=lambda count: counts.update(ended=count),
                on_result=lambda result, count: counts.update({result: count}),
            )
            pipeline.emit(pipeline.identify(), TWO_SPANS)
            pipeline.shutdown(20)
            counts["received"] = len(endpoint.spans)
        return counts

    return export


def test_a_healthy_backend(export: Export) -> None:
    assert export(Answer()) == {"ended": 2, "exported": 2, "received": 2}


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_a_failure(
    export: Export, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    elsewhere = {"Location": "http://127.0.0.1:9/v1/traces?key=hunter2"}
    assert export(Answer(status, elsewhere)) == {"ended": 2, "failed": 2, "received": 0}
    assert f"the endpoint answered {status}, a redirect" in caplog.text
    assert "hunter2" not in caplog.text


def test_a_partial_success_is_counted_and_logged(
    export: Export, caplog: pytest.LogCaptureFixture
) -> None:
    counts = export(Answer(rejected=1))
    assert counts == {"ended": 2, "exported": 1, "rejected": 1, "received": 1}
    assert "refused 1 spans of a batch" in caplog.text


def test_an_answer_in_another_format_counts_by_its_status(export: Export) -> None:
    page = Answer(headers={"Content-Type": "text/html"}, rejected=2)
    assert export(page)["exported"] == 2


@pytest.mark.parametrize("answer", [Answer(400), Answer(401), Answer(403), Answer(413)])
def test_a_refusal_fails_at_once(export: Export, answer: Answer) -> None:
    assert export(answer) == {"ended": 2, "failed": 2, "received": 0}


@pytest.mark.parametrize(
    "answer", [Answer(429, {"Retry-After": "30"}), Answer(503), Answer(seconds=math.inf)]
)
def test_a_temporary_failure_is_retried_until_the_time_limit(
    export: Export, answer: Answer
) -> None:
    assert export(answer, seconds=0.5) == {"ended": 2, "failed": 2, "received": 0}


def test_an_untrusted_certificate_fails_at_once(
    export: Export, caplog: pytest.LogCaptureFixture
) -> None:
    start = time.monotonic()
    assert export(Answer(), tls=True) == {"ended": 2, "failed": 2, "received": 0}
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
    assert time.monotonic() - start < 5  # tried once


def test_another_tls_failure_is_retried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A TLS handshake that fails for another reason than the certificate is retried."""
    with otlp_endpoint() as plain:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", plain.url.replace("http", "https"))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
        exporter, _ = otlp_exporter()
        assert exporter.export([]) is SpanExportResult.FAILURE
    assert "Transient error" in caplog.text
    assert "SSL" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1:9", "name.invalid"])
def test_a_connection_that_fails_is_logged_without_the_url(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, host: str
) -> None:
    endpoint = f"http://me:hunter2@{host}/v1/traces?key=hunter2"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    exporter, _ = otlp_exporter()
    assert exporter.export([]) is SpanExportResult.FAILURE
    assert "Transient error" in caplog.text
    assert "hunter2" not in caplog.text
