"""Is this telemetry configuration going to work? `python -m serve doctor`.

Reads the settings as the service would, holds them against what the backend wants, sends one small
trace through the exporter that the service uses, and says in plain words what was answered and what
to change. A header's value is never shown, only its length; what a backend answers is shown with
every such value blanked out.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import re
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

import requests
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.util.re import parse_env_headers
from requests.adapters import HTTPAdapter
from urllib3.exceptions import NameResolutionError

from metrics.otlp import otlp_exporter
from metrics.tracing import MAX_EXPORT_BATCH_SIZE, SCOPE_NAME
from serve import __version__
from serve.errors import ConfigurationError
from serve.settings import ServeSettings
from serve.telemetry.backends import BACKENDS, Backend, Region, backend_of, key_owner
from serve.telemetry.setup import build_resource

TRACES_PATH = "/v1/traces"

SPAN_BYTES = 400
"""An encoded span, generously: 190 bytes measured over a request of 30 steps without a prompt."""

DEFAULT_TIMEOUT_SECONDS = 10.0

# Headers that are no secret, by which a backend is told what to do.
_HARMLESS_HEADERS = frozenset({"compute_stats", "dd-otlp-source", "x-honeycomb-dataset"})


class Verdict(StrEnum):
    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the checklist. `advice` says what to do, where there is something to do."""

    verdict: Verdict
    subject: str
    text: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the settings send spans, as the exporter reads them."""

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
        """The URL without a user's name and password, without a query, and without what in its
        path may be a key, as some backends take it there."""
        host = self.parts.netloc.rpartition("@")[2]
        return f"{self.parts.scheme}://{host}{_shown_path(self.parts.path)}"


def destination_of(settings: ServeSettings) -> Destination | None:
    """What the exporter would make of the settings; None where no endpoint is named.

    Raises:
        ConfigurationError: the endpoint is no URL.
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
    return Destination(
        url=url,
        variable=variable,
        headers=parse_env_headers(raw, liberal=True),
        headers_variable=f"OTEL_EXPORTER_OTLP_{'TRACES_' if of_traces else ''}HEADERS",
        raw_headers=raw,
        timeout_seconds=settings.otlp_traces_timeout
        or settings.otlp_timeout
        or DEFAULT_TIMEOUT_SECONDS,
    )


# The settings, without sending anything


def examine(settings: ServeSettings, stand_in_for: Backend | None = None) -> list[Finding]:
    """Hold the settings against what the backend wants.

    Args:
        stand_in_for: what the endpoint is, or forwards to, whatever its host is called.
    """
    findings: list[Finding] = []
    switch = next(
        (
            name
            for name, off in (
                ("ENABLE_TRACING=false", not settings.enable_tracing),
                ("OTEL_SDK_DISABLED=true", settings.sdk_disabled),
            )
            if off
        ),
        None,
    )
    if switch is not None:
        findings.append(
            Finding(Verdict.PROBLEM, "tracing", f"{switch} turns it off", "Unset that variable.")
        )
    destination = destination_of(settings)
    if destination is None:
        findings.append(
            Finding(
                Verdict.PROBLEM,
                "endpoint",
                "none is named, so no span is exported",
                f"Set OTEL_EXPORTER_OTLP_ENDPOINT: {_known_endpoints()}; or any other endpoint "
                "that takes OTLP over HTTP.",
            )
        )
        return findings
    backend = stand_in_for or backend_of(destination.host)
    region = None if backend is None else backend.region_of(destination.host)
    findings += _examine_endpoint(destination, backend, region, stand_in_for is not None)
    findings += _examine_headers(destination, backend, region)
    findings += _examine_the_rest(settings, destination, backend)
    return findings


def _known_endpoints() -> str:
    return "; ".join(
        f"{backend.name} {backend.base_url(backend.regions[0].host)}" for backend in BACKENDS
    )


def _examine_endpoint(
    destination: Destination, backend: Backend | None, region: Region | None, stands_in: bool
) -> Iterator[Finding]:
    yield Finding(
        Verdict.OK, "endpoint", f"{destination.variable}: spans go to {destination.shown}"
    )
    yield from _examine_form(destination, backend, region)
    if backend is None:
        yield Finding(
            Verdict.OK, "backend", f"{destination.host}, an OTLP/HTTP endpoint like any other"
        )
    elif stands_in:
        yield Finding(Verdict.OK, "backend", f"{destination.host} stands in for {backend.name}")
    elif region is None:
        yield Finding(
            Verdict.PROBLEM,
            "backend",
            f"{destination.host} is {backend.name}'s and takes no OTLP",
            f"Endpoints that do: {_endpoints_of(backend)}.",
        )
    else:
        place = ", ".join(part for part in (backend.name, region.name) if part)
        yield Finding(Verdict.OK, "backend", place)


