"""DTensor rules for the attention ops: by batch and by head without communication, anything else is gathered."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from . import library

# argument -> its (batch, head) dimensions; None where it has none
_DENSE: dict[str, tuple[int | None, int | None]] = {
    **dict.fromkeys(("q", "k", "v", "dout", "fwd_out", "lse", "dlse"), (0, 1)),
    **dict.fromkeys(("key_ranges", "mask", "bias", "key_log_weight", "block_rows", "block_columns"), (0, 1)),
    "sinks": (None, 0),
    "dropout_seed": (None, None),
    "block_bits": (None, None),  # which both lists number through
}
_PACKED: dict[str, tuple[int | None, int | None]] = {
    **dict.fromkeys(("q", "k", "v", "dout", "fwd_out"), (None, 1)),
    **dict.fromkeys(("lse", "dlse", "key_ranges", "key_log_weight", "sinks"), (None, 0)),
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "dropout_seed"), (None, None)),
}
_GRADIENTS = ("q", "k", "v", "bias", "key_log_weight", "sinks")
_BATCH, _HEADS = 0, 1


def register() -> None:
    """Register the rules; ``library`` does so once DTensor is imported."""
    for op in (library.FWD, library.BWD, library.VARLEN_FWD, library.VARLEN_BWD):
        register_sharding(op)(_rule(op))
        # by default optional tensors that are absent are not part of the cache's key, and `sinks` would be taken for
        # `alibi_slopes` of the same shape
        info = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)
        DTensor._op_dispatcher.sharding_propagator.op_to_schema_info[op] = info


def _rule(op: torch._ops.OpOverload) -> Callable[..., list[tuple[list[Any], list[Any]]]]:
    names = [argument.name for argument in op._schema.arguments]
    packed, backward = "cu_seqlens_q" in names, "dout" in names

    def dims(name: str, x: Any) -> tuple[int | None, int | None]:
        if name == "alibi_slopes":
            return (None, 0) if len(x.shape) == 1 else (None if packed else 0, 1)
        return (_PACKED if packed else _DENSE)[name]

    def place(name: str, x: Any, by: int | None) -> Any:
        """Where a tensor must lie so that each rank can work by batch or by heads on its own."""
        dim = None if by is None else dims(name, x)[by]
        return Replicate() if dim is None or x.shape[dim] == 1 else Shard(dim)

    def rule(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        given = dict(zip(names, args, strict=False))
        rows = []
        for by in (None, *_ways(given, packed)):
            inputs = [place(name, x, by) if hasattr(x, "placements") else None for name, x in given.items()]
            if backward:
                outputs = [
                    _place_gradient(place(name, given[name], by), by) if needed else Replicate()
                    for name, needed in zip(_GRADIENTS, given["needs"], strict=True)
                ]
            else:
                out = place("q", given["q"], by)
                outputs = [out, out if not packed or out == Replicate() else Shard(0)]  # lse: [B, H, S] or [H, T]
            rows.append((outputs, inputs))
        return rows

    return rule


def _place_gradient(placement: Any, by: int | None) -> Any:
    """Every rank adds its share to the gradient of a tensor that all ranks have."""
    return Partial() if by is not None and placement == Replicate() else placement


def _ways(given: dict[str, Any], packed: bool) -> list[int]:
    """By what the work of this call may be split."""
    if given.get("dropout_p"):
        return []  # a shard does not know its global coordinates
    q, k = given["q"], given["k"]
    ways = [] if packed or q.shape[0] == 1 else [_BATCH]
    # Uneven shards would tear query heads from their key heads. DTensor may combine any dimensions of the mesh, and
    # leaves out combinations with more ranks than heads. A single key head is on every rank.
    parts = {math.prod(sizes) for n in range(q.mesh.ndim) for sizes in itertools.combinations(q.mesh.shape, n + 1)}
    if q.shape[1] > 1 and (k.shape[1] == 1 or all(k.shape[1] % n == 0 for n in parts if n <= k.shape[1])):
        ways.append(_HEADS)
    return ways
