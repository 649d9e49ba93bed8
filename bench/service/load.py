"""Latency, goodput and rejections of a server under load, and its saturation throughput.

    python -m bench load --url http://127.0.0.1:8080
    python -m bench load --url http://127.0.0.1:8080 --rate 1 2 4 --shape 1024x1024=3 1152x896
    python -m bench load --url http://127.0.0.1:8080 --clients 8

The load is an open loop: requests arrive at random (Poisson, seeded), whether or not earlier ones
have been answered. A latency counts from when its request should have been sent, so a server that
stalls is charged for every request that arrives meanwhile, as its users would be.

Goodput is the rate of requests answered with an image within the deadline. Without --rate, rates
are tried from well below what sequential requests reach to beyond it, in search of the knee: the
highest rate at which nearly all requests are goodput.

With --clients, that many clients at once are compared with one client instead: images a second,
and how good the server's estimates were (closed loop).

If the server serves /metrics, its own histogram is compared with what the client measured.

A server with SDXL_API_KEYS gets the key in SDXL_API_KEY, which other users cannot see, as they can
see a command line.

Exit status: 0 measured; 1 measured, but the server's histogram disagrees; 2 wrong usage, or a
server that cannot be reached or that refuses the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from bench.errors import BenchError
from bench.option_types import count, from_zero, positive
from bench.outputs import output_file, write_json
from bench.service import closed_loop
from bench.service.arrivals import Arrival, Mix, arrivals
from bench.service.closed_loop import ClosedLoop
from bench.service.load_report import NO_IMAGE, Level, Report, RequestOutcome, knee, level
from bench.service.processes import holds_image
from bench.service.server_histograms import Check, Histogram, check, parse

KEY_VARIABLE = "SDXL_API_KEY"

SWEEP = (0.3, 0.6, 0.8, 0.9, 1.0, 1.1, 1.3)
"""Rates to try, as shares of what sequential requests reach."""
UNLOADED = 6
"""Sequential requests before the load: they warm the server and give the unloaded latency."""
DEADLINE_TIMES = 4.0
"""The default deadline, in unloaded latencies."""
SCRAPES, SCRAPE_SECONDS = 10, 0.2
LAGGING_MS = 50.0
"""If the client sends later than this (p99), it is saturated too, and the report says so."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", required=True, help="the server's URL; it must serve POST /")
    add("--rate", nargs="+", type=positive, metavar="R", help="requests a second (default: sweep)")
    add(
        "--shape",
        nargs="+",
        type=_weighted,
        default=[],
        metavar="WxH[=SHARE]",
        help="requested sizes, and their shares (default: the server's default size)",
    )
    add(
        "--steps",
        nargs="+",
        type=_weighted,
        default=[("20", 1.0)],
        metavar="N[=SHARE]",
        help="requested denoising steps, and their shares (default: 20)",
    )
    add(
        "--deadline",
        type=positive,
        metavar="S",
        help=f"seconds (default: {DEADLINE_TIMES:g} times an unloaded request)",
    )
    add(
        "--seconds",
        type=positive,
        default=20.0,
        help="how long requests arrive at each rate (default: 20)",
    )
    add("--max-requests", type=count, default=500, help="the most at each rate (default: 500)")
    add(
        "--timeout",
        type=positive,
        default=120.0,
        help="seconds until a request is abandoned (default: 120)",
    )
    add("--seed", type=from_zero, default=0, help="seed of the arrivals (default: 0)")
    add(
        "--clients",
        type=_clients,
        metavar="N",
        help="compare the images a second of N clients at once with one client's",
    )
    add("--blocks", type=count, default=8, help="with --clients: blocks of each (default: 8)")
    add("--metrics-url", help="URL of the server's metrics (default: /metrics under --url)")
    add(
        "--anywhere",
        action="store_true",
        help="allow a URL that is not on this machine; a load test overloads its server on purpose",
    )
    add("--json", action="store_true", help="print JSON")
    add("--out", type=output_file, metavar="FILE", help="also write the JSON to this file")


def _clients(text: str) -> int:
    value = int(text)
    if value < 2:
        raise ValueError
    return value


_clients.__name__ = "whole number above 1"


def _weighted(text: str) -> tuple[str, float]:
    name, equals, weight = text.partition("=")
    return name, positive(weight) if equals else 1.0


_weighted.__name__ = "NAME or NAME=SHARE"


