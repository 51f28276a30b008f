"""The "triton" back end: from a call to kernel launches. See backward.py for the two forms of the backward."""

from __future__ import annotations

import functools
import os

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..spec import Gradients, Needs, Spec, Varlen, dropout_threshold, new_bshd, new_lse
from ..tuning import Config, architecture, lookup
from .backward import attn_bwd_dkdv_kernel, attn_bwd_dq_kernel, attn_bwd_finish, attn_bwd_key_plans, attn_bwd_prepare, attn_bwd_tile_bounds
from .bias_grad import attn_bwd_dbias_kernel
from .common import Features, split_head_dim
from .forward import attn_fwd_kernel

MAX_HEAD_DIM = 256
PREPARE_ROWS = 64
TMA_MIN_KEYS = 512  # below, building two descriptors costs more host time than they save
_LARGE = 1 << 30
FLAGS = Features._fields[Features._fields.index("CAUSAL") : Features._fields.index("TMA")]
_compiled: dict = {}  # key -> CompiledKernel: skips Triton's argument binder, 10 to 20 us of host time a launch


def interpreting() -> bool:
    """Kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None = None) -> list[str]:
    """Reasons why these kernels cannot take the call; empty if they can."""
    reasons = []
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {q.dtype}: the Triton kernels take float16, bfloat16 and float32")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        reasons.append(f"head dim {max(q.shape[-1], v.shape[-1])}: the Triton kernels take up to {MAX_HEAD_DIM}")
    if q.device.type == "cpu" and not interpreting():
        reasons.append("CPU tensors: the Triton kernels run on a GPU, or anywhere with TRITON_INTERPRET=1")
    return reasons


# ---- what a call needs, read once


class _Call:
    """A call's tensors with last dims contiguous, its strides, and the flags that choose a kernel variant."""

    __slots__ = (
        "q", "k", "v", "spec", "varlen", "batch", "hq", "hkv", "sq", "sk", "max_q", "max_k", "d", "dv", "flags", "ranges",
        "slopes", "weight", "aligned", "tma", "arch", "dtype", "scale", "qs", "ks", "vs",
    )  # fmt: skip

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None):
        self.q, self.k, self.v = q, k, v = _rows(q), _rows(k), _rows(v)
        self.spec, self.varlen = spec, varlen
        if varlen is None:
            self.batch, self.hq, self.sq, self.d = q.shape
            self.hkv, self.sk = k.shape[1], k.shape[2]
            self.max_q, self.max_k = self.sq, self.sk
        else:
            self.batch = varlen.cu_seqlens_q.shape[0] - 1
            self.sq, self.hq, self.d = q.shape
            self.sk, self.hkv = k.shape[0], k.shape[1]
            self.max_q, self.max_k = min(varlen.max_seqlen_q, self.sq), min(varlen.max_seqlen_k, self.sk)
        self.dv = v.shape[-1]
        self.dtype, self.arch = q.dtype, architecture(q.device)
        self.scale = self.d**-0.5 if spec.scale is None else spec.scale
        self.qs, self.ks, self.vs = _strides(q), _strides(k), _strides(v)
        self.ranges = self.slopes = self.weight = None
        if spec.key_ranges is not None:
            self.ranges = spec.key_ranges if spec.key_ranges.stride(-1) == 1 else spec.key_ranges.contiguous()
        if spec.key_log_weight is not None:
            self.weight = _rows(spec.key_log_weight)
        if spec.alibi_slopes is not None:
            self.slopes = _rows(spec.alibi_slopes)
        window = spec.window_left >= 0, spec.window_right >= 0
        loose = self.ranges is not None or spec.mask is not None or self.weight is not None
        # square causal attention sees every key and leaves no row empty
        sanitize = loose or ((spec.causal or window[0] or window[1]) and (varlen is not None or self.sq != self.sk))
        self.flags = (
            spec.causal, *window, self.ranges is not None, spec.mask is not None, spec.bias is not None,
            self.weight is not None, self.slopes is not None, spec.softcap > 0, spec.sinks is not None,
            spec.dropout_p > 0, varlen is not None, sanitize,
        )  # fmt: skip
        bits = self.qs[0] | self.qs[1] | self.qs[2] | self.ks[0] | self.ks[1] | self.ks[2] | self.vs[0] | self.vs[1] | self.vs[2]
        pointers = q.data_ptr() | k.data_ptr() | v.data_ptr()
        # all strides and pointers are multiples of 16: the common case, for which compiled kernels are kept
        self.aligned = bits & 15 == 0 and pointers & 15 == 0 and bits < _LARGE
        self.tma = (
            self.aligned and varlen is None and self.sk >= TMA_MIN_KEYS and self.arch in ("sm90", "sm100") and q.dtype.itemsize == 2
            and self.weight is None and 0 not in self.ks and 0 not in self.vs and 0 not in self.qs
            and self.d in (64, 128, 256) and self.dv in (64, 128, 256)
        )  # fmt: skip

    def grid(self, rows: int, length: int, heads: int) -> tuple[int, int]:
        tiles = -(-length // rows)
        return tiles, tiles * heads * self.batch

    def optional(self) -> list[Tensor]:
        """ranges, mask, bias, weight, slopes, with q standing in for what is absent and never read."""
        spec, q = self.spec, self.q
        return [q if t is None else t for t in (self.ranges, spec.mask, spec.bias, self.weight, self.slopes)]

    def ranges_strides(self) -> tuple[int, int, int]:
        if self.ranges is None:
            return 0, 0, 0
        if self.varlen is not None:
            r = self.ranges if self.ranges.dim() == 3 else self.ranges[None]
            return 0, _broadcast(r, 0), r.stride(1)
        return _broadcast(self.ranges, 0), _broadcast(self.ranges, 1), self.ranges.stride(2)

    def plane_strides(self) -> list[int]:
        """Strides of mask and bias, 0 where they broadcast."""
        out: list[int] = []
        for t in (self.spec.mask, self.spec.bias):
            out += [0] * 4 if t is None else [_broadcast(t, i) for i in range(4)]
        return out

    def small_strides(self) -> tuple[int, int, int]:
        """Of key_log_weight (batch, head) and of the slopes (batch)."""
        w, a = self.weight, self.slopes
        wb = 0 if w is None or w.dim() == 2 else _broadcast(w, 0)
        wh = 0 if w is None else _broadcast(w, w.dim() - 2)
        return wb, wh, 0 if a is None or a.dim() == 1 else _broadcast(a, 0)

    def numbers(self) -> tuple:
        """window_left, window_right, threshold and the dropout offsets."""
        spec = self.spec
        return (
            min(spec.window_left, _LARGE), min(spec.window_right, _LARGE),
            dropout_threshold(spec.dropout_p), *spec.dropout_offsets,
        )  # fmt: skip

    def keep_scale(self) -> float:
        return 256 / (256 - dropout_threshold(self.spec.dropout_p))

    def cu(self) -> tuple[Tensor, Tensor]:
        return (self.q, self.q) if self.varlen is None else (self.varlen.cu_seqlens_q, self.varlen.cu_seqlens_k)

    def key(self, *more) -> tuple | None:
        """Names a compiled variant among those whose arguments Triton would specialise alike; None if it would not."""
        spec = self.spec
        if not self.aligned or spec.mask is not None or spec.bias is not None or interpreting():
            return None
        extra = [t for t in (self.ranges, self.weight, self.slopes, spec.sinks, spec.dropout_seed) if t is not None]
        if self.varlen is not None:
            extra += self.varlen[:2]
        bits = 0
        for t in extra:
            bits |= t.data_ptr() & 15
            if t.numel() >= _LARGE:
                return None
        if bits or max(spec.dropout_offsets) >= _LARGE:
            return None
        return (self.q.device.index, self.dtype, *(t.dtype for t in extra), *more)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _broadcast(x: Tensor, dim: int) -> int:
    return 0 if x.shape[dim] == 1 else x.stride(dim)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, head, row) strides; 0 for a dimension of size 1, whose stride may be anything."""
    if x.dim() == 3:
        a, b = x.stride()[:2]
        return 0, b if x.shape[1] > 1 else 0, a if x.shape[0] > 1 else 0
    shape, stride = x.shape, x.stride()
    return (
        stride[0] if shape[0] > 1 else 0,
        stride[1] if shape[1] > 1 else 0,
        stride[2] if shape[2] > 1 else 0,
    )


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@functools.lru_cache(maxsize=4096)
def _variant(kind: str, arch: str, dtype: torch.dtype, d: int, dv: int, flags: tuple, tma: bool, weight_grad: bool, head_loop: bool, precision: str):
    wide = dtype == torch.float32
    config = lookup(kind, arch, wide, max(d, dv), "tma" if tma else "")
    return features(config, d, dv, flags, atomic=kind == "fused", weight_grad=weight_grad, head_loop=head_loop, precision=precision if wide else "ieee"), config


def features(config: Config, d: int, dv: int, flags: tuple, *, atomic=False, weight_grad=False, head_loop=False, precision="ieee") -> Features:
    """The variant that a configuration and a call's flags describe."""
    named = dict(zip(FLAGS, flags))
    altered = named["HAS_BIAS"] or named["HAS_WEIGHT"]
    return Features(
        d, dv, split_head_dim(d), split_head_dim(dv), config.block_m, config.block_n, *flags,
        TMA=config.tma, ATOMIC_DQ=atomic, WEIGHT_GRAD=weight_grad, HEAD_LOOP=head_loop, PRECISION=precision,
        PLAIN=not (altered or named["HAS_ALIBI"] or named["HAS_SOFTCAP"]), MAY_EMPTY=altered,
    )  # fmt: skip


