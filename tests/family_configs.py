"""Tiny random models of any model type of the installed transformers: a config is shrunk by the names of its fields."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
import sys
import types
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from family_special import SPECIAL
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 199
LARGEST = 120_000_000  # parameters of a model that is built

# Field names (whole) and what they become; the first that matches decides. Values below the new one are kept.
RULES: tuple[tuple[str, int], ...] = (
    (r"(n_)?vocab_size\w*|\w*_vocab_size|additional_vocab_size", VOCAB),
    (r"\w*num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num", 2),
    (r"\w*attention_heads|n_heads?|num_heads|attention_heads|\w*_n_heads|encoder_heads|num_attn_heads", 4),
    (r"qk_nope_head_dim", 16),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", 24),
    (r"\w*head_dim|d_kv|d_head|kv_channels|dim_head|attention_head_size", 16),
    (r"\w*hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|depth|layers"
     r"|decoder_num_layers|perceiver_depth|resampler_depth|num_blocks|encoder_depth|\w*_num_layers", 2),
    (r"\w*intermediate_size\w*|ffn_dim|\w*_ffn_dim|ffn_hidden_size|mlp_dim|d_ff|n_inner|d_inner"
     r"|\w*feedforward_dim|dim_feedforward", 96),
    (r"hidden_size|\w*_hidden_size|d_model|embed_dim|n_embd|hidden_dim|embedding_size|embed_size|\w*_embed_dim|emb_dim"
     r"|embedding_dim|\w*_hidden_dim|projection_dim|out_hidden_size|dim", 64),
    (r"hidden_size_per_layer_input", 16),
    (r"(kv|q|o)_lora_rank", 24),
    (r"max_\w*position_embeddings|n_positions|max_seq_len|n_ctx|max_sequence_length|seq_length|context_length", 128),
    (r"sliding_window|sliding_window_size|attention_chunk_size|local_attention_window_size", 6),
    (r"num_local_experts|n_routed_experts|num_experts|moe_num_experts|num_moe_experts", 4),
    (r"n_group|topk_group|num_expert_group", 1),
    (r"num_experts_per_tok(en)?|top_k_experts|moe_topk|moe_k", 2),
    (r"num_mel_bins|feature_size", 16),
    (r"index_topk", 8),
    (r"latent_query_num", 4),
    (r"max_source_positions", 20),
    (r"num_queries|num_query_tokens|num_latents|resampler_n_latents", 7),
    (r"num_conv_pos_embeddings", 8),
    (r"num_conv_pos_embedding_groups", 2),
    (r"mamba_d_state|mamba_n_groups|state_size", 8),
    (r"num_codebooks|num_quantizers", 2),
    (r"upsample_groups|adapter_(in|out)_dim|adapter_input_size", 64),
)  # fmt: skip
LAYERS = re.compile(r"\w*hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|depth|layers")


def candidates(model_type: str) -> list[type]:
    """The model classes of a type: the base model first, then others of its modeling file that take its config."""
    config_class = CONFIG_MAPPING[model_type]
    found: list[type] = []
    with contextlib.suppress(KeyError, ValueError, AttributeError, ImportError):
        mapped = AutoModel._model_mapping[config_class]
        found += mapped if isinstance(mapped, tuple) else [mapped]
    package = config_class.__module__.rpartition(".")[0]
    modules = {config_class.__module__.replace(".configuration_", ".modeling_")}
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        own = [
            c
            for c in vars(module).values()
            if inspect.isclass(c)
            and issubclass(c, PreTrainedModel)
            and getattr(c, "config_class", None) is config_class
            and c.__module__.startswith(package)
            and not c.__name__.endswith("PreTrainedModel")
        ]
        found += sorted(own, key=lambda c: (not c.__name__.endswith("Model"), len(c.__name__)))
    return list(dict.fromkeys(found))


def small_value(name: str, value: Any, layers: int) -> Any:
    """The small value of a field, or the value itself."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return min(value, layers if LAYERS.fullmatch(name) else small) if value > 0 else value
    return value


@functools.cache
def modeling_source(config_class: type) -> str:
    """The text of the modeling file that belongs to a config class; empty if there is none."""
    file = Path(inspect.getfile(config_class))
    path = file.with_name(file.name.replace("configuration_", "modeling_"))
    return path.read_text() if path.exists() else ""


