"""The service's settings: read once from the environment, then frozen.

A wrong value stops the start with a sentence that names the variable, the value and what is
allowed. So does an `SDXL_` name that does not exist: a misspelt setting that is ignored is worse
than a start that fails.

The fields of telemetry are in `serve.telemetry_settings`, under their standard `OTEL_*` names.
OpenTelemetry's exporters read theirs from the environment too; this code uses the values here.
Nothing else in this package reads a setting from the environment.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from kernels_warmup.shapes import MOST_CHUNKS, CompiledShape
from metrics import buckets
from metrics.batch_sizes import MAX_QUEUE_SIZE
from metrics.buckets import MOST_IMAGES
from serve import otel_variables
from serve.api_keys import ALLOWED, ApiKeys, is_same, parse_api_keys
from serve.errors import ConfigurationError
from serve.otlp_checks import (
    is_http_url,
    is_proxy,
    refuse_unsendable_headers,
    refuse_unusable_certificates,
)
from serve.setting_fields import (
    TRUE_OR_FALSE,
    BucketBounds,
    LoraSources,
    bucket_bounds_field,
    seconds_field,
)
from serve.telemetry_settings import TelemetrySettings

PREFIX = "SDXL_"

DEMO_MODEL = "demo"
RANDOM_SDXL_BASE = "random:sdxl-base"
SDXL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"

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

_SECRET_FIELDS = frozenset(
    {"otlp_headers", "otlp_traces_headers", "otlp_metrics_headers", "admin_token", "api_keys"}
)
"""Fields whose value no error message shows."""

_URL_FIELDS = frozenset(
    {"otlp_endpoint", "otlp_traces_endpoint", "otlp_metrics_endpoint"}
    | {"gateway_target", "trace_url"}
)
"""Fields whose value may contain a user name and password, or a key."""
_MODEL_NAME = re.compile(r"[!-+\--~]{1,128}")
"""Printable, without spaces and commas."""

_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[1-9][0-9]{0,4})?")
"""A host name or an IPv4 address, as it is in a URL, and a port."""

_FILES = ("_certificate", "_client_key")
"""How the names of the fields that hold files of certificates and keys end."""


class ServeSettings(TelemetrySettings):
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
    model_names: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="a comma-separated list of names without spaces",
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

    loras: LoraSources = Field(
        default=(),
        description=(
            "a comma-separated list of NAME=SOURCE, each name once and a source a .safetensors "
            "file, a directory, OWNER/REPO@REVISION on the hub or demo:NAME,"
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
        description="a comma-separated list of HOST or HOST:PORT, without https:// and paths,",
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
        description="a token of at least 16 characters, printable and without spaces,",
    )
    api_keys: ApiKeys = Field(default=(), description=ALLOWED)
    api_keys_file: Path | None = Field(default=None, description="a file with callers' keys")

    # fal: the gateway's image app, billing

    gateway_target: str | None = Field(
        default=None,
        repr=False,
        pattern=r"^(https?://[^\s]+|[\w.-]+(/[\w.-]+)+)$",
        description="an http:// or https:// URL, or OWNER/APP on fal,",
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


def load_settings() -> ServeSettings:
    """Read the settings from the environment.

    Raises:
        ConfigurationError: names the first variable that is wrong, unknown, or contradicts another.
    """
    _refuse_unknown_names()
    otel_variables.refuse(os.environ, _standard_names())
    _refuse_proxies()
    _refuse_keys()
    _refuse_several_processes()
    try:
        settings = ServeSettings()
    except ValidationError as error:
        raise ConfigurationError(_sentence(error)) from None
    if (path := settings.api_keys_file) is not None:
        settings = settings.model_copy(update={"api_keys": _keys_of_file(path, settings)})
    _refuse_contradictions(settings)
    for name, headers in (
        ("OTEL_EXPORTER_OTLP_HEADERS", settings.otlp_headers),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", settings.otlp_traces_headers),
        ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", settings.otlp_metrics_headers),
    ):
        refuse_unsendable_headers(name, headers or "")
    files = (field for field in ServeSettings.model_fields if field.endswith(_FILES))
    refuse_unusable_certificates({environment_name(f): getattr(settings, f) for f in files})
    return settings


def _refuse_several_processes() -> None:
    """prometheus_client would keep its values in files, and drop every exemplar."""
    for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
        if name in os.environ:
            raise ConfigurationError(
                f"{name} is not allowed: it is for the metrics of several processes, which have no "
                "exemplars. One process serves a GPU; unset it."
            )


def variables_without_effect() -> list[tuple[str, str]]:
    """The standard variables that are set and have no effect here, each with the reason."""
    return list(otel_variables.without_effect(os.environ, _standard_names()))


def environment_name(field: str) -> str:
    """The name of a field's environment variable."""
    alias = ServeSettings.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else PREFIX + field.upper()


def _standard_names() -> list[str]:
    names = map(environment_name, ServeSettings.model_fields)
    return [name for name in names if name.startswith(otel_variables.PREFIX)]


