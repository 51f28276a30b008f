"""Plots of a result file: throughput over sequence length, and how ours compares with the best peer in every cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.figures import PEERS, Figures
from hf_flash_mc.measure.peers import LABELS

DIRECTIONS = ("forward", "backward")


def plot(path: Path) -> list[Path]:
    """PNG and SVG beside the file; anchors are dashed and hollow."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "hf-flash-mc"  # the same file from the same figures
    figures = Figures(path)
    written = []
    for suffix, draw in (("", throughput), ("-ratios", ratios)):
        figure = draw(figures)
        if figure is None:
            continue
        for kind in (".png", ".svg"):
            target = path.with_name(path.stem + suffix + kind)
            figure.savefig(target, dpi=110, metadata={"Date": None} if kind == ".svg" else None)
            written.append(target)
    return written


def throughput(figures: Figures) -> Any:
    """TFLOP/s over length, causal: a panel per head dim and direction."""
    from matplotlib.figure import Figure

    rows = [r for r in figures.cells("long") if r["causal"] == "True"]
    dims = sorted({int(r["head_dim"]) for r in rows})
    if not rows:
        return None
    figure = Figure(figsize=(4 * len(dims), 6))
    axes = figure.subplots(2, len(dims), squeeze=False, sharex=True)
    for column, dim in enumerate(dims):
        for axis, direction in zip(axes[:, column], DIRECTIONS, strict=True):
            chosen = [r for r in rows if int(r["head_dim"]) == dim]
            for i, name in enumerate(("ours", *PEERS)):
                found = [(int(r["sq"]), figures.get(r["cell"], direction, name)) for r in chosen]
                points = sorted((s, f.tflops, f.anchor) for s, f in found if f is not None and f.tflops)
                if not points:
                    continue
                anchor = any(a for *_, a in points)
                axis.plot(
                    [p[0] for p in points], [p[1] for p in points], marker="o", color=f"C{i}",
                    linewidth=2.5 if name == "ours" else 1.2, linestyle="--" if anchor else "-",
                    fillstyle="none" if anchor else "full", label=LABELS[name] + (" (another run)" if anchor else ""),
                )  # fmt: skip
            axis.set(title=f"{direction}, head dim {dim}", xscale="log", ylim=(0, None))
            axis.set_xticks(sorted({int(r["sq"]) for r in chosen}), minor=False)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    if axes[0, 0].lines:
        axes[0, 0].legend(fontsize="x-small")
    figure.suptitle(f"Causal attention, {figures.rows[0]['dtype']}, {figures.rows[0]['device']}")
    figure.tight_layout()
    return figure


def ratios(figures: Figures) -> Any:
    """A bar for each cell and direction: the best peer's time over ours."""
    from matplotlib.figure import Figure

    found = []
    for row in figures.cells("long", "gqa", "context", "windows", "cross", "varlen", "decode"):
        for direction in DIRECTIONS:
            ratio, best = figures.ratio(row["cell"], direction), figures.best(row["cell"], direction)
            if ratio is not None and best is not None:
                found.append((f"{row['cell']} {direction}", ratio, best))
    if not found:
        return None
    figure = Figure(figsize=(9, 1 + 0.2 * len(found)))
    axis = figure.subplots()
    colors = ["C2" if ratio >= 1 else "C3" for _, ratio, _ in found]
    axis.barh(range(len(found)), [ratio for _, ratio, _ in found], color=colors)
    for y, (_, ratio, (name, other)) in enumerate(found):
        axis.text(ratio, y, f" {ratio:.2f} of {LABELS[name]}{'*' if other.anchor else ''}", va="center", fontsize=6)
    axis.set_yticks(range(len(found)), [name for name, *_ in found], fontsize=6)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set(xlabel="time of the best peer over ours (* of another run)", xlim=(0, 1.25 * max(r for _, r, _ in found)))
    figure.suptitle(f"Ours against the best peer, {figures.rows[0]['device']}")
    figure.tight_layout()
    return figure
