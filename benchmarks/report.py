"""Turn result files into the README's tables, docs and plots: no figure is typed by hand.

python -m benchmarks.report                    # results/ -> README.md, docs, results/attention-*.png and *.svg
python -m benchmarks.report --check            # exit code 1 if README.md or a page is not what the result files say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import goals
from benchmarks.figures import ANCHORS_SOURCE, HERE, PEERS, Figure, Figures, Row
from benchmarks.plots import plot
from benchmarks.sections import PAGES, filled
from benchmarks.sections import markdown_table as table
from hf_flash_mc.measure.peers import LABELS

ROOT = HERE.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
FILES = [HERE / "results" / f"attention-{gpu}.csv" for gpu in ("h100", "h200", "h200-train")]
NOTHING = "No result file yet: `python -m benchmarks.run` on a GPU, then `python -m benchmarks.report`."
LONG = ("long", "gqa", "context")
BOTH = ("forward", "backward")
STAR = f"\\* not in this run: {ANCHORS_SOURCE}. Absolute figures move by up to 10 % between cards and days."


def origin(figures: Figures, folder: str) -> str:
    """Where and how each file was measured; ``folder`` is the way to them."""
    shown = []
    for path, rows in figures.files.items():
        meta = rows[0]
        commits = ", ".join(dict.fromkeys((r["commit"] or "unknown")[:12] for r in rows))
        commands = "; ".join(f"`{c}`" for c in dict.fromkeys(r["command"] for r in rows))
        groups = "" if not shown else f"{', '.join(dict.fromkeys(r['group'] for r in rows))}: "
        shown.append(
            f"{groups}{meta['device']}, torch {meta['torch']}, triton {meta['triton']}, {meta['dtype']}, "
            f"commit {commits}, {meta['date']}; {commands}. "
            f"{meta['method'].capitalize()}. "
            f"All figures with p20 and p80: [{path.name}]({folder}/{path.name})."
        )
    return "\n\n".join(shown)


def shape(row: Row) -> list[str]:
    mask = "causal" if row["causal"] == "True" else "full"
    heads = row["q_heads"] if row["q_heads"] == row["kv_heads"] else f"{row['q_heads']}/{row['kv_heads']}"
    length = row["sq"] if row["sq"] == row["sk"] else f"{row['sq']} x {row['sk']}"
    return [row["head_dim"], mask, row["batch"], heads, length]


def pair(figures: Figures, row: Row, name: str, show: str) -> str:
    """ "forward / backward" in TFLOP/s or ms, a dash for what there is not, a star for what is of another run."""
    shown = []
    for direction in BOTH:
        figure = figures.get(row["cell"], direction, name)
        value = None if figure is None else getattr(figure, show)
        pattern = "{:.0f}" if show == "tflops" else "{:.3f}"
        shown.append("-" if figure is None or value is None else pattern.format(value) + ("*" if figure.anchor else ""))
    return "-" if shown == ["-", "-"] else " / ".join(shown)


def ratios(figures: Figures, row: Row) -> str:
    """Ours against the best peer, forward / backward."""
    shown = [figures.ratio(row["cell"], d) for d in BOTH]
    return " / ".join("-" if x is None else f"{x:.2f}" for x in shown)


def throughput(figures: Figures, rows: list[Row], show: str = "tflops") -> str:
    """One line a cell: ours and every peer that has a figure, and how ours compares with the best of them."""
    names = [n for n in PEERS if any(figures.get(r["cell"], d, n) for r in rows for d in BOTH)]
    head = ["D", "mask", "B", "heads", "S", *(LABELS[n] for n in ("ours", *names)), "ours / best peer"]
    body = [[*shape(r), *(pair(figures, r, n, show) for n in ("ours", *names)), ratios(figures, r)] for r in rows]
    return table(head, body)


def bandwidth(figures: Figures, rows: list[Row]) -> str:
    """Cells that memory bounds, in ms, with the share of a device copy's bandwidth."""
    names = [n for n in PEERS if any(figures.get(r["cell"], d, n) for r in rows for d in BOTH)]
    head = ["D", "mask", "B", "heads", "Sq x Sk", *(LABELS[n] for n in ("ours", *names)), "ours, % of copy"]
    body = []
    for r in rows:
        shares = [figures.copy_share(r["cell"], d) for d in BOTH]
        share = " / ".join("-" if x is None else f"{100 * x:.0f}" for x in shares)
        body.append([*shape(r), *(pair(figures, r, n, "ms") for n in ("ours", *names)), share])
    return table(head, body)


