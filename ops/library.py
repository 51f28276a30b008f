"""The attention ops: schemas, bodies, fakes, autograd, autocast and FLOP formulas. Torch only.

Four ops, ``attn_fwd``, ``attn_bwd`` and the same for packed sequences, take every argument of ``flash_attention`` as
``Spec`` lists them and the name of the back end. They are pure: randomness comes in as a tensor, nothing is mutated,
outputs never share memory with inputs and always have the strides that ``spec.new_bshd`` gives.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, repeat
from .lazy import when_imported
from .spec import Needs, Spec, Varlen, new_bshd, new_lse

# Compile caches do not notice a changed fake or backward formula: raise the version when either contract changes.
NAMESPACE = "hf_flash_mc_v2"
# "auto" is what tensors on a GPU get: it chooses below the op
BACK_ENDS = {"auto": "auto", "hopper": "hopper.launch", "triton": "portable.launch", "cpu": "cpu", "reference": "dense"}

_SPEC = (
    "Tensor? key_ranges=None, Tensor? mask=None, Tensor? bias=None, Tensor? key_log_weight=None, "
    "Tensor? alibi_slopes=None, Tensor? sinks=None, Tensor? dropout_seed=None, Tensor? block_rows=None, "
    "Tensor? block_columns=None, Tensor? block_bits=None, float? scale=None, bool causal=False, "
    "SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, float dropout_p=0.0, "
    "SymInt[4] dropout_offsets=[0, 0, 0, 0]"
)
_PACKED = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_TENSORS, _NUMBERS = 10, 7  # how many of _SPEC's arguments are tensors (they come first), and are not

_lib = torch.library.Library(NAMESPACE, "DEF")
# Strides are read by every back end, so Inductor may keep any order it had in eager.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
for _name, _packed in (("attn", ""), ("attn_varlen", _PACKED)):
    _lib.define(
        f"{_name}_fwd(Tensor q, Tensor k, Tensor v, {_packed}str impl, {_SPEC}) -> (Tensor, Tensor)", tags=_TAGS
    )
    _lib.define(
        f"{_name}_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor fwd_out, Tensor lse, "
        f"bool[6] needs, bool deterministic, {_packed}str impl, {_SPEC}) -> {_GRADIENTS}",
        tags=_TAGS,
    )
_ops = getattr(torch.ops, NAMESPACE)
FWD, BWD = _ops.attn_fwd.default, _ops.attn_bwd.default
VARLEN_FWD, VARLEN_BWD = _ops.attn_varlen_fwd.default, _ops.attn_varlen_bwd.default
_FWD_ARGUMENTS, _VARLEN_ARGUMENTS = 4 + _TENSORS + _NUMBERS, 8 + _TENSORS + _NUMBERS


# ---- bodies ----------------------------------------------------------------------------------------------------------


@functools.cache
def back_end(impl: str) -> ModuleType:
    """The module behind an ``impl`` name, imported on first use."""
    if impl not in BACK_ENDS:
        raise NotImplementedError(f"impl={impl!r}: this version has {', '.join(map(repr, BACK_ENDS))}")
    return importlib.import_module(f".{BACK_ENDS[impl]}", __package__)


def _make_spec(options: tuple[Any, ...]) -> Spec:
    """The dispatcher leaves out trailing arguments that equal their defaults, which are Spec's defaults."""
    spec = Spec(*options)
    return spec if len(options) < len(spec) else spec._replace(dropout_offsets=tuple(options[-1]))


def _fwd(q: Tensor, k: Tensor, v: Tensor, impl: str, *options: Any) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, impl, _make_spec(options), None)


def _varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, impl: str, *options: Any
):
    return _forward(q, k, v, impl, _make_spec(options), Varlen(cu_q, cu_k, max_q, max_k))


def _forward(q: Tensor, k: Tensor, v: Tensor, impl: str, spec: Spec, varlen: Varlen | None) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return _empty_forward(q, v, spec)
    out, lse = back_end(impl).forward(q, k, v, spec, varlen)
    if not _is_bshd(out):
        out = new_bshd(q, v.shape[-1]).copy_(out)
    return out, lse if lse.is_contiguous() else lse.contiguous()


def _bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, needs: list[bool],
    deterministic: bool, impl: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _backward(dout, dlse, q, k, v, out, lse, Needs(*needs), deterministic, impl, _make_spec(options), None)


