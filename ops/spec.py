"""What one attention call asks for, as the back ends receive it: plain tuples, torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

REMOVED = -float.fromhex("0x1.62e43p127")  # reference.REMOVED: a logit of this or less is -inf


class Spec(NamedTuple):
    """Everything about an attention call except q, k and v (see ``hf_flash_mc.ops.api`` for the meaning of each).

    Absent tensors are None. Windows are -1 where unbounded. ``scale`` None means D ** -0.5.
    ``dropout_offsets`` are the global (batch, head, row, column) of this call's first element.
    """

    key_ranges: Tensor | None = None  # int32 [B or 1, Hq or 1, Sq, 2]; varlen [Hq or 1, Tq, 2]
    mask: Tensor | None = None  # bool, broadcastable, 4-D: [B or 1, Hq or 1, Sq or 1, Sk or 1]
    bias: Tensor | None = None  # 4-D, the same broadcasting
    key_log_weight: Tensor | None = None  # [B or 1, Hkv or 1, Sk]; varlen [Hkv or 1, Tk]
    alibi_slopes: Tensor | None = None  # [Hq] or [B, Hq]
    sinks: Tensor | None = None  # [Hq]
    dropout_seed: Tensor | None = None  # int64, one element
    # a block mask (block_mask.BlockLists): which blocks of CQ x CK a row of blocks, and a column of them, shows
    block_rows: Tensor | None = None  # int32 [B or 1, Hq or 1, ceil(Sq / CQ), ceil(Sk / CK) + 1, 2]
    block_columns: Tensor | None = None  # int32 [B or 1, Hq or 1, ceil(Sk / CK), ceil(Sq / CQ) + 1, 2]
    block_bits: Tensor | None = None  # int32 [partial blocks, CQ + 1, CK / 32]
    scale: float | None = None
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0  # 0 = none
    dropout_p: float = 0.0
    dropout_offsets: tuple[int, ...] = (0, 0, 0, 0)


class Varlen(NamedTuple):
    """Packed sequences: q is [Tq, Hq, D], k and v [Tk, Hkv, D]; sequence i is rows cu[i] to cu[i + 1]."""

    cu_seqlens_q: Tensor  # int32 [N + 1]
    cu_seqlens_k: Tensor  # int32 [N + 1]
    max_seqlen_q: int
    max_seqlen_k: int


class Paged(NamedTuple):
    """Keys and values in blocks of a pool: the caches are [blocks, block size, Hkv, D]."""

    block_table: Tensor  # int32 [B, most blocks of a sequence]: which blocks hold it, in order
    seqlens_k: Tensor  # int32 [B]: how many keys it has


class Needs(NamedTuple):
    """Which gradients a backward must produce; the others come back as empty tensors."""

    dq: bool = True
    dk: bool = True
    dv: bool = True
    dbias: bool = False
    dkey_log_weight: bool = False
    dsinks: bool = False


class Gradients(NamedTuple):
    """What a back end's backward returns; None where the gradient was not asked for."""

    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dbias: Tensor | None = None  # bias's shape and dtype
    dkey_log_weight: Tensor | None = None  # key_log_weight's shape and dtype
    dsinks: Tensor | None = None  # sinks' shape and dtype


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse and of everything summed over keys."""
    return torch.float64 if dtype == torch.float64 else torch.float32


Layout = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides


def bshd_layout(shape: tuple[int, ...], head_dim: int) -> Layout:
    """[B, H, S, head_dim] on [B, S, H, head_dim] memory; 3-D (varlen) is contiguous."""
    if len(shape) == 3:
        t, h, _ = shape
        return (t, h, head_dim), (h * head_dim, head_dim, 1)
    b, h, s, _ = shape
    return (b, h, s, head_dim), (s * h * head_dim, head_dim, h * head_dim, 1)


def lse_layout(q_shape: tuple[int, ...]) -> Layout:
    """[B, Hq, Sq], or [Hq, Tq] for packed sequences; contiguous."""
    if len(q_shape) == 3:
        t, h, _ = q_shape
        return (h, t), (t, 1)
    b, h, s, _ = q_shape
    return (b, h, s), (h * s, s, 1)


def new_bshd(like: Tensor, head_dim: int | None = None) -> Tensor:
    """Empty tensor of ``like``'s sizes (``head_dim`` last) on [B, S, H, D] memory, whatever the strides of ``like``.

    Real kernels and fakes make every output here, so their strides always agree; and transformers'
    ``transpose(1, 2).contiguous()`` on the result is free.
    """
    return like.new_empty_strided(*bshd_layout(like.shape, like.shape[-1] if head_dim is None else head_dim))


def new_lse(q: Tensor) -> Tensor:
    """Empty lse for ``q``."""
    return q.new_empty_strided(*lse_layout(q.shape), dtype=accumulate_dtype(q.dtype))


# what the code that Inductor generates allocates with
_EMPTY_CUDA = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "_empty_strided_cuda", None)


def new_strided(like: Tensor, layout: Layout, dtype: torch.dtype | None = None) -> Tensor:
    """Empty tensor of a layout, on ``like``'s device, which must be the current one; for code that launches kernels.

    On a GPU it takes 2.5 us where ``new_empty_strided`` takes 4.4, since it is no operator: fakes, modes and autograd
    do not see it.
    """
    if _EMPTY_CUDA is not None and like.is_cuda:
        return _EMPTY_CUDA(*layout, like.dtype if dtype is None else dtype)
    return like.new_empty_strided(*layout, dtype=dtype)


def dropout_threshold(p: float) -> int:
    """Dropout drops a weight where its random byte is below this: p quantised to 1/256."""
    return round(256 * p)
