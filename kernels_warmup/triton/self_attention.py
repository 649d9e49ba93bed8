"""Self-attention over few tokens: SDXL's 1,024 at 1024x1024, 20 heads of 64 channels, batch 2.

The library's kernel reaches 325 TFLOP/s there, but 470 over 4,096 tokens. 40 heads in tiles of 128
queries are 320 programs for 132 multiprocessors, 2.4 each. If two fit a multiprocessor at a time,
264 run first and then 56, while most of the GPU is idle.

Here a program uses so few registers and so little shared memory that all programs run at once. With
tiles of 128 queries, three fit a multiprocessor; some get three and some two, so 19% is idle. With
tiles of 64, five fit, and 640 programs leave 3% idle; but every program reads the keys and values
of its head, 164 MB in all from the level-2 cache instead of 82. `bench operators` measures which
tile is faster. Steps of 32 keys keep the number of registers low. Capping that number instead would
make the assembler serialise the tensor cores' instructions.

The kernel makes one pass over the keys with a running maximum. The tensor memory accelerator reads
query, key and value from the result of the fused projection, through three-dimensional descriptors,
so that a tile never reaches from one image of the batch into the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

MOST_ROWS = 50_000
"""The largest number of queries, of all heads and images, for this kernel. More than that are three
full waves of the library's programs, which then lose little in the last wave. 1,024 tokens have
40,960 queries, 4,096 tokens have 81,920."""


@dataclass(frozen=True)
class Launch:
    """Launch settings.

    Attributes:
        queries: queries of one head per program.
        keys: keys per step of the loop.
        warps: warps per program.
        stages: steps whose loads are in flight.
    """

    queries: int
    keys: int
    warps: int = 4
    stages: int = 3


CANDIDATES = (
    Launch(128, 32),
    Launch(64, 32),
    Launch(64, 64, stages=2),
    Launch(64, 128, stages=2),
    Launch(128, 64, 8),
    Launch(128, 128, 8, stages=2),
)
"""The settings that `bench operators` compares."""


# Not specialised on the number of tokens, so that it is not compiled again for another one.
@triton.jit(do_not_specialize=["tokens"])
def _self_attention_kernel(
    query,
    key,
    value,
    out,
    tokens,
    scale,
    SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    row = tl.program_id(0) * QUERIES
    column = tl.program_id(1) * SIZE
    batch = tl.program_id(2)
    queries = query.load([batch, row, column]).reshape(QUERIES, SIZE)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    summed = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, SIZE), tl.float32)
    for first in tl.range(0, tokens, KEYS):
        keys = key.load([batch, first, column]).reshape(KEYS, SIZE)
        values = value.load([batch, first, column]).reshape(KEYS, SIZE)
        scores = tl.dot(queries, keys.T)
        if not WHOLE:
            # Past the end the descriptor reads zeros, whose scores must be masked.
            inside = first + tl.arange(0, KEYS) < tokens
            scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        shrink = tl.exp2(largest - higher)
        summed = summed * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None])
        largest = higher
    mixed *= (1.0 / summed)[:, None]
    out.store([batch, row, column], mixed.to(out.dtype).reshape(1, QUERIES, SIZE))


CHOSEN = CANDIDATES[0]
"""With it, all programs of 1,024 tokens run at once and read no more than the library's."""


def launch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, how: Launch
) -> torch.Tensor:
    """Run the kernel with these settings; computes `reference.attention`."""
    query, key, value = (_described(tensor) for tensor in (query, key, value))
    batch, tokens, width = query.shape
    size = width // heads
    out = query.new_empty(batch, tokens, width)
    block = [1, how.keys, size]
    _self_attention_kernel[(triton.cdiv(tokens, how.queries), heads, batch)](
        TensorDescriptor.from_tensor(query, [1, how.queries, size]),
        TensorDescriptor.from_tensor(key, block),
        TensorDescriptor.from_tensor(value, block),
        TensorDescriptor.from_tensor(out, [1, how.queries, size]),
        tokens,
        # The hardware computes powers of two, not of e.
        size**-0.5 / math.log(2),
        SIZE=size,
        QUERIES=how.queries,
        KEYS=how.keys,
        WHOLE=tokens % how.keys == 0,
        num_warps=how.warps,
        num_stages=how.stages,
    )
    return out


def _described(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it, with address and rows aligned to 16 bytes for a descriptor."""
    aligned = all(stride * tensor.itemsize % 16 == 0 for stride in tensor.stride()[:-1])
    aligned = aligned and tensor.data_ptr() % 16 == 0
    return tensor if aligned and tensor.stride(-1) == 1 else tensor.contiguous()


def why_unusable(tokens: int, keys: int, size: int) -> str | None:
    """One sentence saying why the kernel cannot compute this attention, or None if it can."""
    if keys != tokens:
        return f"{tokens} queries and {keys} keys are not self-attention"
    if size not in (16, 32, 64, 128):
        return f"a head of {size} is not a power of two from 16 to 128"
    return None


@torch.library.custom_op("stepspan::self_attention", mutates_args=())
def self_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int
) -> torch.Tensor:
    """(batch, tokens, width) from query, key and value of that shape, in any strides."""
    reason = why_unusable(query.shape[1], key.shape[1], query.shape[-1] // heads)
    if reason is not None:
        raise ValueError(reason)
    return launch(query, key, value, heads, CHOSEN)


@register_flop_formula(torch.ops.stepspan.self_attention)
def _flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    batch, tokens, width = query
    return 4 * batch * tokens * width * key[1]


@self_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    return query.new_empty(query.shape)
