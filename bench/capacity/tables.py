"""The tables of docs/scaling.md, from recorded requests of the H200 and recorded loads.

python -m bench.capacity.tables    prints them: a minute
"""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.capacity.check import Load
from bench.capacity.queueing import MDc
from bench.capacity.service_times import ServiceTimes, read
from bench.capacity.simulation import Routing, simulate
from bench.capacity.trace_volume import trace_volume

RESULTS = Path(__file__).parents[1] / "results" / "h200-2026-11-22-requests.json"
CHECKS = (
    "cpu-2026-11-26-capacity-one-server.json",
    "cpu-2026-11-26-capacity-two-servers.json",
    "cpu-2026-11-26-capacity-overload.json",
)
REPLICAS = (1, 2, 4, 8, 16, 64)
BUSY = (0.5, 0.7, 0.8, 0.9)
RATES = (1, 10, 100, 1000)
SIMULATIONS, REQUESTS = 5, 6000
MONTH = 30 * 24 * 3600


def p95(
    times: ServiceTimes, rate: float, replicas: int, routing: Routing, requests: int = REQUESTS
) -> float:
    """The median of the simulations, in seconds."""
    return statistics.median(
        simulate(
            times,
            rate,
            replicas,
            requests=max(requests, 10 * replicas),
            routing=routing,
            max_waiting=1000,
            seed=seed,
        ).percentile(95)
        for seed in range(SIMULATIONS)
    )


def queueing(times: ServiceTimes) -> str:
    """p95 by replicas and busy share: least outstanding, at random, and M/D/c."""
    lines = [
        "| replicas | " + " | ".join(f"{100 * busy:.0f}% busy" for busy in BUSY) + " |",
        "|---" * (1 + len(BUSY)) + "|",
    ]
    service = times.mean_run()
    for replicas in REPLICAS:
        cells = []
        for busy in BUSY:
            rate = busy * replicas / service
            least = p95(times, rate, replicas, "least")
            random = p95(times, rate, replicas, "random")
            exact = MDc(rate, service, replicas).wait_percentile(95) + service
            exact += times.outside_seconds(0.5)
            cells.append(f"{least:.1f} / {random:.1f} / {exact:.1f}")
        lines.append(f"| {replicas} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spans(steps: int) -> str:
    """Spans and bytes a month by rate, sampling and whether steps are spans."""
    volume = trace_volume(steps)
    lines = [
        (
            f"| requests a second | every trace, {volume.spans} spans | one in ten "
            f"| one in a hundred | one in ten, `SDXL_TRACE_STEPS=summary`, "
            f"{volume.spans_without_steps} spans |"
        ),
        "|---|---|---|---|---|",
    ]

    def cell(per_second: float) -> str:
        month = per_second * MONTH
        return f"{_short(month)}, {_short(month * volume.span_bytes)}B"

    for rate in RATES:
        kept = [rate * volume.spans * share for share in (1, 0.1, 0.01)]
        kept.append(rate * volume.spans_without_steps * 0.1)
        lines.append(f"| {rate:g} | " + " | ".join(map(cell, kept)) + " |")
    return "\n".join(lines)


def checks() -> str:
    """Predicted and seen p50 and p95 of the recorded loads."""
    lines = [
        "| servers | requests a second | busy | | seen | simulated (19 of 20) | M/D/c | replayed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file in CHECKS:
        load = Load.read(RESULTS.with_name(file))
        for percent in (50, 95):
            found = load.predicted(percent)
            exact = "-" if found.mdc is None else f"{found.mdc:.3g} s"
            lines.append(
                f"| {load.replicas} | {load.rate:.2g} | {100 * load.utilisation:.0f}% | p{percent} "
                f"| {found.seen:.3g} s | {found.median:.3g} s ({found.low:.3g} to "
                f"{found.high:.3g}) | {exact} | {found.replayed:.3g} s |"
            )
    return "\n".join(lines)


def _short(value: float) -> str:
    """Three digits, with M, G or T for millions, billions and trillions."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "


def main() -> None:
    times = read(RESULTS)
    print(queueing(times), checks(), spans(times.steps), sep="\n\n")


if __name__ == "__main__":
    main()
