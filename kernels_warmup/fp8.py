"""fp8 products for the UNet's linear layers: `torch._scaled_mm` on rounded activations and weights.

Two ways to scale. By row: each token's activations have a scale of their own, found in every step,
and each output channel's weights have one. Static: all activations of a product share one scale,
calibrated before anything is compiled, and so do all its weights; the products are faster and
nothing has to be reduced in a step, for a larger error.

A layer takes its activations in the model's type and rounds them by plain operators, which the
compiler fuses with what made them; or it takes them as `Rounded`, where a kernel wrote them so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
"""448. What is larger becomes NaN when it is cast."""
SMALLEST_SCALE = 1e-12
"""Of a row of zeros, which must not divide by zero."""
MARGIN = 2.0
"""How much larger than in calibration an activation may get before it saturates. fp8 is a
floating-point type: a scale that is twice too large costs one of its 15 exponents at the small end
and no digit elsewhere."""


class Rounded(NamedTuple):
    """A tensor as fp8: `values * scales` gives it back.

    values: (..., width); scales: float32, (..., 1) or one for all, ().
    """

    values: torch.Tensor
    scales: torch.Tensor


def round_rows(tensor: torch.Tensor) -> Rounded:
    """(..., width), each row by its own largest magnitude."""
    scales = tensor.abs().amax(dim=-1, keepdim=True).float() / LARGEST
    scales = scales.clamp(min=SMALLEST_SCALE)
    return Rounded((tensor.float() / scales).to(FP8), scales)


def round_by(tensor: torch.Tensor, scale: torch.Tensor) -> Rounded:
    """By a given scale, (); what is larger than it allows saturates."""
    return Rounded((tensor.float() / scale).clamp(-LARGEST, LARGEST).to(FP8), scale)


class Fp8Linear(nn.Linear):
    """A linear layer whose product is computed in fp8; its result has the type it had before.

    Attributes:
        weight: (outputs, inputs), fp8.
        weight_scale: float32, (1, outputs) or (); (1, outputs) where activations go by row.
        input_scale: float32, (), of all activations; None where they go by row.
        result_type: of what it returns.
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
            # Sums stay in the tensor cores' own accumulators: twice as fast on Hopper, and what
            # torchao does too.
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
    """Turn the named linear layers into `Fp8Linear`; with `input_scales` by static scales."""
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
    """The activations' scale, float32, (), of each named linear layer.

    run: calls the UNet, as often as it takes to show what its layers meet when they serve.

    Raises:
        ValueError: `run` left a layer out.
    """
    largest: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            # On the device: waiting for each layer's value would take longer than the forward.
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
