"""One set of names for Gluon's Hopper functions, whose names move between Triton 3.6 and 3.9."""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = [
    "bar_arrive", "bar_sync", "cta_barrier", "fence_async_shared", "gl", "gluon", "mbarrier", "tma_load",
    "tma_reduce_add", "tma_store", "tma_store_wait", "warpgroup_mma", "warpgroup_mma_wait",
]  # fmt: skip

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
tma_store_wait = tma.store_wait
cta_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@builtin
def _tma_reduce_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """Add a tile of shared memory to global memory. Triton 3.6 has the operation but no name for it."""
    from triton._C.libtriton import ir

    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


tma_reduce_add = getattr(tma, "async_atomic_add", None) or _tma_reduce_add


@gluon.constexpr_function
def _bar_assembly(op, threads):
    return "{ bar." + op + " $1, " + str(threads) + "; mov.u32 $0, $1; }"


@gluon.jit
def bar_sync(name, THREADS: gl.constexpr):
    """Wait at named barrier ``name`` until THREADS threads have come.

    Triton's own barriers use the low numbers (up to 3 with three warpgroups), so ours start at 4. Unlike arriving at an
    mbarrier, which Triton puts a barrier of all the partition's warps before, arriving at one of these costs nothing.
    """
    code: gl.constexpr = _bar_assembly("sync", THREADS)
    gl.inline_asm_elementwise(code, "=r,r", [gl.to_tensor(name)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def bar_arrive(name, THREADS: gl.constexpr):
    """Arrive at a named barrier without waiting."""
    code: gl.constexpr = _bar_assembly("arrive", THREADS)
    gl.inline_asm_elementwise(code, "=r,r", [gl.to_tensor(name)], dtype=gl.int32, is_pure=False, pack=1)
