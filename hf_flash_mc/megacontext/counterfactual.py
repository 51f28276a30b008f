"""CounterfactualScorer: what the next tokens would cost if the working context were edited, for many edits at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attach import evaluating, layer_windows
from .memory import KVMemory
from .positions import Numbering
from .prefix import Keys, PrefixCache, run
from .working_context import Edits


@dataclass
class _Variant:
    """What edits take from the working context (slots by index) and put there, without doing it."""

    removed: np.ndarray
    start: np.ndarray
    lod: np.ndarray
    centre: np.ndarray


class CounterfactualScorer:
    """Losses of the next tokens for V variants of a session's working context, at the cost of about one.

    The slots that no variant touches are a prefix that all variants share, read once where they lie in the session's
    cache; each variant has the rest of its slots, and the tokens that are run, as keys of its own. Nothing of the
    session changes. The losses are those of applying each variant's edits, running the last ``reread`` tokens again and
    reading the targets, up to rounding.

    Args:
        session: with the "kv" back end: there an edit does not change the keys of other slots.
    """

    def __init__(self, session: Any) -> None:
        if not isinstance(session.memory, KVMemory):
            raise NotImplementedError(
                'session: expected the "kv" back end; with embedding gists an edit changes the keys of all slots '
                "behind it, so that variants share nothing"
            )
        self.session, self.windows = session, layer_windows(session.model)

    def losses(self, variants: Sequence[Edits], targets: Tensor, *, reread: int = 1, batch: int = 16) -> Tensor:
        """Losses of ``targets [H]`` after the history: float32 ``[V, H]`` on the CPU, in nats.

        Args:
            variants: one or several edits each; ``Edits.of([])`` is the working context as it is.
            reread: last tokens that are run again in each variant, at least 1.
            batch: variants of one forward; the logits of one take H x vocabulary.

        Raises:
            ValueError: edits that are not legal, or that touch the tokens to be run again.
            NotImplementedError: edits after which positions would have to be renumbered.
        """
        with torch.no_grad():
            logits = self.logits(variants, targets, reread=reread, batch=batch, collect=_losses)
        return torch.cat(logits)

    def logits(
        self,
        variants: Sequence[Edits],
        targets: Tensor,
        *,
        reread: int = 1,
        batch: int = 16,
        collect: Any = lambda logits, targets: logits,
    ) -> list[Tensor]:
        """What ``collect(logits [v, H, V], targets [H])`` makes of each batch; the logits that predict the targets."""
        session = self.session
        targets = torch.as_tensor(targets).to("cpu", torch.int64)
        if targets.dim() != 1 or not len(targets):
            raise ValueError(f"targets: expected token ids [H], at least one, got {list(targets.shape)}")
        session._checked_ids(targets, "targets")
        if isinstance(variants, Edits) or not len(variants) or batch < 1:
            got = "Edits" if isinstance(variants, Edits) else len(variants)
            raise ValueError(
                f"variants, batch: expected a list of at least one Edits, at least 1 of a forward, got {got}, {batch}"
            )
        if not 1 <= reread <= len(session) or session.working_context.lod[-reread:].any():
            raise ValueError(f"reread: expected 1 to {len(session)} tokens that are shown as tokens, got {reread}")
        if not session.memory.numbering.fits(len(targets)):
            session.memory.renumber(session.working_context, len(targets))
        plans = [self._plan(edits, reread) for edits in variants]
        touched = np.unique(np.concatenate([np.empty(0, np.int64), *(plan.removed for plan in plans)]))
        shared, pool = self._shared(touched, reread), self._pool(touched, plans)
        ids = torch.cat((session.tokens(len(session) - reread), targets[:-1])).to(session.device)
        first = int(session.memory.numbering.position[-reread])
        positions = torch.arange(first, first + len(ids), device=session.device)[None]
        tokens = torch.arange(len(session) - reread, len(session) - reread + len(ids))
        out = []
        for start in range(0, len(plans), batch):
            part = range(start, min(start + batch, len(plans)))
            cache = PrefixCache(shared, self._own(part, touched, plans, pool), tokens, self.windows)
            rows = ids[None].expand(len(part), -1)
            with evaluating(session.model):
                logits = run(session.model, cache, positions.expand(len(part), -1), len(targets), input_ids=rows)
            out.append(collect(logits, targets))
        return out

    def _plan(self, edits: Edits, reread: int) -> _Variant:
        session, wc = self.session, self.session.working_context
        collapsed = edits.kind < 0
        if collapsed.any():
            ends = edits.start[collapsed] + session.config.block_size ** edits.lod[collapsed].astype(np.int64)
            session._commit(int(ends.max()))
        after = wc.copy()
        change = after.apply(edits, session.tree.version) if len(edits) else None
        if change is None:
            none = np.empty(0, np.int64)
            return _Variant(none, none, none.astype(np.int8), none)
        if change.removed_index.max() >= len(wc) - reread:
            raise ValueError(f"variants: expected edits before the last {reread} tokens, which are run again")
        numbering = Numbering(session.config)
        numbering.position, numbering.next = session.memory.numbering.position, session.memory.numbering.next
        if not numbering.follow(change, wc.start, wc.total):
            raise NotImplementedError(
                "variants: after these edits positions would be renumbered (the history is past the model's range), so "
                "that no key is shared; score edits of gists that keep a position for each of their tokens"
            )
        return _Variant(
            change.removed_index, change.added_start, change.added_lod, numbering.centres()[change.added_index]
        )

    def _shared(self, touched: np.ndarray, reread: int) -> Keys:
        """The cache's own columns, without those that some variant touches and those that are run again."""
        session, cache = self.session, self.session.cache
        slots, end = session.memory.slots, cache.end
        weight = cache.log_weight[:, None, :, :end].clone()  # [L, 1, Hkv, end]
        hidden = np.concatenate((slots[touched], slots[len(slots) - reread :]))
        weight[..., torch.from_numpy(hidden).to(weight.device)] = -torch.inf
        held = cache.kv[:, :, None, :, :end]  # [2, L, 1, Hkv, end, D]
        return Keys(held[0], held[1], weight, cache.token[None, :end].cpu())

    def _pool(self, touched: np.ndarray, plans: list[_Variant]) -> tuple[Tensor, Tensor, Tensor]:
        """Payloads, log weights and tokens of the touched slots, then of what each plan brings: n rows each."""
        session, wc, spans = self.session, self.session.working_context, self.session.working_context.spans
        start = np.concatenate([wc.start[touched], *(plan.start for plan in plans)])
        lod = np.concatenate([wc.lod[touched], *(plan.lod for plan in plans)]).astype(np.int64)
        parts = [session.cache.read(session.memory.slots[touched])]
        added = slice(len(touched), None)
        if len(start) > len(touched):
            centre = np.concatenate([plan.centre for plan in plans])
            parts.append(session.memory.fetch(start[added], lod[added], centre))
        beta = session.addon.gist.log_weight(torch.from_numpy(lod).to(session.addon.gist.beta.device))  # [L, Hkv, n]
        weight = beta.to(session.device)
        return torch.cat(parts), weight, torch.from_numpy(start + spans[lod] // 2)

    def _own(self, part: range, touched: np.ndarray, plans: list[_Variant], pool: tuple[Tensor, ...]) -> Keys | None:
        """Keys of the variants ``part`` alone, padded to one length with keys that nobody sees."""
        payload, weight, token = pool
        offsets = len(touched) + np.cumsum([0] + [len(plan.start) for plan in plans])
        rows = []
        for i in part:
            kept = np.flatnonzero(~np.isin(touched, plans[i].removed))
            rows.append(np.concatenate((kept, np.arange(offsets[i], offsets[i + 1]))))
        longest = max(map(len, rows))
        if not longest:
            return None
        index = np.zeros((len(rows), longest), np.int64)
        real = np.zeros((len(rows), longest), bool)
        for i, row in enumerate(rows):
            index[i, : len(row)], real[i, : len(row)] = row, True
        where, seen = torch.from_numpy(index), torch.from_numpy(real)
        held = payload[where.to(payload.device)].permute(3, 2, 0, 4, 1, 5)  # [2, L, v, Hkv, E, D]
        weights = weight[..., where.to(weight.device)].permute(0, 2, 1, 3)  # [L, v, Hkv, E]
        weights = weights.masked_fill(~seen[None, :, None].to(weights.device), -torch.inf)
        return Keys(held[0], held[1], weights, token[where])


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy [v, H] on the CPU."""
    wanted = targets.to(logits.device).expand(logits.shape[:2])
    return F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none").view_as(wanted).cpu()
