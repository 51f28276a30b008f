"""What one small call costs the host, counted on stubs in the kernels' place: launches, memory, operators, frames.

A GPU waits for the host in small calls, and no GPU is needed to see that the host does more than it did. The counts
may fall, and then the table below falls too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import hf_flash_mc
from hf_flash_mc.ops import api, auto, checks, flash_attention, repeat
from hf_flash_mc.ops.hopper import backward_launch, launch
from hf_flash_mc.ops.hopper import plan as hopper_plan
from hf_flash_mc.ops.portable import launch as portable
from hf_flash_mc.ops.portable import plan, shapes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors stand in for those of a GPU")
PACKAGE = str(Path(hf_flash_mc.__file__).parent)
KERNELS = {
    launch: ["attn_fwd_hopper_kernel"],
    backward_launch: ["attn_bwd_hopper_kernel", "attn_bwd_hopper_rows", "attn_bwd_hopper_round"],
    portable: ["attn_fwd_kernel", "attn_bwd_prepare", "attn_bwd_dkdv_kernel", "attn_bwd_dq_kernel"],
    shapes: ["few_keys_fwd_kernel", "few_keys_bwd_kernel"],
}
Launched = tuple[str, tuple[Any, ...]]


class Cost(NamedTuple):
    """Of one call that was made before."""

    launches: int
    allocations: int
    operators: int  # through torch's dispatcher
    frames: int  # Python functions of this package that were called


# forward, and forward with backward, of the benchmarks' host cell: 16 heads of 64, 128 tokens, causal, bfloat16;
# by the kernels for a few keys, which take it, and by the general ones
COSTS = {
    "few keys": (Cost(1, 2, 0, 12), Cost(2, 5, 0, 20)),
    "sm90": (Cost(1, 2, 0, 12), Cost(4, 7, 0, 22)),
    "sm80": (Cost(1, 2, 0, 17), Cost(4, 7, 0, 51)),
}


class Stubs:
    """Kernels that do nothing, behind the launchers of a GPU; keeps what is launched.

    ``kind`` is the GPU's architecture, or "few keys": sm90 with the kernels that other kinds leave out.
    """

    def __init__(self, stack: ExitStack, kind: str):
        self.kind, arch = kind, "sm90" if kind == "few keys" else kind
        self.launched: list[Launched] = []
        self.allocated = 0
        for module in (auto, plan, launch):
            stack.enter_context(mock.patch.object(module, "architecture", return_value=arch))
        stack.enter_context(mock.patch.object(plan, "INTERPRETED", False))
        stack.enter_context(mock.patch.object(shapes, "ENABLED", kind == "few keys"))
        stack.enter_context(mock.patch.object(repeat, "KINDS", {"cpu"}))
        stack.enter_context(mock.patch.dict(api._AUTO, {"cpu": "auto"}))
        stack.enter_context(mock.patch.dict(checks.LIMITS, {"auto": checks.LIMITS["triton"]}))
        stack.enter_context(mock.patch.object(hopper_plan, "_runner", self.hopper_runner))
        stack.enter_context(mock.patch.object(plan, "_runner", self.portable_runner))
        for module, names in KERNELS.items():
            for name in names:
                stack.enter_context(mock.patch.object(module, name, Kernel(name)))
        for module in (launch, backward_launch, portable, shapes):
            stack.enter_context(mock.patch.object(module, "new_strided", self.new_strided))

    def new_strided(self, like: Tensor, layout: Any, dtype: torch.dtype | None = None) -> Tensor:
        self.allocated += 1
        return torch._C._dynamo.guards._empty_strided_cpu(*layout, dtype or like.dtype)

    def hopper_runner(self, compiled: Any, of: hopper_plan.Launch) -> Callable[..., None]:
        def run(bases: list[Tensor], addresses: Any, at: tuple[int, ...] | None = None) -> None:
            found = tuple(x.data_ptr() for x in bases)
            assert at in (None, found)
            self.launched.append((compiled.name, (*found, *addresses, of.grid, *of.numbers, *of.constants)))

        return run

    def portable_runner(self, compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            self.launched.append((compiled.name, (*args, grid)))

        return run


class Kernel:
    """``kernel[grid](...)`` gives the compiled kernel."""

    def __init__(self, name: str):
        self.name = name

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
        return lambda *args, **options: SimpleNamespace(name=self.name)


@pytest.fixture(params=list(COSTS))
def stubs(request: pytest.FixtureRequest) -> Iterator[Stubs]:
    plan.forget()
    with ExitStack() as stack:
        yield Stubs(stack, request.param)
    plan.forget()


def leaves(length: int) -> list[Tensor]:
    """q, k and v as projections leave them, on zeros."""
    return [torch.zeros(1, length, 16, 64, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3)]


def both(qkv: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    out, lse = flash_attention(*qkv, causal=True, return_lse=True)
    return (out, lse, *torch.autograd.grad(out, qkv, dout))


def measure(stubs: Stubs, call: Callable[[], Any]) -> Cost:
    stubs.launched.clear()
    stubs.allocated = frames = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal frames
        frames += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    call()
    launches, allocations = len(stubs.launched), stubs.allocated
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    with torch.autograd.profiler.profile() as profile:
        call()
    operators = [e.name for e in profile.function_events if e.name.startswith("aten::")]
    return Cost(launches, allocations, len(operators), frames)


def test_a_repeated_call_costs_the_host_no_more_than_it_did(stubs: Stubs) -> None:
    qkv = leaves(128)
    dout = torch.zeros_like(qkv[0])
    plain = [x.detach() for x in qkv]
    for _ in range(3):  # the first one compiles, the second one knows the plan
        both(qkv, dout)
        flash_attention(*plain, causal=True)
    costs = measure(stubs, lambda: flash_attention(*plain, causal=True)), measure(stubs, lambda: both(qkv, dout))
    for cost, most in zip(costs, COSTS[stubs.kind], strict=True):
        assert all(n <= limit for n, limit in zip(cost, most, strict=True)), f"{cost}, allowed {most}"


def named(launched: list[Launched], tensors: dict[str, Tensor]) -> list[Launched]:
    """With the names of tensors for addresses; others are numbered as they come."""
    names: dict[Any, str] = {x.data_ptr(): name for name, x in tensors.items()}

    def name(x: Any) -> Any:
        return names.setdefault(x, f"other {len(names)}") if type(x) is int and x > 1 << 32 else x

    return [(kernel, tuple(map(name, args))) for kernel, args in launched]


@pytest.mark.parametrize(
    ("options", "lengths", "kv_heads"),
    [({}, (128, 128), 4), ({"causal": True}, (128, 128), 2), ({"causal": True}, (128, 200), 4),
     ({"window": (40, 0), "softcap": 3.0}, (200, 200), 4), ({"scale": 0.3}, (2048, 128), 1)],
    ids=str,
)  # fmt: skip
def test_the_short_way_launches_what_the_long_way_does(
    stubs: Stubs, options: dict[str, Any], lengths: tuple[int, int], kv_heads: int
) -> None:
    sq, sk = lengths
    q = torch.zeros(2, sq, 4, 64, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    k, v = (torch.zeros(2, sk, kv_heads, 64, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(2))
    dout = torch.zeros_like(q)

    def run() -> list[Launched]:
        stubs.launched.clear()
        out, lse = flash_attention(q, k, v, **options, return_lse=True)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
        tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
        return named(stubs.launched, tensors)

    with mock.patch.object(repeat, "KINDS", set()):
        run()
        expected = run()
    assert not repeat._kept
    run(), run()
    with mock.patch.object(api, "_check", side_effect=AssertionError):
        assert run() == expected
    assert len(expected) >= (2 if stubs.kind == "few keys" else 3)


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "taken"),
    [(1, 16, 16, 128, "few"), (8, 16, 16, 128, "few"), (9, 16, 16, 128, "hopper"), (1, 16, 16, 129, "hopper"),
     (1, 16, 8, 128, "hopper"), (1, 16, 8, 64, "few"), (9, 16, 16, 64, "few")],
)  # fmt: skip
def test_a_call_that_runs_at_once_makes_one_launch_each_way(
    batch: int, heads: int, kv_heads: int, length: int, taken: str
) -> None:
    plan.forget()
    with ExitStack() as stack:
        stubs = Stubs(stack, "few keys")
        q = torch.zeros(batch, heads, length, 64, dtype=torch.bfloat16, requires_grad=True)
        k, v = (q.detach()[:, :kv_heads].requires_grad_() for _ in range(2))
        for _ in range(2):  # what is stubbed is the second launch
            stubs.launched.clear()
            both([q, k, v], torch.zeros_like(q))
    plan.forget()
    assert all(taken in name for name, _ in stubs.launched)
    assert len(stubs.launched) == (2 if taken == "few" else 4)
