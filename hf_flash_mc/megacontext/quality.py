"""The statistics of `evaluate`: what each state costs above the whole window, and how sure that is; and of needles.

A row of `evaluate` is a window: the name of a state -> losses of its targets. Names begin with "R:1 " where several
ratios stand in one file; every state is compared with "whole" and with the "drop" of its ratio. A row of
examples/needle.py is a needle: ``length, depth``, and for each way of asking whether it was found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

JUDGED = slice(32, 64)  # targets that count: the first ones are easy from the tail alone
BOOTSTRAPS = 10_000
# whom the table tests against; gists: means, as before training; the last two, of trained gists: for a trained lens
RIVALS = ("drop", "gists", "recency", "gist mass", "trained recency", "trained gist mass")
Row = dict[str, list[float]]
Needle = dict[str, Any]  # a row of examples/needle.py


@dataclass
class Comparison:
    """A line of the table. ``cost``: mean nats above the whole window, with its standard error; ``median``, with its
    95 % interval ``median_low`` to ``median_high``; ``recovered``: R with its 95 % interval ``low`` to ``high``;
    ``p``: rival -> how often, of paired bootstraps over windows, this state's mean cost was not below the rival's."""

    name: str
    cost: float
    error: float
    median: float
    median_low: float
    median_high: float
    recovered: float
    low: float
    high: float
    p: dict[str, float] = field(default_factory=dict)


def split_name(name: str) -> tuple[str, str, str]:
    """Ratio ("16:1 " or ""), state, and expansions (" x4" or ""): how `evaluate` names states."""
    found = re.fullmatch(r"(\d+:1 )?(.*?)( x\d+)?", name)
    assert found
    return found[1] or "", found[2], found[3] or ""


def judged(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Of each state and window, mean nats on the targets that count: ``[n]``."""
    return {name: np.array([np.mean(row[name][JUDGED]) for row in rows]) for name in rows[0]}


def summarise(rows: Sequence[Row], seed: int = 0) -> list[Comparison]:
    """The table's lines, ratio by ratio."""
    return compare(judged(rows), seed)


def compare(losses: Mapping[str, Sequence[float] | np.ndarray], seed: int = 0) -> list[Comparison]:
    """The table's lines from what `judged` gives: of each state, ``[n]``."""
    whole = np.asarray(losses["whole"])
    cost = {name: np.asarray(values) - whole for name, values in losses.items() if name != "whole"}
    count = len(whole)
    draws = np.random.default_rng(seed).integers(0, count, (BOOTSTRAPS, count))
    means = {name: values[draws].mean(1) for name, values in cost.items()}  # [BOOTSTRAPS]
    lines = []
    for name, values in cost.items():
        ratio, _, expansions = split_name(name)
        drop = ratio + "drop"
        low, high = np.quantile(1 - means[name] / means[drop], (0.025, 0.975))
        below, above = np.quantile(np.median(values[draws], 1), (0.025, 0.975))
        recovered = 1 - values.mean() / cost[drop].mean()
        error = values.std(ddof=1) / count**0.5 if count > 1 else float("nan")
        rivals = {rival: ratio + rival + (expansions if rival not in ("drop", "gists") else "") for rival in RIVALS}
        p = {
            rival: (1 + int((means[name] >= means[full]).sum())) / (1 + BOOTSTRAPS)
            for rival, full in rivals.items()
            if full in cost and full != name
        }
        line = Comparison(
            name=name,
            cost=float(values.mean()),
            error=float(error),
            median=float(np.median(values)),
            median_low=float(below),
            median_high=float(above),
            recovered=float(recovered),
            low=float(low),
            high=float(high),
            p=p,
        )
        lines.append(line)
    ratios = [split_name(name)[0] for name in cost]
    return sorted(lines, key=lambda line: ratios.index(split_name(line.name)[0]))


def table_of(lines: Sequence[Comparison], slots: dict[str, int] | None = None, missing: Sequence[str] = ()) -> str:
    """The table as markdown; slots: of each state; missing: lines for what was not run, each "name: reason"."""
    rivals = [rival for rival in RIVALS if any(rival in line.p for line in lines)]
    text = [
        "| state | slots | cost, nats | median (95 %) | recovered R (95 %) | p: not below " + " | ".join(rivals) + " |",
        "|---" * (5 + len(rivals)) + "|",
    ]
    for line in lines:
        p = " | ".join("" if rival not in line.p else f"{line.p[rival]:.4f}" for rival in rivals)
        cost = f"{line.cost:.3f} ± {line.error:.3f}"
        median = f"{line.median:.3f} ({line.median_low:.3f} to {line.median_high:.3f})"
        share = f"{line.recovered:.0%} ({line.low:.0%} to {line.high:.0%})"
        size = (slots or {}).get(line.name, "")
        text.append(f"| {line.name} | {size} | {cost} | {median} | {share} | {p} |")
    for reason in missing:
        name, _, why = reason.partition(": ")
        text.append(f"| {name} | | not run: {why} | " + " | " * (1 + len(rivals)) + "|")
    return "\n".join(text)


def rounded(row: Row) -> Row:
    """Losses as they are kept in a file."""
    return {name: [round(float(x), 5) for x in values] for name, values in row.items()}


def needle_table(results: Sequence[Needle], ways: Sequence[str]) -> str:
    """Found needles by length as markdown, by depth in brackets. Results: ``length, depth`` and each way's success."""
    lines = ["| tokens | needles | " + " | ".join(ways) + " |", "|---" * (2 + len(ways)) + "|"]
    depths = sorted({row["depth"] for row in results})
    for length in sorted({row["length"] for row in results}):
        rows = [row for row in results if row["length"] == length]
        cells = []
        for way in ways:
            by_depth = " ".join(_percent([row[way] for row in rows if row["depth"] == depth]) for depth in depths)
            cells.append(f"{_percent([row[way] for row in rows])} ({by_depth})")
        lines.append(f"| {length} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def needle_shares(results: Sequence[Needle], ways: Sequence[str]) -> dict[str, list[tuple[int, float, float]]]:
    """Of each way and length: the length, the share of needles found, and its standard error."""
    shares: dict[str, list[tuple[int, float, float]]] = {way: [] for way in ways}
    for way in ways:
        for length in sorted({row["length"] for row in results}):
            hits = [row[way] for row in results if row["length"] == length]
            share = sum(hits) / len(hits)
            shares[way].append((length, share, (share * (1 - share) / len(hits)) ** 0.5))
    return shares


def _percent(hits: Sequence[bool]) -> str:
    return f"{sum(hits) / len(hits):.0%}" if hits else "-"
