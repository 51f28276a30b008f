"""WorkingContext: the eight invariants through random edits, against a model that keeps one level for each token."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from hf_flash_mc.megacontext import (
    AllocatorState,
    BudgetError,
    Edits,
    Entry,
    FocusAllocator,
    InvariantError,
    MegaContextConfig,
    MegaContextTree,
    WorkingContext,
)

EDITS = int(os.environ.get("HF_FLASH_MC_TEST_EDITS", "3000"))
SEEDS = st.integers(0, 2**32 - 1)


def config_of(block=4, max_lod=2, w_max=64, sink=4, recent=8, **more) -> MegaContextConfig:
    return MegaContextConfig(
        block_size=block, max_lod=max_lod, w_max=w_max, sink_tokens=sink, recent_tokens=recent, hidden_size=1,
        backend="embedding", **more,
    )  # fmt: skip


def context_of(total: int, *collapses: tuple[int, int], **settings) -> WorkingContext:
    """A context over ``total`` tokens with these (start, lod) collapsed."""
    wc = WorkingContext(config_of(**settings))
    wc.append(total)
    for start, lod in collapses:
        wc.collapse(start, lod)
    return wc


def slots(wc: WorkingContext) -> list[tuple[int, int]]:
    return list(zip(wc.start.tolist(), wc.lod.tolist(), strict=True))


class PerToken:
    """The obvious model: the level at which each token is shown."""

    def __init__(self, config: MegaContextConfig) -> None:
        self.config, self.level = config, np.zeros(0, np.int64)

    def append(self, n: int) -> None:
        self.level = np.append(self.level, np.zeros(n, np.int64))

    def slots(self) -> list[tuple[int, int]]:
        found, at = [], 0
        while at < len(self.level):
            lod = int(self.level[at])
            width = self.config.block_size**lod
            assert at % width == 0
            assert (self.level[at : at + width] == lod).all()
            assert at + width <= len(self.level)
            found.append((at, lod))
            at += width
        return found

    def cost(self) -> int:
        return round(float((1.0 / self.config.block_size**self.level).sum()))

    def legal(self, kind: int, start: int, lod: int) -> bool:
        """Whether this single edit is allowed, the budget aside."""
        if kind not in (1, -1) or not 1 <= lod <= self.config.max_lod:
            return False
        width = self.config.block_size**lod
        if start < 0 or start % width or start + width > len(self.level):
            return False
        inside = self.level[start : start + width]
        return bool((inside == lod).all()) if kind == 1 else bool((inside < lod).all())

    def apply(self, kind: int, start: int, lod: int) -> None:
        self.level[start : start + self.config.block_size**lod] = lod - 1 if kind == 1 else lod

    def possible(self) -> list[tuple[int, int, int]]:
        """Every legal edit, the budget aside."""
        found = []
        for lod in range(1, self.config.max_lod + 1):
            width = self.config.block_size**lod
            nodes = self.level[: len(self.level) // width * width].reshape(-1, width)
            expands, collapses = (nodes == lod).all(1), (nodes < lod).all(1)
            found += [(1, int(i) * width, lod) for i in np.flatnonzero(expands)]
            found += [(-1, int(i) * width, lod) for i in np.flatnonzero(collapses)]
        return found


class Editing(RuleBasedStateMachine):
    """Appends, legal and illegal edits, refocuses; every edit is also made alone on a twin, and checked there."""

    done = 0  # edits over all runs

    @initialize(block=st.sampled_from([2, 3, 4, 8]), max_lod=st.integers(1, 4), sink=st.integers(0, 9),
                recent=st.integers(0, 17), spare=st.integers(0, 80), cooldown=st.integers(0, 3))  # fmt: skip
    def start(self, block, max_lod, sink, recent, spare, cooldown):
        fixed = MegaContextConfig(block, max_lod, sink_tokens=sink, recent_tokens=recent).fixed_cost
        self.config = config_of(block, max_lod, fixed + block + spare, sink, recent, cooldown=cooldown)
        self.wc, self.model = WorkingContext(self.config), PerToken(self.config)
        self.tree = MegaContextTree(self.config, pool=lambda children, lod, first: children.mean(1), embed=self.embed)
        self.allocator, self.state = FocusAllocator(self.config), AllocatorState.initial()

    @staticmethod
    def embed(ids: torch.Tensor) -> torch.Tensor:
        return ids[:, None].float()

    def make(self, edits: Edits) -> None:
        """Apply a batch; the same one by one on a twin, with every invariant and the budget checked after each."""
        twin, before = self.wc.copy(), slots(self.wc)
        for kind, start, lod in zip(edits.kind.tolist(), edits.start.tolist(), edits.lod.tolist(), strict=True):
            assert self.model.legal(kind, start, lod)
            self.model.apply(kind, start, lod)
            twin.apply(Edits.of([(kind, start, lod)]))
            twin.check_invariants()
            assert twin.cost <= self.config.w_max
        change = self.wc.apply(edits)
        type(self).done += len(edits)
        assert slots(self.wc) == slots(twin)
        removed = list(zip(change.removed_start.tolist(), change.removed_lod.tolist(), strict=True))
        added = list(zip(change.added_start.tolist(), change.added_lod.tolist(), strict=True))
        assert [before[i] for i in change.removed_index] == removed
        assert [slots(self.wc)[i] for i in change.added_index] == added
        assert set(before) - set(removed) | set(added) == set(slots(self.wc))
        assert len(before) - len(removed) + len(added) == self.wc.cost

    def scores(self, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return np.clip(rng.normal(0, 0.6, len(self.wc)), -1, 1)

    def ingest(self, n: int, scores: np.ndarray | None) -> None:
        try:
            edits, self.state = self.allocator.make_room(self.wc, scores, n, self.state)
        except BudgetError:
            assert self.wc.total + n > self.config.max_history or n > self.config.recent_tokens
            return
        assert (edits.kind == -1).all()
        assert (edits.start >= self.config.sink_tokens).all()
        ends = edits.start + self.wc.spans[edits.lod]
        assert (ends <= self.wc.total + n - self.config.recent_tokens).all()
        self.make(edits)
        self.tree.append(torch.arange(self.wc.total, self.wc.total + n))
        self.wc.append(n)
        self.model.append(n)

    @rule(n=st.integers(0, 20), seed=st.none() | SEEDS)
    def append(self, n, seed):
        self.ingest(n, None if seed is None else self.scores(seed))

    @rule(n=st.integers(2, 30), seed=st.none() | SEEDS)
    def append_much(self, n, seed):
        for _ in range(n):
            self.ingest(1 + self.config.recent_tokens // 2, None if seed is None else self.scores(seed))

    @rule(rounds=st.integers(1, 40), seed=SEEDS)
    def edit(self, rounds, seed):
        """Random legal edits in batches, wherever they are: the sink and the recent tokens are the allocator's care."""
        rng = np.random.default_rng(seed)
        for _ in range(rounds):
            possible = self.model.possible()
            chosen: list[tuple[int, int, int]] = []
            taken, cost = np.zeros(len(self.model.level), bool), self.wc.cost
            for i in rng.permutation(len(possible))[: rng.integers(1, 33)]:
                kind, start, lod = possible[i]
                inside = slice(start, start + self.config.block_size**lod)
                delta = self.config.block_size - 1
                if kind == -1:
                    delta = 1 - round(float((1.0 / self.config.block_size ** self.model.level[inside]).sum()))
                if not taken[inside].any() and cost + delta <= self.config.w_max:
                    taken[inside], cost = True, cost + delta
                    chosen.append(possible[i])
            self.make(Edits.of(chosen))
            assert self.wc.cost == cost

    @rule(seed=SEEDS)
    def illegal(self, seed):
        """Arbitrary single edits: exactly the illegal ones raise, and change nothing."""
        rng = np.random.default_rng(seed)
        for _ in range(20):
            lod = int(rng.integers(-1, self.config.max_lod + 2))
            width = self.config.block_size ** max(lod, 0)
            start = int(rng.integers(-width, self.wc.total + width + 1))
            kind = int(rng.choice([-1, 1, 1, -1, 0, 2]))
            start = start if rng.random() < 0.3 else start // width * width
            legal = self.model.legal(kind, start, lod)
            if legal and kind == 1 and self.wc.cost + self.config.block_size - 1 > self.config.w_max:
                legal = False
            before = slots(self.wc)
            if legal:
                self.make(Edits.of([(kind, start, lod)]))
            else:
                with pytest.raises(ValueError, match="nothing was changed"):
                    self.wc.apply(Edits.of([(kind, start, lod)]))
                assert slots(self.wc) == before

    @rule(seed=SEEDS, rounds=st.integers(1, 10), stochastic=st.booleans(), limit=st.none() | st.integers(0, 9))
    def refocus(self, seed, rounds, stochastic, limit):
        more = {"stochastic": True, "generator": np.random.default_rng(seed), "temperature": 0.3} if stochastic else {}
        for i in range(rounds):
            edits, self.state = self.allocator.plan(self.wc, self.scores(seed + i), self.state, limit, **more)
            assert np.count_nonzero(edits.kind == 1) <= (self.config.max_edits if limit is None else limit)
            self.make(edits)

    @invariant()
    def holds(self):
        if not hasattr(self, "wc"):
            return
        self.wc.check_invariants(self.tree, self.wc.positions)
        assert slots(self.wc) == self.model.slots()
        assert self.wc.total == len(self.model.level) == len(self.tree)
        assert self.wc.cost == len(self.wc) == self.model.cost() <= self.config.w_max
        covered = np.zeros(self.wc.total + 1, np.int64)
        np.add.at(covered, self.wc.start, 1)
        np.add.at(covered, self.wc.end, -1)
        assert (np.cumsum(covered)[:-1] == 1).all()


