"""Timing scenarios: with the real demo model, and failures with a fake worker."""

from __future__ import annotations

import argparse
import asyncio
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.__main__ import main
from bench.errors import BenchError
from bench.harness import drive, environment, rounds, run
from bench.harness.device_lock import only_bench_on
from bench.harness.environment import ROOT
from bench.harness.result_file import BenchResult, Ceilings, Code, Flops, RequestSample
from bench.harness.run_record import NO_TIME
from bench.harness.scenarios import SCENARIOS, Scenario, chosen
from bench.harness.torch_state import (
    LibrarySettings,
    check_settings_unchanged,
    compiler_settings,
)
from bench.harness.work import CannotRun, ScenarioFailed, Work, choose_work
from bench.harness.worker import Ready
from bench.harness.worktree import worktree
from kernels_warmup.recipes import RECIPES, TUNED
from kernels_warmup.shapes import CompiledShape
from serve.model.sdxl import load_model
from serve.settings import DEMO_MODEL
from tests.bench import made_up

SMALL = ["--model", "demo", "--device", "cpu", "--steps", "2"]
CEILINGS = Ceilings({"float32": 0.1}, 1.0)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also skip measuring ceilings, which takes a second a test."""
    monkeypatch.setattr(environment, "measure_ceilings", lambda _: CEILINGS)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_sample_of_a_run_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    names = ["documented", "served", "channels-last", "graph", "int8", "batch-2"]
    arguments = ["run", "--scenario", *names, *SMALL, "--requests", "4", "--rounds", "2"]
    assert main([*arguments, "--price-per-hour", "3.6", "--out", str(out)]) == 0
    result = BenchResult.read(out)
    assert not result.partial
    assert result.workload.shape == "128x128"
    measured = result.of_side("head")
    assert list(measured) == ["documented", "served", "channels-last", "int8", "batch-2"]
    for scenario in measured.values():
        assert [request.round for request in scenario.requests] == [0, 0, 1, 1]
        assert len(scenario.warmups) == 2
        assert scenario.flops is not None
        for request in scenario.requests:
            assert request.first_step_ms + sum(request.steps_ms) <= request.total_ms
            assert request.stages_ms["denoise"] <= request.total_ms
            assert request.cpu_ms is not None
    assert measured["documented"].calibration
    assert not measured["served"].calibration
    # On a CPU these compute the very same float32.
    assert measured["documented"].error_vs_fp32 == measured["served"].error_vs_fp32 == 0
    assert 0 <= (measured["channels-last"].error_vs_fp32 or 0) < 1e-5
    assert 1e-3 < (measured["int8"].error_vs_fp32 or 0) < 0.1
    assert measured["int8"].lossy
    assert measured["batch-2"].images == 2
    one, two = measured["served"].flops, measured["batch-2"].flops
    assert one is not None
    assert two is not None
    assert two.step == 2 * one.step
    (not_run,) = result.not_run
    assert not_run.name == "graph"
    assert "CUDA" in not_run.reason
    assert result.environment.cpu
    assert result.sessions[0].end is not None
    printed = capsys.readouterr().out
    assert "graph                not run: it needs a CUDA device" in printed

    # The same file, continued: what it has is not measured again.
    more = ["run", "--scenario", "documented", "diffusers", *SMALL, "--requests", "4"]
    assert main([*more, "--rounds", "2", "--resume", "--out", str(out)]) == 0
    longer = BenchResult.read(out)
    assert [(s.first_round, s.rounds) for s in longer.sessions] == [(0, 2), (2, 2)]
    assert {r.round for r in longer.of_side("head")["diffusers"].requests} == {2, 3}
    # The baseline is timed again, so that the sessions can be compared.
    assert {r.round for r in longer.of_side("head")["documented"].requests} == {0, 1, 2, 3}
    assert len(longer.of_side("head")["served"].requests) == 4

    # A file of another workload is not continued.
    other = ["run", "--scenario", "diffusers", *SMALL[:-1], "3", "--resume", "--out", str(out)]
    assert main(other) == 2
    assert "steps was 2 and is 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--scenario", "no-such"],
            "there is no scenario 'no-such'; use one of documented, diffusers",
        ),
        (["--steps", "1"], "1 steps are not enough"),
        (["--shape", "100"], "'100' is not an image size"),
        (["--model", "no-such-model", "--shape", "64x64"], "neither a directory here nor a hub"),
        (["--requests", "0"], "--requests and --rounds"),
        (["--requests", "2", "--rounds", "3"], "no more rounds than requests"),
        (["--price-per-hour", "0"], "--price-per-hour must be above 0"),
        (["--resume"], "--resume needs --out"),
        (["--base", "no-such-commit", "--model", "demo"], "there is no commit 'no-such-commit'"),
    ],
)
def test_wrong_usage_is_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_file_that_exists_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    out.write_text("precious")
    assert main(["run", *SMALL, "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert out.read_text() == "precious"


def test_nothing_measured_is_an_error_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(["run", "--scenario", "graph", *SMALL, "--out", str(out)]) == 2
    assert "graph: it needs a CUDA device" in capsys.readouterr().err
    assert not out.exists()


# By fakes ----------------------------------------------------------------------------------------


class FakeWorker:
    """Returns at once. A scenario holds `held` of `memory` bytes, and fails if the test says so."""

    side = "head"

    def __init__(self, memory: int = 100, held: int = 0) -> None:
        self.memory, self.held = memory, held
        self.in_memory: list[str] = []
        self.most_at_once = 0
        self.unready: dict[str, BaseException] = {}
        self.fails_in_round: dict[str, int] = {}
        self.failure: BaseException = ScenarioFailed("RuntimeError: broken")
        self.request_ms = 1000.0

    def code(self) -> Code:
        return Code("head", "c0ffee", False, {"torch": "2"})

    def prepare(self, scenario: Scenario) -> Ready:
        if scenario.name in self.unready:
            raise self.unready[scenario.name]
        self.in_memory.append(scenario.name)
        self.most_at_once = max(self.most_at_once, len(self.in_memory))
        warmup = self.sample(0)
        return Ready("float32", 1.0, (warmup,), 0.01, Flops(1, 2, 3), None, self.held)

    def sample(self, number: int) -> RequestSample:
        return RequestSample(number, 1, self.request_ms, 2.0, (2.0,))

    def measure(self, name: str, round_number: int, seeds: list[int]) -> list[RequestSample]:
        assert name in self.in_memory
        if self.fails_in_round.get(name) == round_number:
            raise self.failure
        return [self.sample(round_number) for _ in seeds]

    def release(self, names: list[str]) -> None:
        for name in names:
            self.in_memory.remove(name)

    def free_bytes(self) -> int:
        return self.memory - self.held * len(self.in_memory)

    def close(self) -> None:
        self.in_memory = []


def bench(
    worker: FakeWorker, out: Path, *names: str, **changes: Any
) -> tuple[int, BenchResult | None]:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    options = parser.parse_args(["--requests", "2", "--out", str(out)])
    for name, value in changes.items():
        setattr(options, name, value)
    work = Work("demo", "cpu", CompiledShape(128, 128), 2)
    status = rounds.Bench(work, [worker], out, options).measure(chosen(names))  # type: ignore[list-item]
    return status, BenchResult.read(out) if out.exists() else None


def test_what_does_not_fit_in_memory_is_timed_in_groups_beside_the_baseline(tmp_path: Path) -> None:
    worker = FakeWorker(memory=39, held=10)
    names = ("documented", "diffusers", "served", "bf16", "default")
    _, result = bench(worker, tmp_path / "out.json", *names)
    assert worker.most_at_once == 3
    assert worker.in_memory == []
    assert result is not None
    rounds = {n: [r.round for r in s.requests] for n, s in result.of_side("head").items()}
    assert rounds["documented"] == [0, 1, 2, 3, 4, 5] or rounds["documented"] == [0, 1, 2, 3]
    assert rounds["diffusers"] == [0, 1]
    assert set(rounds["default"]) <= set(rounds["documented"])
    assert result.sessions[0].rounds == max(rounds["documented"]) + 1


def test_where_only_one_fits_each_is_timed_alone(tmp_path: Path) -> None:
    worker = FakeWorker(memory=20, held=10)
    _, found = bench(worker, tmp_path / "out.json", "documented", "served", "bf16")
    assert worker.most_at_once == 1
    assert found is not None
    assert [len(s.requests) for s in found.scenarios] == [2, 2, 2]


def test_scenarios_beside_are_in_the_rounds_of_each_call(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    bench(FakeWorker(), out, "documented", "compiled")
    names = ("documented", "compiled", "pdl")
    _, found = bench(FakeWorker(), out, *names, resume=True, beside=["documented", "compiled"])
    assert found is not None
    rounds = {n: [r.round for r in s.requests] for n, s in found.of_side("head").items()}
    assert rounds == {"documented": [0, 1, 2, 3], "compiled": [0, 1, 2, 3], "pdl": [2, 3]}


def test_a_scenario_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    worker = FakeWorker()
    worker.unready["bf16"] = ScenarioFailed("RuntimeError: no such kernel")
    worker.fails_in_round["served"] = 1
    status, result = bench(worker, tmp_path / "out.json", "documented", "served", "bf16", "default")
    assert status == 1
    assert result is not None
    assert {(n.name, n.failed) for n in result.not_run} == {("bf16", True), ("served", True)}
    kept = {name: len(s.requests) for name, s in result.of_side("head").items()}
    assert kept == {"documented": 2, "served": 1, "default": 2}


def test_what_the_machine_lacks_is_no_failure(tmp_path: Path) -> None:
    worker = FakeWorker()
    worker.unready["graph"] = CannotRun("it needs a CUDA device")
    status, result = bench(worker, tmp_path / "out.json", "documented", "graph")
    assert status == 0
    assert result is not None
    assert [(n.name, n.failed) for n in result.not_run] == [("graph", False)]


def test_a_failure_is_tried_once_more_and_again_after_the_code_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    broken, tries = FakeWorker(), []
    broken.unready["bf16"] = ScenarioFailed("RuntimeError: no such kernel")
    prepare = broken.prepare

    def counted(scenario: Scenario) -> Ready:
        tries.append(scenario.name)
        return prepare(scenario)

    monkeypatch.setattr(broken, "prepare", counted)
    names = ("documented", "bf16", "default")
    for expected in (1, 2, 2):
        status, result = bench(broken, out, *names, resume=True)
        assert status == 1
        assert tries.count("bf16") == expected
        assert result is not None
        assert [n.name for n in result.not_run] == ["bf16"]
    # Repaired: what was measured is kept, and the later rounds name the code they ran.
    monkeypatch.setattr(rounds, "code_digest", lambda: "repaired")
    mended = FakeWorker()
    monkeypatch.setattr(
        mended, "code", lambda: Code("head", "badcab", False, {"torch": "2"}, "repaired")
    )
    status, result = bench(mended, out, *names, resume=True)
    assert status == 0
    assert result is not None
    assert not result.not_run
    assert set(result.of_side("head")) == set(names)
    assert [s.code and s.code[0].source for s in result.sessions] == [(), "repaired"]
    # Samples of other libraries never share a file.
    other = FakeWorker()
    monkeypatch.setattr(other, "code", lambda: Code("head", "badcab", False, {"torch": "3"}))
    with pytest.raises(BenchError, match="versions was"):
        bench(other, out, *names, "served", resume=True)


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path) -> None:
    worker = FakeWorker(memory=14, held=10)
    worker.unready["bf16"] = rounds.Interrupted(signal.SIGTERM)
    status, result = bench(worker, tmp_path / "out.json", "diffusers", "bf16")
    assert status == 128 + signal.SIGTERM
    assert result is not None
    assert result.partial
    assert len(result.of_side("head")["diffusers"].requests) == 2


def test_a_round_that_is_interrupted_midway_is_kept_as_far_as_it_came(tmp_path: Path) -> None:
    worker = FakeWorker()
    names = ("documented", "diffusers", "served", "default")
    second_round = random.Random(1).sample(chosen(names), len(names))
    worker.fails_in_round[second_round[2].name] = 1
    worker.failure = rounds.Interrupted(signal.SIGINT)
    status, result = bench(worker, tmp_path / "out.json", *names)
    assert status == 130
    assert result is not None
    assert result.partial
    counts = {s.name: len(s.requests) for s in result.scenarios}
    assert [counts[s.name] for s in second_round] == [2, 2, 1, 1]
    assert result.sessions[0].rounds == 2


def test_an_interruption_before_anything_was_measured_leaves_no_file(tmp_path: Path) -> None:
    worker = FakeWorker()
    worker.unready["documented"] = rounds.Interrupted(signal.SIGINT)
    assert bench(worker, tmp_path / "out.json", "documented") == (130, None)


def test_nothing_is_started_that_cannot_end_in_time_and_a_later_call_continues(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out.json"
    worker = FakeWorker()
    names = ("documented", "regional")
    status, result = bench(worker, out, *names, seconds_limit=60, resume=True)
    assert status == rounds.TIME_IS_UP
    assert result is not None
    assert [n.reason for n in result.not_run] == [NO_TIME]
    status, result = bench(worker, out, *names, seconds_limit=600, resume=True)
    assert status == 0
    assert result is not None
    assert not result.not_run
    assert {len(s.requests) for s in result.scenarios} == {2, 4}


def test_a_scenario_in_the_compilers_cache_needs_less_of_the_time(tmp_path: Path) -> None:
    names = ("documented", "regional", "compiled")
    limits = {"seconds_limit": 120, "resume": True}
    status, _ = bench(FakeWorker(), tmp_path / "cold.json", *names, **limits)
    assert status == rounds.TIME_IS_UP
    status, result = bench(
        FakeWorker(), tmp_path / "cached.json", *names, prepare_seconds=5, **limits
    )
    assert status == 0
    assert result is not None
    assert set(result.of_side("head")) == set(names)


def test_each_call_of_a_resumed_run_starts_something(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    names = ("documented", "regional", "compiled", "vae-compiled")
    calls = 0
    while bench(FakeWorker(), out, *names, seconds_limit=60, resume=True)[0] == rounds.TIME_IS_UP:
        calls += 1
        assert calls < 5
    result = BenchResult.read(out)
    assert set(result.of_side("head")) == set(names)


def test_a_scenario_cut_off_twice_while_it_was_prepared_is_not_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    worker = FakeWorker()
    worker.unready["max"] = rounds.Interrupted(signal.SIGTERM)
    for _ in range(2):
        assert bench(worker, out, "documented", "max", resume=True)[0] == 143
    status, result = bench(worker, out, "documented", "max", "default", resume=True)
    assert status == 1
    assert result is not None
    assert "cut off" in result.not_run[0].reason
    assert result.not_run[0].failed
    assert "default" in result.of_side("head")


# Locks and processes -----------------------------------------------------------------------------


def test_two_benches_on_one_device_are_refused() -> None:
    with only_bench_on("cuda:0"):
        with pytest.raises(
            BenchError, match=f"another bench runs on cuda:0 .process {os.getpid()}"
        ):
            only_bench_on("cuda:0").__enter__()
        with only_bench_on("cpu"):
            pass
    with only_bench_on("cuda:0"):
        pass


def test_the_lock_of_a_dead_process_is_released() -> None:
    code = (
        "import os; from bench.harness.device_lock import only_bench_on\n"
        "held = only_bench_on('cpu'); held.__enter__(); os._exit(1)"
    )
    held = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert held.returncode == 1
    with only_bench_on("cpu"):
        pass


@pytest.mark.e2e
def test_sigterm_keeps_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = ["run", "--scenario", "served", *SMALL, "--requests", "2000", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not out.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    finally:
        process.kill()
    result = BenchResult.read(out)
    assert result.partial
    assert result.scenarios[0].requests


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of its own with this code in it, and commits that cannot be measured."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    place = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
    for package in (*environment.MEASURED, "bench"):
        shutil.copytree(ROOT / package, place / package, ignore=ignored)

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
        subprocess.run(["git", *identity, *arguments], cwd=place, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-qm", "whole")
    git("tag", "whole")
    runtime = place / "serve" / "engine" / "runtime.py"
    text = runtime.read_text()
    runtime.write_text("raise ImportError('half a change')\n")
    git("commit", "-qam", "broken")
    git("tag", "broken")
    git("rm", "-rqf", "kernels_warmup")
    git("commit", "-qam", "empty")
    git("tag", "empty")
    git("checkout", "-q", "whole")
    runtime.write_text(text + "\n\ndef build_runtime() -> None:\n    return None\n")
    git("commit", "-qam", "other entry points")
    git("tag", "other-entry-points")
    git("checkout", "-q", "whole")
    git("mv", "serve/engine/runtime.py", "serve/runtime.py")
    git("rm", "-rqf", "serve/engine")
    git("commit", "-qam", "without serve/engine")
    git("tag", "without-engine")
    git("checkout", "-q", "whole")
    assert runtime.read_text() == text
    return place


def worktrees(place: Path) -> int:
    listed = subprocess.run(
        ["git", "worktree", "list"], cwd=place, capture_output=True, text=True, check=True
    )
    return len(listed.stdout.splitlines())


@pytest.mark.e2e
def test_two_commits_are_timed_in_the_same_rounds(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", clone)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out.json"
    command = ["run", "--scenario", "served", *SMALL, "--requests", "2", "--base", "whole"]
    assert main([*command, "--out", str(out)]) == 0
    result = BenchResult.read(out)
    assert result.sides == ("base", "head")
    base, head = (result.of_side(side)["served"] for side in result.sides)
    assert [r.round for r in base.requests] == [r.round for r in head.requests] == [0, 1]
    assert result.code_of("base").commit == result.code_of("head").commit
    assert not result.code_of("base").dirty
    assert worktrees(clone) == 1


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("revision", "said"),
    [
        ("broken", "base commit cannot be measured.*half a change"),
        ("other-entry-points", "base commit cannot be measured.*build_runtime.*prepare"),
        ("empty", "base commit [0-9a-f]{12} cannot be measured.*kernels_warmup/"),
        ("without-engine", "base commit [0-9a-f]{12} cannot be measured.*serve/engine/"),
    ],
)
def test_a_base_that_cannot_be_measured_is_one_sentence(
    clone: Path, revision: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", clone)
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    options = parser.parse_args(["--scenario", "served", *SMALL, "--base", revision])
    with pytest.raises(BenchError, match=said) as refused:
        run.run(options)
    assert "\n" not in str(refused.value)
    assert worktrees(clone) == 1


def test_a_worktree_is_removed_whatever_happens_in_it(clone: Path) -> None:
    def interrupted() -> None:
        nonlocal place
        with worktree("whole", clone) as (place, _):
            assert (place / "bench" / "harness" / "run.py").exists()
            assert worktrees(clone) == 2
            raise KeyboardInterrupt

    place = clone
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not place.exists()
    assert worktrees(clone) == 1


def test_a_base_needs_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="needs a git checkout"):
        worktree("main", tmp_path).__enter__()


# Scenarios ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_a_batch_is_warm_and_a_run_that_is_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and not generated: that is enough for a shape to be cold.
    compile_eagerly = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_eagerly(function))
    work = choose_work("demo", "cpu", "64x64", 2)
    (compiled,) = (replace(s, compile="off", recipe={"scope": "whole"}) for s in chosen(["served"]))
    with asyncio.Runner() as runner:
        batch = drive.Served(replace(compiled, images=2), work, runner)
        assert batch.request(0, 0).total_ms > 0
        batch._scenario = replace(compiled, images=3)
        with pytest.raises(RuntimeError, match="fell back to running eagerly"):
            batch.request(0, 0)
        batch.close()


def test_scenarios_have_names_of_their_own_and_recipes_that_exist() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)
    assert names[0] == "documented"
    assert names[-1] == "default"
    for scenario in SCENARIOS:
        for fields in (scenario.recipe, scenario.decoder):
            if fields is not None:
                drive.recipe_of(fields)


def test_a_scenario_may_have_steps_of_its_own(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    (asked,) = chosen(["offline"])
    work = choose_work("demo", "cpu", "64x64", 2)
    with asyncio.Runner() as runner:
        batch = drive.load_scenario(replace(asked, images=2, steps=3), work, runner)
        sample = batch.request(0, 0)
        batch.close()
    assert len(sample.steps_ms) == 2
    served, offline = (made_up.scenario(name, [2.0]) for name in ("served", "offline"))
    written = made_up.result(served, replace(offline, steps=made_up.STEPS))
    written.write(out)
    assert BenchResult.read(out).of_side("head")["offline"].steps == made_up.STEPS
    with pytest.raises(ValueError, match="steps instead of 3"):
        made_up.result(replace(offline, steps=3))


def test_what_max_does_is_all_lossless_and_tuning() -> None:
    (all_lossless,) = chosen(["all-lossless"])
    assert replace(RECIPES["max"], options={}) == drive.recipe_of(all_lossless.recipe)


def test_compiled_by_its_fields_is_compiled_by_its_mode() -> None:
    (pdl,) = chosen(["pdl"])
    assert replace(drive.recipe_of(pdl.recipe), options={}) == RECIPES["default"]


@pytest.mark.parametrize("name", [s.name for s in SCENARIOS if s.way == "served"])
def test_no_scenario_changes_how_another_is_compiled(name: str) -> None:
    (scenario,) = chosen([name])
    if scenario.quantize == "fp8" or scenario.attention not in ("auto", "math"):
        pytest.skip("cannot be prepared without a GPU; there `run` itself refuses such a change")
    before = compiler_settings()
    drive.prepare(scenario, load_model(DEMO_MODEL, None, "cpu", "float32"))
    check_settings_unchanged(before, compiler_settings())


def test_a_scenario_that_changes_the_compiler_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    def careless(*_: Any) -> None:
        config.coordinate_descent_tuning = not config.coordinate_descent_tuning

    (served,) = chosen(["served"])
    work = choose_work("demo", "cpu", "64x64", 2)
    defaults = LibrarySettings()
    monkeypatch.setattr(drive, "prepare", careless)
    try:
        with asyncio.Runner() as runner, pytest.raises(ScenarioFailed) as failed:
            drive.load_scenario(served, work, runner)
        assert "coordinate_descent_tuning" in str(failed.value)
        # The setting may belong to the process, as before torch 2.12; it is put back either way.
        careless()
        defaults.apply()
        assert LibrarySettings()._compiler == defaults._compiler
    finally:
        defaults.apply()


def test_only_the_kind_of_run_that_is_timed_is_warmed() -> None:
    (text_once,) = chosen(["text-once"])
    work = choose_work("demo", "cpu", "64x64", 2)
    with asyncio.Runner() as runner:
        for images in (1, 2):
            driven = drive.Served(replace(text_once, images=images), work, runner)
            shapes = driven.with_pipeline(lambda pipeline: pipeline.unet.forward.functions[0].met)
            assert [key[0][0][0] for key in shapes] == [2 * images]
            driven.close()


def test_every_option_for_inductor_is_one() -> None:
    from torch._inductor import config

    recipes = [*RECIPES.values()]
    for scenario in SCENARIOS:
        recipes += [drive.recipe_of(f) for f in (scenario.recipe, scenario.decoder) if f]
    (tuned,) = chosen(["tuned-products"])
    assert drive.recipe_of(tuned.recipe).options == TUNED
    named = {option for recipe in recipes for option in recipe.options}
    assert named
    assert named <= set(config.get_config_copy())


def test_help_loads_no_model_library() -> None:
    code = (
        "import sys, bench.__main__ as b\n"
        "for name in ('run', 'overhead', 'coldstart', 'micro', 'peers', 'bare'):\n"
        "    try: b.main([name, '--help'])\n"
        "    except SystemExit: pass\n"
        "sys.exit(any(m in sys.modules for m in ('torch', 'diffusers', 'transformers')))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert ended.returncode == 0
