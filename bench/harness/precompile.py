"""Compiles several scenarios at once into the compiler's cache, so that timing them does not wait.

    python -m bench precompile --scenario pdl all-lossless batch-8 --model random:sdxl-base

Tracing and lowering a model keep one core busy for a minute; a machine with many cores compiles
several scenarios in little more than the time of one, as many as its GPU's memory holds. Nothing is
timed, and choices that the compiler makes by timing are not kept: the run that follows makes them
again, on a machine at rest.

Exit status: 0 done; 1 a scenario failed; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.errors import BenchError
from bench.harness.scenarios import Scenario, chosen

CORES_EACH = 2
BYTES_EACH = 14 << 30
"""GPU memory of one process: the full-size model in bfloat16, the activations of one image, and
workspaces for the convolutions that are tried."""
BYTES_PER_FURTHER_IMAGE = 3 << 29
"""A decode of eight images holds 8.6 GB of activations, and the UNet's come before it."""
POLL_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scenario", nargs="+", required=True, metavar="NAME", help="as of `run`")
    parser.add_argument("--model", help="as SDXL_MODEL (default: demo without a CUDA device)")
    parser.add_argument("--device", default="auto", help="as SDXL_DEVICE (default: auto)")
    parser.add_argument("--shape", metavar="WxH", help="image size (default: the model's first)")
    parser.add_argument(
        "--at-once", type=int, metavar="N", help="at most so many (default: what memory allows)"
    )
    parser.add_argument("--seconds-limit", type=float, metavar="S", help="end what takes longer")
    parser.add_argument("--out", type=Path, help="write here how long each took, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    from bench.harness.device_lock import only_bench_on
    from bench.harness.drive import CannotRun, choose_work, device_memory, refuse_what_cannot_run
    from bench.harness.environment import describe_machine, where

    work = choose_work(options.model, options.device, options.shape, 2)
    told: dict[str, str] = {}
    scenarios = []
    for scenario in chosen(options.scenario):
        try:
            refuse_what_cannot_run(scenario, work)
        except CannotRun as reason:
            told[scenario.name] = str(reason)
            continue
        scenarios.append(scenario)
    cores = describe_machine(work.device).cores
    at_once = options.at_once
    if at_once is None:
        at_once = max(1, min(len(scenarios), cores // CORES_EACH)) if work.on_cuda else 1
    if at_once < 1:
        raise BenchError("--at-once: 1 and more are allowed")
    room = device_memory(work.device)[1] if work.on_cuda else None
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(2, cores // at_once))}

    def start(scenario: Scenario) -> subprocess.Popen[bytes]:
        arguments = [scenario.name, work.model, work.device, str(work.shape)]
        return subprocess.Popen(
            [sys.executable, "-m", "bench.harness.precompile", *arguments],
            env=os.environ | threads,
            stdout=subprocess.DEVNULL,
        )

    with only_bench_on(work.device):
        told |= all_of(scenarios, start, at_once, options.seconds_limit, room)
    for name, one in told.items():
        print(f"{name:24} {one}")
    if options.out:
        written = where(work.device) | {"at_once": at_once, "scenarios": told}
        options.out.write_text(json.dumps(written, indent=1) + "\n")
    return int(any(one.startswith("failed") for one in told.values()))


def all_of(
    scenarios: Sequence[Scenario],
    start: Callable[[Scenario], subprocess.Popen[bytes]],
    at_once: int,
    seconds_limit: float | None = None,
    room: int | None = None,
) -> dict[str, str]:
    """Each in a process of its own; what became of it, by name. None of them outlives the call.

    Args:
        at_once: at most so many processes.
        room: bytes of GPU memory that they may need together; None: no limit. A scenario that needs
            more than all of it is tried alone.
    """
    began = time.monotonic()
    left, told = list(scenarios), {}
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    needed: dict[str, int] = {}
    try:
        while left or running:
            while left and len(running) < at_once:
                free = None if room is None else room - sum(needed[name] for name in running)
                fits = [s for s in left if free is None or bytes_needed(s) <= free]
                if running and not fits:
                    break
                scenario = (fits or left)[0]
                left.remove(scenario)
                needed[scenario.name] = bytes_needed(scenario)
                running[scenario.name] = start(scenario), time.monotonic()
            for name, (process, since) in list(running.items()):
                status = process.poll()
                if status is not None:
                    seconds = time.monotonic() - since
                    how = "compiled in" if status == 0 else f"failed with status {status} after"
                    told[name] = f"{how} {seconds:.0f} s"
                    del running[name]
            if seconds_limit is not None and time.monotonic() - began > seconds_limit:
                told |= dict.fromkeys(running, "there was no time left for it")
                told |= dict.fromkeys((s.name for s in left), "there was no time left for it")
                break
            time.sleep(POLL_SECONDS)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()
    return told


def bytes_needed(scenario: Scenario) -> int:
    """GPU memory to prepare it at 1024x1024, at most."""
    return BYTES_EACH + (scenario.images - 1) * BYTES_PER_FURTHER_IMAGE


def main(arguments: Sequence[str]) -> int:
    """One scenario: made ready as a run makes it, and given back."""
    import asyncio

    import torch._inductor.config

    from bench.harness.drive import CannotRun, choose_work, drive

    # Others compile and time beside this one, so what is fastest here is fastest by chance. This
    # option is no part of the key that a graph is cached by.
    torch._inductor.config.autotune_local_cache = False
    name, model, device, shape = arguments
    (scenario,) = chosen([name])
    with asyncio.Runner() as runner:
        try:
            drive(scenario, choose_work(model, device, shape, 2), runner).close()
        except CannotRun as reason:
            print(f"{name}: {reason}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
