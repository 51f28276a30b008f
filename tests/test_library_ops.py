"""The registered ops in eager: opcheck, layouts, gradients, autocast, checkpointing, torch.func, FLOPs, host time."""

from __future__ import annotations

import functools
import time
import types
from collections import Counter
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from helpers import Case, make_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from hf_flash_mc.ops import flash_attention, flash_attention_varlen, library, sac_save_list
from hf_flash_mc.ops.reference import reference_attention
from hf_flash_mc.ops.spec import Gradients, Needs, Spec, new_bshd, new_lse

F64 = torch.float64
DENSE = [
    Case(Sq=5, Sk=5, D=8, causal=True),
    Case(B=3, Sq=5, Sk=7, D=40, Hq=4, Hkv=2, strides="bshd", window=(3, 0), dlse=True),
    Case(B=2, Sq=3, Sk=4, D=8, Dv=16, strides="sliced", bias="hq", sinks=True, softcap=2.0),
    Case(B=2, Sq=4, Sk=3, D=8, strides="expanded", key_ranges="random", ranges_shape="bh", key_log_weight="b"),
    Case(dtype=torch.bfloat16, B=2, Sq=1, Sk=1, D=1, mask="k", alibi="bh", aux_fp32=False),
    Case(dtype=F64, Sq=3, Sk=17, D=16, dropout_p=0.5, dropout_offsets=(1, 2, 3, 4)),
    Case(Sq=0, Sk=3, D=8, sinks=True),
    Case(Sq=3, Sk=0, D=8, bias="q", sinks=True),
]
PACKED = [
    Case(varlen=((3, 4), (0, 2), (5, 1)), Hq=4, Hkv=2, D=8, Dv=4, causal=True, sinks=True),
    Case(varlen=((2, 2), (3, 1)), D=8, key_ranges="random", key_log_weight="", alibi="bh", strides="sliced"),
]


def op_arguments(case: Case, impl: str = "cpu", requires_grad: bool = True) -> tuple[Any, ...]:
    """Positional arguments of the forward op of a case, its differentiable tensors being leaves."""
    inputs = make_inputs(case)
    spec = inputs.spec
    for name in ("bias", "key_log_weight", "sinks"):
        if (x := getattr(spec, name)) is not None:
            spec = spec._replace(**{name: x.requires_grad_(requires_grad)})
    qkv = (x.detach().requires_grad_(requires_grad) for x in (inputs.q, inputs.k, inputs.v))
    return (*qkv, *(inputs.varlen or ()), impl, *spec)


def backward_arguments(case: Case, impl: str = "cpu", with_dlse: bool = True) -> tuple[Any, ...]:
    """Positional arguments of the backward op of a case."""
    q, k, v, *rest = op_arguments(case, impl, requires_grad=False)
    packed, (impl, *spec) = (tuple(rest[:4]), rest[4:]) if case.varlen is not None else ((), rest)
    out, lse = forward_op(case)(q, k, v, *rest)
    needs = [True, True, True, spec[2] is not None, spec[3] is not None, spec[5] is not None]
    dlse = torch.randn_like(lse) if with_dlse else None
    return (torch.randn_like(out), dlse, q, k, v, out, lse, needs, False, *packed, impl, *spec)


def forward_op(case: Case) -> Any:
    return library.FWD if case.varlen is None else library.VARLEN_FWD


def backward_op(case: Case) -> Any:
    return library.BWD if case.varlen is None else library.VARLEN_BWD


