"""The command line: answers at once, refuses with one sentence, loads no model library."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve.__main__ import main
from serve.server import bind
from tests.support import forked
from tests.support.processes import ROOT, clean_environment

HEAVY = ("torch", "diffusers", "transformers", "accelerate")


def refused(*arguments: str, status: int = 2, **environment: str) -> str:
    """What `python -m serve` writes where it does not start."""
    with forked.program("serve", *arguments, environment=environment) as started:
        started.process.wait(60)
        assert started.process.returncode == status, started.output()
        assert "Traceback" not in started.output()
        return started.output()


def imported_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    return set(result.stdout.split())


def test_help_answers_without_a_model_library() -> None:
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "serve", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean_environment(),
        check=False,
    )
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
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:99999"}, "with a host"),
        ({"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "abc"}, "a whole number from 0"),
        ({"OTEL_PROPAGATORS": "no-such-propagator"}, "tracecontext"),
        ({"PROMETHEUS_MULTIPROC_DIR": "/nowhere"}, "PROMETHEUS_MULTIPROC_DIR is not allowed"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_a_sentence(
    environment: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not printed.out


@pytest.mark.usefixtures("logging_as_it_was")
def test_ray_is_refused_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it sets variables of Ray's
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["ray", "--replicas", "2"]) == 2
    assert "stepspan[ray,model]" in capsys.readouterr().err
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.usefixtures("logging_as_it_was")
def test_the_doctor_knows_backends_by_any_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--no-send", "--backend", "honey-comb"]) == 1  # no endpoint is set
    assert main(["doctor", "--no-send", "--backend", "nobody"]) == 2
    assert "Honeycomb" in capsys.readouterr().err


def test_a_busy_port_is_an_error() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        output = refused("--port", str(taken.getsockname()[1]))
    assert "cannot listen on 127.0.0.1" in output


def test_the_address_may_precede_or_follow_the_command() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments in (("--port", port, "run"), ("run", "--port", port)):
            assert f"port {port}" in refused(*arguments)


@pytest.mark.e2e
def test_a_model_that_is_not_there_ends_the_process() -> None:
    output = refused("--port", "0", SDXL_MODEL="./nowhere", status=1)
    assert "neither a directory here nor a hub repository" in output


@pytest.mark.parametrize("host", ["", " ", "a..b", "a" * 300])
def test_a_host_that_is_no_address_is_refused(host: str) -> None:
    """An empty one would be every interface."""
    output = refused("--port", "0", "--host", host)
    assert len(output.splitlines()) == 1
    assert output.startswith("stepspan: ")


PACKAGES = ("bench", "kernels_warmup", "metrics", "serve")


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize(
    ("module", "arguments", "status"),
    [("serve", ("--port", "0", "--host", ""), 2), ("bench", ("show", "no-such-file.json"), 2)],
)
def test_nothing_is_imported_from_the_working_directory(
    tmp_path: Path, module: str, arguments: tuple[str, ...], status: int, form: str
) -> None:
    """Our packages' names and a library's; Python itself runs a module of the name it is given."""
    for name in {*PACKAGES, "pydantic", "numpy"} - {module}:
        path = tmp_path / f"{name}.py" if form == "file" else tmp_path / name / "__init__.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise SystemExit('the wrong module')\n")
    # A folder without an __init__.py replaces nothing, and is not named.
    (tmp_path / module).mkdir()
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=tmp_path,
        env=clean_environment({"PYTHONPATH": str(ROOT)}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == status, result.stderr
    assert len(result.stderr.splitlines()) == 2  # what is not used, and what the command refuses
    assert "the wrong module" not in result.stderr
    first = result.stderr.splitlines()[0]
    assert all((name in first) == (name != module) for name in PACKAGES if name != "serve")
    assert "metrics.py" in first or form == "folder"


def test_a_harmless_working_directory_is_not_spoken_of(tmp_path: Path) -> None:
    (tmp_path / "app.py").touch()
    (tmp_path / "metrics").mkdir()  # no __init__.py: replaces nothing
    result = subprocess.run(
        [sys.executable, "-m", "serve", "--help"],
        cwd=tmp_path,
        env=clean_environment({"PYTHONPATH": str(ROOT)}),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stderr == ""
