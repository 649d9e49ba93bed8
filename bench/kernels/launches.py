"""The kernels that a step or a decode launches on a Hopper GPU, counted without one.

    python -m bench launches --scenario compiled all-lossless --model random:sdxl-base

Counts launches, bytes and FLOPs by kind of kernel in the code that torch's compiler generates for
an H200. From them and the given rates (the defaults were measured on one) follows the least time
that they need. It predicts what a change saves of these; `run` measures what that gains.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from bench.errors import BenchError
from bench.harness.scenarios import KERNELS, Scenario, chosen
from bench.outputs import output_file, write_json
from bench.terminal import table

if TYPE_CHECKING:
    from bench.kernels.hopper_code import Lowered
    from kernels_warmup.quantize import Quantized
    from kernels_warmup.shapes import CompiledShape

PARTS = ("step", "decode")
TFLOPS = 710.0
"""TFLOP/s of bfloat16 products, measured on an H200 (bench/results/notes.md)."""
GBPS = 4273.0
"""GB/s read and written, measured in the same session."""


@dataclass(frozen=True)
class CountedModel:
    """The model's configurations, and the size and number of the images."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    shape: CompiledShape
    images: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scenario",
        nargs="+",
        default=["compiled"],
        metavar="NAME",
        help="as of `run`; only those compiled whole (default: compiled)",
    )
    parser.add_argument("--part", default="step", choices=PARTS, help="(default: step)")
    parser.add_argument(
        "--model",
        default="random:sdxl-base",
        help="demo, random:sdxl-base or a directory; its weights are not read",
    )
    parser.add_argument("--shape", metavar="WxH", help="image size (default: the model's first)")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="(default: %(default)s)")
    parser.add_argument("--gbps", type=float, default=GBPS, help="(default: %(default)s)")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="kernels to list")
    parser.add_argument("--out", type=output_file, help="also write it here, as JSON")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BenchError."""
    scenarios = chosen(options.scenario)
    scenarios.sort(key=lambda scenario: options.scenario.index(scenario.name))
    for scenario in scenarios:
        recipe = _fields(scenario, options.part)
        if scenario.calibration or recipe is None or recipe.scope != "whole":
            raise BenchError(
                f"{scenario.name} is not compiled whole: it launches the library's own kernels"
            )
    counts = [_count(scenario, options) for scenario in scenarios]
    if options.out:
        write_json(options.out, {"counted": counts})
    return 0


def _count(scenario: Scenario, options: argparse.Namespace) -> dict[str, Any]:
    counted = _read_model(options.model, options.shape, scenario.images)
    lowered = lower_part(scenario, options.part, counted)
    summary = summarise(lowered, options.tflops, options.gbps)
    title = f"{scenario.name}, {options.part} at {counted.shape}"
    if counted.images > 1:
        title += f", {counted.images} images"
    print(f"\n{title}: {scenario.what}")
    print(report(summary))
    for name, (count, size) in _largest(lowered, options.top):
        print(f"  {count:4d} x {size / count / 1e6:8.2f} MB  {name[:90]}")
    return {
        "scenario": scenario.name,
        "part": options.part,
        "model": options.model,
        "shape": str(counted.shape),
        "images": counted.images,
        "tflops": options.tflops,
        "gbps": options.gbps,
        "by_kind": summary,
    }


def _read_model(model: str, shape: str | None, images: int) -> CountedModel:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from kernels_warmup.shapes import PIXELS_PER_LATENT, CompiledShape
    from serve.demo_model import checkpoint_path
    from serve.model.sdxl_base import UNET_CONFIG, VAE_CONFIG
    from serve.settings import DEMO_MODEL, RANDOM_SDXL_BASE

    if model == RANDOM_SDXL_BASE:
        unet, vae = UNET_CONFIG, VAE_CONFIG
    else:
        folder = checkpoint_path() if model == DEMO_MODEL else Path(model).expanduser()
        try:
            unet = UNet2DConditionModel.load_config(folder / "unet")
            vae = AutoencoderKL.load_config(folder / "vae")
        except OSError:
            raise BenchError(
                f"{model!r} has no local configuration; allowed are {DEMO_MODEL}, "
                f"{RANDOM_SDXL_BASE} and a directory in diffusers layout"
            ) from None
    side = unet["sample_size"] * PIXELS_PER_LATENT
    try:
        size = CompiledShape(side, side) if shape is None else CompiledShape.parse(shape)
    except ValueError as error:
        raise BenchError(str(error)) from None
    return CountedModel(unet, vae, size, images)


def _fields(scenario: Scenario, part: str) -> Any:
    """The recipe of the part that is lowered."""
    import torch

    from bench.harness.drive import recipe_of
    from kernels_warmup.recipes import RECIPES, mode_for

    if part == "decode" and scenario.decoder is not None:
        return recipe_of(scenario.decoder)
    if scenario.recipe is not None:
        return recipe_of(scenario.recipe)
    # The mode for a GPU, because this machine's device may have another.
    return RECIPES[mode_for(scenario.compile, torch.device("cuda"))]


def lower_part(scenario: Scenario, part: str, counted: CountedModel) -> Lowered:
    """All launches of one step (both halves of guidance) or of one decode."""
    from dataclasses import replace

    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from bench.kernels.hopper_code import fake_module, lower, pretended_gpu
    from kernels_warmup.compile import compile_decoder, compile_unet
    from kernels_warmup.triton import why_unusable as kernels_unusable

    # Only the recipe's rewrites are applied; `lower` replaces compiling and capturing.
    recipe = replace(_fields(scenario, part), scope="none", replay="none", options={})
    dtype = torch.bfloat16
    with pretended_gpu() as mode:
        with mode:
            latents = (4, *counted.shape.latent)
            if part == "decode":
                vae = fake_module(lambda: AutoencoderKL(**_clean(counted.vae)), dtype)
                function = compile_decoder(vae, recipe).function
                module = vae.decoder
                inputs: tuple[Any, ...] = (
                    torch.empty(counted.images, *latents, device="cuda", dtype=dtype),
                )
            else:
                module = fake_module(lambda: UNet2DConditionModel(**_clean(counted.unet)), dtype)
                attention = "cudnn" if scenario.attention == "auto" else scenario.attention
                missing = kernels_unusable(torch.device("cuda"), dtype)
                if missing is not None and any(getattr(recipe, name) for name in KERNELS):
                    # The blocks would keep their operators, and the count would be wrong.
                    raise BenchError(f"{scenario.name} cannot be counted here: {missing}")
                with mock.patch("kernels_warmup.compile.quantize_unet", _quantize):
                    forward = compile_unet(module, recipe, attention, scenario.quantize)  # type: ignore[arg-type]
                # If there are two functions, the last is for requests without a negative prompt.
                function = forward.functions[-1].function
                batch = 2 * counted.images
                inputs = (
                    torch.empty(batch, *latents, device="cuda", dtype=dtype),
                    torch.empty((), device="cuda"),
                    *_text(module, batch, dtype, recipe.text_once),
                )
        return lower(module, function, inputs, mode)


def _quantize(unet: Any, quantization: str, *, static: bool) -> Quantized | None:
    """`quantize_unet` without its forwards, which calibrate and measure the error."""
    import torch

    from kernels_warmup.fp8 import set_fp8
    from kernels_warmup.quantize import Quantized, quantized_names

    if quantization == "none":
        return None
    if quantization != "fp8":
        raise BenchError(f"products in {quantization} cannot be counted here")
    names = quantized_names(unet)
    one = torch.empty((), device="cuda")
    set_fp8(unet, names, dict.fromkeys(names, one) if static else None)
    return Quantized("fp8", len(names), math.nan)


def _text(unet: Any, batch: int, dtype: Any, once: bool) -> tuple[Any, ...]:
    """The text inputs of a step; none if `once`: they are written to buffers before the loop."""
    import torch

    width = unet.config.cross_attention_dim
    pooled = unet.config.projection_class_embeddings_input_dim
    pooled -= 6 * unet.config.addition_time_embed_dim
    text = torch.empty(batch, 77, width, device="cuda", dtype=dtype)
    embeds = torch.empty(batch, pooled, device="cuda", dtype=dtype)
    ids = torch.empty(batch, 6, device="cuda", dtype=dtype)
    if not once:
        return text, embeds, ids
    unet.forward.text.prepare(text, {"text_embeds": embeds, "time_ids": ids})
    return ()


def _clean(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def summarise(lowered: Lowered, tflops: float, gbps: float) -> dict[str, dict[str, float]]:
    """Launches, bytes, FLOPs and the least milliseconds, by kind and in all.

    Args:
        tflops: the rate of bfloat16 products; fp8 products have twice that.
        gbps: bytes read and written, 10^9 a second.
    """
    from bench.kernels.hopper_code import FP8_PRODUCTS

    launches: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    short: Counter[str] = Counter()
    for launch in lowered.launches:
        launches[launch.kind] += 1
        moved[launch.kind] += launch.bytes
        short[launch.kind] += launch.short_bytes
    summary = {}
    for kind in sorted(launches, key=lambda kind: -moved[kind]):
        flops = lowered.flops.get(kind, 0)
        rate = tflops * (2 if kind == FP8_PRODUCTS else 1)
        summary[kind] = {
            "launches": launches[kind],
            "bytes": moved[kind],
            "short_bytes": short[kind],
            "flops": flops,
            "floor_ms": round(max(moved[kind] / gbps / 1e6, flops / rate / 1e9), 4),
        }
    summary["all"] = {
        name: round(sum(row[name] for row in summary.values()), 4)
        for name in ("launches", "bytes", "short_bytes", "flops", "floor_ms")
    }
    return summary


def report(summary: dict[str, dict[str, float]]) -> str:
    """The summary as a table for people."""
    return table(
        ("kind", "launches", "MB", "in short runs", "GFLOP", "at least ms"),
        [
            (
                kind,
                f"{row['launches']:.0f}",
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['short_bytes'] / 1e6:.1f}",
                f"{row['flops'] / 1e9:.1f}",
                f"{row['floor_ms']:.3f}",
            )
            for kind, row in summary.items()
        ],
    )


def _largest(lowered: Lowered, count: int) -> list[tuple[str, tuple[int, int]]]:
    """The kernels that move the most bytes, summed by name: (name, (launches, bytes))."""
    found: dict[str, tuple[int, int]] = {}
    for launch in lowered.launches:
        name = f"{launch.kind}: {launch.name}"
        launches, size = found.get(name, (0, 0))
        found[name] = launches + 1, size + launch.bytes
    return sorted(found.items(), key=lambda item: -item[1][1])[:count]