def _examine_form(
    destination: Destination, backend: Backend | None, region: Region | None
) -> Iterator[Finding]:
    """Scheme, port and path."""
    parts = destination.parts
    change = ""
    if backend is not None and region is not None:
        change = f"Set OTEL_EXPORTER_OTLP_ENDPOINT={backend.base_url(destination.host)}"
    yield from _examine_path(destination, backend, change)
    if parts.username is not None or parts.password is not None:
        yield Finding(
            Verdict.PROBLEM,
            "endpoint",
            "it holds a user's name or password, which ends up in logs and error texts",
            f"Put it into {destination.headers_variable}, as Authorization=Basic%20<base64>.",
        )
    local = _is_local(destination.host)
    if parts.scheme == "http" and region is not None:
        yield Finding(Verdict.PROBLEM, "endpoint", "http:// is not served there", change)
    elif parts.scheme == "http" and not local and destination.headers:
        yield Finding(
            Verdict.NOTE,
            "endpoint",
            "http:// to another machine: headers and spans cross the network in the clear",
            "Use https:// unless that network is your own.",
        )
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if region is not None and backend is not None and port not in backend.ports:
        takes = " and ".join(map(str, sorted(backend.ports)))
        yield Finding(
            Verdict.PROBLEM, "endpoint", f"port {port} takes no OTLP/HTTP there, {takes} do", change
        )
    elif region is None and port == 4317:
        yield Finding(
            Verdict.PROBLEM,
            "endpoint",
            "port 4317 is by convention OTLP's gRPC, which is not spoken here",
            "Name the port for OTLP/HTTP, by convention 4318.",
        )


def _examine_path(
    destination: Destination, backend: Backend | None, change: str
) -> Iterator[Finding]:
    path, name = destination.parts.path, destination.variable
    base = path.removesuffix(TRACES_PATH)
    if base.endswith(TRACES_PATH):
        yield Finding(
            Verdict.PROBLEM,
            "endpoint",
            f"{TRACES_PATH} is appended to {name} and stands there already, so it stands twice",
            change or f"Remove {TRACES_PATH} from {name}.",
        )
    elif not path.endswith(TRACES_PATH):
        # A backend's own form is known; another endpoint may have any.
        yield Finding(
            Verdict.NOTE if backend is None else Verdict.PROBLEM,
            "endpoint",
            f"{name} is used as it stands, and does not end in {TRACES_PATH}",
            f"Append {TRACES_PATH}, or name it without in OTEL_EXPORTER_OTLP_ENDPOINT.",
        )
    elif backend is not None and base != backend.path:
        expected = f"{backend.path or 'nothing'} before {TRACES_PATH}"
        yield Finding(
            Verdict.PROBLEM,
            "endpoint",
            f"the path has {_shown_path(base) or 'nothing'} where {backend.name} wants {expected}",
            change or f"Make the path {backend.path}{TRACES_PATH}.",
        )


def _endpoints_of(backend: Backend) -> str:
    first: dict[str, str] = {}
    for region in backend.regions:  # a region's newest name comes first
        first.setdefault(region.name, backend.base_url(region.host))
    return ", ".join(f"{url} ({name})" if name else url for name, url in first.items())


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_private
    except ValueError:
        return host == "localhost" or "." not in host or host.endswith((".internal", ".local"))


