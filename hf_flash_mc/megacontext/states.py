"""The states of a window that `evaluate` compares: whole, dropped, all gists, and gists expanded by each lens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attach import attach_megacontext, detach_megacontext, layer_windows
from .config import MegaContextConfig
from .counterfactual import CounterfactualScorer
from .lensnet import GistMassLens, RandomLens, RecallLens, RecencyLens, TrainedLens
from .prefix import RecordingCache, run
from .session import MegaContextSession
from .working_context import COLLAPSE, EXPAND, Edits

TARGETS = 64  # next tokens; the oracle sees the first half, the second half is judged
LENSES: dict[str, Any] = {
    "recency": RecencyLens,
    "random": RandomLens,
    "gist mass": GistMassLens,
    "recall": RecallLens,
}


@dataclass
class Setting:
    """What one pass over the windows measures, and how its states are called.

    Args:
        block: tokens of a gist. expansions: gists that each lens expands; each number is a state of its own.
        sink, tail: first and last tokens of the context that stay tokens.
        lenses: name -> function from config to lens; None: `LENSES`, those that the back end has.
        oracle: also expand what the scorer measures as best for the first half of the targets.
        gist: settings of an untrained GistNet. heads: a folder of trained heads instead.
        baselines: also measure the whole window and dropping.
        ratio, label: put before names: "16:1 ", and "trained " where gists are in a state.
    """

    block: int = 32
    expansions: tuple[int, ...] = (4,)
    sink: int = 32
    tail: int = 64
    lenses: dict[str, Any] | None = None
    oracle: bool = False
    gist: dict[str, Any] = field(default_factory=dict)
    heads: str | Path | None = None
    baselines: bool = True
    ratio: str = ""
    label: str = ""

    def name(self, state: str, expansions: int | None = None) -> str:
        """As it stands in rows and tables."""
        label = "" if state in ("whole", "drop") else self.label
        several = expansions is not None and len(self.expansions) > 1
        return f"{self.ratio if state != 'whole' else ''}{label}{state}{f' x{expansions}' if several else ''}"

    def attach(self, model: Any, length: int) -> None:
        """Give the model an add-on for windows of ``length`` tokens, with the trained heads if any."""
        held = None if self.heads is None else heads_config(self.heads)
        config = MegaContextConfig(
            block_size=self.block,
            max_lod=1 if held is None else held.max_lod,
            w_max=max(length + 64, 4 * self.block + self.tail + self.sink),
            sink_tokens=self.sink,
            recent_tokens=self.tail,
            backend="kv" if held is None else held.backend,
            gist=self.gist if held is None else held.gist,
            lens={"kind": "gist_mass"} if held is None else held.lens,
        )
        attach_megacontext(model, config)
        if self.heads is not None:
            from .io import WEIGHTS, _check_weights, _read_tensors

            weights, path = _read_tensors(Path(self.heads) / WEIGHTS), Path(self.heads) / WEIGHTS
            try:
                _check_weights(path, weights, model.megacontext.state_dict())
                model.megacontext.load_state_dict(weights)
            except BaseException:
                detach_megacontext(model)
                raise

    def chosen_lenses(self, addon: Any) -> dict[str, Callable[[], Any]]:
        """Lenses to compare, and the add-on's own one where it is trained."""
        made: dict[str, Callable[[], Any]] = {
            name: partial(make, addon.config)
            for name, make in (LENSES if self.lenses is None else self.lenses).items()
            if addon.config.backend == "kv" or getattr(make, "reads", "mass") != "recall"
        }
        if isinstance(addon.lens, TrainedLens):
            own = addon.lens
            made["lens"] = lambda: own
        return made


def heads_config(folder: str | Path) -> MegaContextConfig:
    """The config of saved heads."""
    from .io import CONFIG, FORMAT, _read_json

    values = _read_json(Path(folder) / CONFIG, FORMAT)
    values.pop("format")
    return MegaContextConfig.from_dict(values)


@contextmanager
def hidden_gists(session: MegaContextSession) -> Iterator[None]:
    """Within: gists have no weight, as if their text had been dropped."""
    cache = session.cache
    columns = torch.from_numpy(np.flatnonzero(cache.gist)).to(cache.device)
    kept = cache.log_weight[:, :, columns].clone()
    cache.log_weight[:, :, columns] = -torch.inf
    try:
        yield
    finally:
        cache.log_weight[:, :, columns] = kept


@torch.no_grad()
def target_losses(session: MegaContextSession, targets: Tensor) -> np.ndarray:
    """Loss of each target token [n] after the history; the history is left as it was."""
    last = session.tokens(len(session) - 1)
    session.rewind(1)  # the last token too sees the working context as it is now, in the same forward
    logits = session.ingest(torch.cat((last, targets[:-1])), return_logits=True)
    assert logits is not None
    session.rewind(len(targets) - 1)
    return _losses(logits, targets)