@pytest.mark.timeout(7200)
def test_random_edits_never_break_an_invariant():
    """HF_FLASH_MC_TEST_EDITS edits (each with all invariants checked after it), 0 violations, never over budget."""
    small = EDITS <= 10_000
    limits = settings(
        max_examples=15 if small else 200, stateful_step_count=20, deadline=None, database=None, derandomize=small,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    Editing.done = 0
    while Editing.done < EDITS:
        run_state_machine_as_test(Editing, settings=limits)
    print(f"{Editing.done} edits")


# ---------------------------------------------------------------------- defects not to repeat


def test_defect_02_a_misaligned_collapse_raises():
    """A gist may begin only at a multiple of its span: not at position 17, wherever the slots would allow it."""
    wc = context_of(48)
    for start, lod in ((17, 1), (2, 1), (4, 2), (17, 2)):
        with pytest.raises(
            ValueError, match=r"edits\[0\] \(collapse start .*expected a start at a multiple of block_size"
        ):
            wc.collapse(start, lod)
    assert slots(wc) == [(i, 0) for i in range(48)]


def test_defect_02_coverage_is_checked_by_intervals():
    """As many tokens lost as covered twice: the sum of spans is right, and the check still fails."""
    wc = context_of(48)
    start, lod = np.arange(48), np.zeros(48, np.int8)
    start[20] = 19
    wc._set(start, lod, np.zeros(48, np.int64), 48)
    assert wc.span.sum() == wc.total
    with pytest.raises(InvariantError, match=r"time: slot 20 \(start 19, lod 0\)"):
        wc.check_invariants()
    gists = np.array([0, 16, 16])  # [0, 16) [16, 32) twice, and none for [32, 48)
    wc._set(gists, np.full(3, 2, np.int8), np.zeros(3, np.int64), 48)
    assert wc.span.sum() == wc.total
    with pytest.raises(InvariantError):
        wc.check_invariants()


def test_defect_10_a_batch_may_not_exceed_the_budget_in_between():
    """Expansions paid for only afterwards: refused, though the sum would fit."""
    wc = context_of(60, (16, 1), (20, 1), (24, 1), w_max=60)
    wc.append(60 - wc.cost)
    before = slots(wc)
    with pytest.raises(
        BudgetError, match=r"edits\[0\] .*at most w_max = 60 slots after it; collapse more before it; no"
    ):
        wc.apply(Edits.of([(1, 16, 1), (-1, 28, 1)]))
    assert slots(wc) == before
    wc.apply(Edits.of([(-1, 28, 1), (1, 16, 1)]))
    wc.check_invariants()
    assert wc.cost == 60


# ---------------------------------------------------------------------- edits


def test_expand_and_collapse_are_each_others_inverse():
    wc = context_of(40)
    before = slots(wc)
    change = wc.collapse(16, 2)
    assert (change.added_start.tolist(), change.added_lod.tolist(), change.added_index.tolist()) == ([16], [2], [16])
    assert change.removed_index.tolist() == list(range(16, 32))
    assert wc.cost == 40 - 15
    change = wc.expand(16, 2)
    assert change.added_start.tolist() == [16, 20, 24, 28]
    assert change.added_lod.tolist() == [1] * 4
    for start in (16, 20, 24, 28):
        wc.expand(start, 1)
    assert slots(wc) == before


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([(0, 8, 1)], r"edits\[0\] \(kind 0 start 8, lod 1\): expected kind"),
        ([(-1, 8, 0)], "expected the level of a gist, 1 to 2"),
        ([(-1, 0, 3)], "expected the level of a gist, 1 to 2"),
        ([(-1, -4, 1)], "expected a complete node of the 42 tokens"),
        ([(-1, 40, 1)], "expected a complete node of the 42 tokens"),
        ([(-1, 32, 2)], "expected a complete node of the 42 tokens"),
        ([(1, 8, 1)], "expected that gist among the slots, got others"),
        ([(1, 16, 1)], "expected that gist among the slots, got others"),
        ([(1, 20, 1)], "expected slots that begin there, got a coarser gist around it"),
        ([(-1, 4, 1)], "expected finer slots there, got a gist"),
        ([(-1, 16, 1)], "expected finer slots there, got a gist"),
        ([(-1, 24, 1)], "expected slots that begin there, got a coarser gist around it"),
        ([(-1, 8, 1), (-1, 8, 1)], r"edits\[1\] .*expected edits whose spans do not overlap"),
        ([(-1, 8, 1), (-1, 0, 2)], r"edits\[0\] .*expected edits whose spans do not overlap"),
        ([(-1, 8, 1), (1, 16, 2), (1, 4, 1), (1, 0, 1)], r"edits\[3\]"),
    ],
)
def test_illegal_edits_name_themselves_and_change_nothing(edits, message):
    wc = context_of(42, (4, 1), (16, 2))
    before = slots(wc)
    with pytest.raises(ValueError, match=message + ".*nothing was changed"):
        wc.apply(Edits.of(edits))
    assert slots(wc) == before
    wc.check_invariants()


