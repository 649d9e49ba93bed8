"""Compiling several scenarios at once, in processes that all end with the call."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.harness.result_file import BenchResult
from bench.harness.scenarios import Scenario, chosen
from bench.session.precompile import bytes_needed, compile_all

NAMES = ["served", "bf16", "compiled", "default"]


class Starts:
    """Starts processes that sleep, and counts how many ran at the same time."""

    def __init__(self, seconds: float, failing: str = "") -> None:
        self.seconds, self.failing = seconds, failing
        self.processes: list[subprocess.Popen[bytes]] = []
        self.most_at_once = 0

    def __call__(self, scenario: Scenario) -> subprocess.Popen[bytes]:
        status = int(scenario.name == self.failing)
        command = f"sleep {self.seconds}; exit {status}"
        self.processes.append(subprocess.Popen(["sh", "-c", command]))
        alive = sum(process.poll() is None for process in self.processes)
        self.most_at_once = max(self.most_at_once, alive)
        return self.processes[-1]


def test_at_most_n_run_at_once_and_each_outcome_is_reported() -> None:
    start = Starts(0.1, failing="bf16")
    outcomes = compile_all(chosen(NAMES), start, at_once=2)
    assert start.most_at_once == 2
    assert set(outcomes) == set(NAMES)
    assert outcomes["bf16"].startswith("failed with status 1")
    assert outcomes["compiled"].startswith("compiled in")


def test_processes_share_the_gpus_memory_by_the_images_they_draw() -> None:
    one, eight = (bytes_needed(scenario) for scenario in chosen(["compiled", "batch-8"]))
    assert eight - one >= 8.6e9 * 7 / 8  # the activations of a decode of eight
    start = Starts(0.2)
    outcomes = compile_all(
        chosen(["compiled", "batch-8", "default"]), start, at_once=3, memory=one + eight - 1
    )
    assert start.most_at_once == 2  # the two of one image
    assert all(one.startswith("compiled in") for one in outcomes.values())
    # A scenario that needs more than the whole memory runs alone.
    start = Starts(0.1)
    compile_all(chosen(["batch-8", "compiled"]), start, at_once=2, memory=one)
    assert start.most_at_once == 1
    assert len(start.processes) == 2


def test_a_process_past_the_time_limit_is_ended() -> None:
    start = Starts(60)
    began = time.monotonic()
    outcomes = compile_all(chosen(NAMES), start, at_once=3, seconds_limit=0.1)
    assert time.monotonic() - began < 20
    assert set(outcomes.values()) == {"there was no time left for it"}
    assert set(outcomes) == set(NAMES)
    assert all(process.poll() is not None for process in start.processes)


def test_an_interruption_ends_every_process() -> None:
    start = Starts(60)

    def interrupted(scenario: Scenario) -> subprocess.Popen[bytes]:
        if start.processes:
            raise KeyboardInterrupt
        return start(scenario)

    with pytest.raises(KeyboardInterrupt):
        compile_all(chosen(NAMES), interrupted, at_once=2)
    assert all(process.poll() is not None for process in start.processes)


def test_what_cannot_run_here_is_not_started(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["precompile", "--model", "demo", "--device", "cpu", "--shape", "64x64"]
    assert main([*command, "--scenario", "pdl", "--out", str(out)]) == 0
    assert "CUDA" in json.loads(out.read_text())["scenarios"]["pdl"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_was_compiled_is_found_by_the_run_that_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    work = ["--model", "demo", "--device", "cpu", "--shape", "64x64"]
    began = time.monotonic()
    command = ["precompile", "--scenario", "vae-compiled", *work]
    assert subprocess.run([sys.executable, "-m", "bench", *command], check=False).returncode == 0
    seconds = time.monotonic() - began
    # Without the option that this process sets: the key of what was kept does not hold it.
    out = tmp_path / "out.json"
    command = ["run", "--scenario", "vae-compiled", *work, "--steps", "2", "--requests", "1"]
    command = [sys.executable, "-m", "bench", *command, "--out", str(out)]
    assert subprocess.run(command, check=False).returncode == 0
    (scenario,) = BenchResult.read(out).scenarios
    assert (scenario.prepare_seconds or 0) < 0.5 * seconds
