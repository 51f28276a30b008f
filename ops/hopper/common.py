"""Tile steps of the Hopper kernels, and the constexpr that says how a kernel is cut.

What is elementwise and made of scalars comes from ``portable/common.py``; what makes layouts or reduces is here.
"""

# mypy: disable-error-code="assignment"
# (tuples grow in jitted functions)
from __future__ import annotations

from typing import NamedTuple

from ..portable.common import INT_MAX, Features, masked_start, row_ranges
from .shim import gl, gluon

GROUP_ROWS = 64  # query rows of a warpgroup: the M of one wgmma


class Cut(NamedTuple):
    """How a kernel is cut: the second constexpr of the Hopper kernels, beside ``Features``."""

    D: int  # padded to a power of two
    DV: int
    GROUPS: int  # consumer warpgroups, each with 64 rows
    STAGES: int  # K and V tiles in flight
    TURNS: bool  # warpgroups take turns at the matrix unit
    SPLIT: bool  # a block boundary keeps the wait for P V behind the softmax
    REGISTERS: int
    LOGITS: Features  # the features without key_log_weight, which the kernel adds itself
    Q_SLOTS: int  # 2: the queries of the next item are loaded during this one
    OUT_COLUMNS: int  # of out, staged at once
    CAPPED: bool  # tanh is computed by an instruction, on logits that nothing is added to
    HALVES: bool  # half of a tile's exponentials come behind the wait for P V, over the work that waited for it
    STACKED: bool = False  # tiles of packed sequences are counted behind each other: see packed_tile


