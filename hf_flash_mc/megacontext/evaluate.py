"""What gists and lenses are worth without training: the loss of next tokens with most of a window collapsed.

    python -m hf_flash_mc.megacontext.evaluate --model FOLDER --text FOLDER --windows 200

Each window is read whole (``--context`` tokens), then everything but the sink and the last ``--tail`` tokens is
collapsed to gists, and the loss of the next tokens is measured with: the whole window; no gists at all ("drop"); all
gists; and a few gists expanded by each lens. No choice sees a target. Reported: mean difference to the whole window in
nats on targets 33 to 64, the share of the cost of dropping that is recovered, R = 1 - mean / mean of drop, and paired
bootstrap tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attach import attach_megacontext
from .config import MegaContextConfig
from .lensnet import GistMassLens, RandomLens, RecallLens, RecencyLens
from .session import MegaContextSession
from .working_context import COLLAPSE, Edits

TARGETS, JUDGED = 64, slice(32, 64)  # next tokens, and those that count: the first ones are easy from the tail alone
SUFFIXES = (".txt", ".rst", ".md")
LENSES = {"recency": RecencyLens, "random": RandomLens, "gist mass": GistMassLens, "recall": RecallLens}
BOOTSTRAPS = 10_000


@dataclass
class Comparison:
    """A line of the table. ``cost``: mean nats above the whole window, with its standard error; ``recovered``: R with
    its 95 % interval ``low`` to ``high``."""

    name: str
    cost: float
    error: float
    median: float
    recovered: float
    low: float
    high: float


def read_texts(path: str | Path) -> list[str]:
    """Every text file under a folder, or one file, in a fixed order."""
    path = Path(path)
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"text: expected files ending in {', '.join(SUFFIXES)} under {path}, got none")
    return [file.read_text(errors="replace") for file in files]


def sample_windows(documents: Iterable[Tensor], length: int, count: int, seed: int = 0) -> Tensor:
    """``count`` windows [count, length] of token ids, none overlapping another, each inside one document."""
    pieces = [
        document[start : start + length]
        for document in documents
        for start in range(0, len(document) - length + 1, length)
    ]
    if len(pieces) < count:
        raise ValueError(f"windows: expected at most {len(pieces)} of {length} tokens in this text, got {count}")
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[:count]
    return torch.stack([pieces[i] for i in order.tolist()])


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
    session.reread(1)  # the last token too sees the working context as it is now
    logits = [session.next_logits()[None].cpu()]
    logits.append(session.ingest(targets[:-1], return_logits=True))  # type: ignore[arg-type]
    session.rewind(len(targets) - 1)
    return F.cross_entropy(torch.cat(logits).float(), targets, reduction="none").double().numpy()


def collapse_all(session: MegaContextSession) -> None:
    """Every whole block between the sink and the recent tokens becomes a gist of level 1."""
    config = session.config
    first = -(-config.sink_tokens // config.block_size) * config.block_size
    starts = np.arange(first, len(session) - config.recent_tokens - config.block_size + 1, config.block_size)
    fine = session.working_context.lod[np.searchsorted(session.working_context.start, starts)] == 0
    session.apply(Edits.of([(COLLAPSE, int(start), 1) for start in starts[fine]]))


def measure_window(model: Any, window: Tensor, expansions: int, seed: int, lenses: dict[str, Any]) -> dict[str, list]:
    """Losses of the targets [64] of one window in every state; ``lenses``: name -> function from config to lens."""
    addon = model.megacontext
    context, targets = window[:-TARGETS], window[-TARGETS:]
    recalls = any(getattr(lens, "reads", "") == "recall" for lens in lenses.values())
    session = addon.session(chunk_size=len(context), observe=addon.config.recent_tokens, seed=seed, recall=recalls)
    session.ingest(context)
    found = {"whole": target_losses(session, targets)}
    collapse_all(session)
    queries = session.cache.queries.clone()
    with hidden_gists(session):
        found["drop"] = target_losses(session, targets)
    found["gists"] = target_losses(session, targets)
    original = addon.lens
    for name, make in lenses.items():
        session.cache.queries.copy_(queries)  # the tail as it was read
        addon.lens = make(addon.config)
        session.refocus(max_edits=expansions)
        found[name] = target_losses(session, targets)
        collapse_all(session)
    addon.lens = original
    return {name: losses.tolist() for name, losses in found.items()}


def summarise(rows: list[dict[str, list]], seed: int = 0) -> tuple[list[Comparison], dict[str, float]]:
    """The table, and p values of paired bootstrap tests "recall (or else gist mass) costs no less than ..."."""
    judged = {name: np.array([np.mean(row[name][JUDGED]) for row in rows]) for name in rows[0]}
    cost = {name: values - judged["whole"] for name, values in judged.items() if name != "whole"}
    count = len(rows)
    draws = np.random.default_rng(seed).integers(0, count, (BOOTSTRAPS, count))
    means = {name: values[draws].mean(1) for name, values in cost.items()}  # [BOOTSTRAPS]
    lines = []
    for name, values in cost.items():
        share = 1 - means[name] / means["drop"]
        low, high = np.quantile(share, (0.025, 0.975))
        recovered = 1 - values.mean() / cost["drop"].mean()
        error = values.std(ddof=1) / count**0.5 if count > 1 else float("nan")
        lines.append(Comparison(name, values.mean(), error, float(np.median(values)), recovered, low, high))
    best = "recall" if "recall" in cost else "gist mass"
    tests = {n: float((means[n] - means[best] <= 0).mean()) for n in cost if n != best} if best in cost else {}
    return lines, tests


def table_of(lines: list[Comparison], tests: dict[str, float]) -> str:
    """The table as markdown."""
    text = [
        "| state | cost, nats | median | recovered R | 95 % | p: best lens no better |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        p = f"{tests[line.name]:.4f}" if line.name in tests else ""
        cost = f"{line.cost:.3f} ± {line.error:.3f}"
        share = f"{line.recovered:.0%} | {line.low:.0%} to {line.high:.0%}"
        text.append(f"| {line.name} | {cost} | {line.median:.3f} | {share} | {p} |")
    return "\n".join(text)


def evaluate(
    model: Any,
    windows: Tensor,
    *,
    tail: int = 64,
    sink: int = 32,
    block: int = 32,
    expansions: int = 4,
    gist: dict[str, Any] | None = None,
    lenses: dict[str, Any] | None = None,
    report: Callable[[int, list[dict[str, list]]], None] | None = None,
    heads: str | Path | None = None,
) -> list[dict[str, list]]:
    """Losses of every window [n, context + 64] in every state; ``report(i, rows)`` after each. The model gets an add-on
    for the time being; ``heads``: a folder with a trained GistNet, instead of the settings ``gist``."""
    from .attach import detach_megacontext
    from .io import WEIGHTS, _read_tensors

    held = None if heads is None else heads_config(heads, block)
    config = MegaContextConfig(
        block_size=block,
        max_lod=1 if held is None else held.max_lod,
        w_max=max(windows.shape[1] + 64, 4 * block + tail + sink),
        sink_tokens=sink,
        recent_tokens=tail,
        max_edits=expansions,
        tau=0.0,
        cooldown=0,
        gist=(gist or {}) if held is None else held.gist,
    )
    attach_megacontext(model, config)
    rows: list[dict[str, list]] = []
    try:
        if heads is not None:
            weights = _read_tensors(Path(heads) / WEIGHTS)
            own = {n.removeprefix("gist."): x for n, x in weights.items() if n.startswith("gist.")}
            model.megacontext.gist.load_state_dict(own)
        for i, window in enumerate(windows):
            rows.append(measure_window(model, window, expansions, i, lenses or LENSES))
            if report is not None:
                report(i, rows)
    finally:
        detach_megacontext(model)
    return rows


def heads_config(folder: str | Path, block: int) -> MegaContextConfig:
    """The config of saved heads; ValueError where they are not KV gists of ``block`` tokens."""
    from .io import CONFIG, FORMAT, _read_json

    values = _read_json(Path(folder) / CONFIG, FORMAT)
    values.pop("format")
    config = MegaContextConfig.from_dict(values)
    if config.block_size != block or config.backend != "kv":
        raise ValueError(
            f"heads: expected KV gists of {block} tokens (block), got {folder} with {config.backend} gists of "
            f"{config.block_size}"
        )
    return config


def with_trained(rows: list[dict[str, list]], trained: list[dict[str, list]]) -> list[dict[str, list]]:
    """Both in one table: states of trained gists carry "trained " before their names, where gists are in them."""
    named = [{f"trained {n}": x for n, x in row.items() if n not in ("whole", "drop")} for row in trained]
    return [{**row, **more} for row, more in zip(rows, named, strict=True)]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--text", help="folder or file of text")
    parser.add_argument("--tokens", help="windows of token ids saved before, .npy [n, context + 64], instead of --text")
    parser.add_argument("--save-tokens", help="write the windows there and stop")
    parser.add_argument("--windows", type=int, default=200)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tail", type=int, default=64)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--expansions", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", help="JSON file for losses, table, and where and how they were measured")
    parser.add_argument("--heads", help="folder of a trained GistNet (KV gists of --block tokens), for further rows")
    options = parser.parse_args(arguments)
    windows = _windows(options)
    if options.save_tokens:
        np.save(options.save_tokens, windows.numpy().astype(np.uint16 if windows.max() < 2**16 else np.int32))
        return
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    start = time.perf_counter()

    def report(i: int, rows: list[dict[str, list]]) -> None:
        if options.out:
            Path(options.out).write_text(json.dumps({"options": vars(options), "rows": rows}))
        if i % 8 == 7:
            print(f"{i + 1} windows, {time.perf_counter() - start:.0f} s\n{table_of(*summarise(rows))}", flush=True)

    sizes = {"tail": options.tail, "block": options.block, "expansions": options.expansions}
    rows = evaluate(model, windows, **sizes, report=report)
    if options.heads:
        rows = with_trained(rows, evaluate(model, windows, **sizes, heads=options.heads))
    table = table_of(*summarise(rows))
    if options.out:
        from hf_flash_mc.measure.record import describe_run

        command = " ".join(["hf-flash-mc evaluate", *(sys.argv[1:] if arguments is None else arguments)])
        run = asdict(describe_run(torch.device(options.device), command, f"{len(rows)} windows, paired bootstrap"))
        whole = {"run": run, "options": vars(options), "table": table, "rows": rows}
        Path(options.out).write_text(json.dumps(whole) + "\n")
    print(f"{len(rows)} windows, {time.perf_counter() - start:.0f} s\n{table}", flush=True)


def _windows(options: argparse.Namespace) -> Tensor:
    length = options.context + TARGETS
    if options.tokens:
        held = torch.from_numpy(np.load(options.tokens).astype(np.int64))
        if held.dim() != 2 or held.shape[1] != length or len(held) < options.windows:
            raise SystemExit(f"--tokens: expected [{options.windows} or more, {length}], got {list(held.shape)}")
        return held[: options.windows]
    if not options.text:
        raise SystemExit("--text or --tokens: one of them is needed")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    documents = (tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for text in read_texts(options.text))
    return sample_windows(documents, length, options.windows, options.seed)


if __name__ == "__main__":
    main()