def _varlen_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, needs: list[bool],
    deterministic: bool, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, impl: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    varlen = Varlen(cu_q, cu_k, max_q, max_k)
    return _backward(dout, dlse, q, k, v, out, lse, Needs(*needs), deterministic, impl, _make_spec(options), varlen)


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, needs: Needs,
    deterministic: bool, impl: str, spec: Spec, varlen: Varlen | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the op gives them: empty where not needed."""
    found = _find_gradients(dout, dlse, q, k, v, out, lse, needs, deterministic, impl, spec, varlen)
    return tuple([q.new_empty(0) if x is None else x for x in found])


def _find_gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, needs: Needs,
    deterministic: bool, impl: str, spec: Spec, varlen: Varlen | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dq, dk, dv, dbias, dkey_log_weight and dsinks in the layouts that the fakes give; None where not needed."""
    if q.numel() == 0 or k.numel() == 0:
        return tuple(
            [x if n else None for x, n in zip(_empty_backward(dlse, q, k, v, needs, spec), needs, strict=True)]
        )
    found = back_end(impl).backward(dout, dlse, q, k, v, out, lse, spec, needs, deterministic, varlen)
    dq, dk, dv, *others = found
    if dq is not None and not _is_bshd(dq):
        dq = new_bshd(q).copy_(dq)
    if dk is not None and not _is_bshd(dk):
        dk = new_bshd(k).copy_(dk)
    if dv is not None and not _is_bshd(dv):
        dv = new_bshd(v).copy_(dv)
    return dq, dk, dv, *[x if x is None else x.contiguous() for x in others]


def _empty_forward(q: Tensor, v: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """No query, or no key: then every row gives 0, and lse is the sink or -inf."""
    lse = new_lse(q).fill_(float("-inf"))
    if spec.sinks is not None:
        lse.copy_((spec.sinks[:, None]).expand_as(lse))
    return new_bshd(q, v.shape[-1]).zero_(), lse


def _empty_backward(
    dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, needs: Needs, spec: Spec
) -> tuple[Tensor, ...]:
    like = (q, k, v, spec.bias, spec.key_log_weight, spec.sinks)
    grads = _new_gradients(like, needs)
    for grad in grads:
        grad.zero_()
    if needs.dsinks and dlse is not None:  # lse is the sink itself
        heads = dlse.sum((0, 2) if dlse.dim() == 3 else 1)
        grads[5].copy_(heads)
    return grads


def _new_gradients(like: tuple[Any, ...], needs: Needs) -> tuple[Tensor, ...]:
    """Uninitialised dq, dk, dv, dbias, dkey_log_weight and dsinks; of size 0 where not needed."""
    q = like[0]
    return tuple(
        q.new_empty(0) if not need else new_bshd(x) if i < 3 else x.new_empty(x.shape)
        for i, (x, need) in enumerate(zip(like, needs, strict=True))
    )


def _is_bshd(x: Tensor) -> bool:
    """Whether x has exactly the strides that new_bshd gives."""
    if x.dim() == 3:
        return x.is_contiguous()
    _, h, s, d = x.shape
    return x.stride() == (s * h * d, d, h * d, 1)


# ---- fakes -----------------------------------------------------------------------------------------------------------


def _fake_fwd(q: Tensor, k: Tensor, v: Tensor, impl: str, *options: Any) -> tuple[Tensor, Tensor]:
    return _fake_forward(q, k, v, impl, Spec(*options), None)


def _fake_varlen_fwd(q, k, v, cu_q, cu_k, max_q, max_k, impl, *options):
    return _fake_forward(q, k, v, impl, Spec(*options), Varlen(cu_q, cu_k, max_q, max_k))


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, impl: str, spec: Spec, varlen: Varlen | None
) -> tuple[Tensor, Tensor]:
    # compiled code checks here and not in api.py: the tracer runs this function, but would trace through that one
    if problems := checks.find_problems(q, k, v, impl, spec, varlen):
        checks.raise_problems(problems, "flash_attention" if varlen is None else "flash_attention_varlen")
    return new_bshd(q, v.shape[-1]), new_lse(q)


def _fake_bwd(dout, dlse, q, k, v, out, lse, needs, deterministic, impl, *options):
    spec = Spec(*options)
    return _new_gradients((q, k, v, spec.bias, spec.key_log_weight, spec.sinks), Needs(*needs))


def _fake_varlen_bwd(dout, dlse, q, k, v, out, lse, needs, deterministic, cu_q, cu_k, max_q, max_k, impl, *options):
    return _fake_bwd(dout, dlse, q, k, v, out, lse, needs, deterministic, impl, *options)


for _name, _body, _fake in (
    ("attn_fwd", _fwd, _fake_fwd),
    ("attn_bwd", _bwd, _fake_bwd),
    ("attn_varlen_fwd", _varlen_fwd, _fake_varlen_fwd),
    ("attn_varlen_bwd", _varlen_bwd, _fake_varlen_bwd),
):
    _lib.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_lib)