def features(figures: Figures, rows: list[Row]) -> str:
    """What a feature adds to causal attention without it."""

    def added(row: Row, direction: str) -> str:
        ratio = figures.ratio(row["cell"], direction, ("plain",))
        return "-" if ratio is None else f"{100 * (1 / ratio - 1):+.0f} %"

    return table(
        ["feature", "forward", "backward", "both"],
        [[r["feature"], *(added(r, d) for d in (*BOTH, "both"))] for r in rows],
    )


def training(figures: Figures, rows: list[Row]) -> str:
    """Training steps: ms, and peak memory."""
    cells = {r["cell"] for r in rows}
    names = [r["implementation"] for r in figures.rows if r["cell"] in cells]
    names = list(dict.fromkeys([*names, *goals.STOCK]))

    def shown(figure: Figure | None) -> str:
        if figure is None:
            return "-"
        memory = "" if figure.peak_gib is None else f", {figure.peak_gib:.1f} GiB"
        return f"{figure.ms:.0f}{'*' if figure.anchor else ''} ms{memory}"

    body = [[r["batch"], r["sq"], *(shown(figures.get(r["cell"], "step", n)) for n in names)] for r in rows]
    return table(["B", "S", *(LABELS.get(n, n) for n in names)], body)


def step_parts(figures: Figures, rows: list[Row]) -> str:
    """Where a training step's time goes: ms of its kernels by kind, from the notes."""
    kinds, body = ("attention", "matmul", "optimizer", "other"), []
    for row in figures.rows:
        if row["cell"] not in {r["cell"] for r in rows} or not row["median_ms"]:
            continue
        parts = [part.split() for part in row["note"].partition("; ")[2].split(", ")]
        spent = {part[0]: float(part[1]) for part in parts if len(part) == 3}
        shown = [f"{spent[k]:.1f}" if k in spent else "-" for k in kinds]
        body.append([LABELS.get(row["implementation"], row["implementation"]), row["batch"], row["sq"], *shown])
    return table(["", "B", "S", *kinds], body)


def host_times(figures: Figures) -> str:
    rows = [r for r in figures.rows if r["group"] == "host"]
    names = list(dict.fromkeys(r["implementation"] for r in rows))
    body = []
    for direction in dict.fromkeys(r["direction"] for r in rows):
        found = [figures.get(rows[0]["cell"], direction, n) for n in names]
        body.append([direction.removeprefix("host "), *("-" if f is None else f"{f.ms * 1e3:.0f}" for f in found)])
    return table(["", *(LABELS[n] for n in names)], body)


def sections(figures: Figures, everything: bool) -> list[str]:
    """The tables; for the README without the shorter lengths and the features."""
    long = figures.cells(*LONG)
    if not everything:
        long = [r for r in long if int(r["sq"]) >= 4096] or long
    steps, tuning = ([r for r in figures.cells("train") if (r["feature"] == "llama-1b") == b] for b in (False, True))
    parts: list[tuple[str, list[Row], Callable[[Figures, list[Row]], str]]] = [
        ("Forward / backward TFLOP/s, from [B, S, H, D] memory as transformers gives it:", long, throughput),
        ("Packed sequences of 16 tokens and more, forward / backward TFLOP/s:", figures.cells("varlen"), throughput),
        ("Windows, cross attention and decoding, forward / backward in ms:",
         figures.cells("windows", "cross", "decode"), bandwidth),
        ("Training step of a Llama-shaped model (8 layers, hidden size 2048, 32/8 heads of 64):", steps, training),
        ("Fine-tuning step, with AdamW, of a Llama-shaped model (16 layers, hidden size 2048, 32/8 heads of 64, 1.1 "
         "billion parameters):", tuning, training),
    ]  # fmt: skip
    if everything:
        parts += [(f"Where {what} step's time goes, ms of kernels:", rows, step_parts)
                  for what, rows in (("a training", steps), ("that fine-tuning", tuning))]  # fmt: skip
        parts.append(("What a feature adds to the time of causal attention (head dim 128, S 4096); recompute is the "
                      "forward run again in each backward:", figures.cells("features"), features))  # fmt: skip
    shown = []
    for title, rows, show in parts:
        if rows:
            shown += [title, show(figures, rows)]
    if figures.cells("host"):
        shown += ["Host time of one small call in us, GPU idle otherwise:", host_times(figures)]
    if any("* " in part for part in shown):
        shown.append(STAR)
    return shown


