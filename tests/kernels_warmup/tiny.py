"""SDXL's architecture at a size that runs in milliseconds, with seeded random weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

TEXT_WIDTH = 48
POOLED_WIDTH = 32


def tiny_unet(seed: int = 0) -> Any:
    """As SDXL's: linear projections, text_time conditioning, first blocks without attention."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 8),
        norm_num_groups=8,
        use_linear_projection=True,
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * 8,
    ).eval()


def tiny_vae(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    ).eval()


def tiny_models(seed: int = 0) -> Any:
    return SimpleNamespace(unet=tiny_unet(seed), vae=tiny_vae(seed))


def step_inputs(batch: int, *, size: int = 16, tokens: int = 7, seed: int = 1) -> dict[str, Any]:
    """The arguments that diffusers' pipeline passes to the UNet in each step."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, size, size, generator=draw),
        "timestep": torch.tensor(601.0),
        "encoder_hidden_states": torch.randn(batch, tokens, TEXT_WIDTH, generator=draw),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, POOLED_WIDTH, generator=draw),
            "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]).repeat(batch, 1),
        },
        "return_dict": False,
    }


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    difference = (result.double() - reference.double()).norm()
    return float(difference / reference.double().norm())
