"""FlashAttention-3's functions over our ops: ``from hf_flash_mc.compat.flash_attn_interface import ...``.

Signatures and return values are those of FlashAttention-3's ``flash_attn_interface``. Hints about speed (num_splits,
pack_gqa, sm_margin, scheduler_metadata) are taken and change nothing; what would change the result and these ops lack
(qv, fp8 scales, seqused) raises. attention_chunk has a gradient here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import calls

_WINDOW = (-1, -1)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, qv: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
    window_size: tuple[int, int] = _WINDOW, attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: bool | None = None, deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """q ``[B, Sq, Hq, D]``, k ``[B, Sk, Hkv, D]``, v ``[B, Sk, Hkv, Dv]`` -> out ``[B, Sq, Hq, Dv]``."""
    calls.refuse("flash_attn_func", qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    kwargs = calls.options(softmax_scale, softcap, deterministic, q.device) | calls.visibility(causal, window_size)
    out, lse = calls.dense(q, k, v, key_ranges=calls.chunks(q, k, attention_chunk, causal), **kwargs)
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor, softmax_scale: float | None = None, causal: bool = False, q_descale: Tensor | None = None,
    k_descale: Tensor | None = None, v_descale: Tensor | None = None, window_size: tuple[int, int] = _WINDOW,
    attention_chunk: int = 0, softcap: float = 0.0, deterministic: bool = False, num_heads_q: int | None = None,
    sm_margin: int = 0, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """``flash_attn_func`` of qkv ``[B, S, 3, H, D]``, or ``[B, S, num_heads_q + 2 * Hkv, D]``."""
    if qkv.dim() == 5:
        q, k, v = calls.parts("qkv", qkv, 2, 3, "[B, S, 3, H, D]")
    else:
        if num_heads_q is None:
            raise ValueError(
                f"num_heads_q: expected the number of query heads, since qkv has {qkv.dim()} dimensions; got None"
            )
        rest, odd = divmod(qkv.shape[2] - num_heads_q, 2)
        if odd or rest < 1:
            raise ValueError(
                f"num_heads_q: expected qkv [B, S, num_heads_q + 2 * Hkv, D], got {num_heads_q} and {list(qkv.shape)}"
            )
        q, k, v = qkv.split([num_heads_q, rest, rest], 2)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, sm_margin=sm_margin, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = False, qv: Tensor | None = None, q_descale: Tensor | None = None, k_descale: Tensor | None = None,
    v_descale: Tensor | None = None, window_size: tuple[int, int] = _WINDOW, attention_chunk: int = 0,
    softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False,
    sm_margin: int = 0, return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """q ``[Tq, Hq, D]``, k and v ``[Tk, Hkv, D]``, cu_seqlens int32 ``[B + 1]`` -> out ``[Tq, Hq, Dv]``."""
    calls.refuse(
        "flash_attn_varlen_func", seqused_q=seqused_q, seqused_k=seqused_k, qv=qv, q_descale=q_descale,
        k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk or None,
    )  # fmt: skip
    kwargs = calls.options(softmax_scale, softcap, deterministic, q.device) | calls.visibility(causal, window_size)
    out, lse = calls.packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **kwargs)
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    qv: Tensor | None = None, rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, page_table: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None, max_seqlen_q: int | None = None, rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = _WINDOW,
    attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None, num_splits: int = 0, pack_gqa: bool | None = None, sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    """Append k and v ``[B, Sn, Hkv, D]`` to the caches in place, then attend; see ``calls.with_cache``."""
    calls.refuse(
        "flash_attn_with_kvcache", qv=qv, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new,
        max_seqlen_q=max_seqlen_q, rotary_seqlens=rotary_seqlens, q_descale=q_descale, k_descale=k_descale,
        v_descale=v_descale,
    )  # fmt: skip
    out, lse = calls.with_cache(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, rotary_interleaved, cache_seqlens, cache_batch_idx,
        cache_leftpad, page_table, attention_chunk, None, causal, window_size,
        **calls.options(softmax_scale, softcap, False, q.device),
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out
