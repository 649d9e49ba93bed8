"""Every fix that the doctor prints, tried: with it the service starts, and the finding is gone."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

import pytest

from serve.settings import load_settings
from serve.telemetry.backends import BACKENDS, Backend, backend_of
from serve.telemetry.finding import Finding, Severity
from serve.telemetry.settings_checks import check_settings
from serve.telemetry.trace_endpoint import trace_endpoint
from tests.serve.telemetry.doctor_cases import (
    DATADOG_HEADERS,
    ENDPOINT,
    GOOD,
    GRAFANA_BASIC,
    HEADERS,
    KEYS,
    TRACES_ENDPOINT,
    answering,
    clean_environment_of_settings,
    sent,
)

Environment = dict[str, str]

TRACES_HEADERS = "OTEL_EXPORTER_OTLP_TRACES_HEADERS"
ZONE = "prod-us-east-0"
GRAFANA = f"https://otlp-gateway-{ZONE}.grafana.net"
LOCAL = "http://127.0.0.1:1"
CLASSIC_KEY = "0a" * 16

# What an operator puts in the place of what the doctor cannot know.
PLACEHOLDERS = {
    "<ingest license key>": KEYS["New Relic"],
    "<API key>": KEYS["Datadog"],
    "<base64 of instance id:token>": GRAFANA_BASIC,
    "<ingest key>": KEYS["Honeycomb"],
    "<dataset>": "images",
    "<zone>": ZONE,
    "<base64>": base64.b64encode(b"me:secret").decode(),
}

_SETTING = re.compile(r"\b((?:OTEL|SDXL|ENABLE)_[A-Z_]+)=(\S+)")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    clean_environment_of_settings(monkeypatch)


def findings(
    monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], treat_as: Backend | None
) -> list[Finding]:
    """What the doctor finds; fails the test if the service would not start."""
    with monkeypatch.context() as patch:
        clean_environment_of_settings(patch)
        for name, value in environment.items():
            patch.setenv(name, value)
        return check_settings(load_settings(), treat_as)


def advised(found: list[Finding]) -> list[Finding]:
    return [f for f in found if f.severity is not Severity.OK and f.advice]


def follow(advice: str, environment: Environment) -> Iterator[Environment]:
    """The environments that an operator may make who follows the advice."""
    for placeholder, value in PLACEHOLDERS.items():
        advice = advice.replace(placeholder, value)
    first, _, alternative = advice.partition("; or take ")
    if re.match(r"(Set|Unset) [A-Z_]+[=. ]", first):
        changed = dict(environment)
        for name in re.findall(r"[Uu]nset ([A-Z_]+)", first):
            del changed[name]
        for name, value in _SETTING.findall(first):
            changed[name] = value.rstrip(".,;")
        yield changed
    elif match := re.fullmatch(r"Append (,\S+) to ([A-Z_]+)\.", first):
        yield environment | {match[2]: environment[match[2]] + match[1]}
    elif urls := re.findall(r"https://[^\s,;]+", first):
        for url in urls:
            yield _to(url.rstrip(".,;"))
    else:
        yield _by_hand(first, environment)
    for url in re.findall(r"https://[^\s,;]+", alternative):
        yield _to(url.rstrip(".,;"))


def _to(url: str) -> Environment:
    """The settings of another endpoint, with its backend's key."""
    host = url.split("/")[2].partition(":")[0]
    return (
        {ENDPOINT: url, HEADERS: GOOD.get(host, GOOD.get("otlp.nr-data.net", ""))}
        | ({HEADERS: DATADOG_HEADERS} if "datadog" in host else {})
        | ({HEADERS: f"Authorization=Basic%20{GRAFANA_BASIC}"} if "grafana" in host else {})
    )


