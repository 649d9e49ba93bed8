"""Attention to few keys: SDXL's cross-attention to the 77 tokens of a prompt.

The library's kernel is built for thousands of keys and processes them in tiles. Here all scores of
a query are in registers at once, so the softmax needs no running maximum, and no memory is used
between the first read and the last write. Query and output have the layout of the projections
around them, (batch, tokens, heads x head size); keys and values are read from `TextOnce`'s buffers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

MOST_KEYS = 128
"""The scores of more keys do not fit into the registers."""


@dataclass(frozen=True)
class Launch:
    """Launch settings.

    Attributes:
        queries: queries of one head per program.
        warps: warps per program.
    """

    queries: int
    warps: int


CANDIDATES = (Launch(64, 4), Launch(128, 4), Launch(128, 8), Launch(256, 8))
"""The settings that `bench operators` compares."""


def split(keys: int) -> tuple[int, int]:
    """(head, tail), two powers of two that the tensor cores can multiply and that cover the keys.

    77 keys become 64 + 16, with 3 masked; a single power of two would be 128, with 51 masked.
    """
    if keys <= 16:
        return 16, 0
    head = 1 << (keys.bit_length() - 1)
    rest = keys - head
    return head, max(16, triton.next_power_of_2(rest)) if rest else 0


# Not specialised on the numbers of tokens and keys, so that it is not compiled again for others.
@triton.jit(do_not_specialize=["tokens", "keys"])
def _few_keys_kernel(
    query,
    key,
    value,
    out,
    tokens,
    keys,
    scale,
    query_batch,
    query_token,
    key_batch,
    key_token,
    value_batch,
    value_token,
    SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    QUERIES: tl.constexpr,
):
    token = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)[:, None]
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)[None, :]
    batch = tl.program_id(2)
    key += batch * key_batch + column
    value += batch * value_batch + column
    at_head = tl.arange(0, HEAD)[:, None]
    at_tail = HEAD + tl.arange(0, TAIL if TAIL else 16)[:, None]
    inside = token < tokens

    key_head = tl.load(key + at_head * key_token, at_head < keys, 0.0)
    queries = tl.load(query + batch * query_batch + token * query_token + column, inside, 0.0)
    if TAIL:
        key_tail = tl.load(key + at_tail * key_token, at_tail < keys, 0.0)
    value_head = tl.load(value + at_head * value_token, at_head < keys, 0.0)
    if TAIL:
        value_tail = tl.load(value + at_tail * value_token, at_tail < keys, 0.0)

    head = tl.dot(queries, key_head.T) * scale
    head = tl.where((tl.arange(0, HEAD) < keys)[None, :], head, float("-inf"))
    largest = tl.max(head, 1)
    if TAIL:
        tail = tl.dot(queries, key_tail.T) * scale
        tail = tl.where((HEAD + tl.arange(0, TAIL) < keys)[None, :], tail, float("-inf"))
        largest = tl.maximum(largest, tl.max(tail, 1))
    head = tl.exp2(head - largest[:, None])
    summed = tl.sum(head, 1)
    mixed = tl.dot(head.to(value_head.dtype), value_head)
    if TAIL:
        tail = tl.exp2(tail - largest[:, None])
        summed += tl.sum(tail, 1)
        mixed = tl.dot(tail.to(value_tail.dtype), value_tail, mixed)
    mixed *= (1.0 / summed)[:, None]
    width = tl.num_programs(1) * SIZE
    place = out + (batch * tokens + token) * width + column
    tl.store(place, mixed.to(out.dtype.element_ty), inside)


def launch_for(tokens: int) -> Launch:
    """The launch settings for a number of queries."""
    return Launch(128, 8) if tokens >= 128 else Launch(64, 4)


def launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, how: Launch
) -> torch.Tensor:
    """Run the kernel with these settings; computes `reference.attention`."""
    query, key, value = (_rows_together(tensor) for tensor in (query, key, value))
    batch, tokens, width = query.shape
    keys, size = key.shape[1], width // heads
    head, tail = split(keys)
    out = query.new_empty(batch, tokens, width)
    _few_keys_kernel[(triton.cdiv(tokens, how.queries), heads, batch)](
        query,
        key,
        value,
        out,
        tokens,
        keys,
        # The hardware computes powers of two, not of e.
        size**-0.5 / math.log(2),
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        SIZE=size,
        HEAD=head,
        TAIL=tail,
        QUERIES=how.queries,
        num_warps=how.warps,
    )
    return out


def _rows_together(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def why_unusable(keys: int, size: int) -> str | None:
    """One sentence saying why the kernel cannot compute this attention, or None if it can."""
    if keys > MOST_KEYS:
        return f"{keys} keys are more than the {MOST_KEYS} that fit"
    if size not in (16, 32, 64, 128):
        return f"a head of {size} is not a power of two from 16 to 128"
    return None


@torch.library.custom_op("stepspan::few_keys_attention", mutates_args=())
def few_keys_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    """(batch, tokens, width) from a query of that shape, keys and values (batch, keys, width)."""
    reason = why_unusable(key.shape[1], query.shape[-1] // heads)
    if reason is not None:
        raise ValueError(reason)
    return launch(query, key, value, heads, launch_for(query.shape[1]))


@register_flop_formula(torch.ops.stepspan.few_keys_attention)
def _flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    return 4 * query.numel() * key[1]


@few_keys_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    return query.new_empty(query.shape)