def _examine_headers(
    destination: Destination, backend: Backend | None, region: Region | None
) -> Iterator[Finding]:
    headers, variable = destination.headers, destination.headers_variable
    for name, value in headers.items():
        shown = _shown_name(name, value)
        yield Finding(Verdict.OK, "header", f"{shown}, {len(value)} characters")
        if not value.strip("="):
            yield Finding(
                Verdict.PROBLEM,
                "header",
                f"{shown} has no value",
                f"Set {variable} to NAME=VALUE, the key as the value",
            )
    yield from _examine_encoding(destination)
    for name, value in headers.items():
        if re.search(r"<.*>|\$\{?\w+\}?$|^your[-_ ]", value, re.IGNORECASE):
            yield Finding(
                Verdict.PROBLEM,
                "header",
                f"{_shown_name(name, value)} holds a placeholder",
                "Put the key in its place.",
            )
        owner = key_owner(name)
        if owner is not None and backend is not None and owner is not backend:
            yield Finding(
                Verdict.PROBLEM,
                "header",
                f"{name} is how {owner.name} takes a key, not {backend.name}",
                f"Set {variable}={backend.header_form()}",
            )
    if backend is None:
        return
    key = headers.get(backend.header)
    if not key:
        yield Finding(
            Verdict.PROBLEM,
            "header",
            f"there is no {backend.header}, which holds {backend.name}'s key",
            f"Set {variable}={backend.header_form()}",
        )
        return
    remark = backend.remark(key, region.name if region else "", frozenset(headers))
    if remark is not None:
        yield Finding(
            Verdict.PROBLEM if remark.certain else Verdict.NOTE,
            "header",
            f"what {backend.header} holds {remark.text}",
            f"Set {variable}={backend.header_form()}" if remark.certain else "",
        )
    for name, (value, missing) in backend.wanted.items():
        if headers.get(name) != value:
            yield Finding(
                Verdict.NOTE,
                "header",
                f"without {name}={value} {missing}",
                f"Append ,{name}={value} to {variable}.",
            )


def _shown_path(path: str) -> str:
    return "/".join("***" if len(part) >= 16 else part for part in path.split("/"))


def _shown_name(name: str, value: str) -> str:
    """A header's name, unless a key may stand in its place."""
    if value.strip("=") and re.fullmatch(r"[a-z]+([-_]([a-z]+|[a-z0-9]{1,3}))*", name):
        return name
    return "a header (its name is not shown, it may be the key)"


def _examine_encoding(destination: Destination) -> Iterator[Finding]:
    """A value with a space in it is sent as it stands: whatever is percent-encoded in it, too."""
    for part in destination.raw_headers.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        shown = _shown_name(unquote(name).lower(), value)
        if len(value) > 1 and value[0] == value[-1] == "'":
            yield Finding(
                Verdict.PROBLEM,
                "header",
                f"{shown} is sent with the quotation marks around it",
                "Remove them.",
            )
        elif " " in value and re.search(r"%[0-9A-Fa-f]{2}", value):
            yield Finding(
                Verdict.PROBLEM,
                "header",
                f"{shown} is sent undecoded: its value is percent-encoded, but for a space",
                "Write that space as %20.",
            )
        elif " " in value:
            yield Finding(
                Verdict.NOTE,
                "header",
                f"{shown} has a space in its value, which not every SDK and tool takes",
                "Write it as %20.",
            )


def _examine_the_rest(
    settings: ServeSettings, destination: Destination, backend: Backend | None
) -> Iterator[Finding]:
    seconds = destination.timeout_seconds
    yield Finding(Verdict.OK, "timeout", f"{seconds:g} s for one export")
    if seconds < 1:
        yield Finding(
            Verdict.NOTE, "timeout", "a backend on another continent takes longer", "Allow 10 (s)."
        )
    certificate = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE") or os.environ.get(
        "OTEL_EXPORTER_OTLP_CERTIFICATE"
    )
    if certificate and not Path(certificate).is_file():
        yield Finding(
            Verdict.PROBLEM,
            "certificate",
            f"there is no file {certificate}, so no connection can be made",
            "Name the file of the endpoint's certificate authority, or unset the variable.",
        )
    bundle = next((n for n in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if os.environ.get(n)), None)
    if certificate and bundle:
        yield Finding(
            Verdict.PROBLEM,
            "certificate",
            f"{bundle} is set as well, and wins over {certificate}",
            "Unset it, or put the certificate into that bundle.",
        )
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL"
    )
    if protocol and protocol != "http/protobuf":
        yield Finding(
            Verdict.NOTE,
            "protocol",
            f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} is not heeded: spans go as http/protobuf",
            "The endpoint must be one for OTLP/HTTP.",
        )
    yield _examine_sampling(settings)
    if backend is None:
        return
    if backend.max_bytes is not None:
        most = (settings.bsp_max_export_batch_size or MAX_EXPORT_BATCH_SIZE) * SPAN_BYTES
        if most > backend.max_bytes:
            yield Finding(
                Verdict.PROBLEM,
                "batches",
                f"one can be of {most / 1e6:.1f} MB; "
                f"{backend.name} takes {backend.max_bytes / 1e6:g} MB",
                f"Set OTEL_BSP_MAX_EXPORT_BATCH_SIZE to {backend.max_bytes // SPAN_BYTES} or less",
            )
    wants_delta = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
    same = settings.otlp_metrics_endpoint is None  # else they go elsewhere
    if (
        backend.delta_metrics
        and settings.otlp_metrics
        and same
        and settings.otlp_metrics_temporality != "delta"
    ):
        yield Finding(
            Verdict.PROBLEM,
            "metrics",
            f"{backend.name} takes metrics only as differences",
            f"Set {wants_delta}=delta",
        )


