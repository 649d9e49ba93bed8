"""The step's embedding, projected for all residual blocks by one product.

Each of SDXL's 17 residual blocks projects the same embedding with weights of its own. Side by side
those weights are the weights of one product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


class TimeProjections(nn.Module):
    """Projects the step's embedding for all residual blocks by one product.

    It replaces the UNet's activation of the embedding, (batch, embedding channels). Its result,
    (batch, channels of all blocks), is passed to every block.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        weight, bias = _side_by_side(linears)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(embedding), self.weight, self.bias)


class TimeProjection(nn.Linear):
    """Selects one block's part of the result of `TimeProjections`."""

    start: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.narrow(1, self.start, self.out_features)


def set_time_once(unet: Any) -> None:
    """Project the step's embedding for all residual blocks by one product.

    Raises:
        ValueError: a block does not add a projection of the embedding's SiLU. The UNet is unchanged
            then.
    """
    resnets = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
    linears = [resnet.time_emb_proj for resnet in resnets]
    if (
        unet.time_embed_act is not None
        or any(type(linear) is not nn.Linear or linear.bias is None for linear in linears)
        or any(resnet.time_embedding_norm != "default" for resnet in resnets)
        or any(resnet.skip_time_act for resnet in resnets)
        or any(type(resnet.nonlinearity) is not nn.SiLU for resnet in resnets)
    ):
        raise ValueError("not SDXL's time embedding: its blocks do not all add a projection of it")
    unet.time_embed_act = TimeProjections(linears)
    start = 0
    for resnet, linear in zip(resnets, linears, strict=True):
        linear.__class__ = TimeProjection
        linear.start = start
        start += linear.out_features
        resnet.skip_time_act = True


def _side_by_side(linears: list[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (all outputs, inputs) and biases (all outputs); those of the modules become views."""
    weight = torch.cat([linear.weight.data for linear in linears])
    bias = torch.cat([linear.bias.data for linear in linears])
    sizes = [linear.out_features for linear in linears]
    parts = zip(linears, torch.split(weight, sizes), torch.split(bias, sizes), strict=True)
    for linear, its_weight, its_bias in parts:
        linear.weight.data, linear.bias.data = its_weight, its_bias
    return weight, bias
