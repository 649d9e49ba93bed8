"""What streaming costs: previews, how late a step's event is, and waiting streams.

    python -m bench streams
    python -m bench streams --rounds 100 --out streams.json

One self-hosted server, one request in a run. Each round sends, in random order:

- the same request as `POST /`, as a stream, and as a stream with previews. Compared is the time of
  the request's runs on the server;
- a request behind another one, alone and with waiting streams behind it. Compared is again the
  time of its run, during which the streams only wait.

A step event is late by the time from the step's end, on the server's clock, until this client has
read it. Both are processes of one machine, so their clocks are the same.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.outputs import output_file, write_json

if TYPE_CHECKING:
    import httpx

ARMS = ("plain", "stream", "previews")
WAITING_STREAMS = 20
TARGETS = {"step_event_ms_p99": 50.0, "waiting_streams": 1.02}
"""The largest figures that are wanted."""
FIRST_REQUESTS = 3
"""Not measured: they fill caches."""


@dataclass
class Samples:
    """Raw samples in milliseconds, in the order of rounds."""

    steps: int
    model: str
    run_ms: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    """The time of a request's runs, by how it was sent."""
    late_ms: list[float] = field(default_factory=list)
    """How late each step event of the streams without previews was."""
    late_previews_ms: list[float] = field(default_factory=list)
    """The same with previews, which are encoded in between."""
    alone_ms: list[float] = field(default_factory=list)
    """The time of a run while nothing waits."""
    beside_streams_ms: list[float] = field(default_factory=list)
    """The same while streams wait."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=40, help="rounds (default: 40)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--model", default="demo", help="as SDXL_MODEL (default: demo)")
    parser.add_argument("--device", default="cpu", help="as SDXL_DEVICE (default: cpu)")
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    if options.rounds < 2 or options.steps < 1:
        raise BenchError("--rounds must be at least 2, --steps at least 1")
    from bench.harness.device_lock import only_bench_on
    from bench.harness.environment import where
    from bench.harness.work import device_named
    from bench.service.processes import running

    device = device_named(options.device)
    settings = {
        "SDXL_MODEL": options.model,
        "SDXL_DEVICE": device,
        "SDXL_DEADLINE_SECONDS": "600",
        # Else what waits would share a run with what is measured.
        "SDXL_MAX_BATCH": "1",
    }
    samples = Samples(options.steps, options.model)
    with (
        only_bench_on(device),
        running("the server", ["serve", "--port", "0"], settings) as server,
    ):
        asyncio.run(_measure(server.address, options.rounds, samples))
    figures = summarise(samples)
    for line in report(samples, figures):
        print(line)
    if options.out:
        write_json(options.out, where(device) | asdict(samples) | {"judged": figures})
    return 0


async def _measure(url: str, rounds: int, samples: Samples) -> None:
    import httpx

    order = random.Random(0)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=limits, trust_env=False
    ) as client:
        for seed in range(FIRST_REQUESTS):
            await _plain(client, samples.steps, seed)
        for number in range(rounds):
            for arm in order.sample(ARMS, len(ARMS)):
                await _one_arm(client, arm, number, samples)
            for waiting in order.sample((0, WAITING_STREAMS), 2):
                run_ms = await _behind_another(client, samples.steps, number, waiting)
                (samples.beside_streams_ms if waiting else samples.alone_ms).append(run_ms)
            print(f"{number + 1} of {rounds} rounds", file=sys.stderr, flush=True)


async def _one_arm(client: httpx.AsyncClient, arm: str, seed: int, samples: Samples) -> None:
    if arm == "plain":
        samples.run_ms[arm].append(await _plain(client, samples.steps, seed))
        return
    arrived: list[float] = []
    answer: dict[str, Any] = {}
    wanted = _request(samples.steps, seed) | {"preview": arm == "previews"}
    async with _events(client, wanted) as events:
        async for event in events:
            if event["type"] == "step":
                arrived.append(time.time())
            elif event["type"] == "image":
                answer = event
    samples.run_ms[arm].append(answer["timings"]["inference"] * 1e3)
    timeline = (await client.get(f"/timeline/{answer['trace_id']}")).json()
    late_ms = [
        (at - timeline["started_at"]) * 1e3 - (span["start_ms"] + span["ms"])
        for at, span in zip(
            arrived,
            (span for span in timeline["spans"] if span["name"] == "denoise_step"),
            strict=True,
        )
    ]
    (samples.late_previews_ms if arm == "previews" else samples.late_ms).extend(late_ms)


async def _behind_another(client: httpx.AsyncClient, steps: int, seed: int, waiting: int) -> float:
    """Milliseconds of the run of a request that starts after another one has ended, while that
    many streams wait behind it. They are given up afterwards."""
    async with _events(client, _request(steps, seed)) as first:
        await anext(first)  # it is queued, and so before the next
        measured = asyncio.create_task(_plain(client, steps, seed))
        streams = []
        try:
            await anext(first)  # by its first step the next one is queued too
            streams = [
                asyncio.create_task(_wait(client, _request(100, seed))) for _ in range(waiting)
            ]
            async for _ in first:
                pass
            return await measured
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)


async def _wait(client: httpx.AsyncClient, request: dict[str, Any]) -> None:
    async with _events(client, request) as events:
        async for _ in events:
            pass


async def _plain(client: httpx.AsyncClient, steps: int, seed: int) -> float:
    """Send a request; returns the milliseconds of its runs."""
    answer = await client.post("/", json=_request(steps, seed))
    if answer.status_code != 200:
        raise BenchError(f"the server answered a request with status {answer.status_code}")
    seconds: float = answer.json()["timings"]["inference"]
    return seconds * 1e3


def _request(steps: int, seed: int) -> dict[str, Any]:
    prompt = "a red circle on a white background"
    return {"prompt": prompt, "num_inference_steps": steps, "seed": seed}


@asynccontextmanager
async def _events(
    client: httpx.AsyncClient, request: dict[str, Any]
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The data of a stream's events, as they arrive."""
    async with client.stream("POST", "/stream", json=request) as answer:
        if answer.status_code != 200:
            raise BenchError(f"the server answered a stream with status {answer.status_code}")
        yield (
            json.loads(line[len("data: ") :])
            async for line in answer.aiter_lines()
            if line.startswith("data: ")
        )


