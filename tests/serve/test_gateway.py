"""The gateway as a fal app: what fal resolves of it, and that it needs no model library."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from fal.api import SERVE_REQUIREMENTS, Options
from fal.cli._utils import AppData
from fal.sdk import ApplicationHealthCheckConfig
from packaging.requirements import Requirement
from prometheus_client import REGISTRY
from starlette.testclient import TestClient

from serve import app as app_module
from serve.app import UPLOAD_SECONDS
from serve.errors import ConfigurationError
from serve.gateway import PromptGateway
from serve.http.gateway.client import ANSWER_SECONDS, MAX_CALLS, ImageAppAddress
from serve.http.middleware import RequestMiddleware
from serve.http.request_body import MAX_GATEWAY_BODY_BYTES
from serve.http.security_headers import SecurityHeaders
from serve.http.sockets.early_answers import EarlyAnswers
from serve.schema import MAX_LORAS, MAX_UNTIDY_CHARACTERS
from serve.server import FLUSH_SECONDS
from serve.settings import ServeSettings
from tests.serve.fal_table import FAL_DRAIN_SECONDS, SDIST_URL, read_table, resolve
from tests.support.processes import ROOT


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> AppData:
    return read_table("gateway", monkeypatch)


@pytest.fixture
def options(table: AppData, monkeypatch: pytest.MonkeyPatch) -> Options:
    return resolve(table, "serve.gateway:PromptGateway.run_local", monkeypatch)


def test_fal_resolves_every_host_option(table: AppData, options: Options) -> None:
    assert (table.name, table.auth, table.deployment_strategy) == ("gateway", "private", "rolling")
    assert table.reset_scale
    assert options.host == {
        "machine_type": "S",
        "min_concurrency": 0,
        "max_concurrency": 2,
        "concurrency_buffer": 0,
        "scaling_delay": 10,
        "keep_alive": 600,
        "max_multiplexing": 32,
        "startup_timeout": 300,
        "request_timeout": 90,
        "termination_grace_period_seconds": 80,
        "secrets": [
            "SDXL_GATEWAY_TARGET",
            "FAL_KEY",
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "OTEL_EXPORTER_OTLP_HEADERS",
            "ENABLE_TRACING",
            "OTEL_SAMPLE_RATE",
        ],
        "metrics_port": 9090,
        "health_check_config": ApplicationHealthCheckConfig(
            path="/health",
            method="GET",
            start_period_seconds=30,
            timeout_seconds=5,
            failure_threshold=3,
            call_regularly=True,
        ),
    }
    assert options.environment["python_version"] == "3.11"


def test_its_requirements_are_light_pinned_and_complete(options: Options) -> None:
    project, *pins = options.environment["requirements"]
    assert project == f"stepspan @ {SDIST_URL}"
    for pin in map(Requirement, pins):
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert specifier.version == version(pin.name).split("+")[0], pin.name

    def name(requirement: str) -> str:
        return Requirement(requirement).name.lower().replace("_", "-")

    pinned = {name(pin) for pin in pins}
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {name(requirement) for requirement in described["dependencies"]} <= pinned
    assert {name(requirement) for requirement in SERVE_REQUIREMENTS} <= pinned
    heavy = {name(requirement) for requirement in described["optional-dependencies"]["model"]}
    assert {"torch", "diffusers", "transformers"} <= heavy
    assert pinned.isdisjoint(heavy)


def test_the_time_limits_fit_into_each_other(table: AppData) -> None:
    host = table.options.host
    longest = ServeSettings().deadline_seconds + ANSWER_SECONDS
    # The image app may take its deadline, and an upload that fails and is answered inline.
    assert ANSWER_SECONDS >= UPLOAD_SECONDS
    assert longest < host["request_timeout"]
    ending = longest + FAL_DRAIN_SECONDS + FLUSH_SECONDS + 0.5
    assert ending < host["termination_grace_period_seconds"]
    assert host["max_multiplexing"] <= MAX_CALLS


WITHOUT_THE_MODELS_LIBRARIES = """
import asyncio, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Missing())
from starlette.testclient import TestClient
from serve.gateway import PromptGateway