def _examine_sampling(settings: ServeSettings) -> Finding:
    sampler = settings.traces_sampler or "parentbased_traceidratio"
    root = sampler.removeprefix("parentbased_")
    rate = {"always_on": 1.0, "always_off": 0.0}.get(root, settings.rate)
    unless = ", unless its caller decided" if sampler.startswith("parentbased_") else ""
    if rate == 0:
        return Finding(
            Verdict.NOTE,
            "sampling",
            f"no trace is exported{unless}",
            "Set OTEL_SAMPLE_RATE above 0.",
        )
    share = "every trace" if rate == 1 else f"one trace in {1 / rate:.4g}"
    return Finding(Verdict.OK, "sampling", f"{share} is exported{unless}")


# Sending


@dataclass(slots=True)
class _Exchange:
    """What was answered to the exporter, or why nothing was.

    One answer is enough, though the exporter would ask again for a better one; a connection that
    fails is tried once more, as it does at once.
    """

    answer: requests.Response | None = None
    errors: list[Exception] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)


class _Observing(HTTPAdapter):
    """Lets requests through and notes what comes of them."""

    def __init__(self, exchange: _Exchange) -> None:
        super().__init__()
        self._exchange = exchange

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        try:
            response = super().send(*args, **kwargs)
            _ = response.content  # read here, where what cuts it off is noted
        except Exception as error:
            self._exchange.errors.append(error)
            if len(self._exchange.errors) > 1:
                self._exchange.over.set()
            raise
        self._exchange.answer = response
        self._exchange.over.set()
        return response


def send(settings: ServeSettings, stand_in_for: Backend | None = None) -> list[Finding]:
    """Send a small trace through the service's own exporter and explain the answer."""
    destination = destination_of(settings)
    if destination is None:
        return []
    backend = stand_in_for or backend_of(destination.host)
    exchange = _Exchange()
    exporter, session = otlp_exporter()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Observing(exchange))
    spans, trace_id = _small_trace(settings)
    with _quiet():
        started = time.monotonic()

        def export() -> None:
            exporter.export(spans)
            exchange.over.set()

        exporting = threading.Thread(target=export, name="doctor", daemon=True)
        exporting.start()
        # The exporter keeps to its timeout but where an answer comes byte by byte.
        exchange.over.wait(destination.timeout_seconds + 2)
        seconds = time.monotonic() - started
        exporter.shutdown()  # type: ignore[no-untyped-call]
        exporting.join(1)
    if exchange.answer is not None:
        explain = _Explaining(destination, backend)
        return [explain.answer(exchange.answer, len(spans), trace_id, seconds)]
    return [_explain_silence(destination, exchange.errors, seconds)]


def _small_trace(settings: ServeSettings) -> tuple[tuple[ReadableSpan, ...], str]:
    kept = InMemorySpanExporter()
    provider = TracerProvider(
        sampler=ALWAYS_ON, resource=build_resource(settings), shutdown_on_exit=False
    )
    provider.add_span_processor(SimpleSpanProcessor(kept))
    tracer = provider.get_tracer(SCOPE_NAME, __version__)
    with tracer.start_as_current_span("doctor") as root, tracer.start_as_current_span("checkup"):
        trace_id = trace.format_trace_id(root.get_span_context().trace_id)
    return kept.get_finished_spans(), trace_id


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs what went wrong in its own words; ours say it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


