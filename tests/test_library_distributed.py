"""Attention on several ranks (gloo, two processes), and merging attention over parts of the keys."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import RANKS, gloo, on_ranks
from torch import Tensor, nn

from hf_flash_mc.ops import (
    flash_attention,
    flash_attention_varlen,
    merge_attention,
    ring_attention,
    ulysses_attention,
)
from hf_flash_mc.ops.reference import reference_attention

# ---- merge_attention -------------------------------------------------------------------------------------------------


def split_call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor, at: list[int]) -> tuple[Tensor, Tensor]:
    """Attention over slices of the keys, merged; the sinks with the first slice alone."""
    bounds = [0, *at, k.shape[2]]
    outs, lses = [], []
    for i, (lo, hi) in enumerate(itertools.pairwise(bounds)):
        out, lse = flash_attention(
            q, k[:, :, lo:hi], v[:, :, lo:hi], bias=bias[..., lo:hi], sinks=None if i else sinks, return_lse=True
        )
        outs.append(out)
        lses.append(lse)
    return merge_attention(outs, lses)


@pytest.mark.parametrize("at", [[3], [1, 1, 6], [0, 7]], ids=str)
def test_merged_parts_are_attention_over_all_keys(at: list[int]) -> None:
    gen = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 6), (1, 4, 5, 7), (4,))
    inputs = [torch.randn(n, generator=gen, dtype=torch.float64) for n in shapes]
    inputs[3][:, 1, 2, :3] = float("-inf")  # a row that sees nothing of the first part
    inputs = [x.requires_grad_() for x in inputs]
    q, k, v, bias, sinks = inputs
    found = split_call(q, k, v, bias, sinks, at)
    expected = reference_attention(q, k, v, bias=bias, sinks=sinks)
    weights = [torch.randn(x.shape, generator=gen, dtype=torch.float64) for x in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    gradients = [torch.autograd.grad(x, inputs, weights, allow_unused=True) for x in (found, expected)]
    for name, a, b in zip(("q", "k", "v", "bias", "sinks"), *gradients, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, n=name: f"{n}: {m}")


def test_merge_of_rows_that_no_part_sees() -> None:
    out = torch.zeros(1, 1, 2, 3, requires_grad=True)
    lse = torch.tensor([[[float("-inf"), 0.5]]], requires_grad=True)
    merged, total = merge_attention([out, out], [lse, lse])
    assert total[0, 0, 0] == float("-inf")
    torch.testing.assert_close(total[0, 0, 1], torch.tensor(0.5).add(torch.tensor(2.0).log()))
    (merged.sum() + total[0, 0, 1]).backward()
    assert out.grad.isfinite().all()
    assert lse.grad.isfinite().all()


def test_merge_of_packed_parts_and_low_precision() -> None:
    cu = torch.tensor([0, 4])
    q, k, v = (torch.randn(4, h, 8, dtype=torch.bfloat16) for h in (4, 2, 2))
    half = torch.tensor([0, 2])
    parts = [
        flash_attention_varlen(q, k[i : i + 2], v[i : i + 2], cu, half, 4, 2, return_lse=True, impl="reference")
        for i in (0, 2)
    ]
    out, lse = merge_attention([p[0] for p in parts], [p[1] for p in parts])
    expected, expected_lse = flash_attention_varlen(q, k, v, cu, cu, 4, 4, return_lse=True, impl="reference")
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)  # both parts were rounded to bfloat16


def test_merge_refuses_what_does_not_fit() -> None:
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    wrong = [([], []), ([out], [lse, lse]), ([out, out[:, :, :1]], [lse, lse])]
    wrong += [([out], [x]) for x in (lse.transpose(1, 2), lse[:, :1], lse[..., None])]  # the second would broadcast
    for outs, lses in wrong:
        with pytest.raises(ValueError, match="as many outs as lses"):
            merge_attention(outs, lses)
    with pytest.raises(TypeError, match="outs, lses: expected tensors, got float"):
        merge_attention([out, 1.0], [lse, lse])


@pytest.mark.parametrize("function", [ring_attention, ulysses_attention])
def test_without_a_process_group_the_error_says_so(function: Callable[..., torch.Tensor]) -> None:
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match=r"torch.distributed has not been initialised; .*init_process_group\(\)"):
        function(q, q, q)


# ---- two processes ---------------------------------------------------------------------------------------------------


def placements(tensors: dict[str, Tensor], by: str) -> dict[str, Any]:
    """How tensors of a call lie when it is split by batch or by heads; "rows" is no split that attention can use."""
    from torch.distributed.tensor import Replicate, Shard

    dims = {"batch": 0, "heads": 1, "rows": 2}
    found: dict[str, Any] = {}
    for name, x in tensors.items():
        dim = dims[by]
        if name in ("sinks", "alibi_slopes") and x.dim() == 1:
            dim = {"heads": 0}.get(by, -1)
        split = 0 <= dim < x.dim() and x.shape[dim] > 1 and not (by == "rows" and name not in "qkv")
        found[name] = Shard(dim) if split else Replicate()
    return found


def check_dtensor(tensors: dict[str, Tensor], how: dict[str, Any], expected: Any = None, **options: Any) -> None:
    """The call on DTensors placed like ``how`` against the call on whole tensors, values and gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    leaves = {n: x.clone().requires_grad_(x.is_floating_point() and n != "alibi_slopes") for n, x in tensors.items()}
    spread = {n: distribute_tensor(x.detach(), mesh, [how[n]]) for n, x in leaves.items()}
    spread = {n: x.requires_grad_(leaves[n].requires_grad) for n, x in spread.items()}
    out, lse = flash_attention(**leaves, **options, return_lse=True)
    found, found_lse = flash_attention(**spread, **options, return_lse=True)
    if expected is not None:
        assert found.placements == (expected,), f"{found.placements}, expected {expected}: it was gathered"
    torch.testing.assert_close(found.full_tensor(), out)
    torch.testing.assert_close(found_lse.full_tensor(), lse)
    (out.sin().sum() + lse.cos().sum()).backward()
    (found.sin().sum() + found_lse.cos().sum()).backward()
    for name, x in leaves.items():
        if x.requires_grad:
            grad = spread[name].grad.full_tensor()
            torch.testing.assert_close(grad, x.grad, msg=lambda m, n=name: f"gradient of {n}: {m}")


