"""MPT: ALiBi by the position of the key. Its model turns every mask into bool, so it gets dense ones (support.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.mpt.modeling_mpt import MptAttention, MptModel

from ..attention import KEY, mc_attention


class McMptModel(MptModel):
    """MptModel that reads a user's 4-D mask of numbers as its own code does: anything but 0 hides a key."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation != KEY:  # such masks say the opposite, and its attention cannot tell
            raise NotImplementedError(
                f"attn_implementation={self.config._attn_implementation!r}: a patched MPT runs {KEY!r} alone; way out: "
                "unpatch_model(model)"
            )
        given = kwargs.get("attention_mask")
        if isinstance(given, Tensor) and given.dim() == 4 and given.dtype != torch.bool:
            kwargs["attention_mask"] = given == 0
        return super().forward(*args, **kwargs)


class McMptAttention(MptAttention):
    """MptAttention on mc_attention; same arguments, same results, no attention weights."""

    def forward(
        self,
        hidden_states: Tensor,  # [B, Q, hidden]
        position_bias: Tensor | None,  # [H, 1, longest]
        cache: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,  # the cache's name before transformers 5.20
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        batch, length = hidden_states.shape[:2]
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        shape = (batch, length, self.n_heads, self.head_dim)
        query, key, value = (part.reshape(shape).transpose(1, 2) for part in mixed.chunk(3, dim=2))
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        keys = key.shape[2]
        if position_bias is not None:
            if position_bias.shape[2] < keys:
                raise ValueError(
                    f"config.max_seq_len: expected at least {keys} for {keys} keys, got {position_bias.shape[2]}"
                )
            position_bias = position_bias[None, :, -1:, position_bias.shape[2] - keys :]
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            raise TypeError(f"attention_mask: expected the bool mask that MptModel makes, got {attention_mask.dtype}")
        out, _ = mc_attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout_p if self.training else 0.0,
            scaling=self.softmax_scale,
            position_bias=position_bias,
        )
        return self.out_proj(out.reshape(batch, length, self.hidden_size)), None
