"""A sitting in pieces, by fakes that write what each piece would, and by one real piece."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench import session
from bench.__main__ import main
from bench.drive import Work
from bench.result_file import BenchResult, NotRun
from bench.run import NO_TIME, TIME_IS_UP
from bench.session import Sitting
from kernels_warmup.shapes import CompiledShape
from tests.bench import made_up

STEPS = {"documented": 58.0, "compiled": 30.0, "all-lossless": 26.0}


class Machine:
    """Its clock goes by what is run; writes the file a command names."""

    def __init__(self, seconds: float = 30, statuses: dict[str, int] | None = None) -> None:
        self.now, self.seconds = 0.0, seconds
        self.statuses = statuses or {}
        self.ran: list[list[str]] = []
        self.limits: list[float] = []

    def clock(self) -> float:
        return self.now

    def start(self, command: Sequence[str], seconds: float) -> int:
        self.now += self.seconds
        self.ran.append(list(command))
        self.limits.append(seconds)
        out = Path(command[command.index("--out") + 1])
        for part, status in self.statuses.items():
            if part in out.name or part in command:
                return status
        if command[0] == "run":
            self.measure(out, command)
        else:
            out.write_text("{}")
        return 0

    def measure(self, out: Path, command: Sequence[str], not_run: str = "graph") -> None:
        names = list(command[command.index("--scenario") + 1 : command.index("--model")])
        names = [name for name in names if name != "--beside"]
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
            for name in dict.fromkeys(names)
            if name not in known and name != not_run
        ]
        written = made_up.result(*have, *new, environment=made_up.GPU)
        if not_run in names:
            missing = (*missing, NotRun(not_run, "it needs something"))
        replace(written, not_run=missing).write(out)


@pytest.fixture(autouse=True)
def _a_machine_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def sitting(folder: Path, machine: Machine, *arguments: str, device: str = "cuda") -> Sitting:
    parser = argparse.ArgumentParser()
    session.add_arguments(parser)
    options = parser.parse_args(arguments)
    work = Work("random:sdxl-base", device, CompiledShape(1024, 1024), 30)
    return Sitting(work, folder / "h200-day", options, machine.start, machine.clock)


def ran(machine: Machine) -> list[str]:
    """The names of the files, and of what times scenarios the first of those."""
    told = []
    for command in machine.ran:
        file = Path(command[command.index("--out") + 1]).stem.removeprefix("h200-day-")
        told.append(command[2] if file == "bench" else file)
    return told


def test_everything_is_done_once_and_what_tells_most_comes_first(tmp_path: Path) -> None:
    machine = Machine()
    assert sitting(tmp_path, machine).go() == 0
    order = ran(machine)
    assert order[:3] == ["documented", "kernels-compiled-step", "kernels-compiled-decode"]
    for earlier, later in (
        ("precompile", "all-lossless"),
        ("all-lossless", "pdl"),
        ("pdl", "batch-8"),
        ("batch-8", "fp8"),
        ("fp8", "offline"),
        ("offline", "micro"),
        ("micro", "coldstart-default"),
        # The fastest lossless one is known by then.
        ("coldstart-off", "kernels-all-lossless-step"),
        ("kernels-all-lossless-decode", "operators"),
        ("operators", "numerics"),
        ("numerics", "diffusers"),
        ("diffusers", "tuned-kernels"),
    ):
        assert order.index(earlier) < order.index(later)
    assert order[-1] == "tuned-kernels"
    timed = {name for command in machine.ran for name in command if command[0] == "run"}
    assert {scenario.name for scenario in session.SCENARIOS} <= timed
    # What differs by one change is timed in the same rounds as what it changes.
    ways = next(one for one in machine.ran if one[0] == "run" and "pdl" in one)
    beside = ways.index("--beside")
    assert ways[beside + 1 : beside + 3] == ["documented", "compiled"]

    again = Machine()
    assert sitting(tmp_path, again).go() == 0
    assert again.ran == []


def test_no_piece_is_started_that_would_end_too_late(tmp_path: Path) -> None:
    machine = Machine(seconds=100)
    assert sitting(tmp_path, machine, "--minutes", "9").go() == TIME_IS_UP
    assert machine.now <= 9 * 60
    assert machine.limits[0] == session.PIECE_SECONDS
    assert all(limit <= 9 * 60 - 100 * index for index, limit in enumerate(machine.limits))
    limited = machine.ran[0]
    assert float(limited[limited.index("--seconds-limit") + 1]) < session.PIECE_SECONDS
    # The next call goes on with what is left, and never does anything twice.
    for _ in range(30):
        if sitting(tmp_path, machine, "--minutes", "9").go() == 0:
            break
        machine.now = 0
    files = ran(machine)
    assert len(files) == len(set(files))


def test_a_run_that_was_short_of_time_is_gone_on_with(tmp_path: Path) -> None:
    machine = Machine()
    times = 0

    def start(command: Sequence[str], seconds: float) -> int:
        nonlocal times
        if command[0] == "run" and "pdl" in command and not times:
            times += 1
            machine.ran.append(list(command))
            return TIME_IS_UP
        return Machine.start(machine, command, seconds)

    machine.start = start  # type: ignore[method-assign]
    assert sitting(tmp_path, machine).go() == 0
    assert ran(machine).count("pdl") == 2


@pytest.mark.parametrize("status", [1, 2, 137, 143])
def test_a_piece_that_fails_does_not_end_the_others(tmp_path: Path, status: int) -> None:
    machine = Machine(statuses={"operators": status})
    assert sitting(tmp_path, machine).go() == 1
    assert "tuned-kernels" in ran(machine)
    # What was cut off is tried once more at once, what failed in the next call; then never again.
    assert ran(machine).count("operators") == (1 if status in (1, 2) else 2)
    for _ in range(2):
        assert sitting(tmp_path, machine).go() == 1
    assert ran(machine).count("operators") == 2


def test_a_scenario_without_time_is_still_to_do(tmp_path: Path) -> None:
    machine = Machine()
    assert sitting(tmp_path, machine, "--only", "standard").go() == 0
    out = tmp_path / "h200-day-bench.json"
    measured = BenchResult.read(out)
    kept = tuple(s for s in measured.scenarios if s.name != "default")
    replace(measured, scenarios=kept, not_run=(NotRun("default", NO_TIME),)).write(out)
    assert not sitting(tmp_path, machine).done(sitting(tmp_path, machine).pieces()[0])
    replace(measured, scenarios=kept, not_run=(NotRun("default", "it broke"),)).write(out)
    assert sitting(tmp_path, machine).done(sitting(tmp_path, machine).pieces()[0])


def test_another_machine_compiles_again_what_is_left(tmp_path: Path) -> None:
    machine = Machine()
    sitting(tmp_path, machine, "--only", "precompile", "ways").go()
    assert ran(machine) == ["precompile", "pdl"]
    assert "all-lossless" in machine.ran[0]
    (tmp_path / "tmp" / "h200-day-precompile.json").unlink()
    sitting(tmp_path, machine, "--only", "precompile", "ways").go()
    assert ran(machine)[2:] == ["precompile"]
    assert "pdl" not in machine.ran[-1]
    assert "all-lossless" in machine.ran[-1]


def test_what_is_asked_for_limits_the_pieces(tmp_path: Path) -> None:
    machine = Machine()
    chosen = ("--scenario", "documented", "served", "text-once", "--only", "standard", "rest", "k")
    assert sitting(tmp_path, machine, *chosen, device="cpu").go() == 0
    # Nothing that compiles was asked for, so nothing compiled is profiled.
    files = ["documented", "served", "kernels-served-step", "kernels-served-decode"]
    assert sorted(ran(machine)) == sorted(files)


def test_a_piece_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    began: list[Callable[[], int]] = []

    class Slow(session.subprocess.Popen):  # type: ignore[misc, type-arg]
        def __init__(self, command: Sequence[str]) -> None:
            super().__init__(["sleep", "30"])
            began.append(self.poll)

    monkeypatch.setattr(session.subprocess, "Popen", Slow)
    assert session.start(["run"], 0.1) == -15
    assert began[0]() is not None


def test_the_pieces_are_commands_that_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--model", "demo", "--device", "cpu", "--shape", "64x64", "--steps", "2"]
    assert main(["session", *small, "--results", str(tmp_path), "--list"]) == 0
    listed = [line.split("python -m bench ")[1] for line in capsys.readouterr().out.splitlines()]
    commands = {line.split()[0]: line.split() for line in listed}
    assert set(commands) == {"run", "kernels", "micro", "coldstart", "operators", "numerics"}
    for name, arguments in commands.items():
        parser = argparse.ArgumentParser()
        importlib.import_module(f"bench.{name}").add_arguments(parser)
        parser.parse_args([*arguments[1:], "--out", "x.json"])
    assert main(["session", *small, "--results", str(tmp_path / "nowhere")]) == 2


@pytest.mark.slow
def test_a_sitting_on_the_demo_model_leaves_a_file_for_each_piece(tmp_path: Path) -> None:
    small = ["--model", "demo", "--device", "cpu", "--shape", "64x64", "--steps", "2"]
    names = ["--scenario", "documented", "text-once", "--requests", "2"]
    command = ["session", *small, *names, "--results", str(tmp_path)]
    assert main(command) in (0, 1)  # a small model's decode may be further away than eager's
    found = {path.stem.split("64x64-")[1] for path in tmp_path.glob("cpu-*-demo-64x64-*.json")}
    assert found == {
        "bench",
        "kernels-text-once-step",
        "kernels-text-once-decode",
        "micro",
        "coldstart-auto",
        "operators",
        "numerics",
    }
    micro = next(tmp_path.glob("*-micro.json"))
    assert json.loads(micro.read_text())["environment"]["device"] == "cpu"
