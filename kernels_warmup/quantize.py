"""Quantises the UNet's large linear layers: lossy, and off by default.

`fp8` (see fp8.py) needs an Ada or Hopper GPU or a later one, where its products run at up to twice
bfloat16's rate. `int8`, through torchao, runs anywhere: weights are quantised once, per output
channel, and activations in every step, per token. Both quantise the same layers. Convolutions are
not quantised, because torchao's fp8 convolution refuses GPUs below SM100.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from kernels_warmup.fp8 import calibrate, set_fp8
from kernels_warmup.numerical_error import TIMESTEPS, StepInputs, forward_once, relative_error
from kernels_warmup.shapes import PIXELS_PER_LATENT, CompiledShape

Quantization = Literal["none", "int8", "fp8"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

CHOSEN: tuple[tuple[str, str], ...] = (
    (r"\.ff\.net\.0\.proj$", "2048x1280x10240: 75.4 us, 46.0 by row, 45.4 static; 60 a step"),
    (r"\.ff\.net\.2$", "2048x5120x1280: 35.9 us, 28.0 by row, 20.6 static; 60 a step"),
    (r"\.attn1\.to_qkv$", "2048x1280x3840: 30.3 us, 20.6 by row, 18.9 static; 60 a step"),
)
"""Linear layers that are quantised: a pattern of their names, and the time of one product in
bfloat16 and in fp8, without the quantising itself, on an H200 at 1024x1024
(bench/results/h200-2026-11-22-unet-stack.json). Together with the layers of half the width they
save 3.3 ms a step with scales by row and 4.0 ms with static ones."""

SKIPPED: tuple[tuple[str, str], ...] = (
    (r"^(time_embedding|add_embedding)\.", "a few rows a step, read by every block"),
    (r"\.time_emb_proj$", "a few rows a step: the quantising costs more than the product"),
    (r"\.attn2\.(to_k|to_v)$", "the text's, computed once a run"),
    (
        r"\.(attn1\.to_[qkv]|attn2\.to_q|attn[12]\.to_out\.0|proj_in|proj_out)$",
        "square, 2048x1280x1280: 11.6 us, 10.5 by row, 8.0 static; the 232 gain 0.2 ms by row",
    ),
)
"""Linear layers that are never quantised: a pattern of their names, and the reason, with figures as
in `CHOSEN`. For the square ones, rounding their input takes longer than scales by row save. Static
scales would save 0.8 ms, but the kernels that write their input do not write fp8."""

GRANULE = 16
"""The kernels of both arithmetics need widths that are multiples of this; other layers are left as
they are."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """What quantising did.

    Attributes:
        quantization: the arithmetic.
        layers: how many linear layers were quantised.
        error: relative error of one UNet forward on seeded inputs, against the same UNet before.
    """

    quantization: Quantization
    layers: int
    error: float


def why_unusable(
    quantization: Quantization, device: torch.device, dtype: torch.dtype | None = None
) -> str | None:
    """One sentence saying why this quantisation cannot run here, or None if it can.

    dtype: the model's type, if it is known.
    """
    if quantization not in QUANTIZATIONS:
        allowed = ", ".join(QUANTIZATIONS)
        return f"{quantization!r} is not a quantisation; choose one of {allowed}"
    if quantization == "none":
        return None
    if quantization == "fp8":
        if device.type != "cuda":
            return f"fp8 needs an Ada or Hopper GPU or a later one; this is {device.type}"
        if torch.cuda.get_device_capability(device) < (8, 9):
            name = torch.cuda.get_device_name(device)
            return f"fp8 needs an Ada or Hopper GPU or a later one; this is {name}"
        if dtype not in (None, torch.bfloat16):
            # The library's fp8 products with scales by row return bfloat16 only.
            return f"fp8 needs a bfloat16 model; this one is {dtype}"
        return None
    try:
        import torchao.quantization  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"quantisation {quantization!r} needs torchao, which fails: {type(error).__name__}"
    return None


def quantize_unet(
    unet: Any, quantization: Quantization, *, static: bool = False
) -> Quantized | None:
    """Quantise the large linear layers of a diffusers SDXL UNet in place; None for "none".

    static: with fp8, scale activations by factors that are calibrated here, on seeded inputs at an
        early, a middle and a late timestep, instead of by row in every step.

    Raises:
        ValueError: the quantisation cannot run here; the text is `why_unusable`'s.
    """
    reason = why_unusable(quantization, unet.device, unet.dtype)
    if reason is not None:
        raise ValueError(reason)
    if quantization == "none":
        return None
    names = quantized_names(unet)
    side = unet.config.sample_size * PIXELS_PER_LATENT
    inputs = StepInputs.draw(unet, CompiledShape(side, side), 1, unet.device, unet.dtype)

    def whole_schedule() -> None:
        for timestep in TIMESTEPS:
            forward_once(unet, inputs, timestep=timestep)

    with torch.no_grad():
        before = forward_once(unet, inputs)
        if quantization == "fp8":
            set_fp8(unet, names, calibrate(unet, names, whole_schedule) if static else None)
        else:
            _set_int8(unet, names)
        error = relative_error(forward_once(unet, inputs), before)
    return Quantized(quantization, len(names), error)


def quantized_names(unet: Any) -> list[str]:
    """The names of the UNet's linear layers that are quantised."""
    return [name for name, module in unet.named_modules() if is_quantized(module, name)]


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether a module of the UNet, by its type, name and widths, is one that is quantised."""
    if not isinstance(module, nn.Linear) or not any(re.search(p, name) for p, _ in CHOSEN):
        return False
    return module.in_features % GRANULE == 0 and module.out_features % GRANULE == 0


def _set_int8(unet: Any, names: list[str]) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    # torchao would otherwise change inductor's settings for the whole process.
    config = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    chosen = set(names)
    quantize_(unet, config, filter_fn=lambda _, name: name in chosen)
