"""Attention as torch.library ops: FlashAttention forward and backward on the GPU (Triton) and on the CPU."""

if not __name__.startswith("hf_flash_mc."):
    raise ImportError(
        f"this folder is hf_flash_mc.ops, but it was imported as {__name__!r}: a second copy would register every op "
        "twice. Use `import hf_flash_mc.ops`."
    )

from .api import Explanation, explain_attention, flash_attention, flash_attention_paged, flash_attention_varlen
from .block_mask import BlockLists, evaluate_block_mask
from .distributed import merge_attention, ring_attention, ulysses_attention
from .library import sac_save_list
from .sequence import shard_sequence, unshard_sequence
from .shared_prefix import shared_prefix_attention

__all__ = [
    "BlockLists",
    "Explanation",
    "evaluate_block_mask",
    "explain_attention",
    "flash_attention",
    "flash_attention_paged",
    "flash_attention_varlen",
    "merge_attention",
    "ring_attention",
    "sac_save_list",
    "shard_sequence",
    "shared_prefix_attention",
    "ulysses_attention",
    "unshard_sequence",
]
