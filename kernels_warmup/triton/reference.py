"""What the kernels compute, in plain PyTorch; tests and the bench compare the kernels with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from kernels_warmup.fp8 import Rounded, round_by, round_rows


def add_layer_norm(
    hidden: torch.Tensor,
    change: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden + change and the LayerNorm of that sum; hidden and change: (..., width)."""
    total = hidden + change
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def shifted_layer_norm(
    hidden: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The LayerNorm of hidden (..., width) + shift (width), in hidden's type."""
    shifted = (hidden.float() + shift).to(hidden.dtype)
    return F.layer_norm(shifted, shifted.shape[-1:], weight, bias, eps)


def add_layer_norm_fp8(
    hidden: torch.Tensor,
    change: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, Rounded]:
    """hidden + change and the LayerNorm of that sum, rounded to fp8 by one scale or by row."""
    total, norm = add_layer_norm(hidden, change, weight, bias, eps)
    return total, round_rows(norm) if scale is None else round_by(norm, scale)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    """(batch, tokens, width) from a query of that shape, keys and values (batch, keys, width)."""

    def by_head(flat: torch.Tensor) -> torch.Tensor:
        return flat.view(*flat.shape[:2], heads, -1).transpose(1, 2)

    scores = by_head(query) @ by_head(key).transpose(-1, -2)
    weights = (scores.float() * (query.shape[-1] // heads) ** -0.5).softmax(-1)
    mixed: torch.Tensor = weights.to(value.dtype) @ by_head(value)
    return mixed.transpose(1, 2).reshape(query.shape)


def geglu(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(..., width) from hidden (..., inner), weight (2 x width, inner), bias (2 x width)."""
    value, gate = F.linear(hidden, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)
