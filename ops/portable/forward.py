"""FlashAttention forward (Dao 2023, algorithm 1) in portable Triton.

One program owns BLOCK_M query rows of one head and walks the keys that some of its rows may see. Tiles that every row
sees run without mask code; the others come after, with it. The order is free, since the softmax is online.
"""

import triton
import triton.language as tl

from .block_sparse import keys_of_block, plan_blocks, tile_at, visible_tile
from .common import (
    LOG2E,
    accumulate_parts,
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
    softmax_end,
    softmax_step,
    store_parts,
    tile_logits,
    zero_parts,
)


@triton.jit
def _forward_tiles(acc, m, l, q, row, lo, hi, seen, k_ptr, v_ptr, k_desc, v_desc, stride_kn, stride_vn, batch, head_k,
                   plan, mask_ptr, stride_mm, stride_mn, scale, softcap, slope, bias_ptr, stride_bm, stride_bn,
                   weight_ptr, dropout, sq, sk, F: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The walk over the masked or over the full tiles of a plan."""
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
    K_TMA: tl.constexpr = F.TMA  # logits of unseen keys are replaced, whatever they are
    CHECK: tl.constexpr = MASKED or SANITIZE
    CAREFUL: tl.constexpr = MASKED or F.MAY_EMPTY
    count = plan[4] if MASKED else plan[2]
    for i in tl.range(0, count):
        n0, number = tile_at(i, plan, BLOCK_N, SPAN, MASKED)
        col = n0 + tl.arange(0, BLOCK_N)
        use = col < sk
        if SANITIZE:
            use = key_in_use(weight_ptr, col, sk, F)
        if MASKED:
            ok = visible_tile(lo, hi, row, n0, number, mask_ptr, stride_mm, stride_mn, sq, sk, F, False)
            if SANITIZE and SPAN > 0 and not F.INTERVALS:
                use = keys_of_block(mask_ptr, number, col, use, F)
            elif SANITIZE:
                use = keys_seen(
                    use, gaps, first, last, ok, ranges_ptr, stride_rm, row, col, sq, sk, window_left, window_right, 0, F
                )
        k = load_tile(k_ptr, k_desc, batch, head_k, n0, use, stride_kn, BLOCK_N, D, D_PARTS, CHECK, K_TMA)
        # before the softmax, so that V does not come to lie where K was: see benchmarks/sass.py
        v = load_tile(v_ptr, v_desc, batch, head_k, n0, use, stride_vn, BLOCK_N, DV, DV_PARTS, CHECK, TMA)
        s = dot_parts(q, k, D_PARTS, PRECISION)
        if not F.PLAIN:
            s, _ = tile_logits(
                s,
                row[:, None],
                col[None, :],
                scale,
                softcap,
                slope,
                bias_ptr,
                stride_bm,
                stride_bn,
                weight_ptr,
                sq,
                sk,
                F,
            )
        if MASKED:
            s = tl.where(ok, s, float("-inf"))
        p, m, l, alpha = softmax_step(s, m, l, scale * LOG2E, F, CAREFUL)
        p = drop(p, dropout, row, n0, False, F)
        acc = scale_parts(acc, alpha, DV_PARTS)
        acc = accumulate_parts(p, v, acc, DV_PARTS, PRECISION)
    return acc, m, l


_RUNTIME_INTS = [
    "HQ", "GROUP", "SQ", "SK", "max_q", "tiles", "window_left", "window_right", "threshold", "off_b", "off_h", "off_m",
    "off_n", "stride_rb", "stride_rh", "stride_rm", "stride_wb", "stride_wh", "stride_ab", "stride_xb",
    "stride_xh", "stride_xm",
]  # fmt: skip


@triton.jit(do_not_specialize=_RUNTIME_INTS)
def attn_fwd_kernel(q_ptr, k_ptr, v_ptr, ranges_ptr, mask_ptr, bias_ptr, weight_ptr, slopes_ptr, seed_ptr, cu_q_ptr,
                    cu_k_ptr, blocks_ptr, sinks_ptr, o_ptr, lse_ptr, k_desc, v_desc,
                    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
                    stride_rb, stride_rh, stride_rm, stride_mb, stride_mh, stride_mm, stride_mn,
                    stride_bb, stride_bh, stride_bm, stride_bn, stride_wb, stride_wh, stride_ab, stride_xb, stride_xh,
                    stride_xm,
                    scale, softcap, keep_scale, HQ, GROUP, SQ, SK, max_q, tiles, window_left, window_right, threshold,
                    off_b, off_h, off_m, off_n, F: tl.constexpr):  # fmt: skip
    """out and lse of BLOCK_M rows. Grid: tiles * HQ * B. For VARLEN, SQ and SK are the packed totals."""
    BLOCK_M: tl.constexpr = F.BLOCK_M
    DV_PARTS: tl.constexpr = F.DV_PARTS
    D_PARTS: tl.constexpr = F.D_PARTS
    DV: tl.constexpr = F.DV
    D: tl.constexpr = F.D
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles  # the longest causal rows first
    batch = pid // tiles // HQ
    head = pid // tiles % HQ
    head_k = head // GROUP
    b64 = batch.to(tl.int64)
    h64 = head.to(tl.int64)
    hk64 = head_k.to(tl.int64)
    o_stride = HQ.to(tl.int64) * DV  # out is [B, S, H, D] in memory
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
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    sink = 0.0
    if F.HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        m = tl.zeros([BLOCK_M], tl.float32) + sink * LOG2E
        l = tl.where(m == float("-inf"), 0.0, 1.0)
    acc = zero_parts(BLOCK_M, DV_PARTS)
    q = load_parts(q_base, row, valid, stride_qm, D, D_PARTS, True)
    for stage in tl.static_range(2):  # full tiles, then masked ones
        acc, m, l = _forward_tiles(
            acc, m, l, q, row, lo, hi, seen, k_base, v_base, k_desc, v_desc, stride_kn, stride_vn, batch, head_k, plan,
            mask_base, stride_mm, stride_mn, scale, softcap, slope, bias_base, stride_bm, stride_bn, weight_base,
            dropout, sq, sk, F, stage == 1,
        )  # fmt: skip

    lse, l_safe = softmax_end(m, l, sink, F)
    tl.store(lse_ptr + flat + row, lse, mask=valid)
    o_base = o_ptr + q_first * o_stride + h64 * DV
    store_parts(o_base, row, valid, o_stride, scale_parts(acc, keep_scale / l_safe, DV_PARTS), DV, DV_PARTS)
