"""THE mask function: transformers' opaque mask patterns as int32 key ranges, O(S) instead of O(S^2).

Every pattern of the library (causal, sliding window, chunks, bidirectional, packed documents, image blocks) lets a
query row see one contiguous range of keys around its own position. The form handed to the attention function is

- ``[B, 1, Q, 2]`` int32: row i sees keys lo <= j < hi;
- ``[B, 1, K + Q, 4]`` int32 where padding may have holes: the last Q rows hold (lo, hi, 0, 0), the first K rows hold,
  four times, the bits of a float32 log weight of each key, 0 or -inf. It is 4-D because transformers hands 4-D masks
  through untouched (static caches, `create_masks_for_generate`), and the two widths tell the forms apart even after
  a model has sliced rows off;
- ``[B, 1, Q, K]`` bool where the pattern is not a range: a user's own or/and mask functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils as hf
from transformers.utils import is_tracing

from .support import FLOAT_MASKS, SLICES_MASKS, wants_dense_masks

PROBE_BASE, PROBE_DIGITS = 64, 4  # 64 ** 4 = 16.8 million keys; fixed, as a count from the length would recompile
_INF_BITS = -8388608  # the bits of float32 -inf, as int32
ALL_KEYS = 1 << 30  # where everything is seen: more keys may come than a mask was made for (the caches of BERT)


class Pattern(NamedTuple):
    """An intersection of the library's overlays, all of which contain the diagonal. None is unbounded."""

    causal: bool = False
    left: int | None = None  # sees keys >= row - left
    right: int | None = None  # sees keys <= row + right
    chunk: tuple[int, Tensor] | None = None  # chunk size, left padding [B]
    documents: Tensor | None = None  # [B, Q] non-decreasing document numbers


def _code_of(factory_name: str, *arguments: Any):
    """Code object of the function that a factory of the library returns; None where this version lacks the factory."""
    factory = getattr(hf, factory_name, None)
    return None if factory is None else factory(*arguments).__code__


_AND = _code_of("and_masks", hf.causal_mask_function)
_OR = _code_of("or_masks", hf.causal_mask_function)
_WINDOW = _code_of("sliding_window_overlay", 1)
_WINDOW_BOTH = _code_of("sliding_window_bidirectional_overlay", 1)
_CHUNK = _code_of("chunked_overlay", 1, None)
_BLOCK = _code_of("blockwise_overlay", None)
_PACKED = _code_of("packed_sequence_mask_function", None)
_REMAP = _code_of("remap_positions_for_packed_sequence", None, None)
_RANGE_CODES = {
    code for code in (_AND, _OR, _WINDOW, _WINDOW_BOTH, _CHUNK, _BLOCK, _PACKED, _REMAP) if code is not None
}


def _cells(function: Callable) -> dict[str, Any]:
    return dict(
        zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
    )


def read_pattern(function: Callable) -> Pattern | None:
    """What a mask function is, if it was made by the library's own factories in a form with a closed solution.

    Decided by identity and by code object, never by a hint such as `local_size`. None: probe it, or go dense.
    Dynamo cannot read closures, so under compile only the two plain functions are recognised.
    """
    if function is hf.causal_mask_function:
        return Pattern(causal=True)
    if function is hf.bidirectional_mask_function:
        return Pattern()
    if torch.compiler.is_compiling():
        return None
    code = getattr(function, "__code__", None)
    if code not in _RANGE_CODES:
        return None
    cells = _cells(function)
    if code is _AND:
        return _intersect([read_pattern(part) for part in cells["mask_functions"]])
    if code is _WINDOW and type(cells["sliding_window"]) is int:
        return Pattern(left=cells["sliding_window"] - 1)
    if code is _WINDOW_BOTH and type(cells["sliding_window"]) is int:
        return Pattern(left=cells["sliding_window"], right=cells["sliding_window"])
    if code is _CHUNK and type(cells["chunk_size"]) is int:
        return Pattern(chunk=(cells["chunk_size"], cells["left_padding"]))
    if code is _PACKED:
        return Pattern(documents=cells["packed_sequence_mask"])
    if code is _REMAP:
        # Only ever intersected with the packed mask of the same position ids: inside one document positions rise by
        # one, so rules on distances hold unchanged; chunks count from the document's start, which is for the probe.
        inner = read_pattern(cells["mask_function"])
        return inner if inner is not None and inner.chunk is None else None
    return None


def _intersect(parts: list[Pattern | None]) -> Pattern | None:
    result = Pattern()
    for part in parts:
        if (
            part is None
            or (part.chunk and result.chunk)
            or (part.documents is not None and result.documents is not None)
        ):
            return None
        result = Pattern(
            causal=result.causal or part.causal,
            left=part.left
            if result.left is None
            else result.left
            if part.left is None
            else min(part.left, result.left),
            right=part.right
            if result.right is None
            else result.right
            if part.right is None
            else min(part.right, result.right),
            chunk=part.chunk or result.chunk,
            documents=part.documents if result.documents is None else result.documents,
        )
    return result


