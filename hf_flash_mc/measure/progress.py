"""A progress bar on a terminal, plain lines elsewhere; and tables as plain text."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any


class Progress:
    """``with Progress("checking", 24) as bar: bar.step("forward d64")``. Writes to stderr.

    On a terminal, with rich installed, one bar that stays; else one line a step: "[ 3/24]   1.2 s  forward d64".
    """

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done, self.start = label, total, 0, time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
                from rich.progress import Progress as RichProgress
            except ImportError:
                return self
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.label, total=self.total)
            self._bar.start()
        return self

    def step(self, text: str) -> None:
        """One more of ``total`` is done; ``text`` says which."""
        self.done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=f"{self.label}: {text}")
            return
        width, seconds = len(str(self.total)), time.monotonic() - self.start
        print(f"[{self.done:{width}}/{self.total}] {seconds:6.1f} s  {text}", file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """Columns aligned by spaces."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = ["-" * w for w in widths]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in [head, rule, *rows]
    )
