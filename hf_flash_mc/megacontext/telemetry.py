"""Telemetry: what a session did and how long it took, as a plain dict."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .working_context import Edits, WorkingContext

EDITS = 2**16  # kept
STAGES = ("forward", "commit", "lens", "allocate", "patch")


class Telemetry:
    """Counters of one session.

    ``seconds``: host time of each stage; on a GPU work that is only queued counts for the stage that waits for it.
    ``edits``: (tokens of history, kind, start, lod) of the last edits, for pictures.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.ingested = self.generated = self.refocuses = self.expansions = self.collapses = self.renumberings = 0
        self.edits: deque[tuple[int, int, int, int]] = deque(maxlen=EDITS)
        self._swapped = 0.0  # shares of the working context that refocuses replaced, added up
        self._since: dict[tuple[int, int], int] = {}  # expanded nodes -> the refocus that expanded them
        self._stays = self._stayed = 0  # nodes that were collapsed again, and how many refocuses they stayed expanded

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time inside to ``stage``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def note(self, wc: WorkingContext, edits: Edits, swapped: int, refocus: bool) -> None:
        """Count edits that were applied; ``swapped`` slots came new."""
        for kind, start, lod in zip(edits.kind.tolist(), edits.start.tolist(), edits.lod.tolist(), strict=True):
            self.edits.append((wc.total, kind, start, lod))
            if kind > 0:
                self.expansions += 1
                self._since[start, lod] = self.refocuses
            else:
                self.collapses += 1
                since = self._since.pop((start, lod), None)
                if since is not None:
                    self._stays += 1
                    self._stayed += self.refocuses - since
        if refocus:
            self.refocuses += 1
            self._swapped += swapped / max(1, len(wc))

    def to_dict(self) -> dict[str, Any]:
        """All of it, fit for JSON."""
        values = {**vars(self), "_since": [[*node, at] for node, at in self._since.items()]}
        return {**values, "seconds": dict(self.seconds), "edits": list(self.edits)}

    def load_dict(self, values: dict[str, Any]) -> None:
        """The inverse of ``to_dict``."""
        vars(self).update(values)
        self.seconds = defaultdict(float, values["seconds"])
        self.edits = deque((tuple(edit) for edit in values["edits"]), maxlen=EDITS)
        self._since = {(start, lod): at for start, lod, at in values["_since"]}

    def summary(self, wc: WorkingContext, w_max: int) -> dict[str, Any]:
        """Numbers by name, fit for `accelerate`'s trackers: ``accelerator.log(session.telemetry())``.

        swap_rate: mean share of the working context that a refocus replaced; residency: mean number of refocuses that
        a node stayed expanded (those still expanded count as long as they did so far).
        """
        stays = self._stays + len(self._since)
        stayed = self._stayed + sum(self.refocuses - since for since in self._since.values())
        found: dict[str, Any] = {
            "history_tokens": wc.total,
            "working_context_slots": len(wc),
            "budget_use": len(wc) / w_max,
            "ingested_tokens": self.ingested,
            "generated_tokens": self.generated,
            "refocuses": self.refocuses,
            "expansions": self.expansions,
            "collapses": self.collapses,
            "renumberings": self.renumberings,
            "swap_rate": self._swapped / max(1, self.refocuses),
            "residency": stayed / max(1, stays),
        }
        for lod, count in enumerate(_counts(wc)):
            found[f"slots_lod{lod}"] = count
        for stage in STAGES:
            found[f"seconds_{stage}"] = self.seconds[stage]
        return found


def _counts(wc: WorkingContext) -> list[int]:
    return [int((wc.lod == lod).sum()) for lod in range(int(wc.lod.max()) + 1 if len(wc) else 1)]