def is_range_pattern(function: Callable) -> bool:
    """Whether only the library's own overlays, all of them ranges that contain the diagonal, make up the function."""
    if function is hf.causal_mask_function or function is hf.bidirectional_mask_function:
        return True
    code = getattr(function, "__code__", None)
    if code not in _RANGE_CODES:
        return False
    if torch.compiler.is_compiling() or code not in (_AND, _OR, _REMAP):
        return True
    cells = _cells(function)
    return all(
        map(is_range_pattern, cells["mask_functions"] if "mask_functions" in cells else (cells["mask_function"],))
    )


def _blocks_of(function: Callable) -> Tensor | None:
    """The block numbers [B, S] (negative: none) that a range pattern was made with, if any."""
    cells = _cells(function)
    if function.__code__ is _BLOCK:
        return cells["block_sequence_ids"]
    parts = cells.get("mask_functions") or [part for part in [cells.get("mask_function")] if part is not None]
    return next((found for part in parts if (found := _blocks_of(part)) is not None), None)


def _torn(function: Callable, attention_mask: Tensor | None) -> bool:
    """Whether keys that count belong to one block in several places, so that rows see no single range of keys.

    Waits for the device, once a prefill with image blocks. Not known under compile, where blocks are taken to be whole.
    """
    blocks = None if torch.compiler.is_compiling() else _blocks_of(function)
    if blocks is None or is_tracing(blocks):
        return False
    runs = (torch.diff(blocks, prepend=blocks[:, :1]) != 0).cumsum(1)
    counts = blocks >= 0
    if attention_mask is not None:
        counts = counts & _local_padding(attention_mask.to(blocks.device), blocks.shape[1], 0)

    def distinct(numbers: Tensor) -> Tensor:
        numbers = numbers.masked_fill(~counts, -1).sort(1).values
        return (torch.diff(numbers, prepend=torch.full_like(numbers[:, :1], -1)) != 0).sum(1)

    return not torch.equal(distinct(runs), distinct(blocks))


def document_bounds(documents: Tensor) -> tuple[Tensor, Tensor]:
    """First and one-past-last index of every row's document; ``documents: [B, S]`` non-decreasing numbers."""
    documents = documents.contiguous()
    return torch.searchsorted(documents, documents), torch.searchsorted(documents, documents, right=True)


def _closed_form(pattern: Pattern, q_length: int, kv_length: int, q_offset, kv_offset, device) -> tuple[Tensor, Tensor]:
    """lo and hi, [B or 1, Q], in local key coordinates, clamped to [0, kv_length]; unbounded, hi is ``ALL_KEYS``."""
    shift = q_offset - kv_offset
    if isinstance(shift, Tensor):
        row = torch.arange(q_length, device=device) + shift
    else:
        row = torch.arange(shift, shift + q_length, device=device)
    row = row[None]
    lo, hi = torch.zeros_like(row), torch.full_like(row, ALL_KEYS)
    reach = 0 if pattern.causal else pattern.right
    if reach is not None:
        hi = (row + reach + 1).clamp(0, kv_length)
    if pattern.left is not None:
        lo = (row - pattern.left).clamp(0, kv_length)
    if pattern.chunk is not None:
        size, left_padding = pattern.chunk
        origin = left_padding.to(device)[:, None] - kv_offset
        start = origin + torch.div(row - origin, size, rounding_mode="floor") * size
        lo = torch.maximum(lo, start.clamp(0, kv_length))
        hi = torch.minimum(hi, (start + size).clamp(0, kv_length))
    if pattern.documents is not None:
        start, end = document_bounds(pattern.documents)
        lo, hi = torch.maximum(lo, start), torch.minimum(hi, end)
    return lo, hi


