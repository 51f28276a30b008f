"""Gist training: the student is what a session would show, and its loss reaches every parameter and falls."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from patch_models import VOCAB
from test_megacontext_session import CONFIG, attached, edits
from torch import Tensor

from hf_flash_mc.megacontext import distill
from hf_flash_mc.megacontext.config import MegaContextConfig
from hf_flash_mc.megacontext.distill import GistTask, Layout, Weights, recovered, recovery, teach
from hf_flash_mc.megacontext.evaluate import target_losses
from hf_flash_mc.megacontext.losses import draw_levels, token_losses

BASE = dataclasses.replace(CONFIG, w_max=192)
SETTINGS = {
    "kv": dataclasses.replace(BASE, gist={"rank": 4, "pooling": "query"}),
    "kv-span": dataclasses.replace(BASE, gist={"rank": 4, "rotation": "span"}),
    "embedding": dataclasses.replace(BASE, backend="embedding", gist={"layers": 1, "pooling": "query"}),
}
CONTEXT, HORIZON = 60, 8


def windows(count: int) -> Tensor:
    return torch.randint(3, VOCAB, (count, CONTEXT + HORIZON), generator=torch.Generator().manual_seed(2))


def task_of(config: MegaContextConfig, family: str = "llama", weights: Weights | None = None) -> GistTask:
    torch.manual_seed(0)
    model = attached(family, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in model.megacontext.gist.parameters():
        parameter.requires_grad_(True)
    return GistTask(model, Layout.of(config, CONTEXT, HORIZON), weights)


def stirred(task: GistTask) -> GistTask:
    """Away from the harmless start, so that residuals and weights count."""
    gen = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in task.gist.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=gen))
    return task


def test_layout_is_what_collapse_all_collapses() -> None:
    layout = Layout.of(BASE, CONTEXT, HORIZON)
    assert (layout.first, layout.count, layout.groups) == (4, 12, [3, 7])
    with pytest.raises(ValueError, match="context, horizon"):
        Layout.of(BASE, 15, HORIZON)


@pytest.mark.parametrize("name", SETTINGS)
def test_student_is_what_a_session_shows(name: str) -> None:
    config, ids = SETTINGS[name], windows(2)
    task = stirred(task_of(config))
    model, layout = task._hold[0], task.layout
    lesson = teach(model, ids, layout)
    exact = torch.zeros(2, layout.count, dtype=torch.int64)
    with torch.no_grad():
        made = task.make(lesson, 2)
        whole = task.student(lesson, exact, made)
        assert (whole - lesson.logits).abs().max() <= 1e-4, "nothing collapsed is the teacher"
        levels = torch.tensor([[1, 0, 1, 2, 2, 2, 2, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 1, 0, 2, 2, 2, 2, 1]])
        logits = task.student(lesson, levels, made)
    found = token_losses(logits, ids[:, CONTEXT:])
    for window, row, got in zip(ids, levels, found, strict=True):
        session = model.megacontext.session()
        session.ingest(window[:CONTEXT])
        fine = [(-1, 4 + 4 * i, 1) for i in range(12) if row[i] == 1]
        coarse = [(-1, 4 + 4 * i, 2) for i in layout.groups if row[i] == 2]
        session.apply(edits(*fine, *coarse))
        assert np.allclose(target_losses(session, window[CONTEXT:]), got, atol=2e-4)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_windows_caps_and_sinks_reach_the_student(family: str) -> None:
    ids = windows(1)
    task = stirred(task_of(SETTINGS["kv"], family))
    lesson = teach(task._hold[0], ids, task.layout)
    levels = torch.tensor([[1, 0, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1]])
    with torch.no_grad():
        found = token_losses(task.student(lesson, levels, task.make(lesson)), ids[:, CONTEXT:])[0]
    session = task._hold[0].megacontext.session()
    session.ingest(ids[0, :CONTEXT])
    session.apply(edits(*[(-1, 4 + 4 * i, 1) for i in range(12) if levels[0, i]]))
    assert np.allclose(target_losses(session, ids[0, CONTEXT:]), found, atol=2e-4)
    assert any(t is None for t in lesson.targets) == (6 in task.windows)


@pytest.mark.parametrize("name", ["kv", "embedding"])
def test_every_parameter_learns_and_the_loss_falls(name: str) -> None:
    task, ids = task_of(SETTINGS[name]), windows(4)
    lesson = teach(task._hold[0], ids, task.layout)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    levels = draw_levels(4, 12, 4, 4, torch.Generator().manual_seed(0), task.layout.groups, 1)
    history = []
    for _ in range(12):
        parts = task(lesson, levels)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        history.append(parts)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert history[-1]["kl"] < history[0]["kl"]
    for parameter_name, parameter in task.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name
    assert all(p.grad is None for p in task._hold[0].model.parameters())


def test_gradient_of_the_whole_loss_is_the_finite_difference() -> None:
    weights = Weights(kl=1.0, mass=0.5, output=0.5, separation=0.5)
    task, ids = stirred(task_of(SETTINGS["kv"], weights=weights)), windows(2)
    lesson = teach(task._hold[0], ids, task.layout)
    levels = draw_levels(2, 12, 4, 4, torch.Generator().manual_seed(0), task.layout.groups, 1)
    gist = task.gist.beta
    loss = task(lesson, levels)["loss"]
    (grad,) = torch.autograd.grad(loss, gist)
    step = torch.randn(gist.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            gist.add_(sign * 1e-2 * step)
            values.append(task(lesson, levels)["loss"].double())
            gist.sub_(sign * 1e-2 * step)
    assert (grad.double() * step).sum().item() == pytest.approx(((values[0] - values[1]) / 2e-2).item(), rel=2e-2)


@pytest.mark.parametrize("name", SETTINGS)
def test_gists_made_in_parts_and_again_are_the_same_and_keep_less(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = windows(2)

    def step(task: GistTask) -> tuple[Tensor, list[Tensor], int]:
        """Loss, gradients, and bytes that the forward keeps for the backward."""
        lesson = teach(task._hold[0], ids, task.layout, matching=name != "embedding")
        known = {x.untyped_storage().data_ptr() for x in (lesson.keys, lesson.values, *task._hold[0].parameters())}
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in known:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        levels = draw_levels(2, task.layout.count, 4, 3.0, torch.Generator().manual_seed(1), [], 0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = task(lesson, levels)["loss"]
        loss.backward()
        return loss.detach(), [p.grad for p in task.parameters() if p.grad is not None], sum(kept.values())

    monkeypatch.setattr(distill, "POOLED", 1)
    monkeypatch.setattr(distill, "READ", 12)
    loss, gradients, kept = step(stirred(task_of(SETTINGS[name])))
    monkeypatch.setattr(distill, "_again", lambda make, *args, **more: make(*args, **more))
    whole_loss, whole_gradients, whole = step(stirred(task_of(SETTINGS[name])))
    torch.testing.assert_close(loss, whole_loss)
    torch.testing.assert_close(gradients, whole_gradients)
    assert kept < 0.8 * whole


def test_recovery_compares_gists_with_dropping() -> None:
    task, ids = task_of(SETTINGS["kv"]), windows(3)
    rows = recovery(task, ids)
    session = task._hold[0].megacontext.session()
    session.ingest(ids[0, :CONTEXT])
    assert rows["whole"][0] == pytest.approx(target_losses(session, ids[0, CONTEXT:])[HORIZON // 2 :].mean(), abs=1e-4)
    drop = (rows["drop"] - rows["whole"]).mean()
    assert recovered(rows) == pytest.approx(1 - float((rows["gists"] - rows["whole"]).mean() / drop))
    assert recovered({"whole": torch.zeros(2), "drop": torch.ones(2), "gists": torch.full((2,), 0.25)}) == 0.75


def test_mixtures_of_unequal_rows_are_refused() -> None:
    task, ids = task_of(SETTINGS["kv"]), windows(2)
    lesson = teach(task._hold[0], ids, task.layout)
    levels = torch.zeros(2, 12, dtype=torch.int64)
    levels[0, 3] = 1
    with pytest.raises(ValueError, match="draw_levels"):
        task(lesson, levels)
