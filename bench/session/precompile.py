"""Compile several scenarios at once into the compiler's cache, before they are timed.

    python -m bench precompile --scenario pdl all-lossless batch-8 --model random:sdxl-base

Tracing and lowering a model keeps one core busy for a minute. A machine with many cores compiles
several scenarios in little more than the time of one, as many as the GPU's memory holds. Nothing is
timed here. Choices that the compiler makes by timing are not kept: the run that follows makes them
again, when nothing else runs.

Exit status: 0 done; 1 a scenario failed; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from bench.errors import BenchError
from bench.harness.run_record import NO_TIME
from bench.harness.scenarios import Scenario, chosen
from bench.outputs import output_file, write_json

CORES_EACH = 2
BYTES_EACH = 14 << 30
"""GPU memory of one process: the full-size model in bfloat16, the activations of one image, and
the workspaces of the convolutions that are tried."""
BYTES_PER_FURTHER_IMAGE = 3 << 29
"""Decoding eight images holds 8.6 GB of activations; the UNet's are freed before."""
POLL_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scenario", nargs="+", required=True, metavar="NAME", help="scenarios, as for `run`"
    )
    parser.add_argument("--model", help="as SDXL_MODEL (default: demo without a CUDA device)")
    parser.add_argument("--device", default="auto", help="as SDXL_DEVICE (default: auto)")
    parser.add_argument("--shape", metavar="WxH", help="image size (default: the model's first)")
    parser.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="processes at the same time (default: as many as memory and cores allow)",
    )
    parser.add_argument(
        "--seconds-limit", type=float, metavar="S", help="stop what is not finished after S seconds"
    )
    parser.add_argument("--out", type=output_file, help="write the duration of each here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    from bench.harness.device_lock import only_bench_on
    from bench.harness.environment import describe_machine, where
    from bench.harness.torch_state import device_memory
    from bench.harness.work import CannotRun, check_can_run, choose_work

    work = choose_work(options.model, options.device, options.shape, 2)
    outcomes: dict[str, str] = {}
    scenarios = []
    for scenario in chosen(options.scenario):
        try:
            check_can_run(scenario, work)
        except CannotRun as reason:
            outcomes[scenario.name] = str(reason)
            continue
        scenarios.append(scenario)
    cores = describe_machine(work.device).cores
    at_once = options.at_once
    if at_once is None:
        at_once = max(1, min(len(scenarios), cores // CORES_EACH)) if work.on_cuda else 1
    if at_once < 1:
        raise BenchError("--at-once must be at least 1")
    memory = device_memory(work.device)[1] if work.on_cuda else None
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(2, cores // at_once))}

    def start(scenario: Scenario) -> subprocess.Popen[bytes]:
        arguments = [scenario.name, work.model, work.device, str(work.shape)]
        return subprocess.Popen(
            [sys.executable, "-m", "bench.session.precompile", *arguments],
            env=os.environ | threads,
            stdout=subprocess.DEVNULL,
        )

    with only_bench_on(work.device):
        outcomes |= compile_all(scenarios, start, at_once, options.seconds_limit, memory)
    for name, outcome in outcomes.items():
        print(f"{name:24} {outcome}")
    if options.out:
        written = where(work.device) | {"at_once": at_once, "scenarios": outcomes}
        write_json(options.out, written)
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


def compile_all(
    scenarios: Sequence[Scenario],
    start: Callable[[Scenario], subprocess.Popen[bytes]],
    at_once: int,
    seconds_limit: float | None = None,
    memory: int | None = None,
) -> dict[str, str]:
    """Compile each scenario in a process of its own; returns the outcome of each by name.

    Every process has ended when this returns or raises.

    Args:
        at_once: the most processes at the same time.
        memory: bytes of GPU memory that they may need together; None for no limit. A scenario that
            needs more than all of it runs alone.
    """
    began = time.monotonic()
    left, outcomes = list(scenarios), {}
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    needed: dict[str, int] = {}
    try:
        while left or running:
            while left and len(running) < at_once:
                free = None if memory is None else memory - sum(needed[name] for name in running)
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
                    outcomes[name] = f"{how} {seconds:.0f} s"
                    del running[name]
            if seconds_limit is not None and time.monotonic() - began > seconds_limit:
                outcomes |= dict.fromkeys((*running, *(s.name for s in left)), NO_TIME)
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
    return outcomes


def bytes_needed(scenario: Scenario) -> int:
    """An upper bound of the GPU memory that preparing it at 1024x1024 takes."""
    return BYTES_EACH + (scenario.images - 1) * BYTES_PER_FURTHER_IMAGE


def main(arguments: Sequence[str]) -> int:
    """Load one scenario as `bench run` does, which compiles it, and close it."""
    import asyncio

    import torch._inductor.config

    from bench.harness.drive import load_scenario
    from bench.harness.work import CannotRun, choose_work

    # Other processes run meanwhile, so a choice made by timing would be arbitrary. This option is
    # not part of the key that a compiled graph is cached by.
    torch._inductor.config.autotune_local_cache = False
    name, model, device, shape = arguments
    (scenario,) = chosen([name])
    with asyncio.Runner() as runner:
        try:
            load_scenario(scenario, choose_work(model, device, shape, 2), runner).close()
        except CannotRun as reason:
            print(f"{name}: {reason}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