def test_columns_of_edits_must_agree():
    with pytest.raises(ValueError, match="edits: expected arrays"):
        context_of(42).apply(Edits(np.array([1]), np.array([4, 8]), np.array([1])))


def test_no_edits_change_nothing():
    wc = context_of(42, (4, 1))
    before = slots(wc)
    assert len(wc.apply(Edits.of([])).added_start) == 0
    assert slots(wc) == before


def test_append_over_budget():
    wc = context_of(60)
    with pytest.raises(BudgetError, match=r"expected at most 4 tokens .*got 5; collapse first"):
        wc.append(5)
    with pytest.raises(ValueError, match="expected a number of tokens, got -1"):
        wc.append(-1)
    assert (wc.cost, wc.total) == (60, 60)


def test_views_are_read_only_and_stay():
    wc = context_of(20)
    start, lod = wc.start, wc.lod
    with pytest.raises(ValueError, match="read-only"):
        start[0] = 5
    twin = wc.copy()
    wc.append(3)
    wc.collapse(4, 1)
    assert start.tolist() == list(range(20)) == twin.start.tolist()
    assert not lod.any()


def test_entries_positions_and_text():
    wc = context_of(23, (4, 1), (0, 2))
    assert list(wc.entries) == [Entry(0, 16, 2), *(Entry(i, i + 1, 0) for i in range(16, 23))]
    assert wc.entries[0].cost == 1
    assert wc.entries[-1].end == wc.total == 23
    assert list(wc.entries[:2]) == [(0, 16, 2, 1), (16, 17, 0, 1)]
    assert wc.positions.tolist() == [8, *range(16, 23)]
    assert repr(wc) == "WorkingContext(total=23, cost=8/64, slots by level=[7, 0, 1])"
    assert repr(wc.entries[:1]) == "Entries([(0, 16, 2, 1)])"


