"""Attention as torch.library ops: FlashAttention forward and backward on the GPU (Triton) and on the CPU."""

if not __name__.startswith("hf_flash_mc."):
    raise ImportError(
        f"this folder is hf_flash_mc.ops, but it was imported as {__name__!r}: a second copy would register every op "
        "twice. Use `import hf_flash_mc.ops`."
    )
