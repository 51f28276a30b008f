"""The "hopper" back end: Gluon kernels for sm_90, behind the interface of ``portable/launch.py``.

Any backward is exact on the same out and lse, whichever kernels made them: what the fused one lacks, the portable has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..portable import launch as portable
from ..portable.launch import _on_device
from ..portable.outside import fill_outside
from ..portable.plan import Plan, plan_of
from ..spec import Gradients, Needs, Spec, Varlen, new_strided
from ..tuning import architecture
from . import backward_launch as fused
from .forward import attn_fwd_hopper_kernel
from .plan import HopperConfig, Launch, items_of, strided, tiles, tma_problem, variant
from .programs import idle_counters, programs

MAX_HEAD_DIM = 256
TOGETHER = 512, 32  # tiles and heads: the fastest of many on an H100, causal, S 1024 to 16384
LAUNCH_REGISTERS = 160  # for two consumer warpgroups and the producer's, before they trade registers
EMULATED = False  # tests run the kernels on CPU tensors
_ABSENT = (0,) * 7  # the addresses of optional tensors and of cu_seqlens
Configs = dict[str, HopperConfig]


def unsupported(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None = None) -> list[str]:
    """Reasons why these kernels cannot take the call; empty if they can."""
    reasons = []
    if not EMULATED and architecture(q.device) != "sm90":
        reasons.append(f"device {q.device}: the Hopper kernels run on GPUs of compute capability 9.0")
    if q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {q.dtype}: the Hopper kernels take float16 and bfloat16")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        reasons.append(f"head dim {max(q.shape[-1], v.shape[-1])}: the Hopper kernels take up to {MAX_HEAD_DIM}")
    if spec.block_rows is not None:
        reasons.append("mask: the Hopper kernels walk no lists of blocks")
    for name, given in (("mask", spec.mask), ("bias", spec.bias)):
        if given is not None:
            reasons.append(f"{name}: the Hopper kernels read no dense tile of it")
    for name, x in (("q", q), ("k", k), ("v", v)):
        problem = tma_problem(x)
        if problem is not None:
            reasons.append(f"{name}: {problem}, which the tensor memory accelerator needs")
    return reasons + strided(spec)


def reasons_of(plan: Plan, q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None) -> list[str]:
    """``unsupported``, kept with the plan: everything it looks at is part of a plan's key."""
    reasons = plan.launches.get("hopper-unsupported")
    if reasons is None:
        reasons = plan.launches["hopper-unsupported"] = unsupported(q, k, v, spec, varlen)
    return reasons


