from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.util.re import parse_env_headers

from kernels_warmup.shapes import CompiledShape
from serve.errors import ConfigurationError
from serve.settings import ServeSettings, environment_name, load_settings
from serve.settings.fields import LoraSource
from tests.support.certificates import client_certificate, self_signed
from tests.support.processes import clean_environment

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        proxies = name.upper().endswith("_PROXY")
        if name.startswith(("SDXL_", "OTEL_")) or name == "ENABLE_TRACING" or proxies:
            monkeypatch.delenv(name)


def test_defaults_need_nothing_and_export_nothing() -> None:
    settings = load_settings()
    assert settings.model is None
    assert settings.max_waiting == 32
    assert not settings.tracing_enabled


def test_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_SHAPES", "128x128, 160x96,128x128")
    monkeypatch.setenv("SDXL_MAX_WAITING", "0")
    monkeypatch.setenv("OTEL_SAMPLE_RATE", "0.25")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    settings = load_settings()
    assert settings.shapes == (CompiledShape(128, 128), CompiledShape(160, 96))
    assert settings.max_waiting == 0
    assert settings.sample_rate == 0.25
    assert settings.tracing_enabled


@pytest.mark.parametrize("switch", [("ENABLE_TRACING", "false"), ("OTEL_SDK_DISABLED", "true")])
def test_tracing_can_be_turned_off(
    monkeypatch: pytest.MonkeyPatch, switch: tuple[str, str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv(*switch)
    assert not load_settings().tracing_enabled


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_SHAPES", "")
    monkeypatch.setenv("SDXL_MODEL", "")
    assert load_settings().shapes is None


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("SDXL_MAX_WAITING", "many", "a whole number from 0 to 10000"),
        ("SDXL_MAX_WAITING", "-1", "a whole number from 0 to 10000"),
        ("SDXL_DEADLINE_SECONDS", "0", "above 0"),
        ("SDXL_DEADLINE_SECONDS", "nan", "above 0"),
        ("SDXL_DEADLINE_SECONDS", "inf", "above 0"),
        ("SDXL_DEVICE", "tpu", "auto, cpu, cuda or cuda:N"),
        ("SDXL_DEVICE", "cuda:01", "auto, cpu, cuda or cuda:N"),
        ("SDXL_DTYPE", "fp8", "bfloat16"),
        ("SDXL_SHAPES", "128", "WIDTHxHEIGHT"),
        ("SDXL_SHAPES", "130x128", "multiple of 8"),
        ("SDXL_SHAPES", "128x128,", "WIDTHxHEIGHT"),
        ("SDXL_SHAPES", "9999999x8", "WIDTHxHEIGHT"),
        ("SDXL_MODEL_REVISION", "../..", "a branch, tag or commit"),
        ("SDXL_MODEL_REVISION", "/etc", "a branch, tag or commit"),
        ("SDXL_MODEL_REVISION", "a\\b", "a branch, tag or commit"),
        ("SDXL_LORAS", "ink", "NAME=SOURCE"),
        ("SDXL_LORAS", "ink=", "NAME=SOURCE"),
        ("SDXL_LORAS", "=a/b", "NAME=SOURCE"),
        ("SDXL_LORAS", "a/b=c", "NAME=SOURCE"),
        ("SDXL_LORAS", "ink=a/b,ink=c/d", "each name once"),
        ("SDXL_LORAS", "ink=a/b,", "NAME=SOURCE"),
        ("SDXL_COMPILE", "fast", "off"),
        ("SDXL_ATTENTION", "sage", "auto, cudnn, flash or xformers"),
        ("SDXL_QUANTIZE", "int3", "none, int8 or fp8"),
        ("SDXL_SCHEDULER", "dpm++", "one of euler, euler-trailing"),
        ("SDXL_SCHEDULER", "Euler", "one of euler, euler-trailing"),
        ("SDXL_TIMESTEPS", "999,499.5", "descending"),
        ("SDXL_TIMESTEPS", "999,999", "descending"),
        ("SDXL_TIMESTEPS", "499,999", "descending"),
        ("SDXL_TIMESTEPS", "-1", "0 and more"),
        ("SDXL_TIMESTEPS", "999,", "a comma-separated list"),
        ("SDXL_TIMESTEPS", ",".join(map(str, range(101, 0, -1))), "1 to 100"),
        ("SDXL_STEPS", "0", "a whole number from 1 to 100"),
        ("SDXL_GUIDANCE_SCALE", "21", "a number from 0 to 20"),
        ("SDXL_GUIDANCE_SCALE", "nan", "a number from 0 to 20"),
        ("SDXL_READY_EARLY", "soon", "true or false"),
        ("SDXL_SERVE_COLD_SHAPES", "some", "true or false"),
        ("SDXL_LOG_FORMAT", "xml", "text or json"),
        ("SDXL_TRACE_PROMPTS", "perhaps", "true or false"),
        ("ENABLE_TRACING", "perhaps", "true or false"),
        ("SDXL_PEAK_TFLOPS", "0", "above 0"),
        ("SDXL_PEAK_TFLOPS", "inf", "up to 1000000"),
        ("SDXL_BUDGET_SECONDS", "-1", "a number from 0 to 3600"),
        ("SDXL_BUDGET_STEP_MS", "0", "above 0"),
        ("SDXL_OTLP_METRICS", "perhaps", "true or false"),
        ("SDXL_BUCKETS_STEP", "0.2,0.1", "each above the last"),
        ("SDXL_BUCKETS_STEP", "0.1,0.1", "each above the last"),
        ("SDXL_BUCKETS_QUEUE", "0,1", "positive numbers of seconds"),
        ("SDXL_BUCKETS_QUEUE", "1,inf", "positive numbers of seconds"),
        ("SDXL_BUCKETS_GPU_QUEUE", "0.1,nan", "positive numbers of seconds"),
        ("SDXL_BUCKETS_STAGE", "0.1,,0.2", "a comma-separated list"),
        ("SDXL_BUCKETS_REQUEST", "fast,slow", "a comma-separated list"),
        ("SDXL_BUCKETS_IMAGE_BYTES", ",".join(map(str, range(1, 62))), "1 to 60 positive"),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "collector:4318", "http://"),
        ("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "both", "delta"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "10", "from 1000"),
        ("OTEL_SAMPLE_RATE", "1.5", "from 0 to 1"),
        ("OTEL_SAMPLE_RATE", "nan", "from 0 to 1"),
        ("OTEL_TRACES_SAMPLER_ARG", "-0.1", "from 0 to 1"),
        ("OTEL_TRACES_SAMPLER", "sometimes", "traceidratio"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318", "http://"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10000", "not milliseconds"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "60", "the spans of one long request"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0.5", "a whole number of milliseconds"),
        ("SDXL_TRACE_KEEP_SLOW_SECONDS", "0", "above 0"),
        ("SDXL_TRACE_KEEP_SLOW_STEP_MS", "-3", "above 0"),
        ("SDXL_TRACE_STEPS", "some", "all, slow or summary"),
        ("SDXL_TRACE_TRUST_PARENT", "perhaps", "true or false"),
        ("SDXL_TRACE_URL", "https://example.com/traces", "with {trace_id} in it"),
        ("SDXL_TRACE_URL", "https://example.com/{id}/{trace_id}", "with {trace_id} in it"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli", "none, gzip or deflate"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "abc", "not milliseconds"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp, console or none"),
        ("OTEL_TRACES_EXPORTER", "otlp,console", "otlp, console or none"),
        ("OTEL_METRICS_EXPORTER", "none,otlp", "or none"),
        ("OTEL_METRICS_EXPORTER", "console", "or none"),
        ("OTEL_METRICS_EXPORTER", ",", "or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
        ("OTEL_PROPAGATORS", "b3", "tracecontext"),
        ("OTEL_PROPAGATORS", "baggage", "tracecontext"),
        ("OTEL_PROPAGATORS", "none", "tracecontext"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "abc", "a whole number from 0"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "-1", "a whole number from 0"),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "5.0", "a whole number from 0"),
        ("OTEL_SPAN_EVENT_COUNT_LIMIT", "9" * 20, "a whole number from 0"),
        ("OTEL_BSP_SCHEDULE_DELAY", "9" * 20, "from 1 to 3600000"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "9" * 20, "to 1000000"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "-1", "from 1 to 3600000"),
        ("OTEL_RESOURCE_ATTRIBUTES", "a=1,b", "NAME=VALUE"),
        ("OTEL_RESOURCE_ATTRIBUTES", "=1", "NAME=VALUE"),
        ("OTEL_EXPERIMENTAL_RESOURCE_DETECTORS", "process,gpc", "installed"),
        ("OTEL_LOG_LEVEL", "loud", "debug"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/no/such/ca.pem", "a PEM file"),
        ("OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE", __file__, "a PEM file"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http:///", "with a host"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://:4318", "with a host"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:99999", "with a host"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:0", "with a host"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://host:abc", "with a host"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://[::1", "with a host"),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://a..b", "with a host"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://*.example.com", "with a host"),
        ("SDXL_GATEWAY_TARGET", "http:///", "OWNER/APP"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    sentence = str(caught.value)
    assert sentence.startswith(f"{name}={value!r} is not allowed")
    assert allowed in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key:hunter2"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "hunter2"),
        ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "hunter2"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector://me:hunter2@host"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://me:hun/hunter2@host:x"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://host/?key=hunter2"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://host:x/?key=hunter2"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://me:hunter2%0A@host/v1/traces"),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://host:x/hunter2hunter2hunter2"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "Authorization=Basic%20hunter2%0Ahunter2"),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=1,api-key=hunter2%00"),
        ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "api-key=hunter2%E2%82%AC"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2%20hunter2=x"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2%0D%0Ahunter2=x"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "content-length=7,api-key=hunter2"),
        ("SDXL_ADMIN_TOKEN", "hunter2hunter2\nhunter2"),
        ("SDXL_ADMIN_TOKEN", "hunter2"),
        ("SDXL_API_KEYS", "hunter2hunter2hunter2"),
        ("SDXL_API_KEYS", "alice=hunter2"),
        ("SDXL_API_KEYS", "alice=hunter2hunter2hunter2,bob=hunter2hunter2hunter2"),
        ("SDXL_API_KEYS", "alice=hunter2 hunter2 hunter2"),
        ("SDXL_GATEWAY_TARGET", "http://me:hunter2@host:x"),
        ("SDXL_TRACE_URL", "https://me:hunter2@host/"),
        ("HF_TOKEN", "hf_hunter2\nhunter2"),
        ("HUGGING_FACE_HUB_TOKEN", "hf_hunter2 hunter2"),
        ("FAL_KEY", "hunter2:hunter2\n"),
        ("HTTPS_PROXY", "http://me:hunter2@proxy:x"),
        ("http_proxy", "http://me:hunter2@"),
        ("ALL_PROXY", "gopher://me:hunter2@proxy"),
        ("HTTP_PROXY", "me:hunter2%0A@proxy:3128"),
    ],
)
def test_a_secret_is_never_shown(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert name in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "headers", ["api-key=x", "Authorization=Basic%20abc==,x-scope=1", "a=1, b=2,", "a="]
)
def test_headers_as_the_exporter_reads_them(monkeypatch: pytest.MonkeyPatch, headers: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", headers)
    load_settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "http://me:secret@proxy:3128"),
        ("HTTP_PROXY", "proxy:3128"),
        ("ALL_PROXY", "socks5h://127.0.0.1:1080"),
        ("https_proxy", "http://[::1]:3128/"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://me:x%20y@host/v1/traces?key=1"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://[::1]:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://xn--bcher-kva.example:4318/otlp"),
        ("SDXL_GATEWAY_TARGET", "someone/app"),
        ("HF_TOKEN", "hf_0123456789\n"),
    ],
)
def test_what_http_can_use_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    load_settings()


@pytest.mark.parser
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(max_size=12), value=st.text(max_size=20))
def test_a_header_that_is_allowed_is_one_that_http_carries(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    encoded = f"{quote(name, safe='')}={quote(value, safe='')}"
    with monkeypatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", encoded)
        try:
            load_settings()
        except ConfigurationError:
            return
    sent = parse_env_headers(encoded, liberal=True)
    prepared = requests.Request("POST", "http://127.0.0.1", headers=sent).prepare()
    connection = http.client.HTTPConnection("127.0.0.1")
    connection.putrequest("POST", "/")
    for each, its_value in prepared.headers.items():
        connection.putheader(each, its_value)


def test_a_name_in_lower_case_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("sdxl_steps", "7")
    assert load_settings().steps == 7
    monkeypatch.setenv("sdxl_steps", "abc")
    with pytest.raises(ConfigurationError, match="sdxl_steps='abc' is not allowed"):
        load_settings()
    monkeypatch.setenv("SDXL_STEPS", "7")
    with pytest.raises(ConfigurationError, match="SDXL_STEPS and sdxl_steps"):
        load_settings()


@pytest.mark.parametrize("name", ["SDXL_STPES", "sdxl_stpes", "Sdxl_Stpes"])
def test_a_misspelt_name_is_refused_in_any_case(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "5")
    with pytest.raises(ConfigurationError, match=f"{name} is not a setting; did you mean SDXL_ST"):
        load_settings()


def test_an_unknown_name_is_refused_with_a_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_MAX_WAITNG", "3")
    with pytest.raises(ConfigurationError, match="did you mean SDXL_MAX_WAITING"):
        load_settings()


def test_fixed_timesteps_are_the_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_TIMESTEPS", "999, 749,499,0")
    assert load_settings().timesteps == (999, 749, 499, 0)
    assert load_settings().default_steps == 4
    monkeypatch.setenv("SDXL_STEPS", "4")
    load_settings()
    monkeypatch.setenv("SDXL_STEPS", "8")
    with pytest.raises(ConfigurationError, match=r"SDXL_TIMESTEPS.*SDXL_STEPS=8 contradict"):
        load_settings()
    monkeypatch.delenv("SDXL_STEPS")
    for scheduler in ("lcm", "euler", "euler-trailing"):
        monkeypatch.setenv("SDXL_SCHEDULER", scheduler)
        assert load_settings().scheduler == scheduler
    for scheduler in ("ddim", "ddim-trailing", "euler-ancestral"):
        monkeypatch.setenv("SDXL_SCHEDULER", scheduler)
        with pytest.raises(ConfigurationError, match=f"SDXL_SCHEDULER={scheduler} contradict"):
            load_settings()


def test_loras_are_read_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_LORAS", "ink=demo:ink, Toon_2=someone/toon@v=2,x=/a b/c.safetensors")
    assert load_settings().loras == (
        LoraSource("ink", "demo:ink"),
        LoraSource("Toon_2", "someone/toon@v=2"),
        LoraSource("x", "/a b/c.safetensors"),
    )


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_loras_are_not_added_to_quantised_weights(
    monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    monkeypatch.setenv("SDXL_LORAS", "ink=demo:ink")
    monkeypatch.setenv("SDXL_QUANTIZE", quantization)
    with pytest.raises(ConfigurationError, match=r"SDXL_LORAS.*contradict"):
        load_settings()


def test_contradictions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SAMPLE_RATE", "0.1")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.2")
    with pytest.raises(ConfigurationError, match="contradict"):
        load_settings()
    monkeypatch.delenv("OTEL_TRACES_SAMPLER_ARG")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "200")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "300")
    with pytest.raises(ConfigurationError, match="at most as large"):
        load_settings()
    monkeypatch.delenv("OTEL_BSP_MAX_QUEUE_SIZE")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "9000")
    with pytest.raises(ConfigurationError, match="8192"):
        load_settings()