class CountOps(TorchDispatchMode):
    """Counts the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == library.NAMESPACE:
            self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def qkv(*sizes: int, dtype: torch.dtype = torch.float32, requires_grad: bool = True, seed: int = 0) -> list[Tensor]:
    """q, k and v [B, H, S, D] of one size."""
    gen = torch.Generator().manual_seed(seed)
    sizes = sizes or (2, 2, 5, 8)
    return [torch.randn(sizes, dtype=dtype, generator=gen).requires_grad_(requires_grad) for _ in range(3)]


# ---- registration: schema, fakes, layouts ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*DENSE[:4], DENSE[7], *PACKED], ids=str)
def test_opcheck_forward(case: Case) -> None:
    torch.library.opcheck(forward_op(case), op_arguments(case))


@pytest.mark.parametrize("case", [DENSE[1], DENSE[2], PACKED[0]], ids=str)
def test_opcheck_backward(case: Case) -> None:
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(backward_op(case), backward_arguments(case), test_utils=tests)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("case", DENSE + PACKED, ids=str)
def test_fake_outputs_have_strides_and_dtypes_of_real_ones(case: Case, impl: str) -> None:
    for op, args in (
        (forward_op(case), op_arguments(case, impl, requires_grad=False)),
        (backward_op(case), backward_arguments(case, impl)),
    ):
        real = op(*args)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args))
        for i, (a, b) in enumerate(zip(real, fake, strict=True)):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device), f"output {i}"


@pytest.mark.parametrize("strides", ["bhsd", "bshd", "sliced", "expanded", "lastdim"])
def test_outputs_lie_on_bshd_memory_whatever_the_inputs_strides(strides: str) -> None:
    q, k, v, *rest = op_arguments(Case(B=2, Sq=5, Sk=7, Hq=4, Hkv=2, D=8, Dv=6, strides=strides))
    out, lse = library.FWD(q, k, v, *rest)
    assert out.transpose(1, 2).is_contiguous()
    assert lse.is_contiguous()
    for grad in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)):
        assert grad.transpose(1, 2).is_contiguous()


def test_op_names_hold_what_checkpointing_policies_look_for() -> None:
    names = ["attn_fwd", "attn_varlen_fwd", "ring_attn_fwd"]
    assert [op.name() for op in sac_save_list()] == [f"hf_flash_mc_v2::{name}" for name in names]
    assert {"attn_bwd", "attn_varlen_bwd"} <= set(dir(torch.ops.hf_flash_mc_v2))


def test_meta_tensors_get_shapes() -> None:
    q, k, v = (torch.empty(2, h, s, 8, device="meta") for h, s in ((4, 5), (2, 7), (2, 7)))
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert (out.shape, lse.shape, out.device.type) == ((2, 4, 5, 8), (2, 4, 5), "meta")


def test_no_grad_and_inference_mode_agree_with_grad_mode() -> None:
    q, k, v = qkv()
    expected = flash_attention(q, k, v, causal=True)
    assert expected.requires_grad
    with torch.no_grad():
        out = flash_attention(q, k, v, causal=True)
    with torch.inference_mode():
        inferred = flash_attention(q, k, v, causal=True)
    assert not out.requires_grad
    assert inferred.is_inference()
    assert torch.equal(out, expected)
    assert torch.equal(inferred, expected)


# ---- gradients -------------------------------------------------------------------------------------------------------

GRADCHECK = [
    Case(dtype=F64, Sq=3, Sk=5, Hq=4, Hkv=2, D=3, causal=True),
    Case(dtype=F64, B=2, Sq=4, Sk=3, D=2, Dv=3, window=(1, 0), bias="hk", sinks=True),
    Case(dtype=F64, B=2, Sq=3, Sk=4, Hkv=1, D=2, key_log_weight="bh", softcap=1.5, key_ranges="empty", scale=0.7),
    Case(dtype=F64, varlen=((2, 3), (3, 2)), Hq=2, Hkv=1, D=2, key_log_weight="h", sinks=True, causal=True),
]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradcheck_of_out_and_lse(case: Case, impl: str) -> None:
    args = list(op_arguments(case, impl))
    leaves = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.requires_grad]

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        for i, x in zip(leaves, values, strict=True):
            args[i] = x
        out, lse = library.attention(*args)
        return out, lse.clamp_min(-1e3)  # numerical differences of -inf are nan

    assert torch.autograd.gradcheck(function, [args[i] for i in leaves], nondet_tol=0.0)


def test_raw_op_and_eager_function_give_the_same_gradients() -> None:
    case = DENSE[2]
    args = op_arguments(case)
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    found = []
    for function in (library.attention, library.FWD):
        out, lse = function(*args)
        found.append(torch.autograd.grad((out.cos().sum() + lse.sin().sum()), leaves))
    assert len(leaves) == 5
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_back_ends_get_a_hashable_spec_from_the_raw_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatcher hands integer lists over as lists, and the kernels' plans are kept by the spec's numbers."""
    seen = []
    module = library.back_end("reference")

    def record(function: Any, *args: Any) -> Any:
        seen.extend(x for x in args if isinstance(x, Spec))
        return function(*args)

    for name in ("forward", "backward"):
        monkeypatch.setattr(module, name, functools.partial(record, getattr(module, name)))
    q, k, v = qkv()
    dropout = {"dropout_p": 0.5, "dropout_seed": torch.tensor([1]), "dropout_offsets": [1, 2, 3, 4]}
    out, _ = library.FWD(q, k, v, "reference", **dropout)
    out.sum().backward()
    assert [spec.dropout_offsets for spec in seen] == [(1, 2, 3, 4)] * 2


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "sinks", "key_log_weight"])
def test_only_what_requires_grad_gets_a_gradient(wanted: str) -> None:
    case = Case(dtype=F64, B=2, Sq=3, Sk=4, D=4, bias="hq", sinks=True, key_log_weight="b")
    inputs = make_inputs(case)
    tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    tensors |= {n: getattr(inputs.spec, n) for n in ("bias", "sinks", "key_log_weight")}
    tensors[wanted].requires_grad_()
    with CountOps() as count:
        flash_attention(**tensors, causal=True).cos().sum().backward()
    assert count.calls[library.BWD] == 1
    assert [n for n, x in tensors.items() if x.grad is not None] == [wanted]
    actual, tensors[wanted].grad = tensors[wanted].grad, None
    reference_attention(**tensors, causal=True)[0].cos().sum().backward()
    torch.testing.assert_close(actual, tensors[wanted].grad, atol=1e-12, rtol=1e-10)


