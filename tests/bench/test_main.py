"""The command line: its help answers at once, and loads no model library."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest

from bench.__main__ import COMMANDS, main
from bench.service.processes import ROOT, clean_environment
from bench.stats.error_rates import NO_CHANGE

HEAVY = {"torch", "diffusers", "transformers", "accelerate", "plotly"}
MODEL_CODE = {"kernels", "operators"}
"""Commands that import model code at module level; pyproject.toml lists them."""


def loaded_by(*arguments: str) -> set[str]:
    """Modules that a call of the command line imports."""
    script = (
        "import sys\nfrom bench.__main__ import main\n"
        f"try: main({list(arguments)!r})\nexcept SystemExit: pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    return set(ended.stderr.split())


def test_help_answers_at_once_and_names_every_command() -> None:
    start = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-m", "bench", "--help"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert time.monotonic() - start < 5  # 0.05 s where nothing else runs
    for name, command in COMMANDS.items():
        assert name in ended.stdout
        assert command.help.split()[0] in ended.stdout


def test_help_imports_no_command() -> None:
    loaded = loaded_by("--help")
    assert loaded.isdisjoint(HEAVY | {"numpy", "pydantic"})
    assert not {f"bench.{command.module}" for command in COMMANDS.values()} & loaded


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in MODEL_CODE])
def test_a_commands_help_loads_no_model_library(name: str) -> None:
    loaded = loaded_by(name, "--help")
    assert f"bench.{COMMANDS[name].module}" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("name", ["compare", "show", "load"])
def test_a_commands_help_names_its_exit_statuses_or_files(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"python -m bench {name}" in printed
    assert name == "show" or "Exit status: 0" in printed


@pytest.mark.parametrize("arguments", [[], ["fly"], ["--fast"]])
def test_an_unknown_command_is_wrong_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m bench" in capsys.readouterr().err


def test_what_libraries_advise_is_not_shown() -> None:
    """transformers would advise to install torchvision, torchao lists kernels that it lacks."""
    ended = subprocess.run(
        [sys.executable, "-m", "bench", "session", "--list", "--model", "demo", "--device", "cpu"],
        capture_output=True, text=True, timeout=100, check=True, env=clean_environment(),
    )  # fmt: skip
    assert "python -m bench run" in ended.stdout
    assert "torchvision" not in ended.stderr
    assert "torchao" not in ended.stderr


def test_a_closed_pipe_is_not_a_failure() -> None:
    """As in `bench show RESULT | head -1`."""
    ended = subprocess.run(
        f"{sys.executable} -m bench show {NO_CHANGE} | true",
        shell=True, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert ended.stderr == ""


def test_sigterm_leaves_no_server_behind() -> None:
    """Its default, which `timeout` and CI would get, ends the bench alone."""
    command = [sys.executable, "-m", "bench", "soak"]
    with subprocess.Popen(command, cwd=ROOT, env=clean_environment()) as bench:
        process = psutil.Process(bench.pid)
        until = time.monotonic() + 60
        while len(servers := process.children()) < 2:  # the receiver of spans and the server
            assert bench.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.5)  # a process that is only just made is not known yet
        bench.terminate()
        assert bench.wait(60) == 128 + signal.SIGTERM
        assert psutil.wait_procs(servers, timeout=1)[1] == []
