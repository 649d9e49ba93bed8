"""The OTLP/HTTP exporters, of spans and of metrics, and what they overlook.

To the SDK's exporter a redirect is a success, which it follows nowhere; a partial success is one
like any other; a certificate that is not accepted is tried again like a connection that was cut;
and the lines it logs of a failed connection quote the whole URL. All of that is mended here, in the
HTTP session that it is given.
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
    """The endpoint answered with another address; nothing is sent after it."""

    def __init__(self, status: int) -> None:
        super().__init__(
            f"the endpoint answered {status}, a redirect, which is not followed: name the address "
            "that takes them"
        )


class Untrusted(requests.RequestException):
    """The endpoint's certificate was not accepted; trying again would not mend it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the endpoint's certificate was not accepted: {reason}")


class AnswerReader(requests.Session):
    """A session that reads the answers to the end. Used by one export at a time.

    Args:
        sent: what the exports hold, in a word for the log.
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
        """How much the backend has refused, of batches it accepted, since last asked."""
        rejected, self._rejected = self._rejected, 0
        return rejected

    def _refused(self, response: requests.Response) -> int:
        refused = _rejected(response)
        if refused:
            # Not the backend's own message, which may quote what it was sent.
            logger.warning("the backend refused %d %s of a batch it accepted", refused, self._sent)
        return refused


def _reason(error: requests.RequestException) -> Exception:
    """Why there was no connection; what is raised around it quotes the URL, keys and all."""
    around = error.args[0] if error.args else error
    reason = getattr(around, "reason", None)
    return reason if isinstance(reason, Exception) else ConnectionError(type(around).__name__)


def _rejected(response: requests.Response) -> int:
    """How many of a batch were refused. The answers to spans and to metrics are one message but for
    their names: the count is the same field of both."""
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
