"""A simulation of replicas, each a queue in front of one GPU, with measured service times.

Requests arrive at random (Poisson) and are sent to a replica. A replica draws one run at a time. A
run takes the requests that have waited longest, up to the most images a run. It does not wait for
more, as the service does for up to 20 ms after a shared run.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
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
    fleet = _Fleet(
        requests,
        replicas,
        lambda taken: times.run_seconds(len(taken), run_shares[taken[0]]),
        most_images,
        max_waiting,
        shared=routing == "shared",
    )
    fleet.serve(arrivals, chosen)
    first = int(leave_out * requests)
    served = ~np.isnan(fleet.ended)
    served[:first] = False
    outside = np.array([times.outside_seconds(share) for share in outside_shares[served]])
    return Simulated(
        latencies=fleet.ended[served] - arrivals[served] + outside,
        waits=fleet.began[served] - arrivals[served],
        refused=sum(request >= first for request in fleet.refused) / (requests - first),
        busy=fleet.busy / (replicas * float(np.nanmax(fleet.ended))),
        images_a_run=(requests - len(fleet.refused)) / fleet.runs,
    )


def replay(arrivals: Sequence[float], runs: Sequence[float], replicas: int) -> NDArray[np.float64]:
    """Waits of requests that arrived at these times and whose runs took these seconds, one image a
    run, each sent to the replica with the fewest. Unlike in `simulate`, slow runs that came one
    after the other still do."""
    fleet = _Fleet(len(arrivals), replicas, lambda taken: runs[taken[0]], 1, len(arrivals))
    at = np.array(arrivals, dtype=np.float64)
    fleet.serve(at, None)
    waits: NDArray[np.float64] = fleet.began - at
    return waits


class _Fleet:
    """Replicas and their queues; requests are numbered in the order of their arrival.

    Args:
        run_seconds: of a run of these requests.
        shared: one queue for all replicas.

    Attributes:
        began, ended: when each request's run did; not a number for those refused.
        busy: seconds of all runs.
    """

    def __init__(
        self,
        requests: int,
        replicas: int,
        run_seconds: Callable[[list[int]], float],
        most_images: int,
        max_waiting: int,
        *,
        shared: bool = False,
    ) -> None:
        self.began, self.ended = np.full(requests, np.nan), np.full(requests, np.nan)
        self.busy, self.runs = 0.0, 0
        self.refused: list[int] = []
        self._run_seconds = run_seconds
        self._most_images = most_images
        self._shared = shared
        self._room = max_waiting * (replicas if shared else 1)
        self._queues: list[deque[int]] = [deque() for _ in range(1 if shared else replicas)]
        self._outstanding = np.zeros(replicas, dtype=np.int64)
        self._running: list[list[int]] = [[] for _ in range(replicas)]
        self._idle = list(range(replicas))  # for a shared queue only
        self._ends: list[tuple[float, int]] = []

    def serve(self, arrivals: NDArray[np.float64], chosen: NDArray[np.int64] | None) -> None:
        """Serve every request.

        Args:
            chosen: each one's replica; without, the one with the fewest outstanding.
        """
        for request, now in enumerate(arrivals.tolist()):
            while self._ends and self._ends[0][0] <= now:
                self._end(*heapq.heappop(self._ends))
            if self._shared:
                self._offer_to_all(request, now)
            else:
                self._offer(request, now, None if chosen is None else int(chosen[request]))
        while self._ends:
            self._end(*heapq.heappop(self._ends))

    def _offer_to_all(self, request: int, now: float) -> None:
        if len(self._queues[0]) >= self._room:
            self.refused.append(request)
            return
        self._queues[0].append(request)
        if self._idle:
            self._begin(self._idle.pop(), now)

    def _offer(self, request: int, now: float, replica: int | None) -> None:
        if replica is None or self._full(replica):
            replica = int(np.argmin(self._outstanding))
            if self._full(replica):
                self.refused.append(request)
                return
        self._queues[replica].append(request)
        self._outstanding[replica] += 1
        if not self._running[replica]:
            self._begin(replica, now)

    def _full(self, replica: int) -> bool:
        return bool(self._running[replica]) and len(self._queues[replica]) >= self._room

    def _begin(self, replica: int, now: float) -> None:
        queue = self._queues[0 if self._shared else replica]
        taken = [queue.popleft() for _ in range(min(self._most_images, len(queue)))]
        seconds = self._run_seconds(taken)
        self.began[taken] = now
        self._running[replica] = taken
        self.busy, self.runs = self.busy + seconds, self.runs + 1
        heapq.heappush(self._ends, (now + seconds, replica))

    def _end(self, now: float, replica: int) -> None:
        self.ended[self._running[replica]] = now
        self._outstanding[replica] -= len(self._running[replica])
        self._running[replica] = []
        if self._queues[0 if self._shared else replica]:
            self._begin(replica, now)
        elif self._shared:
            self._idle.append(replica)
