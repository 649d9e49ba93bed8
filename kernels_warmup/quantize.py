"""Lossy arithmetic for the UNet's large products, off by default.

fp8: weights are scaled per output channel once, activations per token in every step, and Hopper's
fp8 units multiply at twice bfloat16's rate. Only the transformer blocks' and their projections'
products are quantised: they are 61% of a step. Time and text embeddings, whose few rows gain
nothing, and all convolutions stay as they are.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from kernels_warmup.attention import transformer_blocks

Quantization = Literal["none", "fp8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

FP8 = torch.float8_e4m3fn
FP8_LARGEST = torch.finfo(FP8).max
SMALLEST_SCALE = 1e-12
"""Keeps a row of zeros from dividing by zero."""


class Fp8Linear(nn.Module):
    """A linear layer with fp8 weights, activations quantised per token on the way in."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = to_fp8_rows(linear.weight.data)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = linear.bias

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        rows = features.reshape(-1, self.in_features)
        quantized, row_scale = to_fp8_rows(rows)
        if rows.is_cuda:
            product = torch._scaled_mm(
                quantized,
                self.weight.t(),
                scale_a=row_scale,
                scale_b=self.scale,
                bias=self.bias,
                out_dtype=rows.dtype,
                # Accumulates in fewer bits; the error it adds is far below fp8's own.
                use_fast_accum=True,
            )
        else:
            product = _reference_product(quantized, row_scale, self.weight, self.scale)
            product = product.to(rows.dtype)
            if self.bias is not None:
                product = product + self.bias
        return product.view(*features.shape[:-1], self.out_features)


def to_fp8_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, columns) as fp8 and the float32 scales (rows, 1) that give the values back."""
    largest = rows.abs().amax(dim=-1, keepdim=True).float()
    scale = largest.clamp(min=SMALLEST_SCALE) / FP8_LARGEST
    return (rows.float() / scale).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8), scale


def _reference_product(
    rows: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    return (rows.float() * row_scale) @ (weight.float() * scale.t()).t()


def quantize_unet(unet: nn.Module, quantization: Quantization) -> int:
    """Replace the large linear layers in place; returns how many were replaced.

    Text keys and values are left alone: they are computed once a request.
    """
    if quantization == "none":
        return 0
    if quantization not in QUANTIZATIONS:
        allowed = ", ".join(QUANTIZATIONS)
        raise ValueError(f"{quantization!r} is not a quantisation: one of {allowed} is")
    device = next(unet.parameters()).device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"fp8 needs an Ada or Hopper GPU or a later one; this is {name}")
    places: list[tuple[Any, str]] = []
    for block in transformer_blocks(unet):
        self_attention = ["to_qkv"] if block.attn1.fused_projections else ["to_q", "to_k", "to_v"]
        places += [(block.attn1, name) for name in self_attention]
        places += [(block.attn1.to_out, "0"), (block.attn2, "to_q"), (block.attn2.to_out, "0")]
        places += [(block.ff.net[0], "proj"), (block.ff.net, "2")]
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            places += [(module, "proj_in"), (module, "proj_out")]
    linears = [(parent, name, getattr(parent, name)) for parent, name in places]
    linears = [place for place in linears if isinstance(place[2], nn.Linear)]
    for parent, name, linear in linears:
        setattr(parent, name, Fp8Linear(linear))
    return len(linears)
