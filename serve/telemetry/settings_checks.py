"""The doctor's checks of the settings, without sending anything.

No check shows a header's value, only its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import unquote

from metrics.tracing import MAX_EXPORT_BATCH_SIZE
from serve.settings import ServeSettings
from serve.telemetry.backends import (
    BACKENDS,
    Backend,
    Region,
    backend_of,
    endpoints_of,
    key_owner,
)
from serve.telemetry.finding import Finding, Severity
from serve.telemetry.trace_endpoint import TRACES_PATH, TraceEndpoint, shown_path, trace_endpoint

SPAN_BYTES = 400
"""An upper estimate of an encoded span: 190 bytes measured, over a request of 30 steps."""


def check_settings(settings: ServeSettings, treat_as: Backend | None = None) -> list[Finding]:
    """Check the settings against what the backend needs.

    Args:
        treat_as: the backend that the endpoint forwards to, if its host does not show it.
    """
    findings = list(_check_switches(settings))
    endpoint = trace_endpoint(settings)
    if endpoint is None:
        findings.append(
            Finding(
                Severity.PROBLEM,
                "endpoint",
                "none is set, so no span is exported",
                f"Set OTEL_EXPORTER_OTLP_ENDPOINT: {_known_endpoints()}; or any other endpoint "
                "that accepts OTLP over HTTP.",
            )
        )
        return findings
    backend = treat_as or backend_of(endpoint.host)
    region = None if backend is None else backend.region_of(endpoint.host)
    findings += _check_endpoint(endpoint, backend, region, treat_as is not None)
    findings += _check_headers(endpoint, backend, region)
    findings += _check_timeout(endpoint)
    findings += _check_certificate(settings)
    findings += _check_protocol(settings)
    findings.append(_check_sampling(settings))
    if backend is not None:
        findings += _check_batch_size(settings, backend)
        findings += _check_pushed_metrics(settings, backend)
    return findings


def _check_switches(settings: ServeSettings) -> Iterator[Finding]:
    switch = None
    if settings.sdk_disabled:
        switch = "OTEL_SDK_DISABLED=true"
    if not settings.enable_tracing:
        switch = "ENABLE_TRACING=false"
    if switch is not None:
        yield Finding(Severity.PROBLEM, "tracing", f"{switch} turns it off", "Unset that variable.")


def _known_endpoints() -> str:
    return "; ".join(
        f"{backend.name} {backend.base_url(backend.regions[0].host)}" for backend in BACKENDS
    )


def _check_endpoint(
    endpoint: TraceEndpoint, backend: Backend | None, region: Region | None, treated: bool
) -> Iterator[Finding]:
    yield Finding(Severity.OK, "endpoint", f"{endpoint.variable}: spans go to {endpoint.shown}")
    yield from _check_form(endpoint, backend, region)
    if backend is None:
        yield Finding(
            Severity.OK, "backend", f"{endpoint.host}, an OTLP/HTTP endpoint like any other"
        )
    elif treated:
        yield Finding(Severity.OK, "backend", f"{endpoint.host} is treated as {backend.name}")
    elif region is None:
        yield Finding(
            Severity.PROBLEM,
            "backend",
            f"{endpoint.host} belongs to {backend.name} and does not accept OTLP",
            f"Endpoints that accept it: {endpoints_of(backend)}.",
        )
    else:
        place = ", ".join(part for part in (backend.name, region.name) if part)
        yield Finding(Severity.OK, "backend", place)


def _check_form(
    endpoint: TraceEndpoint, backend: Backend | None, region: Region | None
) -> Iterator[Finding]:
    """Check scheme, port and path."""
    parts = endpoint.parts
    change = ""
    if backend is not None and region is not None:
        change = f"Set OTEL_EXPORTER_OTLP_ENDPOINT={backend.base_url(endpoint.host)}"
    yield from _check_path(endpoint, backend, change)
    if parts.username is not None or parts.password is not None:
        yield Finding(
            Severity.PROBLEM,
            "endpoint",
            "it contains a user name or password, which logs and error texts would show",
            f"Put it into {endpoint.headers_variable}, as Authorization=Basic%20<base64>.",
        )
    local = _is_local(endpoint.host)
    if parts.scheme == "http" and region is not None:
        yield Finding(Severity.PROBLEM, "endpoint", "this host accepts https:// only", change)
    elif parts.scheme == "http" and not local and endpoint.headers:
        yield Finding(
            Severity.NOTE,
            "endpoint",
            "http:// to another machine: headers and spans cross the network in the clear",
            "Use https:// unless that network is your own.",
        )
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if region is not None and backend is not None and port not in backend.ports:
        accepted = " and ".join(map(str, sorted(backend.ports)))
        yield Finding(
            Severity.PROBLEM,
            "endpoint",
            f"this host accepts OTLP/HTTP on port {accepted}, not on {port}",
            change,
        )
    elif region is None and port == 4317:
        yield Finding(
            Severity.PROBLEM,
            "endpoint",
            "port 4317 is by convention OTLP over gRPC; spans are sent over HTTP",
            "Name the port for OTLP/HTTP, by convention 4318.",
        )


def _check_path(endpoint: TraceEndpoint, backend: Backend | None, change: str) -> Iterator[Finding]:
    path, name = endpoint.parts.path, endpoint.variable
    base = path.removesuffix(TRACES_PATH)
    if base.endswith(TRACES_PATH):
        yield Finding(
            Severity.PROBLEM,
            "endpoint",
            f"{TRACES_PATH} is appended to {name}, which ends in it, so the path has it twice",
            change or f"Remove {TRACES_PATH} from {name}.",
        )
    elif not path.endswith(TRACES_PATH):
        # Another endpoint than a known backend's may have any path.
        yield Finding(
            Severity.NOTE if backend is None else Severity.PROBLEM,
            "endpoint",
            f"{name} is used unchanged, and does not end in {TRACES_PATH}",
            f"Append {TRACES_PATH}, or name it without in OTEL_EXPORTER_OTLP_ENDPOINT.",
        )
    elif backend is not None and base != backend.path:
        yield Finding(
            Severity.PROBLEM,
            "endpoint",
            f"before {TRACES_PATH} the path has {shown_path(base) or 'nothing'}; "
            f"{backend.name} needs {backend.path or 'nothing'}",
            change or f"Make the path {backend.path}{TRACES_PATH}.",
        )


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_private
    except ValueError:
        return host == "localhost" or "." not in host or host.endswith((".internal", ".local"))


def _check_headers(
    endpoint: TraceEndpoint, backend: Backend | None, region: Region | None
) -> Iterator[Finding]:
    headers, variable = endpoint.headers, endpoint.headers_variable
    for name, value in headers.items():
        shown = _shown_name(name, value)
        yield Finding(Severity.OK, "header", f"{shown}, {len(value)} characters")
        if not value.strip("="):
            yield Finding(
                Severity.PROBLEM,
                "header",
                f"{shown} has no value",
                f"Set {variable} to NAME=VALUE, the key as the value",
            )
    yield from _check_encoding(endpoint)
    for name, value in headers.items():
        if re.search(r"<.*>|\$\{?\w+\}?$|^your[-_ ]", value, re.IGNORECASE):
            yield Finding(
                Severity.PROBLEM,
                "header",
                f"{_shown_name(name, value)} contains a placeholder",
                "Put the key in its place.",
            )
        owner = key_owner(name)
        if owner is not None and backend is not None and owner is not backend:
            yield Finding(
                Severity.PROBLEM,
                "header",
                f"{name} is the header of {owner.name}'s key, not of {backend.name}'s",
                f"Set {variable}={backend.header_form()}",
            )
    if backend is None:
        return
    key = headers.get(backend.header)
    if not key:
        yield Finding(
            Severity.PROBLEM,
            "header",
            f"there is no {backend.header}, the header of {backend.name}'s key",
            f"Set {variable}={backend.header_form()}",
        )
        return
    remark = backend.remark(key, region.name if region else "", frozenset(headers))
    if remark is not None:
        yield Finding(
            Severity.PROBLEM if remark.certain else Severity.NOTE,
            "header",
            f"the value of {backend.header} {remark.text}",
            f"Set {variable}={backend.header_form()}" if remark.certain else "",
        )
    for name, (value, missing) in backend.wanted.items():
        if headers.get(name) != value:
            yield Finding(
                Severity.NOTE,
                "header",
                f"without {name}={value} {missing}",
                f"Append ,{name}={value} to {variable}.",
            )


def _shown_name(name: str, value: str) -> str:
    """A header's name, unless it may be a key in the name's place."""
    if value.strip("=") and re.fullmatch(r"[a-z]+([-_]([a-z]+|[a-z0-9]{1,3}))*", name):
        return name
    return "a header (its name is not shown, it may be the key)"


def _check_encoding(endpoint: TraceEndpoint) -> Iterator[Finding]:
    """Check how the values are written.

    The exporter sends a value that contains a space as it is, without percent-decoding it.
    """
    for part in endpoint.raw_headers.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        shown = _shown_name(unquote(name).lower(), value)
        if len(value) > 1 and value[0] == value[-1] == "'":
            yield Finding(
                Severity.PROBLEM,
                "header",
                f"{shown} is sent with the quotation marks around it",
                "Remove them.",
            )
        elif " " in value and re.search(r"%[0-9A-Fa-f]{2}", value):
            yield Finding(
                Severity.PROBLEM,
                "header",
                f"{shown} is sent without decoding: its value is percent-encoded, but has a space",
                "Write that space as %20.",
            )
        elif " " in value:
            yield Finding(
                Severity.NOTE,
                "header",
                f"{shown} has a space in its value, which not every SDK and tool accepts",
                "Write it as %20.",
            )


def _check_timeout(endpoint: TraceEndpoint) -> Iterator[Finding]:
    seconds = endpoint.timeout_seconds
    yield Finding(Severity.OK, "timeout", f"{seconds:g} s for one export")
    if seconds < 1:
        yield Finding(
            Severity.NOTE, "timeout", "a backend on another continent takes longer", "Allow 10 (s)."
        )


def _check_certificate(settings: ServeSettings) -> Iterator[Finding]:
    certificate = settings.otlp_traces_certificate or settings.otlp_certificate
    if certificate is None:
        return
    if not Path(certificate).is_file():
        yield Finding(
            Severity.PROBLEM,
            "certificate",
            f"there is no file {certificate}, so no connection can be made",
            "Name the file of the endpoint's certificate authority, or unset the variable.",
        )
    # The HTTP client prefers these to the exporter's own variable.
    bundles = {
        "REQUESTS_CA_BUNDLE": settings.requests_ca_bundle,
        "CURL_CA_BUNDLE": settings.curl_ca_bundle,
    }
    bundle = next((name for name, path in bundles.items() if path is not None), None)
    if bundle is not None:
        yield Finding(
            Severity.PROBLEM,
            "certificate",
            f"{bundle} is set as well, and wins over {certificate}",
            "Unset it, or put the certificate into that bundle.",
        )


def _check_protocol(settings: ServeSettings) -> Iterator[Finding]:
    protocol = settings.otlp_traces_protocol or settings.otlp_protocol
    if protocol is not None and protocol != "http/protobuf":
        yield Finding(
            Severity.NOTE,
            "protocol",
            f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} has no effect: spans go as http/protobuf",
            "The endpoint must be one for OTLP/HTTP.",
        )


def _check_batch_size(settings: ServeSettings, backend: Backend) -> Iterator[Finding]:
    if backend.max_bytes is None:
        return
    most = (settings.bsp_max_export_batch_size or MAX_EXPORT_BATCH_SIZE) * SPAN_BYTES
    if most > backend.max_bytes:
        yield Finding(
            Severity.PROBLEM,
            "batches",
            f"one can have {most / 1e6:.1f} MB; "
            f"{backend.name} accepts {backend.max_bytes / 1e6:g} MB",
            f"Set OTEL_BSP_MAX_EXPORT_BATCH_SIZE to {backend.max_bytes // SPAN_BYTES} or less",
        )


def _check_pushed_metrics(settings: ServeSettings, backend: Backend) -> Iterator[Finding]:
    if not settings.otlp_metrics or settings.otlp_metrics_endpoint is not None:
        return  # not pushed, or to another endpoint
    if backend.delta_metrics and settings.otlp_metrics_temporality != "delta":
        yield Finding(
            Severity.PROBLEM,
            "metrics",
            f"{backend.name} accepts metrics only as deltas",
            "Set OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE=delta",
        )


def _check_sampling(settings: ServeSettings) -> Finding:
    sampler = settings.traces_sampler or "parentbased_traceidratio"
    root = sampler.removeprefix("parentbased_")
    rate = {"always_on": 1.0, "always_off": 0.0}.get(root, settings.rate)
    unless = ", unless its caller decided" if sampler.startswith("parentbased_") else ""
    if rate == 0:
        return Finding(
            Severity.NOTE,
            "sampling",
            f"no trace is exported{unless}",
            "Set OTEL_SAMPLE_RATE above 0.",
        )
    share = "every trace" if rate == 1 else f"one trace in {1 / rate:.4g}"
    return Finding(Severity.OK, "sampling", f"{share} is exported{unless}")
