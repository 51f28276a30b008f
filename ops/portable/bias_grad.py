"""The gradient of ``bias``, whatever it broadcasts over, without atomics and without a [B, Hq, Sq, Sk] scratch.

One program owns one tile of the bias and walks everything that shares it: batches, heads, and the query or key tiles
where the bias has size 1 there. It recomputes the logits (two matrix products a tile).
"""

import triton
import triton.language as tl

from .block_sparse import seen_in_block
from .common import backward_logits, backward_weights, dot_parts, drop, key_in_use, load_parts, row_ranges, visible

_RUNTIME_INTS = [
    "HQ", "GROUP", "SQ", "SK", "batches", "heads", "m_tiles", "n_tiles", "m_steps", "n_steps", "bias_h", "window_left",
    "window_right", "threshold", "off_b", "off_h", "off_m", "off_n", "stride_rb", "stride_rh", "stride_rm", "stride_wb",
    "stride_wh", "stride_ab", "stride_xb", "stride_xh", "stride_xm",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_INTS)
def attn_bwd_dbias_kernel(q_ptr, k_ptr, v_ptr, ranges_ptr, mask_ptr, bias_ptr, weight_ptr, slopes_ptr, seed_ptr,
                          cu_q_ptr, cu_k_ptr, blocks_ptr, do_ptr, lse2_ptr, delta_ptr, dbias_ptr,
                          stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
                          stride_vn, stride_db, stride_dh, stride_dm, stride_rb, stride_rh, stride_rm, stride_mb,
                          stride_mh, stride_mm, stride_mn, stride_bb, stride_bh, stride_bm, stride_bn, stride_wb,
                          stride_wh, stride_ab, stride_xb, stride_xh, stride_xm,
                          scale, softcap, keep_scale, HQ, GROUP, SQ, SK, batches, heads, m_tiles, n_tiles, m_steps,
                          n_steps, bias_h, window_left, window_right, threshold, off_b, off_h, off_m, off_n,
                          ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """dbias, contiguous float32. Grid: n_tiles * m_tiles * (bias heads) * (bias batches).

    With a block mask ``blocks_ptr`` is a table of its blocks: the number of each, -1 full, -2 unseen.
    A program sums over ``batches`` x ``heads`` that share its tile, and over m_steps x n_steps tiles.
    """
    BLOCK_M: tl.constexpr = F.BLOCK_M
    BLOCK_N: tl.constexpr = F.BLOCK_N
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    PRECISION: tl.constexpr = F.PRECISION
    pid = tl.program_id(0)
    n_tile = pid % n_tiles
    m_tile = pid // n_tiles % m_tiles
    plane = pid // n_tiles // m_tiles
    plane_h = plane % bias_h
    plane_b = plane // bias_h
    grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, batches * heads * m_steps * n_steps):
        n_step = step % n_steps
        m_step = step // n_steps % m_steps
        head = plane_h + step // n_steps // m_steps % heads
        batch = plane_b + step // n_steps // m_steps // heads
        b64 = batch.to(tl.int64)
        h64 = head.to(tl.int64)
        hk64 = h64 // GROUP
        row = (m_tile + m_step) * BLOCK_M + tl.arange(0, BLOCK_M)
        col = (n_tile + n_step) * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = row < SQ
        weight_base = weight_ptr + b64 * stride_wb + hk64 * stride_wh
        ranges_base = ranges_ptr + b64 * stride_rb + h64 * stride_rh
        mask_base = mask_ptr + b64 * stride_mb + h64 * stride_mh
        bias_base = bias_ptr + b64 * stride_bb + h64 * stride_bh
        lo, hi = row_ranges(ranges_base, stride_rm, row, SQ, SK, window_left, window_right, F)
        key_ok = key_in_use(weight_base, col, SK, F)
        ok = key_ok[None, :] & visible(
            lo[:, None], hi[:, None], col[None, :], row[:, None], mask_base, stride_mm, stride_mn, SQ, SK, F
        )
        if F.MASK_M > 0:
            block = blocks_ptr + b64 * stride_xb + h64 * stride_xh
            MASK_M: tl.constexpr = F.MASK_M
            MASK_N: tl.constexpr = F.MASK_N
            block += ((m_tile + m_step) * BLOCK_M // MASK_M).to(tl.int64) * stride_xm
            n0 = (n_tile + n_step) * BLOCK_N
            ok = ok & seen_in_block(mask_base, tl.load(block + n0 // MASK_N), row, n0, F, False)
        if tl.max(ok.to(tl.int32)) != 0:
            slope = 0.0
            if F.HAS_ALIBI:
                slope = tl.load(slopes_ptr + b64 * stride_ab + head).to(tl.float32)
            dropout = (0, 0, 0, 0, 0, 0)
            if F.HAS_DROPOUT:
                dropout = (tl.load(seed_ptr), head + off_h, batch + off_b, off_m, off_n, threshold)
            flat = (b64 * HQ + head) * SQ
            lse2 = tl.load(lse2_ptr + flat + row, mask=valid, other=float("inf"))
            delta = tl.load(delta_ptr + flat + row, mask=valid, other=0.0)
            q = load_parts(q_ptr + b64 * stride_qb + h64 * stride_qh, row, valid, stride_qm, D, D_PARTS, True)
            k = load_parts(k_ptr + b64 * stride_kb + hk64 * stride_kh, col, key_ok, stride_kn, D, D_PARTS, True)
            qk = dot_parts(q, k, D_PARTS, PRECISION)
            dout = load_parts(do_ptr + b64 * stride_db + h64 * stride_dh, row, valid, stride_dm, DV, DV_PARTS, True)
            v = load_parts(v_ptr + b64 * stride_vb + hk64 * stride_vh, col, key_ok, stride_vn, DV, DV_PARTS, True)
            p, _ = backward_weights(
                qk, lse2[:, None], row[:, None], col[None, :], ok, scale, softcap, slope, bias_base, stride_bm,
                stride_bn, weight_base, SQ, SK, F, True,
            )  # fmt: skip
            dp = dot_parts(dout, v, DV_PARTS, PRECISION)
            weights = drop(p, dropout, row, (n_tile + n_step) * BLOCK_N, False, F)
            grad += backward_logits(p, weights, dp, delta[:, None], ok, keep_scale, F, True)
    rows = 1 if ONE_ROW else SQ
    columns = 1 if ONE_COLUMN else SK
    base = dbias_ptr + plane.to(tl.int64) * rows * columns
    row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    col = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if ONE_ROW and ONE_COLUMN:
        tl.store(base, tl.sum(grad))
    elif ONE_ROW:
        tl.store(base + col, tl.sum(grad, 0), mask=col < SK)
    elif ONE_COLUMN:
        tl.store(base + row, tl.sum(grad, 1), mask=row < SQ)
    else:
        at = base + row.to(tl.int64)[:, None] * SK + col[None, :]
        tl.store(at, grad, mask=(row[:, None] < SQ) & (col[None, :] < SK))
