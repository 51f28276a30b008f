"""Attention over a paged cache as an op: schema, bodies, fake and checks. For inference: its backward raises.

On a GPU the kernel reads through the block table. The CPU and the reference gather each sequence's blocks and attend to
them as to any other keys.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import checks, library
from .lazy import when_imported
from .spec import Paged, Spec, new_bshd, new_lse

NAME = "flash_attention_paged"
_SPEC = (
    "Tensor? key_ranges=None, Tensor? alibi_slopes=None, Tensor? sinks=None, float? scale=None, bool causal=False, "
    "SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0"
)
_FIELDS = ("key_ranges", "alibi_slopes", "sinks", "scale", "causal", "window_left", "window_right", "softcap")

library._lib.define(
    f"attn_paged_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor seqlens_k, str impl, {_SPEC})"
    " -> (Tensor, Tensor)",
    tags=library._TAGS,
)
FWD = getattr(torch.ops, library.NAMESPACE).attn_paged_fwd.default


def make_spec(options: tuple[Any, ...]) -> Spec:
    """The Spec of a paged call's options, in the op's order."""
    return Spec(**dict(zip(_FIELDS, options, strict=False)))  # the dispatcher leaves out trailing defaults


def _fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seqlens_k: Tensor, impl: str, *options: Any
) -> tuple[Tensor, Tensor]:
    spec, paged = make_spec(options), Paged(block_table, seqlens_k)
    if 0 in (q.numel(), k_cache.numel(), block_table.numel()):
        return library._empty_forward(q, v_cache, spec)
    if impl == "triton":
        from .portable import paged_launch

        return paged_launch.forward(q, k_cache, v_cache, paged, spec)
    return _gathered(q, k_cache, v_cache, paged, impl, spec)


def _gathered(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, paged: Paged, impl: str, spec: Spec
) -> tuple[Tensor, Tensor]:
    """By a dense back end, sequence by sequence: exact and slow, each sequence's blocks are copied."""
    pool, page = k_cache.shape[:2]
    out, lse = new_bshd(q, v_cache.shape[-1]), new_lse(q)
    for i, length in enumerate(paged.seqlens_k.tolist()):
        length = min(max(length, 0), paged.block_table.shape[1] * page)
        blocks = paged.block_table[i, : -(-length // page)].long()
        there = (blocks >= 0) & (blocks < pool)
        blocks = torch.where(there, blocks, 0)
        k, v = (x[blocks].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (k_cache, v_cache))
        ranges, slopes, weight = spec.key_ranges, spec.alibi_slopes, None
        if not there.all():  # keys of blocks outside the pool are seen by nobody
            gone = torch.where(there, 0.0, float("-inf")).repeat_interleave(page)
            weight = gone[None, None, :length]
        own = spec._replace(
            key_ranges=ranges if ranges is None or ranges.shape[0] == 1 else ranges[i : i + 1],
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[i : i + 1],
            key_log_weight=weight,
        )
        out[i : i + 1], lse[i : i + 1] = library._forward(q[i : i + 1], k, v, impl, own, None)
    return out, lse


def _fake_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seqlens_k: Tensor, impl: str, *options: Any
) -> tuple[Tensor, Tensor]:
    if problems := find_problems(q, k_cache, v_cache, Paged(block_table, seqlens_k), impl, make_spec(options)):
        checks.raise_problems(problems, NAME)
    return new_bshd(q, v_cache.shape[-1]), new_lse(q)


def _no_gradient(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError(
        f"{NAME}: a paged cache has no gradient, it is for inference; run under torch.no_grad(), or train with "
        "flash_attention or flash_attention_varlen"
    )


def _cast_query(op: Any, without: Any, q: Tensor, k_cache: Tensor, *rest: Any) -> Any:
    """Under autocast the query takes the cache's dtype; a cast of the cache would copy the pool."""
    with torch._C._ExcludeDispatchKeyGuard(without):
        return op(q.to(k_cache.dtype), k_cache, *rest)


library._lib.impl("attn_paged_fwd", _fwd, "CompositeExplicitAutograd")
torch.library.register_fake(f"{library.NAMESPACE}::attn_paged_fwd", _fake_fwd, lib=library._lib)
torch.library.register_autograd(f"{library.NAMESPACE}::attn_paged_fwd", _no_gradient, lib=library._lib)
for _key in ("AutocastCPU", "AutocastCUDA", "AutocastXPU"):
    _set = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
    library._lib.impl("attn_paged_fwd", functools.partial(_cast_query, FWD, _set), _key)


def _register_flops(flop_counter: ModuleType) -> None:
    """Over the keys there are, or all that the tables could hold where lengths have no values."""

    def forward(q, k_cache, v_cache, block_table, seqlens_k, *rest, out_val=None, **_):
        keys = q.shape[0] * block_table.shape[1] * k_cache.shape[1]
        if type(seqlens_k) is Tensor and not seqlens_k.is_meta:
            keys = int(seqlens_k.sum())
        return 2 * q.shape[1] * q.shape[2] * keys * (q.shape[3] + v_cache.shape[3])

    flop_counter.register_flop_formula(getattr(torch.ops, library.NAMESPACE).attn_paged_fwd, get_raw=True)(forward)


when_imported("torch.utils.flop_counter", _register_flops)


def attention(*args: Any) -> tuple[Tensor, Tensor]:
    """``attn_paged_fwd(*args)``, below the dispatcher where nothing would see the op; takes all arguments."""
    q, k_cache, v_cache = args[:3]
    if library._forward_ad_level() >= 0:  # the op would drop tangents without a word
        library.no_jvp(None)
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
        or not library.nobody_watches(q, k_cache, v_cache)
    ):
        return FWD(*args)
    return _fwd(*args)


# ---- checks ----------------------------------------------------------------------------------------------------------


def find_problems(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, paged: Paged, impl: str, spec: Spec
) -> list[checks.Problem]:
    """Every reason why this call cannot run. Safe under tracing: looks at no value."""
    problems: list[checks.Problem] = []
    say = problems.append
    tensors: tuple[tuple[str, Any, str], ...] = (
        ("q", q, "[B, Hq, Sq, D]"),
        ("k_cache", k_cache, "[blocks, block size, Hkv, D]"),
        ("v_cache", v_cache, "[blocks, block size, Hkv, Dv]"),
    )
    for name, x, layout in tensors:
        if not isinstance(x, Tensor):
            say((TypeError, f"{name}: expected a torch.Tensor, got {type(x).__name__}"))
        elif x.dim() != 4:
            say((ValueError, f"{name}: expected {layout}, got {x.dim()} dimensions, shape {checks._shape(x)}"))
    if problems:
        return problems
    _check_shapes(q, k_cache, v_cache, say)
    known = not problems
    if impl == "hopper":
        say((NotImplementedError, "impl='hopper': these kernels read no block table; use impl='auto' or 'triton'"))
    else:
        checks._check_types(q, k_cache, v_cache, impl, say)
    checks._check_numbers(spec, say)
    if known:
        _check_table(q, k_cache, paged, say)
        checks._check_options(q, k_cache.transpose(1, 2), spec, None, say)
    if impl == "triton" and not problems:
        from .portable import paged_launch

        problems += [(NotImplementedError, reason) for reason in paged_launch.unsupported(q, v_cache)]
        for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
            if x.stride(-1) != 1 and x.shape[-1] != 1:
                say((ValueError, f"{name}: expected a contiguous last dimension, got strides {x.stride()}"))
    return problems


def _check_shapes(q: Tensor, k_cache: Tensor, v_cache: Tensor, say: Any) -> None:
    if k_cache.shape[:3] != v_cache.shape[:3]:
        got = f"{checks._shape(k_cache)} and {checks._shape(v_cache)}"
        say((ValueError, f"k_cache, v_cache: expected the same blocks, block size and heads, got {got}"))
    hq, hkv = q.shape[1], k_cache.shape[2]
    if hq % hkv if hkv else hq:
        got = f"got {hq} and {hkv}; k_cache is [blocks, block_size, Hkv, D], got shape {checks._shape(k_cache)}"
        say((ValueError, f"q, k_cache: expected query heads to be a multiple of key heads, {got}"))
    if q.shape[-1] != k_cache.shape[-1]:
        say((ValueError, f"q, k_cache: expected the same head dim, got {q.shape[-1]} and {k_cache.shape[-1]}"))
    if 0 in (q.shape[-1], v_cache.shape[-1], k_cache.shape[1]):
        got = f"{q.shape[-1]}, {v_cache.shape[-1]} and {k_cache.shape[1]}"
        say((ValueError, f"q, v_cache: expected head dims and a block size of at least 1, got {got}"))


def _check_table(q: Tensor, k_cache: Tensor, paged: Paged, say: Any) -> None:
    batch = q.shape[0]
    for name, x, layout, dims in (
        ("block_table", paged.block_table, "[B, most blocks]", 2),
        ("seqlens_k", paged.seqlens_k, "[B]", 1),
    ):
        if checks._is_tensor(name, x, q, (torch.int32,), say) and (x.dim() != dims or x.shape[0] != batch):
            say((ValueError, f"{name}: expected {layout} with B = {batch}, got shape {checks._shape(x)}"))
    table = paged.block_table
    if isinstance(table, Tensor) and table.dim() == 2:
        keys = table.shape[1] * k_cache.shape[1]
        if isinstance(keys, int) and keys > checks.MAX_LENGTH:
            say((ValueError, f"block_table: expected room for at most {checks.MAX_LENGTH} keys, got {keys}"))


def value_problems(k_cache: Tensor, paged: Paged) -> list[checks.Problem]:
    """What is wrong with lengths and block numbers. Reads them: on a GPU this waits for the device."""
    problems: list[checks.Problem] = []
    (pool, page), table = k_cache.shape[:2], paged.block_table.cpu()
    most = table.shape[1] * page
    for i, length in enumerate(paged.seqlens_k.tolist()):
        if not 0 <= length <= most:
            text = f"expected 0 to {most}, what the block table has room for, got {length} for sequence {i}"
            problems.append((ValueError, f"seqlens_k: {text}"))
            continue
        used = table[i, : -(-length // page)]
        wrong = used[(used < 0) | (used >= pool)]
        if len(wrong):
            text = f"expected block numbers from 0 to {pool - 1}, got {int(wrong[0])} in sequence {i}"
            problems.append((ValueError, f"block_table: {text}"))
    return problems
