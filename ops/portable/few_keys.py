"""Attention whose keys all fit into one tile: windows of a few tokens, and many queries over a few keys.

All of it runs at the speed of memory, so every tensor is read once and written once: no loop over keys in the
forward, and one pass for dQ, dK and dV in the backward, which works out delta by itself. Batch entries never share a
tile: a NaN in one window stays there.
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
    keep_rows,
    key_in_use,
    load_parts,
    scale_parts,
    softmax_end,
    softmax_step,
    store_parts,
    tile_logits,
    zero_parts,
)
from .grouped import gradient_rows, grouped_rows

_RUNTIME_INTS = [
    "HQ", "SQ", "SK", "batches", "tiles", "splits", "per_split", "window_left", "window_right", "threshold", "off_b",
    "off_h", "off_m", "off_n", "stride_rb", "stride_rh", "stride_rm", "stride_wb", "stride_wh", "stride_ab",
    "stride_lb", "stride_lh", "stride_lm",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_INTS)
def few_keys_fwd_kernel(q_ptr, k_ptr, v_ptr, ranges_ptr, weight_ptr, slopes_ptr, sinks_ptr, seed_ptr, o_ptr, lse_ptr,
                        stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
                        stride_vn, stride_rb, stride_rh, stride_rm, stride_wb, stride_wh, stride_ab,
                        scale, softcap, keep_scale, HQ, SQ, SK, tiles, window_left, window_right, threshold,
                        off_b, off_h, off_m, off_n, GROUP: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """out and lse of BLOCK_M packed rows over at most BLOCK_N keys. Grid: HKV * tiles * B."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    PRECISION: tl.constexpr = F.PRECISION
    pid = tl.program_id(0)
    HK = HQ // GROUP
    head_k = pid % HK  # neighbours in memory, as transformers lays it out
    tile = pid // HK % tiles
    batch = pid // HK // tiles
    b64 = batch.to(tl.int64)
    hk64 = head_k.to(tl.int64)
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head, lo, hi = grouped_rows(
        r, head_k, ranges_ptr + b64 * stride_rb, stride_rh, stride_rm, SQ, SK, window_left, window_right, GROUP, F
    )
    valid = row < SQ
    h64 = head.to(tl.int64)
    r64 = row.to(tl.int64)
    col = tl.arange(0, BLOCK_N)
    weight_base = weight_ptr + b64 * stride_wb + hk64 * stride_wh
    ok = (col[None, :] >= lo[:, None]) & (col[None, :] < hi[:, None])
    use = col < SK
    if F.SANITIZE:  # values that none of these rows sees may hold NaN, and 0 * NaN is NaN
        use = key_in_use(weight_base, col, SK, F) & (tl.max(ok.to(tl.int32), 0) != 0)
    q = load_parts(q_ptr + b64 * stride_qb, h64 * stride_qh + r64 * stride_qm, valid, 1, D, D_PARTS, True)
    k = load_parts(k_ptr + b64 * stride_kb + hk64 * stride_kh, col, col < SK, stride_kn, D, D_PARTS, True)
    v = load_parts(v_ptr + b64 * stride_vb + hk64 * stride_vh, col, use, stride_vn, DV, DV_PARTS, True)
    s = dot_parts(q, k, D_PARTS, PRECISION)
    slope, dropout = head_terms(
        slopes_ptr, stride_ab, seed_ptr, batch, head[:, None], off_b, off_h, off_m, off_n, threshold, F
    )
    if not F.PLAIN:
        s, _ = tile_logits(
            s, row[:, None], col[None, :], scale, softcap, slope, q_ptr, 0, 0, weight_base, SQ, SK, F
        )  # fmt: skip
    s = tl.where(ok, s, float("-inf"))
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    sink = 0.0
    if F.HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        m = sink * LOG2E
        l = tl.where(m == float("-inf"), 0.0, 1.0)
    p, m, l, _ = softmax_step(s, m, l, scale * LOG2E, F, True)
    p = drop(p, dropout, row, 0, False, F)
    acc = accumulate_parts(p, v, zero_parts(BLOCK_M, DV_PARTS), DV_PARTS, PRECISION)
    lse, l_safe = softmax_end(m, l, sink, F)
    tl.store(lse_ptr + (b64 * HQ + h64) * SQ + r64, lse, mask=valid)
    at = (b64 * SQ + r64) * HQ + h64  # out is [B, S, H, D] in memory
    store_parts(o_ptr, at, valid, DV, scale_parts(acc, keep_scale / l_safe, DV_PARTS), DV, DV_PARTS)


