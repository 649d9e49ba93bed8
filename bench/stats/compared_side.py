"""The two sides of a comparison: one side of one result file each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError
from bench.harness.result_file import BenchResult, Code, MeasuredScenario, Side


@dataclass(frozen=True)
class ComparedSide:
    """One side of one file."""

    name: str
    result: BenchResult
    side: Side

    @property
    def code(self) -> Code:
        return self.result.code_of(self.side)

    @property
    def scenarios(self) -> dict[str, MeasuredScenario]:
        return self.result.of_side(self.side)

    @property
    def revision(self) -> str:
        commit = (self.code.commit or "no commit")[:12]
        return f"{commit} with changes" if self.code.dirty else commit

    def why_not_run(self, scenario: str) -> str | None:
        """The recorded reason why a scenario was not run; None if there is none."""
        for missing in self.result.not_run:
            if missing.name == scenario and missing.side in (None, self.side):
                return missing.reason
        return None


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
