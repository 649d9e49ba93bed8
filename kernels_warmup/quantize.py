"""Lossy arithmetic for the UNet's large products, through torchao; off by default.

Weights are quantised once, per output channel; activations in every step, per token. `fp8` needs
an Ada or Hopper GPU or a later one, where its products run at twice bfloat16's rate; `int8` runs
anywhere. Convolutions stay as they are: torchao's fp8 convolution refuses GPUs below SM100.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from kernels_warmup.attention import transformer_blocks
from kernels_warmup.one_forward import StepInputs, forward_once, relative_error
from kernels_warmup.shapes import PIXELS_PER_LATENT, CompiledShape

Quantization = Literal["none", "int8", "fp8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

SKIPPED: tuple[tuple[str, str], ...] = (
    (r"(^|\.)(time_embedding|add_embedding)\.", "a few rows a step, read by every block"),
    (r"\.time_emb_proj$", "a few rows a step: the quantising costs more than the product"),
    (r"\.attn2\.(to_k|to_v)$", "the text's, computed once a run"),
)
"""Linear layers that are never quantised, by name, each with its reason."""

GRANULE = 16
"""Both arithmetics' kernels want widths that are multiples of this; other layers are left alone."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """What quantising did.

    Attributes:
        quantization: which arithmetic.
        layers: how many linear layers were quantised.
        error: relative error of one UNet forward against the same UNet before, on seeded inputs.
    """

    quantization: Quantization
    layers: int
    error: float


def why_unusable(quantization: Quantization, device: torch.device) -> str | None:
    """One sentence saying why this quantisation cannot run here, or None when it can."""
    if quantization not in QUANTIZATIONS:
        allowed = ", ".join(QUANTIZATIONS)
        return f"{quantization!r} is not a quantisation: one of {allowed} is"
    if quantization == "none":
        return None
    if quantization == "fp8":
        if device.type != "cuda":
            return f"fp8 needs an Ada or Hopper GPU or a later one; this is {device.type}"
        if torch.cuda.get_device_capability(device) < (8, 9):
            name = torch.cuda.get_device_name(device)
            return f"fp8 needs an Ada or Hopper GPU or a later one; this is {name}"
    try:
        import torchao.quantization  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"quantisation {quantization!r} needs torchao, which fails: {type(error).__name__}"
    return None


def quantize_unet(unet: Any, quantization: Quantization) -> Quantized | None:
    """Quantise the large linear layers of a diffusers SDXL UNet in place; None where nothing is.

    Raises:
        ValueError: it cannot be done here, with the reason.
    """
    reason = why_unusable(quantization, unet.device)
    if reason is not None:
        raise ValueError(reason)
    if quantization == "none":
        return None
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    config = (
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        if quantization == "fp8"
        else Int8DynamicActivationInt8WeightConfig()
    )
    # Fusing leaves the three projections behind, unused.
    unused = [
        part
        for block in transformer_blocks(unet)
        if block.attn1.fused_projections
        for part in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
    ]
    chosen = {
        name
        for name, module in unet.named_modules()
        if is_quantized(module, name) and not any(module is part for part in unused)
    }
    side = unet.config.sample_size * PIXELS_PER_LATENT
    inputs = StepInputs.draw(unet, CompiledShape(side, side), 1, unet.device, unet.dtype)
    with torch.no_grad():
        before = forward_once(unet, inputs)
        quantize_(unet, config, filter_fn=lambda _, name: name in chosen)
        error = relative_error(forward_once(unet, inputs), before)
    return Quantized(quantization, len(chosen), error)


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether a module of the UNet is one of the products worth quantising."""
    if not isinstance(module, nn.Linear) or any(re.search(p, name) for p, _ in SKIPPED):
        return False
    return module.in_features % GRANULE == 0 and module.out_features % GRANULE == 0
