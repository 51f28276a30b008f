"""Attention over parts of the keys, put together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One attention from several over disjoint sets of keys: each result weighs by the exp of its lse.

    Differentiable in both. Give ``sinks`` to only one of the parts, or it counts several times.

    Args:
        outs: ``[B, H, S, D]`` each (or ``[T, H, D]``, packed).
        lses: ``[B, H, S]`` each (or ``[H, T]``), natural log; -inf where a part shows a row no key.

    Returns:
        (out, lse): the attention over all keys, out in the dtype of the first part, computed in fp32 (fp64 for fp64);
        out 0 and lse -inf where no part shows a row any key.

    Raises:
        ValueError: no part at all, or parts of different shapes.

    Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021).
    """
    shapes = {(tuple(out.shape), tuple(lse.shape)) for out, lse in zip(outs, lses, strict=False)}
    if len(outs) != len(lses) or len(shapes) != 1:
        raise ValueError(
            f"outs, lses: expected as many outs as lses, at least one, of one shape, got {len(outs)} and {len(lses)} "
            f"of shapes {sorted(shapes)}"
        )
    work = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    parts = torch.stack([lse.to(work) for lse in lses])
    top = parts.detach().amax(0)
    top = torch.where(top == float("-inf"), torch.zeros_like(top), top)
    weights = torch.exp(parts - top)
    total = weights.sum(0)
    seen = total > 0
    total = torch.where(seen, total, torch.ones_like(total))
    lse = torch.where(seen, top + torch.log(total), float("-inf"))
    packed = outs[0].dim() == 3
    out = sum(
        out.to(work) * (share.transpose(0, 1) if packed else share)[..., None]
        for out, share in zip(outs, weights / total, strict=True)
    )
    return out.to(outs[0].dtype), lse
