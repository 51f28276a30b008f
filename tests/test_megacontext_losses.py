"""Losses against plain formulas in float64: values, gradients, signs, and the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hf_flash_mc.megacontext import losses

GEN = torch.Generator().manual_seed(0)
N, HQ, HKV, S, T, D, DV = 2, 4, 2, 5, 22, 8, 6
FIRST, BLOCK, COUNT, SCALE = 3, 4, 4, 0.4


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GEN, dtype=torch.float64)


def test_kl_and_delta_nll_are_the_textbooks() -> None:
    teacher, student = draw(2, 3, 11), draw(2, 3, 11).requires_grad_()
    p, q = teacher.softmax(-1), student.softmax(-1)
    kl = losses.horizon_kl(teacher, student)
    assert kl.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item())
    (grad,) = torch.autograd.grad(kl, student)
    assert torch.allclose(grad, (q - p).detach() / 6)
    assert losses.horizon_kl(teacher, teacher).abs() < 1e-12
    coarse = losses.horizon_kl(teacher, student, top_k=3)
    assert 0 < coarse <= kl
    assert losses.horizon_kl(teacher, student, top_k=10).item() == pytest.approx(kl.item())
    targets = torch.randint(11, (2, 3), generator=GEN)
    expected = (p.log() - q.log()).gather(-1, targets[..., None])[..., 0]
    assert torch.allclose(losses.delta_nll(teacher, student, targets), expected)
    assert losses.horizon_kl(teacher.bfloat16(), student.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="top_k"):
        losses.horizon_kl(teacher, student, top_k=11)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_matching_is_the_sum_over_queries_and_blocks(softcap: float | None) -> None:
    q, k, v = draw(N, HQ, S, D), draw(N, HKV, T, D), draw(N, HKV, T, DV)
    targets = losses.block_targets(q, k, v, FIRST, BLOCK, COUNT, SCALE, softcap)
    logits = torch.einsum("nhsd,nhtd->nhst", q, k.repeat_interleave(2, 1)) * SCALE
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    inside = slice(FIRST, FIRST + BLOCK * COUNT)
    blocks = logits[..., inside].unflatten(-1, (COUNT, BLOCK))
    assert torch.allclose(targets.log_mass, blocks.logsumexp(-1))
    gist_v = draw(N, HKV, COUNT, DV).requires_grad_()
    outs = torch.einsum(
        "nhsbk,nhbkd->nhsbd", blocks.softmax(-1), v[:, :, inside].unflatten(2, (COUNT, BLOCK)).repeat_interleave(2, 1)
    )
    share = logits.softmax(-1)[..., inside].unflatten(-1, (COUNT, BLOCK)).sum(-1)  # [N, Hq, S, n]
    plain = (share[..., None] * (outs - gist_v.repeat_interleave(2, 1)[:, :, None]).square()).sum()
    (wanted,) = torch.autograd.grad(plain, gist_v)
    (found,) = torch.autograd.grad(losses.output_matching(targets, gist_v), gist_v)
    scale = (targets.weight * targets.value.square().sum(-1)).sum()
    assert torch.allclose(found * scale, wanted)
    assert losses.output_matching(targets, targets.value) == 0
    # mass: KL over blocks and the rest
    gist_k, beta = draw(N, HKV, COUNT, D).requires_grad_(), draw(1, HKV, COUNT).requires_grad_()
    found = losses.mass_matching(targets, q, gist_k, beta, SCALE, softcap)
    theirs = torch.einsum("nhsd,nhbd->nhsb", q, gist_k.repeat_interleave(2, 1)) * SCALE
    theirs = theirs if softcap is None else softcap * (theirs / softcap).tanh()
    theirs = theirs + beta.repeat_interleave(2, 1)[:, :, None]
    rest = torch.cat((logits[..., :FIRST], logits[..., inside.stop :]), -1).exp().sum(-1, keepdim=True)
    p = torch.cat((blocks.exp().sum(-1), rest), -1)
    s = torch.cat((theirs.exp(), rest), -1)
    p, s = p / p.sum(-1, keepdim=True), s / s.sum(-1, keepdim=True)
    assert found.item() == pytest.approx((p * (p / s).log()).sum(-1).mean().item())
    assert torch.autograd.gradcheck(lambda x, b: losses.mass_matching(targets, q, x, b, SCALE, softcap), (gist_k, beta))


def test_matching_without_a_rest_and_with_unseen_blocks_stays_finite() -> None:
    q, k, v = draw(1, 2, 3, D), draw(1, 2, 8, D), draw(1, 2, 8, DV)
    targets = losses.block_targets(q, k, v, 0, 4, 2, SCALE)
    assert (targets.rest == -torch.inf).all()
    gone = targets._replace(log_mass=targets.log_mass.clone().index_fill_(-1, torch.tensor([0]), -torch.inf))
    keys = draw(1, 2, 2, D).requires_grad_()
    for t in (targets, gone):
        loss = losses.mass_matching(t, q, keys, torch.zeros(1, 2, 2, dtype=torch.float64), SCALE)
        assert loss >= 0
        assert torch.autograd.grad(loss, keys)[0].isfinite().all()
    assert losses.output_matching(targets._replace(weight=targets.weight * 0), targets.value + 1) == 0


def test_separation_pushes_gists_of_different_spans_apart() -> None:
    gists = (draw(1, 6) + 0.1 * draw(5, 6)).requires_grad_()
    loss = losses.span_separation(gists)
    unit = gists / gists.norm(dim=-1, keepdim=True)
    pairs = [(unit[i] @ unit[j]).item() for i in range(5) for j in range(5) if i != j]
    assert loss.item() == pytest.approx(sum(max(0, c - 0.2) for c in pairs) / 20)
    (grad,) = torch.autograd.grad(loss, gists)
    moved = gists.detach() - 0.5 * grad
    assert losses.span_separation(moved) < loss
    apart = torch.nn.functional.normalize(moved, dim=-1)
    assert (apart @ apart.T).sum() < (unit @ unit.T).sum()
    assert losses.span_separation(torch.eye(4)) == 0
    assert losses.span_separation(gists[:1]) == 0


def test_curriculum_and_mixtures() -> None:
    assert [losses.ratio_at(step, 8) for step in (0, 1, 2, 5, 7, 8, 99)] == [4, 4, 8, 16, 32, 32, 32]
    with pytest.raises(ValueError, match="ratios"):
        losses.ratio_at(0, 8, ())
    gen = torch.Generator().manual_seed(1)
    levels = losses.draw_levels(6, 62, 32, 32, gen)
    assert (levels == 1).all()
    levels = losses.draw_levels(6, 62, 32, 4, gen)
    slots = (levels == 0).sum(1) * 32 + (levels == 1).sum(1)
    assert len(slots.unique()) == 1
    assert 62 * 32 / slots[0] == pytest.approx(4, rel=0.1)
    assert (levels[0] != levels[1]).any()
    levels = losses.draw_levels(5, 20, 4, 2, gen, groups=(1, 5, 9), coarse=2)
    for row in levels:
        firsts = [g for g in (1, 5, 9) if (row[g : g + 4] == 2).all()]
        assert len(firsts) == 2
        assert (row == 2).sum() == 8
    assert len((levels == 1).sum(1).unique()) == 1
    assert (losses.draw_levels(3, 8, 4, 1, gen) == 0).all()
    with pytest.raises(ValueError, match="ratio"):
        losses.draw_levels(3, 8, 4, 5, gen)


def test_utilities_are_judged_on_the_held_out_half() -> None:
    base = torch.tensor([9.0, 9, 1, 1])
    variants = torch.tensor([[0.0, 0, 1, 1], [9, 9, 0.5, 0.5], [9, 9, 4, 4]])
    assert losses.counterfactual_utility(base, variants).tolist() == [0.0, 0.5, -1.0]
    assert losses.counterfactual_utility(base, variants, clip=None).tolist() == [0.0, 0.5, -3.0]
    assert losses.counterfactual_utility(base, variants, slice(0, 2), None).tolist() == [9.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="judged"):
        losses.counterfactual_utility(base, variants, slice(4, 9))


def test_bradley_terry_orders_edits_and_never_touches_illegal_ones() -> None:
    scores, gains = draw(2, 4).requires_grad_(), draw(2, 4)
    total = weights = 0.0
    for row in range(2):
        for i in range(4):
            for j in range(4):
                if gains[row, i] > gains[row, j]:
                    gap = (gains[row, i] - gains[row, j]).item()
                    lead = ((scores[row, i] - scores[row, j]) / 0.2).item()
                    total, weights = total + gap * math.log1p(math.exp(-lead)), weights + gap
    loss = losses.bradley_terry(scores, gains)
    assert loss.item() == pytest.approx(total / weights)
    (grad,) = torch.autograd.grad(loss, scores)
    best, worst = gains.argmax(1), gains.argmin(1)
    assert (grad.gather(1, best[:, None]) < 0).all(), "a step raises the best edit's score"
    assert (grad.gather(1, worst[:, None]) > 0).all()
    legal = torch.tensor([[True, True, False, True]] * 2)
    (grad,) = torch.autograd.grad(losses.bradley_terry(scores, gains, legal), scores)
    assert (grad[:, 2] == 0).all()
    assert (grad[:, [0, 1, 3]] != 0).all()
    flat = losses.bradley_terry(scores, torch.zeros(2, 4))
    assert flat == 0
    assert torch.autograd.grad(flat, scores)[0].isfinite().all()


def test_budget_calibration_and_legality() -> None:
    scores = torch.tensor([[0.5, -0.25, 0.75]], dtype=torch.float64, requires_grad=True)
    slots = torch.tensor([31.0, 31.0, 31.0])
    assert losses.budget(scores, slots).item() == pytest.approx(((1.25 - 0.25) / 1.5) ** 2)
    assert losses.budget(scores, slots, torch.tensor([True, True, False])).item() == pytest.approx((0.25 / 0.75) ** 2)
    (grad,) = torch.autograd.grad(losses.budget(scores, slots), scores)
    assert (grad[0, [0, 2]] > 0).all(), "asking for less"
    assert losses.budget(torch.zeros(1, 3), slots) == 0
    gains = torch.tensor([[0.05, 0.0, -0.05]])
    expected = ((0.5 - math.tanh(1)) ** 2 + 0.25**2 + (0.75 + math.tanh(1)) ** 2) / 3
    assert losses.calibration(scores, gains).item() == pytest.approx(expected)
    only = losses.calibration(scores, gains, torch.tensor([[False, True, False]]))
    assert only.item() == pytest.approx(0.25**2)
    lod, kind = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1, -1, 1, -1, 1])
    assert losses.legal_edits(lod, 2, kind).tolist() == [False, True, True, False, True]
