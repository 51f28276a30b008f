"""The search behind ``hf-flash-mc tune``: which configuration of each kernel is the fastest for a shape, on this GPU.

Every candidate passes the error bound before it is timed. What beats the shipped table by 2 % goes into the user cache.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hf_flash_mc.measure.cells import Cell, parse
from hf_flash_mc.measure.problem import Gate, Problem, make_problem
from hf_flash_mc.measure.progress import Progress, text_table
from hf_flash_mc.measure.record import quantile
from hf_flash_mc.measure.timing import Effort, sample
from hf_flash_mc.ops.spec import Needs, Spec

DEFAULT_SHAPES = tuple(
    f"d{d}-{mask}-b4-h{2048 // d}:{2048 // d}-q4096-k4096" for d in (64, 128) for mask in ("full", "causal")
)
WORTH = 0.98  # of the shipped configuration's time, at most
FINAL = 3  # candidates that are timed once more, in turns with the shipped one
FIRST_LOOK, LAST_LOOK = Effort(1, 15, 3), Effort(4, 25, 5)
Configured = Callable[[Any], tuple[Any, ...]]


@dataclass
class Kernel:
    """One kernel of a call: what it is called in the cache, the shipped configuration, and how to run it with another.

    ``run(config)`` returns (out,) for a forward and (dq, dk, dv) for a backward.
    """

    kind: str
    shipped: NamedTuple
    candidates: list[NamedTuple]
    run: Configured


@dataclass(frozen=True)
class Found:
    """What the search says of one kernel; ``best`` is the shipped configuration where nothing beats it."""

    shape: str
    key: str
    shipped: NamedTuple
    shipped_ms: float
    best: NamedTuple
    best_ms: float
    tried: int
    failed: int

    @property
    def better(self) -> bool:
        return self.best != self.shipped


def kernels(problem: Problem, plan: Any) -> list[Kernel]:
    """The kernels that ``impl="auto"`` would run for the problem, forward and backward."""
    from hf_flash_mc.ops import explain_attention
    from hf_flash_mc.ops.portable import launch, shapes

    q, k, v, dout = problem.q, problem.k, problem.v, problem.dout
    spec, needs = Spec(**problem.options), Needs()
    impl = explain_attention(q, k, v, **problem.options).impl
    impl = "triton" if launch.INTERPRETED and q.device.type == "cpu" else impl
    if impl not in ("hopper", "triton"):
        raise ValueError(
            f"shape: expected one that runs on the GPU kernels, but {problem.cell.name} runs on {impl!r}, which has no "
            "tile sizes; see explain_attention"
        )
    state: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def saved() -> tuple[torch.Tensor, torch.Tensor]:
        if not state:
            state["forward"] = launch.forward(q, k, v, spec)
        return state["forward"]

    found = _hopper(problem, plan, spec, saved) if impl == "hopper" else []
    kinds = [x.kind for x in found]
    if "hopper_fwd" not in kinds:
        few = shapes.choose(plan, "fwd")
        if few:
            found.append(_few(plan, f"{few}_fwd", lambda c: shapes.forward(few, plan, q, k, v, spec, c)[:1]))
        else:
            found.append(_general(plan, "fwd", lambda c: launch.forward(q, k, v, spec, None, {"fwd": c})[:1]))
    if "hopper_bwd" in kinds or problem.cell.directions == ("forward",):
        return found
    family = shapes.choose(plan, "bwd")
    if family:

        def backward(c: Any) -> tuple[Any, ...]:
            return shapes.backward(family, plan, dout, None, q, k, v, *saved(), spec, needs, c)[:3]

        return [*found, _few(plan, f"{family}_bwd", backward)]
    for kind in ("dkdv", "dq"):

        def one(c: Any, kind: str = kind) -> tuple[Any, ...]:
            return launch.backward(dout, None, q, k, v, *saved(), spec, needs, False, None, {kind: c})[:3]

        found.append(_general(plan, kind, one))
    return found


def _general(plan: Any, kind: str, run: Configured) -> Kernel:
    """A portable kernel: tiles and warps around the shipped ones."""
    _, shipped = plan.variant(kind)
    return Kernel(kind + "+tma" * shipped.tma, shipped, list(_around(shipped)), run)


def _few(plan: Any, kind: str, run: Configured) -> Kernel:
    """A kernel for a few keys or queries: what holds them is fixed, the rest varies."""
    from hf_flash_mc.ops.portable import shapes

    shipped = shapes._config(plan, kind)
    assert shipped is not None
    few_keys = kind.startswith("few_keys")
    fixed = "block_n" if few_keys else "block_m"
    candidates = [c for c in _around(shipped) if getattr(c, fixed) == getattr(shipped, fixed)]
    rows = plan.sq * (plan.hq // plan.hkv)
    return Kernel(f"{kind}/{shapes._power(plan.sk if few_keys else rows)}", shipped, candidates, run)


def _around(shipped: Any) -> Iterator[Any]:
    """Half, the same and twice the tile, with 2, 4 or 8 warps and up to 4 stages."""
    for m, n, warps, stages in itertools.product((0.5, 1, 2), (0.5, 1, 2), (2, 4, 8), (-1, 0, 1)):
        block_m, block_n = int(shipped.block_m * m), int(shipped.block_n * n)
        if min(block_m, block_n) < 16 or block_m * block_n > 128 * 128 or not 1 <= shipped.num_stages + stages <= 4:
            continue
        a_thread = block_m * block_n // (32 * warps)  # logits: more do not fit in registers, fewer leave threads idle
        if warps != shipped.num_warps and not 8 <= a_thread <= 128:
            continue
        config = shipped._replace(
            block_m=block_m, block_n=block_n, num_warps=warps, num_stages=shipped.num_stages + stages
        )
        if config != shipped:
            yield config


def _hopper(problem: Problem, plan: Any, spec: Spec, saved: Callable[[], Any]) -> list[Kernel]:
    """The Gluon kernels that take the problem."""
    from hf_flash_mc.ops.hopper import backward_launch, launch
    from hf_flash_mc.ops.hopper.plan import HopperConfig, padded, variant

    q, k, v, dout, needs = problem.q, problem.k, problem.v, problem.dout, Needs()
    _, _, shipped = variant(plan)
    grid = itertools.product((2, 3), (64, 128), (2, 3), (False, True))
    forward = [HopperConfig(g, n, s, t, True, 160 if g == 3 else 240) for g, n, s, t in grid]
    width = max(padded(plan.d), padded(plan.dv))
    forward = [c for c in forward if c != shipped and (c.groups == 2 or width == 64)]
    found = [Kernel("hopper_fwd", shipped, list(forward),
                    lambda c: launch.run_forward(plan, q, k, v, spec, None, c)[:1])]  # fmt: skip
    if not launch.backward_reasons(q, k, v, spec, needs, False):
        base = backward_launch.shipped_schedule(plan)
        changes: list[dict[str, Any]] = [{"AHEAD": not base.AHEAD}, {"K_REGS": not base.K_REGS}]
        changes += [{"SUBS": 3 - base.SUBS}] if width == 64 else []
        changes += [{**a, **b} for a, b in itertools.combinations(changes, 2)]
        found.append(Kernel(
            "hopper_bwd", base, [base._replace(**c) for c in changes],
            lambda c: backward_launch.backward(dout, None, q, k, v, *saved(), spec, needs, False, None, {"bwd": c})[:3],
        ))  # fmt: skip
    return found


@contextlib.contextmanager
def shipped_only() -> Iterator[None]:
    """Within it (and in processes that start there) the user cache is not looked at: it would compare with itself."""
    from hf_flash_mc.ops.portable.plan import forget as forget_plans
    from hf_flash_mc.ops.tuning import cache

    before = os.environ.get(cache.SETTING)
    os.environ[cache.SETTING] = "shipped"
    cache.forget()
    forget_plans()
    try:
        yield
    finally:
        os.environ.pop(cache.SETTING)
        if before is not None:
            os.environ[cache.SETTING] = before
        cache.forget()
        forget_plans()


def tune_shape(cell: Cell, device: torch.device, dtype: torch.dtype, most: int | None = None) -> list[Found]:
    """Search for one shape, each kernel by itself, within ``shipped_only``. ``most``: candidates a kernel at most."""
    from hf_flash_mc.ops.portable.plan import plan_of
    from hf_flash_mc.ops.tuning.cache import row_key

    problem = make_problem(cell, device, dtype)
    plan = plan_of(problem.q, problem.k, problem.v, Spec(**problem.options), None)
    gate, found = Gate(problem), []
    if device.type == "cuda":
        _compile_all(cell, dtype, most)
    for kernel in kernels(problem, plan):
        candidates = kernel.candidates[:most]
        key = row_key(kernel.kind, plan)
        assert key is not None  # plain or causal
        with Progress(f"{cell.name} {kernel.kind}", len(candidates) + 1) as bar:
            found.append(_search(cell.name, key, kernel, candidates, gate, device, bar))
    return found


def _search(
    shape: str, key: str, kernel: Kernel, candidates: list[Any], gate: Gate, device: torch.device, bar: Progress
) -> Found:
    """Time the candidates that are right, then the best few in turns with the shipped configuration."""
    out = gate.exact[:1]
    times: dict[Any, float] = {}
    failed = 0
    for config in [kernel.shipped, *candidates]:
        try:
            results = kernel.run(config)
            gradients = len(results) == 3
            wrong = gate.failures((_whole(gate, out[0]), *results) if gradients else results)
            if wrong:
                raise ArithmeticError("; ".join(wrong))
            times[config] = quantile(sample(lambda config=config: kernel.run(config), device, FIRST_LOOK), 0.5)  # type: ignore[misc]
            text = f"{times[config]:.4f} ms"
        except Exception as error:
            if config == kernel.shipped:
                raise RuntimeError(
                    f"{shape} {kernel.kind}: the shipped configuration {config} fails: {error}"
                ) from error
            failed, text = failed + 1, f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
        bar.step(f"{kernel.kind} {tuple(config)}: {text}")
    final = sorted(times, key=lambda c: times[c])[:FINAL]
    final = list(dict.fromkeys([kernel.shipped, *final]))
    samples: dict[Any, list[float]] = {c: [] for c in final}
    for _ in range(LAST_LOOK.rounds):
        for config in final:
            samples[config] += sample(lambda config=config: kernel.run(config), device, LAST_LOOK)  # type: ignore[misc]
    medians = {c: quantile(s, 0.5) for c, s in samples.items()}
    shipped_ms = medians[kernel.shipped]
    best = min(medians, key=lambda c: medians[c])
    if medians[best] > WORTH * shipped_ms:
        best = kernel.shipped
    return Found(shape, key, kernel.shipped, shipped_ms, best, medians[best], len(candidates) + 1, failed)


def _whole(gate: Gate, out: torch.Tensor) -> torch.Tensor:
    """A tensor laid out like the problem's output whose checked piece is ``out``: backwards alone have none."""
    whole = torch.zeros_like(gate.problem.q)
    gate.problem.piece_of(whole, out.shape[1]).copy_(out)
    return whole


