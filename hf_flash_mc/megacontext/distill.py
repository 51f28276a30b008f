"""Distillation: gists learn to stand for their text, by what the frozen model makes of the whole text.

A window is context and horizon. The teacher reads it once (`teach`); its keys, queries and logits serve every mixture
of levels of detail. The student runs only the horizon, over keys that are gists where the mixture says so, as a session
does after a collapse: the tail keeps the keys it was read with, and the last token is run again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import losses
from .attach import layer_windows
from .config import MegaContextConfig
from .gistnet import PooledKV
from .prefix import Keys, PrefixCache, RecordingCache, read, run
from .session import _attention_scales as attention_scales

# gists are made of so many at a time, and again in the backward: else what is between takes twice the keys and values
POOLED = 2**23  # elements of keys
READ = 2**12  # tokens, for embedding gists


@dataclass(frozen=True)
class Layout:
    """Where the parts of a window lie: ``context`` tokens of history, of which ``count`` blocks from token ``first`` on
    may be gists (between the sink and the recent tokens), then ``horizon`` targets."""

    context: int
    horizon: int
    first: int
    count: int
    block: int

    @classmethod
    def of(cls, config: MegaContextConfig, context: int, horizon: int) -> Layout:
        """Of a history of ``context`` tokens under this config."""
        first = -(-config.sink_tokens // config.block_size) * config.block_size
        count = (context - config.recent_tokens - first) // config.block_size
        if count < 1 or config.recent_tokens < 1 or horizon < 2:
            raise ValueError(
                f"context, horizon: expected room for a block of {config.block_size} between the sink and the recent "
                f"tokens ({config.sink_tokens} and {config.recent_tokens}, at least 1), and a horizon of at least 2, "
                f"got {context} and {horizon}"
            )
        return cls(context, horizon, first, count, config.block_size)

    @property
    def groups(self) -> list[int]:
        """Of each gist of gists that fits, its first block."""
        aligned = -(self.first // self.block) % self.block
        return list(range(aligned, self.count - self.block + 1, self.block))


@dataclass
class Lesson:
    """What the teacher made of a batch of windows; without gradients.

    ids: ``[B, context + horizon]``; logits: ``[B, horizon, V]``, which predict the targets; keys, values:
    ``[L, B, Hkv, context - 1, D]``; queries: for each layer ``[B, Hq, horizon, D]``, of the rows that predict them;
    targets: for each layer, None where a sliding window hides some of the context.
    """

    ids: Tensor
    logits: Tensor
    keys: Tensor
    values: Tensor
    queries: list[Tensor]
    targets: list[losses.BlockTargets | None]


@torch.no_grad()
def teach(model: Any, ids: Tensor, layout: Layout, *, matching: bool = True) -> Lesson:
    """One forward over whole windows ``ids [B, context + horizon]``; ``matching``: also the layers' block targets."""
    length = layout.context + layout.horizon
    if ids.dim() != 2 or ids.shape[1] != length:
        raise ValueError(f"ids: expected [B, {length}] (context + horizon), got {list(ids.shape)}")
    cache, logits = read(model, ids[:, :-1], layout.horizon, layout.horizon)
    keys, values = (torch.stack(x)[..., : layout.context - 1, :] for x in (cache.keys, cache.values))
    targets: list[losses.BlockTargets | None] = [None] * len(cache.keys)
    if matching:
        scaling, softcap = attention_scales(model, keys.shape[-1])
        for i, window in enumerate(layer_windows(model)):
            if window is None or window >= length:
                targets[i] = losses.block_targets(
                    cache.queries[i], keys[i], values[i], layout.first, layout.block, layout.count, scaling[i], softcap
                )
    return Lesson(ids, logits, keys, values, cache.queries, targets)


@dataclass
class Weights:
    """Of the parts of the loss."""

    kl: float = 1.0
    mass: float = 0.1
    output: float = 0.1
    separation: float = 0.01

    def __post_init__(self) -> None:
        losses.check_weights(vars(self))


@dataclass
class Gists:
    """Gists of one level.

    blocks: of each, its first block. keys (rotated) and values ``[L, B, Hkv, n, D]``, bare: as they were pooled,
    ``[B * n, L, Hkv, D]``; or embeddings ``[B, n, d]``.
    """

    lod: int
    blocks: list[int]
    keys: Tensor | None = None
    values: Tensor | None = None
    bare: PooledKV | None = None
    embeddings: Tensor | None = None


