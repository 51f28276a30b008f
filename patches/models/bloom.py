"""BLOOM: ALiBi that goes by the position of the key, handed over as a bias of one row."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomAttention, dropout_add

from ..attention import mc_attention


class McBloomAttention(BloomAttention):
    """BloomAttention on mc_attention; same arguments, same results, no attention weights."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, Q, hidden]
        residual: Tensor,
        alibi: Tensor,  # [B * H, 1, K]
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if self.pretraining_tp > 1 and self.slow_but_exact:
            raise NotImplementedError(
                "config.slow_but_exact with pretraining_tp > 1: expected False; unpatch the model"
            )
        batch, length, _ = hidden_states.shape
        query, key, value = self._reshape(self.query_key_value(hidden_states))  # [B, H, Q, D]
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        out, _ = mc_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.inv_norm_factor,
            position_bias=alibi.view(batch, self.num_heads, 1, -1),
            output_attentions=output_attentions,
        )
        out = self.dense(out.reshape(batch, length, self.hidden_size))
        return dropout_add(out, residual, self.hidden_dropout, self.training), None
