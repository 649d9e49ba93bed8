"""Judge whether HEAD is faster than BASE, by how much, and whether the difference is real.

    python -m bench compare RESULT        one file with both sides, as `bench run --base` writes it
    python -m bench compare BASE HEAD     two files; judged relative to a calibration scenario

Each row is one quantity of one scenario. The interval is of the ratio head / base. It is wide
enough for all rows together: where nothing changed, at most 5 of 100 comparisons call any row
different.

    improved        faster by at least the smallest change that matters
    regressed       slower by at least the smallest change that matters
    no difference   any change is smaller than that
    inconclusive    these samples do not decide; the reason says what would
    not interleaved separate runs, and no calibration shows that the machine was in the same state
    not comparable  different machines, workloads or versions, which are named

A file that was continued after the code changed is judged by the rounds of its last session's code.

Exit status: 0 no regression, 1 something regressed, 2 wrong usage or input, 3 nothing regressed
but something could not be decided.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.harness.result_file import BenchResult
from bench.stats.compared_side import ComparedSide, read_sides
from bench.stats.differences import SCENARIO_FACTS, differences, facts, not_comparable, notes
from bench.stats.verdict import (
    ERROR_RATE,
    SMALLEST_CHANGE,
    Judgement,
    by_round,
    judge,
    judge_separate,
)
from bench.terminal import coloured, percent, table

QUANTITIES = ("step", "request", "text_encode", "vae_decode", "image_encode", "cpu")
DEFAULT_QUANTITIES = ("step", "request")
REGRESSED, UNDECIDED = 1, 3
COLOURS = {"improved": "green", "regressed": "red", "no difference": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="BASE and HEAD, or one file with both"
    )
    parser.add_argument(
        "--smallest-change",
        type=share,
        default=SMALLEST_CHANGE,
        metavar="SHARE",
        help="the smallest change that matters, as 1%% or 0.01 (default: 1%%)",
    )
    parser.add_argument(
        "--quantity",
        nargs="+",
        choices=QUANTITIES,
        default=DEFAULT_QUANTITIES,
        help="quantities to judge (default: a steady step, and the whole request)",
    )
    parser.add_argument("--scenario", nargs="+", metavar="NAME", help="judge only these scenarios")
    parser.add_argument(
        "--allow",
        nargs="+",
        default=(),
        metavar="WHAT",
        help="compare although these differ, by the names in the reason of `not comparable`",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def share(text: str) -> float:
    """Parse `1%` or `0.01`; between 0 and one half."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 0.5:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a share between 0 and 50%, such as 1% or 0.01"
        )
    return value


def run(options: argparse.Namespace) -> int:
    base, head = read_sides(options.files)
    comparison = compare(
        base,
        head,
        quantities=options.quantity,
        scenarios=options.scenario,
        smallest_change=options.smallest_change,
        allow=options.allow,
    )
    if options.json:
        print(json.dumps(comparison.as_json(), indent=1, allow_nan=False))
    else:
        print(comparison.as_text())
    return comparison.exit_status


@dataclass(frozen=True)
class Row:
    """One quantity of one scenario."""

    scenario: str
    quantity: str
    base_ms: float | None
    head_ms: float | None
    judgement: Judgement


