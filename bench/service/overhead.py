"""Telemetry overhead of a request: full telemetry, trace sampled out, and telemetry disabled.

    python -m bench overhead --pairs 400
    python -m bench overhead --scrape

One self-hosted server receives the three kinds of request, in a new random order each round. Spans
go to a real OTLP/HTTP endpoint in another process. Wall-time ratios compare requests of one round.
CPU time is the kernel's count for the whole server over blocks of requests of one kind, including
what it does after the response.

The model runs on all cores but one, which is left for telemetry, as the host's cores are when the
model is on a GPU. Threads of one product that share a core with other work wait for each other and
spend CPU time on waiting. With --scrape, requests are also compared with and without a scrape of
/metrics every second.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.outputs import output_file, write_json
from bench.service.selective_telemetry_server import trace_context

if TYPE_CHECKING:
    from bench.service.processes import Server

ARMS = ("off", "sampled out", "on")
BLOCK = 10
"""Requests of one kind in a block of which CPU time is measured."""
FIRST_REQUESTS = 5
"""Not measured: they fill caches."""
SETTLE_SECONDS = 2.5
"""Longer than spans wait in the batch processor."""
SCRAPED_BLOCK = 10
"""Requests in a row with a scrape every second, or without."""
OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=400, help="rounds (default: 400)")
    parser.add_argument(
        "--blocks", type=int, default=8, help="blocks of CPU time of each kind (default: 8)"
    )
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--model", default="demo", help="as SDXL_MODEL (default: demo)")
    parser.add_argument("--scrape", action="store_true", help="also measure the cost of scrapes")
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


@dataclass
class Samples:
    """The raw samples: milliseconds by kind of request, in the order of rounds and of blocks."""

    wall_ms: dict[str, list[float]]
    cpu_ms_a_request: dict[str, list[float]]
    spans_received: int
    steps: int
    model: str
    model_threads: int
    scraped_wall_ms: dict[str, list[float]] | None = None


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    if options.pairs < 2 or options.blocks < 2:
        raise BenchError("--pairs and --blocks: 2 and more are allowed, for an interval")
    from bench.harness.device_lock import only_bench_on
    from bench.harness.work import device_named

    with only_bench_on(device_named("auto")):
        samples = measure(options)
    figures = summarise(samples)
    for line in report(samples, figures):
        print(line)
    if options.out:
        write_json(options.out, asdict(samples) | {"judged": figures})
    return 0


def measure(options: argparse.Namespace) -> Samples:
    """Send requests one after the other: 3 a pair, and 30 a block."""
    from bench.service.processes import running
    from kernels_warmup.cpu_threads import cores_given

    threads = max(1, cores_given() - 1)
    samples = Samples(
        {arm: [] for arm in ARMS},
        {arm: [] for arm in ARMS},
        0,
        options.steps,
        options.model,
        threads,
    )
    with ExitStack() as stack:
        receiver = stack.enter_context(
            running("the OTLP receiver", ["bench.service.otlp_receiver"])
        )
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.address,
            "SDXL_MODEL": options.model,
            "SDXL_LOG_FORMAT": "json",
            "OMP_NUM_THREADS": str(threads),
        }
        server = stack.enter_context(
            running("the server", ["bench.service.selective_telemetry_server"], environment)
        )
        for seed in range(FIRST_REQUESTS):
            server.generate(seed, options.steps)
        order = random.Random(0)
        _time_rounds(server, samples, options.pairs, order)
        _count_cpu(server, samples, options.blocks, order)
        if options.scrape:
            samples.scraped_wall_ms = _scraped(server, options.pairs, options.steps)
        time.sleep(SETTLE_SECONDS)
        samples.spans_received = int(receiver.request("GET", "/count")[1])
    if not samples.spans_received:
        raise BenchError("no span reached the receiver, so nothing was measured")
    return samples


def _time_rounds(server: Server, samples: Samples, pairs: int, order: random.Random) -> None:
    for pair in range(pairs):
        for arm in order.sample(ARMS, len(ARMS)):
            start = time.perf_counter()
            server.generate(pair, samples.steps, trace_context=trace_context(arm))
            samples.wall_ms[arm].append((time.perf_counter() - start) * 1000)
        if (pair + 1) % 20 == 0:
            print(f"{pair + 1} of {pairs} pairs", file=sys.stderr, flush=True)


def _count_cpu(server: Server, samples: Samples, blocks: int, order: random.Random) -> None:
    time.sleep(SETTLE_SECONDS)
    for block in range(blocks):
        for arm in order.sample(ARMS, len(ARMS)):
            before = server.cpu_seconds()
            for index in range(BLOCK):
                context = trace_context(arm)
                server.generate(block * BLOCK + index, samples.steps, trace_context=context)
            # The block includes the telemetry that is exported late.
            time.sleep(SETTLE_SECONDS)
            spent = server.cpu_seconds() - before
            samples.cpu_ms_a_request[arm].append(spent * 1000 / BLOCK)
        print(f"{block + 1} of {blocks} blocks", file=sys.stderr, flush=True)


def _scraped(server: Server, pairs: int, steps: int) -> dict[str, list[float]]:
    walls: dict[str, list[float]] = {"alone": [], "scraped": []}
    for block in range(2 * max(1, pairs // SCRAPED_BLOCK // 2)):
        # Alone, scraped, scraped, alone, ...: drift affects both alike.
        name = ("alone", "scraped", "scraped", "alone")[block % 4]
        with _scraper(server.address, on=name == "scraped"):
            for index in range(SCRAPED_BLOCK):
                start = time.perf_counter()
                server.generate(block * SCRAPED_BLOCK + index, steps)
                walls[name].append((time.perf_counter() - start) * 1000)
    return walls


@contextmanager
def _scraper(address: str, on: bool) -> Iterator[None]:
    """If `on`, read /metrics once a second on another thread until the block ends."""
    from bench.service.processes import connect

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


def summarise(samples: Samples) -> dict[str, Any]:
    """Ratios of wall time and differences of CPU time to requests without telemetry.

    Each has a 95% interval.
    """
    from bench.stats.intervals import interval

    off, figures = samples.wall_ms["off"], {}
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
        figures[arm] = {
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
        figures["scraped every second"] = {"wall_ratio": asdict(interval(ratios))}
    return figures


def report(samples: Samples, figures: dict[str, Any]) -> list[str]:
    """The figures as lines for people."""
    pairs = len(samples.wall_ms["off"])
    work = f"{pairs} pairs of {samples.steps} steps on {samples.model}"
    work += f", the model on {samples.model_threads} threads"
    lines = [f"{work}; {samples.spans_received} spans received"]
    for arm, row in figures.items():
        ratio = row["wall_ratio"]
        line = f"{arm}: wall {ratio['point']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f})"
        if more := row.get("cpu_ms_more_a_request"):
            line += (
                f", CPU {more['point']:+.2f} ms a request "
                f"({more['low']:+.2f} to {more['high']:+.2f})"
            )
        lines.append(line)
    return lines
