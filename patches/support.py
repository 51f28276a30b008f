"""The table of model families: what each needs beyond plain causal attention, what is tested, what is refused and why.

A family that is not listed is not refused for that: `patch_model` looks at the classes of the model itself (api.py).
Rows here hold what cannot be seen there.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Family(NamedTuple):
    """One row. ``model_types`` are transformers' `config.model_type`; ``refused`` is the reason, None = supported.

    ``dense_masks``: the family's code computes with its masks, so it gets bool [B, 1, Q, K] as sdpa does, O(S^2).
    ``float_masks``: the same as numbers to add, as eager gets them, for code that adds a bias to its mask.
    """

    name: str
    model_types: tuple[str, ...]
    needs: str
    tested: bool = False
    refused: str | None = None
    dense_masks: bool = False
    float_masks: bool = False


_SPARSE = "it selects blocks of keys by sparse indices, which the attention ops do not have"
_READS_MASK = "its own code reads the values of the attention mask, and would misread key ranges"

FAMILIES: tuple[Family, ...] = (
    Family("Llama", ("llama",), "causal, GQA", tested=True),
    Family("Mistral", ("mistral",), "sliding window", tested=True),
    Family("Qwen3", ("qwen3",), "causal, GQA, query and key norms", tested=True),
    Family("Gemma 2", ("gemma2",), "softcap, sliding window in every other layer", tested=True),
    Family("Gemma 3", ("gemma3_text", "gemma3"), "sliding window in five of six layers, image blocks", tested=True),
    Family(
        "Gemma 4",
        ("gemma4_text", "gemma4", "gemma4_unified_text", "gemma4_unified"),
        "head dim 512 in full layers, image blocks",
        tested=True,
    ),
    Family("gpt-oss", ("gpt_oss",), "learned sinks, sliding window", tested=True),
    Family("Llama 4", ("llama4_text", "llama4"), "chunked attention", tested=True),
    Family("Qwen 2", ("qwen2",), "sliding window in upper layers", tested=True),
    Family("Mixtral and Qwen3-MoE", ("mixtral", "qwen3_moe"), "mixtures of experts", tested=True),
    Family("Cohere 2", ("cohere2",), "sliding window in three of four layers", tested=True),
    Family("StarCoder 2", ("starcoder2",), "sliding window", tested=True),
    Family("Granite", ("granite",), "scale of its own", tested=True),
    Family(
        "Gemma, OLMo 2, SmolLM3, GPT-NeoX, OPT", ("gemma", "olmo2", "smollm3", "gpt_neox", "opt"), "causal", tested=True
    ),
    Family("DeepSeek V2 and V3", ("deepseek_v2", "deepseek_v3"), "value head dim unlike the key's", tested=True),
    Family("Phi-3", ("phi3",), "head dim 96", tested=True),
    Family("GPT-2", ("gpt2",), "causal, attention dropout", tested=True),
    Family("BERT", ("bert",), "bidirectional, any padding", tested=True),
    Family("ViT", ("vit",), "bidirectional, no mask", tested=True),
    Family("CLIP", ("clip", "clip_text_model", "clip_vision_model"), "causal text, bidirectional vision", tested=True),
    Family("BART", ("bart",), "encoder and decoder, cross attention", tested=True),
    Family("Whisper", ("whisper",), "encoder and decoder, cross attention", tested=True),
    Family("T5", ("t5",), "position bias with a gradient, scale 1", tested=True),
    Family("BLOOM", ("bloom",), "ALiBi by key position (adapter)", tested=True),
    Family("Falcon", ("falcon",), "rotary or ALiBi by key position (adapter)", tested=True),
    Family("GPT-Neo", ("gpt_neo",), "sliding window in every other layer, no scale (adapter)", tested=True),
    Family("MPT", ("mpt",), "ALiBi by key position (adapter); its model turns masks into bool", True, dense_masks=True),
    Family(
        "Parakeet and LASR",
        (
            "parakeet_encoder",
            "parakeet_ctc",
            "parakeet_rnnt",
            "parakeet_tdt",
            "lasr_encoder",
            "lasr_ctc",
            "canary",
            "cohere_asr",
            "nemotron_asr_streaming_encoder",
            "nemotron_asr_streaming",
            "nemotron3_5_asr",
        ),
        "relative positions added to the mask",
        dense_masks=True,
    ),
    Family(
        "SAM 3",
        (
            "sam3",
            "sam3_vision_model",
            "sam3_detr_encoder",
            "sam3_detr_decoder",
            "sam3_mask_decoder",
            "sam3_video",
            "sam3_lite_text",
            "sam3_lite_text_text_model",
            "sam3_lite_text_detr_encoder",
            "sam3_lite_text_detr_decoder",
            "sam3_lite_text_mask_decoder",
            "sam3_vit_model",
            "sam3_geometry_encoder",
        ),
        "masks and position biases that are added up",
        dense_masks=True,
    ),
    Family("BEiT", ("beit",), "relative position bias with a gradient, added to the mask", float_masks=True),
    Family(
        "SigLIP 2",
        ("siglip2", "siglip2_vision_model", "siglip2_text_model", "phi4_multimodal_vision"),
        "masks of image patches",
        dense_masks=True,
    ),
    Family(
        "T5Gemma 2",
        ("t5gemma2", "t5gemma2_text", "t5gemma2_encoder", "t5gemma2_decoder"),
        "self and cross masks in one",
        dense_masks=True,
    ),
    Family(
        "Pix2Struct",
        ("pix2struct", "pix2struct_vision_model", "pix2struct_text_model"),
        "bias added to the mask",
        dense_masks=True,
    ),
    Family("Switch Transformers", ("switch_transformers",), "bias added to the mask", dense_masks=True),
    Family(
        "Qwen 4 (experimental)",
        ("qwen4_exp", "qwen4_exp_text", "qwen4_exp_vision"),
        "token selection by mask",
        dense_masks=True,
    ),
    Family(
        "MiniMax M3 towers",
        ("minimax_m3_vl_vision", "hy_v4_vl_vision"),
        "vision towers beside sparse text models",
        dense_masks=True,
    ),
    Family(
        "Drafters of Gemma 4 and Muse Glimmer",
        ("gemma4_assistant", "gemma4_unified_assistant", "muse_glimmer_assistant"),
        "masks over another model's keys, mirrored for windows",
        dense_masks=True,
    ),
    Family("LightGlue", ("lightglue",), "masks reshaped for cross attention", dense_masks=True),
    Family(
        "DeepSeek sparse attention",
        (
            "deepseek_v32",
            "glm_moe_dsa",
            "axk2",
            "dots3_note",
            "dots3_note_text",
            "dots3_note_audio_encoder",
            "dots3_note_vision_encoder",
            "hy_v4",
            "hy_v4_vl",
            "hy_v4_vl_text",
            "mistral_large4",
            "mistral_large4_text",
        ),
        "keys chosen by an indexer (dense cost)",
        tested=True,
        dense_masks=True,
    ),
    Family("DeepSeek V4", ("deepseek_v4",), "compressed key blocks appended to the mask", refused=_READS_MASK),
    Family(
        "MiniMax M3", ("minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"), "sparse block indices", refused=_SPARSE
    ),
    Family(
        "BridgeTower",
        ("bridgetower",),
        "cross attention between words and images",
        refused="its cross-modal layers call themselves causal and pass no mask, so stock eager and sdpa differ too",
    ),
    Family(
        "Inkling 2",
        ("inkling2_text", "inkling2_loop_text", "inkling2", "inkling2_loop"),
        "a sink logit for every token",
        refused="its sinks differ from token to token, and the ops take one a head",
    ),
    Family("Doge", ("doge",), "dynamic masks", refused=_READS_MASK),
    Family("DiffusionGemma", ("diffusion_gemma", "diffusion_gemma_text"), "its own mask shapes", refused=_READS_MASK),
)

# Families that slice query rows off their masks (key-value sharing layers need only the last tokens in a prefill).
SLICES_MASKS = frozenset({"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"})

# Whose attention calls itself causal and passes no mask, until a transformers after 5.17: stock eager and sdpa differ.
CAUSAL_BY_NAME = frozenset({"Kosmos2ImageToTextProjection"})

# Attention classes with a computation of their own that take a mask argument, but never one of ours: safe to leave to
# transformers. (Those whose forward takes no mask at all are found by api.py.)
HARMLESS_CLASSES = frozenset(
    {
        "BailingHybridDeltaAttention",  # linear ones get the 2-D padding mask
        "Glm5NextTextLinearAttention",
        "KimiLinearDeltaAttention",
        "MiniMaxLightningAttention",
        "OlmoHybridLinearAttentionDecoderLayer",
        "Phi4MultimodalVisionMultiheadAttentionPoolingHead",
        "Siglip2MultiheadAttentionPoolingHead",  # SigLIP 2's masks are dense
    }
)

# Families that compute with their masks: they get dense ones.
DENSE_MASKS = frozenset(t for family in FAMILIES if family.dense_masks for t in family.model_types)


def wants_dense_masks(config: Any) -> bool:
    """Whether code that makes masks with this config computes with them."""
    kind = getattr(config, "model_type", None)
    if kind in SLICES_MASKS:  # a text model all of whose layers take another's keys is the inside of a drafter
        return 0 < getattr(config, "num_kv_shared_layers", 0) == config.num_hidden_layers
    return kind in DENSE_MASKS


FLOAT_MASKS = frozenset(t for family in FAMILIES if family.float_masks for t in family.model_types)

REFUSED: dict[str, Family] = {t: family for family in FAMILIES if family.refused for t in family.model_types}
