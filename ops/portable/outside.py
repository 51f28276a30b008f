"""Rows of packed tensors that no sequence holds: kernels leave them alone, the ops promise a value for them.

To fill the whole tensor first would be to write it twice: 272 MB for 66,560 tokens and 16 heads of 128, about 9 % of
the forward's time on an H100.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import sequence_bounds
from .plan import Launch, Plan

ROWS, WIDTH = 64, 32


@triton.jit(do_not_specialize=["stride_row", "stride_column", "columns", "total", "sequences", "longest", "steps"])
def attn_fill_outside(x_ptr, cu_ptr, stride_row, stride_column, columns, total, sequences, longest, steps,
                      VALUE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """VALUE in all ``columns`` of the rows outside every sequence. ``steps``: halvings. Grid: total / ROWS."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = row * 0  # the last sequence that begins at or before the row is among those from here on
    count = first + sequences
    for _ in tl.range(0, steps):
        half = count // 2
        later = tl.load(cu_ptr + first + half) <= row
        first = tl.where(later, first + half, first)
        count = tl.where(later, count - half, half)
        count = tl.maximum(count, 1)
    start, length = sequence_bounds(cu_ptr, first, total, longest)
    outside = (row < total) & ((row < start) | (row - start >= length))
    if tl.max(outside.to(tl.int32)) > 0:
        for at in tl.range(0, columns, WIDTH):
            column = at + tl.arange(0, WIDTH)
            where = row.to(tl.int64)[:, None] * stride_row + column.to(tl.int64)[None, :] * stride_column
            value = tl.full([ROWS, WIDTH], VALUE, tl.float32).to(x_ptr.dtype.element_ty)
            tl.store(x_ptr + where, value, mask=outside[:, None] & (column < columns)[None, :])


def fill_outside(plan: Plan, x: Tensor, cu_seqlens: Tensor, longest: int, value: float) -> None:
    """``value`` where ``x`` [T, H, D] or [H, T], contiguous, has rows outside the sequences of ``cu_seqlens``."""
    if plan.batch == 0:
        x.fill_(value)
        return
    by_row = x.dim() == 3
    total = x.shape[0] if by_row else x.shape[1]
    columns = x.numel() // max(total, 1)
    key = ("outside", x.dtype, by_row, total, columns, longest, value)
    launch = plan.launches.get(key)
    if launch is None:
        numbers = (columns if by_row else 1, 1 if by_row else total, columns, total, plan.batch, longest,
                   max(plan.batch - 1, 0).bit_length())  # fmt: skip
        launch = Launch(attn_fill_outside, -(-total // ROWS), numbers, (value, ROWS, WIDTH))
        plan.launches[key] = launch
    launch([x, cu_seqlens])
