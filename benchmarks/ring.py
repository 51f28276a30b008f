"""Measure ring and Ulysses attention of one sequence that is spread over ranks, against one rank and torch's own.

  torchrun --nproc-per-node 2 -m benchmarks.ring --out benchmarks/results/ring-h100.csv    a GPU a rank, NCCL
  torchrun --nproc-per-node 2 -m benchmarks.ring --device cpu --out ring-cpu.csv           gloo, tiny: a smoke test
  torchrun --nproc-per-node 2 -m benchmarks.ring --only causal.*q131072                    these cells

Correctness first: out, dq, dk and dv of the last batch entry and KV head are gathered and held to the bound of the
tests, in which one rank's attention in the same dtype is "the same formula" and one in float32 (float64 on a CPU) is
exact. What misses it is not timed, and the exit code is 1. Then all implementations run in turns, in several rounds. A
sample is the time from a common start to the slowest rank's end. "one rank" has the whole sequence on one GPU, the
others idle. TFLOP/s and tokens/s are of all ranks together; memory is the fullest rank's, inputs included.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_flash_mc.measure import cells as registry
from hf_flash_mc.measure import record, run
from hf_flash_mc.measure.cells import Cell
from hf_flash_mc.measure.peers import Unavailable
from hf_flash_mc.measure.problem import NAMES, Attention, Piece, differentiate, error_and_bound, make_problem, piece
from hf_flash_mc.measure.progress import Progress, text_table
from hf_flash_mc.measure.timing import why_not
from hf_flash_mc.ops import (
    explain_attention,
    flash_attention,
    ring_attention,
    shard_sequence,
    ulysses_attention,
    unshard_sequence,
)

ONE = "one rank"
ROUNDS = 3
_TENSORS = ("q", "k", "v", "dout")
STUCK = timedelta(minutes=5)  # a rank that failed alone leaves the others waiting; then they end too


def program(ranks: int = 2) -> str:
    return f"torchrun --nproc-per-node {ranks} -m benchmarks.ring"


@dataclass(frozen=True)
class SpreadLine(record.Line):
    """A line of the file: ``tokens_per_s`` of all ranks together, ``times_one`` as fast as one rank."""

    ranks: int = 1
    backend: str = ""
    tokens_per_s: float | None = None
    times_one: float | None = None


@dataclass(frozen=True)
class Way:
    """How an implementation spreads a sequence; ``make`` gives its attention of this rank's shards."""

    layout: str
    make: Callable[[Cell], Attention]
    torchs: bool = False  # runs inside torch's context_parallel()


def _ours(function: Callable[..., Tensor], layout: str) -> Way:
    return Way(layout, lambda cell: partial(function, causal=cell.causal, layout=layout))


def _torchs(backend: SDPBackend) -> Way:
    """torch.distributed.tensor.experimental.context_parallel, which cuts in our zigzag order."""

    def make(cell: Cell) -> Attention:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                gqa = cell.q_heads != cell.kv_heads
                return F.scaled_dot_product_attention(q, k, v, is_causal=cell.causal, enable_gqa=gqa)

        return attention

    return Way("zigzag", make, torchs=True)


