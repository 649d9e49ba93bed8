"""Throughput with concurrent clients, compared with fal's documented example.

    python -m bench peers --clients 4

Both servers run in processes of their own with the same model, steps and seeds. They are loaded
alternately, in blocks of requests, never at the same time. The scenarios `documented`, `diffusers`
and `default` of `python -m bench run` compare single requests, by step and end to end.
"""

from __future__ import annotations

import argparse
import queue
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from bench.errors import BenchError
from bench.outputs import output_file, write_json

OURS, DOCUMENTED = "ours", "documented"


@dataclass
class Throughput:
    """Images per second of each block, by server, in the order of the blocks."""

    model: str
    steps: int
    clients: int
    requests_a_block: int
    images_per_second: dict[str, list[float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="as SDXL_MODEL (default: demo)")
    parser.add_argument("--clients", type=int, default=4, help="concurrent clients (default: 4)")
    parser.add_argument(
        "--blocks", type=int, default=10, help="blocks of each server (default: 10)"
    )
    parser.add_argument("--requests", type=int, default=12, help="requests a block (default: 12)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: 20)")
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    if min(options.clients, options.blocks, options.requests, options.steps) < 1:
        raise BenchError("--clients, --blocks, --requests and --steps: 1 and more are allowed")
    from bench.harness.device_lock import only_bench_on
    from bench.stats.intervals import interval

    with only_bench_on("peers"):
        found = measure(
            options.model, options.clients, options.blocks, options.requests, options.steps
        )
    for name, rates in found.images_per_second.items():
        print(f"{name}: {interval(rates)} images a second")
    pairs = zip(*(found.images_per_second[name] for name in (OURS, DOCUMENTED)), strict=True)
    ratio = interval([ours / documented for ours, documented in pairs])
    print(f"ours over documented: {ratio}")
    if options.out:
        written = asdict(found) | {"ours_over_documented": asdict(ratio)}
        write_json(options.out, written)
    return 0


def measure(model: str, clients: int, blocks: int, requests: int, steps: int) -> Throughput:
    """Load both servers in blocks; which one is first alternates."""
    from bench.service.processes import running

    found = Throughput(model, steps, clients, requests, {OURS: [], DOCUMENTED: []})
    with ExitStack() as stack:
        servers = {
            OURS: stack.enter_context(
                running("our server", ["serve", "--port", "0"], {"SDXL_MODEL": model})
            ),
            DOCUMENTED: stack.enter_context(
                running("the documented example", ["bench.service.reference_server", model])
            ),
        }
        for server in servers.values():
            load(server, clients, clients, steps)
        for block in range(blocks):
            names = (OURS, DOCUMENTED) if block % 2 else (DOCUMENTED, OURS)
            for name in names:
                seconds = load(servers[name], clients, requests, steps)
                found.images_per_second[name].append(requests / seconds)
            print(f"block {block + 1} of {blocks}", file=sys.stderr, flush=True)
    return found


def load(server: Any, clients: int, requests: int, steps: int) -> float:
    """Seconds until all requests are answered; each client sends its next one at once."""
    from bench.service.processes import connect, holds_image, request_body, send_request

    seeds: queue.SimpleQueue[int] = queue.SimpleQueue()
    for seed in range(requests):
        seeds.put(seed)
    failures: list[str] = []

    def client() -> None:
        connection = connect(server.address)
        try:
            while not failures:
                seed = seeds.get_nowait()
                status, body = send_request(connection, "POST", "/", request_body(seed, steps))
                if status != 200:
                    failures.append(f"{server.name} answered {status}: {body[:200]!r}")
                elif not holds_image(body):
                    failures.append(f"{server.name} answered 200 without an image")
        except queue.Empty:
            pass
        except OSError as error:
            failures.append(f"{server.name} cannot be reached: {type(error).__name__}")
        finally:
            connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise BenchError(failures[0])
    return time.perf_counter() - start
