"""Times scenarios in interleaved rounds and writes every sample down.

    python -m bench run
    python -m bench run --scenario diffusers default --requests 40 --out before.json
    python -m bench run --scenario default --base main

Scenarios that fit in memory together are timed in rounds, each in turn, so that drift befalls all
alike. With --base the same scenarios of another commit are timed in the same rounds, each commit in
a process of its own, and `python -m bench compare` says whether the difference is real. What was
measured is kept when the run is interrupted; --resume goes on with a file.

Exit status: 0 done; 1 a scenario failed; 2 wrong usage or nothing measured; 75 time was up and
--resume goes on; 130 or 143 interrupted. A scenario that needs what the machine lacks is no
failure. A scenario that failed is tried again with --resume: once, and whenever the code changed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.harness.result_file import (
    BenchResult,
    Ceilings,
    Code,
    Conditions,
    Environment,
    MeasuredScenario,
    NotRun,
    RequestSample,
    Session,
    Side,
    Workload,
)
from bench.harness.scenarios import BASELINE, SCENARIOS, Scenario, chosen

if TYPE_CHECKING:
    from bench.harness.drive import Work
    from bench.harness.worker import Asked, Ready

TIME_IS_UP = 75
"""Exit status: the rest is for another call with --resume."""

ATTEMPTS = 2
"""How often a scenario may fail, or be cut off while it gets ready, with the same code."""
NO_TIME = "there was no time left for it"

MEMORY_SPARE = 1.3
"""A further scenario is started where this times the largest so far is free."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(scenario.name for scenario in SCENARIOS)
    parser.add_argument(
        "--scenario", nargs="+", metavar="NAME", help=f"which (default: all): {names}"
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        metavar="NAME",
        help=f"also time these in every round, of a file gone on with too (default: "
        f"{BASELINE.name} where it is asked for)",
    )
    parser.add_argument("--model", help="as SDXL_MODEL (default: demo without a CUDA device)")
    parser.add_argument("--device", default="auto", help="as SDXL_DEVICE (default: auto)")
    parser.add_argument("--shape", metavar="WxH", help="image size (default: the model's first)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument(
        "--requests", type=int, default=20, help="timed requests a scenario (default: 20)"
    )
    parser.add_argument(
        "--rounds", type=int, help="rounds they are spread over (default: one each)"
    )
    parser.add_argument("--base", metavar="REV", help="time this commit beside the present one")
    parser.add_argument("--out", type=Path, help="result file (default: bench-DEVICE-DATE.json)")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="write to, or go on with, DIR/MACHINE-DATE-bench.json",
    )
    parser.add_argument("--resume", action="store_true", help="go on with --out where it exists")
    parser.add_argument(
        "--price-per-hour", type=float, metavar="X", help="of the machine, for the cost of images"
    )
    parser.add_argument(
        "--seconds-limit", type=float, metavar="S", help="start nothing that would end later"
    )
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    scenarios = chosen(options.scenario and [*options.scenario, *(options.beside or ())])
    _refuse_nonsense(options)
    from bench.harness.device_lock import only_bench_on
    from bench.harness.drive import choose_work
    from bench.harness.environment import machine_slug
    from bench.harness.worker import LocalSide, RemoteSide

    work = choose_work(options.model, options.device, options.shape, options.steps)
    out = options.out
    if options.results is not None:
        name = f"{machine_slug(work.device)}-{time.strftime('%Y-%m-%d', time.gmtime())}-bench.json"
        out, options.resume = options.results / name, True
    out = out or Path(f"bench-{machine_slug(work.device)}-{time.strftime('%Y%m%d-%H%M%S')}.json")
    with ExitStack() as stack:
        stack.enter_context(only_bench_on(work.device))
        stack.enter_context(_signals_interrupt())
        sides: list[Asked] = []
        if options.base is None:
            sides.append(LocalSide(work, "head", options.commit))
        else:
            from bench.harness.environment import ROOT
            from bench.harness.worktree import worktree

            place, commit = stack.enter_context(worktree(options.base, ROOT))
            told = {"model": work.model, "device": work.device, "steps": work.steps}
            told["shape"] = str(work.shape)
            for root, side, revision in ((place, "base", commit), (ROOT, "head", options.commit)):
                sides.append(RemoteSide(root, told, side, revision))  # type: ignore[arg-type]
                stack.callback(sides[-1].close)
        bench = Bench(work, sides, out, options)
        status = bench.measure(scenarios)
        if status > TIME_IS_UP and options.base is None:
            # To finalise the interpreter under a thread in native code would abort the process.
            sys.stdout.flush()
            os._exit(status)
        return status


