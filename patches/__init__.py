"""transformers on hf_flash_mc.ops: patch_model, unpatch_model, patched, patch_report."""

if not __name__.startswith("hf_flash_mc."):
    raise ImportError(
        f"this folder is hf_flash_mc.patches, but it was imported as {__name__!r}: a second copy would have "
        "a state of its own. Use `import hf_flash_mc.patches`."
    )

from .api import PatchReport, patch_model, patch_report, patched, unpatch_model
from .context_parallel import ContextParallel, shard_batch

__all__ = [
    "ContextParallel",
    "PatchReport",
    "patch_model",
    "patch_report",
    "patched",
    "shard_batch",
    "unpatch_model",
]
