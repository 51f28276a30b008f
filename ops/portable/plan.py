"""What a call comes down to: kernel variants, grids and numbers, worked out once for each signature and kept.

A signature is the shapes, strides and dtypes of a call's tensors and its Python numbers. A repeated one (every layer of
a model, every step of a training run) costs a dictionary look-up and the launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .. import repeat
from ..spec import Spec, Varlen, bshd_layout, dropout_threshold, lse_layout
from ..tuning import Config, architecture, lookup, tuned
from .common import Features, narrow_parts, split_head_dim
from .forward import attn_fwd_kernel

INTERPRETED = isinstance(attn_fwd_kernel, InterpretedFunction)  # kernels run in Triton's interpreter, on CPU tensors
TMA_MIN_KEYS = 512  # below, building two descriptors costs more host time than they save
FLAGS = Features._fields[Features._fields.index("CAUSAL") : Features._fields.index("TMA")]
_RUNTIME = triton.knobs.runtime
# Above head dim 256, what spills with all of a kernel's keys: half of them then.
_HALF_TILE = {
    "fwd": ("HAS_MASK",),
    "dkdv": ("HAS_RANGES", "HAS_MASK", "HAS_BIAS", "HAS_WEIGHT", "HAS_SOFTCAP", "HAS_DROPOUT", "VARLEN"),
}
_LARGE = 1 << 30
_PLANS_KEPT = 1024


class Launch:
    """One kernel with its grid and numbers: ``launch(tensors, descriptors)``.

    The first launch goes through Triton, which compiles for these numbers and this pointer alignment. Later ones call
    the compiled kernel itself with plain addresses: 10 us of host time in place of 40 to 60.
    """

    __slots__ = ("constants", "grid", "kernel", "numbers", "options", "runner")

    def __init__(
        self,
        kernel: Any,
        grid: int | tuple[int, int, int],
        numbers: tuple,
        constants: tuple,
        config: Config | None = None,
    ):
        self.kernel, self.numbers, self.constants = kernel, numbers, constants
        self.grid = grid if isinstance(grid, tuple) else (grid, 1, 1)
        self.options = {} if config is None else config.options()
        self.runner: Any = None

    def __call__(self, tensors: list[Tensor | None], descriptors: tuple = ()) -> None:
        if self.runner is not None:
            addresses = [0 if t is None else t.data_ptr() for t in tensors]
            bits = 0
            for address in addresses:
                bits |= address
            if bits & 15 == 0:
                self.runner(*addresses, *descriptors, *self.numbers, *self.constants)
                return
        if not self.grid[0]:
            return
        first = tensors[0]
        args = [first if t is None else t for t in tensors]  # stands in for what is absent and never read
        compiled = self.kernel[self.grid](*args, *descriptors, *self.numbers, *self.constants, **self.options)
        if not INTERPRETED and all(t.data_ptr() & 15 == 0 for t in args if t is not None):
            self.runner = _runner(compiled, self.grid)


class Direct(NamedTuple):
    """Triton's launch of a compiled kernel, below the Python that is around it in ``compiled[grid]``."""

    launch: Any  # of (*grid, stream, function, *middle) and the kernel's arguments
    middle: tuple[Any, ...]
    flat: bool  # whether it takes the kernel's arguments one by one, not as a sequence


def direct_launch(compiled: Any) -> Direct | None:
    """How triton 3.6 to 3.9 launch on NVIDIA GPUs; None elsewhere, and for kernels that need scratch memory."""
    version, launcher = triton.__version__, compiled.run
    if (
        compiled.metadata.target.backend != "cuda"
        or not version.startswith(("3.6.", "3.7.", "3.8.", "3.9."))
        or launcher.global_scratch_size
        or launcher.profile_scratch_size
        or getattr(launcher, "gsan_enabled", False)  # a sanitizer that adds arguments
    ):
        return None
    flags, metadata = (launcher.launch_cooperative_grid, launcher.launch_pdl), compiled.packed_metadata
    no_hooks, no_scratch = (None,) * 3, (None,) * 2
    if version.startswith("3.6."):
        return Direct(launcher.launch, (*flags, *no_scratch, metadata, *no_hooks), True)
    arguments = launcher.arg_annotations, launcher.kernel_signature
    return Direct(launcher.launch, (*flags, metadata, *no_hooks, *no_scratch, *arguments), False)


