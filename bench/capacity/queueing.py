"""The closed form of M/D/c: Poisson arrivals, constant service times, c servers.

A denoising run of one size nearly has a constant time. There is one queue in front of all servers.
Times are in units of the caller's choice; `rate` is arrivals per unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

SMALLEST_TAIL = 1e-12
"""Probability of longer queues, which are left out."""


@dataclass(frozen=True)
class MDc:
    """M/D/c: the distribution of the wait, exact up to `SMALLEST_TAIL`.

    The number of customers one service time later is those who were not in service, plus the new
    arrivals. Its stationary distribution gives that of the wait (Franx, 2001: "A simple solution
    for the M/D/c waiting time distribution").

    Attributes:
        service: the constant service time.
    """

    rate: float
    service: float
    servers: int

    def __post_init__(self) -> None:
        if not self.rate * self.service < self.servers:
            raise ValueError("the servers are fewer than the load, so the queue has no limit")

    @property
    def utilisation(self) -> float:
        return self.rate * self.service / self.servers

    @cached_property
    def _at_most(self) -> NDArray[np.float64]:
        """The probability of at most n customers, for n from 0."""
        load, servers = self.rate * self.service, self.servers
        most = servers + self._longest_queue()
        sizes = np.arange(most + 1)
        arrivals = np.exp(sizes * math.log(load) - load - _log_factorials(most))
        # From n customers to m: those beyond the servers stay, the rest of m are new.
        left = np.maximum(sizes - servers, 0)
        new = sizes[None, :] - left[:, None]
        moves = np.where(new >= 0, arrivals[np.maximum(new, 0)], 0.0)
        # Stationary: p = p moves, and the sum is 1, which replaces one of the equations.
        equations = moves.T - np.eye(most + 1)
        equations[-1, :] = 1.0
        wanted = np.zeros(most + 1)
        wanted[-1] = 1.0
        return np.cumsum(np.linalg.solve(equations, wanted))

    def _longest_queue(self) -> int:
        """Queues are longer than this with less than about `SMALLEST_TAIL`."""
        # The queue's tail falls by 1/x for each customer, where x > 1 solves
        # servers * log(x) = load * (x - 1).
        load, low, high = self.rate * self.service, 1.0 + 1e-9, 2.0
        while self.servers * math.log(high) > load * (high - 1):
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            if self.servers * math.log(middle) > load * (middle - 1):
                low = middle
            else:
                high = middle
        return min(4000, math.ceil(-math.log(SMALLEST_TAIL) / math.log(low)) + 1)

    def wait_at_most(self, wait: float) -> float:
        """The probability of a wait of at most this long."""
        if wait < 0:
            return 0.0
        whole = math.floor(wait / self.service) + 1
        ahead = whole * self.service - wait
        # Those who arrived in the last `ahead` and how many were there before them.
        count = whole * self.servers
        sizes = np.arange(count)
        mean = self.rate * ahead
        log_mean = math.log(mean) if mean > 0 else -math.inf
        with np.errstate(invalid="ignore"):
            logs = np.where(sizes == 0, 0.0, sizes * log_mean) - mean - _log_factorials(count - 1)
        known = self._at_most
        others = self.servers + (count - 1 - sizes)
        at_most = known[np.minimum(others, len(known) - 1)]
        return float(min(1.0, np.sum(np.exp(logs) * at_most)))

    def wait_percentile(self, percent: float) -> float:
        """The wait that this percentage of arrivals does not exceed."""
        share = percent / 100
        if self.wait_at_most(0) >= share:
            return 0.0
        high = self.service
        while self.wait_at_most(high) < share:
            high *= 2
        low = 0.0
        for _ in range(60):
            middle = (low + high) / 2
            if self.wait_at_most(middle) < share:
                low = middle
            else:
                high = middle
        return high

    def mean_wait(self) -> float:
        """By Little's law from the mean number of those who wait."""
        at_most = self._at_most
        waiting = float(np.sum(1 - at_most[self.servers :]))
        return waiting / self.rate


def _log_factorials(most: int) -> NDArray[np.float64]:
    """log(n!) for n from 0."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, most + 1)))])
