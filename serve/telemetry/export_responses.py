"""The doctor's explanation of what came back from a trial export: a response, or none.

A server's text is shown with every secret that was sent to it removed.
"""

from __future__ import annotations

import base64
import binascii
import re
import textwrap
from urllib.parse import quote, unquote, urlsplit

import requests
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from urllib3.exceptions import NameResolutionError

from serve.telemetry.backends import Backend, endpoints_of
from serve.telemetry.finding import Finding, Severity
from serve.telemetry.trace_endpoint import TraceEndpoint

# Headers that hold options instead of secrets.
_OPTION_HEADERS = frozenset({"compute_stats", "dd-otlp-source", "x-honeycomb-dataset"})


class ResponseExplainer:
    """Explains the endpoint's response to an export."""

    def __init__(self, endpoint: TraceEndpoint, backend: Backend | None) -> None:
        self._endpoint = endpoint
        self._backend = backend

    def explain(
        self, response: requests.Response, spans: int, trace_id: str, seconds: float
    ) -> Finding:
        status = response.status_code
        said = f"{status} after {seconds:.2f} s"
        if 200 <= status < 300:
            return self._accepted(response, said, spans, trace_id)
        if 300 <= status < 400:
            where = urlsplit(response.headers.get("Location", ""))
            to = f" to {where.scheme}://{where.hostname}" if where.hostname else ""
            return Finding(
                Severity.PROBLEM,
                "answer",
                f"{said}: a redirect{to}, which is not followed; spans would be lost",
                f"Put the URL that accepts spans into {self._endpoint.variable}.",
            )
        means, advice = self._refusal(response)
        quoted = self._quoted(response)
        return Finding(Severity.PROBLEM, "answer", f"{said}: {means}{quoted}", advice)

    def _accepted(
        self, response: requests.Response, said: str, spans: int, trace_id: str
    ) -> Finding:
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind == "text/html":
            return Finding(
                Severity.PROBLEM,
                "answer",
                f"{said}: a web page, so this is not an OTLP endpoint despite the status",
                f"Check host and path of {self._endpoint.variable}.",
            )
        rejected, message = _partial_success(response, kind)
        if rejected:
            return Finding(
                Severity.PROBLEM,
                "answer",
                f"{said}: {rejected} of {spans} spans were refused{self._quote(message)}",
                "Correct what the backend's message names.",
            )
        warned = f", with a warning{self._quote(message)}" if message else ""
        return Finding(
            Severity.NOTE if message else Severity.OK,
            "answer",
            f"{said}: {spans} spans were accepted{warned}; look for trace {trace_id}",
        )

    def _refusal(self, response: requests.Response) -> tuple[str, str]:
        """What a status of 400 and above means, and the advice for it."""
        status, backend = response.status_code, self._backend
        variable = self._endpoint.variable
        if backend is not None and status in backend.refusals:
            advice = f"Set {self._endpoint.headers_variable}={backend.header_form()}"
            regions = f", or the endpoint of your region: {endpoints_of(backend)}"
            return backend.refusals[status], advice + regions + "."
        match status:
            case 400:
                return (
                    "the request was not understood",
                    f"Check that {variable} names an OTLP/HTTP endpoint.",
                )
            case 401 | 403:
                return (
                    "the key is missing, wrong, or not for this endpoint",
                    f"Check {self._endpoint.headers_variable}.",
                )
            case 404 | 405:
                return "there is no OTLP endpoint at that path", f"Check the path of {variable}."
            case 413:
                limit = ""
                if backend is not None and backend.max_bytes is not None:
                    limit = f" {backend.name} accepts {backend.max_bytes / 1e6:g} MB."
                return "the export is too large", f"Lower OTEL_BSP_MAX_EXPORT_BATCH_SIZE.{limit}"
            case 415:
                return (
                    "the endpoint does not accept protobuf",
                    f"Check that {variable} names an OTLP/HTTP endpoint.",
                )
            case 429:
                wait = response.headers.get("Retry-After", "")
                after = f" for {wait} s" if wait.isdigit() else ""
                return (
                    f"the backend accepts no more{after}: a limit of the account is reached",
                    "Wait, lower OTEL_SAMPLE_RATE, or raise the limit there.",
                )
            case _ if status >= 500:
                return (
                    "the backend failed, or a proxy in front of it",
                    "Try again later; see its status page.",
                )
        return "refused", "See the endpoint's documentation about this status."

    def _quoted(self, response: requests.Response) -> str:
        """The text of an error response, fit to be shown; empty unless it is text or JSON."""
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind not in ("application/json", "text/plain"):
            return ""
        return self._quote(response.content[:10_000].decode("utf-8", "replace"))

    def _quote(self, text: str) -> str:
        """A server's text in one short line, with everything secret that was sent to it removed."""
        words = re.sub(r"[^\x20-\x7e]+", " ", text.replace("\\/", "/")).split()
        blanked = _with_stars_for(" ".join(words), self._secrets())
        shortened = textwrap.shorten(blanked, 160, placeholder=" ...")
        return f' ("{shortened}")' if shortened else ""

    def _secrets(self) -> set[str]:
        """All forms in which the server could quote a header's value or the URL's password."""
        password = self._endpoint.parts.password or ""
        found = {password, unquote(password)}
        for part in self._endpoint.raw_headers.split(","):
            found.add(part.partition("=")[2].strip())
        for name, value in self._endpoint.headers.items():
            if name in _OPTION_HEADERS:
                found.discard(value)
                continue
            credentials = value.rpartition(" ")[2]
            found |= {value, credentials, quote(value), quote(credentials, safe="")}
            try:
                decoded = base64.b64decode(credentials, validate=True).decode()
            except (binascii.Error, UnicodeDecodeError, ValueError):
                continue
            found |= {decoded, decoded.partition(":")[2]}
        return found