def dtensor_body(rank: int) -> None:
    from torch.distributed.tensor import Replicate, Shard

    torch.manual_seed(0)

    def sized(hq: int, hkv: int, b: int = 4) -> dict[str, Tensor]:
        return {"q": torch.randn(b, hq, 5, 8), "k": torch.randn(b, hkv, 6, 8), "v": torch.randn(b, hkv, 6, 4)}

    full = {
        "bias": torch.randn(4, 1, 5, 6),
        "key_log_weight": torch.randn(1, 2, 6),
        "sinks": torch.randn(4),
        "alibi_slopes": torch.rand(4, 4),
        "key_ranges": torch.tensor([0, 5], dtype=torch.int32).expand(1, 4, 5, 2).contiguous(),
        "mask": torch.rand(4, 4, 1, 6) > 0.2,
    }
    for by, expected in (("batch", Shard(0)), ("heads", Shard(1)), ("rows", None)):
        plain, rich = sized(4, 2), {**sized(4, 2), **full}
        check_dtensor(plain, placements(plain, by), expected, causal=True)
        check_dtensor(rich, placements(rich, by), expected, softcap=4.0)
    # slopes and sinks of one shape: a cached rule of one call must not serve the other
    plain = sized(4, 2)
    for name in ("alibi_slopes", "sinks"):
        tensors = {**plain, name: torch.rand(4)}
        check_dtensor(tensors, {**placements(plain, "heads"), name: Replicate()}, Shard(1))
    multi_query = sized(6, 1)
    how = {**dict.fromkeys(multi_query, Replicate()), "q": Shard(1)}
    check_dtensor(multi_query, how, Shard(1), causal=True)
    uneven = sized(6, 3)
    check_dtensor(uneven, placements(uneven, "heads"))  # 3 key heads on 2 ranks would tear groups apart
    check_dtensor(sized(4, 2, b=3), placements(sized(4, 2, b=3), "batch"), Shard(0))
    dropped = sized(4, 2)
    check_dtensor(dropped, placements(dropped, "heads"), Replicate(), dropout_p=0.5, dropout_seed=3)