def test_from_arrays():
    wc = context_of(42, (4, 1), (16, 2))
    again = WorkingContext.from_arrays(wc.config, wc.start, wc.lod)
    assert slots(again) == slots(wc)
    again.append(3)
    again.check_invariants()
    assert WorkingContext.from_arrays(wc.config, np.zeros(0, int), np.zeros(0, int)).total == 0
    with pytest.raises(ValueError, match="start, lod: expected whole numbers"):
        WorkingContext.from_arrays(wc.config, wc.start, wc.lod[1:])
    with pytest.raises(InvariantError, match="budget: 42 slots of 40"):
        WorkingContext.from_arrays(config_of(w_max=40), np.arange(42), np.zeros(42, int))
    with pytest.raises(InvariantError, match="level: levels from 0 to 3"):
        WorkingContext.from_arrays(wc.config, np.array([0, 64]), np.array([3, 0]))
    with pytest.raises(InvariantError, match="contiguity"):
        WorkingContext.from_arrays(wc.config, np.array([4, 5]), np.array([0, 0]))


# ---------------------------------------------------------------------- every invariant, broken


def broken(wc: WorkingContext, **columns) -> WorkingContext:
    """The same context with columns replaced behind its back."""
    start, lod = np.array(columns.get("start", wc.start)), np.array(columns.get("lod", wc.lod), np.int8)
    version = np.zeros(len(start), np.int64)
    wc._start, wc._lod, wc._version, wc._cost = start, lod, version, len(start)
    wc._total = columns.get("total", wc._total)
    return wc


