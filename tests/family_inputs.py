"""Inputs for any transformers model, guessed from the signature of its forward and the sizes in its config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BATCH, LENGTH = 2, 13


SOUND_MASKS = ("input_features_mask", "feature_attention_mask", "audio_attention_mask", "padding_mask")


def random_tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _size(config: Any, *names: str, default: int = 0) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return default


def random_ids(config: Any, length: int = LENGTH) -> Tensor:
    books = _size(config, "num_channels") if "dia" in config.model_type else 0
    if books:
        return torch.randint(3, 20, (BATCH, length, books), generator=torch.Generator().manual_seed(1))
    vocab = min(_size(config, "vocab_size", default=90), 90)
    return torch.randint(3, max(vocab, 4), (BATCH, length), generator=torch.Generator().manual_seed(1))


def _images(config: Any) -> list[Tensor]:
    for inner in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        if inner is None:
            continue
        size = getattr(inner, "image_size", None) or getattr(inner, "img_size", None)
        if size is not None:
            break
    else:
        size, inner = 64, config
    height, width = (size, size) if isinstance(size, int) else (list(size) + list(size))[:2]
    channels = _size(inner, "num_channels", "in_channels", "in_chans", default=3)
    if height * width > 300_000:
        height = width = 224
    sizes = [(height, width), (64, 64), (224, 224)]
    flat = [random_tensor(BATCH, channels, h, w) for h, w in dict.fromkeys(sizes)]
    if "xclip" in config.model_type:  # frames of a video as a batch
        flat.append(random_tensor(BATCH * _size(inner, "num_frames", default=8), channels, height, width))
    return [*flat, random_tensor(BATCH, _size(inner, "num_frames", default=2), channels, height, width)]


def _patches(config: Any) -> list[Tensor]:
    """Patch rows of towers that take an image grid: [patches, channels * frames * size * size]."""
    size = _size(config, "patch_size", "spatial_patch_size", default=14)
    channels = _size(config, "in_channels", "in_chans", "num_channels", default=3)
    frames = _size(config, "temporal_patch_size", default=1)
    flat = channels * size * size
    return [
        random_tensor(48, flat * frames),
        random_tensor(48, flat * 2),
        random_tensor(48, channels, size, size),
        random_tensor(1, 48, channels, size, size),
    ]


def _sound(config: Any) -> list[Tensor]:
    bins = _bins(config)
    frames = 2 * _size(config, "max_source_positions", default=32)
    found = [random_tensor(BATCH, bins, frames), random_tensor(BATCH, frames, bins)]
    if "spectrogram" in config.model_type:
        found.append(random_tensor(BATCH, _size(config, "max_length"), bins))
    return found if hasattr(config, "max_source_positions") else found[::-1]


GRID = torch.tensor([[1, 4, 8], [1, 4, 4]])


def _plain(model: Any) -> Iterator[dict[str, Any]]:
    """Words, images and sound in the shapes that most models take."""
    config = model.config
    text = getattr(config, "text_config", None) or getattr(config, "decoder", None) or config
    names = inspect.signature(model.forward).parameters
    base: dict[str, Any] = {}
    if "use_cache" in names:
        base["use_cache"] = False
    if "input_ids" in names:
        ids = {**base, "input_ids": random_ids(text)}
        if "decoder_input_ids" in names:
            ids["decoder_input_ids"] = random_ids(text, 9)
            books = _size(getattr(config, "decoder", None), "num_codebooks", default=1)
            ids["decoder_input_ids"] = ids["decoder_input_ids"].repeat(books, 1)
        required = _required(names)
        if "bbox" in names:
            ids["bbox"] = torch.arange(4).mul(10).add(5).expand(BATCH, LENGTH, 4)
        if not required - ids.keys():
            yield ids
        if "pixel_values" in names:
            for pixels in _images(config):
                yield {**ids, "pixel_values": pixels}
        for name in ("input_features", "input_values"):
            if name in names and "input_ids" in ids:
                for sound in _sound(getattr(config, "audio_config", None) or config):
                    yield {**ids, name: sound}
    for name in ("grid_thw", "image_grid_thw"):
        if name in names:
            first = next(iter(names))
            for patches in _patches(config):
                yield {**base, first: patches, name: GRID}
    for name in ("pixel_values", "pixels", "pixel_values_videos"):
        if name in names:
            for pixels in _images(config):
                given = {**base, name: pixels}
                if "decoder_input_ids" in names:
                    given["decoder_input_ids"] = random_ids(text, 9)
                yield given
                if "input_ids" in names:
                    yield {**given, "input_ids": random_ids(text)}
    for name in ("input_features", "input_values", "audio_values"):
        if name in names:
            wave = random_tensor(BATCH, 4000)
            shapes = [*_sound(config), wave, wave[:, None]]
            for sound in shapes if name == "input_features" else [wave, wave[:, None], *_sound(config)]:
                given = {**base, name: sound}
                if "decoder_input_ids" in names:
                    given["decoder_input_ids"] = random_ids(text, 9)
                yield given
    if "inputs_embeds" in names:
        width = _size(config, "hidden_size", "d_model", "embed_dim", default=64)
        yield {**base, "inputs_embeds": random_tensor(BATCH, LENGTH, width)}
        wide = {**base, "inputs_embeds": random_tensor(BATCH, LENGTH, width)}
        if "encoder_hidden_states" in names:
            yield {
                **wide,
                "encoder_hidden_states": random_tensor(BATCH, 11, _size(config, "encoder_hidden_size", default=width)),
            }
    if "hidden_states" in names or "query_embeds" in names:
        width = _size(config, "hidden_size", "d_model", default=64)
        name = "hidden_states" if "hidden_states" in names else "query_embeds"
        other = _size(config, "encoder_hidden_size", default=width)
        yield {**base, name: random_tensor(BATCH, LENGTH, width)}
        yield {
            **base,
            name: random_tensor(BATCH, LENGTH, width),
            "encoder_hidden_states": random_tensor(BATCH, 11, other),
        }


def _extras(model: Any, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``given`` as it is, and with the arguments that only some families ask for."""
    yield given
    config, names = model.config, inspect.signature(model.forward).parameters
    more = dict(given)
    sound = next((given[n] for n in ("input_features", "input_values", "audio_values") if n in given), None)
    pixels = given.get("pixel_values")
    frames = None if sound is None or sound.dim() < 3 else sound.shape[2 if _bins(config) == sound.shape[1] else 1]
    for name in names:
        if name in given:
            continue
        if frames and (name in SOUND_MASKS or (name == "attention_mask" and "input_ids" not in given)):
            more[name] = torch.ones(BATCH, frames, dtype=torch.long)
        elif name == "qformer_input_ids":
            more[name] = random_ids(config, 5)
        elif name == "aspect_ratio_ids":
            more[name] = torch.ones(BATCH, 1, dtype=torch.long)
        elif name == "aspect_ratio_mask":
            more[name] = torch.ones(BATCH, 1, _size(config, "max_num_tiles", default=4), dtype=torch.long)
        elif name == "pixel_attention_mask" and pixels is not None and pixels.dim() == 3:
            more[name] = torch.ones(pixels.shape[:2], dtype=torch.long)
        elif name == "merge_sizes":
            more[name] = torch.tensor([1, 1])
        elif name == "image_embeds_position_mask":
            more[name] = torch.arange(LENGTH).lt(_size(config, "latent_query_num", default=4)).expand(BATCH, -1).long()
        elif name == "past_values":
            length = length_of(config)
            shape = (BATCH, length) if "freq" in names or "forecast_context_len" in names else (BATCH, length, 1)
            more[name] = random_tensor(*shape)
        elif name == "target_sizes":
            more[name] = torch.tensor([[4, 4], [4, 4]])
        elif name == "past_time_features":
            more[name] = torch.zeros(BATCH, length_of(config), 0)
        elif name == "past_observed_mask":
            more[name] = torch.ones_like(more["past_values"])
        elif name == "mask" and "hidden_states" in given:
            more[name] = torch.ones(given["hidden_states"].shape[:2], dtype=torch.bool)
        elif name == "mm_token_type_ids" and "input_ids" in given:
            more[name] = torch.zeros_like(given["input_ids"])
    if len(more) > len(given):
        yield more


