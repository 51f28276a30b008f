"""Back end "reference": the definition in ``ops/reference.py`` behind the interface that every back end has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .reference import reference_attention, reference_attention_varlen
from .spec import Gradients, Needs, Spec, Varlen

_NO_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
with torch._C._ForceDispatchKeyGuard(_NO_KEYS, _NO_KEYS), torch._C._AutoDispatchBelowAutograd():
    _AUTOGRAD_KEYS = torch._C._dispatch_tls_local_exclude_set()


def forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None = None) -> tuple[Tensor, Tensor]:
    """See ``reference_attention``; any dtype, any device, memory of the order Sq * Sk."""
    with torch.no_grad():
        return _attention(q, k, v, spec, varlen)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: Spec,
    needs: Needs,
    deterministic: bool,
    varlen: Varlen | None = None,
) -> Gradients:
    """Runs the definition again with autograd recording and differentiates it; always deterministic."""
    inputs = (q, k, v, spec.bias, spec.key_log_weight, spec.sinks)
    with _autograd_recording():
        leaves: list[Any] = [
            None if x is None else x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)
        ]
        q, k, v, bias, weight, sinks = leaves
        out, lse = _attention(q, k, v, spec._replace(bias=bias, key_log_weight=weight, sinks=sinks), varlen)
        pairs = [(y, dy) for y, dy in ((out, dout), (lse, dlse)) if dy is not None and y.requires_grad]
        wanted = [x for x, need in zip(leaves, needs, strict=True) if need]
        found = iter(
            torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs], materialize_grads=True)
            if pairs
            else [torch.zeros_like(x) for x in wanted]
        )
    return Gradients(*(next(found) if need else None for need in needs))


def unsupported(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None = None) -> list[str]:
    """Nothing is: the definition takes every call."""
    return []


def _attention(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None) -> tuple[Tensor, Tensor]:
    if spec.block_rows is not None:
        raise NotImplementedError("impl='reference' takes a block mask as a bool mask, as flash_attention gives it")
    options: dict[str, Any] = {name: x for name, x in spec._asdict().items() if not name.startswith("block_")}
    left, right = options.pop("window_left"), options.pop("window_right")
    options["window"] = (None if left < 0 else left, None if right < 0 else right)
    if varlen is None:
        return reference_attention(q, k, v, **options)
    del options["mask"], options["bias"]
    return reference_attention_varlen(q, k, v, varlen.cu_seqlens_q, varlen.cu_seqlens_k, **options)


class _autograd_recording(torch.enable_grad):
    """enable_grad that also works inside an op's body, where the dispatcher passes autograd by."""

    def __enter__(self) -> None:
        super().__enter__()
        c = torch._C
        excluded = c._dispatch_tls_local_exclude_set()
        self._guard = c._ForceDispatchKeyGuard(c._dispatch_tls_local_include_set(), excluded - _AUTOGRAD_KEYS)
        self._guard.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._guard.__exit__(*exc)
        super().__exit__(*exc)
