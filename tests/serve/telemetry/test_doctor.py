"""The doctor's command and output: exit status, the README's example, and no secret shown."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.errors import ConfigurationError
from serve.settings import load_settings
from serve.telemetry.backends import BACKENDS
from serve.telemetry.doctor import run
from tests.serve.telemetry.doctor_cases import (
    DATADOG_HEADERS,
    ENDPOINT,
    HEADERS,
    PROTOBUF,
    TRACES_ENDPOINT,
    answering,
    clean_environment_of_settings,
    partial,
)
from tests.support.processes import clean_environment


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    clean_environment_of_settings(monkeypatch)


# Secrets

SECRET = "s3cr3t/Sh0uld+Never=BeSeen"
PASSWORD = "Qx7vLm2RtZ9kWp4N"
QUERY_KEY = "bH3uYc8JdF6gSa1E"
PATH_KEY = "Wn5oKi0TxU7yPq3M"


def output_of_doctor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **more: Any
) -> str:
    """The output of the doctor and of the libraries that it uses."""
    lines: list[str] = []
    run(load_settings(), lines.append, **more)
    captured = capsys.readouterr()
    return "\n".join(lines) + captured.out + captured.err


def pieces(secret: str, length: int = 6) -> list[str]:
    return [secret[at : at + length] for at in range(len(secret) - length + 1)]


@pytest.mark.parametrize("status", [200, 400, 401, 500])
@pytest.mark.parametrize(
    "echo",
    [
        "key {value} is unknown",
        '{{"error": "unknown key {value}", "header": "{raw}"}}',
        "credentials {decoded} do not match",
        "key {start}... is unknown, it ends in {end}",
        "{escaped}",
        "no such path: {url}",
        '{{"error": "{basic} is unknown at {url}"}}',
        "\x1b[2J{value}\n\n{value}",
    ],
)
def test_a_backend_that_quotes_the_key_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    echo: str,
    status: int,
) -> None:
    caplog.set_level("DEBUG")
    encoded = base64.b64encode(f"12345:{SECRET}".encode()).decode()
    raw = f"Basic%20{encoded}"
    body = echo.format(
        value=encoded,
        raw=raw,
        decoded=f"12345:{SECRET}",
        url=f"/in/{PATH_KEY}/v1/traces?key={QUERY_KEY}",
        basic=base64.b64encode(f"me:{PASSWORD}".encode()).decode(),
        start=encoded[:9],
        end=encoded[-9:],
        escaped=encoded.replace("/", "\\/"),
    )
    kind = "application/json" if body.startswith("{") else "text/plain"
    answer: bytes | str = body
    if status == 200:
        answer, kind = partial(2, body), PROTOBUF
    with answering(status, answer, kind) as server:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        url = server.url.replace("//", f"//me:{PASSWORD}@")
        monkeypatch.setenv(TRACES_ENDPOINT, f"{url}/in/{PATH_KEY}/v1/traces?key={QUERY_KEY}")
        monkeypatch.setenv(HEADERS, f"Authorization={raw},x-scope={SECRET}")
        shown = output_of_doctor(monkeypatch, capsys, width=10_000) + caplog.text
    basic = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    for secret in (SECRET, encoded, basic, PASSWORD, QUERY_KEY, PATH_KEY):
        for piece in pieces(secret):
            assert piece not in shown, shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    "headers",
    [
        f"api-key={SECRET}",
        f"api-key='{SECRET}'",
        f"Authorization=Bearer {SECRET}%3D",
        f"{SECRET.replace('/', '').replace('+', '')}=",  # a key in place of a name
        "c2VjcmV0U2hvdWxkTmV2ZXJCZVNlZW4=",
        "c2VjcmV0U2hvdWxkTmV2ZXJCZVNlZW==",
    ],
)
def test_no_header_is_shown_whatever_is_wrong_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], headers: str
) -> None:
    monkeypatch.setenv(ENDPOINT, "https://otlp.nr-data.net:4318")
    monkeypatch.setenv(HEADERS, headers)
    shown = output_of_doctor(monkeypatch, capsys, sends=False).lower()
    for piece in [*pieces("s3cr3t/sh0uld+never"), *pieces("c2vjcmv0u2hvdwxktmv2zxjczvnlzw")]:
        assert piece not in shown, shown


def test_an_endpoints_password_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "http://someone:hunter2hunter2@127.0.0.1:9/v1/traces?token=hunter2hunter2"
    monkeypatch.setenv(TRACES_ENDPOINT, url)
    assert "hunter2" not in output_of_doctor(monkeypatch, capsys)


@pytest.mark.parametrize("host", ["127.0.0.1:9", "api.honeycomb.io"])
def test_a_key_in_an_endpoints_path_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    monkeypatch.setenv(ENDPOINT, f"https://{host}/in/0123456789abcdef")
    shown = output_of_doctor(monkeypatch, capsys, sends=False)
    assert "/in/***" in shown
    assert "456789" not in shown


# A host of each backend and of none, with what may be mistyped around it.
HOSTS = st.sampled_from(
    [r.host.replace("*", "a") for b in BACKENDS for r in b.regions] + ["localhost", "grafana.net"]
)
ENDPOINTS = st.builds(
    "{}://{}{}{}".format,
    st.sampled_from(["http", "https"]),
    HOSTS,
    st.sampled_from(["", ":4317", ":443", ":99999", ":"]),
    st.text("/v1tracesotlp?#%@:[]", max_size=12),
)
SOME_HEADERS = st.dictionaries(
    st.sampled_from([backend.header for backend in BACKENDS] + ["a", "x-b"]),
    # hypothesis also draws words of our own code, as a backend's name, which the doctor may show:
    # so every character becomes the one that mirrors it between blank and tilde.
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60).map(
        lambda text: "".join(chr(32 + 126 - ord(character)) for character in text)
    ),
    max_size=3,
)


@pytest.mark.parser
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(endpoint=ENDPOINTS, headers=SOME_HEADERS, traces=st.booleans())
def test_any_settings_are_checked_or_refused_and_no_key_is_shown(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, headers: dict[str, str], traces: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(TRACES_ENDPOINT if traces else ENDPOINT, endpoint)
        patch.setenv(HEADERS, ",".join(f"{name}={value}" for name, value in headers.items()))
        lines: list[str] = []
        try:
            status = run(load_settings(), lines.append, sends=False)
        except ConfigurationError as refused:
            lines.append(str(refused))
        else:
            assert status in (0, 1)
            assert (status == 1) == any(line.startswith("problem") for line in lines)
        shown = "\n".join(lines)
        for value in headers.values():
            for piece in pieces(value.strip(), 9):
                assert piece in endpoint or piece not in shown or not piece.strip("= ")


@pytest.mark.parametrize("header", ['a="quoted"', "a=x;y", "a=ü", "key:hunter2", "a b=hunter2"])
def test_headers_that_the_exporter_would_skip_are_refused_at_start_up(
    header: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = doctor({ENDPOINT: "http://127.0.0.1:9", HEADERS: header})
    assert result.returncode == 2
    assert "OTEL_EXPORTER_OTLP_HEADERS is not allowed as it is" in result.stderr
    assert header.partition("=")[2] not in result.stdout + result.stderr or "=" not in header


# The command


def doctor(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=clean_environment({"COLUMNS": "100", "NO_PROXY": "127.0.0.1", **environment}),
    )


def test_the_exit_status_is_ok_problem_or_wrong_settings() -> None:
    with answering(202) as server:
        ok = doctor({ENDPOINT: server.url, HEADERS: DATADOG_HEADERS}, "--backend", "datadog")
    assert ok.returncode == 0, ok.stdout + ok.stderr
    assert ok.stdout.endswith("\nSpans arrive.\n")
    assert "127.0.0.1 is treated as Datadog" in ok.stdout

    with answering(403) as server:
        refused = doctor({ENDPOINT: server.url}, "--backend", "grafana cloud")
        unsent = doctor({ENDPOINT: server.url}, "--no-send")
    assert refused.returncode == 1
    assert "Spans will not arrive as they should: 3 problems." in refused.stdout
    assert unsent.returncode == 0
    assert unsent.stdout.endswith("\nNothing is wrong with the settings. Nothing was sent.\n")
    assert len(server.received) == 1

    wrong = doctor({"OTEL_EXPORTER_OTLP_TIMEOUT": "10000"})
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "not milliseconds" in wrong.stderr
    unknown = doctor({}, "--backend", "nagios")
    assert unknown.returncode == 2
    assert "Known: New Relic, Datadog, Grafana Cloud, Honeycomb." in unknown.stderr
    for result in (ok, refused, unsent):
        assert result.stderr == ""
        assert all(len(line) <= 100 for line in result.stdout.splitlines())


PAGE = Path(__file__).resolve().parents[3] / "docs" / "tracing.md"


@pytest.mark.docs
def test_the_documentation_shows_what_the_doctor_says() -> None:
    block = PAGE.read_text().split("<!-- doctor: begin -->\n```console\n")[1]
    *lines, _ = block.split("```\n<!-- doctor: end -->")[0].split("\n")
    exports = [line.removeprefix("$ export ") for line in lines if line.startswith("$ export ")]
    environment = {
        name: value.strip('"') for name, _, value in (line.partition("=") for line in exports)
    }
    command = lines.index("$ python -m serve doctor --no-send")
    assert "\n".join(lines[command + 1 :]) == doctor(environment, "--no-send").stdout.rstrip("\n")
