"""Kernels of our own in Triton, for SDXL's transformer blocks on Hopper.

- `layer_norm`, `self_attention`, `cross_attention`, `geglu`: one kernel each, with its launch
  settings and the custom operator that `torch.compile` sees.
- `residuals`: the residual sums inside the library's products, with the kernel of `layer_norm`.
- `reference`: what each kernel computes, in plain PyTorch.
- `install`: puts the kernels into a UNet.

Only these modules import Triton. Call `why_unusable` before importing one of them.

The operators are opaque to `torch.compile`: it plans memory around them, and neither traces nor
fuses into them. Launch settings follow from the sizes, so nothing is tuned when a request arrives.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch


def why_unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """One sentence saying why these kernels cannot run here, or None if they can."""
    if device.type != "cuda":
        return f"Triton's kernels need a CUDA device; this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"Triton's kernels need bfloat16 or float16; the model is {dtype}"
    if torch.cuda.get_device_capability(device) != (9, 0):
        # The tiles fill Hopper's shared memory, and the products use its own instructions.
        return "Triton's kernels are built for Hopper GPUs; this is another"
    if find_spec("triton") is None:
        return "triton is not installed; a CUDA build of PyTorch brings it"
    return None
