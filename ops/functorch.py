"""Attention under torch.func: grad, vmap and their compositions. jvp and second derivatives raise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import library
from .spec import Spec

_OPTIONS = len(Spec._fields)
_QKV = 3
_BWD_QKV = 7  # dout, dlse, q, k, v, out, lse
_BWD_DENSE = _BWD_QKV + 3 + _OPTIONS  # and needs, deterministic, impl


def functorch_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """``library.attention`` where a torch.func transform is active."""
    return _Forward.apply(*args)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return (library.FWD if len(args) == _QKV + 1 + _OPTIONS else library.VARLEN_FWD)(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        library.save_for_backward(ctx, inputs, *output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        return library.gradients(ctx, dout, dlse, bwd=_Backward.apply)

    jvp = staticmethod(library.no_jvp)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if len(args) != _QKV + 1 + _OPTIONS:
            raise NotImplementedError("flash_attention_varlen: vmap over packed sequences; put them all into one call")
        n, b = info.batch_size, _batch(args[0], in_dims[0])
        folded = [_fold(x, dim, n, b) for x, dim in zip(args[:_QKV], in_dims[:_QKV], strict=True)]
        options = _fold_options(args[-_OPTIONS:], in_dims[-_OPTIONS:], n, b, keep=True)
        outputs = _Forward.apply(*folded, args[_QKV], *options)
        return tuple(x.unflatten(0, (n, b)) for x in outputs), (0, 0)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return (library.BWD if len(args) == _BWD_DENSE else library.VARLEN_BWD)(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(library.no_double_backward)
    jvp = staticmethod(library.no_jvp)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        needs, deterministic, impl = args[_BWD_QKV : _BWD_QKV + 3]
        if needs[5]:
            raise NotImplementedError("sinks: their gradient under vmap; loop over the samples instead")
        n, b = info.batch_size, _batch(args[2], in_dims[2])
        folded = [_fold(x, dim, n, b) for x, dim in zip(args[:_BWD_QKV], in_dims[:_BWD_QKV], strict=True)]
        # each sample has its own gradient, so a tensor that samples share must not be summed over them
        options = _fold_options(args[-_OPTIONS:], in_dims[-_OPTIONS:], n, b, keep=False)
        found = list(_Backward.apply(*folded, needs, deterministic, impl, *options))
        spec, dims = Spec(*args[-_OPTIONS:]), Spec(*in_dims[-_OPTIONS:])
        for i, needed in enumerate(needs):
            if needed:
                found[i] = found[i].unflatten(0, (n, b))
        for i, name in ((3, "bias"), (4, "key_log_weight")):
            if needs[i] and _batch(getattr(spec, name), getattr(dims, name)) == 1:
                found[i] = found[i].sum(1, keepdim=True)
        return tuple(found), tuple(0 if needed else None for needed in needs)


def _batch(x: Tensor, dim: int | None) -> int:
    """The size of a sample's first dimension."""
    return x.shape[1 if dim == 0 else 0]


def _fold(x: Any, dim: int | None, n: int, b: int) -> Any:
    """The mapped dimension and the batch as one: [n * b, ...]."""
    if x is None:
        return None
    x = x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(n, b, *x.shape[2:]).flatten(0, 1)


def _fold_options(options: tuple[Any, ...], in_dims: tuple[Any, ...], n: int, b: int, keep: bool) -> Spec:
    """The optional tensors for a batch of n * b; with ``keep``, one that all samples share stays of size 1."""
    spec, dims = Spec(*options), Spec(*in_dims)  # dims: of Spec's tensors, where mapped
    if spec.dropout_p:
        raise NotImplementedError("dropout_p: dropout under vmap; put the samples into the batch dimension instead")
    if dims.sinks is not None:
        raise NotImplementedError("sinks: vmap over them; loop over the samples instead")
    changed: dict[str, Any] = {}
    if any(getattr(dims, name) is not None for name in ("block_rows", "block_columns", "block_bits")):
        raise NotImplementedError("mask: vmap over block masks; put the samples into the batch dimension instead")
    for name in ("key_ranges", "mask", "bias", "key_log_weight", "block_rows", "block_columns"):
        x, dim = getattr(spec, name), getattr(dims, name)
        if x is not None and not (keep and dim is None and x.shape[0] == 1):
            changed[name] = _fold(x, dim, n, b)
    slopes, dim = spec.alibi_slopes, in_dims[Spec._fields.index("alibi_slopes")]
    if slopes is not None and (dim is not None or slopes.dim() == 2):  # [Hq] of all samples stays
        slopes = slopes.expand(n, *slopes.shape) if dim is None else slopes.movedim(dim, 0)
        changed["alibi_slopes"] = _fold(slopes if slopes.dim() == 3 else slopes[:, None], 0, n, b)
    return spec._replace(**changed)
