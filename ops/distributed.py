"""Attention over parts of the keys put together again, and attention of a sequence that is spread over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import api, checks, library
from .sequence import CHUNKS, Place, all_gather, all_to_all, cut, join, place_of
from .spec import Spec


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One attention from several over disjoint sets of keys: each result weighs by the exp of its lse.

    Differentiable in both. Give ``sinks`` to only one of the parts, or it counts several times.

    Args:
        outs: ``[B, H, S, D]`` each (or ``[T, H, D]``, packed).
        lses: ``[B, H, S]`` each (or ``[H, T]``), natural log; -inf where a part shows a row no key.

    Returns:
        (out, lse): the attention over all keys, out in the dtype of the first part, computed in fp32 (fp64 for fp64);
        out 0 and lse -inf where no part shows a row any key.

    Raises:
        ValueError: no part at all, or parts of different shapes.

    Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021).
    """
    if wrong := [type(x).__name__ for x in (*outs, *lses) if not isinstance(x, Tensor)]:
        raise TypeError(f"outs, lses: expected tensors, got {', '.join(wrong)}")
    shapes = {(tuple(out.shape), tuple(lse.shape)) for out, lse in zip(outs, lses, strict=False)}
    fits = all(rows == (out[1::-1] if len(out) == 3 else out[:-1]) for out, rows in shapes)
    if len(outs) != len(lses) or len(shapes) != 1 or not fits:
        raise ValueError(
            "outs, lses: expected as many outs as lses, at least one, of one shape ([B, H, S, D] with [B, H, S], or "
            f"[T, H, D] with [H, T]), got {len(outs)} and {len(lses)} of shapes {sorted(shapes)}"
        )
    work = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    parts = torch.stack([lse.to(work) for lse in lses])
    top = parts.detach().amax(0)
    top = torch.where(top == float("-inf"), torch.zeros_like(top), top)
    weights = torch.exp(parts - top)
    total = weights.sum(0)
    seen = total > 0
    total = torch.where(seen, total, torch.ones_like(total))
    lse = torch.where(seen, top + torch.log(total), float("-inf"))
    packed = outs[0].dim() == 3
    out = sum(
        out.to(work) * (share.transpose(0, 1) if packed else share)[..., None]
        for out, share in zip(outs, weights / total, strict=True)
    )
    return out.to(outs[0].dtype), lse


