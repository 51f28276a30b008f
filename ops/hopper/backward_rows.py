"""Before and after the fused backward: what each query row brings, the memory that sums dQ, and its rounding."""

import triton
import triton.language as tl

from ..portable.common import LOG2E, load_parts, row_ranges, sequence_bounds, store_parts


@triton.jit
def first_unit(start, sequence):
    """Where the units of 64 rows of a packed sequence begin, among those of all.

    Sequences begin at multiples of 128 rows there: what is beyond one's last row is nobody's, so it can be zeroed.
    """
    return (start // 128 + sequence) * 2


@triton.jit(do_not_specialize=["HQ", "SQ", "SK", "units", "window_left", "window_right", "stride_lb", "stride_lh",
                               "stride_lm", "stride_rb", "stride_rh", "stride_rm", "max_q", "all_units"])  # fmt: skip
def attn_bwd_hopper_rows(o_ptr, do_ptr, q_ptr, lse_ptr, dlse_ptr, sinks_ptr, ranges_ptr, rows_ptr, dirty_ptr,
                         clean_q_ptr, clean_do_ptr, total_ptr, dsink_ptr, cu_q_ptr,
                         stride_ob, stride_oh, stride_om, stride_db, stride_dh, stride_dm, stride_qb, stride_qh,
                         stride_qm, stride_lb, stride_lh, stride_lm, stride_rb, stride_rh, stride_rm, HQ, SQ, SK, units,
                         window_left, window_right, max_q, all_units, WIDTH: tl.constexpr, HAS_DLSE: tl.constexpr,
                         F: tl.constexpr):  # fmt: skip
    """What the fused kernel asks of 64 query rows (one unit): lse in base 2, delta and, with key_ranges, the keys
    [lo, hi) that each row sees, as float32. Also zeros for dQ's sums, and this unit's share of dsink.

    See portable/backward.py, attn_bwd_prepare, for the formulas. Rows past SQ get lse +inf: weights of 0. A unit with
    a row that sees no key is ``dirty``: q and dout of such a row may hold NaN, so the unit is copied with zeros in
    their place. ``WIDTH`` is the power of two that holds a head dim. Grid: units * HQ * B.

    For VARLEN there are ``all_units`` a head, and ``first_unit`` says which are a sequence's. Rows, sums and clean
    copies lie in these; a unit that is not full of rows is dirty, because its other rows are a neighbour's.
    """
    ROWS: tl.constexpr = 64
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    VALUES: tl.constexpr = ROWS * (4 if F.HAS_RANGES else 2)
    pid = tl.program_id(0)
    unit = pid % units
    bh = pid // units
    batch = (bh // HQ).to(tl.int64)
    head = (bh % HQ).to(tl.int64)
    row = unit * ROWS + tl.arange(0, ROWS)
    sq = SQ
    slot = pid
    lse_at = bh.to(tl.int64) * SQ
    own_row = row  # of sums and clean copies
    if F.VARLEN:
        q_start, sq = sequence_bounds(cu_q_ptr, bh // HQ, SQ, max_q)
        if unit >= (sq + 127) // 128 * 2:
            if F.HAS_SINKS:
                tl.store(dsink_ptr + pid, 0.0)
            return
        at_unit = first_unit(q_start, bh // HQ) + unit
        slot = (bh % HQ) * all_units + at_unit
        own_row = at_unit * ROWS + tl.arange(0, ROWS)
        lse_at = head * SQ + q_start
        o_ptr += q_start.to(tl.int64) * stride_om
        do_ptr += q_start.to(tl.int64) * stride_dm
        q_ptr += q_start.to(tl.int64) * stride_qm
        dlse_ptr += q_start.to(tl.int64) * stride_lm
        batch = batch * 0
    valid = row < sq
    own = (own_row >= 0) if F.VARLEN else valid
    out = load_parts(o_ptr + batch * stride_ob + head * stride_oh, row, valid, stride_om, DV, DV_PARTS, True)
    dout = load_parts(do_ptr + batch * stride_db + head * stride_dh, row, valid, stride_dm, DV, DV_PARTS, True)
    lse = tl.load(lse_ptr + lse_at + row, mask=valid, other=float("-inf"))
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
        # nothing but the sink: the keys it may have seen weigh below 2^-24 together
        empty = empty | ((lse == sink) & (size == 0.0))
    at = rows_ptr + slot.to(tl.int64) * VALUES + tl.arange(0, ROWS)
    tl.store(at, tl.where(empty, float("inf"), lse * LOG2E))
    tl.store(at + ROWS, tl.where(empty, 0.0, delta))
    if F.HAS_RANGES:
        ranges = ranges_ptr + batch * stride_rb + head * stride_rh
        lo, hi = row_ranges(ranges, stride_rm, row, SQ, SK, window_left, window_right, F)
        tl.store(at + 2 * ROWS, tl.maximum(lo, 0).to(tl.float32))
        tl.store(at + 3 * ROWS, tl.maximum(hi, 0).to(tl.float32))
    first = (batch * SQ * HQ + head) * D  # in [B, S, H, D] memory
    stride = HQ.to(tl.int64) * D
    d = tl.arange(0, WIDTH)
    total = total_ptr + first + own_row.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(total, tl.zeros([ROWS, WIDTH], tl.float32), mask=own[:, None] & (d < D)[None, :])
    if F.SANITIZE:
        use = valid & (empty == 0)
        dirty = tl.sum((own & empty).to(tl.int32)) > 0  # lse of a row past the end is -inf
        tl.store(dirty_ptr + slot, dirty.to(tl.int32))
        if dirty:
            q = load_parts(q_ptr + batch * stride_qb + head * stride_qh, row, use, stride_qm, D, D_PARTS, True)
            store_parts(clean_q_ptr + first, own_row, own, stride, q, D, D_PARTS)
            do = load_parts(do_ptr + batch * stride_db + head * stride_dh, row, use, stride_dm, DV, DV_PARTS, True)
            clean_do = clean_do_ptr + (batch * SQ * HQ + head) * DV
            store_parts(clean_do, own_row, own, HQ.to(tl.int64) * DV, do, DV, DV_PARTS)


@triton.jit(do_not_specialize=["SQ", "SK", "window_left", "window_right", "stride_rp", "stride_rm"])
def attn_bwd_hopper_keys_seen(ranges_ptr, plans_ptr, seen_ptr, stride_rp, stride_rm, SQ, SK, window_left, window_right,
                              F: tl.constexpr):  # fmt: skip
    """Which keys some row sees: int32 [planes, tiles * BLOCK_N]. Only key_ranges need it. Grid: (key tiles, planes).

    A tile that some row sees whole needs no look at the others.
    """
    BLOCK_N: tl.constexpr = F.BLOCK_N
    CHUNK: tl.constexpr = 64
    plane = tl.program_id(1).to(tl.int64)
    slot = plane * tl.num_programs(0) + tl.program_id(0)
    first = tl.load(plans_ptr + slot * 4)
    last = tl.minimum(tl.load(plans_ptr + slot * 4 + 1), SQ)
    whole = tl.load(plans_ptr + slot * 4 + 2) < tl.load(plans_ptr + slot * 4 + 3)
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = (col >= 0) & whole
    if whole == 0:
        for start in tl.range(first, last, CHUNK):
            row = start + tl.arange(0, CHUNK)
            lo, hi = row_ranges(ranges_ptr + plane * stride_rp, stride_rm, row, SQ, SK, window_left, window_right, F)
            met = (col[:, None] >= lo[None, :]) & (col[:, None] < hi[None, :])
            seen = seen | (tl.max(met.to(tl.int32), 1) != 0)
    tl.store(seen_ptr + slot * BLOCK_N + tl.arange(0, BLOCK_N), seen.to(tl.int32))


@triton.jit(do_not_specialize=["eighths"])
def attn_bwd_hopper_round(total_ptr, out_ptr, eighths, scale, BLOCK: tl.constexpr):
    """A gradient = scale * its float32 sum, in its own dtype. Grid: 8 * eighths / BLOCK.

    In eighths, since head dims are multiples of 8: a bound that may be any number makes every store one element.
    """
    count = eighths.to(tl.int64) * 8
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(total_ptr + at, mask=at < count) * scale
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < count)


@triton.jit(do_not_specialize=["HQ", "SQ", "units", "max_q"])
def attn_bwd_hopper_round_packed(total_ptr, out_ptr, cu_q_ptr, HQ, SQ, units, max_q, scale, D: tl.constexpr,
                                 WIDTH: tl.constexpr):  # fmt: skip
    """dQ [Tq, HQ, D] of packed sequences from its float32 sums, which lie in units. Grid: units * HQ * B."""
    ROWS: tl.constexpr = 64
    pid = tl.program_id(0)
    unit = pid % units
    head = pid // units % HQ
    sequence = pid // units // HQ
    q_start, sq = sequence_bounds(cu_q_ptr, sequence, SQ, max_q)
    if unit * ROWS < sq:
        row = unit * ROWS + tl.arange(0, ROWS)
        d = tl.arange(0, WIDTH)
        own = ((first_unit(q_start, sequence) * ROWS + row).to(tl.int64) * HQ + head)[:, None] * D + d[None, :]
        at = ((q_start + row).to(tl.int64) * HQ + head)[:, None] * D + d[None, :]
        ok = (row < sq)[:, None] & (d < D)[None, :]
        tl.store(out_ptr + at, (tl.load(total_ptr + own, mask=ok) * scale).to(out_ptr.dtype.element_ty), mask=ok)
