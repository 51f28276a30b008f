"""FlashAttention backward (Dao 2023, algorithm 2) for sm_90 in Gluon: one pass over the scores, five products.

A work item is 128 keys of one KV head, 64 for each of two consumer warpgroups, and a walk over the queries of every
query head of its group. There is one program for each multiprocessor; its producer warp takes items from a counter,
says in a record in shared memory what they are, and feeds keys, values, q and dout through the tensor memory
accelerator. A warpgroup holds its scores transposed, [keys, queries], so that the weights go into dV and the logits'
gradients into dK straight from registers. dQ needs the keys of both warpgroups: they exchange their halves through
shared memory, and each computes half of dQ and adds it to float32 memory by one reducing copy.

The order of one step keeps the matrix unit busy: dP runs under exp2, dV under the logits' gradients, and the scores of
the next step under the writing of dQ.
"""

from ..portable.backward import _plan_queries
from ..portable.common import backward_weights, sequence_bounds
from .backward_rows import first_unit
from .backward_tiles import (
    ALL,
    DO_FREE,
    FREE,
    GIVEN,
    HALF,
    KEYS_FREE,
    SUB,
    add_rows,
    clean_keys,
    only_seen,
    scores,
    store_rows,
    store_tiles,
    tile_memory,
)
from .backward_wide import consume_wide
from .common import leave_counters, longest_first, pack_record, packed_tile, unpack_record
from .dropout import bits_by_key, drop_by_key
from .shim import (
    bar_arrive,
    bar_sync,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_reduce_add,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _item(t, tiles, parts, section, SQ, SK, max_q, max_k, sequences, HK, cu_q_ptr, cu_k_ptr, F: gl.constexpr,
          STACKED: gl.constexpr):  # fmt: skip
    """Work item t: batch, KV head, first key, its part of the queries, where its sequences start, and their lengths."""
    rest, behind = longest_first(t, tiles * section, section)
    part = rest % parts
    batch = rest // parts // HK
    head_k = rest // parts % HK
    tile = tiles - 1 - behind
    n0 = tile * F.BLOCK_N
    q_start = t * 0
    k_start = t * 0
    sq = SQ
    sk = SK
    if F.VARLEN:
        if STACKED:
            batch, n0 = packed_tile(tile, cu_k_ptr, sequences, SK, F.BLOCK_N)
        q_start, sq = sequence_bounds(cu_q_ptr, batch, SQ, max_q)
        k_start, sk = sequence_bounds(cu_k_ptr, batch, SK, max_k)
    return batch, head_k, n0, part, q_start, k_start, sq, sk


@gluon.jit
def _load_step(desc, clean_desc, where, clean_row, dirty, barrier, memory, stage, SUBS: gl.constexpr, F: gl.constexpr):
    """A step's rows of q or dout, unit by unit; the clean copy of a unit where some of them are of no use."""
    batch, head, row = where
    for j in gl.static_range(SUBS):
        at = [batch, head, row + j * SUB, 0]
        clean_at = [batch, head, clean_row + j * SUB, 0]
        to = memory.index(stage * SUBS + j).reshape((1, 1, SUB, memory.shape[2]))
        if F.SANITIZE:
            if dirty[j] != 0:
                tma_load(clean_desc, clean_at, barrier, to)
            else:
                tma_load(desc, at, barrier, to)
        else:
            tma_load(desc, at, barrier, to)


@gluon.jit
def _is_dirty(dirty_ptr, F: gl.constexpr):
    if F.SANITIZE:
        return gl.load(dirty_ptr)
    else:
        return 0


@gluon.jit
def _produce(F: gl.constexpr, T: gl.constexpr, descs, pointers, strides, smem, barriers, record_s, sizes, window):
    """The producer warp: takes items, and loads their keys once and the queries of every step as stages come free."""
    q_desc, k_desc, v_desc, do_desc, clean_q_desc, clean_do_desc = descs
    rows_ptr, dirty_ptr, plans_ptr, cu_q_ptr, cu_k_ptr, counter_ptr = pointers
    stride_tb, stride_th = strides
    q_s, k_s, v_s, do_s, rows_s = smem
    kv_full, q_full, do_full, item_full = barriers
    HQ, GROUP, SQ, SK, tiles, units, parts, section, max_q, max_k, sequences, total = sizes
    window_left, window_right = window
    STAGES: gl.constexpr = T.STAGES
    SUBS: gl.constexpr = T.SUBS
    D: gl.constexpr = F.D
    DV: gl.constexpr = F.DV
    ROWS: gl.constexpr = F.BLOCK_N
    BLOCK_M: gl.constexpr = F.BLOCK_M
    WIDTH: gl.constexpr = SUB * (4 if F.HAS_RANGES else 2)
    lane = gl.arange(0, WIDTH, layout=gl.BlockedLayout([4], [32], [1], [0]))
    t = gl.program_id(0)
    items = t * 0
    done = t * 0  # steps, over all items
    while t < total:
        coming = t * 0 - 1
        batch, head_k, n0, part, q_start, k_start, sq, sk = _item(
            t, tiles, parts, section, SQ, SK, max_q, max_k, sequences, HQ // GROUP, cu_q_ptr, cu_k_ptr, F, T.STACKED
        )
        if n0 < sk:
            start, full_start, full_tiles, _left, masked_tiles = _plan_queries(
                plans_ptr, batch.to(gl.int64), head_k * GROUP, stride_tb, stride_th, n0, sq, sk, window_left,
                window_right, F,
            )  # fmt: skip
            first = start // BLOCK_M
            met = full_tiles + masked_tiles
            begin = met * GROUP * part // parts
            count = met * GROUP * (part + 1) // parts - begin
            full_hi = full_start + full_tiles * BLOCK_M
            unit0 = batch * HQ * units
            tma_batch = batch
            if F.VARLEN:
                unit0 = first_unit(q_start, batch)
                tma_batch = batch * 0
            record = (batch, head_k, n0, first, met, begin, count, full_start, full_hi, q_start, k_start, sq, sk)
            if items > 0:
                bar_sync(KEYS_FREE, 288)
            record_s.store(pack_record(record))
            mbarrier.arrive(item_full, count=1)
            mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            tma_load(k_desc, [tma_batch, head_k, k_start + n0, 0], kv_full, k_s.index(0).reshape((1, 1, ROWS, D)))
            tma_load(v_desc, [tma_batch, head_k, k_start + n0, 0], kv_full, v_s.index(0).reshape((1, 1, ROWS, DV)))
            for i in range(count):
                stage = done % STAGES
                head = head_k * GROUP + (begin + i) // met
                m0 = (first + (begin + i) % met) * BLOCK_M
                unit = unit0 + head * units + m0 // SUB
                # asked for before the wait, which hides that they are far away
                rows = gl.load(rows_ptr + unit * WIDTH + lane)
                dirty = _is_dirty(dirty_ptr + unit, F)
                more_dirty = 0
                if SUBS == 2:
                    more_rows = gl.load(rows_ptr + (unit + 1) * WIDTH + lane)
                    more_dirty = _is_dirty(dirty_ptr + unit + 1, F)
                if i + 1 == count:  # no sooner: another program may be free before this one
                    coming = gl.atomic_add(counter_ptr, 1)
                if done >= STAGES:
                    bar_sync(FREE + stage, 288)
                do_stage = stage
                if T.WIDE:
                    do_stage = 0
                mbarrier.expect(q_full.index(stage), SUBS * q_desc.block_type.nbytes)
                where = (tma_batch, head, q_start + m0)
                clean_row = m0
                if F.VARLEN:
                    clean_row = unit0 * SUB + m0
                dirty_units = (dirty, more_dirty)
                barrier = q_full.index(stage)
                _load_step(q_desc, clean_q_desc, where, clean_row, dirty_units, barrier, q_s, stage, SUBS, F)
                rows_s.index(stage * SUBS).store(rows)
                if SUBS == 2:
                    rows_s.index(stage * SUBS + 1).store(more_rows)
                mbarrier.arrive(q_full.index(stage), count=1)
                if T.WIDE:  # noqa: SIM102 (a branch at run time inside one at compile time)
                    if done > 0:
                        bar_sync(DO_FREE, 288)
                mbarrier.expect(do_full.index(do_stage), SUBS * do_desc.block_type.nbytes)
                barrier = do_full.index(do_stage)
                _load_step(do_desc, clean_do_desc, where, clean_row, dirty_units, barrier, do_s, do_stage, SUBS, F)
                done += 1
            items += 1
        if coming < 0:
            coming = gl.atomic_add(counter_ptr, 1)
        t = coming + gl.num_programs(0)
    if items > 0:
        bar_sync(KEYS_FREE, 288)
    record_s.store(pack_record((-1,)))
    mbarrier.arrive(item_full, count=1)
    for stage in range(gl.minimum(done, STAGES)):  # leave no barrier half full
        bar_sync(FREE + stage, 288)
    if T.WIDE:  # noqa: SIM102
        if done > 0:
            bar_sync(DO_FREE, 288)
    leave_counters(counter_ptr)


@gluon.jit
def _dq_product(ds_s, k_s, slot, z, zero, CID: gl.constexpr, T: gl.constexpr):
    """This warpgroup's part of dQ / scale, as a product in flight: 64 of 128 rows, or half the head dim of 64 rows."""
    COLUMNS: gl.constexpr = zero.shape[1]
    if T.SUBS == 2:
        return warpgroup_mma(
            ds_s.index(slot * 2 + CID).permute((1, 0)), k_s.index(z), zero, use_acc=False, is_async=True
        )
    else:
        k_part = k_s.index(z).slice(CID * COLUMNS, COLUMNS, 1)
        return warpgroup_mma(ds_s.index(slot).permute((1, 0)), k_part, zero, use_acc=False, is_async=True)


@gluon.jit
def _add_dq(dq_desc, dq_out, dq, batch, head, m0, CID: gl.constexpr, T: gl.constexpr):
    """Add a part of dQ to global memory; the copy is on its way when this returns."""
    COLUMNS: gl.constexpr = dq.shape[1]
    tma_store_wait(0)
    dq_out.store(dq)
    fence_async_shared()
    if T.SUBS == 2:
        tma_reduce_add(dq_desc, [batch, head, m0 + CID * SUB, 0], dq_out.reshape((1, 1, SUB, COLUMNS)))
    else:
        tma_reduce_add(dq_desc, [batch, head, m0, CID * COLUMNS], dq_out.reshape((1, 1, SUB, COLUMNS)))


@gluon.jit
def consume_keys(descs, pointers, smem, bars, where, numbers, CID: gl.constexpr, F: gl.constexpr,
                 T: gl.constexpr):  # fmt: skip
    """A consumer warpgroup's 64 keys of one item, ``items`` items and ``done`` steps after the program's start."""
    dq_desc, dk_desc, dv_desc = descs
    seen_ptr, weight_ptr, slopes_ptr, seed_ptr, dw_ptr, dk_ptr, dv_ptr = pointers
    q_s, k_s, v_s, do_s, ds_s, _, dq_s, rows_s = smem
    kv_full, q_full, do_full = bars
    (items, done, batch, head_k, n0, group, first, met, begin, count, full_lo, full_hi, sequence, k_start,
     padded_start) = where  # fmt: skip
    (scale, softcap, keep_scale, sq, sk, window_left, window_right, threshold, off_b, off_h, off_m, off_n, dk_stride,
     dv_stride, d, d_v) = numbers  # fmt: skip
    STAGES: gl.constexpr = T.STAGES
    SUBS: gl.constexpr = T.SUBS
    D: gl.constexpr = F.D
    DV: gl.constexpr = F.DV
    ROWS: gl.constexpr = F.BLOCK_N
    BLOCK_M: gl.constexpr = F.BLOCK_M
    DQ_COLS: gl.constexpr = D if SUBS == 2 else D // 2
    dtype: gl.constexpr = q_s.dtype
    st: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, SUB, 16])
    dk_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    dv_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DV, 16])
    dq_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, DQ_COLS, 16])
    as_k: gl.constexpr = gl.DotOperandLayout(0, dk_l, 2)
    as_v: gl.constexpr = gl.DotOperandLayout(0, dv_l, 2)
    as_s: gl.constexpr = gl.DotOperandLayout(0, st, 2)
    col = n0 + CID * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, st))
    zero_s = gl.zeros((HALF, SUB), gl.float32, st)
    zero_q = gl.zeros((SUB, DQ_COLS), gl.float32, dq_l)
    dk = gl.zeros((HALF, D), gl.float32, dk_l)
    dv = gl.zeros((HALF, DV), gl.float32, dv_l)
    dq_out = dq_s.index(CID)
    mbarrier.wait(kv_full, items & 1)
    k_own = k_s.index(0).slice(CID * HALF, HALF, 0)
    v_own = v_s.index(0).slice(CID * HALF, HALF, 0)
    clean_keys(k_own, v_own, n0 + CID * HALF, n0 + ROWS, seen_ptr, weight_ptr, sq, sk, window_left, False, F)
    seed = 0
    if F.HAS_DROPOUT:
        seed = gl.load(seed_ptr)
    dw = gl.zeros((HALF,), gl.float32, gl.SliceLayout(1, st))
    if count > 0:
        mbarrier.wait(q_full.index(done % STAGES), (done // STAGES) & 1)
    if T.K_REGS:
        k_regs = k_own.load(as_s)
        s_next = scores(k_regs, q_s.index(done % STAGES * SUBS), zero_s)
    else:
        s_next = scores(k_own, q_s.index(done % STAGES * SUBS), zero_s)
    s_next = warpgroup_mma_wait(0, deps=(s_next,))
    tile = begin % gl.maximum(met, 1)
    head = head_k * group + begin // gl.maximum(met, 1)
    for i in range(count):
        t = done + i
        stage = t % STAGES
        phase = (t // STAGES) & 1
        m0 = (first + tile) * BLOCK_M
        dq_row = m0
        if F.VARLEN:
            dq_row = padded_start + m0
        z = i >> 30  # 0, but the compiler cannot know: it would keep dozens of shared-memory descriptors in registers
        if T.K_REGS:
            k_op = k_regs
        else:
            k_op = k_s.index(z).slice(CID * HALF, HALF, 0)
        v_op = v_s.index(z).slice(CID * HALF, HALF, 0)
        masked = (m0 < full_lo) | (m0 + BLOCK_M > full_hi)
        ds_slot = t % 2 * SUBS
        after = t + 1
        slope = 0.0
        if F.HAS_ALIBI:
            slope = gl.load(slopes_ptr + head).to(gl.float32)
        dropout = (0, 0, 0, 0, 0, 0)
        if F.HAS_DROPOUT:
            dropout = (seed, head + off_h, sequence + off_b, off_m, off_n, threshold)
        for j in gl.static_range(SUBS):
            q_j = q_s.index(stage * SUBS + j)
            do_j = do_s.index(stage * SUBS + j)
            row = m0 + j * SUB + gl.arange(0, SUB, layout=gl.SliceLayout(0, st))
            if j == 0:
                mbarrier.wait(do_full.index(stage), phase)
            dp = scores(v_op, do_j, zero_s)
            rows = rows_s.index(stage * SUBS + j)
            bits = bits_by_key(dropout, m0 + j * SUB, n0 + CID * HALF, SUB, F)
            lse2 = rows.slice(0, SUB, 0).load(gl.SliceLayout(0, st))
            if j == 0:
                s = s_next
            else:
                s = warpgroup_mma_wait(2, deps=(s_next,))
            p, cap_slope = backward_weights(
                s, lse2[None, :], row[None, :], col[:, None], True, scale, softcap, slope, weight_ptr, 0, 0, weight_ptr,
                sq, sk, F, False,
            )  # fmt: skip
            if masked:
                p = only_seen(p, col, row, rows, sq, sk, window_left, window_right, weight_ptr, 0, st, F)
            weights = p.to(dtype)
            if F.HAS_DROPOUT:
                weights = drop_by_key(weights, bits, dropout, m0 + j * SUB, n0 + CID * HALF, SUB, st, True, F)
            dv_t = warpgroup_mma(gl.convert_layout(weights.to(dtype), as_v), do_j, dv, is_async=True)
            if j + 1 < SUBS:
                s_next = scores(k_op, q_s.index(stage * SUBS + j + 1), zero_s)
            dp = warpgroup_mma_wait(2 if j + 1 < SUBS else 1, deps=(dp,))
            delta = rows.slice(SUB, SUB, 0).load(gl.SliceLayout(0, st))
            if F.HAS_DROPOUT:
                dp = drop_by_key(dp, bits, dropout, m0 + j * SUB, n0 + CID * HALF, SUB, st, False, F) * keep_scale
            ds = p * (dp - delta[None, :])
            if F.WEIGHT_GRAD:
                dw += gl.sum(ds, 1)
            if F.HAS_SOFTCAP:
                ds = ds * cap_slope
            ds16 = ds.to(dtype)
            dk_t = warpgroup_mma(gl.convert_layout(ds16, as_k), q_j, dk, is_async=True)
            ds_s.index(ds_slot + j).slice(CID * HALF, HALF, 0).store(ds16)
            if j + 1 < SUBS:
                dv = dv_t
                dk = dk_t
        fence_async_shared()
        # each warpgroup needs both halves; ptxas serialises every product of a loop that carries one over its end
        if T.AHEAD:
            bar_arrive(GIVEN + t % 2 * 2 + CID, 256)
            dv = warpgroup_mma_wait(1, deps=(dv_t,))  # frees its operand's registers
            if i + 1 < count:
                mbarrier.wait(q_full.index(after % STAGES), (after // STAGES) & 1)
            s_next = scores(k_op, q_s.index(after % STAGES * SUBS), zero_s)
            bar_sync(GIVEN + t % 2 * 2 + 1 - CID, 256)
            dq_t = _dq_product(ds_s, k_s, t % 2, z, zero_q, CID, T)
            dk, s_next, dq = warpgroup_mma_wait(0, deps=(dk_t, s_next, dq_t))
            bar_arrive(FREE + stage, 288)
            _add_dq(dq_desc, dq_out, dq, batch, head, dq_row, CID, T)
        else:
            bar_sync(ALL, 256)
            dq_t = _dq_product(ds_s, k_s, t % 2, z, zero_q, CID, T)
            dk, dv = warpgroup_mma_wait(1, deps=(dk_t, dv_t))  # frees their operands' registers
            if i + 1 < count:
                mbarrier.wait(q_full.index(after % STAGES), (after // STAGES) & 1)
            s_next = scores(k_op, q_s.index(after % STAGES * SUBS), zero_s)
            dq = warpgroup_mma_wait(1, deps=(dq_t,))
            bar_arrive(FREE + stage, 288)
            _add_dq(dq_desc, dq_out, dq, batch, head, dq_row, CID, T)
            s_next = warpgroup_mma_wait(0, deps=(s_next,))
        tile += 1
        if tile == met:
            tile = 0
            head += 1
    tma_store_wait(0)
    if F.WEIGHT_GRAD:
        if T.SPLIT:
            gl.atomic_add(dw_ptr + col, dw, mask=col < sk, sem="relaxed")
        else:
            gl.store(dw_ptr + col, dw, mask=col < sk)
    if T.SPLIT:
        add_rows(dk_ptr, dk_stride, dk, n0 + CID * HALF, sk, d, dk_l)
        add_rows(dv_ptr, dv_stride, dv, n0 + CID * HALF, sk, d_v, dv_l)
    else:
        bar_sync(ALL, 256)  # nobody reads the keys any more: their memory takes dK and dV
        k_own.store((dk * scale).to(dtype))
        v_own.store((dv * keep_scale).to(dtype))
        fence_async_shared()
        bar_sync(ALL, 256)
        k_tile = k_s.index(0)
        v_tile = v_s.index(0)
        if F.VARLEN:
            if n0 + ROWS > sk:  # a bulk copy would not stop at the sequence's end
                store_rows(dk_ptr, dk_stride, k_own, n0 + CID * HALF, sk, d)
                store_rows(dv_ptr, dv_stride, v_own, n0 + CID * HALF, sk, d_v)
            else:
                store_tiles(dk_desc, dv_desc, [batch, head_k, k_start + n0, 0], k_tile, v_tile, CID)
        else:
            store_tiles(dk_desc, dv_desc, [batch, head_k, n0, 0], k_tile, v_tile, CID)


@gluon.jit
def _consume(CID: gl.constexpr, F: gl.constexpr, T: gl.constexpr, descs, pointers, strides, smem, barriers, record_s,
             sizes, numbers):  # fmt: skip
    """A consumer warpgroup: its part of every item."""
    seen_ptr, weight_ptr, slopes_ptr, seed_ptr, dw_ptr, dk_ptr, dv_ptr = pointers
    stride_sb, stride_sh, stride_wb, stride_wh, stride_ab = strides
    kv_full, q_full, do_full, item_full = barriers
    HQ, GROUP, SQ, SK, D_K, D_V = sizes
    scale, softcap, keep_scale, window_left, window_right, threshold, off_b, off_h, off_m, off_n = numbers
    HK = HQ // GROUP
    mbarrier.wait(item_full, 0)
    record = unpack_record(record_s, 13)
    items = record[0] * 0
    done = record[0] * 0
    while record[0] >= 0:
        batch, head_k, n0, first, met, begin, count, full_lo, full_hi, q_start, k_start, sq, sk = record
        if not F.VARLEN:
            sq = SQ
            sk = SK
        b64 = batch.to(gl.int64)
        tma_batch = batch
        padded_start = 0
        if F.VARLEN:
            tma_batch = batch * 0
            padded_start = first_unit(q_start, batch) * SUB
            keys_start = k_start.to(gl.int64)
            weights_at = keys_start
            dw_at = head_k.to(gl.int64) * SK + keys_start
        else:
            keys_start = b64 * SK
            weights_at = b64 * stride_wb
            dw_at = (b64 * HK + head_k) * SK
        own = (
            seen_ptr + b64 * stride_sb + (head_k * GROUP).to(gl.int64) * stride_sh,
            weight_ptr + weights_at + head_k.to(gl.int64) * stride_wh,
            slopes_ptr + b64 * stride_ab,
            seed_ptr,
            dw_ptr + dw_at,
            dk_ptr + (keys_start * HK + head_k) * D_K,
            dv_ptr + (keys_start * HK + head_k) * D_V,
        )
        where = (items, done, tma_batch, head_k, n0, GROUP, first, met, begin, count, full_lo, full_hi, batch, k_start,
                 padded_start)  # fmt: skip
        call = (scale, softcap, keep_scale, sq, sk, window_left, window_right, threshold, off_b, off_h, off_m, off_n,
                HK * D_K, HK * D_V, D_K, D_V)  # fmt: skip
        if T.WIDE:
            consume_wide(descs, own, smem, (kv_full, q_full, do_full), where, call, CID, F, T)
        else:
            consume_keys(descs, own, smem, (kv_full, q_full, do_full), where, call, CID, F, T)
        bar_arrive(KEYS_FREE, 288)
        items += 1
        done += count
        mbarrier.wait(item_full, items & 1)
        record = unpack_record(record_s, 13)


_RUNTIME_INTS = [
    "HQ", "GROUP", "SQ", "SK", "tiles", "units", "window_left", "window_right", "threshold", "off_b", "off_h", "off_m",
    "off_n", "section", "stride_sb", "stride_sh", "stride_tb", "stride_th", "stride_wb", "stride_wh", "stride_ab",
    "parts", "D_K", "D_V", "max_q", "max_k", "sequences", "total",
]  # fmt: skip


@gluon.jit(do_not_specialize=_RUNTIME_INTS)
def attn_bwd_hopper_kernel(q_desc, k_desc, v_desc, do_desc, clean_q_desc, clean_do_desc, dq_desc, dk_desc, dv_desc,
                           rows_ptr, dirty_ptr, seen_ptr, weight_ptr, slopes_ptr, seed_ptr, plans_ptr, dw_ptr,
                           dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, counter_ptr,
                           stride_sb, stride_sh, stride_tb, stride_th, stride_wb, stride_wh, stride_ab,
                           scale, softcap, keep_scale, HQ, GROUP, SQ, SK, tiles, units, window_left, window_right,
                           threshold, off_b, off_h, off_m, off_n, parts, section, D_K, D_V, max_q, max_k, sequences,
                           total, F: gl.constexpr, T: gl.constexpr):  # fmt: skip
    """dK, dV of 128 keys and their share of dQ / scale, added into float32. ``total`` = tiles * parts * HKV * B items.

    Any grid up to that. For ``section`` see ``longest_first``: where causal, the first keys meet the most queries.
    ``counter_ptr`` points at two zeros, and leaves zeros.

    ``rows_ptr`` and ``dirty_ptr`` [B, HQ, units] and ``seen_ptr`` come from backward_rows.py. For VARLEN, SQ and SK are
    the packed totals of so many ``sequences``, and rows, clean copies and dQ's sums lie in units of their own (see
    there); for T.STACKED, the tiles of all sequences lie behind each other, and ``total`` = tiles * parts * HKV.
    """
    D: gl.constexpr = F.D
    DV: gl.constexpr = F.DV
    BLOCK_N: gl.constexpr = F.BLOCK_N
    SUBS: gl.constexpr = T.SUBS
    STAGES: gl.constexpr = T.STAGES
    REGS: gl.constexpr = T.REGS
    dtype: gl.constexpr = q_desc.dtype
    DO_STAGES: gl.constexpr = 1 if T.WIDE else STAGES
    DQ_COLS: gl.constexpr = 64 if T.WIDE else (D if SUBS == 2 else D // 2)
    q_s = tile_memory(STAGES * SUBS, SUB, D, dtype)
    k_s = tile_memory(1, BLOCK_N, D, dtype)
    v_s = tile_memory(1, BLOCK_N, DV, dtype)
    do_s = tile_memory(DO_STAGES * SUBS, SUB, DV, dtype)
    dq_s = tile_memory(2, SUB, DQ_COLS, gl.float32)
    WIDTH: gl.constexpr = SUB * (4 if F.HAS_RANGES else 2)
    rows_s = gl.allocate_shared_memory(gl.float32, [STAGES * SUBS, WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if T.WIDE:  # written in parts of 32 columns
        PARTS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, 32], dtype)
        ds_s = gl.allocate_shared_memory(dtype, [2, BLOCK_N, SUB], PARTS)
        p_s = gl.allocate_shared_memory(dtype, [2, BLOCK_N, SUB], PARTS)
    else:
        ds_s = tile_memory(2 * SUBS, BLOCK_N, SUB, dtype)
        p_s = ds_s  # stands in: weights stay in registers
    smem = (q_s, k_s, v_s, do_s, ds_s, p_s, dq_s, rows_s)
    record_s = gl.allocate_shared_memory(gl.int32, [16], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    item_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    mbarrier.init(item_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
    fence_async_shared()

    loads = (q_desc, k_desc, v_desc, do_desc, q_desc, do_desc)
    if F.SANITIZE:
        loads = (q_desc, k_desc, v_desc, do_desc, clean_q_desc, clean_do_desc)
    barriers = (kv_full, q_full, do_full, item_full)
    produced = (loads, (rows_ptr, dirty_ptr, plans_ptr, cu_q_ptr, cu_k_ptr, counter_ptr), (stride_tb, stride_th),
                (q_s, k_s, v_s, do_s, rows_s), barriers, record_s,
                (HQ, GROUP, SQ, SK, tiles, units, parts, section, max_q, max_k, sequences, total),
                (window_left, window_right))  # fmt: skip
    numbers = (scale, softcap, keep_scale, window_left, window_right, threshold, off_b, off_h, off_m, off_n)
    consumed = ((dq_desc, dk_desc, dv_desc),
                (seen_ptr, weight_ptr, slopes_ptr, seed_ptr, dw_ptr, dk_ptr, dv_ptr),
                (stride_sb, stride_sh, stride_wb, stride_wh, stride_ab), smem, barriers, record_s,
                (HQ, GROUP, SQ, SK, D_K, D_V), numbers)  # fmt: skip
    gl.warp_specialize(
        [(_consume, (0, F, T) + consumed), (_consume, (1, F, T) + consumed), (_produce, (F, T) + produced)],
        [4, 1],
        [REGS, 24],
    )
