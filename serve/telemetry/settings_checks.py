"""The doctor's checks of the settings, without sending anything.

No check shows a header's value, only its length.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from ipaddress import ip_address
from urllib.parse import unquote

from metrics.batch_sizes import MAX_EXPORT_BATCH_SIZE
from serve.settings import ServeSettings, variables_without_effect
from serve.settings.otlp_checks import shown_header_name
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
    findings += (
        Finding(Severity.NOTE, "variable", f"{name} has no effect: {reason}", f"Unset {name}.")
        for name, reason in variables_without_effect()
    )
    if settings.writes_spans:
        findings += [
            Finding(
                Severity.NOTE,
                "exporter",
                "OTEL_TRACES_EXPORTER=console: spans are written to standard output, none is sent",
                "Unset OTEL_TRACES_EXPORTER.",
            ),
            _check_sampling(settings),
        ]
        return findings
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
    findings += _check_timeout(endpoint, settings)
    findings.append(_check_sampling(settings))
    if backend is not None:
        findings += _check_batch_size(settings, backend)
        findings += _check_pushed_metrics(settings, backend)
    return findings


def _check_switches(settings: ServeSettings) -> Iterator[Finding]:
    switches = {
        "OTEL_SDK_DISABLED=true": settings.sdk_disabled,
        "ENABLE_TRACING=false": not settings.enable_tracing,
        "OTEL_TRACES_EXPORTER=none": settings.traces_exporter == "none",
    }
    for switch in (switch for switch, is_off in switches.items() if is_off):
        name = switch.partition("=")[0]
        yield Finding(Severity.PROBLEM, "tracing", f"{switch} turns it off", f"Unset {name}.")


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
        change = endpoint.change_of_url(backend.base_url(endpoint.host))
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
    is_whole = name != "OTEL_EXPORTER_OTLP_ENDPOINT"
    if base.rstrip("/").endswith(TRACES_PATH) and path != base:
        why = "" if is_whole else f", for it is appended to {name}, which ends in it"
        yield Finding(
            Severity.PROBLEM,
            "endpoint",
            f"the path has {TRACES_PATH} twice{why}",
            change or f"Remove {TRACES_PATH} from the end of {name}.",
        )
    elif not path.endswith(TRACES_PATH):
        # Another endpoint than a known backend's may have any path.
        yield Finding(
            Severity.NOTE if backend is None else Severity.PROBLEM,
            "endpoint",
            f"the path of {name} is used unchanged, and does not end in {TRACES_PATH}",
            change or f"Make {TRACES_PATH} the end of its path.",
        )
    elif backend is not None and base != backend.path:
        path = backend.path + (TRACES_PATH if is_whole else "")
        yield Finding(
            Severity.PROBLEM,
            "endpoint",
            f"before {TRACES_PATH} the path has {shown_path(base) or 'nothing'}; "
            f"{backend.name} needs {backend.path or 'nothing'}",
            change
            or (f"Make the path of {name} {path}." if path else f"Remove the path of {name}."),
        )


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_private
    except ValueError:
        return host == "localhost" or "." not in host or host.endswith((".internal", ".local"))


def _check_headers(
    endpoint: TraceEndpoint, backend: Backend | None, region: Region | None
) -> Iterator[Finding]:
    for name, value in endpoint.headers.items():
        shown = shown_header_name(name, value)
        yield Finding(Severity.OK, "header", f"{shown}, {len(value)} characters")
        if not value.strip("="):
            yield Finding(
                Severity.PROBLEM,
                "header",
                f"{shown} has no value",
                f"Write NAME=VALUE into {endpoint.headers_variable}, the key as the value.",
            )
    yield from _check_encoding(endpoint)
    for name, value in endpoint.headers.items():
        yield from _check_value(name, value, endpoint, backend)
    if backend is not None:
        yield from _check_headers_of_backend(endpoint, backend, region)


def _check_value(
    name: str, value: str, endpoint: TraceEndpoint, backend: Backend | None
) -> Iterator[Finding]:
    """Check one header: a damaged value, a placeholder, another backend's key."""
    shown = shown_header_name(name, value)
    if _line_break_in_credentials(value):
        yield Finding(
            Severity.PROBLEM,
            "header",
            f"the credentials inside the base64 of {shown} have a line break",
            "Encode them without it: printf writes none at the end, echo writes one.",
        )
    if re.search(r"<.*>|\$\{?\w+\}?$|^your[-_ ]", value, re.IGNORECASE):
        yield Finding(
            Severity.PROBLEM,
            "header",
            f"{shown} contains a placeholder",
            "Put the key in its place.",
        )
    owner = key_owner(name)
    if owner is not None and backend is not None and owner is not backend:
        yield Finding(
            Severity.PROBLEM,
            "header",
            f"{name} is the header of {owner.name}'s key, not of {backend.name}'s",
            endpoint.change_of_key(backend),
        )


