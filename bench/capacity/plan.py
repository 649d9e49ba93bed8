"""How many replicas a rate of requests needs, so that 95% are answered within a time.

    python -m bench capacity --rate 3 --p95 4 --results bench/results/h200-2026-11-22-requests.json
    python -m bench capacity --rate 8 --p95 1 --results FILE --max-batch 8 --price-per-hour 3.5

Replicas are simulated with the service times that the file measured: random arrivals, a queue at
each replica, up to --max-batch requests a run. Beside it is M/D/c, the closed form for one queue
and a constant service time. With a price, the cost of a thousand images; then the spans of that
rate, and what waits while a further replica starts.

The requests are alike, and the replicas as fast as the measured machine. Neither a network nor a
proxy is in the figures.

Exit status: 0; 2 if the p95 is shorter than a request by itself, or the file cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from bench.capacity.queueing import MDc
from bench.capacity.service_times import ServiceTimes, read
from bench.capacity.simulation import Routing, Simulated, simulate
from bench.capacity.trace_volume import trace_volume
from bench.errors import BenchError
from bench.option_types import count, positive, share
from bench.outputs import output_file, write_json
from bench.terminal import table

SIMULATIONS = 5
MOST_REFUSED = 0.001
"""Replicas are too few if more than this share is refused, however fast the others are answered."""
MOST_REPLICAS = 4000
MONTH = 30 * 24 * 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rate", type=positive, required=True, metavar="R", help="requests a second")
    add("--p95", type=positive, required=True, metavar="S", help="seconds")
    add("--results", type=Path, required=True, metavar="FILE", help="a result file")
    add(
        "--scenario",
        nargs="+",
        default=[],
        metavar="NAME",
        help="scenarios of the file, one for each size of runs (default: default, batch-N)",
    )
    add("--max-batch", type=count, default=1, help="as SDXL_MAX_BATCH (default: 1)")
    add("--max-waiting", type=count, default=32, help="as SDXL_MAX_WAITING (default: 32)")
    add(
        "--routing",
        choices=get_args(Routing),
        default="least",
        help="to which replica a request goes: the one with the fewest, one at random, or the next "
        "that is free, from one queue (default: least)",
    )
    add(
        "--most-busy",
        type=share,
        default=0.9,
        help="replicas that are busier are too few: their queues grow for longer than is "
        "simulated, and a rise of the rate has no room (default: 0.9)",
    )
    add(
        "--replicas",
        type=count,
        nargs="+",
        help="show these numbers, and search for none; not with --cold-start",
    )
    add("--price-per-hour", type=positive, metavar="X", help="of one replica's machine")
    add("--sample-rate", type=share, default=1.0, help="as OTEL_SAMPLE_RATE (default: 1)")
    add("--cold-start", type=positive, metavar="S", help="seconds until a new replica is ready")
    add(
        "--rise",
        type=positive,
        default=2.0,
        help="with --cold-start: how many times the rate comes at once (default: 2)",
    )
    add("--requests", type=count, default=10000, help="of a simulation, at least (default: 10000)")
    add("--json", action="store_true", help="print JSON")
    add("--out", type=output_file, metavar="FILE", help="also write the JSON to this file")


@dataclass(frozen=True)
class Replicas:
    """A number of replicas under the rate. Times in seconds, medians of the simulations."""

    replicas: int
    overloaded: bool
    """Whether the rate is at least what they can draw. The queues then grow until requests are
    refused, and the figures are those of full queues."""
    busy: float
    images_a_run: float
    refused: float
    p50: float
    p95: float
    p95_low: float
    p95_high: float
    mdc_p95: float | None
    """Of one queue and constant times; None if runs are shared."""
    cost_per_thousand: float | None
    """None without a price, and if overloaded, because not all images are drawn."""


@dataclass(frozen=True)
class Plan:
    """The answer, and what it follows from."""

    rate: float
    wanted_p95: float
    results: str
    machine: str
    workload: str
    routing: Routing
    max_batch: int
    run_seconds: dict[int, float]
    images_per_second: float
    """Of a replica that always has a full run to draw."""
    enough: int | None
    """None if no number was searched for."""
    tried: tuple[Replicas, ...]
    spans_per_request: int
    spans_per_second: float
    trace_bytes_per_month: float
    cold_start: ColdStart | None


@dataclass(frozen=True)
class ColdStart:
    """A sudden rise of the rate, while a further replica starts.

    Attributes:
        excess: requests that come in that time beyond what the replicas can draw.
        refused: those of them that no queue has room for.
        replicas_at_once: how many replicas would have kept the p95 without waiting for a start.
    """

    seconds: float
    rise: float
    excess: float
    refused: float
    replicas_at_once: int


def run(options: argparse.Namespace) -> int:
    if options.replicas is not None and options.cold_start is not None:
        raise BenchError(
            "--cold-start and --replicas: one of them is allowed, because a cold start is computed "
            "for the number of replicas that is enough"
        )
    times = read(options.results, options.scenario)
    if options.max_batch > times.most_images:
        raise BenchError(
            f"{times.name} has runs of at most {times.most_images} images; --max-batch "
            f"{options.max_batch} needs a scenario of as many"
        )
    report = plan(times, options)
    document = as_json(report)
    if options.out is not None:
        write_json(options.out, document)
    print(json.dumps(document, indent=1) if options.json else as_text(report))
    return 0


def plan(times: ServiceTimes, options: argparse.Namespace) -> Plan:
    """Search the fewest replicas that answer 95% in time, unless --replicas names numbers."""
    known: dict[tuple[float, int], Replicas] = {}

    def tried(replicas: int, rate: float = options.rate) -> Replicas:
        if (rate, replicas) not in known:
            known[rate, replicas] = _tried(times, rate, replicas, options)
        return known[rate, replicas]

    enough = None
    if options.replicas is None:
        alone = times.run_seconds(1, 0.95) + times.outside_seconds(0.95)
        if options.p95 <= alone:
            raise BenchError(
                f"a request by itself takes {alone:.3g} s (p95): no number of replicas answers 95% "
                f"within {options.p95:g} s"
            )
        enough = _fewest(times, options.rate, options, tried)
    if enough is None:
        shown = options.replicas
    else:
        around = sorted({max(1, enough - 1), enough, enough + 1})
        shown = [n for n in around if not _overloaded(times, options.rate, n, options)]
    rows = tuple(tried(number) for number in shown)
    cold = None
    if options.cold_start is not None and enough is not None:
        rate = options.rate * options.rise
        room = enough * times.images_per_second(options.max_batch)
        excess = max(0.0, rate - room) * options.cold_start
        at_once = _fewest(times, rate, options, lambda number: tried(number, rate))
        refused = max(0.0, excess - enough * options.max_waiting)
        cold = ColdStart(options.cold_start, options.rise, excess, refused, at_once)
    volume = trace_volume(times.steps)
    spans = volume.spans * options.rate * options.sample_rate
    return Plan(
        options.rate,
        options.p95,
        times.name,
        times.machine,
        times.workload,
        options.routing,
        options.max_batch,
        {images: times.mean_run(images) for images in sorted(times.runs)},
        times.images_per_second(options.max_batch),
        enough,
        rows,
        volume.spans,
        spans,
        spans * volume.span_bytes * MONTH,
        cold,
    )


def _overloaded(
    times: ServiceTimes, rate: float, replicas: int, options: argparse.Namespace
) -> bool:
    return bool(rate >= replicas * times.images_per_second(options.max_batch))


def _fewest(times: ServiceTimes, rate: float, options: argparse.Namespace, tried: Any) -> int:
    """The fewest replicas that are enough; more are assumed to be no worse."""

    one = times.images_per_second(options.max_batch)

    def enough(replicas: int) -> bool:
        if rate > options.most_busy * replicas * one:
            return False
        row: Replicas = tried(replicas)
        return row.p95 <= options.p95 and row.refused <= MOST_REFUSED

    low = math.floor(rate / one)  # too few
    high = low + 1
    while not enough(high):
        low, high = high, max(high + 1, math.ceil(1.2 * high))
        if high > MOST_REPLICAS:
            raise BenchError(f"more than {MOST_REPLICAS} replicas are not simulated")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _tried(
    times: ServiceTimes, rate: float, replicas: int, options: argparse.Namespace
) -> Replicas:
    seen: list[Simulated] = [
        simulate(
            times,
            rate,
            replicas,
            requests=max(options.requests, 20 * replicas),
            most_images=options.max_batch,
            max_waiting=options.max_waiting,
            routing=options.routing,
            seed=seed,
        )
        for seed in range(SIMULATIONS)
    ]
    p95 = sorted(each.percentile(95) for each in seen)
    overloaded = _overloaded(times, rate, replicas, options)
    price = None if overloaded else options.price_per_hour
    return Replicas(
        replicas,
        overloaded,
        statistics.median(each.busy for each in seen),
        statistics.median(each.images_a_run for each in seen),
        statistics.median(each.refused for each in seen),
        statistics.median(each.percentile(50) for each in seen),
        statistics.median(p95),
        p95[0],
        p95[-1],
        _mdc_p95(times, rate, replicas) if options.max_batch == 1 else None,
        None if price is None else price * replicas / (3600 * rate) * 1000,
    )


def _mdc_p95(times: ServiceTimes, rate: float, replicas: int) -> float | None:
    service = times.mean_run()
    if rate * service >= replicas:
        return None
    wait = MDc(rate, service, replicas).wait_percentile(95)
    return wait + service + times.outside_seconds(0.5)


def as_json(report: Plan) -> dict[str, Any]:
    return asdict(report)


def as_text(report: Plan) -> str:
    run = ", ".join(
        f"{images}: {1000 * seconds:.0f} ms" for images, seconds in report.run_seconds.items()
    )
    header = ["replicas", "busy", "p50, s", "p95, s", "5 simulations", "M/D/c p95", "images/run",
              "refused"]  # fmt: skip
    columns = len(header) + any(row.cost_per_thousand is not None for row in report.tried)
    rows = [
        [
            str(row.replicas),
            "overloaded" if row.overloaded else f"{100 * row.busy:.0f}%",
            f"{row.p50:.3g}",
            f"{row.p95:.3g}",
            f"{row.p95_low:.3g} to {row.p95_high:.3g}",
            "-" if row.mdc_p95 is None else f"{row.mdc_p95:.3g}",
            f"{row.images_a_run:.2f}",
            f"{100 * row.refused:.1f}%",
            "-" if row.cost_per_thousand is None else f"{row.cost_per_thousand:.3g}",
        ]
        for row in report.tried
    ]
    lines = [
        f"{report.results}: {report.workload}, on {report.machine}",
        f"a run by its images, mean: {run}; {report.images_per_second:.3g} images/s a replica",
        "",
        table([*header, "1000 images"][:columns], [row[:columns] for row in rows], left=0),
        "",
    ]
    if report.enough is not None:
        lines.append(
            f"{report.enough} replicas answer 95% of {report.rate:g} requests a second within "
            f"{report.wanted_p95:g} s"
        )
    lines.append(
        f"traces: {report.spans_per_request} spans a request, {report.spans_per_second:.3g} spans "
        f"a second, {report.spans_per_second * MONTH / 1e6:.3g} million and "
        f"{report.trace_bytes_per_month / 1e9:.3g} GB a month"
    )
    if (cold := report.cold_start) is not None:
        lines.append(
            f"cold start: at {cold.rise:g} times the rate, {cold.excess:.0f} requests more than "
            f"can be drawn come within {cold.seconds:g} s, and {cold.refused:.0f} find no room; "
            f"{cold.replicas_at_once} replicas would keep the p95"
        )
    return "\n".join(lines)
