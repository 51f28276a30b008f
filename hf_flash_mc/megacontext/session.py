"""MegaContextSession: one history far longer than the window, read, refocused and continued by a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_flash_mc.patches.attention import KEY

from .allocator import AllocatorState, FocusAllocator
from .attach import MegaContext, cache_argument, evaluating, layer_windows
from .cache import MegaContextCache
from .embedding import EmbeddingMemory
from .entries import EntryEmbeddings
from .focus import Focus
from .io import STATE
from .lensnet import GistMassLens
from .memory import KVMemory, Memory
from .recall import RecallIndex, open_store, pairs_of
from .telemetry import Telemetry
from .working_context import Change, Edits, WorkingContext

CHUNK = 512  # tokens of one forward while a text is read
OBSERVED = 64  # last queries whose attention scores the working context


class MegaContextSession(Focus):
    """A history: its tree, the working context the model attends to, and the model's view of it in a cache.

    Args:
        addon: ``model.megacontext``.
        folder: where the tree's files are made; None keeps the history in host memory.
        durable: the tree's appends return only when the disk has them.
        chunk_size: tokens of one forward of `ingest`.
        observe: last queries whose attention to each slot the lens is given.
        seed: of the random lens.
        resume: tokens of the tree that a saved session has; only `load_session` knows.
        recall: keep a `RecallIndex`, as the recall lens needs; None: if the lens reads one. A list: of these heads.

    Attributes:
        working_context, tree, cache: see their classes. One session is one history: batch size 1, not thread-safe.
    """

    @torch.inference_mode(False)  # tensors made within it could not be written to outside
    def __init__(
        self,
        addon: MegaContext,
        folder: str | Path | None = None,
        *,
        durable: bool = False,
        chunk_size: int = CHUNK,
        observe: int = OBSERVED,
        seed: int = 0,
        resume: int | None = None,
        recall: bool | list[tuple[int, int]] | None = None,
    ) -> None:
        if not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size: expected an int of at least 1, got {chunk_size!r}")
        if not isinstance(observe, int) or observe < 0:
            raise ValueError(f"observe: expected an int of at least 0, got {observe!r}")
        if addon.config.recent_tokens < 2:
            raise ValueError(
                f"recent_tokens: a session needs at least 2, got {addon.config.recent_tokens}: the last tokens are run "
                "again when what they see was edited; set it in the MegaContextConfig"
            )
        self.addon, self.model, self.config = addon, addon.base, addon.config
        addon.follow_base()
        self.chunk_size, self.durable = chunk_size, durable
        self.folder = None if folder is None else Path(folder).absolute()  # also after os.chdir
        text = self.model.config.get_text_config(decoder=True)
        self.head_dim = self.config.head_dim or 0  # known since the add-on was attached
        self.cache = MegaContextCache(
            self.config.w_max,
            text.num_attention_heads,
            self.config.num_kv_heads or 0,
            self.head_dim,
            layer_windows(self.model),
            dtype=self.model.dtype,
            device=self.device,
            observe=observe,
        )
        if resume is None and self.folder is not None and (self.folder / STATE).exists():
            raise ValueError(  # its history may be too short to be in the tree
                f"folder: {self.folder} holds a saved session; choose an empty folder, or go on with it by "
                "model.megacontext.load_session(folder)"
            )
        self.memory = self._make_memory(durable)
        held = self.memory.committed
        self.scaling, self._softcap = _attention_scales(self.model, self.head_dim)
        try:
            if resume is not None:
                self.memory.truncate(resume)
            elif held:
                raise ValueError(
                    f"folder: {self.folder} holds a history of {held} tokens; choose an empty folder, or "
                    "model.megacontext.load_session(folder) for a saved session"
                )
            if recall is None:
                recall = addon.lens.reads == "recall"
            if recall is not False:
                self._keep_recall(None if recall is True else recall)
        except BaseException:
            self.memory.close()
            raise
        self.working_context = WorkingContext(self.config)
        self.allocator, self.allocation = FocusAllocator(self.config), AllocatorState.initial()
        self.stats = Telemetry()
        self.generator = torch.Generator().manual_seed(seed)
        self._closed, self._begun_on = False, self._home()
        self._logits: Tensor | None = None  # [V], what follows the history; None after it changed
        self._since_refocus = 0
        self._cache_argument = cache_argument(self.model)
        none = np.empty(0, np.int64)
        self.last_scores = none, none.astype(np.int8), none.astype(np.float32)  # start, lod, score [N]
        self._by_mass = GistMassLens(self.config)
        self._entries: EntryEmbeddings | None = None  # made for trained lenses

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def tree(self) -> Any:
        return self.memory.tree

    def __len__(self) -> int:
        """Tokens of history."""
        return self.working_context.total

    def tokens(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Token ids [n] of the history, int64."""
        self.check_open()
        start, stop, _ = slice(start, stop).indices(len(self))
        stop = max(start, stop)
        split = self.memory.committed
        early = self.tree.tokens(min(start, split), min(stop, split))
        return torch.cat((early, self.memory.tail[max(start - split, 0) : max(stop - split, 0)]))

    @torch.no_grad()
    def ingest(
        self, input_ids: Any, *, return_logits: bool = False, refocus: bool = False, progress: bool = False
    ) -> Tensor | None:
        """Read tokens into the history, in chunks; what no longer fits the budget is collapsed on the way.

        Args:
            input_ids: token ids ``[n]`` or ``[1, n]``, or a list.
            return_logits: return the model's logits after each token, ``[n, V]`` on the CPU.
            refocus: also refocus before a chunk, ``refocus_interval`` tokens after the last time or later.
            progress: show a bar.

        Raises:
            ValueError: ids outside the vocabulary, or (positions="absolute") past the model's range; before anything
                changed. BudgetError: the history cannot be held in ``w_max`` slots with this ``max_lod``.
        """
        ids = self._checked_ids(input_ids)
        self._check_range(len(ids))
        collected = []
        bar = _progress_bar(len(ids)) if progress else None
        done = 0
        while done < len(ids):
            if refocus and self._since_refocus >= self.config.refocus_interval:  # of what earlier calls read, too
                self._refocus_once()
            count = self.make_room(min(self.chunk_size, len(ids) - done))
            last = done + count == len(ids)
            logits = self._forward(ids[done : done + count], keep=count if return_logits else int(last))
            if return_logits:
                collected.append(logits.cpu())
            done += count
            self.ingested(count)
            if bar is not None:
                bar.update(count)
        if bar is not None:
            bar.close()
        return torch.cat(collected) if return_logits and collected else None

    def ingested(self, count: int) -> None:
        """``count`` tokens of a text were read."""
        if self.folder is not None:  # what is on disk survives a crash; in memory it would be a copy for nothing
            self._commit(len(self) - max(self.config.recent_tokens, self.chunk_size))
        self.stats.ingested += count
        self._since_refocus += count

    def generate(self, input_ids: Any = None, **options: Any) -> Tensor:
        """Continue the history; see `hf_flash_mc.megacontext.decode.generate`. The new token ids [1, n]."""
        from .decode import generate

        return generate(self, input_ids, **options)

    def apply(self, edits: Edits, *, refocus: bool = False) -> None:
        """Apply edits to working context and cache; ValueError before anything changes where they are not legal."""
        self.check_open()
        if not isinstance(edits, Edits):
            raise TypeError(f"edits: expected Edits.of([(kind, start, lod), ...]), got {type(edits).__name__}")
        if not len(edits):
            return
        wc = self.working_context
        collapsed = edits.kind < 0
        if collapsed.any():
            lods, starts = edits.lod[collapsed].astype(np.int64), edits.start[collapsed]
            self._commit(int((starts + self.config.block_size**lods).max()))
        after = wc.copy()
        change = after.apply(edits, self.tree.version)
        with self.stats.time("patch"):
            written = self.memory.apply(wc, after, change)
        self.working_context = after
        self._logits = None
        self.stats.note(after, edits, written, refocus)

    def restore(self, context: WorkingContext) -> None:
        """Show what ``context`` shows, a copy of an earlier working context (``session.working_context.copy()``).

        Tokens read since then stay, as tokens. ValueError where it does not fit the history or the budget.
        """
        self.check_open()
        wc = self.working_context
        later = wc.total - context.total
        if later < 0 or wc.lod[len(wc) - later :].any():
            raise ValueError(
                f"context: expected one of at most {wc.total} tokens, and only tokens after it, got {context.total}"
            )
        after = context.copy()
        after.append(later)
        top = self.config.max_lod + 1
        mine, wanted = wc.start * top + wc.lod, after.start * top + after.lod
        gone, came = np.flatnonzero(~np.isin(mine, wanted)), np.flatnonzero(~np.isin(wanted, mine))
        if not len(gone):
            return
        self._commit(int(after.end[came][after.lod[came] > 0].max(initial=0)))
        change = Change(wc.start[gone], wc.lod[gone], gone, after.start[came], after.lod[came], came)
        with self.stats.time("patch"):
            self.memory.apply(wc, after, change)
        self.working_context, self._logits = after, None

    @torch.no_grad()
    def reread(self, count: int) -> None:
        """Run the last ``count`` tokens again, in the working context as it is now.

        ValueError where they are in the tree already: at least the last ``recent_tokens`` tokens never are. If a
        forward fails, the session is as it was before.
        """
        self._check_back(count)
        total, cache, logits = len(self), self.cache, self._logits
        payload, queries = cache.read(self.memory.slots[-count:]), cache.last_queries()
        ids = self._take_back(count)
        try:
            for first in range(0, count, self.chunk_size):
                part = ids[first : first + self.chunk_size]
                self._forward(part, keep=int(first + len(part) == count))
        except BaseException:
            if len(self) > total - count:
                self._take_back(len(self) - (total - count))
            slots = cache.take(count)
            cache.write(slots, payload, np.arange(total - count, total))
            cache.set_queries(queries)
            self.took(ids, slots, logits)
            raise

    @torch.no_grad()
    def step(self, token: Tensor, refocus: bool = True) -> None:
        """One more token [1] at the end of the history; makes room and refocuses when it is time."""
        self.before_step(refocus)
        self._forward(token, keep=1)
        self.stepped()

    def before_step(self, refocus: bool) -> None:
        """Refocus if it is time, and see that one more token fits."""
        interval = self.config.refocus_interval
        if refocus and self._since_refocus >= interval and (self.working_context.lod > 0).any():
            self._refocus_once()
        if len(self.working_context) >= self.config.w_max:
            self.make_room(interval)

    def stepped(self) -> None:
        """One token was generated."""
        self.stats.generated += 1
        self._since_refocus += 1

    def next_logits(self) -> Tensor:
        """Logits [V] of the token after the history; the last token is run again where edits made them stale."""
        if not len(self):
            raise ValueError("the history is empty: ingest something, or give generate its input_ids")
        if self._logits is None:
            if not len(self.memory.tail):
                raise ValueError(
                    "the history was taken back to what is in the tree, or its end was collapsed by hand, and neither "
                    "is run again: ingest something, or give generate its input_ids"
                )
            self.reread(1)
        assert self._logits is not None
        return self._logits.clone()  # a caller or a logits processor may write into it

    def rewind(self, count: int) -> None:
        """Take the last ``count`` tokens back, as if they had never been read; see `reread` for which can be."""
        self._take_back(count)
        self._logits = None

    def telemetry(self) -> dict[str, Any]:
        """Counters and times by name; see `Telemetry.summary`."""
        return self.stats.summary(self.working_context, self.config.w_max)

    def plot(self, path: str | Path | None = None) -> Any:
        """A picture of the working context over the history; see `plots.plot_session`."""
        from .plots import plot_session

        return plot_session(self, path)

    def save(self, folder: str | Path) -> None:
        """Write all of the session into a folder, for ``model.megacontext.load_session``."""
        from .io import save_session

        self.check_open()
        save_session(self, folder)

    def close(self) -> None:
        """Close the tree's files, or free its memory; the session cannot go on."""
        self._closed = True
        self.memory.close()

    def check_invariants(self) -> None:
        """The eight rules of the working context, and that the cache holds exactly its slots."""
        self.check_open()
        wc, slots = self.working_context, self.memory.slots
        wc.check_invariants(self.tree)
        live = np.flatnonzero(self.cache.live)
        if len(slots) != len(wc) or not np.array_equal(np.sort(slots), live):
            raise RuntimeError(f"cache: expected {len(wc)} slots of the working context, got {len(live)} live columns")
        if not np.array_equal(self.cache.gist[slots], wc.lod > 0):
            raise RuntimeError("cache: gists stand where tokens should, or the other way round")

    def _keep_recall(self, heads: list[tuple[int, int]] | None) -> None:
        if self.config.backend != "kv":
            raise NotImplementedError(
                'lens={"kind": "recall"}: the embedding back end keeps no keys to search; use the "kv" back end, or a '
                'lens such as "gist_mass"'
            )
        heads = self.addon.recall_heads() if heads is None else heads
        text = self.model.config.get_text_config(decoder=True)
        groups = text.num_attention_heads // self.config.num_kv_heads
        heads = [(int(layer), int(head)) for layer, head in heads]
        sizes = len(self.cache.layers), text.num_attention_heads
        if not heads or any(not (0 <= layer < sizes[0] and 0 <= head < sizes[1]) for layer, head in heads):
            raise ValueError(
                f"recall: expected (layer, query head) pairs of {sizes[0]} layers with {sizes[1]} heads, got {heads}; "
                "None takes those that copy best"
            )
        store = open_store(self.config, self.folder, len(pairs_of(heads, groups)), self.durable)
        index = RecallIndex(heads, groups, self.scaling, self.addon.rope, self.config.block_size, store, self.device)
        assert isinstance(self.memory, KVMemory)
        self.memory.keep_recall(index)

    def _forward(self, ids: Tensor, keep: int) -> Tensor:
        """Run new tokens [n] on the CPU over the working context; logits of the last ``keep``, [keep, V]."""
        positions, tokens = self.places_for(len(ids))
        slots, logits = self._run({"input_ids": ids[None].to(self.device)}, positions, tokens, max(keep, 1))
        self.took(ids, slots, logits[-1] if keep else None)
        return logits[len(logits) - keep :]

    def places_for(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Make columns and positions ready for ``count`` new tokens: their positions, and numbers in the history."""
        memory = self.memory
        if not memory.numbering.fits(count):
            memory.renumber(self.working_context, count)
            self.stats.renumberings += 1
        if self.cache.needs_compaction(count):
            memory.slots = self.cache.compact()[memory.slots]
        first = memory.numbering.next
        return np.arange(first, first + count), np.arange(len(self), len(self) + count)

    def took(self, ids: Tensor, slots: np.ndarray, logits: Tensor | None) -> None:
        """New tokens [n] were run into columns ``slots`` [n]; logits [V]: what follows them."""
        memory = self.memory
        self.working_context.append(len(ids))
        memory.numbering.append(len(ids))
        memory.slots = np.concatenate((memory.slots, slots))
        memory.tail = torch.cat((memory.tail, ids))
        self._logits = logits

    def check_runs(self) -> None:
        """RuntimeError where the session is closed, or the model is not what it began on, or its attention not ours."""
        self.check_open()
        if not self.addon._hold:
            raise RuntimeError(
                "the session's megacontext was detached from the model: save the session, and load it after "
                "attach_megacontext"
            )
        if self._home() != self._begun_on:
            then, now = (f"{dtype} on {device}" for dtype, device in (self._begun_on, self._home()))
            raise RuntimeError(
                f"the model was cast or moved since the session began (then {then}, now {now}): what it read does not "
                "fit; begin another session, or cast and move the model first"
            )
        if not self.addon.enabled or self.model.config._attn_implementation != KEY:
            raise RuntimeError(
                "the model does not run mc_attention now (inside disable(), or unpatched): gists would be ignored"
            )

    def check_open(self) -> None:
        """RuntimeError after `close`."""
        if self._closed:
            raise RuntimeError(
                "the session is closed; begin another, or model.megacontext.load_session(folder) where it was saved"
            )

    def _home(self) -> tuple[torch.dtype, torch.device]:
        weight = self.model.get_input_embeddings().weight
        return weight.dtype, weight.device

    def call_arguments(self, cache: Any, positions: np.ndarray) -> dict[str, Any]:
        """What the model's forward is given beside tokens; positions: of a row of tokens, int64 [n]."""
        return {
            "position_ids": torch.from_numpy(positions)[None].to(self.device),
            # four dimensions: passed on as it is; the cache says what is seen (cache.py)
            "attention_mask": torch.zeros(1, 1, len(positions), 2, dtype=torch.int32, device=self.device),
            "use_cache": True,
            self._cache_argument: cache,
        }

    def _run(
        self, inputs: dict[str, Tensor], positions: np.ndarray, tokens: np.ndarray, keep: int
    ) -> tuple[np.ndarray, Tensor]:
        """Run new slots, which stand for ``tokens`` [n], at ``positions`` [n]; their columns, and logits [keep, V]."""
        self.check_runs()
        count, cache = len(tokens), self.cache
        slots = cache.open(tokens)
        try:
            with self.stats.time("forward"), torch.no_grad(), evaluating(self.model):
                out = self.model(
                    **inputs,
                    **self.call_arguments(cache, positions),
                    logits_to_keep=keep,
                )
            cache.close(count)
        except BaseException:
            cache.release(slots)
            cache.lose_queries(count)
            raise
        return slots, out.logits[0, out.logits.shape[1] - keep :]

    def _make_memory(self, durable: bool) -> Memory:
        gist = self.addon.gist
        if self.config.backend == "kv":
            return KVMemory(self.config, self.cache, gist, self.addon.rope, self.folder, durable=durable)
        return EmbeddingMemory(
            self.config,
            self.cache,
            gist,
            self.folder,
            embed=self._embed,  # methods, so that a copy of the session has its own
            run=self._run_embeddings,
            chunk_size=self.chunk_size,
            durable=durable,
        )

    def _embed(self, ids: Tensor) -> Tensor:
        """Input embeddings [n, d] of token ids [n]."""
        return self.model.get_input_embeddings()(ids.to(self.device)).detach()

    def _run_embeddings(self, embeddings: Tensor, positions: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Run slots that are embeddings [n, d]; their columns."""
        return self._run({"inputs_embeds": embeddings[None]}, positions, tokens, 1)[0]

    def __copy__(self) -> MegaContextSession:
        raise TypeError("a session shares its cache with no other; use copy.deepcopy, or save it and load_session")

    def _commit(self, upto: int) -> None:
        """Put tokens before number ``upto`` into the tree."""
        self.check_open()
        count = min(upto, len(self)) - self.memory.committed
        if count > 0:
            with self.stats.time("commit"), torch.autocast(self.device.type, enabled=False):
                self.memory.commit(self.memory.committed + count, self.memory.tail, self.working_context)
            self.memory.tail = self.memory.tail[count:]

    def _check_back(self, count: int, name: str = "count") -> None:
        self.check_open()
        if not isinstance(count, int | np.integer) or not 1 <= count <= len(self.memory.tail):
            raise ValueError(
                f"{name}: expected 1 to {len(self.memory.tail)} (the last tokens, not in the tree yet), got {count!r}"
            )

    def _take_back(self, count: int) -> Tensor:
        """Remove the last ``count`` tokens; their ids."""
        self._check_back(count)
        ids = self.memory.tail[-count:].clone()
        self.cache.release(self.memory.slots[-count:])
        self.cache.forget_queries(count)
        self.memory.slots = self.memory.slots[:-count]
        self.memory.numbering.drop(count)
        self.working_context.drop(count)
        self.memory.tail = self.memory.tail[:-count]
        return ids

    def _checked_ids(self, input_ids: Any, name: str = "input_ids") -> Tensor:
        try:
            ids = torch.as_tensor(input_ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{name}: expected token ids [n] or [1, n], as a tensor, an array or a list, got "
                f"{type(input_ids).__name__}; of what a tokenizer returns give .input_ids"
            ) from error
        if not ids.numel():
            ids = ids.to(torch.int64)  # an empty list is taken for floats
        if ids.dim() == 2 and ids.shape[0] > 1:
            raise NotImplementedError(
                f"{name}: {ids.shape[0]} histories in one batch; a session is one history: open a session for each"
            )
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(
                f"{name}: expected whole numbers [n] or [1, n] (a session is one history), got {list(ids.shape)} "
                f"{ids.dtype}"
            )
        ids = ids.to("cpu", torch.int64)
        size = self.model.get_input_embeddings().weight.shape[0]  # it may have been resized
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(
                f"{name}: expected ids from 0 to {size - 1} (the model's vocabulary), got {int(ids.min())} to "
                f"{int(ids.max())}; use this model's tokenizer"
            )
        return ids

    def _check_range(self, count: int) -> None:
        self.memory.numbering.check(count)


def _attention_scales(model: Any, head_dim: int) -> tuple[list[float], float | None]:
    """Each layer's factor on q.k, and the soft cap of logits."""
    modules = [
        m for m in model.modules() if hasattr(m, "_mc_record") and isinstance(getattr(m, "layer_idx", None), int)
    ]
    modules.sort(key=lambda m: m.layer_idx)
    return [float(getattr(m, "scaling", None) or head_dim**-0.5) for m in modules], next(
        (float(m.attn_logit_softcapping) for m in modules if getattr(m, "attn_logit_softcapping", None)), None
    )


def _progress_bar(total: int) -> Any:
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    return tqdm(total=total, unit="token", unit_scale=True, desc="ingest")
