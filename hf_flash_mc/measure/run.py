"""Measure attention against its peers in one run: correctness first, then interleaved medians.

  hf-flash-mc bench                          every cell with what is installed (about eight minutes on an H100)
  hf-flash-mc bench --quick                  shorter samples, without the peers that compile for seconds
  hf-flash-mc bench --only windows decode    these groups; a part of a cell's name does too: --only d128-causal
  hf-flash-mc bench --only train             training steps of a Llama-shaped model

Writes one CSV: a line per cell, direction and implementation, with GPU, versions, commit and command. It is rewritten
after each cell, so whatever ends the run leaves the cells before. An implementation that misses the error bound is not
timed, and the exit code is 1. With --time-limit the run ends in time, says what is missing, and the exit code is 3.
"""

from __future__ import annotations

import argparse
import gc
import re
import shlex
import sys
import time
from pathlib import Path

import torch

from hf_flash_mc.measure import cells as registry
from hf_flash_mc.measure import peers, record, timing, training, warm
from hf_flash_mc.measure.progress import Progress, text_table
from hf_flash_mc.measure.record import Line

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WRONG, INCOMPLETE = 1, 3


def parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the cells (on a CPU small ones), measure nothing")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PART", help="host, or regular expressions on group and name"
    )
    parser.add_argument("--quick", action="store_true", help="samples of a third, no peers that are never the fastest")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="S", help="end within S seconds")
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help=f"of {', '.join(peers.IMPLEMENTATIONS)}")
    there = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=there, help="cpu or cuda; the GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default bfloat16, on a CPU float32")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="default attention-GPU.csv")
    return parser


def main(arguments: list[str], program: str = "hf-flash-mc bench", folder: Path | None = None) -> int:
    """Run; the exit code. ``folder`` is where the file goes without --out."""
    options = parser(program).parse_args(arguments)
    try:
        device = check_device(options.device)
        gpu = device.type == "cuda"
        parts = [p for p in options.only if p != "host"]
        cells = registry.select(registry.CELLS if gpu else registry.SMOKE, parts)
        if options.only and not parts:
            cells = []
        default = peers.CPU_DEFAULT if not gpu else peers.GPU_QUICK if options.quick else peers.GPU_DEFAULT
        implementations = peers.choose(options.implementations, default)
        if options.out is not None and options.out.suffix not in ("", ".csv"):
            raise ValueError(f"out: expected a file that ends in .csv, got {str(options.out)!r}")
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    host = not options.only or "host" in options.only
    if options.list:
        rows = [["host", timing.HOST_CELL.name, "host time of a small call"]] if host else []
        rows += [[c.group, c.name, ", ".join(c.directions)] for c in cells]
        print(text_table(["group", "cell", "directions"], rows))
        if cells and not gpu:
            print("These are the small cells of a CPU; the others need a GPU.")
        return 0
    dtype = DTYPES[options.dtype or ("bfloat16" if gpu else "float32")]
    effort = timing.SMOKE if not gpu else timing.QUICK if options.quick else timing.FULL
    path = (options.out or (folder or Path()) / default_name(device)).with_suffix(".csv")
    # where the file went is of no use to whoever repeats the run
    given = str(options.out) if options.out else None
    command = shlex.join([*program.split(), *(path.name if a == given else a for a in arguments)])
    run = record.describe_run(device, command, effort.text)
    return _Session(run, path, device, dtype, time.monotonic() + options.time_limit).measure(
        cells, implementations, effort, host
    )


class _Session:
    """One run: its lines so far, and when it must end."""

    def __init__(self, run: record.Run, path: Path, device: torch.device, dtype: torch.dtype, end: float):
        self.run, self.path, self.device, self.dtype, self.end = run, path, device, dtype, end
        self.lines: list[Line] = []
        self.missing: list[str] = []

    def left(self) -> float:
        return self.end - time.monotonic()

    def measure(
        self, cells: list[registry.Cell], implementations: dict[str, peers.Maker], effort: timing.Effort, host: bool
    ) -> int:
        attention, training_cells = ([c for c in cells if (c.group == "train") == t] for t in (False, True))
        needed = [*([timing.HOST_CELL] if host else []), *attention]
        if self.device.type == "cuda" and needed:
            mine = [n for n in implementations if n in (*peers.OURS, "plain")]
            slow = warm.compile_cells(needed, self.dtype, mine, min(300.0, 0.5 * self.left()))
            if slow:
                print(f"not compiled in time or failed, left to the measurement: {', '.join(slow)}", flush=True)
        longest = 2.0
        with Progress("measuring", len(cells)) as bar:
            if host:
                self.add(timing.measure_host(self.device, self.dtype))
            for cell in attention:
                if self.left() < 1.5 * longest:
                    self.missing.append(cell.name)
                    continue
                start = time.monotonic()
                try:
                    self.add(timing.measure_cell(cell, self.device, self.dtype, implementations, effort))
                except Exception as error:  # out of memory in the reference, say: the other cells still count
                    self.missing.append(f"{cell.name}: {type(error).__name__}: {str(error)[:200]}")
                longest = max(longest, time.monotonic() - start)
                self.clean()
                bar.step(cell.name)
            for cell in training_cells:
                self.missing += training.measure(cell, self.device, self.left, self.add)[1]
                self.clean()
                bar.step(cell.name)
        return self.summary()

    def add(self, lines: list[Line]) -> None:
        if not lines:
            return
        self.lines += lines
        record.write(self.lines, self.run, self.path)
        for direction in dict.fromkeys(x.direction for x in lines):
            shown = ", ".join(_shown(x) for x in lines if x.direction == direction)
            print(f"{lines[0].cell} {direction}: {shown}", flush=True)

    def clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def summary(self) -> int:
        wrong = [f"{x.implementation} {x.cell} {x.direction}: {x.note}" for x in self.lines if "wrong" in x.note]
        if wrong:
            print("\n".join(["wrong results, not timed:", *wrong]))
        if self.missing:
            print("\n".join(["missing (time limit, or the error beside it):", *self.missing]))
        print(f"wrote {len(self.lines)} lines to {self.path.name}" if self.lines else "nothing was measured")
        return WRONG if wrong else INCOMPLETE if self.missing else 0


def _shown(x: Line) -> str:
    figure = x.note if x.median_ms is None else f"{x.median_ms:.4f} ms"
    extra = f" {x.tflops:.0f} TF" if x.tflops else f" {x.peak_gib} GiB" if x.peak_gib else ""
    return f"{x.implementation} {figure}{extra}"


def check_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: where torch knows no such device, or cannot use it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: got {name!r}, expected one that torch {torch.__version__} can use, and it finds no GPU; use cpu, "
            "or install a CUDA build of torch and a driver (see hf-flash-mc env)"
        )
    return device


def default_name(device: torch.device) -> str:
    """attention-h100.csv and the like."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    match = re.search(r"\b([A-Z]{1,3}\d{2,4}\w*|MI\d+\w*)\b", name)
    return f"attention-{(match.group(1) if match else name.replace(' ', '-')).lower()}.csv"
