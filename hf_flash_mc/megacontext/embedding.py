"""EmbeddingMemory: gists as input embeddings, as first designed: what stands behind an edit is run again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cache import MegaContextCache
from .config import MegaContextConfig
from .gistnet import EmbeddingGist
from .memory import Memory
from .positions import Numbering
from .tree import MegaContextTree
from .working_context import Change, WorkingContext

Run = Callable[[Tensor, np.ndarray, np.ndarray], np.ndarray]


class EmbeddingMemory(Memory):
    """A working context as a sequence of embeddings, and a tree of gists in the space of the model's input embeddings.

    Keys and values are never stored: a slot's are computed with what stands before it, so an edit costs a forward over
    all slots behind it. At 8192 slots that is about twice the cost of decoding if it happens every 32 tokens; the
    "kv" back end patches slots instead.

    Args:
        embed: token ids [n] -> embeddings [n, d]. run: embeddings [n, d], positions [n] and tokens [n] of slots that
            follow those in the cache -> their columns; runs the model.
    """

    def __init__(
        self,
        config: MegaContextConfig,
        cache: MegaContextCache,
        gist: EmbeddingGist,
        folder: Path | None,
        *,
        embed: Callable[[Tensor], Tensor],
        run: Run,
        chunk_size: int,
        durable: bool = False,
    ) -> None:
        super().__init__(config, cache)
        self.gist, self.embed, self.run, self.chunk_size = gist, embed, run, chunk_size
        self.tree = MegaContextTree(
            config,
            folder=folder,
            pool=self._pool,
            embed=self._leaves,
            payload_dtype=self.dtype,
            durable=durable,
        )

    def _pool(self, children: Tensor, *, lod: int, first: int) -> Tensor:
        return self.gist.pool(children.to(self.cache.device), lod=lod, first=first).cpu()

    def _leaves(self, ids: Tensor) -> Tensor:
        return self.embed(ids).cpu()

    def commit(self, upto: int, token_ids: Tensor, wc: WorkingContext) -> None:
        """Put the tokens before number ``upto`` into the tree; token_ids: those from ``committed`` on, int64 [n]."""
        count = upto - self.committed
        if count > 0:
            self.tree.append(token_ids[:count].cpu())

    def apply(self, before: WorkingContext, after: WorkingContext, change: Change) -> int:
        """Bring the cache from one working context to the next; how many slots were computed."""
        numbering = Numbering(self.config)
        numbering.position, numbering.next = self.numbering.position, self.numbering.next
        if not numbering.follow(change, before.start, before.total):
            numbering.renumber(after.span, self.config.refocus_interval)
        old, new = self.numbering.centres(), numbering.centres()
        first = int(min(change.removed_index.min(), change.added_index.min()))
        moved = np.flatnonzero(old[:first] != new[:first])
        first = int(moved[0]) if len(moved) else first
        self.numbering = numbering
        return self._prefill(after, first)

    def renumber(self, wc: WorkingContext, count: int) -> None:
        """Bring all slots into the model's range again, with room for ``count`` tokens."""
        old = self.numbering.centres()
        self.numbering.renumber(wc.span, count)
        moved = np.flatnonzero(old != self.numbering.centres())
        if len(moved):
            self._prefill(wc, int(moved[0]))

    def restore(self, wc: WorkingContext, tail: Tensor) -> None:
        """Fill an empty cache for a working context."""
        self._prefill(wc, 0)

    def embeddings(self, wc: WorkingContext, index: np.ndarray) -> Tensor:
        """Input embeddings [n, d] of slots ``index`` [n] of a working context, on the device."""
        out: Tensor | None = None
        for level in np.unique(wc.lod[index]).tolist():
            chosen = np.flatnonzero(wc.lod[index] == level)
            start = wc.start[index[chosen]]
            if level == 0:
                part = self.embed(self.token_ids(start))
            else:
                part = self.tree.payload(level, torch.from_numpy(start // self.config.span(level)))
            part = part.to(self.cache.device, self.dtype)
            out = part.new_empty(len(index), part.shape[1]) if out is None else out
            out[torch.from_numpy(chosen).to(out.device)] = part
        assert out is not None
        return out

    def token_ids(self, start: np.ndarray) -> Tensor:
        """Ids of single tokens [n]; those outside the tree come from ``tail``."""
        split = self.committed
        known = start < split
        ids = torch.empty(len(start), dtype=torch.int64)
        if known.any():
            first, last = int(start[known].min()), int(start[known].max()) + 1
            ids[torch.from_numpy(known)] = self.tree.tokens(first, last)[torch.from_numpy(start[known] - first)]
        if not known.all():
            ids[torch.from_numpy(~known)] = self.tail[torch.from_numpy(start[~known] - split)]
        return ids

    def _prefill(self, wc: WorkingContext, first: int) -> int:
        """Run the model over the slots from number ``first`` on, in order."""
        self.cache.release(self.slots[first:])
        self.slots = self.slots[:first]
        centres = self.numbering.centres()
        for start in range(first, len(wc), self.chunk_size):
            index = np.arange(start, min(start + self.chunk_size, len(wc)))
            if self.cache.needs_compaction(len(index)):
                self.slots = self.cache.compact()[self.slots]
            token = wc.start[index] + wc.span[index] // 2
            slots = self.run(self.embeddings(wc, index), centres[index], token)
            self.cache.gist[slots] = wc.lod[index] > 0
            self.slots = np.concatenate((self.slots, slots))
        return len(wc) - first

    def copy_history(self, folder: Path) -> list[Any]:
        """The tree once more, in files under ``folder``."""
        source = self.tree

        def pool(children: Tensor, *, lod: int, first: int) -> Tensor:
            return source.payload(lod, slice(first, first + len(children)))

        tree = MegaContextTree(self.config, folder=folder, pool=pool, embed=source.embed, payload_dtype=self.dtype)
        for start in range(0, self.committed, 4096):
            tree.append(source.tokens(start, min(start + 4096, self.committed)))
        return [tree]
