"""Calls that no signature tells (see family_inputs.py): arguments by the class of a model or of a part of one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from family_inputs import BATCH, GRID, LENGTH, random_ids, random_tensor
from family_inputs import candidates as guesses
from torch import Tensor
from transformers import PreTrainedModel


def _causal(length: int) -> Tensor:
    """A float mask [B, 1, S, S] as eager takes it, for parts that make none themselves."""
    seen = torch.ones(BATCH, 1, length, length, dtype=torch.bool).tril()
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def _blt_part(model: Any) -> dict[str, Any]:
    """Rows of Blt's local models attend to their past; patches and rows see each other where they belong together."""
    width, k, patches = model.config.hidden_size, model.config.cross_attn_k, 4
    patch_ids = torch.arange(LENGTH).mul(patches).div(LENGTH, rounding_mode="floor").expand(BATCH, -1)
    seen = patch_ids[:, :, None] == torch.arange(patches).repeat_interleave(k)  # [B, S, patches * k]
    encoder = type(model).__name__ == "BltLocalEncoder"
    seen = (seen.mT if encoder else seen)[:, None]
    given = {
        "inputs_embeds": random_tensor(BATCH, LENGTH, width),
        "attention_mask": _causal(LENGTH),
        "encoder_attention_mask": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
    }
    if encoder:
        return {**given, "num_patches": patches, "patch_ids": patch_ids}
    return {**given, "patch_embeds": random_tensor(BATCH, patches, model.config.hidden_size_global)}


