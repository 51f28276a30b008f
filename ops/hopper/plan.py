"""What a call on sm_90 comes down to: kernel variants, tensor descriptors and numbers, worked out once a signature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..portable.common import APPROXIMATE_CAP, EXACT_CAP, RECIPROCAL_CAP, Features
from ..portable.plan import Plan, direct_launch, features, hooked
from ..spec import Spec
from ..tuning import Config, tuned
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
    programs: int = 1  # on one multiprocessor


# By padded head dim. Three warpgroups share a tile of keys between 192 rows, where walks are long and 192 divides well.
USUAL = {
    64: HopperConfig(2, 128, 3, True),
    128: HopperConfig(2, 128, 2, True),
    256: HopperConfig(2, 64, 2, True),
}
LONG_64 = HopperConfig(3, 128, 3, True, registers=160)


def cap_form(dtype: torch.dtype) -> int:
    """The cheapest form of softcap that holds the error bound."""
    return APPROXIMATE_CAP if dtype == torch.bfloat16 else RECIPROCAL_CAP


def padded(d: int) -> int:
    """Head dims run as powers of two from 64: the tensor memory accelerator reads zeros past the end of a row."""
    return max(64, 1 << (d - 1).bit_length())


def default_config(f: Features, plan: Plan) -> HopperConfig:
    """The table's configuration for a call with these features and lengths. Measured on an H100."""
    width = max(padded(f.D), padded(f.DV))
    bounded = f.CAUSAL or f.HAS_LEFT or f.HAS_RIGHT or f.HAS_RANGES or f.VARLEN
    # bits of dropout are for all of a tile: fewer keys cost 8 % (head dim 128) and 30 % (256)
    more = f.HAS_DROPOUT or f.HAS_WEIGHT or f.HAS_SOFTCAP
    if width == 64 and not more and plan.max_k >= (8192 if bounded else 2048) and not f.HAS_LEFT:
        return LONG_64
    return USUAL[width]


def variant(plan: Plan, config: HopperConfig | None = None) -> tuple[Features, Cut, HopperConfig]:
    """The two constexprs of a call's forward kernel."""
    d, dv = padded(plan.d), padded(plan.dv)
    f = features(Config(64, 64, 4, 1, True), plan.d, plan.dv, plan.flags, cut=lambda n: (padded(n),))
    config = config or tuned("hopper_fwd", plan, HopperConfig) or default_config(f, plan)
    # a packed sequence's last tile reads the neighbour's keys, which may be NaN
    f = f._replace(BLOCK_M=GROUP_ROWS * config.groups, BLOCK_N=config.block_n, SANITIZE=f.SANITIZE or plan.packed,
                   CAP_FORM=cap_form(plan.dtype) if f.HAS_SOFTCAP else EXACT_CAP)  # fmt: skip
    # three warpgroups hide that work for each other (2 % slower); with key_log_weight halves were 16 % slower
    halves = config.groups == 2 and not (f.HAS_DROPOUT or f.HAS_WEIGHT)
    cut = Cut(
        d, dv, config.groups, config.stages, config.turns, config.split, config.registers, f._replace(HAS_WEIGHT=False),
        Q_SLOTS=2 if max(d, dv) <= 128 else 1, OUT_COLUMNS=min(dv, 128),
        CAPPED=f.CAP_FORM > 0 and not (f.HAS_ALIBI or f.HAS_WEIGHT),
        HALVES=halves,
    )  # fmt: skip
    return f, cut, config


def heads_together(f: Features, heads: int, tiles: int, work: int, most: int, alike: int = 1) -> int:
    """How many of ``heads`` heads work off their ``tiles`` tiles longest first together: at least ``work`` tiles.

    Head by head, the last one's long tiles begin when the other multiprocessors have little left to do: a causal call
    of 64 heads of 32 tiles takes 6 % longer than its work on 132 multiprocessors, one of 32 heads 13 %. And programs
    that walk the same keys at the same time wait for each other. Of too many heads (``most``), the L2 cache does not
    hold what is read again. Where all tiles are alike, only that counts, and ``alike`` heads go together.
    """
    if not (f.CAUSAL or f.HAS_LEFT or f.HAS_RIGHT or f.HAS_RANGES):
        work, most = alike * tiles, alike
    return max((n for n in range(1, min(heads, most) + 1) if heads % n == 0), key=lambda n: min(n * tiles, work))


class Items(NamedTuple):
    """The work items of a call: see ``longest_first``."""

    tiles: int  # of one head
    heads: int
    section: int
    stacked: bool = False  # those of all packed sequences, behind each other: see ``packed_tile``

    @property
    def total(self) -> int:
        return self.tiles * self.heads


