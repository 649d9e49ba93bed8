"""Where the time of a step goes, by kernel.

    python -m bench kernels --scenario default --model random:sdxl-base

Profiles some UNet forwards, or decodes, of a warm scenario: time and calls by kernel and by kind of
kernel, the gaps in the device's timeline, and the kernel that each memset prepares. Each kind is
also compared with its roofline (`bench.kernels.roofline`): FLOPs and bytes where they are known,
the rates reached, and the time at the rates of a large product and a copy, measured just before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.errors import BenchError
from bench.harness.scenarios import chosen
from bench.outputs import output_file, write_json

if TYPE_CHECKING:
    import torch

    from bench.harness.result_file import Ceilings
    from bench.kernels.roofline import FlopsAndBytes

FORWARDS = 5
PARTS = ("step", "decode")

KINDS: tuple[tuple[str, str], ...] = (
    ("generated: reduction", r"^triton_(red|per)"),
    ("generated: pointwise", r"^triton_poi"),
    ("attention", r"flash|fmha|sdpa|attention|few_keys"),
    ("conv", r"conv|fprop|implicit|nchwToNhwc|nhwcToNchw|im2col"),
    ("gemm", r"gemm|nvjet|cutlass|^triton_(tem|mm)|splitK|cublas|s16816|h16816|bmm|addmm|geglu"),
    ("norm", r"norm|RowwiseMoments|softmax"),
    ("copy", r"[Mm]em(cpy|set)|copy|Cat"),
    ("elementwise", r"elementwise|vectorized|upsample|reduce"),
)


def kind_of(kernel: str) -> str:
    """A kernel's kind, by its name. Generated kernels go first: their names list what they fuse."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel)), "other")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scenario", default="default", metavar="NAME", help="as of `run`")
    parser.add_argument(
        "--part", nargs="+", default=["step"], choices=PARTS, help="(default: step)"
    )
    parser.add_argument("--model", help="as SDXL_MODEL (default: demo without a CUDA device)")
    parser.add_argument("--device", default="auto", help="as SDXL_DEVICE (default: auto)")
    parser.add_argument("--shape", metavar="WxH", help="image size (default: the model's first)")
    parser.add_argument(
        "--launches",
        type=Path,
        metavar="FILE",
        help="a file of `launches --out` with this scenario, for FLOPs and bytes by kind",
    )
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    import torch

    from bench.harness.device_lock import only_bench_on
    from bench.harness.drive import load_scenario
    from bench.harness.environment import measure_ceilings, where
    from bench.harness.work import CannotRun, choose_work, dtype_name
    from bench.kernels.roofline import count, read_launches

    (scenario,) = chosen([options.scenario])
    work = choose_work(options.model, options.device, options.shape, 2)
    device = torch.device(work.device)
    dtype = dtype_name(scenario, work) if scenario.quantize == "none" else scenario.quantize
    parts = list(dict.fromkeys(options.part))
    generated: dict[str, dict[str, FlopsAndBytes]] = {part: {} for part in parts}
    if options.launches is not None:
        for part in parts:
            generated[part] = read_launches(options.launches, scenario.name, part, str(work.shape))
    profiles: dict[str, dict[str, Any]] = {}
    with only_bench_on(work.device), asyncio.Runner() as runner:
        ceilings = measure_ceilings(work.device)
        try:
            driven = load_scenario(scenario, work, runner)
        except CannotRun as reason:
            raise BenchError(f"{scenario.name} cannot run here: {reason}") from None

        def profile_and_count(pipeline: Any, part: str) -> dict[str, Any]:
            found = profile(pipeline, work.shape, device, part)
            text_once = getattr(pipeline.unet.forward, "text", None) is not None
            amounts = count(pipeline, work.shape, part, text_once=text_once) | generated[part]
            return found | {"by_kind": by_kind(found["by_kind_ms"], amounts, dtype, ceilings)}

        try:
            for part in parts:
                profiles[part] = driven.with_pipeline(partial(profile_and_count, part=part))
        finally:
            driven.close()
    for part, found in profiles.items():
        print(
            f"{scenario.name}, {part}: {found['timeline_ms']} ms on the timeline, "
            f"{found['gaps_ms']} ms of it gaps, {found['kernels']} kernels"
        )
        for kind, row in found["by_kind"].items():
            print(f"  {kind:24} {row['ms']:9.3f} ms{rate_text(row)}")
        for row in found["top"][:15]:
            named = f"{row['kind']:22} {row['kernel'][:70]}"
            print(f"  {row['ms']:9.3f} ms {row['calls']:7.1f} calls  {named}")
        for row in found["memsets"]:
            print(
                f"  {row['calls']:7.1f} memsets of {row['bytes']} bytes, {row['ms']} ms, before "
                f"{row['kernel'][:70]} ({row['kernel_calls']} calls)"
            )
    if options.out:
        written = where(work.device) | {"scenario": scenario.name, "dtype": dtype}
        written |= {"model": work.model, "shape": str(work.shape)}
        written |= {"ceilings": asdict(ceilings), "parts": profiles}
        write_json(options.out, written)
    return 0


def by_kind(
    milliseconds: Mapping[str, float],
    amounts: Mapping[str, FlopsAndBytes],
    dtype: str,
    ceilings: Ceilings,
) -> dict[str, dict[str, float | None]]:
    """Each kind's time with its FLOPs, bytes and rates."""
    from bench.kernels.roofline import FlopsAndBytes, Rate, rounded

    rows = {}
    for kind, ms in milliseconds.items():
        work = amounts.get(kind, FlopsAndBytes())
        rate = Rate.of(work, ms, dtype, ceilings) if ms else Rate(None, None, None)
        rows[kind] = {
            "ms": ms,
            "gflop": rounded(None if work.flops is None else work.flops / 1e9),
            "megabytes": rounded(None if work.bytes is None else work.bytes / 1e6),
            "tflops": rounded(rate.tflops),
            "gb_per_second": rounded(rate.gb_per_second),
            "bound_ms": rounded(rate.bound_ms),
        }
    return rows


