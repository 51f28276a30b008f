"""Timing of one cell: every implementation passes the gate, then all run in turns; and the host time of small calls."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_flash_mc.measure.cells import Cell
from hf_flash_mc.measure.peers import CONTIGUOUS, OURS, Maker, Unavailable, applies, ours
from hf_flash_mc.measure.problem import Attention, Gate, Problem, make_problem
from hf_flash_mc.measure.record import Line, line, quantile

# cells that memory bounds: a device copy of as many bytes runs beside
COPY_GROUPS = ("windows", "cross", "decode", "paged")
HOST_CELL = Cell("host", 64, True, 1, 16, 16, 128, 128)
HOST_CALLS, HOST_REPEATS = 100, 15


@dataclass(frozen=True)
class Effort:
    """``rounds`` of every implementation, each round in another order.

    So clocks and neighbours drift over all of them alike, and none always follows one that draws little power and
    leaves the GPU cool.
    """

    rounds: int = 6
    sample_ms: int = 30
    warmup_ms: int = 10

    @property
    def text(self) -> str:
        return (
            f"median, p20 and p80 over {self.rounds} rounds of {self.sample_ms} ms in changing order; checked before "
            "timing"
        )


FULL, QUICK, SMOKE = Effort(), Effort(6, 10, 4), Effort(3, 4, 1)
Call = Callable[[], object]


def measure_cell(
    cell: Cell, device: torch.device, dtype: torch.dtype, implementations: dict[str, Maker], effort: Effort = FULL
) -> list[Line]:
    """Check every implementation, then time the ones that passed."""
    problem = make_problem(cell, device, dtype)
    makers = {n: m for n, m in implementations.items() if applies(n, cell)}
    gate = Gate(problem)
    runs: dict[str, dict[str, Call]] = {}
    notes: dict[tuple[str, str], str] = {}
    errors: dict[str, float | None] = {}
    for name, make in makers.items():
        runs[name], errors[name], found = _admit(name, make, problem, gate)
        notes |= {(name, direction): text for direction, text in found.items()}
    if cell.group in COPY_GROUPS:
        runs["copy"] = {d: _copy(cell.bytes(d, dtype.itemsize), device) for d in cell.directions}
    del gate
    lines = []
    for direction in cell.directions:
        samples: dict[str, list[float]] = {n: [] for n, calls in runs.items() if direction in calls}
        for i in range(effort.rounds):
            for name in random.Random(i).sample(list(samples), len(samples)):
                samples[name] += sample(runs[name][direction], device, effort)
        for name in runs:
            error = errors.get(name) if direction == "forward" else None
            note = notes.get((name, direction), "")
            lines.append(line(cell, dtype, direction, name, samples.get(name, []), note, rms_error=error))
    return lines


def _admit(
    name: str, make: Maker, problem: Problem, gate: Gate
) -> tuple[dict[str, Call], float | None, dict[str, str]]:
    """What may be timed of an implementation, by direction; the error of its output; and a note for a direction."""
    directions = problem.cell.directions
    backward = directions != ("forward",)
    problem_leaves = (problem.q, problem.k, problem.v)
    try:
        attention = make(problem)
        tensors = [x.detach().contiguous() if name in CONTIGUOUS else x.detach() for x in problem_leaves]
        leaves = [x.requires_grad_(backward) for x in tensors]
        out = attention(*leaves)
        # without the feature the result is another one; the cells without features hold it to the bound
        check = (lambda results: []) if name == "plain" else gate.failures
        if wrong := check((out.detach(),)):
            return {}, None, dict.fromkeys(directions, f"wrong: {'; '.join(wrong)}")
    except Exception as error:  # a peer that cannot take the shape is a result, not a crash
        return {}, None, dict.fromkeys(directions, why_not(error))
    calls: dict[str, Call] = {"forward": lambda: attention(*leaves)}
    where = _back_end(problem, name)
    notes = dict.fromkeys(directions, where)
    if backward:
        extra = [x for x in problem.options.values() if isinstance(x, Tensor) and x.requires_grad]
        wanted = leaves if name == "plain" else [*leaves, *(extra if name in OURS else [])]
        try:
            gradients = torch.autograd.grad(out, wanted, problem.dout, retain_graph=True)
            if wrong := check((out.detach(), *gradients)):
                return {}, None, dict.fromkeys(directions, f"wrong: {'; '.join(wrong)}")
            calls["backward"] = lambda: torch.autograd.grad(out, wanted, problem.dout, retain_graph=True)
        except Exception as error:  # FlashAttention-3 comes in builds without a backward
            notes["backward"] = why_not(error)
    rms = None if name == "plain" else float(f"{gate.rms_error(out):.4g}")
    return {d: calls[d] for d in directions if d in calls}, rms, notes


def why_not(error: Exception) -> str:
    """The note of what did not run."""
    text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return f"not run: {str(error) if isinstance(error, Unavailable) else text}"[:200]


def _back_end(problem: Problem, name: str) -> str:
    """Which of our back ends ran."""
    if name != "ours":
        return ""
    if problem.cell.page:
        return "runs on triton" if problem.q.is_cuda else "runs on cpu"
    from hf_flash_mc.ops import explain_attention

    options = dict(problem.options)
    if problem.cu_seqlens is not None:
        options |= dict(
            zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), problem.packed, strict=True)
        )
    return f"runs on {explain_attention(problem.q, problem.k, problem.v, **options).impl}"


def _copy(size: int, device: torch.device) -> Call:
    """A device copy that reads and writes ``size`` bytes together."""
    source = torch.zeros(max(size // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def sample(call: Call, device: torch.device, effort: Effort) -> list[float]:
    """Milliseconds of single calls; on a GPU by triton.testing.do_bench, which clears the L2 cache in between."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return list(do_bench(call, warmup=effort.warmup_ms, rep=effort.sample_ms, return_mode="all"))
    call()
    times: list[float] = []
    end = time.perf_counter() + effort.sample_ms / 1e3
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def spread(call: Callable[[], object], device: torch.device, samples: int, warmup: int) -> dict[str, float]:
    """Milliseconds of calls that end when the device is done, with the host's share: median, p20 and p80."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    times = []
    for _ in range(warmup + samples):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    return {f"{k}_ms": quantile(times[warmup:], q) for k, q in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}


def measure_host(device: torch.device, dtype: torch.dtype) -> list[Line]:
    """Host milliseconds of one small call while the GPU has nothing else to do: calls are enqueued, not waited for.

    SDPA chooses its own back end here: naming one is a context manager, which costs host time of its own.
    """
    problem = make_problem(HOST_CELL, device, dtype)
    q, k, v = problem.q, problem.k, problem.v
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    calls: dict[str, Attention] = {
        "ours": ours(problem),
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    work: dict[tuple[str, str], Call] = {}
    for name, call in calls.items():
        work["forward", name] = lambda call=call: call(q, k, v)  # type: ignore[misc]
        work["forward+backward", name] = lambda call=call: torch.autograd.grad(call(*leaves), leaves, problem.dout)  # type: ignore[misc]
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in work}
    count = HOST_CALLS if device.type == "cuda" else 2  # on a CPU this times the computation too: a smoke test
    for _ in range(HOST_REPEATS):
        for key, run in work.items():
            samples[key].append(host_time(run, device, count))
    return [line(HOST_CELL, dtype, f"host {d}", n, samples[d, n]) for d, n in work]


def host_time(call: Call, device: torch.device, count: int) -> float:
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
