"""MegaContextCache: keys and values of a working context in slots without order, patched in place.

Attention does not care in which order keys stand, so a refocus overwrites the slots that left with those that came, and
nothing else moves. Slots that hold nothing carry a log weight of -inf, gists carry the learned one. transformers knows
masks only by order; the tensors that `update` returns therefore carry their layer as the attribute `slots`, and
`mc_attention` asks it what a query may see (`visibility`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_flash_mc.ops import flash_attention


class SlotLayer(CacheLayerMixin):
    """One layer's view of a `MegaContextCache`: what transformers' attention modules and `mc_attention` talk to."""

    is_compileable = False
    is_sliding = False  # windows are kept by `visibility`: column order means nothing here

    def __init__(self, cache: MegaContextCache, index: int, window: int | None) -> None:
        super().__init__()
        self.cache, self.index, self.window = cache, index, window
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the cache is allocated at once."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values [1, Hkv, S, D] into the columns that `open` reserved; returns all [1, Hkv, end, D]."""
        cache, (first, last) = self.cache, self.cache.columns
        if key_states.shape[0] != 1 or key_states.shape[2] != last - first:
            raise ValueError(
                f"MegaContextCache: expected keys of {last - first} new tokens of one history (see `open`), got "
                f"{list(key_states.shape)}; run the model through the session"
            )
        held = cache.kv[:, self.index]  # [2, Hkv, capacity, D]
        held[0, :, first:last] = key_states[0]
        held[1, :, first:last] = value_states[0]
        keys, values = held[0, None, :, : cache.end], held[1, None, :, : cache.end]
        keys.slots = self  # type: ignore[attr-defined]
        return keys, values

    def visibility(self, query: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        """What rows of ``query`` [1, Hq, S, D] see, as arguments of `flash_attention`; also keeps the last queries.

        Several new tokens stand in the last columns, in order: aligned at the bottom right, causal is exact. One token
        may stand anywhere and sees every slot.
        """
        refuse_masks(attention_mask)
        cache = self.cache
        cache.reached += 1
        cache.keep_queries(self.index, query)
        rows = query.shape[2]
        mask = None
        if self.window is not None and cache.tokens_seen > self.window:
            mask = cache.window_mask(self.window)
        weight = None if cache.plain else cache.log_weight[self.index, None, :, : cache.end]
        return {"causal": rows > 1, "window": None, "mask": mask, "key_log_weight": weight}

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.end, 0

    def get_seq_length(self) -> int:
        first, last = self.cache.columns
        return self.cache.end - (last - first)

    def get_max_length(self) -> int:
        return self.cache.capacity

    def get_max_cache_shape(self) -> int:  # its name up to transformers 5.17
        return self.cache.capacity


def refuse_masks(attention_mask: Tensor | None) -> None:
    """NotImplementedError where a user's mask came: only the session's own stand-in for one is let through."""
    if attention_mask is not None and attention_mask.shape[-1] != 2:
        raise NotImplementedError(
            "attention_mask: a MegaContextCache takes no padding and no mask of its user; run the model through "
            "the session"
        )


def check_reached(reached: int, layers: int) -> None:
    """RuntimeError if some layer's attention went another way than ours."""
    if reached != layers:
        raise RuntimeError(
            f"{reached} of {layers} layers asked the MegaContextCache what they may see: this model "
            "replaces keys between cache and attention, and would have ignored gists' weights. Please report it"
        )


def attention_shares(queries: Tensor, keys: Tensor, log_weight: Tensor, scale: float, softcap: float | None) -> Tensor:
    """The share of attention that each key gets, float32 [B, N]: mean over heads and queries, all of which see it.

    queries ``[B, Hq, n, D]``, keys ``[B, Hkv, N, D]``, log_weight ``[B, Hkv, N]``. It is the gradient of log-sum-exp by
    the key's log weight. Not recorded; not within inference_mode.
    """
    weight = log_weight.detach().to(torch.float32, copy=True).requires_grad_()
    with torch.enable_grad():  # keys stand in for values, which log-sum-exp has nothing of
        _, lse = flash_attention(
            queries, keys, keys, key_log_weight=weight, softcap=softcap, scale=scale, return_lse=True
        )
        (share,) = torch.autograd.grad(lse.sum(), weight)
    return share.sum(1) / (queries.shape[1] * queries.shape[2])


class MegaContextCache(Cache):
    """Slots of one history, for all layers at once.

    Args:
        capacity: number of slots.
        num_heads: query heads; num_kv_heads, head_dim: of the keys and values.
        windows: for each layer the sliding window W (a row sees tokens less than W before it), or None.
        observe: how many of the last queries are kept, for `attention_mass`; 0 keeps none.

    Attributes:
        kv: ``[2, L, Hkv, capacity, D]``, keys and values.
        log_weight: float32 ``[L, Hkv, capacity]``, -inf where a slot is free.
        token: int64 ``[capacity]`` on the device, the token (of a gist: the central one) a slot stands for.
        end: columns [0, end) are attended to. columns: those of the tokens being run.
        plain: these hold tokens only, no gist and nothing free: the base model's own attention, without weights.
    """

    def __init__(
        self,
        capacity: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        windows: list[int | None],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        observe: int = 0,
    ) -> None:
        layers = len(windows)
        super().__init__(layers=[SlotLayer(self, index, window) for index, window in enumerate(windows)])
        self.capacity, self.observe = capacity, observe
        self.kv = torch.zeros(2, layers, num_kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.log_weight = torch.full((layers, num_kv_heads, capacity), -torch.inf, dtype=torch.float32, device=device)
        self.token = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.queries = torch.zeros(layers, num_heads, observe, head_dim, dtype=dtype, device=device)
        self.windows = windows
        self.live = np.zeros(capacity, bool)
        self.gist = np.zeros(capacity, bool)
        self.end, self.columns, self.reached, self.tokens_seen, self.plain = 0, (0, 0), 0, 0, True
        self._holes: list[int] = []  # free columns below `end`
        self._query_at, self._query_count = 0, 0
        self._masks: dict[int, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return self.kv.device

    def open(self, tokens: np.ndarray) -> np.ndarray:
        """Reserve columns for slots that follow all others and stand for ``tokens`` int64 [count].

        One goes into a free column; several need ``count`` columns at the end (call `compact` before, where
        `needs_compaction`). The slots, int64 [count].
        """
        slots = self.reserve(tokens)
        first, last = self.columns
        self.log_weight[:, :, first:last] = 0.0
        self.token[first:last] = torch.from_numpy(np.array(tokens, np.int64)).to(self.device)
        return slots

    def reserve(self, tokens: np.ndarray) -> np.ndarray:
        """`open` without the tensors on the device, for who writes those of several caches at once."""
        count = len(tokens)
        if count == 1 and self._holes:
            first = self._holes.pop()
        else:
            first = self.end
            if first + count > self.capacity:
                raise ValueError(
                    f"MegaContextCache: {count} new tokens do not fit behind column {first} of {self.capacity}"
                )
            self.end += count
        self.columns = (first, first + count)
        self.live[first : first + count] = True
        self.tokens_seen, self.reached = int(tokens[-1]) + 1, 0
        self.plain = not self._holes and not self.gist[: self.end].any()
        self._masks.clear()
        return np.arange(first, first + count)

    def close(self, count: int) -> None:
        """After a forward: the queries of its rows count; RuntimeError if some layer's attention went another way."""
        check_reached(self.reached, len(self.layers))
        self.count_queries(count)

    def count_queries(self, count: int) -> None:
        """The queries of ``count`` more rows were kept."""
        kept = min(count, self.observe)
        if kept:
            self._query_at = kept % self.observe if count >= self.observe else (self._query_at + kept) % self.observe
            self._query_count = min(self._query_count + kept, self.observe)

    def adopt(self, kv: Tensor, log_weight: Tensor, token: Tensor, queries: Tensor) -> None:
        """Go on in these tensors, of the same shapes, as they are at once filled with what the cache holds."""
        for name, new in {"kv": kv, "log_weight": log_weight, "token": token, "queries": queries}.items():
            new.copy_(getattr(self, name))
            setattr(self, name, new)

    @property
    def query_at(self) -> int:
        """The row of `queries` that the next query goes to."""
        return self._query_at

    def needs_compaction(self, count: int) -> bool:
        return count > 1 and self.end + count > self.capacity

    def compact(self) -> np.ndarray:
        """Move the last slots into free columns; the new column of every old one, int64 [capacity]."""
        moved = np.arange(self.capacity)
        count = int(self.live.sum())
        target = np.flatnonzero(~self.live[:count])
        source = count + np.flatnonzero(self.live[count : self.end])
        if len(source):
            src, dst = self._index(source), self._index(target)
            for held in (self.kv, self.log_weight, self.token):
                axis = held.dim() - (2 if held is self.kv else 1)
                held.index_copy_(axis, dst, held.index_select(axis, src))
            self.gist[target], moved[source] = self.gist[source], target
            self.log_weight[:, :, count : self.end] = -torch.inf
        self.gist[count:] = False
        self.live[:count], self.live[count:] = True, False
        self.end, self._holes = count, []
        return moved

    def take(self, count: int) -> np.ndarray:
        """Free columns for ``count`` slots, holes first; int64 [count]. They count as live from now on."""
        holes = [self._holes.pop() for _ in range(min(count, len(self._holes)))]
        fresh = np.arange(self.end, self.end + count - len(holes))
        if self.end + len(fresh) > self.capacity:
            raise ValueError(f"MegaContextCache: {count} more slots do not fit into {self.capacity}")
        self.end += len(fresh)
        slots = np.concatenate((np.asarray(holes, np.int64), fresh))
        self.live[slots] = True
        return slots

    def release(self, slots: np.ndarray) -> None:
        """Free these columns: their weight becomes -inf."""
        if not len(slots):
            return
        self.live[slots] = False
        self.gist[slots] = False
        self.log_weight.index_fill_(2, self._index(slots), -torch.inf)
        used = np.flatnonzero(self.live[: self.end])
        self.end = int(used[-1]) + 1 if len(used) else 0
        self._holes = np.flatnonzero(~self.live[: self.end])[::-1].tolist()

    def write(self, slots: np.ndarray, payload: Tensor, token: np.ndarray, log_weight: Tensor | None = None) -> None:
        """Overwrite slots in all layers.

        payload ``[n, L, 2, Hkv, D]``; token int64 [n]; log_weight ``[n, L, Hkv]`` for gists, None for tokens (0).
        """
        index = self._index(slots)
        self.kv.index_copy_(3, index, payload.to(self.kv).permute(2, 1, 3, 0, 4))
        self.token.index_copy_(0, index, torch.from_numpy(np.array(token, np.int64)).to(self.device))
        self.gist[slots] = log_weight is not None
        if log_weight is None:
            self.log_weight.index_fill_(2, index, 0.0)
        else:
            self.log_weight.index_copy_(2, index, log_weight.to(self.log_weight).permute(1, 2, 0))

    def read(self, slots: np.ndarray) -> Tensor:
        """Keys and values ``[n, L, 2, Hkv, D]`` of slots."""
        return self.kv.index_select(3, self._index(slots)).permute(3, 1, 0, 2, 4)

    def window_mask(self, window: int) -> Tensor:
        """bool [1, 1, S, end]: slots whose token lies less than ``window`` before the row's; made once a forward."""
        if window not in self._masks:
            first, last = self.columns
            seen = self.token[first:last, None] - self.token[None, : self.end] < window
            self._masks[window] = seen[None, None]
        return self._masks[window]

    def keep_queries(self, layer: int, query: Tensor) -> None:
        """Keep the last queries of ``query`` [1, Hq, S, D] in a ring of ``observe`` rows."""
        kept = min(query.shape[2], self.observe)
        if not kept:
            return
        ring, rows = self.queries[layer], query[0, :, query.shape[2] - kept :].detach()
        at = 0 if kept == self.observe else self._query_at
        first = min(kept, self.observe - at)
        ring[:, at : at + first] = rows[:, :first]
        if first < kept:
            ring[:, : kept - first] = rows[:, first:]

    def forget_queries(self, count: int) -> None:
        """The last ``count`` rows were taken back."""
        count = min(count, self._query_count)
        self._query_count -= count
        if self.observe:
            self._query_at = (self._query_at - count) % self.observe

    def lose_queries(self, count: int) -> None:
        """A forward of ``count`` rows failed: it wrote over the oldest queries, in some layers."""
        self._query_count = min(self._query_count, max(0, self.observe - count))

    def last_queries(self, last: int | None = None) -> Tensor:
        """``[L, Hq, n, D]``, n <= observe (and <= last), oldest first."""
        count = self._query_count if last is None else min(last, self._query_count)
        rows = torch.arange(self._query_at - count, self._query_at, device=self.device) % max(self.observe, 1)
        return self.queries.index_select(2, rows)

    def set_queries(self, queries: Tensor) -> None:
        """Put saved `last_queries` back."""
        count = queries.shape[2]
        self.queries[:, :, :count] = queries.to(self.queries)
        self._query_count, self._query_at = count, count % max(self.observe, 1)

    @torch.inference_mode(False)
    @torch.no_grad()
    def attention_mass(self, scaling: list[float], softcap: float | None = None, last: int | None = None) -> Tensor:
        """The share of attention that each column got from the last queries, float32 [end]: mean over layers and heads.

        Layers with a sliding window are left out where others exist: they cannot see far.
        """
        queries, end = self.last_queries(last), self.end
        rows = queries.shape[2]
        mass = torch.zeros(end, dtype=torch.float32, device=self.device)
        layers = [index for index, window in enumerate(self.windows) if window is None] or list(range(len(self.layers)))
        if not rows:
            return mass
        for scale in sorted({scaling[layer] for layer in layers}):
            part = [layer for layer in layers if scaling[layer] == scale]
            whole = slice(part[0], part[-1] + 1) if len(part) == part[-1] + 1 - part[0] else part
            keys = self.kv[0, whole, :, :end]  # [l, Hkv, end, D]
            mass += attention_shares(queries[whole], keys, self.log_weight[whole, :, :end], scale, softcap).sum(0)
        return mass / len(layers)

    def reset(self) -> None:
        """Forget everything."""
        self.live[:] = False
        self.gist[:] = False
        self.log_weight.fill_(-torch.inf)
        self.end, self.columns, self._holes = 0, (0, 0), []
        self._query_at, self._query_count = 0, 0

    def _index(self, slots: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(slots, np.int64)).to(self.device)
