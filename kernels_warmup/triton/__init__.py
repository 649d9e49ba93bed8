"""Kernels of our own in Triton, for SDXL's transformer blocks on Hopper.

Each of `layer_norm`, `self_attention`, `cross_attention` and `geglu` holds one kernel, how it is
launched, and the operator under which the compiler sees it. `residuals` uses the norm's kernel with
sums that the library's products take. `reference` says in plain PyTorch what each computes, and
`install` puts them into a UNet. Triton is imported by those modules alone, which nothing reaches on
a machine that cannot run them: ask `why_unusable` first.

The operators are opaque to `torch.compile`: it plans memory around them and neither traces nor
fuses into them. Nothing is tuned when a request arrives: launch settings follow from the sizes.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch


def why_unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """One sentence saying why these kernels cannot run here, or None when they can."""
    if device.type != "cuda":
        return f"Triton's kernels need a CUDA device; this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"Triton's kernels need bfloat16 or float16; the model is {dtype}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        # Tiles that fill Hopper's shared memory, and products in its own instructions.
        return "Triton's kernels are built for Hopper's GPUs; this is another"
    if find_spec("triton") is None:
        return "triton is not installed; a CUDA build of PyTorch brings it"
    return None