def summarise(samples: Samples) -> dict[str, Any]:
    """Ratios with 95% intervals, of requests of one round; and how late step events were."""
    from bench.stats.intervals import ratio_interval

    runs = samples.run_ms
    return {
        "stream_to_plain": asdict(ratio_interval(runs["plain"], runs["stream"])),
        "previews_to_stream": asdict(ratio_interval(runs["stream"], runs["previews"])),
        "waiting_streams": asdict(ratio_interval(samples.alone_ms, samples.beside_streams_ms)),
        "step_event_ms": _quantiles(samples.late_ms),
        "step_event_with_preview_ms": _quantiles(samples.late_previews_ms),
        "largest_allowed": TARGETS,
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for name, q in at.items()}


def report(samples: Samples, figures: dict[str, Any]) -> list[str]:
    """The figures as lines for people."""

    def ratio(name: str) -> str:
        found = figures[name]
        return f"{found['point']:.4f} ({found['low']:.4f} to {found['high']:.4f})"

    def late(name: str) -> str:
        return ", ".join(f"{quantile} {ms:.2f} ms" for quantile, ms in figures[name].items())

    return [
        f"{len(samples.alone_ms)} rounds of {samples.steps} steps on {samples.model}",
        f"run time of a stream over POST /: {ratio('stream_to_plain')}",
        f"with previews over without: {ratio('previews_to_stream')}",
        (
            f"beside {WAITING_STREAMS} waiting streams over alone: {ratio('waiting_streams')}; "
            f"at most {TARGETS['waiting_streams']} wanted"
        ),
        (
            f"a step's event after the step's end: {late('step_event_ms')}; "
            f"p99 of at most {TARGETS['step_event_ms_p99']:.0f} ms wanted"
        ),
        f"the same with previews: {late('step_event_with_preview_ms')}",
    ]
