"""The losses that train the demo model: the VAE's, and the text encoders' and UNet's together."""

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from torch import Tensor
from torch.nn import functional

from bench.demo_model.training_data import CAPTIONS_PER_SCENE, TrainingScenes

_KL_WEIGHT = 2e-4
_SQUARE_WEIGHT = 2.0
_EDGE_WEIGHT = 0.25
# Guidance needs a prediction without a prompt. For it SDXL's pipeline replaces the text by zeros,
# or by the encoding of "" if that is the negative prompt. The model learns both.
_DROP_TO_ZEROS = 0.06
_DROP_TO_EMPTY = 0.05
DROPPED = _DROP_TO_ZEROS + _DROP_TO_EMPTY
"""The share of samples that are trained without their caption."""


def vae_loss(vae: AutoencoderKL, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Errors of the pixels and of their differences, plus the divergence from a unit Gaussian.

    `pixels`: (batch, 3, height, width) from -1 to 1. The squared error corrects the colours, which
    are far off at first; the absolute error keeps edges sharp and flat areas flat afterwards.
    """
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.mean + posterior.std * noise_like(posterior.mean, generator)
    output = vae.decode(latents).sample.float()
    error = output - pixels.float()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    mean, variance = posterior.mean.float(), posterior.var.float()
    divergence = 0.5 * (mean.square() + variance - 1 - posterior.logvar.float()).mean()
    pixelwise = error.abs().mean() + _SQUARE_WEIGHT * error.square().mean()
    loss: Tensor = pixelwise + _EDGE_WEIGHT * edges + _KL_WEIGHT * divergence
    return loss


def encode_tokens(pipeline: StableDiffusionXLPipeline, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL's prompt embeddings (batch, 77, widths) and pooled embeddings (batch, width)."""
    first = pipeline.text_encoder(tokens, output_hidden_states=True)
    second = pipeline.text_encoder_2(tokens, output_hidden_states=True)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return hidden, second.text_embeds


def diffusion_loss(
    pipeline: StableDiffusionXLPipeline,
    scenes: TrainingScenes,
    signal: Tensor,
    empty: Tensor,
    batch: int,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of the predicted noise.

    Args:
        signal: the cumulative alpha of each of the scheduler's times.
        empty: (1, 77), the tokens of the empty prompt.
    """
    device = generator.device
    index = random_indices(len(scenes.moments), batch, generator)
    mean, deviation = scenes.moments[index].float().chunk(2, dim=1)
    latents = (mean + deviation * noise_like(mean, generator)) * pipeline.vae.config.scaling_factor
    noise = noise_like(latents, generator)
    times = random_indices(len(signal), batch, generator)
    kept = signal[times].view(-1, 1, 1, 1)
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise

    which = random_indices(CAPTIONS_PER_SCENE, batch, generator)
    tokens = scenes.tokens[index, which].long()
    roll = torch.rand(batch, generator=generator, device=device)
    zeros, blank = roll < _DROP_TO_ZEROS, roll > 1 - _DROP_TO_EMPTY
    tokens = torch.where(blank[:, None], empty, tokens)
    hidden, pooled = encode_tokens(pipeline, tokens)
    hidden = hidden * ~zeros[:, None, None]
    pooled = pooled * ~zeros[:, None]

    predicted = pipeline.unet(
        noisy,
        times,
        encoder_hidden_states=hidden,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": scenes.time_ids.expand(batch, -1)},
        return_dict=False,
    )[0]
    return functional.mse_loss(predicted.float(), noise)


def noise_like(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal float32 of the shape and on the device of `like`."""
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)


def random_indices(bound: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` numbers from 0 up to, but not including, `bound`."""
    return torch.randint(bound, (count,), generator=generator, device=generator.device)
