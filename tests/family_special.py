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
MEMORY: dict[str, Any] = {  # their memory's width of 64 is written into the code, and has to be below the model's
    "image_size": 64,
    "memory_attention_rope_feat_sizes": [4, 4],
    **dict.fromkeys(("memory_attention_hidden_size", "memory_encoder_hidden_size"), 128),
    **dict.fromkeys(("mask_downsampler_embed_dim", "memory_fuser_embed_dim"), 128),
    "vision_config": {"fpn_hidden_size": 128},
    "prompt_encoder_config": {"image_size": 64, "hidden_size": 128},
    "mask_decoder_config": {"hidden_size": 128},
}
SAM2 = {"prompt_encoder_config": {"image_size": 64}}
PHI4_AUDIO = {"ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64, "nemo_conv_channels": 64}
HYBRID = {"LAYERS": 4, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]}
INSERT = {"insert_layer_id": 1}
MLLAMA = {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192}

VQ = {"base_channels": 32, "num_res_blocks": 1}
FEW_FILTERS = {"num_filters": 4, "depths": [1] * 7}
PE = {"architecture": "vit_pe_core_tiny_patch16_384", "model_args": {"embed_dim": 192, "depth": 2, "img_size": 64}}
ESM_FOLD = {
    "single_inputs_size": 64 + 67,
    "num_loops": 1,
    "atom_encoder": {"head_dim": 32, "output_dim": 64},
    "structure_head": {"diffusion_module": {"head_dim": 16, "atom_encoder": {"head_dim": 32, "output_dim": 64}}},
}
DETECTOR = {
    "kernel_list": [3, 2, 2],
    "scale_factor_list": [1, 2, 4, 8],
    "intraclass_block_config": {
        name: [1, 1, 0]
        for name in ("reduce_channel", "return_channel")
        + tuple(
            f"{direction}_{size}ratio"
            for direction in (
                "vertical_long_to_small_conv",
                "horizontal_small_to_long_conv",
                "symmetric_conv_long",
            )
            for size in ("long", "mid", "short")
        )
    },
}
DRAFTER = {  # all of its layers take another model's keys
    "num_hidden_layers": 2,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 6,
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EDGE = {
    "vision_config": {
        "backbone_config": {
            "architecture": "repvit_m1.dist_in1k",
            "num_classes": 2,
            "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
        },
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "prompt_encoder_config": {"image_size": 64},
}

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
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2}},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "step3p7": {"text_config": {"sliding_window": 6}},
    "hunyuan_vl": {"text_config": {"head_dim": 16, "rope_parameters": {**ROPE, "xdrope_section": [2, 2, 2, 2]}}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], **MOE},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], **MOE}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "muse_spark_audio": {"LAYERS": 4},
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
    "sam2_video": MEMORY,
    "edgetam_video": {
        **MEMORY,
        "memory_attention_rope_k_sizes": [2, 2],
        "perceiver_resampler_num_latents": 4,
        "perceiver_resampler_num_latents_2d": 4,
        "perceiver_resampler_attention_head_dim": 64,
    },
    "sam3_tracker_video": {**MEMORY, "image_size": 56, "prompt_encoder_config": {"image_size": 56, "hidden_size": 128}},
    "sam2_hiera_det_model": HIERA,
    "sam2_vision_model": {
        "backbone_channel_list": [256, 128, 64, 32],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 64,
    },
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
    # Types that run inside others are small there too: shrink() looks for each nested config's own row.
    "apertus1p5": {"image_token_offset": 20, "audio_token_offset": 52},
    "apertus1p5_vision_tokenizer": {**VQ, "codebook_size": 32},
    "emu3_vqgan": {**VQ, "hidden_size": 128},
    "wavtokenizer": {"codebook_dim": 64},
    "wavtokenizer_encoder": {"codebook_dim": 64, "codebook_size": 32},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense", "sparse"], "per_layer_config": {}},
    "dots3_note_audio_encoder": {"conv_output_size": 128},
    "esmfold2": ESM_FOLD,
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "vitmatte": {"convstream_hidden_sizes": [16, 32, 64], "fusion_hidden_sizes": [64, 32, 16, 8]},
    "gemma3n_vision": {"architecture": "mobilenetv4_conv_small", "hidden_size": 960},
    "gemma4_assistant": {
        "text_config": {**DRAFTER, "vocab_size_per_layer_input": 0, "hidden_size_per_layer_input": 0},
    },
    "gemma4_unified_assistant": {"text_config": DRAFTER},
    "granite4_vision": {
        "text_config": {"model_type": "granite4_vision_text"},
        "deepstack_layer_map": [[-2, 0]],
        "downsample_rate": "1/2",
    },
    "muse_glimmer_assistant": {"target_layer_ids": [1, 3]},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "perception_lm": {"vision_config": PE},
    "pe_video_encoder": {"vision_config": PE},
    "timm_backbone": {"backbone": "resnet10t"},
    "vibevoice_acoustic_tokenizer": FEW_FILTERS,
    "vibevoice_acoustic_tokenizer_encoder": FEW_FILTERS,
    "vibevoice_acoustic_tokenizer_decoder": FEW_FILTERS,
    "neucodec": {"quantization_dim": 128},
    "xcodec2": {"quantization_dim": 128},
    "pp_ocrv5_server_det": DETECTOR,
    "pp_ocrv6_medium_det": DETECTOR,
    "qwen2_5_omni_dit": {"STOCK": "sdpa"},  # its code looks for a function of the name, and eager has none
    "edgetam": EDGE,
    "edgetam_vision_model": EDGE["vision_config"],
}