# ---- autograd --------------------------------------------------------------------------------------------------------


def save_for_backward(ctx: Any, args: tuple[Any, ...], out: Tensor, lse: Tensor) -> None:
    """Keep what the backward of ``attn_fwd(*args)`` or ``attn_varlen_fwd(*args)`` needs."""
    first = len(args) - _TENSORS - _NUMBERS  # of the spec
    ctx.packed = first > 4
    tensors = args[first : first + _TENSORS]
    ctx.save_for_backward(*args[:3], out, lse, *tensors, *(args[3:5] if ctx.packed else ()))
    ctx.lengths = args[5:7] if ctx.packed else ()
    ctx.impl, ctx.numbers = args[first - 1], args[first + _TENSORS :]
    ctx.set_materialize_grads(False)


def gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None, bwd: Any = None) -> tuple[Any, ...]:
    """The gradients of all arguments of the forward op, from what ``save_for_backward`` kept; by ``bwd``, or the op."""
    q, k, v, out, lse, *rest = ctx.saved_tensors
    need = ctx.needs_input_grad + (False,) * _TENSORS  # the dispatcher left out trailing defaults
    first = 8 if ctx.packed else 4
    needs = [need[0], need[1], need[2], need[first + 2], need[first + 3], need[first + 5]]
    if dout is None:
        if dlse is None:
            return (None,) * (first + _TENSORS + _NUMBERS)
        dout = torch.zeros_like(out)
    deterministic = torch.are_deterministic_algorithms_enabled()
    packed = (*rest[_TENSORS:], *ctx.lengths)
    args = (dout, dlse, q, k, v, out, lse, needs, deterministic, *packed, ctx.impl, *rest[:_TENSORS], *ctx.numbers)
    found = (bwd or (VARLEN_BWD if ctx.packed else BWD))(*args)
    dq, dk, dv, dbias, dweight, dsinks = (x if n else None for x, n in zip(found, needs, strict=True))
    others = (None, None, dbias, dweight, None, dsinks)
    return (dq, dk, dv, *(None,) * (first - 3), *others, *(None,) * (_TENSORS - len(others) + _NUMBERS))


def no_double_backward(ctx: Any, *grads: Tensor | None) -> Any:
    raise NotImplementedError(
        "flash_attention: the second derivative of attention is not implemented; use "
        "hf_flash_mc.ops.reference.reference_attention, or torch's scaled_dot_product_attention under SDPBackend.MATH"
    )


def no_jvp(ctx: Any, *tangents: Any) -> Any:
    raise NotImplementedError(
        "flash_attention: the forward-mode derivative of attention is not implemented; use reverse mode (backward, "
        "torch.func.grad), or torch's scaled_dot_product_attention under SDPBackend.MATH"
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_for_backward(ctx, inputs, *output)


# compiled, exported and DTensor programs differentiate the op itself
for _name in ("attn", "attn_varlen"):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}_fwd", gradients, setup_context=_setup_context, lib=_lib)
    torch.library.register_autograd(f"{NAMESPACE}::{_name}_bwd", no_double_backward, lib=_lib)


# whether torch.vmap maps over a gradient, or is_grads_batched of torch.autograd.grad does: those must see the op
_is_mapped, _is_mapped_by_autograd = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_legacy_batchedtensor


def _must_see_op(x: Tensor) -> bool:
    """Whether a tensor means something that only the dispatcher knows: mapped, or to be negated when it is read."""
    return _is_mapped(x) or _is_mapped_by_autograd(x) or x.is_neg()