def _launch(kernel, grid: int, args: list, consts: tuple, config: Config | None, key: tuple | None) -> None:
    if grid == 0:
        return
    if key is not None:
        key = (kernel, consts, config, *key)
        compiled = _compiled.get(key)
        if compiled is not None:
            compiled[(grid, 1, 1)](*args, *consts)
            return
    options = {} if config is None else {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = kernel[(grid, 1, 1)](*args, *consts, **options)
    if key is not None:
        _compiled[key] = compiled


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """[B, H, S, D] as the tensor memory accelerator reads it: any strides, zeros past the end of S."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[-1]])


def _on_device(function):
    """Triton launches on the current device: make it the tensors' own."""

    @functools.wraps(function)
    def call(first, *args, **kwargs):
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return function(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return function(first, *args, **kwargs)

    return call


@_on_device
def forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None = None, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """out and lse. ``config`` overrides the tuning table."""
    c = _Call(q, k, v, spec, varlen)
    f, table = _variant("fwd", c.arch, c.dtype, c.d, c.dv, c.flags, c.tma, False, False, _precision())
    if config is not None:
        config = config._replace(tma=config.tma and c.tma)
        f, table = features(config, c.d, c.dv, c.flags, precision=f.PRECISION), config
    out, lse = new_bshd(q, c.dv), new_lse(q)
    if varlen is not None:  # rows outside every sequence
        out.zero_()
        lse.fill_(float("-inf"))
    tiles, grid = c.grid(f.BLOCK_M, c.max_q, c.hq)
    k_desc = v_desc = None
    if f.TMA:
        k_desc, v_desc = _descriptor(c.k, f.BLOCK_N), _descriptor(c.v, f.BLOCK_N)
    absent = c.q
    args = [
        c.q, c.k, c.v, out, lse, k_desc, v_desc, *c.optional(), absent if spec.sinks is None else spec.sinks,
        absent if spec.dropout_seed is None else spec.dropout_seed, *c.cu(), *c.qs, *c.ks, *c.vs, *c.ranges_strides(),
        *c.plane_strides(), *c.small_strides(), c.scale, spec.softcap, c.keep_scale(), c.hq, c.hq // c.hkv, c.sq, c.sk,
        c.max_q, tiles, *c.numbers(),
    ]  # fmt: skip
    _launch(attn_fwd_kernel, grid, args, (f,), table, c.key())
    return out, lse


@_on_device
def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: Spec, needs: Needs,
    deterministic: bool, varlen: Varlen | None = None, configs: dict[str, Config] | None = None,
) -> Gradients:  # fmt: skip
    """The gradients that ``needs`` names. ``configs`` overrides the tuning table, by kernel."""
    c = _Call(q, k, v, spec, varlen)
    dout, out = _rows(dout), _rows(out)
    lse2, delta, dsinks = _prepare(c, dout, dlse, out, lse)
    bias_needed, weight_needed = needs.dbias and spec.bias is not None, needs.dkey_log_weight and c.weight is not None
    keys_needed = needs.dk or needs.dv or weight_needed
    fused = needs.dq and keys_needed and not deterministic and _fused_pays(c)
    dq = dk = dv = dw = dbias = None
    if keys_needed:
        dq, dk, dv, dw = _keys(c, dout, lse2, delta, fused, weight_needed, configs or {})
    if needs.dq and not fused:
        dq = _queries(c, dout, lse2, delta, configs or {})
    if bias_needed:
        dbias = _bias(c, dout, lse2, delta)
    return Gradients(
        dq if needs.dq else None, dk if needs.dk else None, dv if needs.dv else None,
        dbias.to(spec.bias.dtype) if dbias is not None and spec.bias is not None else None,
        _like_weight(dw, c) if weight_needed else None,
        dsinks.to(spec.sinks.dtype) if needs.dsinks and dsinks is not None and spec.sinks is not None else None,
    )  # fmt: skip


def _fused_pays(c: _Call) -> bool:
    return os.environ.get("HF_FLASH_MC_FUSED_BACKWARD", "0") == "1"


def _prepare(c: _Call, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor):
    """lse in base 2, delta, dsinks (float32; None without sinks)."""
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    f, _ = _variant("dq", c.arch, c.dtype, c.d, c.dv, c.flags, False, False, False, "ieee")
    f = f._replace(BLOCK_M=PREPARE_ROWS, BLOCK_N=PREPARE_ROWS)
    tiles, grid = c.grid(PREPARE_ROWS, c.max_q, c.hq)
    dsink = None
    if c.spec.sinks is not None:
        dsink = torch.empty(c.batch, c.hq, tiles, dtype=torch.float32, device=lse.device)
    dlse_strides = (0, 0, 0)
    if dlse is not None:
        s = dlse.stride()
        dlse_strides = (s[0], s[1], s[2]) if c.varlen is None else (0, s[0], s[1])
    absent = c.q
    os_, ds = _strides(out), _strides(dout)
    args = [
        out, dout, lse, lse if dlse is None else dlse, absent if c.spec.sinks is None else c.spec.sinks, lse2, delta,
        lse if dsink is None else dsink, c.cu()[0], *os_, *ds, *dlse_strides, c.hq, c.sq, c.max_q, tiles,
    ]  # fmt: skip
    key = None
    bits = os_[0] | os_[1] | os_[2] | ds[0] | ds[1] | ds[2]
    if bits & 15 == 0 and bits < _LARGE and (out.data_ptr() | dout.data_ptr()) & 15 == 0 and (dlse is None or dlse.data_ptr() & 15 == 0):
        key = c.key(None if dlse is None else dlse.dtype)
    if c.varlen is not None:
        lse2.fill_(float("inf"))
    _launch(attn_bwd_prepare, grid, args, (dlse is not None, f), None, key)
    return lse2, delta, None if dsink is None else dsink.sum((0, 2))


def _shared_args(c: _Call, dout: Tensor) -> tuple[list, list]:
    """Strides and numbers that the gradient kernels take in the same order."""
    strides = [*c.qs, *c.ks, *c.vs, *_strides(dout), *c.ranges_strides()]
    return strides, [*c.plane_strides(), *c.small_strides(), c.scale, c.spec.softcap, c.keep_scale(), c.hq, c.hq // c.hkv, c.sq, c.sk]


def _gradient_key(c: _Call, dout: Tensor) -> tuple | None:
    ds = _strides(dout)
    bits = ds[0] | ds[1] | ds[2]
    return c.key() if bits & 15 == 0 and bits < _LARGE and dout.data_ptr() & 15 == 0 else None


def _pick(kind: str, c: _Call, dout: Tensor, configs: dict[str, Config], weight_grad: bool = False):
    tma = c.tma and dout.dim() == 4 and dout.data_ptr() & 15 == 0 and all(s & 7 == 0 and s for s in dout.stride()[:3])
    head_loop = c.ranges is not None and c.ranges.shape[-3] > 1 and c.hq != c.hkv and kind != "dq"
    f, config = _variant(kind, c.arch, c.dtype, c.d, c.dv, c.flags, tma, weight_grad, head_loop, _precision())
    if kind in configs:
        config = configs[kind]._replace(tma=configs[kind].tma and tma)
        f = features(config, c.d, c.dv, c.flags, atomic=f.ATOMIC_DQ, weight_grad=weight_grad, head_loop=head_loop, precision=f.PRECISION)
    return f, config


def _keys(c: _Call, dout: Tensor, lse2: Tensor, delta: Tensor, fused: bool, weight_needed: bool, configs: dict[str, Config]):
    """dk, dv and, where asked, dw (float32 [B, Hkv, Sk] or [Hkv, Tk]); fused, also dq."""
    f, config = _pick("fused" if fused else "dkdv", c, dout, configs, weight_needed)
    dk, dv = new_bshd(c.k), new_bshd(c.v)
    dw = None
    if weight_needed:
        shape = (c.batch, c.hkv, c.sk) if c.varlen is None else (c.hkv, c.sk)
        dw = torch.empty(shape, dtype=torch.float32, device=c.q.device)
    if c.varlen is not None:
        dk.zero_(), dv.zero_()
        if dw is not None:
            dw.zero_()
    acc = None
    if fused:
        acc = torch.zeros(new_bshd(c.q).transpose(1, 2).shape if c.q.dim() == 4 else c.q.shape, dtype=torch.float32, device=c.q.device)
    plans, tb, th = _key_plans(c, f)
    q_desc = do_desc = None
    if f.TMA:
        q_desc, do_desc = _descriptor(c.q, f.BLOCK_M), _descriptor(dout, f.BLOCK_M)
    tiles, grid = c.grid(f.BLOCK_N, c.max_k, c.hkv)
    strides, rest = _shared_args(c, dout)
    absent = c.q
    args = [
        c.q, c.k, c.v, dout, lse2, delta, lse2 if acc is None else acc, dk, dv, lse2 if dw is None else dw, q_desc, do_desc,
        absent if plans is None else plans, *c.optional(), absent if c.spec.dropout_seed is None else c.spec.dropout_seed,
        *c.cu(), *strides, tb, th, *rest, c.max_q, c.max_k, tiles, *c.numbers(),
    ]  # fmt: skip
    _launch(attn_bwd_dkdv_kernel, grid, args, (f,), config, _gradient_key(c, dout))
    dq = None
    if acc is not None:
        dq = new_bshd(c.q)
        _launch(attn_bwd_finish, -(-acc.numel() // 1024), [acc, dq, acc.numel(), c.scale], (1024,), None, None)
    return dq, dk, dv, dw


def _key_plans(c: _Call, f: Features) -> tuple[Tensor | None, int, int]:
    """Which query tiles each key tile meets; only key_ranges needs it, the other rules have closed forms.

    Returns int32 [planes * key tiles, 4] and the strides of batch and head in it, in key tiles.
    """
    if c.ranges is None:
        return None, 0, 0
    m_tiles, n_tiles = -(-c.max_q // f.BLOCK_M), -(-c.max_k // f.BLOCK_N)
    if c.varlen is not None:
        r = c.ranges if c.ranges.dim() == 3 else c.ranges[None]
        planes, sequences, tb, th = r.shape[0], c.batch, n_tiles, c.batch * n_tiles if r.shape[0] > 1 else 0
    else:
        r = c.ranges.contiguous().flatten(0, 1)
        planes, sequences = r.shape[0], 1
        tb = n_tiles * c.ranges.shape[1] if c.ranges.shape[0] > 1 else 0
        th = n_tiles if c.ranges.shape[1] > 1 else 0
    bounds = torch.empty(planes * sequences * m_tiles, 4, dtype=torch.int32, device=c.q.device)
    plans = torch.empty(planes * sequences * n_tiles, 4, dtype=torch.int32, device=c.q.device)
    cu_q, cu_k = c.cu()
    args = [r, bounds, cu_q, cu_k, r.stride(0), r.stride(1), c.sq, c.sk, c.max_q, m_tiles, *c.numbers()[:2]]
    attn_bwd_tile_bounds[(m_tiles, planes, sequences)](*args, f)
    attn_bwd_key_plans[(n_tiles, planes, sequences)](bounds, plans, cu_k, c.sk, c.max_k, m_tiles, f)
    return plans, tb, th


def _queries(c: _Call, dout: Tensor, lse2: Tensor, delta: Tensor, configs: dict[str, Config]) -> Tensor:
    """dq by the split form."""
    f, config = _pick("dq", c, dout, configs)
    dq = new_bshd(c.q)
    if c.varlen is not None:
        dq.zero_()
    k_desc = v_desc = None
    if f.TMA:
        k_desc, v_desc = _descriptor(c.k, f.BLOCK_N), _descriptor(c.v, f.BLOCK_N)
    tiles, grid = c.grid(f.BLOCK_M, c.max_q, c.hq)
    strides, rest = _shared_args(c, dout)
    args = [
        c.q, c.k, c.v, dout, lse2, delta, dq, k_desc, v_desc, *c.optional(),
        c.q if c.spec.dropout_seed is None else c.spec.dropout_seed, *c.cu(), *strides, *rest, c.max_q, tiles, *c.numbers(),
    ]  # fmt: skip
    _launch(attn_bwd_dq_kernel, grid, args, (f,), config, _gradient_key(c, dout))
    return dq


def _bias(c: _Call, dout: Tensor, lse2: Tensor, delta: Tensor) -> Tensor:
    """dbias in float32, of bias's shape."""
    f, config = _variant("dbias", c.arch, c.dtype, c.d, c.dv, c.flags, False, False, False, _precision())
    bias = c.spec.bias
    assert bias is not None
    bb, bh, bm, bn = bias.shape
    grad = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
    m_all, n_all = -(-c.sq // f.BLOCK_M), -(-c.sk // f.BLOCK_N)
    # a dimension of size 1 in the bias is a sum here, unless it is 1 in the attention too
    m_tiles, m_steps = (1, m_all) if bm == 1 else (m_all, 1)
    n_tiles, n_steps = (1, n_all) if bn == 1 else (n_all, 1)
    strides, rest = _shared_args(c, dout)
    args = [
        c.q, c.k, c.v, dout, lse2, delta, grad, *c.optional(), c.q if c.spec.dropout_seed is None else c.spec.dropout_seed,
        *strides, *rest, c.batch if bb == 1 else 1, c.hq if bh == 1 else 1, m_tiles, n_tiles, m_steps, n_steps, bh, *c.numbers(),
    ]  # fmt: skip
    _launch(attn_bwd_dbias_kernel, n_tiles * m_tiles * bh * bb, args, (bm == 1, bn == 1, f), config, None)
    return grad


def _like_weight(dw: Tensor, c: _Call) -> Tensor:
    """Sum the per-head gradient over what key_log_weight broadcasts."""
    weight = c.spec.key_log_weight
    assert weight is not None
    return dw.sum_to_size(weight.shape).to(weight.dtype)
