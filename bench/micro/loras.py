"""What a LoRA costs: the time of a change of the weights, and of a step with and without it.

    python -m bench loras                            the demo model, on this machine
    python -m bench loras --predict                  SDXL base: bytes moved, and the time they take
    python -m bench loras --model random:sdxl-base   SDXL base with random weights, on a GPU

The LoRA has seeded values, and changes every linear layer of the UNet's transformers. Requests go
through the service's own runtime, in turn with it and without it, so every request changes the
weights. Prints the medians of the changes and of the steps, and the ratio of neighbouring requests'
steps, each with its 95% interval.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.outputs import output_file, write_json

NAME = "seeded"

BANDWIDTHS = {"H100 SXM": 3.35e12, "H200": 4.8e12}
"""Bytes a second of the memory, by NVIDIA's data sheets."""

REACHED = 0.8
"""The share of it that is predicted: what copies of large tensors reach."""

PASSES_ON = 4
PASSES_OFF = 2
"""How often a weight's bytes cross the memory bus. On CUDA torch's `addmm` into another tensor
copies the loaded weight there (one read, one write) and adds the product to it (the same again).
Back, it is copied."""


@dataclass(frozen=True)
class Prediction:
    """Bytes that a change moves, and the milliseconds of that by GPU."""

    weights: int
    parameters: int
    rank: int
    kept_bytes: int
    on_bytes: int
    off_bytes: int
    on_ms: dict[str, float]
    off_ms: dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="demo, random:sdxl-base or a directory")
    parser.add_argument("--device", default="auto", help="as SDXL_DEVICE (default: auto)")
    parser.add_argument("--compile", default="auto", help="as SDXL_COMPILE (default: auto)")
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA (default: 64)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps (default: 10)")
    parser.add_argument("--pairs", type=int, default=30, help="of requests (default: 30)")
    parser.add_argument(
        "--predict", action="store_true", help="compute it for SDXL base, run nothing"
    )
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    if min(options.rank, options.steps, options.pairs) < 1:
        raise BenchError("--rank, --steps and --pairs: 1 and more are allowed")
    if options.predict:
        found: dict[str, Any] = asdict(show_prediction(predict(options.rank)))
    else:
        found = measure(options)
    if options.out:
        write_json(options.out, found)
    return 0


def predict(rank: int, bytes_each: int = 2) -> Prediction:
    """The change of SDXL base's UNet by a LoRA of this rank, from the real architecture.

    Args:
        bytes_each: of a weight and of a factor; bfloat16 has 2.
    """
    shapes = list(_shapes("random:sdxl-base").values())
    parameters = sum(outputs * inputs for outputs, inputs in shapes)
    factors = sum(rank * (outputs + inputs) for outputs, inputs in shapes)
    on = bytes_each * (PASSES_ON * parameters + factors)
    off = bytes_each * PASSES_OFF * parameters
    return Prediction(
        weights=len(shapes),
        parameters=parameters,
        rank=rank,
        kept_bytes=bytes_each * (parameters + factors),
        on_bytes=on,
        off_bytes=off,
        on_ms={gpu: 1e3 * on / (rate * REACHED) for gpu, rate in BANDWIDTHS.items()},
        off_ms={gpu: 1e3 * off / (rate * REACHED) for gpu, rate in BANDWIDTHS.items()},
    )


