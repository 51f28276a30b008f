"""Lens training: a lens learns which edits of a working context help, by what each one alone does to the next tokens.

A window is context and horizon (`distill`). The frozen model reads it once; some of its blocks are shown as gists. Then
many single edits are measured at once (`LensTask.measure`): the slots that no edit of a window touches are read once
for all of them, and each runs only the horizon. The lens sees what a session would show it, nothing of the horizon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import losses
from .cache import attention_shares
from .distill import Gists, GistTask, Layout, Lesson, take
from .entries import LATEST
from .lensnet import Lens, LensInput
from .prefix import Keys, PrefixCache, read, run
from .session import OBSERVED

# of one forward; more windows take several
LOGITS = 2**28  # of its variants
TOKENS = 2**13  # of its windows


@dataclass
class Edited:
    """Single edits of B windows, V of each, on the CPU.

    levels: int64 ``[B, V, count]``, each block's level of detail after the edit; kind: +1 expand, -1 collapse; start,
    end: the tokens ``[start, end)`` that are shown otherwise; all int64 ``[B, V]``.
    """

    levels: Tensor
    kind: Tensor
    start: Tensor
    end: Tensor


@dataclass
class Measured:
    """What a lens learns from, on the model's device, without gradients.

    entries: what it sees of B working contexts; edits; base ``[B, H]`` and variants ``[B, V, H]``: losses of the
    targets without an edit and after each, in nats.
    """

    entries: LensInput
    edits: Edited
    base: Tensor
    variants: Tensor

    def gains(self, judged: slice | None, clip: float | None = 1.0) -> Tensor:
        """What each edit gains, ``[B, V]`` nats a token; see `losses.counterfactual_utility`."""
        return losses.counterfactual_utility(self.base, self.variants, judged, clip)


@dataclass
class LensWeights:
    """Of the parts of the loss."""

    rank: float = 1.0
    regression: float = 0.1
    budget: float = 0.1

    def __post_init__(self) -> None:
        losses.check_weights(vars(self))


class LensTask(nn.Module):
    """The loss of a lens over a frozen model and its frozen gists; its parameters are the lens's alone.

    Args:
        model: with a MegaContext attached (back end "kv"), ``model.megacontext.lens`` is trained.
        judged: targets whose losses are an edit's gain; None: all of the horizon, of which the lens sees nothing.
    """

    def __init__(
        self, model: Any, layout: Layout, weights: LensWeights | None = None, judged: slice | None = None
    ) -> None:
        super().__init__()
        addon = model.megacontext
        if addon.config.backend != "kv":
            raise NotImplementedError(
                'model: expected the "kv" back end; with embedding gists an edit changes the keys of all slots behind '
                "it, so that edits share nothing and cannot be measured together"
            )
        self.lens, self.config, self.layout = addon.lens, addon.config, layout
        self.weights = LensWeights() if weights is None else weights
        self.judged = slice(None) if judged is None else judged
        self._hold = (model, GistTask(model, layout))  # not submodules

    def forward(self, measured: Measured) -> dict[str, Tensor]:
        """Loss and parts."""
        raw = self.lens(measured.entries)  # [B, N], before legality, which would take gradients away: edits are legal
        scores = self.lens.legal(raw, measured.entries)
        edits, gains = self.edit_scores(raw.float(), measured), measured.gains(self.judged)
        kind = measured.edits.kind.to(edits.device)
        # edits of one kind compete for the same slots; what an expansion takes a collapse must give: the budget's part
        ranks = [losses.bradley_terry(edits, gains, kind == k) for k in (1, -1)]
        parts = {
            "rank": ranks[0] + ranks[1],
            "regression": losses.calibration(edits, gains, kind > 0),
            "budget": self._budget(scores, measured.entries),
        }
        loss = sum(w * parts[name] for name, w in vars(self.weights).items() if w)
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def edit_scores(self, scores: Tensor, measured: Measured) -> Tensor:
        """Scores of edits ``[B, V]``: an expanded gist's, or minus the mean of what a collapse replaces."""
        edits, start = measured.edits, measured.entries.start[:, None]
        first, end = (x.to(start.device)[..., None] for x in (edits.start, edits.end))
        inside = ((start >= first) & (start < end)).to(scores)  # [B, V, N]
        return edits.kind.to(scores) * (inside * scores[:, None]).sum(-1) / inside.sum(-1)

    def _budget(self, scores: Tensor, entries: LensInput) -> Tensor:
        """What all positive scores ask for against what all negative ones give, in slots; 0 without tokens to give."""
        layout, size = self.layout, self.layout.block
        stop = layout.first + layout.count * size
        movable = (entries.start >= layout.first) & (entries.start < stop)
        if not bool((movable & (entries.lod == 0)).any()):
            return scores.sum() * 0.0
        slots = torch.where(scores > 0, size - 1.0, (size - 1.0) / size)
        return losses.budget(scores, slots, movable)

    # ---- edits ----

    def draw_edits(self, levels: Tensor, count: int | None, generator: torch.Generator | None = None) -> Edited:
        """``count`` different legal edits of each window, at random (None: all that every window has).

        Args:
            levels: int64 ``[B, count of blocks]`` on the CPU, each block's level of detail (`losses.draw_levels`).
        """
        size, groups = self.layout.block, self.layout.groups if self.config.max_lod > 1 else []
        spans = [(j, j + 1) for j in range(self.layout.count)] + [(g, g + size) for g in groups]
        whole = torch.stack([(levels[:, a:b] == levels[:, a : a + 1]).all(1) for a, b in spans], 1)  # [B, spans]
        level = levels[:, [a for a, _ in spans]]
        single = torch.arange(len(spans)) < self.layout.count
        legal = whole & torch.where(single, level <= 1, level >= 1)
        order = torch.rand(legal.shape, generator=generator).masked_fill(~legal, 2.0).argsort(1)
        most = int(legal.sum(1).min())
        if not most:
            raise ValueError("levels: expected at least one legal edit in each window, got none")
        chosen = order[:, : most if count is None else min(count, most)]  # [B, V]
        # a block is a token's or a gist's; a group of blocks is gists', or one gist's of gists
        finer = torch.where(single, 0, 1)[chosen]
        kind = torch.where(level.gather(1, chosen) > finer, 1, -1)
        first, last = (torch.tensor(x)[chosen] for x in zip(*spans, strict=True))
        blocks = torch.arange(self.layout.count)
        inside = (blocks >= first[..., None]) & (blocks < last[..., None])  # [B, V, count]
        after = torch.where(kind > 0, finer, finer + 1)
        edited = torch.where(inside, after[..., None], levels[:, None])
        return Edited(edited, kind, self.layout.first + first * size, self.layout.first + last * size)

    # ---- what the model makes of them ----

    @torch.no_grad()
    def measure(self, ids: Tensor, levels: Tensor, edits: Edited, *, soft: bool = False) -> Measured:
        """Losses after each edit, and what the lens sees; a forward over whole windows, and one over all variants.

        Args:
            ids: ``[B, context + horizon]`` on the model's device; levels: of the working contexts, ``[B, count]``.
            soft: losses are cross entropies with what the model predicts from the whole window, not of the true tokens:
                the same gains on average, without the luck of which token came.
        """
        variants = edits.levels.shape[1] + 1
        vocabulary = self._hold[0].get_output_embeddings().weight.shape[0]
        count = max(1, min(LOGITS // (variants * self.layout.horizon * vocabulary), TOKENS // self.layout.context))
        parts = []
        for first in range(0, len(ids), count):
            part = slice(first, first + count)
            mine = torch.cat((levels[part, None], edits.levels[part]), 1)
            parts.append(self._measure(ids[part], levels[part], mine, soft))
        found, masses = (torch.cat(x) for x in zip(*parts, strict=True))
        return Measured(self.entries(ids, levels, masses), edits, found[:, 0], found[:, 1:])

    def _measure(self, ids: Tensor, levels: Tensor, variants: Tensor, soft: bool) -> tuple[Tensor, Tensor]:
        """Losses ``[B, V, H]`` of working contexts ``variants [B, V, count]``, and attention mass in ``levels``'s."""
        model, task = self._hold
        lesson, queries = self._read(ids)
        pool = self._pool(task.make(lesson, 2 if bool((variants == 2).any()) else 1), lesson)
        mass = self._mass(pool, queries, self.shown(levels))
        seen = self.shown(variants)
        seen[..., self.layout.context - 1] = False  # the last token is run again
        shared = seen.all(1)
        cache = PrefixCache(pool.of(shared[:, None]), pool.of(seen & ~shared[:, None]), self._rows(), task.windows)
        repeat = seen.shape[1]
        rows = ids[:, self.layout.context - 1 : -1].repeat_interleave(repeat, 0)
        logits = run(model, cache, self._rows()[None].to(ids.device), self.layout.horizon, input_ids=rows)
        logits = logits.unflatten(0, (len(ids), repeat))
        if not soft:
            targets = ids[:, None, self.layout.context :].expand(-1, repeat, -1)
            return losses.token_losses(logits.flatten(0, 1), targets.flatten(0, 1)).unflatten(0, (len(ids), -1)), mass
        wanted = lesson.logits.float().softmax(-1)
        rows_of = [-(wanted * x.float().log_softmax(-1)).sum(-1) for x in logits.unbind(1)]
        return torch.stack(rows_of, 1), mass

    def _rows(self) -> Tensor:
        return torch.arange(self.layout.context - 1, self.layout.context - 1 + self.layout.horizon)

    def _read(self, ids: Tensor) -> tuple[Lesson, list[Tensor]]:
        """Keys and values of the whole context, and the last queries before the horizon, of each layer."""
        layout = self.layout
        last = min(self.config.recent_tokens, OBSERVED)
        # the last token of the context predicts the first target: it is the first of the horizon's rows
        cache, logits = read(self._hold[0], ids[:, :-1], layout.horizon + last - 1, layout.horizon)
        keys, values = (torch.stack(x)[..., : layout.context, :] for x in (cache.keys, cache.values))
        return Lesson(ids, logits, keys, values, [], []), [q[:, :, :last] for q in cache.queries]

    def _pool(self, made: Sequence[Gists], lesson: Lesson) -> Pool:
        """All that can be shown: the context's tokens, all gists, and all gists of gists where there are any."""
        device, beta = lesson.ids.device, self._hold[1].gist.log_weight
        keys, values, lods = [lesson.keys], [lesson.values], [torch.zeros(self.layout.context, dtype=torch.int64)]
        for gists in made:
            assert gists.keys is not None
            assert gists.values is not None
            keys.append(gists.keys)
            values.append(gists.values)
            lods.append(torch.full((len(gists.blocks),), gists.lod))
        lod = torch.cat(lods)
        start, _ = self._columns()
        return Pool(
            torch.cat(keys, 3), torch.cat(values, 3), beta(lod.to(device)), start[: len(lod)] + self._span(lod) // 2
        )

    def _mass(self, pool: Pool, queries: list[Tensor], seen: Tensor) -> Tensor:
        """Attention of the last queries to each slot, ``[B, N]``: as `MegaContextCache.attention_mass`."""
        windows, scaling, softcap = self._hold[1].windows, self._hold[1].scaling, self._hold[1].softcap
        shown = pool.of(seen[:, None])
        layers = [i for i, window in enumerate(windows) if window is None] or list(range(len(windows)))
        total: Any = 0.0
        for i in layers:
            assert shown.log_weight is not None
            total = total + attention_shares(queries[i], shown.keys[i], shown.log_weight[i], scaling[i], softcap)
        mass = total / len(layers)
        return mass.gather(1, self._order(seen)[1].to(mass.device))

    # ---- what the lens sees ----

    def entries(self, ids: Tensor, levels: Tensor, mass: Tensor) -> LensInput:
        """Of working contexts of B windows, as `Focus.lens_input` gives it for one."""
        layout, device = self.layout, ids.device
        start, lod = self._columns()
        columns, _ = self._order(self.shown(levels))
        start, lod = start[columns].to(device), lod[columns].to(device)  # [B, N]
        embedded = self._hold[0].get_input_embeddings()(ids[:, : layout.context]).detach()
        means = self._means(embedded)
        shown = embedded.gather(1, start[..., None].expand(-1, -1, embedded.shape[-1]))
        for level, mean in enumerate(means, 1):
            if mean.shape[1]:
                node = (start // layout.block**level).clamp(max=mean.shape[1] - 1)
                held = mean.gather(1, node[..., None].expand(-1, -1, mean.shape[-1])).to(shown)
                shown = torch.where((lod == level)[..., None], held, shown)
        tail = torch.cat((means[-1][:, -1:], means[0][:, -LATEST:]), 1).to(shown)
        return LensInput(start, lod, layout.context, shown, tail, mass)

    def _means(self, embedded: Tensor) -> list[Tensor]:
        """Mean embeddings ``[B, n, d]`` of the nodes of each level, rounded as `EntryEmbeddings` keeps them."""
        known, out = embedded[:, : self.layout.context - self.config.recent_tokens].half(), []
        for _ in range(self.config.max_lod):
            whole = known.shape[1] // self.layout.block
            parts = known[:, : whole * self.layout.block].unflatten(1, (whole, self.layout.block))
            known = parts.float().mean(2).half()
            out.append(known)
        return out

    # ---- columns of the pool: tokens, then gists, then gists of gists ----

    def _columns(self) -> tuple[Tensor, Tensor]:
        """First token and level of detail of each column, int64 ``[P]``."""
        layout = self.layout
        blocks = [torch.arange(layout.count), torch.tensor(layout.groups, dtype=torch.int64)]
        start = torch.cat((torch.arange(layout.context), *(layout.first + x * layout.block for x in blocks)))
        lod = torch.cat([torch.full((n,), i) for i, n in enumerate((layout.context, *map(len, blocks)))])
        return start, lod

    def _span(self, lod: Tensor) -> Tensor:
        return torch.pow(self.layout.block, lod)

    def shown(self, levels: Tensor) -> Tensor:
        """Which columns working contexts ``[..., count]`` show: bool ``[..., P]``."""
        layout = self.layout
        tokens = torch.ones(*levels.shape[:-1], layout.context, dtype=torch.bool)
        tokens[..., layout.first : layout.first + layout.count * layout.block] = (levels == 0).repeat_interleave(
            layout.block, -1
        )
        return torch.cat((tokens, levels == 1, levels[..., layout.groups] == 2), -1)

    def _order(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Of columns seen, bool ``[B, P]`` with N in every row: which, by their text, and which of them that is."""
        columns, real = first_columns(seen)
        if not bool(real.all()):
            raise ValueError("levels: expected as many blocks of each level in every row (see draw_levels)")
        order = self._columns()[0][columns].argsort(1)
        return columns.gather(1, order), order


@dataclass
class Pool:
    """Keys and values ``[L, B, Hkv, P, D]`` of all columns, their log weights ``[L, Hkv, P]`` and middles ``[P]``."""

    keys: Tensor
    values: Tensor
    log_weight: Tensor
    token: Tensor

    def of(self, seen: Tensor) -> Keys:
        """Those that variants show, bool ``[B, V, P or more]``: N = B * V, padded to one length with what none sees."""
        columns, real = first_columns(seen)
        columns, real = columns.flatten(0, 1), real.flatten(0, 1)  # [N, m]
        device, per = self.keys.device, seen.shape[1]
        weight = self.log_weight[:, :, columns.to(device)].transpose(1, 2)  # [L, N, Hkv, m]
        weight = weight.masked_fill(~real.to(device)[:, None], -torch.inf)
        keys, values = (take(x, columns.to(device), per) for x in (self.keys, self.values))
        return Keys(keys, values, weight, self.token[columns])


def first_columns(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that are True, in order, padded to the most of any row: int64 ``[..., m]``, and which are no padding."""
    most = int(seen.sum(-1).max())
    columns = seen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    return columns, seen.gather(-1, columns)


# ---- held-out ranking ------------------------------------------------------------------------------------------------


def ranking(task: LensTask, measured: Measured, lenses: dict[str, Lens], count: int) -> dict[str, Tensor]:
    """What the ``count`` expansions that each lens likes best gain together, ``[B]`` nats a token, judged on the second
    half of the horizon; "random" is any ``count`` of them on average, "oracle" chooses by the first half."""
    half = task.layout.horizon // 2
    gains = measured.gains(slice(half, None), None)
    chosen = {"oracle": measured.gains(slice(half), None)}
    with torch.no_grad():
        for name, lens in lenses.items():
            chosen[name] = task.edit_scores(lens.score(measured.entries), measured)
    legal = (measured.edits.kind > 0).to(gains.device)
    gains, found = gains * legal, {}  # where a window has fewer expansions than count, all of them are made
    for name, scores in chosen.items():
        best = scores.masked_fill(~legal, -torch.inf).topk(min(count, scores.shape[1]), 1).indices
        found[name] = gains.gather(1, best).sum(1)
    found["random"] = gains.sum(1) * (count / legal.sum(1)).clamp(max=1)
    return {name: x.double().cpu() for name, x in found.items()}
