"""Exact, fast, compilable attention for transformers models: ``model = patch_model(model)``, and memory for them.

The public names are loaded when they are first used, so that this import costs next to nothing: it needs neither
torch nor transformers nor triton, let alone a GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_flash_mc.megacontext.attach import attach_megacontext, detach_megacontext
    from hf_flash_mc.megacontext.config import MegaContextConfig
    from hf_flash_mc.megacontext.io import load_megacontext
    from hf_flash_mc.ops import (
        explain_attention,
        flash_attention,
        flash_attention_paged,
        flash_attention_varlen,
        merge_attention,
        ring_attention,
        shard_sequence,
        ulysses_attention,
        unshard_sequence,
    )
    from hf_flash_mc.patches import ContextParallel, patch_model, patch_report, patched, shard_batch, unpatch_model

_SUBPACKAGES = ("cli", "megacontext", "ops", "patches")
# where the names of __all__ live that are not in ops
_HOME = dict.fromkeys(
    ("ContextParallel", "patch_model", "patch_report", "patched", "shard_batch", "unpatch_model"), "patches"
) | dict.fromkeys(
    ("MegaContextConfig", "attach_megacontext", "detach_megacontext", "load_megacontext"), "megacontext"
)  # fmt: skip

__all__ = [
    "ContextParallel",
    "MegaContextConfig",
    "attach_megacontext",
    "detach_megacontext",
    "explain_attention",
    "flash_attention",
    "flash_attention_paged",
    "flash_attention_varlen",
    "load_megacontext",
    "merge_attention",
    "patch_model",
    "patch_report",
    "patched",
    "ring_attention",
    "shard_batch",
    "shard_sequence",
    "ulysses_attention",
    "unpatch_model",
    "unshard_sequence",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'ops')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_SUBPACKAGES])