def _sam3_decoder(model: Any) -> dict[str, Any]:
    width = model.config.hidden_size
    return {
        "vision_features": random_tensor(BATCH, 16, width),
        "text_features": random_tensor(BATCH, 5, width),
        "vision_pos_encoding": random_tensor(BATCH, 16, width),
        "text_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


def _sam3_encoder(model: Any) -> dict[str, Any]:
    width = model.config.hidden_size
    return {
        "vision_features": [random_tensor(BATCH, width, 4, 4)],
        "text_features": random_tensor(BATCH, 5, width),
        "vision_pos_embeds": [random_tensor(BATCH, width, 4, 4)],
        "text_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(),
    }


def _sam3_masks(model: Any) -> dict[str, Any]:
    width = model.config.hidden_size
    return {
        "decoder_queries": random_tensor(BATCH, 7, width),
        "backbone_features": [random_tensor(BATCH, width, n, n) for n in (16, 8, 4)],
        "encoder_hidden_states": random_tensor(BATCH, 16, width),
        "prompt_features": random_tensor(BATCH, 5, width),
        "prompt_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(),
    }


def _boxes(model: Any) -> dict[str, Any]:
    width = model.config.hidden_size
    return {
        "box_embeddings": torch.tensor([[0.5, 0.5, 0.4, 0.3], [0.3, 0.6, 0.2, 0.2]]).expand(BATCH, -1, -1),
        "box_mask": torch.tensor([[1, 1], [1, 0]]).bool(),
        "box_labels": torch.tensor([[1, 0], [1, 0]]),
        "img_feats": (random_tensor(BATCH, width, 8, 8),),
        "img_pos_embeds": (random_tensor(BATCH, width, 8, 8),),
    }


def _memory(model: Any) -> dict[str, Any]:
    """A tracker's frame of 4 x 4 features over two earlier frames in memory, and over four object pointers.

    (A whole tracker runs without gradients, and a random one loses its object, which blanks its output.)
    """
    latents = 8 if type(model).__name__.startswith("EdgeTam") else 16
    frame = random_tensor(16, 1, model.layer_norm.normalized_shape[0])
    given = {
        "current_vision_features": frame,
        "current_vision_position_embeddings": frame.flip(0),
        "memory": random_tensor(2 * latents + 4, 1, 64),
        "memory_posision_embeddings": random_tensor(2 * latents + 4, 1, 64).flip(0),
        "num_object_pointer_tokens": 4,
    }
    return {**given, "num_spatial_memory_tokens": 2} if latents == 8 else given


def _prompted_masks(model: Any) -> dict[str, Any]:
    width = model.hidden_size
    return {
        "image_embeddings": random_tensor(BATCH, width, 4, 4),
        "image_positional_embeddings": random_tensor(BATCH, width, 4, 4).flip(1),
        "sparse_prompt_embeddings": random_tensor(BATCH, 1, 2, width),
        "dense_prompt_embeddings": random_tensor(BATCH, width, 4, 4).flip(2),
        "multimask_output": True,
        "high_resolution_features": [random_tensor(BATCH, width // 8, 16, 16), random_tensor(BATCH, width // 4, 8, 8)],
    }


def _drafter(model: Any) -> dict[str, Any]:
    """A draft model's step over the keys of the model that it drafts for."""
    keys = {}
    for layer in model.model.layers:
        part = layer.self_attn
        heads = part.config.num_attention_heads // part.num_key_value_groups
        keys[part.layer_type] = tuple(random_tensor(BATCH, heads, LENGTH, part.head_dim) for _ in range(2))
    return {
        "inputs_embeds": random_tensor(BATCH, 1, 2 * model.config.backbone_hidden_size),
        "position_ids": torch.full((BATCH, 1), LENGTH - 1),
        "shared_kv_states": keys,
        "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
    }


def _diffusion_drafter(model: Any) -> dict[str, Any]:
    """A draft model's block of tokens over the target's last hidden states, with the cache that tells their number."""
    cache = transformers.cache_utils.DFlashCache(config=model.config)
    cache.set_previous_accepted_tokens(9)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {
        "noise_embeds": random_tensor(BATCH, 4, model.config.hidden_size),
        "context_hidden_states": random_tensor(BATCH, 9, model.config.hidden_size * len(model.config.target_layer_ids)),
        "attention_mask": torch.tensor([[1] * 13, [0] * 3 + [1] * 10]),
        name: cache,
    }


def _codec(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "input_values": random_tensor(BATCH, 1, 3200),
        "input_features": random_tensor(BATCH, 10, config.semantic_model_config.feature_projection_input_dim),
    }


def _molmo2(model: Any) -> dict[str, Any]:
    """Two crops of 16 patches, of which each image token pools four."""
    places = torch.arange(32).view(-1, 4)
    if type(model).__name__ == "Molmo2Adapter":
        width = model.config.hidden_size * len(model.config.vision_feature_layer)
        places[1, 2:] = -1
        return {"image_features": random_tensor(2, 16, width), "pooled_patches_idx": places}
    config = model.config
    return {"pixel_values": random_tensor(2, 16, 3 * config.patch_size**2)}


CALLS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "BltLocalEncoder": _blt_part,
    "BltLocalDecoder": _blt_part,
    "DeepseekOcr2VisionEncoder": lambda m: {
        "inputs_embeds": random_tensor(BATCH, LENGTH, m.config.hidden_size),
        "num_patches": 5,
    },
    "DiaDecoder": lambda m: {
        "input_ids": random_ids(m.config, LENGTH),
        "encoder_hidden_states": random_tensor(BATCH, 11, m.config.cross_hidden_size),
    },
    "Dots3NoteAudioModel": lambda m: {
        "input_features": random_tensor(BATCH, m.config.feature_size, 64),
        "chunk_sample_lengths": torch.tensor([64, 40]) * m.config.hop_length,
    },
    "Inkling2VisionModel": lambda m: {
        "pixel_values": random_tensor(48, *(m.config.patch_size * m.config.spatial_merge_size,) * 2, 3),
        "image_grid_thw": GRID,
    },
    "MimiDecoderModel": lambda m: {"latents": random_tensor(BATCH, m.config.hidden_size, 8)},
    "PocketTTSAudioTokenizerDecoderModel": lambda m: {"latents": random_tensor(BATCH, m.config.hidden_size, 4)},
    "PeAudioVideoEncoder": lambda m: {
        "input_values": random_tensor(BATCH, 1, 8000),
        "pixel_values_videos": random_tensor(BATCH, 3, 3, 64, 64),
    },
    "Emu3VQVAEEncoder": lambda m: {"pixel_values": random_tensor(1, 4, 3, 32, 32)},
    "Emu3VQVAEDecoder": lambda m: dict.fromkeys(
        ("hidden_states", "quant_states"), random_tensor(1, 1, m.conv_in.in_channels, 4, 4)
    ),
    "FunAsrNanoMultiModalProjector": lambda m: {
        "hidden_states": random_tensor(BATCH, LENGTH, m.linear_1.in_features),
        "input_features_mask": torch.tensor([[1] * LENGTH, [1] * 9 + [0] * (LENGTH - 9)]),
    },
    "Sam3GeometryEncoder": _boxes,
    "Sam3LiteTextGeometryEncoder": _boxes,
    "HiggsAudioV2TokenizerModel": lambda m: {"input_values": random_tensor(BATCH, 1, 4800)},
    "MoshiDepthDecoder": lambda m: {
        "input_ids": random_ids(m.config, m.config.num_codebooks),
        "last_hidden_state": random_tensor(BATCH, 1, m.config.input_size),
        "attention_mask": torch.ones(BATCH, m.config.num_codebooks, dtype=torch.long),
        "use_cache": False,
    },
    "MuseGlimmerAssistantModel": _diffusion_drafter,
    "Molmo2Adapter": _molmo2,
    "Molmo2VisionModel": _molmo2,
    "NeuCodecModel": _codec,
    "Xcodec2Model": _codec,
    "Sam3DetrDecoder": _sam3_decoder,
    "Sam3DetrEncoder": _sam3_encoder,
    "Sam3MaskDecoder": _sam3_masks,
    "Sam3LiteTextDetrDecoder": _sam3_decoder,
    "Sam3LiteTextDetrEncoder": _sam3_encoder,
    "Sam3LiteTextMaskDecoder": _sam3_masks,
    **{f"{name}MemoryAttention": _memory for name in ("Sam2Video", "Sam3TrackerVideo", "EdgeTamVideo")},
    **{f"{name}MaskDecoder": _prompted_masks for name in ("Sam2Video", "Sam3TrackerVideo", "EdgeTamVideo")},
    "EdgeTamVideoPerceiverResampler": lambda m: dict.fromkeys(
        ("hidden_states", "positional_encoding"), random_tensor(1, m.hidden_size, 4, 4)
    ),
    "PPOCRV5MobileRecEncoderWithSVTR": lambda m: {
        "hidden_states": random_tensor(BATCH, m.conv_block[0].convolution.in_channels, 1, 8)
    },
    "UnlimitedOcrVisionEncoder": lambda m: {"patch_embeds": random_tensor(BATCH, m.config.hidden_size, 4, 4)},
    "VoxtralRealtimeTextModel": lambda m: {
        "inputs_embeds": random_tensor(BATCH, LENGTH, m.config.hidden_size),
        "t_cond": random_tensor(1, 1, m.config.hidden_size),
        "use_cache": False,
    },
    "Gemma4AssistantForCausalLM": _drafter,
    "Gemma4UnifiedAssistantForCausalLM": _drafter,
}


def candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Keyword arguments worth trying on ``model.forward``, without masks: what is known here, then what is guessed."""
    if type(model).__name__ in CALLS:
        with contextlib.suppress(TypeError, RuntimeError):  # inside other types some parts lack what they have alone
            yield CALLS[type(model).__name__](model)
    if isinstance(model, PreTrainedModel):
        yield from guesses(model)
