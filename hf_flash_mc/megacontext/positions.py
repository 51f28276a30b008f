"""Numbering: the rotary position of every slot of a working context."""

from __future__ import annotations

import numpy as np

from .config import MegaContextConfig
from .working_context import Change


class Numbering:
    """Positions of the slots, in step with a `WorkingContext`.

    A slot takes a range of positions, ``position[i]`` to the next slot's; a token takes one, a gist as many as the
    tokens it stands for, so that positions are the tokens' own. Once the history is longer than the model's range,
    "compressed" renumbers the slots, order kept: a gist takes at most c positions, with the largest c for which all fit
    and an eighth of the range stays free for what comes. A gist's key stands in the middle of its range.

    Attributes:
        position: int64 [N]. next: position of the next token.
    """

    def __init__(self, config: MegaContextConfig) -> None:
        self.limit = config.max_position_embeddings
        self.mode = config.positions
        self.position = np.empty(0, np.int64)
        self.next = 0

    @property
    def width(self) -> np.ndarray:
        """Positions that each slot takes, int64 [N]."""
        return np.diff(self.position, append=self.next)

    def centres(self) -> np.ndarray:
        """Where each slot's key stands, int64 [N]: a token at its position, a gist in the middle."""
        return self.position + self.width // 2

    def fits(self, count: int) -> bool:
        """Whether ``count`` more tokens stay in the model's range."""
        return self.limit is None or self.next + count <= self.limit

    def check(self, count: int) -> None:
        """ValueError where ``count`` more tokens leave the range and positions are absolute."""
        if self.mode == "absolute" and not self.fits(count):
            raise ValueError(
                f'positions="absolute": {count} more tokens end at position {self.next + count}, past the model\'s '
                f'max_position_embeddings {self.limit}; use positions="compressed"'
            )

    def append(self, count: int) -> np.ndarray:
        """Positions of ``count`` new tokens, int64 [count]."""
        new = np.arange(self.next, self.next + count)
        self.position = np.concatenate((self.position, new))
        self.next += count
        return new

    def drop(self, count: int) -> None:
        """The last ``count`` tokens left."""
        if count:
            self.next = int(self.position[-count])
            self.position = self.position[:-count]

    def follow(self, change: Change, start: np.ndarray, total: int) -> bool:
        """Positions after edits: what came shares out the positions of what left.

        start [N before], total: of the working context before. False where tokens would have to share positions: then
        `renumber` is needed.
        """
        lod = change.added_lod
        base = np.searchsorted(start, change.added_start, side="right") - 1
        span = np.diff(start, append=total)
        added = self.position[base] + (change.added_start - start[base]) * self.width[base] // span[base]
        self.position = rearrange(self.position, change, added)
        width = self.width
        return bool((width > 0).all() and (width[change.added_index[lod == 0]] == 1).all())

    def renumber(self, span: np.ndarray, count: int) -> None:
        """New positions for slots of these spans [N], leaving room for at least ``count`` tokens."""
        assert self.limit is not None
        room = max(len(span), self.limit - max(count, self.limit // 8))
        low, high = 1, self.limit  # the largest cap for which the capped spans fit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if np.minimum(span, middle).sum() <= room else (low, middle - 1)
        ends = np.minimum(span, low).cumsum()
        self.position = np.concatenate(([0], ends[:-1])).astype(np.int64)
        self.next = int(ends[-1])


def rearrange(old: np.ndarray, change: Change, added: np.ndarray) -> np.ndarray:
    """A per-slot array after edits: ``added`` [n] where slots came, the old values elsewhere."""
    kept = np.delete(old, change.removed_index)
    new = np.empty(len(kept) + len(added), old.dtype)
    here = np.zeros(len(new), bool)
    here[change.added_index] = True
    new[here], new[~here] = added[np.argsort(change.added_index, kind="stable")], kept
    return new
