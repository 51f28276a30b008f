"""Adapters for families whose attention does not go through transformers' interface: a class that replaces another.

`ADAPTED` names the transformers classes by module and name, so that nothing is imported before such a model is met.
An adapter changes ``module.__class__`` alone: weights, attributes and state-dict keys stay, and undoing it is exact.
"""

from __future__ import annotations

import inspect
from importlib import import_module

from torch import nn
from transformers import PreTrainedModel

ADAPTED: dict[tuple[str, str], str] = {
    ("transformers.models.bloom.modeling_bloom", "BloomAttention"): "bloom",
    ("transformers.models.mpt.modeling_mpt", "MptAttention"): "mpt",
    ("transformers.models.mpt.modeling_mpt", "MptModel"): "mpt",
    ("transformers.models.falcon.modeling_falcon", "FalconAttention"): "falcon",
    ("transformers.models.falcon.modeling_falcon", "FalconModel"): "falcon",
    ("transformers.models.gpt_neo.modeling_gpt_neo", "GPTNeoSelfAttention"): "gpt_neo",
    ("transformers.models.gptj.modeling_gptj", "GPTJAttention"): "gptj",
    ("transformers.models.codegen.modeling_codegen", "CodeGenAttention"): "gptj",
}


def uses_interface(cls: type) -> bool:
    """Whether a module class fetches its attention function from transformers' registry, read from its bytecode.

    A method that a subclass overrides without calling it counts no more.
    """
    overridden: set[str] = set()
    calls_bases = {"super", *(base.__name__ for base in cls.__mro__)}
    for base in cls.__mro__:
        if base is nn.Module or base is PreTrainedModel:
            break
        for name, member in vars(base).items():
            code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
            if code is None or name in overridden:
                continue
            if "ALL_ATTENTION_FUNCTIONS" in code.co_names:
                return True
            if calls_bases.isdisjoint(code.co_names):
                overridden.add(name)
    return False


def adapter_of(cls: type) -> type | None:
    """The class that replaces ``cls`` in a patched model; None if it has no adapter, or needs none in this version."""
    found = ADAPTED.get((cls.__module__, cls.__name__))
    if found is None or uses_interface(cls):
        return None
    return getattr(import_module(f".{found}", __name__), "Mc" + cls.__name__)
