"""SDXL base 1.0 at full size with seeded random weights: `random:sdxl-base`.

Step latency hardly depends on the values of the weights, so this measures a GPU without a download.
The configurations are those of stable-diffusion-xl-base-1.0. Every module is built on the meta
device, and its storage is allocated once, on the device where it is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}

SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "timestep_spacing": "leading",
    "steps_offset": 1,
}

_TEXT_COMMON: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77}

TEXT_ENCODER_CONFIG: dict[str, Any] = _TEXT_COMMON | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}

TEXT_ENCODER_2_CONFIG: dict[str, Any] = _TEXT_COMMON | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}


def build_random_sdxl_base(
    tokenizer: CLIPTokenizer, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> StableDiffusionXLPipeline:
    """Build the pipeline on `device` with weights drawn from `seed`.

    Args:
        tokenizer: any CLIP tokenizer of at most 49,408 tokens, used for both text encoders. The
            published vocabulary would be a download.
    """
    token_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel(**UNET_CONFIG)
        vae = AutoencoderKL(**VAE_CONFIG)
        text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER_CONFIG | token_ids))
        text_encoder_2 = CLIPTextModelWithProjection(
            CLIPTextConfig(**TEXT_ENCODER_2_CONFIG | token_ids)
        )
    for offset, module in enumerate((unet, vae, text_encoder, text_encoder_2)):
        materialise(module, device, dtype, seed + offset)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULER_CONFIG),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def materialise(
    module: torch.nn.Module, device: torch.device, dtype: torch.dtype, seed: int
) -> None:
    """Allocate the storage of a module of meta tensors on `device` and fill it from `seed`.

    Matrices and convolutions are scaled by their fan-in, so that activations keep their magnitude
    through the network. Norms are the identity. No weight is zero, because matrix products of zeros
    run faster than those of data.
    """
    generator = torch.Generator(device).manual_seed(seed)
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            value = torch.empty(parameter.shape, device=device, dtype=dtype)
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel()
                value.normal_(0, 1 / math.sqrt(fan_in), generator=generator)
            elif name == "weight":
                value.fill_(1)
            else:
                value.normal_(0, 0.02, generator=generator)
            setattr(owner, name, torch.nn.Parameter(value, requires_grad=False))
    module.to(device)
    module.eval()