@_on_device
def forward(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None = None, configs: Configs | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse. ``configs`` overrides the table, by kernel ("fwd")."""
    plan = plan_of(q, k, v, spec, varlen)
    if reasons := reasons_of(plan, q, k, v, spec, varlen):
        raise NotImplementedError(
            "impl='hopper' cannot take this call: " + "; ".join(reasons) + ". Use impl='auto' or impl='triton'"
        )
    return run_forward(plan, q, k, v, spec, varlen, configs.get("fwd") if configs else None)


def run_forward(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None, config: HopperConfig | None = None
) -> tuple[Tensor, Tensor]:
    """The forward of a call that is known to be supported."""
    out, lse = new_strided(q, plan.out_layout), new_strided(q, plan.lse_layout, torch.float32)
    launch = plan.launches.get(("hopper-fwd", config))
    if launch is None:
        launch = plan.launches["hopper-fwd", config] = _forward_launch(plan, q, k, v, out, config)
    cu_q = cu_k = None
    if varlen is not None:
        cu_q, cu_k = varlen[:2]
        fill_outside(plan, out, cu_q, plan.max_q, 0.0)
        fill_outside(plan, lse, cu_q, plan.max_q, float("-inf"))
    counters = idle_counters(q)
    small = (spec.key_ranges, spec.key_log_weight, spec.alibi_slopes, spec.sinks, spec.dropout_seed)
    launch([q, k, v, out], [*small, cu_q, cu_k, out, lse, counters])
    return out, lse


def _forward_launch(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, config: HopperConfig | None
) -> Launch:
    f, cut, config = variant(plan, config)
    together = (*TOGETHER, 4 if cut.DV <= 128 else 1)
    items = items_of(plan, f, f.BLOCK_M, plan.sq, plan.max_q, plan.hq, *together)
    cut = cut._replace(STACKED=items.stacked)
    described = [
        tiles(q, 64, cut.D), tiles(k, f.BLOCK_N, cut.D), tiles(v, f.BLOCK_N, cut.DV), tiles(out, 64, cut.OUT_COLUMNS),
    ]  # fmt: skip
    weight_strides = plan.other_strides[8:]
    numbers = (*plan.ranges_strides, *weight_strides, plan.scale, plan.softcap, plan.keep_scale, plan.hq,
               plan.hq // plan.hkv, plan.sq, plan.sk, plan.max_q, plan.batch,
               items.tiles * items.section, items.total, items.section, *plan.tail)  # fmt: skip
    grid = programs(items.total, q.device, config.programs)
    registers = None if config.programs == 1 else LAUNCH_REGISTERS // config.programs
    return Launch(attn_fwd_hopper_kernel, grid, described, numbers, (f, cut), registers)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: Spec,
    needs: Needs, deterministic: bool, varlen: Varlen | None = None,
) -> Gradients:  # fmt: skip
    """The gradients that ``needs`` names: by the fused kernel where it runs, else by the portable ones."""
    if not backward_reasons(q, k, v, spec, needs, deterministic, varlen):
        return fused.backward(dout, dlse, q, k, v, out, lse, spec, needs, deterministic, varlen)
    return portable.backward(dout, dlse, q, k, v, out, lse, spec, needs, deterministic, varlen)


class Call:
    """What ``repeat`` keeps of a call on these kernels."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, impl: str, spec: Spec):
        self.kept, self.spec = (impl, (), spec[10:], ()), spec
        self.plan = plan_of(q, k, v, spec, None)
        reasons = backward_reasons(q, k, v, spec, portable.ALL, False)
        self.fused = not reasons
        self.launch: Launch | None = None
        self.steps: dict[Any, Any] = {}  # of the backward, by the layouts of dout and out

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _repeated_forward(q, k, v, self)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor | None, ...] | None:
        if self.fused and (q.stride(), k.stride(), v.stride()) == self.plan.inputs:
            return fused.repeated(dout, q, k, v, out, lse, self)
        return None


@_on_device
def _repeated_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """``run_forward`` of a call that was made before and has no optional tensors: each address is asked for once."""
    plan, launch = call.plan, call.launch
    if launch is None or launch.runner is None:
        out, lse = run_forward(plan, q, k, v, call.spec, None)
        call.launch = plan.launches["hopper-fwd", None]
        return out, lse
    out, lse = new_strided(q, plan.out_layout), new_strided(q, plan.lse_layout, torch.float32)
    out_at = out.data_ptr()
    # q, k and v are aligned as they were, and new memory is
    launch.runner(
        [q, k, v, out], (*_ABSENT, out_at, lse.data_ptr(), idle_counters(q).data_ptr()),
        (q.data_ptr(), k.data_ptr(), v.data_ptr(), out_at),
    )  # fmt: skip
    return out, lse


def backward_reasons(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, needs: Needs, deterministic: bool, varlen: Varlen | None = None
) -> list[str]:
    """Why the fused backward does not run, kept with the plan."""
    kept = plan_of(q, k, v, spec, varlen).launches
    key = ("hopper-bwd-unsupported", needs, deterministic)
    if key not in kept:
        kept[key] = fused.unsupported_backward(q, k, v, spec, needs, deterministic, varlen)
    return kept[key]


def notes(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None) -> list[str]:
    """What there is to know of a call that these kernels take: why its backward is the portable one."""
    needs = Needs(dkey_log_weight=spec.key_log_weight is not None, dsinks=spec.sinks is not None)
    reasons = backward_reasons(q, k, v, spec, needs, torch.are_deterministic_algorithms_enabled(), varlen)
    return [f"backward by the portable kernels: {reason}" for reason in reasons]
