"""FlashAttention backward (Dao 2023, algorithm 2) in portable Triton, in two forms.

Split: one kernel walks the queries of a key tile for dK and dV, another the keys of a query tile for dQ: seven matrix
products for five, no atomics, the same bits every time. Fused: the first kernel also adds dQ into float32 memory by
atomics: five products, sums in no fixed order.

Before either, ``attn_bwd_prepare`` folds what a row needs into two numbers: delta = rowsum(out * dout) - dlse (the
gradient of lse enters the softmax backward in no other way, since d lse / d logit = p) and lse in base 2, +inf for a
row that saw no key, which makes its weights 0.
"""

import triton
import triton.language as tl

from .block_sparse import plan_blocks, tile_at, visible_tile
from .common import (
    INT_MAX,
    LOG2E,
    accumulate_parts,
    atomic_add_parts,
    backward_logits,
    backward_weights,
    dot_parts,
    drop,
    has_gaps,
    keep_rows,
    key_in_use,
    keys_seen,
    load_parts,
    load_tile,
    plan_tiles,
    range_hull,
    row_ranges,
    scale_parts,
    sequence_bounds,
    store_parts,
    zero_parts,
)


@triton.jit(do_not_specialize=["HQ", "SQ", "max_q", "tiles", "stride_lb", "stride_lh", "stride_lm"])
def attn_bwd_prepare(o_ptr, do_ptr, lse_ptr, dlse_ptr, sinks_ptr, lse2_ptr, delta_ptr, dsink_ptr, cu_q_ptr,
                     stride_ob, stride_oh, stride_om, stride_db, stride_dh, stride_dm, stride_lb, stride_lh, stride_lm,
                     HQ, SQ, max_q, tiles, HAS_DLSE: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """lse2, delta and this tile's share of dsink for BLOCK_M rows. Grid: tiles * HQ * B."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    DV_PARTS: tl.constexpr = F.DV_PARTS
    DV: tl.constexpr = F.DV
    pid = tl.program_id(0)
    tile = pid % tiles
    bh = pid // tiles
    batch = (bh // HQ).to(tl.int64)
    head = (bh % HQ).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if F.VARLEN:
        q_start, sq = sequence_bounds(cu_q_ptr, batch, SQ, max_q)
        if tile * BLOCK_M >= sq:
            if F.HAS_SINKS:
                tl.store(dsink_ptr + pid, 0.0)
            return
        first = q_start.to(tl.int64)
        flat = head * SQ + first
        batch = batch * 0
    else:
        sq = SQ
        first = tl.zeros([], tl.int64)
        flat = (batch * HQ + head) * SQ
    valid = row < sq
    o_base = o_ptr + batch * stride_ob + head * stride_oh + first * stride_om
    do_base = do_ptr + batch * stride_db + head * stride_dh + first * stride_dm
    out = load_parts(o_base, row, valid, stride_om, DV, DV_PARTS, True)
    dout = load_parts(do_base, row, valid, stride_dm, DV, DV_PARTS, True)
    delta = tl.zeros([BLOCK_M], tl.float32)
    size = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(len(DV_PARTS)):
        o = out[i].to(tl.float32)
        # the dout of a row that saw no key may hold NaN; its out is exactly 0
        delta += tl.sum(tl.where(o == 0.0, 0.0, o * dout[i].to(tl.float32)), 1)
        size += tl.sum(tl.abs(o), 1)
    if HAS_DLSE:
        at = dlse_ptr + batch * stride_lb + head * stride_lh + (first + row) * stride_lm
        delta -= tl.load(at, mask=valid, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + flat + row, mask=valid, other=float("-inf"))
    empty = lse == float("-inf")
    if F.HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        share = tl.where(valid & (empty == 0), tl.math.exp2((sink - tl.where(empty, 0.0, lse)) * LOG2E) * delta, 0.0)
        tl.store(dsink_ptr + pid, -tl.sum(share))
        # nothing but the sink: the keys it may have seen weigh below 2^-24 together
        empty = empty | ((lse == sink) & (size == 0.0))
    tl.store(lse2_ptr + flat + row, tl.where(empty, float("inf"), lse * LOG2E), mask=valid)
    tl.store(delta_ptr + flat + row, delta, mask=valid)


@triton.jit(do_not_specialize=["SQ", "SK", "max_q", "tiles", "window_left", "window_right", "stride_r0", "stride_rm"])
def attn_bwd_tile_bounds(ranges_ptr, bounds_ptr, cu_q_ptr, cu_k_ptr, stride_r0, stride_rm, SQ, SK, max_q, tiles,
                         window_left, window_right, F: tl.constexpr):  # fmt: skip
    """(first, last, full_lo, full_hi) of every query tile, for the kernel that walks queries. Grid: (tiles, ranges)."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    tile = tl.program_id(0)
    which = tl.program_id(1).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if F.VARLEN:
        sequence = tl.program_id(2)
        q_start, sq = sequence_bounds(cu_q_ptr, sequence, SQ, max_q)
        _, sk = sequence_bounds(cu_k_ptr, sequence, SK, SK)
        ranges_ptr += q_start.to(tl.int64) * stride_rm
        slot = (which * tl.num_programs(2) + sequence) * tiles + tile
    else:
        sq = SQ
        sk = SK
        slot = which * tiles + tile
    lo, hi = row_ranges(ranges_ptr + which * stride_r0, stride_rm, row, sq, sk, window_left, window_right, F)
    first, last, full_lo, full_hi = range_hull(lo, hi, row < sq)
    out = bounds_ptr + slot * 4
    tl.store(out, first)
    tl.store(out + 1, last)
    tl.store(out + 2, full_lo)
    tl.store(out + 3, full_hi)


@triton.jit
def _queries_of_keys(n0, sq, sk, window_left, window_right, F: tl.constexpr):
    """Rows [first, last) that may see some key of [n0, n0 + BLOCK_N) and [full_lo, full_hi) that see all of them."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    off = sk - sq
    first = n0 * 0
    last = sq + n0 * 0
    full_lo = first
    full_hi = tl.where(n0 + BLOCK_N <= sk, (sq + BLOCK_M - 1) // BLOCK_M * BLOCK_M, 0)
    if F.CAUSAL or F.HAS_RIGHT:
        right = window_right if F.HAS_RIGHT else 0
        if F.CAUSAL:
            right = tl.minimum(right, 0)
        first = tl.maximum(first, n0 - right - off)
        full_lo = tl.maximum(full_lo, n0 + BLOCK_N - 1 - right - off)
    if F.HAS_LEFT:
        last = tl.minimum(last, n0 + BLOCK_N + window_left - off)
        full_hi = tl.minimum(full_hi, n0 + window_left - off + 1)
    first = tl.minimum(first, sq)
    return first, tl.maximum(last, first), full_lo, full_hi


@triton.jit(do_not_specialize=["SK", "max_k", "bound_tiles"])
def attn_bwd_key_plans(bounds_ptr, plans_ptr, cu_k_ptr, SK, max_k, bound_tiles, F: tl.constexpr):
    """For every key tile the rows that see some of its keys, and those that see all: (first, last, full_lo, full_hi).

    Rows are multiples of BLOCK_M. The full run is the first unbroken one: other full tiles go through the masked
    code, which is as right. Grid: (key tiles, planes, sequences). A kernel of its own, since inside the dK/dV kernel
    these reductions cost 26 spills.
    """
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    CHUNK: tl.constexpr = 128
    n0 = tl.program_id(0) * BLOCK_N
    plane = tl.program_id(1).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    bounds_ptr += plane * bound_tiles * 4
    first = tl.full([CHUNK], INT_MAX, tl.int32)
    last = tl.zeros([CHUNK], tl.int32)
    full_first = first
    for start in tl.range(0, bound_tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        some, full = _tile_meets_keys(bounds_ptr, tile, bound_tiles, n0, BLOCK_N)
        first = tl.minimum(first, tl.where(some, tile, INT_MAX))
        last = tl.maximum(last, tl.where(some, tile + 1, 0))
        full_first = tl.minimum(full_first, tl.where(full, tile, INT_MAX))
    stop = tl.max(last)
    begin = tl.minimum(tl.min(first), stop)
    full_begin = tl.minimum(tl.min(full_first), stop)
    broken = tl.full([CHUNK], INT_MAX, tl.int32)
    for start in tl.range(0, bound_tiles, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        _, full = _tile_meets_keys(bounds_ptr, tile, bound_tiles, n0, BLOCK_N)
        broken = tl.minimum(broken, tl.where((tile > full_begin) & (full == 0), tile, INT_MAX))
    out = plans_ptr + (plane * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(out, begin * BLOCK_M)
    tl.store(out + 1, stop * BLOCK_M)
    tl.store(out + 2, full_begin * BLOCK_M)
    tl.store(out + 3, tl.minimum(tl.min(broken), stop) * BLOCK_M)


@triton.jit
def _tile_meets_keys(bounds_ptr, tile, tiles, n0, BLOCK_N: tl.constexpr):
    """Which query tiles see some key of [n0, n0 + BLOCK_N), and which see all of them."""
    inside = tile < tiles
    at = bounds_ptr + tile.to(tl.int64) * 4
    low = tl.load(at, mask=inside, other=0)
    high = tl.load(at + 1, mask=inside, other=0)
    some = inside & (low < high) & (low < n0 + BLOCK_N) & (high > n0)
    full = (
        some & (tl.load(at + 2, mask=inside, other=0) <= n0) & (tl.load(at + 3, mask=inside, other=0) >= n0 + BLOCK_N)
    )
    return some, full


@triton.jit
def _rows_of_keys(plans_ptr, b64, head, stride_tb, stride_th, n0, sq, sk, window_left, window_right, F: tl.constexpr):
    """Rows [first, last) that see some key from n0 on, and [full_lo, full_hi) that see all, by the interval rules."""
    BLOCK_N: tl.constexpr = F.BLOCK_N
    if F.HAS_RANGES:
        at = plans_ptr + (b64 * stride_tb + head.to(tl.int64) * stride_th + n0 // BLOCK_N) * 4
        first = tl.load(at)
        last = tl.load(at + 1)
        full_lo = tl.load(at + 2)
        full_hi = tl.load(at + 3)
    else:
        first, last, full_lo, full_hi = _queries_of_keys(n0, sq, sk, window_left, window_right, F)
    return first, last, full_lo, full_hi


@triton.jit
def _plan_queries(plans_ptr, b64, head, stride_tb, stride_th, n0, sq, sk, window_left, window_right, F: tl.constexpr):
    """Which query tiles the keys from n0 meet, with and without mask code."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    ALL_MASKED: tl.constexpr = F.HAS_MASK
    first, last, full_lo, full_hi = _rows_of_keys(
        plans_ptr, b64, head, stride_tb, stride_th, n0, sq, sk, window_left, window_right, F
    )
    return plan_tiles(first, last, full_lo, full_hi, BLOCK_M, ALL_MASKED)


@triton.jit
def _plan_listed_queries(blocks_ptr, stride_xb, stride_xh, stride_xm, plans_ptr, b64, head, stride_tb, stride_th, n0,
                         sq, sk, window_left, window_right, F: tl.constexpr):  # fmt: skip
    """The same where a block mask lists them."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    MASK_M: tl.constexpr = F.MASK_M
    first, last, full_lo, full_hi = _rows_of_keys(
        plans_ptr, b64, head, stride_tb, stride_th, n0, sq, sk, window_left, window_right, F
    )
    MASK_N: tl.constexpr = F.MASK_N
    column = (n0 // MASK_N).to(tl.int64)
    blocks = blocks_ptr + b64 * stride_xb + head.to(tl.int64) * stride_xh + column * stride_xm
    return plan_blocks(blocks, first, last, full_lo, full_hi, BLOCK_M, MASK_M, F)


@triton.jit
def _key_tiles(dk, dv, dw, k, v, n0, pointers, q_desc, do_desc, strides, batch, head0, heads, plan, seed_ptr, numbers,
               sq, sk, F: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The masked or the full query tiles of ``heads`` query heads, for one tile of keys; tiles are [BLOCK_N, BLOCK_M].

    One loop over heads and tiles together: with a loop in a loop the accumulators spill (128 stores against 1 at
    head dim 128).
    """
    BLOCK_M: tl.constexpr = F.BLOCK_M
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    PRECISION: tl.constexpr = F.PRECISION
    SANITIZE: tl.constexpr = (MASKED and F.SANITIZE) or F.HAS_WEIGHT
    TMA: tl.constexpr = F.TMA and not SANITIZE
    CHECK: tl.constexpr = MASKED or F.HAS_WEIGHT
    q_ptr, do_ptr, lse2_ptr, delta_ptr, dq_ptr, ranges_ptr, mask_ptr, bias_ptr, weight_ptr, slopes_ptr = pointers
    (stride_qh, stride_qm, stride_dh, stride_dm, stride_row, dq_stride, stride_rh, stride_rm, stride_mh, stride_mm,
     stride_mn, stride_bh, stride_bm, stride_bn) = strides  # fmt: skip
    scale, softcap, keep_scale, window_left, window_right, threshold, off_b, off_h, off_m, off_n = numbers
    SPAN: tl.constexpr = F.MASK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    col = n0 + tl.arange(0, BLOCK_N)
    key_ok = col[:, None] < sk
    if F.HAS_WEIGHT:
        key_ok = key_in_use(weight_ptr, col, sk, F)[:, None]
    count = plan[4] if MASKED else plan[2]
    for i in tl.range(0, count * heads):
        head = head0 + i // count
        h64 = head.to(tl.int64)
        tile = i % count
        m0, number = tile_at(tile, plan, BLOCK_M, SPAN, MASKED)
        row = m0 + tl.arange(0, BLOCK_M)
        valid = row < sq
        lse2 = tl.load(lse2_ptr + h64 * stride_row + row, mask=valid, other=float("inf"))
        use = valid
        if SANITIZE:  # a row that sees no key at all may hold NaN in q and dout
            use = lse2 < float("inf")
        q = load_tile(q_ptr + h64 * stride_qh, q_desc, batch, head, m0, use, stride_qm, BLOCK_M, D, D_PARTS, True, TMA)
        qk = dot_parts(k, q, D_PARTS, PRECISION)
        ok = key_ok
        if MASKED:
            ranges = ranges_ptr + h64 * stride_rh
            lo, hi = row_ranges(ranges, stride_rm, row, sq, sk, window_left, window_right, F)
            mask = mask_ptr + h64 * stride_mh
            ok = key_ok & visible_tile(lo, hi, row, n0, number, mask, stride_mm, stride_mn, sq, sk, F, True)
        slope = 0.0
        if F.HAS_ALIBI:
            slope = tl.load(slopes_ptr + head).to(tl.float32)
        p, cap_slope = backward_weights(
            qk, lse2[None, :], row[None, :], col[:, None], ok, scale, softcap, slope, bias_ptr + h64 * stride_bh,
            stride_bm, stride_bn, weight_ptr, sq, sk, F, CHECK,
        )  # fmt: skip
        dropout = (0, 0, 0, 0, 0, 0)
        if F.HAS_DROPOUT:
            dropout = (tl.load(seed_ptr), head + off_h, batch + off_b, off_m, off_n, threshold)
        weights = drop(p, dropout, row, n0, True, F)
        dout = load_tile(
            do_ptr + h64 * stride_dh, do_desc, batch, head, m0, use, stride_dm, BLOCK_M, DV, DV_PARTS, True, TMA
        )
        dv = accumulate_parts(weights, dout, dv, DV_PARTS, PRECISION)
        dp = dot_parts(v, dout, DV_PARTS, PRECISION)
        delta = tl.load(delta_ptr + h64 * stride_row + row, mask=use, other=0.0)
        dlogits = backward_logits(p, weights, dp, delta[None, :], ok, keep_scale, F, CHECK)
        ds = dlogits * cap_slope
        dk = accumulate_parts(ds, q, dk, D_PARTS, PRECISION)
        if F.WEIGHT_GRAD:
            dw += tl.sum(dlogits, 1)
        if F.ATOMIC_DQ:
            seen = k
            if MASKED and F.SANITIZE:  # 0 * NaN is NaN: drop keys that no row of the tile sees
                first, last, _, _ = range_hull(lo, hi, valid)
                gaps = has_gaps(ranges, stride_rm, row, lo, hi, sq, sk, window_left, window_right, F)
                use_k = keys_seen(
                    col < sk,
                    gaps,
                    first,
                    last,
                    ok,
                    ranges,
                    stride_rm,
                    row,
                    col,
                    sq,
                    sk,
                    window_left,
                    window_right,
                    1,
                    F,
                )
                seen = keep_rows(k, use_k, D_PARTS)
            dq = accumulate_parts(tl.trans(ds.to(k[0].dtype)), seen, zero_parts(BLOCK_M, D_PARTS), D_PARTS, PRECISION)
            atomic_add_parts(dq_ptr + h64 * D, row, valid, dq_stride, dq, D, D_PARTS)
    return dk, dv, dw


_RUNTIME_INTS = [
    "HQ", "GROUP", "SQ", "SK", "max_q", "max_k", "tiles", "window_left", "window_right", "threshold",
    "off_b", "off_h", "off_m", "off_n", "stride_rb", "stride_rh", "stride_rm", "stride_tb", "stride_th", "stride_wb",
    "stride_wh", "stride_ab", "stride_xb", "stride_xh", "stride_xm",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_INTS)
def attn_bwd_dkdv_kernel(q_ptr, k_ptr, v_ptr, ranges_ptr, mask_ptr, bias_ptr, weight_ptr, slopes_ptr, seed_ptr,
                         cu_q_ptr, cu_k_ptr, blocks_ptr, do_ptr, lse2_ptr, delta_ptr, plans_ptr, dq_ptr, dk_ptr, dv_ptr,
                         dw_ptr, q_desc, do_desc,
                         stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
                         stride_vn, stride_db, stride_dh, stride_dm, stride_rb, stride_rh, stride_rm, stride_tb,
                         stride_th, stride_mb, stride_mh, stride_mm, stride_mn, stride_bb, stride_bh, stride_bm,
                         stride_bn, stride_wb, stride_wh, stride_ab, stride_xb, stride_xh, stride_xm,
                         scale, softcap, keep_scale, HQ, GROUP, SQ, SK, max_q, max_k, tiles, window_left,
                         window_right, threshold, off_b, off_h, off_m, off_n, F: tl.constexpr):  # fmt: skip
    """dK and dV (and key_log_weight's gradient) of BLOCK_N keys of one KV head, summed over its query heads.

    With ATOMIC_DQ also adds dQ / scale into float32 ``dq_ptr``. Grid: tiles * HKV * B.
    """
    BLOCK_N: tl.constexpr = F.BLOCK_N
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    pid = tl.program_id(0)
    tile = pid % tiles
    HK = HQ // GROUP
    batch = pid // tiles // HK
    head_k = pid // tiles % HK
    b64 = batch.to(tl.int64)
    hk64 = head_k.to(tl.int64)
    n0 = tile * BLOCK_N
    dq_stride = HQ.to(tl.int64) * D
    dk_stride = HK.to(tl.int64) * D
    dv_stride = HK.to(tl.int64) * DV
    if F.VARLEN:
        q_start, sq = sequence_bounds(cu_q_ptr, batch, SQ, max_q)
        k_start, sk = sequence_bounds(cu_k_ptr, batch, SK, max_k)
        if n0 >= sk:
            return
        q_first = q_start.to(tl.int64)
        k_first = k_start.to(tl.int64)
    else:
        sq = SQ
        sk = SK
        q_first = b64 * SQ  # rows before this batch entry in outputs of [B, S, H, D] memory
        k_first = b64 * SK
    col = n0 + tl.arange(0, BLOCK_N)
    k_ok = col < sk
    weight_base = weight_ptr + hk64 * stride_wh + (k_first if F.VARLEN else b64 * stride_wb)
    k_base = k_ptr + hk64 * stride_kh + (k_first * stride_kn if F.VARLEN else b64 * stride_kb)
    v_base = v_ptr + hk64 * stride_vh + (k_first * stride_vn if F.VARLEN else b64 * stride_vb)
    k_use = key_in_use(weight_base, col, sk, F)
    k = load_parts(k_base, col, k_use, stride_kn, D, D_PARTS, True)
    v = load_parts(v_base, col, k_ok, stride_vn, DV, DV_PARTS, True)
    dk = zero_parts(BLOCK_N, D_PARTS)
    dv = zero_parts(BLOCK_N, DV_PARTS)
    dw = tl.zeros([BLOCK_N], tl.float32)
    pointers = (
        q_ptr + (q_first * stride_qm if F.VARLEN else b64 * stride_qb),
        do_ptr + (q_first * stride_dm if F.VARLEN else b64 * stride_db),
        lse2_ptr + (q_first if F.VARLEN else b64 * HQ * SQ),
        delta_ptr + (q_first if F.VARLEN else b64 * HQ * SQ),
        dq_ptr + q_first * dq_stride,
        ranges_ptr + (q_first * stride_rm if F.VARLEN else b64 * stride_rb),
        mask_ptr + b64 * stride_mb,
        bias_ptr + b64 * stride_bb,
        weight_base,
        slopes_ptr + b64 * stride_ab,
    )
    stride_row = SQ.to(tl.int64)
    strides = (stride_qh, stride_qm, stride_dh, stride_dm, stride_row, dq_stride, stride_rh, stride_rm, stride_mh,
               stride_mm, stride_mn, stride_bh, stride_bm, stride_bn)  # fmt: skip
    numbers = (scale, softcap, keep_scale, window_left, window_right, threshold, off_b, off_h, off_m, off_n)
    head0 = head_k * GROUP
    if F.HEAD_LOOP:  # every head has ranges of its own, so tiles of its own
        for g in tl.range(0, GROUP):
            if F.MASK_M > 0:
                plan = _plan_listed_queries(blocks_ptr, stride_xb, stride_xh, stride_xm, plans_ptr, b64, head0 + g,
                                            stride_tb, stride_th, n0, sq, sk, window_left, window_right, F)  # fmt: skip
            else:
                plan = _plan_queries(
                    plans_ptr, b64, head0 + g, stride_tb, stride_th, n0, sq, sk, window_left, window_right, F
                )
            for stage in tl.static_range(2):
                dk, dv, dw = _key_tiles(dk, dv, dw, k, v, n0, pointers, q_desc, do_desc, strides, batch, head0 + g, 1,
                                        plan, seed_ptr, numbers, sq, sk, F, stage == 1)  # fmt: skip
    else:
        if F.MASK_M > 0:
            plan = _plan_listed_queries(blocks_ptr, stride_xb, stride_xh, stride_xm, plans_ptr, b64, head0, stride_tb,
                                        stride_th, n0, sq, sk, window_left, window_right, F)  # fmt: skip
        else:
            plan = _plan_queries(plans_ptr, b64, head0, stride_tb, stride_th, n0, sq, sk, window_left, window_right, F)
        for stage in tl.static_range(2):
            dk, dv, dw = _key_tiles(dk, dv, dw, k, v, n0, pointers, q_desc, do_desc, strides, batch, head0, GROUP,
                                    plan, seed_ptr, numbers, sq, sk, F, stage == 1)  # fmt: skip
    factor = tl.zeros([BLOCK_N], tl.float32)
    store_parts(
        dk_ptr + k_first * dk_stride + hk64 * D,
        col,
        k_ok,
        dk_stride,
        scale_parts(dk, factor + scale, D_PARTS),
        D,
        D_PARTS,
    )
    store_parts(
        dv_ptr + k_first * dv_stride + hk64 * DV,
        col,
        k_ok,
        dv_stride,
        scale_parts(dv, factor + keep_scale, DV_PARTS),
        DV,
        DV_PARTS,
    )
    if F.WEIGHT_GRAD:
        flat_k = (hk64 * SK + k_first) if F.VARLEN else (b64 * HK + head_k) * SK
        tl.store(dw_ptr + flat_k + col, dw, mask=k_ok)


@triton.jit(do_not_specialize=["count"])
def attn_bwd_finish(acc_ptr, dq_ptr, count, scale, BLOCK: tl.constexpr):
    """dQ = scale * its float32 sum, in q's dtype: the end of the fused form. Grid: count / BLOCK."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(dq_ptr + at, (tl.load(acc_ptr + at, mask=at < count) * scale).to(dq_ptr.dtype.element_ty), mask=at < count)
