"""A result as rows, facts and remarks: what the text table and the HTML page show alike."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from bench.harness.result_file import BenchResult, Code, MeasuredScenario, Session
from bench.stats.compare import change, machine
from bench.stats.differences import busy
from bench.stats.verdict import Judgement, Rounds, by_round, judge
from bench.terminal import percent


@dataclass(frozen=True)
class Line:
    """One scenario of one side, with its ratio to the side's first scenario, the baseline."""

    label: str
    scenario: MeasuredScenario
    is_baseline: bool
    ratio: float | None
    """Its steady step over the baseline's, each divided by its images, in the rounds that both
    have; None for the baseline, and for what has no round in common with it."""
    of_baseline: Judgement | None
    """The same with its interval; None if the rounds are too few."""
    mfu: float | None
    floor_ms: float | None
    """The time of a step's nominal FLOPs at the measured rate of matrix products."""
    cost: float | None
    """The price of a thousand images."""

    @property
    def image_step_ms(self) -> float:
        """The step's time divided by its images."""
        return self.scenario.step_ms / self.scenario.images

    @property
    def times_floor(self) -> float | None:
        return None if self.floor_ms is None else self.scenario.step_ms / self.floor_ms


def lines(result: BenchResult) -> list[Line]:
    """One line a scenario and side, in the file's order, base before head."""
    order = list(dict.fromkeys(s.name for s in reversed(result.scenarios)))[::-1]
    rows = []
    for scenario in sorted(result.scenarios, key=lambda s: (order.index(s.name), s.side)):
        baseline = next(iter(result.of_side(scenario.side).values()))
        ratio, judgement = None, None
        if scenario is not baseline:
            ratio, judgement = _of_baseline(_image_steps(baseline), _image_steps(scenario))
        alone = len(result.sides) == 1
        rows.append(
            Line(
                label=scenario.name if alone else f"{scenario.name} ({scenario.side})",
                scenario=scenario,
                is_baseline=scenario is baseline,
                ratio=ratio,
                of_baseline=judgement,
                mfu=scenario.mfu(result.ceilings),
                floor_ms=_floor_ms(scenario, result),
                cost=scenario.cost_per_thousand_images(result.price_per_hour),
            )
        )
    return rows


def _of_baseline(baseline: Rounds, other: Rounds) -> tuple[float | None, Judgement | None]:
    """The ratio in the rounds that both have, and the judgement if these are enough for one.

    A median over all rounds may be of other sessions, and so of another state of the machine.
    """
    judgement = judge(baseline, other)
    if judgement.ratio is not None:
        return judgement.ratio, judgement
    ratios = [other[index] / baseline[index] for index in baseline.keys() & other.keys()]
    return (statistics.median(ratios) if ratios else None), None


def _image_steps(scenario: MeasuredScenario) -> dict[int, float]:
    """The step's time divided by its images, by round."""
    return {number: ms / scenario.images for number, ms in by_round(scenario, "step").items()}


def _floor_ms(scenario: MeasuredScenario, result: BenchResult) -> float | None:
    rate = None if result.ceilings is None else result.ceilings.matmul_tflops.get(scenario.dtype)
    if rate is None or scenario.flops is None:
        return None
    return scenario.flops.step / (rate * 1e12) * 1000


# Text --------------------------------------------------------------------------------------------

COLUMNS = (
    "scenario",
    "requests",
    "step ms",
    "of the first",
    "interval",
    "request ms",
    "images/s",
    "MFU",
    "x floor",
    "memory",
    "error",
    "per 1000",
)


