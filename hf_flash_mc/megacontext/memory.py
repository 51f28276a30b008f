"""Where a history lives: all of it in the tree, what is attended to in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cache import MegaContextCache
from .config import MegaContextConfig
from .gistnet import KVGist
from .positions import Numbering, rearrange
from .recall import RecallIndex
from .rope import Rope
from .store import FileStore, MemoryStore, Store, StoreError
from .tree import MegaContextTree
from .working_context import Change, WorkingContext

PLACES = "positions.ctx"  # the file of the positions at which tokens' keys are rotated


class Memory:
    """What both back ends share: a tree, a cache, and which column holds which slot.

    Attributes:
        slots: int64 [N], the cache's column of each slot of the working context. numbering: their positions.
        tail: ids of the tokens that are not in the tree yet, int64 [n].
    """

    tree: MegaContextTree

    def __init__(self, config: MegaContextConfig, cache: MegaContextCache) -> None:
        self.config, self.cache, self.dtype = config, cache, cache.kv.dtype
        self.numbering = Numbering(config)
        self.slots = np.empty(0, np.int64)
        self.tail = torch.empty(0, dtype=torch.int64)
        self.recall: RecallIndex | None = None

    @property
    def committed(self) -> int:
        """Tokens that are in the tree."""
        return len(self.tree)

    def commit(self, upto: int, token_ids: Tensor, wc: WorkingContext) -> None:
        """Put the tokens before number ``upto`` into the tree; token_ids: those from ``committed`` on, int64 [n]."""
        raise NotImplementedError

    def apply(self, before: WorkingContext, after: WorkingContext, change: Change) -> int:
        """Bring the cache from one working context to the next; how many slots were written."""
        raise NotImplementedError

    def renumber(self, wc: WorkingContext, count: int) -> None:
        """Bring all slots into the model's range again, with room for ``count`` tokens."""
        raise NotImplementedError

    def restore(self, wc: WorkingContext, tail: Tensor) -> None:
        """Fill an empty cache for a working context; ``tail`` [n, L, 2, Hkv, D]: of the tokens outside the tree."""
        raise NotImplementedError

    def copy_history(self, folder: Path) -> list[Any]:
        """The whole history once more, in files under ``folder``, still open."""
        raise NotImplementedError

    def truncate(self, total: int) -> None:
        """Forget the tree's tokens from number ``total`` on."""
        if total > self.committed:
            raise StoreError(f"the tree holds {self.committed} tokens, expected at least {total}; restore its files")
        self.tree.truncate(total)

    def flush(self, durable: bool = False) -> None:
        """Hand the tree's files to the operating system, and with ``durable`` to the disk."""
        self.tree.flush(durable)

    def close(self) -> None:
        self.tree.close()