def _check_headers_of_backend(
    endpoint: TraceEndpoint, backend: Backend, region: Region | None
) -> Iterator[Finding]:
    """Check the key that the backend needs, and the headers that it wants beside the key."""
    key = endpoint.headers.get(backend.header)
    if not key:
        yield Finding(
            Severity.PROBLEM,
            "header",
            f"there is no {backend.header}, the header of {backend.name}'s key",
            endpoint.change_of_key(backend),
        )
        return
    remark = backend.remark(key, region.name if region else "", frozenset(endpoint.headers))
    if remark is not None:
        advice = endpoint.change_of_key(backend) if remark.certain else ""
        if remark.missing:
            advice = f"Append ,{remark.missing} to {endpoint.headers_variable}."
        yield Finding(
            Severity.PROBLEM if remark.certain else Severity.NOTE,
            "header",
            f"the value of {backend.header} {remark.text}",
            advice,
        )
    for name, (value, missing) in backend.wanted.items():
        if endpoint.headers.get(name) != value:
            yield Finding(
                Severity.NOTE,
                "header",
                f"without {name}={value} {missing}",
                f"Append ,{name}={value} to {endpoint.headers_variable}.",
            )


def _line_break_in_credentials(value: str) -> bool:
    """Whether the text inside base64 credentials of the scheme Basic has a line break."""
    scheme, _, credentials = value.partition(" ")
    try:
        decoded = base64.b64decode(credentials)
    except (binascii.Error, ValueError):
        return False
    is_text = re.fullmatch(rb"[ -~\r\n]+", decoded) is not None
    return scheme.lower() == "basic" and is_text and re.search(rb"[\r\n]", decoded) is not None


def _check_encoding(endpoint: TraceEndpoint) -> Iterator[Finding]:
    """Check how the values are written.

    The exporter sends a value that contains a space as it is, without percent-decoding it.
    """
    for part in endpoint.raw_headers.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        shown = shown_header_name(unquote(name).lower(), value)
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


def _check_timeout(endpoint: TraceEndpoint, settings: ServeSettings) -> Iterator[Finding]:
    seconds = endpoint.timeout_seconds
    yield Finding(Severity.OK, "timeout", f"{seconds:g} s for one export")
    if seconds < 1:
        longer = []
        if (settings.otlp_traces_timeout or settings.otlp_timeout or 10) < 1:
            of_traces = "TRACES_" if settings.otlp_traces_timeout is not None else ""
            longer.append(f"OTEL_EXPORTER_OTLP_{of_traces}TIMEOUT=10")
        if (settings.bsp_export_timeout or 10_000) < 1000:
            longer.append("OTEL_BSP_EXPORT_TIMEOUT=10000")
        yield Finding(
            Severity.NOTE,
            "timeout",
            "a backend on another continent takes longer",
            f"Set {' and '.join(longer)}",
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
            f"Set OTEL_BSP_MAX_EXPORT_BATCH_SIZE={backend.max_bytes // SPAN_BYTES} or less",
        )


def _check_pushed_metrics(settings: ServeSettings, backend: Backend) -> Iterator[Finding]:
    if not settings.pushes_metrics or settings.otlp_metrics_endpoint is not None:
        return  # not pushed, or to another endpoint
    if backend.delta_metrics and settings.otlp_metrics_temporality == "cumulative":
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
            f"{change_of_rate(settings, '1')}, or another share above 0.",
        )
    share = "every trace" if rate == 1 else f"one trace in {1 / rate:.4g}"
    return Finding(Severity.OK, "sampling", f"{share} is exported{unless}")


def change_of_rate(settings: ServeSettings, share: str) -> str:
    """The advice to export another share of the traces, which the other variables allow."""
    if (settings.traces_sampler or "").endswith(("always_on", "always_off")):
        return (
            f"Set OTEL_TRACES_SAMPLER=parentbased_traceidratio and OTEL_TRACES_SAMPLER_ARG={share}"
        )
    if settings.traces_sampler_arg is None:
        return f"Set OTEL_SAMPLE_RATE={share}"
    also = "" if settings.sample_rate is None else " and unset OTEL_SAMPLE_RATE"
    return f"Set OTEL_TRACES_SAMPLER_ARG={share}{also}"
