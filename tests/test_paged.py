"""flash_attention_paged: the Triton kernel through the block table, and the CPU's gathering, against dense float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers import Case, Inputs, check_bound, exact_attention, make_inputs, naive_attention, poisoned_empty
from torch import Tensor

from hf_flash_mc.ops import flash_attention, flash_attention_paged
from hf_flash_mc.ops import paged as op
from hf_flash_mc.ops.spec import Paged, Spec

pytest.importorskip("triton")

from test_triton import BF16, DEVICE, FP16

from hf_flash_mc.ops.portable import paged_launch, plan

INTERPRETER = pytest.mark.skipif(DEVICE == "cpu" and not plan.INTERPRETED, reason="needs a GPU or the interpreter")
GATHERING = "cpu" if DEVICE == "cpu" else "reference"


@dataclasses.dataclass(frozen=True)
class Call:
    """Sequences of these lengths, all of one Case, in blocks of ``page`` keys."""

    page: int
    lengths: tuple[int, ...]
    case: Case

    def __str__(self) -> str:
        return f"page{self.page}-{self.lengths}-{self.case.id}".replace(" ", "")


@dataclasses.dataclass
class Paging:
    """A call's tensors. ``sequences``: each one's dense inputs, q [1, Hq, Sq, D], k and v [1, Hkv, length, D]."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    table: Tensor
    lengths: Tensor
    options: dict[str, Any]
    sequences: list[tuple[Inputs, Case]]

    def run(self, impl: str) -> tuple[Tensor, Tensor]:
        args = (self.q, self.k_cache, self.v_cache, self.table, self.lengths)
        with poisoned_empty():
            return flash_attention_paged(*args, **self.options, return_lse=True, impl=impl)

    def check(self, out: Tensor, lse: Tensor, label: object) -> None:
        for i, (inputs, case) in enumerate(self.sequences):
            exact, (native, _) = exact_attention(inputs, case), naive_attention(inputs, case)
            for name, x in (("out", out[i : i + 1]), ("lse", lse[i : i + 1])):
                check_bound(name, x, exact[name], native[name], case.dtype, f"sequence {i} of {label}")


