"""Figures of result files, and of peers that were not in their runs: those stand in anchors.csv and stay marked."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hf_flash_mc.measure.cells import CELLS, Cell

HERE = Path(__file__).parent
ANCHORS = HERE / "anchors.csv"
ANCHORS_SOURCE = (
    "measured earlier, side by side on one NVIDIA H100 80GB HBM3 with torch 2.11.0+cu130 and triton 3.6.0: FA3 is a "
    "forward-only build (tokenspeed-fa3 3.0.0.post20260810), FA4-CuTe is flash-attn-4 4.0.0b36"
)
PEERS = ("fa2", "cudnn", "efficient", "flex", "varlen_attn", "fa3", "fa4")
Row = dict[str, str]


@dataclass(frozen=True)
class Figure:
    """One median; ``anchor``: from another run."""

    ms: float
    tflops: float | None = None
    gbps: float | None = None
    peak_gib: float | None = None
    rms_error: float | None = None
    anchor: bool = False


@cache
def cell_of(name: str) -> Cell:
    """The registry's cell of this name.

    Raises:
        ValueError: where the registry has none.
    """
    for cell in CELLS:
        if cell.name == name:
            return cell
    raise ValueError(f"cell: expected one of the registry (hf_flash_mc/measure/cells.py), got {name!r}")


class Figures:
    """Medians by cell, direction ("both": forward and backward together) and implementation.

    Of several files the last one that has a cell counts for it: figures of two runs never share a cell.
    """

    def __init__(self, *paths: Path, anchors: Path = ANCHORS):
        self.files: dict[Path, list[Row]] = {}
        for path in paths:
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            again = {r["cell"] for r in rows}
            self.files = {p: [r for r in old if r["cell"] not in again] for p, old in self.files.items()}
            self.files[path] = rows
        self.rows: list[Row] = [row for rows in self.files.values() for row in rows]
        self.found: dict[tuple[str, str, str], Figure] = {}
        self.notes: dict[tuple[str, str, str], str] = {}
        for row in self.rows:
            key = (row["cell"], row["direction"], row["implementation"])
            self.notes[key] = row["note"]
            if row["median_ms"]:
                names = ("tflops", "gbps", "peak_gib", "rms_error")
                numbers = {n: float(row[n]) if row.get(n) else None for n in names}
                self.found[key] = Figure(float(row["median_ms"]), **numbers)
        self.anchors = read_anchors(anchors)

    def cells(self, *groups: str) -> list[Row]:
        """The first row of each cell of these groups, in the order of the registry."""
        first: dict[str, Row] = {}
        for row in self.rows:
            if row["group"] in groups:
                first.setdefault(row["cell"], row)
        order = [c.name for c in CELLS]
        return sorted(first.values(), key=lambda r: order.index(r["cell"]) if r["cell"] in order else -1)

    def get(self, cell: str, direction: str, name: str) -> Figure | None:
        """Measured in this run; else the anchor, for peers."""
        if direction == "both":
            ways = [self.get(cell, d, name) for d in ("forward", "backward")]
            a, b = ways
            return None if a is None or b is None else Figure(a.ms + b.ms, anchor=a.anchor or b.anchor)
        return self.found.get((cell, direction, name)) or self.anchors.get((cell, direction, name))

    def best(self, cell: str, direction: str, names: tuple[str, ...] = PEERS) -> tuple[str, Figure] | None:
        """The fastest of ``names``."""
        there = [(n, f) for n in names if (f := self.get(cell, direction, n)) is not None]
        return min(there, key=lambda pair: pair[1].ms, default=None)

    def ratio(self, cell: str, direction: str, names: tuple[str, ...] = PEERS) -> float | None:
        """How many times as fast as the best of ``names`` ours is."""
        ours, other = self.get(cell, direction, "ours"), self.best(cell, direction, names)
        return None if ours is None or other is None else other[1].ms / ours.ms

    @property
    def copy_gbps(self) -> float | None:
        """The fastest device copy of the run."""
        return max((f.gbps for (_, _, n), f in self.found.items() if n == "copy" and f.gbps), default=None)

    def copy_share(self, cell: str, direction: str) -> float | None:
        """Bytes that must move, over time, over the bandwidth of the fastest copy."""
        ours = self.get(cell, direction, "ours")
        return None if ours is None or not ours.gbps or not self.copy_gbps else ours.gbps / self.copy_gbps


def read_anchors(path: Path) -> dict[tuple[str, str, str], Figure]:
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            key = (row["cell"], row["direction"], row["implementation"])
            values.setdefault(key, {})[row["unit"]] = float(row["value"])
    found = {}
    for (cell, direction, name), v in values.items():
        flops = cell_of(cell).flops(direction) / 1e9 if direction in ("forward", "backward") else None
        ms = v["ms"] if "ms" in v else flops / v["tflops"] if flops else 0.0
        found[cell, direction, name] = Figure(ms, flops / ms if flops else None, peak_gib=v.get("gib"), anchor=True)
    return found


def matching(pattern: str) -> list[str]:
    """Names of the registry's cells whose "group name" the pattern matches as a whole."""
    return [c.name for c in CELLS if re.fullmatch(pattern, f"{c.group} {c.name}")]