def drop(values: np.ndarray, *which: int) -> np.ndarray:
    return np.delete(values, which)


@pytest.mark.parametrize(
    ("invariant", "columns"),
    [
        ("budget", lambda wc: {"start": np.arange(70), "lod": np.zeros(70), "total": 70}),
        ("contiguity", lambda wc: {"total": wc.total + 4}),
        ("contiguity", lambda wc: {"start": drop(wc.start, 0, 1, 2, 3), "lod": drop(wc.lod, 0, 1, 2, 3)}),
        ("contiguity", lambda wc: {"start": drop(wc.start, 13), "lod": drop(wc.lod, 13)}),
        ("atomicity", lambda wc: {"start": drop(wc.start, 4), "lod": drop(wc.lod, 4)}),
        ("contiguity", lambda wc: {"start": [], "lod": []}),
        ("alignment", lambda wc: {"start": np.where(wc.start == 16, 17, wc.start)}),
        ("level", lambda wc: {"lod": np.where(wc.start == 9, 3, wc.lod)}),
        ("level", lambda wc: {"lod": np.where(wc.start == 9, -1, wc.lod)}),
        ("time", lambda wc: {"start": wc.start[::-1], "lod": wc.lod[::-1]}),
        ("time", lambda wc: {"start": wc.start[:-1], "lod": wc.lod[:-1], "total": wc.total - 1}),
        ("atomicity", lambda wc: {"start": drop(wc.start, 6), "lod": drop(wc.lod, 6)}),
        ("atomicity", lambda wc: {"lod": np.where(wc.start == 12, 1, wc.lod)}),
    ],
)
def test_a_broken_invariant_is_named(invariant, columns):
    wc = context_of(42, (4, 1), (16, 2))
    wc.check_invariants()
    broken(wc, **columns(wc))
    with pytest.raises(InvariantError) as caught:
        wc.check_invariants()
    assert caught.value.invariant == invariant


def test_positions_and_tree_are_checked():
    config = config_of()
    tree = MegaContextTree(config, pool=lambda children, lod, first: children.mean(1), embed=Editing.embed)
    tree.append(torch.arange(42))
    wc = context_of(42, (4, 1), (16, 2))
    wc.check_invariants(tree, wc.positions)
    for positions in (wc.positions + 1, wc.positions[1:], wc.start):
        with pytest.raises(InvariantError, match="positions: expected a token's own position"):
            wc.check_invariants(positions=positions)
    tree.refresh(2, torch.tensor([1]), torch.zeros(1, 1))
    with pytest.raises(InvariantError, match=r"tree: slot .* \(start 16, lod 2\): refreshed in the tree"):
        wc.check_invariants(tree)
    wc.expand(16, 2)
    wc.collapse(16, 2, version=tree.version)
    wc.check_invariants(tree)
    tree.append(torch.arange(1))
    with pytest.raises(InvariantError, match="tree: tree of 43 tokens, expected at most 42"):
        wc.check_invariants(tree)
    tree.truncate(32)  # the last tokens need not be in it yet
    wc.check_invariants(tree)
    tree.truncate(31)
    with pytest.raises(InvariantError, match=r"tree: slot .* \(start 16, lod 2\): past the tree's 31 tokens"):
        wc.check_invariants(tree)


def test_drop_takes_tokens_back():
    wc = context_of(42, (4, 1), (36, 1))
    wc.drop(2)
    wc.drop(0)
    wc.check_invariants()
    assert (wc.total, wc.entries[-1]) == (40, Entry(36, 40, 1))
    for n in (1, 40, -1):
        with pytest.raises(ValueError, match="n: expected at most the lod 0 slots at the end"):
            wc.drop(n)
    wc.append(3)
    wc.check_invariants()
    assert wc.total == 43