def page_out(call: Call, spare: int = 3) -> Paging:
    """The sequences' keys and values scattered over a pool that is NaN elsewhere; unused columns name no block."""
    gen = torch.Generator().manual_seed(7)
    sequences = []
    for i, length in enumerate(call.lengths):
        case = dataclasses.replace(call.case, B=1, Sk=length, seed=i)
        inputs = make_inputs(case, DEVICE)
        if sequences and inputs.spec.sinks is not None:
            inputs.spec = inputs.spec._replace(sinks=sequences[0][0].spec.sinks)
        sequences.append((inputs, case))
    needed = [-(-n // call.page) for n in call.lengths]
    columns, pool = max(needed) + 2, sum(needed) + spare
    numbers = torch.randperm(pool, generator=gen).to(torch.int32)
    table, at = torch.full((len(needed), columns), -7, dtype=torch.int32), 0
    first = sequences[0][0]
    caches = [
        torch.full((pool, call.page, x.shape[1], x.shape[3]), float("nan"), dtype=x.dtype, device=DEVICE)
        for x in (first.k, first.v)
    ]
    for i, (inputs, _) in enumerate(sequences):
        blocks = numbers[at : at + needed[i]]
        at += needed[i]
        table[i, : needed[i]] = blocks
        for cache, x in zip(caches, (inputs.k, inputs.v), strict=True):
            for j, block in enumerate(blocks.tolist()):
                part = x[0, :, j * call.page : (j + 1) * call.page].transpose(0, 1)
                cache[block, : part.shape[0]] = part
    specs = [inputs.spec for inputs, _ in sequences]
    options: dict[str, Any] = {"causal": call.case.causal, "window": call.case.window, "softcap": call.case.softcap}
    options |= {"sinks": specs[0].sinks, "scale": call.case.scale}
    if specs[0].key_ranges is not None:
        options["key_ranges"] = torch.cat([s.key_ranges for s in specs])
    if specs[0].alibi_slopes is not None:
        options["alibi_slopes"] = torch.stack([s.alibi_slopes for s in specs])
    q = torch.cat([inputs.q for inputs, _ in sequences])
    lengths = torch.tensor(call.lengths, dtype=torch.int32, device=DEVICE)
    return Paging(q, *caches, table.to(DEVICE), lengths, options, sequences)


CALLS = [
    Call(16, (63, 1, 0, 130), Case(Hq=4, Hkv=1, Sq=1, dtype=BF16)),
    Call(16, (33, 70), Case(Hq=4, Hkv=2, Sq=3, D=40, Dv=24, dtype=FP16, causal=True, poison=True)),
    Call(32, (90, 3, 0), Case(Hq=7, Hkv=1, Sq=2, causal=True, window=(20, None), sinks=True, poison=True)),
    Call(256, (270, 17), Case(Hq=2, Hkv=2, Sq=1, dtype=BF16, softcap=4.0, alibi="h")),
    Call(1, (13, 5), Case(Hq=2, Hkv=1, Sq=5, D=5, causal=True, poison=True)),
    Call(13, (50, 29), Case(Hq=4, Hkv=2, Sq=4, key_ranges="random", ranges_shape="h", poison=True)),
    Call(24, (70, 0), Case(Hq=2, Hkv=2, Sq=6, key_ranges="hostile", sinks=True, alibi="h", softcap=4.0, poison=True)),
    Call(16, (33, 5), Case(Hq=4, Hkv=1, Sq=1, D=512, dtype=BF16)),
    Call(16, (97, 20), Case(Hq=4, Hkv=1, Sq=33, causal=True, window=(30, 9), scale=0.3, poison=True)),  # three tiles
]
SMALL = CALLS[1], CALLS[2], CALLS[6]


@INTERPRETER
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_kernel_agrees_with_dense_float64(call: Call) -> None:
    paging = page_out(call)
    paging.check(*paging.run("triton"), call)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_gathering_agrees_with_dense_float64(call: Call) -> None:
    paging = page_out(call)
    paging.check(*paging.run(GATHERING), call)


@INTERPRETER
@pytest.mark.parametrize("call", SMALL, ids=str)
def test_split_keys_are_merged(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_launch, "TILES_PER_SPLIT", 1)
    paging = page_out(call)
    paged_launch.forget()
    try:
        out, lse = paging.run("triton")
        assert any(merge is not None for _, merge, *_ in paged_launch._kept.values())
        paging.check(out, lse, call)
        assert all(torch.equal(a, b) for a, b in zip(paging.run("triton"), (out, lse), strict=True))  # the same bits
    finally:
        paged_launch.forget()


@INTERPRETER
def test_one_plan_serves_whatever_lengths_and_tables_say() -> None:
    """Splits follow from shapes: a captured graph stays valid while sequences grow."""
    paged_launch.forget()
    paging = page_out(Call(16, (63, 80), Case(Hq=2, Hkv=1, Sq=1)))
    paging.run("triton")
    paging.lengths.copy_(torch.tensor([5, 0]))
    paging.table.copy_(paging.table.roll(1, 0))
    paging.run("triton")
    assert len(paged_launch._kept) == 1


def hostile(paging: Paging) -> tuple[Tensor, Tensor]:
    """Block numbers outside the pool within the sequences; which keys are still there, [B, most keys]."""
    pool, page = paging.k_cache.shape[:2]
    table = paging.table.clone()
    table[0, 1], table[0, 3], table[1, 0] = pool, -1, 2**31 - 1
    there = ((table >= 0) & (table < pool)).repeat_interleave(page, 1)
    return table, there & (torch.arange(there.shape[1], device=there.device) < paging.lengths[:, None])


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=INTERPRETER), GATHERING, "reference"])
@pytest.mark.parametrize("page", [16, 11])
def test_blocks_outside_the_pool_are_seen_by_nobody(impl: str, page: int) -> None:
    paging = page_out(Call(page, (70, 40), Case(Hq=4, Hkv=2, Sq=2)))
    table, there = hostile(paging)
    spec = (None, None, None, None, True)
    out, lse = op.FWD(paging.q, paging.k_cache, paging.v_cache, table, paging.lengths, impl, *spec)
    for i, (inputs, case) in enumerate(paging.sequences):
        weight = torch.where(there[i, : case.Sk], 0.0, float("-inf"))[None, None]
        found = flash_attention(
            inputs.q.double(), inputs.k.double(), inputs.v.double(), causal=True, key_log_weight=weight.double(),
            return_lse=True, impl="reference",
        )  # fmt: skip
        for a, b in zip((out[i], lse[i]), found, strict=True):
            torch.testing.assert_close(a, b[0], rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=INTERPRETER), GATHERING])
def test_lengths_are_clamped_to_the_table(impl: str) -> None:
    paging = page_out(Call(16, (64, 64), Case(Hq=2, Sq=1)))
    table = paging.table[:, :4].contiguous()
    args = (paging.q, paging.k_cache, paging.v_cache, table)
    expected = op.FWD(*args, torch.tensor([64, 0], dtype=torch.int32, device=DEVICE), impl)
    far = torch.tensor([2**31 - 1, -5], dtype=torch.int32, device=DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(op.FWD(*args, far, impl), expected, strict=True))


@INTERPRETER
def test_strided_caches() -> None:
    """Keys and values interleaved in one pool, the query on [B, S, H, D] memory, a table wider than what is passed."""
    paging = page_out(Call(16, (63, 20), Case(Hq=4, Hkv=2, Sq=2, causal=True, strides="sliced")))
    both = torch.stack((paging.k_cache, paging.v_cache), 1)
    paging.k_cache, paging.v_cache = both[:, 0], both[:, 1]
    paging.table = torch.cat((paging.table, paging.table), 1)[:, : paging.table.shape[1]]
    paging.check(*paging.run("triton"), "strided")