def _by_hand(advice: str, environment: Environment) -> Environment:
    url_name = TRACES_ENDPOINT if TRACES_ENDPOINT in environment else ENDPOINT
    headers_name = TRACES_HEADERS if TRACES_HEADERS in environment else HEADERS
    url, headers = environment.get(url_name, ""), environment.get(headers_name, "")
    root = "/".join(url.split("/")[:3])
    if match := re.fullmatch(r"Remove (\S+) from the end of ([A-Z_]+)\.", advice):
        assert match[2] == url_name
        return environment | {url_name: url.removesuffix(match[1])}
    if match := re.fullmatch(r"Remove the path of ([A-Z_]+)\.", advice):
        assert match[1] == url_name
        return environment | {url_name: root}
    if match := re.fullmatch(r"Make the path of ([A-Z_]+) (\S+)\.", advice):
        assert match[1] == url_name
        return environment | {url_name: root + match[2]}
    if match := re.fullmatch(r"Make (\S+) the end of its path\.", advice):
        return environment | {url_name: url.rstrip("/") + match[1]}
    if match := re.fullmatch(r"Put it into ([A-Z_]+), as (\S+)\.", advice):
        return environment | {url_name: re.sub("//[^@]*@", "//", url), match[1]: match[2]}
    if match := re.match(r"Write NAME=VALUE into ([A-Z_]+),", advice):
        return environment | {match[1]: f"api-key={KEYS['New Relic']}"}
    hand = {
        "Name the port": {url_name: url.replace(":4317", ":4318")},
        "Encode them": {headers_name: _without_line_breaks(headers)},
        "Put the key": {headers_name: re.sub(r"<.*?>|\$\{\w+\}", "0123456789", headers)},
        "Remove them": {headers_name: headers.replace("'", "")},
        "Write that space": {headers_name: headers.replace(" ", "%20")},
        "Write it as": {headers_name: headers.replace(" ", "%20")},
        "Use https://": {url_name: url.replace("http:", "https:")},
    }
    [change] = [change for start, change in hand.items() if advice.startswith(start)]
    return environment | change


def _without_line_breaks(headers: str) -> str:
    name, _, value = headers.partition("=")
    decoded = base64.b64decode(unquote(value).partition(" ")[2])
    clean = re.sub(rb"[\r\n]", b"", decoded)
    return f"{name}=Basic%20{base64.b64encode(clean).decode()}"


