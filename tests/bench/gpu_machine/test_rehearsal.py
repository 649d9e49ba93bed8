"""The rehearsal of a GPU session: its verdict on results, and its lists of packages."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.gpu_machine import rehearsal
from bench.harness.result_file import NotRun
from tests.bench.made_up import result, scenario
from tests.support.processes import ROOT

NO_GPU = "it needs a CUDA device, and there is none here"


def pins(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {
        name.lower().replace("_", "-"): version
        for name, _, version in (line.partition("==") for line in lines)
    }


def test_the_wheels_are_the_versions_that_the_tests_run_with() -> None:
    wheels, locked = pins(rehearsal.MISSING), pins(ROOT / "requirements.lock")
    assert {"diffusers", "torchao", "opentelemetry-sdk"} <= wheels.keys() & locked.keys()
    for name in wheels.keys() & locked.keys():
        assert wheels[name] == locked[name], name
    assert not wheels.keys() & pins(rehearsal.MACHINE).keys() - {
        "prometheus-client",
        "protobuf",
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A rehearsal of a single command, `python -m made_up`, with this Python."""
    for name in ("WHEELS", "SITE", "CHECKOUT", "LOGS"):
        folder = tmp_path / name.lower()
        folder.mkdir()
        monkeypatch.setattr(rehearsal, name, folder)
    monkeypatch.setattr(rehearsal, "HOME", tmp_path)
    monkeypatch.setattr(rehearsal, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(rehearsal, "ARCHIVE", tmp_path / "results.tar.gz")
    monkeypatch.setattr(rehearsal, "OFFLINE", ("false",))
    monkeypatch.setattr(rehearsal, "VERSIONS", "print('Python')")
    monkeypatch.setattr(rehearsal, "COMMANDS", (("session", "made_up"),))
    return tmp_path


def made_up(home: Path, statuses: list[int], not_run: dict[str, str]) -> None:
    """A command that exits with these statuses in turn, and writes results as a session does."""
    path = home / "a-bench.json"
    left_out = tuple(NotRun(name, reason) for name, reason in not_run.items())
    replace(result(scenario("served", [5.0])), not_run=left_out).write(path)
    (home / "site/made_up.py").write_text(
        "import pathlib, sys, tarfile\n"
        f"with tarfile.open({str(home / 'results.tar.gz')!r}, 'w:gz') as kept:\n"
        f"    kept.add({str(path)!r}, {path.name!r})\n"
        f"count = pathlib.Path({str(home / 'count')!r})\n"
        "calls = int(count.read_text()) if count.exists() else 0\n"
        "count.write_text(str(calls + 1))\n"
        f"sys.exit({statuses}[calls])\n"
    )


@pytest.mark.parametrize(
    ("statuses", "not_run", "good"),
    [
        ([0], {"graph": NO_GPU}, True),
        ([75, 75, 0], {}, True),
        ([75, 1], {}, False),
        ([2], {}, False),
        ([0], {"geglu": "RuntimeError: it broke"}, False),
        ([0], {"geglu": "CUDA error"}, False),
    ],
)
def test_only_what_needs_a_gpu_may_stay_without_a_time(
    home: Path, statuses: list[int], not_run: dict[str, str], good: bool
) -> None:
    made_up(home, statuses, not_run)
    log, is_good = rehearsal.rehearse()
    assert is_good is good
    assert sum("call" in line for line in log) == len(statuses)
    assert "timed (1): served" in log
    assert (home / "checkout/pyproject.toml").exists()
    assert not (home / "checkout/.git").exists()


def test_without_results_it_has_failed(home: Path) -> None:
    (home / "site/made_up.py").write_text("")
    assert rehearsal.rehearse()[1] is False


def test_what_is_sent_has_to_fit(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(home, [0], {})
    assert rehearsal.size(home / "wheels") == 0
    (home / "wheels/big.whl").write_bytes(b"0" * 1000)
    assert rehearsal.size(home / "wheels") == 1000
    monkeypatch.setattr(rehearsal, "MOST_BYTES", 999)
    assert rehearsal.rehearse()[1] is False


@pytest.mark.parametrize("python", ["no-such-python", sys.executable])
def test_another_python_is_refused(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "PYTHON_VERSION", "2.7")
    with pytest.raises(rehearsal.RehearsalError, match="PYTHON312"):
        rehearsal.build(python)
