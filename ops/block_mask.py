"""torch's flex_attention BlockMask as lists of blocks and bits, which kernels walk, or as a bool mask.

The lists are in blocks of our own, 64 or 128 long, so that a kernel's tiles never straddle one, whatever BLOCK_SIZE the
BlockMask has. mask_mod is evaluated on partial blocks alone; what it says also tells which of them are full or empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .watch import state_of

_WORD = 32
_CHUNK = 1 << 23  # positions evaluated at a time: 64 MiB of int64
_UNSEEN, _PARTIAL, _FULL = 0, 1, 2


class BlockLists(NamedTuple):
    """An evaluated BlockMask, as ``flash_attention(mask=...)`` takes it. Made by ``evaluate_block_mask``.

    A list is int32 pairs: (partial blocks, full blocks), then (position, number) of the partial, the full and the
    unseen blocks, each in rising order. Partial block ``number`` is ``bits[number]``: a bit for each row and key, and
    behind the rows one row of bits that says which keys some row sees. The number of a full block is -1, of an unseen
    one -2.
    """

    rows: Tensor  # int32 [B or 1, Hq or 1, ceil(Sq / CQ), ceil(Sk / CK) + 1, 2]
    columns: Tensor  # int32 [B or 1, Hq or 1, ceil(Sk / CK), ceil(Sq / CQ) + 1, 2]
    bits: Tensor  # int32 [partial blocks, CQ + 1, CK / 32]
    lengths: tuple[int, int]  # (Sq, Sk)


def evaluate_block_mask(block_mask: Any) -> BlockLists:
    """The lists and bits of a BlockMask, for ``flash_attention(mask=...)``.

    ``flash_attention`` does this by itself. By hand it serves where the result cannot be kept with the BlockMask: in
    inference mode, before the capture of a CUDA graph, and before a compiled function, where the number of partial
    blocks is not known and bits are made for every block (an eighth of a byte for each query and key).

    Args:
        block_mask: of ``create_block_mask`` or ``BlockMask.from_kv_blocks``, with its mask_mod. Its lists of queries
            (q_indices) are not read: they follow from those of keys.

    Returns:
        BlockLists, on the device of the BlockMask. Memory: 16 bytes for each block, and an eighth of a byte for each
        query and key of partial blocks.

    Raises:
        TypeError: no BlockMask. ValueError: its shapes do not agree.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask: expected a flex_attention BlockMask, got {type(block_mask).__name__}")
    _check_lists(block_mask)
    lengths, spans = block_mask.seq_lengths, _spans(block_mask)
    with torch.no_grad():
        states, rule = _states(block_mask, spans, lengths), _rule(block_mask, spans, lengths)
        evaluate = _evaluate_partial if _may_wait(states) else _evaluate_all
        numbers, bits = evaluate(rule, states, spans, lengths)
        return BlockLists(_list(numbers), _list(numbers.transpose(2, 3)), bits, (lengths[0], lengths[1]))


def read_mask(mask: Any, q: Tensor, k: Tensor, dense: bool) -> tuple[Any, tuple[Tensor | None, ...]]:
    """A mask that is no tensor, as a bool mask or as (rows, columns, bits) of ``BlockLists``; the other is absent.

    Something that is neither BlockMask nor BlockLists is returned as it is, for the checks to name.
    """
    from torch.nn.attention.flex_attention import BlockMask

    absent = (None, None, None)
    if isinstance(mask, BlockMask):
        _check_lengths(mask.seq_lengths, q, k)
        if dense:
            return dense_mask(mask), absent
        return None, _kept_lists(mask)[:3]
    if isinstance(mask, BlockLists):
        _check_lengths(mask.lengths, q, k)
        return (dense_of_lists(mask), absent) if dense else (None, mask[:3])
    _check_no_function(mask)
    return mask, absent


def _check_no_function(mask: Any) -> None:
    if callable(mask):
        raise NotImplementedError(
            "mask: expected a bool tensor or a flex_attention BlockMask, got a function; give a mask_mod to "
            "create_block_mask, and say a score_mod as bias, alibi_slopes or softcap"
        )


def _check_lengths(lengths: Any, q: Tensor, k: Tensor) -> None:
    if tuple(lengths) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"mask: expected a BlockMask for {q.shape[2]} queries and {k.shape[2]} keys, got one for {tuple(lengths)}; "
            "make it with Q_LEN and KV_LEN of this call"
        )


