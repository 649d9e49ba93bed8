"""What telemetry costs: servers that tell everything, sample everything out, or tell nothing.

    python -m bench overhead --pairs 400
    python -m bench overhead --scrape

Three self-hosted servers in processes of their own get the same requests in turn, in a new order
each round; spans go to a real OTLP/HTTP endpoint in a fourth process. The wall-time ratio is of
requests of one round; CPU is the kernel's count for the whole process, over blocks of rounds, with
what it does after the answer. With --scrape, the server that tells everything is also compared with
itself while /metrics is read every second.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.errors import BenchError

ARMS = ("off", "sampled out", "on")
BLOCK = 20
"""Rounds a block of CPU time: enough that what is told late falls into it."""
FIRST_REQUESTS = 5
"""Left out: caches fill."""
SETTLE_SECONDS = 2.5
"""Longer than the last spans stay in the batch processor."""
SCRAPED_BLOCK = 10
"""Requests in a row with a scraper, then as many without: it reads once a second."""
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=400, help="rounds (default: 400)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--model", default="demo", help="as SDXL_MODEL (default: demo)")
    parser.add_argument("--scrape", action="store_true", help="also the cost of being scraped")
    parser.add_argument("--out", type=Path, help="also write it here, as JSON")


@dataclass
class Samples:
    """What was measured, raw: milliseconds by arm, in the order of rounds and of blocks."""

    wall_ms: dict[str, list[float]]
    cpu_ms_a_request: dict[str, list[float]]
    spans_received: int
    steps: int
    model: str
    scraped_wall_ms: dict[str, list[float]] | None = None


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    if options.pairs < 2 * BLOCK:
        raise BenchError(f"--pairs: {2 * BLOCK} and more are allowed, for two blocks of CPU time")
    from bench.device_lock import only_bench_on

    with only_bench_on("overhead"):
        samples = measure(options.pairs, options.steps, options.model, options.scrape)
    told = judge(samples)
    for line in tell(samples, told):
        print(line)
    if options.out:
        options.out.write_text(json.dumps(asdict(samples) | {"judged": told}, indent=1) + "\n")
    return 0


def measure(pairs: int, steps: int, model: str, scrape: bool) -> Samples:
    """About 3 requests a pair, one after the other."""
    from bench.processes import Server, running

    with ExitStack() as stack:
        receiver = stack.enter_context(running("the OTLP receiver", ["bench.receiver"]))
        exporting = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.address}
        common = {"SDXL_MODEL": model, "SDXL_LOG_FORMAT": "json"}
        ways = {
            "off": ("silent", {"ENABLE_TRACING": "false"}),
            "sampled out": ("tells", exporting | {"OTEL_SAMPLE_RATE": "0"}),
            "on": ("tells", exporting | {"OTEL_SAMPLE_RATE": "1"}),
        }
        servers: dict[str, Server] = {}
        for arm in ARMS:
            way, environment = ways[arm]
            servers[arm] = stack.enter_context(
                running(
                    f"the server with telemetry {arm}", ["bench.telling", way], common | environment
                )
            )
            for seed in range(FIRST_REQUESTS):
                servers[arm].generate(seed, steps)
        samples = Samples({arm: [] for arm in ARMS}, {arm: [] for arm in ARMS}, 0, steps, model)
        _interleave(servers, samples, pairs, steps)
        if scrape:
            samples.scraped_wall_ms = _scraped(servers["on"], pairs, steps)
        samples.spans_received = int(receiver.ask("GET", "/count")[1])
    if not samples.spans_received:
        raise BenchError("no span reached the receiver, so nothing was measured")
    return samples


def _interleave(servers: dict[str, Any], samples: Samples, pairs: int, steps: int) -> None:
    order = random.Random(0)
    for block in range(pairs // BLOCK):
        cpu = {arm: server.cpu_seconds() for arm, server in servers.items()}
        for index in range(BLOCK):
            for arm in order.sample(ARMS, len(ARMS)):
                start = time.perf_counter()
                servers[arm].generate(block * BLOCK + index, steps)
                samples.wall_ms[arm].append((time.perf_counter() - start) * 1000)
        time.sleep(SETTLE_SECONDS)
        for arm, server in servers.items():
            spent = server.cpu_seconds() - cpu[arm]
            samples.cpu_ms_a_request[arm].append(spent * 1000 / BLOCK)
        print(f"{(block + 1) * BLOCK} of {pairs} pairs", file=sys.stderr, flush=True)


def _scraped(server: Any, pairs: int, steps: int) -> dict[str, list[float]]:
    walls: dict[str, list[float]] = {"alone": [], "scraped": []}
    for block in range(2 * max(1, pairs // SCRAPED_BLOCK // 2)):
        # Alone, scraped, scraped, alone, ...: drift befalls both alike.
        name = ("alone", "scraped", "scraped", "alone")[block % 4]
        with _scraper(server.address, on=name == "scraped"):
            for index in range(SCRAPED_BLOCK):
                start = time.perf_counter()
                server.generate(block * SCRAPED_BLOCK + index, steps)
                walls[name].append((time.perf_counter() - start) * 1000)
    return walls


@contextmanager
def _scraper(address: str, on: bool) -> Iterator[None]:
    """Reads /metrics once a second, from another thread, until the block ends."""
    from bench.processes import connect

    stop = threading.Event()

    def scrape() -> None:
        connection = connect(address)
        while not stop.is_set():
            connection.request("GET", "/metrics", headers={"accept": OPEN_METRICS})
            connection.getresponse().read()
            stop.wait(1)
        connection.close()

    thread = threading.Thread(target=scrape, daemon=True)
    if on:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if on:
            thread.join(10)


def judge(samples: Samples) -> dict[str, Any]:
    """Ratios of wall time and differences of CPU, each with its 95% interval."""
    from bench.intervals import interval

    off, told = samples.wall_ms["off"], {}
    for arm in ARMS[1:]:
        ratios = [
            with_it / without for with_it, without in zip(samples.wall_ms[arm], off, strict=True)
        ]
        more = [
            with_it - without
            for with_it, without in zip(
                samples.cpu_ms_a_request[arm], samples.cpu_ms_a_request["off"], strict=True
            )
        ]
        told[arm] = {
            "wall_ratio": asdict(interval(ratios)),
            "cpu_ms_more_a_request": asdict(interval(more, "mean")),
        }
    if samples.scraped_wall_ms is not None:
        alone, scraped = (samples.scraped_wall_ms[name] for name in ("alone", "scraped"))
        blocks = min(len(alone), len(scraped)) // SCRAPED_BLOCK

        def block_mean(values: list[float], block: int) -> float:
            part = values[block * SCRAPED_BLOCK : (block + 1) * SCRAPED_BLOCK]
            return sum(part) / len(part)

        ratios = [block_mean(scraped, block) / block_mean(alone, block) for block in range(blocks)]
        told["scraped every second"] = {"wall_ratio": asdict(interval(ratios))}
    return told


def tell(samples: Samples, told: dict[str, Any]) -> list[str]:
    """For people."""
    pairs = len(samples.wall_ms["off"])
    work = f"{pairs} pairs of {samples.steps} steps on {samples.model}"
    lines = [f"{work}; {samples.spans_received} spans received"]
    for arm, figures in told.items():
        ratio = figures["wall_ratio"]
        line = f"{arm}: wall {ratio['point']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f})"
        if more := figures.get("cpu_ms_more_a_request"):
            line += (
                f", CPU {more['point']:+.2f} ms a request "
                f"({more['low']:+.2f} to {more['high']:+.2f})"
            )
        lines.append(line)
    return lines
