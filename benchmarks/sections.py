"""Sections of docs/ made from JSON result files: what stands between <!-- NAME:begin --> and <!-- NAME:end -->.

Quality from results/quality-*.json (`hf-flash-mc evaluate --out`), needles and soak from needles-*.json and
soak-*.json (examples/needle.py and soak.py), positions from positions-*.json (`benchmarks.positions`), parts from
megacontext-*.json (`benchmarks.megacontext`), kills from training-kills-*.json (`benchmarks.kills`), memory from
activation-memory-*.json (`benchmarks.activation_memory`), tests and sanitizers on a GPU from guards-*.json, attention
over several GPUs from ring-*.csv (`benchmarks.ring`). A picture of the same name, quality-X.png, is shown beneath its
table.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hf_flash_mc.megacontext.quality import BOOTSTRAPS, compare, needle_table, table_of

PAGES = ("megacontext.md", "benchmarks.md", "guards.md", "distributed.md")  # of docs/
SETTLED = 10_000  # tokens of a soak after which memory should not grow
Found = dict[str, Any]


def markdown_table(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def quality(found: Found) -> str:
    options, losses = found["options"], found["losses"]
    text = Path(options["tokens"] or options["text"]).stem
    whole = losses["whole"]
    head = (
        f"Model {options['model']}, text {text}, {len(whole)} windows of {options['context']} tokens. The whole window "
        f"leaves {sum(whole) / len(whole):.3f} nats a token."
    )
    return f"{head}\n\n{table_of(compare(losses), found['slots'], found['missing'])}"


def needles(found: Found) -> str:
    options = found["options"]
    head = f"Window of {options['window']} slots, {options['rounds']} refocuses of up to {options['edits']} expansions"
    if options["heads"]:
        head += f", gists of {Path(options['heads']).name}"
    return f"{head}.\n\n{needle_table(found['results'], found['ways'])}"


def positions(found: Found) -> str:
    rows = found["rows"]
    base = np.array([row["absolute"] for row in rows])
    draws = np.random.default_rng(0).integers(0, len(base), (BOOTSTRAPS, len(base)))
    body = []
    for name in rows[0]:
        cost = np.array([row[name] for row in rows]) - base
        low, high = np.quantile(cost[draws].mean(1), (0.025, 0.975))
        above = "" if name == "absolute" else f"{cost.mean():+.4f} ({low:+.4f} to {high:+.4f})"
        body.append([name, f"{base.mean() + cost.mean():.4f}", above])
    head = f"{len(rows)} histories; {found['run']['method']}."
    return f"{head}\n\n{markdown_table(['positions', 'nats a token', 'above absolute (95 %)'], body)}"


def soak(found: Found) -> str:
    rows, options = found["rows"], found["options"]
    settled = next((row for row in rows if row["tokens"] >= SETTLED), rows[0])
    body = [
        [
            f"{row['tokens']:,}",
            f"{row['slots']} of {options['window']}",
            f"{row['device_mib']:.0f}" if row["device_mib"] else "-",
            f"{row['host_mib']:.0f}",
            f"{row['tokens_per_second']:.0f}",
        ]
        for row in (settled, rows[-1])
    ]
    head = ["tokens", "slots", "GPU memory (peak), MiB", "host memory, MiB", "tokens/s"]
    result = "; ".join(found["problems"]) or "every check passed"
    return f"{markdown_table(head, body)}\n\nHistory on disk: {found['history_mib']:.0f} MiB; {result}."


def parts(found: Found) -> str:
    body = []
    for row in found["rows"]:
        speed = f"{row['tokens_per_s'] / 1e6:.2f}" if "tokens_per_s" in row else ""
        share = f"{row['overhead']:.1%}" if "overhead" in row else ""
        times = f"{row['median_ms']:.3g} ({row['p20_ms']:.3g} to {row['p80_ms']:.3g})"
        body.append([row["part"], times, speed, share])
    return markdown_table(["part", "ms (p20 to p80)", "million tokens/s", "of the decoding between two"], body)


def kills(found: Found) -> str:
    head = ["script", "kills", "while a checkpoint was written", "runs", "losses and weights at the end"]
    body = []
    for row in found["rows"]:
        same = "the unbroken run's, bit for bit" if row["same losses"] and row["same weights"] else "**differ**"
        body.append([row["script"], str(row["kills"]), str(row["kills within a checkpoint"]), str(row["runs"]), same])
    return markdown_table(head, body)


def guards(found: Found) -> str:
    """What ran on a GPU, on which commit, and what it found."""
    rows = found["rows"]
    body = [[r["guard"], f"{r['cases']:,}", str(r["errors"]), r["commit"], f"`{r['command']}`"] for r in rows]
    return markdown_table(["guard", "cases", "errors", "commit", "command"], body)


def activations(found: Found) -> str:
    """Ours and eager side by side, "read / learn", and how much less the fuller part of ours takes."""
    pairs: dict[tuple[Any, ...], dict[str, Found]] = {}
    for row in found["rows"]:
        pairs.setdefault((row["head"], row["context"], row["batch"]), {})[row["attention"]] = row
    body = []
    for (head, context, batch), ways in pairs.items():
        most, shown = {}, []
        for way in ("ours", "eager"):
            row = ways.get(way, {})
            if "read_mib" in row:
                most[way] = max(row["read_mib"], row["learn_mib"])
                shown.append(f"{row['read_mib']:,.0f} / {row['learn_mib']:,.0f} ({row['kept_mib']:,.0f} kept)")
            else:
                shown.append(row.get("note", "-"))
        ratio = f"{most['eager'] / most['ours']:.1f}" if len(most) == 2 else "-"
        body.append([head, f"{context:,}", str(batch), *shown, ratio])
    return markdown_table(["head", "context", "windows", "ours, MiB", "eager, MiB", "eager / ours"], body)


def spread(found: Found) -> str:
    """Each length and direction: how many times as fast as one GPU, and the memory of the fullest."""
    rows, alone = found["rows"], "one rank"
    names = [name for name in dict.fromkeys(row["implementation"] for row in rows) if name != alone]
    body = []
    for cell, direction in dict.fromkeys((row["cell"], row["direction"]) for row in rows):
        mine = {row["implementation"]: row for row in rows if (row["cell"], row["direction"]) == (cell, direction)}
        one = mine[alone]
        head = [f"{int(one['sq']):,}", "causal" if one["causal"] == "True" else "full", direction]
        cells = [f"{float(one['median_ms']):.0f} ms, {float(one['peak_gib']):.1f} GiB"]
        for name in names:
            row = mine.get(name, {})
            timed = row.get("times_one")
            cells.append(f"{float(timed):.2f} x, {float(row['peak_gib']):.1f} GiB" if timed else row.get("note", "-"))
        body.append([*head, *cells])
    ranks = max(int(row["ranks"]) for row in rows)
    q, kv, d = (rows[0][name] for name in ("q_heads", "kv_heads", "head_dim"))
    table = markdown_table(["tokens", "mask", "direction", "one GPU", *names], body)
    return f"{ranks} GPUs; {q} query and {kv} KV heads of {d}.\n\n{table}"


def load(path: Path) -> Found:
    """A result file; of a CSV the rows, and what all of them say about the run."""
    if path.suffix == ".json":
        return dict(json.loads(path.read_text()))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {"run": rows[0], "rows": rows}


KINDS: dict[str, tuple[str, Callable[[Found], str]]] = {
    "quality": ("quality-*.json", quality),
    "needles": ("needles-*.json", needles),
    "positions": ("positions-*.json", positions),
    "soak": ("soak-*.json", soak),
    "parts": ("megacontext-*.json", parts),
    "activations": ("activation-memory-*.json", activations),
    "kills": ("training-kills-*.json", kills),
    "guards": ("guards-*.json", guards),
    "ring": ("ring-*.csv", spread),
}


def origin(run: Found, path: Path) -> str:
    """Where and how a file was measured; a file of several commands names them, and their commits, line by line."""
    how = (
        f"commit {(run['commit'] or 'unknown')[:12]}, {run['date']}; `{run['command']}`"
        if "command" in run
        else run["date"]
    )
    return (
        f"{run['device']}, {run['dtype']}, torch {run['torch']}, transformers {run['transformers']}, {how}. "
        f"[{path.name}](../benchmarks/results/{path.name})"
    )


def section(name: str, results: Path) -> str:
    """All files of a kind, one after the other."""
    pattern, show = KINDS[name]
    parts = []
    for path in sorted(results.glob(pattern)):
        found = load(path)
        parts += [show(found), origin(found["run"], path)]
        if path.with_suffix(".png").exists():
            parts.append(f"![{path.stem}](../benchmarks/results/{path.stem}.png)")
    return "\n\n".join(parts) or f"Not measured yet: no `benchmarks/results/{pattern}`."


def filled(page: str, results: Path) -> str:
    """A page with what stands between its markers replaced."""

    def replaced(match: re.Match[str]) -> str:
        return f"{match[1]}\n{section(match[2], results)}\n{match[3]}"

    names = "|".join(KINDS)
    return re.sub(rf"(<!-- ({names}):begin -->)\n.*?(<!-- \2:end -->)", replaced, page, flags=re.DOTALL)
