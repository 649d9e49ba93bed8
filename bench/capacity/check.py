"""Check the simulation of `bench capacity` against a running service, under an open-loop load.

    python -m bench.capacity.check --url http://127.0.0.1:8080 --rate 1.5
    python -m bench.capacity.check --url http://127.0.0.1:8000 --replicas 2 --rate 3

Requests arrive at random (Poisson, seeded). Each answer says how long its run took, so the service
times are those of this very load. With them, as many requests are simulated at the same rate, many
times over: what was seen should lie in the range of nineteen of twenty simulations. They draw the
service times independently; the figure `replayed` keeps each request's own time and arrival, so on
a machine that is slow for a while it shows the queues alone. The service needs SDXL_MAX_BATCH=1,
because the answers do not say who shared a run.

Exit status: 0 the seen p50 and p95 are in their ranges; 1 one is not; 2 wrong usage, or no service.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from bench.capacity.queueing import MDc
from bench.capacity.service_times import MODEL_STAGES, ServiceTimes
from bench.capacity.simulation import replay, simulate
from bench.errors import BenchError
from bench.option_types import count, positive
from bench.outputs import output_file, write_json
from bench.service.arrivals import Arrival, Mix, arrivals
from bench.service.load import checked_url

SIMULATIONS = 200
RANGE = (2.5, 97.5)
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Seen:
    """One answered request; seconds. Its latency counts from `at`, when it was to be sent."""

    at: float
    latency: float
    run: float
    queue: float


@dataclass(frozen=True)
class Predicted:
    """A percentile of the latencies: as seen, and of the simulations their median and range.

    Attributes:
        mdc: of a steady state with one queue and constant service times; None beyond saturation.
        replayed: of one simulation with the very arrivals and service times.
    """

    percent: int
    seen: float
    median: float
    low: float
    high: float
    mdc: float | None
    replayed: float

    @property
    def agrees(self) -> bool:
        return self.low <= self.seen <= self.high


@dataclass(frozen=True)
class Load:
    """An open-loop load on a number of replicas, and what it saw."""

    rate: float
    replicas: int
    steps: int
    seen: tuple[Seen, ...]

    @classmethod
    def read(cls, path: Path) -> Load:
        """A load that `--out` wrote."""
        found = json.loads(path.read_text())
        seen = tuple(Seen(**each) for each in found["seen"])
        return cls(found["rate"], found["replicas"], found["steps"], seen)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def mean_run(self) -> float:
        return float(np.mean([each.run for each in self.seen]))

    @property
    def utilisation(self) -> float:
        return self.rate * self.mean_run / self.replicas

    def predicted(self, percent: int) -> Predicted:
        seen = self.seen
        times = ServiceTimes(
            "seen", "", "", self.steps,
            {1: np.sort([each.run for each in seen])},
            np.sort([max(0.0, each.latency - each.run - each.queue) for each in seen]),
        )  # fmt: skip
        found = [
            simulate(
                times,
                self.rate,
                self.replicas,
                requests=len(seen),
                max_waiting=len(seen),  # nothing is refused, as nothing was
                leave_out=0,
                seed=seed,
            ).percentile(percent)
            for seed in range(SIMULATIONS)
        ]
        low, high = np.percentile(found, RANGE)
        waits = replay([each.at for each in seen], [each.run for each in seen], self.replicas)
        replayed = waits + [each.latency - each.queue for each in seen]
        return Predicted(
            percent,
            float(np.percentile([each.latency for each in seen], percent)),
            float(np.median(found)),
            float(low),
            float(high),
            self._mdc(times, percent),
            float(np.percentile(replayed, percent)),
        )

    def _mdc(self, times: ServiceTimes, percent: int) -> float | None:
        if self.utilisation >= 1:
            return None
        wait = MDc(self.rate, self.mean_run, self.replicas).wait_percentile(percent)
        return wait + self.mean_run + times.outside_seconds(0.5)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.capacity.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--url", required=True, help="the service's URL, or its proxy's")
    add("--replicas", type=count, default=1, help="servers behind it (default: 1)")
    add("--rate", type=positive, required=True, metavar="R", help="requests a second")
    add("--requests", type=count, default=200, help="how many are sent (default: 200)")
    add("--steps", type=count, default=20, help="denoising steps of each (default: 20)")
    add("--seed", type=int, default=0, help="seed of the arrivals (default: 0)")
    add("--out", type=output_file, metavar="FILE", help="also write what was seen, as JSON")
    options = parser.parse_args(arguments)
    try:
        url = checked_url(options.url, anywhere=False)
        mix = Mix.of([], [(str(options.steps), 1.0)])
        planned = arrivals(mix, options.rate, float("inf"), options.requests, options.seed)
        seen = asyncio.run(_send(url, planned))
        load = Load(options.rate, options.replicas, options.steps, tuple(seen))
        if options.out is not None:
            write_json(options.out, load.as_json())
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    predicted = [load.predicted(percent) for percent in (50, 95)]
    figures = {
        "mean_run": load.mean_run,
        "utilisation": load.utilisation,
        "percentiles": [asdict(each) | {"agrees": each.agrees} for each in predicted],
    }
    print(json.dumps(figures, indent=1))
    return 0 if all(each.agrees for each in predicted) else 1


async def _send(url: str, planned: list[Arrival]) -> list[Seen]:
    """Send every request at its time.

    Raises:
        BenchError: the service cannot be reached, or refuses a request.
    """
    loop = asyncio.get_running_loop()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=TIMEOUT_SECONDS, limits=limits, trust_env=False
    ) as client:
        start = loop.time() + 0.1

        async def one(arrival: Arrival) -> Seen:
            await asyncio.sleep(start + arrival.at - loop.time())
            try:
                answer = await client.post("/", json=arrival.body)
            except httpx.TransportError as error:
                raise BenchError(f"{url} cannot be reached: {type(error).__name__}") from error
            latency = loop.time() - start - arrival.at
            if answer.status_code != 200:
                raise BenchError(f"{url} answered {answer.status_code} to a request")
            timings = answer.json()["timings"]
            run = sum(timings.get(f"{stage}_ms") or 0.0 for stage in MODEL_STAGES)
            return Seen(arrival.at, latency, run / 1000, timings["queue_ms"] / 1000)

        return list(await asyncio.gather(*(one(arrival) for arrival in planned)))


if __name__ == "__main__":
    sys.exit(main())
