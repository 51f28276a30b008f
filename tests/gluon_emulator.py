"""Runs Gluon kernels for Hopper on the CPU: numpy for tensors, one thread for each warp partition.

The Python bodies of the ``@gluon.jit`` functions run as they stand, with ``gl``, ``tl`` and Hopper's own functions
replaced. That checks values, indexing, barrier phases, deadlocks and the reuse of shared memory: an asynchronous
matrix product reads its operands when it is waited for, a bulk store when its wait comes, so that memory overwritten
too early shows as a wrong value. It does not model layouts, registers or the compiler.

    with emulated(launch_module.some_kernel):   # a @gluon.jit kernel called as kernel[grid](...)
        ...
    Emulator(seed=0).launch(kernel, grid, tensors, descriptors, numbers, NAME=constexpr)
"""

from __future__ import annotations

import builtins
import contextlib
import random
import re
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl

TIMEOUT = 15.0  # seconds at a barrier before it counts as a deadlock
FLOATS = {"fp16", "bf16", "fp32", "fp64"}
INTS = {"int32": np.int64, "int64": np.int64, "int1": np.bool_, "uint32": np.uint32, "uint64": np.uint64}


class EmulatorError(AssertionError):
    """A kernel did what the hardware would not forgive."""


def rounded(x: Any, dtype: Any) -> np.ndarray:
    """``x`` in float32, holding what ``dtype`` (a triton dtype) can hold."""
    x = np.asarray(x, np.float32)
    if dtype.name == "bf16":
        bits = np.ascontiguousarray(x).view(np.uint32)
        up = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        return np.where(np.isfinite(x), up, x).reshape(x.shape)
    return x.astype(np.float16).astype(np.float32) if dtype.name == "fp16" else x


class Array(np.ndarray):
    """A tensor in registers, or a scalar (0 dimensions). Integers divide towards zero, as in Triton."""

    def to(self, dtype: Any, **_: Any) -> Array:
        if dtype.name in FLOATS:
            return array(rounded(self, dtype))
        return array(np.asarray(self).astype(INTS[dtype.name]))

    def permute(self, *order: int) -> Array:
        return array(np.transpose(self, order))

    def split(self) -> tuple[Array, Array]:
        return array(self[..., 0]), array(self[..., 1])

    def __floordiv__(self, other: Any) -> Array:
        a, b = np.asarray(self), np.asarray(other)
        return array(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)))

    def __mod__(self, other: Any) -> Array:
        return array(np.fmod(np.asarray(self), np.asarray(other)))

    def __rfloordiv__(self, other: Any) -> Array:
        return array(other) // self

    def __rmod__(self, other: Any) -> Array:
        return array(other) % self


def array(x: Any) -> Array:
    x = np.asarray(x)
    if x.dtype == np.float64:
        x = x.astype(np.float32)
    return x.view(Array)


class Allocation:
    """What all views of one shared-memory buffer share: what threads wrote to it since their last proxy fence."""

    def __init__(self) -> None:
        self.unfenced: list[tuple[int, np.ndarray]] = []


