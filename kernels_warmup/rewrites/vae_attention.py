"""The VAE's one attention, in the model's own type.

It has a single head of size 512, which is too wide for any flash kernel. PyTorch's scaled dot
product attention then falls back to products in float32.
"""

from __future__ import annotations

from typing import Any, cast

import torch


class WideHeadAttention:
    """A diffusers attention processor for one head of any width: two products and a softmax.

    The scores are float32, because bfloat16 would round a score of 50 by 0.1. Everything else is of
    the model's own type. 16,384 tokens need 1 GiB for the scores, once per image.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        batch, channels, height, width = hidden_states.shape
        tokens = hidden_states.flatten(2).transpose(1, 2)
        normed = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        query, key, value = attn.to_q(normed), attn.to_k(normed), attn.to_v(normed)
        weights = _scores(query * channels**-0.5, key).softmax(-1).to(value.dtype)
        mixed = attn.to_out[0](torch.bmm(weights, value))
        mixed = mixed.transpose(1, 2).reshape(batch, channels, height, width)
        return cast(torch.Tensor, mixed + hidden_states)


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(batch, tokens, tokens) in float32, from products in the inputs' own type."""
    if query.is_cuda and query.dtype != torch.float32:
        return torch.bmm(query, key.transpose(1, 2), out_dtype=torch.float32)
    return torch.bmm(query, key.transpose(1, 2)).float()


def set_vae_attention(vae: Any) -> None:
    """Compute the attention in the decoder's middle by `WideHeadAttention`.

    Raises:
        ValueError: that attention is not SDXL's.
    """
    for attn in vae.decoder.mid_block.attentions:
        if (
            attn.heads != 1
            or attn.spatial_norm is not None
            or not attn.residual_connection
            or attn.rescale_output_factor != 1.0
            or attn.inner_dim != attn.query_dim
        ):
            raise ValueError("not SDXL's VAE: its middle attention is not one plain wide head")
        attn.set_processor(WideHeadAttention())
