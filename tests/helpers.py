"""What the tests share: attention cases, their inputs, the exact answer, and the one error bound.

A ``Case`` describes a call in plain values, so it prints as a readable id and hypothesis can draw it. ``run_case``
runs it on a back end and compares outputs and every gradient with ``reference_attention`` in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_flash_mc.ops.reference import dropout_keep, reference_attention, reference_attention_varlen, visibility
from hf_flash_mc.ops.spec import Needs, Spec, Varlen

# error bound: 2 x the error of the same formula in the same dtype + this x max |reference|
TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-10}
BACKENDS = {
    "cpu": "hf_flash_mc.ops.cpu",
    "triton": "hf_flash_mc.ops.portable.launch",
    "hopper": "hf_flash_mc.ops.hopper.launch",
}
GRADIENTS = ("dq", "dk", "dv", "dbias", "dkey_log_weight", "dsinks")
INF = float("inf")


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention call. Shapes of optional tensors are the letters of the dimensions that are not broadcast."""

    dtype: torch.dtype = torch.float32
    B: int = 1
    Hq: int = 2
    Hkv: int = 2
    Sq: int = 33
    Sk: int = 33
    D: int = 16
    Dv: int | None = None  # None: D
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    key_ranges: str | None = None  # causal, full, padded, packed, random, empty, hostile
    ranges_shape: str = ""  # of "bh"
    mask: str | None = None  # of "bhqk"
    bias: str | None = None  # of "bhqk"; a trailing "-" puts -inf in a fifth of it
    key_log_weight: str | None = None  # of "bh"; a trailing "-" removes a fifth of the keys
    alibi: str | None = None  # "h" or "bh"
    softcap: float | None = None
    sinks: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    dropout_offsets: tuple[int, int, int, int] = (0, 0, 0, 0)
    dlse: bool = False
    strides: str = "bhsd"  # bhsd, bshd, sliced (from a larger, NaN-filled tensor), expanded, lastdim
    aux_fp32: bool = True  # bias, weights, slopes and sinks in float32, or in dtype
    poison: bool = False  # NaN in everything that no visible pair touches
    varlen: tuple[tuple[int, int], ...] | None = None  # (query rows, keys) of each sequence; sets B, Sq, Sk
    deterministic: bool = False
    seed: int = 0

    @property
    def id(self) -> str:
        """The sizes, then what differs from the defaults."""
        sizes = str(self.varlen).replace(" ", "") if self.varlen is not None else f"b{self.B}-s{self.Sq}x{self.Sk}"
        head = f"{str(self.dtype)[6:]}-{sizes}-h{self.Hq}:{self.Hkv}-d{self.D}" + (f":{self.Dv}" if self.Dv else "")
        skip = {"dtype", "B", "Hq", "Hkv", "Sq", "Sk", "D", "Dv", "varlen"}
        rest = [
            f.name if getattr(self, f.name) is True else f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if f.name not in skip and getattr(self, f.name) != f.default
        ]
        return "-".join([head, *rest]).replace(" ", "")

    def __str__(self) -> str:
        return self.id


