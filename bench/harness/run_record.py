"""What a run has measured so far, its result file, and the failed attempts beside that file.

Nothing here measures. `RunRecord` continues an existing file and replaces it after each round.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.harness.result_file import (
    BenchResult,
    Ceilings,
    Code,
    Conditions,
    MeasuredScenario,
    NotRun,
    RequestSample,
    Session,
    Side,
    Workload,
)
from bench.harness.scenarios import SCENARIOS, Scenario

if TYPE_CHECKING:
    from bench.harness.work import Work
    from bench.harness.worker import Ready

ATTEMPTS = 2
"""How often a scenario may fail, or be interrupted while it is prepared, with the same code."""
NO_TIME = "there was no time left for it"
"""The reason in a result file for a scenario that a later call with --resume measures."""


# Attempts ----------------------------------------------------------------------------------------


class Attempts:
    """How often each scenario was tried without success, in a file beside the result file.

    A process that is killed cannot write, so an attempt is written before it begins. Attempts are
    counted for one state of the code: when the code changes, the counts start at zero.
    """

    def __init__(self, out: Path | None, code: str) -> None:
        self._path = None if out is None else out.with_name(f".{out.name}.attempts")
        self._code = code
        self._counts: dict[str, int] = {}
        if self._path is not None and self._path.exists():
            kept = json.loads(self._path.read_text())
            if kept["code"] == code:
                self._counts = kept["counts"]

    def exhausted(self, name: str) -> bool:
        """Whether the scenario was tried as often as is allowed."""
        return self._counts.get(name, 0) >= ATTEMPTS

    def begin(self, name: str) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1
        self._write()

    def clear(self, name: str) -> None:
        """Forget a scenario's attempts: it succeeded, or cannot run on this machine."""
        self._counts.pop(name, None)
        self._write()

    def _write(self) -> None:
        if self._path is not None and self._counts:
            self._path.write_text(json.dumps({"code": self._code, "counts": self._counts}))
        elif self._path is not None:
            self._path.unlink(missing_ok=True)


def code_digest() -> str:
    """A digest of all code that may decide whether a scenario fails."""
    from bench.harness.environment import MEASURED, ROOT, source_digest

    return source_digest(ROOT, (*MEASURED, "bench"))


# The record --------------------------------------------------------------------------------------


