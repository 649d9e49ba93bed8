"""The doctor's trial export: a small trace, sent by the exporter that the service uses."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import requests
from opentelemetry import trace
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from requests.adapters import HTTPAdapter

from metrics.otlp import otlp_exporter
from metrics.tracing import SCOPE_NAME
from serve import __version__
from serve.settings import ServeSettings
from serve.telemetry.backends import Backend, backend_of
from serve.telemetry.export_responses import (
    ResponseExplainer,
    explain_no_response,
    explain_nothing_sent,
)
from serve.telemetry.finding import Finding
from serve.telemetry.settings_checks import change_of_rate
from serve.telemetry.setup import build_resource, span_limits
from serve.telemetry.trace_endpoint import trace_endpoint


@dataclass(slots=True)
class _Exchange:
    """The response to the export, or the errors instead of one.

    It is over with the first response, though the exporter retries on some, and with the second
    failed connection, which the exporter tries without a delay.
    """

    response: requests.Response | None = None
    errors: list[Exception] = field(default_factory=list)
    tried: bool = False
    over: threading.Event = field(default_factory=threading.Event)


class _ObservingAdapter(HTTPAdapter):
    """Sends requests and keeps their responses and errors."""

    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        self._exchange.tried = True
        try:
            response = super().send(*args, **kwargs)
            _ = response.content  # read here, so that an error while reading is kept too
        except Exception as error:
            self._exchange.errors.append(error)
            if len(self._exchange.errors) > 1:
                self._exchange.over.set()
            raise
        self._exchange.response = response
        self._exchange.over.set()
        return response


def send_trial_trace(settings: ServeSettings, treat_as: Backend | None = None) -> list[Finding]:
    """Send a trace of two spans through the service's own exporter, and explain the response.

    Nothing is sent, and there is no finding, if the service itself would send nothing.
    """
    endpoint = trace_endpoint(settings)
    if endpoint is None or not settings.tracing_enabled or settings.writes_spans:
        return []
    backend = treat_as or backend_of(endpoint.host)
    exchange = _Exchange()
    exporter, session = otlp_exporter(timeout_seconds=endpoint.timeout_seconds)
    for scheme in ("http://", "https://"):
        session.mount(scheme, _ObservingAdapter(exchange))
    spans, trace_id = _trial_trace(settings)
    with _logging_disabled():
        started = time.monotonic()

        def export() -> None:
            exporter.export(spans)
            exchange.over.set()

        exporting = threading.Thread(target=export, name="doctor", daemon=True)
        exporting.start()
        # The exporter keeps its timeout, except for a response that arrives byte by byte.
        exchange.over.wait(endpoint.timeout_seconds + 2)
        seconds = time.monotonic() - started
        exporter.shutdown()  # type: ignore[no-untyped-call]
        exporting.join(1)
    if exchange.response is not None:
        explainer = ResponseExplainer(endpoint, backend, change_of_rate(settings, "0.1"))
        return [explainer.explain(exchange.response, len(spans), trace_id, seconds)]
    if session.refusal or not exchange.tried:
        return [explain_nothing_sent(session.refusal)]
    return [explain_no_response(endpoint, exchange.errors, seconds)]


def _trial_trace(settings: ServeSettings) -> tuple[tuple[ReadableSpan, ...], str]:
    kept = InMemorySpanExporter()
    provider = TracerProvider(
        sampler=ALWAYS_ON,
        resource=build_resource(settings),
        shutdown_on_exit=False,
        span_limits=span_limits(settings),
        meter_provider=NoOpMeterProvider(),
    )
    provider.add_span_processor(SimpleSpanProcessor(kept, meter_provider=NoOpMeterProvider()))
    tracer = provider.get_tracer(SCOPE_NAME, __version__)
    with tracer.start_as_current_span("doctor") as root, tracer.start_as_current_span("checkup"):
        trace_id = trace.format_trace_id(root.get_span_context().trace_id)
    return kept.get_finished_spans(), trace_id


@contextmanager
def _logging_disabled() -> Iterator[None]:
    """The exporter logs what went wrong; the findings say it better."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
