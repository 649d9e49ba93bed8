"""A residual sum and its LayerNorm in one kernel and one pass over memory.

The kernel that inductor generates makes several passes over a row and reads it again in each, so it
takes twice the time that its bytes need. Here a row stays in the registers of one warp, so its sums
need no barrier.

If an fp8 product reads the norm, the kernel writes fp8. The row is in registers already when its
largest magnitude is needed, and half as many bytes are written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels_warmup.fp8 import FP8


@dataclass(frozen=True)
class Launch:
    """Launch settings.

    Attributes:
        rows: rows per program.
        warps: warps per program.
    """

    rows: int
    warps: int = 1


CANDIDATES = (Launch(1), Launch(2), Launch(4), Launch(4, 4), Launch(8, 4))
"""The settings that `bench operators` compares. With one warp, a row's sums need no barrier."""


def launch_for(width: int) -> Launch:
    """One warp, and enough rows for each thread to load 16 bytes of the narrower part as well."""
    _, tail = split(width)
    return Launch(max(1, 256 // tail) if tail else max(1, 256 // width))


def split(width: int) -> tuple[int, int]:
    """A width as a sum of two powers of two, of which the second may be 0: 1280 is 1024 + 256.

    Raises:
        ValueError: it is not such a sum.
    """
    head = 1 << (width.bit_length() - 1)
    tail = width - head
    if tail & (tail - 1):
        raise ValueError(f"a row of {width} is not one or two powers of two; SDXL's are")
    return head, tail


# Not specialised on the number of rows, so that it is not compiled again for another one.
@triton.jit(do_not_specialize=["rows", "first_changed", "first_normed"])
def _add_layer_norm_kernel(
    hidden,
    change,
    missing,
    weight,
    bias,
    total,
    normed,
    scales,
    rows,
    first_changed,
    first_normed,
    eps,
    ADD: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALES: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = row < rows
    width: tl.constexpr = HEAD + TAIL
    at_head = tl.arange(0, HEAD)[None, :]
    at_tail = HEAD + tl.arange(0, TAIL if TAIL else 1)[None, :]

    head = tl.load(hidden + row * width + at_head, inside, 0.0).to(tl.float32)
    if TAIL:
        tail = tl.load(hidden + row * width + at_tail, inside, 0.0).to(tl.float32)
    if ADD:
        changed = inside & (row >= first_changed)
        same = inside & (row < first_changed)
        moved = change + (row - first_changed) * width
        head += tl.load(moved + at_head, changed, 0.0).to(tl.float32)
        head += tl.load(missing + at_head + row * 0, same, 0.0).to(tl.float32)
        tl.store(total + row * width + at_head, head.to(total.dtype.element_ty), inside)
        if TAIL:
            tail += tl.load(moved + at_tail, changed, 0.0).to(tl.float32)
            tail += tl.load(missing + at_tail + row * 0, same, 0.0).to(tl.float32)
            tl.store(total + row * width + at_tail, tail.to(total.dtype.element_ty), inside)
    if SHIFT:
        head += tl.load(missing + at_head).to(tl.float32)
        if TAIL:
            tail += tl.load(missing + at_tail).to(tl.float32)

    # Mean first, then the squared distances from it: a difference of large sums would cancel.
    summed = tl.sum(head, 1)
    if TAIL:
        summed += tl.sum(tail, 1)
    mean = (summed / width)[:, None]
    head -= mean
    squares = tl.sum(head * head, 1)
    if TAIL:
        tail -= mean
        squares += tl.sum(tail * tail, 1)
    scale = tl.rsqrt(squares / width + eps)[:, None]

    wanted = inside & (row >= first_normed)
    place = normed + (row - first_normed) * width
    head *= scale * tl.load(weight + at_head).to(tl.float32)
    head += tl.load(bias + at_head).to(tl.float32)
    if TAIL:
        tail *= scale * tl.load(weight + at_tail).to(tl.float32)
        tail += tl.load(bias + at_tail).to(tl.float32)
    if SCALES == "row":
        largest = tl.max(tl.abs(head), 1)
        if TAIL:
            largest = tl.maximum(largest, tl.max(tl.abs(tail), 1))
        narrow = tl.maximum(largest[:, None] / 448.0, 1e-12)
        tl.store(scales + row - first_normed, narrow, wanted)
    elif SCALES == "one":
        narrow = tl.load(scales)
    if SCALES != "none":
        # The hardware's cast to fp8 saturates.
        head *= 1.0 / narrow
        # A thread has loaded 8 neighbours. Without this hint it would store 16, the widest store,
        # and fetch half of them from another thread first.
        at_head = tl.max_contiguous(at_head, (1, 8))
        if TAIL:
            tail *= 1.0 / narrow
            at_tail = tl.max_contiguous(at_tail, (1, 8))
    tl.store(place + at_head, head.to(normed.dtype.element_ty), wanted)
    if TAIL:
        tl.store(place + at_tail, tail.to(normed.dtype.element_ty), wanted)


def launch(
    hidden: torch.Tensor,
    change: torch.Tensor | None,
    missing: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    normed_rows: int,
    how: Launch,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Run the kernel: hidden + change, (rows, width), and its LayerNorm, (normed_rows, width).

    Args:
        hidden: (rows, width).
        change: (rows, width), or the last rows only. None: there is no sum, and None is returned
            in its place.
        missing: (width), added to the rows that change leaves out. Without a change it is added to
            every row before the norm, and that sum is not stored.
        normed_rows: how many of the last rows are normed.
        how: the launch settings.
        scales: makes the norm fp8. float32, either (normed_rows, 1), to be filled with each row's
            scale, or (), the one scale by which all rows are rounded.
    """
    rows, width = hidden.shape
    head, tail = split(width)
    normed = hidden.new_empty(normed_rows, width, dtype=None if scales is None else FP8)
    total = None if change is None else torch.empty_like(hidden)
    _add_layer_norm_kernel[(triton.cdiv(rows, how.rows),)](
        hidden,
        hidden if change is None else change,
        weight if missing is None else missing,
        weight,
        bias,
        hidden if total is None else total,
        normed,
        hidden if scales is None else scales,
        rows,
        rows - (rows if change is None else change.shape[0]),
        rows - normed_rows,
        eps,
        ADD=change is not None,
        SHIFT=change is None and missing is not None,
        SCALES="none" if scales is None else "row" if scales.dim() else "one",
        HEAD=head,
        TAIL=tail,
        ROWS=how.rows,
        num_warps=how.warps,
    )
    return total, normed


@torch.library.custom_op("stepspan::add_layer_norm", mutates_args=())
def add_layer_norm(
    hidden: torch.Tensor,
    change: torch.Tensor,
    missing: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    normed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden + change, and the LayerNorm of its last `normed` batch entries.

    hidden: (batch, tokens, width). change: the same, or the last batch entries only; `missing`
    (width) is then added to every token of the other entries.
    """
    batch, tokens, width = hidden.shape
    _require_whole(hidden, change, missing)
    total, norm = launch(
        hidden.contiguous().view(-1, width),
        change.contiguous().view(-1, width),
        missing,
        weight,
        bias,
        eps,
        normed * tokens,
        launch_for(width),
    )
    assert total is not None
    return total.view(batch, tokens, width), norm.view(normed, tokens, width)


@add_layer_norm.register_fake
def _(
    hidden: torch.Tensor,
    change: torch.Tensor,
    missing: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    normed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(normed, *hidden.shape[1:])


@torch.library.custom_op("stepspan::layer_norm", mutates_args=())
def layer_norm(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """The LayerNorm of hidden (..., width)."""
    width = hidden.shape[-1]
    flat = hidden.contiguous().view(-1, width)
    _, norm = launch(flat, None, None, weight, bias, eps, flat.shape[0], launch_for(width))
    return norm.view(hidden.shape)


@layer_norm.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("stepspan::add_layer_norm_fp8", mutates_args=())
def add_layer_norm_fp8(
    hidden: torch.Tensor,
    change: torch.Tensor,
    missing: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `add_layer_norm`, for the whole batch, with the LayerNorm as fp8: sum, norm and scales.

    scale: float32, (), by which the whole norm is rounded; the returned scales are then empty.
        None: each row is scaled by itself, and the scales are float32, (batch, tokens, 1).
    """
    batch, tokens, width = hidden.shape
    _require_whole(hidden, change, missing)
    scales = _new_scales(hidden, scale)
    total, norm = launch(
        hidden.contiguous().view(-1, width),
        change.contiguous().view(-1, width),
        missing,
        weight,
        bias,
        eps,
        batch * tokens,
        launch_for(width),
        scales.view(-1, 1) if scale is None else scale,
    )
    assert total is not None
    return total.view(hidden.shape), norm.view(hidden.shape), scales


@add_layer_norm_fp8.register_fake
def _(
    hidden: torch.Tensor,
    change: torch.Tensor,
    missing: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    narrow = hidden.new_empty(hidden.shape, dtype=FP8)
    return hidden.new_empty(hidden.shape), narrow, _new_scales(hidden, scale)


@torch.library.custom_op("stepspan::layer_norm_fp8", mutates_args=())
def layer_norm_fp8(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The LayerNorm of hidden (..., width) as fp8, and its scales as in `add_layer_norm_fp8`."""
    width = hidden.shape[-1]
    flat = hidden.contiguous().view(-1, width)
    scales = _new_scales(hidden, scale)
    rounded_by = scales.view(-1, 1) if scale is None else scale
    of = (weight, bias, eps, flat.shape[0], launch_for(width), rounded_by)
    _, norm = launch(flat, None, None, *of)
    return norm.view(hidden.shape), scales


@layer_norm_fp8.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden.new_empty(hidden.shape, dtype=FP8), _new_scales(hidden, scale)


def _new_scales(hidden: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    # Empty if a scale is given: a custom operator must not return one of its inputs.
    shape = (*hidden.shape[:-1], 1) if scale is None else (0,)
    return hidden.new_empty(shape, dtype=torch.float32)


def _require_whole(
    hidden: torch.Tensor, change: torch.Tensor, missing: torch.Tensor | None
) -> None:
    if len(change) != len(hidden) and missing is None:
        raise ValueError(
            f"change has {len(change)} of {len(hidden)} batch entries, and missing is not given"
        )
