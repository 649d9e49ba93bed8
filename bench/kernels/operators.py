"""Time of every distinct product, convolution, attention and norm of a step, each by itself.

    python -m bench operators --model random:sdxl-base --shape 1024x1024

Prints how often each occurs in a step, and the rate that each implementation of it reaches.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bench.outputs import output_file, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="as SDXL_MODEL (default: demo without a CUDA device)")
    parser.add_argument("--device", default="auto", help="as SDXL_DEVICE (default: auto)")
    parser.add_argument("--shape", metavar="WxH", help="image size (default: the model's first)")
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    import torch

    from bench.harness.device_lock import only_bench_on
    from bench.harness.environment import measure_ceilings, where
    from bench.harness.work import choose_work
    from bench.kernels.operator_times import time_operators
    from kernels_warmup.numerical_error import StepInputs
    from serve.model.loading import load_model

    work = choose_work(options.model, options.device, options.shape, 2)
    device = torch.device(work.device)
    with only_bench_on(work.device), torch.no_grad():
        ceilings = measure_ceilings(work.device)
        unet = load_model(work.model, None, work.device, "bfloat16").pipeline.unet
        inputs = StepInputs.draw(unet, work.shape, 1, device, torch.bfloat16)
        rows = time_operators(unet, inputs, device)
    for row in sorted(rows, key=lambda row: -row.get("step_ms", 0)):
        figures = row.get("failed") or (
            f"{row['us']:9.1f} us x {row['count']:3d} = {row['step_ms']:7.3f} ms a step, "
            + (f"{row['gb_s']:6.0f} GB/s" if "gb_s" in row else f"{row['tflops']:6.1f} TFLOP/s")
        )
        sizes = "x".join(map(str, row["sizes"]))
        print(f"{row['kind']:10} {sizes:32} {row['how']:32} {figures}")
    if options.out:
        written = where(work.device) | {"model": work.model, "shape": str(work.shape)}
        written |= {"ceilings": asdict(ceilings), "operators": rows}
        write_json(options.out, written)
    return 0