def _losses(logits: Tensor, targets: Tensor) -> np.ndarray:
    return F.cross_entropy(logits.float().cpu(), targets, reduction="none").double().numpy()


def collapse_all(session: MegaContextSession) -> None:
    """Every whole block between the sink and the recent tokens becomes a gist of level 1."""
    config = session.config
    first = -(-config.sink_tokens // config.block_size) * config.block_size
    starts = np.arange(first, len(session) - config.recent_tokens - config.block_size + 1, config.block_size)
    fine = session.working_context.lod[np.searchsorted(session.working_context.start, starts)] == 0
    session.apply(Edits.of([(COLLAPSE, int(start), 1) for start in starts[fine]]))


def expand_best(session: MegaContextSession, scores: Tensor | np.ndarray, count: int) -> None:
    """Expand the ``count`` gists that score highest ([N] scores), the most recent of equals.

    Not a refocus, which expands only what scores above its threshold: lenses are compared at an equal budget.
    """
    wc, scores = session.working_context, np.asarray(scores)
    gists = np.flatnonzero(wc.lod > 0)[::-1]
    best = gists[np.argsort(-scores[gists], kind="stable")][:count]
    session.apply(Edits.of([(EXPAND, int(wc.start[i]), int(wc.lod[i])) for i in best]))


def expansion_utilities(session: MegaContextSession, targets: Tensor) -> np.ndarray:
    """What expanding each gist alone gains on these targets, in nats a token: float64 [N], 0 for tokens."""
    wc = session.working_context
    gists = np.flatnonzero(wc.lod > 0)
    edits = [Edits.of([]), *(Edits.of([(EXPAND, int(wc.start[i]), int(wc.lod[i]))]) for i in gists)]
    losses = CounterfactualScorer(session).losses(edits, targets).double().mean(1).numpy()
    out = np.zeros(len(wc))
    out[gists] = losses[0] - losses[1:]
    return out


@torch.no_grad()
def dropped_and_read_again(model: Any, session: MegaContextSession, targets: Tensor) -> np.ndarray:
    """Losses where the tail itself is read without what was dropped, as gists that are embeddings make it."""
    wc = session.working_context
    kept = torch.from_numpy(wc.start[wc.lod == 0].copy())
    ids = torch.cat((session.tokens()[kept], targets[:-1]))
    places = torch.cat((kept, torch.arange(len(session), len(session) + len(targets) - 1)))
    cache = RecordingCache(layer_windows(model), 0)
    device = session.device
    logits = run(model, cache, places[None].to(device), len(targets), input_ids=ids[None].to(device))
    return _losses(logits[0], targets)


def measure_window(
    model: Any, window: Tensor, setting: Setting, seed: int, slots: dict[str, int] | None = None
) -> dict[str, np.ndarray]:
    """Losses of the targets [64] of one window in every state; ``slots`` gets how many each state has."""
    addon, name = model.megacontext, setting.name
    context, targets = window[:-TARGETS], window[-TARGETS:]
    lenses = setting.chosen_lenses(addon)
    kv = addon.config.backend == "kv"
    tail = addon.config.recent_tokens
    session = addon.session(chunk_size=len(context), observe=tail, seed=seed, recall=kv and "recall" in lenses)
    found: dict[str, np.ndarray] = {}

    def measure(state: str, count: int | None = None) -> None:
        found[name(state, count)] = target_losses(session, targets)
        if slots is not None:
            slots[name(state, count)] = len(session.working_context)

    session.ingest(context)
    if setting.baselines:
        queries = session.cache.last_queries()
        measure("whole")
        session.cache.set_queries(queries)  # the targets' took their places
    collapse_all(session)
    queries = session.cache.last_queries()  # of the tail, which is what lenses may know of what is asked for
    if not kv:
        found[name("drop, read again")] = dropped_and_read_again(model, session, targets)
    if setting.baselines:
        with hidden_gists(session):
            measure("drop")
    measure("gists")
    original = addon.lens
    scores: dict[str, Any] = {}
    for lens, make in lenses.items():
        session.cache.set_queries(queries)
        addon.lens = make()
        scores[lens] = session.scores()
    addon.lens = original
    if setting.oracle and kv:
        scores["oracle"] = expansion_utilities(session, targets[: TARGETS // 2])
    for lens, score in scores.items():
        for count in setting.expansions:
            expand_best(session, score, count)
            measure(lens, count)
            collapse_all(session)
    session.close()
    return found
