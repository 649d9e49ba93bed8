"""A measurement session in pieces: with a fake that writes each piece's file, and one real one."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import COMMANDS, main
from bench.errors import BenchError
from bench.harness.environment import ROOT
from bench.harness.own_folder import own_folder
from bench.harness.result_file import BenchResult, NotRun
from bench.harness.rounds import TIME_IS_UP
from bench.harness.run_record import NO_TIME
from bench.harness.scenarios import SCENARIOS
from bench.harness.work import Work
from bench.session import progress
from bench.session import run as session
from bench.session.plan import TEST_SECONDS
from bench.session.progress import Archive
from bench.session.run import MeasurementSession
from kernels_warmup.shapes import CompiledShape
from tests.bench import made_up

STEPS = {"documented": 58.0, "compiled": 30.0, "all-lossless": 26.0}


class Machine:
    """Runs no command but writes its file, and advances a clock by the command's time."""

    def __init__(self, seconds: float = 30, statuses: dict[str, int] | None = None) -> None:
        self.now, self.seconds = 0.0, seconds
        self.statuses = statuses or {}
        self.failing: set[str] = set()
        self.lacking = {"graph"}
        self.ran: list[list[str]] = []
        self.limits: list[float] = []

    def clock(self) -> float:
        return self.now

    def start(self, command: Sequence[str], seconds: float, log: Path | None = None) -> int:
        self.now += self.seconds
        self.ran.append(list(command))
        self.limits.append(seconds)
        if log is not None:
            log.write_text("what it printed\n")
        option = "--junit-xml" if command[0] == "pytest" else "--out"
        out = Path(command[command.index(option) + 1])
        for part, status in self.statuses.items():
            if part in out.name or part in command:
                return status
        if command[1] == "run":
            return self.measure(out, command)
        if command[1] == "precompile":
            out.write_text(json.dumps({"scenarios": dict.fromkeys(scenarios(command), "compiled")}))
        else:
            out.write_text("{}")
        return 0

    def measure(self, out: Path, command: Sequence[str]) -> int:
        names = dict.fromkeys(scenarios(command))
        before = BenchResult.read(out) if out.exists() else None
        have = () if before is None else before.scenarios
        missing = () if before is None else before.not_run
        known = {scenario.name for scenario in have}
        new = [
            made_up.scenario(
                name,
                [STEPS.get(name, 40.0)] * 10,
                lossy="fp8" in name or name == "int8",
                calibration=name in ("documented", "diffusers"),
            )
            for name in names
            if name not in known | self.lacking | self.failing
        ]
        missing = tuple(n for n in missing if n.name not in names)
        missing += tuple(NotRun(n, "it needs something") for n in names if n in self.lacking)
        missing += tuple(NotRun(n, "it broke", failed=True) for n in names if n in self.failing)
        written = made_up.result(*have, *new, environment=made_up.GPU)
        replace(written, not_run=missing).write(out)
        return int(any(name in self.failing for name in names))


def scenarios(command: Sequence[str]) -> list[str]:
    """The names after --scenario and --beside."""
    names = list(command[command.index("--scenario") + 1 :])
    end = next(
        (i for i, one in enumerate(names) if one.startswith("--") and one != "--beside"), None
    )
    found = [name for name in names[:end] if name != "--beside"]
    if "--beside" in command and "--beside" not in names[:end]:
        raise AssertionError("--beside follows --scenario")
    return found


@pytest.fixture(autouse=True)
def _a_machine_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def measurement(
    folder: Path, machine: Machine, *arguments: str, device: str = "cuda"
) -> MeasurementSession:
    parser = argparse.ArgumentParser()
    session.add_arguments(parser)
    options = parser.parse_args(arguments)
    work = Work("random:sdxl-base", device, CompiledShape(1024, 1024), 30)
    archive = None if options.archive is None else Archive(options.archive, folder)
    return MeasurementSession(
        work, folder / "h200-day", options, archive, machine.start, machine.clock
    )


