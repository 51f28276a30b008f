"""The ops under torch.compile, torch.export and AOTInductor: one graph for many sizes, the same numbers as eager."""

from __future__ import annotations

import functools
import io
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from hf_flash_mc.ops import flash_attention, flash_attention_varlen, library, sac_save_list

SIZES = [(5, 16), (3, 33), (7, 64), (3, 9)]  # batch, length
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled code from other tests, none for them; what is cached on disk would hide a changed op."""
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


def qkv(b: int, s: int, sk: int | None = None, requires_grad: bool = True) -> list[Tensor]:
    """q [b, 4, s, 8], k and v [b, 2, sk, 8]; the head counts are unlike every size the tests use."""
    return [torch.randn(b, h, n, 8, requires_grad=requires_grad) for h, n in ((4, s), (2, sk or s), (2, sk or s))]


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def assert_same_as_eager(compiled: Callable[..., Tensor], eager: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    leaves = [x for x in inputs if x.requires_grad]
    found, expected = (function(*inputs) for function in (compiled, eager))
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, leaves, weights), torch.autograd.grad(expected, leaves, weights), strict=True
    ):
        torch.testing.assert_close(a, b)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attention(q, k, v, causal=True)


def with_options(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = q.new_zeros(q.shape[2], k.shape[2]) + q[0, 0, :, :1]
    ranges = torch.stack([torch.zeros(q.shape[2]), torch.arange(q.shape[2]) + 1], -1).int()[None, None]
    weight = k[:, :, :, 0]
    out, lse = flash_attention(
        q, k, v, window=(7, None), bias=bias, key_ranges=ranges, key_log_weight=weight, sinks=q[0, :, 0, 0],
        softcap=3.0, alibi_slopes=q.detach()[:, :, 0, 0], return_lse=True,
    )  # fmt: skip
    return out + lse[..., None]


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    n = q.shape[0]
    cu = torch.tensor([0, 3, n])
    return flash_attention_varlen(q, k, v, cu, cu, n, n, causal=True)


@pytest.mark.parametrize("function", [plain, with_options, packed])
def test_one_graph_serves_every_size(function: Callable[..., Tensor]) -> None:
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, s in SIZES:
        assert_same_as_eager(compiled, function, qkv(b, s))
    assert graphs() == 1


@needs_compiler
def test_inductor_gives_the_numbers_of_eager() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attention(q, k, v, causal=True).transpose(1, 2).flatten(2).sin()

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for b, s in SIZES[:3]:
        assert_same_as_eager(compiled, function, [torch.randn(b, s, h, 8, requires_grad=True) for h in (4, 2, 2)])
    assert graphs() == 1


def test_sizes_zero_and_one_are_right() -> None:
    compiled = torch.compile(plain, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, s, sk in ((5, 16, 16), (1, 16, 16), (5, 1, 16), (5, 1, 1)):
        assert_same_as_eager(compiled, plain, qkv(b, s, sk))
    assert graphs() <= 4  # the tracer makes a graph of its own for a size of 1
    q, k, v = qkv(3, 5, 7)
    assert compiled(q[:, :, :0], k, v).shape == (3, 4, 0, 8)
    assert not compiled(q, k[:, :, :0], v[:, :, :0]).any()


def test_marked_dynamic_dimensions_stay_dynamic() -> None:
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    for s in (16, 33, 64):
        inputs = qkv(3, s)
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 2)  # raises if a guard fixes the length
        assert_same_as_eager(compiled, plain, inputs)
    assert graphs() == 1


def test_length_known_only_at_run_time() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        n = length.item()
        torch._check(n >= 2)
        torch._check(n <= k.shape[2])
        mask = torch.ones(q.shape[2], n, dtype=torch.bool, device=q.device)
        return flash_attention(q, k.narrow(2, 0, n), v.narrow(2, 0, n), mask=mask)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (5, 9):
            call = functools.partial(function, length=torch.tensor(n))
            assert_same_as_eager(functools.partial(compiled, length=torch.tensor(n)), call, qkv(3, 16))
    assert graphs() == 1


@pytest.mark.parametrize("kind", ["longest", "bias"])
def test_numbers_known_only_at_run_time(kind: str) -> None:
    """The usual max_seqlen is one; checks that asked for its value were errors of the tracer."""

    def function(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
        n = int(ends.diff().max())
        if kind == "longest":
            rows = [x[0].transpose(0, 1) for x in (q, k, v)]
            return flash_attention_varlen(*rows, ends, ends, n, n, causal=True)
        return flash_attention(q, k[:, :, :n], v[:, :, :n], bias=q.new_zeros(1, 1, 1, n))

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for ends in (torch.tensor([0, 5, 16]), torch.tensor([0, 7, 16])):
            call = functools.partial(function, ends=ends)
            assert_same_as_eager(functools.partial(compiled, ends=ends), call, qkv(2, 16))
    assert graphs() == 1


def test_integers_are_symbols_and_do_not_make_graphs() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, left: int, row: int) -> Tensor:
        return flash_attention(q, k, v, window=(left, 0), dropout_p=0.5, dropout_seed=5, dropout_offsets=(0, 0, row, 0))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for left, row in ((3, 2), (5, 4), (8, 17)):
        call = functools.partial(function, left=left, row=row)
        assert_same_as_eager(functools.partial(compiled, left=left, row=row), call, qkv(3, 16))
    assert graphs() == 1


def test_autocast_inside_and_outside() -> None:
    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return flash_attention(q, k, v, bias=q.new_ones(9, 9), sinks=q[0, :, 0, 0])

    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    inputs = qkv(3, 9)
    assert compiled(*inputs).dtype == torch.bfloat16
    assert_same_as_eager(compiled, inside, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = torch.compile(plain, fullgraph=True, backend="aot_eager")
        assert outside(*inputs).dtype == torch.bfloat16
        assert_same_as_eager(outside, plain, inputs)
    grads = torch.autograd.grad(compiled(*inputs).float().sum(), inputs)
    assert {x.dtype for x in grads} == {torch.float32}


@pytest.mark.parametrize(("save", "forwards"), [(None, 2), (sac_save_list, 1)])
def test_checkpointing(save: Callable[[], list[Any]] | None, forwards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"context_fn": functools.partial(create_selective_checkpoint_contexts, save())} if save else {}

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        body = lambda *x: plain(*x).sin()  # noqa: E731
        return checkpoint(body, q, k, v, use_reentrant=False, **extra)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = qkv(3, 9)
    assert_same_as_eager(compiled, function, inputs)
    calls = []
    module = library.back_end("cpu")
    for name in ("forward", "backward"):
        body = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, n=name, f=body: calls.append(n) or f(*args))
    compiled(*inputs).sum().backward()
    assert sorted(calls) == ["backward"] + ["forward"] * forwards


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_mask_of_forward_and_backward_agree(checkpointed: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, dropout_p=0.5)

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        call = (lambda *x: checkpoint(attend, *x, use_reentrant=False)) if checkpointed else attend
        return call(q, k, v), call(q, k, v)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    q, k = (torch.randn(1, 2, 16, 8) for _ in range(2))
    v = torch.eye(16).expand(1, 2, 16, 16).clone().requires_grad_()
    outs = compiled(q, k, v)
    assert not torch.equal(*outs), "two calls of a graph draw two seeds"
    assert not torch.equal(outs[0], compiled(q, k, v)[0]), "each run of a graph draws anew"
    weights = torch.randn_like(outs[0])
    (grad,) = torch.autograd.grad(outs, v, (weights, 2 * weights))
    torch.testing.assert_close(grad, (outs[0].detach() + 2 * outs[1].detach()).transpose(2, 3) @ weights)


def test_dropout_with_a_seed_drops_what_eager_drops() -> None:
    function = functools.partial(flash_attention, dropout_p=0.25, dropout_seed=torch.tensor([11]))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_as_eager(compiled, function, qkv(3, 9))


def test_deterministic_flag_makes_a_graph_of_its_own() -> None:
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    inputs = qkv(3, 9)
    compiled(*inputs).sum().backward()
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_as_eager(compiled, plain, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert graphs() == 2


def test_block_mask_is_evaluated_in_the_graph() -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    block_mask = create_block_mask(lambda b, h, i, j: (i >= j) & (j != 3), None, None, 200, 200, device="cpu")

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, mask=block_mask)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same_as_eager(compiled, function, qkv(3, 200))


# ---- errors while tracing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fullgraph", [True, False])
def test_forward_mode_raises_while_tracing(fullgraph: bool) -> None:
    """The op has no rule for it, and gave a tangent of zeros."""
    q, k, v = (x.detach() for x in qkv(2, 7))
    compiled = torch.compile(
        lambda x: torch.func.jvp(lambda y: plain(y, k, v), (x,), (x,)), fullgraph=fullgraph, backend="aot_eager"
    )
    error = torch._dynamo.exc.Unsupported if fullgraph else NotImplementedError
    with pytest.raises(error, match="forward-mode derivative of attention is not implemented"):
        compiled(q)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_wrong_calls_raise_every_reason_while_tracing(fullgraph: bool) -> None:
    def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k[:1], v, window=(-3, 0), scale=-1.0, softcap=-2.0, dropout_p=1.0)

    compiled = torch.compile(wrong, fullgraph=fullgraph, dynamic=True, backend="eager")
    with pytest.raises(Exception, match="one batch size") as error:
        compiled(*qkv(3, 9))
    for reason in ("scale: expected", "no cap, got -2", "0 on the left, or None for unbounded, got -3", "dropout_p: "):
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sinks": torch.zeros(3)}, r"sinks: expected \[Hq\]"),
        ({"mask": torch.zeros(9, 8, dtype=torch.bool)}, "mask: expected a shape that broadcasts"),
        ({"mask": torch.zeros(3, 9, dtype=torch.bool)}, r"pass mask\[:, None, None\]"),
        ({"key_ranges": torch.zeros(1, 1, 9, 2)}, "key_ranges: expected torch.int32"),
        ({"impl": "fastest"}, "impl: expected one of"),
        ({"impl": "hopper"}, "compute capability 9.0"),
    ],
    ids=str,
)
def test_each_wrong_option_is_named_while_tracing(options: dict[str, Any], reason: str) -> None:
    function = functools.partial(flash_attention, **options)
    with pytest.raises(Exception, match=reason):
        torch.compile(function, fullgraph=True, backend="eager")(*qkv(3, 9))


# ---- export and AOTInductor ------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Projection, attention, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 32)
        self.out = nn.Linear(16, 16)
        self.sinks = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (8, 4)).transpose(1, 2)
        q, k, v = heads.split((4, 2, 2), 1)
        return self.out(flash_attention(q, k, v, causal=True, sinks=self.sinks).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_is_saved_loaded_and_trained(strict: bool) -> None:
    torch.manual_seed(0)
    block = Block()
    dims = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(block, (torch.randn(3, 9, 16),), dynamic_shapes=dims, strict=strict)
    assert sum(node.target is library.FWD for node in program.graph.nodes) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).run_decompositions().module()
    loaded.load_state_dict(block.state_dict())
    for b, s in ((5, 17), (2, 6)):
        x = torch.randn(b, s, 16)
        torch.testing.assert_close(loaded(x), block(x))
    x = torch.randn(3, 9, 16)
    for module in (block, loaded):
        module(x).square().mean().backward()
    trained = dict(loaded.named_parameters())
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(trained[name].grad, parameter.grad)


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attention(q, k, v, causal=True)


@pytest.mark.parametrize("strict", [True, False])
def test_export_puts_no_bound_on_lengths(strict: bool) -> None:
    """A check of dropout_offsets guarded that there are no more than 2^31 keys: dimensions without a maximum failed."""
    rows, keys = torch.export.Dim("rows"), torch.export.Dim("keys")
    inputs, sizes = tuple(qkv(3, 9, requires_grad=False)), {"q": {2: rows}, "k": {2: keys}, "v": {2: keys}}
    program = torch.export.export(Attention(), inputs, dynamic_shapes=sizes, strict=strict)
    inputs = qkv(3, 17, requires_grad=False)
    torch.testing.assert_close(program.module()(*inputs), plain(*inputs))


@needs_compiler
def test_aot_inductor_runs_in_a_process_that_has_the_ops() -> None:
    sizes = {name: {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC} for name in "qkv"}
    with torch.no_grad():
        program = torch.export.export(Attention(), tuple(qkv(3, 9, requires_grad=False)), dynamic_shapes=sizes)
        runner = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))
        for b, s in ((3, 9), (5, 17)):
            inputs = qkv(b, s, requires_grad=False)
            torch.testing.assert_close(runner(*inputs), plain(*inputs))
