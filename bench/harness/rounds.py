"""Prepare scenarios in groups that fit in memory, and time each group in interleaved rounds."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.harness.run_record import NO_TIME, Attempts, RunRecord, ScenarioRecord, code_digest
from bench.harness.scenarios import BASELINE, Scenario, chosen

if TYPE_CHECKING:
    from bench.harness.work import Work
    from bench.harness.worker import BenchWorker

TIME_IS_UP = 75
"""Exit status: another call with --resume measures the rest."""
MEMORY_SPARE = 1.3
"""Another scenario is prepared if this many times the largest so far is free."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class Bench:
    """One call of `bench run`."""

    def __init__(
        self, work: Work, workers: Sequence[BenchWorker], out: Path, options: argparse.Namespace
    ) -> None:
        self._work, self._workers = work, workers
        self._requests: int = options.requests
        self._rounds: int = options.rounds or options.requests
        self._seconds_limit: float | None = options.seconds_limit
        self._prepare_seconds: float | None = options.prepare_seconds
        self._resume: bool = options.resume
        self._beside = chosen(options.beside or [BASELINE.name])
        self._began = time.monotonic()
        self._attempts = Attempts(out if options.resume else None, code_digest())
        codes = [worker.code() for worker in workers]
        self._record = RunRecord(out, work, codes, options.price_per_hour)
        self._selected: list[Scenario] = []
        self._in_memory: list[str] = []
        self._next_round = 0
        self._postponed = False
        self._has_started_one = False

    def measure(self, scenarios: Sequence[Scenario]) -> int:
        """Measure these scenarios and write the file; returns the exit status.

        Raises:
            BenchError: nothing could be measured, or the file cannot be continued.
        """
        from bench.harness.environment import conditions, measure_ceilings

        record = self._record
        if self._resume and record.path.exists():
            record.continue_file()
            self._next_round = record.first_round
        self._selected = list(scenarios)
        left = [s for s in scenarios if not record.is_settled(s, self._requests, self._attempts)]
        if record.continues and not left:
            self._log(f"{record.path} already has every scenario, or the reason why it cannot run")
            return self._failed_status()
        record.start = conditions(self._work.device)
        status = 0
        try:
            record.ceilings = measure_ceilings(self._work.device)
            while left and not self._postponed:
                left = self._measure_group(left)
            for scenario in left:
                record.add_not_run(scenario, None, NO_TIME)
            record.end = conditions(self._work.device)
            record.write()
            status = TIME_IS_UP if self._postponed and self._resume else self._failed_status()
        except Interrupted as interrupted:
            status = 128 + interrupted.number
            self._log("interrupted: the samples so far are kept")
            if any(scenario.requests for scenario in record.scenarios.values()):
                record.write(partial=True)
        if status <= TIME_IS_UP:
            for worker in self._workers:
                worker.close()
        if not record.measured():
            if status:
                return status
            reasons = "; ".join(f"{n.name}: {n.reason}" for n in record.not_run.values())
            raise BenchError(f"no scenario could be measured ({reasons})")
        return status

    def _failed_status(self) -> int:
        """1 if a selected scenario failed, else 0."""
        selected = {scenario.name for scenario in self._selected}
        return int(any(n.failed and n.name in selected for n in self._record.not_run.values()))

    # Groups

    def _measure_group(self, left: list[Scenario]) -> list[Scenario]:
        """Prepare as many scenarios as fit, time and release them.

        Returns the scenarios after these, which this call has not tried.
        """
        group: list[Scenario] = []
        tried = 0
        largest = 0
        # These are in every group, so that the machine's state in one group or session can be held
        # against another's. They come after the group's first, which may be the only one that fits.
        beside = [s for s in self._beside if s in self._selected and s not in left]
        for scenario in left:
            if group and not self._fits(largest):
                break
            tried += 1
            if not self._is_in_time(scenario, group):
                self._postponed = True
                self._record.add_not_run(scenario, None, NO_TIME)
                continue
            if self._attempts.exhausted(scenario.name):
                reason = "it was cut off twice while it was prepared"
                self._record.add_not_run(scenario, None, reason, failed=True)
                continue
            held = self._prepare(scenario)
            if held is None:
                continue
            largest = max(largest, held)
            group.append(scenario)
            self._has_started_one = True
            while beside and self._fits(largest):
                companion = beside.pop(0)
                held = self._prepare(companion)
                if held is not None:
                    largest = max(largest, held)
                    group.append(companion)
        if group:
            self._time(group)
            for worker in self._workers:
                worker.release(self._in_memory)
            self._in_memory = []
        return left[tried:]

    def _fits(self, largest: int) -> bool:
        """Whether another scenario as large as the largest so far would fit in memory."""
        return all(worker.free_bytes() >= MEMORY_SPARE * largest for worker in self._workers)

    def _is_in_time(self, scenario: Scenario, group: Sequence[Scenario]) -> bool:
        if self._seconds_limit is None:
            return True
        if self._resume and not self._has_started_one:
            # Each call of a resumed run starts at least one, or the run would never end.
            return True
        seconds = scenario.prepare_seconds[0 if self._work.on_cuda else 1]
        if self._prepare_seconds is not None:
            seconds = min(seconds, self._prepare_seconds)
        ahead = seconds * len(self._workers) + self._rounds_seconds(group, one_more=scenario)
        return time.monotonic() - self._began + ahead < self._seconds_limit

    def _rounds_seconds(self, group: Sequence[Scenario], one_more: Scenario) -> float:
        """An estimate, from the warm-ups, of the rounds of a group with one more scenario."""
        each = []
        for scenario in group:
            ready = self._record.scenarios[self._workers[0].side, scenario.name].ready
            each.append(ready.warmups[-1].total_ms / 1000 / scenario.images)
        if each:
            each.append(max(each) * one_more.images)
        return 1.1 * self._requests * len(self._workers) * sum(each)

    def _prepare(self, scenario: Scenario) -> int | None:
        """Prepare a scenario on every side.

        Returns the bytes it holds, or None if it cannot run on one of them.
        """
        from bench.harness.work import CannotRun, ScenarioFailed

        self._attempts.begin(scenario.name)
        held = 0
        for worker in self._workers:
            self._log(f"{scenario.name}{self._side_of(worker)}: {scenario.what}")
            try:
                ready = worker.prepare(scenario)
            except CannotRun as reason:
                failed = isinstance(reason, ScenarioFailed)
                if not failed:
                    self._attempts.clear(scenario.name)
                side = worker.side if len(self._workers) > 1 else None
                self._record.add_not_run(scenario, side, str(reason), failed=failed)
                self._log(f"  {'FAILED' if failed else 'not run'}: {reason}")
                for earlier in self._workers[: self._workers.index(worker)]:
                    earlier.release([scenario.name])
                    del self._record.scenarios[earlier.side, scenario.name]
                return None
            new = ScenarioRecord(scenario, worker.side, ready)
            kept = self._record.scenarios.setdefault((worker.side, scenario.name), new)
            kept.ready = ready
            held += ready.held_bytes
            error = "-" if ready.error_vs_fp32 is None else f"{ready.error_vs_fp32:.4f}"
            self._log(
                f"  prepared in {ready.prepare_seconds:.1f} s; request "
                f"{ready.warmups[-1].total_ms:.1f} ms, error against float32 {error}"
            )
        self._record.clear_not_run(scenario)
        self._in_memory.append(scenario.name)
        self._attempts.clear(scenario.name)
        return held

    # Rounds

    def _time(self, group: list[Scenario]) -> None:
        from bench.harness.work import CannotRun

        requests, rounds = self._requests, self._rounds
        for index in range(rounds):
            number = self._next_round
            # Rounds differ by one request at most.
            seeds = range(index * requests // rounds, (index + 1) * requests // rounds)
            # A new order each round, so that no scenario always follows the same one.
            order = random.Random(number).sample(group, len(group))
            for scenario in order:
                for worker in self._workers if number % 2 else self._workers[::-1]:
                    record = self._record.scenarios[worker.side, scenario.name]
                    try:
                        record.requests += worker.measure(scenario.name, number, list(seeds))
                    except CannotRun as error:
                        reason = f"it failed midway: {error}"
                        self._log(f"{scenario.name}{self._side_of(worker)} FAILED: {reason}")
                        self._record.add_not_run(scenario, worker.side, reason, failed=True)
                        self._attempts.begin(scenario.name)
                        group.remove(scenario)
                        break
            self._next_round += 1
            self._record.write(partial=True)
            self._log(f"round {index + 1} of {rounds}, {len(group)} scenarios")

    def _side_of(self, worker: BenchWorker) -> str:
        return f" ({worker.side})" if len(self._workers) > 1 else ""

    def _log(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)