def ran(machine: Machine) -> list[str]:
    """A name for each command: its result file's or, for `run`, its first scenario's."""
    names = []
    for command in machine.ran:
        option = "--junit-xml" if command[0] == "pytest" else "--out"
        file = Path(command[command.index(option) + 1]).stem.removeprefix("h200-day-")
        names.append(command[3] if file == "bench" else file)
    return names


def test_everything_is_done_once_and_the_most_informative_comes_first(tmp_path: Path) -> None:
    machine = Machine()
    assert measurement(tmp_path, machine).run() == 0
    order = ran(machine)
    assert order[:4] == ["gpu-tests", "precompile-first", "documented", "kernels-all-lossless"]
    assert scenarios(machine.ran[2]) == ["documented", "compiled", "all-lossless", "all-but-geglu"]
    for earlier, later in (
        ("kernels-all-lossless", "layer-norm"),
        ("precompile-ways", "layer-norm"),
        ("layer-norm", "fp8"),
        ("fp8", "batch-8"),
        ("batch-8", "coldstart-default"),
        ("coldstart-default", "operators"),
        ("operators", "all-but-group-norm"),
        ("all-but-group-norm", "pdl"),
        ("pdl", "offline"),
        ("offline", "micro"),
        ("micro", "numerics"),
        ("numerics", "diffusers"),
        ("diffusers", "tuned-kernels"),
    ):
        assert order.index(earlier) < order.index(later), (earlier, later)
    assert order[-1] == "tuned-kernels"
    timed = {name for command in machine.ran if command[1] == "run" for name in scenarios(command)}
    assert {scenario.name for scenario in SCENARIOS} == timed
    # What differs by one change is timed in the same rounds as what it changes.
    ways = next(one for one in machine.ran if one[1] == "run" and "layer-norm" in one)
    beside = ways.index("--beside")
    assert ways[beside + 1 : beside + 3] == ["documented", "compiled"]

    again = Machine()
    assert measurement(tmp_path, again).run() == 0
    assert again.ran == []


def test_nine_minutes_get_to_the_profile_and_the_single_ways(tmp_path: Path) -> None:
    """Each piece takes the seconds that it is estimated to take on a GPU."""
    machine = Machine(seconds=110)
    measurement(tmp_path, machine, "--minutes", "9").run()
    assert ran(machine)[:4] == [
        *("gpu-tests", "precompile-first", "documented", "kernels-all-lossless"),
    ]
    measurement(tmp_path, machine, "--minutes", "9").run()
    machine.now = 0
    measurement(tmp_path, machine, "--minutes", "9").run()
    assert {"layer-norm", "fp8", "batch-8"} <= set(ran(machine))


def test_no_piece_is_started_that_would_end_too_late(tmp_path: Path) -> None:
    machine = Machine(seconds=100)
    assert measurement(tmp_path, machine, "--minutes", "9").run() == TIME_IS_UP
    assert machine.now <= 9 * 60
    assert machine.limits[0] == TEST_SECONDS
    assert all(limit <= 9 * 60 - 100 * index for index, limit in enumerate(machine.limits))
    limited = machine.ran[2]
    assert float(limited[limited.index("--seconds-limit") + 1]) < machine.limits[2]
    # The next call continues with what is left, and never does anything twice.
    for _ in range(40):
        if measurement(tmp_path, machine, "--minutes", "9").run() == 0:
            break
        machine.now = 0
    files = ran(machine)
    assert len(files) == len(set(files))


def test_a_run_that_was_short_of_time_is_continued(tmp_path: Path) -> None:
    machine = Machine()
    times = 0

    def start(command: Sequence[str], seconds: float, log: Path | None = None) -> int:
        nonlocal times
        if command[1] == "run" and "pdl" in command and not times:
            times += 1
            machine.ran.append(list(command))
            return TIME_IS_UP
        return Machine.start(machine, command, seconds, log)

    machine.start = start  # type: ignore[method-assign]
    assert measurement(tmp_path, machine).run() == 0
    assert ran(machine).count("pdl") == 2