def _check_lists(block_mask: Any) -> None:
    """The lists of keys, and the sizes that the others follow from."""
    (sq, _), (rows, _) = block_mask.seq_lengths, block_mask.BLOCK_SIZE
    if block_mask.mask_mod is None:
        raise ValueError("mask: expected a BlockMask with a mask_mod (slicing one drops it), got None")
    for counts, indices in _key_lists(block_mask):
        expected = (*indices.shape[:2], -(-sq // rows))
        if indices.dim() != 4 or tuple(counts.shape) != expected or tuple(indices.shape[:3]) != expected:
            raise ValueError(
                f"mask: expected the lists of a BlockMask as [B, H, {-(-sq // rows)} row blocks] and [B, H, row "
                f"blocks, key blocks], got {tuple(counts.shape)} and {tuple(indices.shape)}; use create_block_mask"
            )


def _key_lists(block_mask: Any) -> list[tuple[Tensor, Tensor]]:
    """(counts, indices) of the partial blocks, and of the full ones where there are lists of them."""
    lists = [(block_mask.kv_num_blocks, block_mask.kv_indices)]
    if block_mask.full_kv_num_blocks is not None:
        lists.append((block_mask.full_kv_num_blocks, block_mask.full_kv_indices))
    return lists


def _kept_lists(block_mask: Any) -> BlockLists:
    """``evaluate_block_mask``, once for each BlockMask and state of all that its mask_mod reads."""
    if torch.compiler.is_compiling():
        return evaluate_block_mask(block_mask)
    state = state_of((block_mask.mask_mod, block_mask.seq_lengths, block_mask.BLOCK_SIZE, _key_lists(block_mask)))
    kept = block_mask.__dict__.get("_hf_flash_mc_lists")
    if state is not None and kept is not None and kept[0] == state:
        return kept[1]
    found = evaluate_block_mask(block_mask)
    if state is not None and _may_wait(block_mask.kv_num_blocks):
        block_mask._hf_flash_mc_lists = state, found
    return found


def _may_wait(x: Tensor) -> bool:
    """Whether the number of partial blocks may be read: plain tensors, no tracing, no capture of a CUDA graph."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or torch._C._len_torch_dispatch_stack():
        return False
    return not (x.is_meta or torch._C._are_functorch_transforms_active()) and not (
        x.is_cuda and torch.cuda.is_current_stream_capturing()
    )


# ---- blocks ----------------------------------------------------------------------------------------------------------


def _spans(block_mask: Any) -> tuple[int, ...]:
    """Rows and keys of our blocks: as coarse as those of the BlockMask, and no tile is longer than 128."""
    return tuple(128 if n % 128 == 0 else 64 for n in block_mask.BLOCK_SIZE)


def _grids(block_mask: Any) -> tuple[Tensor, Tensor]:
    """Bool [B, H, row blocks, key blocks] of the BlockMask's own blocks: those listed, and those listed as full."""
    columns = -(-block_mask.seq_lengths[1] // block_mask.BLOCK_SIZE[1])
    lists = _key_lists(block_mask)
    partial, *full = (_listed(counts, indices, columns) for counts, indices in lists)
    whole = full[0] if full else torch.zeros_like(partial)
    return partial | whole, whole


def _listed(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Bool [B, H, rows, columns]: which blocks are among the first ``counts`` of ``indices``."""
    listed = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    grid = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=counts.device)
    listed = listed & (indices >= 0) & (indices < columns)
    return grid.scatter(-1, torch.where(listed, indices, columns).long(), True)[..., :columns]  # the last: unlisted


def _states(block_mask: Any, spans: tuple[int, ...], lengths: tuple[int, int]) -> Tensor:
    """int32 [B, H, Qb, Kb] of our blocks: unseen, full where all of the BlockMask's blocks in it are, else partial."""
    ends, device = [], block_mask.kv_num_blocks.device
    for span, own, length in zip(spans, block_mask.BLOCK_SIZE, lengths, strict=True):
        start = torch.arange(0, length, span, device=device)
        ends.append((start // own, (start + span).clamp(max=length).sub(1) // own + 1))
    (top, bottom), (left, right) = ends
    seen, full = (_count(grid, top, bottom, left, right) for grid in _grids(block_mask))
    whole = full == (bottom - top)[:, None] * (right - left)
    whole = whole & (torch.arange(1, left.numel() + 1, device=device) * spans[1] <= lengths[1])
    return torch.where(whole, _FULL, torch.where(seen > 0, _PARTIAL, _UNSEEN)).to(torch.int32)


def _count(grid: Tensor, top: Tensor, bottom: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """How many of ``grid`` lie in each rectangle [top, bottom) x [left, right)."""
    total = F.pad(grid.to(torch.int64).cumsum(2).cumsum(3), (1, 0, 1, 0))
    rows = total[:, :, bottom] - total[:, :, top]
    return rows[..., right] - rows[..., left]


def _list(numbers: Tensor) -> Tensor:
    """int32 [B, H, n, m + 1, 2], the lists of ``BlockLists``, from the numbers [B, H, n, m] of blocks."""
    partial, full = numbers >= 0, numbers == -1
    order = torch.argsort(torch.where(partial, 0, torch.where(full, 1, 2)), dim=-1, stable=True)
    pairs = torch.stack([order, numbers.gather(-1, order)], -1)
    counts = torch.stack([partial.sum(-1), full.sum(-1)], -1)
    return torch.cat([counts[..., None, :], pairs], -2).to(torch.int32)


def block_table(rows: Tensor) -> Tensor:
    """int32 [B or 1, Hq or 1, Qb, Kb]: the number of every block, from the lists of rows."""
    at, numbers = rows[..., 1:, :].unbind(-1)
    return torch.empty_like(numbers, memory_format=torch.contiguous_format).scatter_(-1, at.long(), numbers)


# ---- bits ------------------------------------------------------------------------------------------------------------


def _rule(block_mask: Any, spans: tuple[int, ...], lengths: tuple[int, int]) -> Any:
    """What the BlockMask shows in our partial blocks, as a mask_mod that may be asked past the ends."""
    (rows, keys), mask_mod, grids = block_mask.BLOCK_SIZE, block_mask.mask_mod, None
    if rows % spans[0] or keys % spans[1]:  # blocks of ours may hold several, partial, full and unseen ones
        grids = _grids(block_mask)

    def rule(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        row, key = i.clamp(max=lengths[0] - 1), j.clamp(max=lengths[1] - 1)
        seen = mask_mod(b, h, row, key)
        if grids is not None:
            listed, full = (grid[b, h, row // rows, key // keys] for grid in grids)
            seen = (seen & listed) | full
        return seen & (i < lengths[0]) & (j < lengths[1])

    return rule


def _evaluate_partial(rule: Any, states: Tensor, spans: tuple[int, ...], lengths: Any) -> tuple[Tensor, Tensor]:
    """The numbers of blocks, int64 [B, H, Qb, Kb], and bits of those that are partial indeed; waits for the device."""
    at = (states == _PARTIAL).nonzero()
    numbers = torch.where(states == _FULL, -1, -2).long()
    bits, kept, full = [states.new_empty(0, spans[0] + 1, spans[1] // _WORD)], [at[:0]], [at[:0]]
    for part, seen in _chunks(rule, at, spans):
        some, whole = _judge(seen, part[:, 2] * spans[0], lengths[0])
        partial = some & ~whole
        bits.append(_pack(seen[partial]))
        kept.append(part[partial])
        full.append(part[whole])
    numbers[torch.cat(full).unbind(1)] = -1
    found = torch.cat(kept)
    numbers[found.unbind(1)] = torch.arange(len(found), device=at.device)
    return numbers, torch.cat(bits)


def _chunks(rule: Any, at: Tensor, spans: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Some of the blocks ``at`` [n, 4] at a time, and what they show: bool [n, CQ, CK]."""
    from torch.nn.attention.flex_attention import create_mask

    rows, keys = spans
    for part in at.split(max(1, _CHUNK // (rows * keys))):
        if not len(part):
            continue
        yield part, create_mask(_at_blocks(rule, part, spans), len(part), 1, rows, keys, device=at.device)[:, 0]


def _at_blocks(rule: Any, at: Tensor, spans: tuple[int, ...]) -> Any:
    """The rule as a mask_mod of (index into ``at``, nothing, row and key within that block)."""
    b, h, row, key = at[:, 0], at[:, 1], at[:, 2] * spans[0], at[:, 3] * spans[1]

    def of_block(n: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return rule(b[n], h[n], row[n] + i, key[n] + j)

    return of_block


def _evaluate_all(rule: Any, states: Tensor, spans: tuple[int, ...], lengths: Any) -> tuple[Tensor, Tensor]:
    """The same without waiting, for graphs: every block gets bits. Compiled, nothing of the order Sq * Sk but these."""
    from torch.nn.attention.flex_attention import create_mask

    (b, h, m, n), (rows, keys) = states.shape, spans
    seen = create_mask(rule, b, h, m * rows, n * keys, device=states.device)
    seen = seen.view(b, h, m, rows, n, keys).transpose(3, 4).reshape(-1, rows, keys)
    first = torch.arange(0, m * rows, rows, device=states.device)[:, None].expand(b, h, m, n).reshape(-1)
    some, whole = (x.view(b, h, m, n) for x in _judge(seen, first, lengths[0]))
    index = torch.arange(states.numel(), device=states.device).view(b, h, m, n)
    of_partial = torch.where(whole, -1, torch.where(some, index, -2))
    return torch.where(states == _PARTIAL, of_partial, torch.where(states == _FULL, -1, -2)), _pack(seen)


def _judge(seen: Tensor, first: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which blocks [n, CQ, CK], whose first rows are given, show something, and which all to every row there is."""
    past = first[:, None] + torch.arange(seen.shape[1], device=seen.device) >= rows
    return seen.flatten(1).any(1), (seen | past[..., None]).flatten(1).all(1)


def _pack(seen: Tensor) -> Tensor:
    """int32 [n, CQ + 1, CK / 32]: key j is bit j % 32 of word j // 32; the last row is the union of all."""
    seen = torch.cat([seen, seen.any(1, keepdim=True)], 1)
    weight = torch.tensor([1 << i for i in range(_WORD - 1)] + [-(1 << (_WORD - 1))], device=seen.device)
    return (seen.unflatten(-1, (-1, _WORD)) * weight).sum(-1).to(torch.int32)


# ---- as a bool mask --------------------------------------------------------------------------------------------------


def dense_mask(block_mask: Any) -> Tensor:
    """``[B or 1, Hq or 1, Sq, Sk]``, True = seen: exactly what flex_attention would show of ``block_mask``.

    A block that is listed as full is seen whole; a block that is listed as partial is seen where mask_mod says so;
    any other block is not seen.
    """
    from torch.nn.attention.flex_attention import create_mask

    _check_lists(block_mask)
    (sq, sk), (b, h, _) = block_mask.seq_lengths, block_mask.kv_num_blocks.shape
    device, sizes = block_mask.kv_num_blocks.device, block_mask.BLOCK_SIZE
    said = create_mask(block_mask.mask_mod, b, h, sq, sk, device=device)
    rows, keys = torch.arange(sq, device=device) // sizes[0], torch.arange(sk, device=device) // sizes[1]
    listed, full = (grid[:, :, rows][..., keys] for grid in _grids(block_mask))
    return (said & listed) | full


def dense_of_lists(lists: BlockLists) -> Tensor:
    """``[B or 1, Hq or 1, Sq, Sk]``, True = seen."""
    table, (sq, sk) = block_table(lists.rows), lists.lengths
    bits = (lists.bits[:, :-1, :, None] >> torch.arange(_WORD, device=table.device)) & 1  # [P, CQ, CK / 32, 32]
    bits = bits.flatten(2).bool()
    unseen = bits.new_zeros(1, *bits.shape[1:])
    blocks = torch.cat([unseen, ~unseen, bits])
    return blocks[table.long() + 2].transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :sq, :sk]


def stand_ins(mask: Any, q: Tensor, k: Tensor, dense: bool) -> tuple[Any, tuple[Tensor | None, ...]]:
    """What ``read_mask`` gives, raising what it raises, with tensors without values: for descriptions of a call."""
    from torch.nn.attention.flex_attention import BlockMask

    absent = (None, None, None)
    if not isinstance(mask, (BlockMask, BlockLists)):
        _check_no_function(mask)
        return mask, absent
    _check_lengths(mask.lengths if isinstance(mask, BlockLists) else mask.seq_lengths, q, k)
    if dense:
        return None, absent
    if isinstance(mask, BlockLists):
        return None, mask[:3]
    counts, (cq, ck) = mask.kv_num_blocks, _spans(mask)
    m, n = -(-mask.seq_lengths[0] // cq), -(-mask.seq_lengths[1] // ck)
    shapes = (*counts.shape[:2], m, n + 1, 2), (*counts.shape[:2], n, m + 1, 2), (0, cq + 1, ck // _WORD)
    return None, tuple(torch.empty(shape, dtype=torch.int32, device=q.device) for shape in shapes)
