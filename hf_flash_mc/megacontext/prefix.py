"""Models over keys that were made before: a shared prefix that is read once, and reads that are recorded.

Everything here is differentiable in the keys, values and log weights that are given, and leaves the model as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_flash_mc.ops import flash_attention, shared_prefix_attention
from hf_flash_mc.patches.attention import KEY

from .attach import cache_argument, layer_windows


@dataclass
class Keys:
    """Keys and values of every layer, in any order.

    keys, values: for each of L layers ``[N, Hkv, n, D]``, keys rotated to where they stand (a tensor
    ``[L, N, Hkv, n, D]``, or a list). log_weight: for each layer ``[N or 1, Hkv, n]``, -inf removes a key; None: 0.
    token: int64 ``[N or 1, n]`` on the CPU, the token that a key stands for; needed where layers have sliding windows.
    """

    keys: Sequence[Tensor] | Tensor
    values: Sequence[Tensor] | Tensor
    log_weight: Sequence[Tensor] | Tensor | None = None
    token: Tensor | None = None


class _Layer(CacheLayerMixin):
    """One layer of a cache that answers `mc_attention` itself; see ``attend``."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: Any, index: int, window: int | None) -> None:
        super().__init__()
        self.cache, self.index, self.window = cache, index, window
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: there is nothing to allocate."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys that the new rows have of their own, ``[N, Hkv, E, D]``, marked with this layer."""
        keys, values = self.cache.own_keys(self.index, key_states, value_states)
        keys = keys.view_as(keys)  # a tensor of its own: the mark must not outlive this call on one that is kept
        keys.slots = self
        return keys, values

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        """`mc_attention` hands its call over: query ``[N, Hq, S, D]`` -> ``[N, Hq, S, D]``."""
        if mask is not None and mask.shape[-1] != 2:
            raise NotImplementedError(
                "attention_mask: prefixes take no padding and no mask of their user; give no mask, and rows of one "
                "length"
            )
        self.cache.reached += 1
        return self.cache.attend(self.index, self.window, query, key, value, options)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class PrefixCache(Cache):
    """Keys that V variants of each of B prefixes share, and keys of their own; new rows attend to both.

    Args:
        shared: N = B prefixes, read once for all variants of each.
        own: N = B * V variants, beside each other for each prefix, or None; seen by all of their rows.
        tokens: int64 ``[S]`` on the CPU, the tokens that the new rows stand for; for sliding windows.
        windows: of the model's layers (`layer_windows`).
    """

    def __init__(self, shared: Keys, own: Keys | None, tokens: Tensor, windows: list[int | None]) -> None:
        super().__init__(layers=[_Layer(self, index, window) for index, window in enumerate(windows)])
        self.shared, self.own, self.tokens, self.reached = shared, own, tokens, 0
        self._masks: dict[int, tuple[Tensor | None, Tensor | None]] = {}

    def own_keys(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the variants have of their own, before the new rows."""
        if self.own is None:
            return keys, values
        held = self.own.keys[layer].to(keys), self.own.values[layer].to(values)
        return torch.cat((held[0], keys), 2), torch.cat((held[1], values), 2)

    def attend(
        self, layer: int, window: int | None, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Rows [N, Hq, S, D] over prefix and own keys."""
        if options.pop("dropout_p", 0.0):
            raise NotImplementedError("attention_dropout: expected 0 over a shared prefix; call model.eval()")
        shared, own, rows = self.shared, self.own, query.shape[2]
        weight = None
        if own is not None and own.log_weight is not None:
            weight = own.log_weight[layer]
            weight = torch.cat((weight, weight.new_zeros(*weight.shape[:2], rows)), 2)
        mask = prefix_mask = None
        if window is not None:
            prefix_mask, mask = self._window_masks(window, query.device)
            if prefix_mask is not None and prefix_mask.shape[0] > 1:  # of each prefix: for all of its variants
                prefix_mask = prefix_mask.repeat_interleave(query.shape[0] // prefix_mask.shape[0], 0)
        return shared_prefix_attention(
            query,
            key,
            value,
            shared.keys[layer],
            shared.values[layer],
            causal=True,
            mask=mask,
            prefix_mask=prefix_mask,
            key_log_weight=weight,
            prefix_log_weight=None if shared.log_weight is None else shared.log_weight[layer],
            **options,
        )

    def _window_masks(self, window: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """What rows see of the prefix and of their own keys, bool [N or 1, 1, S, n]; None where nothing is cut.

        Keys are in no order, so a window is a mask here; it is made once for all layers.
        """
        if window not in self._masks:
            parts = [self.shared] if self.own is None else [self.shared, self.own]
            if any(part.token is None for part in parts):
                raise ValueError("token: this model has sliding windows; give the tokens that keys stand for")
            rows = self.tokens
            shared = rows[None, :, None] - self.shared.token[:, None, :] < window  # type: ignore[index]
            own = rows[None, :, None] - rows[None, None, :] < window
            if self.own is not None:
                before = rows[None, :, None] - self.own.token[:, None, :] < window  # type: ignore[index]
                own = torch.cat((before, own.expand(len(before), -1, -1)), 2)
            self._masks[window] = tuple(  # type: ignore[assignment]
                None if bool(seen.all()) else seen[:, None].to(device) for seen in (shared, own)
            )
        return self._masks[window]


class RecordingCache(Cache):
    """A plain causal forward whose keys, values and last queries are kept, as they are.

    Attributes:
        keys, values: for each layer ``[B, Hkv, T, D]``; queries: for each ``[B, Hq, observe, D]``, the last ones.
    """

    def __init__(self, windows: list[int | None], observe: int) -> None:
        super().__init__(layers=[_Layer(self, index, window) for index, window in enumerate(windows)])
        self.observe, self.reached = observe, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.queries: list[Tensor] = []

    def own_keys(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The new keys, kept."""
        self.keys.append(keys)
        self.values.append(values)
        return keys, values

    def attend(
        self, layer: int, window: int | None, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Causal attention, with the layer's window."""
        self.queries.append(query[:, :, query.shape[2] - self.observe :])
        reach = None if window is None else (window - 1, 0)
        return flash_attention(query, key, value, causal=True, window=reach, **options)


def run(model: Any, cache: Any, position_ids: Tensor, keep: int, **inputs: Tensor) -> Tensor:
    """One forward over a cache of this module; logits of the last ``keep`` rows, ``[N, keep, V]``.

    Args:
        position_ids: ``[N or 1, S]``. inputs: ``input_ids`` [N, S] or ``inputs_embeds`` [N, S, d].

    Raises:
        RuntimeError: the model is not patched, or replaces keys between cache and attention.
    """
    if model.config._attn_implementation != KEY:
        raise RuntimeError("model: expected one that runs mc_attention; call patch_model(model) or attach_megacontext")
    rows = next(iter(inputs.values())).shape[1]
    out = model(
        **inputs,
        position_ids=position_ids,
        # four dimensions: passed on as it is, and `attend` knows what is seen
        attention_mask=torch.zeros(1, 1, rows, 2, dtype=torch.int32, device=position_ids.device),
        use_cache=True,
        logits_to_keep=keep,
        **{cache_argument(model): cache},
    )
    if cache.reached != len(cache.layers):
        raise RuntimeError(
            f"{cache.reached} of {len(cache.layers)} layers attended to the keys that were given: this model replaces "
            "keys between cache and attention, and would have ignored them. Please report it"
        )
    return out.logits[:, out.logits.shape[1] - keep :]


def read(model: Any, input_ids: Tensor, observe: int, keep: int) -> tuple[RecordingCache, Tensor]:
    """A plain forward over ``input_ids [B, T]``: its keys, values and last queries, and the last logits."""
    cache = RecordingCache(layer_windows(model), observe)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return cache, run(model, cache, positions, keep, input_ids=input_ids)
