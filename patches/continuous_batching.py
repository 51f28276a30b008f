"""patch_model(continuous_batching=True): what has to change in transformers for generate_batch to run on mc_attention.

transformers batches continuously only with sdpa, eager, or attention that has "flash" in its name. As long as there are
models patched so, a few of its functions are wrapped; for any other attention they do what they did. The last model to
be unpatched or deleted puts the originals back.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.utils import logging

from .attention import KEY, mc_attention
from .paged import NOT_READY, is_paged, window_of

# Until transformers 5.24 the models make masks for a paged batch too, unless their attention has no mask function. So
# there the attention goes by this name while a manager holds the model.
MASKLESS = f"{KEY}_paged"
_NAMES = (KEY, MASKLESS)
_wrapped: list[tuple[Any, str, Any, Any]] = []  # owner, name, original, what stands there now
_claims: set[int] = set()
logger = logging.get_logger(__name__)


class Claim:
    """That the functions stay wrapped, as long as this object lives; copies, by copy or by pickle, are new claims.

    ``managers``: those made for its model, which run as they were planned when they were made.
    """

    def __init__(self) -> None:
        _wrap()
        self.managers: weakref.WeakSet[Any] = weakref.WeakSet()
        _claims.add(id(self))
        self._finalizer = weakref.finalize(self, _give_up, id(self))

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Claim, ()

    def end(self, model: Any) -> None:
        """Before the model is unpatched. RuntimeError while it generates."""
        managers = list(self.managers)
        if any(manager.is_running() for manager in managers):
            raise RuntimeError(
                "model: continuous batching is running; leave its context or call manager.stop() before unpatch_model"
            )
        model.destroy_cached_continuous_batching_manager()
        for manager in managers:
            manager.start = manager.warmup = _outlived
        self._finalizer()


def claim(model: PreTrainedModel, adapted: list[Any], skipped: dict[str, str]) -> Claim:
    """The claim of a model that is about to be patched; raises if its generate_batch would not be exact."""
    name = type(model).__name__
    if not hasattr(model, "init_continuous_batching"):
        raise ValueError(f"continuous_batching=True: {name} does not generate; patch the model with a head")
    others = [type(module).__name__ for module, *_ in adapted] + list(skipped.values())
    if others:
        raise NotImplementedError(f"continuous_batching=True: {name} has attention without a paged cache: {others[0]}")
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        raise ValueError(
            f"model: {name} keeps a manager that was planned for its former attention; "
            "call model.destroy_cached_continuous_batching_manager() first"
        )
    return Claim()


def refuse(*args: Any, **kwargs: Any) -> Any:
    """Stands for init_continuous_batching on models that were patched without it."""
    raise NotImplementedError(NOT_READY)


def _outlived(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("this manager was planned for a patched model, which was unpatched since; make a new one")


def _give_up(claim: int) -> None:
    _claims.discard(claim)
    if _claims:
        return
    while _wrapped:
        owner, name, original, ours = _wrapped.pop()
        if inspect.getattr_static(owner, name) is ours:  # not where somebody else has wrapped it since
            setattr(owner, name, original)
    AttentionInterface._global_mapping.pop(MASKLESS, None)


def _wrap() -> None:
    if _wrapped:
        return
    from transformers.generation.continuous_batching import continuous_api, initialization

    flash = "is_flash_attention_requested"
    package = [m for name, m in sys.modules.items() if name.startswith(continuous_api.__name__.rpartition(".")[0])]
    plan: list[tuple[Any, str, Callable[[Any], Any]]] = [(m, flash, _is_flash) for m in package if hasattr(m, flash)]
    plan.append((continuous_api.ContinuousBatchingManager, "switch_to_cb_friendly_attn", _switch))
    plan.append((initialization, "ensure_decode_fast_path_is_available", _decode_path))
    try:
        originals = [inspect.getattr_static(owner, name) for owner, name, _ in plan]  # before anything changes
    except AttributeError as missing:
        raise NotImplementedError(
            f"continuous_batching=True: transformers {transformers.__version__} is not known here ({missing}); "
            "expected 5.17 to 5.24"
        ) from missing
    for (owner, name, wrapper), original in zip(plan, originals, strict=True):
        ours = functools.wraps(original)(wrapper(original))
        setattr(owner, name, ours)
        _wrapped.append((owner, name, original, ours))
    AttentionInterface.register(MASKLESS, _only_paged)


def _is_flash(original: Callable[..., bool]) -> Callable[..., bool]:
    """mc_attention counts as flash: it needs no masks, so CUDA graphs and asynchronous batching are the default."""

    def is_flash_attention_requested(
        config: Any = None, requested_attention_implementation: str | None = None, version: Any = None
    ) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        return name in _NAMES or original(config, requested_attention_implementation, version)

    return is_flash_attention_requested


def _switch(original: Callable[..., None]) -> Callable[..., None]:
    """A manager's choice of attention: none for a model that was patched for it, whose claim learns of the manager."""

    def switch_to_cb_friendly_attn(self: Any, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        name = model.config._attn_implementation
        if name not in _NAMES:
            return original(self, model, *args, **kwargs)
        state = getattr(model, "_mc_state", None)
        if state is None or state.claim is None:
            return refuse()
        state.claim.managers.add(self)
        if name == KEY and not hasattr(masking_utils, "PagedAttentionCache"):  # stop() switches back
            model.set_attn_implementation(MASKLESS)
            self._original_attn_impl = KEY

    return switch_to_cb_friendly_attn


def _decode_path(original: Callable[..., None]) -> Callable[..., None]:
    """Block tables are read on any device; only caches of windows have none.

    Nor do these get CUDA graphs and asynchronous batches: with both, on transformers 5.17, one of two runs on an H100
    gave wrong tokens in models with windows, and right ones without.
    """

    def ensure_decode_fast_path_is_available(config: Any, cb_config: Any, user_requested: bool) -> None:
        if config._attn_implementation not in _NAMES:
            return original(config, cb_config, user_requested)
        if any(window_of(config, layer) is not None for layer in range(config.num_hidden_layers)):
            if user_requested and cb_config.max_blocks_per_request:
                logger.warning("max_blocks_per_request: no block table, since the model has layers of a sliding window")
            cb_config.max_blocks_per_request = 0
            if any(cb_config.cuda_graph_booleans) or cb_config.use_async_batching:
                logger.warning("use_cuda_graph, use_async_batching: off, as the model has layers of a sliding window")
            cb_config.use_cuda_graph, cb_config.use_async_batching = (False, False), False

    return ensure_decode_fast_path_is_available


def _only_paged(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    if not is_paged(kwargs):
        raise RuntimeError(
            "a continuous batching manager holds the model: start() and stop() it before anything else runs, or "
            "unpatch_model(model)"
        )
    return mc_attention(module, query, key, value, attention_mask, **kwargs)
