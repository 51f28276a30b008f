"""What trained lenses read: an embedding of each slot, and the gists of the latest text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .config import MegaContextConfig
from .tree import MegaContextTree
from .working_context import WorkingContext

LATEST = 5  # finest gists that say what the text is about now, beside the coarsest one
COPIED = 4096  # tokens taken over at a time


def _mean(children: Tensor, *, lod: int, first: int) -> Tensor:
    return children.float().mean(1)


class EntryEmbeddings:
    """Mean input embeddings of every node of a history, kept in step with its tree.

    The same for both back ends: a lens judges what text is about, not how it is shown.

    Args:
        embed: token ids [n] -> input embeddings [n, d], on the device.
    """

    def __init__(self, config: MegaContextConfig, embed: Callable[[Tensor], Tensor]) -> None:
        self.embed = embed
        self.means = MegaContextTree(
            dataclasses.replace(config, backend="embedding"),
            pool=_mean,
            embed=self._leaves,
            payload_dtype=torch.float16,
        )

    def _leaves(self, ids: Tensor) -> Tensor:
        return self.embed(ids).float().cpu()

    def follow(self, tree: MegaContextTree) -> None:
        """Take over the tokens that came to the tree, or left it."""
        if len(tree) < len(self.means):
            self.means.truncate(len(tree))
        for first in range(len(self.means), len(tree), COPIED):
            self.means.append(tree.tokens(first, min(first + COPIED, len(tree))))

    def of(self, wc: WorkingContext, token_ids: Tensor) -> Tensor:
        """Embeddings [N, d] of the slots; token_ids: the history's, int64 [total]."""
        tokens = torch.from_numpy(np.flatnonzero(wc.lod == 0))
        shown = self.embed(token_ids[torch.from_numpy(wc.start.copy())[tokens]])
        out = shown.new_empty(len(wc), shown.shape[1])
        out[tokens.to(out.device)] = shown
        for lod in range(1, int(wc.lod.max(initial=0)) + 1):
            slots = np.flatnonzero(wc.lod == lod)
            nodes = torch.from_numpy(wc.start[slots] // wc.spans[lod])
            out[torch.from_numpy(slots).to(out.device)] = self.means.payload(lod, nodes).to(out)
        return out

    def tail(self) -> Tensor:
        """The coarsest latest gist, if there is one, and up to five of the finest: [t, d], float16 on the CPU."""
        top = self.means.config.max_lod
        parts = []
        for lod, count in ((top, 1), (1, LATEST)):
            stop = self.means.len_of(lod)
            parts.append(self.means.payload(lod, slice(max(0, stop - count), stop)))
        return torch.cat(parts)