@triton.jit
def _row_tile(tile, dk, dv, dw, k, v, col, key_ok, head_k, batch, row_pointers, row_strides, ranges, stride_rh,
              stride_rm, slopes_ptr, stride_ab, seed_ptr, weight_ptr, dq_ptr, results, scale, softcap, keep_scale, HQ,
              SQ, SK, window_left, window_right, threshold, off_b, off_h, off_m, off_n,
              HAS_DLSE: tl.constexpr, ONE: tl.constexpr, GROUP: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """dQ of one tile of packed rows; dk, dv and dw with what it adds to them.

    ONE: there are no further tiles, so dV is written at once, which frees its registers.
    """
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    PRECISION: tl.constexpr = F.PRECISION
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head, lo, hi = grouped_rows(
        r, head_k, ranges, stride_rh, stride_rm, SQ, SK, window_left, window_right, GROUP, F
    )  # fmt: skip
    q, dout, lse2, delta = gradient_rows(row_pointers, row_strides, row, head, SQ, SQ, HAS_DLSE, F)
    ok = (col[None, :] >= lo[:, None]) & (col[None, :] < hi[:, None]) & key_ok[None, :]
    slope, dropout = head_terms(
        slopes_ptr, stride_ab, seed_ptr, batch, head[:, None], off_b, off_h, off_m, off_n, threshold, F
    )
    p, cap_slope = backward_weights(
        dot_parts(q, k, D_PARTS, PRECISION), lse2[:, None], row[:, None], col[None, :], ok, scale, softcap, slope,
        q[0], 0, 0, weight_ptr, SQ, SK, F, True,
    )  # fmt: skip
    weights = drop(p, dropout, row, 0, False, F)
    dv = accumulate_parts(tl.trans(weights.to(v[0].dtype)), dout, dv, DV_PARTS, PRECISION)
    if ONE:
        _store_keys(results, 1, dv, keep_scale, col, SK, DV, DV_PARTS, BLOCK_N)
    dp = dot_parts(dout, v, DV_PARTS, PRECISION)
    dlogits = backward_logits(p, weights, dp, delta[:, None], ok, keep_scale, F, True)
    if F.WEIGHT_GRAD:
        dw += tl.sum(dlogits, 0)
    ds = (dlogits * cap_slope).to(k[0].dtype)
    dk = accumulate_parts(tl.trans(ds), q, dk, D_PARTS, PRECISION)
    if ONE:
        _store_keys(results, 0, dk, scale, col, SK, D, D_PARTS, BLOCK_N)
    seen = k
    if F.SANITIZE:
        seen = keep_rows(k, tl.max(ok.to(tl.int32), 0) != 0, D_PARTS)
    dq = accumulate_parts(ds, seen, zero_parts(BLOCK_M, D_PARTS), D_PARTS, PRECISION)
    factor = tl.zeros([BLOCK_M], tl.float32) + scale
    at = (batch.to(tl.int64) * SQ + row) * HQ + head
    store_parts(dq_ptr, at, row < SQ, D, scale_parts(dq, factor, D_PARTS), D, D_PARTS)
    return dk, dv, dw


@triton.jit
def _store_keys(results, WHICH: tl.constexpr, parts, factor, col, sk, D: tl.constexpr, PARTS: tl.constexpr,
                BLOCK_N: tl.constexpr):  # fmt: skip
    """dK (WHICH 0) or dV (1) of all keys, times ``factor``."""
    at = results[2] + col * results[3]
    store_parts(results[WHICH], at, col < sk, D, scale_parts(parts, tl.zeros([BLOCK_N], tl.float32) + factor, PARTS),
                D, PARTS)  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_INTS)