@pytest.mark.parametrize("status", [1, 2, 137, 143])
def test_a_piece_that_fails_does_not_end_the_others(tmp_path: Path, status: int) -> None:
    machine = Machine(statuses={"operators": status})
    assert measurement(tmp_path, machine).run() == 1
    assert "tuned-kernels" in ran(machine)
    # A piece that was cut off is tried once more at once, one that failed in the next call.
    assert ran(machine).count("operators") == (1 if status in (1, 2) else 2)
    for _ in range(2):
        assert measurement(tmp_path, machine).run() == 1
    assert ran(machine).count("operators") == 2


def test_a_failure_shows_in_status_and_summary_and_is_tried_again_with_other_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine()
    machine.failing = {"geglu"}
    assert measurement(tmp_path, machine).run() == 1
    printed = capsys.readouterr().out
    assert any("geglu" in line and "FAILED" in line for line in printed.splitlines())
    assert any(line.startswith("graph ") and "FAILED" not in line for line in printed.splitlines())
    for _ in range(3):
        assert measurement(tmp_path, machine).run() == 1
    assert ran(machine).count("layer-norm") == 2
    monkeypatch.setattr(progress, "code_digest", lambda: "repaired")
    machine.failing = set()
    assert measurement(tmp_path, machine).run() == 0
    assert ran(machine).count("layer-norm") == 3
    assert ran(machine).count("documented") == 1


def test_a_scenario_without_time_is_still_to_do(tmp_path: Path) -> None:
    machine = Machine()
    assert measurement(tmp_path, machine, "--only", "first").run() == 0
    out = tmp_path / "h200-day-bench.json"
    measured = BenchResult.read(out)
    kept = tuple(s for s in measured.scenarios if s.name != "compiled")
    for missing, done in (
        (NotRun("compiled", NO_TIME), False),
        (NotRun("compiled", "it broke", failed=True), False),
        (NotRun("compiled", "it needs something"), True),
    ):
        replace(measured, scenarios=kept, not_run=(missing,)).write(out)
        planned = measurement(tmp_path, machine, "--only", "first")
        assert planned.done(planned.plan.pieces()[-1]) == done


def test_another_machine_compiles_again_what_is_left(tmp_path: Path) -> None:
    machine = Machine()
    only = ("--only", "precompile-ways", "ways")
    measurement(tmp_path, machine, *only, "--scenario", "layer-norm", "geglu").run()
    assert ran(machine) == ["precompile-ways", "layer-norm"]
    (own_folder() / "h200-day-precompile-ways.json").unlink()
    measurement(tmp_path, machine, *only, "--scenario", "layer-norm", "geglu", "zero-text").run()
    assert ran(machine)[2:] == ["precompile-ways", "layer-norm"]
    assert scenarios(machine.ran[2]) == ["zero-text"]


def test_what_was_precompiled_is_expected_to_be_ready_soon(tmp_path: Path) -> None:
    machine = Machine()
    cold = next(p for p in measurement(tmp_path, machine).plan.pieces() if p.name == "first")
    measurement(tmp_path, machine, "--only", "precompile-first").run()
    warm = next(p for p in measurement(tmp_path, machine).plan.pieces() if p.name == "first")
    assert warm.seconds <= cold.seconds
    ways = {p.name: p for p in measurement(tmp_path, machine).plan.pieces()}
    measurement(tmp_path, machine, "--only", "precompile-ways").run()
    again = {p.name: p for p in measurement(tmp_path, machine).plan.pieces()}
    assert again["ways"].seconds < ways["ways"].seconds
    assert "--prepare-seconds" not in ways["ways"].command
    assert "--prepare-seconds" in again["ways"].command


