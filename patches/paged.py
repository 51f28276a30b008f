"""Attention over the paged cache of transformers' continuous batching (generate_batch).

A batch is the new tokens of all requests, one request after the other: [1, H, T, D]. It comes in one of two forms. With
read and write indices the cache copies each request's keys together, and attention is that of packed sequences. With a
block table each request has one new token, which goes into its last block, and attention reads through the table.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_flash_mc.ops import flash_attention_paged, flash_attention_varlen

NOT_READY = (
    "continuous batching: the model was patched without it; unpatch_model(model), then "
    "patch_model(model, continuous_batching=True)"
)
_WAY_OUT = "Way out: generate, one batch after the other"


def is_paged(kwargs: dict[str, Any]) -> bool:
    """Whether the keyword arguments of an attention call come from continuous batching."""
    return kwargs.get("write_index") is not None


def paged_attention(
    module: nn.Module,
    ready: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sliding_window: int | None,
    kwargs: dict[str, Any],
    options: dict[str, Any],
    absent: dict[str, Any],
) -> Tensor:
    """``query: [1, Hq, T, D]``, ``key: [1, Hkv, K, D]``, ``value: [1, Hkv, K, Dv]`` -> ``[1, T, Hq, Dv]``, contiguous.

    ``ready``: whether the model was patched for it. ``kwargs``: what transformers hands to an attention function, the
    lengths included; changed in place. ``options``: softcap, sinks, scale. Rows behind the last request pad the batch;
    what comes out for them is arbitrary.

    Raises:
        NotImplementedError: not ready, an argument of ``absent`` that is not None, a window that the cache was not made
            for, or keys that another layer wrote.
    """
    if not ready:
        raise NotImplementedError(NOT_READY)
    given = [name for name, x in absent.items() if x is not None]
    if given:
        raise NotImplementedError(f"continuous batching with {', '.join(given)}. {_WAY_OUT}")
    layer: Any = module.layer_idx
    kept = window_of(module.config, layer)
    if kept != sliding_window:
        raise NotImplementedError(
            f"continuous batching: the paged cache keeps a window of {kept} for layer {layer}, whose "
            f"attention asks for {sliding_window}. {_WAY_OUT}"
        )
    if kwargs.get("cache") is not None:  # since transformers 5.24 the model has updated it
        key, value = _update_cache(layer, key, value, sliding_window, kwargs)
    if isinstance(kwargs["cu_seq_lens_k"], dict):
        raise NotImplementedError(f"continuous batching: layer {layer} attends to another layer's keys. {_WAY_OUT}")
    options |= {"causal": True, "window": None if sliding_window is None else (sliding_window - 1, 0)}
    read = _from_blocks if kwargs.get("block_table") is not None else _from_copies
    return read(query, key, value, kwargs, options)[None].contiguous()


def window_of(config: Any, layer: int) -> int | None:
    """The window whose keys the paged cache keeps for a layer; None if it keeps all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def _update_cache(
    layer: int, key: Tensor, value: Tensor, sliding_window: int | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """As models do it since transformers 5.24: returns copies of all requests' keys and values, or notes the blocks."""
    cache = kwargs.pop("cache")
    if "kwargs" in inspect.signature(cache.update).parameters:  # since 5.19
        return cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
    kind = "full_attention" if sliding_window is None else "sliding_attention"
    for name, given in (("cu_seq_lens_k", kwargs["cu_seq_lens_k"]), ("max_length_k", kwargs["max_seqlen_k"])):
        kwargs[name] = given[kind] if isinstance(given, dict) else given
    kwargs["max_length_q"] = kwargs["max_seqlen_q"]
    if kwargs.get("block_table") is None:
        key, value = cache.update(key, value, layer, kwargs["read_index"], kwargs["write_index"])  # [K, Hkv, D]
        return key.transpose(0, 1)[None], value.transpose(0, 1)[None]
    if hasattr(cache, "get_cache_for_block_table"):  # 5.18
        group, *caches = cache.get_cache_for_block_table(layer)
    else:
        group, place = cache.layer_index_to_group_indices[layer]
        caches = [x[place].unflatten(0, (-1, cache.block_size)) for x in (cache.key_cache, cache.value_cache)]
    kwargs["block_table"] = kwargs["block_table"][group]
    kwargs["k_cache"], kwargs["v_cache"] = caches
    return key, value


def _from_copies(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """``[T, Hq, Dv]`` of packed sequences."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, D]
    cu_q, cu_k, rows = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], q.shape[0]
    if q.device.type == "cpu" and not torch.compiler.is_compiling():  # where the op refuses rows of no sequence
        q, k, v = q[: cu_q[-1]], k[: cu_k[-1]], v[: cu_k[-1]]
    longest = kwargs["max_length_q"], kwargs["max_length_k"]
    out = flash_attention_varlen(q, k, v, cu_q, cu_k, *longest, **options)
    return F.pad(out, (0, 0, 0, 0, 0, rows - out.shape[0])) if out.shape[0] != rows else out


def _from_blocks(query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """``[T, Hq, Dv]`` through the block table, after the new keys and values have been written; T requests."""
    caches, table, rows = (kwargs["k_cache"], kwargs["v_cache"]), kwargs["block_table"], query.shape[2]
    lengths = kwargs["cu_seq_lens_k"].diff()[:rows]  # new tokens included; 0 for rows that pad the batch
    row = torch.where(lengths > 0, torch.arange(rows, device=lengths.device), 0)  # they write what row 0 writes, again
    last, size = lengths[row].long() - 1, caches[0].shape[1]
    place = table[row, last // size].long(), last % size
    for cache, new in zip(caches, (key, value), strict=True):
        cache.index_put_(place, new[0].transpose(0, 1)[row])
    return flash_attention_paged(query.transpose(0, 2), *caches, table, lengths, **options)[:, :, 0]