def try_all(
    monkeypatch: pytest.MonkeyPatch, environment: Environment, treat_as: Backend | None = None
) -> int:
    """Follow each advice by itself and in turn, until none is left; returns how many there were."""
    followed = 0
    pending = [(environment, 0)]
    while pending:
        current, depth = pending.pop()
        assert depth < 8, current
        found = findings(monkeypatch, current, treat_as)
        for finding in advised(found):
            followed += 1
            for changed in follow(finding.advice, current):
                after = findings(monkeypatch, changed, treat_as)
                assert finding.text not in [f.text for f in after], (finding, changed)
                if finding is advised(found)[0]:
                    pending.append((changed, depth + 1))
    return followed


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # Tracing is off, or exports nothing.
        {ENDPOINT: LOCAL, "ENABLE_TRACING": "false", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: LOCAL, "OTEL_TRACES_EXPORTER": "none"},
        {ENDPOINT: LOCAL, "OTEL_TRACES_EXPORTER": "console"},
        {ENDPOINT: LOCAL, "OTEL_BLRP_SCHEDULE_DELAY": "7", "OTEL_NO_SUCH": "x"},
        {ENDPOINT: LOCAL, "OTEL_TRACES_SAMPLER": "always_off"},
        {ENDPOINT: LOCAL, "OTEL_TRACES_SAMPLER": "parentbased_always_off"},
        {ENDPOINT: LOCAL, "OTEL_SAMPLE_RATE": "0"},
        {ENDPOINT: LOCAL, "OTEL_TRACES_SAMPLER_ARG": "0"},
        {ENDPOINT: LOCAL, "OTEL_TRACES_SAMPLER_ARG": "0", "OTEL_SAMPLE_RATE": "0"},
        {
            ENDPOINT: LOCAL,
            "OTEL_TRACES_SAMPLER": "traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": "0",
            "SDXL_TRACE_KEEP_SLOW_SECONDS": "2",
        },
        # The endpoint.
        {ENDPOINT: "https://otlp.nr-data.net:4318/v1/traces", HEADERS: GOOD["otlp.nr-data.net"]},
        {TRACES_ENDPOINT: "https://otlp.nr-data.net:4318", HEADERS: GOOD["otlp.nr-data.net"]},
        {TRACES_ENDPOINT: "https://otlp.nr-data.net:4318/v1/traces/", HEADERS: "api-key=x"},
        {TRACES_ENDPOINT: "https://otlp.nr-data.net/v1/traces/v1/traces", HEADERS: "api-key=x"},
        {TRACES_ENDPOINT: "http://otlp.datadoghq.eu:8126/v1/traces", HEADERS: DATADOG_HEADERS},
        {ENDPOINT: "http://otlp.nr-data.net", HEADERS: GOOD["otlp.nr-data.net"]},
        {ENDPOINT: "https://otlp.datadoghq.com:4318", HEADERS: DATADOG_HEADERS},
        {ENDPOINT: GRAFANA, HEADERS: f"Authorization=Basic%20{GRAFANA_BASIC}"},
        {ENDPOINT: "https://api.honeycomb.io/otlp", HEADERS: GOOD["api.honeycomb.io"]},
        {ENDPOINT: "http://127.0.0.1:4318/v1/traces"},
        {ENDPOINT: "http://127.0.0.1:4317"},
        {TRACES_ENDPOINT: "http://127.0.0.1:4317/spans"},
        {ENDPOINT: "http://me:hunter2hunter2@127.0.0.1:4318"},
        {TRACES_ENDPOINT: "http://me:x@127.0.0.1:4318/v1/traces?key=1", TRACES_HEADERS: "a=1"},
        {ENDPOINT: "http://collector.example.com:4318", HEADERS: "a=1234567"},
        {ENDPOINT: "https://api.datadoghq.com", HEADERS: DATADOG_HEADERS},
        {ENDPOINT: "https://mystack.grafana.net/tempo"},
        {ENDPOINT: "https://log-api.eu.newrelic.com"},
        # Headers.
        {ENDPOINT: "https://otlp.nr-data.net:4318"},
        {ENDPOINT: "https://otlp.nr-data.net:4318", HEADERS: DATADOG_HEADERS},
        {ENDPOINT: "https://otlp.datadoghq.com", HEADERS: "compute_stats=true"},
        {ENDPOINT: "https://otlp.datadoghq.com", HEADERS: f"dd-api-key={KEYS['Datadog']}"},
        {ENDPOINT: "https://otlp.datadoghq.com", HEADERS: f"dd-api-key={'0a' * 20}"},
        {ENDPOINT: "https://otlp.nr-data.net", HEADERS: "api-key=NRAK-0123456789"},
        {ENDPOINT: "https://otlp.nr-data.net", HEADERS: GOOD["otlp.eu01.nr-data.net"]},
        {ENDPOINT: "https://api.honeycomb.io", HEADERS: "x-honeycomb-team=hcamk_0123456789"},
        {ENDPOINT: "https://api.honeycomb.io", HEADERS: f"x-honeycomb-team={CLASSIC_KEY}"},
        {ENDPOINT: "https://api.honeycomb.io", TRACES_HEADERS: f"x-honeycomb-team={CLASSIC_KEY}"},
        {ENDPOINT: "https://api.honeycomb.io", HEADERS: "x-honeycomb-dataset=my%20images"},
        *(
            {ENDPOINT: f"{GRAFANA}/otlp", HEADERS: f"Authorization={value}"}
            for value in (
                GRAFANA_BASIC,
                "Basic%20not-base64",
                f"Basic%20{base64.b64encode(b'no-colon-12345').decode()}",
                f"Basic%20{base64.b64encode(b'123:glsa_12345').decode()}",
                f"Basic%20{base64.b64encode(b'123:glc_12345' + bytes([10])).decode()}",
                f"Basic {GRAFANA_BASIC}",
            )
        ),
        {ENDPOINT: LOCAL, HEADERS: f"Authorization=Basic {'abc' * 9}%3D"},
        {ENDPOINT: LOCAL, HEADERS: "api-key='0123456789'"},
        {ENDPOINT: LOCAL, HEADERS: "a=<API_KEY>"},
        {ENDPOINT: LOCAL, HEADERS: "a=${DD_API_KEY}"},
        {ENDPOINT: LOCAL, HEADERS: "api-key="},
        # The rest.
        {ENDPOINT: LOCAL, "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5"},
        {ENDPOINT: LOCAL, "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "0.5"},
        {ENDPOINT: LOCAL, "OTEL_BSP_EXPORT_TIMEOUT": "500", "OTEL_EXPORTER_OTLP_TIMEOUT": "0.6"},
        {
            ENDPOINT: "https://otlp.nr-data.net",
            HEADERS: GOOD["otlp.nr-data.net"],
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "4000",
        },
        {
            ENDPOINT: "https://otlp.datadoghq.com",
            HEADERS: DATADOG_HEADERS,
            "OTEL_METRICS_EXPORTER": "otlp",
        },
    ],
    ids=lambda environment: ",".join(environment.values())[:60],
)
def test_a_fix_removes_what_it_is_for(
    monkeypatch: pytest.MonkeyPatch, environment: Environment
) -> None:
    assert try_all(monkeypatch, environment)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("name", [ENDPOINT, TRACES_ENDPOINT])
