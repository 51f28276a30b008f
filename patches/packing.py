"""Where packing="position_ids" holds: in the attention of the text."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def is_tower(module: nn.Module, root: PreTrainedModel) -> bool:
    """Whether a module attends to what a composite model hears or sees: documents are packed in its text alone."""
    parts = (getattr(root.config, name, None) for name in ("text_config", "decoder"))
    text = next((part for part in parts if isinstance(part, PreTrainedConfig)), root.config)
    return type(getattr(module, "config", text)) is not type(text) and not getattr(module, "is_causal", False)