@pytest.mark.parametrize(
    ("sampler", "name", "value"),
    [
        ("always_on", "OTEL_SAMPLE_RATE", "0.1"),
        ("parentbased_always_on", "OTEL_TRACES_SAMPLER_ARG", "0.1"),
        ("always_off", "OTEL_SAMPLE_RATE", "1"),
        ("always_off", "SDXL_TRACE_KEEP_SLOW_SECONDS", "2"),
        ("parentbased_always_off", "SDXL_TRACE_KEEP_SLOW_STEP_MS", "50"),
    ],
)
def test_a_sampler_without_a_ratio_refuses_one(
    monkeypatch: pytest.MonkeyPatch, sampler: str, name: str, value: str
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    load_settings()
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"{sampler} and {name}.*contradict"):
        load_settings()


def test_no_other_module_reads_a_setting_from_the_environment() -> None:
    reading = {
        path.relative_to(ROOT).as_posix()
        for package in ("serve", "metrics")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"os\.(environ|getenv)|from os import", path.read_text())
    }
    assert reading <= {
        "serve/settings/environment.py",
        "serve/telemetry/logs.py",  # writes a variable for transformers
        "serve/__main__.py",  # writes variables for Ray
        "serve/model/loading.py",  # writes a variable for huggingface_hub
        "metrics/gpu.py",  # the CUDA driver's own variable
        "metrics/tracing.py",  # switches the SDK's own metrics on, which has no other switch
    }


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().max_waiting = 1  # type: ignore[misc]


