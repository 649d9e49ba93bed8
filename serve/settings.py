"""The service's settings: read once from the environment, then frozen.

A wrong value stops the start with a sentence that names the variable, the value and what is
allowed. So does an `SDXL_` name that does not exist: a misspelt setting that is ignored is worse
than a start that fails.

Telemetry uses the standard `OTEL_*` names. OpenTelemetry's exporters read theirs from the
environment too; this code uses the values here. Nothing else in this package reads a setting from
the environment.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from kernels_warmup.shapes import CompiledShape
from metrics import buckets
from metrics.buckets import MOST_IMAGES
from metrics.tracing import MAX_QUEUE_SIZE, MOST_SPANS_PER_REQUEST
from serve.errors import ConfigurationError
from serve.setting_fields import (
    BucketBounds,
    Compression,
    Ratio,
    SamplerName,
    bucket_bounds_field,
    doctor_field,
    otlp_compression_field,
    otlp_headers_field,
    otlp_timeout_field,
    otlp_url_field,
)

PREFIX = "SDXL_"

DEMO_MODEL = "demo"
RANDOM_SDXL_BASE = "random:sdxl-base"
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"

TRUE_OR_FALSE = "true or false"

_SECRET_FIELDS = frozenset(
    {"otlp_headers", "otlp_traces_headers", "otlp_metrics_headers", "admin_token"}
)
"""Fields whose value no error message shows."""


class ServeSettings(BaseSettings):
    """Every setting with its default. Each description ends the sentence "... is allowed"."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="ignore", env_ignore_empty=True
    )

    # The model, and where it runs

    model: str | None = Field(
        default=None,
        min_length=1,
        description=(
            f"`{DEMO_MODEL}`, `{RANDOM_SDXL_BASE}`, a hub repository like {SDXL_BASE}, "
            "or a local directory in diffusers layout"
        ),
    )
    model_revision: str | None = Field(
        default=None, min_length=1, description="a branch, tag or commit of a hub repository"
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="auto, cpu, cuda or cuda:N",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="auto, bfloat16, float16 or float32"
    )

    # Compiling and warming up

    shapes: Annotated[tuple[CompiledShape, ...] | None, NoDecode] = Field(
        default=None,
        description=(
            "a comma-separated list of WIDTHxHEIGHT, each side a multiple of 8 from 64 to 2048"
        ),
    )
    serve_cold_shapes: bool = Field(default=False, description=TRUE_OR_FALSE)
    ready_early: bool = Field(default=False, description=TRUE_OR_FALSE)
    compile: Literal["auto", "off", "regional", "default", "max"] = Field(
        default="auto", description="auto, off, regional, default or max"
    )
    attention: Literal["auto", "cudnn", "flash", "xformers"] = Field(
        default="auto", description="auto, cudnn, flash or xformers"
    )
    quantize: Literal["none", "int8", "fp8"] = Field(
        default="none", description="none, int8 or fp8"
    )
    cache_dir: Path | None = Field(
        default=None, description="a folder that only this service's operators can write to"
    )

    # Defaults of a request (few-step checkpoints need others), and limits

    steps: int = Field(default=20, ge=1, le=100, description="a whole number from 1 to 100")
    guidance_scale: float = Field(
        default=5.0,
        ge=0,
        le=20,
        allow_inf_nan=False,
        description="a number from 0 to 20; at 1 and below the model runs without guidance",
    )
    max_waiting: int = Field(
        default=32, ge=0, le=10_000, description="a whole number from 0 to 10000"
    )
    max_batch: int | None = Field(
        default=None, ge=1, le=MOST_IMAGES, description=f"a whole number from 1 to {MOST_IMAGES}"
    )
    batch_wait_ms: float = Field(
        default=0,
        ge=0,
        le=10_000,
        allow_inf_nan=False,
        description="a number of milliseconds from 0 to 10000",
    )
    max_images: int = Field(
        default=4, ge=1, le=MOST_IMAGES, description=f"a whole number from 1 to {MOST_IMAGES}"
    )
    deadline_seconds: float = Field(
        default=60, gt=0, le=3600, allow_inf_nan=False, description="a number up to 3600, above 0"
    )

    # Operation: logs, profiles, the operator's token

    log_format: Literal["auto", "text", "json"] = Field(
        default="auto", description="auto, text or json"
    )
    profile_dir: Path | None = Field(default=None, description="a folder that can be written")
    nvtx: bool = Field(default=False, description=TRUE_OR_FALSE)
    admin_token: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="a token of at least 16 characters, printable and without spaces,",
    )

    # fal: the gateway's image app, billing, and what fal sets on a runner

    gateway_target: str | None = Field(
        default=None,
        pattern=r"^(https?://[^\s]+|[\w.-]+(/[\w.-]+)+)$",
        description="an http:// or https:// URL, or OWNER/APP on fal,",
    )
    fal_billing: bool = Field(default=False, description=TRUE_OR_FALSE)
    fal_runner_id: str | None = Field(
        default=None, validation_alias="FAL_JOB_ID", description="any text"
    )
    fal_app_name: str | None = Field(
        default=None, validation_alias="FAL_APP_NAME", description="any text"
    )

    # Metrics: the latency budget, utilisation, histogram buckets, pushing

    budget_seconds: float = Field(
        default=2, ge=0, le=3600, allow_inf_nan=False, description="a number from 0 to 3600"
    )
    budget_step_ms: float | None = Field(
        default=None,
        gt=0,
        le=3_600_000,
        allow_inf_nan=False,
        description="a number of milliseconds up to 3600000, above 0",
    )
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        allow_inf_nan=False,
        description="a number of dense bf16 teraFLOPs a second up to 1000000, above 0",
    )
    buckets_request: BucketBounds = bucket_bounds_field("seconds")
    buckets_queue: BucketBounds = bucket_bounds_field("seconds")
    buckets_stage: BucketBounds = bucket_bounds_field("seconds")
    buckets_step: BucketBounds = bucket_bounds_field("seconds")
    buckets_gpu_queue: BucketBounds = bucket_bounds_field("seconds")
    buckets_image_bytes: BucketBounds = bucket_bounds_field("bytes")
    otlp_metrics: bool = Field(default=False, description=TRUE_OR_FALSE)
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

    # Tracing: on or off, which requests are exported, what their spans hold

    enable_tracing: bool = Field(
        default=True, validation_alias="ENABLE_TRACING", description=TRUE_OR_FALSE
    )
    sdk_disabled: bool = Field(
        default=False, validation_alias="OTEL_SDK_DISABLED", description=TRUE_OR_FALSE
    )
    sample_rate: Ratio | None = Field(
        default=None,
        validation_alias="OTEL_SAMPLE_RATE",
        allow_inf_nan=False,
        description="a number from 0 to 1",
    )
    traces_sampler: SamplerName | None = Field(
        default=None,
        validation_alias="OTEL_TRACES_SAMPLER",
        description=("always_on, always_off, traceidratio, or one of these after `parentbased_`"),
    )
    traces_sampler_arg: Ratio | None = Field(
        default=None,
        validation_alias="OTEL_TRACES_SAMPLER_ARG",
        allow_inf_nan=False,
        description="a number from 0 to 1",
    )
    trace_keep_slow_seconds: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="a number of seconds above 0"
    )
    trace_keep_slow_step_ms: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="a number of milliseconds above 0"
    )
    trace_trust_parent: bool = Field(default=True, description=TRUE_OR_FALSE)
    trace_steps: Literal["all", "slow", "summary"] = Field(
        default="all", description="all, slow or summary"
    )
    trace_prompts: bool = Field(default=False, description=TRUE_OR_FALSE)
    trace_url: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s{}]*\{trace_id\}[^\s{}]*$",
        description="an http:// or https:// URL with {trace_id} in it",
    )
    service_name: str | None = Field(
        default=None, validation_alias="OTEL_SERVICE_NAME", description="any text"
    )
    resource_attributes: str = Field(
        default="",
        validation_alias="OTEL_RESOURCE_ATTRIBUTES",
        description="a comma-separated list of NAME=VALUE",
    )

    # The batch span processor

    bsp_max_queue_size: int | None = Field(
        default=None,
        validation_alias="OTEL_BSP_MAX_QUEUE_SIZE",
        ge=MOST_SPANS_PER_REQUEST,
        description=f"a whole number from {MOST_SPANS_PER_REQUEST}, the spans of one long request,",
    )
    bsp_max_export_batch_size: int | None = Field(
        default=None,
        validation_alias="OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
        ge=1,
        description="a whole number from 1, at most OTEL_BSP_MAX_QUEUE_SIZE",
    )
    bsp_schedule_delay: int | None = Field(
        default=None,
        validation_alias="OTEL_BSP_SCHEDULE_DELAY",
        ge=1,
        description="a whole number of milliseconds from 1",
    )
    bsp_export_timeout: str | None = Field(
        default=None,
        validation_alias="OTEL_BSP_EXPORT_TIMEOUT",
        description="any text, without effect,",
    )

    # The OTLP endpoint, for spans and for pushed metrics

    otlp_endpoint: str | None = otlp_url_field("OTEL_EXPORTER_OTLP_ENDPOINT", " without /v1/traces")
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

    # Read by the exporter and its HTTP client; here only the doctor checks them

    otlp_certificate: str | None = doctor_field("OTEL_EXPORTER_OTLP_CERTIFICATE")
    otlp_traces_certificate: str | None = doctor_field("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE")
    requests_ca_bundle: str | None = doctor_field("REQUESTS_CA_BUNDLE")
    curl_ca_bundle: str | None = doctor_field("CURL_CA_BUNDLE")
    otlp_protocol: str | None = doctor_field("OTEL_EXPORTER_OTLP_PROTOCOL")
    otlp_traces_protocol: str | None = doctor_field("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")

    @field_validator("shapes", mode="before")
    @classmethod
    def _parse_shapes(cls, value: Any) -> Any:
        if isinstance(value, str):
            shapes = tuple(CompiledShape.parse(part) for part in value.split(","))
            return tuple(dict.fromkeys(shapes))
        return value

    @field_validator("admin_token")
    @classmethod
    def _fits_into_a_header(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not re.fullmatch(r"[!-~]+", token.get_secret_value()):
            raise ValueError("does not fit into a header")
        return token

    @field_validator("otlp_metrics_temporality", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        # The specification writes these values in any case.
        return value.lower() if isinstance(value, str) else value

    @field_validator(
        "buckets_request",
        "buckets_queue",
        "buckets_stage",
        "buckets_step",
        "buckets_gpu_queue",
        "buckets_image_bytes",
        mode="before",
    )
    @classmethod
    def _parse_buckets(cls, value: Any) -> Any:
        return buckets.parse(value) if isinstance(value, str) else value

    @property
    def tracing_enabled(self) -> bool:
        """Whether spans are exported: an endpoint is set, and tracing is not turned off."""
        named = self.otlp_endpoint is not None or self.otlp_traces_endpoint is not None
        return self.enable_tracing and not self.sdk_disabled and named

    @property
    def rate(self) -> float:
        """The share of traces that is exported, of those that no caller has decided on."""
        rates = (self.sample_rate, self.traces_sampler_arg)
        return next((rate for rate in rates if rate is not None), 1.0)

    @property
    def exports_to_honeycomb(self) -> bool:
        """Whether spans go to Honeycomb, which reads the sampling rate from its own attribute."""
        host = urlsplit(self.otlp_traces_endpoint or self.otlp_endpoint or "").hostname or ""
        return host.endswith(".honeycomb.io")

    @property
    def resource_attributes_name_the_service(self) -> bool:
        """Whether `OTEL_RESOURCE_ATTRIBUTES` holds a service name."""
        return "service.name=" in self.resource_attributes


def load_settings() -> ServeSettings:
    """Read the settings from the environment.

    Raises:
        ConfigurationError: names the first variable that is wrong, unknown, or contradicts another.
    """
    _refuse_unknown_names()
    try:
        settings = ServeSettings()
    except ValidationError as error:
        raise ConfigurationError(_sentence(error)) from None
    _refuse_contradictions(settings)
    return settings


def environment_name(field: str) -> str:
    """The name of a field's environment variable."""
    alias = ServeSettings.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else PREFIX + field.upper()


def _refuse_unknown_names() -> None:
    known = {environment_name(field) for field in ServeSettings.model_fields}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            ours = ", ".join(sorted(n for n in known if n.startswith(PREFIX)))
            raise ConfigurationError(f"{name} is not a setting{hint} Allowed are {ours}.")


def _sentence(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    location = str(problem["loc"][0])
    field = next(
        name for name in ServeSettings.model_fields if location in (name, environment_name(name))
    )
    name = environment_name(field)
    allowed = ServeSettings.model_fields[field].description
    if field in _SECRET_FIELDS:
        return f"{name} is not allowed as it is (its value is not shown): {allowed} is."
    # An endpoint's URL may contain a user name and password.
    value = re.sub(r"//[^/@]*@", "//...@", os.environ.get(name, ""))
    return f"{name}={value!r} is not allowed: {allowed} is."


def _refuse_contradictions(settings: ServeSettings) -> None:
    if settings.otlp_metrics and not (settings.otlp_metrics_endpoint or settings.otlp_endpoint):
        raise ConfigurationError(
            "SDXL_OTLP_METRICS needs an endpoint to push to: set OTEL_EXPORTER_OTLP_ENDPOINT or "
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT."
        )
    rate, argument = settings.sample_rate, settings.traces_sampler_arg
    if rate is not None and argument is not None and rate != argument:
        raise ConfigurationError(
            f"OTEL_SAMPLE_RATE={rate} and OTEL_TRACES_SAMPLER_ARG={argument} contradict each "
            "other: set one of them."
        )
    fixed = settings.traces_sampler or ""
    if fixed.endswith(("always_on", "always_off")):
        for name, value in (
            ("OTEL_SAMPLE_RATE", rate),
            ("OTEL_TRACES_SAMPLER_ARG", argument),
        ):
            if value is not None:
                raise ConfigurationError(
                    f"OTEL_TRACES_SAMPLER={fixed} and {name}={value} contradict each other: that "
                    "sampler takes no ratio; traceidratio and parentbased_traceidratio do."
                )
    if fixed.endswith("always_off"):
        for field in ("trace_keep_slow_seconds", "trace_keep_slow_step_ms"):
            if getattr(settings, field) is not None:
                raise ConfigurationError(
                    f"OTEL_TRACES_SAMPLER={fixed} and {environment_name(field)} contradict each "
                    "other: that sampler exports nothing; a ratio of 0 keeps slow and failed ones."
                )
    batch, queue = settings.bsp_max_export_batch_size, settings.bsp_max_queue_size
    if batch is not None and batch > (queue or MAX_QUEUE_SIZE):
        raise ConfigurationError(
            f"OTEL_BSP_MAX_EXPORT_BATCH_SIZE={batch} is larger than the queue "
            f"(OTEL_BSP_MAX_QUEUE_SIZE, {queue or MAX_QUEUE_SIZE}): at most as large is allowed."
        )
