"""What Triton's CPU interpreter (3.6 to 3.9) gets wrong for our kernels, put right; a test harness only.

It stores bfloat16 as its bits in uint16 and computes on the bits in places; and numpy >= 2.4 refuses ``int`` of a
one-element array (triton issue 9171, fixed after 3.6).
"""

from __future__ import annotations

import numpy as np

_COMPARISONS = {np.less, np.greater, np.less_equal, np.greater_equal, np.equal, np.not_equal}
_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift}


def _bits_to_float32(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _float32_to_bits(x):
    """Round to nearest even; NaN stays a quiet NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def apply() -> None:
    """Patch the interpreter once, if triton is installed."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "_hf_flash_mc_patched", False):
        return
    builder._hf_flash_mc_patched = True

    def is_bf16(h):
        return h.dtype.scalar == tl.bfloat16

    def widen(h):
        return handle(_bits_to_float32(h.data), tl.float32) if is_bf16(h) else h

    def narrow(h):
        return handle(_float32_to_bits(h.data), tl.bfloat16)

    dot, cast, fp_to_fp, binary, unary = (
        builder.create_dot, builder.cast_impl, builder.create_fp_to_fp, builder.binary_op, builder.unary_op,
    )  # fmt: skip

    def cast_impl(self, src, dst):
        if is_bf16(src) and dst.scalar != tl.bfloat16:
            return widen(src) if dst.scalar == tl.float32 else cast(self, widen(src), dst)
        if dst.scalar == tl.bfloat16 and not is_bf16(src):
            return narrow(src if src.dtype.scalar == tl.float32 else cast(self, src, tl.float32))
        return cast(self, src, dst)

    def binary_op(self, lhs, rhs, op):
        if not is_bf16(lhs) or op in _BITWISE:
            return binary(self, lhs, rhs, op)
        result = binary(self, widen(lhs), widen(rhs), op)
        return handle(result.data.astype(bool), tl.int1) if op in _COMPARISONS else narrow(result)

    def create_fp_to_fp(self, src, dst, rounding):
        if tl.bfloat16 in (src.dtype.scalar, dst.scalar):
            return cast_impl(self, src, dst)
        return fp_to_fp(self, src, dst, rounding)

    builder.create_dot = lambda self, a, b, d, *rest: dot(self, widen(a), widen(b), d, *rest)
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.binary_op = binary_op
    builder.unary_op = lambda self, a, op: narrow(unary(self, widen(a), op)) if is_bf16(a) else unary(self, a, op)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_lang_tensor
