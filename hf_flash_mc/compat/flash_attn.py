"""FlashAttention-2's functions over our ops, on any GPU or CPU: ``from hf_flash_mc.compat.flash_attn import ...``.

Signatures and return values are those of flash_attn 2.x. Tensors are ``[B, S, H, D]``, or ``[T, H, D]`` where packed;
a window of -1 is unbounded; masks align at the bottom right. ``deterministic`` is honoured. Dropout draws another mask
than FlashAttention would, from torch's generator. ``return_attn_probs`` returns (out, lse, None): the matrix of weights
is never made, so it is refused with dropout, where it would tell what was dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import calls

_WINDOW = (-1, -1)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = _WINDOW, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """q ``[B, Sq, Hq, D]``, k and v ``[B, Sk, Hkv, D]`` -> out ``[B, Sq, Hq, D]``."""
    kwargs = calls.options(softmax_scale, softcap, deterministic, q.device) | calls.visibility(causal, window_size)
    found = calls.dense(q, k, v, dropout_p=dropout_p, alibi_slopes=_slopes(alibi_slopes), **kwargs)
    return _results(found, dropout_p, return_attn_probs)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``flash_attn_func`` with k and v as one tensor: kv ``[B, Sk, 2, Hkv, D]``."""
    k, v = calls.parts("kv", kv, 2, 2, "[B, S, 2, H, D]")
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``flash_attn_func`` with q, k and v as one tensor: qkv ``[B, S, 3, H, D]``."""
    q, k, v = calls.parts("qkv", qkv, 2, 3, "[B, S, 3, H, D]")
    return flash_attn_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = _WINDOW, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Any:  # fmt: skip
    """q ``[Tq, Hq, D]``, k and v ``[Tk, Hkv, D]``, cu_seqlens int32 ``[B + 1]`` -> out ``[Tq, Hq, D]``."""
    calls.refuse("flash_attn_varlen_func", block_table=block_table)
    kwargs = calls.options(softmax_scale, softcap, deterministic, q.device) | calls.visibility(causal, window_size)
    found = calls.packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=dropout_p, alibi_slopes=_slopes(alibi_slopes), **kwargs,
    )  # fmt: skip
    return _results(found, dropout_p, return_attn_probs)


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``flash_attn_varlen_func`` with kv ``[Tk, 2, Hkv, D]``."""
    k, v = calls.parts("kv", kv, 1, 2, "[T, 2, H, D]")
    return flash_attn_varlen_func(q, k, v, *args, **kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Any:
    """``flash_attn_varlen_func`` with qkv ``[T, 3, H, D]``."""
    q, k, v = calls.parts("qkv", qkv, 1, 3, "[T, 3, H, D]")
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = _WINDOW,
    softcap: float = 0.0, rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    """Append k and v ``[B, Sn, Hkv, D]`` to the caches in place, then attend; see ``calls.with_cache``.

    num_splits is a hint about speed and changes nothing here.
    """
    out, lse = calls.with_cache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, rotary_interleaved, cache_seqlens, cache_batch_idx,
        cache_leftpad, block_table, 0, alibi_slopes, causal, window_size,
        **calls.options(softmax_scale, softcap, False, q.device),
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


def _slopes(slopes: Tensor | None) -> Tensor | None:
    return None if slopes is None else slopes.to(torch.float32)


def _results(found: calls.Result, dropout_p: float, all_of_them: bool) -> Any:
    if not all_of_them:
        return found[0]
    if dropout_p:
        raise NotImplementedError(
            "return_attn_probs: with dropout the matrix of weights is asked for, which is never made"
        )
    return (*found, None)
