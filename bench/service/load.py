"""Latency, goodput and rejections of a server under load, and the rate at which it gives in.

    python -m bench load --url http://127.0.0.1:8080
    python -m bench load --url http://127.0.0.1:8080 --rate 1 2 4 --shape 1024x1024=3 1152x896

Requests arrive at random and wait for nobody (an open loop, Poisson, seeded): a server that stalls
finds them all waiting when it wakes, as it would find its users. Each latency therefore counts from
when its request was meant to be sent, and not from when a busy client got round to it.

Goodput is what was answered within the deadline. Without --rate, rates are tried from well below
what one request after the other reaches to beyond it, and the knee is looked for: the highest rate
at which nearly everything that arrives is still goodput.

Where the server serves /metrics, its own histogram is held against what was measured here.

Exit status: 0 measured, 1 measured, but the server's histogram tells something else, 2 wrong usage,
a server that cannot be reached or that refuses the requests.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

from bench.errors import BenchError
from bench.report.terminal import table
from bench.service.server_histograms import Check, Histogram, check, parse

PROMPT = "a small red circle left of a large blue square on a white background"
PERCENTILES = (50, 90, 95, 99)
KEPT_UP = 0.95
"""The share of what arrives that must be goodput for a rate to count as served."""
SWEEP = (0.3, 0.6, 0.8, 0.9, 1.0, 1.1, 1.3)
"""Rates tried, in shares of what one request after the other reaches."""
UNLOADED = 6
"""Requests one after the other before anything else: they warm what is cold and give the scale."""
DEADLINE_TIMES = 4.0
"""The deadline unless one is given, in unloaded latencies."""
SCRAPES, SCRAPE_SECONDS = 10, 0.2
LAGGING_MS = 50.0
"""Sending later than that at the 99th percentile is told: then the client, too, is saturated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", required=True, help="where the server answers POST /")
    add("--rate", nargs="+", type=_positive, metavar="R", help="requests a second (default: sweep)")
    add(
        "--shape",
        nargs="+",
        type=_weighted,
        default=[],
        metavar="WxH[=SHARE]",
        help="sizes asked for, and how often (default: the server's own)",
    )
    add(
        "--steps",
        nargs="+",
        type=_weighted,
        default=[("20", 1.0)],
        metavar="N[=SHARE]",
        help="denoising steps asked for, and how often (default: 20)",
    )
    add(
        "--deadline",
        type=_positive,
        metavar="S",
        help=f"seconds (default: {DEADLINE_TIMES:g} times what an unloaded request takes)",
    )
    add("--seconds", type=_positive, default=20.0, help="of arrivals at each rate (default: 20)")
    add("--max-requests", type=_count, default=500, help="at each rate (default: 500)")
    add("--timeout", type=_positive, default=120.0, help="seconds until a request is given up")
    add("--seed", type=int, default=0, help="of arrivals and their mix (default: 0)")
    add("--metrics-url", help="where the server's metrics are (default: /metrics beside --url)")
    add(
        "--anywhere",
        action="store_true",
        help="also where the URL is not of this machine: a sweep overloads its server on purpose, "
        "which is no thing to do by a slip of the hand to somebody's service, or to a bill",
    )
    add("--json", action="store_true", help="for programs")
    add("--out", type=Path, metavar="FILE", help="write the JSON there as well")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


_positive.__name__ = "number above 0"  # what argparse calls it in its error


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_count.__name__ = "whole number above 0"


def _weighted(text: str) -> tuple[str, float]:
    name, equals, weight = text.partition("=")
    return name, _positive(weight) if equals else 1.0


_weighted.__name__ = "NAME or NAME=SHARE"


def run(options: argparse.Namespace) -> int:
    url = checked_url(options.url, anywhere=options.anywhere)
    mix = Mix.of(options.shape, options.steps)
    report = asyncio.run(_measure(url, mix, options))
    document = json.dumps(report.as_json(), indent=1, allow_nan=False)
    if options.out is not None:
        try:
            options.out.write_text(document + "\n", encoding="utf-8")
        except OSError as error:
            raise BenchError(f"{options.out} cannot be written: {error.strerror}") from error
    print(document if options.json else report.as_text())
    return 0 if report.server is None or report.server.agrees else 1