@gluon.jit
def tile_hull(ranges_ptr, stride_rm, row0, sq, sk, window_left, window_right, ROWS: gl.constexpr, F: gl.constexpr):
    """Of query rows row0 to row0 + ROWS: the keys [first, last) that some row sees, [full_lo, full_hi) that all see.

    The fifth value says that key_ranges may leave a hole between first and last. For one warp.
    """
    if F.HAS_RANGES:
        WIDTH: gl.constexpr = 128 if ROWS <= 128 else 256
        lane = gl.arange(0, WIDTH, layout=gl.BlockedLayout([WIDTH // 32], [32], [1], [0]))
        row = row0 + lane
        valid = (row < sq) & (lane < ROWS)
        lo, hi = row_ranges(ranges_ptr, stride_rm, row, sq, sk, window_left, window_right, F)
        before = gl.maximum(row - 1, 0)
        lo_before, hi_before = row_ranges(ranges_ptr, stride_rm, before, sq, sk, window_left, window_right, F)
        some = valid & (lo < hi)
        first = gl.min(gl.where(some, lo, INT_MAX), 0)
        last = gl.max(gl.where(some, hi, 0), 0)
        full_lo = gl.max(gl.where(valid, lo, 0), 0)
        full_hi = gl.min(gl.where(valid, hi, INT_MAX), 0)
        touches = (lo_before < hi_before) & (lo <= hi_before) & (lo_before <= hi)
        breaks = some & ((lane == 0) | (touches == 0))
        gaps = (gl.sum(breaks.to(gl.int32), 0) > 1).to(gl.int32)
    else:  # both ends rise with the row
        row1 = gl.minimum(row0 + ROWS, sq) - 1
        first, full_hi = row_ranges(ranges_ptr, stride_rm, row0, sq, sk, window_left, window_right, F)
        full_lo, last = row_ranges(ranges_ptr, stride_rm, row1, sq, sk, window_left, window_right, F)
        last = gl.maximum(last, 0)
        gaps = row0 * 0
    return gl.minimum(first, last), last, full_lo, full_hi, gaps


@gluon.jit
def longest_first(t, work, section):
    """The t-th piece of work: its head, and how many tiles of that head come after it.

    ``section`` heads have ``work`` tiles together: first the first tiles of each, then the second ones, ...
    """
    at = t % work
    return t // work * section + at % section, (work - 1 - at) // section


@gluon.jit
def packed_tile(tile, cu_ptr, sequences, total, ROWS: gl.constexpr):
    """Tile number ``tile`` of all packed sequences': its sequence, and its first row there. For one warp.

    Sequence i's tiles of ROWS rows begin at number cu_seqlens[i] // ROWS + i: room for all of them, and at most one is
    empty. With as many for each sequence as the longest one has, programs spent their time on claiming empty ones.
    """
    WIDTH: gl.constexpr = 256
    lane = gl.arange(0, WIDTH, layout=gl.BlockedLayout([WIDTH // 32], [32], [1], [0]))
    first_tile = tile * 0 - 1
    sequence = tile * 0
    for at in range(0, sequences, WIDTH):
        i = at + lane
        start = gl.load(cu_ptr + i, mask=i < sequences, other=0)
        first = gl.minimum(gl.maximum(start, 0), total) // ROWS + i
        begun = (first <= tile) & (i < sequences)
        first_tile = gl.maximum(first_tile, gl.max(gl.where(begun, first, -1), 0))
        sequence += gl.sum(begun.to(gl.int32), 0)
    # before the first sequence: in none
    return gl.maximum(sequence - 1, 0), gl.where(first_tile < 0, INT_MAX, (tile - first_tile) * ROWS)


@gluon.jit
def leave_counters(counter_ptr):
    """This program takes no more items; the last one leaves the two counters as it found them."""
    if gl.atomic_add(counter_ptr + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter_ptr, 0)
        gl.store(counter_ptr + 1, 0)


@gluon.jit
def pack_record(values):
    """Up to 16 scalars as one tensor [16], for one warp."""
    at = gl.arange(0, 16, layout=gl.BlockedLayout([1], [32], [1], [0]))
    record = at * 0
    for i in gl.static_range(len(values)):
        record = gl.where(at == i, values[i], record)
    return record


@gluon.jit
def unpack_record(memory, COUNT: gl.constexpr, WARPS: gl.constexpr = 4):
    """The scalars that ``pack_record`` packed, for so many warps; every thread reads all of them."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([16], [32], [WARPS], [0])
    at = gl.arange(0, 16, layout=LAYOUT)
    record = memory.load(LAYOUT)
    out = ()
    for i in gl.static_range(COUNT):
        out = out + (gl.sum(gl.where(at == i, record, 0), 0),)
    return out


@gluon.jit
def tile_start(i, plan, BLOCK: gl.constexpr):
    """Where the i-th tile of a walk begins: the masked tiles come first."""
    start, full_start, full_tiles, left, masked = plan
    at_edge = masked_start(i, start, full_start, full_tiles, left, BLOCK)
    return gl.where(i < masked, at_edge, full_start + (i - masked) * BLOCK)


@gluon.jit
def hide(s, lo, hi, col, F: gl.constexpr):
    """-inf where the row may not see the key."""
    ok = col[None, :] < hi[:, None]
    if F.HAS_LEFT or F.HAS_RANGES:
        ok = ok & (col[None, :] >= lo[:, None])
    return gl.where(ok, s, float("-inf"))


@gluon.jit
def new_maximum(s, m, scale_log2, FOLD: gl.constexpr):
    """The first half of a step of the online softmax in base 2 (see portable/common.py, softmax_step).

    The new m, what to take from the logits, and the factor of what was summed before; FOLD scales in the exponent.
    """
    if FOLD:
        new = gl.maximum(m, gl.max(s, 1) * scale_log2)
    else:
        new = gl.maximum(m, gl.max(s, 1))
    safe = gl.where(new == float("-inf"), 0.0, new)  # a row that has met nothing yet
    return new, safe, gl.exp2(m - safe)


@gluon.jit
def exponentials(s, safe, scale_log2, FOLD: gl.constexpr, SUMS: gl.constexpr):
    """The second half of the step, for some columns: weights, and [64, 8] sums of them, one for each thread (SUMS).

    An exchange of sums between the four threads of a row in every tile cost 2 % at head dim 128, 16 % at 64 (H100,
    causal, S 16384).
    """
    if FOLD:
        p = gl.exp2(s * scale_log2 - safe[:, None])
    else:
        p = gl.exp2(s - safe[:, None])
    return p, gl.convert_layout(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 8]), 1), SUMS)


@gluon.jit
def halves(x, LAYOUT: gl.constexpr):
    """The left and the right columns of a tile, in registers as they are."""
    left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
    return gl.convert_layout(left, LAYOUT), gl.convert_layout(right, LAYOUT)