gateway = PromptGateway(_allow_init=True)
app = gateway._build_app()
asyncio.run(gateway.setup())
print(TestClient(app).get("/ready").json()["state"])
"""


def test_it_runs_where_the_models_libraries_are_not_installed(tmp_path: Path) -> None:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    missing = [
        Requirement(requirement).name
        for extra in ("model", "gpu")
        for requirement in described["optional-dependencies"][extra]
    ]
    shown = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_MODELS_LIBRARIES, *missing, "pynvml"],
        env={"SDXL_GATEWAY_TARGET": "http://127.0.0.1:9", "HOME": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.stdout.strip() == "ready", shown.stderr


@pytest.fixture
def gateway() -> PromptGateway:
    return PromptGateway(_allow_init=True)


def test_our_handlers_win_over_fals(gateway: PromptGateway) -> None:
    built = gateway._build_app()
    outermost = [added.cls for added in built.user_middleware[:3]]
    assert outermost == [SecurityHeaders, EarlyAnswers, RequestMiddleware]
    schema = gateway.openapi()["paths"]["/"]["post"]
    assert schema["requestBody"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/PromptRequest"
    }


def test_it_refuses_to_start_without_our_handlers(gateway: PromptGateway) -> None:
    with pytest.raises(RuntimeError, match="no longer calls _add_extra_routes"):
        asyncio.run(gateway.setup())


def test_exit_before_setup_is_no_error(gateway: PromptGateway) -> None:
    gateway.handle_exit()
    asyncio.run(gateway.teardown())


def test_keys_beside_fals_own_are_refused(
    gateway: PromptGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway._build_app()
    monkeypatch.setenv("SDXL_GATEWAY_TARGET", "http://127.0.0.1:9")
    monkeypatch.setenv("SDXL_API_KEYS", "alice=Wm4tZc8NvR2qLx6Y")
    with pytest.raises(ConfigurationError, match=r"SDXL_API_KEYS.*self-hosted"):
        asyncio.run(gateway.setup())


def test_setup_drain_and_teardown(gateway: PromptGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXL_GATEWAY_TARGET", "http://127.0.0.1:9")
    client = TestClient(gateway._build_app())

    async def live() -> None:
        await gateway.setup()
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200
        # The router takes such a path for the one before the line break.
        assert client.post("/%0A", json={"prompt": "a"}).status_code == 404
        gateway.handle_exit()
        await asyncio.sleep(0.01)
        assert client.get("/ready").json()["state"] == "draining"
        assert client.post("/", json={"prompt": "a"}).json()["error_type"] == "draining"
        await gateway.teardown()

    try:
        asyncio.run(live())
    finally:
        assert app_module._on_metrics_port is not None
        REGISTRY.unregister(app_module._on_metrics_port)
        app_module._on_metrics_port = None


@pytest.fixture
def running(gateway: PromptGateway, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """A client of the gateway, whose image app cannot be reached."""
    monkeypatch.setenv("SDXL_GATEWAY_TARGET", "http://127.0.0.1:9")
    client = TestClient(gateway._build_app(), headers={"content-type": "application/json"})
    asyncio.run(gateway.setup())
    try:
        yield client
    finally:
        asyncio.run(gateway.teardown())
        assert app_module._on_metrics_port is not None
        REGISTRY.unregister(app_module._on_metrics_port)
        app_module._on_metrics_port = None


def test_the_longest_request_is_served(running: TestClient) -> None:
    emoji = "\N{LARGE RED CIRCLE}" * MAX_UNTIDY_CHARACTERS
    body = {
        "prompt": emoji,
        "negative_prompt": emoji,
        "loras": [{"path": f"{n:064}", "scale": 0.123456789} for n in range(MAX_LORAS)],
        "trace_context": {"traceparent": f"00-{1:032}-{1:016}-01", "tracestate": "a=" + "x" * 510},
    }
    escaped = json.dumps(body).encode()
    assert len(escaped) < MAX_GATEWAY_BODY_BYTES
    assert running.post("/", content=escaped).json()["error_type"] == "image_app_unreachable"


def test_a_body_beyond_the_limit_is_refused(running: TestClient) -> None:
    largest = b'{"prompt": "a"}'.ljust(MAX_GATEWAY_BODY_BYTES)
    assert running.post("/", content=largest).status_code == 502
    assert running.post("/", content=largest + b" ").status_code == 413


# Where the image app is

KEY = ("key-id", "key-secret")


def test_an_app_on_fal_is_called_with_the_key() -> None:
    target = ImageAppAddress.named_by("someone/sdxl", KEY, "fal.run")
    assert target.url == "https://fal.run/someone/sdxl"
    assert target.headers == {"Authorization": "Key key-id:key-secret"}
    assert "key-secret" not in repr(target)


def test_a_plain_address_is_never_sent_the_key() -> None:
    target = ImageAppAddress.named_by("https://elsewhere.test/sdxl", KEY, "fal.run")
    assert (target.url, target.headers) == ("https://elsewhere.test/sdxl", {})


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        (None, KEY, "SDXL_GATEWAY_TARGET is not set"),
        ("someone/sdxl", None, "FAL_KEY is needed to call it"),
        ("http://host:99999", KEY, "SDXL_GATEWAY_TARGET is no URL"),
        ("http://[::1", KEY, "SDXL_GATEWAY_TARGET is no URL"),
    ],
)
def test_a_target_that_cannot_be_called_stops_the_start(
    name: str | None, key: tuple[str, str] | None, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        ImageAppAddress.named_by(name, key, "fal.run")
