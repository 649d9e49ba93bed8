"""Request time on a busy machine: beside no, one and two endless loops.

    python -m bench busy
    python -m bench busy --rounds 30 --out busy.json

Two self-hosted servers run side by side, and each round sends one request at a time to them, in
random order: `ships` waits as the service decides, `libgomp` as GNU's OpenMP runtime does by itself
(GOMP_SPINCOUNT=300000, its own default). A round goes through all loads in random order. Beside
loops a request to `libgomp` may take a minute, so it is sent in few rounds only.

An endless loop is a process that does nothing but use a core. What else the machine does while this
runs counts as a load too, so the load average is part of the result.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.outputs import output_file, write_json

if TYPE_CHECKING:
    from bench.service.processes import Server

LOADS = (0, 1, 2)
"""Endless loops beside the servers."""
ARMS = {"ships": {}, "libgomp": {"GOMP_SPINCOUNT": "300000"}}
"""The environment of each server."""
TARGETS = {0: 1.05, 1: 2.0, 2: 3.0}
"""Largest ratio of the request's time: without loops to `libgomp`'s, else to its own without."""
FIRST_REQUESTS = 3
"""Not measured: they fill caches."""
SETTLE_SECONDS = 2.5
"""Before each request: a server sees within a second that others need the cores, and a second and a
half later that they no longer do."""


@dataclass
class Samples:
    """Raw samples in milliseconds, by load and by server, in the order of rounds."""

    steps: int
    model: str
    cpu_threads: dict[str, dict[str, Any]]
    """What each server said of its threads on /ready, before the first round."""
    load_average: list[float] = field(default_factory=list)
    """Of the last minute, before the first and after the last round."""
    wall_ms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    waiting: dict[str, list[str]] = field(default_factory=dict)
    """How the threads of `ships` waited just after each of its requests, by load."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=20, help="rounds (default: 20)")
    parser.add_argument(
        "--baseline-rounds",
        type=int,
        default=3,
        help="rounds in which libgomp's own waiting is measured beside loops too (default: 3)",
    )
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--model", default="demo", help="as SDXL_MODEL (default: demo)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="further environment variables of both servers",
    )
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    if options.rounds < 2 or options.baseline_rounds < 0 or options.steps < 1:
        raise BenchError(
            "--rounds must be at least 2, --steps at least 1, --baseline-rounds at least 0"
        )
    more = {}
    for pair in options.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise BenchError(f"--set takes NAME=VALUE, not {pair!r}")
        more[name] = value
    from bench.harness.device_lock import only_bench_on
    from bench.harness.environment import where

    with only_bench_on("cpu"):
        samples = measure(options, more)
    figures = summarise(samples)
    for line in report(samples, figures):
        print(line)
    if options.out:
        written = where("cpu") | asdict(samples) | {"judged": figures}
        write_json(options.out, written)
    return 0


def measure(options: argparse.Namespace, more: dict[str, str]) -> Samples:
    """Start both servers and send them requests, one at a time."""
    from bench.service.processes import running

    settings = {
        "SDXL_MODEL": options.model,
        "SDXL_DEVICE": "cpu",
        "SDXL_DEADLINE_SECONDS": "600",
        **more,
    }
    order = random.Random(0)
    with ExitStack() as stack:
        servers = {
            arm: stack.enter_context(
                running(f"the server {arm}", ["serve", "--port", "0"], settings | environment)
            )
            for arm, environment in ARMS.items()
        }
        samples = Samples(
            options.steps,
            options.model,
            {arm: threads_of(server) for arm, server in servers.items()},
            [os.getloadavg()[0]],
            {str(load): {arm: [] for arm in ARMS} for load in LOADS},
            {str(load): [] for load in LOADS},
        )
        for server in servers.values():
            for seed in range(FIRST_REQUESTS):
                server.generate(seed, options.steps)
        for number in range(options.rounds):
            for load in order.sample(LOADS, len(LOADS)):
                arms = [
                    arm
                    for arm in order.sample(list(ARMS), len(ARMS))
                    if arm == "ships" or not load or number < options.baseline_rounds
                ]
                _time_one_load(servers, arms, load, number, samples)
            print(f"{number + 1} of {options.rounds} rounds", file=sys.stderr, flush=True)
        samples.load_average.append(os.getloadavg()[0])
    return samples


def _time_one_load(
    servers: dict[str, Server], arms: Sequence[str], load: int, number: int, samples: Samples
) -> None:
    with endless_loops(load):
        for arm in arms:
            # The other server's request was work of others too, as this server saw it.
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            servers[arm].generate(number, samples.steps)
            samples.wall_ms[str(load)][arm].append((time.perf_counter() - start) * 1000)
            if arm == "ships":
                samples.waiting[str(load)].append(threads_of(servers[arm])["waiting"])


@contextmanager
def endless_loops(count: int) -> Iterator[None]:
    """Run that many processes that each use a core, until the block ends."""
    loops = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"], stdin=subprocess.DEVNULL)
        for _ in range(count)
    ]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def threads_of(server: Server) -> dict[str, Any]:
    """What a server says of its threads."""
    said: dict[str, Any] = json.loads(server.request("GET", "/ready")[1])["cpu_threads"]
    return said


def summarise(samples: Samples) -> dict[str, Any]:
    """Ratios with 95% intervals. Requests of one round are compared.

    Without loops to `libgomp`'s request, beside loops to the own request without.
    """
    from bench.stats.intervals import interval, ratio_interval

    walls = samples.wall_ms
    idle = walls["0"]
    figures: dict[str, Any] = {
        "0": {
            "ships": asdict(ratio_interval(idle["libgomp"], idle["ships"])),
            "largest_allowed": TARGETS[0],
        }
    }
    for load in LOADS[1:]:
        row: dict[str, Any] = {"largest_allowed": TARGETS[load]}
        for arm, values in walls[str(load)].items():
            if values:
                row[arm] = asdict(
                    interval([wall / idle[arm][index] for index, wall in enumerate(values)])
                )
        figures[str(load)] = row
    return figures


def report(samples: Samples, figures: dict[str, Any]) -> list[str]:
    """The figures as lines for people."""
    from statistics import median

    threads = samples.cpu_threads["ships"]
    before, after = samples.load_average
    work = (
        f"{len(samples.wall_ms['0']['ships'])} rounds of {samples.steps} steps on {samples.model}"
    )
    work += f", {threads['threads']} threads on {threads['cores']} cores"
    lines = [f"{work}; load average {before:.1f} before, {after:.1f} after"]
    for load, row in figures.items():
        beside = "no loop" if load == "0" else f"{load} loop{'s' * (load != '1')}"
        for arm, values in samples.wall_ms[load].items():
            line = f"beside {beside}, {arm}: median {median(values):.0f} ms" if values else None
            if line is not None and (ratio := row.get(arm)):
                to = "libgomp's" if load == "0" else "its own without loops"
                line += f", {ratio['point']:.3f} of {to} ({ratio['low']:.3f} to {ratio['high']:.3f}"
                line += f"; at most {row['largest_allowed']} wanted)" if arm == "ships" else ")"
            if line is not None:
                lines.append(line)
        yielding = samples.waiting[load].count("yielding")
        lines.append(f"  ships yielded in {yielding} of {len(samples.waiting[load])} rounds")
    return lines
