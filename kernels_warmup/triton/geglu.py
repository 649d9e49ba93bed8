"""GEGLU in one kernel: both halves of the feed-forward's first product, and their gating.

As two kernels, the product writes 2 x width columns, and the gating reads them to write half as
many. Here the columns of value and gate of one tile are one product of twice the width, in one
accumulator. They meet in registers, and only the result is written.

The kernel is persistent: one program per multiprocessor loops over the tiles, so that the first
loads of the next tile are in flight while this one is gated. The tensor memory accelerator loads
the operands through descriptors made on the host, which a captured graph stores by value. The
weight's descriptor has three dimensions, (value or gate, column, inner), so that one copy loads
both parts of a tile.
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
"""How many rows of tiles are computed before the next column of tiles. 132 tiles of 128 x 256 then
read about as many rows as columns, which is the fewest bytes in all."""


@dataclass(frozen=True)
class Launch:
    """Launch settings.

    Attributes:
        rows: rows of a tile.
        columns: columns of a tile of the result; the product has as many again for the gate.
        inner: inner dimension per step; 64 are 128 bytes, the widest pattern of shared memory.
        warps: warps per program.
        stages: steps whose loads are in flight.
        flatten: make one loop of the tiles and their steps, so that loads run ahead across tiles.
        programs: programs per multiprocessor; two fill each other's gaps if shared memory is enough
            for both.
    """

    rows: int = 128
    columns: int = 128
    inner: int = 64
    warps: int = 8
    stages: int = 4
    flatten: bool = True
    programs: int = 1


CANDIDATES = (
    Launch(),
    Launch(flatten=False),
    Launch(stages=3),
    Launch(rows=256, columns=64),
    Launch(columns=64, warps=4, stages=3, programs=2),
    Launch(columns=64, warps=4, stages=3, programs=2, flatten=False),
)
"""The settings that `bench operators` compares. In the last two, two programs share a
multiprocessor."""


@triton.jit
def _normal_distribution(x):
    """P(X <= x) of a standard normal X, the factor in gelu: (1 + erf(x / sqrt 2)) / 2.

    It is the odd polynomial on -5..5 with the smallest maximal error, and constant outside. The
    error is at most 3.3e-7; float32's own step at 1 is 1.2e-7. It takes a third fewer instructions
    than erf, and no division.
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


# Not specialised on the number of rows, so that it is not compiled again for another one.
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
        # A thread holds both value and gate of a column, so splitting them moves no data.
        value, gate = both.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
        at = column + tl.arange(0, COLUMNS)
        value += tl.load(bias + at).to(tl.float32)[None, :]
        gate += tl.load(bias + columns + at).to(tl.float32)[None, :]
        gated = value * gate * _normal_distribution(gate)
        out.store([row, column], gated.to(out.dtype))


def launch_for(rows: int, columns: int, inner: int) -> Launch:
    """The launch settings for a hidden state (rows, inner) and a result (rows, columns).

    Raises:
        ValueError: the number of columns is not a multiple of 16, or a row of the hidden state is
            not a multiple of 16 bytes.
    """
    if columns % 16 or inner % 8:
        raise ValueError(f"GEGLU from {inner} to {columns} channels needs multiples of 8 and 16")
    # The widest tile that divides the columns; a tile may reach past the last row.
    for width in (128, 64, 32):
        if columns % width == 0:
            return Launch(columns=width)
    return Launch(columns=16)


def launch(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, how: Launch
) -> torch.Tensor:
    """Run the kernel with these settings; computes `reference.geglu`."""
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
    # In Triton's interpreter: a few, so that each program loops over several tiles.
    return 3


@torch.library.custom_op("stepspan::geglu", mutates_args=())
def geglu(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """(..., columns) from hidden (..., inner), weight (2 x columns, inner) and bias (2 x columns);
    in weight and bias the value's part comes first."""
    columns, inner = weight.shape[0] // 2, weight.shape[1]
    return launch(hidden, weight, bias, launch_for(hidden.numel() // inner, columns, inner))


@register_flop_formula(torch.ops.stepspan.geglu)
def _flops(hidden: torch.Size, weight: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * hidden.numel() * weight[0]


@geglu.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return hidden.new_empty(*hidden.shape[:-1], weight.shape[0] // 2)
