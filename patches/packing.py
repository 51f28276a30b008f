"""Where packing="position_ids" holds: in the attention of the text, and in models without recurrent layers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def is_tower(module: nn.Module, root: PreTrainedModel) -> bool:
    """Whether a module attends to what a composite model hears or sees: documents are packed in its text alone."""
    parts = (getattr(root.config, name, None) for name in ("text_config", "decoder"))
    text = next((part for part in parts if isinstance(part, PreTrainedConfig)), root.config)
    return type(getattr(module, "config", text)) is not type(text) and not getattr(module, "is_causal", False)


def refuse_recurrence(root: PreTrainedModel) -> None:
    """packing: layers with a state, which mc_attention does not run, would carry it from document to document."""
    parts = [m for m in root.modules() if isinstance(m, PreTrainedModel)]
    kinds = {kind for m in parts for kind in getattr(m.config, "layer_types", None) or ()}
    if any(m._is_stateful for m in parts) or kinds & {"linear_attention", "conv"}:
        raise NotImplementedError(
            f'packing="position_ids": {type(root).__name__} has recurrent layers, which would mix the documents. Way '
            "out: leave packing out, and give position_ids and what these layers take (seq_idx, cu_seq_lens_q), but "
            "neither mask nor cache"
        )
