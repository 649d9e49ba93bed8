"""Changing a model's weights while it stays compiled and captured.

Compiled code and captured graphs read the weights at the addresses that they had during warm-up, so
a weight may change in place only. After `compile_model` the model reads the weight of every linear
layer and convolution from the module's own `weight`: a rewrite that puts several weights into one
tensor makes the modules' weights views of it. What a rewrite computed from a weight is found by
`derived_tensors` and has to be computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn


@dataclass(frozen=True)
class Derived:
    """A tensor that a rewrite computed from a module's weight.

    Attributes:
        tensor: where the model reads it.
        compute: computes it again from the weight as it is now.
    """

    tensor: torch.Tensor
    compute: Callable[[], torch.Tensor]


@runtime_checkable
class KeepsDerived(Protocol):
    """A rewritten module that keeps tensors computed from the weights of its children."""

    def derived_tensors(self) -> Mapping[str, Derived]:
        """By the name of the child whose weight it was computed from."""


def derived_tensors(module: nn.Module) -> dict[str, Derived]:
    """What the rewrites of a module computed from weights, by the name of the weight's module."""
    return {
        f"{name}.{child}": derived
        for name, part in module.named_modules()
        if isinstance(part, KeepsDerived)
        for child, derived in part.derived_tensors().items()
    }


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """The weight of a linear layer or a convolution as a view (outputs, inputs).

    The inputs of a convolution are its channels and the pixels of its kernel, in the order in which
    the weight stores them. `like_matrix` brings another tensor into the same order.
    """
    return _stored_order(weight, weight).view(len(weight), -1)


def like_matrix(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A tensor (rows, channels, kernel height, kernel width), or (rows, inputs), as a matrix whose
    columns are in the order of `as_matrix(weight)`."""
    return _stored_order(tensor, weight).reshape(len(tensor), -1)


def _stored_order(tensor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    channels_last = weight.dim() == 4 and not weight.is_contiguous()
    return tensor.permute(0, 2, 3, 1) if channels_last else tensor
