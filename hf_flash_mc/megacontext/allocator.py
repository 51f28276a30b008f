"""FocusAllocator: from scores to edits, within the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .config import MegaContextConfig
from .working_context import COLLAPSE, EXPAND, BudgetError, Edits, WorkingContext


@dataclass(frozen=True)
class AllocatorState:
    """What the allocator remembers: how many plans it made, and which nodes (start, lod) it leaves alone until which.

    ``start`` int64 [n], ``lod`` int8 [n], ``until`` int64 [n].
    """

    iteration: int
    start: np.ndarray
    lod: np.ndarray
    until: np.ndarray

    @classmethod
    def initial(cls) -> AllocatorState:
        none = np.empty(0, np.int64)
        return cls(0, none, none.astype(np.int8), none)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {"iteration": self.iteration, **{k: getattr(self, k).tolist() for k in ("start", "lod", "until")}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AllocatorState:
        start, until = (np.array(values[key], np.int64) for key in ("start", "until"))
        return cls(int(values["iteration"]), start, np.array(values["lod"], np.int8), until)


@dataclass(frozen=True)
class _Slots:
    """Slots as the allocator sees them: ``start``, ``lod``, ``score`` [N] each."""

    start: np.ndarray
    lod: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class _Groups:
    """Complete groups of siblings of one level: first slot, start and level of the gist they would make, mean score."""

    first: np.ndarray
    start: np.ndarray
    lod: np.ndarray
    score: np.ndarray

    def __getitem__(self, which: np.ndarray) -> _Groups:
        return _Groups(self.first[which], self.start[which], self.lod[which], self.score[which])


class FocusAllocator:
    """Greedy (or sampled) choice of edits; pure functions of working context, scores and state.

    Collapses happen only to pay for expansions or to make room: a history that fits the budget is never coarsened.
    Every edit moves ``block_size - 1`` slots, so each expansion past the free budget takes one collapse. What was
    expanded or collapsed is not reversed by the next ``cooldown`` plans.
    """

    def __init__(self, config: MegaContextConfig) -> None:
        self.config = config
        self._spans = np.int64(config.block_size) ** np.arange(config.max_lod + 1)

    def plan(
        self,
        wc: WorkingContext,
        scores: np.ndarray | Tensor,
        state: AllocatorState,
        max_edits: int | None = None,
        *,
        stochastic: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: np.random.Generator | None = None,
        upto: int | None = None,
    ) -> tuple[Edits, AllocatorState]:
        """Edits of one refocus: at most ``max_edits`` expansions, the collapses that pay for them first.

        scores [N] in [-1, 1]: a gist above ``tau`` may be expanded; ``block_size`` siblings whose mean is below
        ``-tau`` may be collapsed, unless they touch the sink, the recent tokens or those from number ``upto`` on. Ties
        go to recent expansions and old collapses. ``stochastic``: drawn without replacement from the ``top_k`` best by
        softmax(|score| / temperature).
        O(N) numpy operations and one sort of the candidates.
        """
        limit = self.config.max_edits if max_edits is None else max_edits
        if limit < 0:
            raise ValueError(f"max_edits: expected a number of expansions, got {limit}")
        if stochastic and (generator is None or not temperature > 0 or (top_k is not None and top_k < 1)):
            raise ValueError(
                f"stochastic: expected a numpy generator, temperature > 0 and top_k None or >= 1, got {generator}, "
                f"{temperature} and {top_k}"
            )
        slots = _Slots(wc.start, wc.lod, _checked(scores, len(wc)))
        tau, block = self.config.tau, self.config.block_size

        gists = np.flatnonzero((slots.lod > 0) & (slots.score > tau))
        gists = gists[~self._cooling(state, slots.start[gists], slots.lod[gists])]
        gists = gists[::-1][np.argsort(-slots.score[gists][::-1], kind="stable")]  # best first, then the most recent
        recent = wc.total - self.config.recent_tokens
        groups = self._groups(slots, recent if upto is None else min(recent, upto))
        groups = groups[groups.score < -tau]
        groups = groups[~self._cooling(state, groups.start, groups.lod)]
        groups = groups[np.argsort(groups.score, kind="stable")]  # worst first, then the oldest
        if stochastic:
            assert generator is not None
            gists = gists[_drawn(slots.score[gists], temperature, top_k, generator)]
            groups = groups[_drawn(groups.score, temperature, top_k, generator)]

        gists = gists[:limit]
        inside = np.sort(gists)  # no group may be collapsed of which a member is expanded
        begin, end = np.searchsorted(inside, groups.first), np.searchsorted(inside, groups.first + block)
        groups = groups[begin == end]
        free = max(0, self.config.w_max - wc.cost) // (block - 1)
        gists = gists[: free + len(groups.first)]
        groups = groups[np.arange(max(0, len(gists) - free))]
        edits = Edits(
            np.repeat(np.array([COLLAPSE, EXPAND], np.int8), [len(groups.first), len(gists)]),
            np.concatenate([groups.start, slots.start[gists]]),
            np.concatenate([groups.lod, slots.lod[gists]]),
        )
        return edits, self._remember(state, edits, state.iteration + 1)

    def make_room(
        self,
        wc: WorkingContext,
        scores: np.ndarray | Tensor | None,
        need: int,
        state: AllocatorState,
        upto: int | None = None,
    ) -> tuple[Edits, AllocatorState]:
        """Collapses after which ``need`` more tokens fit, lowest scores first, coarser levels as needed.

        No threshold; what cools down is collapsed last. ``recent_tokens`` is counted from the end that the history has
        after them; tokens from number ``upto`` on stay as they are. Without scores: finest level first, oldest first.
        BudgetError where even that does not free enough.
        """
        if need < 0:
            raise ValueError(f"need: expected a number of tokens, got {need}")
        score = np.zeros(len(wc)) if scores is None else _checked(scores, len(wc))
        slots = _Slots(wc.start, wc.lod, score)
        target, block = self.config.w_max - need, self.config.block_size
        while len(slots.start) > target:  # a round for each level, at most a few
            recent = wc.total + need - self.config.recent_tokens
            groups = self._groups(slots, recent if upto is None else min(recent, upto))
            if not len(groups.first):
                raise BudgetError(
                    f"need: expected at most {max(0, self.config.w_max - len(slots.start))} tokens ({len(slots.start)} "
                    f"of w_max = {self.config.w_max} slots remain after every collapse), got {need}; append fewer at a "
                    f"time, or raise w_max or max_lod"
                )
            cooling = self._cooling(state, groups.start, groups.lod)
            order = np.lexsort((groups.start, groups.lod, groups.score, cooling))
            slots = self._collapsed(slots, groups[order[: -(-(len(slots.start) - target) // (block - 1))]])
        made = np.flatnonzero(wc.lod[np.searchsorted(wc.start, slots.start)] != slots.lod)
        edits = Edits(np.full(len(made), COLLAPSE, np.int8), slots.start[made], slots.lod[made])
        return edits, self._remember(state, edits, state.iteration)

    def _groups(self, slots: _Slots, recent: int) -> _Groups:
        """Complete groups of siblings that lie between the sink and the token ``recent``."""
        block, top = self.config.block_size, self.config.max_lod
        start, lod = slots.start, slots.lod
        first = np.flatnonzero((lod < top) & (start >= self.config.sink_tokens))
        first = first[: np.searchsorted(first, len(start) - block, side="right")]
        span = self._spans[lod[first]]
        first = first[start[first] % (span * block) == 0]
        last = first + block - 1
        span = self._spans[lod[first]]
        # between the first child and the last lie block_size - 2 slots, so all of them have their level
        whole = (lod[last] == lod[first]) & (start[last] == start[first] + (block - 1) * span)
        first = first[whole & (start[first] + block * span <= recent)]
        mean = slots.score[first[:, None] + np.arange(block)].mean(1)  # [G, block_size] -> [G]
        return _Groups(first, start[first], (lod[first] + 1).astype(np.int8), mean)

    def _collapsed(self, slots: _Slots, groups: _Groups) -> _Slots:
        """The slots after these groups became gists, which score like the mean of their children."""
        lod, score = slots.lod.copy(), slots.score.copy()
        lod[groups.first], score[groups.first] = groups.lod, groups.score
        stay = np.ones(len(lod), bool)
        stay[(groups.first[:, None] + np.arange(1, self.config.block_size)).ravel()] = False
        return _Slots(slots.start[stay], lod[stay], score[stay])

    def _key(self, start: np.ndarray, lod: np.ndarray) -> np.ndarray:
        """One number for each node."""
        return start * (self.config.max_lod + 1) + lod

    def _cooling(self, state: AllocatorState, start: np.ndarray, lod: np.ndarray) -> np.ndarray:
        alive = state.until > state.iteration
        held = np.sort(self._key(state.start[alive], state.lod[alive]))
        if not len(held):
            return np.zeros(len(start), bool)
        key = self._key(start, lod)  # np.isin would hash every one of them: 2 ms for 8192
        return held[np.minimum(np.searchsorted(held, key), len(held) - 1)] == key

    def _remember(self, state: AllocatorState, edits: Edits, iteration: int) -> AllocatorState:
        keep = state.until > iteration
        until = np.full(len(edits), iteration + self.config.cooldown, np.int64)
        columns = ((state.start, edits.start), (state.lod, edits.lod), (state.until, until))
        # a long ingest makes room many times within one iteration: no more nodes are kept than there can be slots
        return AllocatorState(
            iteration, *(np.concatenate([old[keep], new])[-self.config.w_max :] for old, new in columns)
        )


def _checked(scores: np.ndarray | Tensor, n: int) -> np.ndarray:
    """scores [n] as float64; ValueError where they are no scores of these slots."""
    if isinstance(scores, Tensor):
        scores = scores.detach().double().cpu().numpy()
    values = np.asarray(scores, np.float64)
    if values.shape != (n,):
        raise ValueError(f"scores: expected one for each of {n} slots, got shape {values.shape}")
    if n and not np.abs(values).max() <= 1 + 1e-6:  # NaN fails too
        raise ValueError(f"scores: expected values in [-1, 1], got {values.min()} to {values.max()}")
    return values


def _drawn(score: np.ndarray, temperature: float, top_k: int | None, generator: np.random.Generator) -> np.ndarray:
    """Indices of the first ``top_k``, in the order of a draw without replacement by softmax(|score| / temperature)."""
    best = np.abs(score[:top_k])
    return np.argsort(-(best / temperature + generator.gumbel(size=len(best))), kind="stable")
