"""The server's own latency histogram, compared with what its clients measured.

Two scrapes of `/metrics` enclose the load. Between them the server must have counted the requests
that it answered. Each quantile of the clients' times must lie in the same bucket as the server's,
or in a neighbouring one, because a client also waits for the connection and the network.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

HISTOGRAM = "sdxl_request_duration_seconds"
QUANTILES = (0.5, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Histogram:
    """The successful requests that the server has counted up to one moment."""

    bounds: tuple[float, ...]
    """Upper bounds in seconds; the last is infinite."""
    counts: tuple[float, ...]
    """Requests in each bucket, not cumulative."""
    total_seconds: float

    @property
    def count(self) -> float:
        return sum(self.counts)

    def since(self, before: Histogram) -> Histogram:
        """The requests counted since `before`; `count` is negative if the server was restarted."""
        if before.bounds != self.bounds:
            before = Histogram(self.bounds, (0.0,) * len(self.bounds), 0.0)
        return Histogram(
            self.bounds,
            tuple(now - then for now, then in zip(self.counts, before.counts, strict=True)),
            self.total_seconds - before.total_seconds,
        )

    def bucket_of(self, quantile: float) -> int:
        """The index of the bucket that a quantile lies in."""
        wanted = quantile * self.count
        cumulative = 0.0
        for index, count in enumerate(self.counts):
            cumulative += count
            if count and cumulative >= wanted:
                return index
        return len(self.counts) - 1


def parse(text: str, endpoint: str = "/", outcome: str = "ok") -> Histogram | None:
    """The histogram of one endpoint and outcome; None if it is not in `text`.

    Raises:
        ValueError: `text` is not in the Prometheus text format.
    """
    cumulative: dict[float, float] = {}
    total = 0.0
    for family in text_string_to_metric_families(text):
        if family.name != HISTOGRAM:
            continue
        for sample in family.samples:
            labels = sample.labels
            if labels.get("endpoint") != endpoint or labels.get("outcome") != outcome:
                continue
            if sample.name.endswith("_bucket"):
                if "le" not in labels:
                    raise ValueError("a bucket has no bound")
                cumulative[float(labels["le"])] = sample.value
            elif sample.name.endswith("_sum"):
                total = sample.value
    if not cumulative:
        return None
    bounds = tuple(sorted(cumulative))
    heights = [0.0, *(cumulative[bound] for bound in bounds)]
    counts = tuple(after - before for before, after in itertools.pairwise(heights))
    return Histogram(bounds, counts, total)


@dataclass(frozen=True)
class QuantileCheck:
    """One quantile as the client and the server measured it, in seconds."""

    quantile: float
    client: float
    server_low: float
    server_high: float
    agrees: bool


@dataclass(frozen=True)
class Check:
    """The comparison of client and server."""

    client_count: int
    server_count: int
    mean_overhead_ms: float | None
    """The clients' mean minus the server's, which is exact despite the buckets; None if the two
    counted different numbers of requests."""
    quantiles: tuple[QuantileCheck, ...]

    @property
    def agrees(self) -> bool:
        return self.client_count == self.server_count and all(q.agrees for q in self.quantiles)

    def sentence(self) -> str:
        if self.client_count != self.server_count:
            return (
                f"the server counted {self.server_count} successful requests and the clients "
                f"{self.client_count}: it has other clients, or it lost some"
            )
        if not self.client_count:
            return (
                "no request succeeded, so there is nothing to compare with the server's histogram"
            )
        wrong = [q for q in self.quantiles if not q.agrees]
        if wrong:
            worst = wrong[0]
            return (
                f"the server puts p{100 * worst.quantile:g} between {1000 * worst.server_low:.0f} "
                f"and {1000 * worst.server_high:.0f} ms, its clients saw {1000 * worst.client:.0f}"
            )
        return (
            f"the server's histogram agrees: {self.server_count} requests, every quantile in its "
            f"bucket or the next, {self.mean_overhead_ms:+.1f} ms on average outside the server"
        )


def check(server: Histogram, client_seconds: Sequence[float]) -> Check:
    """Compare the server's histogram with the clients' times.

    Args:
        client_seconds: of each successful request, from sending it to its last byte.
    """
    count = round(server.count)
    same = count == len(client_seconds) > 0
    quantiles = []
    for quantile in QUANTILES if same else ():
        # inverted_cdf: the definition that the buckets use, an observed value.
        client = float(np.quantile(client_seconds, quantile, method="inverted_cdf"))
        index = server.bucket_of(quantile)
        clients_index = bisect.bisect_left(server.bounds, client)
        quantiles.append(
            QuantileCheck(
                quantile,
                client,
                server.bounds[index - 1] if index else 0.0,
                server.bounds[index],
                abs(clients_index - index) <= 1,
            )
        )
    overhead = None
    if same:
        overhead = 1000 * (math.fsum(client_seconds) - server.total_seconds) / count
    return Check(len(client_seconds), count, overhead, tuple(quantiles))
