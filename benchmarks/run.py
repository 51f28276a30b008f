"""Measure attention against its peers in one run: correctness first, then interleaved medians, then host time.

    python -m benchmarks.run                      # every shape; about five minutes on an H100
    python -m benchmarks.run --quick              # S 4096, head dims 64 and 128
    python -m benchmarks.run --cells causal-b4    # the shapes whose name matches

Writes results/attention-GPU.csv, one line per shape, direction and implementation, and a JSON file beside it that says
where and how it was measured. An implementation that misses the error bound is not timed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

import hf_flash_mc
from benchmarks import registry
from benchmarks.registry import Attention, Cell

RESULTS = Path(__file__).parent / "results"
ROUNDS = 3  # of every implementation in turn, so that clocks and neighbours drift over all of them alike
SAMPLE_MS, WARMUP_MS = 60, 15  # per round
HOST_CELL = Cell("host", 64, True, 1, 16, 16, 128, 128)
HOST_CALLS, HOST_REPEATS = 100, 15


@dataclass(frozen=True)
class Line:
    """One measurement; times in milliseconds. ``note`` says why there is none."""

    group: str
    cell: str
    head_dim: int
    causal: bool
    batch: int
    q_heads: int
    kv_heads: int
    sq: int
    sk: int
    dtype: str
    direction: str
    implementation: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    tflops: float | None = None
    samples: int = 0
    note: str = ""


def line(cell: Cell, dtype: torch.dtype, direction: str, name: str, samples: list[float], note: str = "") -> Line:
    shape = {f.name: getattr(cell, f.name) for f in fields(Cell)}
    head = {"cell": cell.name, **shape, "dtype": str(dtype)[6:], "direction": direction, "implementation": name}
    if not samples:
        return Line(**head, note=note)
    low, middle, high = (quantile(samples, q) for q in (0.2, 0.5, 0.8))
    tflops = None if cell.group == "host" else round(cell.flops(direction) / middle / 1e9, 1)
    times = [round(t, 6) for t in (middle, low, high)]
    return Line(**head, median_ms=times[0], p20_ms=times[1], p80_ms=times[2], tflops=tflops, samples=len(samples))


def quantile(samples: list[float], q: float) -> float:
    """Linear between the samples."""
    return torch.tensor(samples, dtype=torch.float64).quantile(q).item()


def measure_cell(cell: Cell, device: torch.device, dtype: torch.dtype, implementations: dict) -> list[Line]:
    """Check every implementation, then time the ones that passed, interleaved, forward and backward."""
    inputs = registry.make_inputs(cell, device, dtype)
    runs: dict[str, dict[str, Callable[[], object]]] = {}
    notes: dict[str, str] = {}
    bound = Bound(cell, *inputs)
    for name, make in implementations.items():
        try:
            attention = make(cell)
            bound.check(name, attention)
            runs[name] = directions(attention, *inputs)
        except AssertionError as error:
            notes[name] = f"wrong: {error}"
        except Exception as error:  # a peer that cannot take the shape is a result, not a crash
            notes[name] = f"not run: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    lines = []
    for direction in ("forward", "backward"):
        samples: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                samples[name] += sample(run[direction], device)
        lines += [line(cell, dtype, direction, n, samples.get(n, []), notes.get(n, "")) for n in implementations]
    return lines


def directions(attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed: a forward that records its graph, as in training, and the backward of one kept graph."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return {
        "forward": lambda: attention(*leaves),
        "backward": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
    }


class Bound:
    """The project's error bound on a slice of a cell: its last batch entry and KV head, where offsets are largest."""

    def __init__(self, cell: Cell, q: Tensor, k: Tensor, v: Tensor, dout: Tensor):
        self.inputs, self.dtype = (q, k, v, dout), q.dtype
        group = cell.q_heads // cell.kv_heads
        self.heads = (slice(-group, None), slice(-1, None))
        rows, keys = ((slice(-1, None), heads) for heads in self.heads)
        small = q[rows], k[keys], v[keys], dout[rows]
        self.exact = registry.reference_slice(cell, *small)
        self.native = differentiate(registry.sdpa(cell, SDPBackend.MATH), *small)

    def check(self, name: str, attention: Attention) -> None:
        """AssertionError if out, dq, dk or dv is off by more than the bound that the tests use."""
        from tests.helpers import check_bound

        results = differentiate(attention, *self.inputs)
        heads = (self.heads[0], self.heads[0], self.heads[1], self.heads[1])
        names = ("out", "dq", "dk", "dv")
        for n, x, h, exact, native in zip(names, results, heads, self.exact, self.native, strict=True):
            check_bound(n, x[-1:, h], exact, native, self.dtype, name)


