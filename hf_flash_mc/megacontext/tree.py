"""MegaContextTree: the whole history, append-only, as token ids and levels of gists."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from .config import MegaContextConfig
from .store import Store


class Pool(Protocol):
    """Makes nodes of level ``lod`` from their children: called once for all nodes that an append completes."""

    def __call__(self, children: Tensor, *, lod: int, first: int) -> Tensor:
        """children [m, block_size, *shape] of nodes ``first .. first + m`` of level ``lod`` -> [m, *shape]."""


class MegaContextTree:
    """Levels 0 (token ids, and a payload for each where the back end has one) to ``max_lod`` of one history.

    Args:
        config: block size, levels, base model.
        stores: stores to use, "tokens" and the levels 0 (only with ``leaf_payload``) to ``max_lod``; else
        folder: where the files are or will be; else the history is in memory.
        pool: makes gists; without one, levels above 0 stay empty and only LOD0 can be used.
        embed: token ids [n] -> leaf payloads [n, *shape], for back ends without stored leaf payloads.
        payload_shape, payload_dtype: of one node's payload; the shape defaults to ``config.payload_shape``.
        durable: appends return only when the disk has them.
    """

    def __init__(
        self,
        config: MegaContextConfig,
        *,
        stores: Mapping[str | int, Store] | None = None,
        folder: str | os.PathLike[str] | None = None,
        pool: Pool | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
        payload_shape: tuple[int, ...] | None = None,
        payload_dtype: torch.dtype = torch.float32,
        durable: bool = False,
    ) -> None:
        raise NotImplementedError

    def append(self, token_ids: Tensor, payload0: Tensor | None = None) -> dict[int, range]:
        """Add tokens [n] (and payloads [n, *shape]); nodes that become complete are pooled, one call a level.

        Returns the new nodes of each level 0..max_lod (ranges, possibly empty). All or nothing.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        """Tokens of history."""
        raise NotImplementedError

    def len_of(self, lod: int) -> int:
        """Complete nodes of a level."""
        raise NotImplementedError

    def tokens(self, start: int, stop: int) -> Tensor:
        """Token ids [stop - start], int64."""
        raise NotImplementedError

    def payload(self, lod: int, index: Tensor | slice) -> Tensor:
        """Payloads [n, *shape] of nodes of a level, on the CPU."""
        raise NotImplementedError

    def parent(self, lod: int, index: Tensor | int) -> Tensor:
        """Node of level ``lod + 1`` above each; -1 where it is not complete yet."""
        raise NotImplementedError

    def children(self, lod: int, index: Tensor | int) -> Tensor:
        """Nodes [..., block_size] of level ``lod - 1`` below each."""
        raise NotImplementedError

    def ancestors(self, lod: int, index: Tensor | int) -> Tensor:
        """Nodes [..., max_lod - lod] of the levels above; -1 where not complete yet."""
        raise NotImplementedError

    def refresh(self, lod: int, index: Tensor | slice, payload: Tensor) -> None:
        """Replace gists [n, *shape] of a level >= 1 and raise ``version``."""
        raise NotImplementedError

    @property
    def version(self) -> int:
        """How often gists were refreshed."""
        raise NotImplementedError

    def version_of(self, lod: int, index: Tensor) -> Tensor:
        """``version`` at which each node was last written [n] int64 (0: as it was pooled)."""
        raise NotImplementedError

    def flush(self, durable: bool = False) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError
