"""The endpoint that spans go to: its URL and headers, as OpenTelemetry's exporter reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from opentelemetry.util.re import parse_env_headers

from serve.errors import ConfigurationError
from serve.settings import ServeSettings

TRACES_PATH = "/v1/traces"

DEFAULT_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class TraceEndpoint:
    """The endpoint that the exporter sends spans to, as it reads it from the settings.

    Attributes:
        variable, headers_variable: the environment variables that name URL and headers.
        headers: the headers decoded, as they are sent.
        raw_headers: the headers as the variable holds them.
    """

    url: str = field(repr=False)
    variable: str
    headers: Mapping[str, str] = field(repr=False)
    headers_variable: str
    raw_headers: str = field(repr=False)
    timeout_seconds: float

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


def trace_endpoint(settings: ServeSettings) -> TraceEndpoint | None:
    """The endpoint that the settings name; None if they name none.

    Raises:
        ConfigurationError: the endpoint is not a valid URL.
    """
    if settings.otlp_traces_endpoint is not None:
        url, variable = settings.otlp_traces_endpoint, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
    elif settings.otlp_endpoint is not None:
        url = settings.otlp_endpoint.removesuffix("/") + TRACES_PATH
        variable = "OTEL_EXPORTER_OTLP_ENDPOINT"
    else:
        return None
    try:
        _ = urlsplit(url).port
    except ValueError:
        raise ConfigurationError(
            f"{variable} is no URL: http:// or https://, a host, and a port from 1 to 65535 is "
            "allowed."
        ) from None
    of_traces = settings.otlp_traces_headers is not None
    raw = settings.otlp_traces_headers or settings.otlp_headers or ""
    return TraceEndpoint(
        url=url,
        variable=variable,
        headers=parse_env_headers(raw, liberal=True),
        headers_variable=f"OTEL_EXPORTER_OTLP_{'TRACES_' if of_traces else ''}HEADERS",
        raw_headers=raw,
        timeout_seconds=settings.otlp_traces_timeout
        or settings.otlp_timeout
        or DEFAULT_TIMEOUT_SECONDS,
    )


def shown_path(path: str) -> str:
    """A URL's path with stars in place of every part that is long enough to be a key."""
    return "/".join("***" if len(part) >= 16 else part for part in path.split("/"))
