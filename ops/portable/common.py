"""Tile steps that the forward and the backward kernels share, and the description of a kernel variant.

Tiles come in two orientations, [rows, columns] in the forward and dQ kernels and [columns, rows] in the dK/dV kernel.
The elementwise steps work for both: they take ``row`` and ``col`` as index tensors that broadcast to the tile,
[M, 1] with [1, N] or [1, M] with [N, 1].

A head dim that is no power of two is held as a tuple of power-of-two parts (80 = 64 + 16): the matrix unit then does
D / next_power_of_2(D) of the padded work. A "parts" value below is such a tuple of tiles.
"""

# mypy: disable-error-code="assignment"
# (tuples grow part by part in jitted functions)
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INT_MAX = tl.constexpr(2147483647)
EXACT_CAP, RECIPROCAL_CAP, APPROXIMATE_CAP = 0, 1, 2
MIN_PART = 16  # the smallest inner dimension of tl.dot


class Features(NamedTuple):
    """What one compiled kernel is specialised for; passed to kernels as the single constexpr argument ``F``."""

    D: int
    DV: int
    D_PARTS: tuple[int, ...]
    DV_PARTS: tuple[int, ...]
    BLOCK_M: int
    BLOCK_N: int
    CAUSAL: bool = False
    HAS_LEFT: bool = False  # a window bound on the left
    HAS_RIGHT: bool = False  # and on the right
    HAS_RANGES: bool = False
    HAS_MASK: bool = False
    HAS_BIAS: bool = False
    HAS_WEIGHT: bool = False  # key_log_weight
    HAS_ALIBI: bool = False
    HAS_SOFTCAP: bool = False
    HAS_SINKS: bool = False
    HAS_DROPOUT: bool = False
    VARLEN: bool = False
    SANITIZE: bool = False  # some key or row may take part in nothing and hold NaN
    SPLIT_GROUPS: bool = False  # dropout's column offset is no multiple of 16
    TMA: bool = False
    ATOMIC_DQ: bool = False
    WEIGHT_GRAD: bool = False
    HEAD_LOOP: bool = False  # key_ranges differ between the query heads of one KV head
    PRECISION: str = "ieee"  # of float32 dots
    PLAIN: bool = True  # logits are nothing but scale * q.k, so the scale folds into the exponent
    MAY_EMPTY: bool = False  # bias or weights of -inf can empty a row of a tile that visibility calls full
    MASK_M: int = 0  # rows and keys of a block of the block mask, 0 without one
    MASK_N: int = 0
    INTERVALS: bool = True  # causal, windows or key_ranges
    CAP_FORM: int = 0  # how softcap's tanh is computed: EXACT_CAP, RECIPROCAL_CAP or APPROXIMATE_CAP


