"""Losses that train GistNet and LensNet: pure functions of tensors, in nats or without unit.

Targets come from one pass of the frozen model over the whole text (the teacher); nothing here runs a model. Half
precision is computed in float32, float64 stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def check_weights(weights: dict[str, float]) -> None:
    """ValueError for weights of a loss's parts, by name, that are negative or all 0."""
    bad = {name: w for name, w in weights.items() if not w >= 0}
    if bad:
        raise ValueError(f"weights: expected numbers of at least 0, got {bad}")
    if not any(weights.values()):
        raise ValueError("weights: expected one above 0, got none; nothing would be learnt")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- gists: next tokens ----------------------------------------------------------------------------------------------


def horizon_kl(teacher: Tensor, student: Tensor, top_k: int | None = None) -> Tensor:
    """KL(teacher || student) of next-token distributions: mean over all positions, nats.

    Args:
        teacher, student: logits ``[..., V]``; the teacher's get no gradient.
        top_k: compare the teacher's k likeliest tokens and all others together; a lower bound that needs less memory.
    """
    target = _wide(teacher.detach()).log_softmax(-1)
    found = _wide(student).log_softmax(-1)
    if top_k is not None:
        if not 1 <= top_k < target.shape[-1]:
            raise ValueError(f"top_k: expected 1 to {target.shape[-1] - 1} (below the vocabulary), got {top_k}")
        target, index = target.topk(top_k, -1)
        found = found.gather(-1, index)
        target, found = (torch.cat((x, _remainder(x)), -1) for x in (target, found))
    return (target.exp() * (target - found)).sum(-1).mean()