@dataclass(frozen=True)
class Comparison:
    """Every judgement on two sides, and what a reader should know beside them."""

    base: ComparedSide
    head: ComparedSide
    smallest_change: float
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def interleaved(self) -> bool:
        return self.base.result is self.head.result

    @property
    def exit_status(self) -> int:
        verdicts = {row.judgement.verdict for row in self.rows}
        if "regressed" in verdicts:
            return REGRESSED
        return 0 if verdicts <= {"improved", "no difference"} else UNDECIDED

    def as_json(self) -> dict[str, Any]:
        """The comparison for `--json`; ratios are head over base."""
        return {
            "base": {"file": self.base.name, **asdict(self.base.code)},
            "head": {"file": self.head.name, **asdict(self.head.code)},
            "interleaved": self.interleaved,
            "smallest_change": self.smallest_change,
            "error_rate": ERROR_RATE,
            "rows": [
                {
                    "scenario": row.scenario,
                    "quantity": row.quantity,
                    "base_ms": row.base_ms,
                    "head_ms": row.head_ms,
                    **asdict(row.judgement),
                }
                for row in self.rows
            ],
            "notes": list(self.notes),
            "exit_status": self.exit_status,
        }

    def as_text(self) -> str:
        header = ("scenario", "quantity", "base", "head", "change", "interval", "verdict")
        cells = [
            (
                row.scenario,
                row.quantity,
                _milliseconds(row.base_ms),
                _milliseconds(row.head_ms),
                *change(row.judgement),
                row.judgement.verdict,
            )
            for row in self.rows
        ]
        colours = [COLOURS.get(row.judgement.verdict, "yellow") for row in self.rows]
        workload = self.head.result.workload
        what = f"{workload.model}, {workload.shape}, {workload.steps} steps"
        how = "interleaved" if self.interleaved else "not interleaved"
        matters = f"{100 * self.smallest_change:.3g}%"
        parts = [
            f"base  {self.base.revision}  {self.base.name}",
            f"head  {self.head.revision}  {self.head.name}",
            f"{what}, on {machine(self.head.result)}, {how}; changes under {matters} do not matter",
            "",
            table(header, cells, left=2, colours=colours),
        ]
        reasons = _grouped_reasons(self.rows)
        if reasons or self.notes:
            parts.append("")
        parts += reasons
        parts += [coloured(f"note: {note}", "faint") for note in self.notes]
        return "\n".join(parts)


def change(judgement: Judgement) -> tuple[str, str]:
    """The change and its interval as signed percentages; empty strings if there is none."""
    if judgement.ratio is None or judgement.low is None or judgement.high is None:
        return "", ""
    interval = f"{percent(judgement.low - 1)} to {percent(judgement.high - 1)}"
    return percent(judgement.ratio - 1), interval


def machine(result: BenchResult) -> str:
    """The machine in a few words."""
    environment = result.environment
    if environment.gpu is not None and environment.device == "cuda":
        return environment.gpu
    cores = environment.cores
    return f"{cores} core{'' if cores == 1 else 's'} of {environment.cpu}"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} ms"


def _grouped_reasons(rows: Sequence[Row]) -> list[str]:
    """Each reason once, after the names of its rows."""
    of_reason: dict[str, list[str]] = {}
    for row in rows:
        if row.judgement.reason:
            of_reason.setdefault(row.judgement.reason, []).append(f"{row.scenario} {row.quantity}")
    return [
        f"{'all' if len(names) == len(rows) > 1 else ', '.join(names)}: {reason}"
        for reason, names in of_reason.items()
    ]


def compare(
    base: ComparedSide,
    head: ComparedSide,
    *,
    quantities: Sequence[str] = DEFAULT_QUANTITIES,
    scenarios: Sequence[str] | None = None,
    smallest_change: float = SMALLEST_CHANGE,
    allow: Sequence[str] = (),
) -> Comparison:
    """Judge every quantity of every scenario that was selected on both sides.

    Raises:
        BenchError: there is no such scenario, or `allow` has an unknown name.
    """
    names = _compared_names(base, head, scenarios)
    may_differ = {*facts(base), *facts(head), *SCENARIO_FACTS}
    for name in allow:
        if name not in may_differ:
            raise BenchError(f"--allow {name}: unknown; use one of {', '.join(sorted(may_differ))}")
    different = [
        f"{name} ({was} and {became})"
        for name, was, became in differences(base, head)
        if name not in allow
    ]
    error_rate = ERROR_RATE / (len(names) * len(quantities))
    interleaved = base.result is head.result
    distrust = _broken_control(base, head, smallest_change) if interleaved else None
    rows = []
    for name in names:
        here, there = base.scenarios.get(name), head.scenarios.get(name)
        for quantity in quantities:
            judgement = not_comparable(base, head, name, different, allow)
            of_base = {} if here is None else by_round(here, quantity)
            of_head = {} if there is None else by_round(there, quantity)
            if judgement is None and not (of_base and of_head):
                judgement = Judgement("not comparable", f"{quantity} was not measured on both")
            if judgement is None and distrust is not None:
                judgement = Judgement("inconclusive", distrust)
            if judgement is None and interleaved:
                judgement = judge(
                    of_base, of_head, smallest_change=smallest_change, error_rate=error_rate
                )
            if judgement is None:
                judgement = _judge_by_calibration(
                    base, head, name, quantity, smallest_change, error_rate
                )
            rows.append(Row(name, quantity, _median(of_base), _median(of_head), judgement))
    return Comparison(base, head, smallest_change, tuple(rows), tuple(notes(base, head, names)))


