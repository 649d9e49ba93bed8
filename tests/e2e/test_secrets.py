"""A secret in each place that could leak one: none is in the output of a real server or the doctor.

The endpoint and the hub here quote whatever they are sent, and one proxy is not there.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from bench.service.loopback import LoopbackHandler, serving
from tests.e2e.conftest import START_SECONDS
from tests.support import forked, processes
from tests.support.processes import ROOT, ServerProcess, clean_environment, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# No six characters of one are in another, or in any word.
PASSWORD = "Qx7vLm2RtZ9kWp4N"
QUERY_KEY = "bH3uYc8JdF6gSa1E"
HEADER_KEY = "Wn5oKi0TxU7yPq3M"
METRICS_KEY = "zC4rVe9BhG2jLs8D"
PROXY_PASSWORD = "Fk6mXw1QnA5tYb7J"
HUB_TOKEN = "hf_Rd2cPv8ZgH4sUe6K"
FAL_KEY = "Jy9bNt3M:vX5wEq7LhC1fSz0A"
ADMIN_TOKEN = "Ug8pDk4OiB6rTm2Y"
PROMPT = "Vc1nHs7F GxKq9J3wLe5R Zb0tMy4P"


@dataclass
class Quoting:
    """An HTTP server that answers 401 and quotes the request in the status line and the body."""

    port: int = 0
    bodies: list[bytes] = field(default_factory=list)


@contextmanager
def quoting() -> Iterator[Quoting]:
    quoted = Quoting()

    class Handler(LoopbackHandler):
        def respond(self) -> None:
            quoted.bodies.append(self.read_body())
            told = {"path": self.path} | dict(self.headers.items())
            body = json.dumps({"error": told}).encode()
            self.send_response(401, " ".join(told.values()))
            for name, value in (
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("X-Error-Message", "; ".join(told.values())),
            ):
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with serving(Handler) as url:
        quoted.port = int(url.rpartition(":")[2])
        yield quoted


def planted(port: int) -> dict[str, str]:
    """Secrets in the settings of spans (a server that quotes), metrics (a proxy that is not there)
    and of everything else that this process may send."""
    proxy = f"http://me:{PROXY_PASSWORD}@127.0.0.1:{free_port()}"
    return {
        "SDXL_DEVICE": "cpu",
        "SDXL_SHAPES": "64x64",
        "SDXL_ADMIN_TOKEN": ADMIN_TOKEN,
        "SDXL_OTLP_METRICS": "true",
        "OMP_NUM_THREADS": "1",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": (
            f"http://me:{PASSWORD}@127.0.0.1:{port}/v1/traces?api-key={QUERY_KEY}"
        ),
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": f"x-key=Bearer%20{HEADER_KEY}",
        "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": (
            f"http://me:{PASSWORD}@collector.invalid:4318/v1/metrics?api-key={QUERY_KEY}"
        ),
        "OTEL_EXPORTER_OTLP_METRICS_HEADERS": f"x-key={METRICS_KEY}",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",
        "OTEL_LOG_LEVEL": "debug",
        "HTTP_PROXY": proxy,
        "HTTPS_PROXY": proxy,
        "ALL_PROXY": proxy,
        "NO_PROXY": "127.0.0.1",
        "HF_TOKEN": HUB_TOKEN,
        "FAL_KEY": FAL_KEY,
    }


def leaks(text: str) -> list[str]:
    """The secrets of which a text holds six characters or more in a row."""
    secrets = [PASSWORD, QUERY_KEY, HEADER_KEY, METRICS_KEY, PROXY_PASSWORD, HUB_TOKEN]
    secrets += [FAL_KEY, ADMIN_TOKEN, PROMPT]
    encoded = [base64.b64encode(f"me:{secret}".encode()).decode() for secret in secrets[:5]]
    return [
        secret
        for secret in (*secrets, *encoded)
        if any(secret[at : at + 6] in text for at in range(len(secret) - 5))
    ]


def doctor(environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", "doctor"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
        env=clean_environment(environment),
    )


def wait_for(server: ServerProcess, text: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while text not in server.output():
        assert time.monotonic() < deadline, f"no {text!r} in:\n{server.output()}"
        time.sleep(0.1)


def test_a_server_whose_exports_fail_writes_no_secret() -> None:
    with quoting() as endpoint, forked.self_hosted(planted(endpoint.port)) as server:
        server.wait_until_ready(START_SECONDS)
        shown = ""
        for body in (
            {"prompt": PROMPT, "num_inference_steps": 2},
            {"prompt": PROMPT, "num_inference_steps": "many"},
        ):
            answer = httpx.post(server.url, json=body, timeout=120)
            drawn = answer.json() if answer.status_code == 200 else {}
            # A successful response returns the prompt to its sender, and nothing else does.
            told = json.dumps(drawn | {"prompt": ""}) if drawn else answer.text
            shown += told + str(answer.headers)
        wait_for(server, "Failed to export spans batch code: 401, reason: Unauthorized")
        wait_for(server, "Failed to export metrics batch")
        for path in ("/metrics", "/ready", "/health"):
            shown += httpx.get(server.url + path, timeout=60).text
        assert httpx.post(server.url + "/nowhere", json={"prompt": PROMPT}).status_code == 404
        server.terminate()
        output = server.output()
    assert not leaks(output), output
    assert not leaks(shown), shown
    spans = b"".join(endpoint.bodies).decode("latin-1")
    assert "denoise_step" in spans
    assert not leaks(spans)


def test_the_doctor_writes_no_secret() -> None:
    with quoting() as endpoint:
        environment = planted(endpoint.port)
        refused = doctor(environment)
        of_spans, of_metrics = (f"OTEL_EXPORTER_OTLP_{s}_ENDPOINT" for s in ("TRACES", "METRICS"))
        environment[of_spans] = environment[of_metrics]
        unreachable = doctor(environment)
    for result in (refused, unreachable):
        assert result.returncode == 1, result.stdout + result.stderr
        assert not leaks(result.stdout + result.stderr), result.stdout + result.stderr
    assert "401 after" in refused.stdout
    assert "the proxy made no connection" in unreachable.stdout


def test_a_server_that_may_not_read_its_model_writes_no_secret() -> None:
    """The hub's client quotes the URL, and what the hub says."""
    with quoting() as hub:
        environment = planted(hub.port) | {
            "SDXL_MODEL": "someone/private",
            "HF_ENDPOINT": f"http://me:{PASSWORD}@127.0.0.1:{hub.port}",
        }
        with processes.self_hosted(environment, ROOT) as server:
            server.process.wait(START_SECONDS)
            output = server.output()
    assert server.process.returncode == 1
    assert "someone/private" in output
    assert hub.bodies
    assert not leaks(output), output


REFUSED = {
    "OTEL_EXPORTER_OTLP_HEADERS": f"Authorization=Basic%20{HEADER_KEY}%0A{HEADER_KEY}",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS": f"x-key={HEADER_KEY}%00",
    "OTEL_EXPORTER_OTLP_METRICS_HEADERS": f"x-key={HEADER_KEY}%E2%82%AC",
    "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://me:{PASSWORD}@127.0.0.1:9/?api-key={QUERY_KEY}",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://me:{PASSWORD}%0A@127.0.0.1:9/v1/traces",
    "HTTPS_PROXY": f"http://me:{PROXY_PASSWORD}@127.0.0.1:port",
    "SDXL_ADMIN_TOKEN": f"{ADMIN_TOKEN}\n{ADMIN_TOKEN}",
}


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_a_secret_that_http_cannot_carry_stops_the_start(command: str) -> None:
    """The server and the doctor refuse it with one sentence, which names the variable only."""
    for name, value in REFUSED.items():
        with forked.program("serve", command, environment={name: value}) as started:
            started.process.wait(120)
            output = started.output()
        assert started.process.returncode == 2, output
        assert name in output
        assert len(output.splitlines()) == 1, output
        assert not leaks(output), output