class _Attention(torch.autograd.Function):
    """Eager autograd: a third of the host time of the formula registered on the op.

    Only what is differentiable is an argument of its own, and only tensors that are there are saved.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, weight: Tensor | None, sinks: Tensor | None,
        impl: str, spec: Spec, varlen: Varlen | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = _run_forward(q, k, v, impl, spec, varlen)
        held = spec[:_TENSORS] if varlen is None else (*spec[:_TENSORS], *varlen[:2])
        where = [i for i, x in enumerate(held) if x is not None]
        ctx.save_for_backward(q, k, v, out, lse, *[held[i] for i in where])
        ctx.call = impl, where, spec[_TENSORS:], () if varlen is None else varlen[2:]
        ctx.set_materialize_grads(False)
        return out, lse

    # not once_differentiable: that looks at incoming gradients alone, and would drop terms without a word
    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        if dout is None and dlse is None:
            return (None,) * 9
        q, k, v, out, lse, *saved = ctx.saved_tensors
        impl, where, numbers, lengths = ctx.call
        held: list[Any] = [None] * (_TENSORS + 2)
        for i, x in zip(where, saved, strict=True):
            held[i] = x
        spec = Spec(*held[:_TENSORS], *numbers)
        varlen = Varlen(*held[_TENSORS:], *lengths) if lengths else None
        if dout is None:
            dout = torch.zeros_like(out)
        needs = Needs(*ctx.needs_input_grad[:6])
        deterministic = torch.are_deterministic_algorithms_enabled()
        # compiled autograd traces this, and must see the op itself
        by_op = torch.compiler.is_compiling() or torch.is_grad_enabled()
        by_op = by_op or any(x is not None and _must_see_op(x) for x in (dout, dlse, *held))
        if not by_op and nobody_watches(q, k, v):
            found = _find_gradients(dout, dlse, q, k, v, out, lse, needs, deterministic, impl, spec, varlen)
        else:
            call = (*(varlen or ()), impl, *spec)
            ours = (VARLEN_BWD if varlen else BWD)(dout, dlse, q, k, v, out, lse, list(needs), deterministic, *call)
            found = tuple(x if n else None for x, n in zip(ours, needs, strict=True))
        return (*found, None, None, None)

    jvp = staticmethod(no_jvp)


class _Repeated(_Attention):
    """The same for a call that was made before: its ``Call`` knows what else there is to know."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: repeat.Call) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out, lse = call.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.repeated, ctx.call = call, call.kept
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        if (
            dlse is None
            and dout is not None
            and ctx.needs_input_grad[:3] == (True, True, True)
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and not (_is_mapped(dout) or _is_mapped_by_autograd(dout) or dout.is_neg())  # _must_see_op, without a call
            and not torch.are_deterministic_algorithms_enabled()
        ):
            q, k, v, out, lse = ctx.saved_tensors
            if nobody_watches(q, k, v):
                found = ctx.repeated.backward(dout, q, k, v, out, lse)
                if found is not None:
                    return (*found, None)
        return _Attention.backward(ctx, dout, dlse)


# without a look for what transforms of torch.func left behind: such a tensor has no memory, so no signature
_apply_repeated = super(torch.autograd.function._SingleLevelFunction, _Repeated).apply


def keep(signature: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, impl: str, options: tuple[Any, ...]) -> None:
    """Keep a call without optional tensors that has run, if its back end does."""
    make = getattr(back_end(impl), "Call", None)
    if make is not None and q.numel() and k.numel():
        repeat.keep(signature, make(q, k, v, impl, Spec(*options)))


def may_repeat(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether an eager call may take the short way, if it was made before.

    Under autocast too: there is no arithmetic on that way, and q, k and v were cast.
    """
    return (
        _plain(q, k, v)
        and F.scaled_dot_product_attention is _SDPA
        and not torch._C._are_functorch_transforms_active()
        and _forward_ad_level() < 0
    )


def repeated(call: repeat.Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``attention`` of a call that was made before."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _apply_repeated(q, k, v, call)
    return call.forward(q, k, v)


def attention(*args: Any) -> tuple[Tensor, Tensor]:
    """``attn_fwd(*args)`` or ``attn_varlen_fwd(*args)`` by the cheapest route that is right; takes all arguments."""
    if F.scaled_dot_product_attention is not _SDPA:
        _refuse_context_parallel(F.scaled_dot_product_attention)
    packed = len(args) != _FWD_ARGUMENTS
    if torch.compiler.is_compiling():
        if _forward_ad_level() >= 0:  # the op would drop tangents without a word
            no_jvp(None)
        return (VARLEN_FWD if packed else FWD)(*args)  # the tracer must see the op itself
    if torch._C._are_functorch_transforms_active():
        from .functorch import functorch_attention

        return functorch_attention(*args)
    q, k, v, *lengths, impl = args[: 8 if packed else 4]
    spec = Spec(*args[8 if packed else 4 :])
    varlen = Varlen(*lengths) if packed else None
    if _forward_ad_level() >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return _Attention.apply(q, k, v, spec.bias, spec.key_log_weight, spec.sinks, impl, spec, varlen)
    return _run_forward(q, k, v, impl, spec, varlen)


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def nobody_watches(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Plain tensors and no mode: nothing would see the op, so its 15 us in the dispatcher can be saved.

    Under autocast the op is what keeps the back end's own arithmetic out of it.
    """
    return _plain(q, k, v) and not torch._C._is_any_autocast_enabled() and not q.is_meta


def _plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN and not torch._C._len_torch_dispatch_stack()
        and not (q.is_neg() or k.is_neg() or v.is_neg())
    )  # fmt: skip


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, impl: str, spec: Spec, varlen: Varlen | None
) -> tuple[Tensor, Tensor]:
    """The forward below autograd: the op, or its body where nobody watches."""
    if nobody_watches(q, k, v) and not any(isinstance(x, Tensor) and x.is_neg() for x in spec):
        return _forward(q, k, v, impl, spec, varlen)
    with torch._C._AutoDispatchBelowAutograd():
        if varlen is None:
            return FWD(q, k, v, impl, *spec)
        return VARLEN_FWD(q, k, v, *varlen, impl, *spec)


