"""Other libraries' function names over our ops: ``flash_attn`` (FlashAttention-2), ``flash_attn_interface`` (-3)."""
