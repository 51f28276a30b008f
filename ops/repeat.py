"""Eager calls that were made before: what such a call comes down to is kept, so that checks and plans need no repeat.

Only for calls on a GPU without optional tensors, made where nothing watches (``library.may_repeat``): every layer
of a model and every step of a training run makes such calls. Torch only.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

from torch import Tensor

KINDS = {"cuda"}  # device types whose back ends keep calls
KEPT = 1024


class Call(Protocol):
    """What a back end keeps of a call; both functions take tensors of the signature that it was kept under."""

    kept: tuple[Any, ...]  # what a backward by the long way needs of it: impl, (), Spec's numbers, ()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor | None, ...] | None:
        """dq, dk and dv, in the layouts of the op; None where the call must go the usual way."""
        ...


_kept: dict[tuple[Any, ...], Call] = {}


def signature(q: Tensor, k: Tensor, v: Tensor, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """What decides how a call without optional tensors runs; Triton compiles for pointers aligned to 16 bytes or not.

    Calls in float32 also depend on a switch of torch's, so they have none: an empty tuple.
    """
    dtype = q.dtype
    if dtype.itemsize != 2:
        return ()
    try:
        alignment = (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15
    except RuntimeError:  # what a transform of torch.func left behind has no memory of its own
        return ()
    return (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, alignment, numbers,
    )  # fmt: skip


def find(key: tuple[Any, ...]) -> Call | None:
    """The call kept under a signature."""
    try:
        return _kept.get(key)
    except TypeError:  # a number that is none, such as a list: the checks will say so
        return None


def keep(key: tuple[Any, ...], call: Call) -> None:
    """Keep a call."""
    if len(_kept) >= KEPT:
        forget()
    with contextlib.suppress(TypeError):  # a window that is a list
        _kept[key] = call


def forget() -> None:
    """Drop all calls, as ``portable.plan.forget`` does."""
    _kept.clear()