def probe_ranges(
    function: Callable,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset,
    kv_offset,
    device,
    span: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """lo and hi, [B, Q], of a pattern known only as a function: how far it reaches to both sides of the diagonal.

    The reach is found digit by digit in base 64, each digit by counting visible keys at 63 distances. No data-dependent
    control flow and nothing that depends on the length, so it traces into one graph; and each digit is a reduction, so
    that a compiler cannot inline one step into the next (bisection by pointwise operations grows exponentially there).
    """
    q = (torch.arange(q_length, device=device) + q_offset).expand(batch, -1)[..., None, None]  # [B, Q, 1, 1]
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.zeros_like(q)
    first, last = kv_offset, kv_offset + kv_length - 1
    if span is not None:
        first, end = (x[:, :, None, None] + kv_offset for x in span)
        last = torch.maximum(end - 1, first)  # of a row that is padding only, one key: it is cut off later
    pivot = q.clamp(first, last)
    side = torch.arange(-1, 2, 2, device=device)[:, None]  # -1 and 1
    step = torch.arange(1, PROBE_BASE, device=device)  # [63]

    def seen(key: Tensor) -> Tensor:
        inside = (key >= first) & (key <= last)
        key = key.clamp(kv_offset, kv_offset + kv_length - 1)
        if torch.compiler.is_compiling():  # torch 2.11's Inductor: faulty C++ where it knows an index as a formula
            key = key ^ 0
        return function(b, h, q, key) & inside

    reach = torch.zeros_like(q).expand(-1, -1, 2, -1)  # [B, Q, 2, 1]: to the left, to the right
    for digit in reversed(range(PROBE_DIGITS)):
        width = PROBE_BASE**digit
        reach = reach + width * seen(pivot + side * (reach + width * step)).sum(-1, keepdim=True)
    start = (pivot - kv_offset)[..., 0, 0]
    lo = start - reach[..., 0, 0]
    return lo, torch.where(seen(pivot)[..., 0, 0], start + reach[..., 1, 0] + 1, lo)


def _local_padding(attention_mask: Tensor, kv_length: int, kv_offset) -> Tensor:
    """The 2-D padding mask cut or filled (with False) to the keys at hand: [B, kv_length] bool."""
    keep: Tensor = hf.prepare_padding_mask(attention_mask, kv_length, kv_offset)  # type: ignore[assignment]
    if isinstance(kv_offset, Tensor):
        keep = keep[:, torch.arange(kv_length, device=keep.device) + kv_offset]
    elif keep.shape[1] != kv_length:
        keep = keep[:, kv_offset : kv_offset + kv_length]
    return keep.to(torch.bool)


def _hides_nothing(attention_mask: Tensor | None, kv_length: int) -> bool:
    """Whether a padding mask is all ones, where looking is free: in eager, on the CPU."""
    if attention_mask is None or attention_mask.device.type != "cpu" or is_tracing(attention_mask):
        return False
    return attention_mask.shape[1] == kv_length and bool(attention_mask.all())


def key_range_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Callable = hf.causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    **unused: Any,
) -> Tensor:
    """A mask function for `AttentionMaskInterface`; the forms are in the module's docstring, never None.

    ``attention_mask``: [B, keys seen so far] padding, True = valid, or None. ``q_offset`` and ``kv_offset`` place the
    first query and the first key in the sequence, and may be tensors (static caches).
    """

    def dense() -> Tensor:
        mask = hf.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,  # type: ignore[arg-type]
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        assert mask is not None  # the skips are off
        return mask

    if getattr(config, "model_type", None) in FLOAT_MASKS:
        return torch.where(dense(), 0.0, torch.finfo(dtype).min).to(dtype)
    if wants_dense_masks(config) or (attention_mask is not None and attention_mask.ndim != 2):
        return dense()
    if mask_function is hf.bidirectional_mask_function and _hides_nothing(attention_mask, kv_length):
        attention_mask = None  # to stock, too, it is then no mask, and may be of any length
    pattern = None if use_vmap else read_pattern(mask_function)
    one_row = q_length == 1 and not torch.compiler.is_compiling()
    if pattern is not None and one_row and attention_mask is None:
        ranges = _one_row(pattern, kv_length, q_offset, kv_offset, device)
        if ranges is not None:
            return ranges.expand(batch_size, 1, 1, 2)
    keep = None
    if pattern is not None:
        lo, hi = _closed_form(pattern, q_length, kv_length, q_offset, kv_offset, device)
    elif one_row and not use_vmap:
        # one row of any pattern is O(K) already, and probing would cost more host time
        keep = dense()[:, 0, 0]
        lo, hi = keep.new_zeros(1, 1, dtype=torch.int64), keep.new_full((1, 1), kv_length, dtype=torch.int64)
    elif not use_vmap and is_range_pattern(mask_function) and not _torn(mask_function, attention_mask):
        span = None
        if attention_mask is not None:
            keep = _local_padding(attention_mask.to(device), kv_length, kv_offset)
            span = _span(keep)
        lo, hi = probe_ranges(mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, device, span)
    else:
        return dense()
    if attention_mask is not None and keep is None:
        keep = _local_padding(attention_mask.to(device), kv_length, kv_offset)
    result = _stack(batch_size, lo, hi) if keep is None else _apply_padding(batch_size, lo, hi, keep, config)
    if result is None:
        return dense()
    if os.environ.get("HF_FLASH_MC_CHECKS") == "1" and not torch.compiler.is_compiling():
        _check_against_dense(result, dense(), kv_length)
    if keep is not None and not torch.compiler.is_compiling():
        result.made_for = kv_length  # type: ignore[attr-defined]  # ranges do not tell, see check_length
    return result