def _median(figures: dict[int, float]) -> float | None:
    return statistics.median(figures.values()) if figures else None


def _compared_names(
    base: ComparedSide, head: ComparedSide, wanted: Sequence[str] | None
) -> list[str]:
    """The scenarios that were selected on both sides, in head's order, without the calibration."""
    known = {**head.measured, **base.measured}
    if wanted is not None:
        unknown = [name for name in wanted if name not in known]
        if unknown:
            raise BenchError(
                f"no scenario {', '.join(unknown)} was measured; there are {', '.join(known)}"
            )
        return list(dict.fromkeys(wanted))
    names = [
        name
        for name, scenario in known.items()
        if not scenario.calibration
        and (name in head.scenarios or head.why_not_run(name))
        and (name in base.scenarios or base.why_not_run(name))
    ]
    if not names:
        raise BenchError(
            f"{base.name} and {head.name} have no scenario in common: one has "
            f"{', '.join(base.measured)}, the other {', '.join(head.measured)}"
        )
    return names


def _judge_by_calibration(
    base: ComparedSide,
    head: ComparedSide,
    name: str,
    quantity: str,
    smallest_change: float,
    error_rate: float,
) -> Judgement:
    """Judge two runs relative to the first calibration scenario that both timed.

    A calibration scenario is never judged relative to itself.
    """
    for calibration, scenario in base.scenarios.items():
        other = head.scenarios.get(calibration)
        if not scenario.calibration or other is None or not other.calibration:
            continue
        if calibration == name:
            continue
        # A stage that the calibration does not time is taken relative to its steps.
        timed = by_round(scenario, quantity) and by_round(other, quantity)
        return judge_separate(
            by_round(base.scenarios[name], quantity),
            by_round(head.scenarios[name], quantity),
            by_round(scenario, quantity if timed else "step"),
            by_round(other, quantity if timed else "step"),
            smallest_change=smallest_change,
            error_rate=error_rate,
        )
    return Judgement(
        "not interleaved",
        "measured in separate runs with no calibration scenario in common: measure both in one run "
        "with --base",
        interleaved=False,
    )


def _broken_control(base: ComparedSide, head: ComparedSide, smallest_change: float) -> str | None:
    """Why an interleaved run cannot be trusted; None if it can.

    A calibration scenario runs the same code on both sides, so its speed must be the same.
    """
    controls = [
        (name, by_round(scenario, "step"), by_round(head.scenarios[name], "step"))
        for name, scenario in base.scenarios.items()
        if scenario.calibration and name in head.scenarios
    ]
    for name, of_base, of_head in controls:
        found = judge(
            of_base,
            of_head,
            smallest_change=smallest_change,
            error_rate=ERROR_RATE / len(controls),
        )
        if found.verdict in ("improved", "regressed") and found.ratio is not None:
            return (
                f"{name}, which runs no code of this project, differs by "
                f"{percent(found.ratio - 1)} between the two sides, so their processes were not in "
                f"the same state: measure again"
            )
    return None
