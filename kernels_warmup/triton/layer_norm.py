"""A sum and its LayerNorm in one pass over memory: what stands between two parts of a block.

The generated kernel reads the row again for each of its passes over it, so it takes twice the time
its bytes need. Here a row stays in registers: one warp holds it, so its sums cross no barrier.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Launch:
    """How the rows are shared out."""

    rows: int
    """Rows a program."""
    warps: int = 1


CANDIDATES = (Launch(1), Launch(2), Launch(4), Launch(4, 4), Launch(8, 4))
"""For a bench to choose from; with one warp a row's sums cross no barrier."""


def launch_for(width: int) -> Launch:
    """One warp, and as many rows as let each thread load 16 bytes also of the narrower part."""
    _, tail = split(width)
    return Launch(max(1, 256 // tail) if tail else max(1, 256 // width))


def split(width: int) -> tuple[int, int]:
    """A width as the sum of two powers of two, the second perhaps 0: 1280 is 1024 + 256.

    Raises:
        ValueError: it is no such sum.
    """
    head = 1 << (width.bit_length() - 1)
    tail = width - head
    if tail & (tail - 1):
        raise ValueError(f"a row of {width} is not one or two powers of two; SDXL's are")
    return head, tail


# Not compiled anew for other numbers of rows: addresses follow from the width alone.
@triton.jit(do_not_specialize=["rows", "first_changed", "first_normed"])
def _add_layer_norm_kernel(
    hidden,
    change,
    missing,
    weight,
    bias,
    total,
    normed,
    rows,
    first_changed,
    first_normed,
    eps,
    ADD: tl.constexpr,
    SHIFT: tl.constexpr,
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

    # The mean first and the squares about it after: a difference of two large sums would cancel.
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
    tl.store(place + at_head, head.to(normed.dtype.element_ty), wanted)
    if TAIL:
        tail *= scale * tl.load(weight + at_tail).to(tl.float32)
        tail += tl.load(bias + at_tail).to(tl.float32)
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
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(hidden + change, its LayerNorm), all as (rows, width); None for the sum without a change.

    change may have the last rows only; to those before, missing (width) is added. Without a change,
    missing is added to every row before the norm, and the sum is not kept. Of the norm only the
    last normed_rows are computed and returned.
    """
    rows, width = hidden.shape
    head, tail = split(width)
    normed = hidden.new_empty(normed_rows, width)
    total = None if change is None else torch.empty_like(hidden)
    _add_layer_norm_kernel[(triton.cdiv(rows, how.rows),)](
        hidden,
        hidden if change is None else change,
        weight if missing is None else missing,
        weight,
        bias,
        hidden if total is None else total,
        normed,
        rows,
        rows - (rows if change is None else change.shape[0]),
        rows - normed_rows,
        eps,
        ADD=change is not None,
        SHIFT=change is None and missing is not None,
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
    """hidden + change, and the LayerNorm of its last `normed` of the batch.

    hidden: (batch, tokens, width); change: of the same shape, or of the last of the batch only.
    Then `missing` (width) is what every token of the others gets added.
    """
    batch, tokens, width = hidden.shape
    if change.shape[0] != batch and missing is None:
        raise ValueError(
            f"{change.shape[0]} of {batch} change, and nothing is given for the others"
        )
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
