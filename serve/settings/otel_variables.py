"""The standard OpenTelemetry variables that are no settings of this service.

One whose meaning this service does not have is refused, unless its value says what happens anyway.
One for a signal or a protocol that this service does not use has no effect, and the log and the
doctor say so. docs/otel-variables.md is the whole list.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from serve.errors import ConfigurationError

PREFIX = "OTEL_"


@dataclass(frozen=True, slots=True)
class Restriction:
    """The values of a variable that are allowed, in any case, and why. None are: it is refused."""

    reason: str
    values: tuple[str, ...] = ()
    is_list: bool = False
    """Whether the variable holds a comma-separated list. Then each part is one of the values, and
    the first of them is among the parts."""

    def allows(self, value: str) -> bool:
        if not self.is_list:
            return value.strip().lower() in self.values
        parts = {part.strip().lower() for part in value.split(",")}
        return self.values[0] in parts and parts <= set(self.values)


_PROTOCOL = Restriction("the exporter sends protobuf over HTTP", ("http/protobuf",))
_CONFIG_FILE = Restriction("this service is configured by environment variables alone")
_PROMETHEUS = Restriction("the metrics are at /metrics of the service's own port")
_CONFIGURATOR = Restriction("the service configures its SDK by itself")
_CREDENTIALS = Restriction(
    "the exporter has a session of its own; keys belong into OTEL_EXPORTER_OTLP_HEADERS"
)

RESTRICTED: Mapping[str, Restriction] = {
    "OTEL_CONFIG_FILE": _CONFIG_FILE,
    "OTEL_EXPERIMENTAL_CONFIG_FILE": _CONFIG_FILE,
    "OTEL_ENTITIES": Restriction("OTEL_RESOURCE_ATTRIBUTES describes this process"),
    "OTEL_EXPORTER_OTLP_PROTOCOL": _PROTOCOL,
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": _PROTOCOL,
    "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": _PROTOCOL,
    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": Restriction(
        "the histograms have the buckets of SDXL_BUCKETS_*", ("explicit_bucket_histogram",)
    ),
    "OTEL_EXPORTER_PROMETHEUS_HOST": _PROMETHEUS,
    "OTEL_EXPORTER_PROMETHEUS_PORT": _PROMETHEUS,
    "OTEL_LOGS_EXPORTER": Restriction("the log is standard error and not exported", ("none",)),
    "OTEL_METRICS_EXEMPLAR_FILTER": Restriction(
        "exemplars are the exported traces", ("trace_based",)
    ),
    "OTEL_PROPAGATORS": Restriction(
        "callers are followed by W3C trace context; baggage is neither read nor passed on",
        ("tracecontext", "baggage"),
        is_list=True,
    ),
    "OTEL_PYTHON_CONTEXT": Restriction(
        "requests are told apart by context variables", ("contextvars_context",)
    ),
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER": _CREDENTIALS,
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_METRICS_CREDENTIAL_PROVIDER": _CREDENTIALS,
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER": _CREDENTIALS,
    "OTEL_PYTHON_ID_GENERATOR": Restriction("sampling needs random trace ids", ("random",)),
    "OTEL_PYTHON_METER_CONFIGURATOR": _CONFIGURATOR,
    "OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED": Restriction("it is a switch", ("true", "false")),
    "OTEL_PYTHON_TRACER_CONFIGURATOR": _CONFIGURATOR,
}
"""Variables of which few values or none are allowed."""

_NO_LOGS = "no logs are exported"
_NO_GRPC = "spans and metrics are sent over HTTP, not gRPC"
_NO_ZIPKIN = "spans are sent as OTLP, not to Zipkin"
_NO_GLOBAL = "the service passes its provider by hand and uses no global one"

NOT_APPLICABLE: Mapping[str, str] = {
    "OTEL_BLRP_EXPORT_TIMEOUT": _NO_LOGS,
    "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE": _NO_LOGS,
    "OTEL_BLRP_MAX_QUEUE_SIZE": _NO_LOGS,
    "OTEL_BLRP_SCHEDULE_DELAY": _NO_LOGS,
    "OTEL_EXPORTER_OTLP_INSECURE": _NO_GRPC,
    "OTEL_EXPORTER_OTLP_LOGS_CERTIFICATE": _NO_LOGS,
    "OTEL_EXPORTER_OTLP_LOGS_CLIENT_CERTIFICATE": _NO_LOGS,
    "OTEL_EXPORTER_OTLP_LOGS_CLIENT_KEY": _NO_LOGS,
    "OTEL_EXPORTER_OTLP_LOGS_COMPRESSION": _NO_LOGS,
    "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": _NO_LOGS,
    "OTEL_EXPORTER_OTLP_LOGS_HEADERS": _NO_LOGS,
    "OTEL_EXPORTER_OTLP_LOGS_INSECURE": _NO_LOGS,
    "OTEL_EXPORTER_OTLP_LOGS_PROTOCOL": _NO_LOGS,
    "OTEL_EXPORTER_OTLP_LOGS_TIMEOUT": _NO_LOGS,
    "OTEL_EXPORTER_OTLP_METRICS_INSECURE": _NO_GRPC,
    "OTEL_EXPORTER_OTLP_METRIC_INSECURE": _NO_GRPC,
    "OTEL_EXPORTER_OTLP_SPAN_INSECURE": _NO_GRPC,
    "OTEL_EXPORTER_OTLP_TRACES_INSECURE": _NO_GRPC,
    "OTEL_EXPORTER_ZIPKIN_ENDPOINT": _NO_ZIPKIN,
    "OTEL_EXPORTER_ZIPKIN_PROTOCOL": _NO_ZIPKIN,
    "OTEL_EXPORTER_ZIPKIN_TIMEOUT": _NO_ZIPKIN,
    "OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT": _NO_LOGS,
    "OTEL_LOGRECORD_ATTRIBUTE_VALUE_LENGTH_LIMIT": _NO_LOGS,
    "OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER": _NO_GRPC,
    "OTEL_PYTHON_EXPORTER_OTLP_GRPC_LOGS_CREDENTIAL_PROVIDER": _NO_GRPC,
    "OTEL_PYTHON_EXPORTER_OTLP_GRPC_METRICS_CREDENTIAL_PROVIDER": _NO_GRPC,
    "OTEL_PYTHON_EXPORTER_OTLP_GRPC_RETRYABLE_ERROR_CODES": _NO_GRPC,
    "OTEL_PYTHON_EXPORTER_OTLP_GRPC_TRACES_CREDENTIAL_PROVIDER": _NO_GRPC,
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_LOGS_CREDENTIAL_PROVIDER": _NO_LOGS,
    "OTEL_PYTHON_LOGGER_CONFIGURATOR": _NO_LOGS,
    "OTEL_PYTHON_LOGGER_PROVIDER": _NO_LOGS,
    "OTEL_PYTHON_LOGGING_AUTO_INSTRUMENTATION_ENABLED": _NO_LOGS,
    "OTEL_PYTHON_METER_PROVIDER": _NO_GLOBAL,
    "OTEL_PYTHON_TRACER_PROVIDER": _NO_GLOBAL,
}
"""Variables without effect, each with the reason."""


def refuse(environment: Mapping[str, str], honoured: Iterable[str]) -> None:
    """Refuse a standard variable that would be ignored though it has a meaning here.

    Args:
        honoured: the names of the standard variables that are settings.

    Raises:
        ConfigurationError: names the variable and what is allowed.
    """
    read = {*honoured, *RESTRICTED}
    for name, value in sorted(environment.items()):
        if not value:
            continue  # the specification: an empty value is none
        if name not in read and name.upper() in read and name.upper().startswith(PREFIX):
            raise ConfigurationError(
                f"{name} is not allowed: OpenTelemetry reads {name.upper()}, in capitals."
            )
        restriction = RESTRICTED.get(name)
        if restriction is None or (restriction.values and restriction.allows(value)):
            continue
        if not restriction.values:
            raise ConfigurationError(f"{name} is not allowed: {restriction.reason}. Unset it.")
        separator = ", with or without " if restriction.is_list else " or "
        allowed = separator.join(restriction.values)
        raise ConfigurationError(
            f"{name}={value!r} is not allowed. Allowed: {allowed}, because {restriction.reason}."
        )


def without_effect(
    environment: Mapping[str, str], honoured: Iterable[str]
) -> Iterator[tuple[str, str]]:
    """The `OTEL_` variables that are set and have no effect, each with the reason."""
    known = {name for name in (*honoured, *RESTRICTED) if name.startswith(PREFIX)}
    for name, value in sorted(environment.items()):
        if not value or not name.startswith(PREFIX) or name in known:
            continue
        reason = NOT_APPLICABLE.get(name, "this service knows no variable of that name")
        if name not in NOT_APPLICABLE and (
            close := difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        ):
            reason += f"; {close[0]} is one"
        yield name, reason