def run(options: argparse.Namespace) -> int:
    url = checked_url(options.url, anywhere=options.anywhere)
    mix = Mix.of(options.shape, options.steps)
    if options.clients is not None and options.rate is not None:
        raise BenchError("--clients and --rate: one of them is allowed")
    report: Report | ClosedLoop
    if options.clients is None:
        report = asyncio.run(_measure(url, mix, options))
    else:
        report = asyncio.run(_compare(url, mix, options))
    document = json.dumps(report.as_json(), indent=1, allow_nan=False)
    if options.out is not None:
        write_json(options.out, report.as_json())
    print(document if options.json else report.as_text())
    server = report.server if isinstance(report, Report) else None
    return 0 if server is None or server.agrees else 1


def checked_url(url: str, *, anywhere: bool) -> str:
    """The URL without a slash at its end.

    Raises:
        BenchError: it is no URL, or not on this machine and `anywhere` is False.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError as error:
        raise BenchError(f"--url {url!r} is not allowed. Allowed: http://HOST:PORT") from error
    # `urlsplit` drops spaces and line breaks, which whoever opens the URL does not.
    visible = all("!" <= character <= "~" for character in url)
    if parts.scheme not in ("http", "https") or not host or not visible:
        raise BenchError(f"--url {url!r} is not allowed. Allowed: http://HOST:PORT")
    if not anywhere and not _is_this_machine(host):
        raise BenchError(
            f"{host} is not this machine, and a load test overloads its server on purpose; "
            f"add --anywhere to allow it"
        )
    return url.rstrip("/")


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, which may resolve to any host


# Measuring ---------------------------------------------------------------------------------------


def _client(url: str, options: argparse.Namespace) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # trust_env=False: without the proxies that the environment names.
    return httpx.AsyncClient(
        base_url=url,
        timeout=options.timeout,
        limits=limits,
        trust_env=False,
        auth=key_for(httpx.URL(url), os.environ.get(KEY_VARIABLE, "")),
    )


def key_for(server: httpx.URL, key: str) -> Callable[[httpx.Request], httpx.Request]:
    """Adds a key to requests to this server, and to no other one, as that of the metrics.

    Raises:
        BenchError: the key does not fit into a header.
    """
    if not re.fullmatch(r"[!-~]*", key):
        raise BenchError(f"{KEY_VARIABLE} is not allowed as it is (its value is not shown)")

    def add(request: httpx.Request) -> httpx.Request:
        url = request.url
        if key and (url.scheme, url.host, url.port) == (server.scheme, server.host, server.port):
            request.headers["Authorization"] = f"Bearer {key}"
        return request

    return add


async def _compare(url: str, mix: Mix, options: argparse.Namespace) -> ClosedLoop:
    metrics_url = options.metrics_url or f"{url}/metrics"
    async with _client(url, options) as client:
        return await closed_loop.measure(
            client, metrics_url, mix, options.clients, options.blocks, options.seed
        )


async def _measure(url: str, mix: Mix, options: argparse.Namespace) -> Report:
    metrics_url = options.metrics_url or f"{url}/metrics"
    async with _client(url, options) as client:
        unloaded = await _unloaded(client, mix)
        deadline = options.deadline or DEADLINE_TIMES * unloaded
        before = await _settled(client, metrics_url)
        tried: list[tuple[Level, list[RequestOutcome]]] = []

        async def attempt(rate: float) -> None:
            planned = arrivals(mix, rate, options.seconds, options.max_requests, options.seed)
            if planned:
                # Limited by the number of requests, arrivals end earlier.
                full = len(planned) == options.max_requests
                seconds = planned[-1].at if full else options.seconds
                outcomes = await send_all(client, planned)
                tried.append((level(rate, seconds, outcomes, deadline), outcomes))

        if options.rate is not None:
            for rate in options.rate:
                await attempt(rate)
        else:
            await _sweep(attempt, tried, 1 / unloaded)
        if not tried:
            raise BenchError("no request arrived: --rate times --seconds is too small")
        client_seconds = [
            each.ended - each.sent for _, outcomes in tried for each in outcomes if each.ok
        ]
        server = await _compare_histogram(client, metrics_url, before, client_seconds)
    levels = sorted((each for each, _ in tried), key=lambda each: each.rate)
    return Report(
        url,
        1000 * unloaded,
        deadline,
        options.seed,
        mix,
        tuple(levels),
        server,
        tuple(_notes(levels, server, metrics_url)),
    )


async def _sweep(
    attempt: Callable[[float], Awaitable[None]],
    tried: list[tuple[Level, list[RequestOutcome]]],
    sequential_rate: float,
) -> None:
    """Try rising rates until far past the knee, then one between it and the next rate tried."""
    for share in SWEEP:
        await attempt(share * sequential_rate)
        if tried and tried[-1][0].in_time < tried[-1][0].sent / 2:
            break
    levels = [each for each, _ in tried]
    reached = knee(levels)
    past = [each.rate for each in levels if reached is not None and each.rate > reached.rate]
    if reached is not None and past:
        await attempt((reached.rate + min(past)) / 2)


def _notes(levels: Sequence[Level], server: Check | None, metrics_url: str) -> Iterator[str]:
    if server is None:
        yield f"{metrics_url} has no histogram of requests, so there is none to compare with"
    lagging = max(each.lag_ms for each in levels)
    if lagging > LAGGING_MS:
        yield (
            f"requests were sent up to {lagging:.0f} ms late (p99): this client is saturated too, "
            "and the latencies include its delay"
        )


async def send_all(client: httpx.AsyncClient, planned: Sequence[Arrival]) -> list[RequestOutcome]:
    """Send every request at its time, whether or not earlier ones have been answered."""
    loop = asyncio.get_running_loop()
    start = loop.time() + 0.05

    async def one(arrival: Arrival) -> RequestOutcome:
        await asyncio.sleep(start + arrival.at - loop.time())
        sent = loop.time() - start
        outcome = await _outcome(client, arrival.body)
        return RequestOutcome(arrival.at, sent, loop.time() - start, outcome)

    return list(await asyncio.gather(*(one(arrival) for arrival in planned)))


async def _outcome(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    try:
        answer = await client.post("/", json=body)
    except httpx.TimeoutException:
        return "timeout"
    except httpx.ConnectError:
        return "no connection"
    except httpx.TransportError:
        return "broken off"
    if answer.status_code == 200 and not holds_image(answer.content):
        return NO_IMAGE
    return str(answer.status_code)


async def _unloaded(client: httpx.AsyncClient, mix: Mix) -> float:
    """The mean seconds of a request, sent one after the other, weighted by the mix.

    Raises:
        BenchError: the server cannot be reached, or refuses one of the mix's requests.
    """
    took: list[float] = []
    bodies = mix.bodies()
    for index in range(max(UNLOADED, 2 * len(bodies))):
        body = bodies[index % len(bodies)][0]
        start = time.perf_counter()
        try:
            answer = await client.post("/", json=body | {"seed": index})
        except httpx.TransportError as error:
            raise BenchError(
                f"{client.base_url} cannot be reached: {type(error).__name__}"
            ) from error
        if answer.status_code != 200:
            raise BenchError(f"{client.base_url} answered {_refusal(answer)}")
        if not holds_image(answer.content):
            raise BenchError(
                f"{client.base_url} answered 200 without an image: POST / there is not stepspan's"
            )
        took.append(time.perf_counter() - start)
    # The first of each kind may still warm something.
    steady = took[len(bodies) :]
    weights = [bodies[index % len(bodies)][1] for index in range(len(bodies), len(took))]
    return float(np.average(steady, weights=weights))


def _refusal(answer: httpx.Response) -> str:
    """The status, and the server's explanation if it gives one."""
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = ""
    return f"{answer.status_code}: {detail}"[:300] if detail else str(answer.status_code)