class KVMemory(Memory):
    """A working context's keys and values in a `MegaContextCache`, and the tree they come from and go to.

    Tokens enter the tree late (`commit`): the last ones can still be taken back. The tree keeps a token's key as it was
    rotated, and the position it was rotated at; a token that comes back to that position comes back bit for bit, to
    another one it is turned by the difference, once, in float32. Gists are kept without rotation.
    """

    def __init__(
        self,
        config: MegaContextConfig,
        cache: MegaContextCache,
        gist: KVGist,
        rope: Rope,
        folder: Path | None,
        *,
        durable: bool = False,
    ) -> None:
        super().__init__(config, cache)
        self.gist, self.rope = gist, rope
        self.tree = MegaContextTree(config, folder=folder, pool=self._pool, payload_dtype=self.dtype, durable=durable)
        try:
            self.places = open_places(config, folder, durable)
        except BaseException:
            self.tree.close()
            raise
        if len(self.places) < len(self.tree):
            self.places.close()
            self.tree.close()
            raise StoreError(f"{PLACES}: expected {len(self.tree)} positions, got {len(self.places)}; restore the file")
        self.places.truncate(len(self.tree))  # killed between the two

    def commit(self, upto: int, token_ids: Tensor, wc: WorkingContext) -> None:
        """Put the tokens before number ``upto`` into the tree; token_ids: those from ``committed`` on, int64 [n]."""
        first = self.committed
        count = upto - first
        if count <= 0:
            return
        index = np.searchsorted(wc.start, first) + np.arange(count)  # tokens outside the tree are lod 0 slots
        payload = self.cache.read(self.slots[index]).contiguous()  # once, where it is: pooled, searched and stored
        places = torch.from_numpy(self.numbering.position[index].astype(np.int32))
        beside = [self.places] if self.recall is None else [self.places, self.recall.store]
        try:
            self.places.append(places)
            if self.recall is not None:
                self.recall.append(payload, places)
            self.tree.append(token_ids[:count].cpu(), payload)  # last: it says how many there are
        except BaseException:
            for store in beside:
                store.truncate(min(first, len(store)))
            raise

    def keep_recall(self, recall: RecallIndex) -> None:
        """Keep an index of the tree's tokens; what it lacks is read from the tree."""
        self.recall = recall
        recall.store.truncate(min(len(recall), self.committed))
        for first in range(len(recall), self.committed, 4096):
            part = slice(first, min(first + 4096, self.committed))
            recall.append(self.tree.payload(0, part).to(self.cache.device), self.places.read(part))

    def _pool(self, children: Tensor, *, lod: int, first: int) -> Tensor:
        """Gists of nodes ``first, first + 1, ...`` of a level, for the tree."""
        positions = None
        if lod == 1:
            count, size = children.shape[:2]
            where = self.places.read(slice(first * size, (first + count) * size))
            positions = where.long().reshape(count, size)
        return self.gist.pool(children, lod=lod, positions=positions, first=first)

    def apply(self, before: WorkingContext, after: WorkingContext, change: Change) -> int:
        """Bring the cache from one working context to the next; how many slots were written.

        Reads the tree first: if that fails, the cache is as it was.
        """
        numbering = Numbering(self.config)
        numbering.position, numbering.next = self.numbering.position, self.numbering.next
        in_place = numbering.follow(change, before.start, before.total)
        if not in_place:
            numbering.renumber(after.span, self.config.refocus_interval)
        centres = numbering.centres()
        came = change.added_index
        old = rearrange(self.numbering.centres(), change, centres[came])
        payload = self.fetch(after.start[came], after.lod[came], centres[came])
        self.cache.release(self.slots[change.removed_index])
        slots = self.cache.take(len(came))
        self.slots = rearrange(self.slots, change, slots)
        self._write(slots, after, came, payload)
        if in_place:
            self.numbering = numbering
            return len(came)
        return len(came) + self._move(after, old, numbering)

    def renumber(self, wc: WorkingContext, count: int) -> None:
        """Bring all slots into the model's range again, with room for ``count`` tokens."""
        numbering = Numbering(self.config)
        numbering.renumber(wc.span, count)
        self._move(wc, self.numbering.centres(), numbering)

    def _move(self, wc: WorkingContext, old: np.ndarray, numbering: Numbering) -> int:
        """Rotate slots from where their keys stand, ``old`` [N], to where the numbering has them; how many moved."""
        new = numbering.centres()
        index = np.flatnonzero(old != new)
        if len(wc) and old[-1] != new[-1]:  # the last queries stand with the last tokens
            self._turn_queries(int(new[-1] - old[-1]))
        held = wc.start[index] < self.committed
        kept, tail = index[held], index[~held]
        step = 4096  # slots at a time
        for part in (kept[i : i + step] for i in range(0, len(kept), step)):
            self._write(self.slots[part], wc, part, self.fetch(wc.start[part], wc.lod[part], new[part]))
        if len(tail):
            payload = self.cache.read(self.slots[tail])
            self.cache.write(self.slots[tail], self._turned(payload, new[tail] - old[tail]), wc.start[tail])
        self.numbering = numbering
        return len(index)

    def fetch(self, start: np.ndarray, lod: np.ndarray, centre: np.ndarray) -> Tensor:
        """Payloads ``[n, L, 2, Hkv, D]`` of nodes from the tree, keys rotated to the positions ``centre`` [n]."""
        out = torch.empty(len(start), *self.config.payload_shape, dtype=self.dtype, device=self.cache.device)
        for level in np.unique(lod).tolist():
            chosen = np.flatnonzero(lod == level)
            nodes = torch.from_numpy(start[chosen] // self.config.span(level))
            payload = self.tree.payload(level, nodes).to(self.cache.device)
            where = centre[chosen]
            if level == 0:
                payload = self._turned(payload, where - self.places.read(nodes).numpy())
            else:
                payload = self._turned(payload, where, bare=True)
            out[torch.from_numpy(chosen).to(out.device)] = payload
        return out

    def _turned(self, payload: Tensor, by: np.ndarray, bare: bool = False) -> Tensor:
        """Keys turned by ``by`` [n] positions, rounded once; where that is 0 their bits stay.

        ``bare``: keys without rotation, which also get the factor that the model's tables carry (YaRN).
        """
        moved = np.arange(len(by)) if bare else np.flatnonzero(by)
        if not len(moved):
            return payload
        rope = self.rope if bare else self.rope._replace(attention_scaling=torch.ones_like(self.rope.attention_scaling))
        index = torch.from_numpy(moved).to(payload.device)
        cos, sin = rope.tables(torch.from_numpy(by[moved]).to(payload.device))  # [n, L or 1, R]
        keys = payload[index, :, 0].float()  # [n, L, Hkv, D]
        turned = payload if bare else payload.clone()
        turned[index, :, 0] = rope.rotate(keys, cos[:, :, None], sin[:, :, None]).to(payload.dtype)
        return turned

    def _turn_queries(self, by: int) -> None:
        rope = self.rope._replace(attention_scaling=torch.ones_like(self.rope.attention_scaling))
        cos, sin = rope.tables(torch.tensor(by, device=self.cache.device))  # [L or 1, R]
        queries = self.cache.queries
        queries.copy_(rope.rotate(queries.float(), cos[:, None, None], sin[:, None, None]))

    def _write(self, slots: np.ndarray, wc: WorkingContext, index: np.ndarray, payload: Tensor) -> None:
        """Put payloads into columns ``slots``; ``index``: which slots of the working context they are."""
        lod, token = wc.lod[index], wc.start[index] + wc.span[index] // 2
        for gists in (False, True):
            chosen = np.flatnonzero((lod > 0) == gists)
            if not len(chosen):
                continue
            weight = None
            if gists:
                weight = self.gist.log_weight(torch.from_numpy(lod[chosen].astype(np.int64)).to(self.gist.beta.device))
                weight = weight.detach().permute(2, 0, 1)  # [n, L, Hkv]
            part = payload[torch.from_numpy(chosen).to(payload.device)]
            self.cache.write(slots[chosen], part, token[chosen], weight)

    def restore(self, wc: WorkingContext, tail: Tensor) -> None:
        """Fill an empty cache for a working context; ``tail`` [n, L, 2, Hkv, D]: of the tokens outside the tree."""
        self.slots = self.cache.take(len(wc))
        count = tail.shape[0]
        split = len(wc) - count
        centres = self.numbering.centres()
        for first in range(0, split, 4096):
            part = np.arange(first, min(first + 4096, split))
            self._write(self.slots[part], wc, part, self.fetch(wc.start[part], wc.lod[part], centres[part]))
        if count:
            self.cache.write(self.slots[split:], tail.to(self.cache.device), wc.start[split:])

    def copy_history(self, folder: Path) -> list[Any]:
        """The tree and the positions once more, in files under ``folder``."""
        source = self.tree

        def pool(children: Tensor, *, lod: int, first: int) -> Tensor:
            return source.payload(lod, slice(first, first + len(children)))

        tree = MegaContextTree(self.config, folder=folder, pool=pool, payload_dtype=self.dtype)
        places = open_places(self.config, folder)
        for first in range(0, self.committed, 4096):
            part = slice(first, min(first + 4096, self.committed))
            places.append(self.places.read(part))
            tree.append(source.tokens(part.start, part.stop), source.payload(0, part))
        return [places, tree]

    def truncate(self, total: int) -> None:
        """Forget the tree's tokens from number ``total`` on."""
        super().truncate(total)
        self.places.truncate(total)
        if self.recall is not None:
            self.recall.store.truncate(total)

    def flush(self, durable: bool = False) -> None:
        """Hand the tree's files to the operating system, and with ``durable`` to the disk."""
        self.places.flush(durable)
        if self.recall is not None:
            self.recall.store.flush(durable)
        super().flush(durable)

    def close(self) -> None:
        self.places.close()
        super().close()
        if self.recall is not None:
            self.recall.store.close()


def open_places(config: MegaContextConfig, folder: Path | None, durable: bool = False) -> Store:
    """The positions at which tokens' keys are rotated: int32, one for each token of the tree."""
    if folder is None:
        return MemoryStore((), torch.int32)
    about: dict[str, Any] = {"level": 0, "block_size": config.block_size, "model_id": config.base_model_name_or_path}
    about["durable"] = durable  # a tree that is longer than its positions cannot be opened
    path = folder / PLACES
    return (FileStore.open if path.exists() else FileStore.create)(path, (), torch.int32, **about)
