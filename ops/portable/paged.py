"""Attention over a paged cache: blocks of keys and values anywhere in a pool, found through a table of block numbers.

Few packed rows over many keys, as in few_queries.py: the keys that a tile of rows sees are split into parts, as many as
the shapes alone say (a CUDA graph stays valid while sequences grow), and a second kernel merges the parts. More rows
than a tile holds take more tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    INT_MAX,
    LOG2E,
    accumulate_parts,
    dot_parts,
    load_parts,
    range_hull,
    scale_parts,
    softmax_end,
    softmax_step,
    store_parts,
    tile_logits,
    zero_parts,
)
from .grouped import grouped_rows

_RUNTIME_INTS = [
    "HQ", "SQ", "pool", "columns", "row_tiles", "splits", "window_left", "window_right", "stride_tb", "stride_rb",
    "stride_rh", "stride_rm", "stride_ab",
]  # fmt: skip


@triton.jit
def pages_of(table_ptr, at, last, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The blocks of the tile of keys from ``at``: one number, or one for each key. -1 from ``last`` on."""
    if PAGE % BLOCK_N == 0:
        return tl.load(table_ptr + at // PAGE, mask=at < last, other=-1)
    else:
        col = at + tl.arange(0, BLOCK_N)
        return tl.load(table_ptr + col // PAGE, mask=col < last, other=-1)


@triton.jit
def cache_rows(page, col, inside, pool, stride_kp, stride_kn, stride_vp, stride_vn, PAGE: tl.constexpr):
    """Where keys ``col`` of blocks ``page`` lie in the caches, and which of them are there.

    Blocks whose number is outside the pool hold nothing.
    """
    there = (page >= 0) & (page < pool)
    p64 = tl.where(there, page, 0).to(tl.int64)
    slot = (col % PAGE).to(tl.int64)
    use = inside & (col < tl.where(there, INT_MAX, 0))
    return p64 * stride_kp + slot * stride_kn, p64 * stride_vp + slot * stride_vn, use


@triton.jit(do_not_specialize=_RUNTIME_INTS)
def paged_fwd_kernel(q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, ranges_ptr, slopes_ptr, sinks_ptr, o_ptr, lse_ptr,
                     stride_qb, stride_qh, stride_qm, stride_kp, stride_kh, stride_kn, stride_vp, stride_vh, stride_vn,
                     stride_tb, stride_rb, stride_rh, stride_rm, stride_ab, scale, softcap, HQ, SQ, pool, columns,
                     row_tiles, splits, window_left, window_right,
                     PAGE: tl.constexpr, SPLIT: tl.constexpr, GAPS: tl.constexpr, GROUP: tl.constexpr,
                     F: tl.constexpr):  # fmt: skip
    """out and lse of a tile of packed rows of a KV head over one part of the keys that they see.

    Caches are [pool, PAGE, HKV, D], the table int32 [B, columns], lengths int32 [B] (clamped to what the table can
    hold). With SPLIT to float32 [B, Hq, Sq, splits, Dv] and base-2 [B, Hq, Sq, splits]. GAPS: rows may see ranges with
    keys between them that none sees. Grid: row_tiles * HKV * splits * B.
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
    row_tile = pid % row_tiles
    head_k = pid // row_tiles % HK
    split = pid // row_tiles // HK % splits
    batch = pid // row_tiles // HK // splits
    b64 = batch.to(tl.int64)
    hk64 = head_k.to(tl.int64)
    SK = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), columns * PAGE)
    row, head, lo, hi = grouped_rows(
        row_tile * BLOCK_M + tl.arange(0, BLOCK_M), head_k, ranges_ptr + b64 * stride_rb, stride_rh, stride_rm, SQ, SK,
        window_left, window_right, GROUP, F,
    )  # fmt: skip
    valid = row < SQ
    h64 = head.to(tl.int64)
    r64 = row.to(tl.int64)
    first, last, _, _ = range_hull(lo, hi, valid)
    start = first // BLOCK_N * BLOCK_N
    tiles = (last - start + BLOCK_N - 1) // BLOCK_N
    per_split = (tiles + splits - 1) // splits
    k_base = k_ptr + hk64 * stride_kh
    v_base = v_ptr + hk64 * stride_vh
    slope = 0.0
    if F.HAS_ALIBI:
        slope = tl.load(slopes_ptr + b64 * stride_ab + head[:, None]).to(tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    sink = 0.0
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        m = sink * LOG2E
        l = tl.where(m == float("-inf"), 0.0, 1.0)
    acc = zero_parts(BLOCK_M, DV_PARTS)
    q = load_parts(q_ptr + b64 * stride_qb, h64 * stride_qh + r64 * stride_qm, valid, 1, D, D_PARTS, True)
    table_base = table_ptr + b64 * stride_tb
    page = pages_of(table_base, start + split * per_split * BLOCK_N, last, PAGE, BLOCK_N)
    for tile in tl.range(split * per_split, tl.minimum((split + 1) * per_split, tiles)):
        at = start + tile * BLOCK_N
        col = at + tl.arange(0, BLOCK_N)
        inside = (col >= first) & (col < last)
        k_at, v_at, use = cache_rows(page, col, inside, pool, stride_kp, stride_kn, stride_vp, stride_vn, PAGE)
        page = pages_of(table_base, at + BLOCK_N, last, PAGE, BLOCK_N)  # early: nothing waits for it
        ok = (col[None, :] >= lo[:, None]) & (col[None, :] < hi[:, None]) & use[None, :]
        k = load_parts(k_base, k_at, use, 1, D, D_PARTS, True)
        if GAPS:
            use = use & (tl.max(ok.to(tl.int32), 0) != 0)
        v = load_parts(v_base, v_at, use, 1, DV, DV_PARTS, True)  # before the softmax: see forward.py
        s = dot_parts(q, k, D_PARTS, PRECISION)
        if not F.PLAIN:
            s, _slope_of_cap = tile_logits(
                s, row[:, None], col[None, :], scale, softcap, slope, q_ptr, 0, 0, q_ptr, SQ, SK, F
            )
        s = tl.where(ok, s, float("-inf"))
        p, m, l, alpha = softmax_step(s, m, l, scale * LOG2E, F, True)
        acc = scale_parts(acc, alpha, DV_PARTS)
        acc = accumulate_parts(p, v, acc, DV_PARTS, PRECISION)
    flat = (b64 * HQ + h64) * SQ + r64
    if SPLIT:
        index = flat * splits + split
        l_safe = tl.where(l == 0.0, 1.0, l)
        tl.store(lse_ptr + index, tl.where(l == 0.0, float("-inf"), m + tl.math.log2(l_safe)), mask=valid)
    else:
        lse, l_safe = softmax_end(m, l, sink, F)
        tl.store(lse_ptr + flat, lse, mask=valid)
        index = (b64 * SQ + r64) * HQ + h64  # out is [B, S, H, D] in memory
    store_parts(o_ptr, index, valid, DV, scale_parts(acc, 1.0 / l_safe, DV_PARTS), DV, DV_PARTS)
