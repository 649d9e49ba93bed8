"""Counts the floating-point operations of a run.

The count is nominal: it is that of the unmodified model, also where an optimisation computes the
same result with fewer operations. A product of (m, k) and (k, n) counts 2mkn; activations, norms
and additions count nothing. Counting runs the model on the meta device, where a full-size model
takes seconds and no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kernels_warmup.shapes import CompiledShape

META = torch.device("meta")
TEXT_TOKENS = 77


@dataclass(frozen=True)
class RunFlops:
    """FLOPs of one run by stage, for all of its images together; `step` is one denoising step."""

    text_encode: int
    step: int
    vae_decode: int

    def total(self, steps: int) -> int:
        return self.text_encode + steps * self.step + self.vae_decode


def count_run(
    pipeline: Any, shape: CompiledShape, *, guidance: bool = True, images: int = 1
) -> RunFlops:
    """FLOPs of a run of a diffusers SDXL pipeline; reads only the configurations of its parts."""
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    return RunFlops(
        text_encode=sum(
            count_text_encoder(encoder, guidance=guidance, images=images)
            for encoder in encoders
            if encoder is not None
        ),
        step=count_step(pipeline.unet.config, shape, guidance=guidance, images=images),
        vae_decode=count_decode(pipeline.vae.config, shape, images=images),
    )


def count_step(
    unet_config: Mapping[str, Any],
    shape: CompiledShape,
    *,
    guidance: bool = True,
    images: int = 1,
) -> int:
    """FLOPs of one denoising step: one UNet forward, over both halves of the guidance if there is
    guidance."""
    with META:
        unet = UNet2DConditionModel.from_config(dict(unet_config)).eval()
        batch = images * (2 if guidance else 1)
        pooled = unet.config.projection_class_embeddings_input_dim
        pooled -= 6 * unet.config.addition_time_embed_dim
        arguments = {
            "sample": torch.empty(batch, unet.config.in_channels, *shape.latent),
            "timestep": torch.empty(()),
            "encoder_hidden_states": torch.empty(
                batch, TEXT_TOKENS, unet.config.cross_attention_dim
            ),
            "added_cond_kwargs": {
                "text_embeds": torch.empty(batch, pooled),
                "time_ids": torch.empty(batch, 6),
            },
        }
    return _count(unet, arguments)


def count_decode(vae_config: Mapping[str, Any], shape: CompiledShape, *, images: int = 1) -> int:
    """FLOPs of decoding the images' latents."""
    with META:
        vae = AutoencoderKL.from_config(dict(vae_config)).eval()
        latents = torch.empty(images, vae.config.latent_channels, *shape.latent)
        vae.forward = vae.decode  # count through forward, whose own version also encodes
    return _count(vae, {"z": latents})


def count_encode(vae_config: Mapping[str, Any], shape: CompiledShape, *, images: int = 1) -> int:
    """FLOPs of encoding pictures to latents, as image to image does."""
    with META:
        vae = AutoencoderKL.from_config(dict(vae_config)).eval()
        pictures = torch.empty(images, vae.config.in_channels, shape.height, shape.width)
        vae.forward = vae.encode
    return _count(vae, {"x": pictures})


def count_text_encoder(encoder: nn.Module, *, guidance: bool = True, images: int = 1) -> int:
    """FLOPs of encoding the prompts, and the negative prompts if there is guidance."""
    batch = images * (2 if guidance else 1)
    with META:
        twin = type(encoder)(encoder.config).eval()
        tokens = torch.zeros(batch, TEXT_TOKENS, dtype=torch.long)
    return _count(twin, {"input_ids": tokens})


def _count(module: Any, arguments: dict[str, Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(**arguments)
    return int(counter.get_total_flops())