def _refuse_nonsense(options: argparse.Namespace) -> None:
    rounds = options.requests if options.rounds is None else options.rounds
    if options.requests < 1 or not 1 <= rounds <= options.requests:
        raise BenchError(
            "--requests and --rounds: 1 and more, and no more rounds than requests, are"
        )
    if options.price_per_hour is not None and not options.price_per_hour > 0:
        raise BenchError("--price-per-hour must be above 0")
    if options.out is not None and options.results is not None:
        raise BenchError("--out and --results both name the file: one of them is allowed")
    if options.resume and options.out is None and options.results is None:
        raise BenchError("--resume needs --out, the file to go on with")
    if options.out is not None and options.out.exists() and not options.resume:
        raise BenchError(
            f"{options.out} exists: --resume goes on with it; another name starts anew"
        )


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Either signal raises where the main thread is, so that a compile of minutes ends too."""

    def interrupt(number: int, _frame: object) -> None:
        raise Interrupted(number)

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Attempts:
    """How often each scenario was tried without success, in a file beside the result.

    A process that is killed says nothing, so an attempt is written down before it begins. Attempts
    count for the code they were made with: changed code starts from none.
    """

    def __init__(self, out: Path | None, code: str) -> None:
        self._path = None if out is None else out.with_name(f".{out.name}.attempts")
        self._code = code
        self._counts: dict[str, int] = {}
        if self._path is not None and self._path.exists():
            kept = json.loads(self._path.read_text())
            if kept["code"] == code:
                self._counts = kept["counts"]

    def spent(self, name: str) -> bool:
        """Whether it has had its chances."""
        return self._counts.get(name, 0) >= ATTEMPTS

    def begin(self, name: str) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1
        self._keep()

    def end(self, name: str) -> None:
        """It succeeded, or needs what is not here."""
        self._counts.pop(name, None)
        self._keep()

    def _keep(self) -> None:
        if self._path is not None and self._counts:
            self._path.write_text(json.dumps({"code": self._code, "counts": self._counts}))
        elif self._path is not None:
            self._path.unlink(missing_ok=True)


def code_digest() -> str:
    """Of everything that may decide whether a scenario fails."""
    from bench.harness.environment import MEASURED, ROOT, source_digest

    return source_digest(ROOT, (*MEASURED, "bench"))


@dataclass
class Row:
    """One scenario on one side while it is measured."""

    scenario: Scenario
    side: Side
    ready: Ready | None
    requests: list[RequestSample] = field(default_factory=list)

    def measured(self, before: MeasuredScenario | None) -> MeasuredScenario | None:
        """What the file says of it, after what an earlier session measured."""
        if before is not None:
            return replace(before, requests=(*before.requests, *self.requests))
        if not self.requests:
            return None
        scenario, ready = self.scenario, self.ready
        assert ready is not None
        return MeasuredScenario(
            name=scenario.name,
            side=self.side,
            what=scenario.what,
            dtype=ready.dtype,
            requests=tuple(self.requests),
            warmups=ready.warmups,
            images=scenario.images,
            steps=scenario.steps,
            settings=scenario.settings,
            calibration=scenario.calibration,
            lossy=scenario.lossy,
            prepare_seconds=ready.prepare_seconds,
            peak_memory_bytes=ready.peak_memory_bytes,
            flops=ready.flops,
            error_vs_fp32=ready.error_vs_fp32,
        )


class Bench:
    """One run: scenarios got ready in groups that fit, timed in rounds, and written down."""

    def __init__(
        self, work: Work, sides: Sequence[Asked], out: Path, options: argparse.Namespace
    ) -> None:
        self._work, self._sides, self._out = work, sides, out
        self._requests: int = options.requests
        self._rounds: int = options.rounds or options.requests
        self._limit: float | None = options.seconds_limit
        self._price: float | None = options.price_per_hour
        self._resume: bool = options.resume
        self._beside = chosen(options.beside or [BASELINE.name])
        self._began = time.monotonic()
        self._rows: dict[tuple[Side, str], Row] = {}
        self._not_run: dict[tuple[Side | None, str], NotRun] = {}
        self._earlier: BenchResult | None = None
        self._next_round = 0
        self._first_round = 0
        self._postponed = False
        self._end: Conditions | None = None
        self._ceilings: Ceilings | None = None
        self._in_memory: list[str] = []
        self._has_started_one = False
        self._attempts = Attempts(out if options.resume else None, code_digest())

    def measure(self, scenarios: Sequence[Scenario]) -> int:
        """Returns the exit status. Raises BenchError."""
        from bench.harness.environment import conditions, describe_machine, measure_ceilings

        self._environment: Environment = describe_machine(self._work.device)
        self._codes: tuple[Code, ...] = tuple(side.code() for side in self._sides)
        self._go_on_with_file()
        self._asked = list(scenarios)
        left = [s for s in scenarios if not self._settled(s)]
        if self._earlier is not None and not left:
            self._say(f"{self._out} has every scenario that was asked for, or why it cannot")
            return self._failed_status()
        self._start = conditions(self._work.device)
        status = 0
        try:
            self._ceilings = measure_ceilings(self._work.device)
            while left and not self._postponed:
                left = self._group(left)
            self._end = conditions(self._work.device)
            self._write()
            status = TIME_IS_UP if self._postponed and self._resume else self._failed_status()
        except Interrupted as interrupted:
            status = 128 + interrupted.number
            self._say("interrupted: what was measured is kept")
            if any(row.requests for row in self._rows.values()):
                self._write(partial=True)
        if status <= TIME_IS_UP:
            for side in self._sides:
                side.close()
        self._tell()
        if not self._measured():
            if status:
                return status
            reasons = "; ".join(f"{n.name}: {n.reason}" for n in self._not_run.values())
            raise BenchError(f"no scenario could be measured ({reasons})")
        return status

    def _failed_status(self) -> int:
        """The exit status where time was not the reason to end."""
        asked = {scenario.name for scenario in self._asked}
        return int(any(n.failed and n.name in asked for n in self._not_run.values()))

    # A file from before

    def _go_on_with_file(self) -> None:
        if not self._resume or not self._out.exists():
            return
        earlier = BenchResult.read(self._out)
        # The code may have changed: a scenario that failed is repaired and tried again. Each
        # session names the code it ran, and scenarios are compared within rounds of one session.
        for what, then, now in (
            ("workload", earlier.workload, self._workload()),
            ("machine", earlier.environment, self._environment),
            ("code", _comparable(earlier.code), _comparable(self._codes)),
        ):
            if then != now:
                raise BenchError(
                    f"{self._out} was measured with another {what}: --resume goes on only with "
                    f"the same; {_difference(then, now)}"
                )
        self._earlier = earlier
        last = earlier.sessions[-1]
        self._next_round = self._first_round = last.first_round + last.rounds
        self._not_run = {(n.side, n.name): n for n in earlier.not_run}

    def _settled(self, scenario: Scenario) -> bool:
        """Whether the file has it, or why it cannot be there."""
        if self._earlier is None:
            return False
        have = {(s.side, s.name): len(s.requests) for s in self._earlier.scenarios}
        if all(have.get((s.side, scenario.name), 0) >= self._requests for s in self._sides):
            return True
        missing = [n for key, n in self._not_run.items() if key[1] == scenario.name]
        if any(n.failed for n in missing):
            return self._attempts.spent(scenario.name)
        return any(n.reason != NO_TIME for n in missing)

    # Groups and rounds

    def _group(self, left: list[Scenario]) -> list[Scenario]:
        """Get ready as many as fit, time them in rounds, give them back; returns what is left."""
        group: list[Scenario] = []
        largest = 0
        # Beside every group, so that groups and sessions can be told apart by the machine's state;
        # after the group's first, so that there is one where only one fits.
        beside = [s for s in self._beside if s in self._asked and s not in left]
        for scenario in left:
            if group and not self._fits(largest):
                break
            if not self._in_time(scenario, group):
                self._postponed = True
                self._cannot(scenario, None, NO_TIME)
                continue
            if self._attempts.spent(scenario.name):
                reason = "it was cut off while getting ready, twice"
                self._cannot(scenario, None, reason, failed=True)
                continue
            held = self._get_ready(scenario)
            if held is None:
                continue
            largest = max(largest, held)
            group.append(scenario)
            self._has_started_one = True
            while beside and self._fits(largest):
                known = beside.pop(0)
                held = self._get_ready(known)
                if held is not None:
                    largest = max(largest, held)
                    group.append(known)
        rest = [s for s in left if s not in group and not self._tried(s)]
        if group:
            self._time(group)
            self._end_group()
        return rest

    def _tried(self, scenario: Scenario) -> bool:
        return any(name == scenario.name for _, name in self._not_run)

    def _fits(self, largest: int) -> bool:
        """Whether a scenario like the largest so far would fit beside what is in memory."""
        return all(side.free_bytes() >= MEMORY_SPARE * largest for side in self._sides)

    def _in_time(self, scenario: Scenario, group: Sequence[Scenario]) -> bool:
        if self._limit is None:
            return True
        if self._resume and not self._has_started_one:
            # Each call of a resumed run starts something, or it would never end.
            return True
        seconds = scenario.prepare_seconds[0 if self._work.on_cuda else 1]
        ahead = seconds * len(self._sides) + self._rounds_seconds(group, one_more=scenario)
        return time.monotonic() - self._began + ahead < self._limit

    def _rounds_seconds(self, group: Sequence[Scenario], one_more: Scenario) -> float:
        """What the rounds of a group will take, and with one more scenario, from its warm-ups."""
        each = []
        for scenario in group:
            row = self._rows[self._sides[0].side, scenario.name]
            assert row.ready is not None
            each.append(row.ready.warmups[-1].total_ms / 1000 / scenario.images)
        if each:
            each.append(max(each) * one_more.images)
        return 1.1 * self._requests * len(self._sides) * sum(each)

    def _get_ready(self, scenario: Scenario) -> int | None:
        """Bytes it holds once it is ready on every side; None where it cannot run."""
        from bench.harness.drive import CannotRun, ScenarioFailed

        self._attempts.begin(scenario.name)
        held = 0
        for side in self._sides:
            self._say(f"{scenario.name}{self._of(side)}: {scenario.what}")
            try:
                ready = side.prepare(scenario)
            except CannotRun as reason:
                failed = isinstance(reason, ScenarioFailed)
                if not failed:
                    self._attempts.end(scenario.name)
                which = side.side if len(self._sides) > 1 else None
                self._cannot(scenario, which, str(reason), failed=failed)
                self._say(f"  {'FAILED' if failed else 'not run'}: {reason}")
                for earlier in self._sides[: self._sides.index(side)]:
                    earlier.release([scenario.name])
                    del self._rows[earlier.side, scenario.name]
                return None
            row = self._rows.setdefault((side.side, scenario.name), Row(scenario, side.side, ready))
            row.ready = ready
            held += ready.held_bytes
            error = "-" if ready.error_vs_fp32 is None else f"{ready.error_vs_fp32:.4f}"
            self._say(
                f"  ready in {ready.prepare_seconds:.1f} s; "
                f"{ready.warmups[-1].total_ms:.1f} ms, error {error}"
            )
        self._not_run = {key: n for key, n in self._not_run.items() if key[1] != scenario.name}
        self._in_memory.append(scenario.name)
        self._attempts.end(scenario.name)
        return held

    def _time(self, group: list[Scenario]) -> None:
        from bench.harness.drive import CannotRun

        per_round = -(-self._requests // self._rounds)
        for index in range(self._rounds):
            number = self._next_round
            seeds = range(index * per_round, min(self._requests, (index + 1) * per_round))
            if not seeds:
                break
            # In a new order each time, so that nobody always follows the same neighbour.
            order = random.Random(number).sample(group, len(group))
            for scenario in order:
                sides = self._sides if number % 2 else self._sides[::-1]
                for side in sides:
                    row = self._rows[side.side, scenario.name]
                    try:
                        row.requests += side.measure(scenario.name, number, list(seeds))
                    except CannotRun as reason:
                        self._say(f"{scenario.name}{self._of(side)} FAILED midway: {reason}")
                        reason_midway = f"it failed midway: {reason}"
                        self._cannot(scenario, side.side, reason_midway, failed=True)
                        self._attempts.begin(scenario.name)
                        group.remove(scenario)
                        break
            self._next_round += 1
            self._write(partial=True)
            self._say(f"round {index + 1} of {self._rounds}, {len(group)} scenarios")

    def _end_group(self) -> None:
        for side in self._sides:
            side.release(self._in_memory)
        self._in_memory = []

    # Telling

    def _cannot(
        self, scenario: Scenario, side: Side | None, reason: str, *, failed: bool = False
    ) -> None:
        self._not_run[side, scenario.name] = NotRun(scenario.name, reason, side, failed)

    def _of(self, side: Asked) -> str:
        return f" ({side.side})" if len(self._sides) > 1 else ""

    def _workload(self) -> Workload:
        work = self._work
        return Workload(work.model, str(work.shape), work.steps, guidance=True)

    def _measured(self) -> list[MeasuredScenario]:
        """Every scenario with samples, in the stack's order."""
        earlier = (
            {} if self._earlier is None else {(s.side, s.name): s for s in self._earlier.scenarios}
        )
        found = []
        for scenario in SCENARIOS:
            for side in self._sides:
                key = (side.side, scenario.name)
                row, before = self._rows.get(key), earlier.get(key)
                measured = before if row is None else row.measured(before)
                if measured is not None:
                    found.append(measured)
        return found

    def _write(self, partial: bool = False) -> None:
        scenarios = self._measured()
        if not scenarios:
            return
        sessions = () if self._earlier is None else self._earlier.sessions
        code = self._codes if self._earlier is None else self._earlier.code
        # A round that was interrupted has samples, and counts.
        begun = [1 + r.round for row in self._rows.values() for r in row.requests]
        rounds = max(begun, default=self._first_round) - self._first_round
        if rounds:
            other = () if self._codes == code else self._codes
            session = Session(
                self._first_round, rounds, self._start, self._end, self._ceilings, other
            )
            sessions = (*sessions, session)
        kept = {(s.side, s.name) for s in scenarios}
        result = BenchResult(
            command=_command(),
            workload=self._workload(),
            environment=self._environment,
            code=code,
            sessions=sessions,
            scenarios=tuple(scenarios),
            not_run=tuple(n for key, n in self._not_run.items() if n.failed or key not in kept),
            partial=partial,
            price_per_hour=self._price,
        )
        result.write(self._out)

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)

    def _tell(self) -> None:
        """The figures in short; `show` and `compare` have more to say."""
        scenarios = self._measured()
        if not scenarios:
            return
        first = scenarios[0]
        print(
            f"{'scenario':20} {'step ms':>9} {'of first':>9} {'request ms':>11} {'error':>8}  what"
        )
        for s in scenarios:
            name = s.name if len(self._sides) == 1 else f"{s.name} {s.side}"
            error = "" if s.error_vs_fp32 is None else f"{s.error_vs_fp32:.4f}"
            print(
                f"{name:20} {s.step_ms:9.3f} {s.step_ms / first.step_ms:9.3f} "
                f"{s.request_ms:11.2f} {error:>8}  {s.what}"
            )
        for n in self._not_run.values():
            print(f"{n.name:20} {'' if n.failed else 'not run: '}{n.why}")
        print(f"written to {self._out}")


def _comparable(codes: tuple[Code, ...]) -> tuple[Code, ...]:
    """What must stay the same through a file: the sides, and the versions of the libraries."""
    return tuple(replace(code, commit=None, dirty=False, source=None) for code in codes)


def _difference(then: Any, now: Any) -> str:
    """The first field in which two dataclasses, or tuples of them, differ."""
    if isinstance(then, tuple):
        pairs = [(a, b) for a, b in zip(then, now, strict=False) if a != b]
        return _difference(*pairs[0]) if pairs else f"{len(then)} sides then, {len(now)} now"
    name = next(n for n in vars(then) if getattr(then, n) != getattr(now, n))
    return f"{name} was {getattr(then, name)!r} and is {getattr(now, name)!r}"


def _command() -> str:
    """How to run it again, without paths of this machine."""
    arguments = [Path(a).name if "/" in a and Path(a).is_absolute() else a for a in sys.argv[1:]]
    return shlex.join(["python", "-m", "bench", *arguments])
