"""Attention of several variants that share their first keys: those are read once for all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .api import flash_attention
from .distributed import merge_attention


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    key_log_weight: Tensor | None = None,
    mask: Tensor | None = None,
    prefix_log_weight: Tensor | None = None,
    prefix_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    """Attention of V variants for each of B prefixes, over [prefix, own keys], as if the prefix were repeated V times.

    All queries of a prefix attend to it in one call, and each variant's to its own keys in another; lse merges the two.
    Memory and traffic of the prefix do not grow with V, forward or backward; gradients are those of the whole
    attention (the prefix's: summed over its variants).

    Args:
        q: ``[B * V, Hq, S, D]``, the variants of one prefix beside each other.
        k, v: ``[B * V, Hkv, E, D or Dv]``, each variant's own keys and values, E >= 1.
        prefix_k, prefix_v: ``[B, Hkv, P, D or Dv]``; every row sees all of it but what mask and weight hide.
        causal, window, key_log_weight, mask: as in ``flash_attention``, for a variant's own keys (aligned at the bottom
            right of [S, E]).
        prefix_log_weight: ``[B or 1, Hkv or 1, P]``, of the prefix's keys; has a gradient; -inf removes a key.
        prefix_mask: bool, broadcast to ``[B * V, 1, S, P]``: what of the prefix rows see.
        softcap, sinks, scale, impl: as in ``flash_attention``, for both.

    Returns:
        out ``[B * V, Hq, S, Dv]``, and with ``return_lse`` also lse ``[B * V, Hq, S]``.

    Raises:
        ValueError: sizes that do not fit each other; and as ``flash_attention``. There is no dropout: its mask is drawn
            for one attention, not for two that are merged.

    Source: Juravsky et al., "Hydragen" (2024).
    """
    variants = _variants(q, k, v, prefix_k, prefix_v)
    common: dict[str, Any] = {"softcap": softcap, "scale": scale, "return_lse": True, "impl": impl}
    groups, (_, heads, rows, _) = prefix_k.shape[0], q.shape
    # [B * V, Hq, S, D] -> [B, Hq, V * S, D]: a view where q lies as [B * V, S, Hq, D] in memory
    packed = q.unflatten(0, (groups, variants)).transpose(1, 2).flatten(2, 3)
    if prefix_mask is not None:
        shape = (groups * variants, 1, rows, prefix_k.shape[2])
        prefix_mask = prefix_mask.expand(shape).unflatten(0, (groups, variants)).transpose(1, 2).flatten(2, 3)
    shared, shared_lse = flash_attention(
        packed, prefix_k, prefix_v, mask=prefix_mask, key_log_weight=prefix_log_weight, sinks=sinks, **common
    )
    own, own_lse = flash_attention(
        q, k, v, causal=causal, window=window, mask=mask, key_log_weight=key_log_weight, **common
    )
    # back to [B * V, Hq, S, ...]
    shared = shared.unflatten(2, (variants, rows)).transpose(1, 2).flatten(0, 1)
    shared_lse = shared_lse.unflatten(2, (variants, rows)).transpose(1, 2).reshape(groups * variants, heads, rows)
    out, lse = merge_attention([shared, own], [shared_lse, own_lse])
    return (out, lse) if return_lse else out


def _variants(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> int:
    """Variants of each prefix; ValueError where the sizes do not fit."""
    shapes = [list(x.shape) for x in (q, k, v, prefix_k, prefix_v)]
    groups = prefix_k.shape[0] if prefix_k.dim() == 4 else 0
    fits = all(len(shape) == 4 for shape in shapes) and groups > 0 and q.shape[0] % groups == 0
    if not fits or k.shape[:2] != (q.shape[0], prefix_k.shape[1]) or prefix_v.shape[:3] != prefix_k.shape[:3]:
        raise ValueError(
            "q, k, v, prefix_k, prefix_v: expected [B * V, Hq, S, D], [B * V, Hkv, E, D], [B * V, Hkv, E, Dv], "
            f"[B, Hkv, P, D] and [B, Hkv, P, Dv], got {', '.join(map(str, shapes))}; the variants of one prefix stand "
            "beside each other in the batch"
        )
    return q.shape[0] // groups