def checked_url(url: str, *, anywhere: bool) -> str:
    """Without a slash at its end. Raises BenchError for what is no URL, or is not of this machine
    and need not be."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError as error:
        raise BenchError(f"--url {url!r} is not allowed; http://HOST:PORT is") from error
    if parts.scheme not in ("http", "https") or not host:
        raise BenchError(f"--url {url!r} is not allowed; http://HOST:PORT is")
    if not anywhere and not _is_this_machine(host):
        raise BenchError(
            f"{host} is not this machine, and load overloads its server on purpose; "
            f"--anywhere says that this is meant"
        )
    return url.rstrip("/")


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name, which may lead anywhere


# Arrivals ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """What is asked for, and how often."""

    shapes: tuple[tuple[str, float], ...]
    """WIDTHxHEIGHT and its share; empty: the server's default size."""
    steps: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, shapes: Sequence[tuple[str, float]], steps: Sequence[tuple[str, float]]) -> Mix:
        for shape, _ in shapes:
            if not all(part.isdigit() for part in shape.split("x")) or shape.count("x") != 1:
                raise BenchError(f"--shape {shape} is not allowed; WIDTHxHEIGHT is")
        for count, _ in steps:
            if not count.isdigit() or int(count) < 1:
                raise BenchError(f"--steps {count} is not allowed; a whole number above 0 is")
        return cls(tuple(shapes), tuple((int(count), share) for count, share in steps))

    def bodies(self) -> list[tuple[dict[str, Any], float]]:
        """Every request there is in it, with its share of all."""
        told = []
        for shape, shape_share in self.shapes or (("", 1.0),):
            size = {}
            if shape:
                width, height = shape.split("x")
                size = {"width": int(width), "height": int(height)}
            for steps, steps_share in self.steps:
                body = {"prompt": PROMPT, "num_inference_steps": steps, **size}
                told.append((body, shape_share * steps_share))
        total = sum(share for _, share in told)
        return [(body, share / total) for body, share in told]


@dataclass(frozen=True)
class Arrival:
    """A request and when it is meant to be sent, in seconds from the start."""

    at: float
    body: dict[str, Any]


def arrivals(mix: Mix, rate: float, seconds: float, most: int, seed: int) -> list[Arrival]:
    """A Poisson process of `rate` for `seconds`, or for `most` requests if those are fewer."""
    generator = np.random.default_rng([seed, round(1000 * rate)])
    at = np.cumsum(generator.exponential(1 / rate, most))
    at = at[at < seconds]
    bodies = mix.bodies()
    which = generator.choice(len(bodies), len(at), p=[share for _, share in bodies])
    seeds = generator.integers(0, 2**31, len(at))
    return [
        Arrival(float(moment), bodies[index][0] | {"seed": int(seed_of)})
        for moment, index, seed_of in zip(at, which, seeds, strict=True)
    ]


# Sending -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What became of one request; seconds from the start of its load."""

    meant: float
    sent: float
    ended: float
    outcome: str
    """`200`, another status, or what kept it from one: `timeout`, `no connection`."""

    @property
    def latency(self) -> float:
        """As a user who pressed a button at `meant` has it."""
        return self.ended - self.meant

    @property
    def ok(self) -> bool:
        return self.outcome == "200"


async def send_all(client: httpx.AsyncClient, planned: Sequence[Arrival]) -> list[Answer]:
    """Every request at its time, whatever became of those before it."""
    loop = asyncio.get_running_loop()
    start = loop.time() + 0.05

    async def one(arrival: Arrival) -> Answer:
        await asyncio.sleep(start + arrival.at - loop.time())
        sent = loop.time() - start
        outcome = await _outcome(client, arrival.body)
        return Answer(arrival.at, sent, loop.time() - start, outcome)

    return list(await asyncio.gather(*(one(arrival) for arrival in planned)))


