"""torch's flex BlockMask: as lists and bits, in the portable kernels (interpreted without a GPU), compiled, kept."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import Case, Inputs, backend_attention, check_results, dense_rules, make_inputs, poisoned_empty
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, create_mask, or_masks

from hf_flash_mc.ops import BlockLists, evaluate_block_mask, flash_attention, flash_attention_varlen
from hf_flash_mc.ops import block_mask as block_masks
from hf_flash_mc.ops.block_mask import block_table, dense_mask, dense_of_lists
from hf_flash_mc.ops.spec import Spec
from hf_flash_mc.ops.watch import state_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernels() -> Any:
    """The portable back end, if it can run here."""
    pytest.importorskip("triton")
    from hf_flash_mc.ops.portable import launch, plan

    if DEVICE == "cpu" and not plan.INTERPRETED:
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before triton is imported")
    return launch


# ---- masks -----------------------------------------------------------------------------------------------------------

DOCUMENTS = (torch.arange(400) // 47).to(DEVICE)
GLOBAL = torch.zeros(400, dtype=torch.bool, device=DEVICE)
GLOBAL[::59] = True


def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return DOCUMENTS[i] == DOCUMENTS[j]


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i - j).abs() < 30


def strided(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Differs by batch and head, and leaves rows and keys out."""
    return ((i * 7 + j * 3 + b + h) % 5 != 0) & (i % 11 != 3) & (j % 13 != 5) & (i // 64 != j // 64 + h)


def everything(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return b.new_ones((), dtype=torch.bool)


PATTERNS = {
    "documents": and_masks(documents, causal),
    "window": window,
    "global": or_masks(window, lambda b, h, i, j: GLOBAL[j]),
    "strided": strided,
    "everything": everything,
    "nothing": lambda b, h, i, j: i < 0,
}


@functools.cache
def block_mask(pattern: str, sq: int, sk: int, size: Any = 128, b: Any = None, h: Any = None) -> BlockMask:
    return create_block_mask(PATTERNS[pattern], b, h, sq, sk, device=DEVICE, BLOCK_SIZE=size)


# ---- lists and bits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 64, 128, (96, 50), (256, 64), (1, 300), 512], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lists_say_what_the_mask_says(pattern: str, size: Any) -> None:
    """Whatever the block size; with bits of partial blocks alone, and (as in graphs) with bits of all."""
    for sq, sk, b, h in ((200, 333, 2, 3), (129, 64, None, None)):
        mask = block_mask(pattern, sq, sk, size, b, h)
        seen = create_mask(PATTERNS[pattern], b, h, sq, sk, device=DEVICE)
        assert torch.equal(dense_mask(mask), seen)
        lists = evaluate_block_mask(mask)
        assert torch.equal(dense_of_lists(lists), seen)
        spans = block_masks._spans(mask)
        states = block_masks._states(mask, spans, mask.seq_lengths)
        rule = block_masks._rule(mask, spans, mask.seq_lengths)
        numbers, bits = block_masks._evaluate_all(rule, states, spans, mask.seq_lengths)
        rows = block_masks._list(numbers)
        assert torch.equal(dense_of_lists(lists._replace(rows=rows, bits=bits)), seen)
        assert torch.equal(rows[..., 0], lists.rows[..., 0]), "the same blocks are partial and full"
        assert torch.equal(block_table(lists.rows), block_table(lists.columns).transpose(2, 3))


def test_bits_are_of_partial_blocks_alone() -> None:
    """128 x 128 blocks: the lower triangle's diagonal has bits, what is below it none, and a full block says so."""
    lists = evaluate_block_mask(create_block_mask(causal, None, None, 1024, 1024, device=DEVICE))
    assert lists.bits.shape == (8, 129, 4)
    assert lists.rows[0, 0, :, 0].tolist() == [[1, i] for i in range(8)]
    assert lists.columns[0, 0, :, 0].tolist() == [[1, 7 - i] for i in range(8)]
    assert lists.rows[0, 0, 3, 1:5].tolist() == [[3, 3], [0, -1], [1, -1], [2, -1]]


def test_blocks_that_are_full_or_empty_indeed_get_no_bits() -> None:
    """A coarse block size, or no separate list of full blocks: what mask_mod says decides."""
    coarse = create_block_mask(causal, None, None, 512, 512, device=DEVICE, BLOCK_SIZE=512)
    fine = create_block_mask(causal, None, None, 512, 512, device=DEVICE, separate_full_blocks=False)
    for mask in (coarse, fine):
        assert evaluate_block_mask(mask).rows[0, 0, :, 0].tolist() == [[1, i] for i in range(4)]


def test_mask_mod_is_asked_inside_the_sequences_alone() -> None:
    """It may index tensors of exactly their lengths."""
    row, key = torch.arange(70, device=DEVICE), torch.arange(67, device=DEVICE)
    mask = create_block_mask(lambda b, h, i, j: row[i] >= key[j], None, None, 70, 67, device=DEVICE, BLOCK_SIZE=32)
    assert torch.equal(dense_of_lists(evaluate_block_mask(mask))[0, 0], row[:, None] >= key)


def listed_blocks() -> tuple[BlockMask, Tensor]:
    """Full blocks that mask_mod knows nothing of, up to the ragged ends; a partial one; and what is to be seen."""

    def tensor(*rows: Any) -> Tensor:
        return torch.tensor([[rows]], dtype=torch.int32, device=DEVICE)

    mask = BlockMask.from_kv_blocks(
        tensor(1, 1), tensor([1, 0], [0, 1]), tensor(1, 1), tensor([0, 1], [1, 0]), BLOCK_SIZE=(64, 100),
        mask_mod=lambda b, h, i, j: j % 2 == 0, seq_lengths=(90, 150),
    )  # fmt: skip
    seen = torch.zeros(90, 150, dtype=torch.bool, device=DEVICE)
    seen[:64, :100] = seen[64:, 100:] = True
    seen[:64, 100::2] = seen[64:, :100:2] = True
    return mask, seen


def test_full_blocks_are_seen_whole() -> None:
    mask, seen = listed_blocks()
    assert torch.equal(dense_mask(mask)[0, 0], seen)
    assert torch.equal(dense_of_lists(evaluate_block_mask(mask))[0, 0], seen)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def masked_inputs(case: Case, mask: Any) -> tuple[Inputs, Inputs]:
    """A case's inputs under a dense mask, with NaN wherever no visible pair is, and the same with lists of blocks."""
    lists = evaluate_block_mask(mask)
    plain = make_inputs(case, DEVICE)
    spec = plain.spec._replace(mask=dense_mask(mask))
    seen, alibi, keep = dense_rules(case, spec, plain.clean[0], plain.clean[1])
    row, key = seen.any(-1), seen.unflatten(1, (case.Hkv, -1)).any(3).any(2)
    given = [
        torch.where(used[..., None], x, float("nan")) for x, used in zip(plain.clean, (row, key, key, row), strict=True)
    ]
    dense = Inputs(*given, plain.dlse, spec, None, plain.clean, seen, alibi, keep)  # type: ignore[arg-type]
    blocks = plain.spec._replace(block_rows=lists.rows, block_columns=lists.columns, block_bits=lists.bits)
    return dense, dataclasses.replace(dense, spec=blocks)


BF16 = torch.bfloat16
CASES = {
    "documents": (Case(Hq=4, Hkv=1, Sq=150, Sk=150, D=24), ("documents", 150, 150, 64)),
    "long-tiles-in-blocks-of-128": (Case(Hq=1, Hkv=1, Sq=131, Sk=200, D=40, Dv=16), ("global", 131, 200)),
    "odd-blocks": (Case(dtype=BF16, B=2, Hq=1, Hkv=1, Sq=130, Sk=110, dlse=True), ("window", 130, 110, (96, 50))),
    "planes": (Case(B=2, Hq=2, Hkv=1, Sq=67, Sk=150, sinks=True), ("strided", 67, 150, 64, 2, 2)),
    "planes-and-ranges": (
        Case(Hq=4, Hkv=2, Sq=70, Sk=100, key_ranges="random", ranges_shape="h"),
        ("strided", 70, 100, 32, None, 4),
    ),
    "causal-window": (
        Case(Hq=1, Hkv=1, Sq=200, Sk=220, causal=True, window=(90, None), dlse=True),
        ("everything", 200, 220, 64),
    ),
    "causal-strided": (Case(Sq=140, Sk=100, causal=True), ("strided", 140, 100, 64)),
    "packed-ranges": (Case(Hq=1, Hkv=1, Sq=150, Sk=150, key_ranges="packed"), ("everything", 150, 150, 64)),
    "bias-and-dropout": (
        Case(Hq=2, Hkv=1, Sq=70, Sk=90, bias="hk", dropout_p=0.2, softcap=5.0, dlse=True),
        ("strided", 70, 90, 64, None, 2),
    ),
    "weights": (Case(Sq=70, Sk=130, key_log_weight="h-", bias="hqk-", alibi="h"), ("documents", 70, 130, 64)),
    "nothing": (Case(Sq=40, Sk=70, sinks=True), ("nothing", 40, 70)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kernels_against_float64(name: str) -> None:
    """Values and every gradient; keys and rows that take no part hold NaN."""
    kernels()
    case, mask = CASES[name]
    dense, blocks = masked_inputs(case, block_mask(*mask))
    with poisoned_empty():
        actual = backend_attention(blocks, case, "triton")
    check_results(actual, dense, case, name)


def test_kernels_on_full_blocks_that_are_listed() -> None:
    kernels()
    case = Case(Hq=1, Hkv=1, Sq=90, Sk=150)
    dense, blocks = masked_inputs(case, listed_blocks()[0])
    check_results(backend_attention(blocks, case, "triton"), dense, case, "listed")


def test_fused_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """dQ by atomics, and without them where the call must be deterministic."""
    launch = kernels()
    monkeypatch.setenv("HF_FLASH_MC_BACKWARD", "fused")
    case = Case(Hq=2, Hkv=1, Sq=70, Sk=100)
    dense, blocks = masked_inputs(case, block_mask("strided", 70, 100, 64, None, 2))
    check_results(backend_attention(blocks, case, "triton"), dense, case, "fused")
    monkeypatch.setattr(launch, "attn_bwd_finish", None)
    same = dataclasses.replace(case, deterministic=True)
    check_results(backend_attention(blocks, same, "triton"), dense, same, "split")


def test_lists_with_strides_of_their_own() -> None:
    kernels()
    case = Case(Hq=2, Hkv=2, Sq=70, Sk=70)
    dense, blocks = masked_inputs(case, block_mask("strided", 70, 70, 64, None, 2))
    spec = blocks.spec
    wide = [torch.stack([x, x], -1)[..., 0] for x in (spec.block_rows, spec.block_columns, spec.block_bits)]
    spec = spec._replace(block_rows=wide[0], block_columns=wide[1], block_bits=wide[2])
    check_results(backend_attention(dataclasses.replace(blocks, spec=spec), case, "triton"), dense, case, "strided")


def test_blocks_that_are_not_listed_are_not_read() -> None:
    """Blocks that are not listed are not read: NaN in one document does not reach the others."""
    kernels()
    case = Case(Hq=1, Hkv=1, Sq=192, Sk=192)
    inputs = make_inputs(case, DEVICE)
    lists = evaluate_block_mask(
        create_block_mask(lambda b, h, i, j: i // 64 == j // 64, None, None, 192, 192, device=DEVICE, BLOCK_SIZE=64)
    )
    poison = torch.arange(192, device=DEVICE)[:, None] // 64 == 1  # the second document, its queries included
    q, k, v, dout = (torch.where(poison, float("nan"), x) for x in inputs.clean)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attention(*leaves, mask=lists, impl="triton")
    for x in (out, *torch.autograd.grad(out, leaves, dout)):
        assert x[:, :, :64].isfinite().all()
        assert x[:, :, 128:].isfinite().all()
        assert x[:, :, 64:128].isnan().all()


# ---- the public function ---------------------------------------------------------------------------------------------


def qkv(sq: int = 70, sk: int = 100, heads: int = 2, batch: int = 1) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = ((batch, n, s, 16) for n, s in ((heads, sq), (1, sk), (1, sk)))
    return [torch.randn(shape, generator=gen).to(DEVICE).requires_grad_() for shape in shapes]


def outputs(mask: Any, impl: str, **options: Any) -> list[Tensor]:
    leaves = qkv()
    out, lse = flash_attention(*leaves, mask=mask, impl=impl, return_lse=True, **options)
    return [out, lse, *torch.autograd.grad(out.sin().sum() + lse.sum(), leaves)]


@pytest.mark.parametrize("impl", ["auto", "triton", "reference"])
def test_block_mask_and_its_lists_are_one_mask(impl: str) -> None:
    kernels()
    mask = block_mask("documents", 70, 100, 32)
    seen = create_mask(PATTERNS["documents"], None, None, 70, 100, device=DEVICE)
    expected = outputs(seen, "reference", causal=True)
    for given in (mask, evaluate_block_mask(mask)):
        torch.testing.assert_close(outputs(given, impl, causal=True), expected)


def test_mask_mod_is_evaluated_once_until_something_it_reads_changes() -> None:
    calls: Counter[str] = Counter()
    shift = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        calls["all"] += 1
        return i + shift >= j

    mask = create_block_mask(lambda b, h, i, j: i + shift >= j, None, None, 70, 100, device=DEVICE, BLOCK_SIZE=128)
    found = evaluate_block_mask(mask)
    assert block_masks._kept_lists(mask) is block_masks._kept_lists(mask)
    assert torch.equal(block_masks._kept_lists(mask).bits, found.bits)
    shift += 7
    moved = block_masks._kept_lists(mask)
    assert torch.equal(dense_of_lists(moved), dense_mask(mask))
    assert not torch.equal(moved.bits, found.bits)
    mask.mask_mod = mask_mod  # reads a Counter, whose state is not known: evaluated each time
    block_masks._kept_lists(mask)
    once = calls["all"]
    block_masks._kept_lists(mask)
    assert calls["all"] == 2 * once > 0


def test_full_blocks_alone_do_not_ask_mask_mod() -> None:
    def never(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        raise AssertionError("mask_mod was asked about a full block")

    mask = create_block_mask(everything, None, None, 256, 256, device=DEVICE)
    mask.mask_mod = never
    lists = evaluate_block_mask(mask)
    assert len(lists.bits) == 0
    assert bool(dense_of_lists(lists).all())


def test_lists_under_vmap() -> None:
    """A block mask that all samples share; one for each sample is refused."""
    kernels()
    lists = evaluate_block_mask(block_mask("strided", 70, 100, 64, None, 2))
    (q, k, v), function = qkv(), functools.partial(flash_attention, mask=lists, impl="triton")
    qs = torch.stack([q.detach(), 2 * q.detach()])
    mapped = torch.func.vmap(lambda x: function(x, k.detach(), v.detach()))(qs)
    for i in range(2):
        torch.testing.assert_close(mapped[i], function(qs[i], k, v).detach())


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "bwd"])
def test_opcheck(backward: bool) -> None:
    """Schema, fakes and autograd know the lists."""
    kernels()
    from hf_flash_mc.ops import library

    lists = evaluate_block_mask(block_mask("documents", 33, 40, 64))
    q, k, v = (x.detach() for x in qkv(33, 40))
    spec = Spec(block_rows=lists.rows, block_columns=lists.columns, block_bits=lists.bits)
    tests = ("test_schema", "test_faketensor")
    if not backward:
        torch.library.opcheck(library.FWD, (q, k, v, "triton", *spec), test_utils=tests)
        return
    out, lse = library.FWD(q, k, v, "triton", *spec)
    needs = [True] * 3 + [False] * 3
    args = (torch.randn_like(out), None, q, k, v, out, lse, needs, False, "triton", *spec)
    torch.library.opcheck(library.BWD, args, test_utils=tests)


# ---- compiled --------------------------------------------------------------------------------------------------------


def test_compiled_with_a_block_mask_as_argument() -> None:
    """One graph, forward and backward; the block mask is evaluated inside it."""
    kernels()

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return flash_attention(q, k, v, mask=mask, impl="triton")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    mask, found = block_mask("documents", 70, 100, 64), []
    for call in (compiled, function):
        leaves = qkv()
        out = call(*leaves, mask)
        found.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_compiled_with_lists_of_any_number_of_partial_blocks() -> None:
    """What was evaluated before is an input of the graph, and other masks of the same sizes run in the same graph."""
    kernels()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")

    def function(q: Tensor, k: Tensor, v: Tensor, mask: BlockLists) -> Tensor:
        return flash_attention(q, k, v, mask=mask, impl="triton")

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    leaves, sizes = [x.detach() for x in qkv(130, 130, heads=1)], set()
    for pattern in ("window", "documents", "strided"):
        lists = evaluate_block_mask(block_mask(pattern, 130, 130, 64))
        sizes.add(len(lists.bits))
        expected = flash_attention(*leaves, mask=dense_of_lists(lists), impl="reference")
        torch.testing.assert_close(compiled(*leaves, lists), expected)
    assert len(sizes) == 3
    assert counter.frame_count == 2


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
@pytest.mark.parametrize("evaluated", [False, True], ids=["BlockMask", "BlockLists"])
def test_sizes_of_another_call(impl: str, evaluated: bool) -> None:
    mask = block_mask("window", 128, 128)
    given = evaluate_block_mask(mask) if evaluated else mask
    with pytest.raises(ValueError, match=r"mask: expected a BlockMask for 70 queries and 100 keys, got one for \(128"):
        flash_attention(*qkv(), mask=given, impl=impl)


def test_planes_of_another_call() -> None:
    kernels()
    with pytest.raises(ValueError, match=r"mask: expected a block mask of B or 1 times Hq or 1 planes of 2 x 2 blocks"):
        flash_attention(*qkv(), mask=block_mask("strided", 70, 100, 64, None, 3), impl="triton")


def test_functions_of_flex_attention_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="give a mask_mod to create_block_mask, and say a score_mod as bias"):
        flash_attention(*qkv(), mask=lambda score, b, h, i, j: score + i)
    with pytest.raises(TypeError, match="block_mask: expected a flex_attention BlockMask, got Tensor"):
        evaluate_block_mask(torch.ones(3, 3, dtype=torch.bool))


def test_packed_sequences_take_no_block_mask() -> None:
    q, k, v = (x.detach()[0].transpose(0, 1) for x in qkv(64, 64))
    cu = torch.tensor([0, 64], dtype=torch.int32, device=DEVICE)
    with pytest.raises(NotImplementedError, match="mask: packed sequences take none"):
        flash_attention_varlen(q, k, v, cu, cu, 64, 64, mask=block_mask("window", 64, 64))  # type: ignore[arg-type]


def test_lists_without_their_batch_dimensions_are_refused() -> None:
    mask = block_mask("window", 128, 128)
    mask = BlockMask.from_kv_blocks(mask.kv_num_blocks[0, 0], mask.kv_indices[0, 0], mask_mod=window)
    with pytest.raises(ValueError, match=r"mask: expected the lists of a BlockMask as \[B, H, 1 row blocks\]"):
        evaluate_block_mask(mask)


def test_hopper_kernels_leave_block_masks_to_the_portable_ones() -> None:
    pytest.importorskip("triton.experimental.gluon")
    from hf_flash_mc.ops.hopper import launch
    from hf_flash_mc.ops.hopper.backward_launch import unsupported_backward
    from hf_flash_mc.ops.spec import Needs

    lists = evaluate_block_mask(block_mask("window", 128, 128))
    call = (*(x.detach() for x in qkv(128, 128)), Spec(block_rows=lists.rows))
    assert "mask: the Hopper kernels walk no lists of blocks" in launch.unsupported(*call)
    assert "mask: not in the fused backward" in unsupported_backward(*call, Needs(), False)


# ---- what a mask_mod reads -------------------------------------------------------------------------------------------

SHARED = torch.zeros(3)


def reads_global(i: Any) -> Any:
    return SHARED[i]


def test_states_follow_what_a_function_reads() -> None:
    own, number = torch.zeros(2), 3

    def reads_closure(i: Any) -> Any:
        return own[i] + number

    functions = (reads_global, reads_closure, functools.partial(reads_closure, 1), lambda i: reads_global(i))
    before = [state_of(f) for f in functions]
    assert None not in before
    assert [state_of(f) for f in functions] == before
    own += 1
    assert [state_of(f) == x for f, x in zip(functions, before, strict=True)] == [True, False, False, True]
    SHARED.add_(1)
    assert not any(state_of(f) == x for f, x in zip(functions, before, strict=True))
    after = state_of(reads_closure)
    number = 4
    assert state_of(reads_closure) != after


def test_states_that_cannot_be_told() -> None:
    class Config:
        width = 3

    config = Config()
    with torch.inference_mode():
        hidden = torch.zeros(2)
    assert state_of(lambda i: i < config.width) is None
    assert state_of(lambda i: hidden[i]) is None
    assert state_of(lambda i: torch.where(i > 0, i, -i)) is not None
