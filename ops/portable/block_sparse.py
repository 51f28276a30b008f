"""The walk over the blocks that a block mask lists, and the bits of its partial blocks (see ``ops/block_mask.py``).

A list is pairs of int32: (partial blocks, full blocks), then (position, number) of each partial block and of each full
one, both in rising order. ``number`` finds a partial block's bits; it is -1 for a full block, which is seen whole.
Tiles never straddle blocks: a block's sizes (``F.MASK_M``, ``F.MASK_N``) are multiples of every tile's.
"""

import triton
import triton.language as tl

from .common import masked_start, visible


@triton.jit
def _starts_below(pairs, count, limit, SPAN: tl.constexpr):
    """How many of ``count`` listed blocks of SPAN elements start below ``limit``."""
    CHUNK: tl.constexpr = 128
    found = count * 0
    for start in tl.range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        position = tl.load(pairs + i * 2, mask=i < count, other=0)
        found += tl.sum(((i < count) & (position * SPAN < limit)).to(tl.int32))
    return found


@triton.jit
def plan_blocks(blocks, first, last, full_lo, full_hi, BLOCK: tl.constexpr, SPAN: tl.constexpr, F: tl.constexpr):
    """The tiles of one list, of blocks SPAN long and tiles BLOCK long, within [first, last).

    Masked are the partial blocks, and those full ones that do not lie inside [full_lo, full_hi): where no interval
    rule is given, none of them. Positions 2 and 4 are the counts of full and of masked tiles, as in ``plan_tiles``.
    """
    partial = tl.load(blocks)
    full = tl.load(blocks + 1)
    STEPS: tl.constexpr = SPAN // BLOCK
    if F.INTERVALS:
        pairs = blocks + 2
        before = _starts_below(pairs, partial, first - SPAN + 1, SPAN)
        partial = tl.maximum(_starts_below(pairs, partial, last, SPAN), before)
        pairs = pairs + tl.load(blocks) * 2
        left = _starts_below(pairs, full, first - SPAN + 1, SPAN)
        right = tl.maximum(_starts_below(pairs, full, last, SPAN), left)
        inner = tl.minimum(tl.maximum(_starts_below(pairs, full, full_lo, SPAN), left), right)
        end = tl.minimum(tl.maximum(_starts_below(pairs, full, full_hi - SPAN + 1, SPAN), inner), right)
        skip = tl.load(blocks)  # the full blocks come behind the partial ones
        masked = partial - before + inner - left + right - end
        return (blocks + 2, skip + inner, (end - inner) * STEPS, before, masked * STEPS, partial - before, skip + left,
                inner - left, skip + end)  # fmt: skip
    else:
        none = partial * 0
        return blocks + 2, partial, full * STEPS, none, partial * STEPS, partial, none, none, none


@triton.jit
def tile_at(i, plan, BLOCK: tl.constexpr, SPAN: tl.constexpr, MASKED: tl.constexpr):
    """Where tile ``i`` of the masked or the full ones begins, and the number of its block; SPAN 0: no block mask."""
    if SPAN > 0:
        pairs, full_first, _, before, _, partial, left_first, left, right_first = plan
        STEPS: tl.constexpr = SPAN // BLOCK
        j = i // STEPS
        if MASKED:
            others = j - partial
            other = tl.where(others < left, left_first + others, right_first + others - left)
            at = pairs + tl.where(j < partial, before + j, other) * 2
            number = tl.load(at + 1)
        else:
            at = pairs + (full_first + j) * 2
            number = -1
        return tl.load(at) * SPAN + i % STEPS * BLOCK, number
    else:
        start, full_start, full_tiles, left, _ = plan
        if MASKED:
            return masked_start(i, start, full_start, full_tiles, left, BLOCK), -1
        else:
            return full_start + i * BLOCK, -1


@triton.jit
def seen_in_block(bits_ptr, number, row, n0, F: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Bool tile [rows, BLOCK_N], or transposed: the bits of block ``number`` for the keys from n0.

    A full block (-1) shows everything, an unseen one (-2) nothing. A row's words are loaded once and shared by its
    elements: a word for each element costs 60 registers more at head dim 64.
    """
    BLOCK_N: tl.constexpr = F.BLOCK_N
    MASK_M: tl.constexpr = F.MASK_M
    MASK_N: tl.constexpr = F.MASK_N
    WORDS: tl.constexpr = MASK_N // 32
    first = n0 % MASK_N
    block = bits_ptr + number.to(tl.int64) * ((MASK_M + 1) * WORDS) + first // 32
    at = block + row % MASK_M * WORDS
    has_bits = row * 0 + number >= 0
    other = tl.where(number == -1, -1, 0)
    key = tl.arange(0, BLOCK_N)
    key = key[:, None] if TRANSPOSED else key[None, :]
    word = tl.load(at, mask=has_bits, other=other)
    words = word[None, :] if TRANSPOSED else word[:, None]
    for w in tl.static_range(1, BLOCK_N // 32):
        word = tl.load(at + w, mask=has_bits, other=other)
        words = tl.where(key // 32 == w, word[None, :] if TRANSPOSED else word[:, None], words)
    shift = key % 32
    if BLOCK_N < 32:  # a tile is part of a word
        shift += first % 32
    return ((words >> shift) & 1) != 0


@triton.jit
def keys_of_block(bits_ptr, number, col, use, F: tl.constexpr):
    """Which keys some row of the block sees, from the row of bits behind its rows: the others may hold NaN."""
    MASK_M: tl.constexpr = F.MASK_M
    MASK_N: tl.constexpr = F.MASK_N
    WORDS: tl.constexpr = MASK_N // 32
    at = bits_ptr + number.to(tl.int64) * ((MASK_M + 1) * WORDS) + MASK_M * WORDS + col % MASK_N // 32
    word = tl.load(at, mask=use & (col * 0 + number >= 0), other=-1)
    return use & (((word >> (col % 32)) & 1) != 0)


@triton.jit
def visible_tile(lo, hi, row, n0, number, mask_ptr, stride_mm, stride_mn, sq, sk, F: tl.constexpr,
                 TRANSPOSED: tl.constexpr):  # fmt: skip
    """Bool tile [rows, BLOCK_N], or transposed: which keys from n0 a row sees. ``mask_ptr`` is the dense mask, or the
    bits of a block mask; those know the ends of the sequences."""
    BLOCK_N: tl.constexpr = F.BLOCK_N
    col = n0 + tl.arange(0, BLOCK_N)
    if F.MASK_M > 0:
        ok = seen_in_block(mask_ptr, number, row, n0, F, TRANSPOSED)
    if F.MASK_M == 0 or F.INTERVALS:
        if TRANSPOSED:
            by_rules = visible(
                lo[None, :], hi[None, :], col[:, None], row[None, :], mask_ptr, stride_mm, stride_mn, sq, sk, F
            )
        else:
            by_rules = visible(
                lo[:, None], hi[:, None], col[None, :], row[:, None], mask_ptr, stride_mm, stride_mn, sq, sk, F
            )
        ok = (ok & by_rules) if F.MASK_M > 0 else by_rules
    return ok