async def _outcome(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    try:
        return str((await client.post("/", json=body)).status_code)
    except httpx.TimeoutException:
        return "timeout"
    except httpx.ConnectError:
        return "no connection"
    except httpx.TransportError:
        return "broken off"


# Figures -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """What one rate gave."""

    rate: float
    """Asked for, requests a second."""
    seconds: float
    """Of arrivals."""
    sent: int
    ok: int
    in_time: int
    latency_ms: dict[str, float]
    """Of what succeeded, by percentile, from when each was meant to be sent."""
    refused: dict[str, int]
    """Everything else, by status or reason."""
    lag_ms: float
    """How late requests were sent, 99th percentile."""

    @property
    def goodput(self) -> float:
        """Answers within the deadline a second."""
        return self.in_time / self.seconds

    @property
    def kept_up(self) -> bool:
        return self.in_time >= KEPT_UP * self.sent


def level(rate: float, seconds: float, answers: Sequence[Answer], deadline: float) -> Level:
    """`answers` to arrivals at `rate` over `seconds`."""
    ok = [answer.latency for answer in answers if answer.ok]
    latency: dict[str, float] = {}
    if ok:
        latency = {f"p{p}": 1000 * float(np.percentile(ok, p)) for p in PERCENTILES}
        latency["max"] = 1000 * max(ok)
    lags = [answer.sent - answer.meant for answer in answers]
    return Level(
        rate=rate,
        seconds=seconds,
        sent=len(answers),
        ok=len(ok),
        in_time=sum(latency <= deadline for latency in ok),
        latency_ms=latency,
        refused=dict(Counter(answer.outcome for answer in answers if not answer.ok)),
        lag_ms=1000 * float(np.percentile(lags, 99)) if lags else 0.0,
    )


def knee(levels: Sequence[Level]) -> Level | None:
    """The highest rate that was kept up with, below the first that was not; None if none was."""
    reached = None
    for each in sorted(levels, key=lambda each: each.rate):
        if not each.kept_up:
            break
        reached = each
    return reached


@dataclass(frozen=True)
class Report:
    """A whole run of `load`."""

    url: str
    unloaded_ms: float
    deadline: float
    """Seconds."""
    seed: int
    mix: Mix
    levels: tuple[Level, ...]
    server: Check | None
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        reached = knee(self.levels)
        return {
            "url": self.url,
            "unloaded_ms": self.unloaded_ms,
            "deadline_seconds": self.deadline,
            "seed": self.seed,
            "mix": asdict(self.mix),
            "levels": [
                {**asdict(each), "goodput": each.goodput, "kept_up": each.kept_up}
                for each in self.levels
            ],
            "knee": None if reached is None else reached.rate,
            "server": None if self.server is None else asdict(self.server),
            "server_agrees": None if self.server is None else self.server.agrees,
            "notes": list(self.notes),
        }

    def as_text(self) -> str:
        header = ("rate/s", "sent", "ok", *(f"p{p}" for p in PERCENTILES), "max", "goodput/s",
                  "in time", "not served")  # fmt: skip
        rows = [
            (
                f"{each.rate:.3g}",
                str(each.sent),
                str(each.ok),
                *(
                    f"{each.latency_ms[name]:.0f}" if each.latency_ms else ""
                    for name in (*(f"p{p}" for p in PERCENTILES), "max")
                ),
                f"{each.goodput:.3g}",
                f"{100 * each.in_time / each.sent:.0f}%" if each.sent else "",
                ", ".join(f"{count} x {name}" for name, count in sorted(each.refused.items())),
            )
            for each in self.levels
        ]
        scale = f"unloaded {self.unloaded_ms:.0f} ms, deadline {self.deadline:.3g} s"
        told = [
            f"{self.url}: {scale}; latencies in ms, from when a request was meant to be sent",
            "",
            table(
                header, rows, left=0, colours=[None if x.kept_up else "yellow" for x in self.levels]
            ),
            "",
            self._knee_sentence(),
        ]
        told += [] if self.server is None else [self.server.sentence()]
        return "\n".join([*told, *(f"note: {note}" for note in self.notes)])

    def _knee_sentence(self) -> str:
        reached = knee(self.levels)
        share = f"{100 * KEPT_UP:.0f}%"
        if reached is None:
            lowest = min(each.rate for each in self.levels)
            return f"knee: below {lowest:.3g} a second, the lowest rate tried"
        past = [each for each in self.levels if each.rate > reached.rate]
        if not past:
            return f"knee: not reached; {reached.rate:.3g} a second was kept up with"
        beyond = min(past, key=lambda each: each.rate)
        return (
            f"knee: {reached.rate:.3g} a second, the highest rate with {share} in time; at "
            f"{beyond.rate:.3g} it was {100 * beyond.in_time / max(1, beyond.sent):.0f}%"
        )


# The whole ---------------------------------------------------------------------------------------


async def _measure(url: str, mix: Mix, options: argparse.Namespace) -> Report:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    metrics_url = options.metrics_url or f"{url}/metrics"
    # A proxy that the environment names would be measured instead.
    async with httpx.AsyncClient(
        base_url=url, timeout=options.timeout, limits=limits, trust_env=False
    ) as client:
        unloaded = await _unloaded(client, mix)
        deadline = options.deadline or DEADLINE_TIMES * unloaded
        before = await _settled(client, metrics_url)
        tried: list[tuple[Level, list[Answer]]] = []

        async def attempt(rate: float) -> None:
            planned = arrivals(mix, rate, options.seconds, options.max_requests, options.seed)
            if planned:
                # Cut short by the number of requests, arrivals span less.
                full = len(planned) == options.max_requests
                seconds = planned[-1].at if full else options.seconds
                answers = await send_all(client, planned)
                tried.append((level(rate, seconds, answers, deadline), answers))

        if options.rate is not None:
            for rate in options.rate:
                await attempt(rate)
        else:
            await _sweep(attempt, tried, 1 / unloaded)
        if not tried:
            raise BenchError("no request arrived: --rate times --seconds is too small")
        of_server = [a.ended - a.sent for _, answers in tried for a in answers if a.ok]
        server = await _held_against(client, metrics_url, before, of_server)
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
    tried: list[tuple[Level, list[Answer]]],
    one_after_the_other: float,
) -> None:
    """Upwards until far past the knee, then once between it and the first rate past it."""
    for share in SWEEP:
        await attempt(share * one_after_the_other)
        if tried and tried[-1][0].in_time < tried[-1][0].sent / 2:
            break
    levels = [each for each, _ in tried]
    reached = knee(levels)
    past = [each.rate for each in levels if reached is not None and each.rate > reached.rate]
    if reached is not None and past:
        await attempt((reached.rate + min(past)) / 2)