class GistTask(nn.Module):
    """The loss of a GistNet over a frozen model; its parameters are the GistNet's alone.

    Args:
        model: with a MegaContext attached, ``model.megacontext.gist`` is trained.
    """

    def __init__(self, model: Any, layout: Layout, weights: Weights | None = None) -> None:
        super().__init__()
        addon = model.megacontext
        addon.follow_base()
        self.gist, self.config, self.layout = addon.gist, addon.config, layout
        self.weights = Weights() if weights is None else weights
        self._hold = (model, addon.rope)  # not submodules
        self.windows = layer_windows(model)
        self.scaling, self.softcap = attention_scales(model, addon.config.head_dim)
        if self.config.backend == "embedding" and any(w is not None and w < layout.context for w in self.windows):
            raise NotImplementedError(
                'backend="embedding": expected a model whose layers see the whole context, got sliding windows of '
                f"{min(w for w in self.windows if w is not None)}; train the kv back end, or a shorter context"
            )

    def forward(self, lesson: Lesson, levels: Tensor) -> dict[str, Tensor]:
        """Loss and parts; ``levels [B, count]``: of each block, of each level as many in every row (`draw_levels`)."""
        made = self.make(lesson, 2 if bool((levels == 2).any()) else 1)
        logits = self.student(lesson, levels, made)
        parts = {"kl": losses.horizon_kl(lesson.logits, logits)}
        with torch.no_grad():
            parts["dnll"] = losses.delta_nll(lesson.logits, logits, lesson.ids[:, self.layout.context :]).mean()
        if self.config.backend == "kv":
            parts |= self._matching(lesson, made[0])
        parts["separation"] = self._separation(made[0])
        loss = sum(w * parts[name] for name, w in vars(self.weights).items() if name in parts and w)
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def make(self, lesson: Lesson, top: int = 1) -> list[Gists]:
        """Gists of all blocks, and with ``top`` 2 of all whole groups of blocks."""
        kv = self.config.backend == "kv"
        made = [self._kv_gists(lesson) if kv else self._embedding_gists(lesson)]
        if top > 1:
            made.append(self._coarser(made[0]))
        return made

    def student(self, lesson: Lesson, levels: Tensor, made: list[Gists], drop: bool = False) -> Tensor:
        """Logits ``[B, horizon, V]`` of the horizon over the working context that ``levels`` says.

        drop: leave the gists away, as if their text had been deleted.
        """
        levels = levels.cpu()  # indices are made there, without a wait for the device
        if self.config.backend == "kv":
            return self._kv_student(lesson, levels, [] if drop else made)
        return self._embedding_student(lesson, levels, [] if drop else made)

    # ---- keys and values ----

    def _kv_gists(self, lesson: Lesson) -> Gists:
        layout = self.layout
        inside = slice(layout.first, layout.first + layout.count * layout.block)
        # [L, B, Hkv, n, K, D] -> [B, n, K, L, Hkv, D], not copied
        children = [
            x[..., inside, :].unflatten(3, (layout.count, layout.block)).permute(1, 3, 4, 0, 2, 5)
            for x in (lesson.keys, lesson.values)
        ]
        places = torch.arange(inside.start, inside.stop, device=lesson.ids.device).view(layout.count, layout.block)
        step = max(1, POOLED // children[0][0, 0].numel())
        parts = [
            _again(self.gist, *(x[row, at : at + step] for x in children), lod=1, positions=places[at : at + step])
            for row in range(len(lesson.ids))
            for at in range(0, layout.count, step)
        ]
        pooled = PooledKV(*(torch.cat(x) for x in zip(*parts, strict=True)))
        return self._placed(pooled, 1, list(range(layout.count)), lesson.keys.dtype)

    def _placed(self, pooled: PooledKV, lod: int, blocks: list[int], dtype: torch.dtype) -> Gists:
        """Keys rotated to the middle of their spans."""
        layout, rope = self.layout, self._hold[1]
        device, span = pooled.keys.device, layout.block**lod
        centres = layout.first + torch.tensor(blocks, device=device) * layout.block + span // 2
        cos, sin = (x[:, :, None] for x in rope.tables(centres))  # [n, L or 1, 1, R]
        keys, values = (x.unflatten(0, (-1, len(blocks))) for x in pooled)  # [B, n, L, Hkv, D]
        keys = rope.rotate(keys, cos, sin)
        keys, values = (x.permute(2, 0, 3, 1, 4).to(dtype) for x in (keys, values))
        return Gists(lod, blocks, keys, values, pooled)

    def _coarser(self, fine: Gists) -> Gists:
        """Gists of gists, of the groups that the layout has."""
        groups, block = self.layout.groups, self.layout.block
        if not groups:
            raise ValueError("levels: expected no level 2, the context holds no whole group of blocks")
        index = torch.tensor(groups)[:, None] + torch.arange(block)  # [g, K]
        if fine.embeddings is not None:
            children = fine.embeddings[:, index].flatten(0, 1)  # [B * g, K, d]
            return Gists(2, groups, embeddings=self._gist_of(children, 2).unflatten(0, (-1, len(groups))))
        assert fine.bare is not None
        assert fine.keys is not None
        dtype = fine.keys.dtype  # a tree keeps gists in it
        parts = [x.to(dtype).unflatten(0, (-1, self.layout.count))[:, index].flatten(0, 1) for x in fine.bare]
        return self._placed(self.gist(*parts, lod=2), 2, groups, dtype)

    def _kv_student(self, lesson: Lesson, levels: Tensor, made: list[Gists]) -> Tensor:
        layout, device = self.layout, lesson.ids.device
        shown = self._tokens(levels).to(device)  # [B, t]
        keys, values = ([take(x, shown)] for x in (lesson.keys, lesson.values))
        tokens = [shown]
        weight = [keys[0].new_zeros(keys[0].shape[:-1], dtype=torch.float32)]  # [L, B, Hkv, t]
        for gists in made:
            if gists.keys is None or gists.values is None:
                continue
            chosen = self._chosen(levels, gists).to(device)  # [B, g], into gists.blocks
            keys.append(take(gists.keys, chosen))
            values.append(take(gists.values, chosen))
            beta = self.gist.log_weight(torch.full((1,), gists.lod, device=device))  # [L, Hkv, 1]
            weight.append(beta[:, None].expand(*keys[-1].shape[:-1]))
            first = torch.tensor(gists.blocks, device=device)[chosen] * layout.block + layout.first
            tokens.append(first + layout.block**gists.lod // 2)
        needs_tokens = any(w is not None for w in self.windows)
        token = torch.cat(tokens, 1).cpu() if needs_tokens else None
        shared = Keys(torch.cat(keys, 3), torch.cat(values, 3), torch.cat(weight, 3), token)
        rows = torch.arange(layout.context - 1, layout.context - 1 + layout.horizon)
        cache = PrefixCache(shared, None, rows, self.windows)
        ids = lesson.ids[:, layout.context - 1 : -1]
        return run(self._hold[0], cache, rows[None].to(device), layout.horizon, input_ids=ids)

    def _matching(self, lesson: Lesson, gists: Gists) -> dict[str, Tensor]:
        """Attention's mass and output, each a mean over layers."""
        assert gists.keys is not None
        assert gists.values is not None
        mass, output = [], []
        beta = self.gist.log_weight(torch.ones(1, dtype=torch.int64, device=lesson.ids.device))  # [L, Hkv, 1]
        for i, targets in enumerate(lesson.targets):
            if targets is None:
                continue
            if self.weights.mass:
                weight = beta[i][None].expand(-1, -1, self.layout.count)
                found = losses.mass_matching(
                    targets, lesson.queries[i], gists.keys[i], weight, self.scaling[i], self.softcap
                )
                mass.append(found)
            if self.weights.output:
                output.append(losses.output_matching(targets, gists.values[i]))
        named = {"mass": mass, "output": output}
        return {name: torch.stack(found).mean() for name, found in named.items() if found}

    def _separation(self, gists: Gists) -> Tensor:
        """Of what sets gists apart: their values or embeddings, without what all of a window share."""
        x = gists.embeddings if gists.values is None else gists.values
        assert x is not None
        x = x.float()
        return losses.span_separation(x - x.mean(-2, keepdim=True).detach())

    # ---- embeddings ----

    def _embed(self, ids: Tensor) -> Tensor:
        return self._hold[0].get_input_embeddings()(ids).detach()

    def _gist_of(self, children: Tensor, lod: int) -> Tensor:
        """Embeddings ``[n, K, d]`` -> ``[n, d]``; products in the model's dtype."""
        dtype = self._hold[0].dtype
        with torch.autocast(children.device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            return self.gist(children.float(), lod=lod)

    def _embedding_gists(self, lesson: Lesson) -> Gists:
        layout = self.layout
        ids = lesson.ids[:, layout.first : layout.first + layout.count * layout.block]
        children = self._embed(ids).view(-1, layout.block, self.config.hidden_size)
        parts = [_again(self._gist_of, x, 1) for x in children.split(max(1, READ // layout.block))]
        gists = torch.cat(parts).unflatten(0, (len(ids), layout.count))
        return Gists(1, list(range(layout.count)), embeddings=gists)

    def _embedding_student(self, lesson: Lesson, levels: Tensor, made: list[Gists]) -> Tensor:
        layout, model, device = self.layout, self._hold[0], lesson.ids.device
        shown = self._tokens(levels, layout.context + layout.horizon - 1).to(device)
        parts = [self._embed(lesson.ids.gather(1, shown))]
        places = [shown]
        for gists in made:
            assert gists.embeddings is not None
            chosen = self._chosen(levels, gists).to(device)
            index = chosen[..., None].expand(-1, -1, gists.embeddings.shape[-1])
            parts.append(gists.embeddings.gather(1, index).to(parts[0].dtype))
            first = torch.tensor(gists.blocks, device=device)[chosen] * layout.block + layout.first
            places.append(first + layout.block**gists.lod // 2)
        where = torch.cat(places, 1)
        order = where.argsort(1)
        embeddings = torch.cat(parts, 1)
        embeddings = embeddings.gather(1, order[..., None].expand_as(embeddings))
        cache = RecordingCache([None] * len(self.windows), 0)
        return run(model, cache, where.gather(1, order), layout.horizon, inputs_embeds=embeddings)

    # ---- what is shown ----

    def _tokens(self, levels: Tensor, stop: int | None = None) -> Tensor:
        """Tokens shown as they are, in order, ``[B, t]``: sink, tail (to ``stop``), and blocks of level 0."""
        layout = self.layout
        stop = layout.context - 1 if stop is None else stop
        seen = torch.ones(len(levels), stop, dtype=torch.bool)
        inside = slice(layout.first, layout.first + layout.count * layout.block)
        seen[:, inside] = (levels == 0).repeat_interleave(layout.block, 1)[:, : stop - layout.first]
        return _ones(seen)

    def _chosen(self, levels: Tensor, gists: Gists) -> Tensor:
        """Which gists are shown, ``[B, g]``."""
        return _ones(levels[:, torch.tensor(gists.blocks)] == gists.lod)


def _again(make: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """``make(...)``, of which nothing is kept for the backward, which makes it once more."""
    return checkpoint(make, *args, use_reentrant=False, preserve_rng_state=False, **more)


def _ones(seen: Tensor) -> Tensor:
    """Columns that are True, in order: bool ``[B, n]`` with as many in every row -> int64 ``[B, m]``."""
    index = seen.nonzero()[:, 1]
    if len(index) % len(seen) or bool((seen.sum(1) * len(seen) != len(index)).any()):
        raise ValueError("levels: expected as many blocks of each level in every row (see draw_levels)")
    return index.view(len(seen), -1)


def take(x: Tensor, index: Tensor, variants: int = 1) -> Tensor:
    """``[L, B, Hkv, n, D]`` at ``index [B * variants, m]``: ``[L, B * variants, Hkv, m, D]``."""
    held = x[:, :, None].expand(-1, -1, variants, -1, -1, -1)
    where = index.unflatten(0, (-1, variants))[None, :, :, None, :, None]
    return held.gather(4, where.expand(x.shape[0], -1, -1, x.shape[2], -1, x.shape[4])).flatten(1, 2)


@torch.no_grad()
def recovery(task: GistTask, ids: Tensor) -> dict[str, Tensor]:
    """Losses of the second half of the horizon, a mean for each window [B]: "whole", "drop", and all "gists"."""
    layout = task.layout
    lesson = teach(task._hold[0], ids, layout, matching=False)
    levels = torch.ones(len(ids), layout.count, dtype=torch.int64, device=ids.device)
    made = task.make(lesson)
    found = {
        "whole": lesson.logits,
        "drop": task.student(lesson, levels, made, drop=True),
        "gists": task.student(lesson, levels, made),
    }
    targets, judged = ids[:, layout.context :], slice(layout.horizon // 2, None)
    return {name: losses.token_losses(x, targets)[:, judged].mean(1).double().cpu() for name, x in found.items()}


def recovered(rows: dict[str, Tensor]) -> float:
    """R = 1 - mean cost of the gists / mean cost of dropping."""
    drop = float((rows["drop"] - rows["whole"]).mean())
    return 1 - float((rows["gists"] - rows["whole"]).mean()) / drop if drop else math.nan