def _refuse_unknown_names() -> None:
    """Refuse names that are no settings. Names are read in any case, so one may be set twice."""
    known = {environment_name(field) for field in ServeSettings.model_fields}
    spellings: dict[str, str] = {}
    for name in sorted(os.environ):
        setting = name.upper()
        if not setting.startswith(PREFIX):
            continue
        if setting not in known:
            close = difflib.get_close_matches(setting, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            ours = ", ".join(sorted(n for n in known if n.startswith(PREFIX)))
            raise ConfigurationError(f"{name} is not a setting{hint} Allowed are {ours}.")
        if setting in spellings:
            raise ConfigurationError(
                f"{spellings[setting]} and {name} are the same setting: set one of them."
            )
        spellings[setting] = name


def _refuse_proxies() -> None:
    """Refuse a proxy that no HTTP client can use: their messages quote it, password and all."""
    for name in sorted(os.environ):
        if name.upper() not in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            continue
        if os.environ[name] and not is_proxy(os.environ[name]):
            raise ConfigurationError(
                f"{name} is not allowed as it is (its value is not shown): the URL of a proxy is, "
                "as http://HOST:PORT."
            )


def _refuse_keys() -> None:
    """Refuse a key of a hub or of fal that does not fit into a header: the HTTP client's message
    would quote it."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "FAL_KEY"):
        key = os.environ.get(name, "")
        # The hub's client strips its token, which may come from a file.
        if not re.fullmatch(r"[!-~]*", key if name == "FAL_KEY" else key.strip()):
            raise ConfigurationError(
                f"{name} is not allowed as it is (its value is not shown): visible ASCII "
                "characters without spaces and line breaks are."
            )


def _sentence(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False)[0]
    location = str(problem["loc"][0])
    field = next(
        name for name in ServeSettings.model_fields if location in (name, environment_name(name))
    )
    name, value = _as_given(environment_name(field))
    allowed = ServeSettings.model_fields[field].description
    if field in _SECRET_FIELDS or (field in _URL_FIELDS and _may_hold_a_secret(value)):
        return f"{name} is not allowed as it is (its value is not shown): {allowed} is."
    return f"{name}={value!r} is not allowed: {allowed} is."


def _as_given(name: str) -> tuple[str, str]:
    """A variable's name as it is spelt in the environment, and its value."""
    return next((item for item in os.environ.items() if item[0].upper() == name), (name, ""))


def _may_hold_a_secret(url: str) -> bool:
    """Whether a URL has a user name, a query or a part that is long enough to be a key."""
    return bool(re.search(r"[@?#]|[^/:.]{16}", url.partition("://")[2] or url))


def _keys_of_file(path: Path, settings: ServeSettings) -> ApiKeys:
    if settings.api_keys:
        raise ConfigurationError(
            "SDXL_API_KEYS and SDXL_API_KEYS_FILE contradict each other: set one of them."
        )
    try:
        keys: ApiKeys = parse_api_keys(path.read_text(encoding="ascii"))
    except OSError as error:
        raise ConfigurationError(
            f"SDXL_API_KEYS_FILE={str(path)!r} cannot be read: {error.strerror}."
        ) from None
    except ValueError:
        raise ConfigurationError(
            f"SDXL_API_KEYS_FILE={str(path)!r} has something else in it (it is not shown): "
            f"{ALLOWED} is allowed."
        ) from None
    return keys


def _refuse_contradictions(settings: ServeSettings) -> None:
    token = settings.admin_token
    if token is not None and any(
        is_same(token.get_secret_value(), key.digest) for key in settings.api_keys
    ):
        raise ConfigurationError(
            "SDXL_ADMIN_TOKEN is one of the API keys as well: a caller would be an operator."
        )
    if settings.timesteps is not None:
        given = f"SDXL_TIMESTEPS={','.join(map(str, settings.timesteps))}"
        if "steps" in settings.model_fields_set and settings.steps != settings.default_steps:
            raise ConfigurationError(
                f"{given} and SDXL_STEPS={settings.steps} contradict each other: every run has "
                f"{settings.default_steps} steps then; leave SDXL_STEPS unset."
            )
        if settings.scheduler not in (None, "euler", "euler-trailing", "lcm"):
            raise ConfigurationError(
                f"{given} and SDXL_SCHEDULER={settings.scheduler} contradict each other: of the "
                "schedulers, euler and lcm take timesteps."
            )
    if settings.loras and settings.quantize != "none":
        raise ConfigurationError(
            f"SDXL_LORAS and SDXL_QUANTIZE={settings.quantize} contradict each other: a LoRA is "
            "added to weights that are not quantised."
        )
    exporters = settings.metrics_exporter
    stated = "otlp_metrics" in settings.model_fields_set and exporters is not None
    if stated and settings.otlp_metrics != ("otlp" in (exporters or ())):
        raise ConfigurationError(
            f"SDXL_OTLP_METRICS={str(settings.otlp_metrics).lower()} and OTEL_METRICS_EXPORTER="
            f"{','.join(sorted(exporters or ())) or 'none'} contradict each other: set one of them."
        )
    if settings.pushes_metrics and not (settings.otlp_metrics_endpoint or settings.otlp_endpoint):
        name = "SDXL_OTLP_METRICS" if settings.otlp_metrics else "OTEL_METRICS_EXPORTER=otlp"
        raise ConfigurationError(
            f"{name} needs an endpoint to push to: set OTEL_EXPORTER_OTLP_ENDPOINT or "
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT."
        )
    wanted = settings.traces_exporter == "otlp" and settings.enable_tracing
    if wanted and not settings.sdk_disabled and not settings.tracing_enabled:
        raise ConfigurationError(
            "OTEL_TRACES_EXPORTER=otlp needs an endpoint to export to: set "
            "OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT."
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