def rate_text(row: Mapping[str, float | None]) -> str:
    """A kind's rates as text for people; empty if its work is not known."""
    parts = []
    if row["tflops"] is not None:
        parts.append(f"{row['tflops']:.4g} TFLOP/s")
    if row["gb_per_second"] is not None:
        parts.append(f"{row['gb_per_second']:.4g} GB/s")
    if row["bound_ms"] and row["ms"]:
        parts.append(
            f"{row['ms'] / row['bound_ms']:.2f} times its bound of {row['bound_ms']:.3g} ms"
        )
    return "".join(f", {part}" for part in parts)


def profile(pipeline: Any, shape: Any, device: torch.device, part: str) -> dict[str, Any]:
    """Milliseconds and calls of one forward, averaged over FORWARDS of them."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from kernels_warmup.numerical_error import StepInputs, forward_once
    from kernels_warmup.rewrites.zero_text import takes_zero_text

    inputs = StepInputs.draw(pipeline.unet, shape, 1, device, torch.bfloat16)
    inputs = inputs.without_negative().cast(pipeline.unet.dtype)
    zero_text = takes_zero_text(pipeline.unet)
    # A run computes the text's share before its steps.
    text = getattr(pipeline.unet.forward, "text", None)
    buffered = None if text is None else text.prepare(inputs.text, inputs.added)
    latents = inputs.latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor

    def once() -> None:
        if part == "step":
            forward_once(pipeline.unet, inputs, zero_text=zero_text, buffered=buffered)
        else:
            pipeline.vae.decode(latents, return_dict=False)

    on_cuda = device.type == "cuda"
    once()
    walls = []
    with profiler(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as seen:
        for _ in range(FORWARDS):
            start = time.perf_counter()
            once()
            if on_cuda:
                torch.cuda.synchronize()
            walls.append((time.perf_counter() - start) * 1000)
    total: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    spans: list[tuple[float, float]] = []
    for event in seen.events() or []:
        if on_cuda and event.device_type.name != "CUDA":
            continue
        span = event.time_range
        # A CPU's operators call one another, so only their own time adds up.
        total[event.name] += span.end - span.start if on_cuda else event.self_cpu_time_total
        calls[event.name] += 1
        spans.append((span.start, span.end))
    busy_ms = covered(spans) / 1000 / FORWARDS
    by_kind: Counter[str] = Counter()
    for kernel, microseconds in total.items():
        by_kind[kind_of(kernel)] += microseconds
    wall_ms = statistics.median(walls)
    memsets: list[dict[str, Any]] = []
    if on_cuda:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            seen.export_chrome_trace(str(trace))
            memsets = memset_owners(json.loads(trace.read_text())["traceEvents"], FORWARDS)
    return {
        "forwards": FORWARDS,
        "timeline_ms": round(wall_ms, 4),
        "gaps_ms": round(max(0.0, wall_ms - busy_ms), 4),
        "kernels": round(sum(calls.values()) / FORWARDS, 1),
        "by_kind_ms": {k: round(v / 1000 / FORWARDS, 4) for k, v in by_kind.most_common()},
        "top": [
            {
                "kernel": kernel[:160],
                "kind": kind_of(kernel),
                "calls": round(calls[kernel] / FORWARDS, 2),
                "ms": round(microseconds / 1000 / FORWARDS, 4),
            }
            for kernel, microseconds in total.most_common(40)
        ],
        "memsets": memsets,
    }


def memset_owners(events: Iterable[Mapping[str, Any]], forwards: int) -> list[dict[str, Any]]:
    """The kernels that memsets prepare, those with the most memsets first.

    A library clears a kernel's workspace right before it launches the kernel, so a memset belongs
    to the next kernel on its stream; if there is none, its kernel is "". Counts and milliseconds
    are of one forward. `kernel_calls` counts all launches of the kernel, with or without a memset.

    Args:
        events: `traceEvents` of a Chrome trace, as torch.profiler exports it.
    """
    streams: defaultdict[tuple[Any, Any], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ("kernel", "gpu_memset"):
            streams[event["args"].get("device"), event["args"].get("stream")].append(event)
    kernel_calls: Counter[str] = Counter()
    memsets: Counter[tuple[str, int]] = Counter()
    microseconds: Counter[tuple[str, int]] = Counter()
    for stream in streams.values():
        owner = ""
        # Backwards, so that the next kernel is known.
        for event in sorted(stream, key=lambda event: float(event["ts"]), reverse=True):
            if event["cat"] == "kernel":
                owner = event["name"]
                kernel_calls[owner] += 1
            else:
                size = int(event["args"].get("bytes", 0))
                memsets[owner, size] += 1
                microseconds[owner, size] += event["dur"]
    return [
        {
            "kernel": kernel[:160],
            "bytes": size,
            "calls": round(count / forwards, 2),
            "kernel_calls": round(kernel_calls[kernel] / forwards, 2),
            "ms": round(microseconds[kernel, size] / 1000 / forwards, 4),
        }
        for (kernel, size), count in memsets.most_common()
    ]


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the timeline that the spans cover, overlaps counted once."""
    busy, until = 0.0, -math.inf
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy
