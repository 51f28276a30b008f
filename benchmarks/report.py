"""Turn a result file into the README's tables and plots: no figure is typed by hand.

python -m benchmarks.report                    # results/attention-h100.csv -> README.md, results/*.png and *.svg
python -m benchmarks.report --check            # exit code 1 if README.md is not what the result file says
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

from benchmarks.registry import LABELS

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NOTHING = "No result file yet: `python -m benchmarks.run` on a GPU, then `python -m benchmarks.report`."
Row = dict[str, str]


def read(stem: Path) -> tuple[list[Row], dict[str, str]]:
    """The lines of STEM.csv and what STEM.json says of them."""
    with stem.with_suffix(".csv").open(newline="") as file:
        return list(csv.DictReader(file)), json.loads(stem.with_suffix(".json").read_text())


def summary(stem: Path) -> str:
    """The README's section: where it was measured, then one table per kind of figure."""
    if not stem.with_suffix(".csv").exists():
        return NOTHING
    rows, meta = read(stem)
    parts = [
        f"{meta['device']}, torch {meta['torch']}, triton {meta['triton']}, {rows[0]['dtype']}, "
        f"commit {(meta['commit'] or 'unknown')[:12]}, {meta['date']}; `{meta['command']}`. "
        f"{meta['method'].capitalize()}. "
        f"All figures with p20 and p80: [{stem.name}.csv](benchmarks/results/{stem.name}.csv)."
    ]
    long = [r for r in rows if r["group"] == "long"]
    if long:
        parts += ["Forward / backward TFLOP/s, from [B, S, H, D] memory as transformers gives it:", throughput(long)]
    other = [r for r in rows if r["group"] not in ("long", "host")]
    if other:
        parts += ["Short windows and decoding, forward / backward in ms:", milliseconds(other)]
    host = [r for r in rows if r["group"] == "host"]
    if host:
        parts += ["Host time of one small call in us, GPU idle otherwise:", host_times(host)]
    return "\n\n".join(parts)


def table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def grouped(rows: list[Row], key: str) -> dict[str, list[Row]]:
    """Rows by a column, in the order of the file."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def figure(rows: list[Row], name: str, direction: str, column: str) -> float | None:
    """One number of a cell, None if it was not measured."""
    for row in rows:
        if (row["implementation"], row["direction"]) == (name, direction) and row[column]:
            return float(row[column])
    return None


def pair(rows: list[Row], name: str, column: str, pattern: str) -> str:
    """ "forward / backward", a dash for what was not measured."""
    values = (figure(rows, name, direction, column) for direction in ("forward", "backward"))
    shown = ["-" if v is None else pattern.format(v) for v in values]
    return "-" if shown == ["-", "-"] else " / ".join(shown)


def ratio(rows: list[Row], name: str, peer: str) -> str:
    """How many times as fast as the peer, forward / backward."""
    shown = []
    for direction in ("forward", "backward"):
        a, b = (figure(rows, n, direction, "median_ms") for n in (name, peer))
        shown.append("-" if a is None or b is None else f"{b / a:.2f}")
    return " / ".join(shown)


def shape(row: Row) -> list[str]:
    mask = "causal" if row["causal"] == "True" else "full"
    heads = row["q_heads"] if row["q_heads"] == row["kv_heads"] else f"{row['q_heads']}/{row['kv_heads']}"
    length = row["sq"] if row["sq"] == row["sk"] else f"{row['sq']} x {row['sk']}"
    return [row["head_dim"], mask, row["batch"], heads, length]


def throughput(rows: list[Row]) -> str:
    names = list(grouped(rows, "implementation"))
    versus = "fa2" if "fa2" in names else names[-1]
    head = ["D", "mask", "B", "heads", "S", *(LABELS[n] for n in names), f"ours vs {LABELS[versus]}"]
    body = [
        [*shape(cell[0]), *(pair(cell, n, "tflops", "{:.0f}") for n in names), ratio(cell, "ours", versus)]
        for cell in grouped(rows, "cell").values()
    ]
    return table(head, body)


def milliseconds(rows: list[Row]) -> str:
    names = list(grouped(rows, "implementation"))
    head = ["D", "mask", "B", "heads", "Sq x Sk", *(LABELS[n] for n in names)]
    body = [
        [*shape(cell[0]), *(pair(cell, n, "median_ms", "{:.3f}") for n in names)]
        for cell in grouped(rows, "cell").values()
    ]
    return table(head, body)


def host_times(rows: list[Row]) -> str:
    labels = {"ours": "ours", "sdpa": "SDPA (its own choice)"}
    names = list(grouped(rows, "implementation"))
    body = []
    for direction, group in grouped(rows, "direction").items():
        values = [figure(group, n, direction, "median_ms") for n in names]
        body.append([direction.removeprefix("host "), *("-" if v is None else f"{v * 1e3:.0f}" for v in values)])
    return table(["", *(labels[n] for n in names)], body)


def plot(stem: Path) -> list[Path]:
    """TFLOP/s over sequence length, a panel per head dim and direction (causal, as many KV heads as query heads)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, meta = read(stem)
    rows = [r for r in rows if r["group"] == "long" and r["causal"] == "True" and r["q_heads"] == r["kv_heads"]]
    if not rows:
        return []
    dims = sorted({int(r["head_dim"]) for r in rows})
    figure_, axes = plt.subplots(2, len(dims), figsize=(4 * len(dims), 6), squeeze=False, sharex=True)
    for column, dim in enumerate(dims):
        for axis, direction in zip(axes[:, column], ("forward", "backward"), strict=True):
            chosen = [r for r in rows if int(r["head_dim"]) == dim and r["direction"] == direction and r["tflops"]]
            for name, group in grouped(chosen, "implementation").items():
                points = sorted((int(r["sq"]), float(r["tflops"])) for r in group)
                width = 2.5 if name == "ours" else 1.2
                axis.plot(*zip(*points, strict=True), marker="o", linewidth=width, label=LABELS[name])
            axis.set(title=f"{direction}, head dim {dim}", xscale="log", ylim=(0, None))
            axis.set_xticks(sorted({int(r["sq"]) for r in chosen}), minor=False)
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    axes[0, 0].legend(fontsize="small")
    figure_.suptitle(f"Causal attention, {rows[0]['dtype']}, {meta['device']}")
    figure_.tight_layout()
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure_.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure_)
    return paths


def replaced(readme: str, section: str) -> str:
    """The README with what stands between the markers replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stem", nargs="?", type=Path, default=RESULTS / "attention-h100", help="result without suffix")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    options = parser.parse_args(arguments)
    old = options.readme.read_text()
    new = replaced(old, summary(options.stem))
    if options.check:
        print("README is up to date" if old == new else "README is out of date: run python -m benchmarks.report")
        return int(old != new)
    options.readme.write_text(new)
    written = plot(options.stem) if options.stem.with_suffix(".csv").exists() else []
    print(f"wrote {options.readme.name}", *(p.name for p in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