@dataclass
class ScenarioRecord:
    """One scenario on one side while it is measured."""

    scenario: Scenario
    side: Side
    ready: Ready
    requests: list[RequestSample] = field(default_factory=list)

    def measured(
        self, earlier: MeasuredScenario | None, *, same_code: bool
    ) -> MeasuredScenario | None:
        """The entry in the result file, which starts with what an earlier call measured.

        Its other fields are of the code that was measured last.
        """
        if not self.requests:
            return earlier
        before = () if earlier is None else earlier.requests
        if earlier is not None and same_code:
            return replace(earlier, requests=(*before, *self.requests))
        scenario, ready = self.scenario, self.ready
        return MeasuredScenario(
            name=scenario.name,
            side=self.side,
            what=scenario.what,
            dtype=ready.dtype,
            requests=(*before, *self.requests),
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


class RunRecord:
    """The samples of one call of the bench, after those of earlier calls in the same file."""

    def __init__(
        self, path: Path, work: Work, codes: Sequence[Code], price_per_hour: float | None
    ) -> None:
        from bench.harness.environment import describe_machine

        self.path = path
        self._codes = tuple(codes)
        self._workload = Workload(work.model, str(work.shape), work.steps, guidance=True)
        self._environment = describe_machine(work.device)
        self._price_per_hour = price_per_hour
        self._earlier: BenchResult | None = None
        self.scenarios: dict[tuple[Side, str], ScenarioRecord] = {}
        self.not_run: dict[tuple[Side | None, str], NotRun] = {}
        self.first_round = 0
        """The number of this call's first round."""
        self.start: Conditions | None = None
        self.end: Conditions | None = None
        self.ceilings: Ceilings | None = None

    @property
    def continues(self) -> bool:
        """Whether the file holds samples of earlier calls."""
        return self._earlier is not None

    def continue_file(self) -> None:
        """Read the file and number the rounds after its last.

        Raises:
            BenchError: it was measured with another workload, machine or library version.
        """
        earlier = BenchResult.read(self.path)
        # The code may differ: a scenario that failed is repaired and tried again. Each session in
        # the file names its code, and `compare` leaves out the rounds of other code than the last.
        for what, then, now in (
            ("workload", earlier.workload, self._workload),
            ("machine", earlier.environment, self._environment),
            ("code", _without_commit(earlier.code), _without_commit(self._codes)),
        ):
            if then != now:
                raise BenchError(
                    f"{self.path} was measured with another {what}, and --resume continues only "
                    f"with the same: {_difference(then, now)}"
                )
        self._earlier = earlier
        last = earlier.sessions[-1]
        self.first_round = last.first_round + last.rounds
        self.not_run = {(n.side, n.name): n for n in earlier.not_run}

    def is_settled(self, scenario: Scenario, requests: int, attempts: Attempts) -> bool:
        """Whether the file has all samples of a scenario, or a reason that stays true."""
        if self._earlier is None:
            return False
        counts = {(s.side, s.name): len(s.requests) for s in self._earlier.scenarios}
        if all(counts.get((code.side, scenario.name), 0) >= requests for code in self._codes):
            return True
        missing = [n for key, n in self.not_run.items() if key[1] == scenario.name]
        if any(n.failed for n in missing):
            return attempts.exhausted(scenario.name)
        return any(n.reason != NO_TIME for n in missing)

    def add_not_run(
        self, scenario: Scenario, side: Side | None, reason: str, *, failed: bool = False
    ) -> None:
        """Record why a scenario has no samples, or no more; `side` None means all sides."""
        self.not_run[side, scenario.name] = NotRun(scenario.name, reason, side, failed)

    def clear_not_run(self, scenario: Scenario) -> None:
        self.not_run = {key: n for key, n in self.not_run.items() if key[1] != scenario.name}

    def measured(self) -> list[MeasuredScenario]:
        """Every scenario with samples, in the order of SCENARIOS."""
        earlier = (
            {} if self._earlier is None else {(s.side, s.name): s for s in self._earlier.scenarios}
        )
        found = []
        for scenario in SCENARIOS:
            for code in self._codes:
                key = (code.side, scenario.name)
                record, before = self.scenarios.get(key), earlier.get(key)
                entry = before
                if record is not None:
                    entry = record.measured(before, same_code=self._was_of_this_code(before))
                if entry is not None:
                    found.append(entry)
        return found

    def _was_of_this_code(self, earlier: MeasuredScenario | None) -> bool:
        """Whether a scenario's last samples in the file are of the code of this call."""
        if self._earlier is None or earlier is None:
            return False
        last = max(request.round for request in earlier.requests)
        session = next(s for s in self._earlier.sessions if s.has(last))
        return self._earlier.code_in(session) == self._codes

    def write(self, partial: bool = False) -> None:
        """Replace the file, if there is any sample."""
        scenarios = self.measured()
        if not scenarios:
            return
        sessions = () if self._earlier is None else self._earlier.sessions
        code = self._codes if self._earlier is None else self._earlier.code
        # A round that was interrupted has samples, so it counts.
        begun = [1 + r.round for record in self.scenarios.values() for r in record.requests]
        rounds = max(begun, default=self.first_round) - self.first_round
        if rounds:
            assert self.start is not None
            other = () if self._codes == code else self._codes
            session = Session(self.first_round, rounds, self.start, self.end, self.ceilings, other)
            sessions = (*sessions, session)
        have_samples = {(s.side, s.name) for s in scenarios}
        result = BenchResult(
            command=_command(),
            workload=self._workload,
            environment=self._environment,
            code=code,
            sessions=sessions,
            scenarios=tuple(scenarios),
            not_run=tuple(
                n for key, n in self.not_run.items() if n.failed or key not in have_samples
            ),
            partial=partial,
            price_per_hour=self._price_per_hour,
        )
        result.write(self.path)


def _without_commit(codes: tuple[Code, ...]) -> tuple[Code, ...]:
    """What must stay the same in a file: the sides and the versions of the libraries."""
    return tuple(replace(code, commit=None, dirty=False, source=None) for code in codes)


def _difference(then: Any, now: Any) -> str:
    """The first field in which two dataclasses, or tuples of them, differ."""
    if isinstance(then, tuple):
        pairs = [(a, b) for a, b in zip(then, now, strict=False) if a != b]
        return _difference(*pairs[0]) if pairs else f"{len(then)} sides then, {len(now)} now"
    name = next(n for n in vars(then) if getattr(then, n) != getattr(now, n))
    return f"{name} was {getattr(then, name)!r} and is {getattr(now, name)!r}"


def _command() -> str:
    """The command that repeats this run, without paths of this machine."""
    arguments = [Path(a).name if "/" in a and Path(a).is_absolute() else a for a in sys.argv[1:]]
    return shlex.join(["python", "-m", "bench", *arguments])
