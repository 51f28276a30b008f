"""Lens training: edits are measured as a session would, the lens sees what a session shows, and it learns to rank."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from patch_models import VOCAB
from test_megacontext_session import CONFIG, attached
from torch import Tensor

from hf_flash_mc.megacontext.config import MegaContextConfig
from hf_flash_mc.megacontext.counterfactual import CounterfactualScorer
from hf_flash_mc.megacontext.distill import Layout
from hf_flash_mc.megacontext.lens_task import LensTask, LensWeights, ranking
from hf_flash_mc.megacontext.lensnet import GistMassLens, LensInput, OracleLens, build_lens
from hf_flash_mc.megacontext.losses import draw_levels
from hf_flash_mc.megacontext.working_context import COLLAPSE, EXPAND, Edits

BASE = dataclasses.replace(CONFIG, w_max=192, lens={"kind": "dual", "width": 32, "head_dim": 16, "prior": "gist_mass"})
CONTEXT, HORIZON = 60, 8


def windows(count: int) -> Tensor:
    return torch.randint(3, VOCAB, (count, CONTEXT + HORIZON), generator=torch.Generator().manual_seed(2))


def task_of(config: MegaContextConfig = BASE, family: str = "llama", **more) -> LensTask:
    torch.manual_seed(0)
    model = attached(family, config).eval()
    return LensTask(model, Layout.of(config, CONTEXT, HORIZON), **more)


def mixed(task: LensTask, batch: int, seed: int = 1) -> Tensor:
    """Working contexts of all levels."""
    layout, generator = task.layout, torch.Generator().manual_seed(seed)
    groups = layout.groups if task.config.max_lod > 1 else []
    return draw_levels(batch, layout.count, layout.block, 2.0, generator, groups, min(1, len(groups)))


def session_of(task: LensTask, ids: Tensor, levels: Tensor):
    """A session that shows what ``levels`` says of one window."""
    model, layout = task._hold[0], task.layout
    session = model.megacontext.session(chunk_size=CONTEXT, observe=task.config.recent_tokens)
    session.ingest(ids[:CONTEXT])
    starts = [layout.first + layout.block * j for j in range(layout.count)]
    session.apply(Edits.of([(COLLAPSE, s, 1) for s, level in zip(starts, levels.tolist(), strict=True) if level]))
    session.apply(Edits.of([(COLLAPSE, starts[g], 2) for g in layout.groups if levels[g] == 2]))
    return session


def as_session_edit(task: LensTask, kind: int, start: int, end: int) -> Edits:
    lod = 1 if end - start == task.layout.block else 2
    return Edits.of([(EXPAND if kind > 0 else COLLAPSE, start, lod)])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("max_lod", [1, 2, 3])
def test_measured_as_a_session_measures_and_seen_as_it_shows(family: str, max_lod: int) -> None:
    task = task_of(dataclasses.replace(BASE, max_lod=max_lod), family)
    ids, levels = windows(3), mixed(task, 3)
    edits = task.draw_edits(levels, None, torch.Generator().manual_seed(0))
    measured = task.measure(ids, levels, edits)
    assert set(edits.kind.unique().tolist()) == {-1, 1}
    assert ((edits.end - edits.start).unique() == torch.tensor([4] if max_lod == 1 else [4, 16])).all()
    for i in range(3):
        session = session_of(task, ids[i], levels[i])
        wanted = [
            as_session_edit(task, *row)
            for row in torch.stack((edits.kind[i], edits.start[i], edits.end[i]), 1).tolist()
        ]
        scorer = CounterfactualScorer(session)
        found = scorer.losses([Edits.of([]), *wanted], ids[i, CONTEXT:])
        assert torch.allclose(measured.base[i], found[0], atol=1e-4)
        assert torch.allclose(measured.variants[i], found[1:], atol=1e-4)
        shown, mine = session.lens_input(), measured.entries
        assert torch.equal(mine.start[i], shown.start)
        assert torch.equal(mine.lod[i], shown.lod)
        assert mine.cursor == shown.cursor
        assert torch.equal(mine.entries[i], shown.entries)
        assert torch.equal(mine.tail[i], shown.tail)
        assert torch.allclose(mine.attention_mass[i], shown.attention_mass, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["dual", "transformer"])
def test_a_batch_scores_as_its_contexts_one_by_one(kind: str) -> None:
    task = task_of(dataclasses.replace(BASE, lens=BASE.lens | {"kind": kind}))
    levels = mixed(task, 3)
    entries = task.measure(windows(3), levels, task.draw_edits(levels, 1)).entries
    with torch.no_grad():
        for parameter in task.lens.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    names = ("start", "lod", "entries", "tail", "attention_mass")
    for lens in (task.lens, GistMassLens(task.config)):
        together = lens.score(entries)
        for i in range(3):
            alone = LensInput(cursor=entries.cursor, **{name: getattr(entries, name)[i] for name in names})
            assert torch.allclose(together[i], lens.score(alone), atol=1e-5)
        with pytest.raises(ValueError, match="count: expected None for 3 contexts"):
            lens.score(dataclasses.replace(entries, count=torch.tensor(5, dtype=torch.int32)))


def test_edits_are_legal_different_and_all_of_them() -> None:
    task = task_of()
    layout = task.layout
    levels = torch.zeros(2, layout.count, dtype=torch.int64)
    levels[0, layout.groups[0] : layout.groups[0] + 4] = 2
    levels[1, layout.groups[1] : layout.groups[1] + 4] = 1
    edits = task.draw_edits(levels, None)
    for row in range(2):
        spans = set(zip(edits.start[row].tolist(), edits.end[row].tolist(), strict=True))
        assert len(spans) == edits.start.shape[1] == layout.count - 4 + 1
    expands = edits.kind[0] == 1
    assert edits.levels[0, expands].tolist() == [[1 if level == 2 else level for level in levels[0].tolist()]]
    assert (edits.end - edits.start)[0, expands].tolist() == [16]
    one = task_of(dataclasses.replace(BASE, max_lod=1))
    everything = torch.ones(1, layout.count, dtype=torch.int64)
    assert one.draw_edits(everything, None).kind.tolist() == [[1] * layout.count]
    assert task.draw_edits(everything, 5).kind.shape == (1, 5)


def test_soft_losses_are_expected_ones() -> None:
    task = task_of()
    ids, levels = windows(2), mixed(task, 2)
    edits = task.draw_edits(levels, 3)
    with torch.no_grad():
        whole = task._hold[0](ids[:, :-1]).logits[:, -HORIZON:].softmax(-1)
    found, mass = task._measure(ids, levels, edits.levels, True)
    exact, _ = task._measure(ids, levels * 0, torch.zeros_like(levels)[:, None], True)
    entropy = -(whole * whole.log()).sum(-1)
    assert torch.allclose(exact[:, 0], entropy, atol=1e-4), "nothing collapsed: the whole window's own entropy"
    assert (found.sum(-1) > entropy.sum(-1)[:, None]).all()
    assert mass.sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_windows_in_several_forwards_measure_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of()
    ids, levels = windows(4), mixed(task, 4)
    edits = task.draw_edits(levels, 5)
    whole = task.measure(ids, levels, edits)
    monkeypatch.setattr("hf_flash_mc.megacontext.lens_task.LOGITS", 2 * 6 * HORIZON * VOCAB)
    parts = task.measure(ids, levels, edits)
    assert torch.allclose(whole.variants, parts.variants, atol=1e-5)
    assert torch.allclose(whole.entries.attention_mass, parts.entries.attention_mass, atol=1e-6)


def test_a_lens_learns_to_rank_what_was_measured() -> None:
    task = task_of()
    levels = torch.ones(4, task.layout.count, dtype=torch.int64)
    measured = task.measure(windows(4), levels, task.draw_edits(levels, None), soft=True)
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    first = task(measured)
    for _ in range(60):
        loss = task(measured)["loss"]
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in task.parameters())
        optimizer.step()
    last = task(measured)
    assert last["rank"] < 0.5 * first["rank"]
    assert not [p for p in task._hold[0].model.parameters() if p.grad is not None]


def test_ranking_of_lenses_that_know() -> None:
    task = task_of(dataclasses.replace(BASE, max_lod=1))
    levels = torch.ones(3, task.layout.count, dtype=torch.int64)
    measured = task.measure(windows(3), levels, task.draw_edits(levels, None))
    gains = measured.gains(slice(HORIZON // 2, None), None)
    utility = torch.zeros(3, len(measured.entries.lod[0]))
    for row, start, gain in zip(utility, measured.edits.start, gains, strict=True):
        row[np.searchsorted(measured.entries.start[0].numpy(), start.numpy())] = gain
    knows = OracleLens(task.config, lambda _: 0.5 + 0.4 * utility)
    wrong = OracleLens(task.config, lambda _: 0.5 - 0.4 * utility)
    found = ranking(task, measured, {"knows": knows, "wrong": wrong}, 4)
    assert torch.allclose(found["knows"], gains.topk(4, 1).values.sum(1).double(), atol=1e-6)
    assert torch.allclose(found["wrong"], -(-gains).topk(4, 1).values.sum(1).double(), atol=1e-6)
    assert torch.allclose(found["random"], 4 * gains.mean(1).double(), atol=1e-6)
    both = task_of()
    mixed_edits = both.measure(windows(3), levels, both.draw_edits(levels, None))  # collapses to level 2, too
    assert (mixed_edits.edits.kind < 0).any()
    everything = ranking(both, mixed_edits, {"knows": knows}, 99)
    assert torch.allclose(everything["knows"], gains.sum(1).double(), atol=1e-5)
    assert torch.allclose(everything["random"], everything["oracle"], atol=1e-6)
    assert (found["wrong"] <= found["random"]).all()
    assert (found["oracle"] <= found["knows"]).all()


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(NotImplementedError, match='"kv" back end'):
        task_of(dataclasses.replace(BASE, backend="embedding", gist={"layers": 1}))
    with pytest.raises(ValueError, match="weights"):
        LensWeights(rank=-1.0)
    task = task_of()
    uneven = torch.ones(2, task.layout.count, dtype=torch.int64)
    uneven[0, 0] = 0
    with pytest.raises(ValueError, match="as many blocks of each level"):
        task.measure(windows(2), uneven, task.draw_edits(uneven, 1))
    assert build_lens(task.config) is not None