def differentiate(attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def sample(call: Callable[[], object], device: torch.device) -> list[float]:
    """Milliseconds of single calls; on a GPU by triton.testing.do_bench, which clears the L2 cache in between."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return list(do_bench(call, warmup=WARMUP_MS, rep=SAMPLE_MS, return_mode="all"))
    call()
    times = []
    end = time.perf_counter() + SAMPLE_MS / 1e3
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def measure_host(device: torch.device, dtype: torch.dtype, impl: str) -> list[Line]:
    """Host milliseconds of one small call while the GPU has nothing else to do: calls are enqueued, not waited for.

    SDPA chooses its own back end here: naming one is a context manager, which costs host time of its own.
    """
    q, k, v, dout = registry.make_inputs(HOST_CELL, device, dtype)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    calls: dict[str, Attention] = {
        "ours": registry.ours(HOST_CELL, impl),
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    work: dict[tuple[str, str], Callable[[], object]] = {}
    for name, call in calls.items():
        work["forward", name] = lambda call=call: call(q, k, v)
        work["forward+backward", name] = lambda call=call: torch.autograd.grad(call(*leaves), leaves, dout)
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    count = HOST_CALLS if device.type == "cuda" else 2  # on a CPU this times the computation too: a smoke test
    for _ in range(HOST_REPEATS):
        for key, call in work.items():
            samples[key].append(host_time(call, device, count))
    return [line(HOST_CELL, dtype, f"host {d}", n, samples[d, n]) for d, n in work]


def host_time(call: Callable[[], object], device: torch.device, count: int) -> float:
    """Milliseconds of host time a call, over ``count`` calls without a wait between them."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call()
    wait()
    start = time.perf_counter()
    for _ in range(count):
        call()
    elapsed = time.perf_counter() - start
    wait()
    return elapsed * 1e3 / count


def metadata(device: torch.device, arguments: list[str], seconds: float) -> dict[str, object]:
    """Where and how: GPU, versions, commit, the command that anyone can run."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "cuda": torch.version.cuda,
        "driver": driver_version() if device.type == "cuda" else None,
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "triton", "transformers")},
        "hf-flash-mc": hf_flash_mc.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.run", *arguments]),
        "seconds": round(seconds),
        "method": f"median, p20 and p80 over {ROUNDS} interleaved rounds of {SAMPLE_MS} ms; checked before timing",
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True).splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def commit() -> str | None:
    """The checked-out commit, "-dirty" if files that are measured differ from it; None outside a repository.

    A copy of the tree without its repository says which commit it is in the environment variable BENCHMARK_COMMIT.
    """
    here = Path(__file__).parent.parent
    if os.environ.get("BENCHMARK_COMMIT"):
        return os.environ["BENCHMARK_COMMIT"]
    try:
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.check_output(
            ["git", "status", "--porcelain", "ops", "benchmarks/*.py"], cwd=here, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("-dirty" if changed.strip() else "")


def write(lines: list[Line], meta: dict[str, object], stem: Path) -> None:
    """STEM.csv and STEM.json."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Line)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(x) for x in lines)
    stem.with_suffix(".json").write_text(json.dumps(meta, indent=2) + "\n")


def default_stem(device: torch.device) -> Path:
    """results/attention-h100 and the like."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    match = re.search(r"\b([A-Z]{1,3}\d{2,4}\w*|MI\d+\w*)\b", name)
    return RESULTS / f"attention-{(match.group(1) if match else name.replace(' ', '-')).lower()}"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="only S 4096 at head dims 64 and 128")
    parser.add_argument("--cells", help="regular expression on the shape's name, such as 'd128-causal'")
    parser.add_argument("--implementations", nargs="+", help="a choice of ours, fa2, cudnn, flex")
    parser.add_argument("--budget", type=float, default=600, help="start no shape after so many seconds (default 600)")
    parser.add_argument("--out", type=Path, help="where to write, without suffix (default results/attention-GPU)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    device, start = torch.device(options.device), time.monotonic()
    gpu = device.type == "cuda"
    dtype, impl = (torch.bfloat16, "triton") if gpu else (torch.float32, "cpu")
    implementations = registry.GPU_IMPLEMENTATIONS if gpu else registry.CPU_IMPLEMENTATIONS
    if options.implementations:
        implementations = {name: implementations[name] for name in options.implementations}
    cells = registry.SMOKE if not gpu else registry.QUICK if options.quick else registry.CELLS
    cells = [c for c in cells if re.search(options.cells or "", c.name)]
    lines = measure_host(device, dtype, impl)
    print_lines(lines, start)
    for cell in cells:
        if time.monotonic() - start > options.budget:
            print(f"budget of {options.budget:.0f} s used up: {cell.name} and what follows are left out")
            break
        lines += (new := measure_cell(cell, device, dtype, implementations))
        print_lines(new, start)
    write(lines, metadata(device, arguments, time.monotonic() - start), options.out or default_stem(device))
    wrong = [f"{x.implementation} {x.cell}: {x.note}" for x in lines if x.note.startswith("wrong")]
    print("\n".join(wrong))
    return 1 if wrong else 0


def print_lines(lines: list[Line], start: float) -> None:
    """One printed line per shape and direction."""
    for direction in dict.fromkeys(x.direction for x in lines):
        chosen = [x for x in lines if x.direction == direction]
        shown = ", ".join(
            f"{x.implementation} {x.note or f'{x.median_ms:.4f} ms'}{'' if x.tflops is None else f' {x.tflops:.0f} TF'}"
            for x in chosen
        )
        print(f"{time.monotonic() - start:6.1f} s  {chosen[0].cell} {direction}: {shown}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
