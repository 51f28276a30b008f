"""The "triton" back end: from a call to kernel launches. See backward.py for the two forms of the backward."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..block_mask import block_table
from ..spec import Gradients, Needs, Spec, Varlen, new_strided
from ..tuning import Config, architecture, largest_head_dim
from . import shapes
from .backward import (
    attn_bwd_dkdv_kernel,
    attn_bwd_finish,
    attn_bwd_key_plans,
    attn_bwd_prepare,
    attn_bwd_tile_bounds,
)
from .backward_dq import attn_bwd_dq_kernel
from .bias_grad import attn_bwd_dbias_kernel
from .forward import attn_fwd_kernel
from .outside import fill_outside
from .plan import INTERPRETED, Launch, Plan, list_strides, plan_of, strides, tma_can_read

PREPARE_ROWS, PREPARE_ROWS_BIG = 64, 16  # up to Dv = 256, and above
FINISH_BLOCK = 1024
ALL = Needs()  # the gradients of q, k and v
Configs = dict[str, Config]


def unsupported(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None = None) -> list[str]:
    """Reasons why these kernels cannot take the call; empty if they can."""
    reasons = []
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype {q.dtype}: the Triton kernels take float16, bfloat16 and float32")
    arch, wide = architecture(q.device), q.dtype == torch.float32
    head_dim, most = max(q.shape[-1], v.shape[-1]), largest_head_dim(arch, wide)
    if head_dim > most:
        reasons.append(f"head dim {head_dim}: the Triton kernels take up to {most} in {q.dtype} on {arch}")
    if q.device.type == "cpu" and not INTERPRETED:
        reasons.append("CPU tensors: the Triton kernels run on a GPU, or anywhere with TRITON_INTERPRET=1")
    return reasons


def _on_device(function: Any) -> Any:
    """Triton launches on the current device: make it the tensors' own."""

    @functools.wraps(function)
    def call(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not first.is_cuda or first.get_device() == torch._C._cuda_getDevice():
            return function(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return function(first, *args, **kwargs)

    return call


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _planned(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None, plan: Plan | None
) -> tuple[Plan, Tensor, Tensor, Tensor, Spec]:
    """The plan, after copies of what the kernels cannot stride through: only the last dimension must be contiguous."""
    plan = plan or plan_of(q, k, v, spec, varlen)
    if plan.needs_copies:
        q, k, v = _rows(q), _rows(k), _rows(v)
        ranges, weight, slopes, sinks = spec.key_ranges, spec.key_log_weight, spec.alibi_slopes, spec.sinks
        spec = spec._replace(
            key_ranges=None if ranges is None else _rows(ranges),
            key_log_weight=None if weight is None else _rows(weight),
            alibi_slopes=None if slopes is None else _rows(slopes),
            sinks=None if sinks is None else _rows(sinks),
            block_rows=None if spec.block_rows is None else spec.block_rows.contiguous(),
            block_columns=None if spec.block_columns is None else spec.block_columns.contiguous(),
            block_bits=None if spec.block_bits is None else spec.block_bits.contiguous(),
        )
        plan = plan_of(q, k, v, spec, varlen)
    return plan, q, k, v, spec


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """[B, H, S, D] as the tensor memory accelerator reads it: any strides, zeros past the end of S."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[-1]])


def _descriptors(on: bool, a: Tensor, b: Tensor, rows: int) -> tuple:
    return (_descriptor(a, rows), _descriptor(b, rows)) if on else (None, None)


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None, *more: Tensor | None
) -> list[Tensor | None]:
    """The tensors every kernel takes, in its order, and ``more`` behind them; first of these the blocks it walks."""
    cu_q, cu_k = (None, None) if varlen is None else varlen[:2]
    ranges, mask, bias, weight, slopes, _, seed = spec[:7]
    mask = spec.block_bits if mask is None else mask  # whose strides are then 0
    return [q, k, v, ranges, mask, bias, weight, slopes, seed, cu_q, cu_k, *more]


@_on_device
def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None = None, configs: Configs | None = None,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out and lse. ``configs`` overrides the tuning table, by kernel; ``plan`` is the call's, where it is known."""
    plan, q, k, v, spec = _planned(q, k, v, spec, varlen, plan)
    if configs is None and (family := shapes.choose(plan, "fwd")):
        return shapes.forward(family, plan, q, k, v, spec)
    config = configs.get("fwd") if configs else None
    found = plan.launches.get(("fwd", config))
    if found is None:
        f, config_used = plan.variant("fwd", config)
        tiles, grid = plan.grid(f.BLOCK_M, plan.max_q, plan.hq)
        numbers = (*plan.qs, *plan.ks, *plan.vs, *plan.ranges_strides, *plan.numbers(*plan.row_blocks), plan.max_q,
                   tiles, *plan.tail)  # fmt: skip
        found = plan.launches["fwd", config] = Launch(attn_fwd_kernel, grid, numbers, (f,), config_used), f
    launch, f = found
    out, lse = new_strided(q, plan.out_layout), new_strided(q, plan.lse_layout, torch.float32)
    if varlen is not None:
        fill_outside(plan, out, varlen.cu_seqlens_q, plan.max_q, 0.0)
        fill_outside(plan, lse, varlen.cu_seqlens_q, plan.max_q, float("-inf"))
    launch(_inputs(q, k, v, spec, varlen, spec.block_rows, spec.sinks, out, lse), _descriptors(f.TMA, k, v, f.BLOCK_N))
    return out, lse


class Call:
    """What ``repeat`` keeps of a call on these kernels."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, impl: str, spec: Spec):
        self.kept, self.spec = (impl, (), spec[10:], ()), spec
        self.plan = plan_of(q, k, v, spec, None)
        few_keys = all(shapes.choose(self.plan, way) == "few_keys" for way in ("fwd", "bwd"))
        self.small = shapes.OneLaunch(self.plan) if few_keys and not self.plan.needs_copies else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = None if self.small is None else _small_forward(q, k, v, self.small)
        return found or forward(q, k, v, self.spec, None, None, self.plan)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor | None, ...] | None:
        plan, small = self.plan, self.small
        if small is not None and (found := _small_backward(dout, q, k, v, out, lse, small)) is not None:
            return found
        if not plan.takes(q, k, v):
            return None
        gradients = backward(dout, None, q, k, v, out, lse, self.spec, ALL, False, None, None, plan)
        if small is not None:
            small.learn(dout, out)
        return gradients[:3]


@_on_device
def _small_forward(q: Tensor, k: Tensor, v: Tensor, small: shapes.OneLaunch) -> tuple[Tensor, Tensor] | None:
    return small.forward(q, k, v)


@_on_device
def _small_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, small: shapes.OneLaunch
) -> tuple[Tensor, ...] | None:
    return small.backward(dout, q, k, v, out, lse)


@_on_device
def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: Spec,
    needs: Needs, deterministic: bool, varlen: Varlen | None = None, configs: Configs | None = None,
    plan: Plan | None = None,
) -> Gradients:  # fmt: skip
    """The gradients that ``needs`` names. ``configs`` overrides the tuning table, by kernel; naming "fused" takes
    that form wherever the call need not be deterministic."""
    plan, q, k, v, spec = _planned(q, k, v, spec, varlen, plan)
    dout, out = _rows(dout), _rows(out)
    if configs is None and (family := shapes.choose(plan, "bwd")):
        return shapes.backward(family, plan, dout, dlse, q, k, v, out, lse, spec, needs)
    step = _Backward(plan, q, k, v, spec, varlen, dout, configs or {})
    dsinks = step.prepare(dlse, out, lse)
    weight_needed = needs.dkey_log_weight and spec.key_log_weight is not None
    keys_needed = needs.dk or needs.dv or weight_needed
    fused = needs.dq and keys_needed and not deterministic and use_fused(step.configs)
    dq = dk = dv = dw = None
    if keys_needed:
        dq, dk, dv, dw = step.keys(fused, weight_needed)
    if needs.dq and not fused:
        dq = step.queries()
    bias, weight, sinks = spec.bias, spec.key_log_weight, spec.sinks
    return Gradients(
        dq if needs.dq else None,
        dk if needs.dk else None,
        dv if needs.dv else None,
        step.bias().to(bias.dtype) if needs.dbias and bias is not None else None,
        None if dw is None or weight is None else dw.sum_to_size(weight.shape).to(weight.dtype),
        dsinks.to(sinks.dtype) if needs.dsinks and dsinks is not None and sinks is not None else None,
    )


def use_fused(configs: Configs) -> bool:
    """The fused form sums dQ by atomics, which on an H100 costs more than the two products it saves.

    So it runs where asked: by ``configs``, or by the environment variable HF_FLASH_MC_BACKWARD ("split" or "fused").
    """
    asked = os.environ.get("HF_FLASH_MC_BACKWARD", "split")
    if asked not in ("split", "fused"):
        raise ValueError(f'HF_FLASH_MC_BACKWARD: expected "split" or "fused", got {asked!r}')
    return "fused" in configs or asked == "fused"


class _Backward:
    """One backward: the tensors that its kernels share."""

    def __init__(
        self,
        plan: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spec: Spec,
        varlen: Varlen | None,
        dout: Tensor,
        configs: Configs,
    ):
        self.plan, self.q, self.k, self.v, self.spec, self.varlen = plan, q, k, v, spec, varlen
        self.dout, self.configs = dout, configs
        self.layout = (dout.stride(), dout.data_ptr() & 15)  # of dout: part of every key
        self.lse2 = self.delta = q  # set by prepare

    def _launch(self, kind: str, *more: Any) -> tuple[Any, Any]:
        key = (kind, self.layout, self.configs.get(kind), *more)
        return key, self.plan.launches.get(key)

    def prepare(self, dlse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor | None:
        """lse in base 2 and delta; returns dsinks in float32, None without sinks."""
        plan = self.plan
        self.lse2, self.delta = new_strided(lse, plan.lse_layout), new_strided(lse, plan.lse_layout)
        key, launch = self._launch("prepare", out.stride(), None if dlse is None else (dlse.stride(), dlse.dtype))
        if launch is None:
            f, _ = plan.variant("dq")
            rows = PREPARE_ROWS if plan.dv <= 256 else PREPARE_ROWS_BIG
            f = f._replace(BLOCK_M=rows, BLOCK_N=rows)
            tiles, grid = plan.grid(rows, plan.max_q, plan.hq)
            s = (0, 0, 0) if dlse is None else (0, *dlse.stride()) if plan.packed else dlse.stride()
            numbers = (*strides(out), *strides(self.dout), *s, plan.hq, plan.sq, plan.max_q, tiles)
            launch = plan.launches[key] = Launch(attn_bwd_prepare, grid, numbers, (dlse is not None, f)), tiles
        run, tiles = launch
        dsink = None
        if self.spec.sinks is not None:
            dsink = lse.new_empty((plan.batch, plan.hq, tiles), dtype=torch.float32)
        cu_q = None if self.varlen is None else self.varlen.cu_seqlens_q
        if cu_q is not None:
            fill_outside(plan, self.lse2, cu_q, plan.max_q, float("inf"))
        run([out, self.dout, lse, dlse, self.spec.sinks, self.lse2, self.delta, dsink, cu_q])
        return None if dsink is None else dsink.sum((0, 2))

    def _tensors(self, blocks: Tensor | None, *more: Tensor | None) -> list[Tensor | None]:
        return _inputs(self.q, self.k, self.v, self.spec, self.varlen, blocks, self.dout, self.lse2, self.delta, *more)

    def _strides(self) -> tuple[int, ...]:
        plan = self.plan
        return (*plan.qs, *plan.ks, *plan.vs, *strides(self.dout), *plan.ranges_strides)

    def keys(self, fused: bool, weight_needed: bool) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """(dq if fused, dk, dv, dw in float32 [B, Hkv, Sk] or [Hkv, Tk])."""
        plan, kind = self.plan, "fused" if fused else "dkdv"
        key, found = self._launch(kind, weight_needed)
        if found is None:
            f, config = plan.variant(
                kind, self.configs.get(kind), tma=tma_can_read(self.dout), weight_grad=weight_needed
            )
            tiles, grid = plan.grid(f.BLOCK_N, plan.max_k, plan.hkv)
            planner = _KeyPlans(plan, f)
            numbers = (*self._strides(), *planner.strides, *plan.numbers(*plan.column_blocks), plan.max_q, plan.max_k,
                       tiles, *plan.tail)  # fmt: skip
            found = plan.launches[key] = Launch(attn_bwd_dkdv_kernel, grid, numbers, (f,), config), f, planner
        launch, f, planner = found
        dk, dv = new_strided(self.k, plan.k_layout), new_strided(self.v, plan.v_layout)
        dw = acc = dq = None
        if weight_needed:
            dw = self.lse2.new_empty((plan.hkv, plan.sk) if plan.packed else (plan.batch, plan.hkv, plan.sk))
        if fused:
            dq = new_strided(self.q, plan.q_layout)
            acc = torch.zeros(dq.numel(), dtype=torch.float32, device=dq.device)
        if self.varlen is not None:
            for t in (dk, dv, dw):
                if t is not None:
                    fill_outside(plan, t, self.varlen.cu_seqlens_k, plan.max_k, 0.0)
        plans = planner.run(self.spec.key_ranges, self.varlen)
        launch(
            self._tensors(self.spec.block_columns, plans, acc, dk, dv, dw),
            _descriptors(f.TMA, self.q, self.dout, f.BLOCK_M),
        )
        if acc is not None and dq is not None:
            Launch(attn_bwd_finish, -(-acc.numel() // FINISH_BLOCK), (acc.numel(), plan.scale), (FINISH_BLOCK,))(
                [acc, dq]
            )
        return dq, dk, dv, dw

    def queries(self) -> Tensor:
        """dq by the split form."""
        plan = self.plan
        key, found = self._launch("dq")
        if found is None:
            f, config = plan.variant("dq", self.configs.get("dq"))
            tiles, grid = plan.grid(f.BLOCK_M, plan.max_q, plan.hq)
            numbers = (*self._strides(), *plan.numbers(*plan.row_blocks), plan.max_q, tiles, *plan.tail)
            found = plan.launches[key] = Launch(attn_bwd_dq_kernel, grid, numbers, (f,), config), f
        launch, f = found
        dq = new_strided(self.q, plan.q_layout)
        if self.varlen is not None:
            fill_outside(plan, dq, self.varlen.cu_seqlens_q, plan.max_q, 0.0)
        launch(self._tensors(self.spec.block_rows, dq), _descriptors(f.TMA, self.k, self.v, f.BLOCK_N))
        return dq

    def bias(self) -> Tensor:
        """dbias in float32, of bias's shape."""
        plan, bias = self.plan, self.spec.bias
        assert bias is not None
        rows = self.spec.block_rows
        table = None if rows is None else block_table(rows)
        blocks = list_strides(table)
        key, launch = self._launch("dbias")
        if launch is None:
            f, config = plan.variant("dbias", tma=False)
            bb, bh, bm, bn = bias.shape
            m_all, n_all = -(-plan.sq // f.BLOCK_M), -(-plan.sk // f.BLOCK_N)
            # a dimension of size 1 in the bias is a sum over that of the attention
            m_tiles, m_steps = (1, m_all) if bm == 1 else (m_all, 1)
            n_tiles, n_steps = (1, n_all) if bn == 1 else (n_all, 1)
            sums = (plan.batch if bb == 1 else 1, plan.hq if bh == 1 else 1)
            numbers = (*self._strides(), *plan.numbers(*blocks), *sums, m_tiles, n_tiles, m_steps, n_steps, bh,
                       *plan.tail)  # fmt: skip
            grid = n_tiles * m_tiles * bh * bb
            launch = plan.launches[key] = Launch(attn_bwd_dbias_kernel, grid, numbers, (bm == 1, bn == 1, f), config)
        grad = self.lse2.new_empty(bias.shape)
        launch(self._tensors(table, grad))
        return grad


class _KeyPlans:
    """Which query tiles each key tile meets; only key_ranges needs it, the other rules have closed forms.

    ``strides`` are those of batch and head in the result, in key tiles.
    """

    def __init__(self, plan: Plan, f: Any):
        self.strides = (0, 0)
        shape = plan.ranges_shape
        if shape is None:
            return
        m_tiles, n_tiles = -(-plan.max_q // f.BLOCK_M), -(-plan.max_k // f.BLOCK_N)
        many_heads = len(shape) > 2 and shape[-3] > 1
        if plan.packed:
            planes, sequences = shape[0] if many_heads else 1, plan.batch
            self.strides = (n_tiles, sequences * n_tiles if many_heads else 0)
        else:
            planes, sequences = shape[0] * shape[1], 1
            self.strides = (n_tiles * shape[1] if shape[0] > 1 else 0, n_tiles if many_heads else 0)
        self.sizes = planes * sequences * m_tiles, planes * sequences * n_tiles
        numbers = (shape[-2] * 2, 2, plan.sq, plan.sk, plan.max_q, m_tiles, *plan.tail[:2])
        self.bounds = Launch(attn_bwd_tile_bounds, (m_tiles, planes, sequences), numbers, (f,))
        self.plans = Launch(attn_bwd_key_plans, (n_tiles, planes, sequences), (plan.sk, plan.max_k, m_tiles), (f,))

    def run(self, ranges: Tensor | None, varlen: Varlen | None) -> Tensor | None:
        """int32 [planes * key tiles, 4]."""
        if ranges is None:
            return None
        bounds, plans = (ranges.new_empty((n, 4)) for n in self.sizes)
        cu_q, cu_k = (None, None) if varlen is None else varlen[:2]
        self.bounds([ranges.contiguous(), bounds, cu_q, cu_k])
        self.plans([bounds, plans, cu_k])
        return plans