def _notes(levels: Sequence[Level], server: Check | None, metrics_url: str) -> Iterator[str]:
    if server is None:
        yield f"{metrics_url} holds no histogram of requests, so nothing is held against it"
    lagging = max(each.lag_ms for each in levels)
    if lagging > LAGGING_MS:
        yield (
            f"requests were sent up to {lagging:.0f} ms late (p99): this client is saturated too, "
            "and its own delay is in the latencies"
        )


async def _unloaded(client: httpx.AsyncClient, mix: Mix) -> float:
    """The mean seconds of the mix's requests, one after the other; each is refused here if at all.
    Raises BenchError."""
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
        took.append(time.perf_counter() - start)
    # The first of each kind may still warm something.
    steady = took[len(bodies) :]
    weights = [bodies[index % len(bodies)][1] for index in range(len(bodies), len(took))]
    return float(np.average(steady, weights=weights))


def _refusal(answer: httpx.Response) -> str:
    """The status and what the server says of it, as far as it is a sentence."""
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = ""
    return f"{answer.status_code}: {detail}"[:300] if detail else str(answer.status_code)


async def _scrape(client: httpx.AsyncClient, metrics_url: str) -> Histogram | None:
    """None where there is nothing to scrape."""
    try:
        answer = await client.get(metrics_url, headers={"accept": "text/plain"})
        return parse(answer.text) if answer.status_code == 200 else None
    except (httpx.TransportError, ValueError):
        return None


async def _settled(client: httpx.AsyncClient, metrics_url: str) -> Histogram | None:
    """A scrape that the one before agrees with: a request is counted after its last byte, on
    another thread."""
    last = await _scrape(client, metrics_url)
    for _ in range(SCRAPES):
        await asyncio.sleep(SCRAPE_SECONDS)
        now = await _scrape(client, metrics_url)
        if now == last:
            break
        last = now
    return last


async def _held_against(
    client: httpx.AsyncClient,
    metrics_url: str,
    before: Histogram | None,
    of_server: Sequence[float],
) -> Check | None:
    """None where the server has no histogram."""
    found = None
    for _ in range(SCRAPES if before is not None else 0):
        now = await _settled(client, metrics_url)
        if now is None or before is None:
            return None
        found = check(now.since(before), of_server)
        if found.server_count >= len(of_server):
            break
    return found
