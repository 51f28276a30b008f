"""FlashAttention-3's forward (Shah et al. 2024) in Gluon, for sm_90.

A work item is 64 query rows of one head for each consumer warpgroup, and a walk over the keys that some of them may
see, masked tiles first. There is one program for each multiprocessor; its scheduling warp takes items from a counter
and says in a record in shared memory what they are, and its producer warp feeds Q, K and V through the tensor memory
accelerator, already those of the next item while the consumers finish this one. A consumer keeps the Q K^T of the next
tile on the matrix unit while it computes the softmax of this one, and the warpgroups take turns at the matrix unit, so
that one computes products while another computes exponentials.
"""

from ..portable.common import (
    LN2,
    LOG2E,
    capped,
    head_terms,
    key_in_use,
    plan_tiles,
    row_ranges,
    sequence_bounds,
    tile_logits,
)
from .common import (
    exponentials,
    halves,
    hide,
    leave_counters,
    longest_first,
    new_maximum,
    pack_record,
    packed_tile,
    tile_hull,
    tile_start,
    unpack_record,
)
from .dropout import bits_by_row, drop_by_row
from .shim import (
    bar_arrive,
    bar_sync,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
    tma_store,
    tma_store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)

CLEANED_ROWS = gl.constexpr(32)
# named barriers: stage s of K or V is free (up to 3 stages), warpgroup g's turn at the matrix unit, and slot s of the
# queries is free, 8 apart
K_FREE, V_FREE, TURN, Q_FREE = gl.constexpr(4), gl.constexpr(8), gl.constexpr(12), gl.constexpr(7)


@gluon.jit
def _item(t, HQ, SQ, SK, max_q, sequences, work, section, cu_q_ptr, cu_k_ptr, F: gl.constexpr,
          STACKED: gl.constexpr):  # fmt: skip
    """Work item t: batch, head, first row, where its sequences start, and their lengths. Longest rows first."""
    bh, behind = longest_first(t, work, section)
    batch = bh // HQ
    head = bh % HQ
    row_start = behind * F.BLOCK_M
    if F.VARLEN:
        if STACKED:
            batch, row_start = packed_tile(behind, cu_q_ptr, sequences, SQ, F.BLOCK_M)
        q_start, sq = sequence_bounds(cu_q_ptr, batch, SQ, max_q)
        k_start, sk = sequence_bounds(cu_k_ptr, batch, SK, SK)
    else:
        q_start = t * 0
        k_start = t * 0
        sq = SQ
        sk = SK
    return batch, head, row_start, q_start, k_start, sq, sk


