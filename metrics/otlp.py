"""The OTLP/HTTP exporters of spans and metrics, with an HTTP session that corrects them.

The SDK's exporter has five faults. It counts a redirect as a success without following it. It
ignores the rejections in a partial success. It retries after an untrusted certificate. Its log line
for a failed export contains the text of the HTTP client's exception, which may quote the URL or a
header, or the server's own words. `REQUESTS_CA_BUNDLE` overrides its certificate. The session given
to it corrects all five.
"""

from __future__ import annotations

import logging
import ssl
from http import HTTPStatus
from typing import Any

import requests
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import MeterProvider, NoOpMeterProvider
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from urllib3.exceptions import (
    ConnectTimeoutError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
)

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


_WHILE_READING = (
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)
"""What the HTTP client raises when it has sent a request and cannot read the response."""


class ClientError(requests.RequestException):
    """The HTTP client raised something else; a retry would not help."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"the HTTP client raised {cause}")


class AnswerReader(requests.Session):
    """A session that checks the answers. One export at a time uses it.

    Args:
        sent: the name of what is exported, for the log.
    """

    def __init__(self, sent: str) -> None:
        super().__init__()
        self._sent = sent
        self._rejected = 0
        self.refusal = ""
        """The type of the last exception with which the HTTP client refused to send."""

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        # Given here, the certificate of the exporter's own variable wins over REQUESTS_CA_BUNDLE.
        if isinstance(self.verify, str):
            kwargs["verify"] = self.verify
        try:
            response = super().request(*args, **kwargs)
        except (requests.ConnectionError, requests.Timeout) as error:
            reason = _reason(error)
            if any(isinstance(part, ssl.SSLCertVerificationError) for part in reason.args):
                raise Untrusted(_described(reason)) from None
            raise requests.ConnectionError(_described(reason)) from None
        except Exception as error:  # noqa: BLE001 - a proxy's URL alone raises four kinds
            kind = type(error).__name__
            if not isinstance(error, _WHILE_READING):
                self.refusal = kind
            raise ClientError(kind) from None
        # The exporter logs it, and it is the server's own text.
        response.reason = _phrase(response.status_code)
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
    reason = getattr(around, "reason", around)
    return reason if isinstance(reason, Exception) else error


def _described(reason: Exception) -> str:
    """An exception's text if it is known to quote no more than host and port, else its type."""
    tls = next((part for part in reason.args if isinstance(part, ssl.SSLError)), None)
    if tls is not None:
        return str(tls)
    quotes_nothing = (
        ConnectTimeoutError,
        NameResolutionError,
        NewConnectionError,
        ReadTimeoutError,
    )
    return str(reason) if isinstance(reason, quotes_nothing) else type(reason).__name__


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "an unknown status"


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
    meter_provider: MeterProvider | None = None, timeout_seconds: float | None = None
) -> tuple[OTLPSpanExporter, AnswerReader]:
    """The exporter, which reads the standard `OTEL_EXPORTER_OTLP_*` variables, and its session.

    Args:
        timeout_seconds: time limit for one export, retries included; None: the environment's.
    """
    session = AnswerReader("spans")
    exporter = OTLPSpanExporter(
        session=session,
        # Else the SDK loads the global provider that OTEL_PYTHON_METER_PROVIDER names.
        meter_provider=meter_provider or NoOpMeterProvider(),
        timeout=timeout_seconds,
    )
    return exporter, session


def otlp_metric_exporter(**options: Any) -> tuple[OTLPMetricExporter, AnswerReader]:
    """The same for metrics."""
    session = AnswerReader("metric points")
    exporter = OTLPMetricExporter(session=session, meter_provider=NoOpMeterProvider(), **options)
    return exporter, session
