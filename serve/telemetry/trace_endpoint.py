"""The endpoint that spans go to: its URL and headers, as OpenTelemetry's exporter reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, quote, urlsplit

from opentelemetry.util.re import parse_env_headers

from serve.settings import ServeSettings
from serve.telemetry.backends import Backend

TRACES_PATH = "/v1/traces"

OPTION_HEADERS = frozenset({"compute_stats", "dd-otlp-source", "x-honeycomb-dataset"})
"""Headers that hold options instead of secrets."""


@dataclass(frozen=True, slots=True)
class TraceEndpoint:
    """The endpoint that the exporter sends spans to, as it reads it from the settings.

    Attributes:
        variable, headers_variable: the environment variables that name URL and headers.
        headers: the headers decoded, as they are sent.
        raw_headers: the headers as the variable holds them.
        timeout_seconds: time limit for one export, retries included.
        timeout_variable: the variable that a longer time limit goes into.
        certificate_variable: the variable that a certificate authority goes into.
    """

    url: str = field(repr=False)
    variable: str
    headers: Mapping[str, str] = field(repr=False)
    headers_variable: str
    raw_headers: str = field(repr=False)
    timeout_seconds: float
    timeout_variable: str
    certificate_variable: str

    @property
    def parts(self) -> SplitResult:
        return urlsplit(self.url)

    @property
    def host(self) -> str:
        return (self.parts.hostname or "").lower()

    @property
    def shown(self) -> str:
        """The URL fit to be shown: without user name, password and query, and with stars in place
        of what may be a key in its path."""
        host = self.parts.netloc.rpartition("@")[2]
        return f"{self.parts.scheme}://{host}{shown_path(self.parts.path)}"

    def change_of_url(self, base: str) -> str:
        """The advice to send spans to the OTLP endpoint `base`, which has no `/v1/traces`."""
        path = "" if self.variable == "OTEL_EXPORTER_OTLP_ENDPOINT" else TRACES_PATH
        return f"Set {self.variable}={base}{path}"

    def change_of_key(self, backend: Backend) -> str:
        """The advice to send a backend's key, beside the options that are sent already."""
        form = backend.header_form()
        for name in OPTION_HEADERS & self.headers.keys() - backend.wanted.keys():
            form += f",{name}={quote(self.headers[name])}"
        return f"Set {self.headers_variable}={form}"


def trace_endpoint(settings: ServeSettings) -> TraceEndpoint | None:
    """The endpoint that the settings name; None if they name none."""
    if settings.otlp_traces_endpoint is not None:
        url, variable = settings.otlp_traces_endpoint, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    elif settings.otlp_endpoint is not None:
        url = settings.otlp_endpoint.removesuffix("/") + TRACES_PATH
        variable = "OTEL_EXPORTER_OTLP_ENDPOINT"
    else:
        return None
    of_traces = settings.otlp_traces_headers is not None
    certificate = "TRACES_" if settings.otlp_traces_certificate is not None else ""
    raw = settings.otlp_traces_headers or settings.otlp_headers or ""
    return TraceEndpoint(
        url=url,
        variable=variable,
        headers=parse_env_headers(raw, liberal=True),
        headers_variable=f"OTEL_EXPORTER_OTLP_{'TRACES_' if of_traces else ''}HEADERS",
        raw_headers=raw,
        timeout_seconds=settings.traces_timeout_seconds,
        timeout_variable=_timeout_variable(settings),
        certificate_variable=f"OTEL_EXPORTER_OTLP_{certificate}CERTIFICATE",
    )


def _timeout_variable(settings: ServeSettings) -> str:
    milliseconds = settings.bsp_export_timeout
    if milliseconds is not None and milliseconds / 1e3 == settings.traces_timeout_seconds:
        return "OTEL_BSP_EXPORT_TIMEOUT"
    of_traces = "TRACES_" if settings.otlp_traces_timeout is not None else ""
    return f"OTEL_EXPORTER_OTLP_{of_traces}TIMEOUT"


def shown_path(path: str) -> str:
    """A URL's path with stars in place of every part that is long enough to be a key."""
    return "/".join("***" if len(part) >= 16 else part for part in path.split("/"))
