"""numpy in place of ``triton.language``, Gluon's language and Hopper's functions, for gluon_emulator.py."""

from __future__ import annotations

import math
import threading
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from gluon_emulator import (
    FLOATS,
    INTS,
    Allocation,
    Array,
    Barrier,
    Barriers,
    Descriptor,
    Emulator,
    EmulatorError,
    InFlight,
    Pointer,
    Shared,
    array,
)

DTYPES = ("float16", "bfloat16", "float32", "int1", "int32", "int64", "uint32", "uint64")
MASK32 = np.uint64(0xFFFFFFFF)


def where(condition: Any, a: Any, b: Any) -> Array:
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.kind == "f" or b.dtype.kind == "f":
        a, b = a.astype(np.float32), b.astype(np.float32)
    elif np.uint32 in (a.dtype, b.dtype):
        a, b = a.astype(np.uint32), b.astype(np.uint32)
    return array(np.where(condition, a, b))


def filled(shape: Any, value: Any, dtype: Any, layout: Any = None) -> Array:
    return array(np.full(tuple(shape), value, np.float32 if dtype.name in FLOATS else INTS[dtype.name]))


def load(pointer: Pointer, mask: Any = None, other: Any = 0, **_: Any) -> Array:
    shape = np.broadcast_shapes(pointer.offset.shape, () if mask is None else np.shape(mask))
    offset, mask = pointer.at(mask, shape)
    out = np.full(shape, other, pointer.memory.dtype)
    out[mask] = pointer.memory[offset[mask]]
    return array(out)


