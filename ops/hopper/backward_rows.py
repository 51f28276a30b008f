"""Before and after the fused backward: what each query row brings, the memory that sums dQ, and its rounding."""

import triton
import triton.language as tl

from ..portable.common import LOG2E, load_parts


@triton.jit(do_not_specialize=["HQ", "SQ", "tiles", "stride_lb", "stride_lh", "stride_lm"])
def attn_bwd_hopper_rows(o_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, rows_ptr, acc_ptr, dsink_ptr,
                         stride_ob, stride_oh, stride_om, stride_db, stride_dh, stride_dm,
                         stride_lb, stride_lh, stride_lm, HQ, SQ, tiles,
                         WIDTH: tl.constexpr, HAS_DLSE: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """lse in base 2 and delta of 64 rows, side by side; zeros for dQ's sums; this tile's share of dsink.

    ``WIDTH`` is the power of two that holds a head dim.

    See portable/backward.py, attn_bwd_prepare, for the formulas. Rows past SQ get lse +inf: weights of 0. Grid:
    tiles * HQ * B, where tiles covers rows_ptr's padded length.
    """
    ROWS: tl.constexpr = 64
    DV_PARTS: tl.constexpr = F.DV_PARTS
    DV: tl.constexpr = F.DV
    pid = tl.program_id(0)
    tile = pid % tiles
    bh = pid // tiles
    batch = (bh // HQ).to(tl.int64)
    head = (bh % HQ).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    valid = row < SQ
    out = load_parts(o_ptr + batch * stride_ob + head * stride_oh, row, valid, stride_om, DV, DV_PARTS, True)
    dout = load_parts(do_ptr + batch * stride_db + head * stride_dh, row, valid, stride_dm, DV, DV_PARTS, True)
    lse = tl.load(lse_ptr + bh.to(tl.int64) * SQ + row, mask=valid, other=float("-inf"))
    delta = tl.zeros([ROWS], tl.float32)
    size = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(len(DV_PARTS)):
        o = out[i].to(tl.float32)
        # the dout of a row that saw no key may hold NaN; its out is exactly 0
        delta += tl.sum(tl.where(o == 0.0, 0.0, o * dout[i].to(tl.float32)), 1)
        if F.HAS_SINKS:
            size += tl.sum(tl.abs(o), 1)
    if HAS_DLSE:
        at = dlse_ptr + batch * stride_lb + head * stride_lh + row * stride_lm
        delta -= tl.load(at, mask=valid, other=0.0).to(tl.float32)
    empty = lse == float("-inf")
    if F.HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        share = tl.where(valid & (empty == 0), tl.math.exp2((sink - tl.where(empty, 0.0, lse)) * LOG2E) * delta, 0.0)
        tl.store(dsink_ptr + pid, -tl.sum(share))
        empty = empty | ((lse == sink) & (size == 0.0))
    at = rows_ptr + pid.to(tl.int64) * (2 * ROWS) + tl.arange(0, ROWS)
    tl.store(at, tl.where(empty, float("inf"), lse * LOG2E))
    tl.store(at + ROWS, tl.where(empty, 0.0, delta))
    d = tl.arange(0, WIDTH)
    acc = acc_ptr + ((batch * SQ + row)[:, None] * HQ + head) * F.D + d[None, :]
    tl.store(acc, tl.zeros([ROWS, WIDTH], tl.float32), mask=valid[:, None] & (d < F.D)[None, :])


@triton.jit(do_not_specialize=["count"])
def attn_bwd_hopper_round(acc_ptr, dq_ptr, count, scale, BLOCK: tl.constexpr):
    """dQ = scale * its float32 sum, in q's dtype. Grid: count / BLOCK."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dq_ptr + at, (tl.load(acc_ptr + at, mask=at < count) * scale).to(dq_ptr.dtype.element_ty), mask=at < count)