def _rope(config: PreTrainedConfig, small: dict[str, Any]) -> None:
    """Scale the sections of multimodal rotary embeddings to the small head dim."""
    given = getattr(config, "rope_parameters", None)
    key = "mrope_section"
    if not isinstance(given, dict) or not given:
        return
    if not given.get(key):
        found = re.search(rf'"{key}", \[(\d+), (\d+), (\d+)\]', modeling_source(type(config)))
        if not found:
            return
        given = {**given, key: [int(n) for n in found.groups()]}
    half = 4 if hasattr(config, "qk_rope_head_dim") else int(8 * given.get("partial_rotary_factor", 1.0))
    sections = [max(1, n * half // sum(given[key])) for n in given[key]]
    sections[-1] += half - sum(sections)
    small["rope_parameters"] = {**given, key: sections}


def held(config: PreTrainedConfig, name: str) -> Any:
    """The value of a config's field; that of the config itself where layers have other ones."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return vars(config).get(name)


def layers_of_every_kind(config: PreTrainedConfig, least: int) -> list[int]:
    """The first layers of every kind that a config's lists of names tell apart, ``least`` of them or more."""
    count = held(config, "num_hidden_layers") or 0
    lists = [v for v in vars(config).values() if isinstance(v, (list, tuple)) and v and len(v) == count]
    kinds = list(zip(*(v for v in lists if all(isinstance(x, str) for x in v)), strict=True))
    first = {kinds.index(kind) for kind in kinds}
    return sorted([*first, *(i for i in range(count) if i not in first)][: max(least, len(first))]) if first else []


def shrink(
    config: PreTrainedConfig, layers: int = 2, only: str | None = None, depth: int = 0, every_kind: bool = True
) -> dict[str, Any]:
    """Keyword arguments for a small config of the same class; ``only``: a pattern of the field names to touch.

    ``every_kind``: keep a layer of every kind, not just the first layers. What ``family_special.py`` says of a type
    holds for it inside other types too.
    """
    small: dict[str, Any] = {}
    special = dict(SPECIAL.get(config.model_type, {}))
    kept = layers_of_every_kind(config, layers) if every_kind and "LAYERS" not in special else []
    below = layers = special.pop("LAYERS", layers)
    layers = len(kept) or layers
    special.pop("STOCK", None)
    tokens = 3
    parameters = inspect.signature(type(config).__init__).parameters
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if isinstance(value, PreTrainedConfig):
            if depth < 3:
                small[name] = shrink(value, below, only, depth + 1, every_kind)
                small[name].setdefault("model_type", value.model_type)
            continue
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        listed = isinstance(value, (list, tuple)) and len(value) == (held(config, "num_hidden_layers") or -1)
        if listed and kept and (default is not None or isinstance(value[0], str)):
            small[name] = [value[i] for i in kept]
            continue
        if default is None:
            continue  # computed from other fields
        if re.search(r"(token_id|token_index|_id|_idx|_index)$", name):
            if isinstance(value, int) and value >= VOCAB:
                tokens += 1
                small[name] = VOCAB - tokens
            continue
        if isinstance(value, list) and name.endswith("token_id") and value:
            small[name] = [2]
            continue
        new = small_value(name, value, layers)
        if "drop" in name and isinstance(value, float):
            new = 0.0
        if name.endswith("num_key_value_heads") and value == held(config, name.replace("key_value", "attention")):
            new = 4  # multi-head attention stays so
        patch = getattr(config, "patch_size", None)
        if name == "image_size" and isinstance(value, int) and isinstance(patch, int) and 4 * patch < value:
            new = 4 * patch
        if name == "head_dim" and value == getattr(config, "qk_rope_head_dim", 0):
            new = 8
        if listed and isinstance(value, list) and default is not None:
            new = value[:layers]
        if (new != value or (depth and isinstance(value, int))) and (only is None or re.fullmatch(only, name)):
            small[name] = new
    if only is None:
        _rope(config, small)
    return merge(small, special)


def merge(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """``extra`` over ``base``, nested."""
    out = dict(base)
    for name, value in extra.items():
        nested = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = merge(out[name], value) if nested else value
    return out


def configs(model_type: str) -> Iterator[PreTrainedConfig | Exception]:
    """Small configs of a type, most promising first; an exception where one cannot be made."""
    config_class = CONFIG_MAPPING[model_type]
    special = SPECIAL.get(model_type, {})
    try:
        stock = config_class()
    except Exception as error:
        try:  # some types have no stock config of their own that is valid
            stock = config_class(**special)
        except Exception:
            yield error
            return
    dims = r".*layers|depth|.*vocab_size|n_layer|max_position_embeddings"
    for only, every_kind in ((None, True), (None, False), (dims, False)):
        try:
            yield config_class(**shrink(stock, only=only, every_kind=every_kind))
        except Exception as error:
            yield error
    if not special:
        yield stock


@contextlib.contextmanager
def without_backends(cls: type) -> Iterator[None]:
    """Builds what asks for a library that is not here: enough to be refused, but not to be run."""
    module = sys.modules.get(cls.__module__)
    if module is None:  # a class that only tells which library is missing
        yield
        return
    nothing = type("Absent", (), {"__new__": lambda *_: nn.Identity()})
    absent = {"requires_backends": lambda *_: None}
    if cls.__name__.startswith("LayoutLMv2"):
        layers = types.SimpleNamespace(FrozenBatchNorm2d=nothing)
        absent |= {"LayoutLMv2VisualBackbone": nothing, "detectron2": types.SimpleNamespace(layers=layers)}
    with contextlib.ExitStack() as stack:
        for name, stub in absent.items():
            stack.enter_context(unittest.mock.patch.object(module, name, stub, create=True))
        yield


def build(cls: type, config: PreTrainedConfig, seed: int = 0) -> nn.Module:
    """A model on stock attention (eager, if it has that), in eval mode, with noise on every parameter.

    ValueError if it is too large.
    """
    config._attn_implementation = SPECIAL.get(config.model_type, {}).get("STOCK", "eager")
    with without_backends(cls), torch.device("meta"), torch.no_grad():
        try:
            size = sum(p.numel() for p in cls(config).parameters())
        except (NotImplementedError, RuntimeError):  # values read while it is built
            size = 0
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} M parameters after shrinking")
    torch.manual_seed(seed)
    with without_backends(cls):
        model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(torch.nan_to_num(parameter, nan=0.0).clamp(-1, 1) + torch.randn_like(parameter) * 0.05)
    return model.float().eval()