def split_head_dim(d: int) -> tuple[int, ...]:
    """Power-of-two parts, none below 16, that cover ``d``: 80 -> (64, 16), 96 -> (64, 32), 112 -> (64, 32, 16)."""
    parts, left = [], -(-d // MIN_PART) * MIN_PART
    while left:
        parts.append(1 << (left.bit_length() - 1))
        left -= parts[-1]
    return tuple(parts)


def narrow_parts(d: int) -> tuple[int, ...]:
    """Parts of 32, the last one 16 if that is enough.

    For dots that run as FMAs, whose operands are held in registers over the whole part: at head dim 128 the forward
    spilled 385 registers with one part and none with four.
    """
    full, left = divmod(d, 32)
    return (32,) * full + ((MIN_PART if left <= MIN_PART else 32,) if left else ())


@triton.constexpr_function
def part_width(parts, i):
    return parts[i]


@triton.constexpr_function
def part_start(parts, i):
    return sum(parts[:i])


@triton.constexpr_function
def part_ragged(parts, i, d):
    return sum(parts[: i + 1]) > d


# ---- tiles as tuples of parts


@triton.jit
def zero_parts(ROWS: tl.constexpr, PARTS: tl.constexpr):
    """float32 zeros, one [ROWS, part] tile for each part."""
    out = ()
    for i in tl.static_range(len(PARTS)):
        out = out + (tl.zeros([ROWS, part_width(PARTS, i)], tl.float32),)
    return out


@triton.jit
def load_parts(ptr, index, ok, stride, D: tl.constexpr, PARTS: tl.constexpr, CHECK: tl.constexpr):
    """Rows ``index`` of a [*, D] matrix; with CHECK, rows that are not ``ok`` come as zeros."""
    out = ()
    rows = index.to(tl.int64)[:, None] * stride
    for i in tl.static_range(len(PARTS)):
        d = part_start(PARTS, i) + tl.arange(0, part_width(PARTS, i))
        at = ptr + rows + d[None, :]
        if CHECK:
            if part_ragged(PARTS, i, D):
                tile = tl.load(at, mask=ok[:, None] & (d[None, :] < D), other=0.0)
            else:
                tile = tl.load(at, mask=ok[:, None], other=0.0)
        else:
            if part_ragged(PARTS, i, D):
                tile = tl.load(at, mask=d[None, :] < D, other=0.0)
            else:
                tile = tl.load(at)
        out = out + (tile,)
    return out


@triton.jit
def load_tile(
    ptr,
    desc,
    batch,
    head,
    start,
    ok,
    stride,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    CHECK: tl.constexpr,
    TMA: tl.constexpr,
):
    """ROWS rows from ``start``: by the tensor memory accelerator (zeros past the end), or by pointers."""
    if TMA:
        return (desc.load([batch, head, start, 0]).reshape([ROWS, part_width(PARTS, 0)]),)
    else:
        return load_parts(ptr, start + tl.arange(0, ROWS), ok, stride, D, PARTS, CHECK)


@triton.jit
def store_parts(ptr, index, ok, stride, parts, D: tl.constexpr, PARTS: tl.constexpr):
    """Write parts to the rows ``index`` that are ``ok`` of a [*, D] matrix."""
    rows = index.to(tl.int64)[:, None] * stride
    for i in tl.static_range(len(PARTS)):
        d = part_start(PARTS, i) + tl.arange(0, part_width(PARTS, i))
        tl.store(ptr + rows + d[None, :], parts[i].to(ptr.dtype.element_ty), mask=ok[:, None] & (d[None, :] < D))


@triton.jit
def atomic_add_parts(ptr, index, ok, stride, parts, D: tl.constexpr, PARTS: tl.constexpr):
    """Add parts to float32 rows; the order of additions is not fixed."""
    rows = index.to(tl.int64)[:, None] * stride
    for i in tl.static_range(len(PARTS)):
        d = part_start(PARTS, i) + tl.arange(0, part_width(PARTS, i))
        tl.atomic_add(ptr + rows + d[None, :], parts[i], mask=ok[:, None] & (d[None, :] < D), sem="relaxed")


@triton.jit
def scale_parts(parts, factor, PARTS: tl.constexpr):
    """Each row of every part times its factor."""
    out = ()
    for i in tl.static_range(len(PARTS)):
        out = out + (parts[i] * factor[:, None],)
    return out


@triton.jit
def keep_rows(parts, ok, PARTS: tl.constexpr):
    """Rows that are not ``ok`` become zeros."""
    out = ()
    for i in tl.static_range(len(PARTS)):
        out = out + (tl.where(ok[:, None], parts[i], tl.zeros_like(parts[i])),)
    return out


@triton.jit
def dot_parts(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b^T over the split head dim: float32 [rows of a, rows of b]."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(PARTS)):
        s = tl.dot(a[i], tl.trans(b[i]), s, input_precision=PRECISION)
    return s


@triton.jit
def accumulate_parts(p, b, acc, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p @ b, part by part; p is rounded to b's dtype."""
    out = ()
    for i in tl.static_range(len(PARTS)):
        out = out + (tl.dot(p.to(b[i].dtype), b[i], acc[i], input_precision=PRECISION),)
    return out


# ---- visibility


@triton.jit
def sequence_bounds(cu_ptr, i, total, longest):
    """Start and length of packed sequence ``i``, held inside [0, total) and ``longest`` whatever cu_seqlens says."""
    start = tl.minimum(tl.maximum(tl.load(cu_ptr + i), 0), total)
    stop = tl.minimum(tl.maximum(tl.load(cu_ptr + i + 1), start), total)
    return start, tl.minimum(stop - start, longest)


@triton.jit
def row_ranges(ranges_ptr, stride_rm, row, sq, sk, window_left, window_right, F: tl.constexpr):
    """The keys [lo, hi) that each row may see, every interval rule folded in; rows past sq see none."""
    valid = row < sq
    at = row + (sk - sq)
    lo = row * 0
    hi = tl.where(valid, sk, 0)
    if F.CAUSAL:
        hi = tl.minimum(hi, at + 1)
    if F.HAS_LEFT:
        lo = tl.maximum(lo, at - window_left)
    if F.HAS_RIGHT:
        hi = tl.minimum(hi, at + window_right + 1)
    if F.HAS_RANGES:
        pair = ranges_ptr + row.to(tl.int64) * stride_rm
        lo = tl.maximum(lo, tl.minimum(tl.load(pair, mask=valid, other=0), sk))  # so that no rounding up overflows
        hi = tl.minimum(hi, tl.load(pair + 1, mask=valid, other=0))
    return lo, hi


@triton.jit
def range_hull(lo, hi, valid):
    """Of a tile's rows: the keys [first, last) that some row sees, and [full_lo, full_hi) that every row sees."""
    some = lo < hi
    first = tl.min(tl.where(some, lo, INT_MAX))
    last = tl.max(tl.where(some, hi, 0))
    full_lo = tl.max(tl.where(valid, lo, 0))
    full_hi = tl.min(tl.where(valid, hi, INT_MAX))
    return tl.minimum(first, last), last, full_lo, full_hi


@triton.jit
def has_gaps(ranges_ptr, stride_rm, row, lo, hi, sq, sk, window_left, window_right, F: tl.constexpr):
    """May some key between the first and the last that a tile's rows see be seen by none of them?

    Only key_ranges can do that. Neighbouring rows whose ranges touch leave no gap, and every pattern of transformers
    has that form; any break in the chain counts as a gap, without looking further.
    """
    if F.HAS_RANGES:
        before = tl.maximum(row - 1, 0)
        lo_before, hi_before = row_ranges(ranges_ptr, stride_rm, before, sq, sk, window_left, window_right, F)
        touches = (lo_before < hi_before) & (lo <= hi_before) & (lo_before <= hi)
        first = row == tl.min(row)
        return tl.sum(((lo < hi) & (first | (touches == 0))).to(tl.int32)) > 1
    else:
        return tl.min(row) < 0


@triton.jit
def keys_seen(use, gaps, first, last, ok, ranges_ptr, stride_rm, row, col, sq, sk, window_left, window_right,
              AXIS: tl.constexpr, F: tl.constexpr):  # fmt: skip
    """Which keys of a masked tile some row of it sees: the others may hold NaN, and 0 * NaN is NaN.

    A reduction of the visibility tile would do for all, but needs 100 registers more than the rest of the loop; so
    it serves masks only, and ranges with gaps are walked row by row.
    """
    use = use & (col >= first) & (col < last)
    if F.HAS_MASK or F.MASK_M > 0:
        use = use & (tl.max(ok.to(tl.int32), AXIS) != 0)
    elif F.HAS_RANGES:  # noqa: SIM102 (a branch at run time inside one at compile time)
        if gaps:
            seen = col < 0
            row0 = tl.min(row)
            for step in tl.range(0, tl.minimum(tl.max(row) + 1, sq) - row0):
                one = row0 + step
                lo, hi = row_ranges(ranges_ptr, stride_rm, one, sq, sk, window_left, window_right, F)
                seen = seen | ((col >= lo) & (col < hi))
            use = use & seen
    return use


@triton.jit
def plan_tiles(first, last, full_lo, full_hi, BLOCK: tl.constexpr, ALL_MASKED: tl.constexpr):
    """Cut [first, last) into BLOCK-aligned tiles: masked ones on both sides of a run that needs no mask.

    Returns (start, full_start, full_tiles, left_tiles, masked_tiles); ``masked_start`` turns a masked tile's number
    into its position.
    """
    start = first // BLOCK * BLOCK
    end = (last + BLOCK - 1) // BLOCK * BLOCK
    full_start = (full_lo + BLOCK - 1) // BLOCK * BLOCK
    full_stop = full_hi // BLOCK * BLOCK
    if ALL_MASKED:
        full_stop = full_start
    end = tl.where(last <= first, start, end)
    none = (full_stop <= full_start) | (last <= first)
    full_start = tl.where(none, end, full_start)
    full_stop = tl.where(none, end, full_stop)
    left = (full_start - start) // BLOCK
    return start, full_start, (full_stop - full_start) // BLOCK, left, left + (end - full_stop) // BLOCK


@triton.jit
def masked_start(i, start, full_start, full_tiles, left, BLOCK: tl.constexpr):
    """Where masked tile ``i`` begins: the left ones first, then those behind the full run."""
    return tl.where(i < left, start + i * BLOCK, full_start + (full_tiles + i - left) * BLOCK)


@triton.jit
def query_tile(ranges_ptr, stride_rm, row, sq, sk, window_left, window_right, F: tl.constexpr):
    """How a tile of query rows walks its keys: each row's lo and hi, the plan of tiles, what ``keys_seen`` asks for."""
    BLOCK_N: tl.constexpr = F.BLOCK_N
    ALL_MASKED: tl.constexpr = F.HAS_MASK
    lo, hi = row_ranges(ranges_ptr, stride_rm, row, sq, sk, window_left, window_right, F)
    first, last, full_lo, full_hi = range_hull(lo, hi, row < sq)
    plan = plan_tiles(first, last, full_lo, full_hi, BLOCK_N, ALL_MASKED)
    gaps = has_gaps(ranges_ptr, stride_rm, row, lo, hi, sq, sk, window_left, window_right, F)
    return lo, hi, plan, (gaps, first, last, ranges_ptr, stride_rm, window_left, window_right)


@triton.jit
def head_terms(slopes_ptr, stride_ab, seed_ptr, batch, head, off_b, off_h, off_m, off_n, threshold, F: tl.constexpr):
    """This head's ALiBi slope, and what ``dropout_keep`` asks for."""
    slope = 0.0
    if F.HAS_ALIBI:
        slope = tl.load(slopes_ptr + batch.to(tl.int64) * stride_ab + head).to(tl.float32)
    dropout = (0, 0, 0, 0, 0, 0)
    if F.HAS_DROPOUT:
        dropout = (tl.load(seed_ptr), head + off_h, batch + off_b, off_m, off_n, threshold)
    return slope, dropout


@triton.jit
def visible(lo, hi, col, row, mask_ptr, stride_mm, stride_mn, sq, sk, F: tl.constexpr):
    """Bool tile: may this row see this key? ``lo`` and ``hi`` broadcast like ``row``."""
    ok = (col >= lo) & (col < hi)
    if F.HAS_MASK:
        at = mask_ptr + row.to(tl.int64) * stride_mm + col.to(tl.int64) * stride_mn
        ok = ok & (tl.load(at, mask=ok & (row < sq) & (col < sk), other=0) != 0)
    return ok


# ---- logits


@triton.jit
def tanh(x):
    """tanh through exp2, since the approximate instruction keeps 11 bits only."""
    e = tl.math.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def capped(x, F: tl.constexpr):
    """tanh(x) as F.CAP_FORM says; the other forms are for NVIDIA GPUs and 16-bit input.

    The reciprocal form errs by 1e-7, absolutely. The approximate instruction errs by 2^-11, relatively: of the error
    bound of bfloat16 that is at most 0.4, of float16's up to 3, so float16 does not take it.
    """
    if F.CAP_FORM == 2:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    elif F.CAP_FORM == 1:
        over = 1.0 + tl.math.exp2(x * (2.0 * LOG2E))
        return 1.0 - 2.0 * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [over], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tanh(x)


@triton.jit
def tile_logits(
    qk, row, col, scale, softcap, slope, bias_ptr, stride_bm, stride_bn, weight_ptr, sq, sk, F: tl.constexpr
):
    """Logits in base 2, before visibility, from a tile of q.k. Returns (logits, d logits / d (scale * q.k)).

    The second is 1 unless there is a softcap. ``weight_ptr`` points at this head's key_log_weight row. With F.PLAIN
    the caller folds the scale itself and does not call this.
    """
    slope_of_cap = 1.0
    if F.HAS_SOFTCAP:
        t = capped(qk * (scale / softcap), F)
        s = t * (softcap * LOG2E)
        slope_of_cap = 1.0 - t * t
    else:
        s = qk * (scale * LOG2E)
    if F.HAS_ALIBI:
        s -= (slope * LOG2E) * tl.abs(row + (sk - sq) - col).to(tl.float32)
    if F.HAS_BIAS:
        at = bias_ptr + row.to(tl.int64) * stride_bm + col.to(tl.int64) * stride_bn
        s += tl.load(at, mask=(row < sq) & (col < sk), other=0.0).to(tl.float32) * LOG2E
    if F.HAS_WEIGHT:
        w = tl.load(weight_ptr + col, mask=col < sk, other=0.0).to(tl.float32)
        # a removed key may hold NaN, and NaN - inf is NaN
        s = tl.where(w == float("-inf"), float("-inf"), s + w * LOG2E)
    return s, slope_of_cap


@triton.jit
def key_in_use(weight_ptr, col, sk, F: tl.constexpr):
    """[N] bool: inside the sequence and not removed by a log weight of -inf."""
    ok = col < sk
    if F.HAS_WEIGHT:
        ok = ok & (tl.load(weight_ptr + col, mask=ok, other=0.0).to(tl.float32) != float("-inf"))
    return ok


@triton.jit
def dropout_keep(dropout, row, col):
    """Bool tile: Philox4x32-7 at counter (column // 16, row, head, batch), byte column % 16, kept if >= threshold.

    For any rows and columns; each element has a call of the generator, but for those that the compiler finds equal.
    """
    seed, head, batch, off_m, off_n, threshold = dropout
    column = col + off_n
    r0, r1, r2, r3 = _random_bytes(seed, row + off_m, column >> 4, head, batch)
    byte = (column + row * 0).to(tl.uint32) & 15
    low = tl.where(byte < 4, r0, r1)
    high = tl.where(byte < 12, r2, r3)
    word = tl.where(byte < 8, low, high)
    return ((word >> ((byte & 3) * 8)) & 0xFF) >= threshold


@triton.jit
def _random_bytes(seed, row, group, head, batch):
    """16 bytes for each pair of a row and a group of 16 columns, as four words."""
    zero = (row + group).to(tl.uint32) * 0
    c0 = zero + group.to(tl.uint32)
    c1 = zero + row.to(tl.uint32)
    return tl.philox(seed, c0, c1, zero + head.to(tl.uint32), zero + batch.to(tl.uint32), n_rounds=7)


@triton.jit
def dropout_bits(dropout, row, group):
    """``dropout_keep`` of groups of 16 columns in uint32: column c is bit ``bit_of_column(c)``."""
    seed, head, batch, off_m, off_n, threshold = dropout
    r0, r1, r2, r3 = _random_bytes(seed, row + off_m, group + (off_n >> 4), head, batch)
    four = threshold.to(tl.uint32) * 0x01010101
    low = _bytes_reach(r0, four) | (_bytes_reach(r1, four) >> 1)
    return low | (_bytes_reach(r2, four) >> 2) | (_bytes_reach(r3, four) >> 3)


@triton.jit
def bit_of_column(c):
    """Where ``dropout_bits`` has column c of a group: at bit 7 - c // 4 of byte c % 4."""
    return (((c & 3) << 3) + 7 - (c >> 2)).to(tl.uint32)


@triton.jit
def _bytes_reach(x, y):
    """Of four bytes at once: the highest bit of each is set where x >= y."""
    low_reaches = (x | 0x80808080) - (y & 0x7F7F7F7F)  # whether the lower seven bits do; no byte borrows from the next
    return ((x & low_reaches) | ((x | low_reaches) & ~y)) & 0x80808080


@triton.jit
def drop(p, dropout, row, n0, TRANSPOSED: tl.constexpr, F: tl.constexpr):
    """p of the rows [M] and BLOCK_N keys from n0 with zeros where dropout falls: [M, N], or [N, M] where TRANSPOSED.

    One call of the generator serves 16 neighbouring columns; n0 is a multiple of 16.
    """
    if F.HAS_DROPOUT:
        BLOCK_N: tl.constexpr = F.BLOCK_N
        ROWS: tl.constexpr = p.shape[1] if TRANSPOSED else p.shape[0]
        if F.SPLIT_GROUPS:
            col = n0 + tl.arange(0, BLOCK_N)
            if TRANSPOSED:
                keep = dropout_keep(dropout, row[None, :], col[:, None])
            else:
                keep = dropout_keep(dropout, row[:, None], col[None, :])
        else:
            group = (n0 >> 4) + tl.arange(0, BLOCK_N // 16)
            bit = bit_of_column(tl.arange(0, 16))
            if TRANSPOSED:
                bits = dropout_bits(dropout, row[None, :], group[:, None])[:, None, :] >> bit[None, :, None]
                keep = (bits & 1).reshape([BLOCK_N, ROWS]) != 0
            else:
                bits = dropout_bits(dropout, row[:, None], group[None, :])[:, :, None] >> bit[None, None, :]
                keep = (bits & 1).reshape([ROWS, BLOCK_N]) != 0
        p = zero_dropped(p, keep, dropout)
    return p


@triton.jit
def zero_dropped(p, keep, dropout):
    """p, or a zero that the compiler does not know.

    With one that it knows it selects after p is rounded to 16 bits, which takes three instructions for one.
    """
    return tl.where(keep, p, (dropout[5] >> 8).to(tl.float32))  # the threshold is below 256


@triton.jit
def softmax_step(s, m, l, SCALE_LOG2, F: tl.constexpr, CAREFUL: tl.constexpr):
    """One step of the online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1) in base 2.

    ``s`` [M, N] is q.k where F.PLAIN (the scale folds into the exponent: one FFMA an element), else base-2 logits.
    CAREFUL where a row may have met nothing but -inf so far. Returns (p, m, l, factor for the accumulators).
    """
    if F.PLAIN:
        new = tl.maximum(m, tl.max(s, 1) * SCALE_LOG2)
    else:
        new = tl.maximum(m, tl.max(s, 1))
    if CAREFUL:
        safe = tl.where(new == float("-inf"), 0.0, new)
    else:
        safe = new
    if F.PLAIN:
        p = tl.math.exp2(s * SCALE_LOG2 - safe[:, None])
    else:
        p = tl.math.exp2(s - safe[:, None])
    alpha = tl.math.exp2(m - safe)
    return p, new, l * alpha + tl.sum(p, 1), alpha


@triton.jit
def softmax_end(m, l, sink, F: tl.constexpr):
    """lse, and l made safe to divide by, at the end of a row; with sinks m and l began with the sink."""
    nothing = l == 0.0  # the row met no key: l is 0, or it holds the sink alone, and the accumulator is 0 either way
    l_safe = tl.where(nothing, 1.0, l)
    lse = tl.where(nothing, float("-inf"), (m + tl.math.log2(l_safe)) * LN2)
    if F.HAS_SINKS:  # the sink alone: its own bits, by which the backward knows that the row saw nothing
        # l is 1 but for the rounding of sink * LOG2E, at most 2^-24 of it, where m - sink * LOG2E became an FMA
        alone = tl.abs(l - 1.0) <= tl.maximum(tl.abs(m), 1.0) * 1.1920929e-07
        lse = tl.where(alone & (m == sink * LOG2E), sink, lse)
    return lse, l_safe


@triton.jit
def sees_nothing(lse, sink, out, F: tl.constexpr):
    """Which rows saw no key, from their lse and out (parts); with a sink, the keys they may have seen weigh below
    2^-24 together."""
    blind = lse == float("-inf")
    if F.HAS_SINKS:
        size = tl.sum(tl.abs(out[0].to(tl.float32)), 1)
        for i in tl.static_range(1, len(F.DV_PARTS)):
            size += tl.sum(tl.abs(out[i].to(tl.float32)), 1)
        blind = blind | ((lse == sink) & (size == 0.0))
    return blind


@triton.jit
def backward_weights(qk, lse2, row, col, ok, scale, softcap, slope, bias_ptr, stride_bm, stride_bn, weight_ptr, sq, sk,
                     F: tl.constexpr, CHECK: tl.constexpr):  # fmt: skip
    """Softmax weights again, from q.k and lse: (p, d logits / d (scale * q.k)). Both orientations."""
    cap_slope = 1.0
    if F.PLAIN:
        p = tl.math.exp2(qk * (scale * LOG2E) - lse2)
    else:
        s, cap_slope = tile_logits(
            qk, row, col, scale, softcap, slope, bias_ptr, stride_bm, stride_bn, weight_ptr, sq, sk, F
        )
        p = tl.math.exp2(s - lse2)
    if CHECK:
        p = tl.where(ok, p, 0.0)
        if F.HAS_SOFTCAP:
            cap_slope = tl.where(ok, cap_slope, 0.0)  # NaN where the key is NaN
    return p, cap_slope


@triton.jit
def backward_logits(p, weights, dp, delta, ok, keep_scale, F: tl.constexpr, CHECK: tl.constexpr):
    """The gradient of the logits from dout.v and delta: p * (dp - delta), or of the ``weights`` that dropout left."""
    if F.HAS_DROPOUT:
        ds = weights * (dp * keep_scale) - p * delta
    else:
        ds = p * (dp - delta)
    if CHECK:
        ds = tl.where(ok, ds, 0.0)  # dp may be NaN where the value is not seen
    return ds