def test_loss_on_lse_alone() -> None:
    q, k, v = qkv(dtype=F64)
    flash_attention(q, k, v, return_lse=True)[1].sin().sum().backward()
    reference = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    reference_attention(*reference)[1].sin().sum().backward()
    for a, b in zip((q, k), reference, strict=False):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-10)
    assert v.grad is None or not v.grad.any()


@pytest.mark.parametrize("kind", ["expanded", "transposed", "size_one", "strided_last"])
def test_gradients_of_odd_strides_arrive(kind: str) -> None:
    q, k, v = qkv(1 if kind == "size_one" else 2, 2, 5, 8, dtype=F64)
    out = flash_attention(q, k, v)
    dout = torch.randn(out.shape, dtype=F64)
    if kind == "expanded":
        dout = torch.randn((), dtype=F64).expand_as(out)
    elif kind == "transposed":
        dout = dout.transpose(2, 3).contiguous().transpose(2, 3)
    elif kind == "size_one":
        dout = dout.as_strided(dout.shape, (7, 40, 8, 1))
    else:
        dout = torch.randn((*out.shape[:3], 16), dtype=F64)[..., ::2]
    found = torch.autograd.grad(out, (q, k, v), dout)
    expected = torch.autograd.grad(reference_attention(q, k, v)[0], (q, k, v), dout)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_keys(sinks: bool) -> None:
    q, k, v = qkv(1, 2, 3, 4, dtype=F64)
    sink = torch.tensor([0.5, -0.25], dtype=F64, requires_grad=True) if sinks else None
    ranges = torch.tensor([[0, 3], [2, 2], [3, 1]], dtype=torch.int32)[None, None]
    out, lse = flash_attention(q, k, v, key_ranges=ranges, sinks=sink, return_lse=True)
    assert not out[:, :, 1:].any()
    expected = torch.full((2, 2), float("-inf"), dtype=F64) if sink is None else sink.detach()[:, None].expand(2, 2)
    assert torch.equal(lse[0, :, 1:], expected)
    dlse = torch.randn(lse.shape, dtype=F64)
    dlse[:, :, 0] = 0
    dout = torch.zeros_like(out)
    dout[:, :, 1:] = float("nan")  # must reach nothing
    torch.autograd.backward((out, lse), (dout, dlse))
    for x in (q, k, v):
        assert not x.grad.any()
    if sink is not None:
        torch.testing.assert_close(sink.grad, dlse[0].sum(1))