def items_of(plan: Plan, f: Features, rows: int, length: int, longest: int, heads: int, *together: int) -> Items:
    """Tiles of ``rows`` of ``heads`` heads of each batch element. ``together`` as for ``heads_together``.

    Packed sequences have as many tiles as the longest one, most of them empty where it is much longer than the others.
    Then the tiles of all are counted behind each other: with one sequence of 8192 among 200 of 16 to 200 tokens that is
    2.5 to 3.4 times faster forward, 1.5 to 1.7 times backward (H100). Lengths of 16 to 1023 lost up to 10 % by it.
    """
    tiles, total = plan.grid(rows, longest, heads)
    stacked = length // rows + plan.batch
    if plan.packed and total > 2 * stacked * heads:
        return Items(stacked, heads, math.gcd(heads, 4), True)
    heads *= plan.batch
    return Items(tiles, heads, heads_together(f, heads, tiles, *together))


class Tiles(NamedTuple):
    """What makes tensor descriptors of one tensor's signature: its sizes, strides and the block of one copy."""

    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: Any

    def of(self, base: Tensor) -> TensorDescriptor:
        return TensorDescriptor(base, *self)


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


def strided(spec: Spec) -> list[str]:
    """Which optional tensors have a last dimension that these kernels cannot stride through."""
    named = zip(Spec._fields, spec[:6], strict=False)
    return [
        f"{name}: the last dimension is not contiguous"
        for name, x in named
        if x is not None and name not in ("mask", "bias") and x.stride(-1) != 1 and x.shape[-1] != 1
    ]


class Launch:
    """A Gluon kernel with its grid and numbers: ``launch(bases, tensors)``; the first launch compiles.

    Later ones hand plain addresses to the compiled kernel: 25 us of host time in place of 90.
    """

    __slots__ = ("constants", "grid", "kernel", "numbers", "options", "runner", "tiles")

    def __init__(
        self, kernel: Any, grid: int, tiles: list[Tiles], numbers: tuple, constants: tuple, registers: int | None = None
    ):
        self.kernel, self.grid, self.tiles = kernel, (grid, 1, 1), tiles
        self.numbers, self.constants = numbers, constants
        # a thread's registers at the start, where more than one program shares a multiprocessor
        self.options = {"num_warps": 4} if registers is None else {"num_warps": 4, "maxnreg": registers}
        self.runner: Callable[..., None] | None = None

    def __call__(self, bases: list[Tensor], tensors: list[Tensor | None]) -> None:
        if self.runner is not None:
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            bits = 0
            for address in addresses:
                bits |= address
            if bits & 15 == 0:
                self.runner(bases, addresses)
                return
        args = [bases[0] if t is None else t for t in tensors]  # stands in for what is absent and never read
        described = [t.of(x) for t, x in zip(self.tiles, bases, strict=True)]
        compiled = self.kernel[self.grid](*described, *args, *self.numbers, *self.constants, **self.options)
        if compiled is not None and all(t.data_ptr() & 15 == 0 for t in args):
            self.runner = _runner(compiled, self)


_MAPS_KEPT = 256  # sets of addresses whose encoded tensor maps are kept


def _runner(compiled: Any, of: Launch) -> Callable[..., None]:
    """The compiled kernel as a function of bases, addresses and, where they are known already, the bases' addresses.

    Straight to Triton's C function where that is known, with tensor maps that are encoded once for each address.
    """
    grid, described, rest = of.grid, of.tiles, (*of.numbers, *of.constants)
    general = compiled[grid]

    def through_triton(bases: list[Tensor], addresses: Sequence[int], at: tuple[int, ...] | None = None) -> None:
        general(*[t.of(x) for t, x in zip(described, bases, strict=True)], *addresses, *rest)

    found = direct_launch(compiled)
    launch = None if found is None else _without_descriptors(found.launch)
    metas = getattr(compiled.metadata, "tensordesc_meta", None)
    if found is None or launch is None or not metas or len(metas) != len(described):
        return through_triton
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
    from triton.runtime import driver

    utils = driver.active.utils
    encode = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor  # of 3.6
    fixed = [
        (m["swizzle"], m["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[m["elem_type"]], m["block_size"], t.shape, t.strides, 0)
        for m, t in zip(metas, described, strict=True)
    ]
    sizes = [(*t.shape, *t.strides) for t in described]
    known: dict[tuple[int, ...], list[Any]] = {}  # by the addresses of all bases
    function, middle, flat = compiled.function, found.middle, found.flat
    current_stream, device = torch._C._cuda_getCurrentRawStream, torch.cuda.current_device()

    def direct(bases: list[Tensor], addresses: Sequence[int], at: tuple[int, ...] | None = None) -> None:
        if hooked():
            return through_triton(bases, addresses)
        if at is None:
            at = tuple([base.data_ptr() for base in bases])
        args = known.get(at)
        if args is None:
            if len(known) >= _MAPS_KEPT:
                known.clear()
            args = known[at] = []
            for address, constant, size in zip(at, fixed, sizes, strict=True):
                args += (encode(address, *constant), *size)
        if flat:
            launch(*grid, current_stream(device), function, *middle, *args, *addresses, *rest)
        else:
            launch(*grid, current_stream(device), function, *middle, (*args, *addresses, *rest))
        return None

    return direct


def _without_descriptors(launch: Any) -> Any:
    """The C function that Triton wraps in one that encodes tensor descriptors; None where that looks different."""
    if not hasattr(launch, "__closure__"):
        return None
    held = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
    return held["launcher"].cell_contents if "launcher" in held else None
