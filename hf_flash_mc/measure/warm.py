"""Compile what a measurement needs in parallel processes: kernels take 3 to 11 s each, and land in Triton's cache."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from hf_flash_mc.measure.cells import Cell
from hf_flash_mc.measure.progress import Progress

Job = TypeVar("Job")
MOST_WORKERS = 14
STALL = 50.0  # seconds: no kernel takes as long to compile


def in_parallel(
    label: str, function: Callable[[Job], Any], jobs: dict[str, Job], seconds: float, stall: float = float("inf")
) -> dict[str, Any]:
    """``function(job)`` of every job in processes of their own; those that came back within ``seconds``, by name.

    An exception of a job is its result. What still runs at the end, or once nothing came back for ``stall`` seconds (a
    process that crashed takes its job with it), is stopped. The functions and jobs are pickled.
    """
    results: dict[str, Any] = {}
    if not jobs:
        return results
    end = time.monotonic() + seconds
    workers = min(len(jobs), max((os.cpu_count() or 2) - 2, 1), MOST_WORKERS)
    with Progress(label, len(jobs)) as bar, multiprocessing.get_context("spawn").Pool(workers) as pool:
        waiting = pool.imap_unordered(_guarded, [(function, name, job) for name, job in jobs.items()])
        for _ in jobs:
            try:
                name, result = waiting.next(max(min(end - time.monotonic(), stall), 0.1))
            except multiprocessing.TimeoutError:
                break
            results[name] = result
            bar.step(f"{name}: {type(result).__name__}: {result}"[:120] if isinstance(result, Exception) else name)
    return results


def _guarded(work: tuple[Callable[[Any], Any], str, Any]) -> tuple[str, Any]:
    function, name, job = work
    try:
        return name, function(job)
    except Exception as error:
        return name, RuntimeError(f"{type(error).__name__}: {str(error)[-300:]}")  # one that can be pickled


def compile_cells(cells: list[Cell], dtype: torch.dtype, names: list[str], seconds: float) -> list[str]:
    """Run each cell once on the GPU, by these implementations of ours; the names of the cells that were not done."""
    jobs = {c.name: (c, dtype, names) for c in cells if c.group != "train"}
    results = in_parallel("compiling", run_once, jobs, seconds, STALL)
    return [n for n in jobs if n not in results or isinstance(results[n], Exception)]


def run_once(job: tuple[Cell, torch.dtype, list[str]]) -> None:
    """Forward, and backward where the cell has one, at the cell's own sizes: kernels depend on them."""
    from hf_flash_mc.measure.peers import IMPLEMENTATIONS, applies
    from hf_flash_mc.measure.problem import make_problem

    cell, dtype, names = job
    problem = make_problem(cell, torch.device("cuda"), dtype)
    backward = cell.directions != ("forward",)
    for name in names:
        if not applies(name, cell):
            continue
        leaves = [x.detach().requires_grad_(backward) for x in (problem.q, problem.k, problem.v)]
        out = IMPLEMENTATIONS[name](problem)(*leaves)
        if backward:
            extra = [x for x in problem.options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
            torch.autograd.grad(out, [*leaves, *(extra if name != "plain" else [])], problem.dout)
    torch.cuda.synchronize()