def summary(files: list[Path]) -> str:
    """The README's section."""
    if not files:
        return NOTHING
    figures = Figures(*files)
    place = origin(figures, "benchmarks/results")
    more = "Every cell, and what was aimed at: [docs/performance.md](docs/performance.md)."
    return "\n\n".join([f"{place} {more}", *sections(figures, everything=False)])


def performance(files: list[Path]) -> str:
    """docs/performance.md: goals met and missed, with the reasons that were written by hand, then every table."""
    if not files:
        return f"# Performance\n\n{NOTHING}\n"
    figures, reasons = Figures(*files), goals.reasons()
    head = ["goal", "direction", "cell", "ours", "best other", "ratio", "at least", "met"]
    body, missed = [], []
    for goal in goals.GOALS:
        found = goals.outcomes(figures, goal)
        absent = sum(x.ours == "not measured" for x in found)
        if absent:
            body.append(
                [goal.text, goal.direction, f"{absent} cells", "not measured", "", "-", f"{goal.ratio:.2f}", "-"]
            )
        for x in found:
            if x.ours == "not measured":
                continue
            least = goal.average if x.cell == "average" else goal.ratio
            body.append([
                goal.text, goal.direction, x.cell, x.ours, x.other, "-" if x.ratio is None else f"{x.ratio:.2f}",
                f"{least:.2f}", "-" if x.met is None else "yes" if x.met else "**no**",
            ])  # fmt: skip
        if any(x.met is False for x in found):
            text = reasons.get(goal.id, "no reason written down yet")
            missed.append(f"- {goal.text} ({goal.direction}): {text}")
    parts = [
        "# Performance",
        "Generated by `python -m benchmarks.report` from result files; only the reasons (benchmarks/reasons.toml) "
        "are written by hand. [benchmarks.md](benchmarks.md) says how it is measured.",
        origin(figures, "../benchmarks/results"),
        "## Goals",
        "The ratio is the time of the best peer (or of what the goal names) over ours: above 1 is faster than it. For "
        "memory-bound cells it is our bandwidth over that of the fastest device copy of the run; for errors, theirs "
        "over ours. `-`: not measured.",
        table(head, body),
        STAR,
    ]
    if missed:
        parts += ["## Missed, and why", "\n".join(missed)]
    return "\n\n".join([*parts, "## All figures", *sections(figures, everything=True)]) + "\n"


def replaced(readme: str, section: str) -> str:
    """The README with what stands between the markers replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=FILES, help="of a cell in several, the last counts")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help=f"folder of {' and '.join(PAGES)}")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of their JSON files")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a text is out of date")
    options = parser.parse_args(arguments)
    files = [path for path in options.files if path.exists()]
    texts = {
        options.readme: replaced(options.readme.read_text(), summary(files)),
        options.page: performance(files),
    }
    texts |= {options.docs / name: filled((options.docs / name).read_text(), options.results) for name in PAGES}
    if options.check:
        old = [p.name for p, text in texts.items() if not p.exists() or p.read_text() != text]
        print(f"out of date: {', '.join(old)}; run python -m benchmarks.report" if old else "all up to date")
        return int(bool(old))
    for p, text in texts.items():
        p.write_text(text)
    written = plot(files[0]) if files else []
    print("wrote", *(p.name for p in (*texts, *written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
