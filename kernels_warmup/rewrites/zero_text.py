"""No attention to the text for the half of the batch whose text is zero.

Without a negative prompt, SDXL's unconditional text is zero. Its keys and values have no bias, so
they are zero too: the attention returns zero, and its output projection returns its bias. So the
second norm, the query, the attention and the projection are needed for the conditional half alone.
The caller of the UNet sets `ZERO_TEXT` in `cross_attention_kwargs`; the text itself is not checked.

For that, diffusers' transformer block, which serves a dozen models, is reduced to SDXL's three
sums. The Triton kernels build on the same block.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from kernels_warmup.attention import transformer_blocks

ZERO_TEXT = "zero_text"
"""Key in `cross_attention_kwargs`: the text of the batch's first half is zero."""


class Block(BasicTransformerBlock):  # type: ignore[misc]
    """SDXL's transformer block: adds self-attention, cross-attention and feed-forward in turn, each
    computed from a norm of the sum so far.

    hidden_states: (batch, tokens, channels), the unconditional half first.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        zero_text = ZERO_TEXT in (cross_attention_kwargs or ())
        hidden_states = hidden_states + self.attn1(
            self.norm1(hidden_states), attention_mask=attention_mask
        )
        if zero_text:
            text = self._from_the_conditional_half(hidden_states)
        else:
            text = self.attn2(
                self.norm2(hidden_states),
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
            )
        hidden_states = hidden_states + text
        result: torch.Tensor = hidden_states + self.ff(self.norm3(hidden_states))
        return result

    def _from_the_conditional_half(self, hidden_states: torch.Tensor) -> torch.Tensor:
        unconditional, conditional = hidden_states.chunk(2)
        text = self.attn2(self.norm2(conditional))
        bias = self.attn2.to_out[0].bias
        return torch.cat([bias.to(text.dtype).expand_as(unconditional), text])


def set_blocks(unet: Any, kind: type[Block] = Block) -> None:
    """Make every transformer block of the UNet a `kind`.

    Raises:
        ValueError: a block is not SDXL's. The UNet is unchanged then.
    """
    blocks = transformer_blocks(unet)
    for block in blocks:
        _require_plain(block)
    for block in blocks:
        block.__class__ = kind


def _require_plain(block: Any) -> None:
    """Raise for a block with parts that `Block` would leave out."""
    norms = (block.norm1, block.norm2, block.norm3)
    extra = [
        name
        for name, more in (
            ("norm_type", block.norm_type != "layer_norm"),
            ("pos_embed", block.pos_embed is not None),
            ("only_cross_attention", block.only_cross_attention),
            ("fuser", hasattr(block, "fuser")),
            ("chunked feed-forward", block._chunk_size is not None),
            ("norms", any(type(norm) is not nn.LayerNorm for norm in norms)),
            ("attn2", block.attn2 is None or block.attn2.to_out[0].bias is None),
        )
        if more
    ]
    if extra:
        raise ValueError(f"not SDXL's transformer block: it differs in {', '.join(extra)}")


def takes_zero_text(unet: Any) -> bool:
    """Whether this UNet has a separate function for runs without a negative prompt."""
    return bool(getattr(unet.forward, "takes_zero_text", False))
