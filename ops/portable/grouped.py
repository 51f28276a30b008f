"""What the kernels for special shapes share: rows of several query heads in one tile, and the end of split work.

The query heads that read one KV head lie in one tile, ``row * GROUP + head of the group``: every key is then read once
for the whole group, and its gradients are complete in one program, so nothing needs atomics.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from .common import LOG2E, load_parts, row_ranges, sees_nothing, softmax_end


@triton.jit
def grouped_rows(r, head_k, ranges_ptr, stride_rh, stride_rm, sq, sk, window_left, window_right,
                GROUP: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Position and query head of the grouped rows ``r``, and the keys [lo, hi) that each sees."""
    row = r // GROUP
    head = head_k * GROUP + r % GROUP
    ranges = ranges_ptr + head.to(tl.int64) * stride_rh
    lo, hi = row_ranges(ranges, stride_rm, row, sq, sk, window_left, window_right, F)
    return row, head, lo, hi


@triton.jit
def gradient_rows(pointers, strides, row, head, sq, sink_rows, HAS_DLSE: tl.constexpr, F: tl.constexpr):
    """q, dout, lse in base 2 (+inf: the row saw no key) and delta = rowsum(out * dout) - dlse of packed rows.

    Pointers are those of the batch entry. With sinks, rows below sink_rows put their share of the sink's gradient into
    dsink [Hq, Sq].
    """
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    q_ptr, o_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, dsink_ptr = pointers
    stride_qh, stride_qm, stride_oh, stride_om, stride_dh, stride_dm, stride_lh, stride_lm = strides
    h64 = head.to(tl.int64)
    r64 = row.to(tl.int64)
    flat = h64 * sq + r64
    valid = row < sq
    lse = tl.load(lse_ptr + flat, mask=valid, other=float("-inf"))
    out = load_parts(o_ptr, h64 * stride_oh + r64 * stride_om, valid, 1, DV, DV_PARTS, True)
    sink = 0.0
    if F.HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
    blind = sees_nothing(lse, sink, out, F)
    use = valid
    if F.SANITIZE:  # q and dout of a row that saw nothing may hold NaN
        use = valid & (blind == 0)
    q = load_parts(q_ptr, h64 * stride_qh + r64 * stride_qm, use, 1, D, D_PARTS, True)
    dout = load_parts(do_ptr, h64 * stride_dh + r64 * stride_dm, use, 1, DV, DV_PARTS, True)
    delta = tl.sum(out[0].to(tl.float32) * dout[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(DV_PARTS)):
        delta += tl.sum(out[i].to(tl.float32) * dout[i].to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + h64 * stride_lh + r64 * stride_lm, mask=valid, other=0.0).to(tl.float32)
    if F.HAS_SINKS:
        none = lse == float("-inf")
        share = tl.where(none, 0.0, tl.math.exp2((sink - tl.where(none, 0.0, lse)) * LOG2E) * delta)
        tl.store(dsink_ptr + flat, -share, mask=row < sink_rows)
    return q, dout, tl.where(blind, float("inf"), lse * LOG2E), delta


@triton.jit(do_not_specialize=["HQ", "SQ", "splits"])
def merge_splits_kernel(part_ptr, part_lse_ptr, sinks_ptr, o_ptr, lse_ptr, HQ, SQ, splits, SPLITS: tl.constexpr,
                        BLOCK_D: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """out and lse of one row from those of its splits: float32 [B, Hq, Sq, splits, Dv] and base-2 [..., splits].

    Grid: (B * HQ * SQ, Dv / BLOCK_D). SPLITS is a power of two, at least ``splits``.
    """
    DV: tl.constexpr = F.DV
    at = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.arange(0, SPLITS)
    head = at // SQ % HQ
    part = tl.load(part_lse_ptr + at * splits + s, mask=s < splits, other=float("-inf"))
    m = tl.max(part, 0)
    sink = 0.0
    if F.HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        m = tl.maximum(m, sink * LOG2E)
    safe = tl.where(m == float("-inf"), 0.0, m)
    weight = tl.math.exp2(part - safe)
    l = tl.sum(weight, 0)
    if F.HAS_SINKS:
        l += tl.math.exp2(sink * LOG2E - safe)
    lse, l_safe = softmax_end(m, l, sink, F)
    ok = (s < splits)[:, None] & (d < DV)[None, :]
    out = tl.load(part_ptr + (at * splits + s)[:, None] * DV + d[None, :], mask=ok, other=0.0)
    out = tl.sum(out * weight[:, None], 0) / l_safe
    row = (at // SQ // HQ * SQ + at % SQ) * HQ + head  # out is [B, S, H, D] in memory
    tl.store(o_ptr + row * DV + d, out.to(o_ptr.dtype.element_ty), mask=d < DV)
    tl.store(lse_ptr + at, lse)


@triton.jit(do_not_specialize=["count", "splits"])
def sum_splits_kernel(part_ptr, out_ptr, count, splits, BLOCK: tl.constexpr):
    """out [count] = the sum of float32 [splits, count], always in the same order. Grid: count / BLOCK."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.range(0, splits):
        total += tl.load(part_ptr + s * count.to(tl.int64) + at, mask=at < count, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < count)
