"""The text's share of a step, computed once a run.

The keys and values of SDXL's 70 cross-attentions and the added-condition embedding depend on the
prompt alone. diffusers computes them in every step; `TextOnce` computes them once and keeps them in
buffers that the UNet reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch

from kernels_warmup.attention import transformer_blocks


@dataclass(frozen=True)
class TextCondition:
    """The buffers for one batch size from which the steps of a run read its prompts.

    They are refilled in place. Their addresses never change, so a captured graph may read them.
    """

    projected: dict[int, torch.Tensor]
    """Attention width -> (2 x attentions, batch x tokens, width), keys and values alternating."""
    added: torch.Tensor
    """(batch, time embedding channels): the pooled text and the image size, embedded."""
    views: tuple[tuple[Any, torch.Tensor, torch.Tensor], ...]
    """Each attention with its key and its value, (batch, tokens, width), views of `projected`."""


@dataclass(frozen=True, eq=False)
class BufferedText:
    """One text in the buffers, as `TextOnce.prepare` put it there. Valid until the next `prepare`
    of as many texts and tokens.

    It holds no tensors. Its holder may let the steps read the buffers.
    """

    batch: int
    tokens: int
    """Tokens of a prompt in it. Each number has buffers of its own, and so graphs of its own."""


BUFFERED_TEXT = "buffered_text"
"""The entry of `cross_attention_kwargs` with the `BufferedText` that a step reads."""


class TextOnce:
    """Computes what depends on the prompt alone once, at the start of a run.

    `prepare` fills the buffers for a batch and returns what identifies the filling. The UNet's
    attentions and its added-condition embedding read the buffers that are attached. Each batch size
    has buffers of its own, so the guided and the unguided steps of one run can both be prepared
    before the run's first step.

    Raises:
        ValueError: the UNet's conditioning or a cross-attention is not SDXL's.
    """

    def __init__(self, unet: Any) -> None:
        if unet.config.addition_embed_type != "text_time" or unet.encoder_hid_proj is not None:
            raise ValueError("not SDXL's conditioning: the text is processed in the UNet itself")
        self._unet = unet
        # Read once: the UNet walks all of its modules to find its type, which takes milliseconds.
        self._dtype = unet.dtype
        self._attentions: dict[int, list[Any]] = {}
        for block in transformer_blocks(unet):
            self._attentions.setdefault(block.attn2.inner_dim, []).append(block.attn2)
        self._weights = {width: _stack(group) for width, group in self._attentions.items()}
        self._conditions: dict[tuple[int, int], TextCondition] = {}
        self._attached: TextCondition | None = None
        self._buffered: dict[tuple[int, int], BufferedText] = {}
        self._embed_added = unet.get_aug_embed
        unet.register_buffer("added_condition", None, persistent=False)
        unet.get_aug_embed = MethodType(_read_added_condition, unet)
        for group in self._attentions.values():
            for attn in group:
                attn.register_buffer("text_key", None, persistent=False)
                attn.register_buffer("text_value", None, persistent=False)

    def prepare(
        self, encoder_hidden_states: torch.Tensor, added_cond_kwargs: Mapping[str, torch.Tensor]
    ) -> BufferedText:
        """Fill the buffers for these prompts and attach them to the UNet.

        encoder_hidden_states: (batch, tokens, text width), the unconditional half first;
        added_cond_kwargs: `text_embeds` (batch, pooled width) and `time_ids` (batch, 6).
        """
        batch, tokens, _ = encoder_hidden_states.shape
        self._buffered.pop((batch, tokens), None)  # not valid while the buffers are written
        self._fill(encoder_hidden_states, added_cond_kwargs)
        buffered = self._buffered[batch, tokens] = BufferedText(batch, tokens)
        return buffered

    def holds(self, buffered: BufferedText) -> bool:
        """Whether the buffers still hold this text."""
        return self._buffered.get((buffered.batch, buffered.tokens)) is buffered

    def attach(self, buffered: BufferedText) -> None:
        """Let the UNet read this text. Moves no data; takes microseconds where it is attached.

        Raises:
            RuntimeError: the buffers no longer hold this text.
        """
        if not self.holds(buffered):
            raise RuntimeError("the buffers hold the text of another run")
        self._attach(self._conditions[buffered.batch, buffered.tokens])

    def _fill(
        self, encoder_hidden_states: torch.Tensor, added_cond_kwargs: Mapping[str, torch.Tensor]
    ) -> None:
        batch, tokens, _ = encoder_hidden_states.shape
        condition = self._conditions.get((batch, tokens))
        if condition is None:
            condition = self._conditions[batch, tokens] = self._allocate(batch, tokens)
        self._attach(condition)
        with torch.no_grad():
            text = encoder_hidden_states.flatten(0, 1).to(self._dtype)
            for width, projected in condition.projected.items():
                weights = self._weights[width]
                everywhere = text.expand(len(weights), -1, -1)
                torch.bmm(everywhere, weights.transpose(1, 2), out=projected)
            added = self._embed_added(
                emb=condition.added,
                encoder_hidden_states=encoder_hidden_states,
                added_cond_kwargs=added_cond_kwargs,
            )
            condition.added.copy_(added)

    def _allocate(self, batch: int, tokens: int) -> TextCondition:
        # Outside inference mode, because an inference tensor cannot be refilled outside it.
        with torch.inference_mode(False), torch.no_grad():
            projected = {
                width: weights.new_empty(len(weights), batch * tokens, width)
                for width, weights in self._weights.items()
            }
            views = []
            for width, group in self._attentions.items():
                of_group = projected[width].view(-1, batch, tokens, width).unbind()
                views += list(zip(group, of_group[::2], of_group[1::2], strict=True))
            some = next(iter(projected.values()))
            embedding = self._unet.add_embedding.linear_2.out_features
            return TextCondition(projected, some.new_empty(batch, embedding), tuple(views))

    def _attach(self, condition: TextCondition) -> None:
        if condition is self._attached:
            return
        for attn, key, value in condition.views:
            # What setting the attributes does in the end. SDXL has 140 of them, each checked for
            # microseconds, and a run may attach between two steps.
            attn._buffers.update(text_key=key, text_value=value)
        self._unet.added_condition = condition.added
        self._attached = condition


def _read_added_condition(
    unet: Any,
    emb: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    added_cond_kwargs: dict[str, torch.Tensor],
) -> torch.Tensor:
    return cast(torch.Tensor, unet.added_condition)


def _stack(attentions: list[Any]) -> torch.Tensor:
    """The weights of keys and values, alternating, as one (2 x attentions, width, text width).

    The modules' weights become views of it, so that no weight is stored twice.
    """
    linears = [linear for attn in attentions for linear in (attn.to_k, attn.to_v)]
    if any(linear.bias is not None for linear in linears):
        raise ValueError("not SDXL's cross-attention: its key and value projections have a bias")
    stacked = torch.stack([linear.weight.data for linear in linears])
    for linear, weight in zip(linears, stacked.unbind(), strict=True):
        linear.weight.data = weight
    return stacked
