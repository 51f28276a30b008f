"""WorkingContext: which nodes of the tree the model sees, as arrays of slots ordered by start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .config import MegaContextConfig

if TYPE_CHECKING:
    from .tree import MegaContextTree


class BudgetError(ValueError):
    """More slots are asked for than ``w_max`` allows."""


class InvariantError(RuntimeError):
    """A working context is broken; ``invariant`` names which of the eight rules."""

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(f"{invariant}: {detail}")
        self.invariant = invariant


class Entry(NamedTuple):
    """One slot: tokens [start, end) at level ``lod``, at a cost of 1."""

    start: int
    end: int
    lod: int
    cost: int = 1


@dataclass(frozen=True)
class Edits:
    """Edits of one refocus, in order.

    ``kind`` int8 [n]: +1 expands, -1 collapses; ``start`` int64 [n], ``lod`` int8 [n]: the gist expanded, or made.
    """

    kind: np.ndarray
    start: np.ndarray
    lod: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)


@dataclass(frozen=True)
class Change:
    """What edits did: slots that left and slots that came, by start (int64), lod (int8) and index before and after."""

    removed_start: np.ndarray
    removed_lod: np.ndarray
    removed_index: np.ndarray
    added_start: np.ndarray
    added_lod: np.ndarray
    added_index: np.ndarray


class WorkingContext:
    """Slots that tile the history [0, total) without gap or overlap; each is a token (lod 0) or a gist.

    ``start`` int64 [N], ``lod`` int8 [N], ``version`` int64 [N] (of the tree when the slot was made) are read-only;
    ``cost == N <= w_max`` always.
    """

    total: int

    def __init__(self, config: MegaContextConfig) -> None:
        raise NotImplementedError

    @classmethod
    def from_arrays(cls, config: MegaContextConfig, start: np.ndarray, lod: np.ndarray) -> WorkingContext:
        """A context of given slots (of a saved session); InvariantError where they break a rule."""
        raise NotImplementedError

    @property
    def start(self) -> np.ndarray:
        raise NotImplementedError

    @property
    def lod(self) -> np.ndarray:
        raise NotImplementedError

    @property
    def version(self) -> np.ndarray:
        raise NotImplementedError

    @property
    def cost(self) -> int:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def span(self) -> np.ndarray:
        """Tokens of each slot, int64 [N]."""
        raise NotImplementedError

    @property
    def end(self) -> np.ndarray:
        """int64 [N]."""
        raise NotImplementedError

    @property
    def positions(self) -> np.ndarray:
        """Absolute positions, int64 [N]: a token's own, a gist's centre ``start + span // 2``."""
        raise NotImplementedError

    @property
    def entries(self) -> Sequence[Entry]:
        """The slots as objects, made when asked for."""
        raise NotImplementedError

    def append(self, n: int) -> None:
        """``n`` new tokens at the end, as lod 0 slots; BudgetError where they do not fit."""
        raise NotImplementedError

    def expand(self, start: int, lod: int, version: int = 0) -> Change:
        """The gist of level ``lod`` at ``start`` -> its ``block_size`` children."""
        raise NotImplementedError

    def collapse(self, start: int, lod: int, version: int = 0) -> Change:
        """Everything finer inside the span of that node -> its gist of level ``lod``."""
        raise NotImplementedError

    def apply(self, edits: Edits, version: int = 0) -> Change:
        """All edits, or ValueError (BudgetError) before anything changes. Their spans must not overlap; the budget must
        hold after each of them in order. ``version``: the tree's, kept for the new slots."""
        raise NotImplementedError

    def stale(self, tree: MegaContextTree) -> np.ndarray:
        """bool [N]: gists that the tree refreshed since their slot was made."""
        raise NotImplementedError

    def mark_loaded(self, version: int) -> None:
        """Every slot's content is now that of the tree at ``version``."""
        raise NotImplementedError

    def check_invariants(self, tree: MegaContextTree | None = None, positions: np.ndarray | None = None) -> None:
        """All eight rules; InvariantError names the broken one. ``positions`` [N]: those in use, checked too."""
        raise NotImplementedError

    def copy(self) -> WorkingContext:
        raise NotImplementedError
