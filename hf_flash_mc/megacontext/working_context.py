"""WorkingContext: which nodes of the tree the model sees, as arrays of slots ordered by start."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np
import torch

from .config import MegaContextConfig

if TYPE_CHECKING:
    from .tree import MegaContextTree

EXPAND, COLLAPSE = 1, -1


class BudgetError(ValueError):
    """More slots are asked for than ``w_max`` allows."""


class InvariantError(RuntimeError):
    """A working context is broken; ``invariant`` names which of the eight rules.

    They are budget, contiguity, alignment, level, positions, tree, time, atomicity.
    """

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(f"{invariant}: {detail}")
        self.invariant = invariant


class Entry(NamedTuple):
    """One slot: tokens [start, end) at level ``lod``, at a cost of 1."""

    start: int
    end: int
    lod: int
    cost: int = 1


class Entries(Sequence[Entry]):
    """The slots of a working context as it is now; each object is made when it is asked for."""

    def __init__(self, start: np.ndarray, end: np.ndarray, lod: np.ndarray) -> None:
        self._start, self._end, self._lod = start, end, lod

    def __len__(self) -> int:
        return len(self._start)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Entries: ...
    def __getitem__(self, index: int | slice) -> Entry | Entries:
        if isinstance(index, slice):
            return Entries(self._start[index], self._end[index], self._lod[index])
        return Entry(int(self._start[index]), int(self._end[index]), int(self._lod[index]))

    def __repr__(self) -> str:
        return f"Entries({[tuple(entry) for entry in self[:8]]}{', ...' if len(self) > 8 else ''})"


@dataclass(frozen=True)
class Edits:
    """Edits of one refocus, in order.

    ``kind`` int8 [n]: +1 expands, -1 collapses; ``start`` int64 [n], ``lod`` int8 [n]: the gist expanded, or made.
    """

    kind: np.ndarray
    start: np.ndarray
    lod: np.ndarray

    @classmethod
    def of(cls, edits: Iterable[tuple[int, int, int]]) -> Edits:
        """From (kind, start, lod) triples."""
        columns = np.array(list(edits), np.int64).reshape(-1, 3).T
        return cls(columns[0].astype(np.int8), columns[1].copy(), columns[2].astype(np.int8))

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

    ``start`` int64 [N], ``lod`` int8 [N], ``version`` int64 [N] (of the tree when the slot was made) are read-only and
    stay as they are when the context changes; ``cost == N <= w_max`` always.
    """

    def __init__(self, config: MegaContextConfig) -> None:
        self.config = config
        self.spans = np.int64(config.block_size) ** np.arange(config.max_lod + 1)  # tokens of a node of each level
        self._cost = self._total = self._seen = 0  # slots, tokens, and the longest history so far
        none = np.empty(0, np.int64)
        self._set(none, none.astype(np.int8), none, 0)

    @classmethod
    def from_arrays(
        cls, config: MegaContextConfig, start: np.ndarray, lod: np.ndarray, version: int = 0
    ) -> WorkingContext:
        """A context of given slots (of a saved session); InvariantError where they break a rule."""
        start, lod = np.array(start), np.array(lod)
        if start.ndim != 1 or start.shape != lod.shape or start.dtype.kind not in "iu" or lod.dtype.kind not in "iu":
            raise ValueError(
                f"start, lod: expected whole numbers [N] each, got {start.dtype} {start.shape}, {lod.dtype} {lod.shape}"
            )
        wc = cls(config)
        if len(start) > config.w_max:
            raise InvariantError("budget", f"{len(start)} slots of {config.w_max}")
        if len(lod) and not (lod.min() >= 0 and lod.max() <= config.max_lod):
            raise InvariantError("level", f"levels from {lod.min()} to {lod.max()}, expected 0 to {config.max_lod}")
        total = int(start[-1] + wc.spans[lod[-1]]) if len(start) else 0
        wc._set(start.astype(np.int64), lod.astype(np.int8), np.full(len(start), version, np.int64), total)
        wc.check_invariants()
        return wc

    # ------------------------------------------------------------------ what it holds

    @property
    def total(self) -> int:
        """Tokens of history."""
        return self._total

    @property
    def start(self) -> np.ndarray:
        return _frozen(self._start[: self._cost])

    @property
    def lod(self) -> np.ndarray:
        return _frozen(self._lod[: self._cost])

    @property
    def version(self) -> np.ndarray:
        return _frozen(self._version[: self._cost])

    @property
    def cost(self) -> int:
        return self._cost

    def __len__(self) -> int:
        return self._cost

    @property
    def span(self) -> np.ndarray:
        """Tokens of each slot, int64 [N]."""
        return self.spans[self.lod]

    @property
    def end(self) -> np.ndarray:
        """int64 [N]."""
        return self.start + self.span

    @property
    def positions(self) -> np.ndarray:
        """Absolute positions, int64 [N]: a token's own, a gist's centre ``start + span // 2``."""
        return self.start + self.span // 2

    @property
    def entries(self) -> Entries:
        """The slots as objects, made when asked for."""
        return Entries(self.start, self.end, self.lod)

    def __repr__(self) -> str:
        levels = np.bincount(self.lod, minlength=self.config.max_lod + 1).tolist()
        return f"WorkingContext(total={self.total}, cost={self.cost}/{self.config.w_max}, slots by level={levels})"

    # ------------------------------------------------------------------ changes

    def append(self, n: int, version: int = 0) -> None:
        """``n`` new tokens at the end, as lod 0 slots; BudgetError where they do not fit."""
        if n < 0:
            raise ValueError(f"n: expected a number of tokens, got {n}")
        cost = self._cost + n
        if cost > self.config.w_max:
            raise BudgetError(
                f"n: expected at most {self.config.w_max - self._cost} tokens (free slots of w_max = "
                f"{self.config.w_max}), got {n}; collapse first (FocusAllocator.make_room)"
            )
        if cost > len(self._start):
            self._reserve(min(max(cost, 2 * len(self._start)), self.config.w_max))
        new = slice(self._cost, cost)
        self._start[new] = np.arange(self._total, self._total + n)
        self._lod[new] = 0
        self._version[new] = version
        self._cost = cost
        self._total += n
        self._seen = max(self._seen, self._total)

    def drop(self, n: int) -> None:
        """Take the last ``n`` tokens back; ValueError where they are not lod 0 slots. (A suffix may be read again.)"""
        if not 0 <= n <= self._cost or self._lod[self._cost - n : self._cost].any():
            raise ValueError(f"n: expected at most the lod 0 slots at the end of {self._cost} slots, got {n}")
        self._cost -= n
        self._total -= n
        self._seen = self._total

    def expand(self, start: int, lod: int, version: int = 0) -> Change:
        """The gist of level ``lod`` at ``start`` -> its ``block_size`` children."""
        return self.apply(Edits.of([(EXPAND, start, lod)]), version)

    def collapse(self, start: int, lod: int, version: int = 0) -> Change:
        """Everything finer inside the span of that node -> its gist of level ``lod``."""
        return self.apply(Edits.of([(COLLAPSE, start, lod)]), version)

    def apply(self, edits: Edits, version: int = 0) -> Change:
        """Make all edits; ValueError (BudgetError) before anything changes where one of them is illegal.

        Their spans must not overlap, and the budget must hold after each of them, in their order. ``version``: the
        tree's, kept for the new slots. O(N) numpy operations.
        """
        kind, start, lod = (np.asarray(column, np.int64) for column in (edits.kind, edits.start, edits.lod))
        low, high = self._located(kind, start, lod)
        gone = np.zeros(self._cost + 1, np.int8)
        gone[low] = 1
        gone[high] -= 1  # spans do not overlap: one ends at most where the next begins
        left = np.cumsum(gone[:-1]).astype(bool)  # [N] slots that leave
        expanded = kind == EXPAND
        children = np.arange(self.config.block_size)
        inner = start[expanded, None] + children * self.spans[lod[expanded] - 1][:, None]  # [e, block_size]
        came_start = np.concatenate([start[~expanded], inner.ravel()])
        came_lod = np.concatenate([lod[~expanded], np.repeat(lod[expanded] - 1, len(children))]).astype(np.int8)

        old_start, old_lod, stay = self.start, self.lod, ~left
        new_start = np.concatenate([old_start[stay], came_start])
        order = np.argsort(new_start, kind="stable")
        new_start = new_start[order]
        new_lod = np.concatenate([old_lod[stay], came_lod])[order]
        stamps = np.full(len(came_start), version, np.int64)
        new_version = np.concatenate([self.version[stay], stamps])[order]
        removed = np.flatnonzero(left)
        added = np.flatnonzero(order >= len(order) - len(came_start))
        self._set(new_start, new_lod, new_version, self._total)
        return Change(old_start[removed], old_lod[removed], removed, new_start[added], new_lod[added], added)

    def mark_loaded(self, version: int) -> None:
        """Every slot's content is now that of the tree at ``version``."""
        self._version = np.full(len(self._start), version, np.int64)

    def copy(self) -> WorkingContext:
        twin = WorkingContext(self.config)
        twin._set(self.start.copy(), self.lod.copy(), self.version.copy(), self._total)
        twin._seen = self._seen
        return twin

    # ------------------------------------------------------------------ checks

    def stale(self, tree: MegaContextTree) -> np.ndarray:
        """bool [N]: gists that the tree refreshed since their slot was made."""
        found = np.zeros(self._cost, bool)
        for lod in range(1, self.config.max_lod + 1):
            at = np.flatnonzero(self.lod == lod)
            nodes = torch.from_numpy(self.start[at] // self.spans[lod])
            found[at] = tree.version_of(lod, nodes).numpy() > self.version[at]
        return found

    def check_invariants(self, tree: MegaContextTree | None = None, positions: np.ndarray | None = None) -> None:
        """All eight rules; InvariantError names the broken one.

        ``tree``: the history that this context shows (its nodes and gist versions must agree; the last tokens may not
        be in it yet). ``positions`` [N]: the absolute positions in use, if they are to be checked.
        """
        start, lod, top = self.start, self.lod, self.config.max_lod
        _require("budget", self._cost <= self.config.w_max, f"{self._cost} slots of {self.config.w_max}")
        _all("level", (lod >= 0) & (lod <= top), start, lod, f"expected a level from 0 to {top}")
        span = self.spans[lod]
        end = start + span
        _all("alignment", start % span == 0, start, lod, "expected its start at a multiple of its span")
        _all("time", np.diff(start, prepend=-1) > 0, start, lod, "expected starts that increase")
        _require("time", self._total >= self._seen, f"{self._total} tokens after {self._seen}")
        _require("contiguity", self._cost > 0 or self._total == 0, f"no slots for {self._total} tokens")
        _require("contiguity", self._cost == 0 or start[0] == 0, f"first slot at {start[:1]}, expected 0")
        _require(
            "contiguity", self._cost == 0 or end[-1] == self._total, f"last end {end[-1:]} of {self._total} tokens"
        )
        _require("atomicity", self._whole_blocks(start, lod), "a block shows some of its children, but not all")
        _all("contiguity", end[:-1] == start[1:], start, lod, "expected its end where the next slot starts")
        if positions is not None:
            same = np.shape(positions) == start.shape and bool(np.all(np.asarray(positions) == self.positions))
            _require("positions", same, "expected a token's own position, and start + span // 2 for a gist")
        if tree is not None:
            _require("tree", len(tree) <= self._total, f"tree of {len(tree)} tokens, expected at most {self._total}")
            _all("tree", (lod == 0) | (end <= len(tree)), start, lod, f"past the tree's {len(tree)} tokens")
            _all("tree", ~self.stale(tree), start, lod, "refreshed in the tree since it was loaded")

    def _whole_blocks(self, start: np.ndarray, lod: np.ndarray) -> bool:
        """Whether each block that shows a child of some level shows all its tokens at that level or finer."""
        for level in range(self.config.max_lod):
            fine, width = lod <= level, self.spans[level + 1]
            block = start[fine] // width
            first = np.flatnonzero(np.diff(block, prepend=-1))
            if len(first):
                shown = np.add.reduceat(self.spans[lod[fine]], first)
                if np.any(shown != np.minimum(width, self._total - block[first] * width)):
                    return False
        return True

    # ------------------------------------------------------------------ inside

    def _located(self, kind: np.ndarray, start: np.ndarray, lod: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Slots [low, high) that each edit replaces; raises where one is illegal."""
        if not kind.ndim == start.ndim == lod.ndim == 1 or not len(kind) == len(start) == len(lod):
            raise ValueError(f"edits: expected arrays [n] each, got {kind.shape}, {start.shape} and {lod.shape}")

        def require(fine: np.ndarray, reason: str, error: type[ValueError] = ValueError) -> None:
            if not fine.all():
                i = int(np.argmin(fine))
                what = {EXPAND: "expand", COLLAPSE: "collapse"}.get(int(kind[i]), f"kind {kind[i]}")
                raise error(f"edits[{i}] ({what} start {start[i]}, lod {lod[i]}): {reason}; nothing was changed")

        top = self.config.max_lod
        require((kind == EXPAND) | (kind == COLLAPSE), "expected kind +1 (expand) or -1 (collapse)")
        require((lod >= 1) & (lod <= top), f"expected the level of a gist, 1 to {top}")
        span = self.spans[lod]
        end = start + span
        require(start % span == 0, "expected a start at a multiple of block_size ** lod")
        require((start >= 0) & (end <= self._total), f"expected a complete node of the {self._total} tokens")
        low, high = np.searchsorted(self.start, start), np.searchsorted(self.start, end)
        starts, levels = np.append(self.start, self._total), np.append(self.lod, -1)
        require(starts[low] == start, "expected slots that begin there, got a coarser gist around it")
        same = levels[low] == lod
        require(same | (kind == COLLAPSE), "expected that gist among the slots, got others")
        require((starts[high] == end) & ~(same & (kind == COLLAPSE)), "expected finer slots there, got a gist")
        order = np.argsort(start, kind="stable")
        fine = np.ones(len(kind), bool)
        fine[order[1:]] = end[order[:-1]] <= start[order[1:]]
        require(fine, "expected edits whose spans do not overlap")
        running = self._cost + np.cumsum(np.where(kind == EXPAND, self.config.block_size - 1, 1 - (high - low)))
        over = f"expected at most w_max = {self.config.w_max} slots after it; collapse more before it"
        require(running <= self.config.w_max, over, BudgetError)
        return low, high

    def _reserve(self, size: int) -> None:
        """Longer arrays; views of the old ones stay as they are."""
        for name in ("_start", "_lod", "_version"):
            old = getattr(self, name)
            new = np.empty(size, old.dtype)
            new[: self._cost] = old[: self._cost]
            setattr(self, name, new)

    def _set(self, start: np.ndarray, lod: np.ndarray, version: np.ndarray, total: int) -> None:
        self._start, self._lod, self._version = start, lod, version
        self._cost = len(start)
        self._total = total
        self._seen = max(self._seen, total)


def _frozen(view: np.ndarray) -> np.ndarray:
    view.flags.writeable = False
    return view


def _require(invariant: str, fine: bool, detail: str) -> None:
    if not fine:
        raise InvariantError(invariant, detail)


def _all(invariant: str, fine: np.ndarray, start: np.ndarray, lod: np.ndarray, expected: str) -> None:
    if not fine.all():
        i = int(np.argmin(fine))
        bad = len(fine) - int(np.count_nonzero(fine))
        raise InvariantError(invariant, f"slot {i} (start {start[i]}, lod {lod[i]}): {expected} ({bad} such)")
