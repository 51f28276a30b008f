"""A patched model whose sequence is spread over ranks: what it takes, its attention, and shards of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_flash_mc.ops import ring_attention, shard_sequence, ulysses_attention
from hf_flash_mc.ops.sequence import CHUNKS, Place, all_gather, join, place_of

from .masks import document_bounds

METHODS = {"ring": ring_attention, "ulysses": ulysses_attention}

# Decoders in which tokens meet in attention only, and in which `sliding_window` says all that a mask would beyond
# causal; each is compared with one process by a test.
MODEL_TYPES = frozenset({
    "cohere2", "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite",
    "llama", "mistral", "mixtral", "olmo2", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
})  # fmt: skip
_LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary frequencies from the longest position that a rank sees


@dataclass(frozen=True)
class ContextParallel:
    """How the sequence of a patched model is spread over ranks.

    ``group``: a 1-D DeviceMesh, a ProcessGroup, or None for all ranks; kept as this rank's place in it. ``method``:
    "ring" (any number of heads, keys and values travel) or "ulysses" (the ranks share out the heads). ``layout``: how
    ``shard_batch`` cuts, "zigzag" (balanced under a causal mask) or "contiguous" (better for sliding windows).
    """

    group: Any = None
    method: str = "ring"
    layout: str = "zigzag"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {self.method!r}")
        object.__setattr__(self, "group", place_of(self.group, self.layout))

    @property
    def place(self) -> Place:
        return self.group


def read_context_parallel(given: Any) -> ContextParallel:
    """What patch_model and shard_batch take: a ContextParallel, or a mesh or group for a ring."""
    return given if isinstance(given, ContextParallel) else ContextParallel(place_of(given, name="context_parallel"))


# ---- patching --------------------------------------------------------------------------------------------------------


def check_spreadable(root: PreTrainedModel) -> None:
    """Raise for a model that would be wrong with its sequence spread over ranks."""
    name, kind = type(root).__name__, getattr(root.config, "model_type", "")
    if kind not in MODEL_TYPES:
        raise NotImplementedError(
            f"context_parallel: {name} (model type {kind!r}) is not among the families that are tested with a sequence "
            f"spread over ranks: {', '.join(sorted(MODEL_TYPES))}"
        )
    rope = repr(getattr(root.config, "rope_parameters", None))
    for type_ in _LENGTH_DEPENDENT:
        if f"'{type_}'" in rope:
            raise NotImplementedError(
                f"context_parallel: {name}'s rotary positions are of type {type_!r}, whose frequencies follow the "
                "longest position, which differs between ranks"
            )


def add_hooks(root: PreTrainedModel, how: ContextParallel, packing: str | None) -> list[RemovableHandle]:
    """Hooks that check, and complete, what the model is called with."""
    inner = root.base_model  # which user code may call by itself
    takes = inspect.signature(type(inner).forward).parameters
    check = partial(_check_inputs, how, packing, "use_cache" in takes)
    return [
        root.register_forward_pre_hook(_check_labels, with_kwargs=True),
        inner.register_forward_pre_hook(check, with_kwargs=True),
    ]


def _check_labels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
        raise ValueError(
            "labels: the last row of a shard predicts the first token of another rank's, so the model cannot shift "
            "them; pass shift_labels too, as hf_flash_mc.shard_batch(batch, ...) makes them"
        )


def _check_inputs(
    how: ContextParallel, packing: str | None, cached: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > 1:
        raise TypeError("context_parallel: pass everything but input_ids by keyword")
    rows = args[0] if args else kwargs.get("input_ids")
    rows = kwargs.get("inputs_embeds") if rows is None else rows
    assert rows is not None, "input_ids or inputs_embeds"  # the model says so itself
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise NotImplementedError("past_key_values, use_cache: no caches with context_parallel; it is for training")
    if cached:
        kwargs["use_cache"] = False
    if kwargs.get("attention_mask") is not None:
        _check_unpadded(kwargs["attention_mask"])
        kwargs["attention_mask"] = None
    expected = how.place.positions(rows.shape[1], rows.device)[None]
    given = kwargs.get("position_ids")
    if given is None:
        kwargs["position_ids"] = expected
    elif packing is None:
        _check_positions(given, expected)
    return args, kwargs


def _check_unpadded(mask: Any) -> None:
    way_out = (
        "padding cannot be expressed with context_parallel. Pad at the end and leave attention_mask out: under a "
        "causal mask no other row sees padding, and labels of -100 keep it out of the loss"
    )
    if torch.compiler.is_compiling():
        raise NotImplementedError(f"attention_mask: its values are not known under torch.compile, and {way_out}")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(mask.all()):
        raise NotImplementedError(f"attention_mask: {way_out}")


def _check_positions(given: Tensor, expected: Tensor) -> None:
    text = (
        "position_ids: expected those of this rank's shard, as hf_flash_mc.shard_batch(batch, ...) makes them; "
        'documents packed into a row need patch_model(..., packing="position_ids")'
    )
    if given.dim() != 2 or given.shape[-1] != expected.shape[-1]:
        raise ValueError(f"{text}; got shape {tuple(given.shape)}")
    right = (given == expected).all()
    if torch.compiler.is_compiling() or given.device.type != "cpu":
        torch._assert_async(right, text)  # on the device: reading would wait for it
    elif not bool(right):
        raise ValueError(text)


# ---- attention -------------------------------------------------------------------------------------------------------


def spread_attention(
    how: ContextParallel,
    packing: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    causal: bool,
    sliding_window: int | None,
    options: dict[str, Any],
    refused: dict[str, Any],
) -> Tensor:
    """mc_attention's result ``[B, Hq, S_local, Dv]`` on a shard; visibility comes from arguments, not from the mask.

    Masks are made for a shard as if it were a sequence of its own, so one that holds more than that cannot be used.
    """
    given = [name for name, x in refused.items() if x is not None]
    if given:
        raise NotImplementedError(f"{', '.join(given)}: not with context_parallel")
    plain = isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.int32 and attention_mask.shape[-1] == 2
    if not plain and attention_mask is not None:
        raise NotImplementedError("attention_mask: dense masks and padding cannot be expressed with context_parallel")
    if query.shape[2] != key.shape[2]:
        raise NotImplementedError(f"{query.shape[2]} queries over {key.shape[2]} keys: no caches with context_parallel")
    ranges = None if packing is None else _document_ranges(how.place, position_ids, query.shape[0])
    window = None if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
    place = how.place
    return METHODS[how.method](
        query, key, value, group=place, layout=place.layout, causal=causal, window=window, key_ranges=ranges, **options
    )


def _document_ranges(place: Place, position_ids: Tensor | None, batch: int) -> Tensor:
    """Key ranges ``[B, 1, S_local, 2]`` of documents that begin where the ids of the whole row do not go up by one."""
    if position_ids is None or position_ids.dim() != 2:
        raise NotImplementedError('packing="position_ids": the attention needs position_ids [B, S_local]')
    ids = join(all_gather(position_ids.expand(batch, -1), place).movedim(0, 1), place, 1)  # [B, S]
    documents = (torch.diff(ids, prepend=ids[:, :1] - 1) != 1).long().cumsum(-1)
    ranges = torch.stack(document_bounds(documents), -1).to(torch.int32)
    return shard_sequence(ranges, place, layout=place.layout)[:, None]


# ---- batches ---------------------------------------------------------------------------------------------------------


def shard_batch(batch: Mapping[str, Any], context_parallel: Any = None) -> dict[str, Any]:
    """This rank's shard of a batch that every rank of the group has whole, for a model patched the same way.

    Args:
        batch: ``input_ids`` or ``inputs_embeds`` ``[B, S, ...]``, S divisible by the ranks (zigzag: by twice their
            number); optionally ``labels [B, S]``, ``position_ids [B or 1, S]``, an ``attention_mask`` of ones, and
            whatever else. Tensors of size S in their second dimension are cut, others stay.
        context_parallel: as given to ``patch_model``.

    Returns:
        The batch with ``position_ids`` (those of the whole sequence), without the mask; with labels also
        ``shift_labels``, shifted before they were cut, and ``num_items_in_batch``, the number of labels (or the one
        given) over the number of ranks: the mean over the ranks of losses, and of gradients, as DDP and FSDP take it,
        is that of one process. Losses that are no mean over tokens (auxiliary losses of routers) are a rank's own.

    Raises:
        ValueError: a length that does not divide. NotImplementedError: padding in the mask. TypeError: no such batch.
    """
    how = read_context_parallel(context_parallel)
    given = batch
    place, batch = how.place, dict(given) if hasattr(given, "keys") else {}
    rows = batch["input_ids"] if batch.get("input_ids") is not None else batch.get("inputs_embeds")
    if rows is None:
        got = f"one of {', '.join(map(str, batch))}" if batch else type(given).__name__
        raise TypeError(f"batch: expected a dict with input_ids or inputs_embeds, got {got}")
    length = rows.shape[1]
    if batch.get("attention_mask") is not None:
        _check_unpadded(batch["attention_mask"])
    batch.pop("attention_mask", None)
    if length % (place.size * CHUNKS[place.layout]):
        raise ValueError(
            f"batch: expected a length divisible by {place.size * CHUNKS[place.layout]} ({place.size} ranks, layout "
            f"{place.layout!r}), got {length}; pad at the end, with labels of -100"
        )
    if batch.get("position_ids") is None:
        batch["position_ids"] = torch.arange(length, device=rows.device)[None]
    labels = batch.get("labels")
    if labels is not None:
        if batch.get("shift_labels") is None:
            batch["shift_labels"] = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        items = batch.get("num_items_in_batch")
        items = (batch["shift_labels"] != -100).sum() if items is None else items
        batch["num_items_in_batch"] = items / place.size
    for name, x in batch.items():
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == length:
            batch[name] = shard_sequence(x, place, layout=place.layout)
    return batch
