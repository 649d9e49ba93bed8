"""fp8 products for the UNet's linear layers: `torch._scaled_mm` on rounded activations and weights.

There are two ways to scale. By row: each token's activations have their own scale, computed in
every step, and each output channel's weights have one. Static: all activations of a product share
one scale, calibrated before anything is compiled, and so do all its weights. Static products are
faster and need no reduction in a step, but their error is larger.

A layer accepts activations in the model's type and rounds them by plain operators, which the
compiler fuses with the kernel that computed them. It also accepts activations that a kernel has
rounded already, as `Rounded`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
"""448. Casting a larger value gives NaN."""
SMALLEST_SCALE = 1e-12
"""The scale of a row of zeros, so that nothing is divided by zero."""
MARGIN = 2.0
"""How much larger than in calibration an activation may become before it saturates. fp8 is a
floating-point type: a scale that is twice as large as needed loses one of 15 exponents, at the
small end, and no precision elsewhere."""


class Rounded(NamedTuple):
    """A tensor rounded to fp8, equal to about `values * scales`.

    Attributes:
        values: fp8, (..., width).
        scales: float32, (..., 1), or () for one scale.
    """

    values: torch.Tensor
    scales: torch.Tensor


def round_rows(tensor: torch.Tensor) -> Rounded:
    """Round (..., width) to fp8, each row scaled by its own largest magnitude."""
    scales = tensor.abs().amax(dim=-1, keepdim=True).float() / LARGEST
    scales = scales.clamp(min=SMALLEST_SCALE)
    return Rounded((tensor.float() / scales).to(FP8), scales)


def round_by(tensor: torch.Tensor, scale: torch.Tensor) -> Rounded:
    """Round to fp8 by a given scale, (); values that are too large for it saturate."""
    return Rounded((tensor.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale)


class Fp8Linear(nn.Linear):
    """A linear layer that multiplies in fp8 and returns the model's type.

    Attributes:
        weight: fp8, (outputs, inputs).
        weight_scale: float32, (1, outputs) with scales by row, () with static ones.
        input_scale: float32, (), the static scale of the activations; None with scales by row.
        result_type: the type of its result.
    """

    weight_scale: torch.Tensor
    input_scale: torch.Tensor | None
    result_type: torch.dtype

    def forward(self, input: torch.Tensor | Rounded) -> torch.Tensor:
        """(..., outputs) from (..., inputs)."""
        values, scales = self._rounded(input)
        product = torch._scaled_mm(
            values.flatten(0, -2),
            self.weight.t(),
            scale_a=scales.flatten(0, -2) if scales.dim() else scales,
            scale_b=self.weight_scale,
            bias=self.bias,
            out_dtype=self.result_type,
            # Sums stay in the tensor cores' accumulators: twice as fast on Hopper; torchao's
            # default as well.
            use_fast_accum=True,
        )
        return product.view(*values.shape[:-1], self.out_features)

    def _rounded(self, input: torch.Tensor | Rounded) -> Rounded:
        if isinstance(input, Rounded):
            return input
        if self.input_scale is None:
            return round_rows(input)
        return round_by(input, self.input_scale)


def set_fp8(
    unet: Any, names: Iterable[str], input_scales: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Turn the named linear layers into `Fp8Linear`; static if `input_scales` are given."""
    for name in names:
        linear = unet.get_submodule(name)
        weight = linear.weight.data
        if input_scales is None:
            values, scales = round_rows(weight)
            scales = scales.t().contiguous()
            input_scale = None
        else:
            largest = weight.abs().amax().float()
            values, scales = round_by(weight, (largest / LARGEST).clamp(min=SMALLEST_SCALE))
            input_scale = input_scales[name]
        linear.__class__ = Fp8Linear
        linear.result_type = weight.dtype
        linear.weight = nn.Parameter(values, requires_grad=False)
        linear.register_buffer("weight_scale", scales, persistent=False)
        linear.register_buffer("input_scale", input_scale, persistent=False)


def calibrate(
    unet: Any, names: Iterable[str], run: Callable[[], object]
) -> dict[str, torch.Tensor]:
    """The static scale, float32, (), of each named linear layer's activations.

    run: calls the UNet on inputs that are typical of requests.

    Raises:
        ValueError: `run` did not reach a layer.
    """
    largest: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # Stays on the device: reading each value would take longer than the forward.
            seen = args[0].abs().amax().float()
            largest[name] = torch.maximum(largest.get(name, seen), seen)

        return hook

    names = list(names)
    hooks = [unet.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name in names if name not in largest]
    if missing:
        raise ValueError(f"calibration did not reach {', '.join(missing)}")
    return {
        name: (MARGIN * value / LARGEST).clamp(min=SMALLEST_SCALE)
        for name, value in largest.items()
    }