def store(pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> None:
    shape = np.broadcast_shapes(pointer.offset.shape, np.shape(value), () if mask is None else np.shape(mask))
    offset, mask = pointer.at(mask, shape)
    pointer.memory[offset[mask]] = np.broadcast_to(np.asarray(value), shape)[mask]


def philox(seed: Any, c0: Any, c1: Any, c2: Any, c3: Any, n_rounds: int = 10) -> tuple[Array, ...]:
    """Philox4x32 (Salmon et al. 2011) with ``seed`` as its key."""
    c = [np.asarray(x).astype(np.uint64) & MASK32 for x in (c0, c1, c2, c3)]
    key = int(np.asarray(seed)) % 2**64
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(n_rounds):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high_a, high_b = a >> np.uint64(32), b >> np.uint64(32)
        c = [high_b ^ c[1] ^ np.uint64(k0), b & MASK32, high_a ^ c[3] ^ np.uint64(k1), a & MASK32]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(array(x.astype(np.uint32)) for x in c)


def tensor_range(*bounds: Any) -> Iterator[Array]:
    """A loop whose variable is a tensor, as in a jitted function."""
    return (array(i) for i in range(*(int(b) for b in bounds)))


def quiet(function: Any) -> Any:
    """Without numpy's warnings: infinities are everyday here."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return array(function(*args, **kwargs))

    return call


def reduction(function: Any) -> Any:
    return lambda x, axis=None, **_: array(function(np.asarray(x), axis))


def language(emulator: Emulator) -> types.SimpleNamespace:
    """What ``gl`` and ``tl`` are inside the emulator."""
    exp2, absolute = quiet(np.exp2), quiet(np.abs)
    return types.SimpleNamespace(
        **{name: getattr(tl, name) for name in DTYPES},
        constexpr=lambda x: x,
        program_id=lambda axis: array(emulator.cta.pid[axis]),
        num_programs=lambda axis: array(emulator.grid[axis]),
        cdiv=lambda a, b: -(-int(a) // int(b)) if not isinstance(a, Array) else (a + b - 1) // b,
        minimum=quiet(np.minimum),
        maximum=quiet(np.maximum),
        abs=absolute,
        exp2=exp2,
        log2=quiet(np.log2),
        math=types.SimpleNamespace(exp2=exp2, log2=quiet(np.log2), abs=absolute),
        fma=lambda a, b, c: a * b + c,
        where=where,
        arange=lambda a, b, layout=None: array(np.arange(a, b)),
        full=filled,
        zeros=lambda shape, dtype, layout=None: filled(shape, 0, dtype),
        join=lambda a, b: array(np.stack([a, b], -1)),
        zeros_like=lambda x: array(np.zeros_like(np.asarray(x))),
        max=reduction(np.max),
        min=reduction(np.min),
        sum=reduction(np.sum),
        convert_layout=lambda x, layout, **_: x,
        to_tensor=array,
        static_range=range,
        range=lambda *bounds, **_: tensor_range(*bounds),
        static_assert=lambda *_: None,
        assume=lambda *_: None,
        multiple_of=lambda x, *_: x,
        load=load,
        store=store,
        atomic_add=lambda pointer, value, **kw: atomic_add(emulator, pointer, value, **kw),
        philox=philox,
        NVMMADistributedLayout=lambda *_, **__: None,
        DotOperandLayout=lambda *_, **__: None,
        SliceLayout=lambda *_, **__: None,
        BlockedLayout=lambda *_, **__: None,
        SwizzledSharedLayout=lambda *_, **__: None,
        NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda *_, **__: None),
        allocate_shared_memory=lambda dtype, shape, layout=None: allocate(emulator, dtype, shape),
        warp_specialize=emulator.partitions,
        inline_asm_elementwise=emulator.assembly,
        barrier=lambda: None,
        thread_barrier=lambda: None,
    )


def atomic_add(emulator: Emulator, pointer: Pointer, value: Any, mask: Any = None, **_: Any) -> Array:
    with emulator.cta.changed:
        old = load(pointer, mask)
        store(pointer, old + value, mask)
    return old


def allocate(emulator: Emulator, dtype: Any, shape: Any) -> Any:
    """Shared memory, full of NaN; int64 is for mbarriers."""
    cta = emulator.cta
    if dtype.name == "int64":
        made = Barriers(cta, math.prod(shape))
        cta.barriers += made.all
        return made if len(shape) > 1 else made.all[0]
    root = Allocation()
    cta.allocations.append(root)
    if dtype.name in FLOATS:
        return Shared(np.full(shape, np.nan, np.float32), dtype, root)
    return Shared(np.full(shape, -(2**30), INTS[dtype.name]), dtype, root)


def substitutes(emulator: Emulator) -> dict[str, Any]:
    """What replaces the names of a kernel's module."""

    def tma_load(desc: Descriptor, coords: Any, barrier: Barrier, to: Shared, pred: Any = True) -> None:
        if not pred:
            return
        emulator.pause()
        block = desc.read(coords)
        if to.values.size != block.size:
            raise EmulatorError(f"bulk load of {desc.block_shape} into shared memory {to.shape}")
        to.values[...] = block.reshape(to.shape)
        barrier.complete(desc.nbytes_per_cta)

    def queue(name: str) -> list[Any]:
        local = emulator.cta.local
        if not hasattr(local, name):
            setattr(local, name, [])
        return getattr(local, name)

    def tma_store(desc: Descriptor, coords: Any, source: Shared, add: bool = False) -> None:
        source.check_fenced("a bulk store")
        where_to = [int(c) for c in coords]
        queue("stores").append(lambda: desc.write(where_to, source.values, add))

    def tma_store_wait(pending: int = 0, **_: Any) -> None:
        waiting = queue("stores")
        while len(waiting) > pending:
            with emulator.cta.changed:
                waiting.pop(0)()

    def product(a: Any, b: Shared, acc: Any, use_acc: Any = True, is_async: bool = False, **_: Any) -> InFlight | Array:
        for operand in (a, b):
            if isinstance(operand, Shared):
                operand.check_fenced("a matrix product")
        if isinstance(a, InFlight):
            raise EmulatorError("a matrix product's operand is the unfinished result of another")

        def compute() -> Array:
            left = a.values if isinstance(a, Shared) else np.asarray(a)
            base = acc.finish() if isinstance(acc, InFlight) else np.asarray(acc)
            with np.errstate(all="ignore"):
                found = left.astype(np.float32) @ b.values.astype(np.float32)
                return array(found + base if use_acc else found)

        flight = InFlight(compute)
        if not emulator.lazy:
            flight.finish()
        queue("products").append(flight)
        return flight if is_async else product_wait(0, (flight,))

    def product_wait(num_outstanding: int = 0, deps: Any = ()) -> Any:
        emulator.pause()
        waiting = queue("products")
        while len(waiting) > num_outstanding:
            waiting.pop(0).finish()
        for x in deps:
            if isinstance(x, InFlight) and x.value is None:
                raise EmulatorError("a matrix product's result is used before its wait")
        found = tuple(x.value if isinstance(x, InFlight) else x for x in deps)
        return found[0] if len(found) == 1 else found

    def fence(*_: Any) -> None:
        for allocation in emulator.cta.allocations:
            allocation.unfenced = [w for w in allocation.unfenced if w[0] != threading.get_ident()]

    words = language(emulator)
    mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, phase, pred=True, **_: barrier.wait(phase, pred),
        arrive=lambda barrier, count=1, pred=True: barrier.arrive(count, pred),
        expect=lambda barrier, nbytes, pred=True: barrier.expect(nbytes, pred),
        invalidate=lambda barrier: None,
    )
    return {
        "gl": words,
        "tl": words,
        "range": tensor_range,
        "min": lambda *xs: min(xs) if all(isinstance(x, int) for x in xs) else words.minimum(*xs),
        "max": lambda *xs: max(xs) if all(isinstance(x, int) for x in xs) else words.maximum(*xs),
        "mbarrier": mbarrier,
        "tma_load": tma_load,
        "tma_store": tma_store,
        "tma_store_wait": tma_store_wait,
        "tma_reduce_add": lambda desc, coords, source: tma_store(desc, coords, source, add=True),
        "tma": types.SimpleNamespace(store_wait=tma_store_wait),
        "warpgroup_mma": product,
        "warpgroup_mma_wait": product_wait,
        "fence_async_shared": fence,
        "cta_barrier": lambda: None,
    }
