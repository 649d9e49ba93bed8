"""Puts the kernels into a UNet: modules become their counterparts here by their class alone.

Names, weights and `isinstance` stay as they were, and equal blocks still share one compiled graph.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from kernels_warmup.attention import Backend, StepAttention, transformer_blocks
from kernels_warmup.blocks import ZERO_TEXT, Block, set_blocks
from kernels_warmup.triton.cross_attention import few_keys_attention
from kernels_warmup.triton.cross_attention import why_unusable as why_not_few_keys
from kernels_warmup.triton.geglu import geglu
from kernels_warmup.triton.layer_norm import add_layer_norm, layer_norm
from kernels_warmup.triton.self_attention import MOST_ROWS, self_attention
from kernels_warmup.triton.self_attention import why_unusable as why_not_self_attention


def set_layer_norm(unet: Any, *, across_blocks: bool = True) -> None:
    """Every sum and norm of the transformer blocks in one kernel.

    across_blocks: also a block's last sum with the next one's first norm. Their transformer then
    runs its blocks in parts, and a block that is compiled by itself would not be.

    Raises:
        ValueError: a block is not SDXL's; nothing has been changed then.
    """
    set_blocks(unet, NormedBlock)
    if across_blocks:
        for module in unet.modules():
            if isinstance(module, Transformer2DModel):
                module.__class__ = NormedTransformer


def set_cross_attention(unet: Any, backend: Backend) -> None:
    """Attention to the text by the kernel, to more keys than it takes by the named backend."""
    processor = FewKeysAttention(backend)
    for block in transformer_blocks(unet):
        block.attn2.set_processor(processor)


def set_self_attention(unet: Any, backend: Backend) -> None:
    """Self-attention over few tokens by the kernel, over more by the named backend."""
    processor = FewTokensAttention(backend)
    for block in transformer_blocks(unet):
        block.attn1.set_processor(processor)


def set_geglu(unet: Any) -> None:
    """Feed-forwards' first product and its gating in one kernel, for weights in the model's type.

    Raises:
        ValueError: a feed-forward is not SDXL's; nothing has been changed then.
    """
    gatings = [block.ff.net[0] for block in transformer_blocks(unet)]
    if any(not isinstance(gating, GEGLU) or gating.proj.bias is None for gating in gatings):
        raise ValueError("not SDXL's feed-forward: it does not begin with a GEGLU with a bias")
    for gating in gatings:
        gating.__class__ = FusedGEGLU


class NormedBlock(Block):
    """`Block`, each of its sums taken together with the norm that follows."""

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
        refuse_masks(attention_mask, encoder_attention_mask)
        norm = normed(hidden_states, self.norm1)
        zero_text = ZERO_TEXT in (cross_attention_kwargs or ())
        hidden, change = self.parts(hidden_states, norm, encoder_hidden_states, zero_text)
        return hidden + change

    def parts(
        self,
        hidden: torch.Tensor,
        norm: torch.Tensor,
        text: torch.Tensor | None,
        zero_text: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's last two summands, from its input and that input's first norm."""
        # A half that attends to nothing needs no norm, and gains the projection's bias alone.
        attending = hidden.shape[0] // 2 if zero_text else hidden.shape[0]
        hidden, norm = added(hidden, self.attn1(norm), self.norm2, last=attending)
        change = self.attn2(norm, encoder_hidden_states=text)
        missing = self.attn2.to_out[0].bias if zero_text else None
        hidden, norm = added(hidden, change, self.norm3, missing=missing)
        return hidden, self.ff(norm)


class NormedTransformer(Transformer2DModel):  # type: ignore[misc]
    """SDXL's stack of blocks, each block's last sum taken together with the next's first norm."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """hidden_states: (batch, channels, height, width)."""
        refuse_masks(attention_mask, encoder_attention_mask)
        batch, _, height, width = hidden_states.shape
        text = encoder_hidden_states
        zero_text = ZERO_TEXT in (cross_attention_kwargs or ())
        hidden, inner = self._operate_on_continuous_inputs(hidden_states)
        first, *others = self.transformer_blocks
        norm = normed(hidden, first.norm1)
        hidden, change = first.parts(hidden, norm, text, zero_text)
        for block in others:
            hidden, norm = added(hidden, change, block.norm1)
            hidden, change = block.parts(hidden, norm, text, zero_text)
        output = self._get_output_for_continuous_inputs(
            hidden + change, hidden_states, batch, height, width, inner
        )
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def refuse_masks(*masks: torch.Tensor | None) -> None:
    if any(mask is not None for mask in masks):
        raise ValueError("SDXL attends to every token; an attention mask is not supported")


def normed(hidden: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    return cast(torch.Tensor, layer_norm(hidden, norm.weight, norm.bias, norm.eps))


def added(
    hidden: torch.Tensor,
    change: torch.Tensor,
    norm: nn.LayerNorm,
    *,
    missing: torch.Tensor | None = None,
    last: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and the norm of it or of its last of the batch; see `add_layer_norm`."""
    rows = hidden.shape[0] if last is None else last
    result = add_layer_norm(hidden, change, missing, norm.weight, norm.bias, norm.eps, rows)
    return cast(tuple[torch.Tensor, torch.Tensor], result)


class FewKeysAttention(StepAttention):
    """`StepAttention` by the kernel for few keys, where there are no more of them than it takes."""

    def mix(
        self, heads: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        if why_not_few_keys(key.shape[1], query.shape[-1] // heads) is not None:
            return super().mix(heads, query, key, value)
        return cast(torch.Tensor, few_keys_attention(query, key, value, heads))


class FewTokensAttention(StepAttention):
    """`StepAttention` by the kernel for self-attention, where the library's waves are not full."""

    def mix(
        self, heads: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        batch, tokens, width = query.shape
        refused = why_not_self_attention(tokens, key.shape[1], width // heads) is not None
        if refused or batch * heads * tokens > MOST_ROWS:
            return super().mix(heads, query, key, value)
        return cast(torch.Tensor, self_attention(query, key, value, heads))


class FusedGEGLU(GEGLU):  # type: ignore[misc]
    """diffusers' GEGLU in one kernel."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, geglu(hidden_states, self.proj.weight, self.proj.bias))
