"""`python -m bench.stats.error_rates`: measure how often the verdict is wrong.

It judges pairs whose true difference is known. Each simulated kind of noise gives the times of
requests in sequence; base and head alternate in it, and the order within a round alternates, as
with `bench run --base`. The verdict knows nothing of the noise. One kind is real: stretches of a
run of one commit against itself, in two processes, on a machine that other work used meanwhile.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.harness.result_file import BenchResult
from bench.outputs import output_file, write_json
from bench.stats.verdict import (
    ERROR_RATE,
    SMALLEST_CHANGE,
    Judgement,
    by_round,
    judge,
    judge_separate,
    judge_unpaired,
)

RESULTS = Path(__file__).resolve().parents[1] / "results"
OUT = RESULTS / "verdict-error-rates.json"
NO_CHANGE = RESULTS / "cpu-2026-11-24-no-change.json"
"""`python -m bench run --scenario diffusers default --base HEAD --steps 4 --requests 240`."""
CHANGE = 0.03
STEPS = 19
"""Steady steps a request, of 20."""

Generator = np.random.Generator
Logs = NDArray[np.float64]


# Kinds of noise ----------------------------------------------------------------------------------


def quiet(generator: Generator, requests: int) -> Logs:
    return generator.normal(0, 0.01, requests)


def loud(generator: Generator, requests: int) -> Logs:
    return generator.normal(0, 0.05, requests)


def heavy_tails(generator: Generator, requests: int) -> Logs:
    return 0.01 * generator.standard_t(2, requests)


def drifting(generator: Generator, requests: int) -> Logs:
    """A trend of up to 5% through the run, and a random walk of 2%, as from clocks and heat."""
    trend = generator.uniform(-0.05, 0.05) * np.linspace(0, 1, requests)
    walk = 0.02 * np.cumsum(generator.normal(0, 1, requests)) / math.sqrt(requests)
    return quiet(generator, requests) + trend + walk


def _neighbour(generator: Generator, requests: int, length: float, share: float) -> Logs:
    """Another process that runs for `share` of the time, for `length` requests in a row on average.

    Each request meanwhile takes 5% to 40% longer.
    """
    leaves, comes = 1 / length, share / (1 - share) / length
    present = generator.random() < share
    slowed = np.zeros(requests)
    for index in range(requests):
        if present:
            slowed[index] = generator.uniform(0.05, 0.4)
        present = generator.random() < (1 - leaves if present else comes)
    return slowed


def brief_neighbour(generator: Generator, requests: int) -> Logs:
    return quiet(generator, requests) + _neighbour(generator, requests, 3, 0.2)


def lasting_neighbour(generator: Generator, requests: int) -> Logs:
    return quiet(generator, requests) + _neighbour(generator, requests, 10, 0.3)


def all_at_once(generator: Generator, requests: int) -> Logs:
    return drifting(generator, requests) + _neighbour(generator, requests, 3, 0.2)


WORLDS: dict[str, Callable[[Generator, int], Logs]] = {
    "1% noise": quiet,
    "5% noise": loud,
    "heavy tails": heavy_tails,
    "drift": drifting,
    "a brief neighbour": brief_neighbour,
    "a lasting neighbour": lasting_neighbour,
    "drift and a neighbour": all_at_once,
}


# Rates -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Shares of all trials with one kind of noise."""

    world: str
    rounds: int
    trials: int
    false_alarm: float
    """There was no change, and the verdict was improved or regressed."""
    found: float
    """There was a change of 3%, and the verdict was right."""
    wrong_way: float
    """There was a change of 3%, and the verdict was the opposite."""


def interleaved(world: str, rounds: int, trials: int, seed: int = 0) -> Rates:
    """Base and head in pairs, with one request a round and side."""
    make = WORLDS[world]

    def trial(generator: Generator, change: float) -> Judgement:
        noise = make(generator, 2 * rounds).reshape(rounds, 2)
        noise[1::2] = noise[1::2, ::-1]  # head went first in every other round
        return judge(_figures(noise[:, 0]), _figures(noise[:, 1] + change))

    return _rates(trial, world, rounds, trials, seed)


def of_a_real_run(result: BenchResult, rounds: int, trials: int, seed: int = 0) -> Rates:
    """Random stretches of `rounds` rounds of one scenario of a real run.

    Which side is called head is random, and a change multiplies its times.
    """
    pairs = []
    for name, scenario in result.of_side("base").items():
        base, head = (by_round(s, "step") for s in (scenario, result.of_side("head")[name]))
        shared = sorted(base.keys() & head.keys())
        pairs.append(np.log([[base[number], head[number]] for number in shared]))

    def trial(generator: Generator, change: float) -> Judgement:
        pair = pairs[generator.integers(len(pairs))]
        start = generator.integers(len(pair) - rounds + 1)
        noise = pair[start : start + rounds, :: generator.choice([-1, 1])]
        return judge(_figures(noise[:, 0]), _figures(noise[:, 1] + change))

    return _rates(trial, "a real run", rounds, trials, seed)