@pytest.mark.parametrize(
    ("b", "hq", "hkv", "sq", "sk"), [(0, 2, 1, 3, 4), (1, 0, 2, 3, 4), (2, 2, 1, 0, 4), (2, 2, 1, 3, 0)]
)
def test_zero_length(b: int, hq: int, hkv: int, sq: int, sk: int) -> None:
    q, k, v = (torch.randn(b, h, s, 4, requires_grad=True) for h, s in ((hq, sq), (hkv, sk), (hkv, sk)))
    sinks = torch.randn(hq, requires_grad=True)
    bias = torch.randn(1, hq, sq, sk, requires_grad=True)
    out, lse = flash_attention(q, k, v, bias=bias, sinks=sinks, return_lse=True)
    assert out.shape == (b, hq, sq, 4)
    assert torch.equal(lse, sinks.detach()[:, None].expand(b, hq, sq))
    assert torch.equal(flash_attention(q, k, v, return_lse=True)[1], torch.full((b, hq, sq), float("-inf")))
    dlse = torch.randn(b, hq, sq)
    torch.autograd.backward((out, lse), (torch.ones_like(out), dlse))
    for x in (q, k, v, bias):
        assert x.grad is not None
        assert not x.grad.any()
    torch.testing.assert_close(sinks.grad, dlse.sum((0, 2)))


def test_zero_length_packed() -> None:
    q, k = torch.randn(3, 2, 4, requires_grad=True), torch.randn(0, 2, 4, requires_grad=True)
    sinks, cu = torch.randn(2, requires_grad=True), torch.tensor([0, 3])
    out, lse = flash_attention_varlen(q, k, k, cu, cu * 0, 3, 0, sinks=sinks, return_lse=True)
    assert not out.any()
    assert torch.equal(lse, sinks.detach()[:, None].expand(2, 3))
    lse.sum().backward()
    assert torch.equal(sinks.grad, torch.full((2,), 3.0))


def test_second_derivative_raises_instead_of_dropping_terms() -> None:
    for function in (library.attention, library.FWD):
        q, *rest = op_arguments(DENSE[0])
        (grad,) = torch.autograd.grad(function(q, *rest)[0].sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"second derivative .* use .*\.reference\.reference_attention"):
            grad.sum().backward()


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}], ids=["kernel", "tiles"])
def test_batches_of_gradients(options: dict[str, Any]) -> None:
    """vmap over backward passes met the body of the op, whose steps in place it cannot map."""
    q, k, v = qkv()
    out, lse = flash_attention(q, k, v, return_lse=True, **options)
    douts, dlses = torch.randn(3, *out.shape), torch.randn(3, *lse.shape)
    backward = functools.partial(torch.autograd.grad, (out, lse), (q, k, v), retain_graph=True)
    expected = [torch.stack(x) for x in zip(*map(backward, zip(douts, dlses, strict=True)), strict=True)]
    torch.testing.assert_close(list(backward((douts, dlses), is_grads_batched=True)), expected)
    torch.testing.assert_close(list(torch.vmap(lambda *x: backward(x))(douts, dlses)), expected)


def test_forward_mode_raises_instead_of_giving_zero() -> None:
    q, k, v = qkv(requires_grad=False)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: flash_attention(x, k, v), (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        flash_attention(forward_ad.make_dual(q, q), k, v)


def test_saved_tensors_all_go_through_hooks() -> None:
    # activation offloading sees what it can move: every tensor the backward reads
    args = op_arguments(Case(B=2, Sq=3, Sk=4, D=8, bias="h", sinks=True, key_ranges="random", dropout_p=0.5))
    packed: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x.data_ptr()) or x, lambda x: x):
        out, lse = library.attention(*args)
    given = [x for x in args if isinstance(x, Tensor)]
    assert {x.data_ptr() for x in (*given, out, lse)} <= set(packed)


# ---- torch.func ------------------------------------------------------------------------------------------------------


def func_case() -> tuple[Any, dict[str, Tensor], dict[str, int | None]]:
    """A function of named tensors, four samples of some of them, and which are mapped."""
    gen = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=gen, dtype=F64)
    tensors = {
        "q": draw(4, 2, 4, 3, 4),
        "k": draw(2, 2, 5, 4),
        "v": draw(2, 4, 2, 5, 3),
        "bias": draw(1, 4, 3, 1),
        "key_log_weight": draw(4, 1, 2, 5),
        "alibi_slopes": draw(4, 4).abs(),
    }
    dims = {"q": 0, "k": None, "v": 1, "bias": None, "key_log_weight": 0, "alibi_slopes": 0}
    return lambda *values: flash_attention(**dict(zip(tensors, values, strict=True)), causal=True), tensors, dims


