"""SDXL's transformer block as three sums, with the text's part left out where the text is zero.

diffusers' forward serves a dozen models; this one is what is left of it for SDXL. A module is
turned into its counterpart here by its class alone: names, weights and `isinstance` stay as they
were, and equal blocks still share one compiled graph.

**Zero text.** Without a negative prompt SDXL's unconditional text is zero, and so are its keys and
values, which have no bias: attention over them gives zero and its output projection nothing but its
bias. So the second norm, the query, the attention and its projection are needed for the conditional
half of the batch alone. Whoever calls the UNet says so by `cross_attention_kwargs`; nobody looks at
the text.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from kernels_warmup.attention import transformer_blocks

ZERO_TEXT = "zero_text"
"""The entry of `cross_attention_kwargs` by which the first half of the batch has zeros as text."""


class Block(BasicTransformerBlock):  # type: ignore[misc]
    """h + self-attention, h + cross-attention, h + feed-forward, each after a norm of its own.

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
    """Give every transformer block of the UNet this kind's forward.

    Raises:
        ValueError: a block is not SDXL's; nothing has been changed then.
    """
    blocks = transformer_blocks(unet)
    for block in blocks:
        _require_plain(block)
    for block in blocks:
        block.__class__ = kind


def _require_plain(block: Any) -> None:
    """Refuse a block that does more than SDXL's, rather than drop what it does."""
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
