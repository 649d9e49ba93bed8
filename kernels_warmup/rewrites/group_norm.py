"""Group norm and SiLU for channels_last, in a form the compiler makes fast kernels of.

diffusers' modules are turned into the classes here: names, weights and `isinstance` stay as they
were. What is computed is nn.GroupNorm, otherwise arranged.

inductor writes nn.GroupNorm as a reduction over one group's channels and pixels together. In
channels_last memory a group's channels are 8 to 120 bytes of each pixel, and that is all a program
reads at a time. Here every step runs along the channels instead:

1. mean and variance over the pixels, a channel each;
2. merged to groups: the group's variance is the mean of its channels' variances and of their means'
   squared distances from the group's, which cancels nothing;
3. a channel's mean and scale, stored, so that
4. the pass over all pixels reads them side by side, where it would else work them out per pixel.

Shapes: (batch, channels, ...) in any memory order. Statistics are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


def group_norm(features: torch.Tensor, norm: nn.GroupNorm, *, silu: bool = False) -> torch.Tensor:
    """`norm` of the features, then SiLU if asked; the features' type, channels innermost for
    features that are channels_last."""
    # (batch, pixels, channels): from here on loops run in channels_last's order.
    pixels = features.flatten(2).transpose(1, 2)
    mean, scale = _mean_and_scale(pixels, norm)
    result = (pixels.float() - mean) * scale + norm.bias
    if silu:
        result = F.silu(result)
    return result.to(features.dtype).transpose(1, 2).reshape(features.shape)


def _mean_and_scale(pixels: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """What is taken off each channel and what it is multiplied by, both (batch, 1, channels)."""
    batch, _, channels = pixels.shape
    variances, means = torch.var_mean(pixels.float(), dim=1, correction=0)
    means = means.reshape(batch, norm.num_groups, -1)
    variances = variances.reshape(batch, norm.num_groups, -1)
    mean = means.mean(2, keepdim=True)
    variance = (variances + (means - mean).square()).mean(2, keepdim=True)
    weight = norm.weight.float().reshape(norm.num_groups, -1)
    scale = torch.rsqrt(variance + norm.eps) * weight
    mean = mean.expand(means.shape).clone(memory_format=torch.contiguous_format)
    # Stored in groups, as they come out of the reductions: so the same kernel can store them.
    return (
        stored(mean).reshape(batch, 1, channels),
        stored(scale).reshape(batch, 1, channels),
    )


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor; the compiler keeps it in memory, in this order of strides.

    A view by strides needs something that has them. Otherwise the compiler may work a tensor out
    anew wherever it is read, or lay it out in another order.
    """
    return tensor.as_strided(tensor.shape, tensor.stride())


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, for channels_last."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return group_norm(input, self)


class GroupNormSilu(nn.GroupNorm):
    """nn.GroupNorm with the SiLU that follows it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return group_norm(input, self, silu=True)


class Resnet(ResnetBlock2D):  # type: ignore[misc]
    """SDXL's residual block with both norms as above: norm, SiLU, convolution, twice."""

    def forward(
        self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        features = input_tensor
        if self.conv_shortcut is not None:
            # Read three times, so kept in memory by the compiler; but unless told in which order,
            # in channels-first order, and each of the three then jumps from pixel to pixel.
            features = stored(features.contiguous(memory_format=torch.channels_last))
        hidden = self.conv1(group_norm(features, self.norm1, silu=True))
        if self.time_emb_proj is not None and temb is not None:
            activated = temb if self.skip_time_act else F.silu(temb)
            hidden = hidden + self.time_emb_proj(activated)[:, :, None, None]
        hidden = self.conv2(group_norm(hidden, self.norm2, silu=True))
        if self.conv_shortcut is not None:
            features = self.conv_shortcut(features)
        result: torch.Tensor = features + hidden
        return result


def set_unet_norms(unet: Any) -> None:
    """Replace every group norm of a diffusers SDXL UNet.

    Raises:
        ValueError: one of them, or what follows it, is not SDXL's; nothing has been changed then.
    """
    _replace(unet, unet.conv_norm_out is not None and type(unet.conv_act) is nn.SiLU)
    unet.conv_act = nn.Identity()


def set_decoder_norms(decoder: Any) -> None:
    """Replace every group norm of a diffusers VAE decoder. Raises as `set_unet_norms` does."""
    _replace(decoder, type(decoder.conv_act) is nn.SiLU)
    decoder.conv_act = nn.Identity()


def _replace(module: Any, silu_at_the_end: bool) -> None:
    resnets = [part for part in module.modules() if isinstance(part, ResnetBlock2D)]
    norms = {name: part for name, part in module.named_modules() if isinstance(part, nn.GroupNorm)}
    odd = [name for name, norm in norms.items() if type(norm) is not nn.GroupNorm]
    odd += [name for name, norm in norms.items() if not norm.affine]
    if not silu_at_the_end or "conv_norm_out" not in norms:
        odd.append("conv_norm_out")
    odd += [difference for resnet in resnets for difference in _differences(resnet)]
    if odd:
        raise ValueError(f"not SDXL's group norms: {', '.join(sorted(set(odd)))}")
    for norm in norms.values():
        norm.__class__ = GroupNorm
    module.conv_norm_out.__class__ = GroupNormSilu
    for resnet in resnets:
        resnet.__class__ = Resnet


def _differences(resnet: Any) -> list[str]:
    """In what a residual block does more than SDXL's."""
    # The decoder's blocks, which know no time, call that "group".
    plain = ("default",) if resnet.time_emb_proj is not None else ("default", "group")
    return [
        name
        for name, more in (
            ("time_embedding_norm", resnet.time_embedding_norm not in plain),
            ("resampling", resnet.upsample is not None or resnet.downsample is not None),
            ("nonlinearity", type(resnet.nonlinearity) is not nn.SiLU),
            ("output_scale_factor", resnet.output_scale_factor != 1.0),
            ("dropout", resnet.dropout.p != 0.0),
        )
        if more
    ]
