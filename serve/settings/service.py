"""The fields of the service's settings.

A wrong value stops the start with a sentence that names the variable, the value and what is
allowed. So does an `SDXL_` name that does not exist: a misspelt setting that is ignored is worse
than a start that fails.

The fields of telemetry are in `serve.settings.telemetry`, under their standard `OTEL_*` names.
OpenTelemetry's exporters read theirs from the environment too; this code uses the values here.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from kernels_warmup.shapes import MOST_CHUNKS, CompiledShape
from metrics import buckets
from metrics.buckets import MOST_IMAGES
from serve.settings.api_keys import ALLOWED, ApiKeys
from serve.settings.fields import (
    TRUE_OR_FALSE,
    BucketBounds,
    LoraSources,
    bucket_bounds_field,
    seconds_field,
    stays_inside,
)
from serve.settings.otlp_checks import is_http_url
from serve.settings.telemetry import TelemetrySettings

PREFIX = "SDXL_"

DEMO_MODEL = "demo"
RANDOM_SDXL_BASE = "random:sdxl-base"
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
SDXL_BASE_COMMIT = "462165984030d82259a11f4367a4eed129e94a7b"
"""What is loaded of `SDXL_BASE` without `SDXL_MODEL_REVISION`: its main branch, as it has been
since October 2023. The default model must not change with what the hub says."""

SchedulerName = Literal[
    "euler",
    "euler-trailing",
    "euler-ancestral",
    "euler-ancestral-trailing",
    "ddim",
    "ddim-trailing",
    "lcm",
]

MOST_STEPS = 100

_MODEL_NAME = re.compile(r"[!-+\--~]{1,128}")
"""Printable, without spaces and commas."""

_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[1-9][0-9]{0,4})?")
"""A host name or an IPv4 address, as it is in a URL, and a port."""


class ServeSettings(TelemetrySettings):
    """Every setting with its default. Each description says what is allowed, for error messages."""

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
    model_names: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="a comma-separated list of names without spaces",
    )
    model_revision: str | None = Field(
        default=None,
        min_length=1,
        description="a branch, tag or commit of a hub repository, without .. and a leading /",
    )
    device: str = Field(
        default="auto",
        # torch takes no leading zeros, and keeps a number in one byte.
        pattern=r"^(auto|cpu|cuda(:(0|[1-9][0-9]?))?)$",
        description="auto, cpu, cuda or cuda:N",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto", description="auto, bfloat16, float16 or float32"
    )

    loras: LoraSources = Field(
        default=(),
        description=(
            "a comma-separated list of NAME=SOURCE, each name once and a source a .safetensors "
            "file, a directory, OWNER/REPO@REVISION on the hub or demo:NAME"
        ),
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

    # The scheduler

    scheduler: SchedulerName | None = Field(
        default=None, description=f"one of {', '.join(get_args(SchedulerName))}"
    )
    timesteps: Annotated[tuple[int, ...] | None, NoDecode] = Field(
        default=None,
        description=(
            f"a comma-separated list of 1 to {MOST_STEPS} whole numbers of 0 and more, descending"
        ),
    )

    # Defaults of a request (few-step checkpoints need others), and limits

    steps: int = Field(
        default=20, ge=1, le=MOST_STEPS, description=f"a whole number from 1 to {MOST_STEPS}"
    )
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
    batch_wait_ms: float | None = Field(
        default=None,
        ge=0,
        le=10_000,
        allow_inf_nan=False,
        description="a number of milliseconds from 0 to 10000",
    )
    max_images: int = Field(
        default=4, ge=1, le=MOST_IMAGES, description=f"a whole number from 1 to {MOST_IMAGES}"
    )
    image_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="a comma-separated list of HOST or HOST:PORT, without https:// and paths",
    )
    deadline_seconds: float = Field(
        default=60, gt=0, le=3600, allow_inf_nan=False, description="a number up to 3600, above 0"
    )

    # What is read of a prompt

    prompt_chunks: int = Field(
        default=1,
        ge=1,
        le=MOST_CHUNKS,
        description=f"a whole number from 1 to {MOST_CHUNKS}",
    )
    prompt_syntax: Literal["plain", "weighted"] = Field(
        default="plain", description="plain or weighted"
    )

    # The check of finished images

    safety_checker: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "a local directory with diffusers' StableDiffusionSafetyChecker, or a hub repository "
            "as NAME/NAME or NAME/NAME@REVISION"
        ),
    )
    safety_checker_optional: bool = Field(default=False, description=TRUE_OR_FALSE)

    # Connections. `serve.http.sockets.connections` says what each limit is for

    max_connections: int | None = Field(
        default=None, ge=1, le=100_000, description="a whole number from 1 to 100000"
    )
    header_seconds: float = seconds_field(10)
    keep_alive_seconds: float = seconds_field(5)
    send_seconds: float = seconds_field(30)

    # Operation: the playground, logs, profiles, the operator's token, callers' keys

    playground: bool = Field(default=True, description=TRUE_OR_FALSE)
    debug: bool = Field(default=True, description=TRUE_OR_FALSE)
    log_format: Literal["auto", "text", "json"] = Field(
        default="auto", description="auto, text or json"
    )
    profile_dir: Path | None = Field(default=None, description="a folder that can be written")
    nvtx: bool = Field(default=False, description=TRUE_OR_FALSE)
    admin_token: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="a token of at least 16 characters, printable and without spaces",
    )
    api_keys: ApiKeys = Field(default=(), description=ALLOWED)
    api_keys_file: Path | None = Field(default=None, description="a file with callers' keys")

    # fal: the gateway's image app, billing

    gateway_target: str | None = Field(
        default=None,
        repr=False,
        pattern=r"^(https?://[^\s]+|[\w.-]+(/[\w.-]+)+)$",
        description="an http:// or https:// URL, or OWNER/APP on fal",
    )
    fal_billing: bool = Field(default=False, description=TRUE_OR_FALSE)

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

    # Tracing: which requests are exported, what their spans hold

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
        repr=False,
        pattern=r"^https?://[^\s{}]*\{trace_id\}[^\s{}]*$",
        description="an http:// or https:// URL with {trace_id} in it",
    )

    @field_validator("model_names", mode="before")
    @classmethod
    def _parse_names(cls, value: Any) -> Any:
        if isinstance(value, str):
            names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
            if not all(_MODEL_NAME.fullmatch(name) for name in names):
                raise ValueError("not a list of names")
            return names
        return value

    @field_validator("model_revision")
    @classmethod
    def _stays_in_the_cache(cls, revision: str | None) -> str | None:
        if revision is not None and not stays_inside(revision):
            raise ValueError("leads out of the repository")
        return revision

    @field_validator("shapes", mode="before")
    @classmethod
    def _parse_shapes(cls, value: Any) -> Any:
        if isinstance(value, str):
            shapes = tuple(CompiledShape.parse(part) for part in value.split(","))
            return tuple(dict.fromkeys(shapes))
        return value

    @field_validator("timesteps", mode="before")
    @classmethod
    def _parse_timesteps(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = tuple(int(part) for part in value.split(","))
            descending = all(one > next_one >= 0 for one, next_one in itertools.pairwise(value))
            if not descending or value[0] < 0 or len(value) > MOST_STEPS:
                raise ValueError("not descending timesteps")
        return value

    @field_validator("image_hosts", mode="before")
    @classmethod
    def _parse_hosts(cls, value: Any) -> Any:
        if isinstance(value, str):
            hosts = tuple(part.strip().lower().removesuffix(":443") for part in value.split(","))
            if not all(_HOST.fullmatch(host) for host in hosts):
                raise ValueError("not a list of hosts")
            return tuple(dict.fromkeys(hosts))
        return value

    @field_validator("gateway_target")
    @classmethod
    def _is_a_url_or_an_app(cls, target: str | None) -> str | None:
        if target is not None and "://" in target and not is_http_url(target):
            raise ValueError("no URL that HTTP can use")
        return target

    @field_validator("admin_token")
    @classmethod
    def _fits_into_a_header(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not re.fullmatch(r"[!-~]+", token.get_secret_value()):
            raise ValueError("does not fit into a header")
        return token

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
    def default_steps(self) -> int:
        """The denoising steps of a request that names none."""
        return self.steps if self.timesteps is None else len(self.timesteps)

    @property
    def pushes_metrics(self) -> bool:
        """Whether the metrics are pushed over OTLP."""
        return self.otlp_metrics or "otlp" in (self.metrics_exporter or ())