def test_every_setting_says_what_is_allowed() -> None:
    for name, field in ServeSettings.model_fields.items():
        assert field.description, environment_name(name)
        assert not field.description.endswith((",", ".")), environment_name(name)


def test_a_push_needs_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_OTLP_METRICS", "true")
    with pytest.raises(ConfigurationError, match="set OTEL_EXPORTER_OTLP_ENDPOINT or"):
        load_settings()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://127.0.0.1:4318/v1/metrics")
    assert load_settings().otlp_metrics


def test_a_push_can_be_turned_on_by_its_standard_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
    with pytest.raises(ConfigurationError, match="needs an endpoint"):
        load_settings()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert load_settings().pushes_metrics
    monkeypatch.setenv("SDXL_OTLP_METRICS", "false")
    with pytest.raises(ConfigurationError, match="contradict"):
        load_settings()
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    assert not load_settings().pushes_metrics
    monkeypatch.setenv("SDXL_OTLP_METRICS", "true")
    with pytest.raises(ConfigurationError, match="contradict"):
        load_settings()


def test_an_exporter_that_is_named_needs_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    with pytest.raises(ConfigurationError, match="needs an endpoint"):
        load_settings()
    monkeypatch.setenv("ENABLE_TRACING", "false")
    assert not load_settings().tracing_enabled


def test_a_client_certificate_and_its_key_are_read_at_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate, key = client_certificate(tmp_path)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CLIENT_KEY", str(key))
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"):
        load_settings()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", str(certificate))
    load_settings()
    _, another_key = client_certificate(tmp_path)
    another_key.write_bytes(self_signed()[1])
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE"):
        load_settings()


def test_a_wrong_setting_is_found_before_the_sdk_is_imported() -> None:
    """The SDK reads the limits of a span at its import, and answers with a traceback."""
    code = "import sys, serve.settings; sys.exit('opentelemetry.sdk.trace' in sys.modules)"
    environment = clean_environment({"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "abc"})
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0


def test_buckets_and_temporality_are_read_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_BUCKETS_STEP", "0.02, 0.03,0.05")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "DELTA")
    settings = load_settings()
    assert settings.buckets_step == (0.02, 0.03, 0.05)
    assert settings.buckets_queue is None
    assert settings.otlp_metrics_temporality == "delta"
