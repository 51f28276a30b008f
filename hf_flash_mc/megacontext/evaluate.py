"""What gists and lenses are worth: the loss of next tokens with most of a window collapsed.

    hf-flash-mc evaluate --model FOLDER --text FOLDER --windows 200
    hf-flash-mc evaluate --model FOLDER --tokens FILE --block 8 16 32 --expansions 1 4 12 --heads FOLDER --oracle \\
        --out quality.json --plot quality.png

Each window is read whole (``--context`` tokens), then everything but the sink and the last ``--tail`` tokens is
collapsed to gists, and the loss of the next tokens is measured with: the whole window; no gists at all ("drop"); all
gists; and a few gists expanded by each lens. No choice sees a target, but the oracle's: it sees the first half of them.
Reported: mean and median difference to the whole window in nats on targets 33 to 64, the share of the cost of dropping
that is recovered, R = 1 - mean / mean of drop, and paired bootstrap tests. kvpress's presses stand in the same table,
with as many keys as there are slots, where kvpress is installed (`peers`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import peers
from .attach import detach_megacontext
from .io import asking_the_hub
from .quality import JUDGED, Row, compare, judged, rounded, summarise, table_of
from .states import (
    LENSES,
    TARGETS,
    Setting,
    collapse_all,
    hidden_gists,
    measure_window,
    target_losses,
)

__all__ = ["JUDGED", "LENSES", "TARGETS", "collapse_all", "evaluate", "hidden_gists", "main", "target_losses"]

SUFFIXES = (".txt", ".rst", ".md")


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


class Run:
    """Rows of several passes over the same windows, side by side, kept in a file so that a run that ended goes on.

    Args:
        windows: [n, context + 64]. path: the file of what is done so far, or None. about: what a run must share to go
            on from it.
    """

    def __init__(self, windows: Tensor, path: Path | None = None, about: dict[str, Any] | None = None) -> None:
        self.windows, self.path = windows, path
        self.about = {**(about or {}), "ids": hashlib.sha256(windows.numpy().tobytes()).hexdigest()}
        self.parts: dict[str, list[Row]] = {}
        self.slots: dict[str, int] = {}
        if path is not None and path.exists():
            held = json.loads(path.read_text())
            if held["about"] == self.about:
                self.parts, self.slots = held["parts"], held["slots"]

    def measure(self, model: Any, name: str, setting: Setting, report: Any = None) -> None:
        """One setting over all windows that it was not measured on yet; the model has an add-on for the time being."""
        rows = self.parts.setdefault(name, [])
        if len(rows) == len(self.windows):
            return
        setting.attach(model, self.windows.shape[1])
        try:
            for i in range(len(rows), len(self.windows)):
                self._add(rows, measure_window(model, self.windows[i], setting, i, self.slots), name, report)
        finally:
            detach_megacontext(model)

    def measure_presses(self, model: Any, name: str, setting: Setting, report: Any = None) -> None:
        """kvpress's presses, each with as many keys as the lenses' states of this setting have slots."""
        rows = self.parts.setdefault(name, [])
        for window in self.windows[len(rows) :]:
            context, targets = window[:-TARGETS], window[-TARGETS:]
            row = {}
            for press, kind in peers.PRESSES.items():
                for count in setting.expansions:
                    size = self.slots[setting.name("recency", count)]
                    row[setting.name(press, count)] = peers.press_losses(
                        model, context, targets, kind, size, setting.tail
                    )
                    self.slots[setting.name(press, count)] = size
            self._add(rows, row, name, report)

    def rows(self) -> list[Row]:
        """Of each window that every pass so far has measured, all states."""
        done = [part for part in self.parts.values() if part]
        return [{k: x for part in parts for k, x in part.items()} for parts in zip(*done, strict=False)]

    def _add(self, rows: list[Row], found: dict[str, np.ndarray], name: str, report: Any) -> None:
        rows.append(rounded({state: list(losses) for state, losses in found.items()}))
        if self.path is not None:
            fresh = self.path.with_name(self.path.name + ".new")
            fresh.write_text(json.dumps({"about": self.about, "parts": self.parts, "slots": self.slots}))
            fresh.replace(self.path)
        if report is not None:
            report(name, len(rows))


def evaluate(model: Any, windows: Tensor, **setting: Any) -> list[Row]:
    """Losses of every window [n, context + 64] in every state of one `Setting`, whose fields are the arguments."""
    run = Run(windows)
    run.measure(model, "", Setting(**setting))
    return run.rows()


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    options = parse_arguments(arguments)
    for path in (options.out, options.plot, options.save_tokens):
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    windows = _windows(options)
    if options.save_tokens:
        np.save(options.save_tokens, windows.numpy().astype(np.uint16 if windows.max() < 2**16 else np.int32))
        return
    plan, about = settings(options), {k: v for k, v in vars(options).items() if k not in ("out", "plot")}
    from transformers import AutoModelForCausalLM

    from hf_flash_mc.measure.record import commit

    with asking_the_hub("model", options.model):
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    start = time.perf_counter()
    out = None if options.out is None else Path(options.out)
    run = Run(windows, None if out is None else out.with_name(out.name + ".part"), about | {"commit": commit()})
    if run.parts:
        print(f"going on from {run.path}", flush=True)

    def report(name: str, done: int) -> None:
        if done % 8 == 0 or done == len(windows):
            print(f"[{time.perf_counter() - start:.0f} s] {name}: {done} of {len(windows)} windows", flush=True)

    missing = []
    for i, (name, setting) in enumerate(plan.items()):
        if i:
            print(table_of(summarise(run.rows()), run.slots), flush=True)
        run.measure(model, name, setting, report)
    reason = peers.why_not(model)
    if reason is not None:
        missing = [f"{press}: {reason}" for press in peers.PRESSES]
    else:
        for name, setting in plan.items():
            if setting.heads is None:
                run.measure_presses(model, f"kvpress, {name}", setting, report)
    losses = {name: [round(x, 5) for x in values.tolist()] for name, values in judged(run.rows()).items()}
    lines = compare(losses)  # of what the file keeps, so that its table can be made again
    table = table_of(lines, run.slots, missing)
    if out is not None:
        whole = describe(options, arguments, len(windows)) | {"table": table}
        whole |= {"lines": [asdict(line) for line in lines], "slots": run.slots, "missing": missing}
        whole["losses"] = losses
        out.write_text(json.dumps(whole) + "\n")
        out.with_name(out.name + ".part").unlink(missing_ok=True)
    if options.plot:
        from .plots import plot_quality

        plot_quality(lines, run.rows(), options.plot)
    print(f"{len(windows)} windows, {time.perf_counter() - start:.0f} s\n{table}", flush=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hf-flash-mc evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--text", help="folder or file of text")
    parser.add_argument("--tokens", help="instead of --text: a file of prepare_tokens.py, or windows saved before")
    parser.add_argument("--save-tokens", help="write the windows there and stop")
    parser.add_argument("--windows", type=int, default=200, help="how many (default 200)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window (default 2048)")
    parser.add_argument("--tail", type=int, default=64, help="last tokens that stay tokens (default 64)")
    parser.add_argument("--block", type=int, nargs="+", default=[32], help="tokens of a gist (default 32), or several")
    parser.add_argument("--expansions", type=int, nargs="+", default=[4], help="gists that a lens expands (default 4)")
    parser.add_argument("--oracle", action="store_true", help="also the best by measured utility (slow: a run a gist)")
    parser.add_argument("--seed", type=int, default=0, help="of the windows that are drawn (default 0)")
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=there, help="cpu or cuda; the GPU where there is one")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="of the model (default float32)")
    parser.add_argument("--out", help="JSON file for each window's losses, table, and where and how they were measured")
    parser.add_argument("--plot", help="PNG file of the table")
    parser.add_argument("--heads", nargs="+", default=[], help="folders of trained heads, each for further rows")
    options = parser.parse_args(arguments)
    check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """ValueError for what would measure nothing."""
    from hf_flash_mc.measure.run import check_device

    for name in ("windows", "tail", "expansions"):
        given = getattr(options, name)
        if np.min(given) < 1:
            raise ValueError(f"{name}: expected at least 1, got {given}")
    if bool(options.text) == bool(options.tokens):
        raise ValueError("text, tokens: expected one of them")
    check_device(options.device)


def settings(options: argparse.Namespace) -> dict[str, Setting]:
    """Every pass over the windows, by name: untrained gists of each ratio, then the trained heads."""
    from .states import heads_config

    least = Setting.sink + options.tail + 2 * max(options.block)
    if options.context < least:
        raise ValueError(
            f"context: expected at least {least} tokens ({Setting.sink} first and {options.tail} last ones, and two "
            f"gists of {max(options.block)}), got {options.context}"
        )
    names = [Path(folder).name for folder in options.heads]
    if len({*names}) < len(names):
        raise ValueError(f"heads: expected folders of different names, by which rows are called, got {names}")
    plan: dict[str, Setting] = {}
    sizes = {"expansions": tuple(options.expansions), "tail": options.tail, "oracle": options.oracle}

    def ratio(block: int) -> str:
        return f"{block}:1 " if len(options.block) > 1 else ""

    for block in options.block:
        plan[f"{block}:1"] = Setting(block=block, ratio=ratio(block), **sizes)
    for folder in options.heads:
        block = heads_config(folder).block_size
        if block not in options.block:
            raise ValueError(
                f"heads: expected gists of {' or '.join(map(str, options.block))} tokens (block), got {folder} with "
                f"{block}; add it to --block"
            )
        label = "trained " if len(options.heads) == 1 else f"{Path(folder).name}: "
        name = f"heads {folder}"
        plan[name] = Setting(block=block, heads=folder, ratio=ratio(block), label=label, baselines=False, **sizes)
    return plan


def describe(options: argparse.Namespace, arguments: list[str] | None, count: int) -> dict[str, Any]:
    """Where and how."""
    from hf_flash_mc.measure.record import describe_command, without_folders

    given = sys.argv[1:] if arguments is None else arguments
    method = f"{count} windows, paired bootstrap"
    run = describe_command(torch.device(options.device), ["hf-flash-mc", "evaluate"], given, method, options.dtype)
    return {"run": run, "options": without_folders(vars(options))}


def _windows(options: argparse.Namespace) -> Tensor:
    length = options.context + TARGETS
    if options.tokens:
        from .training import Windows, load_array

        tokens = load_array(options.tokens)
        if tokens.ndim == 1:
            return Windows(options.tokens, length=length).apart(options.windows, options.seed)
        held = torch.from_numpy(tokens.astype(np.int64))
        if held.dim() != 2 or held.shape[1] != length or len(held) < options.windows:
            raise ValueError(f"tokens: expected [{options.windows} or more, {length}], got {list(held.shape)}")
        return held[: options.windows]
    from transformers import AutoTokenizer

    with asking_the_hub("model", options.model):
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    documents = (tokenizer(text, return_tensors="pt", verbose=False).input_ids[0] for text in read_texts(options.text))
    return sample_windows(documents, length, options.windows, options.seed)


if __name__ == "__main__":
    main()