class _Explaining:
    """Puts an answer into words."""

    def __init__(self, destination: Destination, backend: Backend | None) -> None:
        self._destination = destination
        self._backend = backend

    def answer(
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
                Verdict.PROBLEM,
                "answer",
                f"{said}: a redirect{to}, which is not followed; spans would be lost",
                f"Name the address that takes the spans in {self._destination.variable}.",
            )
        means, advice = self._refusal(response)
        quoted = self._quoted(response)
        return Finding(Verdict.PROBLEM, "answer", f"{said}: {means}{quoted}", advice)

    def _accepted(
        self, response: requests.Response, said: str, spans: int, trace_id: str
    ) -> Finding:
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind == "text/html":
            return Finding(
                Verdict.PROBLEM,
                "answer",
                f"{said}: a web page, so what answers is no OTLP endpoint though it says yes",
                f"Check host and path of {self._destination.variable}.",
            )
        rejected, message = _partial_success(response, kind)
        if rejected:
            return Finding(
                Verdict.PROBLEM,
                "answer",
                f"{said}: {rejected} of {spans} spans were refused{self._quote(message)}",
                "Change what the backend names.",
            )
        warned = f", with a warning{self._quote(message)}" if message else ""
        return Finding(
            Verdict.NOTE if message else Verdict.OK,
            "answer",
            f"{said}: {spans} spans were taken{warned}; look for trace {trace_id}",
        )

    def _refusal(self, response: requests.Response) -> tuple[str, str]:
        """What a status of 400 and above means, and what to do."""
        status, backend = response.status_code, self._backend
        variable = self._destination.variable
        if backend is not None and status in backend.refusals:
            advice = f"Set {self._destination.headers_variable}={backend.header_form()}"
            regions = f", or the endpoint of your region: {_endpoints_of(backend)}"
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
                    f"Check {self._destination.headers_variable}.",
                )
            case 404 | 405:
                return "nothing takes spans at that path", f"Check the path of {variable}."
            case 413:
                limit = ""
                if backend is not None and backend.max_bytes is not None:
                    limit = f" {backend.name} takes {backend.max_bytes / 1e6:g} MB."
                return "the export is too large", f"Lower OTEL_BSP_MAX_EXPORT_BATCH_SIZE.{limit}"
            case 415:
                return (
                    "protobuf is not taken there",
                    f"Check that {variable} names an OTLP/HTTP endpoint.",
                )
            case 429:
                wait = response.headers.get("Retry-After", "")
                after = f" for {wait} s" if wait.isdigit() else ""
                return (
                    f"the backend takes no more{after}: a limit of the account is reached",
                    "Wait, lower OTEL_SAMPLE_RATE, or raise the limit there.",
                )
            case _ if status >= 500:
                return (
                    "the backend, or a proxy before it, is in trouble",
                    "Try again later; its status page may know.",
                )
        return "refused", "See what the endpoint's documentation says of this status."

    def _quoted(self, response: requests.Response) -> str:
        """What a refusal says of itself: text as it stands, OTLP's message out of its protobuf."""
        kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind not in ("application/json", "text/plain"):
            return ""
        return self._quote(response.content[:10_000].decode("utf-8", "replace"))

    def _quote(self, text: str) -> str:
        """A server's words on one line, short, and without what was sent to it."""
        words = re.sub(r"[^\x20-\x7e]+", " ", text.replace("\\/", "/")).split()
        blanked = _without(" ".join(words), self._secrets())
        shortened = textwrap.shorten(blanked, 160, placeholder=" ...")
        return f' ("{shortened}")' if shortened else ""

    def _secrets(self) -> set[str]:
        """Every form in which a header's value or the URL's password could be quoted."""
        password = self._destination.parts.password or ""
        found = {password, unquote(password)}
        for part in self._destination.raw_headers.split(","):
            found.add(part.partition("=")[2].strip())
        for name, value in self._destination.headers.items():
            if name in _HARMLESS_HEADERS:
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


def _without(text: str, secrets: set[str]) -> str:
    """`text` with stars for all that it shares with a secret, in pieces as short as this."""
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
    """Spans refused of an accepted batch, and the backend's message."""
    if kind == "application/json":
        try:
            told = response.json().get("partialSuccess") or {}
            return int(told.get("rejectedSpans") or 0), str(told.get("errorMessage") or "")
        except (ValueError, TypeError, AttributeError):
            return 0, ""
    if kind not in ("application/x-protobuf", "application/protobuf"):
        return 0, ""
    try:
        partial = ExportTraceServiceResponse.FromString(response.content).partial_success
    except DecodeError:
        return 0, ""
    return partial.rejected_spans, partial.error_message