def show_prediction(found: Prediction) -> Prediction:
    print(
        f"SDXL base's UNet, rank {found.rank}: {found.weights} weights, "
        f"{found.parameters / 1e9:.2f} billion parameters, {found.kept_bytes / 1e9:.2f} GB kept"
    )
    for name, moved, times in (
        ("on", found.on_bytes, found.on_ms),
        ("off", found.off_bytes, found.off_ms),
    ):
        each = ", ".join(f"{ms:.1f} ms on {gpu}" for gpu, ms in times.items())
        print(f"{name:3} {moved / 1e9:5.1f} GB moved: {each}, at {REACHED:.0%} of its bandwidth")
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Alternate requests with the LoRA and without it."""
    from bench.harness.device_lock import only_bench_on
    from bench.harness.environment import where
    from bench.harness.work import device_named
    from bench.stats.intervals import interval

    device = device_named(options.device)
    with tempfile.TemporaryDirectory() as folder, only_bench_on(device):
        file = Path(folder) / f"{NAME}.safetensors"
        _write(file, _shapes(options.model), options.rank)
        pairs = asyncio.run(_pairs(options, device, file))
    rows = {
        "change, with it next (ms)": interval([on.lora_swap_ms for on, _ in pairs]),
        "change, without it next (ms)": interval([off.lora_swap_ms for _, off in pairs]),
        "step with it (ms)": interval([_step(on) for on, _ in pairs]),
        "step without it (ms)": interval([_step(off) for _, off in pairs]),
        "step with it over without": interval([_step(on) / _step(off) for on, off in pairs]),
    }
    for name, found in rows.items():
        print(f"{name:30} {found}")
    return where(device) | {
        "model": options.model,
        "rank": options.rank,
        "pairs": options.pairs,
        "figures": {name: asdict(found) for name, found in rows.items()},
    }


async def _pairs(options: argparse.Namespace, device: str, file: Path) -> list[tuple[Any, Any]]:
    """The timings of each pair of requests, with the LoRA and without it."""
    from prometheus_client import CollectorRegistry

    from kernels_warmup.warmup import GUIDED_BY_NOTHING
    from serve.engine.build import build_runtime
    from serve.engine.call import Call
    from serve.errors import ModelError
    from serve.schema import TextToImageRequest, Timings
    from serve.settings import ServeSettings
    from serve.settings.fields import LoraSource

    settings = ServeSettings(
        model=options.model,
        device=device,
        compile=options.compile,
        loras=(LoraSource(NAME, str(file)),),
        max_batch=1,
    )
    runtime = build_runtime(settings, CollectorRegistry(), kinds=(GUIDED_BY_NOTHING,))

    async def timings(wanted: list[dict[str, str]]) -> Timings:
        request = TextToImageRequest.model_validate(
            {
                "prompt": "a red circle on a white background",
                "num_inference_steps": options.steps,
                "seed": 1,
                "loras": wanted,
            }
        )
        call = Call("/", "POST", runtime.tracing.identify())
        return (await runtime.generate(request, call)).timings

    try:
        await runtime.start()
        await timings([])
        return [(await timings([{"path": NAME}]), await timings([])) for _ in range(options.pairs)]
    except ModelError as error:
        raise BenchError(str(error)) from None
    finally:
        runtime.close(5)


def _step(timings: Any) -> float:
    """Milliseconds of a step, without the first, which waits for the text."""
    steps = timings.steps_ms[1:] or timings.steps_ms
    return float(sum(steps) / len(steps))


def _shapes(model: str) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of every linear layer of the UNet's transformers, by its name."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel
    from torch import nn

    from serve.demo_model import checkpoint_path
    from serve.model.sdxl_base import UNET_CONFIG

    config: Any = UNET_CONFIG
    if model != "random:sdxl-base":
        folder = checkpoint_path() if model == "demo" else Path(model)
        file = folder / "unet" / "config.json"
        if not file.is_file():
            raise BenchError("--model: demo, random:sdxl-base or a directory is allowed")
        config = json.loads(file.read_text())
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(config)
    return {
        name: (module.out_features, module.in_features)
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and ".attentions." in f".{name}"
    }


def _write(file: Path, shapes: dict[str, tuple[int, int]], rank: int) -> None:
    """Small values: the pictures stay finite."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (outputs, inputs) in shapes.items():
        for role, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            values = torch.randn(shape, generator=generator) * 0.01
            tensors[f"unet.{name}.lora_{role}.weight"] = values.to(torch.bfloat16)
    save_file(tensors, file)
