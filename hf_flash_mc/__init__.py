"""Exact, fast, compilable attention for transformers models: ``model = patch_model(model)``.

The public names are loaded when they are first used, so that this import costs next to nothing: it needs neither
torch nor transformers nor triton, let alone a GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_flash_mc.ops import explain_attention, flash_attention, flash_attention_varlen, merge_attention
    from hf_flash_mc.patches import patch_model, patch_report, patched, unpatch_model

_HOME = {
    "explain_attention": "ops",
    "flash_attention": "ops",
    "flash_attention_varlen": "ops",
    "merge_attention": "ops",
    "patch_model": "patches",
    "patch_report": "patches",
    "patched": "patches",
    "unpatch_model": "patches",
}
_SUBPACKAGES = ("cli", "ops", "patches")

__all__ = [
    "explain_attention",
    "flash_attention",
    "flash_attention_varlen",
    "merge_attention",
    "patch_model",
    "patch_report",
    "patched",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_SUBPACKAGES])
