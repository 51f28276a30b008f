"""What the fused backward and its form for wide heads share: its schedule, names of barriers, steps on tiles."""

from typing import NamedTuple

from ..portable.common import key_in_use, row_ranges
from .shim import bar_sync, fence_async_shared, gl, gluon, tma_store, tma_store_wait, warpgroup_mma

SUB = gl.constexpr(64)  # query rows of one matrix product
HALF = gl.constexpr(64)  # keys of one warpgroup
# named barriers: stage s of q and dout (of q alone where WIDE) is free, and then dout is; warpgroup c's half of slot s
# is written; all meet; keys and values are free
FREE, DO_FREE, GIVEN, ALL = gl.constexpr(4), gl.constexpr(7), gl.constexpr(8), gl.constexpr(12)
KEYS_FREE = gl.constexpr(13)


class Schedule(NamedTuple):
    """How a kernel variant is laid out in time and memory; a constexpr like ``Features``."""

    SUBS: int = 1  # sub-tiles of 64 query rows in one step
    STAGES: int = 2  # of q and dout; of q alone where WIDE
    AHEAD: bool = False  # the next step's scores go to the matrix unit before this step's dQ, not behind it
    K_REGS: bool = False  # keys as a register operand: less traffic in shared memory
    SPLIT: bool | None = None  # programs share a key tile and add dK, dV into float32; None: as the grid asks
    REGS: int = 240
    WIDE: bool = False  # a warpgroup sums half the columns, not the gradients of half the keys: see backward_wide.py
    CAP_FORM: int = 0  # of softcap: see capped, in portable/common.py
    STACKED: bool = False  # tiles of packed sequences are counted behind each other: see packed_tile


@gluon.jit
def zero_rows(tile, keep, LAYOUT: gl.constexpr):
    """Zeros in the rows of a shared-memory tile that are not kept."""
    x = tile.load(LAYOUT)
    tile.store(gl.where(keep[:, None], x, gl.zeros_like(x)))


@gluon.jit
def clean_keys(k, v, start, stop, seen_ptr, weight_ptr, sq, sk, window_left, MEET: gl.constexpr, F: gl.constexpr):
    """Zeros in a warpgroup's keys and values, from key ``start``, where no row sees them; MEET: both then wait.

    They may hold NaN, and 0 * NaN is NaN; so may a packed neighbour's, before the item's last key, ``stop``.
    """
    if F.HAS_RANGES or F.HAS_WEIGHT or (F.SANITIZE and F.HAS_LEFT):
        _clean_keys(k, v, start, seen_ptr, weight_ptr, sq, sk, window_left, MEET, F)
    elif F.VARLEN:  # noqa: SIM102 (a branch at run time inside one at compile time)
        if stop > sk:
            _clean_keys(k, v, start, seen_ptr, weight_ptr, sq, sk, window_left, MEET, F)


@gluon.jit
def _clean_keys(k, v, start, seen_ptr, weight_ptr, sq, sk, window_left, MEET: gl.constexpr, F: gl.constexpr):
    CLEAN: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    own = start + gl.arange(0, k.shape[0], layout=gl.SliceLayout(1, CLEAN))
    use = key_in_use(weight_ptr, own, sk, F)
    if F.HAS_RANGES:
        use = use & (gl.load(seen_ptr + own) != 0)
    elif F.HAS_LEFT:
        use = use & (own >= sk - sq - window_left)
    zero_rows(k, use, CLEAN)
    zero_rows(v, use, CLEAN)
    fence_async_shared()
    if MEET:
        bar_sync(ALL, 256)


@gluon.jit
def only_seen(p, col, row, rows, sq, sk, window_left, window_right, weight_ptr, START: gl.constexpr,
              LAYOUT: gl.constexpr, F: gl.constexpr):  # fmt: skip
    """p [keys, queries] with zeros where a query does not see a key; ``rows`` has the queries' bounds from START."""
    COUNT: gl.constexpr = p.shape[1]
    if F.HAS_RANGES:  # as float32, which is exact below 2^24
        key = col.to(gl.float32)
        low = rows.slice(2 * SUB + START, COUNT, 0).load(gl.SliceLayout(0, LAYOUT))
        p = gl.where(key[:, None] >= low[None, :], p, 0.0)
        high = rows.slice(3 * SUB + START, COUNT, 0).load(gl.SliceLayout(0, LAYOUT))
        p = gl.where(key[:, None] < high[None, :], p, 0.0)
    else:
        lo, hi = row_ranges(weight_ptr, 0, row, sq, sk, window_left, window_right, F)
        p = gl.where(col[:, None] < hi[None, :], p, 0.0)
        if F.HAS_LEFT:
            p = gl.where(col[:, None] >= lo[None, :], p, 0.0)
    return p


@gluon.jit
def scores(keys, queries, zero):
    """Keys times queries^T (or values times dout^T), as a product in flight."""
    return warpgroup_mma(keys, queries.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def add_rows(ptr, stride, tile, row0, rows, columns, LAYOUT: gl.constexpr):
    """Add a tile to the rows from row0 of a float32 [rows, columns] matrix; the order of additions is not fixed."""
    row = row0 + gl.arange(0, tile.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    at = ptr + row.to(gl.int64)[:, None] * stride + column[None, :]
    gl.atomic_add(at, tile, mask=(row < rows)[:, None] & (column < columns)[None, :], sem="relaxed")


@gluon.jit
def store_tiles(dk_desc, dv_desc, at, dk, dv, CID: gl.constexpr):
    """The tiles of dK and dV that both warpgroups have staged, each by one of them in one bulk copy."""
    if CID == 0:
        tma_store(dk_desc, at, dk.reshape((1, 1, dk.shape[0], dk.shape[1])))
    else:
        tma_store(dv_desc, at, dv.reshape((1, 1, dv.shape[0], dv.shape[1])))
    tma_store_wait(0)


@gluon.jit
def store_rows(ptr, stride, staged, row0, rows, columns):
    """The rows from row0 of a [rows, columns] matrix, from the shared memory [64, width] where they are staged."""
    WIDTH: gl.constexpr = staged.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = row0 + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    at = ptr + row.to(gl.int64)[:, None] * stride + column[None, :]
    gl.store(at, staged.load(LAYOUT), mask=(row < rows)[:, None] & (column < columns)[None, :])


@gluon.jit
def tile_memory(COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, DTYPE: gl.constexpr):
    """Shared memory for COUNT tiles, as bulk copies and matrix products want it."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], DTYPE)
    return gl.allocate_shared_memory(DTYPE, [COUNT, ROWS, COLUMNS], layout)
