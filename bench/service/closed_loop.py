"""Images a second of several clients at once, compared with those of one client.

Each client sends its next request when the last is answered (closed loop). The two numbers of
clients are measured in turn, block by block, on one server, so that both see the same machine.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from bench.errors import BenchError
from bench.service.arrivals import Mix
from bench.service.processes import holds_image
from bench.stats.intervals import Interval, interval

REQUESTS_A_CLIENT = 5
LEAST_REQUESTS = 8
"""Requests of a block. At its end some clients have nothing left to send; with few requests each
that end would weigh too much."""
ESTIMATES = "sdxl_estimate_ratio"
WITHIN = (0.9, 1.1)
"""The server's estimate of a request is good if its actual time is within these shares of it."""


@dataclass(frozen=True)
class ClosedLoop:
    """Images a second of each block, by the number of clients, in the order of the blocks."""

    url: str
    mix: Mix
    clients: int
    one_client: tuple[float, ...]
    all_clients: tuple[float, ...]
    estimates: tuple[int, int] | None
    """How many requests under steady load were estimated within `WITHIN`, and how many were
    estimated; None if the server does not say."""

    @property
    def ratio(self) -> Interval:
        """Images a second of all clients over one client, of neighbouring blocks."""
        pairs = zip(self.one_client, self.all_clients, strict=True)
        return interval([many / one for one, many in pairs])

    def as_json(self) -> dict[str, Any]:
        ratio = self.ratio
        return {
            "url": self.url,
            "mix": {"shapes": self.mix.shapes, "steps": self.mix.steps},
            "clients": self.clients,
            "images_per_second": {"1": self.one_client, str(self.clients): self.all_clients},
            "ratio": {"point": ratio.point, "low": ratio.low, "high": ratio.high},
            "estimates_within": None if self.estimates is None else self.estimates[0],
            "estimates": None if self.estimates is None else self.estimates[1],
        }

    def as_text(self) -> str:
        lines = [
            f"{self.url}: images a second, {len(self.one_client)} blocks of each",
            f"1 client: {interval(self.one_client)}",
            f"{self.clients} clients: {interval(self.all_clients)}",
            f"{self.clients} clients over one: {self.ratio}",
        ]
        if self.estimates is not None:
            good, count = self.estimates
            share = 100 * good / count if count else 0.0
            lines.append(
                f"estimates within 10%: {share:.0f}% of {count} requests of {self.clients}"
                " clients, at steady load"
            )
        return "\n".join(lines)


async def measure(
    client: httpx.AsyncClient, metrics_url: str, mix: Mix, clients: int, blocks: int, seed: int
) -> ClosedLoop:
    """Measure one client and `clients` clients in turn.

    Raises:
        BenchError: a request was not answered with an image.
    """
    rates: dict[int, list[float]] = {1: [], clients: []}
    bodies = _bodies(mix, seed)
    for count in rates:
        await _block(client, bodies, count)  # warms the server, and its estimates
    for number in range(blocks):
        for count in (1, clients) if number % 2 else (clients, 1):
            rates[count].append(await _block(client, bodies, count))
    estimates = await _steady_estimates(client, metrics_url, bodies, clients)
    return ClosedLoop(
        str(client.base_url).rstrip("/"),
        mix,
        clients,
        tuple(rates[1]),
        tuple(rates[clients]),
        estimates,
    )


async def _steady_estimates(
    client: httpx.AsyncClient, metrics_url: str, bodies: Iterator[dict[str, Any]], clients: int
) -> tuple[int, int] | None:
    """How many requests were estimated well under steady load, and how many were estimated; None if
    the server does not say.

    At the start of a block all clients arrive at once, which no server can foresee. So the block
    has twice the requests, and those of its second half count.
    """
    half = max(LEAST_REQUESTS, REQUESTS_A_CLIENT * clients)

    halfway: asyncio.Task[tuple[int, int] | None] | None = None

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal halfway
        for number, each in enumerate(bodies):
            if number == half:
                halfway = asyncio.create_task(_scraped(client, metrics_url))
            yield each

    await _block(client, counted(), clients, 2 * half)
    before = None if halfway is None else await halfway
    after = await _estimates(client, metrics_url)
    if before is None or after is None:
        return None
    return after[0] - before[0], after[1] - before[1]


def _bodies(mix: Mix, seed: int) -> Iterator[dict[str, Any]]:
    """Requests of the mix, at random, without end."""
    generator = np.random.default_rng(seed)
    bodies = mix.bodies()
    shares = [share for _, share in bodies]
    for number in itertools.count():
        body, _ = bodies[int(generator.choice(len(bodies), p=shares))]
        yield body | {"seed": number}


async def _block(
    client: httpx.AsyncClient,
    bodies: Iterator[dict[str, Any]],
    clients: int,
    requests: int | None = None,
) -> float:
    """Images a second of one block."""
    requests = requests or max(LEAST_REQUESTS, REQUESTS_A_CLIENT * clients)
    left = itertools.islice(bodies, requests)

    async def one_client() -> None:
        for body in left:
            try:
                answer = await client.post("/", json=body)
            except httpx.TransportError as error:
                raise BenchError(
                    f"{client.base_url} cannot be reached: {type(error).__name__}"
                ) from error
            if answer.status_code != 200:
                raise BenchError(f"{client.base_url} answered {answer.status_code}")
            if not holds_image(answer.content):
                raise BenchError(f"{client.base_url} answered 200 without an image")

    start = time.perf_counter()
    await asyncio.gather(*(one_client() for _ in range(clients)))
    return requests / (time.perf_counter() - start)


async def _estimates(client: httpx.AsyncClient, metrics_url: str) -> tuple[int, int] | None:
    """How many requests the server has estimated well so far, and how many it has estimated; None
    if it does not say.

    It counts a request on another thread after the last byte, so two scrapes in a row must agree.
    """
    last = None
    for _ in range(20):
        now = await _scraped(client, metrics_url)
        if now is None or now == last:
            return now
        last = now
        await asyncio.sleep(0.2)
    return last


async def _scraped(client: httpx.AsyncClient, metrics_url: str) -> tuple[int, int] | None:
    """The same at this moment."""
    try:
        answer = await client.get(metrics_url, headers={"accept": "text/plain"})
    except httpx.TransportError:
        return None
    return _parse_estimates(answer.text) if answer.status_code == 200 else None


def _parse_estimates(text: str) -> tuple[int, int] | None:
    below: dict[float, float] = {}
    for family in text_string_to_metric_families(text):
        if family.name == ESTIMATES:
            below = {
                float(sample.labels["le"]): sample.value
                for sample in family.samples
                if sample.name.endswith("_bucket")
            }
    if not all(bound in below for bound in WITHIN):
        return None
    low, high = WITHIN
    return round(below[high] - below[low]), round(below[float("inf")])
