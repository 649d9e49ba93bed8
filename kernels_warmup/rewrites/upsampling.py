"""Nearest upsampling by two and the 3x3 convolution after it, as one convolution before it.

The upsampled image contains each row twice, so two of the three rows of a 3x3 kernel always meet
the same row. An even row of the result is `w0 x[i-1] + (w1 + w2) x[i]`, an odd one is
`(w0 + w1) x[i] + w2 x[i+1]`; columns behave alike. If these sums of weights are computed once, a
pixel that becomes four needs 16 products per channel instead of 36. The zero padding stays the
same. In bfloat16 the sums are rounded once more than the weights were, which adds 4 to 7% to the
decoder's error. There are two ways to compute it:

- `phases`: a 2x2 convolution with four times the channels, one set for each corner of the 2x2
  pixels that a pixel becomes. Each set is read at its own offset and interleaved.
- `transposed`: a transposed 4x4 convolution of stride 2, whose result needs no interleaving.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.upsampling import Upsample2D
from torch import nn

from kernels_warmup.weights import Derived

Upsampling = Literal["nearest", "phases", "transposed"]
UPSAMPLINGS: tuple[Upsampling, ...] = get_args(Upsampling)


def phase_kernel(kernel: torch.Tensor) -> torch.Tensor:
    """The kernel for `phases`, (4 x out, in, 2, 2), from (out, in, 3, 3). The channels of the upper
    left pixels come first, then those of the upper right, lower left and lower right ones."""
    summed = kernel.float()
    for dim in (3, 2):
        first, middle, last = summed.unbind(dim)
        even = torch.stack([first, middle + last], dim)
        odd = torch.stack([first + middle, last], dim)
        # Columns first, so that rows become the outermost order.
        summed = torch.cat([even, odd])
    return summed.to(kernel.dtype)


def transposed_kernel(kernel: torch.Tensor) -> torch.Tensor:
    """The kernel for `transposed`, (in, out, 4, 4), from (out, in, 3, 3)."""
    summed = kernel.float().transpose(0, 1)
    for dim in (2, 3):
        first, middle, last = summed.unbind(dim)
        summed = torch.stack([last, middle + last, first + middle, first], dim)
    return summed.to(kernel.dtype)


def interleave(phases: torch.Tensor) -> torch.Tensor:
    """The image (batch, channels, 2 x height, 2 x width) from the result of the `phases`
    convolution, (batch, 4 x channels, height + 1, width + 1)."""
    batch, sets, height, width = phases.shape
    channels, height, width = sets // 4, height - 1, width - 1
    each, channel, row, column = phases.stride()
    # One view puts all pixels in place: the sets of the lower pixels are two sets further on and
    # are read one row further down, those of the right pixels one set and one column.
    in_place = phases.as_strided(
        (batch, height, 2, width, 2, channels),
        (
            each,
            row,
            row + 2 * channels * channel,
            column,
            column + channels * channel,
            channel,
        ),
    )
    return in_place.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class Upsample(Upsample2D):  # type: ignore[misc]
    """Upsample2D that never makes the upsampled image."""

    summed: torch.Tensor
    """The kernel of the convolution that replaces upsampling and convolution."""
    upsampling: Upsampling

    def forward(
        self, hidden_states: torch.Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        height, width = hidden_states.shape[2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            # A side that was odd before the downsampling: not exactly twice the size.
            return cast(torch.Tensor, super().forward(hidden_states, output_size))
        if self.upsampling == "transposed":
            return F.conv_transpose2d(
                hidden_states, self.summed, self.conv.bias, stride=2, padding=1
            )
        # The bias is added after interleaving, because the compiler fuses it with that copy.
        pixels = interleave(F.conv2d(hidden_states, self.summed, padding=1))
        return pixels if self.conv.bias is None else pixels + self.conv.bias[:, None, None]

    def derived_tensors(self) -> dict[str, Derived]:
        sum_kernel = phase_kernel if self.upsampling == "phases" else transposed_kernel
        return {"conv": Derived(self.summed, lambda: sum_kernel(self.conv.weight.data))}


def set_upsampling(module: Any, upsampling: Upsampling) -> None:
    """Compute every upsampling of a UNet or a decoder in this way.

    The summed kernels are kept in addition to the unchanged weights: 65 MB in bfloat16 for SDXL's
    UNet, 19 MB for its decoder. They are summed in float32 and rounded once.

    Raises:
        ValueError: the way is unknown or an upsampling is not SDXL's. The module is unchanged then.
    """
    if upsampling not in UPSAMPLINGS:
        raise ValueError(
            f"{upsampling!r} is not an upsampling; choose one of {', '.join(UPSAMPLINGS)}"
        )
    if upsampling == "nearest":
        return
    upsamples = [part for part in module.modules() if isinstance(part, Upsample2D)]
    for upsample in upsamples:
        _require_plain(upsample)
    sum_kernel = phase_kernel if upsampling == "phases" else transposed_kernel
    for upsample in upsamples:
        weight = upsample.conv.weight.data
        summed = sum_kernel(weight)
        if weight.is_contiguous(memory_format=torch.channels_last):
            summed = summed.contiguous(memory_format=torch.channels_last)
        upsample.register_buffer("summed", summed, persistent=False)
        upsample.upsampling = upsampling
        upsample.__class__ = Upsample


def _require_plain(upsample: Any) -> None:
    conv = getattr(upsample, "conv", None)
    if (
        type(conv) is not nn.Conv2d
        or upsample.use_conv_transpose
        or not upsample.interpolate
        or upsample.norm is not None
        or conv.kernel_size != (3, 3)
        or conv.padding != (1, 1)
        or conv.stride != (1, 1)
        or conv.dilation != (1, 1)
        or conv.groups != 1
        or conv.padding_mode != "zeros"
    ):
        raise ValueError(
            "not SDXL's upsampling: it is not a nearest one before a plain 3x3 convolution"
        )