class Shared:
    """A view of shared memory."""

    def __init__(self, values: np.ndarray, dtype: Any, root: Allocation):
        self.values, self.dtype, self.root = values, dtype, root

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def _view(self, values: np.ndarray) -> Shared:
        if not np.may_share_memory(values, self.values):
            raise EmulatorError("a view of shared memory became a copy")
        return Shared(values, self.dtype, self.root)

    def index(self, i: Any) -> Shared:
        if not 0 <= int(i) < self.values.shape[0]:
            raise EmulatorError(f"index {int(i)} of shared memory {self.shape}")
        return self._view(self.values[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        at = [builtins.slice(None)] * self.values.ndim
        at[dim] = builtins.slice(start, start + length)
        return self._view(self.values[tuple(at)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self._view(self.values.transpose(order))

    def reshape(self, shape: Any) -> Shared:
        return self._view(self.values.reshape(tuple(shape)))

    def load(self, layout: Any = None) -> Array:
        return array(self.values.copy())

    def store(self, value: Any) -> None:
        if value.shape != self.shape:
            raise EmulatorError(f"store of {value.shape} to shared memory {self.shape}")
        self.values[...] = value if self.dtype.name not in FLOATS else rounded(value, self.dtype)
        self.root.unfenced.append((threading.get_ident(), self.values))

    def check_fenced(self, reader: str) -> None:
        if any(np.shares_memory(values, self.values) for _, values in list(self.root.unfenced)):
            raise EmulatorError(f"{reader} reads shared memory that was stored to without fence_async_shared")


class Barrier:
    """An mbarrier: a phase ends when its arrivals and the bytes it expects have come."""

    def __init__(self, cta: Cta):
        self.cta, self.phase, self.count, self.pending, self.bytes = cta, 0, 0, 0, 0

    def init(self, count: int) -> None:
        self.count = self.pending = int(count)

    def _advance(self) -> None:
        if self.pending < 0:
            raise EmulatorError(f"more arrivals at an mbarrier than its count of {self.count}")
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
            self.cta.changed.notify_all()

    def arrive(self, count: int = 1, pred: Any = True) -> None:
        with self.cta.changed:
            if pred:
                self.pending -= int(count)
                self._advance()

    def expect(self, nbytes: int, pred: Any = True) -> None:
        with self.cta.changed:
            if pred:
                self.bytes += int(nbytes)
                self.pending -= 1
                self._advance()

    def complete(self, nbytes: int) -> None:
        with self.cta.changed:
            self.bytes -= nbytes
            self._advance()

    def wait(self, phase: Any, pred: Any = True) -> None:
        with self.cta.changed:
            if pred:
                self.cta.wait_until(lambda: self.phase != int(phase), "an mbarrier")


class Barriers:
    """Several mbarriers."""

    def __init__(self, cta: Cta, n: int):
        self.all = [Barrier(cta) for _ in range(n)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class Cta:
    """One program: its threads' common state."""

    def __init__(self, emulator: Emulator, pid: tuple[int, int, int]):
        self.pid, self.changed = pid, threading.Condition()
        self.named: dict[int, list[int]] = {}
        self.barriers: list[Barrier] = []
        self.allocations: list[Allocation] = []
        self.local = threading.local()
        self.failure: BaseException | None = None

    def wait_until(self, ready: Callable[[], bool], what: str) -> None:
        start = time.monotonic()
        while not ready():
            if self.failure is not None:
                raise EmulatorError("another partition failed") from self.failure
            self.changed.wait(0.2)
            if time.monotonic() - start > TIMEOUT:
                raise EmulatorError(f"deadlock: waited {TIMEOUT:.0f} s at {what}")

    def named_barrier(self, op: str, name: int, threads: int) -> None:
        with self.changed:
            state = self.named.setdefault(name, [0, 0])
            generation = state[1]
            state[0] += getattr(self.local, "threads", 128)
            if state[0] > threads:
                raise EmulatorError(f"more threads than {threads} at named barrier {name}")
            if state[0] == threads:
                state[0], state[1] = 0, generation + 1
                self.changed.notify_all()
            if op == "sync":
                self.wait_until(lambda: state[1] != generation, f"named barrier {name}")

    def finish_loads(self) -> None:
        for barrier in self.barriers:
            if barrier.bytes:
                raise EmulatorError("a program ended while a bulk load was on its way")

    def finish_products(self) -> None:
        if getattr(self.local, "products", None):
            raise EmulatorError("a program ended without waiting for its matrix products")


class InFlight:
    """The accumulator of a matrix product that has been issued and not waited for."""

    def __init__(self, compute: Callable[[], Array]):
        self.compute, self.value = compute, None

    def finish(self) -> Array:
        if self.value is None:
            self.value = self.compute()
        return self.value


class Pointer:
    """An address, or a tensor of addresses, in flat memory."""

    def __init__(self, memory: np.ndarray, offset: Any, dtype: Any):
        self.memory, self.offset = memory, np.asarray(offset, np.int64)
        self.dtype = types.SimpleNamespace(element_ty=dtype, name="pointer")

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + np.asarray(other, np.int64), self.dtype.element_ty)

    __radd__ = __add__

    def at(self, mask: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        offset = np.broadcast_to(self.offset, shape)
        mask = np.ones(shape, bool) if mask is None else np.broadcast_to(np.asarray(mask, bool), shape)
        used = offset[mask]
        if used.size and not (used.min() >= 0 and used.max() < self.memory.size):
            raise EmulatorError(f"address out of bounds: {used.min()} to {used.max()} of {self.memory.size}")
        return offset, mask


class Descriptor:
    """A tensor descriptor: a strided view of flat memory and the block that one copy moves."""

    def __init__(self, memory: np.ndarray, offset: int, shape: Any, strides: Any, block: Any, dtype: Any, layout: Any):
        size = memory.itemsize
        self.values = np.lib.stride_tricks.as_strided(memory[offset:], tuple(shape), tuple(s * size for s in strides))
        self.block_shape, self.dtype, self.layout = list(block), dtype, layout
        nbytes = int(np.prod(block)) * dtype.primitive_bitwidth // 8
        self.block_type = types.SimpleNamespace(nbytes=nbytes, shape=list(block), element_ty=dtype)
        self.nbytes_per_cta = nbytes

    def _overlap(self, coords: Any) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        inside, block = [], []
        for at, n, size in zip([int(c) for c in coords], self.block_shape, self.values.shape, strict=True):
            low, high = max(at, 0), max(min(at + n, size), max(at, 0))
            inside.append(slice(low, high) if low < size else slice(0, 0))
            block.append(slice(low - at, high - at) if low < size else slice(0, 0))
        return tuple(inside), tuple(block)

    def read(self, coords: Any) -> np.ndarray:
        inside, block = self._overlap(coords)
        out = np.zeros(self.block_shape, np.float32)
        out[block] = self.values[inside]
        return out

    def write(self, coords: Any, values: np.ndarray, add: bool) -> None:
        inside, block = self._overlap(coords)
        values = values.reshape(self.block_shape)[block]
        self.values[inside] = self.values[inside] + values if add else values


def triton_dtype(dtype: torch.dtype) -> Any:
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.int32: tl.int32}
    return {**names, torch.int64: tl.int64, torch.bool: tl.int1}[dtype]


class Memory:
    """The storages that a launch's arguments lie in, as flat numpy arrays; ``flush`` writes them back."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[torch.Tensor, np.ndarray]] = {}

    def of(self, x: torch.Tensor) -> np.ndarray:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.known:
            flat = torch.empty(0, dtype=x.dtype).set_(storage, 0, (storage.nbytes() // x.itemsize,))
            copy = flat.float() if x.is_floating_point() else flat
            self.known[storage.data_ptr()] = flat, copy.numpy().copy()
        return self.known[storage.data_ptr()][1]

    def flush(self) -> None:
        for flat, values in self.known.values():
            flat.copy_(torch.from_numpy(values))

    def argument(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return Pointer(self.of(x), x.storage_offset(), triton_dtype(x.dtype))
        if hasattr(x, "block_shape") and hasattr(x, "base"):
            base, dtype = x.base, triton_dtype(x.base.dtype)
            at = base.storage_offset()
            return Descriptor(self.of(base), at, x.shape, x.strides, x.block_shape, dtype, x.layout)
        return array(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else x


class Emulator:
    """``lazy``: matrix products read their operands when waited for, copies take their time.

    ``seed`` varies timing; ``pause`` is the longest of the pauses (in seconds) that widen race windows.
    """

    def __init__(self, lazy: bool = True, seed: int = 0, pause: float = 2e-3):
        self.lazy, self.random, self.longest = lazy, random.Random(seed), pause
        self.cta = Cta(self, (0, 0, 0))
        self.grid = (1, 1, 1)
        self._globals: dict[int, dict[str, Any]] = {}

    def launch(self, kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        """Run every program of the grid, one after the other. Launch options among ``constants`` are dropped."""
        from language_emulation import substitutes  # beside this file

        self.substitutes = substitutes(self)
        function, memory = self._function(kernel), Memory()
        grid = (grid,) if isinstance(grid, int) else tuple(grid)
        self.grid = grid + (1,) * (3 - len(grid))
        values = dict(zip(kernel.arg_names, args, strict=False))
        values.update({n: x for n, x in constants.items() if n in kernel.arg_names})
        constexprs = {p.name for p in kernel.params if p.is_constexpr}
        values = {n: x if n in constexprs else memory.argument(x) for n, x in values.items()}
        for z in range(self.grid[2]):
            for y in range(self.grid[1]):
                for x in range(self.grid[0]):
                    self.cta = Cta(self, (x, y, z))
                    function(**values)
                    self.cta.finish_loads()
                    self.cta.finish_products()
        memory.flush()

    def _function(self, jitted: Any) -> types.FunctionType:
        fn = jitted.fn
        new = types.FunctionType(
            fn.__code__, self._patched(fn.__globals__), fn.__name__, fn.__defaults__, fn.__closure__
        )
        new.__kwdefaults__ = fn.__kwdefaults__
        return new

    def _patched(self, original: dict[str, Any]) -> dict[str, Any]:
        if id(original) not in self._globals:
            made = self._globals[id(original)] = dict(original)
            for name, x in original.items():
                if isinstance(x, tl.constexpr):
                    made[name] = x.value
                elif isinstance(getattr(x, "fn", None), types.FunctionType) and type(x).__name__ != "ConstexprFunction":
                    made[name] = self._function(x)
            made.update({n: x for n, x in self.substitutes.items() if n in original or n == "range"})
        return self._globals[id(original)]

    def partitions(self, parts: list[tuple[Any, tuple]], num_warps: list[int], *_: Any) -> None:
        """gl.warp_specialize: each function in a thread of its own."""
        cta = self.cta

        def run(function: Any, args: tuple, warps: int) -> None:
            cta.local.threads = 32 * warps
            try:
                function(*args)
                if getattr(cta.local, "stores", None):
                    raise EmulatorError("a partition ended without waiting for its bulk stores")
                cta.finish_products()
            except BaseException as error:
                with cta.changed:
                    if cta.failure is None:
                        cta.failure = error
                    cta.changed.notify_all()

        threads = [
            threading.Thread(target=run, args=(*part, warps), daemon=True)
            for part, warps in zip(parts, [4, *num_warps], strict=True)
        ]
        self.random.shuffle(threads)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if cta.failure is not None:
            raise cta.failure

    def pause(self) -> None:
        """Widen race windows."""
        if self.lazy and self.random.random() < 0.3:
            time.sleep(self.random.random() * self.longest)

    def assembly(self, code: str, constraints: str, args: list[Any], **_: Any) -> Array | None:
        if "prmt.b32" in code:  # of hopper/dropout.py
            words, select, x = np.broadcast_arrays(*args)
            byte = (select.astype(np.int64) >> 8 * (np.arange(x.shape[-1]) % 2)) & 3  # the right one of two is higher
            return array(np.where((words >> (8 * byte + 7).astype(np.uint32)) & 1 != 0, x, 0))
        if code.startswith("rcp.approx"):
            with np.errstate(all="ignore"):
                return array(np.float32(1) / np.asarray(args[0], np.float32))
        if code.startswith("tanh.approx"):  # as wrong as it may be, in both directions
            x = np.asarray(args[0], np.float32)
            return array(np.tanh(x) * (1 + 2**-10.987 * np.where(x.view(np.int32) & 1, 1, -1)).astype(np.float32))
        found = re.search(r"bar\.(\w+) (\S+), (\d+)", code)
        if found is None:
            raise EmulatorError(f"inline assembly that is not emulated: {code}")
        name = int(args[0]) if found.group(2) == "$1" else int(found.group(2))
        self.cta.named_barrier(found.group(1), name, int(found.group(3)))
        return None


class EmulatedKernel:
    """Stands where a jitted kernel stood: ``kernel[grid](*args)`` runs in the emulator."""

    def __init__(self, kernel: Any, **options: Any):
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **constants: Emulator(**self.options).launch(self.kernel, grid, *args, **constants)


@contextlib.contextmanager
def emulated(module: Any, *names: str, **options: Any) -> Iterator[None]:
    """Within it, the kernels ``names`` of ``module`` run in the emulator."""
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(module, name, EmulatedKernel(getattr(module, name), **options)))
        yield
