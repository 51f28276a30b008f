"""The consumers of the fused backward for head dims above 128, whose dK and dV are too many columns for a warpgroup.

A program owns 64 keys. Of a step's 64 queries each of two warpgroups computes the scores of 32, and hands the weights
and the logits' gradients on through shared memory; then each sums its half of the columns of dK, dV and dQ.
"""

from ..portable.common import backward_weights
from .backward_tiles import ALL, DO_FREE, FREE, SUB, add_rows, clean_keys, only_seen, scores, store_rows, store_tiles
from .dropout import bits_by_key, drop_by_key
from .shim import (
    bar_arrive,
    bar_sync,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_reduce_add,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)

QUERIES = gl.constexpr(32)  # of a step, whose scores a warpgroup computes
DQ_COLS = gl.constexpr(64)  # of one product


@gluon.jit
def _dq_product(ds, k, zero, START: gl.constexpr):
    """64 columns of dQ / scale, as a product in flight."""
    return warpgroup_mma(ds.permute((1, 0)), k.slice(START, DQ_COLS, 1), zero, use_acc=False, is_async=True)


@gluon.jit
def _add_dq(dq_desc, dq_out, dq, batch, head, row, START: gl.constexpr):
    """Add 64 columns of dQ to global memory; the copy is on its way when this returns."""
    tma_store_wait(0)
    dq_out.store(dq)
    fence_async_shared()
    tma_reduce_add(dq_desc, [batch, head, row, START], dq_out.reshape((1, 1, SUB, DQ_COLS)))


