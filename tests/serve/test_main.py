"""The command line: answers at once, refuses with one sentence, loads no model library."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from serve.server import bind
from tests.support.processes import clean_environment

HEAVY = ("torch", "diffusers", "transformers", "accelerate")


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(environment),
        check=False,
    )


def imported_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    return set(result.stdout.split())


def test_help_answers_without_a_model_library() -> None:
    start = time.monotonic()
    result = serve("--help")
    seconds = time.monotonic() - start
    assert result.returncode == 0
    assert "--port" in result.stdout
    assert seconds < 5  # 0.1 s where nothing else runs
    modules = imported_by(
        "from serve.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    )
    assert modules.isdisjoint(HEAVY)


@pytest.mark.parametrize("module", ["serve.server", "serve.engine.runtime", "serve.app"])
def test_servers_are_imported_without_a_model_library(module: str) -> None:
    assert imported_by(f"import {module}").isdisjoint(HEAVY)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SDXL_MAX_WAITING": "many"}, "SDXL_MAX_WAITING='many' is not allowed"),
        ({"SDXL_MDOEL": "demo"}, "did you mean SDXL_MODEL"),
        ({"OTEL_SAMPLE_RATE": "2"}, "a number from 0 to 1"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_a_sentence(
    environment: dict[str, str], said: str
) -> None:
    result = serve(**environment)
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_busy_port_is_an_error() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        result = serve("--port", str(taken.getsockname()[1]))
    assert result.returncode == 2
    assert "cannot listen on 127.0.0.1" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_address_may_precede_or_follow_the_command() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments in (("--port", port, "run"), ("run", "--port", port)):
            assert f"port {port}" in serve(*arguments).stderr


@pytest.mark.e2e
def test_a_model_that_is_not_there_ends_the_process() -> None:
    result = serve("--port", "0", SDXL_MODEL="./nowhere")
    assert result.returncode == 1
    assert "neither a directory here nor a hub repository" in result.stderr
