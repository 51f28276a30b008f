"""What the shrinking rules cannot know, model type by model type; LAYERS: how many layers reach every kind of layer."""

from __future__ import annotations

from typing import Any

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MOE = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
WORDS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION_LLAMA = {
    "intermediate_size": 256,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "vision_output_dim": 64,
}
SAM = {
    "vision_config": {"image_size": 64, "output_channels": 64, "num_pos_feats": 32},
    "prompt_encoder_config": {"image_size": 64, "image_embedding_size": 4},
}
HIERA = {
    "hidden_size": 32,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [32, 64, 128, 256],
    "window_positional_embedding_background_size": [4, 4],
    "window_size_per_stage": [8, 4, 8, 4],
    "global_attention_blocks": [3],
}
SAM2 = {
    "vision_config": {
        "backbone_config": HIERA,
        "backbone_channel_list": [256, 128, 64, 32],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 64,
    },
    "prompt_encoder_config": {"image_size": 64},
}
PHI4_AUDIO = {"ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64, "nemo_conv_channels": 64}
HYBRID = {"LAYERS": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]}
INSERT = {"insert_layer_id": 1}
MLLAMA = {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192}

SPECIAL: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 6, "context_length": 12},
    "informer": {"prediction_length": 6, "context_length": 12},
    "time_series_transformer": {"prediction_length": 6, "context_length": 12},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "deepseek_v2": MOE,
    "dots1": MOE,
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 6},
    "hunyuan_v1_dense": {"head_dim": 16},
    "audio-spectrogram-transformer": {"max_length": 64},
    "llama4_vision_model": VISION_LLAMA,
    "llama4": {"vision_config": VISION_LLAMA},
    "sam": SAM,
    "sam_hq": SAM,
    "chameleon": {"vocabulary_map": {"<image>": 8}},
    "emu3": {"vocabulary_map": {"<image>": 8}},
    "minicpm_ocr": INSERT,
    "minicpm_ocr_vision": INSERT,
    "minicpmv4_6": INSERT,
    "minicpmv4_6_vision": INSERT,
    "minicpmv4_7": INSERT,
    "minicpmv4_7_vision": INSERT,
    "xmod": {"default_language": "en_XX"},
    "mllama_vision_model": MLLAMA,
    "mllama": {"vision_config": MLLAMA},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "mistral4": {
        "qk_nope_head_dim": 8,
        "rope_parameters": {
            **ROPE,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "llama_4_scaling_beta": 0.1,
            "partial_rotary_factor": 0.5,
        },
    },
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROPE}}},
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "glm5_next_text": {"index_kpool": 2},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "pix2struct_text_model": {"initializer_range": 0.02},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "step3p7": {"text_config": {"sliding_window": 6}},
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": {**ROPE, "xdrope_section": [2, 2, 2, 2]}}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], **MOE},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], **MOE}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark_audio": {"LAYERS": 4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}},
    "florence_vision": {
        "embed_dim": [16, 32, 32, 32],
        "depths": [1, 1, 1, 1],
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
    },
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": {**ROPE, "xdrope_section": [2, 2, 2, 2]}},
    "ministral": {"head_dim": 16},
    "gemma3n_text": {"LAYERS": 10, "num_kv_shared_layers": 5, "intermediate_size": 96},
    "nemotron": {"num_key_value_heads": 2},
    "step3p5": {"sliding_window": 6},
    "perceiver": {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "qk_channels": 64, "v_channels": 64},
    "jamba": {"LAYERS": 8},
    # Mixers of state in every layer that the first few have: these get a layer with attention.
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layers_block_type": ["mamba", "attention"]},
    "recurrent_gemma": {"LAYERS": 3},
    "zamba": HYBRID,
    "zamba2": {**HYBRID, "attention_head_dim": 32, "attention_hidden_size": 128},
    "sam2": SAM2,
    "voxtral": {"text_config": {"num_key_value_heads": 2}, "audio_config": {"intermediate_size": 256}},
    "phi4_multimodal_audio": PHI4_AUDIO,
    "phi4_multimodal": {"audio_config": PHI4_AUDIO},
    "kosmos-2.5": {"vision_config": {"patch_embed_hidden_size": 768}},
    "mamba2": {"num_heads": 8},
    "blt": {"encoder_hash_byte_group_vocab": 50, "decoder_config": {"hidden_size_global": 64}},
    "sam3_tracker": {
        "vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
        "prompt_encoder_config": {"image_size": 56},
    },
}
