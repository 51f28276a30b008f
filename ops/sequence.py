"""A sequence spread over ranks: which rank holds which rows, cutting and joining, and the collectives as pure ops.

Layouts, for n ranks: "contiguous" gives rank r the r-th of n pieces; "zigzag" cuts 2 n chunks and gives rank r the
chunks r and 2 n - 1 - r, so that all ranks have the same work under a causal mask.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .library import NAMESPACE

CHUNKS = {"contiguous": 1, "zigzag": 2}  # how many a rank holds


class Place(NamedTuple):
    """A rank's place among those that share a sequence. Plain values: groups cannot be copied or enter a graph."""

    group: str  # the process group's name
    rank: int
    size: int
    layout: str = "zigzag"

    def starts(self, length: int, rank: int | None = None) -> list[int]:
        """Global positions at which the chunks of a rank's shard of ``length`` rows begin, ascending."""
        rank = self.rank if rank is None else rank
        if self.layout == "contiguous":
            return [rank * length]
        return [rank * (length // 2), (2 * self.size - 1 - rank) * (length // 2)]

    def positions(self, length: int, device: torch.device | str | None = None) -> Tensor:
        """Global positions of this rank's rows: int64 ``[length]``."""
        chunk = length // CHUNKS[self.layout]
        return torch.cat([torch.arange(s, s + chunk, device=device) for s in self.starts(length)])

    def order(self) -> list[int]:
        """Where chunk i of the sequence stands when the ranks' shards are laid one behind the other."""
        held = [start for rank in range(self.size) for start in self.starts(CHUNKS[self.layout], rank)]
        return sorted(range(len(held)), key=held.__getitem__)


def place_of(group: Any = None, layout: str = "zigzag", name: str = "group") -> Place:
    """The place of this rank in a process group, in a 1-D DeviceMesh, or (None) among all ranks.

    ``name``: the argument that ``group`` was given as, for what is said of it.

    Raises:
        ValueError: an unknown layout, or a mesh of several dimensions. TypeError: what is no group.
        RuntimeError: torch.distributed has not been initialised.
    """
    if layout not in CHUNKS:
        raise ValueError(f"layout: expected one of {', '.join(map(repr, CHUNKS))}, got {layout!r}")
    if isinstance(group, Place):
        return group
    if group is not None and hasattr(group, "get_group"):
        if group.ndim != 1:
            raise ValueError(
                f"{name}: expected a DeviceMesh of one dimension, got {group.ndim}; pass one of them: mesh['name']"
            )
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
        if group is None:
            raise RuntimeError(
                f"{name}: torch.distributed has not been initialised; start with torchrun and call "
                "torch.distributed.init_process_group() first"
            )
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name}: expected a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
    return Place(group.group_name, group.rank(), group.size(), layout)


def process_group(name: str) -> Any:
    """The group of a name, in the bodies of ops."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


# ---- collectives -----------------------------------------------------------------------------------------------------

# Ours and not torch's functional ones: those are private, differ between versions, and return a subclass in eager.
_lib = torch.library.Library(NAMESPACE, "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_lib.define("all_to_all(Tensor x, str group) -> Tensor", tags=_TAGS)
_lib.define("all_gather(Tensor x, str group, int size) -> Tensor", tags=_TAGS)


def _all_to_all(x: Tensor, group: str) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=process_group(group))
    return out


def _all_gather(x: Tensor, group: str, size: int) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(size, *x.shape)
    dist.all_gather(list(out.unbind()), x, group=process_group(group))
    return out


_lib.impl("all_to_all", _all_to_all, "CompositeExplicitAutograd")
_lib.impl("all_gather", _all_gather, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::all_to_all", lambda x, group: x.new_empty(x.shape), lib=_lib)
torch.library.register_fake(
    f"{NAMESPACE}::all_gather", lambda x, group, size: x.new_empty((size, *x.shape)), lib=_lib
)
_ALL_TO_ALL = getattr(torch.ops, NAMESPACE).all_to_all.default
_ALL_GATHER = getattr(torch.ops, NAMESPACE).all_gather.default


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


torch.library.register_autograd(
    f"{NAMESPACE}::all_to_all",
    lambda ctx, grad: (_ALL_TO_ALL(grad, ctx.group), None),
    setup_context=_keep_group,
    lib=_lib,
)
torch.library.register_autograd(
    f"{NAMESPACE}::all_gather",
    lambda ctx, grad: (_ALL_TO_ALL(grad, ctx.group).sum(0), None, None),
    setup_context=_keep_group,
    lib=_lib,
)


def all_to_all(x: Tensor, place: Place) -> Tensor:
    """``x: [ranks, ...]``: its i-th part goes to rank i, and part i of the result came from rank i. Differentiable."""
    return _ALL_TO_ALL(x, place.group)


def all_gather(x: Tensor, place: Place) -> Tensor:
    """``[ranks, *x.shape]``, contiguous; differentiable (a rank gets the sum of what all ranks' results ask of it)."""
    return _ALL_GATHER(x, place.group, place.size)


# ---- cutting and joining ---------------------------------------------------------------------------------------------


def shard_sequence(x: Tensor, group: Any = None, *, dim: int = 1, layout: str = "zigzag") -> Tensor:
    """This rank's rows of a tensor that every rank has whole.

    Args:
        x: any shape; ``dim`` runs along the sequence (1 for token ids ``[B, S]``, 2 for ``[B, H, S, D]``).
        group: ProcessGroup, 1-D DeviceMesh, or None for all ranks.
        layout: "zigzag" (balanced under a causal mask) or "contiguous".

    Raises:
        ValueError: the length is no multiple of the number of ranks (zigzag: of twice that); pad the sequence. Or x has
            no such dimension.

    The position ids of a shard are ``shard_sequence(torch.arange(S)[None])``.
    """
    place = place_of(group, layout)
    _check_dim(x, dim)
    parts = place.size * CHUNKS[place.layout]
    if x.shape[dim] % parts:
        raise ValueError(
            f"x: expected a length divisible by {parts} along dim {dim} ({place.size} ranks, {place.layout}), got "
            f"{x.shape[dim]}; pad the sequence at its end"
        )
    length = x.shape[dim] // place.size
    chunk = length // CHUNKS[place.layout]
    return torch.cat([x.narrow(dim, start, chunk) for start in place.starts(length)], dim)


def unshard_sequence(x: Tensor, group: Any = None, *, dim: int = 1, layout: str = "zigzag") -> Tensor:
    """The whole tensor on every rank from the ranks' shards of one shape; the inverse of ``shard_sequence``.

    Differentiable: a shard's gradient is the sum over the ranks of what each asks of its whole tensor.
    """
    place = place_of(group, layout)
    _check_dim(x, dim)
    dim %= x.dim()
    return join(all_gather(x, place).movedim(0, dim), place, dim)


def _check_dim(x: Tensor, dim: int) -> None:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected from {-x.dim()} to {x.dim() - 1} for x of shape {tuple(x.shape)}, got {dim}")


def join(x: Tensor, place: Place, dim: int) -> Tensor:
    """``[..., ranks, S_local, ...]``, ranks at ``dim``, as ``[..., S, ...]`` in the order of the sequence."""
    count = CHUNKS[place.layout]
    x = x.unflatten(dim + 1, (count, -1)).flatten(dim, dim + 1)
    if count > 1:
        x = x.index_select(dim, torch.tensor(place.order(), device=x.device))
    return x.flatten(dim, dim + 1)


def cut(x: Tensor, place: Place, dim: int) -> Tensor:
    """The inverse of ``join``."""
    count = CHUNKS[place.layout]
    x = x.unflatten(dim, (place.size * count, -1))
    if count > 1:
        order = place.order()
        inverse = sorted(range(len(order)), key=order.__getitem__)
        x = x.index_select(dim, torch.tensor(inverse, device=x.device))
    return x.unflatten(dim, (place.size, count)).flatten(dim + 1, dim + 2)
