"""Reads the settings from the environment, and refuses what is wrong with a sentence.

The sentence names the variable, the value and what is allowed. Nothing else in this package reads a
setting from the environment.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from pydantic import ValidationError

from metrics.batch_sizes import MAX_QUEUE_SIZE
from serve.errors import ConfigurationError
from serve.settings import otel_variables
from serve.settings.api_keys import ALLOWED, ApiKeys, is_same, parse_api_keys
from serve.settings.otlp_checks import (
    is_proxy,
    refuse_unsendable_headers,
    refuse_unusable_certificates,
)
from serve.settings.service import PREFIX, ServeSettings

_SECRET_FIELDS = frozenset(
    {"otlp_headers", "otlp_traces_headers", "otlp_metrics_headers", "admin_token", "api_keys"}
)
"""Fields whose value no error message shows."""

_URL_FIELDS = frozenset(
    {"otlp_endpoint", "otlp_traces_endpoint", "otlp_metrics_endpoint"}
    | {"gateway_target", "trace_url"}
)
"""Fields whose value may contain a user name and password, or a key."""

_FILES = ("_certificate", "_client_key")
"""How the names of the fields that hold files of certificates and keys end."""


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
                f"{name} is not allowed as it is (its value is not shown). Allowed: the URL of a "
                "proxy, as http://HOST:PORT."
            )


def _refuse_keys() -> None:
    """Refuse a key of a hub or of fal that does not fit into a header: the HTTP client's message
    would quote it."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "FAL_KEY"):
        key = os.environ.get(name, "")
        # The hub's client strips its token, which may come from a file.
        if not re.fullmatch(r"[!-~]*", key if name == "FAL_KEY" else key.strip()):
            raise ConfigurationError(
                f"{name} is not allowed as it is (its value is not shown). Allowed: visible ASCII "
                "characters without spaces and line breaks."
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
        return f"{name} is not allowed as it is (its value is not shown). Allowed: {allowed}."
    return f"{name}={value!r} is not allowed. Allowed: {allowed}."


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
            f"SDXL_API_KEYS_FILE={str(path)!r} has something else in it (it is not shown). "
            f"Allowed: {ALLOWED}."
        ) from None
    return keys


def _refuse_contradictions(settings: ServeSettings) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigurationError: names the first pair.
    """
    _refuse_a_caller_as_operator(settings)
    _refuse_contradicting_steps(settings)
    if settings.loras and settings.quantize != "none":
        raise ConfigurationError(
            f"SDXL_LORAS and SDXL_QUANTIZE={settings.quantize} contradict each other: a LoRA is "
            "added to weights that are not quantised."
        )
    _refuse_contradicting_exporters(settings)
    _refuse_contradicting_sampling(settings)
    batch, queue = settings.bsp_max_export_batch_size, settings.bsp_max_queue_size
    if batch is not None and batch > (queue or MAX_QUEUE_SIZE):
        raise ConfigurationError(
            f"OTEL_BSP_MAX_EXPORT_BATCH_SIZE={batch} is larger than the queue "
            f"(OTEL_BSP_MAX_QUEUE_SIZE, {queue or MAX_QUEUE_SIZE}): at most as large is allowed."
        )


def _refuse_a_caller_as_operator(settings: ServeSettings) -> None:
    token = settings.admin_token
    if token is not None and any(
        is_same(token.get_secret_value(), key.digest) for key in settings.api_keys
    ):
        raise ConfigurationError(
            "SDXL_ADMIN_TOKEN is one of the API keys as well: a caller would be an operator."
        )


def _refuse_contradicting_steps(settings: ServeSettings) -> None:
    if settings.timesteps is None:
        return
    given = f"SDXL_TIMESTEPS={','.join(map(str, settings.timesteps))}"
    if "steps" in settings.model_fields_set and settings.steps != settings.default_steps:
        raise ConfigurationError(
            f"{given} and SDXL_STEPS={settings.steps} contradict each other: every run has "
            f"{settings.default_steps} steps then; leave SDXL_STEPS unset."
        )
    if settings.scheduler not in (None, "euler", "euler-trailing", "lcm"):
        raise ConfigurationError(
            f"{given} and SDXL_SCHEDULER={settings.scheduler} contradict each other: of the "
            "schedulers, euler, euler-trailing and lcm take timesteps."
        )


def _refuse_contradicting_exporters(settings: ServeSettings) -> None:
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


def _refuse_contradicting_sampling(settings: ServeSettings) -> None:
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