async def _scrape(client: httpx.AsyncClient, metrics_url: str) -> Histogram | None:
    """The server's histogram; None if it serves none."""
    try:
        answer = await client.get(metrics_url, headers={"accept": "text/plain"})
        return parse(answer.text) if answer.status_code == 200 else None
    except (httpx.TransportError, ValueError):
        return None


async def _settled(client: httpx.AsyncClient, metrics_url: str) -> Histogram | None:
    """The server's histogram, once two scrapes in a row agree.

    The server counts a request on another thread after it has sent the last byte.
    """
    last = await _scrape(client, metrics_url)
    for _ in range(SCRAPES):
        await asyncio.sleep(SCRAPE_SECONDS)
        now = await _scrape(client, metrics_url)
        if now == last:
            break
        last = now
    return last


async def _compare_histogram(
    client: httpx.AsyncClient,
    metrics_url: str,
    before: Histogram | None,
    client_seconds: Sequence[float],
) -> Check | None:
    """Compare the server's histogram with the client's times; None if the server has none."""
    found = None
    for _ in range(SCRAPES if before is not None else 0):
        now = await _settled(client, metrics_url)
        if now is None or before is None:
            return None
        found = check(now.since(before), client_seconds)
        if found.server_count >= len(client_seconds):
            break
    return found
