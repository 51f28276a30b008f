"""Attention of a few packed rows over many keys: decoding, and a few queries that read a long context.

Such calls have few rows to spread over the GPU, so their keys are split, into a number of parts that follows from the
shapes alone (a CUDA graph stays valid). Each part's out and lse are merged by a second kernel ("Flash-Decoding", Dao
et al. 2023); the backward reads and writes every key once, and dQ is summed over the parts in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    LOG2E,
    accumulate_parts,
    backward_logits,
    backward_weights,
    dot_parts,
    drop,
    head_terms,
    key_in_use,
    load_parts,
    range_hull,
    scale_parts,
    softmax_end,
    softmax_step,
    store_parts,
    tile_logits,
    zero_parts,
)
from .grouped import gradient_rows, grouped_rows

_RUNTIME_INTS = [
    "HQ", "SQ", "SK", "batches", "splits", "per_split", "window_left", "window_right", "threshold", "off_b", "off_h",
    "off_m", "off_n", "stride_rb", "stride_rh", "stride_rm", "stride_wb", "stride_wh", "stride_ab", "stride_lb",
    "stride_lh", "stride_lm",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_INTS)
def few_queries_fwd_kernel(q_ptr, k_ptr, v_ptr, ranges_ptr, weight_ptr, slopes_ptr, sinks_ptr, seed_ptr, o_ptr,
                           lse_ptr, stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb,
                           stride_vh, stride_vn, stride_rb, stride_rh, stride_rm, stride_wb, stride_wh, stride_ab,
                           scale, softcap, keep_scale, HQ, SQ, SK, splits, window_left, window_right, threshold,
                           off_b, off_h, off_m, off_n,
                           SPLIT: tl.constexpr, GAPS: tl.constexpr, GROUP: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """out and lse of all packed rows of a KV head over one part of the keys that they see.

    With SPLIT to float32 [B, Hq, Sq, splits, Dv] and base-2 [B, Hq, Sq, splits]. GAPS: rows may see ranges with keys
    between them that none sees. The keys that some row sees are split, not all of them: a cache may be mostly empty.
    Grid: HKV * splits * B.
    """
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    PRECISION: tl.constexpr = F.PRECISION
    SINKS: tl.constexpr = F.HAS_SINKS and not SPLIT
    pid = tl.program_id(0)
    HK = HQ // GROUP
    head_k = pid % HK
    split = pid // HK % splits
    batch = pid // HK // splits
    b64 = batch.to(tl.int64)
    hk64 = head_k.to(tl.int64)
    r = tl.arange(0, BLOCK_M)
    row, head, lo, hi = grouped_rows(
        r, head_k, ranges_ptr + b64 * stride_rb, stride_rh, stride_rm, SQ, SK, window_left, window_right, GROUP, F
    )
    valid = row < SQ
    h64 = head.to(tl.int64)
    r64 = row.to(tl.int64)
    first, last, _, _ = range_hull(lo, hi, valid)
    start = first // BLOCK_N * BLOCK_N
    tiles = (last - start + BLOCK_N - 1) // BLOCK_N
    per_split = (tiles + splits - 1) // splits
    weight_base = weight_ptr + b64 * stride_wb + hk64 * stride_wh
    k_base = k_ptr + b64 * stride_kb + hk64 * stride_kh
    v_base = v_ptr + b64 * stride_vb + hk64 * stride_vh
    slope, dropout = head_terms(
        slopes_ptr, stride_ab, seed_ptr, batch, head[:, None], off_b, off_h, off_m, off_n, threshold, F
    )
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    sink = 0.0
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        m = sink * LOG2E
        l = tl.where(m == float("-inf"), 0.0, 1.0)
    acc = zero_parts(BLOCK_M, DV_PARTS)
    q = load_parts(q_ptr + b64 * stride_qb, h64 * stride_qh + r64 * stride_qm, valid, 1, D, D_PARTS, True)
    for tile in tl.range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        col = start + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        ok = (col[None, :] >= lo[:, None]) & (col[None, :] < hi[:, None])
        inside = (col >= first) & (col < last)
        use = inside
        if F.HAS_WEIGHT:
            use = use & key_in_use(weight_base, col, SK, F)
        if GAPS:
            use = use & (tl.max(ok.to(tl.int32), 0) != 0)
        k = load_parts(k_base, col, inside, stride_kn, D, D_PARTS, True)
        v = load_parts(v_base, col, use, stride_vn, DV, DV_PARTS, True)  # before the softmax: see forward.py
        s = dot_parts(q, k, D_PARTS, PRECISION)
        if not F.PLAIN:
            s, _slope_of_cap = tile_logits(
                s, row[:, None], col[None, :], scale, softcap, slope, q_ptr, 0, 0, weight_base, SQ, SK, F
            )
        s = tl.where(ok, s, float("-inf"))
        p, m, l, alpha = softmax_step(s, m, l, scale * LOG2E, F, True)
        p = drop(p, dropout, row, start + tile * BLOCK_N, False, F)
        acc = scale_parts(acc, alpha, DV_PARTS)
        acc = accumulate_parts(p, v, acc, DV_PARTS, PRECISION)
    flat = (b64 * HQ + h64) * SQ + r64
    if SPLIT:
        at = flat * splits + split
        l_safe = tl.where(l == 0.0, 1.0, l)
        tl.store(lse_ptr + at, tl.where(l == 0.0, float("-inf"), m + tl.math.log2(l_safe)), mask=valid)
    else:
        lse, l_safe = softmax_end(m, l, sink, F)
        tl.store(lse_ptr + flat, lse, mask=valid)
        at = (b64 * SQ + r64) * HQ + h64  # out is [B, S, H, D] in memory
    store_parts(o_ptr, at, valid, DV, scale_parts(acc, keep_scale / l_safe, DV_PARTS), DV, DV_PARTS)


@triton.jit(do_not_specialize=_RUNTIME_INTS)
def few_queries_bwd_kernel(q_ptr, k_ptr, v_ptr, ranges_ptr, weight_ptr, slopes_ptr, sinks_ptr, seed_ptr, o_ptr, do_ptr,
                           lse_ptr, dlse_ptr, dq_ptr, dk_ptr, dv_ptr, dw_ptr, dsink_ptr,
                           stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
                           stride_vn, stride_ob, stride_oh, stride_om, stride_db, stride_dh, stride_dm,
                           stride_lb, stride_lh, stride_lm,
                           stride_rb, stride_rh, stride_rm, stride_wb, stride_wh, stride_ab,
                           scale, softcap, keep_scale, HQ, SQ, SK, batches, splits, per_split, window_left,
                           window_right, threshold, off_b, off_h, off_m, off_n,
                           HAS_DLSE: tl.constexpr, GAPS: tl.constexpr, GROUP: tl.constexpr,
                           F: tl.constexpr):  # fmt: skip
    """dK, dV (and dw) of ``per_split`` tiles of keys, and what they add to dQ; tiles are [BLOCK_N, BLOCK_M].

    dq is [splits, B, Sq, Hq, D], in float32 where there is more than one split. Grid: HKV * splits * B.
    """
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    PRECISION: tl.constexpr = F.PRECISION
    pid = tl.program_id(0)
    HK = HQ // GROUP
    head_k = pid % HK
    split = pid // HK % splits
    batch = pid // HK // splits
    b64 = batch.to(tl.int64)
    hk64 = head_k.to(tl.int64)
    row, head, lo, hi = grouped_rows(
        tl.arange(0, BLOCK_M), head_k, ranges_ptr + b64 * stride_rb, stride_rh, stride_rm, SQ, SK, window_left,
        window_right, GROUP, F,
    )  # fmt: skip
    valid = row < SQ
    first, last, _, _ = range_hull(lo, hi, valid)
    pointers = (
        q_ptr + b64 * stride_qb, o_ptr + b64 * stride_ob, do_ptr + b64 * stride_db, lse_ptr + b64 * HQ * SQ,
        dlse_ptr + b64 * stride_lb, sinks_ptr, dsink_ptr + b64 * HQ * SQ,
    )  # fmt: skip
    strides = (stride_qh, stride_qm, stride_oh, stride_om, stride_dh, stride_dm, stride_lh, stride_lm)
    q, dout, lse2, delta = gradient_rows(pointers, strides, row, head, SQ, tl.where(split == 0, SQ, 0), HAS_DLSE, F)
    weight_base = weight_ptr + b64 * stride_wb + hk64 * stride_wh
    k_base = k_ptr + b64 * stride_kb + hk64 * stride_kh
    v_base = v_ptr + b64 * stride_vb + hk64 * stride_vh
    slope, dropout = head_terms(
        slopes_ptr, stride_ab, seed_ptr, batch, head[None, :], off_b, off_h, off_m, off_n, threshold, F
    )
    dq = zero_parts(BLOCK_M, D_PARTS)
    factor = tl.zeros([BLOCK_N], tl.float32)
    tiles = (SK + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        col = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        ok = (col[:, None] >= lo[None, :]) & (col[:, None] < hi[None, :])
        use = (col >= first) & (col < last)
        if F.HAS_WEIGHT:
            use = use & key_in_use(weight_base, col, SK, F)
            ok = ok & use[:, None]
        if GAPS:
            use = use & (tl.max(ok.to(tl.int32), 1) != 0)
        k = load_parts(k_base, col, use, stride_kn, D, D_PARTS, True)
        v = load_parts(v_base, col, use, stride_vn, DV, DV_PARTS, True)
        p, cap_slope = backward_weights(
            dot_parts(k, q, D_PARTS, PRECISION), lse2[None, :], row[None, :], col[:, None], ok, scale, softcap, slope,
            q_ptr, 0, 0, weight_base, SQ, SK, F, True,
        )  # fmt: skip
        weights = drop(p, dropout, row, tile * BLOCK_N, True, F)
        at = (b64 * SK + col) * HK + head_k
        dv = accumulate_parts(weights, dout, zero_parts(BLOCK_N, DV_PARTS), DV_PARTS, PRECISION)
        store_parts(dv_ptr, at, col < SK, DV, scale_parts(dv, factor + keep_scale, DV_PARTS), DV, DV_PARTS)
        dp = dot_parts(v, dout, DV_PARTS, PRECISION)
        dlogits = backward_logits(p, weights, dp, delta[None, :], ok, keep_scale, F, True)
        if F.WEIGHT_GRAD:
            tl.store(dw_ptr + (b64 * HK + head_k) * SK + col, tl.sum(dlogits, 1), mask=col < SK)
        ds = (dlogits * cap_slope).to(k[0].dtype)
        dk = accumulate_parts(ds, q, zero_parts(BLOCK_N, D_PARTS), D_PARTS, PRECISION)
        store_parts(dk_ptr, at, col < SK, D, scale_parts(dk, factor + scale, D_PARTS), D, D_PARTS)
        dq = accumulate_parts(tl.trans(ds), k, dq, D_PARTS, PRECISION)
    entry = split.to(tl.int64) * batches + batch
    at = (entry * SQ + row) * HQ + head
    dq = scale_parts(dq, tl.zeros([BLOCK_M], tl.float32) + scale, D_PARTS)
    store_parts(dq_ptr, at, valid, D, dq, D, D_PARTS)
