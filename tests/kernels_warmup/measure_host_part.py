"""What the service's choice of CPU threads costs the host's part of a step.

    python -m tests.kernels_warmup.measure_host_part
    python -m tests.kernels_warmup.measure_host_part --rounds 100 --out host-part.json

On CUDA the host launches a step's kernels and computes nothing itself. So this runs the full-size
UNet on torch's meta device, which needs no GPU: every operator is called and no value is computed.
Two processes take turns: in one the threads were chosen as every front door chooses them, in the
other torch's own choice holds. On CUDA nothing else is chosen: how threads wait is changed only for
a model on the CPU.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time

from bench.outputs import output_file, write_json

ARMS = ("untouched", "chosen")
FORWARDS = 1
"""Forwards of one sample."""
SHAPE = (1024, 1024)


def main() -> None:
    """Prints the ratio of the two and its interval."""
    parser = argparse.ArgumentParser(
        description="What the service's choice of CPU threads costs the host's part of a step."
    )
    parser.add_argument("--rounds", type=int, default=40, help="samples of each (default: 40)")
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")
    parser.add_argument("--worker", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        _work(options.worker)
        return
    samples = _measure(max(2, options.rounds))

    from bench.harness.environment import where
    from bench.stats.intervals import interval, ratio_interval

    for arm in ARMS:
        found = interval(samples[arm])
        sys.stdout.write(
            f"{arm}: {found.point:.1f} ms a step ({found.low:.1f} to {found.high:.1f})\n"
        )
    ratio = ratio_interval(samples[ARMS[0]], samples[ARMS[1]])
    sys.stdout.write(
        f"chosen over untouched: {ratio.point:.4f} ({ratio.low:.4f} to {ratio.high:.4f})\n"
    )
    if options.out:
        write_json(options.out, where("cpu") | {"shape": SHAPE, "milliseconds": samples})


def _measure(rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step's host part, by arm, in the order of rounds."""
    from kernels_warmup.cpu_threads import INHERITED, THREADS

    environment = {
        name: value for name, value in os.environ.items() if name not in (*THREADS, INHERITED)
    }
    workers = {
        arm: subprocess.Popen(
            [sys.executable, "-m", "tests.kernels_warmup.measure_host_part", "--worker", arm],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for arm in ARMS
    }
    samples: dict[str, list[float]] = {arm: [] for arm in ARMS}
    order = random.Random(0)
    try:
        for number in range(rounds + 1):
            for arm in order.sample(ARMS, len(ARMS)):
                taken = _ask(workers[arm])
                if number:  # the first sample warms up
                    samples[arm].append(taken)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return samples


def _ask(worker: subprocess.Popen[str]) -> float:
    assert worker.stdin is not None  # both are pipes
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def _work(arm: str) -> None:
    """Print the milliseconds of a forward for each line read."""
    if arm == "chosen":
        from kernels_warmup.cpu_threads import choose_cpu_threads

        choose_cpu_threads()
    import torch
    from diffusers import UNet2DConditionModel

    from kernels_warmup.numerical_error import StepInputs, forward_once
    from kernels_warmup.shapes import CompiledShape
    from serve.model.sdxl_base import UNET_CONFIG

    meta = torch.device("meta")
    with meta, torch.no_grad():
        unet = UNet2DConditionModel(**UNET_CONFIG).to(torch.bfloat16).eval()
        inputs = StepInputs.draw(unet, CompiledShape(*SHAPE), 1, meta, torch.bfloat16)
        for _line in sys.stdin:
            start = time.perf_counter()
            for _ in range(FORWARDS):
                forward_once(unet, inputs)
            taken = (time.perf_counter() - start) / FORWARDS
            sys.stdout.write(f"{1e3 * taken:.3f}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
