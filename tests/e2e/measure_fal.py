"""`python -m tests.e2e.measure_fal`: what fal's runtime costs beyond the self-hosted server.

Both serve the demo model on the CPU, as real processes on this machine. Prints the time that
`import serve.app` takes and what of it is fal's, the time from a process's start to ready, and the
time that a request takes longer, from pairs of one request to each in turn.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

import httpx

from tests.e2e.conftest import START_SECONDS, STARTS

ENVIRONMENT = {"SDXL_DEVICE": "cpu"}

# The least work for an image, so that only the server differs.
ONE_STEP = {
    "prompt": "a red circle",
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "width": 160,
    "height": 96,
    "seed": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.e2e.measure_fal")
    parser.add_argument("--starts", type=int, default=5, help="starts of each (%(default)s)")
    parser.add_argument("--pairs", type=int, default=300, help="pairs of requests (%(default)s)")
    arguments = parser.parse_args()

    for module in ("serve.app", "fal"):
        seconds = [seconds_to_import(module) for _ in range(arguments.starts + 1)][1:]
        print(f"import {module}: {summary(seconds, 's')}")

    starts: dict[str, list[float]] = {kind: [] for kind in STARTS}
    for _ in range(arguments.starts):
        for kind, taken in starts.items():
            taken.append(seconds_to_ready(kind))
    for kind, taken in starts.items():
        print(f"{kind}: process start to ready: {summary(taken, 's')}")
    later = [fal - ours for ours, fal in zip(starts["self-hosted"], starts["fal"], strict=True)]
    print(f"fal is ready later by: {summary(later, 's')}")

    with ExitStack() as stack:
        clients = []
        for start in STARTS.values():
            process = stack.enter_context(start(ENVIRONMENT))
            process.wait_until_ready(START_SECONDS)
            clients.append(stack.enter_context(httpx.Client(base_url=process.url, timeout=60)))
        print(f"a refused request takes longer by: {longer(clients, {}, arguments.pairs)}")
        print(f"an image of one step takes longer by: {longer(clients, ONE_STEP, arguments.pairs)}")


def seconds_to_import(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def seconds_to_ready(kind: str) -> float:
    with STARTS[kind](ENVIRONMENT) as process:
        return process.wait_until_ready(START_SECONDS)


def longer(clients: Sequence[httpx.Client], body: dict[str, object], pairs: int) -> str:
    """How much longer the second takes than the first; each pair begins with the other one."""
    for client in clients:
        for _ in range(20):
            client.post("/", json=body)
    differences = []
    for pair in range(pairs):
        milliseconds = [0.0, 0.0]
        for which in (0, 1) if pair % 2 else (1, 0):
            start = time.perf_counter()
            clients[which].post("/", json=body).read()
            milliseconds[which] = (time.perf_counter() - start) * 1e3
        differences.append(milliseconds[1] - milliseconds[0])
    return summary(differences, "ms")


def summary(values: Sequence[float], unit: str) -> str:
    """The median and where it lies with 95% confidence, by the sign test's order statistics."""
    ordered = sorted(values)
    half_width = 0.98 * len(ordered) ** 0.5
    low = ordered[max(0, round(len(ordered) / 2 - half_width) - 1)]
    high = ordered[min(len(ordered) - 1, round(len(ordered) / 2 + half_width))]
    median = statistics.median(ordered)
    return f"{median:.2f} {unit} ({low:.2f} to {high:.2f}, {len(ordered)} measured)"


if __name__ == "__main__":
    main()