def length_of(config: Any) -> int:
    """How many past values a time series model wants."""
    return _size(config, "context_length", default=12) + max(getattr(config, "lags_sequence", None) or [0])


def _bins(config: Any) -> int:
    return _size(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_feat_dim", "n_mels",
                 "feature_projection_input_dim", "input_dim", default=16)  # fmt: skip


def candidates(model: Any) -> Iterator[dict[str, Any]]:
    """Keyword arguments worth trying on ``model.forward``, without masks."""
    for given in _plain(model):
        yield from _extras(model, given)
    config, names = model.config, inspect.signature(model.forward).parameters
    if "past_values" in names:
        yield from list(_extras(model, {}))[1:]
    if "pixel_values" in names and "pixel_position_ids" in names:
        place = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij"), -1).flatten(0, 1)
        size = 3 * _size(config, "patch_size", default=16) ** 2
        yield {"pixel_values": random_tensor(BATCH, 36, size), "pixel_position_ids": place.expand(BATCH, -1, -1)}
    if "query_embeds" in names and "input_ids" in names:
        width = _size(config, "encoder_hidden_size", default=64)
        given = {
            "query_embeds": random_tensor(BATCH, 7, config.hidden_size),
            "encoder_hidden_states": random_tensor(BATCH, 11, width),
        }
        yield {**given, "input_ids": random_ids(config, 5)}
    if "aspect_ratio_ids" in names and "input_ids" not in names:
        tiles, size = _size(config, "max_num_tiles", default=4), _size(config, "image_size")
        yield {
            "pixel_values": random_tensor(BATCH, 1, tiles, 3, size, size),
            "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(BATCH, 1, tiles, dtype=torch.long),
        }
    if "pixel_values" in names and "target_sizes" in names and "input_ids" not in names:
        size = _size(config, "patch_size", default=14)
        yield {"pixel_values": random_tensor(1, 3, size, 32 * size), "target_sizes": torch.tensor([[4, 4], [4, 4]])}
    if "image_attention_mask" in names:
        image = getattr(config, "vision_config", config)
        yield {
            "input_ids": random_ids(config),
            "pixel_values": random_tensor(BATCH, 1, 3, image.image_size, image.image_size),
            "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long),
            "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long),
            "use_cache": False,
        }
    if {"context", "attention_mask"} <= names.keys():
        width = _size(config, "hidden_size", default=64)
        yield {"context": random_tensor(BATCH, 11, width), "attention_mask": torch.ones(BATCH, 11, dtype=torch.long)}
    if "pixel_values" in names and "input_ids" not in names:
        size = _size(config, "patch_size", default=14)
        yield {"pixel_values": random_tensor(BATCH, 16, 3 * size * size)}
        yield {"pixel_values": random_tensor(BATCH, 729, 3 * size * size)}
    if "input_features_mask" in names:
        for width in (7 * _bins(config), _size(config, "input_size", default=80)):
            sound = random_tensor(BATCH, _bins(config), 200)
            yield {"input_features": sound, "input_features_mask": torch.ones(BATCH, 200, dtype=torch.long)}
            features = {"input_features": random_tensor(BATCH, 24, width)}
            yield {**features, "input_features_mask": torch.ones(BATCH, 24, dtype=torch.long)}
    if "mask" in names and "hidden_states" in names:
        frames = random_tensor(BATCH, 64, _size(config, "input_size", default=80))
        yield {"hidden_states": frames, "mask": torch.ones(BATCH, 64, dtype=torch.bool)}
    if "hidden_states" in names and isinstance(getattr(config, "patch_size", None), (list, tuple)):
        yield {"hidden_states": _images(config)[0]}
    if "quantized_code" in names:
        yield {
            "hidden_states": random_tensor(BATCH, LENGTH * config.repeats, config.mel_dim),
            "condition_vector": random_tensor(BATCH, LENGTH, config.mel_dim),
            "speaker_embedding": random_tensor(BATCH, LENGTH * config.repeats, config.enc_emb_dim),
            "quantized_code": random_ids(config),
            "time_step": torch.tensor(0.5),
        }
    if "feature_lens" in names:
        bins = _bins(config)
        yield {"input_features": random_tensor(bins, 240), "feature_lens": torch.tensor([200, 40])}
    if "pixel_values" in names and "spatial_shapes" in names:
        size = 3 * _size(config, "patch_size", default=16) ** 2
        yield {
            "pixel_values": random_tensor(BATCH, 16, size),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
            "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
        }
    if "flattened_patches" in names:
        patches = random_tensor(BATCH, 12, 2 + _size(config, "patch_embed_hidden_size", default=768))
        patches[..., :2] = torch.arange(1, 13)[:, None]
        yield {"flattened_patches": patches}
        if "image_embeds_position_mask" in names:
            yield from list(
                _extras(model, {"flattened_patches": patches, "input_ids": random_ids(config.text_config)})
            )[1:]


