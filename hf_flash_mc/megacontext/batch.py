"""Several sessions of one model in one forward: their new tokens are one row, each reads its own slots, none is padded.

The caches of the sessions become parts of one buffer, so that no step copies keys: a session's cache is a view of its
columns, and works alone as before. One new token for each session runs as a batch of one row each over those columns,
which is the shape that decoding kernels are made for; texts of several lengths run packed, with `cu_seqlens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from hf_flash_mc.ops import flash_attention, flash_attention_varlen

from .attach import evaluating
from .cache import MegaContextCache, SlotLayer, check_reached, refuse_masks
from .decode import Continuation

if TYPE_CHECKING:
    from .attach import MegaContext
    from .session import MegaContextSession

SHARED = {"kv": 3, "log_weight": 2, "token": 0, "queries": 2}  # a cache's tensors, and which dimension counts its slots


class BatchLayer(SlotLayer):
    """One layer's view of a `BatchCache`: what transformers' attention modules and `mc_attention` talk to."""

    def __init__(self, cache: Any, index: int, window: int | None) -> None:
        super().__init__(cache, index, window)
        self.cache: Any = cache  # a BatchCache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put keys and values [1, Hkv, T, D] into the columns that `open` reserved; returns all [1, Hkv, S * C, D]."""
        held = self.cache.kv[:, self.index]  # [2, Hkv, S * C, D]
        held[0].index_copy_(1, self.cache.columns, key_states[0])
        held[1].index_copy_(1, self.cache.columns, value_states[0])
        keys, values = held[0, None], held[1, None]
        keys.slots = self
        return keys, values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        """Attention of each session's rows over its own columns: ``[1, Hq, T, D]`` -> ``[1, Hq, T, Dv]``.

        ``mc_attention`` calls it for the keys that `update` returned. Also keeps the last queries.
        """
        refuse_masks(mask)
        cache = self.cache
        cache.reached += 1
        cache.keep_queries(self.index, query)
        weight = None if cache.plain else cache.log_weight[self.index]  # [Hkv, S * C]
        if self.window is not None and cache.exceeds(self.window):
            weight = cache.log_weight[self.index].masked_fill(cache.left_behind(self.window), -torch.inf)
        if cache.cu_rows is not None:
            q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, Hq, D], [S * C, Hkv, D]
            lengths = {"max_seqlen_q": cache.longest, "max_seqlen_k": cache.capacity, "key_ranges": cache.ranges}
            options["key_log_weight"] = weight
            out = flash_attention_varlen(q, k, v, cache.cu_rows, cache.cu_columns, **lengths, **options)
            return out.transpose(0, 1)[None]
        size, rows = len(cache.members), cache.rows
        k, v = (x[0].unflatten(1, (size, -1)).transpose(0, 1) for x in (key, value))  # [S, Hkv, C, D]
        q = query[0].transpose(0, 1)[:, :, None]  # [A, Hq, 1, D]
        if rows is not None:  # sessions that have ended see nothing
            q = q.new_zeros(size, *q.shape[1:]).index_copy_(0, rows, q)
        if weight is not None:
            weight = weight.unflatten(1, (size, -1)).transpose(0, 1)  # [S, Hkv, C]
        out = flash_attention(q, k, v, key_ranges=cache.ranges, key_log_weight=weight, **options)
        if rows is not None:
            out = out.index_select(0, rows)
        return out[:, :, 0].transpose(0, 1)[None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.kv.shape[3], 0

    def get_seq_length(self) -> int:
        return self.cache.kv.shape[3] - len(self.cache.columns)

    def get_max_length(self) -> int:
        return self.cache.kv.shape[3]

    def get_max_cache_shape(self) -> int:
        return self.cache.kv.shape[3]


class BatchCache(Cache):
    """The slots of S sessions with C columns each, in one buffer.

    The members' own tensors become views of it: copied once, and not at all where they are such views already.

    Attributes:
        kv: ``[2, L, Hkv, S * C, D]``. log_weight: float32 ``[L, Hkv, S * C]``. token: int64 ``[S * C]``.
        columns: int64 [T], where the tokens being run go.
        ranges: int32, the columns that each of their rows sees within its session; ``[S, 1, 1, 2]``, or [T, 2] packed.
        rows: int64 [A], the sessions that have a row; None: all. cu_rows: int32 [S + 1] of packed rows; None: one each.
        plain: see `MegaContextCache`.
    """

    def __init__(self, members: list[MegaContextCache]) -> None:
        first = members[0]
        super().__init__(layers=[BatchLayer(self, index, window) for index, window in enumerate(first.windows)])
        self.members, self.capacity, self.device = members, first.capacity, first.device
        self.kv, self.log_weight, self.token, self.queries = _shared(members)
        size = len(members)
        self.cu_columns = torch.arange(size + 1, dtype=torch.int32, device=self.device) * self.capacity
        self._first_query = np.cumsum([0] + [member.observe for member in members])[:-1]
        self._slots: list[np.ndarray] = []
        self._left_behind: dict[int, Tensor] = {}
        self.cu_rows: Tensor | None = None
        self.rows: Tensor | None = None

    def open(self, tokens: list[np.ndarray]) -> list[np.ndarray]:
        """Reserve columns for slots of each session that stand for ``tokens``, int64 [n] (n = 0: none); the slots."""
        self._slots, self._left_behind, self.reached = [], {}, 0
        try:
            for member, new in zip(self.members, tokens, strict=True):
                self._slots.append(member.reserve(new) if len(new) else np.empty(0, np.int64))
        except BaseException:
            self.release()
            raise
        counts = np.array([len(new) for new in tokens])
        active = np.flatnonzero(counts)
        of_row = np.repeat(np.arange(len(counts)), counts)
        column = np.concatenate(self._slots)
        self.columns = self._put(column + of_row * self.capacity)
        self.log_weight.index_fill_(2, self.columns, 0.0)
        self.token.index_copy_(0, self.columns, self._put(np.concatenate(tokens)))
        self.plain = all(self.members[i].plain for i in active)
        self.longest, self._counts = int(counts.max()), counts
        ends = np.array([member.end for member in self.members])
        if self.longest == 1:  # a single token stands anywhere and sees every slot
            high = np.where(counts > 0, ends, 0)
            self.ranges = self._put(np.stack((np.zeros_like(high), high), -1)[:, None, None], torch.int32)
            self.rows = None if len(active) == len(counts) else self._put(active)
            self.cu_rows = None
        else:  # several stand in the last columns, in order
            high = np.where(counts[of_row] > 1, column + 1, ends[of_row])
            self.ranges = self._put(np.stack((np.zeros_like(high), high), -1), torch.int32)
            self.cu_rows = self._put(np.append(0, counts.cumsum()), torch.int32)
        seeing = [i for i in active if self.members[i].observe]
        self._query_rows = self._put(self._first_query[seeing] + [self.members[i].query_at for i in seeing])
        self._queried = None if len(seeing) == len(active) else self._put(np.flatnonzero(np.isin(active, seeing)))
        return self._slots

    def close(self) -> None:
        """After a forward: its rows' queries count; RuntimeError if some layer's attention went another way."""
        check_reached(self.reached, len(self.layers))
        for member, count in zip(self.members, self._counts.tolist(), strict=True):
            member.count_queries(count)

    def release(self) -> None:
        """Free the columns again that `open` reserved."""
        for member, slots in zip(self.members, self._slots, strict=False):
            member.release(slots)
            member.lose_queries(len(slots))

    def exceeds(self, window: int) -> bool:
        """Whether a session with a row has tokens that a window of so many does not reach."""
        return any(m.tokens_seen > window for m, n in zip(self.members, self._counts, strict=True) if n)

    def left_behind(self, window: int) -> Tensor:
        """bool [1, S * C]: columns that the one row of their session does not see through the window."""
        if window not in self._left_behind:
            last = self._put(np.array([member.tokens_seen - 1 for member in self.members]))
            token = self.token.unflatten(0, (len(self.members), -1))
            self._left_behind[window] = (last[:, None] - token >= window).flatten()[None]
        return self._left_behind[window]

    def keep_queries(self, layer: int, query: Tensor) -> None:
        """Keep each session's last queries of ``query`` [1, Hq, T, D] in its ring."""
        if self.cu_rows is None:
            new = query[0] if self._queried is None else query[0].index_select(1, self._queried)
            self.queries[layer].index_copy_(1, self._query_rows, new.detach())
            return
        first = 0
        for member, count in zip(self.members, self._counts.tolist(), strict=True):
            if count:
                member.keep_queries(layer, query[:, :, first : first + count])
            first += count

    def _put(self, values: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, dtype)


@torch.inference_mode(False)  # buffers made within it could not be written to outside
def _shared(members: list[MegaContextCache]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kv, log_weight, token and queries of all members in one tensor each, of which theirs become views."""
    capacity, dim = members[0].capacity, members[0].kv.shape[4]
    base = members[0].kv._base
    if (
        base is not None
        and base.shape[3] == len(members) * capacity
        and all(m.kv._base is base and m.kv.storage_offset() == i * capacity * dim for i, m in enumerate(members))
    ):  # a batch of these sessions, in this order, ran before
        return tuple(getattr(members[0], name)._base for name in SHARED)
    big = []
    for name, axis in SHARED.items():
        parts = [getattr(member, name) for member in members]
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        big.append(parts[0].new_empty(shape))
    del parts
    place = dict.fromkeys(SHARED, 0)
    for member in members:
        views = []
        for (name, axis), whole in zip(SHARED.items(), big, strict=True):
            size = getattr(member, name).shape[axis]
            views.append(whole.narrow(axis, place[name], size))
            place[name] += size
        member.adopt(*views)
    return tuple(big)


@torch.no_grad()
def generate(
    addon: MegaContext,
    sessions: Sequence[MegaContextSession],
    input_ids: Sequence[Any] | None = None,
    *,
    streamers: Sequence[Any] | None = None,
    refocus: bool = True,
    **options: Any,
) -> list[Tensor]:
    """Continue several histories of one model at once, one forward for all of them at each token.

    Each session keeps its own working context, makes room, refocuses and ends (by an end-of-sequence token, a stopping
    criterion or a length) by itself, and gets what it would get alone, up to rounding; sampling draws from one random
    stream, so draws differ from those of sessions run one after the other.

    Args:
        addon: ``model.megacontext``. sessions: different ones of it.
        input_ids: token ids for each session, ``[n]`` or ``[1, n]`` or None; None: all go on.
        streamers: one for each session, or None.
        refocus, options: as for one session; see `hf_flash_mc.megacontext.decode.generate`.

    Returns:
        The new token ids of each session, ``[1, n]``.

    Raises:
        ValueError: what is no list of different sessions of this model, or not as many texts; and, with
            NotImplementedError, what one session raises, for all sessions before anything changed.
    """
    sessions = _checked(addon, sessions)
    texts = _each(sessions, "input_ids", input_ids)
    out = _each(sessions, "streamers", streamers)
    if options.pop("streamer", None) is not None:
        raise ValueError("streamer: expected streamers=[...], one for each session")
    runs = [
        Continuation(session, ids, streamer=streamer, refocus=refocus, **options)
        for session, ids, streamer in zip(sessions, texts, out, strict=True)
    ]
    cache = BatchCache([session.cache for session in sessions])
    _ingest(sessions, cache, [run.prompt for run in runs])
    for run in runs:
        run.begin()
    while any(not run.done for run in runs):
        # before anything of this step is kept, so that an error leaves each history whole
        active = [i for i, run in enumerate(runs) if not run.done]
        tokens = [torch.empty(0, dtype=torch.int64)] * len(runs)
        for i in active:
            tokens[i] = runs[i].choose().cpu()
        for i in active:
            sessions[i].before_step(refocus)
        _forward(sessions, cache, tokens)
        for i in active:
            sessions[i].stepped()
            runs[i].check()
    return [run.end() for run in runs]


def _checked(addon: MegaContext, sessions: Any) -> list[MegaContextSession]:
    from .session import MegaContextSession

    found = [sessions] if isinstance(sessions, MegaContextSession) else list(sessions)
    if not found or not all(isinstance(session, MegaContextSession) for session in found):
        kinds = sorted({type(session).__name__ for session in found})
        raise ValueError(f"sessions: expected a list of sessions, got {kinds or found}")
    if len({id(session) for session in found}) < len(found):
        raise ValueError("sessions: expected different ones, got one twice; it cannot be continued in two ways at once")
    if any(session.addon is not addon for session in found):
        raise ValueError("sessions: expected those of one model, got another one's; run each model's by themselves")
    return found


def _each(sessions: list[MegaContextSession], name: str, given: Sequence[Any] | None) -> list[Any]:
    if given is None:
        return [None] * len(sessions)
    if len(given) != len(sessions):
        raise ValueError(f"{name}: expected one for each of {len(sessions)} sessions, got {len(given)}")
    return list(given)


def _ingest(sessions: list[MegaContextSession], cache: BatchCache, texts: list[Tensor]) -> None:
    """Read a text into each session, in the chunks that it would take alone."""
    if any(window is not None for window in sessions[0].cache.windows):
        for session, ids in zip(sessions, texts, strict=True):  # packed rows know no windows over unordered slots
            session.ingest(ids)
        return
    left = texts
    while any(len(ids) for ids in left):
        counts = [
            session.make_room(min(session.chunk_size, len(ids))) if len(ids) else 0
            for session, ids in zip(sessions, left, strict=True)
        ]
        _forward(sessions, cache, [ids[:count] for ids, count in zip(left, counts, strict=True)])
        for session, count in zip(sessions, counts, strict=True):
            if count:
                session.ingested(count)
        left = [ids[count:] for ids, count in zip(left, counts, strict=True)]


def _forward(sessions: list[MegaContextSession], cache: BatchCache, ids: list[Tensor]) -> None:
    """Run each session's new tokens [n] (n = 0 for none) over its working context, all in one row."""
    first = sessions[0]
    for session in sessions:
        session.check_runs()
    none = np.empty(0, np.int64)
    places = [s.places_for(len(new)) if len(new) else (none, none) for s, new in zip(sessions, ids, strict=True)]
    slots = cache.open([tokens for _, tokens in places])
    active = [i for i, new in enumerate(ids) if len(new)]
    row = torch.cat(ids)[None].to(first.device)
    last = torch.tensor([len(ids[i]) for i in active]).cumsum(0) - 1
    positions = np.concatenate([position for position, _ in places])
    try:
        with first.stats.time("forward"), evaluating(first.model):
            out = first.model(
                input_ids=row, **first.call_arguments(cache, positions), logits_to_keep=last.to(first.device)
            )
        cache.close()
    except BaseException:
        cache.release()
        raise
    for i, logits in zip(active, out.logits[0], strict=True):
        sessions[i].took(ids[i], slots[i], logits)
