"""Adapters for families whose attention does not go through transformers' interface: a class that replaces another.

`ADAPTED` names the transformers classes by module and name, so that nothing is imported before such a model is met.
An adapter changes ``module.__class__`` alone: weights, attributes and state-dict keys stay, and undoing it is exact.
"""

from __future__ import annotations

from importlib import import_module

ADAPTED: dict[tuple[str, str], str] = {
    ("transformers.models.bloom.modeling_bloom", "BloomAttention"): "bloom",
    ("transformers.models.mpt.modeling_mpt", "MptAttention"): "mpt",
    ("transformers.models.falcon.modeling_falcon", "FalconAttention"): "falcon",
    ("transformers.models.falcon.modeling_falcon", "FalconModel"): "falcon",
    ("transformers.models.gpt_neo.modeling_gpt_neo", "GPTNeoSelfAttention"): "gpt_neo",
}


def adapter_of(cls: type) -> type | None:
    """The class that replaces ``cls`` in a patched model; None if it has no adapter."""
    found = ADAPTED.get((cls.__module__, cls.__name__))
    return None if found is None else getattr(import_module(f".{found}", __name__), "Mc" + cls.__name__)
