"""Focus: how a session decides what to show: scores, plans, and room for them."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .allocator import AllocatorState, FocusAllocator
from .cache import MegaContextCache
from .config import MegaContextConfig
from .entries import EntryEmbeddings
from .lensnet import GistMassLens, LensInput, TrainedLens
from .memory import Memory
from .recall import entry_mass
from .telemetry import Telemetry
from .working_context import BudgetError, Edits, WorkingContext

STRONG = 0.9  # a gist of such a score is expanded even if only what is average can pay for it


def _check_count(name: str, count: int) -> None:
    if not isinstance(count, int | np.integer) or count < 0:
        raise ValueError(f"{name}: expected a whole number of at least 0, got {count!r}")


class Focus:
    """The part of a `MegaContextSession` that chooses; it has the session's attributes."""

    addon: Any
    model: Any
    config: MegaContextConfig
    cache: MegaContextCache
    memory: Memory
    working_context: WorkingContext
    allocator: FocusAllocator
    allocation: AllocatorState
    stats: Telemetry
    generator: torch.Generator
    scaling: list[float]
    last_scores: tuple[np.ndarray, np.ndarray, np.ndarray]
    _softcap: float | None
    _by_mass: GistMassLens
    _entries: EntryEmbeddings | None
    _logits: Tensor | None
    _since_refocus: int

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def tokens(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Token ids [n] of the history."""
        raise NotImplementedError

    def apply(self, edits: Edits, *, refocus: bool = False) -> None:
        """Apply edits to working context and cache."""
        raise NotImplementedError

    def reread(self, count: int) -> None:
        """Run the last tokens again."""
        raise NotImplementedError

    def _commit(self, upto: int) -> None:
        raise NotImplementedError

    def _check_back(self, count: int, name: str = "count") -> None:
        raise NotImplementedError

    def _embed(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def refocus(self, *, rounds: int = 1, max_edits: int | None = None, reread: int = 0) -> list[Edits]:
        """Let the lens score the working context and the allocator edit it, ``rounds`` times; the edits of each.

        Args:
            max_edits: expansions of one round, each paid for by a collapse if need be; None: the config's.
            reread: tokens at the end of the history that are run again after each round, so that they (a question, say)
                are read in the light of what was expanded. They stay tokens, however many.

        Raises:
            ValueError: counts that are no whole numbers; ``reread`` tokens that are in the tree already (see `reread`),
                before anything changed.
        """
        limit = self.config.max_edits if max_edits is None else max_edits
        for name, count in (("rounds", rounds), ("reread", reread), ("max_edits", limit)):
            _check_count(name, count)
        if reread:
            self._check_back(reread, "reread")
        edits, answered = [], False
        for _ in range(rounds):
            edits.append(self._refocus_once(max_edits, reread, answered))
            if reread:
                # a question that was answered by something needs nothing else, which could only be taken for the answer
                answered = answered or bool((self.last_scores[2] > STRONG).any())
                self.reread(reread)
        return edits

    def scores(self, keep: int = 0) -> Tensor:
        """The lens's scores of the working context, float32 [N] on the CPU.

        keep: the last so many tokens ask, and stay out of the tree; 0: the last ``observe`` queries ask.
        """
        _check_count("keep", keep)
        with self.stats.time("lens"), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            scores = self.addon.lens.score(self.lens_input(keep)).detach().cpu()
        self.last_scores = self.working_context.start, self.working_context.lod, scores.numpy().copy()
        return scores

    def lens_input(self, keep: int = 0) -> LensInput:
        """What the lens is shown of the working context, on the device; ``keep``: only so many last queries count."""
        wc, lens = self.working_context, self.addon.lens
        trained = isinstance(getattr(lens, "_orig_mod", lens), TrainedLens)  # the module that torch.compile wrapped
        if trained or lens.reads == "recall":  # they know what is in the tree
            self._commit(len(self) - max(self.config.recent_tokens, keep))
        last = keep or None
        mass = self.attention_mass(last) if self.cache.observe and lens.reads != "nothing" else None
        context = LensInput.of(wc, self.device, attention_mass=mass, generator=self.generator)
        if lens.reads == "recall":
            context.recall = self.recall_mass(last)
        if trained:
            if self._entries is None:
                self._entries = EntryEmbeddings(self.config, self._embed)
            self._entries.follow(self.memory.tree)
            context.entries = self._entries.of(wc, self.tokens())
            tail = self._entries.tail().to(context.entries)
            context.tail = tail if len(tail) else context.entries[-self.config.block_size :].mean(0, keepdim=True)
        return context

    def attention_mass(self, last: int | None = None) -> Tensor:
        """The share of attention that each slot got from the last queries (at most ``last`` of them), float32 [N]."""
        mass = self.cache.attention_mass(self.scaling, self._softcap, last)
        return mass[torch.from_numpy(self.memory.slots).to(mass.device)]

    def recall_mass(self, last: int | None = None) -> Tensor:
        """What the copying heads' last queries ask for, by exact keys whatever the level of detail, float32 [N].

        ValueError where the session keeps no `RecallIndex`.
        """
        if self.memory.recall is None:
            raise ValueError(
                "recall: this session keeps no index; start it with session(recall=True), or with a config of "
                'lens={"kind": "recall"}'
            )
        queries, wc = self.cache.last_queries(last), self.working_context
        first = self.memory.numbering.next - queries.shape[2]
        blocks = self.memory.recall.mass(queries, first, self.config.sink_tokens).cpu().numpy()
        return torch.from_numpy(entry_mass(blocks, wc.start, wc.span, self.config.block_size)).to(self.device)

    def make_room(self, need: int, scores: Tensor | None = None, *, tokens: int | None = None, keep: int = 1) -> int:
        """Collapse until ``need`` slots are free, or fewer where that is impossible; how many were made sure of.

        Args:
            scores: [N], what to keep; None: the lens's, or by attention mass where the lens reads all of the history.
            tokens: how many of the slots are for new tokens, which make others less recent; None: all.
            keep: the last so many tokens stay tokens.
        """
        wc = self.working_context
        while len(wc) + need > self.config.w_max:
            scores = self._worth() if scores is None else scores
            try:
                with self.stats.time("allocate"):
                    # its state would keep what had to go from coming back for a while: the next refocus knows better
                    # the last token stays one, however many come: it may have to be run again before they do
                    upto = wc.total - max(keep, 1)
                    edits, _ = self.allocator.make_room(wc, scores, need, self.allocation, upto)
            except BudgetError:
                if need == 1:
                    raise
                need = max(1, need // 2)
                continue
            if tokens is not None:  # the allocator takes all slots for tokens to come
                kept = edits.start + wc.spans[edits.lod] <= wc.total + tokens - self.config.recent_tokens
                edits = Edits(edits.kind[kept], edits.start[kept], edits.lod[kept])
            logits = self._logits
            self.apply(edits)
            self._logits = logits  # the text is the same: stale by a collapse of what mattered least
            break
        return need

    def _worth(self) -> Tensor:
        if self.addon.lens.reads != "recall" or not self.cache.observe:
            return self.scores()
        wc = self.working_context
        with self.stats.time("lens"), torch.no_grad():
            return self._by_mass.score(LensInput.of(wc, self.device, attention_mass=self.attention_mass())).cpu()

    def _refocus_once(self, max_edits: int | None = None, keep: int = 0, strict: bool = False) -> Edits:
        """One round; ``keep``: see `scores`; ``strict``: only what is asked for strongly."""
        limit = self.config.max_edits if max_edits is None else max_edits
        scores, strong = self._asked(keep, strict)
        edits, state = self._plan(scores, limit, keep)
        strong = min(strong, limit)
        if (edits.kind > 0).sum() < strong:  # nothing is poor enough to pay for them: the poorest does
            with suppress(BudgetError):  # a question may fill the window: then nothing more is to be had
                self.make_room(strong * (self.config.block_size - 1), scores, tokens=0, keep=keep)
            edits, state = self._plan(self._asked(keep, strict)[0], limit, keep)
        self.allocation, self._since_refocus = state, 0
        if len(edits):
            self.apply(edits, refocus=True)
        else:
            self.stats.note(self.working_context, edits, 0, True)
        return edits

    def _asked(self, keep: int, strict: bool) -> tuple[Tensor, int]:
        """Scores, and how many gists are asked for strongly; if it is a question that asks, these alone."""
        scores = self.scores(keep)
        gists = torch.from_numpy(self.working_context.lod > 0)
        strong = gists & (scores > STRONG)
        if strict or (keep and bool(strong.any())):
            scores[gists & ~strong] = scores[gists & ~strong].clamp(max=0.0)
        return scores, int(strong.sum())

    def _plan(self, scores: Tensor, limit: int, keep: int = 0) -> tuple[Edits, AllocatorState]:
        wc = self.working_context
        with self.stats.time("allocate"):
            return self.allocator.plan(wc, scores, self.allocation, limit, upto=wc.total - keep)
