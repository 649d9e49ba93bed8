"""The two sides of a comparison: one side of one result file each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from bench.errors import BenchError
from bench.harness.result_file import BenchResult, Code, MeasuredScenario, Session, Side


@dataclass(frozen=True)
class ComparedSide:
    """One side of one file."""

    name: str
    result: BenchResult
    side: Side

    @property
    def code(self) -> Code:
        """The code of the last session, which is the code that is judged."""
        last = self.result.code_in(self.result.sessions[-1])
        return next(code for code in last if code.side == self.side)

    @cached_property
    def sessions(self) -> tuple[Session, ...]:
        """The sessions with the code of the last one, on every side of the file."""
        last = _same(self.result.code_in(self.result.sessions[-1]))
        return tuple(s for s in self.result.sessions if _same(self.result.code_in(s)) == last)

    @property
    def left_out(self) -> tuple[Session, ...]:
        """The sessions with other code, whose rounds are not judged."""
        return tuple(s for s in self.result.sessions if s not in self.sessions)

    @property
    def measured(self) -> dict[str, MeasuredScenario]:
        """The scenarios by name, with the samples of all sessions."""
        return self.result.of_side(self.side)

    @cached_property
    def scenarios(self) -> dict[str, MeasuredScenario]:
        """The scenarios by name, with the samples of `sessions`; those without any are left out."""
        found = {}
        for name, scenario in self.measured.items():
            kept = tuple(
                request
                for request in scenario.requests
                if any(session.has(request.round) for session in self.sessions)
            )
            if kept:
                found[name] = replace(scenario, requests=kept)
        return found

    @property
    def revision(self) -> str:
        return self.code.revision

    def why_not_run(self, scenario: str) -> str | None:
        """The reason why a scenario has no samples; None if it was not selected."""
        for missing in self.result.not_run:
            if missing.name == scenario and missing.side in (None, self.side):
                return missing.reason
        if scenario in self.measured and scenario not in self.scenarios:
            return f"it was measured only with other code than {self.revision}"
        return None


def _same(codes: Sequence[Code]) -> tuple[object, ...]:
    """What is equal for the same code: commits that differ elsewhere have one `source`."""
    return tuple(code.source or (code.commit, code.dirty) for code in codes)


def read_sides(files: Sequence[Path]) -> tuple[ComparedSide, ComparedSide]:
    """Base and head, from one file with both or from two files with one each. Raises BenchError."""
    if len(files) > 2:
        raise BenchError(f"{len(files)} files were given; compare one or two")
    results = [BenchResult.read(path) for path in files]
    if len(files) == 1:
        name, result = files[0].name, results[0]
        if len(result.sides) != 2:
            raise BenchError(
                f"{files[0]} holds one side; give a BASE and a HEAD, or measure with --base"
            )
        return ComparedSide(name, result, "base"), ComparedSide(name, result, "head")
    for path, result in zip(files, results, strict=True):
        if len(result.sides) != 1:
            raise BenchError(f"{path} holds both sides; compare it by itself")
    base, head = (
        ComparedSide(path.name, result, result.sides[0])
        for path, result in zip(files, results, strict=True)
    )
    return base, head
