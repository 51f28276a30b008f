"""GPT-Neo: no scale, and a sliding window in every other layer that stock keeps in a buffer [S, S]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from ..attention import mc_attention


class McGPTNeoSelfAttention(GPTNeoSelfAttention):
    """GPTNeoSelfAttention on mc_attention; same arguments, same results, no attention weights."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, Q, hidden]
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:2], self.num_heads, self.head_dim)
        query, key, value = (
            f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_id)
        if self.attention_type == "local":
            attention_mask = self._local(attention_mask, query.shape[2])
        out, _ = mc_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=1.0,
            output_attentions=output_attentions,
        )
        return self.resid_dropout(self.out_proj(out.reshape(*hidden_states.shape[:2], -1))), None

    def _local(self, mask: Tensor | None, queries: int) -> Tensor:
        """The causal mask cut to the window: a row that counts ends at its own key, so its first key follows."""
        if mask is None or mask.dtype != torch.int32:
            raise NotImplementedError("GPT-Neo's local layers: expected a 2-D padding mask or none, got a 4-D mask")
        weights, ranges = mask[:, :, : mask.shape[2] - queries], mask[:, :, -queries:]
        lo = torch.maximum(ranges[..., 0], ranges[..., 1] - self.config.window_size)
        return torch.cat((weights, torch.cat((lo[..., None], ranges[..., 1:]), -1)), 2)
