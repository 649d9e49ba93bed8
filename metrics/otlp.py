"""The OTLP/HTTP exporters of spans and metrics, with an HTTP session that corrects them.

The SDK's exporter has four faults. It counts a redirect as a success without following it. It
ignores the rejections in a partial success. It retries after an untrusted certificate. Its log line
for a failed connection contains the whole URL. The session given to it corrects all four.
"""

from __future__ import annotations

import logging
import ssl
from typing import Any

import requests
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import MeterProvider
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

logger = logging.getLogger(__name__)


class Redirected(requests.RequestException):
    """The endpoint answered with a redirect, which is not followed."""

    def __init__(self, status: int) -> None:
        super().__init__(
            f"the endpoint answered {status}, a redirect, which is not followed: set the final "
            "address"
        )


class Untrusted(requests.RequestException):
    """The endpoint's certificate was not accepted; a retry would not help."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the endpoint's certificate was not accepted: {reason}")


class AnswerReader(requests.Session):
    """A session that checks the answers. One export at a time uses it.

    Args:
        sent: the name of what is exported, for the log.
    """

    def __init__(self, sent: str) -> None:
        super().__init__()
        self._sent = sent
        self._rejected = 0

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        try:
            response = super().request(*args, **kwargs)
        except requests.exceptions.ConnectionError as error:
            reason = _reason(error)
            if any(isinstance(part, ssl.SSLCertVerificationError) for part in reason.args):
                raise Untrusted(str(reason)) from None
            raise requests.exceptions.ConnectionError(str(reason)) from None
        if 300 <= response.status_code < 400:
            raise Redirected(response.status_code)
        if response.ok:
            self._rejected += self._refused(response)
        return response

    def take_rejected(self) -> int:
        """How much the backend has refused of accepted batches since the last call."""
        rejected, self._rejected = self._rejected, 0
        return rejected

    def _refused(self, response: requests.Response) -> int:
        refused = _rejected(response)
        if refused:
            # Without the backend's message, which may quote what it received.
            logger.warning("the backend refused %d %s of a batch it accepted", refused, self._sent)
        return refused


def _reason(error: requests.RequestException) -> Exception:
    """Why there was no connection. The exception around it contains the URL with its keys."""
    around = error.args[0] if error.args else error
    reason = getattr(around, "reason", None)
    return reason if isinstance(reason, Exception) else ConnectionError(type(around).__name__)


def _rejected(response: requests.Response) -> int:
    """How many items of a batch were refused. The answers to spans and to metrics differ in names
    only: the count is the same field."""
    if "protobuf" not in response.headers.get("content-type", ""):
        return 0
    try:
        answer = ExportTraceServiceResponse.FromString(response.content)
    except DecodeError:
        return 0
    return int(answer.partial_success.rejected_spans)


def otlp_exporter(
    meter_provider: MeterProvider | None = None,
) -> tuple[OTLPSpanExporter, AnswerReader]:
    """The exporter, which reads the standard `OTEL_EXPORTER_OTLP_*` variables, and its session."""
    session = AnswerReader("spans")
    return OTLPSpanExporter(session=session, meter_provider=meter_provider), session


def otlp_metric_exporter(**options: Any) -> tuple[OTLPMetricExporter, AnswerReader]:
    """The same for metrics."""
    session = AnswerReader("metric points")
    return OTLPMetricExporter(session=session, **options), session
