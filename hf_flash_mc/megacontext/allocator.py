"""FocusAllocator: from scores to edits, within the budget."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .config import MegaContextConfig
from .working_context import Edits, WorkingContext


@dataclass(frozen=True)
class AllocatorState:
    """What the allocator remembers: how many plans it made, and which nodes (start, lod) it must leave until when."""

    iteration: int
    start: np.ndarray
    lod: np.ndarray
    until: np.ndarray

    @classmethod
    def initial(cls) -> AllocatorState:
        empty = np.empty(0, np.int64)
        return cls(0, empty, empty.astype(np.int8), empty)


class FocusAllocator:
    """Greedy (or sampled) choice of edits; pure functions of working context, scores and state.

    Collapses happen only to pay for expansions or to make room: a history that fits the budget is never coarsened.
    Every edit moves ``block_size - 1`` slots, so each expansion past the free budget takes one collapse.
    """

    def __init__(self, config: MegaContextConfig) -> None:
        self.config = config

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
    ) -> tuple[Edits, AllocatorState]:
        """Edits of one refocus: at most ``max_edits`` expansions, the collapses that pay for them first.

        scores [N] in [-1, 1]: a gist above ``tau`` may be expanded; ``block_size`` siblings whose mean is below
        ``-tau`` may be collapsed, unless they touch the sink or the recent tokens. Ties go to recent expansions and old
        collapses. ``stochastic``: drawn without replacement from the ``top_k`` best by softmax(|score| / temperature).
        """
        raise NotImplementedError

    def make_room(
        self, wc: WorkingContext, scores: np.ndarray | Tensor | None, need: int, state: AllocatorState
    ) -> tuple[Edits, AllocatorState]:
        """Collapses after which ``need`` more tokens fit, lowest scores first, coarser levels as needed.

        No threshold. ``recent_tokens`` is counted from the end that the history has after them. Without scores: finest
        level first, oldest first. BudgetError where even that does not free enough.
        """
        raise NotImplementedError
