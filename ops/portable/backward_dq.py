"""The dQ half of the split backward: one program owns a tile of query rows and walks their keys, like the forward."""

import triton
import triton.language as tl

from .block_sparse import keys_of_block, plan_blocks, tile_at, visible_tile
from .common import (
    accumulate_parts,
    backward_logits,
    backward_weights,
    dot_parts,
    drop,
    head_terms,
    key_in_use,
    keys_seen,
    load_parts,
    load_tile,
    query_tile,
    range_hull,
    scale_parts,
    sequence_bounds,
    store_parts,
    zero_parts,
)


@triton.jit
def _query_tiles(dq, q, dout, lse2, delta, row, lo, hi, seen, k_ptr, v_ptr, k_desc, v_desc, stride_kn, stride_vn, batch,
                 head_k, plan, mask_ptr, stride_mm, stride_mn, scale, softcap, slope, bias_ptr, stride_bm, stride_bn,
                 weight_ptr, dropout, keep_scale, sq, sk, F: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The masked or the full key tiles of one query tile; tiles are [BLOCK_M, BLOCK_N]."""
    BLOCK_N: tl.constexpr = F.BLOCK_N
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    PRECISION: tl.constexpr = F.PRECISION
    SPAN: tl.constexpr = F.MASK_N
    gaps, first, last, ranges_ptr, stride_rm, window_left, window_right = seen
    SANITIZE: tl.constexpr = (MASKED and F.SANITIZE) or F.HAS_WEIGHT
    TMA: tl.constexpr = F.TMA and not SANITIZE
    CHECK: tl.constexpr = MASKED or SANITIZE
    count = plan[4] if MASKED else plan[2]
    for i in tl.range(0, count):
        n0, number = tile_at(i, plan, BLOCK_N, SPAN, MASKED)
        col = n0 + tl.arange(0, BLOCK_N)
        use = col < sk
        if SANITIZE:
            use = key_in_use(weight_ptr, col, sk, F)
        key_ok = use[None, :]
        ok = key_ok
        if MASKED:
            ok = key_ok & visible_tile(lo, hi, row, n0, number, mask_ptr, stride_mm, stride_mn, sq, sk, F, False)
            if SANITIZE and SPAN > 0 and not F.INTERVALS:
                use = keys_of_block(mask_ptr, number, col, use, F)
            elif SANITIZE:
                use = keys_seen(
                    use, gaps, first, last, ok, ranges_ptr, stride_rm, row, col, sq, sk, window_left, window_right, 0, F
                )
        k = load_tile(k_ptr, k_desc, batch, head_k, n0, use, stride_kn, BLOCK_N, D, D_PARTS, CHECK, TMA)
        v = load_tile(v_ptr, v_desc, batch, head_k, n0, use, stride_vn, BLOCK_N, DV, DV_PARTS, CHECK, TMA)
        qk = dot_parts(q, k, D_PARTS, PRECISION)
        p, cap_slope = backward_weights(
            qk, lse2[:, None], row[:, None], col[None, :], ok, scale, softcap, slope, bias_ptr, stride_bm, stride_bn,
            weight_ptr, sq, sk, F, CHECK,
        )  # fmt: skip
        weights = drop(p, dropout, row, n0, False, F)
        dp = dot_parts(dout, v, DV_PARTS, PRECISION)
        ds = backward_logits(p, weights, dp, delta[:, None], ok, keep_scale, F, CHECK) * cap_slope
        dq = accumulate_parts(ds, k, dq, D_PARTS, PRECISION)
    return dq


_RUNTIME_INTS = [
    "HQ", "GROUP", "SQ", "SK", "max_q", "tiles", "window_left", "window_right", "threshold", "off_b", "off_h", "off_m",
    "off_n", "stride_rb", "stride_rh", "stride_rm", "stride_wb", "stride_wh", "stride_ab", "stride_xb",
    "stride_xh", "stride_xm",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_INTS)
def attn_bwd_dq_kernel(q_ptr, k_ptr, v_ptr, ranges_ptr, mask_ptr, bias_ptr, weight_ptr, slopes_ptr, seed_ptr, cu_q_ptr,
                       cu_k_ptr, blocks_ptr, do_ptr, lse2_ptr, delta_ptr, dq_ptr, k_desc, v_desc,
                       stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh,
                       stride_vn, stride_db, stride_dh, stride_dm, stride_rb, stride_rh, stride_rm, stride_mb,
                       stride_mh, stride_mm, stride_mn, stride_bb, stride_bh, stride_bm, stride_bn, stride_wb,
                       stride_wh, stride_ab, stride_xb, stride_xh, stride_xm,
                       scale, softcap, keep_scale, HQ, GROUP, SQ, SK, max_q, tiles, window_left,
                       window_right, threshold, off_b, off_h, off_m, off_n, F: tl.constexpr):  # fmt: skip
    """dQ of BLOCK_M rows. Grid: tiles * HQ * B."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles
    batch = pid // tiles // HQ
    head = pid // tiles % HQ
    head_k = head // GROUP
    b64 = batch.to(tl.int64)
    h64 = head.to(tl.int64)
    hk64 = head_k.to(tl.int64)
    dq_stride = HQ.to(tl.int64) * D
    if F.VARLEN:
        q_start, sq = sequence_bounds(cu_q_ptr, batch, SQ, max_q)
        k_start, sk = sequence_bounds(cu_k_ptr, batch, SK, SK)
        if tile * BLOCK_M >= sq:
            return
        q_first = q_start.to(tl.int64)
        k_first = k_start.to(tl.int64)
        flat = h64 * SQ + q_first
    else:
        sq = SQ
        sk = SK
        q_first = b64 * SQ
        k_first = b64 * SK
        flat = (b64 * HQ + head) * SQ
    q_base = q_ptr + h64 * stride_qh + (q_first * stride_qm if F.VARLEN else b64 * stride_qb)
    do_base = do_ptr + h64 * stride_dh + (q_first * stride_dm if F.VARLEN else b64 * stride_db)
    k_base = k_ptr + hk64 * stride_kh + (k_first * stride_kn if F.VARLEN else b64 * stride_kb)
    v_base = v_ptr + hk64 * stride_vh + (k_first * stride_vn if F.VARLEN else b64 * stride_vb)
    weight_base = weight_ptr + hk64 * stride_wh + (k_first if F.VARLEN else b64 * stride_wb)
    ranges_base = ranges_ptr + h64 * stride_rh + (q_first * stride_rm if F.VARLEN else b64 * stride_rb)
    mask_base = mask_ptr + b64 * stride_mb + h64 * stride_mh
    bias_base = bias_ptr + b64 * stride_bb + h64 * stride_bh

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < sq
    lo, hi, plan, seen = query_tile(ranges_base, stride_rm, row, sq, sk, window_left, window_right, F)
    if F.MASK_M > 0:
        BLOCK_N: tl.constexpr = F.BLOCK_N
        MASK_M: tl.constexpr = F.MASK_M
        MASK_N: tl.constexpr = F.MASK_N
        blocks = blocks_ptr + b64 * stride_xb + h64 * stride_xh + (tile * BLOCK_M // MASK_M).to(tl.int64) * stride_xm
        first, last, full_lo, full_hi = range_hull(lo, hi, valid)
        plan = plan_blocks(blocks, first, last, full_lo, full_hi, BLOCK_N, MASK_N, F)
    slope, dropout = head_terms(
        slopes_ptr, stride_ab, seed_ptr, batch, head, off_b, off_h, off_m, off_n, threshold, F
    )  # fmt: skip
    q = load_parts(q_base, row, valid, stride_qm, D, D_PARTS, True)
    dout = load_parts(do_base, row, valid, stride_dm, DV, DV_PARTS, True)
    lse2 = tl.load(lse2_ptr + flat + row, mask=valid, other=float("inf"))
    delta = tl.load(delta_ptr + flat + row, mask=valid, other=0.0)
    dq = zero_parts(BLOCK_M, D_PARTS)
    for stage in tl.static_range(2):
        dq = _query_tiles(
            dq, q, dout, lse2, delta, row, lo, hi, seen, k_base, v_base, k_desc, v_desc, stride_kn, stride_vn, batch,
            head_k, plan, mask_base, stride_mm, stride_mn, scale, softcap, slope, bias_base, stride_bm, stride_bn,
            weight_base, dropout, keep_scale, sq, sk, F, stage == 1,
        )  # fmt: skip
    factor = tl.zeros([BLOCK_M], tl.float32) + scale
    store_parts(
        dq_ptr + q_first * dq_stride + h64 * D, row, valid, dq_stride, scale_parts(dq, factor, D_PARTS), D, D_PARTS
    )