def _explain_silence(destination: Destination, errors: list[Exception], seconds: float) -> Finding:
    """Why there was no answer. The exception's own text is not shown: it may hold the URL."""
    error = errors[-1] if errors else None
    host, port = destination.host, destination.parts.port
    where = f"{host} port {port or (443 if destination.parts.scheme == 'https' else 80)}"
    proxied = ""
    if proxy := requests.utils.get_environ_proxies(destination.shown).get(destination.parts.scheme):
        proxied = f" The connection goes through the proxy {urlsplit(proxy).hostname}."
    reason = getattr(error.args[0], "reason", None) if error is not None and error.args else None
    if isinstance(error, requests.exceptions.ProxyError):
        text, advice = "the proxy lets nothing through", "Check HTTPS_PROXY and NO_PROXY."
    elif isinstance(error, requests.exceptions.SSLError):
        detail = _certificate_trouble(reason)
        text = f"no trusted connection to {where}{detail}"
        advice = (
            "A certificate authority of your own goes into OTEL_EXPORTER_OTLP_CERTIFICATE; an "
            "endpoint without TLS is named with http://."
        )
    elif isinstance(reason, NameResolutionError):
        text, advice = f"there is no host {host}", f"Check {destination.variable}."
    elif isinstance(error, requests.exceptions.ConnectTimeout):
        text = f"{where} did not accept a connection in {seconds:.0f} s"
        advice = "A firewall may drop it; check the host and what may leave this network."
    elif isinstance(error, requests.exceptions.ReadTimeout) or error is None:
        text = f"{where} accepted the spans and said nothing for {seconds:.0f} s"
        advice = "Check that it takes OTLP/HTTP; else allow it longer, OTEL_EXPORTER_OTLP_TIMEOUT."
    elif reason is not None:
        text = f"nothing listens at {where}"
        advice = f"Check {destination.variable}, and that the endpoint is up."
    else:
        text = f"{where} closed the connection or does not speak HTTP"
        advice = "Check scheme and port: https:// or http://, and OTLP/HTTP's port, not gRPC's."
    return Finding(Verdict.PROBLEM, "answer", f"none: {text}", advice + proxied)


def _certificate_trouble(reason: object) -> str:
    cause = reason.args[0] if isinstance(reason, Exception) and reason.args else None
    message = getattr(cause, "verify_message", "")
    return f": {message}" if message else ""


# Telling


def run(
    settings: ServeSettings,
    say: Callable[[str], None],
    *,
    sends: bool = True,
    stand_in_for: Backend | None = None,
    width: int = 100,
) -> int:
    """Tell the whole checklist. Returns the exit status: 0 if all is well, 1 on a problem."""

    def tell(findings: list[Finding]) -> int:
        """Returns how many problems there are."""
        wrong = [finding.subject for finding in findings if finding.verdict is Verdict.PROBLEM]
        for finding in findings:
            # A fact about something that has a problem as well is not "ok".
            only_told = finding.verdict is Verdict.OK and finding.subject in wrong
            say(_line(finding, "" if only_told else finding.verdict.value, width))
        return len(wrong)

    problems = tell(examine(settings, stand_in_for))
    if sends:
        problems += tell(send(settings, stand_in_for))
    unsent = "" if sends else " Nothing was sent."
    if problems:
        count = "one problem" if problems == 1 else f"{problems} problems"
        say(f"\nSpans will not arrive as they should: {count}.{unsent}")
        return 1
    say(f"\nNothing is wrong with the settings.{unsent}" if unsent else "\nSpans arrive.")
    return 0


def _line(finding: Finding, verdict: str, width: int) -> str:
    """A finding on lines of at most `width`, its advice below it."""
    lead = f"{verdict:<8} {finding.subject:<12} "
    indent = " " * len(lead)
    options: Any = {"break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(
        finding.text, width, initial_indent=lead, subsequent_indent=indent, **options
    )
    if finding.advice:
        lines += textwrap.wrap(
            finding.advice,
            width,
            initial_indent=indent + "-> ",
            subsequent_indent=indent + "   ",
            **options,
        )
    return "\n".join(lines)