def samples(tensors: dict[str, Tensor], dims: dict[str, int | None]) -> list[list[Tensor]]:
    return [[x if dims[n] is None else x.select(dims[n], i) for n, x in tensors.items()] for i in range(4)]


def test_vmap_is_a_loop() -> None:
    function, tensors, dims = func_case()
    out = torch.func.vmap(function, tuple(dims.values()))(*tensors.values())
    torch.testing.assert_close(out, torch.stack([function(*sample) for sample in samples(tensors, dims)]))


def test_vmap_of_grad_is_a_loop_of_backward() -> None:
    function, tensors, dims = func_case()
    loss = lambda *values: function(*values).sin().sum()  # noqa: E731
    gradient = torch.func.grad(loss, (0, 1, 2, 3, 4))
    found = torch.func.vmap(gradient, tuple(dims.values()))(*tensors.values())
    for i, sample in enumerate(samples(tensors, dims)):
        leaves = [x.clone().requires_grad_() for x in sample[:5]]
        expected = torch.autograd.grad(loss(*leaves, sample[5]), leaves)
        for name, a, b in zip(tensors, found, expected, strict=False):
            torch.testing.assert_close(a[i], b, msg=lambda m, n=name: f"{n}: {m}")


def test_jacrev_is_exact() -> None:
    q, k, v = qkv(1, 1, 2, 3, dtype=F64, requires_grad=False)
    found = torch.func.jacrev(lambda x: flash_attention(x, k, v))(q)
    expected = torch.func.jacrev(lambda x: reference_attention(x, k, v)[0])(q)
    torch.testing.assert_close(found, expected)


def test_nested_grad_and_what_vmap_cannot_do_raise() -> None:
    q, k, v = qkv(requires_grad=False)
    loss = lambda x: flash_attention(x, k, v).sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(q)
    with pytest.raises(NotImplementedError, match="dropout_p"):
        torch.func.vmap(lambda x: flash_attention(x, k, v, dropout_p=0.5, dropout_seed=1))(q[None])
    with pytest.raises(NotImplementedError, match="sinks"):
        torch.func.vmap(lambda s: flash_attention(q, k, v, sinks=s))(torch.zeros(3, 2))


