"""GEGLU in one kernel: both halves of the feed-forward's first product, and their gating.

Apart, the product writes 2 x width columns that a second kernel reads again to write half as many.
Here the value's and the gate's columns of one tile are one product of twice the width, in one
accumulator; they meet in registers and only the result is written.

Persistent: a program for each multiprocessor walks over the tiles, and the next tile's first loads
are under way while this one is gated. Operands come by the tensor memory accelerator through
descriptors made on the host, which a captured graph keeps by value. The weight's descriptor has
three dimensions, (value or gate, column, inner), so that one copy brings both parts of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

TILES_TOGETHER = 16
"""Rows of tiles that are walked through before the next column: 132 tiles of 128 x 256 then read
about as many rows as columns, the fewest bytes in all."""


@dataclass(frozen=True)
class Launch:
    """A tile's size, and how many warps work on how many of them ahead."""

    rows: int = 128
    columns: int = 128
    """Of the result; the product has as many for the gate again."""
    inner: int = 64
    """128 bytes, the widest pattern of the shared memory's banks."""
    warps: int = 8
    stages: int = 4
    flatten: bool = True
    """Make one loop of the tiles and their steps, so that loads run ahead across tiles."""
    programs: int = 1
    """A multiprocessor; two fill each other's gaps where the shared memory suffices for both."""


CANDIDATES = (
    Launch(),
    Launch(flatten=False),
    Launch(stages=3),
    Launch(rows=256, columns=64),
    Launch(columns=64, warps=4, stages=3, programs=2),
    Launch(columns=64, warps=4, stages=3, programs=2, flatten=False),
)
"""For a bench to choose from; of the last two, two programs share a multiprocessor."""


@triton.jit
def _normal_distribution(x):
    """P(X <= x) of a standard normal X, by which gelu multiplies: (1 + erf(x / sqrt 2)) / 2.

    An odd polynomial on -5..5 of least maximal error, flat outside: off by 3.3e-7 at most, where
    float32's own step at 1 is 1.2e-7. A third fewer instructions than erf, and no division.
    """
    x = tl.minimum(tl.maximum(x, -5.0), 5.0)
    t = x * x * 0.08 - 1.0
    p = t * 0.000721861958 - 0.00169041171
    p = t * p + 0.00142997527
    p = t * p - 0.00249876105
    p = t * p + 0.00668941718
    p = t * p - 0.0113264266
    p = t * p + 0.0162826013
    p = t * p - 0.0232082363
    p = t * p + 0.0314646475
    p = t * p - 0.04045159
    p = t * p + 0.05151904
    p = t * p - 0.070295915
    p = t * p + 0.1413638
    return x * p + 0.5


# Not compiled anew for other numbers of rows: addresses follow from the descriptors.
@triton.jit(do_not_specialize=["rows"])
def _geglu_kernel(
    hidden,
    weight,
    bias,
    out,
    rows,
    columns,
    inner,
    PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    TOGETHER: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=FLATTEN):
        above = tile // (TOGETHER * across) * TOGETHER
        height = min(down - above, TOGETHER)
        row = (above + tile % (TOGETHER * across) % height) * ROWS
        column = tile % (TOGETHER * across) // height * COLUMNS
        both = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)
        for step in tl.range(0, tl.cdiv(inner, INNER)):
            left = hidden.load([row, step * INNER])
            right = weight.load([0, column, step * INNER]).reshape(2 * COLUMNS, INNER)
            both = tl.dot(left, right.T, both)
        # A thread holds a column's value and gate both: parting them moves nothing.
        value, gate = both.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
        at = column + tl.arange(0, COLUMNS)
        value += tl.load(bias + at).to(tl.float32)[None, :]
        gate += tl.load(bias + columns + at).to(tl.float32)[None, :]
        gated = value * gate * _normal_distribution(gate)
        out.store([row, column], gated.to(out.dtype))


def launch_for(rows: int, columns: int, inner: int) -> Launch:
    """Settings for a hidden state (rows, inner) and a result (rows, columns).

    Raises:
        ValueError: the columns are not a multiple of 16, or a row of the hidden state is not one of
            16 bytes.
    """
    if columns % 16 or inner % 8:
        raise ValueError(
            f"GEGLU from {inner} to {columns} channels: multiples of 8 and 16 are needed"
        )
    # The widest tile that the columns fill; a tile of rows may reach past the end.
    for width in (128, 64, 32):
        if columns % width == 0:
            return Launch(columns=width)
    return Launch(columns=16)


def launch(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, how: Launch
) -> torch.Tensor:
    """As `reference.geglu`, with these settings."""
    columns, inner = weight.shape[0] // 2, weight.shape[1]
    flat = hidden.reshape(-1, inner).contiguous()
    rows = flat.shape[0]
    out = flat.new_empty(rows, columns)
    programs = how.programs * _multiprocessors(hidden.device)
    tiles = triton.cdiv(rows, how.rows) * triton.cdiv(columns, how.columns)
    _geglu_kernel[(min(programs, tiles),)](
        TensorDescriptor.from_tensor(flat, [how.rows, how.inner]),
        TensorDescriptor.from_tensor(weight.view(2, columns, inner), [2, how.columns, how.inner]),
        bias,
        TensorDescriptor.from_tensor(out, [how.rows, how.columns]),
        rows,
        columns,
        inner,
        PROGRAMS=programs,
        ROWS=how.rows,
        COLUMNS=how.columns,
        INNER=how.inner,
        TOGETHER=TILES_TOGETHER,
        FLATTEN=how.flatten,
        num_warps=how.warps,
        num_stages=how.stages,
    )
    return out.view(*hidden.shape[:-1], columns)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    # In the interpreter: a few, so that each walks over several tiles.
    return 3


@torch.library.custom_op("stepspan::geglu", mutates_args=())
def geglu(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(..., columns) from hidden (..., inner), weight (2 x columns, inner), the values' rows first,
    and bias (2 x columns)."""
    columns, inner = weight.shape[0] // 2, weight.shape[1]
    return launch(hidden, weight, bias, launch_for(hidden.numel() // inner, columns, inner))


@register_flop_formula(torch.ops.stepspan.geglu)
def _flops(hidden: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * hidden.numel() * weight[0]


@geglu.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(*hidden.shape[:-1], weight.shape[0] // 2)