WAYS: dict[str, Way] = {
    "ring": _ours(ring_attention, "zigzag"),
    "ring-contiguous": _ours(ring_attention, "contiguous"),
    "ulysses": _ours(ulysses_attention, "contiguous"),
    "torch-cp-fa2": _torchs(SDPBackend.FLASH_ATTENTION),
    "torch-cp-cudnn": _torchs(SDPBackend.CUDNN_ATTENTION),
}


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(program(), description=__doc__, formatter_class=raw)
    parser.add_argument("--list", action="store_true", help="print the cells, measure nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="regular expressions on a cell's name")
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help=f"of {', '.join((ONE, *WAYS))}")
    parser.add_argument("--sample-ms", type=float, help="of an implementation in each round (default 200, on a CPU 4)")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="S", help="end within S seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--dtype", choices=run.DTYPES, help="default bfloat16, on a CPU float32")
    parser.add_argument("--out", type=Path, default=Path("ring.csv"), metavar="FILE.csv", help="default ring.csv")
    return parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    try:
        device = run.check_device(options.device)
        gpu = device.type == "cuda"
        cells = registry.select(registry.RING if gpu else registry.RING_SMOKE, options.only)
        names = options.implementations or [ONE, *WAYS]
        if unknown := [n for n in names if n not in (ONE, *WAYS)]:
            raise ValueError(f"implementations: expected some of {', '.join((ONE, *WAYS))}, got {', '.join(unknown)}")
        if not options.list:
            _check_launch(device)
    except ValueError as error:
        print(f"benchmarks.ring: {error}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # the ranks share the cores
    dist.init_process_group("nccl" if gpu else "gloo", timeout=STUCK)
    try:
        dtype = run.DTYPES[options.dtype or ("bfloat16" if gpu else "float32")]
        session = Session(device, dtype, names, options.sample_ms or (200 if gpu else 4), options.time_limit)
        given = [options.out.name if a == str(options.out) else a for a in arguments]  # its folder is nobody's concern
        command = shlex.join([*program(session.ranks).split(), *given])
        return session.measure(cells, options.out.with_suffix(".csv"), command)
    finally:
        dist.destroy_process_group()


def _check_launch(device: torch.device) -> None:
    ranks = int(os.environ.get("WORLD_SIZE", "0"))
    if ranks < 2:
        raise ValueError(f"expected two ranks or more, got {ranks or 'none'}; start it by: {program()}")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if device.type == "cuda" and torch.cuda.device_count() < local:
        raise ValueError(
            f"device: expected a GPU for each of {local} ranks, got {torch.cuda.device_count()}; start fewer, or use "
            "--device cpu"
        )


class Gate:
    """What must hold before anything is timed, on the last batch entry and its last KV head."""

    def __init__(self, cell: Cell, part: Piece) -> None:
        attention = partial(flash_attention, causal=cell.causal)
        wide = torch.float64 if part.q.device.type == "cpu" else torch.float32
        self.native = differentiate(attention, part)
        self.exact = differentiate(attention, part._replace(**{n: getattr(part, n).to(wide) for n in _TENSORS}))

    def failures(self, shards: tuple[Tensor, ...], layout: str) -> list[str]:
        """What misses the bound, of this rank's out, dq, dk and dv and the other ranks'."""
        found = []
        for name, x, right, plain in zip(NAMES, shards, self.exact, self.native, strict=True):
            whole = unshard_sequence(x[-1:, -right.shape[1] :].contiguous(), dim=2, layout=layout)
            error, bound = error_and_bound(whole, right, plain)
            if not error <= bound:
                found.append(f"{name} is off by {error:.1e}, {bound:.1e} is allowed")
        return found


class Candidate:
    """One implementation with its tensors on this rank; ``mesh`` where it runs inside torch's context_parallel()."""

    def __init__(self, attention: Attention, tensors: list[Tensor], length: int, mesh: Any = None) -> None:
        self.attention, self.length, self.mesh = attention, length, mesh
        self.leaves, self.dout = [x.detach().requires_grad_() for x in tensors[:3]], tensors[3]
        self.out: Tensor | None = None  # whose graph the timed backward runs over and over

    def inside(self) -> AbstractContextManager[None]:
        if self.mesh is None:
            return nullcontext()
        from torch.distributed.tensor.experimental import context_parallel

        rows = torch.arange(self.length, device=self.dout.device)[None]  # it wants something to cut
        return context_parallel(self.mesh, buffers=[rows], buffer_seq_dims=[1], no_restore_buffers={rows})

    def differentiate(self) -> tuple[Tensor, ...]:
        """out, dq, dk and dv."""
        out = self.attention(*self.leaves)
        return (out.detach(), *torch.autograd.grad(out, self.leaves, self.dout))

    def forward(self) -> None:
        with torch.no_grad():
            self.attention(*self.leaves)

    def backward(self) -> None:
        torch.autograd.grad(self.out, self.leaves, self.dout, retain_graph=True)  # type: ignore[arg-type]

    def call(self, direction: str) -> Callable[[], object]:
        if direction == "forward":
            return self.forward
        if self.out is None:
            self.out = self.attention(*self.leaves)
        return self.backward

    @property
    def gib(self) -> float:
        return sum(x.numel() * x.element_size() for x in (*self.leaves, self.dout)) / 2**30


class Session:
    """One rank's part of a run. What decides how often anything runs is agreed upon, so that no rank waits in vain."""

    def __init__(self, device: torch.device, dtype: torch.dtype, names: list[str], sample_ms: float, limit: float):
        self.device, self.dtype, self.names, self.sample_ms = device, dtype, names, sample_ms
        self.end = time.monotonic() + limit
        self.rank, self.ranks, self.backend = dist.get_rank(), dist.get_world_size(), dist.get_backend()
        self.mesh = init_device_mesh(device.type, (self.ranks,))
        self.lines: list[SpreadLine] = []
        self.missing: list[str] = []

    def measure(self, cells: list[Cell], path: Path, command: str) -> int:
        """Every cell; the exit code, the same on every rank."""
        method = f"median, p20 and p80 of the slowest rank over {ROUNDS} interleaved rounds; checked before timing"
        about = record.describe_run(self.device, command, method)
        longest = 0.0
        with Progress("measuring", len(cells)) if self.rank == 0 else nullcontext() as bar:
            for cell in cells:
                begun = time.monotonic()
                if self._largest(begun + 1.5 * longest > self.end):
                    self.missing.append(cell.name)
                    continue
                self.lines += self._cell(cell)
                if self.rank == 0:
                    record.write(self.lines, about, path)
                longest = self._largest(max(longest, time.monotonic() - begun))
                self._free()
                if bar is not None:
                    bar.step(cell.name)
        wrong = [f"{x.implementation} {x.cell}: {x.note}" for x in self.lines if "wrong" in x.note]
        if self.rank == 0:
            for title, texts in (("wrong results, not timed:", wrong), ("missing (time limit):", self.missing)):
                if texts:
                    print("\n".join([title, *texts]))
            print(f"wrote {len(self.lines)} lines to {path.name}" if self.lines else "nothing was measured")
            print(table(self.lines))
        return run.WRONG if wrong else run.INCOMPLETE if self.missing else 0

    def _cell(self, cell: Cell) -> list[SpreadLine]:
        whole = make_problem(cell, self.device, self.dtype)
        gate = Gate(cell, piece(whole))
        tensors = [x.detach() for x in (whole.q, whole.k, whole.v, whole.dout)]
        del whole
        layouts = {n: WAYS[n].layout for n in self.names if n != ONE and (cell.causal or n != "ring-contiguous")}
        shards = {layout: [_share(x, layout) for x in tensors] for layout in sorted(set(layouts.values()))}
        found: dict[str, Candidate | None] = {}
        notes: dict[str, str] = {}
        if ONE in self.names:
            attention = partial(flash_attention, causal=cell.causal)
            found[ONE] = Candidate(attention, tensors, cell.sq) if self.rank == 0 else None
            notes[ONE] = _back_end(cell, tensors)
        del tensors
        for name, layout in layouts.items():
            try:
                found[name], notes[name] = self._admit(WAYS[name], cell, shards[layout], gate)
            except Exception as error:  # what does not run here is a result, which all ranks meet alike
                notes[name] = why_not(error)
        found = {name: x for name, x in found.items() if name == ONE or x is not None}
        peaks = {(n, d): self._peak(x, d) for n, x in found.items() for d in registry.BOTH}
        samples = self._sample(found)
        return [self._line(cell, n, d, samples, notes[n], peaks.get((n, d))) for d in registry.BOTH for n in notes]

    def _admit(self, way: Way, cell: Cell, shards: list[Tensor], gate: Gate) -> tuple[Candidate | None, str]:
        """What may be timed, and the note of its lines."""
        if way.torchs and self.device.type != "cuda":
            raise Unavailable("torch's context_parallel has back ends for GPUs only")
        candidate = Candidate(way.make(cell), shards, cell.sq, self.mesh if way.torchs else None)
        with candidate.inside():
            results = candidate.differentiate()
        wrong = gate.failures(results, way.layout)
        if self._largest(len(wrong)):
            return None, f"wrong: {'; '.join(wrong) or 'on another rank'}"
        return candidate, "" if way.torchs else _back_end(cell, shards)

    def _peak(self, candidate: Candidate | None, direction: str) -> float | None:
        """GiB of the fullest rank: the candidate's inputs, and what the forward (then the backward too) adds."""
        if self.device.type != "cuda":
            return None
        peak = 0.0
        if candidate is not None:
            self._free()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() / 2**30
            with candidate.inside():
                _ = candidate.forward() if direction == "forward" else candidate.differentiate()
            self._wait()
            peak = torch.cuda.max_memory_allocated() / 2**30 - before + candidate.gib
        return self._largest(peak)

    def _sample(self, found: Mapping[str, Candidate | None]) -> dict[tuple[str, str], list[float]]:
        """Milliseconds of every candidate and direction, in turns."""
        samples: dict[tuple[str, str], list[float]] = {(n, d): [] for d in registry.BOTH for n in found}
        for turn in range(ROUNDS + 1):  # the first says how many calls a round has
            for (name, direction), times in samples.items():
                candidate = found[name]
                count = 1 if turn == 0 else max(1, min(100, round(self.sample_ms / times[0])))
                with candidate.inside() if candidate else nullcontext():
                    call = candidate.call(direction) if candidate else _nothing
                    if turn == 0:
                        call()
                    times += [self._time(call) for _ in range(count)]
        return {key: times[1:] for key, times in samples.items()}

    def _time(self, call: Callable[[], object]) -> float:
        """Milliseconds that the slowest rank takes, from a common start."""
        dist.barrier()
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        return self._largest((time.perf_counter() - start) * 1e3)

    def _line(
        self, cell: Cell, name: str, direction: str, samples: dict[tuple[str, str], list[float]], note: str,
        peak: float | None,
    ) -> SpreadLine:  # fmt: skip
        times, one = samples.get((name, direction), []), samples.get((ONE, direction), [])
        line = record.line(cell, self.dtype, direction, name, times, note, peak)
        ranks = 1 if name == ONE else self.ranks
        if line.median_ms is None:
            return SpreadLine(**asdict(line), ranks=ranks, backend=self.backend)
        tokens = round(cell.batch * cell.sq / line.median_ms * 1e3)
        faster = round(record.quantile(one, 0.5) / line.median_ms, 3) if one else None
        return SpreadLine(**asdict(line), ranks=ranks, backend=self.backend, tokens_per_s=tokens, times_one=faster)

    def _largest(self, x: float) -> float:
        """The largest of the ranks' values."""
        values = torch.tensor(float(x), dtype=torch.float64, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.item()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _nothing() -> None:
    """What the other ranks do while one has it all."""


def _share(x: Tensor, layout: str) -> Tensor:
    """This rank's rows, on [B, S, H, D] memory."""
    return shard_sequence(x, dim=2, layout=layout).transpose(1, 2).contiguous().transpose(1, 2)


def _back_end(cell: Cell, tensors: list[Tensor]) -> str:
    return f"runs on {explain_attention(*tensors[:3], causal=cell.causal).impl}"


def table(lines: list[SpreadLine]) -> str:
    """What was measured, for a terminal."""
    head = ["cell", "direction", "implementation", "ranks", "ms", "p20", "p80", "TFLOP/s", "tokens/s", "of one", "GiB"]
    rows = []
    for x in lines:
        row = [x.cell, x.direction, x.implementation, str(x.ranks)]
        if x.median_ms is None:
            rows.append([*row, *["-"] * (len(head) - len(row)), x.note])
            continue
        row += [f"{ms:.3f}" for ms in (x.median_ms, x.p20_ms or 0, x.p80_ms or 0)]
        row += [f"{x.tflops:.1f}", f"{x.tokens_per_s:.0f}", "-" if x.times_one is None else f"{x.times_one:.2f} x"]
        rows.append([*row, "-" if x.peak_gib is None else f"{x.peak_gib:.2f}", x.note])
    return text_table([*head, "note"], rows)


if __name__ == "__main__":
    sys.exit(main())