def _one_row(pattern: Pattern, kv_length: int, q_offset, kv_offset, device) -> Tensor | None:
    """[1, 1, 1, 2] for one query row with plain integers, in a single tensor op (no copy from the host, no sync)."""
    if (
        isinstance(q_offset, Tensor)
        or isinstance(kv_offset, Tensor)
        or pattern.chunk is not None
        or pattern.documents is not None
    ):
        return None
    row = q_offset - kv_offset
    lo = 0 if pattern.left is None else max(row - pattern.left, 0)
    reach = 0 if pattern.causal else pattern.right
    hi = ALL_KEYS if reach is None else min(row + reach + 1, kv_length)
    if hi <= lo:
        return None
    return torch.arange(lo, hi + 1, hi - lo, dtype=torch.int32, device=device).view(1, 1, 1, 2)


def _stack(batch: int, lo: Tensor, hi: Tensor) -> Tensor:
    lo, hi = torch.broadcast_tensors(lo, hi)
    ranges = torch.stack((lo, hi), -1).to(torch.int32)[:, None]
    return ranges.expand(batch, -1, -1, -1)


def _span(keep: Tensor) -> tuple[Tensor, Tensor]:
    """First and one-past-last valid key of each row of ``keep: [B, K]``, [B, 1]; (0, 0): nothing is valid."""
    valid = keep.to(torch.int64)
    end = (valid * torch.arange(1, keep.shape[1] + 1, device=keep.device)).amax(1, keepdim=True)
    return valid.argmax(1, keepdim=True), end


def _apply_padding(batch: int, lo: Tensor, hi: Tensor, keep: Tensor, config: Any) -> Tensor | None:
    """Ranges cut to the first and last valid key; valid keys in between ride along as weights. None: make it dense.

    On the CPU the holes are looked for, which is free. On a GPU that would be a sync, so the weights always go along;
    except for families that slice rows off their masks, where losing them would be wrong.
    """
    keep = keep.expand(batch, -1)
    first, end = _span(keep)
    ranges = _stack(batch, torch.maximum(lo, first), torch.minimum(hi, end))
    sliced = lo.shape[1] > 1 and getattr(config, "model_type", None) in SLICES_MASKS
    if not is_tracing(keep) and (sliced or keep.device.type == "cpu"):
        holes = keep.sum(1, keepdim=True) != (end - first)
        if not holes.any():
            return ranges
        if sliced:
            return None
    bits = torch.where(keep, 0, _INF_BITS).to(torch.int32)[:, None, :, None].expand(-1, 1, -1, 4)
    return torch.cat((bits, torch.nn.functional.pad(ranges, (0, 2))), 2)


def check_length(mask: Tensor, kv_length: int) -> None:
    """Raise ValueError where stock would add a mask of another length to its scores (eager only)."""
    made_for = getattr(mask, "made_for", kv_length)
    if made_for != kv_length:
        raise ValueError(
            f"attention_mask: expected one for the {kv_length} keys of this attention, got one for {made_for}"
        )


def split_mask(mask: Tensor, q_length: int, kv_length: int) -> tuple[Tensor, Tensor | None]:
    """Undo the int32 forms: key ranges [B, 1, Q, 2] and log weights of keys, [B, 1, K] float32 or None."""
    if mask.shape[-1] == 2 and mask.shape[2] == q_length:
        return mask, None
    if mask.shape[-1] == 4 and mask.shape[2] == kv_length + q_length:
        return mask[:, :, kv_length:, :2], mask[:, :, :kv_length, 0].contiguous().view(torch.float32)
    raise ValueError(
        f"attention_mask: an int32 mask of mc_attention for {q_length} queries and {kv_length} keys has shape "
        f"[B, 1, {q_length}, 2] or [B, 1, {kv_length + q_length}, 4], got {list(mask.shape)}; the model changed the "
        "mask on its way to the attention (slicing a padded mask under compile does that). Run this call eagerly, or "
        "without padding."
    )


def to_dense(mask: Tensor, q_length: int, kv_length: int) -> Tensor:
    """Bool [B, 1, Q, K] of an int32 mask: for the sdpa fallback and for checks."""
    ranges, weight = split_mask(mask, q_length, kv_length)
    key = torch.arange(kv_length, device=mask.device)
    seen = (key >= ranges[..., :1]) & (key < ranges[..., 1:])
    return seen if weight is None else seen & (weight == 0)[:, :, None]


def _check_against_dense(mask: Tensor, dense: Tensor, kv_length: int) -> None:
    rows = dense.shape[2]
    if not torch.equal(to_dense(mask, rows, kv_length), dense):
        raise RuntimeError(
            "the key ranges of this mask pattern differ from transformers' dense mask: the pattern is not one range of "
            "keys per row (image blocks that are not contiguous?). Please report it, and use sdpa for this model"
        )