def packed_and_compiled_body(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (RANKS,))
    spread = lambda x, how: distribute_tensor(x, mesh, [how])  # noqa: E731
    q, k, v = (torch.randn(7, h, 8) for h in (4, 2, 2))
    cu = torch.tensor([0, 3, 7], dtype=torch.int32)
    expected, lse = flash_attention_varlen(q, k, v, cu, cu, 4, 4, causal=True, return_lse=True)
    heads = [spread(x, Shard(1)).requires_grad_() for x in (q, k, v)]
    places = [spread(cu, Replicate())] * 2
    found, found_lse = flash_attention_varlen(*heads, *places, 4, 4, causal=True, return_lse=True)
    assert (found.placements, found_lse.placements) == ((Shard(1),), (Shard(0),))
    torch.testing.assert_close(found.full_tensor(), expected)
    torch.testing.assert_close(found_lse.full_tensor(), lse)

    dense = [torch.randn(2, h, 5, 8) for h in (4, 2, 2)]
    leaves = [x.clone().requires_grad_() for x in dense]
    flash_attention(*leaves, causal=True).sin().sum().backward()
    compiled = torch.compile(lambda *x: flash_attention(*x, causal=True).sin(), fullgraph=True, backend="aot_eager")
    heads = [spread(x, Shard(1)).requires_grad_() for x in dense]
    compiled(*heads).sum().backward()
    for x, leaf in zip(heads, leaves, strict=True):
        torch.testing.assert_close(x.grad.full_tensor(), leaf.grad)


class Block(nn.Module):
    """Attention with four projections, as models have them; works on whole heads and on a rank's share of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(flash_attention(q, k, v, causal=True).transpose(1, 2).flatten(2))


def parallel_body(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (RANKS,))
    column, row = ColwiseParallel(), RowwiseParallel()
    for kind in ("fsdp", "tensor parallel"):
        torch.manual_seed(0)
        whole, split, x = Block(), Block(), torch.randn(4, 6, 32)
        split.load_state_dict(whole.state_dict())
        share = x
        if kind == "fsdp":
            fully_shard(split, mesh=mesh)
            share = x.chunk(RANKS)[rank]
        else:
            parallelize_module(split, mesh, {"q": column, "k": column, "v": column, "o": row})
        expected = whole(x)
        found = split(share)
        torch.testing.assert_close(found, expected.chunk(RANKS)[rank] if kind == "fsdp" else expected)
        expected.square().mean().backward()
        found.square().mean().backward()  # FSDP averages over the ranks
        for (name, a), b in zip(split.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, msg=lambda m, n=f"{kind}, {name}": f"{n}: {m}")


def context_parallel_body(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    q, k, v = (torch.randn(2, 2, 8, 8) for _ in range(3))
    expected = flash_attention(q, k, v)
    with context_parallel(
        init_device_mesh("cpu", (RANKS,)), buffers=[x.clone() for x in (q, k, v)], buffer_seq_dims=[2] * 3
    ):
        for function in (flash_attention, torch.compile(flash_attention, backend="eager")):
            with pytest.raises(Exception, match="each rank would see only its own part of the keys"):
                function(q, k, v)
    assert torch.equal(flash_attention(q, k, v), expected)


@gloo
def test_dtensors_split_by_batch_or_heads_and_gathered_otherwise() -> None:
    on_ranks(dtensor_body, packed_and_compiled_body)


@gloo
def test_fsdp_tensor_parallel_and_context_parallel() -> None:
    on_ranks(parallel_body, context_parallel_body)
