"""What differs between two sides: facts that forbid a comparison, and notes on the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from bench.harness.result_file import BenchResult
from bench.stats.compared_side import ComparedSide
from bench.stats.verdict import Judgement

SCENARIO_FACTS = ("dtype", "images")
"""Fields of a scenario that must be equal for a comparison."""
WORSE_ERROR = 1.1
"""A note reports an error of one forward pass that rose by this factor. A smaller rise comes from
another order of additions."""


def differences(base: ComparedSide, head: ComparedSide) -> Iterator[tuple[str, object, object]]:
    """The facts in which two files differ, by name, with both values."""
    facts_of_base, facts_of_head = facts(base), facts(head)
    for name in dict.fromkeys([*facts_of_base, *facts_of_head]):
        was, became = facts_of_base.get(name), facts_of_head.get(name)
        if was != became:
            yield name, _text(was), _text(became)


def facts(side: ComparedSide) -> dict[str, object]:
    """The workload, the machine and the versions of a side, by the names that `--allow` takes."""
    result, environment = side.result, side.result.environment
    limits = {s.start.power_limit_watts for s in side.sessions} - {None}
    return {
        **asdict(result.workload),
        **{
            name: getattr(environment, name)
            for name in ("device", "gpu", "driver", "cuda", "cpu", "cores", "platform", "python")
        },
        "power limit": ", ".join(f"{limit:.0f} W" for limit in sorted(filter(None, limits))),
        **side.code.versions,
    }


def _text(value: object) -> str:
    return "none" if value in (None, "") else str(value)


def not_comparable(
    base: ComparedSide, head: ComparedSide, name: str, different: list[str], allow: Sequence[str]
) -> Judgement | None:
    """The verdict `not comparable` on a scenario, with its reason; None if it can be compared."""
    for side in (base, head):
        if name not in side.scenarios:
            reason = side.why_not_run(name) or "it was not selected"
            which = "base" if side is base else "head"
            return Judgement("not comparable", f"{which} did not run it: {reason}")
    if different:
        return Judgement("not comparable", f"these differ: {', '.join(different)}")
    here, there = base.scenarios[name], head.scenarios[name]
    of_scenario = [
        f"{what} ({was} and {became})"
        for what in SCENARIO_FACTS
        if (was := getattr(here, what)) != (became := getattr(there, what)) and what not in allow
    ]
    if of_scenario:
        return Judgement("not comparable", f"these differ: {', '.join(of_scenario)}")
    return None


def notes(base: ComparedSide, head: ComparedSide, names: Sequence[str]) -> Iterator[str]:
    """What a reader should know beside the verdicts."""
    for side in (base, head) if base.result is not head.result else (head,):
        if side.result.partial:
            yield f"{side.name} was interrupted; its samples up to then are judged"
        yield from left_out(side)
    if base.code.commit is not None and base.code.commit == head.code.commit:
        dirty = base.code.dirty or head.code.dirty
        yield "both sides are the same commit" + (", one with changes" if dirty else "")
    for result in {id(side.result): side.result for side in (base, head)}.values():
        yield from busy(result)
    for name in names:
        here, there = base.scenarios.get(name), head.scenarios.get(name)
        if here is None or there is None:
            continue
        if here.settings != there.settings:
            changed = sorted(
                key
                for key in here.settings.keys() | there.settings.keys()
                if here.settings.get(key) != there.settings.get(key)
            )
            yield f"{name}: settings differ: " + ", ".join(
                f"{key} {_text(here.settings.get(key))} -> {_text(there.settings.get(key))}"
                for key in changed
            )
        if (
            here.error_vs_fp32 is not None
            and there.error_vs_fp32 is not None
            and there.error_vs_fp32 > WORSE_ERROR * here.error_vs_fp32
        ):
            yield (
                f"{name}: the error of one forward pass against float32 rose from "
                f"{here.error_vs_fp32:.2g} to {there.error_vs_fp32:.2g}"
            )
    for missing in set(base.scenarios) ^ set(head.scenarios):
        if missing not in names:
            yield f"{missing} is on one side only"


def left_out(side: ComparedSide) -> Iterator[str]:
    """Notes on the sessions whose rounds are not judged, because they are of other code."""
    for session in side.left_out:
        codes = ", ".join(f"{code.side} {code.revision}" for code in side.result.code_in(session))
        yield (
            f"{side.name}: {session.rounds} rounds from round {session.first_round} are of other "
            f"code ({codes}) and are left out"
        )


def busy(result: BenchResult) -> Iterator[str]:
    """Notes on a machine that was busy when the bench began, or whose GPU was throttled."""
    throttled: set[str] = set()
    for session in result.sessions:
        load = session.start.load_average
        if load is not None and load > result.environment.cores / 2:
            yield (
                f"the machine was busy when the bench began: load {load:.1f} on "
                f"{result.environment.cores} cores"
            )
        for moment in (session.start, session.end):
            throttled.update(() if moment is None else moment.throttle_reasons)
    if throttled:
        yield f"the GPU was throttled: {', '.join(sorted(throttled))}"
