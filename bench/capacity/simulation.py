"""A simulation of replicas, each a queue in front of one GPU, with measured service times.

Requests arrive at random (Poisson) and are sent to a replica. A replica draws one run at a time. A
run takes the requests that have waited longest, up to the most images a run. It does not wait for
more, as the service does for up to 20 ms after a shared run.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bench.capacity.service_times import ServiceTimes

Routing = Literal["least", "random", "shared"]
"""Which replica a request is sent to: `least`, the one with the fewest outstanding requests, as
nginx does; `random`, as a Kubernetes Service does; `shared`, one queue that all take from."""

WARMING = 0.1
"""The share of the requests that is left out by default, because the queues begin empty."""


@dataclass(frozen=True)
class Simulated:
    """What the requests of a simulation saw.

    Attributes:
        latencies: seconds from arrival to answer of those that were served.
        waits: their seconds in the queue.
        refused: the share that found every queue full.
        busy: the share of the time that a replica drew.
        images_a_run: the mean.
    """

    latencies: NDArray[np.float64]
    waits: NDArray[np.float64]
    refused: float
    busy: float
    images_a_run: float

    def percentile(self, percent: float) -> float:
        """Of the latencies; infinite if nothing was served."""
        return float(np.percentile(self.latencies, percent)) if len(self.latencies) else np.inf


def simulate(
    times: ServiceTimes,
    rate: float,
    replicas: int,
    *,
    requests: int,
    most_images: int = 1,
    max_waiting: int = 32,
    routing: Routing = "least",
    leave_out: float = WARMING,
    seed: int = 0,
) -> Simulated:
    """Serve `requests` at `rate` a second. The same arguments give the same result.

    Args:
        most_images: of a run, at most as many as the largest that was measured.
        max_waiting: requests that may wait at a replica. One that finds its replica full goes to
            the one with the fewest; if that is full too, it is refused.
        leave_out: the share of the requests, from the first, that is in no figure.
    """
    generator = np.random.default_rng([seed, replicas, round(1e6 * rate)])
    arrivals = np.cumsum(generator.exponential(1 / rate, requests))
    run_shares, outside_shares = generator.random(requests), generator.random(requests)
    chosen = generator.integers(0, replicas, requests) if routing == "random" else None
    shared = routing == "shared"
    queues: list[deque[int]] = [deque() for _ in range(1 if shared else replicas)]
    outstanding = np.zeros(replicas, dtype=np.int64)
    running: list[list[int]] = [[] for _ in range(replicas)]
    idle = list(range(replicas))  # for `shared` only
    ends: list[tuple[float, int]] = []
    began, ended = np.full(requests, np.nan), np.full(requests, np.nan)
    room = max_waiting * (replicas if shared else 1)
    busy, runs, refused = 0.0, 0, []

    def begin(replica: int, now: float) -> None:
        nonlocal busy, runs
        queue = queues[0 if shared else replica]
        taken = [queue.popleft() for _ in range(min(most_images, len(queue)))]
        seconds = times.run_seconds(len(taken), run_shares[taken[0]])
        began[taken] = now
        running[replica] = taken
        busy, runs = busy + seconds, runs + 1
        heapq.heappush(ends, (now + seconds, replica))

    def end(now: float, replica: int) -> None:
        for request in running[replica]:
            ended[request] = now
        outstanding[replica] -= len(running[replica])
        running[replica] = []
        if queues[0 if shared else replica]:
            begin(replica, now)
        elif shared:
            idle.append(replica)

    for request, now in enumerate(arrivals.tolist()):
        while ends and ends[0][0] <= now:
            end(*heapq.heappop(ends))
        if shared:
            if len(queues[0]) >= room:
                refused.append(request)
                continue
            queues[0].append(request)
            if idle:
                begin(idle.pop(), now)
            continue
        replica = int(chosen[request]) if chosen is not None else int(np.argmin(outstanding))
        if running[replica] and len(queues[replica]) >= max_waiting:
            replica = int(np.argmin(outstanding))
            if running[replica] and len(queues[replica]) >= max_waiting:
                refused.append(request)
                continue
        queues[replica].append(request)
        outstanding[replica] += 1
        if not running[replica]:
            begin(replica, now)
    while ends:
        end(*heapq.heappop(ends))

    first = int(leave_out * requests)
    served = ~np.isnan(ended)
    served[:first] = False
    outside = np.array([times.outside_seconds(share) for share in outside_shares[served]])
    return Simulated(
        latencies=ended[served] - arrivals[served] + outside,
        waits=began[served] - arrivals[served],
        refused=sum(request >= first for request in refused) / (requests - first),
        busy=busy / (replicas * float(np.nanmax(ended))),
        images_a_run=(requests - len(refused)) / runs,
    )
