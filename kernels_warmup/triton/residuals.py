"""The residual sums inside the products, so that a block's three sums need no pass of their own.

The hidden state is the accumulator of a product: `total += inner @ weight.T`, in place, by the
library's own product with beta = 1. (Into another tensor, PyTorch's `addmm` would copy the sum
first.) The products' biases are left out of this sum. They are constants, so what the sum lacks at
each norm is computed once, when the model is prepared. The norm adds it while the row is in
registers, and the bias of the transformer's last projection includes it. No bias is ever written to
memory.

Without a negative prompt, the text adds only the projection's bias to the unconditional half. The
biases are left out for both halves, so the product runs on the conditional half alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from kernels_warmup.rewrites.zero_text import ZERO_TEXT
from kernels_warmup.triton.install import NormedTransformer, normed, refuse_masks
from kernels_warmup.triton.layer_norm import launch, launch_for
from kernels_warmup.weights import Derived


@torch.library.custom_op("stepspan::add_product", mutates_args=("total",))
def add_product(total: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor) -> None:
    """Add inner @ weight.T to total (batch, tokens, width), in place.

    inner: (batch, tokens, channels), or the last batch entries only; the others stay unchanged.
    weight: (width, channels).
    """
    rows = inner.reshape(-1, inner.shape[-1])
    total.view(-1, total.shape[-1])[-len(rows) :].addmm_(rows, weight.t())


@add_product.register_fake
def _(total: torch.Tensor, inner: torch.Tensor, weight: torch.Tensor) -> None:
    return None


@register_flop_formula(torch.ops.stepspan.add_product)
def _flops(total: torch.Size, inner: torch.Size, weight: torch.Size, **_: Any) -> int:
    return 2 * inner.numel() * weight[0]


@torch.library.custom_op("stepspan::shifted_layer_norm", mutates_args=())
def shifted_layer_norm(
    hidden: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    last: int,
) -> torch.Tensor:
    """The LayerNorm of hidden + shift, of the last `last` batch entries.

    hidden: (batch, tokens, width); shift: float32, (width).
    """
    part = hidden[-last:]
    rows = part.reshape(-1, part.shape[-1])
    width = rows.shape[1]
    _, norm = launch(rows, None, shift, weight, bias, eps, len(rows), launch_for(width))
    return norm.view(part.shape)


@shifted_layer_norm.register_fake
def _(
    hidden: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    last: int,
) -> torch.Tensor:
    return hidden.new_empty(last, *hidden.shape[1:])


def set_residual_products(unet: Any) -> None:
    """Compute the residual sums by the products.

    Call it after `install.set_layer_norm`, and do not change the biases afterwards. After a
    change of a last projection's weight, its `derived_tensors` has to be computed again.

    Raises:
        ValueError: a transformer is not SDXL's, or `set_layer_norm` was not called across blocks.
            The UNet is unchanged then.
    """
    transformers = [module for module in unet.modules() if isinstance(module, NormedTransformer)]
    if not transformers:
        raise ValueError("residual products need the kernel's norms across blocks")
    for transformer in transformers:
        if not transformer.use_linear_projection:
            raise ValueError("not SDXL's transformer: its projections are convolutions")
        if any(product.bias is None for product in _residual_products(transformer)):
            raise ValueError("not SDXL's transformer: a product before a sum has no bias")
    with torch.no_grad():
        for transformer in transformers:
            _carry_biases(transformer)
            transformer.__class__ = ResidualTransformer


def _residual_products(transformer: Any) -> list[nn.Linear]:
    """The products before the residual sums, in the order in which they run."""
    return [
        product
        for block in transformer.transformer_blocks
        for product in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2])
    ]


def _carry_biases(transformer: Any) -> None:
    """Register `shifts` (sums, width), the biases that each sum lacks so far, and `output_bias`."""
    biases = torch.stack([product.bias.float() for product in _residual_products(transformer)])
    shifts = biases.cumsum(0)
    output_bias = _output_bias(shifts, transformer.proj_out)
    transformer.register_buffer("shifts", shifts, persistent=False)
    transformer.register_buffer("output_bias", output_bias, persistent=False)


def _output_bias(shifts: torch.Tensor, projection: nn.Linear) -> torch.Tensor:
    """The projection's bias and its product with the biases that the last sum lacks, (width,)."""
    bias = F.linear(shifts[-1], projection.weight.float(), projection.bias.float())
    return bias.to(projection.weight.dtype)


class ResidualTransformer(NormedTransformer):
    """`NormedTransformer` with each residual sum computed by the product before it."""

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
        # The half that does not attend to the text needs no norm before that attention.
        attending = batch // 2 if ZERO_TEXT in (cross_attention_kwargs or ()) else batch
        shifts = iter(self.shifts.unbind())
        # The projection's result is used nowhere else, so it may be changed in place.
        total, _ = self._operate_on_continuous_inputs(hidden_states)
        norm = normed(total, self.transformer_blocks[0].norm1)
        following = [block.norm1 for block in self.transformer_blocks[1:]]
        for block, next_norm in zip(self.transformer_blocks, [*following, None], strict=True):
            attn1, attn2 = block.attn1, block.attn2
            add_product(total, attn1.processor.attended(attn1, norm), attn1.to_out[0].weight)
            norm = _shifted(total, next(shifts), block.norm2, attending)
            text = attn2.processor.attended(attn2, norm, encoder_hidden_states)
            add_product(total, text, attn2.to_out[0].weight)
            norm = _shifted(total, next(shifts), block.norm3, batch)
            gated, _, last = block.ff.net
            add_product(total, gated(norm), last.weight)
            if next_norm is not None:
                norm = _shifted(total, next(shifts), next_norm, batch)
        projected = F.linear(total, self.proj_out.weight, self.output_bias)
        image = projected.reshape(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()
        output = image + hidden_states
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def derived_tensors(self) -> dict[str, Derived]:
        compute = partial(_output_bias, self.shifts, self.proj_out)
        return {"proj_out": Derived(self.output_bias, compute)}


def _shifted(
    total: torch.Tensor, shift: torch.Tensor, norm: nn.LayerNorm, last: int
) -> torch.Tensor:
    result = shifted_layer_norm(total, shift, norm.weight, norm.bias, norm.eps, last)
    return cast(torch.Tensor, result)
