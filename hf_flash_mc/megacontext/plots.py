"""Pictures of a session (what is shown of the history, at which detail, what was edited when) and of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .quality import JUDGED, Comparison, Row, split_name

if TYPE_CHECKING:
    from .session import MegaContextSession

COLOURS = ("#0b6e4f", "#f2a541", "#c8553d", "#5b2a86", "#333333", "#999999")  # by level of detail


def plot_session(session: MegaContextSession, path: str | Path | None = None) -> Any:
    """Three rows over the history's tokens: levels of detail, the lens's last scores, and all edits so far.

    Args:
        path: where to save the picture; None: only return it.

    Returns:
        A matplotlib figure. ImportError where matplotlib is missing.
    """
    from matplotlib.figure import Figure

    wc = session.working_context
    figure = Figure(figsize=(11, 6), layout="constrained")
    levels, marks, edits = figure.subplots(3, 1, sharex=True, height_ratios=(1, 1, 1.4))
    for lod in range(session.config.max_lod + 1):
        at = wc.lod == lod
        bars = list(zip(wc.start[at].tolist(), wc.span[at].tolist(), strict=True))
        label = f"tokens: {len(bars)}" if lod == 0 else f"gists of {session.config.span(lod)}: {len(bars)}"
        levels.broken_barh(
            _joined(bars) if lod == 0 else bars, (lod, 0.8), color=_colour(lod), label=label, lw=0.2, ec="w"
        )
    levels.set_yticks(np.arange(session.config.max_lod + 1) + 0.4, range(session.config.max_lod + 1))
    levels.set(ylabel="level of detail", ylim=(-0.2, session.config.max_lod + 1.8))  # room for the legend on top
    levels.set_title(f"{wc.total} tokens in {len(wc)} of {session.config.w_max} slots")
    levels.legend(loc="upper left", ncols=session.config.max_lod + 1, fontsize="small")
    start, lods, scores = session.last_scores
    marks.scatter(start + wc.spans[lods] / 2, scores, s=4, c=[_colour(lod) for lod in lods.tolist()])
    marks.axhline(0, color="0.8", lw=0.8, zorder=0)
    marks.set(ylabel="last scores", ylim=(-1.05, 1.05))
    for kind, colour, label in ((1, "#1b7837", "expanded"), (-1, "#762a83", "collapsed")):
        chosen = np.array([edit for edit in session.stats.edits if edit[1] == kind], np.int64).reshape(-1, 4)
        width, height = session.config.block_size ** chosen[:, 3], max(wc.total / 80, 1)
        edits.barh(chosen[:, 0], width, left=chosen[:, 2], height=height, color=colour, label=f"{label}: {len(chosen)}")
    edits.plot([0, wc.total], [0, wc.total], color="0.8", lw=0.8, zorder=0)
    edits.legend(loc="lower right", fontsize="small")  # no edit is of text that was not read yet
    edits.set_ylabel("tokens read at the edit")
    edits.set_xlabel("token of the history")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def plot_needles(table: dict[str, list[tuple[int, float, float]]], path: str | Path, ceiling: str = "exact") -> Any:
    """Recall of needles by the length of the history: name -> (tokens, recall, standard error) of each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, rows) in enumerate(table.items()):
        tokens, recall, error = (np.array(column) for column in zip(*rows, strict=True))
        tokens = tokens * 2 ** (0.04 * (i - (len(table) - 1) / 2))  # side by side, or equal ones would hide each other
        top = name == ceiling  # a larger, hollow mark, so that what reaches it does not hide it
        style: dict[str, Any] = {"ls": "--", "ms": 11, "mfc": "none"} if top else {"ls": "-", "ms": 6}
        axes.errorbar(tokens, recall, error, marker="o", label=name, capsize=3, **style)
    axes.set_xscale("log", base=2)
    lengths = sorted({row[0] for rows in table.values() for row in rows})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set(xlabel="tokens of history", ylabel="share of needles found (± standard error)", ylim=(-0.03, 1.03))
    figure.legend(fontsize="small", loc="outside right upper")
    figure.savefig(path, dpi=120)
    return figure


def plot_soak(rows: list[dict[str, float]], path: str | Path) -> Any:
    """Memory and speed over a long stream: rows with tokens, device_mib, host_mib, tokens_per_second, swap_rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    tokens = [row["tokens"] for row in rows]
    names = ["device_mib", "host_mib"] if any(row["device_mib"] for row in rows) else ["host_mib"]
    for name in names:
        panels[0].plot(tokens, [row[name] for row in rows], label=name.removesuffix("_mib"))
    panels[0].legend(fontsize="small")
    for panel, name in zip(panels[1:], ("tokens_per_second", "swap_rate"), strict=True):
        panel.plot(tokens, [row[name] for row in rows])
    for panel, label in zip(panels, ("memory, MiB", "tokens per second", "swap rate,\nshare of slots"), strict=True):
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
    panels[-1].set_xlabel("tokens of history")
    figure.savefig(path, dpi=120)
    return figure


def plot_quality(lines: Sequence[Comparison], rows: Sequence[Row], path: str | Path) -> Any:
    """What `evaluate` found: R of every state with its 95 % interval, and cost by target.

    By target: states of the first ratio with the most expansions.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, max(4.0, 0.28 * len(lines))), layout="constrained")
    shares, curves = figure.subplots(1, 2, width_ratios=(1, 1.2))
    names = [split_name(line.name) for line in lines]
    shown = [line for line, (_, state, _) in zip(lines, names, strict=True) if state != "drop"][::-1]
    middle = np.array([line.recovered for line in shown])
    ends = np.array([[line.low for line in shown], [line.high for line in shown]])
    reach = np.abs(ends - middle)
    shares.errorbar(100 * middle, range(len(shown)), xerr=100 * reach, fmt="o", ms=4, capsize=2, color=COLOURS[0])
    shares.set_yticks(range(len(shown)), [line.name for line in shown], fontsize="small")
    shares.axvline(0, color="0.6", lw=0.8, zorder=0)
    shares.set(xlabel="share of the cost of dropping that is recovered, % (95 %)", xlim=(-50, 105))
    whole = np.array([row["whole"] for row in rows])
    most = max((x for _, _, x in names), key=lambda x: int(x[2:] or 0))  # expansions
    drawn = [line for line, (r, _, x) in zip(lines, names, strict=True) if r == names[0][0] and x in ("", most)]
    for i, line in enumerate(drawn[:20]):  # more lines would not be told apart
        cost = np.array([row[line.name] for row in rows]) - whole  # [n, targets]
        block = 8 if cost.shape[1] % 8 == 0 else 1
        mean = cost.mean(0).reshape(-1, block).mean(1)
        curves.plot(np.arange(len(mean)) * block + (block + 1) / 2, mean, marker="o", ms=3, label=line.name,
                    color=f"C{i % 10}", ls="-" if i < 10 else "--")  # fmt: skip
    curves.axvspan(0, JUDGED.start + 0.5, color="0.95", zorder=0)  # not judged
    curves.axhline(0, color="0.6", lw=0.8, zorder=0)
    curves.set(xlabel="target, tokens after the context", ylabel="cost above the whole window, nats")
    curves.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{len(rows)} windows")
    figure.savefig(path, dpi=120)
    return figure


def _colour(lod: int) -> str:
    return COLOURS[min(lod, len(COLOURS) - 1)]


def _joined(bars: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Touching tokens as one bar."""
    joined: list[tuple[int, int]] = []
    for start, span in bars:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + span)
        else:
            joined.append((start, span))
    return joined
