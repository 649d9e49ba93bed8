"""Throughput with concurrent clients, beside other servers of the same checkpoint.

    python -m bench peers --clients 1,4,16 --peers documented,bentoml,litserve

All servers draw the same images: the same model, dtype, size, steps and seeds, as PNG. They are
loaded alternately, in blocks of requests, never at the same time; a server that is not loaded is
paused. Each block gives one ratio to each peer. `documented` is fal's documented example, which has
no batching; BentoML and LitServe batch up to --max-batch requests, as our server may. `make
peers-env` installs these two.

The scenarios `documented`, `diffusers` and `default` of `python -m bench run` compare single
requests, by step and end to end.

Exit status: 0 all was measured; 2 wrong usage, or a server failed.
"""

from __future__ import annotations

import argparse
import http.client
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.outputs import output_file, write_json

if TYPE_CHECKING:
    from bench.peers.drawing import PeerSettings
    from bench.peers.servers import ComparedServer
    from bench.stats.intervals import Interval

OWN_THREADS = "own"
FEWEST_REQUESTS = 4
"""Requests of a block."""
TRAINING_REQUESTS = 12
"""Requests before anything else, one after the other. BentoML's batching learns how long one, two
and three take together from the first eleven batches, and waits for the others meanwhile."""
LONGEST_WAIT_SECONDS = 3600
"""The same for every server, so that none refuses a request that another one answers."""

Rates = Mapping[int, Mapping[str, Sequence[float]]]
"""Images per second of each block, in the order of the blocks, by clients and server."""


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    peers: tuple[str, ...]
    clients: tuple[int, ...]
    """Ascending. One number after the other, because BentoML's batching goes by its last 50
    batches: waiting times with many clients would delay a single one."""
    blocks: int
    requests: int | None
    """Requests of a block; None: chosen by the number of clients."""
    steps: int
    threads: int | None
    """OMP_NUM_THREADS of every server; None: each has its own default."""

    def requests_with(self, clients: int) -> int:
        """Requests of a block with so many clients.

        Two rounds of all clients, since the first batch of a block may be a single request.
        """
        return self.requests or max(FEWEST_REQUESTS, 2 * clients)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from bench.peers.servers import DOCUMENTED, PEERS

    add = parser.add_argument
    add("--model", default="demo", help="as SDXL_MODEL (default: demo)")
    add("--dtype", default="auto", help="as SDXL_DTYPE (default: auto)")
    add("--shape", default="", help="WIDTHxHEIGHT (default: the model's)")
    add(
        "--peers",
        type=_names,
        default=(DOCUMENTED,),
        help=f"comma-separated, of {', '.join(PEERS)} (default: {DOCUMENTED})",
    )
    add(
        "--clients",
        type=_numbers,
        default=(4,),
        help="concurrent clients, comma-separated (default: 4)",
    )
    add("--blocks", type=int, default=6, help="blocks of each server (default: 6)")
    add(
        "--requests",
        type=int,
        help=f"requests a block (default: two a client, at least {FEWEST_REQUESTS})",
    )
    add("--steps", type=int, default=20, help="denoising steps (default: 20)")
    add("--max-batch", type=int, default=8, help="images of a batch at most (default: 8)")
    add(
        "--threads",
        default=None,
        help="OMP_NUM_THREADS of every server: a number, or `own` for each server's own default "
        "(default: OMP_NUM_THREADS if it is set, else the cores that this process may use)",
    )
    add("--out", type=output_file, metavar="FILE", help="also write it here, as JSON")


def _names(text: str) -> tuple[str, ...]:
    from bench.peers.servers import PEERS

    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PEERS)}")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers") from None


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    from bench.harness.device_lock import only_bench_on
    from bench.harness.work import device_named

    plan, settings = _checked(options)
    device = device_named("auto")
    with only_bench_on(device):
        load_average = os.getloadavg()[0]
        rates = measure(plan, settings)
    report(plan, rates, load_average)
    if options.out:
        write_json(options.out, _result(device, plan, settings, rates, load_average))
    return 0


def _checked(options: argparse.Namespace) -> tuple[Plan, PeerSettings]:
    """Raises BenchError for a value that is not allowed, or a peer that is not installed."""
    from bench.peers.drawing import PeerSettings
    from bench.peers.environments import PINS, pythonpath
    from kernels_warmup.shapes import CompiledShape

    counts = [*options.clients, options.blocks, options.steps]
    if min(counts) < 1 or (options.requests is not None and options.requests < 1):
        raise BenchError("--clients, --blocks, --requests and --steps: 1 and more are allowed")
    if options.max_batch < 2:  # as BentoML's batching requires
        raise BenchError("--max-batch: 2 and more are allowed")
    if options.dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise BenchError("--dtype: auto, bfloat16, float16 and float32 are allowed")
    if options.shape:
        try:
            CompiledShape.parse(options.shape)
        except ValueError as error:
            raise BenchError(f"--shape: {error}") from None
    for name in options.peers:
        if name in PINS:
            pythonpath(name)
    plan = Plan(
        peers=options.peers,
        clients=options.clients,
        blocks=options.blocks,
        requests=options.requests,
        steps=options.steps,
        threads=_threads(options.threads),
    )
    settings = PeerSettings(
        model=options.model,
        dtype=options.dtype,
        shape=options.shape,
        max_batch=options.max_batch,
        longest_wait_seconds=LONGEST_WAIT_SECONDS,
    )
    return plan, settings


