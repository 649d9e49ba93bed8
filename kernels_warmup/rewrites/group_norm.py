"""Group norm and SiLU for channels_last, in a form that inductor turns into fast kernels.

The result is that of nn.GroupNorm; only the order of the computation differs. inductor computes
nn.GroupNorm by a reduction over the channels and pixels of one group together. In channels_last
memory, the channels of a group are 8 to 120 consecutive bytes of each pixel, so a program reads in
short pieces. Here every pass runs along all channels:

1. Compute mean and variance over the pixels for each channel.
2. Merge them into groups. The variance of a group is the mean of its channels' variances plus the
   mean squared distance of the channels' means from the group's mean. Nothing cancels.
3. Store mean and scale per channel.
4. In the pass over all pixels, read them; otherwise they would be computed again per pixel.

Shapes: (batch, channels, ...) in any memory order. Statistics are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


def group_norm(features: torch.Tensor, norm: nn.GroupNorm, *, silu: bool = False) -> torch.Tensor:
    """`norm` of the features, then SiLU if `silu`. The result has the type of the features, and is
    channels_last if they are."""
    # (batch, pixels, channels): loops now run in channels_last's order.
    pixels = features.flatten(2).transpose(1, 2)
    mean, scale = _mean_and_scale(pixels, norm)
    result = (pixels.float() - mean) * scale + norm.bias
    if silu:
        result = F.silu(result)
    return result.to(features.dtype).transpose(1, 2).reshape(features.shape)


def _mean_and_scale(pixels: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """What to subtract from each channel, and what to multiply it by; both (batch, 1, channels)."""
    batch, _, channels = pixels.shape
    variances, means = torch.var_mean(pixels.float(), dim=1, correction=0)
    means = means.reshape(batch, norm.num_groups, -1)
    variances = variances.reshape(batch, norm.num_groups, -1)
    mean = means.mean(2, keepdim=True)
    variance = (variances + (means - mean).square()).mean(2, keepdim=True)
    weight = norm.weight.float().reshape(norm.num_groups, -1)
    scale = torch.rsqrt(variance + norm.eps) * weight
    mean = mean.expand(means.shape).clone(memory_format=torch.contiguous_format)
    # Stored in groups, the shape of the reductions' results, so that their kernel stores them.
    return (
        stored(mean).reshape(batch, 1, channels),
        stored(scale).reshape(batch, 1, channels),
    )


def stored(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, which the compiler now keeps in memory with these strides.

    A view by strides forces that. Otherwise the compiler may compute the tensor again wherever it
    is read, or choose another memory order.
    """
    return tensor.as_strided(tensor.shape, tensor.stride())


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, computed by `group_norm`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return group_norm(input, self)


class GroupNormSilu(nn.GroupNorm):
    """nn.GroupNorm and the SiLU after it, computed by `group_norm`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return group_norm(input, self, silu=True)


class Resnet(ResnetBlock2D):  # type: ignore[misc]
    """SDXL's residual block, norm, SiLU and convolution twice, with `group_norm` for both norms."""

    def forward(
        self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        features = input_tensor
        if self.conv_shortcut is not None:
            # Three kernels read it, so the compiler keeps it in memory, by default channels-first;
            # each of the three would then read with a large stride.
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
        ValueError: a norm, or the module after it, is not SDXL's. The UNet is unchanged then.
    """
    _replace(unet, unet.conv_norm_out is not None and type(unet.conv_act) is nn.SiLU)
    unet.conv_act = nn.Identity()


def set_decoder_norms(decoder: Any) -> None:
    """Replace every group norm of a diffusers VAE decoder; raises like `set_unet_norms`."""
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
    """The attributes by which a residual block differs from SDXL's."""
    # The decoder's blocks, which have no time embedding, call the plain kind "group".
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