def test_an_archive_holds_everything_and_is_continued_from(tmp_path: Path) -> None:
    archive = tmp_path / "out" / "call.tar.gz"
    archive.parent.mkdir()
    chosen = ("--archive", str(archive), "--only", "first", "micro")
    folder = tmp_path / "one"
    folder.mkdir()
    assert measurement(folder, Machine(), *chosen).run() == 0
    with tarfile.open(archive) as kept:
        names = set(kept.getnames())
    assert {"h200-day-bench.json", "h200-day-micro.json", "h200-day-session.json"} <= names
    assert {"h200-day-first.log", "h200-day-micro.log"} <= names
    assert [path.name for path in archive.parent.iterdir()] == ["call.tar.gz"]
    # Another machine, or another day's empty folder.
    folder = tmp_path / "two"
    folder.mkdir()
    machine = Machine()
    assert measurement(folder, machine, *chosen, "operators").run() == 0
    assert ran(machine) == ["operators"]
    archive.write_bytes(b"no archive")
    with pytest.raises(BenchError, match="cannot be read"):
        measurement(folder, machine, *chosen)
    with pytest.raises(BenchError, match="cannot be written"):
        Archive(tmp_path / "nowhere" / "call.tar.gz", folder)


def test_scenario_and_only_limit_the_pieces(tmp_path: Path) -> None:
    machine = Machine()
    chosen = ("--scenario", "documented", "served", "text-once", "--only", "first", "rest", "k")
    assert measurement(tmp_path, machine, *chosen, device="cpu").run() == 0
    assert ran(machine) == ["documented", "served", "kernels-served"]


def test_a_piece_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[Callable[[], int]] = []

    class Slow(session.subprocess.Popen):  # type: ignore[misc, type-arg]
        def __init__(self, command: Sequence[str], **options: Any) -> None:
            super().__init__(["sh", "-c", "echo begun; sleep 30"], **options)
            began.append(self.poll)

    monkeypatch.setattr(session.subprocess, "Popen", Slow)
    log = tmp_path / "piece.log"
    assert session.start(["bench", "run"], 0.5, log) == -15
    assert began[0]() is not None
    assert log.read_text() == "begun\n"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_creates_the_folder_of_the_results(tmp_path: Path) -> None:
    results = tmp_path / "new" / "results"
    make = ["make", "bench-gpu", "PYTHON=true", f"RESULTS={results}"]
    subprocess.run(make, cwd=ROOT, check=True)
    assert results.is_dir()


def test_the_pieces_are_commands_that_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--model", "demo", "--device", "cpu", "--shape", "64x64", "--steps", "2"]
    assert main(["session", *small, "--results", str(tmp_path), "--list"]) == 0
    listed = [line.split("python -m bench ")[1] for line in capsys.readouterr().out.splitlines()]
    commands = {line.split()[0]: line.split() for line in listed}
    assert set(commands) == {"run", "micro", "coldstart", "operators", "numerics"}
    for name, arguments in commands.items():
        parser = argparse.ArgumentParser()
        COMMANDS[name].load().add_arguments(parser)
        parser.parse_args([*arguments[1:], "--out", "x.json"])
    with pytest.raises(SystemExit) as stop:
        main(["session", *small, "--results", str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    both = ["--results", str(tmp_path), "--archive", str(tmp_path / "a.tar.gz")]
    assert main(["session", *small, *both]) == 2
    [tests] = (p for p in measurement(tmp_path, Machine()).plan.pieces() if p.name == "gpu-tests")
    assert (ROOT / tests.command[-1]).exists()


@pytest.mark.slow
def test_a_session_on_the_demo_model_leaves_a_file_for_each_piece(tmp_path: Path) -> None:
    small = ["--model", "demo", "--device", "cpu", "--shape", "64x64", "--steps", "2"]
    names = ["--scenario", "documented", "text-once", "--requests", "2"]
    command = ["session", *small, *names, "--results", str(tmp_path)]
    assert main(command) in (0, 1)  # a small model's decode may be further away than eager's
    found = {path.stem.split("64x64-")[1] for path in tmp_path.glob("cpu-*-demo-64x64-*.json")}
    assert found == {
        "bench",
        "session",
        "kernels-text-once",
        "micro",
        "coldstart-auto",
        "operators",
        "numerics",
    }
    micro = next(tmp_path.glob("*-micro.json"))
    assert json.loads(micro.read_text())["environment"]["device"] == "cpu"
