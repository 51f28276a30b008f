"""MegaContext: a long history on disk as a tree of gists, and a bounded working context that a model attends to.

The names are loaded when they are first used: the data structures need neither transformers nor a model.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "AllocatorState": "allocator",
    "BudgetError": "working_context",
    "Change": "working_context",
    "CounterfactualScorer": "counterfactual",
    "DualLens": "lensnet",
    "Edits": "working_context",
    "EmbeddingGist": "gistnet",
    "Entry": "working_context",
    "FileStore": "store",
    "FocusAllocator": "allocator",
    "GistMassLens": "lensnet",
    "GraphedLens": "lens_graph",
    "InvariantError": "working_context",
    "KVGist": "gistnet",
    "Lens": "lensnet",
    "LensInput": "lensnet",
    "MegaContext": "attach",
    "MegaContextCache": "cache",
    "MegaContextConfig": "config",
    "MegaContextSession": "session",
    "MegaContextTree": "tree",
    "MemoryStore": "store",
    "OracleLens": "lensnet",
    "RandomLens": "lensnet",
    "RecallIndex": "recall",
    "RecallLens": "lensnet",
    "RecencyLens": "lensnet",
    "Rope": "rope",
    "Store": "store",
    "StoreError": "store",
    "TransformerLens": "lensnet",
    "WorkingContext": "working_context",
    "attach_megacontext": "attach",
    "build_gist": "gistnet",
    "build_lens": "lensnet",
    "detach_megacontext": "attach",
    "load_megacontext": "io",
    "rope_of": "rope",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
