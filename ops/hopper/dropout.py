"""Dropout of a tile in the layouts of the matrix unit, with one call of the generator for 16 columns of a row.

In an accumulator four threads share the 16 columns in the forward, and eight in the backward, whose tile lies the other
way. Each would make the calls of all its elements. Here a thread makes an equal share of the calls, keeps a bit for
each element, and takes its elements' bits from a few hundred bytes of shared memory, through which the layouts change.
"""

from ..portable.common import dropout_bits, dropout_keep, zero_dropped
from .shim import gl, gluon


@gluon.constexpr_function
def _calls_by_row(groups):
    """Of [64, groups]: a thread has rows of its own four lanes, in as many groups as are left to it."""
    bases = [[0, 1 << i] for i in range(groups.bit_length() - 1)] + [[8, 0]]
    lanes = (bases + [[0, 0]])[:2] + [[1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(bases[2:], lanes, [[16, 0], [32, 0]], [], [64, groups])


@gluon.constexpr_function
def _elements_by_row(groups):
    """Of [64, groups, 16]: as wgmma's accumulator [64, 16 * groups]."""
    registers = [[0, 0, 1], [0, 0, 8], [8, 0, 0]] + [[0, 1 << i, 0] for i in range(groups.bit_length() - 1)]
    lanes = [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0, 0], [32, 0, 0]], [], [64, groups, 16])


@gluon.constexpr_function
def _elements_by_key(pairs):
    """Of [4, 16, pairs], two rows each: as wgmma's accumulator [64, 2 * pairs]."""
    registers = [[0, 8, 0]] + [[0, 0, 1 << i] for i in range(2, pairs.bit_length() - 1)]
    lanes = [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[1, 0, 0], [2, 0, 0]], [], [4, 16, pairs])


@gluon.jit
def bits_by_row(dropout, row0, n0, F: gl.constexpr):
    """What dropout keeps of rows row0 to row0 + 64 and BLOCK_N keys from n0, for ``drop_by_row``.

    In two steps, because a bool tile that waits for logits would be held in a register for each element.
    """
    if F.HAS_DROPOUT and not F.SPLIT_GROUPS:
        GROUPS: gl.constexpr = F.BLOCK_N // 16
        CALLS: gl.constexpr = _calls_by_row(GROUPS)
        row = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, CALLS))
        group = (n0 >> 4) + gl.arange(0, GROUPS, layout=gl.SliceLayout(0, CALLS))
        bits = dropout_bits(dropout, row[:, None], group[None, :])
        return gl.convert_layout(bits, gl.SliceLayout(2, _elements_by_row(GROUPS)))
    else:
        return 0


@gluon.jit
def drop_by_row(p, bits, dropout, row0, n0, LAYOUT: gl.constexpr, DTYPE: gl.constexpr, F: gl.constexpr):
    """p [64, BLOCK_N], rounded to the 16-bit DTYPE, with zeros where it is dropped."""
    BLOCK_N: gl.constexpr = F.BLOCK_N
    if F.SPLIT_GROUPS:
        row = row0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        col = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        return zero_dropped(p, dropout_keep(dropout, row[:, None], col[None, :]), dropout).to(DTYPE)
    else:
        c = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, _elements_by_row(BLOCK_N // 16))))
        words = (bits[:, :, None] << (c >> 2).to(gl.uint32)[None, None, :]).reshape([64, BLOCK_N])
        first = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT)) & 2  # byte of the left one of two neighbours
        return _keep_pairs(p.to(DTYPE), gl.convert_layout(words, LAYOUT), (0xDD88 + 0x1111 * first)[None, :])


@gluon.jit
def _keep_pairs(x, words, select):
    """x, of 16 bits, with zeros where the chosen byte of its word is positive as an int8; two neighbours at a time.

    ``select`` is 0x88 + 0x11 * (the left one's byte) + 256 * (0xCC + 0x11 * (the right one's byte)): the instruction
    makes of each chosen byte's sign a byte of a mask.
    """
    code: gl.constexpr = "{ .reg .b32 mask; prmt.b32 mask, $1, $2, $3; and.b32 $0, mask, $5; }"
    return gl.inline_asm_elementwise(
        code, "=r,r,r,r,r,r", [words, select, x], dtype=x.dtype, is_pure=True, pack=2
    )


@gluon.jit
def bits_by_key(dropout, row0, n0, ROWS: gl.constexpr, F: gl.constexpr):
    """As ``bits_by_row``, of ROWS rows and 64 keys from n0, for ``drop_by_key``; odd rows in the lower half bytes."""
    if F.HAS_DROPOUT and not F.SPLIT_GROUPS:
        CALLS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        row = row0 + 2 * gl.arange(0, ROWS // 2, layout=gl.SliceLayout(0, CALLS))
        group = (n0 >> 4) + gl.arange(0, 4, layout=gl.SliceLayout(1, CALLS))
        even = dropout_bits(dropout, row[None, :], group[:, None])
        odd = dropout_bits(dropout, row[None, :] + 1, group[:, None])
        return gl.convert_layout(even | (odd >> 4), gl.SliceLayout(1, _elements_by_key(ROWS // 2)))
    else:
        return 0


@gluon.jit
def drop_by_key(x, bits, dropout, row0, n0, ROWS: gl.constexpr, LAYOUT: gl.constexpr, HALF: gl.constexpr,
                F: gl.constexpr):  # fmt: skip
    """x [64 keys, ROWS], of 16 bits (HALF) or float32, with zeros where it is dropped."""
    if F.SPLIT_GROUPS:
        row = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT))
        col = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        return zero_dropped(x, dropout_keep(dropout, row[None, :], col[:, None]), dropout)
    else:
        c = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, _elements_by_key(ROWS // 2))))
        even = bits[:, None, :] << (c >> 2).to(gl.uint32)[None, :, None]
        words = gl.convert_layout(gl.join(even, even << 4).reshape([64, ROWS]), LAYOUT)
        byte = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT)) & 3
        if HALF:
            return _keep_pairs(x, words, (0xCC88 + 0x1111 * byte)[:, None])
        else:
            return _keep(x, words, (0x8888 + 0x1111 * byte)[:, None])


@gluon.jit
def _keep(x, words, select):
    """float32 x, with zeros where a byte of its word is positive as an int8; ``select`` is 0x8888 + 0x1111 * byte."""
    code: gl.constexpr = "{ .reg .b32 mask; prmt.b32 mask, $1, $1, $2; and.b32 $0, mask, $3; }"
    return gl.inline_asm_elementwise(code, "=r,r,r,r", [words, select, x], dtype=gl.float32, is_pure=True, pack=1)