def _threads(given: str | None) -> int | None:
    if given == OWN_THREADS:
        return None
    text = given or os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    if not text.isdecimal() or int(text) < 1:
        raise BenchError(f"--threads: a number from 1 and `{OWN_THREADS}` are allowed")
    return int(text)


# Measuring ---------------------------------------------------------------------------------------


def measure(plan: Plan, settings: PeerSettings) -> Rates:
    """Load the servers in blocks. Raises BenchError if a server fails."""
    from bench.peers.servers import OURS, serving

    names = (OURS, *plan.peers)
    rates: dict[int, dict[str, list[float]]] = {
        clients: {name: [] for name in names} for clients in plan.clients
    }
    with ExitStack() as stack:
        servers: dict[str, ComparedServer] = {}
        for name in names:
            print(f"starting {name}", file=sys.stderr, flush=True)
            servers[name] = stack.enter_context(
                serving(name, settings, max(plan.clients), plan.threads)
            )
            load(servers[name], 1, TRAINING_REQUESTS, plan.steps)
            servers[name].pause()
        for clients in plan.clients:
            requests = plan.requests_with(clients)
            for name in names:
                # The first runs of a batch size are slow.
                load_alone(servers[name], clients, clients, plan.steps)
            for block in range(plan.blocks):
                for name in order(names, block):
                    seconds = load_alone(servers[name], clients, requests, plan.steps)
                    rates[clients][name].append(requests / seconds)
                print(
                    f"{clients} clients, block {block + 1} of {plan.blocks}",
                    file=sys.stderr,
                    flush=True,
                )
    return rates


def load_alone(server: ComparedServer, clients: int, requests: int, steps: int) -> float:
    """As `load`, of a server that is paused before and after."""
    server.resume()
    seconds = load(server, clients, requests, steps)
    server.pause()
    return seconds


def order(names: Sequence[str], block: int) -> list[str]:
    """The servers' order in a block: each is first, last and next to each other equally often."""
    turn = (block // 2) % len(names)
    turned = [*names[turn:], *names[:turn]]
    return turned[::-1] if block % 2 else turned


def load(server: ComparedServer, clients: int, requests: int, steps: int) -> float:
    """Seconds until all requests are answered; each client sends its next one at once.

    Raises:
        BenchError: a request failed.
    """
    from bench.harness.work import PROMPT

    seeds: queue.SimpleQueue[int] = queue.SimpleQueue()
    for seed in range(requests):
        seeds.put(seed)
    failures: list[str] = []

    def client() -> None:
        connection = server.connect()
        try:
            while not failures:
                seed = seeds.get_nowait()
                drawing = {"prompt": PROMPT, "num_inference_steps": steps, "seed": seed}
                server.draw(connection, drawing)
        except queue.Empty:
            pass
        except BenchError as error:
            failures.append(str(error))
        except (OSError, http.client.HTTPException) as error:
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


# Reporting ---------------------------------------------------------------------------------------


def report(plan: Plan, rates: Rates, load_average: float) -> None:
    """Print images a second and ratios, with intervals."""
    from bench.peers.servers import OURS
    from bench.stats.intervals import interval

    for clients in plan.clients:
        requests, rows = plan.requests_with(clients), rates[clients]
        print(f"{clients} clients, {plan.blocks} blocks of {requests} requests: images a second")
        print(f"  {OURS:<11} {interval(rows[OURS])}")
        for name, ratio in ratios(rows):
            print(f"  {name:<11} {interval(rows[name])}, ours over it {ratio}")
    cores = len(os.sched_getaffinity(0))
    if load_average > cores / 2:
        print(f"note: the machine was busy: load {load_average:.1f} on {cores} cores")


def ratios(rates: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, Interval]]:
    """Ours over each peer, of the pairs of each block."""
    from bench.peers.servers import OURS
    from bench.stats.intervals import interval

    for name, theirs in rates.items():
        if name != OURS:
            pairs = zip(rates[OURS], theirs, strict=True)
            yield name, interval([ours / other for ours, other in pairs])


def _result(
    device: str, plan: Plan, settings: PeerSettings, rates: Rates, load_average: float
) -> dict[str, Any]:
    """The measurement as JSON has it."""
    from bench.harness.environment import where
    from bench.peers.environments import PINS, version

    return {
        **where(device),
        "load_average": load_average,
        "peers": {name: version(name) if name in PINS else None for name in plan.peers},
        "model": settings.model,
        "dtype": settings.dtype,
        "shape": settings.shape or None,
        "max_batch": settings.max_batch,
        "steps": plan.steps,
        "threads": plan.threads,
        "clients": {
            str(clients): {
                "requests_a_block": plan.requests_with(clients),
                "images_per_second": rates[clients],
                "ours_over": {name: asdict(ratio) for name, ratio in ratios(rates[clients])},
            }
            for clients in plan.clients
        },
    }
