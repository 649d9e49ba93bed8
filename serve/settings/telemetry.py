"""The settings of telemetry: standard `OTEL_*` variables, and fal's two of its own.

`serve.settings.load_settings` reads them together with all others. OpenTelemetry's exporters read
some of them from the environment once more, so a value that they would read in another way, or
would answer with a traceback, is refused here. `serve.settings.otel_variables` has the standard
variables that this service does not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from metrics.batch_sizes import MOST_SPANS_PER_REQUEST
from serve.settings.fields import (
    TRUE_OR_FALSE,
    Compression,
    Ratio,
    SamplerName,
    WholeNumber,
    limit_field,
    milliseconds_field,
    otlp_compression_field,
    otlp_headers_field,
    otlp_timeout_field,
    otlp_url_field,
    pem_file_field,
)
from serve.settings.otlp_checks import is_http_url

DEFAULT_TIMEOUT_SECONDS = 10.0


class TelemetrySettings(BaseSettings):
    """The fields of telemetry. Each description says what is allowed, for error messages."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True)

    # On or off, and where to

    enable_tracing: bool = Field(
        default=True, validation_alias="ENABLE_TRACING", description=TRUE_OR_FALSE
    )
    sdk_disabled: bool = Field(
        default=False, validation_alias="OTEL_SDK_DISABLED", description=TRUE_OR_FALSE
    )
    traces_exporter: Literal["otlp", "console", "none"] | None = Field(
        default=None, validation_alias="OTEL_TRACES_EXPORTER", description="otlp, console or none"
    )
    metrics_exporter: Annotated[frozenset[Literal["otlp", "prometheus"]] | None, NoDecode] = Field(
        default=None,
        validation_alias="OTEL_METRICS_EXPORTER",
        description="otlp, prometheus, both with a comma between them, or none",
    )
    log_level: Literal["debug", "info", "warn", "error", "none"] | None = Field(
        default=None,
        validation_alias="OTEL_LOG_LEVEL",
        description="debug, info, warn, error or none",
    )

    # Sampling

    sample_rate: Ratio | None = Field(
        default=None,
        validation_alias="OTEL_SAMPLE_RATE",
        allow_inf_nan=False,
        description="a number from 0 to 1",
    )
    traces_sampler: SamplerName | None = Field(
        default=None,
        validation_alias="OTEL_TRACES_SAMPLER",
        description="always_on, always_off, traceidratio, or one of these after `parentbased_`",
    )
    traces_sampler_arg: Ratio | None = Field(
        default=None,
        validation_alias="OTEL_TRACES_SAMPLER_ARG",
        allow_inf_nan=False,
        description="a number from 0 to 1",
    )

    # The resource

    service_name: str | None = Field(
        default=None, validation_alias="OTEL_SERVICE_NAME", description="any text"
    )
    resource_attributes: Annotated[Mapping[str, str], NoDecode] = Field(
        default={},
        validation_alias="OTEL_RESOURCE_ATTRIBUTES",
        description="a comma-separated list of NAME=VALUE, values percent-encoded",
    )
    resource_detectors: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        validation_alias="OTEL_EXPERIMENTAL_RESOURCE_DETECTORS",
        description="a comma-separated list of installed resource detectors, as process,os,host",
    )
    fal_runner_id: str | None = Field(
        default=None, validation_alias="FAL_JOB_ID", description="any text"
    )
    fal_app_name: str | None = Field(
        default=None, validation_alias="FAL_APP_NAME", description="any text"
    )

    # Limits of a span

    attribute_count_limit: WholeNumber | None = limit_field("OTEL_ATTRIBUTE_COUNT_LIMIT")
    attribute_value_length_limit: WholeNumber | None = limit_field(
        "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT"
    )
    span_attribute_count_limit: WholeNumber | None = limit_field("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT")
    span_attribute_value_length_limit: WholeNumber | None = limit_field(
        "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT"
    )
    span_event_count_limit: WholeNumber | None = limit_field("OTEL_SPAN_EVENT_COUNT_LIMIT")
    span_link_count_limit: WholeNumber | None = limit_field("OTEL_SPAN_LINK_COUNT_LIMIT")
    event_attribute_count_limit: WholeNumber | None = limit_field(
        "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT"
    )
    link_attribute_count_limit: WholeNumber | None = limit_field("OTEL_LINK_ATTRIBUTE_COUNT_LIMIT")

    # The batch span processor

    bsp_max_queue_size: WholeNumber | None = Field(
        default=None,
        validation_alias="OTEL_BSP_MAX_QUEUE_SIZE",
        ge=MOST_SPANS_PER_REQUEST,
        le=1_000_000,
        description=f"a whole number from {MOST_SPANS_PER_REQUEST}, the spans of one long request, "
        "to 1000000",
    )
    bsp_max_export_batch_size: WholeNumber | None = Field(
        default=None,
        validation_alias="OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
        ge=1,
        le=1_000_000,
        description="a whole number from 1, at most OTEL_BSP_MAX_QUEUE_SIZE",
    )
    bsp_schedule_delay: WholeNumber | None = milliseconds_field("OTEL_BSP_SCHEDULE_DELAY")
    bsp_export_timeout: WholeNumber | None = milliseconds_field("OTEL_BSP_EXPORT_TIMEOUT")

    # Pushed metrics

    otlp_metrics_temporality: Literal["cumulative", "delta", "lowmemory"] = Field(
        default="cumulative",
        validation_alias="OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
        description="cumulative, delta or lowmemory",
    )
    metric_export_interval: float = Field(
        default=60_000,
        validation_alias="OTEL_METRIC_EXPORT_INTERVAL",
        ge=1000,
        le=3_600_000,
        allow_inf_nan=False,
        description="a number of milliseconds from 1000 to 3600000",
    )
    metric_export_timeout: WholeNumber | None = milliseconds_field("OTEL_METRIC_EXPORT_TIMEOUT")

    # The OTLP endpoint, for spans and for pushed metrics

    otlp_endpoint: str | None = otlp_url_field(
        "OTEL_EXPORTER_OTLP_ENDPOINT", ", without /v1/traces and without a query"
    )
    otlp_traces_endpoint: str | None = otlp_url_field(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", ", used unchanged"
    )
    otlp_metrics_endpoint: str | None = otlp_url_field(
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", ", used unchanged"
    )
    otlp_headers: str | None = otlp_headers_field("OTEL_EXPORTER_OTLP_HEADERS")
    otlp_traces_headers: str | None = otlp_headers_field("OTEL_EXPORTER_OTLP_TRACES_HEADERS")
    otlp_metrics_headers: str | None = otlp_headers_field("OTEL_EXPORTER_OTLP_METRICS_HEADERS")
    otlp_compression: Compression | None = otlp_compression_field("OTEL_EXPORTER_OTLP_COMPRESSION")
    otlp_traces_compression: Compression | None = otlp_compression_field(
        "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION"
    )
    otlp_metrics_compression: Compression | None = otlp_compression_field(
        "OTEL_EXPORTER_OTLP_METRICS_COMPRESSION"
    )
    otlp_timeout: float | None = otlp_timeout_field("OTEL_EXPORTER_OTLP_TIMEOUT")
    otlp_traces_timeout: float | None = otlp_timeout_field("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT")
    otlp_metrics_timeout: float | None = otlp_timeout_field("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT")
    otlp_certificate: str | None = pem_file_field(
        "OTEL_EXPORTER_OTLP_CERTIFICATE", "the endpoint's certificate authority"
    )
    otlp_traces_certificate: str | None = pem_file_field(
        "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", "the endpoint's certificate authority"
    )
    otlp_metrics_certificate: str | None = pem_file_field(
        "OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE", "the endpoint's certificate authority"
    )
    otlp_client_certificate: str | None = pem_file_field(
        "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "this client's certificate"
    )
    otlp_traces_client_certificate: str | None = pem_file_field(
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE", "this client's certificate"
    )
    otlp_metrics_client_certificate: str | None = pem_file_field(
        "OTEL_EXPORTER_OTLP_METRICS_CLIENT_CERTIFICATE", "this client's certificate"
    )
    otlp_client_key: str | None = pem_file_field(
        "OTEL_EXPORTER_OTLP_CLIENT_KEY", "the client certificate's key, unencrypted"
    )
    otlp_traces_client_key: str | None = pem_file_field(
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", "the client certificate's key, unencrypted"
    )
    otlp_metrics_client_key: str | None = pem_file_field(
        "OTEL_EXPORTER_OTLP_METRICS_CLIENT_KEY", "the client certificate's key, unencrypted"
    )

    @field_validator(
        "traces_exporter",
        "log_level",
        "traces_sampler",
        "otlp_metrics_temporality",
        "otlp_compression",
        "otlp_traces_compression",
        "otlp_metrics_compression",
        mode="before",
    )
    @classmethod
    def _lower(cls, value: Any) -> Any:
        # The specification writes these values in any case.
        return value.lower() if isinstance(value, str) else value

    @field_validator("metrics_exporter", mode="before")
    @classmethod
    def _parse_exporters(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = _listed(value.lower())
        return () if names == ("none",) else names or ("",)

    @field_validator("resource_attributes", mode="before")
    @classmethod
    def _parse_attributes(cls, value: Any) -> Any:
        return resource_attributes(value) if isinstance(value, str) else value

    @field_validator("resource_detectors", mode="before")
    @classmethod
    def _parse_detectors(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        names = _listed(value)
        installed = {point.name for point in entry_points(group="opentelemetry_resource_detector")}
        if unknown := set(names) - installed - {"*"}:
            raise ValueError(f"{unknown} are not installed")
        return names

    @field_validator("otlp_endpoint", "otlp_traces_endpoint", "otlp_metrics_endpoint")
    @classmethod
    def _is_a_url(cls, url: str | None) -> str | None:
        if url is not None and not is_http_url(url):
            raise ValueError("no URL that HTTP can use")
        return url

    @field_validator("otlp_endpoint")
    @classmethod
    def _takes_a_path(cls, url: str | None) -> str | None:
        # The exporter appends the path to the whole text: behind a query it would be a part of it.
        if url is not None and ("?" in url or "#" in url):
            raise ValueError("a query")
        return url

    @property
    def tracing_enabled(self) -> bool:
        """Whether spans are exported: there is a destination, and tracing is not turned off."""
        if self.sdk_disabled or not self.enable_tracing or self.traces_exporter == "none":
            return False
        named = self.otlp_endpoint is not None or self.otlp_traces_endpoint is not None
        return named or self.writes_spans

    @property
    def writes_spans(self) -> bool:
        """Whether spans go to standard output instead of an endpoint."""
        return self.traces_exporter == "console"

    @property
    def rate(self) -> float:
        """The share of traces that is exported, of those that no caller has decided on."""
        rates = (self.sample_rate, self.traces_sampler_arg)
        return next((rate for rate in rates if rate is not None), 1.0)

    @property
    def exports_to_honeycomb(self) -> bool:
        """Whether spans go to Honeycomb, which reads the sampling rate from its own attribute."""
        host = urlsplit(self.otlp_traces_endpoint or self.otlp_endpoint or "").hostname or ""
        return host.endswith(".honeycomb.io") and not self.writes_spans

    @property
    def traces_timeout_seconds(self) -> float:
        """Time limit for the export of one batch of spans, retries included."""
        return _shorter(self.otlp_traces_timeout or self.otlp_timeout, self.bsp_export_timeout)

    @property
    def metrics_timeout_seconds(self) -> float:
        """Time limit for one push of the metrics, retries included."""
        return _shorter(self.otlp_metrics_timeout or self.otlp_timeout, self.metric_export_timeout)


def _shorter(seconds: float | None, milliseconds: int | None) -> float:
    seconds = seconds or DEFAULT_TIMEOUT_SECONDS
    return seconds if milliseconds is None else min(seconds, milliseconds / 1e3)


def _listed(value: str) -> tuple[str, ...]:
    """The parts of a comma-separated list, each once and in its order."""
    return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


def resource_attributes(text: str) -> dict[str, str]:
    """The attributes of `OTEL_RESOURCE_ATTRIBUTES`, without blanks around them and decoded.

    Raises:
        ValueError: a part is not NAME=VALUE.
    """
    attributes = {}
    # Not `_listed`: of a name that is there several times, the last value counts.
    for part in filter(str.strip, text.split(",")):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise ValueError("not NAME=VALUE")
        attributes[name] = unquote(value)
    return attributes