# ---- autocast, checkpointing, dropout --------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_autocast_casts_q_k_v_and_nothing_else(impl: str) -> None:
    q, k, v = qkv()
    bias = torch.randn(5, 5, requires_grad=True)
    raw = (None, None, bias[None, None], *(None,) * 7, None, False, -1, -1, 0.0, 0.0, (0, 0, 0, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = flash_attention(q, k.half(), v, bias=bias, return_lse=True, impl=impl)
        direct = library.FWD(q, k.half(), v, impl, *raw)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, direct[0])
    (out.float().sin().sum() + lse.sum()).backward()
    assert (q.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)
    expected = flash_attention(q.bfloat16(), k.half().bfloat16(), v.bfloat16(), bias=bias, impl=impl)
    assert torch.equal(out, expected), "the back end itself must not run under autocast"


def test_backward_inside_autocast_is_the_same() -> None:
    found = []
    for inside in (False, True):
        q, k, v = qkv()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = flash_attention(q, k, v, impl="reference").float().sin().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        found.append(q.grad)
    assert torch.equal(*found)


def test_float64_stays_float64_under_autocast() -> None:
    q, k, v = qkv(dtype=F64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attention(q, k, v).dtype == F64


def test_checkpointing_recomputes_and_selective_checkpointing_does_not() -> None:
    policy = functools.partial(create_selective_checkpoint_contexts, sac_save_list())

    def by_name(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "attn" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    for context_fn, forwards in (
        (None, 2),
        (policy, 1),
        (functools.partial(create_selective_checkpoint_contexts, by_name), 1),
    ):
        q, k, v = qkv()
        extra = {} if context_fn is None else {"context_fn": context_fn}
        with CountOps() as count:
            out = checkpoint(lambda *x: flash_attention(*x, causal=True).sin(), q, k, v, use_reentrant=False, **extra)
            out.sum().backward()
        assert (count.calls[library.FWD], count.calls[library.BWD]) == (forwards, 1)
        expected = torch.autograd.grad(flash_attention(q, k, v, causal=True).sin().sum(), (q, k, v))
        for x, grad in zip((q, k, v), expected, strict=True):
            assert torch.equal(x.grad, grad)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_dropout_mask_of_forward_and_backward_agree(checkpointed: bool) -> None:
    # v is the identity, so out holds the dropped weights, and d sum(out * W) / dv their transposed product with W
    torch.manual_seed(3)
    q, k = (torch.randn(1, 2, 16, 8) for _ in range(2))
    v = torch.eye(16).expand(1, 2, 16, 16).clone().requires_grad_()
    call = lambda x: flash_attention(q, k, x, dropout_p=0.5)  # noqa: E731
    out = checkpoint(call, v, use_reentrant=False) if checkpointed else call(v)
    weights = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, v, weights)
    torch.testing.assert_close(grad, out.detach().transpose(2, 3) @ weights)
    dropped = (out == 0).float().mean().item()
    assert 0.35 < dropped < 0.65
    assert not torch.equal(call(v), call(v)), "each call draws its own seed"


def test_dropout_seed_of_every_kind_repeats_and_offsets_shift() -> None:
    q, k, v = qkv(3, 4, 5, 8, requires_grad=False)
    whole = flash_attention(q, k, v, dropout_p=0.25, dropout_seed=7)
    assert torch.equal(whole, flash_attention(q, k, v, dropout_p=0.25, dropout_seed=torch.tensor([7])))
    assert torch.equal(whole, flash_attention(q, k, v, dropout_p=0.25, dropout_seed=torch.tensor(7)))
    part = flash_attention(
        q[1:, 2:, 3:], k[1:, 2:], v[1:, 2:], dropout_p=0.25, dropout_seed=7, dropout_offsets=(1, 2, 3, 0)
    )
    torch.testing.assert_close(part, whole[1:, 2:, 3:])


# ---- FLOP formula, determinism, host time ----------------------------------------------------------------------------


def test_flop_formula_counts_full_attention() -> None:
    b, hq, hkv, sq, sk, d, dv = 2, 4, 2, 16, 24, 8, 6
    q, k, v = (torch.randn(b, h, s, n, requires_grad=True) for h, s, n in ((hq, sq, d), (hkv, sk, d), (hkv, sk, dv)))
    with FlopCounterMode(display=False) as count:
        flash_attention(q, k, v, causal=True).sum().backward()
    pairs = b * hq * sq * sk
    assert count.get_total_flops() == 2 * pairs * (d + dv) + 2 * pairs * (3 * d + 2 * dv)


def test_flop_formula_of_packed_sequences_counts_each_sequence() -> None:
    q, k, v, cu_q, cu_k, *_ = op_arguments(PACKED[0])
    with FlopCounterMode(display=False) as count:
        flash_attention_varlen(q, k, v, cu_q, cu_k, 5, 4).sum().backward()
    pairs = 4 * (3 * 4 + 0 * 2 + 5 * 1)
    assert count.get_total_flops() == 2 * pairs * (8 + 4) + 2 * pairs * (3 * 8 + 2 * 4)


def test_deterministic_flag_reaches_the_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    module = library.back_end("reference")
    backward = module.backward

    def record(
        dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, spec: Any, needs: Needs, *rest: Any
    ) -> Gradients:
        seen.append((needs, rest[0]))
        return backward(dout, dlse, q, k, v, out, lse, spec, needs, *rest)

    monkeypatch.setattr(module, "backward", record)
    q, k, v = qkv()
    for flag in (False, True):
        torch.use_deterministic_algorithms(flag)
        try:
            flash_attention(q, k, v.detach(), impl="reference").sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
    needs = Needs(True, True, False, False, False, False)
    assert seen == [(needs, False), (needs, True)]


def test_nan_filled_allocations_leave_no_nan() -> None:
    # with deterministic algorithms on, torch fills what it allocates with NaN: an element nobody wrote would show
    torch.use_deterministic_algorithms(True)
    try:
        for case in (DENSE[1], DENSE[2], PACKED[0]):
            args = op_arguments(case)
            out, lse = library.attention(*args)
            leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
            for x in (out, lse, *torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), leaves)):
                assert not x.isnan().any(), case
    finally:
        torch.use_deterministic_algorithms(False)