def separate(rounds: int, trials: int, seed: int = 0, *, calibrated: bool = True) -> Rates:
    """Two runs, each at a speed of its own.

    The speed affects the calibration by up to a half more or less than the scenario. Without
    calibration the two runs are compared as two samples of one.
    """

    def trial(generator: Generator, change: float) -> Judgement:
        figures = []
        for of_head in (0, 1):
            session = generator.normal(0, 0.01)
            noise = quiet(generator, 2 * rounds).reshape(rounds, 2)
            common = session * generator.uniform(0.5, 1.5)
            figures += [
                _figures(noise[:, 0] + common + of_head * change),
                _figures(noise[:, 1] + session),
            ]
        base, base_calibration, head, head_calibration = figures
        if not calibrated:
            return judge_unpaired(list(base.values()), list(head.values()))
        return judge_separate(base, head, base_calibration, head_calibration)

    world = "separate runs, " + ("calibrated" if calibrated else "compared as they are")
    return _rates(trial, world, rounds, trials, seed)


def of_steps(rounds: int, trials: int, seed: int = 0, *, pooled: bool) -> Rates:
    """Steps with 1% noise each, in requests with another 1% common to their steps.

    Every step is one figure (`pooled`), or one median a request is. Any change counts, so that only
    the interval decides.
    """

    def trial(generator: Generator, change: float) -> Judgement:
        sides = []
        for of_head in (0, 1):
            steps = quiet(generator, rounds * STEPS).reshape(rounds, STEPS)
            steps += quiet(generator, rounds)[:, None] + of_head * change
            taken = steps.ravel() if pooled else np.median(steps, axis=1)
            sides.append(list(np.exp(taken)))
        return judge_unpaired(*sides, smallest_change=1e-9)

    world = "steps pooled" if pooled else "a median a request"
    return _rates(trial, world, rounds, trials, seed)


def _figures(logs: Logs) -> dict[int, float]:
    return dict(enumerate(np.exp(logs)))


def _rates(
    trial: Callable[[Generator, float], Judgement], world: str, rounds: int, trials: int, seed: int
) -> Rates:
    generator = np.random.default_rng(seed)
    alarms = found = wrong = 0
    for index in range(trials):
        alarms += trial(generator, 0.0).verdict in ("improved", "regressed")
        slower = index % 2 == 0
        verdict = trial(generator, math.log1p(CHANGE if slower else -CHANGE)).verdict
        found += verdict == ("regressed" if slower else "improved")
        wrong += verdict == ("improved" if slower else "regressed")
    return Rates(world, rounds, trials, alarms / trials, found / trials, wrong / trials)


def all_rates(trials: int) -> list[Rates]:
    rates = [interleaved(world, rounds, trials) for world in WORLDS for rounds in (6, 10, 20, 40)]
    real = BenchResult.read(NO_CHANGE)
    rates += [of_a_real_run(real, rounds, trials) for rounds in (6, 10, 20, 40)]
    rates += [separate(20, trials, calibrated=calibrated) for calibrated in (True, False)]
    # Fewer trials, because each draws as many samples as twenty others.
    return rates + [of_steps(20, max(1, trials // 4), pooled=pooled) for pooled in (True, False)]


def render(rates: list[Rates]) -> str:
    """A Markdown table, in percent."""
    lines = [
        "| | requests a side | no change, called one | 3% found | 3% called the wrong way |",
        "|---|---|---|---|---|",
    ]
    for row in rates:
        shares = (row.false_alarm, row.found, row.wrong_way)
        cells = " | ".join(f"{100 * share:.1f}%" for share in shares)
        lines.append(f"| {row.world} | {row.rounds} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stats.error_rates", description=__doc__)
    parser.add_argument(
        "--trials", type=int, default=2000, help="trials of each kind (default: 2000)"
    )
    parser.add_argument(
        "--out",
        type=output_file,
        default=str(OUT),  # as text, so that it is checked too
        help=f"default: bench/results/{OUT.name}",
    )
    options = parser.parse_args()
    rates = all_rates(options.trials)
    document = {
        "smallest_change": SMALLEST_CHANGE,
        "error_rate": ERROR_RATE,
        "rates": [asdict(row) for row in rates],
    }
    write_json(options.out, document)
    print(render(rates))


if __name__ == "__main__":
    main()
