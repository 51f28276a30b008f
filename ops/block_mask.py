"""torch's flex_attention BlockMask as a bool mask, until the kernels read block masks themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dense_mask(block_mask: Any, q: Tensor, k: Tensor) -> Any:
    """``[B or 1, Hq or 1, Sq, Sk]``, True = seen: exactly what flex_attention would show of ``block_mask``.

    A block that is listed as full is seen whole; a block that is listed as partial is seen where mask_mod says so;
    any other block is not seen. Something that is no BlockMask is returned as it is, for the checks to name.
    """
    from torch.nn.attention.flex_attention import BlockMask, create_mask

    if not isinstance(block_mask, BlockMask):
        return block_mask
    sq, sk = q.shape[2], k.shape[2]
    if tuple(block_mask.seq_lengths) != (sq, sk):
        raise ValueError(
            f"mask: expected a BlockMask for {sq} queries and {sk} keys, got one for {tuple(block_mask.seq_lengths)}; "
            "make it with Q_LEN and KV_LEN of this call"
        )
    if block_mask.mask_mod is None:
        raise ValueError("mask: expected a BlockMask with a mask_mod (slicing one drops it), got None")
    b, h = block_mask.kv_num_blocks.shape[:2]
    seen = create_mask(block_mask.mask_mod, b, h, sq, sk, device=q.device)
    seen = seen & _listed(block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.BLOCK_SIZE, sq, sk)
    if block_mask.full_kv_num_blocks is not None:
        seen = seen | _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, block_mask.BLOCK_SIZE, sq, sk)
    return seen


def _listed(counts: Tensor, indices: Any, block: tuple[int, int], sq: int, sk: int) -> Tensor:
    """Bool [B, H, Sq, Sk]: which positions lie in a block that is among the first ``counts`` of ``indices``."""
    columns = -(-sk // block[1])
    listed = torch.arange(indices.shape[-1], device=counts.device) < counts[..., None]
    grid = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=counts.device)
    grid = grid.scatter(-1, torch.where(listed, indices, columns).long(), True)  # the last column takes the unlisted
    rows = torch.arange(sq, device=counts.device) // block[0]
    keys = torch.arange(sk, device=counts.device) // block[1]
    return grid[:, :, rows][..., keys]
