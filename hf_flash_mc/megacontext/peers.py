"""kvpress as a baseline of `evaluate`: its presses evict keys while a text is read, down to the slots that gists take.

kvpress asks for an older transformers than this package does (below 5.3), so it cannot be one of its extras. It works
with a newer one when its hook is given the two arguments that transformers has renamed or dropped since:

    pip install --no-deps kvpress && pip install "cachetools<6" "fire<0.7" datasets pandas
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .attach import cache_argument

PRESSES = {"SnapKV (kvpress)": "SnapKVPress", "expected attention (kvpress)": "ExpectedAttentionPress"}


def why_not(model: Any) -> str | None:
    """Why the presses cannot run on this model here; None: they can."""
    try:
        from kvpress.presses.base_press import SUPPORTED_MODELS
    except ImportError as error:
        try:
            return f"kvpress {version('kvpress')} cannot be imported ({error})"
        except PackageNotFoundError:
            return "kvpress is not installed"
    if not isinstance(model, SUPPORTED_MODELS):
        return f"kvpress {version('kvpress')} does not support {type(model).__name__}"
    return None


@torch.no_grad()
def press_losses(model: Any, context: Tensor, targets: Tensor, press: str, slots: int, window: int) -> np.ndarray:
    """Losses of the targets [n] with ``slots`` keys of the context [T] kept by a press, float64.

    As with gists, the last token of the context is run after its text was compressed.

    Args:
        press: a value of `PRESSES`. window: last tokens whose queries SnapKV asks, and which it always keeps.
    """
    import kvpress

    read, length = context[None, :-1].to(model.device), len(context) - 1
    ratio = max(0.0, 1 - (slots - 1 + 0.5) / length)  # a press keeps the whole part of length * (1 - ratio)
    options = {"window_size": window} if press == "SnapKVPress" else {}
    chosen = getattr(kvpress, press)(compression_ratio=ratio, **options)
    stock = chosen.forward_hook

    def hook(module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Its own hook, under the names of arguments that it knows."""
        held = kwargs.get("cache", kwargs.get("past_key_values"))
        count = torch.arange(kwargs["hidden_states"].shape[1])
        return stock(module, inputs, {**kwargs, "past_key_values": held, "cache_position": count}, output)

    chosen.forward_hook = hook
    with chosen(model):
        out = model(read, use_cache=True, logits_to_keep=1)
    cache = out.get("cache") or out.past_key_values
    kept = {layer.keys.shape[2] for layer in cache.layers}
    if kept != {slots - 1}:
        raise RuntimeError(f"{press}: expected {slots - 1} keys in every layer, got {sorted(kept)}")
    ids = torch.cat((context[-1:], targets[:-1]))[None].to(model.device)
    places = torch.arange(length, length + len(targets), device=model.device)[None]
    logits = model(ids, position_ids=places, **{cache_argument(model): cache}).logits[0]
    return F.cross_entropy(logits.float().cpu(), targets, reduction="none").double().numpy()