def test_a_fix_for_a_backend_behind_a_proxy(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, name: str
) -> None:
    environment = {name: "http://127.0.0.1:4318/elsewhere"}
    assert try_all(monkeypatch, environment, backend)


SAMPLERS: list[Environment] = [
    {},
    {"OTEL_SAMPLE_RATE": "0.5"},
    {"OTEL_TRACES_SAMPLER": "always_on"},
    {"OTEL_TRACES_SAMPLER": "parentbased_always_on"},
    {"OTEL_TRACES_SAMPLER": "traceidratio"},
    {"OTEL_TRACES_SAMPLER_ARG": "0.5"},
    {"OTEL_TRACES_SAMPLER_ARG": "0.5", "OTEL_SAMPLE_RATE": "0.5"},
]


@pytest.mark.parametrize("environment", SAMPLERS)
def test_the_fix_for_a_backend_that_wants_less_exports_less(
    monkeypatch: pytest.MonkeyPatch, environment: Environment
) -> None:
    with answering(429) as server:
        advice = sent(monkeypatch, server.url, **environment).advice
    [changed] = follow(advice[advice.index("Set ") :], environment)
    assert any(
        "one trace in 10" in finding.text
        for finding in findings(monkeypatch, {ENDPOINT: LOCAL} | changed, None)
    )


@pytest.mark.parametrize(
    ("backend", "status"),
    [(backend, status) for backend in BACKENDS for status in (*backend.refusals, 413)],
    ids=lambda part: getattr(part, "name", str(part)),
)
def test_the_fix_for_a_refused_export_is_a_setting_that_is_right(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, status: int
) -> None:
    with answering(status) as server:
        advice = sent(monkeypatch, server.url, backend).advice
    if status == 413:
        assert "OTEL_BSP_MAX_EXPORT_BATCH_SIZE" in advice
        return
    own, *others = list(follow(advice, {ENDPOINT: LOCAL}))
    assert len(others) == len(set(re.findall(r"https://[^\s,]+", advice)))
    own[ENDPOINT] = next(iter(others))[ENDPOINT]
    for environment in (own, *others):
        found = findings(monkeypatch, environment, None)
        bad = [f for f in found if f.severity is Severity.PROBLEM and "region" not in f.text]
        assert not bad, (environment, bad)
        assert backend_of(trace_endpoint_host(monkeypatch, environment)) is backend


def trace_endpoint_host(monkeypatch: pytest.MonkeyPatch, environment: Environment) -> str:
    with monkeypatch.context() as patch:
        clean_environment_of_settings(patch)
        for name, value in environment.items():
            patch.setenv(name, value)
        endpoint = trace_endpoint(load_settings())
        assert endpoint is not None
        return endpoint.host
