"""Falcon, rotary and ALiBi. FalconModel adds ALiBi onto a dense mask; here each attention adds it as a one-row bias."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.models.falcon.modeling_falcon import (
    FalconAttention,
    FalconModel,
    apply_rotary_pos_emb,
    build_alibi_tensor,
)

from ..attention import mc_attention
from ..masks import split_mask


class McFalconModel(FalconModel):
    """FalconModel that makes no ALiBi itself, so that its mask stays one of key ranges."""

    use_alibi = property(lambda self: False)  # hides the instance's attribute


class McFalconAttention(FalconAttention):
    """FalconAttention on mc_attention; same arguments, same results, no attention weights."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, Q, hidden]
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        parts = self._split_heads(self.query_key_value(hidden_states))
        query, key, value = (part.transpose(1, 2) for part in parts)  # [B, H, Q, D]
        if not self.config.alibi:
            assert position_embeddings is not None  # FalconModel always makes them
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        bias = self._alibi(attention_mask, query, key.shape[2]) if self.config.alibi else None
        dropout = self.attention_dropout.p if self.config.alibi and self.training else 0.0  # rotary: stock has none
        out, _ = mc_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=1 / math.sqrt(self.head_dim),
            position_bias=bias,
            output_attentions=output_attentions,
        )
        return self.dense(out.reshape(*hidden_states.shape[:2], -1)), None

    def _alibi(self, mask: Tensor | None, query: Tensor, keys: int) -> Tensor:
        """[B or 1, H, 1, K]: slopes times the number of valid keys before a key, in bfloat16 steps as stock has it.

        Once, as with stock's sdpa (and Falcon's own code): stock's eager adds it twice.
        """
        valid = torch.ones(1, keys, dtype=torch.long, device=query.device)
        if mask is not None and mask.dtype == torch.int32:
            ranges, weight = split_mask(mask, query.shape[2], keys)  # weight: [B, 1, K] or None
            first = ranges[:, 0, :, 0].amin(1, keepdim=True)  # [B, 1]: where the padding on the left ends
            valid = (torch.arange(keys, device=query.device) >= first).long()
            valid = valid if weight is None else (weight[:, 0] == 0).long()
        elif mask is not None:
            raise NotImplementedError("Falcon with ALiBi: expected a 2-D padding mask or none, got a 4-D mask")
        alibi = build_alibi_tensor(valid, self.num_heads, dtype=torch.float32)
        return alibi.view(valid.shape[0], self.num_heads, 1, keys) * self.inv_norm_factor
