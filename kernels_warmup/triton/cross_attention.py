"""Attention to few keys: SDXL's cross-attention to the 77 tokens of a prompt.

The library's kernel is built for thousands of keys and walks over them in tiles. Here all scores of
a query are in registers at once: one softmax without a running maximum, and between the first read
and the last write no other memory is touched. Query and output keep the layout of the projections
around them, (batch, tokens, heads x head size), and the keys lie where `TextOnce` left them.
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
"""Scores of more keys no longer fit into the registers beside what else is there."""


@dataclass(frozen=True)
class Launch:
    """How the queries are shared out."""

    queries: int
    """Of one head, a program."""
    warps: int


CANDIDATES = (Launch(64, 4), Launch(128, 4), Launch(128, 8), Launch(256, 8))
"""For a bench to choose from."""


def split(keys: int) -> tuple[int, int]:
    """(head, tail), powers of two that the tensor cores take, together no fewer than the keys.

    77 is 64 + 16 with three keys masked, where one power of two would be 128 with 51.
    """
    if keys <= 16:
        return 16, 0
    head = 1 << (keys.bit_length() - 1)
    rest = keys - head
    return head, max(16, triton.next_power_of_2(rest)) if rest else 0


# Not compiled anew for other numbers of them: addresses follow from the strides.
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
    """Settings for so many queries; fewer queries are no reason for a smaller tile than 64."""
    return Launch(128, 8) if tokens >= 128 else Launch(64, 4)


def launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, how: Launch
) -> torch.Tensor:
    """As `reference.attention`, with these settings."""
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
        # The hardware raises two to a power, not e.
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
    """One sentence saying why so many keys of this head size are not for this kernel, or None."""
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
