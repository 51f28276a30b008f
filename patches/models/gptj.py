"""GPT-J and CodeGen as they were before transformers 5.24, where both took up the attention interface."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.codegen.modeling_codegen import CodeGenAttention
from transformers.models.gptj.modeling_gptj import GPTJAttention

from ..attention import mc_attention


class _OwnAttention(nn.Module):
    """What both have in common: forward prepares and finishes everything around a method `_attn`."""

    attn_dropout: nn.Dropout

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query, key, value ``[B, H, S, D]`` -> out ``[B, H, Q, D]``. Rotation leaves CodeGen's queries in float32."""
        out, _ = mc_attention(
            self,
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
        )
        return out.transpose(1, 2), None


class McGPTJAttention(_OwnAttention, GPTJAttention):
    """GPTJAttention on mc_attention; same arguments, same results, no attention weights."""


class McCodeGenAttention(_OwnAttention, CodeGenAttention):
    """CodeGenAttention on mc_attention; same arguments, same results, no attention weights."""