def _remainder(log_p: Tensor) -> Tensor:
    """log(1 - sum p) ``[..., 1]``, finite."""
    tiny = torch.finfo(log_p.dtype).tiny
    return (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=tiny).log()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of ``targets [N, H]`` under ``logits [N, H, V]``: ``[N, H]`` nats."""
    losses = F.cross_entropy(_wide(logits).flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(targets)


def delta_nll(teacher: Tensor, student: Tensor, targets: Tensor) -> Tensor:
    """dNLL@H: what the gists cost on the true next tokens, ``[N, H]`` nats; logits ``[N, H, V]`` that predict them."""
    return token_losses(student, targets) - token_losses(teacher.detach(), targets)


# ---- gists: attention, layer by layer --------------------------------------------------------------------------------


class BlockTargets(NamedTuple):
    """What queries get from blocks of keys in one layer (or a stack of layers, as leading dimensions).

    log_mass: ``[..., Hq, S, n]``, log of the sum of exp(logit) over each block; rest: ``[..., Hq, S]``, over all other
    keys (-inf without any); value: ``[..., Hkv, n, Dv]``, each block's mean value weighted by the attention it gets
    from all queries of its KV head; weight: ``[..., Hkv, n]``, that attention, summed.
    """

    log_mass: Tensor
    rest: Tensor
    value: Tensor
    weight: Tensor


@torch.no_grad()
def block_targets(
    queries: Tensor, keys: Tensor, values: Tensor, first: int, block: int, count: int, scale: float,
    softcap: float | None = None,
) -> BlockTargets:  # fmt: skip
    """Targets of ``count`` blocks of ``block`` keys, the first beginning at key ``first``.

    The dense logits of the S queries live here only, for one layer at a time.

    Args:
        queries: ``[N, Hq, S, D]``; keys: ``[N, Hkv, T, D]``; values: ``[N, Hkv, T, Dv]``. Every query sees every key.
    """
    logits = _logits(queries, keys, scale, softcap)  # [N, Hkv, G, S, T]
    inside = slice(first, first + count * block)
    outside = torch.cat((logits[..., :first], logits[..., first + count * block :]), -1)
    log_mass = logits[..., inside].unflatten(-1, (count, block)).logsumexp(-1)
    rest = outside.logsumexp(-1) if outside.shape[-1] else torch.full_like(log_mass[..., 0], -torch.inf)
    share = logits.softmax(-1)[..., inside].sum((2, 3)).unflatten(-1, (count, block))  # [N, Hkv, n, K]
    weight = share.sum(-1)
    held = _wide(values[:, :, inside]).unflatten(2, (count, block))
    value = (share[..., None] * held).sum(3) / weight.clamp(min=torch.finfo(weight.dtype).tiny)[..., None]
    return BlockTargets(log_mass.flatten(1, 2), rest.flatten(1, 2), value, weight)


def _logits(queries: Tensor, keys: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``[N, Hq, S, D]``, ``[N, Hkv, T, D]`` -> ``[N, Hkv, G, S, T]``."""
    grouped = _wide(queries).unflatten(1, (keys.shape[1], -1))
    logits = torch.matmul(grouped * scale, _wide(keys)[:, :, None].transpose(-1, -2))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def mass_matching(
    targets: BlockTargets, queries: Tensor, keys: Tensor, log_weight: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """KL between how attention is shared out among blocks and the rest, and how it is with gists; mean over queries.

    A gist that draws too much costs as a gist that draws too little does. What the rest gets is exact in both.

    Args:
        queries: ``[N, Hq, S, D]``, those of the targets; keys: the gists' ``[N, Hkv, n, D]``, rotated to where they
            stand; log_weight: ``[N or 1, Hkv, n]``.
    """
    logits = _logits(queries.detach(), keys, scale, softcap) + _wide(log_weight)[:, :, None, None]
    student = torch.cat((logits.flatten(1, 2), targets.rest[..., None]), -1).log_softmax(-1)
    teacher = torch.cat((targets.log_mass, targets.rest[..., None]), -1).log_softmax(-1)
    # a block without mass (-inf) costs nothing: 0 * inf must not become NaN
    student, teacher = (torch.where(teacher == -torch.inf, 0.0, x) for x in (student, teacher))
    share = torch.cat((targets.log_mass, targets.rest[..., None]), -1).softmax(-1)
    return (share * (teacher - student)).sum(-1).mean()


def output_matching(targets: BlockTargets, values: Tensor) -> Tensor:
    """Squared error between what a query gets from a block and the gist's value, weighted by its attention there.

    Up to a constant this is sum_q w_b(q) |o_b(q) - v_b|^2 over all queries q and blocks b, which needs only each
    block's attention-weighted value (`block_targets`). In units of those values' mean square; 0 is the best that one
    value can do.

    Args:
        values: the gists' ``[N, Hkv, n, Dv]``.
    """
    error = (_wide(values) - targets.value).square().sum(-1)
    scale = (targets.weight * targets.value.square().sum(-1)).sum()
    return (targets.weight * error).sum() / scale.clamp(min=torch.finfo(scale.dtype).tiny)


# ---- gists: spans and mixtures ---------------------------------------------------------------------------------------


def span_separation(gists: Tensor, margin: float = 0.2) -> Tensor:
    """Mean over pairs of different spans of max(0, cos - margin): falls as their gists are pushed apart.

    Args:
        gists: ``[..., n, d]``, one of each of n spans; pairs are within the last but one dimension.
    """
    count = gists.shape[-2]
    if count < 2:
        return gists.sum() * 0.0
    unit = F.normalize(_wide(gists), dim=-1)
    cosine = unit @ unit.transpose(-1, -2)
    pairs = ~torch.eye(count, dtype=torch.bool, device=gists.device)
    return (cosine - margin).clamp(min=0)[..., pairs].mean()


def ratio_at(step: int, steps: int, ratios: Sequence[float] = (4, 8, 16, 32)) -> float:
    """Curriculum: tokens per slot of the old text at a step; all ratios for an equal time, in order."""
    if not ratios or steps < 1 or step < 0:
        raise ValueError(f"ratios, steps, step: expected ratios, at least 1 and 0, got {ratios}, {steps}, {step}")
    return ratios[min(step * len(ratios) // steps, len(ratios) - 1)]


def draw_levels(
    batch: int, blocks: int, block_size: int, ratio: float, generator: torch.Generator,
    groups: Sequence[int] = (), coarse: int = 0,
) -> Tensor:  # fmt: skip
    """A random mixture of levels of detail: int64 ``[batch, blocks]``, of each level as many in every row.

    So that n tokens take about n / ratio slots: a share of the blocks is collapsed (level 1), the others stay tokens
    (level 0), and ``coarse`` of the groups are gists of gists (level 2).

    Args:
        ratio: 1 (nothing collapsed) to block_size (everything).
        groups: for each group of ``block_size`` blocks that level 2 may replace, its first block.
        coarse: how many of them, in each row.
    """
    if not 1 <= ratio <= block_size or not 0 <= coarse <= len(groups):
        raise ValueError(
            f"ratio, coarse: expected a ratio of 1 to {block_size} (block_size) and coarse of 0 to {len(groups)} "
            f"(groups), got {ratio} and {coarse}"
        )
    count = min(round(blocks * (1 - 1 / ratio) / (1 - 1 / block_size)), blocks - coarse * block_size)
    order = torch.rand(batch, blocks, generator=generator)
    levels = torch.zeros(batch, blocks, dtype=torch.int64)
    if coarse:
        chosen = torch.rand(batch, len(groups), generator=generator).argsort(1)[:, :coarse]
        first = torch.tensor(list(groups))[chosen]  # [batch, coarse]
        whole = (first[..., None] + torch.arange(block_size)).flatten(1)
        levels.scatter_(1, whole, 2)
        order.scatter_(1, whole, 2.0)  # last
    return levels.scatter(1, order.argsort(1)[:, :count], 1)


# ---- lens ------------------------------------------------------------------------------------------------------------


def counterfactual_utility(
    base: Tensor, variants: Tensor, judged: slice | None = None, clip: float | None = 1.0
) -> Tensor:
    """What each single edit gains on the held-out half of the horizon: ``[..., V]`` nats a token, > 0 is better.

    Args:
        base: losses ``[..., H]`` without an edit; variants: ``[..., V, H]``.
        judged: the targets that count; None: the second half. What chose the edits must not have seen them: the best of
            many by the same tokens is mostly noise.
        clip: gains are cut to [-clip, clip], as a few tokens may cost many nats.
    """
    half = base.shape[-1] // 2
    part = slice(half, None) if judged is None else judged
    gain = (base[..., None, part] - variants[..., part]).mean(-1)
    if base[..., part].shape[-1] == 0:
        raise ValueError(f"judged: expected some of the {base.shape[-1]} targets, got {judged}")
    return gain if clip is None else gain.clamp(-clip, clip)


def bradley_terry(scores: Tensor, utilities: Tensor, legal: Tensor | None = None, tau: float = 0.2) -> Tensor:
    """-log P(the better edit of each pair scores higher), weighted by how much better it is.

    P = sigmoid((s_i - s_j) / tau) over all pairs of a sample; the weight of a pair is |u_i - u_j|.

    Args:
        scores, utilities: ``[..., V]``; utilities get no gradient. legal: bool ``[..., V]``, edits that may be made;
            the others are in no pair, and get no gradient.
    """
    gap = (utilities[..., :, None] - utilities[..., None, :]).detach().to(scores.dtype)
    weight = gap.clamp(min=0)
    if legal is not None:
        weight = weight * (legal[..., :, None] & legal[..., None, :])
    lead = (scores[..., :, None] - scores[..., None, :]) / tau
    total = weight.sum()
    return (weight * F.softplus(-lead)).sum() / total.clamp(min=torch.finfo(scores.dtype).tiny)


def calibration(scores: Tensor, utilities: Tensor, legal: Tensor | None = None, unit: float = 0.05) -> Tensor:
    """Mean squared error of scores ``[..., V]`` against tanh(utility / unit): what a score is worth, across samples."""
    error = (scores - (utilities.detach() / unit).tanh().to(scores.dtype)).square()
    if legal is None:
        return error.mean()
    return torch.where(legal, error, 0.0).sum() / legal.sum().clamp(min=1)


def budget(scores: Tensor, slots: Tensor | float, legal: Tensor | None = None) -> Tensor:
    """((P - N) / (P + N))^2 with P = slots that positive scores ask for, N = slots that negative ones give back.

    Args:
        scores: ``[..., n]``; slots: what an edit of each takes or frees, broadcast to it. legal: as above. Mean over
            samples; 0 where nothing is asked for or given.
    """
    weighted = scores * slots
    if legal is not None:
        weighted = torch.where(legal, weighted, 0.0)
    asked, given = weighted.clamp(min=0).sum(-1), (-weighted).clamp(min=0).sum(-1)
    total = asked + given
    return ((asked - given) / torch.where(total > 0, total, 1.0)).square().mean()


def legal_edits(lod: Tensor, max_lod: int, kind: Tensor) -> Tensor:
    """Which edits may be made at all: bool. A token has no more detail; a gist of the top level cannot be coarser.

    Args:
        lod: level of what is edited (of the tokens or gists that a collapse replaces); kind: +1 expand, -1 collapse.
    """
    return torch.where(kind > 0, lod > 0, lod < max_lod)