def few_keys_bwd_kernel(q_ptr, k_ptr, v_ptr, ranges_ptr, weight_ptr, slopes_ptr, sinks_ptr, seed_ptr, o_ptr, do_ptr,
                        lse_ptr, dlse_ptr, dq_ptr, dk_ptr, dv_ptr, dw_ptr, dsink_ptr,
                        stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
                        stride_vn, stride_ob, stride_oh, stride_om, stride_db, stride_dh, stride_dm,
                        stride_lb, stride_lh, stride_lm,
                        stride_rb, stride_rh, stride_rm, stride_wb, stride_wh, stride_ab,
                        scale, softcap, keep_scale, HQ, SQ, SK, batches, tiles, splits, per_split, window_left,
                        window_right, threshold, off_b, off_h, off_m, off_n,
                        HAS_DLSE: tl.constexpr, ONE: tl.constexpr, GROUP: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """dQ of ``per_split`` tiles of packed rows, and what they add to dK, dV and dw of all keys.

    dk and dv are [splits, B, Sk, Hkv, D], in float32 where there is more than one split.
    ONE: per_split is 1. Grid: HKV * splits * B.
    """
    BLOCK_N: tl.constexpr = F.BLOCK_N
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    pid = tl.program_id(0)
    HK = HQ // GROUP
    head_k = pid % HK
    split = pid // HK % splits
    batch = pid // HK // splits
    b64 = batch.to(tl.int64)
    hk64 = head_k.to(tl.int64)
    col = tl.arange(0, BLOCK_N)
    weight_base = weight_ptr + b64 * stride_wb + hk64 * stride_wh
    key_ok = key_in_use(weight_base, col, SK, F)
    k = load_parts(k_ptr + b64 * stride_kb + hk64 * stride_kh, col, key_ok, stride_kn, D, D_PARTS, True)
    v = load_parts(v_ptr + b64 * stride_vb + hk64 * stride_vh, col, key_ok, stride_vn, DV, DV_PARTS, True)
    dk = zero_parts(BLOCK_N, D_PARTS)
    dv = zero_parts(BLOCK_N, DV_PARTS)
    dw = tl.zeros([BLOCK_N], tl.float32)
    row_pointers = (
        q_ptr + b64 * stride_qb, o_ptr + b64 * stride_ob, do_ptr + b64 * stride_db, lse_ptr + b64 * HQ * SQ,
        dlse_ptr + b64 * stride_lb, sinks_ptr, dsink_ptr + b64 * HQ * SQ,
    )  # fmt: skip
    row_strides = (stride_qh, stride_qm, stride_oh, stride_om, stride_dh, stride_dm, stride_lh, stride_lm)
    ranges = ranges_ptr + b64 * stride_rb
    entry = split.to(tl.int64) * batches + batch
    results = (dk_ptr, dv_ptr, entry * SK * HK + head_k, HK)
    first = split * per_split
    if ONE:
        dk, dv, dw = _row_tile(
            first, dk, dv, dw, k, v, col, key_ok, head_k, batch, row_pointers, row_strides, ranges, stride_rh,
            stride_rm, slopes_ptr, stride_ab, seed_ptr, weight_base, dq_ptr, results, scale, softcap, keep_scale, HQ,
            SQ, SK, window_left, window_right, threshold, off_b, off_h, off_m, off_n, HAS_DLSE, ONE, GROUP, F,
        )  # fmt: skip
    else:
        for tile in tl.range(first, tl.minimum(first + per_split, tiles)):
            dk, dv, dw = _row_tile(
                tile, dk, dv, dw, k, v, col, key_ok, head_k, batch, row_pointers, row_strides, ranges, stride_rh,
                stride_rm, slopes_ptr, stride_ab, seed_ptr, weight_base, dq_ptr, results, scale, softcap, keep_scale,
                HQ, SQ, SK, window_left, window_right, threshold, off_b, off_h, off_m, off_n, HAS_DLSE, ONE, GROUP, F,
            )  # fmt: skip
        _store_keys(results, 0, dk, scale, col, SK, D, D_PARTS, BLOCK_N)
        _store_keys(results, 1, dv, keep_scale, col, SK, DV, DV_PARTS, BLOCK_N)
    if F.WEIGHT_GRAD:
        tl.store(dw_ptr + (entry * HK + head_k) * SK + col, dw, mask=col < SK)