@dataclasses.dataclass
class Inputs:
    """Tensors of a case. q, k, v, dout are [B, H, S, D], or [T, H, D] with ``varlen``."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    spec: Spec
    varlen: Varlen | None
    clean: tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, dout as [B, H, S, D], before poison
    seen: Tensor  # bool [B, Hq, Sq, Sk]: visible, and not removed by key_log_weight; varlen: B = 1, block diagonal
    alibi: Tensor | None  # [B, Hq, Sq, Sk], what is added to the logits
    keep: Tensor | None  # bool, the same shape: dropout's survivors


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Random tensors of a case, drawn on the CPU so that every device gets the same values."""
    gen = torch.Generator().manual_seed(case.seed)
    packed = case.varlen is not None
    b, sq, sk = case.B, case.Sq, case.Sk
    if packed:
        b, sq, sk = 1, sum(n for n, _ in case.varlen), sum(n for _, n in case.varlen)
    sequences = len(case.varlen) if packed else case.B
    dv = case.Dv or case.D
    aux = torch.float32 if case.aux_fp32 and case.dtype != torch.float64 else case.dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    def shape_of(letters: str, **sizes: int) -> tuple[int, ...]:
        return tuple(n if letter in letters else 1 for letter, n in sizes.items())

    q, k = draw(b, case.Hq, sq, case.D), draw(b, case.Hkv, sk, case.D)
    v, dout = draw(b, case.Hkv, sk, dv), draw(b, case.Hq, sq, dv)
    if case.strides == "expanded":  # equal values, so that stride 0 can say them
        k, v, dout = k[:1, :1].expand_as(k), v[:1, :1].expand_as(v), dout[:1, :1, :1, :1].expand_as(dout)
    options: dict[str, Any] = {}
    if case.key_ranges is not None:
        options["key_ranges"] = draw_ranges(case, gen, b, sq, sk)
    if case.mask is not None:
        options["mask"] = draw(*shape_of(case.mask, b=b, h=case.Hq, q=sq, k=sk)) > -0.6
    if case.bias is not None:
        bias = draw(*shape_of(case.bias, b=b, h=case.Hq, q=sq, k=sk))
        options["bias"] = torch.where(draw(*bias.shape) < -0.85, -INF, bias) if case.bias.endswith("-") else bias
    if case.key_log_weight is not None:
        weight = draw(*shape_of(case.key_log_weight, b=b, h=case.Hkv), sk)
        weight = torch.where(draw(*weight.shape) < -0.85, -INF, weight) if case.key_log_weight.endswith("-") else weight
        options["key_log_weight"] = weight[0] if packed else weight
    if case.alibi is not None:
        options["alibi_slopes"] = draw(*((sequences,) if case.alibi == "bh" else ()), case.Hq).abs() * 0.1
    if case.sinks:
        options["sinks"] = draw(case.Hq)
    options = {n: (x.to(aux) if x.is_floating_point() else x).to(device) for n, x in options.items()}
    left, right = case.window if case.window is not None else (None, None)
    spec = Spec(
        **options,
        dropout_seed=torch.tensor([case.seed * 2654435761 + 12345678901], device=device) if case.dropout_p else None,
        scale=case.scale,
        causal=case.causal,
        window_left=-1 if left is None else left,
        window_right=-1 if right is None else right,
        softcap=case.softcap or 0.0,
        dropout_p=case.dropout_p,
        dropout_offsets=case.dropout_offsets,
    )
    clean = tuple(x.to(case.dtype).to(device) for x in (q, k, v, dout))
    seen, alibi, keep = dense_rules(case, spec, clean[0], clean[1])
    given = list(clean)
    if case.poison:
        row, key = seen.any(-1), seen.unflatten(1, (case.Hkv, -1)).any(3).any(2)
        used = (row, key, key, row)
        given = [torch.where(u[..., None], x, float("nan")) for x, u in zip(clean, used, strict=True)]
    expand = (False, not case.poison, not case.poison, not case.poison)  # poison differs between heads
    given = [lay_out(x, case.strides, e) for x, e in zip(given, expand, strict=True)]
    dlse = draw(b, case.Hq, sq).to(torch.float64 if case.dtype == torch.float64 else torch.float32).to(device)
    varlen = None
    if packed:
        given, dlse = [x[0].transpose(0, 1) for x in given], dlse[0]
        cu = [torch.tensor([0, *(n[i] for n in case.varlen)]).cumsum(0).to(device, torch.int32) for i in (0, 1)]
        varlen = Varlen(cu[0], cu[1], *(max((n[i] for n in case.varlen), default=0) for i in (0, 1)))
    return Inputs(*given, dlse if case.dlse else None, spec, varlen, clean, seen, alibi, keep)  # type: ignore[arg-type]