def hooked() -> bool:
    """Whether a profiler watches launches: then these go through ``compiled[grid]``."""
    enter, leave = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook  # None, a function, or a chain of them
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _runner(compiled: Any, grid: tuple[int, int, int]) -> Any:
    """The compiled kernel as a function of its arguments; a direct launch saves 5 us of Python."""
    general, found = compiled[grid], direct_launch(compiled)
    if found is None:
        return general
    launch, middle, flat = found
    function = compiled.function
    current_stream, device = torch._C._cuda_getCurrentRawStream, torch.cuda.current_device()

    def direct(*args: Any) -> None:
        if hooked():
            return general(*args)
        if flat:
            launch(*grid, current_stream(device), function, *middle, *args)
        else:
            launch(*grid, current_stream(device), function, *middle, args)
        return None

    return direct


class Plan:
    """A call's sizes, strides and flags. Launches are added by launch.py under ``launches``."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None):
        if varlen is None:
            self.batch, self.hq, self.sq, self.d = q.shape
            self.hkv, self.sk = k.shape[1], k.shape[2]
            self.max_q, self.max_k = self.sq, self.sk
        else:
            self.batch = varlen.cu_seqlens_q.shape[0] - 1
            self.sq, self.hq, self.d = q.shape
            self.sk, self.hkv = k.shape[0], k.shape[1]
            self.max_q, self.max_k = min(varlen.max_seqlen_q, self.sq), min(varlen.max_seqlen_k, self.sk)
        self.dv, self.dtype, self.arch, self.packed = v.shape[-1], q.dtype, architecture(q.device), varlen is not None
        self.scale = self.d**-0.5 if spec.scale is None else spec.scale
        threshold = dropout_threshold(spec.dropout_p)
        self.keep_scale = 256 / (256 - threshold)
        self.tail = (min(spec.window_left, _LARGE), min(spec.window_right, _LARGE), threshold, *spec.dropout_offsets)
        self.softcap = spec.softcap
        self.qs, self.ks, self.vs = strides(q), strides(k), strides(v)
        self.flags = _flags(spec, self)
        self.ranges_shape = None if spec.key_ranges is None else spec.key_ranges.shape
        self.ranges_strides = _ranges_strides(spec.key_ranges, self.packed)
        self.other_strides = (*_plane(spec.mask), *_plane(spec.bias), *_small(spec.key_log_weight, spec.alibi_slopes))
        sizes = (64, 128, 256)
        self.tma = (
            self.arch in ("sm90", "sm100") and not self.packed and self.sk >= TMA_MIN_KEYS and q.dtype.itemsize == 2
            and spec.key_log_weight is None and self.d in sizes and self.dv in sizes
            and all(tma_can_read(x) for x in (q, k, v))
        )  # fmt: skip
        # of lists of int32 pairs, and of the bits: rows and keys of a block of the block mask
        self.row_blocks, self.column_blocks = list_strides(spec.block_rows), list_strides(spec.block_columns)
        bits = spec.block_bits
        self.block = (0, 0) if bits is None else (bits.shape[1] - 1, bits.shape[2] * 32)
        self.own_blocks = spec.block_rows is not None and spec.block_rows.shape[1] > 1
        rows = (q, k, v, spec.key_ranges, spec.key_log_weight, spec.alibi_slopes, spec.sinks)
        self.needs_copies = any(t is not None and t.stride(-1) != 1 and t.shape[-1] != 1 for t in rows) or any(
            t is not None and not t.is_contiguous() for t in spec[7:10]
        )
        self.out_layout, self.lse_layout = bshd_layout(q.shape, self.dv), lse_layout(q.shape)
        self.q_layout, self.k_layout, self.v_layout = (bshd_layout(x.shape, x.shape[-1]) for x in (q, k, v))
        self.inputs = (q.stride(), k.stride(), v.stride())
        self.alignment = alignment(q, k, v)
        self.launches: dict[Any, Any] = {}

    def takes(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether tensors of the same sizes and dtype also have the strides and alignment that this was made for.

        What was saved for a backward may come back elsewhere: hooks that move tensors to the host lay them out anew.
        """
        return (q.stride(), k.stride(), v.stride()) == self.inputs and alignment(q, k, v) == self.alignment

    def grid(self, rows: int, length: int, heads: int) -> tuple[int, int]:
        """Tiles of ``rows`` in ``length``, and programs over heads and batch."""
        tiles = -(-length // rows)
        return tiles, tiles * heads * self.batch

    def numbers(self, *blocks: int) -> tuple:
        """What all kernels but the small ones take behind their strides of q, k, v, dout and ranges.

        ``blocks`` are the strides of the lists of blocks, for kernels that walk them.
        """
        return (
            *self.other_strides,
            *blocks,
            self.scale,
            self.softcap,
            self.keep_scale,
            self.hq,
            self.hq // self.hkv,
            self.sq,
            self.sk,
        )

    def _spills(self, kind: str) -> bool:
        features = _HALF_TILE.get(kind, ())
        return any(self.flags[FLAGS.index(name)] for name in features) or bool(features and self.block[0])

    def variant(
        self, kind: str, config: Config | None = None, *, tma: bool = True, weight_grad: bool = False
    ) -> tuple[Features, Config]:
        """The features and configuration of kernel ``kind``; ``config`` overrides the table."""
        tma = tma and self.tma
        wide = self.dtype == torch.float32
        if config is None:
            config = tuned(kind + "+tma" * tma, self, Config)
            config = config or lookup(kind, self.arch, wide, max(self.d, self.dv), "tma" if tma else "")
            if max(self.d, self.dv) > 256 and self._spills(kind):
                config = config._replace(block_n=max(config.block_n // 2, 16))
        if self.block[0]:  # tiles do not straddle blocks, and the walk needs some registers of its own
            bounded = any(self.flags[:4])  # by causal, a window or key_ranges as well
            rows, keys = min(config.block_m, self.block[0]), min(config.block_n, 64 if bounded else self.block[1])
            config = config._replace(block_m=rows, block_n=keys, max_registers=None)
        own_ranges = self.ranges_shape is not None and self.ranges_shape[-3] > 1
        precision = "tf32" if wide and torch.backends.cuda.matmul.allow_tf32 else "ieee"
        cut = narrow_parts if wide and precision == "ieee" else split_head_dim
        f = features(
            config._replace(tma=config.tma and tma),
            self.d,
            self.dv,
            self.flags,
            atomic=kind == "fused",
            weight_grad=weight_grad,
            head_loop=(own_ranges or self.own_blocks) and self.hq != self.hkv and kind in ("dkdv", "fused"),
            cut=cut,
            precision=precision,
            block=self.block,
        )
        return f, config


def features(
    config: Config,
    d: int,
    dv: int,
    flags: tuple[bool, ...],
    *,
    atomic: bool = False,
    weight_grad: bool = False,
    head_loop: bool = False,
    cut: Callable[[int], tuple[int, ...]] = split_head_dim,
    precision: str = "ieee",
    block: tuple[int, int] = (0, 0),
) -> Features:
    """The kernel variant that a configuration and a call's flags (in the order of FLAGS) describe.

    ``cut`` says in what parts a head dim is held, ``block`` the sizes of a block mask's blocks.
    """
    named: dict[str, Any] = dict(zip(FLAGS, flags, strict=True))
    altered = named["HAS_BIAS"] or named["HAS_WEIGHT"]
    named.update(TMA=config.tma, ATOMIC_DQ=atomic, WEIGHT_GRAD=weight_grad, HEAD_LOOP=head_loop, PRECISION=precision)
    named.update(PLAIN=not (altered or named["HAS_ALIBI"] or named["HAS_SOFTCAP"]), MAY_EMPTY=altered)
    intervals = any(named[name] for name in ("CAUSAL", "HAS_LEFT", "HAS_RIGHT", "HAS_RANGES"))
    named.update(MASK_M=block[0], MASK_N=block[1], INTERVALS=intervals)
    return Features(d, dv, cut(d), cut(dv), config.block_m, config.block_n, **named)


_kept: dict[tuple, Plan] = {}


def forget() -> None:
    """Drop all plans, so that the next calls compile (or look up) their kernels anew."""
    _kept.clear()
    repeat.forget()


def plan_of(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None) -> Plan:
    """The plan of a call; of all tensors the last dimension must be contiguous."""
    key = (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, q.device, spec[10:],
        torch.backends.cuda.matmul.allow_tf32 if q.dtype == torch.float32 else None,
        tuple([None if t is None else (t.shape, t.stride(), t.dtype) for t in spec[:9]]),
        # not how many blocks have bits
        None if spec.block_bits is None else (spec.block_bits.shape[1:], spec.block_bits.is_contiguous()),
        None if varlen is None else (varlen[0].shape, varlen[2:]),
        alignment(q, k, v),  # decides whether descriptors may be used
    )  # fmt: skip
    plan = _kept.get(key)
    if plan is None:
        if len(_kept) >= _PLANS_KEPT:
            forget()
        plan = _kept[key] = Plan(q, k, v, spec, varlen)
    return plan


def alignment(q: Tensor, k: Tensor, v: Tensor) -> int:
    """The bytes by which addresses miss a multiple of 16, which Triton compiles for."""
    return (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, head, row) strides; 0 for a dimension of size 1, whose stride may be anything."""
    s = [stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True)]
    return (0, s[1], s[0]) if x.dim() == 3 else (s[0], s[1], s[2])


def tma_can_read(x: Tensor) -> bool:
    """The tensor memory accelerator takes strides that are multiples of 16 bytes, and none of 0."""
    return x.dim() == 4 and all(s > 0 and s * x.itemsize % 16 == 0 for s in x.stride()[:3]) and x.data_ptr() % 16 == 0


def _flags(spec: Spec, plan: Plan) -> tuple[bool, ...]:
    left, right = spec.window_left >= 0, spec.window_right >= 0
    ranges, mask, weight = spec.key_ranges is not None, spec.mask is not None, spec.key_log_weight is not None
    # square causal attention sees every key and leaves no row empty
    blocks = spec.block_rows is not None
    sanitize = (
        ranges or mask or blocks or weight or ((spec.causal or left or right) and (plan.packed or plan.sq != plan.sk))
    )
    return (
        spec.causal, left, right, ranges, mask, spec.bias is not None, weight, spec.alibi_slopes is not None,
        spec.softcap > 0, spec.sinks is not None, spec.dropout_p > 0, plan.packed, sanitize,
        spec.dropout_p > 0 and spec.dropout_offsets[3] % 16 != 0,
    )  # fmt: skip


def _broadcast(x: Tensor, dim: int) -> int:
    return 0 if x.shape[dim] == 1 else x.stride(dim)


def _ranges_strides(ranges: Tensor | None, packed: bool) -> tuple[int, int, int]:
    if ranges is None:
        return 0, 0, 0
    if packed:
        return (0, _broadcast(ranges, 0), ranges.stride(1)) if ranges.dim() == 3 else (0, 0, ranges.stride(0))
    return _broadcast(ranges, 0), _broadcast(ranges, 1), ranges.stride(2)


def list_strides(blocks: Tensor | None) -> tuple[int, int, int]:
    """(batch, head, row) strides of lists, or of a table, of blocks [B or 1, Hq or 1, rows, ...]."""
    return (0, 0, 0) if blocks is None else (_broadcast(blocks, 0), _broadcast(blocks, 1), blocks.stride(2))


def _plane(x: Tensor | None) -> tuple[int, ...]:
    """Strides of mask or bias, 0 where it broadcasts."""
    return (0, 0, 0, 0) if x is None else tuple(_broadcast(x, i) for i in range(4))


def _small(weight: Tensor | None, slopes: Tensor | None) -> tuple[int, int, int]:
    """Of key_log_weight (batch, head) and of the slopes (batch)."""
    wb = 0 if weight is None or weight.dim() == 2 else _broadcast(weight, 0)
    wh = 0 if weight is None else _broadcast(weight, weight.dim() - 2)
    return wb, wh, 0 if slopes is None or slopes.dim() == 1 else _broadcast(slopes, 0)
