"""Puts the kernels into a UNet: modules become their counterparts here by their class alone.

Names, weights and `isinstance` stay unchanged, and equal blocks still share one compiled graph.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from kernels_warmup.attention import Backend, StepAttention, transformer_blocks
from kernels_warmup.fp8 import Fp8Linear, Rounded
from kernels_warmup.rewrites.zero_text import ZERO_TEXT, Block, set_blocks
from kernels_warmup.triton.cross_attention import few_keys_attention
from kernels_warmup.triton.cross_attention import why_unusable as why_not_few_keys
from kernels_warmup.triton.geglu import geglu
from kernels_warmup.triton.layer_norm import (
    add_layer_norm,
    add_layer_norm_fp8,
    layer_norm,
    layer_norm_fp8,
)
from kernels_warmup.triton.self_attention import MOST_ROWS, self_attention
from kernels_warmup.triton.self_attention import why_unusable as why_not_self_attention


def set_layer_norm(unet: Any, *, across_blocks: bool = True) -> None:
    """Compute each residual sum of the transformer blocks and the norm after it in one kernel.

    across_blocks: do so for the last sum of a block and the first norm of the next one as well. The
        transformer then calls parts of its blocks, so blocks cannot be compiled one by one.

    Raises:
        ValueError: a block is not SDXL's. The UNet is unchanged then.
    """
    set_blocks(unet, NormedBlock)
    if across_blocks:
        for module in unet.modules():
            if isinstance(module, Transformer2DModel):
                module.__class__ = NormedTransformer


def set_fp8_norms(unet: Any) -> None:
    """Write the norms that an fp8 product reads as fp8; call it after `set_layer_norm`.

    The second norm of a block is not written as fp8: its product, the query of the cross-attention,
    is square and not quantised. The third fp8 product, the feed-forward's last, needs no kernel of
    ours: it reads the result of the gating, and the compiler makes one kernel of gating, largest
    value and cast (`python -m bench launches --scenario fp8-fused` counts 70 of them).
    """
    for block in transformer_blocks(unet):
        products = (getattr(block.attn1, "to_qkv", None), block.ff.net[0].proj)
        for norm, product in zip((block.norm1, block.norm3), products, strict=True):
            if isinstance(product, Fp8Linear):
                norm.__class__ = Fp8Norm
                norm.register_buffer("fp8_scale", product.input_scale, persistent=False)


def set_cross_attention(unet: Any, backend: Backend) -> None:
    """Compute cross-attention by the kernel; by the named backend for more keys than that takes."""
    processor = FewKeysAttention(backend)
    for block in transformer_blocks(unet):
        block.attn2.set_processor(processor)


def set_self_attention(unet: Any, backend: Backend) -> None:
    """Compute self-attention over few tokens by the kernel, over more by the named backend."""
    processor = FewTokensAttention(backend)
    for block in transformer_blocks(unet):
        block.attn1.set_processor(processor)


def set_geglu(unet: Any) -> None:
    """Compute the first product of each feed-forward and its gating in one kernel.

    Only for weights of the model's own type, not for quantised ones.

    Raises:
        ValueError: a feed-forward is not SDXL's. The UNet is unchanged then.
    """
    gatings = [block.ff.net[0] for block in transformer_blocks(unet)]
    if any(not isinstance(gating, GEGLU) or gating.proj.bias is None for gating in gatings):
        raise ValueError("not SDXL's feed-forward: it does not begin with a GEGLU with a bias")
    for gating in gatings:
        gating.__class__ = FusedGEGLU


class NormedBlock(Block):
    """`Block` that computes each residual sum together with the norm after it."""

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
        norm: torch.Tensor | Rounded,
        text: torch.Tensor | None,
        zero_text: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last two summands of the block's result, from its input and the first norm of it."""
        # The half that does not attend needs no norm, and only the projection's bias is added.
        attending = hidden.shape[0] // 2 if zero_text else hidden.shape[0]
        hidden, norm = added(hidden, self.attn1(norm), self.norm2, last=attending)
        change = self.attn2(norm, encoder_hidden_states=text)
        missing = self.attn2.to_out[0].bias if zero_text else None
        hidden, norm = added(hidden, change, self.norm3, missing=missing)
        return hidden, self.ff(norm)


class NormedTransformer(Transformer2DModel):  # type: ignore[misc]
    """SDXL's stack of blocks; computes a block's last sum together with the next block's norm."""

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


class Fp8Norm(nn.LayerNorm):
    """A norm whose result is fp8, for an fp8 product.

    Attributes:
        fp8_scale: float32, (), the scale of all rows; None if each row has its own.
    """

    fp8_scale: torch.Tensor | None

    def rounded(self, values: torch.Tensor, scales: torch.Tensor) -> Rounded:
        return Rounded(values, scales if self.fp8_scale is None else self.fp8_scale)


def normed(hidden: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor | Rounded:
    """`norm` of hidden (..., width), by the kernel."""
    of = (hidden, norm.weight, norm.bias, norm.eps)
    if isinstance(norm, Fp8Norm):
        return norm.rounded(*layer_norm_fp8(*of, norm.fp8_scale))
    return cast(torch.Tensor, layer_norm(*of))


def added(
    hidden: torch.Tensor,
    change: torch.Tensor,
    norm: nn.LayerNorm,
    *,
    missing: torch.Tensor | None = None,
    last: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | Rounded]:
    """hidden + change, and its norm; `missing` and `last` as in `layer_norm.add_layer_norm`."""
    of = (hidden, change, missing, norm.weight, norm.bias, norm.eps)
    if isinstance(norm, Fp8Norm):
        assert last is None, "the kernel writes the whole batch as fp8"
        total, *rounded = add_layer_norm_fp8(*of, norm.fp8_scale)
        return total, norm.rounded(*rounded)
    result = add_layer_norm(*of, hidden.shape[0] if last is None else last)
    return cast(tuple[torch.Tensor, torch.Tensor], result)


class FewKeysAttention(StepAttention):
    """`StepAttention` that uses the kernel for few keys, if there are few enough."""

    def mix(
        self, heads: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        if why_not_few_keys(key.shape[1], query.shape[-1] // heads) is not None:
            return super().mix(heads, query, key, value)
        return cast(torch.Tensor, few_keys_attention(query, key, value, heads))


class FewTokensAttention(StepAttention):
    """`StepAttention` that uses the kernel for self-attention, if there are few enough queries."""

    def mix(
        self, heads: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        batch, tokens, width = query.shape
        refused = why_not_self_attention(tokens, key.shape[1], width // heads) is not None
        if refused or batch * heads * tokens > MOST_ROWS:
            return super().mix(heads, query, key, value)
        return cast(torch.Tensor, self_attention(query, key, value, heads))


class FusedGEGLU(GEGLU):  # type: ignore[misc]
    """diffusers' GEGLU, computed by one kernel."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, geglu(hidden_states, self.proj.weight, self.proj.bias))