def _compile_all(cell: Cell, dtype: torch.dtype, most: int | None) -> None:
    """Every candidate once, in parallel processes; failures show again, and are counted, in the search."""
    from hf_flash_mc.measure.warm import MOST_WORKERS, in_parallel

    jobs = {f"part {i} of {MOST_WORKERS}": (cell, dtype, most, i) for i in range(MOST_WORKERS)}
    in_parallel(f"compiling for {cell.name}", _compile_part, jobs, 600)


def _compile_part(job: tuple[Cell, torch.dtype, int | None, int]) -> None:
    from hf_flash_mc.measure.warm import MOST_WORKERS
    from hf_flash_mc.ops.portable.plan import plan_of

    cell, dtype, most, part = job
    problem = make_problem(cell, torch.device("cuda"), dtype)
    plan = plan_of(problem.q, problem.k, problem.v, Spec(**problem.options), None)
    work = [(kernel, c) for kernel in kernels(problem, plan) for c in [kernel.shipped, *kernel.candidates[:most]]]
    for kernel, config in work[part::MOST_WORKERS]:
        try:
            kernel.run(config)
        except Exception:  # too much shared memory and the like: the search says so
            continue
    torch.cuda.synchronize()


def tune(shapes: list[str], device: str, dtype: str, most: int | None = None, dry_run: bool = False) -> str:
    """Search for every shape, store what is better, and say so in a table.

    Raises:
        ValueError: for a shape, device or dtype that cannot be tuned.
    """
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in dtypes:
        raise ValueError(f"dtype: expected one of {', '.join(dtypes)}, got {dtype!r}")
    if most is not None and most < 1:
        raise ValueError(f"most: expected at least 1 configuration, got {most}; leave it out to try all")
    cells = [parse(name) for name in shapes]
    where = torch.device(device)
    if where.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"device: expected a GPU that torch can use, got {device!r}: the CPU back end has no tile sizes to tune"
        )
    from hf_flash_mc.ops.tuning import cache

    found: list[Found] = []
    with shipped_only():
        for cell in cells:
            found += tune_shape(cell, where, dtypes[dtype], most)
    lines = [_table(found)]
    if dry_run:
        return "\n".join([*lines, "nothing stored (dry run)"])
    file = cache.store({x.key: list(x.best) if x.better else None for x in found})
    better = sum(x.better for x in found)
    lines.append(f"{better} of {len(found)} kernels have a faster configuration; kept in {file}")
    if os.environ.get(cache.SETTING) == "shipped":
        lines.append(f"{cache.SETTING}=shipped is set: it will not be used")
    return "\n".join(lines)


def _table(found: list[Found]) -> str:
    rows = [
        [x.shape, x.key.split("/", 1)[0], f"{x.shipped_ms:.4f}", f"{x.best_ms:.4f}",
         f"{x.shipped_ms / x.best_ms:.2f}" if x.better else "-", f"{x.tried - x.failed}/{x.tried}",
         str(tuple(x.best)) if x.better else "shipped"]
        for x in found
    ]  # fmt: skip
    return text_table(["shape", "kernel", "shipped, ms", "best, ms", "faster", "ran", "configuration"], rows)


def clear() -> str:
    """Take the rows of this GPU, Triton and kernels out of the user cache."""
    from hf_flash_mc.ops.tuning import cache

    rows = cache.read().get(cache.owner(), {})
    if not rows:
        return f"{cache.path()} has no rows for {cache.owner()}"
    cache.store(dict.fromkeys(rows))
    return f"{len(rows)} rows taken out of {cache.path()}"
