"""Counts the floating-point operations of a run.

The count is nominal: it is that of the unmodified model, also where an optimisation computes the
same result with fewer operations. A product of (m, k) and (k, n) counts 2mkn; activations, norms
and additions count nothing. Counting runs the model on the meta device, where a full-size model
takes seconds and no memory. A process counts each configuration once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
    batch = images * (2 if guidance else 1)

    def prepare() -> Prepared:
        unet = UNet2DConditionModel.from_config(dict(unet_config))
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
        return unet, arguments

    return _count(("step", _text(unet_config), shape, batch), prepare)


def count_decode(vae_config: Mapping[str, Any], shape: CompiledShape, *, images: int = 1) -> int:
    """FLOPs of decoding the images' latents."""

    def prepare() -> Prepared:
        vae = AutoencoderKL.from_config(dict(vae_config))
        latents = torch.empty(images, vae.config.latent_channels, *shape.latent)
        vae.forward = vae.decode  # count through forward, whose own version also encodes
        return vae, {"z": latents}

    return _count(("decode", _text(vae_config), shape, images), prepare)


def count_encode(vae_config: Mapping[str, Any], shape: CompiledShape, *, images: int = 1) -> int:
    """FLOPs of encoding pictures to latents, as image to image does."""

    def prepare() -> Prepared:
        vae = AutoencoderKL.from_config(dict(vae_config))
        pictures = torch.empty(images, vae.config.in_channels, shape.height, shape.width)
        vae.forward = vae.encode
        return vae, {"x": pictures}

    return _count(("encode", _text(vae_config), shape, images), prepare)


def count_text_encoder(encoder: nn.Module, *, guidance: bool = True, images: int = 1) -> int:
    """FLOPs of encoding the prompts, and the negative prompts if there is guidance."""
    batch = images * (2 if guidance else 1)
    config: Any = encoder.config

    def prepare() -> Prepared:
        tokens = torch.zeros(batch, TEXT_TOKENS, dtype=torch.long)
        return type(encoder)(config), {"input_ids": tokens}

    return _count((type(encoder), _text(config.to_dict()), batch), prepare)


Prepared = tuple[Any, dict[str, Any]]
"""A module and the arguments of its forward."""

_counted: dict[tuple[object, ...], int] = {}


def _count(key: tuple[object, ...], prepare: Callable[[], Prepared]) -> int:
    """Count one forward on the meta device, or return what was counted under this key."""
    if key not in _counted:
        with META:
            module, arguments = prepare()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module.eval()(**arguments)
        _counted[key] = int(counter.get_total_flops())
    return _counted[key]


def _text(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config), sort_keys=True, default=str)
