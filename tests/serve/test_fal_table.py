"""What fal resolves of the image app's table in pyproject.toml, through fal's own code."""

from __future__ import annotations

import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from fal.api import SERVE_REQUIREMENTS, FalServerlessHost, Options
from fal.cli._utils import AppData
from fal.sdk import ApplicationHealthCheckConfig
from packaging.requirements import Requirement

from serve.app import UPLOAD_SECONDS
from serve.server import FLUSH_SECONDS
from serve.settings import ServeSettings
from tests.serve.fal_table import FAL_DRAIN_SECONDS, SDIST_URL, read_table, resolve

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> AppData:
    return read_table("sdxl", monkeypatch)


@pytest.fixture
def options(table: AppData, monkeypatch: pytest.MonkeyPatch) -> Options:
    return resolve(table, "serve.app:SdxlApp.run_local", monkeypatch)


def test_fal_resolves_every_host_option(table: AppData, options: Options) -> None:
    assert (table.name, table.auth, table.deployment_strategy) == ("sdxl", "private", "rolling")
    assert table.reset_scale
    assert options.host == {
        "machine_type": "GPU-H100",
        "num_gpus": 1,
        "min_concurrency": 0,
        "max_concurrency": 4,
        "concurrency_buffer": 0,
        "scaling_delay": 10,
        "keep_alive": 300,
        "max_multiplexing": 2,
        "startup_timeout": 1800,
        "request_timeout": 90,
        "termination_grace_period_seconds": 80,
        "data_mounts": ["/data/.cache"],
        "secrets": [
            "HF_TOKEN",
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "OTEL_EXPORTER_OTLP_HEADERS",
            "ENABLE_TRACING",
            "OTEL_SAMPLE_RATE",
            "SDXL_OTLP_METRICS",
            "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE",
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
    assert set(options.host) <= FalServerlessHost._SUPPORTED_KEYS
    assert options.gateway == {"exposed_port": 8080}
    assert options.environment["kind"] == "virtualenv"
    assert options.environment["python_version"] == "3.11"


def test_requirements_are_this_project_and_pins_of_what_is_tested_here(options: Options) -> None:
    requirements: list[str] = options.environment["requirements"]
    project, *pins = requirements
    assert project == f"stepspan[gpu,model] @ {SDIST_URL}"
    # Not installed here.
    gpu_only = {"nvidia-cuda-runtime-cu12", "nvidia-ml-py", "torchao", "xformers"}
    for pin in map(Requirement, pins):
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert pin.url is None
        if pin.name not in gpu_only:
            assert specifier.version == version(pin.name).split("+")[0], pin.name


def test_the_pins_cover_the_project_and_what_fal_serves_with(table: AppData) -> None:
    def name(requirement: str) -> str:
        return Requirement(requirement).name.lower().replace("_", "-")

    pinned = {name(pin) for pin in table.options.environment["requirements"][1:]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["gpu"], *extras["model"]]
    assert {name(requirement) for requirement in needed} <= pinned
    # By entry point fal adds none of these by itself.
    assert {name(requirement) for requirement in SERVE_REQUIREMENTS} <= pinned


def test_the_time_limits_fit_into_each_other(table: AppData) -> None:
    host = table.options.host
    deadline = ServeSettings().deadline_seconds
    longest = deadline + UPLOAD_SECONDS
    assert longest < host["request_timeout"]
    ending = longest + FAL_DRAIN_SECONDS + FLUSH_SECONDS + 0.5
    assert ending < host["termination_grace_period_seconds"]