def _required(names: Any) -> set[str]:
    empty, some = inspect.Parameter.empty, (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {n for n, p in names.items() if p.default is empty and p.kind not in some}


def masks(model: Any, inputs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], Tensor | None]]:
    """Padded forms of ``inputs``: a name, the inputs, and the rows of the first [B, S] output that count."""
    if type(model).__name__ == "BltGlobalTransformer":  # it makes no masks itself: Blt hands it 4-D ones
        seen = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
        inputs = {**inputs, "attention_mask": torch.where(seen, 0.0, torch.finfo(torch.float32).min)}
        yield "causal", inputs, None
        return
    if type(model).__name__ in ("KyutaiSpeechToTextModel", "MoshiModel"):  # without one 5.17's eager is not causal
        inputs = {**inputs, "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}
    yield "none", inputs, None
    names = inspect.signature(model.forward).parameters
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if ids is None or "attention_mask" not in names:
        return
    right, left, holes, whole = torch.ones(4, *ids.shape[:2], dtype=torch.long)
    right[0, -4:], left[0, :5], holes[0, 1::3], whole[0] = 0, 0, 0, 0
    for name, mask in (("right", right), ("left", left), ("holes", holes), ("whole-row", whole)):
        if name == "left" and type(model).__name__ == "BltModel":
            continue  # its patches pool rows of padding into those that count: stock eager and sdpa differ
        if name == "holes" and type(model).__name__ in ("Glm5NextTextModel", "Glm5NextModel"):
            continue  # the same by its pools of keys; test_families.py compares with sdpa
        yield name, {**inputs, "attention_mask": mask}, mask.bool()