def stub_back_end() -> types.SimpleNamespace:
    """A back end that does nothing but allocate."""
    return types.SimpleNamespace(
        forward=lambda q, k, v, spec, varlen=None: (new_bshd(q, v.shape[-1]), new_lse(q)),
        backward=lambda dout, dlse, q, k, v, *rest: Gradients(new_bshd(q), new_bshd(k), new_bshd(v)),
    )


def fastest(function: Any, calls: int = 5, batches: int = 400) -> float:
    """Microseconds of one call: the fastest of many short batches, which other processes leave alone."""
    best = float("inf")
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        best = min(best, time.perf_counter() - start)
    return best / calls * 1e6


def test_host_time_is_no_more_than_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    # measured against torch's own attention in the same minute, so that a slow machine does not matter;
    # torch computes something, which at this size costs a few microseconds
    stub = stub_back_end()
    monkeypatch.setattr(library, "back_end", lambda impl: stub)
    q, k, v = qkv(1, 8, 16, 64)
    ranges = torch.zeros(1, 1, 16, 2, dtype=torch.int32)
    dout = torch.randn_like(q)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad():
        theirs = fastest(lambda: sdpa(q, k, v, is_causal=True))
        ours = fastest(lambda: flash_attention(q, k, v, causal=True))
        ranged = fastest(lambda: flash_attention(q, k, v, key_ranges=ranges))
    print(f"\nhost microseconds: ours {ours:.1f}, with key_ranges {ranged:.1f}, torch with its kernel {theirs:.1f}")
    assert ours < 1.3 * theirs
    assert ranged < 1.7 * theirs
    theirs = fastest(lambda: torch.autograd.grad(sdpa(q, k, v, is_causal=True), (q, k, v), dout), 3)
    ours = fastest(lambda: torch.autograd.grad(flash_attention(q, k, v, causal=True), (q, k, v), dout), 3)
    print(f"forward and backward: ours {ours:.1f}, torch with its kernels {theirs:.1f}")
    assert ours < 1.4 * theirs


def test_import_of_the_ops_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, hf_flash_mc.ops as o; "
        "heavy = ('triton', 'transformers', 'torch.distributed.tensor', 'torch._dynamo', 'torch.utils.flop_counter'); "
        "print([m for m in heavy if m in sys.modules]); "
        "import torch.utils.flop_counter as f; print(len([k for k in f.flop_registry if 'hf_flash_mc' in str(k)]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.split("\n")[:2] == ["[]", "5"]


def test_tensors_to_be_negated_reach_back_ends_negated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such views (``z.conj().imag``) hold numbers of the other sign: only the dispatcher knows."""
    seen: list[bool] = []
    for name in ("_forward", "_find_gradients"):
        found = getattr(library, name)

        def spy(*args: Any, found: Any = found) -> Any:
            tensors = [x for a in args for x in (a if isinstance(a, tuple) else (a,)) if isinstance(x, torch.Tensor)]
            seen.extend(x.is_neg() for x in tensors)
            return found(*args)

        monkeypatch.setattr(library, name, spy)
    lazy = torch.randn(2, 1, 2, 5, 8, dtype=torch.complex64).conj().imag
    assert lazy.is_neg()
    for plain in (False, True):
        for q, dout, bias in ((lazy[0], lazy[1], None), (-lazy[0].resolve_neg(), lazy[1], lazy[0][..., :5])):
            leaf = q.detach().clone() if plain else q.detach()
            leaf.requires_grad_()
            out = flash_attention(leaf, leaf, leaf, bias=bias)
            out.backward(dout)
            expected = q.resolve_neg().detach().clone().requires_grad_()
            eager = None if bias is None else bias.resolve_neg().clone()
            stock = flash_attention(expected, expected, expected, bias=eager)
            stock.backward(dout.resolve_neg().clone())
            assert torch.equal(out, stock)
            assert torch.equal(leaf.grad, expected.grad)
    assert not any(seen)