def draw_ranges(case: Case, gen: torch.Generator, b: int, sq: int, sk: int) -> Tensor:
    """int32 ``[B or 1, Hq or 1, Sq, 2]`` (packed: ``[Hq or 1, Tq, 2]``) of the kind a case names."""
    shape = (b if "b" in case.ranges_shape else 1, case.Hq if "h" in case.ranges_shape else 1, sq)

    def integers(low: int, high: int, shape: tuple[int, ...] = shape) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=gen)

    kind, row = case.key_ranges, torch.arange(sq).expand(shape)
    after = (row + 1 + (0 if case.varlen is not None else sk - sq)).clamp(0, sk)  # first key past the diagonal
    if kind == "causal":
        lo, hi = torch.zeros_like(row), after
    elif kind == "full":
        lo, hi = torch.zeros_like(row), torch.full_like(row, sk)
    elif kind == "padded":  # left padding, causal
        lo, hi = integers(0, sk // 2, (*shape[:2], 1)).expand(shape), after
    elif kind == "packed":  # documents that start anywhere, causal
        starts = integers(0, max(sk - 1, 0), (*shape[:2], 4)).sort(-1).values
        starts[..., 0] = 0
        lo = torch.where(starts[..., None, :] < after[..., None], starts[..., None, :], 0).amax(-1)
        hi = after
    elif kind in ("random", "empty"):
        lo, hi = torch.stack([integers(0, sk), integers(0, sk)]).sort(0).values
        hi = torch.where(integers(0, 1) == 0, lo, hi) if kind == "empty" else hi
    elif kind == "hostile":
        far = torch.tensor([-(2**31), -1, 0, sk // 2, sk, sk + 1, 2**31 - 1])
        lo, hi = far[integers(0, 6)], far[integers(0, 6)]
    else:
        raise ValueError(f"unknown key_ranges kind {kind!r}")
    ranges = torch.stack([lo, hi], -1).to(torch.int32)
    return ranges[0] if case.varlen is not None else ranges


def lay_out(x: Tensor, strides: str, expand: bool) -> Tensor:
    """The values of ``x: [B, H, S, D]`` on memory of another shape; gaps hold NaN, so a stray read shows."""
    b, h, s, d = x.shape
    if strides == "bshd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "sliced":
        memory = x.new_full((b, s + 1, h + 1, d + 8), float("nan"))
        return memory[:, :s, :h, :d].copy_(x.transpose(1, 2)).transpose(1, 2)
    if strides == "lastdim":
        return x.new_full((b, h, s, 2 * d), float("nan"))[..., ::2].copy_(x)
    if strides == "expanded" and expand and x.numel():
        same = [bool((x == x.narrow(i, 0, 1)).all()) for i in range(4)]
        return x[tuple(slice(0, 1) if e else slice(None) for e in same)].contiguous().expand_as(x)
    return x.contiguous()


def dense_rules(case: Case, spec: Spec, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What ``Inputs`` calls seen, alibi and keep, from the reference's own visibility and dropout."""
    (b, hq, tq, _), tk, device = q.shape, k.shape[2], q.device
    seen = torch.zeros(b, hq, tq, tk, dtype=torch.bool, device=device)
    alibi = torch.zeros(b, hq, tq, tk, dtype=torch.float64, device=device) if spec.alibi_slopes is not None else None
    keep = torch.ones_like(seen) if case.dropout_p else None
    at_q = at_k = 0
    for i, (sq, sk) in enumerate(case.varlen if case.varlen is not None else ((tq, tk),)):
        rows, keys = slice(at_q, at_q + sq), slice(at_k, at_k + sk)
        at_q, at_k = at_q + sq, at_k + sk
        ranges = spec.key_ranges
        if ranges is not None and case.varlen is not None:
            ranges = ranges[None, :, rows]
        seen[:, :, rows, keys] = visibility(
            b, hq, sq, sk, causal=case.causal, window=case.window, key_ranges=ranges, mask=spec.mask, device=device
        )
        row, col = torch.arange(sq, device=device)[:, None], torch.arange(sk, device=device)
        if alibi is not None:
            slopes = spec.alibi_slopes.double()
            slopes = slopes[i] if case.varlen is not None and slopes.dim() == 2 else slopes
            alibi[:, :, rows, keys] = -slopes.reshape(-1, hq, 1, 1) * (row + sk - sq - col).abs()
        if keep is not None:
            ob, oh, om, on = case.dropout_offsets
            batch = torch.arange(b, device=device).reshape(b, 1, 1, 1) + ob + (i if case.varlen is not None else 0)
            head = torch.arange(hq, device=device).reshape(1, hq, 1, 1) + oh
            keep[:, :, rows, keys] = dropout_keep(spec.dropout_seed, case.dropout_p, batch, head, row + om, col + on)
    if spec.key_log_weight is not None:
        weight, hkv = spec.key_log_weight, k.shape[1]
        weight = (weight if weight.dim() == 3 else weight[None])[:, :, None, None].expand(b, hkv, 1, 1, tk)
        seen = (seen.unflatten(1, (hkv, -1)) & (weight != -INF)).flatten(1, 2)
    return seen, alibi, keep


def naive_attention(inputs: Inputs, case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Outputs and gradients of the textbook formula, all in the inputs' own dtype; and ``_rounding`` of it."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in zip(("dq", "dk", "dv"), inputs.clean, strict=False)}
    leaves |= _auxiliary_leaves(inputs.spec)
    q, k, v = leaves["dq"], leaves["dk"], leaves["dv"]
    b, hq, group, dtype = q.shape[0], q.shape[1], q.shape[1] // k.shape[1], q.dtype
    scale = q.shape[-1] ** -0.5 if case.scale is None else case.scale
    logits = (q @ k.repeat_interleave(group, 1).transpose(-1, -2)) * scale
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    seen = inputs.seen
    if inputs.alibi is not None:
        logits = logits + inputs.alibi.to(dtype)
    if (bias := leaves.get("dbias")) is not None:
        seen = seen & (bias != -INF)
        logits = logits + bias.masked_fill(bias == -INF, 0).to(dtype)
    if (weight := leaves.get("dkey_log_weight")) is not None:
        weight = (weight if weight.dim() == 3 else weight[None]).expand(-1, k.shape[1], -1)
        weight = weight.repeat_interleave(group, 1)[:, :, None]
        logits = logits + weight.masked_fill(weight == -INF, 0).to(dtype)
    logits = logits.masked_fill(~seen, -INF).to(torch.promote_types(dtype, torch.float32))
    dead = ~seen.any(-1, keepdim=True)
    columns = torch.cat([logits, logits.new_full((*logits.shape[:-1], 1), -INF)], -1)  # the last column: the sink
    if (sinks := leaves.get("dsinks")) is not None:
        columns = torch.cat([logits, sinks.to(logits.dtype).reshape(1, hq, 1, 1).expand(b, hq, q.shape[2], 1)], -1)
    else:
        columns = columns.masked_fill(dead, 0)
    lse = columns.logsumexp(-1, keepdim=True)
    p = torch.exp(logits - lse).masked_fill(dead, 0).to(dtype)
    lse = lse if sinks is not None else lse.masked_fill(dead, -INF)
    if inputs.keep is not None:
        p = torch.where(inputs.keep, p * (256 / (256 - round(256 * case.dropout_p))), 0)
    out, lse = p @ v.repeat_interleave(group, 1), lse.squeeze(-1)
    results = _with_gradients(out, lse, dataclasses.replace(inputs, dout=inputs.clean[3]), leaves)
    rounding = _rounding(inputs, case, torch.exp(logits - lse[..., None]).detach(), out.detach(), lse.detach())
    if inputs.varlen is not None:
        results |= {n: results[n][0].transpose(0, 1) for n in ("out", "dq", "dk", "dv")} | {"lse": results["lse"][0]}
    return results, rounding


def _rounding(inputs: Inputs, case: Case, p: Tensor, out: Tensor, lse: Tensor) -> dict[str, float]:
    """The least error to expect of each gradient, for any back end that keeps ``out`` in its dtype.

    dS = P * (rowsum(dout * v) - rowsum(dout * out)) is a difference of sums that may cancel to nothing (a row with one
    key has no gradient at all), while rounding out moves the second sum by about eps * |dout * out|, and float32
    arithmetic moves both. Carried through to the gradients as independent errors of the rows.
    """
    q, k, v, dout = (x.double() for x in inputs.clean)
    if not p.numel():
        return {}
    eps, work = torch.finfo(case.dtype).eps, torch.finfo(lse.dtype).eps
    terms = dout.norm(dim=-1) * v.norm(dim=-1).amax()
    if inputs.dlse is not None:
        terms = terms + inputs.dlse.reshape(lse.shape).abs()
    row = (eps * (dout * out).norm(dim=-1) + work * terms)[..., None]  # [B, Hq, Sq, 1]
    pair = p.nan_to_num(0.0) * row
    scale = case.D**-0.5 if case.scale is None else case.scale
    spec, keyed = inputs.spec, pair.square().unflatten(1, (case.Hkv, -1)).sum((2, 3)).sqrt()  # [B, Hkv, Sk]
    found = {"dq": (row * k.abs().amax()).amax() * scale, "dk": keyed.amax() * q.abs().amax() * scale}
    if spec.bias is not None:
        moved = pair if spec.bias.shape[3] > 1 else pair.sum(-1, keepdim=True)
        found["dbias"] = moved.square().sum_to_size(spec.bias.shape).sqrt().amax()
    if (weight := spec.key_log_weight) is not None:
        shape = (1,) * (3 - weight.dim()) + tuple(weight.shape)
        found["dkey_log_weight"] = keyed.square().sum_to_size(shape).sqrt().amax()
    if spec.sinks is not None:
        share = torch.exp(spec.sinks.double()[:, None] - lse)
        found["dsinks"] = (share * row[..., 0]).square().sum((0, 2)).sqrt().amax()
    return {n: x.item() for n, x in found.items()}


def exact_attention(inputs: Inputs, case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Outputs and gradients of the reference in float64 (or in another dtype, to test the reference itself)."""
    leaves = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v} | _auxiliary_leaves(inputs.spec)
    wide = dtype == torch.float64
    leaves = {n: (x.detach().double() if wide else x.detach().clone()).requires_grad_() for n, x in leaves.items()}
    return _with_gradients(*_reference_call(inputs, case, leaves), inputs, leaves)


def backend_attention(inputs: Inputs, case: Case, impl: str) -> dict[str, Tensor]:
    """Outputs and gradients of a back end's own ``forward`` and ``backward``."""
    if impl == "reference":
        return exact_attention(inputs, case, case.dtype)
    module = importlib.import_module(BACKENDS[impl])
    q, k, v, spec, varlen = inputs.q, inputs.k, inputs.v, inputs.spec, inputs.varlen
    reasons = module.unsupported(q, k, v, spec, varlen)
    assert not reasons, f"{impl} cannot take {case}: {'; '.join(reasons)}"
    needs = Needs(True, True, True, spec.bias is not None, spec.key_log_weight is not None, spec.sinks is not None)
    out, lse = module.forward(q, k, v, spec, varlen)
    gradients = module.backward(inputs.dout, inputs.dlse, q, k, v, out, lse, spec, needs, case.deterministic, varlen)
    results = {"out": out, "lse": lse} | {n: x for n, x in gradients._asdict().items() if x is not None}
    wanted = {"out", "lse"} | {n for n in GRADIENTS if getattr(needs, n)}
    assert set(results) == wanted, f"{case}: expected {sorted(wanted)}, got {sorted(results)}"
    like = {"out": v, "dq": q, "dk": k, "dv": v, "dbias": spec.bias, "dkey_log_weight": spec.key_log_weight}
    for name, x in (like | {"dsinks": spec.sinks}).items():
        if name in results:
            assert results[name].dtype == x.dtype, f"{case}: {name} is {results[name].dtype}"
    return results


def public_attention(inputs: Inputs, case: Case, impl: str) -> dict[str, Tensor]:
    """Outputs and gradients through ``flash_attention`` / ``flash_attention_varlen`` and autograd."""
    leaves = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()} | _auxiliary_leaves(inputs.spec)
    return _with_gradients(*_public_call(inputs, case, leaves, impl), inputs, leaves)


def _auxiliary_leaves(spec: Spec) -> dict[str, Tensor]:
    given = {"dbias": spec.bias, "dkey_log_weight": spec.key_log_weight, "dsinks": spec.sinks}
    return {n: x.detach().clone().requires_grad_() for n, x in given.items() if x is not None}


def _options(inputs: Inputs, case: Case, leaves: dict[str, Tensor]) -> dict[str, Any]:
    spec = inputs.spec
    names = ("key_ranges", "alibi_slopes", "dropout_seed", "dropout_p", "causal", "scale")
    options = {n: getattr(spec, n) for n in names} | {"window": case.window, "softcap": case.softcap}
    options |= {"key_log_weight": leaves.get("dkey_log_weight"), "sinks": leaves.get("dsinks")}
    return options if case.varlen is not None else options | {"mask": spec.mask, "bias": leaves.get("dbias")}


def _reference_call(inputs: Inputs, case: Case, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    qkv, options = (leaves["dq"], leaves["dk"], leaves["dv"]), _options(inputs, case, leaves)
    options["dropout_offsets"] = case.dropout_offsets
    if inputs.varlen is None:
        return reference_attention(*qkv, **options)
    return reference_attention_varlen(*qkv, inputs.varlen.cu_seqlens_q, inputs.varlen.cu_seqlens_k, **options)


def _public_call(inputs: Inputs, case: Case, leaves: dict[str, Tensor], impl: str) -> tuple[Tensor, Tensor]:
    from hf_flash_mc.ops import api

    function = api.flash_attention if inputs.varlen is None else api.flash_attention_varlen
    qkv, options = (leaves["dq"], leaves["dk"], leaves["dv"]), _options(inputs, case, leaves)
    if any(case.dropout_offsets):
        if "dropout_offsets" not in inspect.signature(function).parameters:
            pytest.skip("the public function takes no dropout offsets")
        options["dropout_offsets"] = case.dropout_offsets
    return function(*qkv, *(inputs.varlen or ()), **options, return_lse=True, impl=impl)


def _with_gradients(out: Tensor, lse: Tensor, inputs: Inputs, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    outputs, gradients = [out], [inputs.dout.reshape(out.shape)]
    if inputs.dlse is not None:
        outputs, gradients = [out, lse], [*gradients, inputs.dlse.reshape(lse.shape)]
    gradients = [g.to(x.dtype) for g, x in zip(gradients, outputs, strict=True)]
    found: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if out.requires_grad:  # without any sequence the reference has nothing to differentiate
        found = torch.autograd.grad(outputs, list(leaves.values()), gradients, allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves.values(), strict=True)]
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, zeros, strict=True))}


def check_bound(
    name: str, actual: Tensor, exact: Tensor, native: Tensor, dtype: torch.dtype, label: str, rounding: float = 0.0
) -> None:
    """The one error bound: |actual - exact| <= 2 x max |native - exact| + TOLERANCE x max |exact|, everywhere.

    ``exact`` is the float64 reference, ``native`` the same formula in ``dtype``. Infinities must agree exactly.
    ``rounding`` (see ``_rounding``) stands in for the native error where that is smaller by luck or by cancellation.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)} [{label}]"
    actual, exact, native = actual.detach().double(), exact.detach().double(), native.detach().double()
    finite = exact.isfinite()
    wrong = ~torch.where(finite, actual.isfinite(), actual == exact)
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ in being finite; first at "
        f"{wrong.nonzero()[0].tolist()}: {actual[wrong][0].item()}, expected {exact[wrong][0].item()} [{label}]"
    )
    if not finite.any():
        return
    zero = exact.new_zeros(())
    error = torch.where(finite, (actual - exact).abs(), zero)
    native_error = torch.where(finite & native.isfinite(), (native - exact).abs(), zero).amax().item()
    largest = torch.where(finite, exact.abs(), zero).amax().item()
    bound = max(2 * native_error, rounding) + TOLERANCE[dtype] * largest
    worst = error.amax().item()
    assert worst <= bound, (
        f"{name}: error {worst:.3e} > {bound:.3e} = max(2 x {native_error:.3e}, {rounding:.3e}) "
        f"+ {TOLERANCE[dtype]:.0e} x {largest:.3e}; "
        f"worst at {(error == worst).nonzero()[0].tolist()} of {tuple(exact.shape)} [{label}]"
    )


def check_results(actual: dict[str, Tensor], inputs: Inputs, case: Case, label: object) -> None:
    """Every output and gradient of ``actual`` against the float64 reference, within the bound."""
    exact, (native, rounding) = exact_attention(inputs, case), naive_attention(inputs, case)
    assert set(actual) == set(exact), f"{label}: expected {sorted(exact)}, got {sorted(actual)}"
    for name in exact:
        check_bound(name, actual[name], exact[name], native[name], case.dtype, label, rounding.get(name, 0.0))


def run_case(case: Case, impl: str, device: str = "cpu", public: bool = False) -> None:
    """Run a case on back end ``impl`` (``public``: through autograd) and compare values and all gradients."""
    inputs = make_inputs(case, device)
    with poisoned_empty():
        actual = (public_attention if public else backend_attention)(inputs, case, impl)
    check_results(actual, inputs, case, f"{impl}: {case!r}")


class _PoisonedEmpty(TorchDispatchMode):
    """Fills every new uninitialised floating-point tensor with NaN."""

    NAMES = ("empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in self.NAMES and result.is_floating_point():
            result.fill_(float("nan"))
        return result


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within it, memory that a back end allocates and forgets to write shows up as NaN."""
    with _PoisonedEmpty():
        yield