@gluon.jit
def consume_wide(descs, pointers, smem, bars, where, numbers, CID: gl.constexpr, F: gl.constexpr,
                 T: gl.constexpr):  # fmt: skip
    dq_desc, dk_desc, dv_desc = descs
    seen_ptr, weight_ptr, slopes_ptr, seed_ptr, dw_ptr, dk_ptr, dv_ptr = pointers
    q_s, k_s, v_s, do_s, ds_s, p_s, dq_s, rows_s = smem
    kv_full, q_full, do_full = bars
    (items, done, batch, head_k, n0, group, first, met, begin, count, full_lo, full_hi, sequence, k_start,
     padded_start) = where  # fmt: skip
    (scale, softcap, keep_scale, sq, sk, window_left, window_right, threshold, off_b, off_h, off_m, off_n, dk_stride,
     dv_stride, d, d_v) = numbers  # fmt: skip
    STAGES: gl.constexpr = T.STAGES
    D: gl.constexpr = F.D
    DV: gl.constexpr = F.DV
    KEYS: gl.constexpr = F.BLOCK_N
    BLOCK_M: gl.constexpr = F.BLOCK_M
    COLS: gl.constexpr = D // 2
    COLS_V: gl.constexpr = DV // 2
    PASSES: gl.constexpr = COLS // DQ_COLS
    dtype: gl.constexpr = q_s.dtype
    st: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, QUERIES, 16])
    dk_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS, 16])
    dv_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLS_V, 16])
    dq_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DQ_COLS, 16])
    col = n0 + gl.arange(0, KEYS, layout=gl.SliceLayout(1, st))
    zero_s = gl.zeros((KEYS, QUERIES), gl.float32, st)
    zero_q = gl.zeros((SUB, DQ_COLS), gl.float32, dq_l)
    dk = gl.zeros((KEYS, COLS), gl.float32, dk_l)
    dv = gl.zeros((KEYS, COLS_V), gl.float32, dv_l)
    dq_out = dq_s.index(CID)
    mbarrier.wait(kv_full, items & 1)
    OWN: gl.constexpr = KEYS // 2
    clean_keys(k_s.index(0).slice(CID * OWN, OWN, 0), v_s.index(0).slice(CID * OWN, OWN, 0), n0 + CID * OWN, n0 + KEYS,
               seen_ptr, weight_ptr, sq, sk, window_left, True, F)  # fmt: skip
    seed = 0
    if F.HAS_DROPOUT:
        seed = gl.load(seed_ptr)
    dw = gl.zeros((KEYS,), gl.float32, gl.SliceLayout(1, st))
    if count > 0:
        mbarrier.wait(q_full.index(done % STAGES), (done // STAGES) & 1)
    s_next = scores(k_s.index(0), q_s.index(done % STAGES).slice(CID * QUERIES, QUERIES, 0), zero_s)
    s_next = warpgroup_mma_wait(0, deps=(s_next,))
    tile = begin % gl.maximum(met, 1)
    head = head_k * group + begin // gl.maximum(met, 1)
    for i in range(count):
        t = done + i
        stage = t % STAGES
        slot = t % 2
        m0 = (first + tile) * BLOCK_M
        dq_row = m0
        if F.VARLEN:
            dq_row = padded_start + m0
        z = i >> 30  # 0, but the compiler cannot know: it would keep dozens of shared-memory descriptors in registers
        k = k_s.index(z)
        q = q_s.index(stage)
        do = do_s.index(z)
        masked = (m0 < full_lo) | (m0 + BLOCK_M > full_hi)
        after = t + 1
        slope = 0.0
        if F.HAS_ALIBI:
            slope = gl.load(slopes_ptr + head).to(gl.float32)
        dropout = (0, 0, 0, 0, 0, 0)
        if F.HAS_DROPOUT:
            dropout = (seed, head + off_h, sequence + off_b, off_m, off_n, threshold)
        row0 = m0 + CID * QUERIES
        row = row0 + gl.arange(0, QUERIES, layout=gl.SliceLayout(0, st))
        mbarrier.wait(do_full.index(0), t & 1)
        dp = scores(v_s.index(z), do.slice(CID * QUERIES, QUERIES, 0), zero_s)
        rows = rows_s.index(stage)
        bits = bits_by_key(dropout, row0, n0, QUERIES, F)
        lse2 = rows.slice(CID * QUERIES, QUERIES, 0).load(gl.SliceLayout(0, st))
        p, cap_slope = backward_weights(
            s_next, lse2[None, :], row[None, :], col[:, None], True, scale, softcap, slope, weight_ptr, 0, 0,
            weight_ptr, sq, sk, F, False,
        )  # fmt: skip
        if masked:
            p = only_seen(p, col, row, rows, sq, sk, window_left, window_right, weight_ptr, CID * QUERIES, st, F)
        weights = p.to(dtype)
        if F.HAS_DROPOUT:
            weights = drop_by_key(weights, bits, dropout, row0, n0, QUERIES, st, True, F)
        p_s.index(slot).slice(CID * QUERIES, QUERIES, 1).store(weights.to(dtype))
        dp = warpgroup_mma_wait(0, deps=(dp,))
        delta = rows.slice(SUB + CID * QUERIES, QUERIES, 0).load(gl.SliceLayout(0, st))
        if F.HAS_DROPOUT:
            dp = drop_by_key(dp, bits, dropout, row0, n0, QUERIES, st, False, F) * keep_scale
        ds = p * (dp - delta[None, :])
        if F.WEIGHT_GRAD:
            dw += gl.sum(ds, 1)
        if F.HAS_SOFTCAP:
            ds = ds * cap_slope
        ds_s.index(slot).slice(CID * QUERIES, QUERIES, 1).store(ds.to(dtype))
        fence_async_shared()
        bar_sync(ALL, 256)
        dv = warpgroup_mma(p_s.index(slot), do.slice(CID * COLS_V, COLS_V, 1), dv, is_async=True)
        dk = warpgroup_mma(ds_s.index(slot), q.slice(CID * COLS, COLS, 1), dk, is_async=True)
        dq = _dq_product(ds_s.index(slot), k, zero_q, CID * COLS)
        if PASSES == 2:
            dq_more = _dq_product(ds_s.index(slot), k, zero_q, CID * COLS + DQ_COLS)
        if i + 1 < count:
            mbarrier.wait(q_full.index(after % STAGES), (after // STAGES) & 1)
        s_next = scores(k, q_s.index(after % STAGES).slice(CID * QUERIES, QUERIES, 0), zero_s)
        dv = warpgroup_mma_wait(PASSES + 2, deps=(dv,))
        bar_arrive(DO_FREE, 288)
        dk = warpgroup_mma_wait(PASSES + 1, deps=(dk,))
        bar_arrive(FREE + stage, 288)
        dq = warpgroup_mma_wait(PASSES, deps=(dq,))
        _add_dq(dq_desc, dq_out, dq, batch, head, dq_row, CID * COLS)
        if PASSES == 2:
            dq_more = warpgroup_mma_wait(1, deps=(dq_more,))
            _add_dq(dq_desc, dq_out, dq_more, batch, head, dq_row, CID * COLS + DQ_COLS)
        s_next = warpgroup_mma_wait(0, deps=(s_next,))
        tile += 1
        if tile == met:
            tile = 0
            head += 1
    tma_store_wait(0)
    if F.WEIGHT_GRAD:  # the other warpgroup has the other queries
        gl.atomic_add(dw_ptr + col, dw, mask=col < sk, sem="relaxed")
    if T.SPLIT:
        add_rows(dk_ptr + CID * COLS, dk_stride, dk, n0, sk, d - CID * COLS, dk_l)
        add_rows(dv_ptr + CID * COLS_V, dv_stride, dv, n0, sk, d_v - CID * COLS_V, dv_l)
    else:
        bar_sync(ALL, 256)  # nobody reads the keys any more: their memory takes dK and dV
        k_own = k_s.index(0).slice(CID * COLS, COLS, 1)
        v_own = v_s.index(0).slice(CID * COLS_V, COLS_V, 1)
        k_own.store((dk * scale).to(dtype))
        v_own.store((dv * keep_scale).to(dtype))
        fence_async_shared()
        bar_sync(ALL, 256)
        if F.VARLEN:
            if n0 + KEYS > sk:  # a bulk copy would not stop at the sequence's end
                store_rows(dk_ptr + CID * COLS, dk_stride, k_own, n0, sk, d - CID * COLS)
                store_rows(dv_ptr + CID * COLS_V, dv_stride, v_own, n0, sk, d_v - CID * COLS_V)
            else:
                store_tiles(dk_desc, dv_desc, [batch, head_k, k_start + n0, 0], k_s.index(0), v_s.index(0), CID)
        else:
            store_tiles(dk_desc, dv_desc, [batch, head_k, n0, 0], k_s.index(0), v_s.index(0), CID)
