"""The registered ops on a GPU: opcheck on the Triton kernels, CUDA graphs, dropout in replays, autocast, host time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Case
from test_library_ops import (
    DENSE,
    PACKED,
    backward_arguments,
    backward_op,
    fastest,
    forward_op,
    op_arguments,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_flash_mc.ops import explain_attention, flash_attention

pytestmark = pytest.mark.gpu
ON_GPU = [case for case in DENSE if case.dtype != torch.float64] + PACKED


def to_gpu(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an op on the GPU, with the Triton kernels as back end."""
    moved = (x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args)
    return tuple("triton" if isinstance(x, str) else x for x in moved)


def qkv(b: int = 2, s: int = 128, requires_grad: bool = True) -> list[Tensor]:
    """bf16 q [b, 4, s, 64], k and v [b, 2, s, 64]."""
    shapes = [(b, h, s, 64) for h in (4, 2, 2)]
    return [torch.randn(n, device="cuda", dtype=torch.bfloat16, requires_grad=requires_grad) for n in shapes]


@pytest.mark.parametrize("case", [DENSE[0], DENSE[1], DENSE[2], DENSE[3], PACKED[0]], ids=str)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(forward_op(case), to_gpu(op_arguments(case)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_fake_outputs_have_strides_and_dtypes_of_real_ones(case: Case) -> None:
    for op, args in (
        (forward_op(case), to_gpu(op_arguments(case, requires_grad=False))),
        (backward_op(case), to_gpu(backward_arguments(case))),
    ):
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args))
        for i, (a, b) in enumerate(zip(real, fake, strict=True)):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device), f"output {i}"


def test_auto_chooses_and_says_why() -> None:
    few, usual = explain_attention(*qkv(s=16), causal=True), explain_attention(*qkv(s=256), causal=True)
    assert few.impl == "triton"
    assert "portable Triton kernels" in str(few)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert (usual.impl, "Hopper kernels" in str(usual)) == (("hopper", True) if hopper else ("triton", False))


def replay(function: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a captured CUDA graph gives in two replays, and what the function gives without one."""
    eager = function()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    graph.replay()
    first = out.clone()
    graph.replay()
    return first, out.clone(), eager


def test_cuda_graph_gives_what_eager_gives() -> None:
    q, k, v = qkv()

    def function() -> Tensor:
        out = flash_attention(q, k, v, causal=True)
        # detached: a graph that lives on ties its leaves to the stream it was made on, which no capture may touch
        return torch.cat(
            [x.detach().flatten() for x in (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))]
        )

    first, second, eager = replay(function)
    torch.testing.assert_close(first, second, atol=2e-2, rtol=2e-2)  # dq may be summed in another order
    torch.testing.assert_close(first, eager, atol=2e-2, rtol=2e-2)


def test_each_replay_of_a_cuda_graph_drops_other_weights() -> None:
    q, k, _ = qkv(requires_grad=False)
    v = torch.eye(128, 64, device="cuda", dtype=torch.bfloat16).expand(2, 2, 128, 64)
    first, second, _ = replay(lambda: flash_attention(q, k, v, dropout_p=0.5))
    assert not torch.equal(first == 0, second == 0)


def test_reduce_overhead_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_flash_mc.ops.hopper.programs._counters", {})  # the first call of all is within the warm-up

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, causal=True).float().square()

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # warm-up, capture, replay
        torch.compiler.cudagraph_mark_step_begin()
        inputs = qkv()
        found = compiled(*inputs)
        expected = function(*inputs)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        grads = [torch.autograd.grad(x.sum(), inputs) for x in (found, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, atol=3e-2, rtol=3e-2)


def test_autocast() -> None:
    inputs = [x.detach().float().requires_grad_() for x in qkv()]
    with torch.autocast("cuda", dtype=torch.float16):
        out, lse = flash_attention(*inputs, causal=True, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    out.float().sum().backward()
    assert {x.grad.dtype for x in inputs} == {torch.float32}


def test_host_time_of_a_small_call() -> None:
    # the GPU is done long before the host: no synchronisation, so this measures the host alone
    q, k, v = (x[:, :2].contiguous().detach().requires_grad_() for x in qkv(1, 64))
    dout = torch.randn_like(q)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    times = {}
    for name, function in (("ours", flash_attention), ("torch", sdpa)):
        causal = {"causal": True} if name == "ours" else {"is_causal": True}
        with torch.no_grad():
            forward = fastest(lambda f=function, c=causal: f(q, k, v, **c), 10)
        both = fastest(lambda f=function, c=causal: torch.autograd.grad(f(q, k, v, **c), (q, k, v), dout), 5)
        times[name] = forward, both
    print(f"\nhost microseconds, forward and forward plus backward: {times}")
    assert times["ours"][0] <= 1.2 * times["torch"][0]
    assert times["ours"][1] <= 1.0 * times["torch"][1]


REPEATED: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "full": {},
    "window and softcap": {"window": (300, 0), "softcap": 20.0},
    "sinks and dropout": {"causal": True, "sinks": True, "dropout_p": 0.2, "dropout_seed": 7},
    "key_log_weight and ranges": {"key_log_weight": True, "key_ranges": True},
}


@pytest.mark.parametrize("impl", ["hopper", "triton"])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("name", REPEATED)
def test_100_repeats_are_bit_identical(name: str, d: int, impl: str) -> None:
    """The forward, and the deterministic backward, however the GPU orders their programs."""
    if impl == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    torch.manual_seed(0)
    sizes = [(2, 1100, h, d) for h in (8, 4, 4)]
    q, k, v = (torch.randn(n, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for n in sizes)
    rows = torch.arange(1100, device="cuda", dtype=torch.int32)
    tensors = {
        "sinks": torch.randn(8, device="cuda", requires_grad=True),
        "key_log_weight": torch.randn(2, 4, 1100, device="cuda", requires_grad=True),
        "key_ranges": torch.stack([rows // 3, rows + 1], -1)[None, None],
    }
    options = {n: tensors[n] if x is True and n in tensors else x for n, x in REPEATED[name].items()}
    leaves = [q, k, v, *(x for x in options.values() if isinstance(x, Tensor) and x.requires_grad)]
    dout = torch.randn_like(q)
    torch.use_deterministic_algorithms(True)
    try:
        first: tuple[Tensor, ...] = ()
        for _ in range(100):
            out, lse = flash_attention(q, k, v, **options, impl=impl, return_lse=True)
            found = (out, lse, *torch.autograd.grad((out, lse.sum()), leaves, (dout, torch.ones_like(lse.sum()))))
            first = first or tuple(x.detach() for x in found)
            assert all(torch.equal(x, y) for x, y in zip(found, first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
