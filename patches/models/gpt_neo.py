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
        past = 0 if layer_past is None else layer_past.get_seq_length(self.layer_id)
        row = torch.arange(query.shape[2], device=query.device) + past  # before the update, which changes past in place
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_id)
        if attention_mask is not None:
            attention_mask = self._cut(attention_mask, row, key.shape[2])
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

    def _cut(self, mask: Tensor, row: Tensor, keys: int) -> Tensor:
        """The mask that GPTNeoModel makes, or a user's 4-D one, cut to what stock's buffer lets rows ``[Q]`` see."""
        first = row - self.config.window_size + 1 if self.attention_type == "local" else torch.zeros_like(row)
        if mask.dtype == torch.int32:
            weights, ranges = mask[:, :, : -row.shape[0]], mask[:, :, -row.shape[0] :]
            lo = torch.maximum(ranges[..., 0], first.to(torch.int32))
            return torch.cat((weights, torch.cat((lo[..., None], ranges[..., 1:]), -1)), 2)
        key = torch.arange(keys, device=mask.device)
        seen = (key >= first[:, None]) & (key <= row[:, None])
        return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