def _with_stars_for(text: str, secrets: set[str]) -> str:
    """`text` with stars in place of every 5 characters in a row that a secret contains too."""
    piece = 5
    shown = [True] * len(text)
    for secret in secrets:
        length = min(piece, len(secret))
        pieces = {secret[at : at + length] for at in range(len(secret) - length + 1)} - {""}
        for at in range(len(text) - length + 1):
            if text[at : at + length].strip() and text[at : at + length] in pieces:
                shown[at : at + length] = [False] * length
    starred = "".join(
        character if keep else "*" for character, keep in zip(text, shown, strict=True)
    )
    return re.sub(r"\*+", "***", starred)


def _partial_success(response: requests.Response, kind: str) -> tuple[int, str]:
    """How many spans of an accepted batch the backend rejected, and its message."""
    if kind == "application/json":
        try:
            partial = response.json().get("partialSuccess") or {}
            return int(partial.get("rejectedSpans") or 0), str(partial.get("errorMessage") or "")
        except (ValueError, TypeError, AttributeError):
            return 0, ""
    if kind not in ("application/x-protobuf", "application/protobuf"):
        return 0, ""
    try:
        partial = ExportTraceServiceResponse.FromString(response.content).partial_success
    except DecodeError:
        return 0, ""
    return partial.rejected_spans, partial.error_message


def explain_no_response(
    endpoint: TraceEndpoint, errors: list[Exception], seconds: float
) -> Finding:
    """Explain why there was no response.

    The exceptions' texts are not shown: they may contain the URL.
    """
    error = errors[-1] if errors else None
    host, port = endpoint.host, endpoint.parts.port
    where = f"{host} port {port or (443 if endpoint.parts.scheme == 'https' else 80)}"
    proxied = ""
    if proxy := requests.utils.get_environ_proxies(endpoint.shown).get(endpoint.parts.scheme):
        proxied = f" The connection goes through the proxy {urlsplit(proxy).hostname}."
    reason = getattr(error.args[0], "reason", None) if error is not None and error.args else None
    if isinstance(error, requests.exceptions.ProxyError):
        text, advice = "the proxy made no connection", "Check HTTPS_PROXY and NO_PROXY."
    elif isinstance(error, requests.exceptions.SSLError):
        detail = _certificate_error(reason)
        text = f"no trusted connection to {where}{detail}"
        advice = (
            "A certificate authority of your own goes into OTEL_EXPORTER_OTLP_CERTIFICATE; an "
            "endpoint without TLS has an http:// URL."
        )
    elif isinstance(reason, NameResolutionError):
        text, advice = f"there is no host {host}", f"Check {endpoint.variable}."
    elif isinstance(error, requests.exceptions.ConnectTimeout):
        text = f"{where} did not accept a connection in {seconds:.0f} s"
        advice = (
            "A firewall may drop the packets; check the host and this network's outgoing rules."
        )
    elif isinstance(error, requests.exceptions.ReadTimeout) or error is None:
        text = f"{where} accepted the spans and sent no response for {seconds:.0f} s"
        advice = "Check that it accepts OTLP/HTTP; if it is slow, raise OTEL_EXPORTER_OTLP_TIMEOUT."
    elif reason is not None:
        text = f"nothing listens at {where}"
        advice = f"Check {endpoint.variable}, and that the endpoint is up."
    else:
        text = f"{where} closed the connection or does not speak HTTP"
        advice = "Check scheme and port: https:// or http://, and OTLP/HTTP's port, not gRPC's."
    return Finding(Severity.PROBLEM, "answer", f"none: {text}", advice + proxied)


def _certificate_error(reason: object) -> str:
    cause = reason.args[0] if isinstance(reason, Exception) and reason.args else None
    message = getattr(cause, "verify_message", "")
    return f": {message}" if message else ""
