"""FlashAttention-3's forward (Shah et al. 2024) in Gluon, for sm_90.

A program owns 64 query rows for each of its consumer warpgroups and walks the keys that some of them may see, masked
tiles first. One producer warp feeds K and V into a ring in shared memory through the tensor memory accelerator. A
consumer keeps the Q K^T of the next tile on the matrix unit while it computes the softmax of this one, and the
warpgroups take turns at the matrix unit, so that one computes products while another computes exponentials.
"""

from ..portable.common import (
    LN2,
    LOG2E,
    dropout_keep,
    head_terms,
    key_in_use,
    plan_tiles,
    row_ranges,
    sequence_bounds,
    tile_logits,
)
from .common import hide, softmax_tile, tile_hull, tile_start, weigh
from .shim import (
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


@gluon.jit
def _produce(F: gl.constexpr, C: gl.constexpr, q_desc, k_desc, v_desc, memory, barriers, place, plan, n_tiles):
    """The producer warp: queries once, then K and V of every tile as stages come free."""
    GROUPS: gl.constexpr = C.GROUPS
    STAGES: gl.constexpr = C.STAGES
    BLOCK_N: gl.constexpr = F.BLOCK_N
    q_s, k_s, v_s = memory
    q_full, k_full, k_empty, v_full, v_empty = barriers
    batch, head, head_k, q_row, k_row = place
    mbarrier.expect(q_full, GROUPS * q_desc.block_type.nbytes)
    for g in gl.static_range(GROUPS):
        tma_load(q_desc, [batch, head, q_row + g * 64, 0], q_full, q_s.index(g))
    for i in range(n_tiles):
        stage = i % STAGES
        free = ((i // STAGES) & 1) ^ 1
        n0 = k_row + tile_start(i, plan, BLOCK_N)
        mbarrier.wait(k_empty.index(stage), free)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma_load(k_desc, [batch, head_k, n0, 0], k_full.index(stage), k_s.index(stage))
        mbarrier.wait(v_empty.index(stage), free)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma_load(v_desc, [batch, head_k, n0, 0], v_full.index(stage), v_s.index(stage))


@gluon.jit
def _needs_cleaning(n0, i, plan, seen, removed, sk, WIDTH: gl.constexpr, F: gl.constexpr):
    """May keys n0 to n0 + WIDTH of tile i hold values that no row sees, and that are not zeros past the end?"""
    gaps, first, last = seen
    beyond = n0 + WIDTH > last
    if not F.VARLEN:
        beyond = beyond & (last < sk)
    dirty = (i < plan[4]) & (gaps | (n0 < first) | beyond)
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
                if gaps:
                    shown = col < 0
                    for one in range(q_row0, gl.minimum(q_row0 + C.GROUPS * 64, sq)):
                        lo, hi = row_ranges(ranges_ptr, stride_rm, one, sq, sk, window_left, window_right, F)
                        shown = shown | ((col >= lo) & (col < hi))
                    use = use & shown
            part = v.slice(at, ROWS, 0)
            part.store(gl.where(use[:, None], part.load(LAYOUT), 0.0))


@gluon.jit
def _wait_for_values(v_s, v_full, cleaned, phases, i, plan, seen, removed, q_row0, rules, weight_ptr,
                     GROUP: gl.constexpr, F: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """The values of tile i, ready to be multiplied. ``phases`` has one bit for the ``cleaned`` barrier of each stage.

    One barrier for all stages would not do: the first warpgroup may be two cleaned tiles ahead of another.
    """
    STAGES: gl.constexpr = C.STAGES
    BLOCK_N: gl.constexpr = F.BLOCK_N
    sk = rules[3]
    stage = i % STAGES
    mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
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
def _tile_weights(weight_ptr, n0, sk, LAYOUT: gl.constexpr, F: gl.constexpr):
    """key_log_weight of a tile's keys and whether any of them is removed; nothing where there is none."""
    if F.HAS_WEIGHT:
        col = n0 + gl.arange(0, F.BLOCK_N, layout=LAYOUT)
        weight = gl.load(weight_ptr + col, mask=col < sk, other=0.0).to(gl.float32)
        return weight, gl.min(weight, 0) == float("-inf")
    else:
        return 0.0, sk < 0


@gluon.jit
def _tile_softmax(s, m, l, n0, masked, lo, hi, row, weight, removed, terms, rules, LAYOUT: gl.constexpr,
                  F: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """From a tile of q.k to weights: logits, visibility, online softmax, dropout."""
    LOGITS: gl.constexpr = C.LOGITS
    scale, softcap, slope, dropout = terms
    _, _, sq, sk, _, _ = rules
    col = n0 + gl.arange(0, F.BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    if not F.PLAIN:
        s, _ = tile_logits(s, row[:, None], col[None, :], scale, softcap, slope, None, 0, 0, None, sq, sk, LOGITS)
        if F.HAS_WEIGHT:
            s = weigh(s, weight, removed)
    if masked:
        s = hide(s, lo, hi, col, F)
    p, m, l, alpha = softmax_tile(s, m, l, scale * LOG2E, F)
    if F.HAS_DROPOUT:
        seed, head, index, off_m, off_n, threshold = dropout
        p = gl.where(dropout_keep(seed, row[:, None], col[None, :], head, index, off_m, off_n, threshold), p, 0.0)
    return p, m, l, alpha


@gluon.jit
def _consume(GROUP: gl.constexpr, F: gl.constexpr, C: gl.constexpr, o_desc, o_ptr, lse_ptr, sinks_ptr, weight_ptr,
             memory, barriers, place, plan, seen, rules, terms, keep_scale, stride_om, n_tiles):  # fmt: skip
    """A consumer warpgroup: 64 rows of out and lse."""
    GROUPS: gl.constexpr = C.GROUPS
    STAGES: gl.constexpr = C.STAGES
    BLOCK_N: gl.constexpr = F.BLOCK_N
    D: gl.constexpr = C.D
    DV: gl.constexpr = C.DV
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    LP: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LS)
    COL: gl.constexpr = gl.SliceLayout(0, LS)
    q_s, k_s, v_s, o_s = memory
    q_full, k_full, k_empty, v_full, v_empty, turn, cleaned = barriers
    batch, head, _, q_row, _, row_start = place
    ranges_ptr, stride_rm, sq, sk, window_left, window_right = rules
    dtype: gl.constexpr = k_s.dtype
    masked_tiles = plan[4]

    q = q_s.index(GROUP).reshape([64, D])
    row = row_start + GROUP * 64 + gl.arange(0, 64, layout=ROW)
    lo, hi = row_ranges(ranges_ptr, stride_rm, row, sq, sk, window_left, window_right, F)
    m = gl.full([64], float("-inf"), gl.float32, ROW)
    l = gl.zeros([64], gl.float32, ROW)
    if F.HAS_SINKS:
        sink = gl.load(sinks_ptr + head).to(gl.float32)
        m = gl.zeros([64], gl.float32, ROW) + sink * LOG2E
        l = gl.where(m == float("-inf"), 0.0, l + 1.0)
    acc = gl.zeros([64, DV], gl.float32, LO)
    zero = gl.zeros([64, BLOCK_N], gl.float32, LS)
    phases = n_tiles * 0

    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, k_s.index(0).reshape([BLOCK_N, D]).permute((1, 0)), zero, use_acc=False, is_async=True)
    n0 = tile_start(0, plan, BLOCK_N)
    weight, removed = _tile_weights(weight_ptr, n0, sk, COL, F)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(0), count=1)
    p, m, l, alpha = _tile_softmax(s, m, l, n0, masked_tiles > 0, lo, hi, row, weight, removed, terms, rules, LS, F, C)
    pd = gl.convert_layout(p.to(dtype), LP)
    for i in range(1, n_tiles):
        stage = i % STAGES
        before = (i - 1) % STAGES
        if C.TURNS:
            mbarrier.wait(turn.index(GROUP), (i - 1) & 1)
        mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
        k = k_s.index(stage).reshape([BLOCK_N, D]).permute((1, 0))
        s = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        phases = _wait_for_values(
            v_s, v_full, cleaned, phases, i - 1, plan, seen, removed, row_start, rules, weight_ptr, GROUP, F, C
        )
        acc = warpgroup_mma(pd, v_s.index(before).reshape([BLOCK_N, DV]), acc, is_async=True)
        if C.TURNS:
            mbarrier.arrive(turn.index((GROUP + 1) % GROUPS), count=1)
        n0 = tile_start(i, plan, BLOCK_N)
        weight, removed = _tile_weights(weight_ptr, n0, sk, COL, F)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        p, m, l, alpha = _tile_softmax(
            s, m, l, n0, i < masked_tiles, lo, hi, row, weight, removed, terms, rules, LS, F, C
        )
        if C.SPLIT:  # passed already; ptxas would move the wait below above the exponentials
            mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, LO))[:, None]
        pd = gl.convert_layout(p.to(dtype), LP)
    last = n_tiles - 1
    _wait_for_values(v_s, v_full, cleaned, phases, last, plan, seen, removed, row_start, rules, weight_ptr, GROUP, F, C)
    acc = warpgroup_mma(pd, v_s.index(last % STAGES).reshape([BLOCK_N, DV]), acc, is_async=True)

    # a row that met no key: l is 0, or it holds the sink alone, and acc is 0 either way
    nothing = l == 0.0
    l_safe = gl.where(nothing, 1.0, l)
    lse = gl.where(nothing, float("-inf"), (m + gl.log2(l_safe)) * LN2)
    if F.HAS_SINKS:  # the sink alone: its own bits, by which the backward knows that the row saw nothing
        lse = gl.where((l == 1.0) & (m == sink * LOG2E), sink, lse)
    gl.store(lse_ptr + row, lse, mask=row < sq)
    factor = gl.convert_layout(keep_scale / l_safe, gl.SliceLayout(1, LO))
    acc = warpgroup_mma_wait(0, deps=(acc,))
    acc = acc * factor[:, None]
    o = o_s.index(GROUP)
    flat = o.reshape([64, DV])
    flat.store(acc.to(dtype))
    if F.VARLEN:  # a bulk store would not stop at the sequence's end
        LANES: gl.constexpr = DV // 8
        OUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
        out_row = row_start + GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
        d = gl.arange(0, DV, layout=gl.SliceLayout(0, OUT))
        at = o_ptr + out_row.to(gl.int64)[:, None] * stride_om + d[None, :]
        gl.store(at, flat.load(OUT), mask=(out_row < sq)[:, None] & (d < F.DV)[None, :])
    else:
        fence_async_shared()
        tma_store(o_desc, [batch, head, q_row + GROUP * 64, 0], o)
        tma_store_wait(0)


_RUNTIME_INTS = [
    "HQ", "GROUP", "SQ", "SK", "max_q", "tiles", "window_left", "window_right", "threshold", "off_b", "off_h", "off_m",
    "off_n", "stride_rb", "stride_rh", "stride_rm", "stride_wb", "stride_wh", "stride_ab",
]  # fmt: skip


@gluon.jit(do_not_specialize=_RUNTIME_INTS)
def attn_fwd_hopper_kernel(q_desc, k_desc, v_desc, o_desc, ranges_ptr, weight_ptr, slopes_ptr, sinks_ptr, seed_ptr,
                           cu_q_ptr, cu_k_ptr, o_ptr, lse_ptr, stride_rb, stride_rh, stride_rm, stride_wb, stride_wh,
                           stride_ab, scale, softcap, keep_scale, HQ, GROUP, SQ, SK, max_q, tiles, window_left,
                           window_right, threshold, off_b, off_h, off_m, off_n,
                           F: gl.constexpr, C: gl.constexpr):  # fmt: skip
    """out and lse of 64 * C.GROUPS rows. Grid: tiles * HQ * B. For VARLEN, SQ and SK are the packed totals."""
    GROUPS: gl.constexpr = C.GROUPS
    STAGES: gl.constexpr = C.STAGES
    ROWS: gl.constexpr = GROUPS * 64
    BLOCK_N: gl.constexpr = F.BLOCK_N
    dtype: gl.constexpr = q_desc.dtype
    pid = gl.program_id(0)
    tile = tiles - 1 - pid % tiles  # the longest causal rows first
    bh = pid // tiles
    batch = bh // HQ
    head = bh % HQ
    head_k = head // GROUP
    row_start = tile * ROWS
    stride_om = HQ.to(gl.int64) * F.DV  # out is [B, S, H, D] in memory
    if F.VARLEN:
        q_start, sq = sequence_bounds(cu_q_ptr, batch, SQ, max_q)
        k_start, sk = sequence_bounds(cu_k_ptr, batch, SK, SK)
        if row_start >= sq:
            return
        o_base = o_ptr + q_start.to(gl.int64) * stride_om + head * F.DV
        lse_base = lse_ptr + head.to(gl.int64) * SQ + q_start
        ranges_base = ranges_ptr + q_start.to(gl.int64) * stride_rm
        weight_base = weight_ptr + k_start
        tma_batch = batch * 0
    else:
        q_start = batch * 0
        k_start = batch * 0
        sq = SQ
        sk = SK
        o_base = o_ptr
        lse_base = lse_ptr + (batch.to(gl.int64) * HQ + head) * SQ
        ranges_base = ranges_ptr + batch.to(gl.int64) * stride_rb
        weight_base = weight_ptr + batch.to(gl.int64) * stride_wb
        tma_batch = batch
    ranges_base += head.to(gl.int64) * stride_rh
    weight_base += head_k.to(gl.int64) * stride_wh
    slope, dropout = head_terms(slopes_ptr, stride_ab, seed_ptr, batch, head, off_b, off_h, off_m, off_n, threshold, F)

    first, last, full_lo, full_hi, gaps = tile_hull(
        ranges_base, stride_rm, row_start, sq, sk, window_left, window_right, ROWS, F
    )
    start, full_start, full_tiles, left, masked = plan_tiles(first, last, full_lo, full_hi, BLOCK_N, False)
    masked = gl.where(masked + full_tiles == 0, 1, masked)  # nothing to see: one tile, all of it hidden
    n_tiles = masked + full_tiles
    plan = (start, full_start, full_tiles, left, masked)
    seen = (gaps, first, last)
    rules = (ranges_base, stride_rm, sq, sk, window_left, window_right)
    terms = (scale, softcap, slope, dropout)

    q_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, C.D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, C.D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, C.DV], v_desc.layout)
    if C.SHARE:
        o_s = q_s
    else:
        o_s = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, 64, C.DV], o_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    cleaned = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(cleaned.index(i), count=1)
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    for i in gl.static_range(GROUPS):
        mbarrier.init(turn.index(i), count=1)
    mbarrier.arrive(turn.index(0), count=1)
    fence_async_shared()

    loads = ((q_s, k_s, v_s), (q_full, k_full, k_empty, v_full, v_empty))
    memory = (q_s, k_s, v_s, o_s)
    barriers = (q_full, k_full, k_empty, v_full, v_empty, turn, cleaned)
    q_row = q_start + row_start
    place = (tma_batch, head, head_k, q_row, k_start, row_start)
    common = (o_desc, o_base, lse_base, sinks_ptr, weight_base, memory, barriers, place, plan, seen, rules, terms,
              keep_scale, stride_om, n_tiles)  # fmt: skip
    produced = (q_desc, k_desc, v_desc, loads[0], loads[1], place[:5], plan, n_tiles)
    if GROUPS == 2:
        gl.warp_specialize(
            [(_consume, (0, F, C) + common), (_consume, (1, F, C) + common), (_produce, (F, C) + produced)],
            [4, 1],
            [C.REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, F, C) + common),
                (_consume, (1, F, C) + common),
                (_consume, (2, F, C) + common),
                (_produce, (F, C) + produced),
            ],
            [4, 4, 1],
            [C.REGISTERS, C.REGISTERS, 24],
        )