_UNSHARED = {  # arguments of flash_attention that a sequence spread over ranks does not have, and why
    "mask": "a dense mask would be S x S; say it as key_ranges",
    "bias": "it would be S x S",
    "key_log_weight": "it is not sent along with the keys; a removed key can be left out by key_ranges",
    "alibi_slopes": "the op counts distances from the shard's first row",
}


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    layout: str = "zigzag",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_ranges: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    dropout_offsets: tuple[int, int, int, int] = (0, 0, 0, 0),
    return_lse: bool = False,
    impl: str = "auto",
    **others: Any,
) -> Any:
    """``flash_attention`` of one sequence that is spread over ranks; keys and values travel, nothing is gathered.

    Every rank calls it, with the same options and shards of the same shape, and runs its backward. Communication runs
    beside the computation; only keys that some row of another rank may see are sent. Arguments not listed, and those
    listed by name only, mean what they mean in ``flash_attention`` of the whole sequence. Works under torch.compile.

    Args:
        q: this rank's rows, ``[B, Hq, S_local, D]``; k: ``[B, Hkv, S_local, D]``; v: ``[B, Hkv, S_local, Dv]``.
        group: the ranks: a ProcessGroup, a 1-D DeviceMesh, or None for all.
        layout: which rows a rank has, as ``shard_sequence`` cuts them: "zigzag" (balanced under causal; S_local even)
            or "contiguous" (better for windows: each rank needs its neighbours only).
        key_ranges: int32 ``[B or 1, Hq or 1, S_local, 2]``, for this rank's rows, in positions of the whole sequence.
        sinks: ``[Hq]``, the same on all ranks; counted once. Its gradient is this rank's share: sum it over the ranks.
        dropout_seed: as there, and the same on every rank; None draws one on the group's first rank. The mask is that
            of the whole sequence on one GPU.
        dropout_offsets: global (batch, head, row, column) of the whole sequence's first element.
        impl: "auto", "hopper", "triton" or "cpu".

    Returns:
        out ``[B, Hq, S_local, Dv]``; with return_lse also lse ``[B, Hq, S_local]``, differentiable.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``flash_attention``; NotImplementedError for mask, bias,
            key_log_weight and alibi_slopes, for impl="reference", and inside torch.func transforms.
    """
    from . import ring

    place = _enter("ring_attention", q, group, layout, others)
    if impl == "auto":
        impl = api._AUTO.get(q.device.type, "auto")
    if api._autocast(q.device.type):
        q, k, v = library.autocast_qkv(q.device.type, q, k, v)
    left, right = (-1, -1) if window is None else api._window(window)
    options = ring.Options(
        key_ranges, sinks, _shared_seed(dropout_seed, q, place) if dropout_p else None, scale, causal, left, right,
        api._softcap(softcap), dropout_p, dropout_offsets,
    )  # fmt: skip
    # under compile the fake checks
    problems = [] if torch.compiler.is_compiling() else ring.find_problems(q, k, v, place.layout, impl, options)
    if problems:
        checks.raise_problems(problems, "ring_attention")
    out, lse = ring.RING_FWD(q, k, v, place.group, place.layout, impl, *options)
    return (out, lse) if return_lse else out


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any = None,
    layout: str = "zigzag",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_ranges: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    dropout_offsets: tuple[int, int, int, int] = (0, 0, 0, 0),
    return_lse: bool = False,
    impl: str = "auto",
    **others: Any,
) -> Any:
    """As ``ring_attention``, by exchanging: each rank attends over the whole sequence for its share of the heads.

    Four all-to-alls of a shard each, whatever the number of ranks; the whole sequence of Hq / ranks heads is in memory
    at once. The number of ranks must divide Hq. Key heads that ranks share are sent to each of them.

    Args, Returns, Raises: those of ``ring_attention``; ValueError also where the heads cannot be shared out.

    Source: Jacobs et al., "DeepSpeed Ulysses" (2023).
    """
    place = _enter("ulysses_attention", q, group, layout, others)
    if api._autocast(q.device.type):  # before they are sent
        q, k, v = library.autocast_qkv(q.device.type, q, k, v)
    if not torch.compiler.is_compiling():  # the attention op checks too, but sees what is left for this rank's heads
        back_end = api._AUTO.get(q.device.type, "auto") if impl == "auto" else impl
        spec = Spec(key_ranges=key_ranges, sinks=sinks, dropout_offsets=dropout_offsets)
        if problems := checks.find_problems(q, k, v, back_end, spec):
            checks.raise_problems(problems, "ulysses_attention")
    heads, rest = divmod(q.shape[1], place.size)
    if rest or not q.shape[2] == k.shape[2] == v.shape[2] or q.shape[2] % CHUNKS[layout]:
        raise ValueError(
            f"ulysses_attention: expected a number of query heads divisible by {place.size} ranks, and q, k and v of "
            f"one length divisible by {CHUNKS[layout]} (layout={layout!r}), got shapes {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}; ring_attention takes any number of heads"
        )
    copies = place.size // math.gcd(k.shape[1], place.size)
    if copies > 1:
        k, v = (x.repeat_interleave(copies, 1) for x in (k, v))
    first = place.rank * heads
    if key_ranges is not None:
        whole = join(all_gather(key_ranges, place).movedim(0, 2), place, 2)
        key_ranges = whole if whole.shape[1] == 1 else whole[:, first : first + heads].contiguous()
    batch, head, row, column = dropout_offsets
    out, lse = api.flash_attention(
        *(_heads_to_sequence(x, place) for x in (q, k, v)),
        causal=causal,
        window=window,
        key_ranges=key_ranges,
        softcap=softcap,
        sinks=None if sinks is None else sinks[first : first + heads],
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=_shared_seed(dropout_seed, q, place) if dropout_p else None,
        dropout_offsets=(batch, head + first, row, column),
        return_lse=True,
        impl=impl,
    )
    out = _sequence_to_heads(out, place)
    return (out, _sequence_to_heads(lse[..., None], place)[..., 0]) if return_lse else out


def _enter(name: str, q: Any, group: Any, layout: str, others: dict[str, Any]) -> Place:
    """The rank's place, after refusing what cannot be shared out."""
    for argument, value in others.items():
        if argument not in _UNSHARED:
            raise TypeError(f"{name}() got an unexpected keyword argument {argument!r}")
        if value is not None:
            raise NotImplementedError(f"{name}: {argument} is not supported: {_UNSHARED[argument]}")
    if not isinstance(q, Tensor):
        raise TypeError(f"q: expected a torch.Tensor, got {type(q).__name__}")
    if hasattr(q, "placements"):
        raise NotImplementedError(f"{name}: q is a DTensor; pass the local shards, q.to_local()")
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or library._forward_ad_level() >= 0
    ):
        raise NotImplementedError(f"{name}: torch.func transforms and forward-mode derivatives are not implemented")
    return place_of(group, layout)


def _shared_seed(seed: int | Tensor | None, q: Tensor, place: Place) -> Tensor:
    drawn = api._seed(seed, q)
    return all_gather(drawn[None], place)[0, 0] if seed is None else drawn


def _heads_to_sequence(x: Tensor, place: Place) -> Tensor:
    """``[B, H, S_local, D]`` to ``[B, H / ranks, S, D]``, on [B, S, H, D] memory."""
    x = x.transpose(1, 2).unflatten(2, (place.size, -1)).movedim(2, 0)  # [ranks, B, S_local, h, D]
    return join(all_to_all(x, place).movedim(0, 1), place, 1).transpose(1, 2)


def _sequence_to_heads(x: Tensor, place: Place) -> Tensor:
    """The inverse."""
    x = all_to_all(cut(x.transpose(1, 2), place, 1).movedim(1, 0), place)  # [ranks, B, S_local, h, D]
    return x.movedim(0, 2).flatten(2, 3).transpose(1, 2)
