"""Rounds, groups, failures, interruptions and time limits of a run, with a fake worker."""

from __future__ import annotations

import argparse
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bench import run
from bench.errors import BenchError
from bench.harness import rounds
from bench.harness.result_file import BenchResult, Code, Flops, RequestSample
from bench.harness.run_record import NO_TIME
from bench.harness.scenarios import Scenario, chosen
from bench.harness.work import CannotRun, ScenarioFailed, Work
from bench.harness.worker import Ready
from kernels_warmup.shapes import CompiledShape


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
        self.error = 0.01

    def code(self) -> Code:
        return Code("head", "c0ffee", False, {"torch": "2"})

    def prepare(self, scenario: Scenario) -> Ready:
        if scenario.name in self.unready:
            raise self.unready[scenario.name]
        self.in_memory.append(scenario.name)
        self.most_at_once = max(self.most_at_once, len(self.in_memory))
        warmup = self.sample(0)
        return Ready("float32", 1.0, (warmup,), self.error, Flops(1, 2, 3), None, self.held)

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


@pytest.mark.parametrize(("requests", "count"), [(10, 6), (7, 6), (12, 6), (3, 1), (6, 6)])
def test_there_are_as_many_rounds_as_asked_for(requests: int, count: int, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    _, found = bench(FakeWorker(), out, "served", requests=requests, rounds=count)
    assert found is not None
    sizes = Counter(request.round for request in found.of_side("head")["served"].requests)
    assert sorted(sizes) == list(range(count))
    assert sizes.total() == requests
    assert max(sizes.values()) - min(sizes.values()) <= 1
    assert found.sessions[0].rounds == count


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


def test_a_continued_scenario_is_described_as_its_last_code_measured_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"

    def measured(requests: int, error: float, commit: str) -> tuple[int, float | None]:
        worker = FakeWorker()
        worker.error = error
        monkeypatch.setattr(worker, "code", lambda: Code("head", commit, False, {"torch": "2"}))
        _, found = bench(worker, out, "served", resume=True, requests=requests)
        assert found is not None
        (scenario,) = found.scenarios
        return len(scenario.requests), scenario.error_vs_fp32

    assert measured(2, 0.01, "c0ffee") == (2, 0.01)
    assert measured(4, 0.02, "badcab") == (6, 0.02)
    # The same code again: what its first call found stays.
    assert measured(8, 0.03, "badcab") == (14, 0.02)


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path) -> None:
    worker = FakeWorker(memory=14, held=10)
    worker.unready["bf16"] = rounds.Interrupted(signal.SIGTERM)
    status, result = bench(worker, tmp_path / "out.json", "diffusers", "bf16")
    assert status == 128 + signal.SIGTERM
    assert result is not None
    assert result.partial
    assert len(result.of_side("head")["diffusers"].requests) == 2


def test_an_interrupted_round_keeps_its_finished_requests(tmp_path: Path) -> None:
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


def test_no_scenario_starts_that_cannot_end_in_time_and_a_later_call_continues(
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


def test_a_resumed_call_tries_what_had_no_time_also_beyond_the_first_group(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    names = ("served", "channels-last", "fused-qkv", "text-once")

    def call(limit: float) -> tuple[int, set[str], set[str]]:
        worker = FakeWorker(memory=20, held=10)
        status, found = bench(worker, out, *names, seconds_limit=limit, resume=True)
        assert found is not None
        assert all(n.reason == NO_TIME for n in found.not_run)
        return status, set(found.of_side("head")), {n.name for n in found.not_run}

    assert call(1) == (rounds.TIME_IS_UP, {"served"}, set(names[1:]))
    assert call(1) == (rounds.TIME_IS_UP, set(names[:2]), set(names[2:]))
    assert call(600) == (0, set(names), set())


def test_a_resumed_call_tries_what_failed_also_beyond_the_first_group(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    names = ("served", "channels-last", "fused-qkv", "text-once")
    broken = FakeWorker(memory=20, held=10)
    broken.unready = {name: ScenarioFailed("RuntimeError: broken") for name in names[1:]}
    assert bench(broken, out, *names, resume=True)[0] == 1
    status, found = bench(FakeWorker(memory=20, held=10), out, *names, resume=True)
    assert status == 0
    assert found is not None
    assert set(found.of_side("head")) == set(names)
    assert not found.not_run


def test_all_that_the_time_did_not_suffice_for_is_listed(tmp_path: Path) -> None:
    """Also what no longer fits in memory after a scenario that would have ended too late."""
    worker = FakeWorker(memory=20, held=10)
    names = ("served", "regional", "pdl", "default")
    _, found = bench(worker, tmp_path / "out.json", *names, seconds_limit=60)
    assert found is not None
    assert set(found.of_side("head")) == {"served", "pdl"}
    assert {n.name for n in found.not_run} == {"regional", "default"}


def test_a_scenario_interrupted_twice_in_its_preparation_is_not_tried_again(tmp_path: Path) -> None:
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
