"""Checks of loaded weights."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch


def non_finite_tensor(parts: Mapping[str, object]) -> str | None:
    """The name of the first tensor with a value that is NaN or infinite, or None.

    Args:
        parts: the pipeline's parts by name; those that are no modules are left out. The result
            begins with a part's name: `unet.conv_in.weight`.
    """
    for part, module in parts.items():
        if not isinstance(module, torch.nn.Module):
            continue
        tensors = {
            name: tensor
            for name, tensor in chain(module.named_parameters(), module.named_buffers())
            if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel()
        }
        if not tensors:
            continue
        # The smallest and the largest value of a tensor with a NaN are NaN. Everything is enqueued
        # before anything is read, so a GPU is waited for once.
        ends = [torch.stack(torch.aminmax(tensor.detach())).float() for tensor in tensors.values()]
        finite = torch.stack(ends).isfinite().all(dim=1).tolist()
        for name, is_finite in zip(tensors, finite, strict=True):
            if not is_finite:
                return f"{part}.{name}"
    return None