def test_nothing_to_attend_to() -> None:
    q, cache = torch.randn(2, 4, 1, 8, device=DEVICE), torch.randn(3, 16, 2, 8, device=DEVICE)
    table, lengths, sinks = torch.zeros(2, 0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), torch.randn(4)
    args = [x.to(DEVICE) for x in (table, lengths)]
    out, lse = flash_attention_paged(q, cache, cache, *args, sinks=sinks.to(DEVICE), return_lse=True)
    assert not out.any()
    torch.testing.assert_close(lse, sinks.to(DEVICE)[None, :, None].expand_as(lse))
    assert flash_attention_paged(q[:0], cache, cache, args[0][:0], args[1][:0]).shape == (0, 4, 1, 8)


def test_compiles_as_one_graph_and_passes_opcheck() -> None:
    paging = page_out(Call(16, (63, 0), Case(Hq=4, Hkv=2, Sq=2, causal=True)))
    args = (paging.q, paging.k_cache, paging.v_cache, paging.table, paging.lengths)

    def step(*args: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attention_paged(*args, causal=True, window=(40, None), return_lse=True)

    expected = step(*args)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for a, b in zip(compiled(*args), expected, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    torch.library.opcheck(op.FWD, (*args, GATHERING), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(Exception, match="expected one dtype"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(paging.q.double(), *args[1:])


def test_a_backward_raises_and_a_forward_does_not() -> None:
    paging = page_out(Call(16, (30,), Case(Sq=1)))
    paging.q.requires_grad_()
    out, _ = paging.run(GATHERING)
    with pytest.raises(NotImplementedError, match="inference"):
        out.sum().backward()
    with forward_ad.dual_level():
        paging.q = forward_ad.make_dual(paging.q.detach(), torch.ones_like(paging.q))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            paging.run(GATHERING)


def test_autocast_casts_the_query_alone() -> None:
    paging = page_out(Call(16, (30,), Case(Sq=1, dtype=BF16)))
    expected, _ = paging.run(GATHERING)
    paging.q = paging.q.float()
    with torch.autocast(DEVICE, dtype=BF16):
        assert torch.equal(paging.run(GATHERING)[0], expected)
    with torch.autocast(DEVICE, dtype=FP16):
        assert paging.run(GATHERING)[0].dtype == BF16


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": torch.zeros(2, 4, 8)}, ValueError, r"q: expected \[B, Hq, Sq, D\], got 3"),
        ({"k_cache": torch.zeros(5, 16, 2, 8)}, ValueError, "same blocks, block size and heads"),
        ({"q": torch.zeros(2, 3, 1, 8)}, ValueError, r"got 3 and 2; k_cache is \[blocks, block_size, Hkv, D\]"),
        ({"q": torch.zeros(2, 4, 1, 9)}, ValueError, "same head dim, got 9 and 8"),
        ({"q": torch.zeros(2, 4, 1, 8).double()}, TypeError, "expected one dtype"),
        ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, ValueError, r"block_table: .* B = 2, got shape \(3, 2"),
        ({"block_table": torch.zeros(2, 2)}, TypeError, "block_table: expected torch.int32"),
        ({"seqlens_k": torch.tensor([1, 33])}, ValueError, "seqlens_k: expected 0 to 32, .* got 33 for sequence 1"),
        ({"seqlens_k": torch.tensor([-1, 3])}, ValueError, "seqlens_k: .* got -1 for sequence 0"),
        ({"seqlens_k": [1, 2]}, TypeError, "seqlens_k: expected a torch.Tensor, got list"),
        ({"block_table": torch.tensor([[0, 4], [1, 2]])}, ValueError, "from 0 to 3, got 4 in sequence 0"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks: expected \[Hq\]"),
        ({"key_ranges": torch.zeros(2, 1, 2, 2, dtype=torch.int32)}, ValueError, "key_ranges"),
        ({"impl": "hopper"}, NotImplementedError, "read no block table"),
        ({"softcap": -1.0}, ValueError, "softcap"),
    ],
    ids=lambda x: str(x)[:30] if isinstance(x, str) else next(iter(x)) if isinstance(x, dict) else None,
)
def test_what_is_wrong_is_named(change: dict[str, Any], error: type[Exception], text: str) -> None:
    cache = torch.zeros(4, 16, 2, 8)
    call = {"q": torch.zeros(2, 4, 1, 8), "k_cache": cache, "v_cache": cache, "seqlens_k": torch.tensor([30, 17])}
    call |= {"block_table": torch.tensor([[0, 1], [2, 3]])} | change
    with pytest.raises(error, match=text):
        flash_attention_paged(**call)


@INTERPRETER
def test_the_table_has_a_tile_for_every_head_dim_and_the_rest_is_named() -> None:
    for arch in ("sm80", "sm86", "sm90", "sm100", "gfx942", "interpreter"):
        for wide in (False, True):
            assert all(
                paged_launch.config_of(rows, arch, wide, d, True) for rows in (1, 17, 33, 999) for d in (5, 128, 256)
            )
    cache = torch.zeros(1, 16, 1, 8, 2, device=DEVICE)[..., 0]
    table = Paged(torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), torch.ones(1, dtype=torch.int32, device=DEVICE))
    q = torch.zeros(1, 1, 1, 8, device=DEVICE)
    problems = op.find_problems(q, cache, cache, table, "triton", Spec())
    assert [text.split(":")[0] for _, text in problems] == ["k_cache", "v_cache"]