def _forward_ad_level() -> int:
    return torch.autograd.forward_ad._current_level


# ---- context parallelism ---------------------------------------------------------------------------------------------

_SDPA = torch._C._nn.scaled_dot_product_attention


def _refuse_context_parallel(sdpa: Any) -> None:
    # torch's context_parallel() replaces SDPA and nothing else: here each rank would attend to its own keys only
    if getattr(sdpa, "__module__", "") == "torch.distributed.tensor.experimental._context_parallel._attention":
        raise RuntimeError(
            "flash_attention: inside torch.distributed.tensor.experimental.context_parallel each rank would see only "
            "its own part of the keys. Use ring_attention or ulysses_attention (a transformers model: "
            "patch_model(model, context_parallel=mesh)), or leave context_parallel() for this call"
        )


# ---- autocast --------------------------------------------------------------------------------------------------------


def autocast_qkv(kind: str, *qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in the autocast dtype of this device type; float64 stays."""
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype not in (dtype, torch.float64) else x
        for x in qkv
    )


def _register_autocast(kind: str, key: str) -> None:
    """Under autocast q, k and v are cast and nothing else: bias, weights and sinks keep their precision."""
    without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(op: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(without):
            return op(*autocast_qkv(kind, q, k, v), *rest)

    def keep(op: Any, *args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(without):
            return op(*args)

    for name, op, kernel in (
        ("attn_fwd", FWD, cast),
        ("attn_varlen_fwd", VARLEN_FWD, cast),
        ("attn_bwd", BWD, keep),
        ("attn_varlen_bwd", VARLEN_BWD, keep),
    ):
        _lib.impl(name, functools.partial(kernel, op), key)


for _kind in ("CPU", "CUDA", "XPU"):
    _register_autocast(_kind.lower(), f"Autocast{_kind}")


# ---- FLOP formulas, sharding rules, checkpointing --------------------------------------------------------------------


def _register_flops(flop_counter: ModuleType) -> None:
    """Full counts, causal or not, as torch counts its own: 2 P (D + Dv) forward, 2 P (3 D + 2 Dv) backward."""

    def pairs(q: Tensor, k: Tensor, packed: tuple[Any, ...]) -> int:
        if q.dim() == 4:
            return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        cu_q, cu_k, max_q, max_k = packed
        if type(cu_q) is Tensor and not cu_q.is_meta:
            return q.shape[1] * int((cu_q.diff().long() * cu_k.diff()).sum())
        return q.shape[1] * (cu_q.shape[0] - 1) * max_q * max_k  # no values: the most it can be

    def forward(q, k, v, *rest, out_val=None, **_):
        return 2 * pairs(q, k, rest[:4]) * (q.shape[-1] + v.shape[-1])

    def backward(dout, dlse, q, k, v, out, lse, needs, deterministic, *rest, out_val=None, **_):
        return 2 * pairs(q, k, rest[:4]) * (3 * q.shape[-1] + 2 * v.shape[-1])

    for packet, formula in (
        (_ops.attn_fwd, forward),
        (_ops.attn_varlen_fwd, forward),
        (_ops.attn_bwd, backward),
        (_ops.attn_varlen_bwd, backward),
    ):
        flop_counter.register_flop_formula(packet, get_raw=True)(formula)


def _register_sharding(_: ModuleType) -> None:
    from .sharding import register

    register()


# both modules take long to import (the first one imports triton), and only their users need these
when_imported("torch.utils.flop_counter", _register_flops)
when_imported("torch.distributed.tensor", _register_sharding)


def sac_save_list() -> list[Any]:
    """The ops whose outputs selective activation checkpointing should keep: recomputing them is what costs.

    For ``torch.utils.checkpoint.create_selective_checkpoint_contexts(sac_save_list())``.
    """
    from .ring import RING_FWD

    return [FWD, VARLEN_FWD, RING_FWD]