def cells(line: Line) -> tuple[str, ...]:
    """The cells of one line, in the order of COLUMNS."""
    scenario = line.scenario
    shift, interval = ("" if line.ratio is None else percent(line.ratio - 1)), ""
    if line.of_baseline is not None:
        shift, interval = change(line.of_baseline)
    return (
        line.label,
        str(len(scenario.requests)),
        digits(scenario.step_ms),
        shift,
        interval,
        digits(scenario.request_ms),
        digits(scenario.images_per_second),
        "" if line.mfu is None else f"{100 * line.mfu:.0f}%",
        "" if line.times_floor is None else f"{line.times_floor:.2f}",
        _bytes(scenario.peak_memory_bytes),
        "" if scenario.error_vs_fp32 is None else f"{scenario.error_vs_fp32:.2g}",
        "" if line.cost is None else f"{line.cost:.3g}",
    )


def columns(
    shown: Sequence[Line], names: Collection[str] = COLUMNS
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the columns with these names, without columns that are empty."""
    rows = [cells(line) for line in shown]
    kept = [
        index
        for index, name in enumerate(COLUMNS)
        if name in names and any(row[index] for row in rows)
    ]
    return [COLUMNS[index] for index in kept], [[row[index] for index in kept] for row in rows]


def digits(value: float) -> str:
    """A number with four significant digits."""
    return f"{value:.{max(0, 3 - math.floor(math.log10(value)))}f}"


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def facts(result: BenchResult) -> Iterator[tuple[str, str]]:
    """The workload, the machine, the code and the machine's state, by name."""
    workload, environment = result.workload, result.environment
    guidance = "guidance on" if workload.guidance else "guidance off"
    yield "workload", f"{workload.model}, {workload.shape}, {workload.steps} steps, {guidance}"
    yield "machine", machine(result)
    system = {
        "": environment.platform,
        "python": environment.python,
        "driver": environment.driver,
        "CUDA": environment.cuda,
    }
    yield "system", ", ".join(f"{name} {value}".strip() for name, value in system.items() if value)
    for code in result.code:
        versions = ", ".join(f"{name} {version}" for name, version in code.versions.items())
        name = "code" if len(result.code) == 1 else code.side
        yield name, f"{_revision(code)}; {versions}"
    if result.ceilings is not None:
        rates = ", ".join(
            f"{dtype} {digits(rate)} TFLOP/s"
            for dtype, rate in result.ceilings.matmul_tflops.items()
        )
        yield "ceilings", f"{rates}; copy {digits(result.ceilings.copy_gb_per_second)} GB/s"
    for session in result.sessions:
        name = "state" if len(result.sessions) == 1 else f"state, from round {session.first_round}"
        yield name, _state(session) or "not recorded"
        for code in session.code:
            yield f"code, from round {session.first_round}", _revision(code)
    yield "command", result.command


def _revision(code: Code) -> str:
    source = "" if code.source is None else f", source {code.source[:8]}"
    return f"{code.revision}{source}"


def _state(session: Session) -> str:
    """Clocks, power, temperature and load at the start and at the end."""
    moments = [session.start] if session.end is None else [session.start, session.end]
    parts = []
    for name, unit in (
        ("sm_clock_mhz", "MHz"),
        ("memory_clock_mhz", "MHz memory"),
        ("power_watts", "W"),
        ("power_limit_watts", "W limit"),
        ("temperature_celsius", "C"),
        ("load_average", "load"),
    ):
        values = [getattr(moment, name) for moment in moments]
        if any(value is not None for value in values):
            seen = [f"{value:.4g}" if value is not None else "?" for value in values]
            parts.append(f"{' -> '.join(dict.fromkeys(seen))} {unit}")
    return ", ".join(parts)


def remarks(result: BenchResult) -> Iterator[str]:
    """What a reader should know about the figures."""
    if result.partial:
        yield "the run was interrupted; these are its samples up to then"
    yield from busy(result)
    for name, scenario in result.of_side(result.sides[-1]).items():
        if scenario.images > 1:
            yield (
                f"{name} draws {scenario.images} images a request: its step is of all of them, "
                f"and its ratio to the first scenario is of one image"
            )
        if scenario.lossy:
            yield f"{name} is lossy: judge its speed together with what it changes in the images"