@gluon.jit
def _lane_weights(weight_ptr, n0, sk, F: gl.constexpr):
    """key_log_weight of a tile's keys in base 2 [BLOCK_N], for one warp."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([F.BLOCK_N // 32], [32], [1], [0])
    col = n0 + gl.arange(0, F.BLOCK_N, layout=LAYOUT)
    return gl.load(weight_ptr + col, mask=col < sk, other=0.0).to(gl.float32) * LOG2E


@gluon.jit
def _stage_weights(weights_s, slot, weight):
    """A tile's weights, and whether one of them is -inf, for the consumers. There is a slot more than stages of K:

    when a stage of K is free, everybody is done with the softmax of the tile before the one that was in it.
    """
    values_s, removed_s = weights_s
    values_s.index(slot).store(weight)
    one = gl.zeros([1], gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    removed_s.index(slot).store(one + (gl.min(weight, 0) == float("-inf")).to(gl.int32))


@gluon.jit
def _staged_weights(weights_s, count, LAYOUT: gl.constexpr, F: gl.constexpr, C: gl.constexpr):
    """What ``_stage_weights`` staged for the tile that is ``count`` over all items; nothing without weights."""
    if F.HAS_WEIGHT:
        values_s, removed_s = weights_s
        slot = count % (C.STAGES + 1)
        removed = gl.sum(removed_s.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        return values_s.index(slot).load(LAYOUT), removed != 0
    else:
        return 0.0, False


@gluon.jit
def _schedule(F: gl.constexpr, C: gl.constexpr, barriers, record_s, pointers, strides, sizes, window, total):
    """The scheduling warp: takes an item when the producer loads the last keys of the one before, and describes it.

    No sooner: another program may be free before this one. By a warp of its own, because the producer would leave
    stages empty while it waits for the counter, the bounds of sequences and key_ranges.
    """
    item_full, item_empty, wanted = barriers
    ranges_ptr, cu_q_ptr, cu_k_ptr, counter_ptr = pointers
    stride_rb, stride_rh, stride_rm = strides
    HQ, SQ, SK, max_q, sequences, work, section = sizes
    window_left, window_right = window
    EARLY: gl.constexpr = F.VARLEN and not C.STACKED  # the next one may be empty, and the one after it
    t = gl.program_id(0)
    items = t * 0
    while t < total:
        if EARLY:
            coming = gl.atomic_add(counter_ptr, 1)
        batch, head, row_start, q_start, k_start, sq, sk = _item(
            t, HQ, SQ, SK, max_q, sequences, work, section, cu_q_ptr, cu_k_ptr, F, C.STACKED
        )
        if row_start < sq:
            ranges = ranges_ptr + head.to(gl.int64) * stride_rh
            if F.VARLEN:
                ranges += q_start.to(gl.int64) * stride_rm
            else:
                ranges += batch.to(gl.int64) * stride_rb
            first, last, full_lo, full_hi, gaps = tile_hull(
                ranges, stride_rm, row_start, sq, sk, window_left, window_right, F.BLOCK_M, F
            )
            start, full_start, full_tiles, left, masked = plan_tiles(first, last, full_lo, full_hi, F.BLOCK_N, False)
            masked = gl.where(masked + full_tiles == 0, 1, masked)  # nothing to see: one tile, all of it hidden
            plan = (start, full_start, full_tiles, left, masked)
            mbarrier.wait(item_empty, (items & 1) ^ 1)
            record_s.store(pack_record((batch, head, row_start, q_start, k_start, sq, sk, first, last, gaps) + plan))
            mbarrier.arrive(item_full, count=1)
            mbarrier.wait(wanted, items & 1)
            items += 1
        if not EARLY:
            coming = gl.atomic_add(counter_ptr, 1)
        t = coming + gl.num_programs(0)
    mbarrier.wait(item_empty, (items & 1) ^ 1)
    record_s.store(pack_record((-1,)))
    mbarrier.arrive(item_full, count=1)
    leave_counters(counter_ptr)


@gluon.jit
def _next_item(items, item_full, item_empty, record_s, WARPS: gl.constexpr):
    """The record of item number ``items`` of this program; it begins with -1 where there is none."""
    mbarrier.wait(item_full, items & 1)
    record = unpack_record(record_s, 15, WARPS)
    mbarrier.arrive(item_empty, count=1)
    return record


@gluon.jit
def _produce(F: gl.constexpr, C: gl.constexpr, descs, memory, weights_s, barriers, record_s, weight_ptr, strides,
             GROUP, SK):  # fmt: skip
    """The producer warp: loads the queries of an item once, and K and V of every tile as stages come free."""
    gl.static_assert(C.STAGES <= 3, "named barriers are for up to 3 stages")
    GROUPS: gl.constexpr = C.GROUPS
    STAGES: gl.constexpr = C.STAGES
    SLOTS: gl.constexpr = C.Q_SLOTS
    BLOCK_N: gl.constexpr = F.BLOCK_N
    # packed items may be short, and empty ones are passed over; bounds in memory: 5 % faster at 128, 3 % slower at 64
    AHEAD: gl.constexpr = 4 if F.VARLEN or (F.HAS_RANGES and C.D > 64) else 1
    q_desc, k_desc, v_desc = descs
    q_s, k_s, v_s = memory
    q_full, k_full, v_full, item_full, item_empty, wanted = barriers
    stride_wb, stride_wh = strides
    record = _next_item(0, item_full, item_empty, record_s, 1)
    items = record[0] * 0
    count = record[0] * 0
    values = record[0] * 0
    while record[0] >= 0:
        batch, head, row_start, q_start, k_start, _sq, sk = record[:7]
        start, full_start, full_tiles, left, masked = record[10:]
        plan = (start, full_start, full_tiles, left, masked)
        head_k = head // GROUP
        weights = weight_ptr + head_k.to(gl.int64) * stride_wh
        if F.VARLEN:
            weights += k_start
            tma_batch = batch * 0
        else:
            weights += batch.to(gl.int64) * stride_wb
            tma_batch = batch
            sk = SK
        slot = items & (SLOTS - 1)
        if items >= SLOTS:
            bar_sync(Q_FREE + slot * 8, GROUPS * 128 + 32)
        mbarrier.expect(q_full.index(slot), GROUPS * q_desc.block_type.nbytes)
        for g in gl.static_range(GROUPS):
            at = [tma_batch, head, q_start + row_start + g * 64, 0]
            tma_load(q_desc, at, q_full.index(slot), q_s.index(slot * GROUPS + g))
        for i in range(masked + full_tiles + 1):  # V a tile behind K, as they are used
            if i < masked + full_tiles:
                stage = count % STAGES
                n0 = k_start + tile_start(i, plan, BLOCK_N)
                if F.HAS_WEIGHT:
                    weight = _lane_weights(weights, n0 - k_start, sk, F)
                if count >= STAGES:
                    bar_sync(K_FREE + stage, GROUPS * 128 + 32)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma_load(k_desc, [tma_batch, head_k, n0, 0], k_full.index(stage), k_s.index(stage))
                if F.HAS_WEIGHT:
                    _stage_weights(weights_s, count % (STAGES + 1), weight)
                    mbarrier.arrive(k_full.index(stage), count=1)
                if i == gl.maximum(masked + full_tiles - AHEAD, 0):
                    mbarrier.arrive(wanted, count=1)
                count += 1
            if i > 0:
                stage = values % STAGES
                n0 = k_start + tile_start(i - 1, plan, BLOCK_N)
                if values >= STAGES:
                    bar_sync(V_FREE + stage, GROUPS * 128 + 32)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                tma_load(v_desc, [tma_batch, head_k, n0, 0], v_full.index(stage), v_s.index(stage))
                values += 1
        items += 1
        record = _next_item(items, item_full, item_empty, record_s, 1)
    for slot in range(gl.minimum(items, SLOTS)):  # leave no barrier half full
        bar_sync(Q_FREE + slot * 8, GROUPS * 128 + 32)
    for stage in range(gl.minimum(count, STAGES)):
        bar_sync(K_FREE + stage, GROUPS * 128 + 32)
        bar_sync(V_FREE + stage, GROUPS * 128 + 32)


@gluon.jit
def _needs_cleaning(n0, i, plan, seen, removed, sk, WIDTH: gl.constexpr, F: gl.constexpr):
    """May keys n0 to n0 + WIDTH of tile i hold values that no row sees, and that are not zeros past the end?"""
    gaps, first, last = seen
    beyond = n0 + WIDTH > last
    if not F.VARLEN:
        beyond = beyond & (last < sk)
    dirty = (i < plan[4]) & ((gaps != 0) | (n0 < first) | beyond)
    if F.HAS_WEIGHT:
        dirty = dirty | removed
    return dirty


@gluon.jit
def _clean_values(v, n0, i, plan, seen, removed, q_row0, rules, weight_ptr, F: gl.constexpr, C: gl.constexpr):
    """Zeros in place of values that no row of the tile sees: they may hold NaN, and 0 * NaN is NaN."""
    ROWS: gl.constexpr = CLEANED_ROWS
    BLOCK_N: gl.constexpr = F.BLOCK_N
    LANES: gl.constexpr = C.DV // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    ranges_ptr, stride_rm, sq, sk, window_left, window_right = rules
    gaps, first, last = seen
    for at in gl.static_range(0, BLOCK_N, ROWS):
        if _needs_cleaning(n0 + at, i, plan, seen, removed, sk, ROWS, F):
            col = n0 + at + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
            use = (col >= first) & (col < last)
            if F.HAS_WEIGHT:
                use = use & key_in_use(weight_ptr, col, sk, F)
            if F.HAS_RANGES:  # noqa: SIM102 (a branch at run time inside one at compile time)
                if gaps != 0:
                    shown = col < 0
                    for one in range(q_row0, gl.minimum(q_row0 + C.GROUPS * 64, sq)):
                        lo, hi = row_ranges(ranges_ptr, stride_rm, one, sq, sk, window_left, window_right, F)
                        shown = shown | ((col >= lo) & (col < hi))
                    use = use & shown
            part = v.slice(at, ROWS, 0)
            part.store(gl.where(use[:, None], part.load(LAYOUT), 0.0))


@gluon.jit
def _wait_for_values(v_s, v_full, cleaned, phases, count, i, plan, seen, removed, q_row0, rules, weight_ptr,
                     GROUP: gl.constexpr, F: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """The values of tile i, ready to be multiplied. ``phases`` has one bit for the ``cleaned`` barrier of each stage.

    One barrier for all stages would not do: the first warpgroup may be two cleaned tiles ahead of another.
    """
    STAGES: gl.constexpr = C.STAGES
    BLOCK_N: gl.constexpr = F.BLOCK_N
    sk = rules[3]
    stage = count % STAGES
    mbarrier.wait(v_full.index(stage), (count // STAGES) & 1)
    if F.SANITIZE:
        n0 = tile_start(i, plan, BLOCK_N)
        if _needs_cleaning(n0, i, plan, seen, removed, sk, BLOCK_N, F):
            if GROUP == 0:
                v = v_s.index(stage).reshape([BLOCK_N, C.DV])
                _clean_values(v, n0, i, plan, seen, removed, q_row0, rules, weight_ptr, F, C)
                fence_async_shared()
                mbarrier.arrive(cleaned.index(stage), count=1)
            mbarrier.wait(cleaned.index(stage), (phases >> stage) & 1)
            phases = phases ^ (1 << stage)
    return phases


@gluon.jit
def _tile_maximum(s, m, n0, masked, lo, hi, row, weight, removed, terms, rules, LAYOUT: gl.constexpr, F: gl.constexpr,
                  C: gl.constexpr):  # fmt: skip
    """From a tile of q.k to logits, visibility, and the rows' maxima: see ``new_maximum``."""
    LOGITS: gl.constexpr = C.LOGITS
    FOLD: gl.constexpr = F.PLAIN or C.CAPPED
    scale, softcap, slope = terms
    _, _, sq, sk, _, _ = rules
    col = n0 + gl.arange(0, F.BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    scale_log2 = scale * LOG2E
    if C.CAPPED:
        s = capped(s * (scale / softcap), F)
        scale_log2 = softcap * LOG2E
    elif not F.PLAIN:
        s, _ = tile_logits(s, row[:, None], col[None, :], scale, softcap, slope, None, 0, 0, None, sq, sk, LOGITS)
    edge = masked
    if F.HAS_WEIGHT:
        s = s + weight[None, :]
        edge = masked | removed  # two branches would become one path of selects, for every tile
    if edge:
        s = hide(s, lo, hi, col, F)
        if F.HAS_WEIGHT:  # a removed key may hold NaN, and NaN - inf is NaN
            s = gl.where((weight == float("-inf"))[None, :], float("-inf"), s)
    m, safe, alpha = new_maximum(s, m, scale_log2, FOLD)
    return s, m, safe, alpha


@gluon.jit
def _exponentials(s, safe, terms, SUMS: gl.constexpr, F: gl.constexpr, C: gl.constexpr):
    """From logits to weights, and each thread's sums of them."""
    FOLD: gl.constexpr = F.PLAIN or C.CAPPED
    scale, softcap, _ = terms
    scale_log2 = scale * LOG2E
    if C.CAPPED:
        scale_log2 = softcap * LOG2E
    return exponentials(s, safe, scale_log2, FOLD, SUMS)


@gluon.jit
def _times_values(pd, v, acc, C: gl.constexpr):
    """P V, in flight, of weights in one piece or in two."""
    HALF: gl.constexpr = v.shape[0] // 2
    if C.HALVES:
        left, right = pd
        acc = warpgroup_mma(left, v.slice(0, HALF, 0), acc, is_async=True)
        return warpgroup_mma(right, v.slice(HALF, HALF, 0), acc, is_async=True)
    else:
        return warpgroup_mma(pd, v, acc, is_async=True)


@gluon.jit
def _queries(q_s, items, GROUP: gl.constexpr, C: gl.constexpr):
    """Where a warpgroup's 64 rows of the queries of item number ``items`` lie."""
    return q_s.index(items % C.Q_SLOTS * C.GROUPS + GROUP).reshape([64, C.D])


@gluon.jit
def _first_product(going, q, k_s, q_full, k_full, items, count, zero, F: gl.constexpr, C: gl.constexpr):
    """Q K^T of an item's first tile, in flight; of whatever lies there where no item is to come (going < 0)."""
    stage = count % C.STAGES
    if going >= 0:
        mbarrier.wait(q_full.index(items % C.Q_SLOTS), (items // C.Q_SLOTS) & 1)
        mbarrier.wait(k_full.index(stage), (count // C.STAGES) & 1)
    k = k_s.index(stage).reshape([F.BLOCK_N, C.D]).permute((1, 0))
    return warpgroup_mma(q, k, zero, use_acc=False, is_async=True)


@gluon.jit
def _consume(GROUP: gl.constexpr, F: gl.constexpr, C: gl.constexpr, o_desc, memory, barriers, record_s, pointers,
             strides, sizes, numbers):  # fmt: skip
    """A consumer warpgroup: 64 rows of out and lse of every item."""
    GROUPS: gl.constexpr = C.GROUPS
    STAGES: gl.constexpr = C.STAGES
    BLOCK_N: gl.constexpr = F.BLOCK_N
    D: gl.constexpr = C.D
    DV: gl.constexpr = C.DV
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    LP: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N // 2, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LS)
    COL: gl.constexpr = gl.SliceLayout(0, LS)
    ROW_O: gl.constexpr = gl.SliceLayout(1, LO)
    q_s, k_s, v_s, o_s, weights_s = memory
    q_full, k_full, v_full, item_full, item_empty, cleaned = barriers
    ranges_ptr, weight_ptr, slopes_ptr, sinks_ptr, seed_ptr, o_ptr, lse_ptr = pointers
    stride_rb, stride_rh, stride_rm, stride_wb, stride_wh, stride_ab = strides
    HQ, KV_GROUP, SQ, SK = sizes
    scale, softcap, keep_scale, window_left, window_right, threshold, off_b, off_h, off_m, off_n = numbers
    dtype: gl.constexpr = k_s.dtype
    o = o_s.index(GROUP)
    o_flat = o.reshape([64, C.OUT_COLUMNS])
    zero = gl.zeros([64, BLOCK_N], gl.float32, LS)

    record = _next_item(0, item_full, item_empty, record_s, 4)
    items = record[0] * 0
    count = record[0] * 0  # tiles done, over all items
    phases = record[0] * 0
    if C.TURNS and GROUP == GROUPS - 1:
        bar_arrive(TURN, 256)
    s = _first_product(record[0], _queries(q_s, items, GROUP, C), k_s, q_full, k_full, items, count, zero, F, C)
    s = warpgroup_mma_wait(0, deps=(s,))
    while record[0] >= 0:
        q = _queries(q_s, items, GROUP, C)
        q_free = Q_FREE + items % C.Q_SLOTS * 8
        batch, head, row_start, q_start, k_start, sq, sk, first, last, gaps = record[:10]
        start, full_start, full_tiles, left, masked = record[10:]
        n_tiles = masked + full_tiles
        if not F.VARLEN:
            sq = SQ
            sk = SK
        plan = (start, full_start, full_tiles, left, masked)
        seen = (gaps, first, last)
        b64 = batch.to(gl.int64)
        h64 = head.to(gl.int64)
        ranges = ranges_ptr + h64 * stride_rh
        weights = weight_ptr + (head // KV_GROUP).to(gl.int64) * stride_wh
        if F.VARLEN:
            ranges += q_start.to(gl.int64) * stride_rm
            weights += k_start
            lse_at = lse_ptr + h64 * SQ + q_start
        else:
            ranges += b64 * stride_rb
            weights += b64 * stride_wb
            lse_at = lse_ptr + (b64 * HQ + head) * SQ
        rules = (ranges, stride_rm, sq, sk, window_left, window_right)
        slope, dropout = head_terms(
            slopes_ptr, stride_ab, seed_ptr, batch, head, off_b, off_h, off_m, off_n, threshold, F
        )
        row0 = row_start + GROUP * 64
        terms = (scale, softcap, slope)
        row = row0 + gl.arange(0, 64, layout=ROW)
        lo, hi = row_ranges(ranges, stride_rm, row, sq, sk, window_left, window_right, F)
        m = gl.full([64], float("-inf"), gl.float32, ROW)
        l = gl.zeros([64, 8], gl.float32, SUMS)
        if F.HAS_SINKS:
            sink = gl.load(sinks_ptr + head).to(gl.float32)
            m = gl.zeros([64], gl.float32, ROW) + sink * LOG2E
            l = l + gl.where(sink == float("-inf"), 0.0, 0.125)  # 1, over 8 columns
        acc = gl.zeros([64, DV], gl.float32, LO)

        bar_arrive(K_FREE + count % STAGES, GROUPS * 128 + 32)
        if n_tiles == 1:
            bar_arrive(q_free, GROUPS * 128 + 32)
        n0 = tile_start(0, plan, BLOCK_N)
        weight, removed = _staged_weights(weights_s, count, COL, F, C)
        bits = bits_by_row(dropout, row0, n0, F)
        s, m, safe, alpha = _tile_maximum(s, m, n0, masked > 0, lo, hi, row, weight, removed, terms, rules, LS, F, C)
        p, own = _exponentials(s, safe, terms, SUMS, F, C)
        l = l * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None] + own
        if C.HALVES:
            left, right = halves(p, HALF)
            pd = (gl.convert_layout(left.to(dtype), LP), gl.convert_layout(right.to(dtype), LP))
        else:
            if F.HAS_DROPOUT:
                p = drop_by_row(p, bits, dropout, row0, n0, LS, dtype, F)
            pd = gl.convert_layout(p.to(dtype), LP)
        for i in range(1, n_tiles):
            before = count % STAGES
            stage = (count + 1) % STAGES
            if C.TURNS:
                bar_sync(TURN + GROUP, 256)
            mbarrier.wait(k_full.index(stage), ((count + 1) // STAGES) & 1)
            k = k_s.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
            s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
            phases = _wait_for_values(
                v_s, v_full, cleaned, phases, count, i - 1, plan, seen, removed, row_start, rules, weights, GROUP, F, C
            )
            acc = _times_values(pd, v_s.index(before).reshape([BLOCK_N, DV]), acc, C)
            if C.TURNS:
                bar_arrive(TURN + (GROUP + 1) % GROUPS, 256)
            n0 = tile_start(i, plan, BLOCK_N)
            bits = bits_by_row(dropout, row0, n0, F)
            s = warpgroup_mma_wait(2 if C.HALVES else 1, deps=(s,))
            if F.HAS_WEIGHT:
                weight, removed = _staged_weights(weights_s, count + 1, COL, F, C)
            bar_arrive(K_FREE + stage, GROUPS * 128 + 32)
            if i == n_tiles - 1:
                bar_arrive(q_free, GROUPS * 128 + 32)
            s, m, safe, alpha = _tile_maximum(
                s, m, n0, i < masked, lo, hi, row, weight, removed, terms, rules, LS, F, C
            )
            if C.HALVES:
                first_s, second_s = halves(s, HALF)
                own_safe = gl.convert_layout(safe, gl.SliceLayout(1, HALF))
                early, own = _exponentials(first_s, own_safe, terms, SUMS, F, C)
            else:
                p, own = _exponentials(s, safe, terms, SUMS, F, C)
                if F.HAS_DROPOUT:
                    p = drop_by_row(p, bits, dropout, row0, n0, LS, dtype, F)
            l = l * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None] + own
            if C.SPLIT:  # noqa: SIM102 (a branch at run time inside one at compile time)
                # never so; but where code branches, ptxas cannot move the wait below above these exponentials
                if SQ < 0:
                    mbarrier.wait(v_full.index(before), 0)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            bar_arrive(V_FREE + before, GROUPS * 128 + 32)
            if C.HALVES:  # under whose exponentials the products with alpha and the conversions hide
                late, own = _exponentials(second_s, own_safe, terms, SUMS, F, C)
                l = l + own
            acc = acc * gl.convert_layout(alpha, ROW_O)[:, None]
            if C.HALVES:
                pd = (gl.convert_layout(early.to(dtype), LP), gl.convert_layout(late.to(dtype), LP))
            else:
                pd = gl.convert_layout(p.to(dtype), LP)
            count += 1
        phases = _wait_for_values(
            v_s,
            v_full,
            cleaned,
            phases,
            count,
            n_tiles - 1,
            plan,
            seen,
            removed,
            row_start,
            rules,
            weights,
            GROUP,
            F,
            C,
        )
        stage = count % STAGES
        acc = _times_values(pd, v_s.index(stage).reshape([BLOCK_N, DV]), acc, C)

        count += 1
        items += 1
        record = _next_item(items, item_full, item_empty, record_s, 4)
        # the next item's first product runs under what is left of this one
        q = _queries(q_s, items, GROUP, C)
        s = _first_product(record[0], q, k_s, q_full, k_full, items, count, zero, F, C)

        l = gl.convert_layout(gl.sum(l, 1), ROW)
        # a row that met no key: l is 0, or it holds the sink alone, and acc is 0 either way
        nothing = l == 0.0
        l_safe = gl.where(nothing, 1.0, l)
        lse = gl.where(nothing, float("-inf"), (m + gl.log2(l_safe)) * LN2)
        if F.HAS_SINKS:  # the sink alone: its own bits, by which the backward knows that the row saw nothing
            # l is 1 but for the rounding of sink * LOG2E, where m - sink * LOG2E became an FMA (portable softmax_end)
            alone = gl.abs(l - 1.0) <= gl.maximum(gl.abs(m), 1.0) * 1.1920929e-07
            lse = gl.where(alone & (m == sink * LOG2E), sink, lse)
        gl.store(lse_at + row, lse, mask=row < sq)
        factor = gl.convert_layout(keep_scale / l_safe, ROW_O)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        bar_arrive(V_FREE + stage, GROUPS * 128 + 32)
        result = (acc * factor[:, None]).to(dtype)
        PARTS: gl.constexpr = DV // C.OUT_COLUMNS
        parts = (result,)
        if PARTS == 2:
            parts = halves(result, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.OUT_COLUMNS, 16]))
        for part in gl.static_range(PARTS):
            tma_store_wait(0)  # of what was staged in the same memory before
            o_flat.store(parts[part])
            if F.VARLEN:
                if row0 + 64 > sq:  # a bulk copy would not stop at the sequence's end
                    _store_rows(o_ptr, o_flat, q_start, row0, part * C.OUT_COLUMNS, sq, head, HQ, F, C)
                else:
                    fence_async_shared()
                    tma_store(o_desc, [0, head, q_start + row0, part * C.OUT_COLUMNS], o)
            else:
                fence_async_shared()
                tma_store(o_desc, [batch, head, row0, part * C.OUT_COLUMNS], o)
        s = warpgroup_mma_wait(0, deps=(s,))
    tma_store_wait(0)
    if C.TURNS and GROUP == 0:
        bar_sync(TURN, 256)  # the last turn, which nobody takes


@gluon.jit
def _store_rows(o_ptr, staged, q_start, row0, column, sq, head, HQ, F: gl.constexpr, C: gl.constexpr):
    """Rows of a packed out [T, Hq, DV], from ``column`` on, that are in their sequence, from where they are staged."""
    LANES: gl.constexpr = C.OUT_COLUMNS // 8
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    row = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    d = column + gl.arange(0, C.OUT_COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    at = o_ptr + ((q_start + row).to(gl.int64) * HQ + head)[:, None] * F.DV + d[None, :]
    gl.store(at, staged.load(LAYOUT), mask=(row < sq)[:, None] & (d < F.DV)[None, :])


_RUNTIME_INTS = [
    "HQ", "GROUP", "SQ", "SK", "max_q", "sequences", "work", "total", "section", "window_left", "window_right",
    "threshold", "off_b", "off_h", "off_m", "off_n", "stride_rb", "stride_rh", "stride_rm", "stride_wb", "stride_wh",
    "stride_ab",
]  # fmt: skip


@gluon.jit(do_not_specialize=_RUNTIME_INTS)
def attn_fwd_hopper_kernel(q_desc, k_desc, v_desc, o_desc, ranges_ptr, weight_ptr, slopes_ptr, sinks_ptr, seed_ptr,
                           cu_q_ptr, cu_k_ptr, o_ptr, lse_ptr, counter_ptr, stride_rb, stride_rh, stride_rm, stride_wb,
                           stride_wh, stride_ab, scale, softcap, keep_scale, HQ, GROUP, SQ, SK, max_q, sequences,
                           work, total, section, window_left, window_right, threshold, off_b, off_h, off_m, off_n,
                           F: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """out and lse. ``total`` = HQ * B * tiles items of 64 * C.GROUPS rows; any grid up to that.

    ``section`` of the HQ * B heads, a divisor, go together, with their ``work`` items: see ``longest_first``.
    ``counter_ptr`` points at two zeros, and leaves zeros. For VARLEN, SQ and SK are the packed totals of so many
    ``sequences``; for C.STACKED, the tiles of these lie behind each other, and ``total`` = HQ * tiles.
    """
    GROUPS: gl.constexpr = C.GROUPS
    SLOTS: gl.constexpr = C.Q_SLOTS
    STAGES: gl.constexpr = C.STAGES
    BLOCK_N: gl.constexpr = F.BLOCK_N
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [SLOTS * GROUPS, 1, 1, 64, C.D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, C.D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, C.DV], v_desc.layout)
    o_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, C.OUT_COLUMNS], o_desc.layout)
    record_s = gl.allocate_shared_memory(gl.int32, [16], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    item_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    item_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    wanted = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    cleaned = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    weights_s = (0, 0)
    if F.HAS_WEIGHT:
        PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        values_s = gl.allocate_shared_memory(gl.float32, [STAGES + 1, BLOCK_N], PLAIN)
        removed_s = gl.allocate_shared_memory(gl.int32, [STAGES + 1, 1], PLAIN)
        weights_s = (values_s, removed_s)
    for i in gl.static_range(SLOTS):
        mbarrier.init(q_full.index(i), count=1)
    mbarrier.init(item_full, count=1)
    mbarrier.init(item_empty, count=GROUPS + 1)
    mbarrier.init(wanted, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(cleaned.index(i), count=1)
        mbarrier.init(k_full.index(i), count=2 if F.HAS_WEIGHT else 1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()

    loads = (q_full, k_full, v_full, item_full, item_empty)
    scheduled = ((item_full, item_empty, wanted), record_s, (ranges_ptr, cu_q_ptr, cu_k_ptr, counter_ptr),
                 (stride_rb, stride_rh, stride_rm), (HQ, SQ, SK, max_q, sequences, work, section),
                 (window_left, window_right), total)  # fmt: skip
    produced = ((q_desc, k_desc, v_desc), (q_s, k_s, v_s), weights_s, loads + (wanted,), record_s, weight_ptr,
                (stride_wb, stride_wh), GROUP, SK)  # fmt: skip
    numbers = (scale, softcap, keep_scale, window_left, window_right, threshold, off_b, off_h, off_m, off_n)
    consumed = (o_desc, (q_s, k_s, v_s, o_s, weights_s), loads + (cleaned,), record_s,
                (ranges_ptr, weight_ptr, slopes_ptr, sinks_ptr, seed_ptr, o_ptr, lse_ptr),
                (stride_rb, stride_rh, stride_rm, stride_wb, stride_wh, stride_ab),
                (HQ, GROUP, SQ, SK), numbers)  # fmt: skip
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, F, C) + consumed),
                (_consume, (1, F, C) + consumed),
                (_produce, (F, C) + produced),
                (_schedule, (F, C) + scheduled),
            ],
            [4, 1, 1],
            [C.REGISTERS, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, F, C) + consumed),
                (_consume, (1, F, C) + consumed),
                (_consume, (2, F, C) + consumed),
                (_produce, (F, C) + produced),
                (_schedule, (F, C) + scheduled),
            ],
            [4, 4, 1, 1],
            [C.REGISTERS, C.REGISTERS, 24, 24],
        )
