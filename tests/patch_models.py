"""Tiny random transformers models for the patch tests, one row per family, and how to compare two of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

BATCH, LENGTH, VOCAB = 3, 21, 97
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "hidden_dropout": 0.0}
ENCODER_DECODER = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}

# Attention classes of their own: patches/models. The last two only before transformers 5.24.
ADAPTED = ("bloom", "mpt", "falcon", "falcon_alibi", "gpt_neo", "gptj", "codegen")

CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 6}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "phi3": ("Phi3", {"hidden_size": 80, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 24, "sliding_window": 6, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 11},
    ),
    "gemma3": ("Gemma3", {"head_dim": 24, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": ("GptOss", dict(head_dim=16, sliding_window=6, **MOE)),
    "llama4": (
        "Llama4",
        dict(head_dim=16, attention_chunk_size=8, intermediate_size_mlp=96, no_rope_layers=[1, 0], **MOE),
    ),
    "mixtral": ("Mixtral", MOE),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 24, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gemma": ("Gemma", {"head_dim": 24}),
    "gemma4": (
        "Gemma4",
        {
            "head_dim": 24,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 0,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "olmo2": ("Olmo2", {}),
    "cohere2": ("Cohere2", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "granite": ("Granite", {"attention_multiplier": 0.3}),
    "smollm3": ("SmolLM3", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": 6, "residual_dropout": 0.0, "embedding_dropout": 0.0}),
    "gpt_neox": ("GPTNeoX", {}),
    "deepseek_v2": ("DeepseekV2", {**MLA, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3", MLA),
    "deepseek_v32": ("DeepseekV32", {**MLA, "index_topk": 5, "index_n_heads": 2, "index_head_dim": 16}),
    "opt": ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "bloom": ("Bloom", NO_DROPOUT),
    "mpt": ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "falcon": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, **NO_DROPOUT}),
    "falcon_alibi": ("Falcon", {"alibi": True, "multi_query": True, "new_decoder_architecture": False, **NO_DROPOUT}),
    "gptj": ("GPTJ", {"rotary_dim": 8, "n_inner": 96, "attn_pdrop": 0.0, "n_positions": 256, **NO_DROPOUT}),
    "codegen": ("CodeGen", {"rotary_dim": 8, "n_inner": 96, "attn_pdrop": 0.0, "n_positions": 256, **NO_DROPOUT}),
    "gpt_neo": (
        "GPTNeo",
        {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 6,
            "embed_dropout": 0.0,
            "resid_dropout": 0.0,
        },
    ),
    "gpt2": (
        "GPT2",
        {
            "n_embd": 64,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 256,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        },
    ),
}


def causal_config(family: str) -> transformers.PreTrainedConfig:
    name, special = CAUSAL[family]
    suffix = "TextConfig" if family in ("gemma3", "gemma4", "llama4") else "Config"
    return getattr(transformers, name + suffix)(**{**SMALL, **special})


def causal_model(family: str, config: transformers.PreTrainedConfig | None = None) -> nn.Module:
    name = CAUSAL[family][0]
    cls = getattr(transformers, {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM"))
    model = build(cls, config or causal_config(family))
    if family == "falcon_alibi":  # stock eager adds ALiBi twice: into the mask and onto the scores; sdpa once
        model.config._attn_implementation = "sdpa"
    return model


def build(cls: type, config: transformers.PreTrainedConfig) -> nn.Module:
    """A model on stock eager attention, in eval mode; parameters that start at zero or one get noise too."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def tokens(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def padding(kind: str) -> Tensor | None:
    """[BATCH, LENGTH] masks; every kind leaves one row whole."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if kind == "none":
        return None
    if kind == "left":
        mask[0, :7], mask[1, :1] = 0, 0
    elif kind == "right":
        mask[0, -7:], mask[1, -1:] = 0, 0
    elif kind == "holes":
        mask[0, 3:9], mask[0, 12], mask[1, :2], mask[1, 10:12], mask[1, -2:] = 0, 0, 0, 0, 0
    elif kind == "whole row":
        mask[0] = 0
    return mask


def outputs_and_gradients(model: nn.Module, read: Callable[[Any], Tensor], rows: Tensor | None, **inputs: Any):
    """The tensor that ``read`` takes from the output, on the rows that count, and the gradient of every parameter."""
    model.zero_grad()
    out = read(model(**inputs))
    out = out if rows is None else out[rows.bool()]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
    (out * weight).mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, expected, tolerance: float = 1e-5) -> None:
    """Outputs and gradients equal up to fp32 rounding: ``tolerance`` of the largest value (outputs: at least of 1)."""
    (out, grads), (ref, ref_grads) = got, expected
    assert out.isfinite().all()
    assert (out - ref).abs().max() <= tolerance * max(1.0, ref.abs().max().item())
    assert grads.keys() == ref_grads.keys()
    largest = max(g.abs().max().item() for g in ref_grads.values())
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        assert (grad - ref_grads[name]).abs().max() <= tolerance * largest, name


def twin(model: nn.Module) -> nn.Module:
    """An independent copy (its config too)."""
    return copy.deepcopy(model)
