"""What a call on sm_90 comes down to: kernel variants, tensor descriptors and numbers, worked out once a signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..portable.common import Features
from ..portable.plan import Plan, features
from ..tuning import Config
from .common import GROUP_ROWS, Cut
from .shim import gl

ELEMENT = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


class HopperConfig(NamedTuple):
    """How the forward is cut and compiled."""

    groups: int  # consumer warpgroups of 64 rows
    block_n: int
    stages: int
    turns: bool
    split: bool = True
    registers: int = 240


# (largest padded head dim, configuration): measured on an H100; "wide" where logits take more than a scale
PLAIN = [(64, HopperConfig(3, 128, 2, False, True, 160)), (128, HopperConfig(2, 128, 2, True)),
         (256, HopperConfig(2, 64, 2, True))]  # fmt: skip
WIDE = [(64, HopperConfig(2, 128, 2, True)), (128, HopperConfig(2, 64, 3, True)), (256, HopperConfig(2, 32, 2, True))]


def padded(d: int) -> int:
    """Head dims run as powers of two from 64: the tensor memory accelerator reads zeros past the end of a row."""
    return max(64, 1 << (d - 1).bit_length())


def default_config(f: Features) -> HopperConfig:
    """The table's configuration for a call with these features."""
    wide = f.HAS_DROPOUT or f.HAS_SOFTCAP or f.HAS_ALIBI or f.HAS_WEIGHT
    width = max(padded(f.D), padded(f.DV))
    return next(config for limit, config in (WIDE if wide else PLAIN) if width <= limit)


def variant(plan: Plan, config: HopperConfig | None = None) -> tuple[Features, Cut, HopperConfig]:
    """The two constexprs of a call's forward kernel."""
    d, dv = padded(plan.d), padded(plan.dv)
    f = features(Config(64, 64, 4, 1, True), plan.d, plan.dv, plan.flags, cut=lambda n: (padded(n),))
    config = config or default_config(f)
    # a packed sequence's last tile reads the neighbour's keys, which may be NaN
    f = f._replace(BLOCK_M=GROUP_ROWS * config.groups, BLOCK_N=config.block_n, SANITIZE=f.SANITIZE or plan.packed)
    cut = Cut(d, dv, config.groups, config.stages, config.turns, config.split, config.registers,
              f._replace(HAS_WEIGHT=False), d == dv == 256)  # fmt: skip
    return f, cut, config


class Tiles:
    """What makes tensor descriptors of one tensor's signature: its sizes, strides and the block of one copy.

    Triton's own TensorDescriptor checks itself for 5 us; this one is made of what was checked already.
    """

    __slots__ = ("base", "block_shape", "layout", "padding", "shape", "strides")

    def __init__(self, shape: list[int], strides: list[int], block: list[int], layout: Any):
        self.shape, self.strides, self.block_shape, self.layout, self.padding = shape, strides, block, layout, "zero"
        self.base: Any = None

    def of(self, base: Tensor) -> Tiles:
        made = Tiles(self.shape, self.strides, self.block_shape, self.layout)
        made.base = base
        return made

    def checked(self, base: Tensor) -> TensorDescriptor:
        return TensorDescriptor(base, self.shape, self.strides, self.block_shape, self.layout)


def tiles(x: Tensor, rows: int, width: int) -> Tiles:
    """x [B, H, S, D], or packed [T, H, D] as [1, H, T, D], in blocks of ``rows`` rows of one head."""
    shape, strides = list(x.shape), list(x.stride())
    if len(shape) == 3:
        shape = [1, shape[1], shape[0], shape[2]]
        strides = [0, strides[1], strides[0], strides[2]]
    # the stride of a dimension of size 1 may be anything, and is never used
    strides = [8 if n == 1 else s for n, s in zip(shape[:3], strides[:3], strict=True)] + [1]
    block = [1, 1, rows, width]
    return Tiles(shape, strides, block, gl.NVMMASharedLayout.get_default_for(block, ELEMENT[x.dtype]))


def tma_problem(x: Tensor) -> str | None:
    """Why the tensor memory accelerator cannot read x, None if it can."""
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return "the last dimension is not contiguous"
    steps = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
    if any(s == 0 for s in steps):
        return "a dimension is expanded (stride 0)"
    if any(s % 8 for s in steps) or x.shape[-1] % 8 or x.data_ptr() % 16:
        return "strides, head dim and base address are not all multiples of 16 bytes"
    return None


class Launch:
    """A Gluon kernel with its grid and numbers: ``launch(bases, tensors)``; the first launch compiles.

    Later ones hand plain addresses to the compiled kernel.
    """

    __slots__ = ("constants", "grid", "kernel", "numbers", "runner", "tiles", "warps")

    def __init__(self, kernel: Any, grid: int, tiles: list[Tiles], numbers: tuple, constants: tuple):
        self.kernel, self.grid, self.tiles = kernel, (grid, 1, 1), tiles
        self.numbers, self.constants = numbers, constants
        self.runner: Callable[..., None] | None = None

    def __call__(self, bases: list[Tensor], tensors: list[Tensor | None]) -> None:
        aligned = True
        if self.runner is not None:
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            bits = 0
            for address in addresses:
                bits |= address
            aligned = bits & 15 == 0
            if aligned:
                made = [t.of(x) for t, x in zip(self.tiles, bases, strict=True)]
                self.runner(*made, *addresses, *self.numbers, *self.constants)
                return
        args = [bases[0] if t is None else t for t in tensors]  # stands in for what is absent and never read
        made = [t.checked(x) for t, x in zip(self.tiles, bases, strict=True)]
        compiled = self.kernel[self.grid](*made, *args, *self.numbers, *self.constants, num_warps=4)
        if compiled is not None and all(t.data_ptr() & 15 == 0 for t in args):
            self.runner = direct(compiled, self.grid)


def direct(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """The compiled kernel as a function of its arguments; on Triton 3.6 straight to the launcher's C function."""
    from ..portable.plan import _runner

    return _runner(compiled, grid)
