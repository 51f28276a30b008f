"""MegaContextTree: the whole history, append-only, as token ids and levels of gists."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .config import MegaContextConfig
from .store import HEADER, FileStore, MemoryStore, Store, StoreError, sync_folder

TOKENS = "tokens"
METADATA = "metadata.json"


class Pool(Protocol):
    """Makes nodes of level ``lod`` from their children: called once for all nodes that an append completes."""

    def __call__(self, children: Tensor, *, lod: int, first: int) -> Tensor:
        """children [m, block_size, *shape] of nodes ``first .. first + m`` of level ``lod`` -> [m, *shape]."""


class MegaContextTree:
    """Levels 0 (token ids, and a payload for each with the kv back end) to ``max_lod`` of one history.

    The token ids are written last: they say how long the history is. A process killed between two files leaves others
    longer, and opening cuts them back: a history reopens as a whole number of appends, none that returned missing.

    Args:
        config: block size, levels, back end, base model.
        stores: stores to use, by "tokens" and the levels with a payload (kv back end: from 0, else from 1).
        folder: where the files are or will be. With neither, the history is in memory.
        pool: makes gists; may return a wider dtype, which is rounded once.
        embed: token ids [n] -> leaf payloads [n, *shape] (embedding back end, which stores no leaf payloads).
        payload_shape, payload_dtype: of one node's payload; the shape defaults to ``config.payload_shape``.
        durable: appends return only when the disk has them (files).

    Raises:
        StoreError: the folder holds something else, or files that do not belong together.
    """

    def __init__(
        self,
        config: MegaContextConfig,
        *,
        stores: Mapping[str | int, Store] | None = None,
        folder: str | os.PathLike[str] | None = None,
        pool: Pool | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
        payload_shape: tuple[int, ...] | None = None,
        payload_dtype: torch.dtype = torch.float32,
        durable: bool = False,
    ) -> None:
        if stores is not None and folder is not None:
            raise ValueError("stores, folder: expected one of them, got both")
        self.config = config
        self.pool = pool
        self.embed = embed
        self.payload_shape = config.payload_shape if payload_shape is None else tuple(payload_shape)
        self.payload_dtype = payload_dtype
        self.has_leaves = config.backend == "kv"
        self._block = config.block_size
        if folder is not None:
            self._stores = self._open_folder(Path(folder), durable)
        elif stores is not None:
            self._stores = self._given(stores)
        else:
            self._stores = {key: MemoryStore(*self._record(key)) for key in self._keys}
        try:
            self._align()
        except StoreError:
            if folder is not None:
                self.close()
            raise
        self._refreshed: dict[int, np.ndarray] = {}  # level -> version of each refreshed node

    # ------------------------------------------------------------------ history

    @torch.no_grad()
    def append(self, token_ids: Tensor, payload0: Tensor | None = None) -> dict[int, range]:
        """Add tokens [n] (kv: and payloads [n, *shape]); nodes that become complete are pooled, one call a level.

        Returns the new nodes of each level 0..max_lod (ranges, possibly empty). All or nothing, if ``pool`` fails too.
        """
        ids = self._checked_ids(token_ids)
        old = {lod: self.len_of(lod) for lod in range(self.config.max_lod + 1)}
        total = old[0] + len(ids)
        new = {lod: range(old[lod], total // self._block**lod) for lod in old}
        made: dict[str | int, Tensor] = {}
        if self.has_leaves:
            made[0] = self._checked_payload("payload0", payload0, len(ids))
        elif payload0 is not None:
            raise ValueError("payload0: expected None (the embedding back end stores no leaf payloads), got a tensor")
        for lod in range(1, self.config.max_lod + 1):
            if new[lod]:
                made[lod] = self._pooled(lod, new, ids, made)
        made[TOKENS] = ids.to(torch.int32)
        self._commit(made, old[0])
        return new

    def truncate(self, total: int) -> None:
        """Forget the tokens from number ``total`` on, and the nodes that need them (to return to a saved session)."""
        if not 0 <= total <= len(self):
            raise ValueError(f"total: expected 0 to {len(self)} tokens, got {total}")
        self._stores[TOKENS].truncate(total)
        self._align()
        self._refreshed = {lod: versions[: self.len_of(lod)] for lod, versions in self._refreshed.items()}

    def __len__(self) -> int:
        """Tokens of history."""
        return len(self._stores[TOKENS])

    def len_of(self, lod: int) -> int:
        """Complete nodes of a level."""
        return len(self) // self.config.span(lod)

    def tokens(self, start: int, stop: int) -> Tensor:
        """Token ids [stop - start], int64."""
        return self._stores[TOKENS].read(slice(start, stop)).long()

    def payload(self, lod: int, index: Tensor | slice) -> Tensor:
        """Payloads [n, *shape] of nodes of a level, on the CPU (``embed`` decides for its level 0)."""
        if not 0 <= lod <= self.config.max_lod:
            raise ValueError(f"lod: expected 0 to {self.config.max_lod}, got {lod}")
        if lod == 0 and not self.has_leaves:
            return self._embedded(self._stores[TOKENS].read(index).long())
        return self._stores[lod].read(index)

    # ------------------------------------------------------------------ relations

    def parent(self, lod: int, index: Tensor | int) -> Tensor:
        """Node of level ``lod + 1`` above each of ``index``, int64 of its shape; -1 where it is not complete yet."""
        if lod >= self.config.max_lod:
            raise ValueError(
                f"lod: expected at most {self.config.max_lod - 1} (the last level has no parents), got {lod}"
            )
        above = self._nodes(lod, index) // self._block
        return torch.where(above < self.len_of(lod + 1), above, -1)

    def children(self, lod: int, index: Tensor | int) -> Tensor:
        """Nodes [..., block_size] of level ``lod - 1`` below each of ``index``, int64."""
        if lod < 1:
            raise ValueError(f"lod: expected 1 to {self.config.max_lod} (tokens have no children), got {lod}")
        return self._nodes(lod, index)[..., None] * self._block + torch.arange(self._block)

    def ancestors(self, lod: int, index: Tensor | int) -> Tensor:
        """Nodes [..., max_lod - lod] of the levels above each of ``index``, int64; -1 where not complete yet."""
        nodes = self._nodes(lod, index)
        above = [nodes // self._block**up for up in range(1, self.config.max_lod - lod + 1)]
        if not above:
            return nodes.new_empty((*nodes.shape, 0))
        complete = torch.tensor([self.len_of(up) for up in range(lod + 1, self.config.max_lod + 1)])
        stacked = torch.stack(above, -1)
        return torch.where(stacked < complete, stacked, -1)

    # ------------------------------------------------------------------ refresh

    def refresh(self, lod: int, index: Tensor | slice, payload: Tensor) -> None:
        """Replace gists [n, *shape] of a level >= 1 and raise ``version``. Nodes above are not pooled again."""
        if not 1 <= lod <= self.config.max_lod:
            raise ValueError(f"lod: expected 1 to {self.config.max_lod} (tokens are never rewritten), got {lod}")
        self._stores[lod].write(index, payload.to(self.payload_dtype))
        versions = np.zeros(self.len_of(lod), np.int64)
        known = self._refreshed.get(lod, versions[:0])
        versions[: len(known)] = known
        versions[index if isinstance(index, slice) else index.cpu().numpy()] = self.version
        self._refreshed[lod] = versions

    @property
    def version(self) -> int:
        """How often gists were refreshed, over all levels (kept in the files)."""
        return sum(self._stores[lod].version for lod in range(1, self.config.max_lod + 1))

    def version_of(self, lod: int, index: Tensor) -> Tensor:
        """``version`` at which each node was refreshed last, int64 [n]; 0: not since the tree was opened."""
        nodes = self._nodes(lod, index)
        known = torch.from_numpy(self._refreshed.get(lod, np.zeros(0, np.int64)))
        if not len(known):
            return torch.zeros_like(nodes)
        return torch.where(nodes < len(known), known[nodes.clamp(max=len(known) - 1)], 0)

    def flush(self, durable: bool = False) -> None:
        """See Store.flush."""
        for key in self._keys:
            self._stores[key].flush(durable)

    def close(self) -> None:
        for store in self._stores.values():
            store.close()

    # ------------------------------------------------------------------ inside

    @property
    def _keys(self) -> list[str | int]:
        """The stores in the order in which they are written; the token ids make an append count, so they come last."""
        return [*range(0 if self.has_leaves else 1, self.config.max_lod + 1), TOKENS]

    def _record(self, key: str | int) -> tuple[tuple[int, ...], torch.dtype]:
        return ((), torch.int32) if key == TOKENS else (self.payload_shape, self.payload_dtype)

    def _expected(self, key: str | int, total: int) -> int:
        return total if isinstance(key, str) else total // self._block**key

    def _given(self, stores: Mapping[str | int, Store]) -> dict[str | int, Store]:
        if set(stores) != set(self._keys):
            raise ValueError(f"stores: expected the keys {self._keys}, got {list(stores)}")
        for key in self._keys:
            got = (stores[key].shape, stores[key].dtype)
            if got != self._record(key):
                raise ValueError(f"stores[{key!r}]: expected records of {self._record(key)}, got {got}")
        return dict(stores)

    def _align(self) -> None:
        """Cut off what an interrupted append left behind; StoreError where something is missing."""
        total = len(self)
        for key in self._keys:
            store, expected = self._stores[key], self._expected(key, total)
            if len(store) < expected:
                raise StoreError(
                    f"level {key}: expected {expected} records for {total} tokens, got {len(store)}; the files do not "
                    f"belong together: restore them from one copy, or ingest the history again"
                )
            if len(store) > expected:
                store.truncate(expected)

    def _open_folder(self, folder: Path, durable: bool) -> dict[str | int, Store]:
        """Open or create every file of a history. The token ids are created last, so where they are all others are."""
        folder.mkdir(parents=True, exist_ok=True)
        self._check_metadata(folder, durable)
        exists = (folder / self._file(TOKENS)).exists()
        held = sorted(path.name for path in folder.glob("*.ctx") if path.stat().st_size > HEADER.size)
        if held and not exists:  # made anew it would be empty, and cut the others to nothing
            path = folder / self._file(TOKENS)
            raise StoreError(f"{path}: expected beside {', '.join(held)}, got no such file; restore it")
        stores: dict[str | int, Store] = {}
        try:
            for key in self._keys:
                path = folder / self._file(key)
                if exists and not path.exists():
                    raise StoreError(f"{path}: expected beside {self._file(TOKENS)}, got no such file; restore it")
                make = FileStore.open if path.exists() else FileStore.create
                level = 0 if isinstance(key, str) else key
                name = self.config.base_model_name_or_path or ""
                stores[key] = make(
                    path,
                    *self._record(key),
                    level=level,
                    block_size=self._block,
                    model_id=name,
                    durable=durable,
                )
        except BaseException:
            for store in stores.values():
                store.close()
            raise
        return stores

    def _file(self, key: str | int) -> str:
        """LOD0.ctx holds the token ids, KV0.ctx their payloads, LOD1.ctx and on the gists."""
        return {TOKENS: "LOD0.ctx", 0: "KV0.ctx"}.get(key, f"LOD{key}.ctx")

    def _check_metadata(self, folder: Path, durable: bool) -> None:
        """Write metadata.json, or compare the one that is there."""
        config = self.config
        want: dict[str, Any] = {
            "format": 2,
            "backend": config.backend,
            "block_size": config.block_size,
            "max_lod": config.max_lod,
            "payload_shape": list(self.payload_shape),
            "payload_dtype": str(self.payload_dtype).removeprefix("torch."),
            "base_model_name_or_path": config.base_model_name_or_path,
            "revision": config.revision,
        }
        path = folder / METADATA
        if not path.exists():
            if any(folder.glob("*.ctx")):
                raise StoreError(f"{path}: expected beside the .ctx files, got no such file; restore it")
            fresh = path.with_name(METADATA + ".new")
            with open(fresh, "w") as file:
                json.dump(want, file, indent=2)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(fresh, path)
            if durable:
                sync_folder(folder)
            return
        try:
            got = json.loads(path.read_text())
        except ValueError as error:
            raise StoreError(f"{path}: expected JSON, got something else ({error}); restore it") from error
        if not isinstance(got, dict):
            raise StoreError(f"{path}: expected a JSON object, got {type(got).__name__}; restore it")
        differ = [f"{key}: expected {want[key]!r}, got {got.get(key)!r}" for key in want if got.get(key) != want[key]]
        if differ:
            raise StoreError(f"{folder} was written for something else: {'; '.join(differ)}")

    def _checked_ids(self, token_ids: Tensor) -> Tensor:
        """token ids on the CPU, int64 [n], within the vocabulary."""
        whole = isinstance(token_ids, Tensor) and not token_ids.is_floating_point() and token_ids.dtype != torch.bool
        if not whole or token_ids.ndim != 1:
            got = (
                f"{token_ids.dtype} {[*token_ids.shape]}" if isinstance(token_ids, Tensor) else type(token_ids).__name__
            )
            raise TypeError(f"token_ids: expected a tensor of whole numbers [n], got {got}")
        ids = token_ids.detach().to("cpu", torch.int64)
        limit = self.config.vocab_size or 2**31
        bad = torch.nonzero((ids < 0) | (ids >= limit))
        if len(bad):
            at = int(bad[0, 0])
            raise ValueError(
                f"token_ids: expected ids from 0 to {limit - 1}, got {int(ids[at])} at {at} ({len(bad)} outside in "
                f"all); is this the base model's tokenizer?"
            )
        return ids

    def _checked_payload(self, name: str, payload: Tensor | None, n: int) -> Tensor:
        """payload [n, *shape], rounded to the tree's dtype."""
        expected = (n, *self.payload_shape)
        if not isinstance(payload, Tensor) or not payload.is_floating_point():
            got = payload.dtype if isinstance(payload, Tensor) else type(payload).__name__
            raise TypeError(f"{name}: expected a tensor of floating-point numbers {list(expected)}, got {got}")
        if tuple(payload.shape) != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {[*payload.shape]}")
        return payload.detach().to(self.payload_dtype)

    def _embedded(self, ids: Tensor) -> Tensor:
        if self.embed is None:
            raise ValueError("embed: expected a function from token ids to embeddings (embedding back end), got None")
        return self._checked_payload("embed(ids)", self.embed(ids), len(ids))

    def _pooled(self, lod: int, new: dict[int, range], ids: Tensor, made: dict[str | int, Tensor]) -> Tensor:
        """Payloads [m, *shape] of the new nodes of a level, from children that are partly stored, partly new."""
        if self.pool is None:
            raise ValueError(f"pool: expected a function that makes gists (level {lod} is due), got None")
        start, stop = new[lod].start * self._block, new[lod].stop * self._block
        stored = new[lod - 1].start - start  # children that earlier appends brought
        if lod == 1 and not self.has_leaves:
            below = self._embedded(torch.cat([self.tokens(start, start + stored), ids[: stop - start - stored]]))
        else:
            fresh = made[lod - 1][: stop - start - stored]
            old = self._stores[lod - 1].read(slice(start, start + stored)).to(fresh.device)
            below = torch.cat([old, fresh])
        m = len(new[lod])
        gists = self.pool(below.reshape(m, self._block, *self.payload_shape), lod=lod, first=new[lod].start)
        return self._checked_payload(f"pool(..., lod={lod})", gists, m)

    def _commit(self, made: dict[str | int, Tensor], total: int) -> None:
        try:
            for key in self._keys:
                if key in made:
                    self._stores[key].append(made[key])
        except BaseException:
            for key in self._keys:
                expected = self._expected(key, total)
                if len(self._stores[key]) > expected:
                    self._stores[key].truncate(expected)
            raise

    def _nodes(self, lod: int, index: Tensor | int) -> Tensor:
        """index as int64, each a node that exists."""
        nodes = torch.as_tensor(index, dtype=torch.int64)
        count = self.len_of(lod)
        if nodes.numel() and (int(nodes.min()) < 0 or int(nodes.max()) >= count):
            raise IndexError(
                f"index: expected nodes 0 to {count - 1} of level {lod}, got values from {nodes.min()} to {nodes.max()}"
            )
        return nodes
