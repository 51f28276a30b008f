"""The "hopper" back end's backward: from a call to launches of the fused kernel in backward.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..portable.launch import _KeyPlans, _on_device
from ..portable.plan import Launch as PortableLaunch
from ..portable.plan import Plan, features, plan_of, strides
from ..spec import Gradients, Needs, Spec, Varlen, bshd_layout, new_bshd
from ..tuning import Config
from .backward import Schedule, attn_bwd_hopper_kernel
from .backward_rows import attn_bwd_hopper_round, attn_bwd_hopper_rows
from .plan import Launch, padded, tiles, tma_problem

HEAD_DIMS = (40, 128)  # below, padding to 64 wastes more than the fused form saves
KEYS = 128  # of one program
ROUND_BLOCK = 4096
SCHEDULES = {64: Schedule(SUBS=2), 128: Schedule()}  # by padded head dim
Configs = dict[str, Schedule]


def unsupported_backward(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, needs: Needs, deterministic: bool, varlen: Varlen | None = None
) -> list[str]:
    """Reasons why the fused backward cannot take the call, or should not; empty if it can."""
    reasons = []
    if q.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {q.dtype}: the fused backward takes float16 and bfloat16")
    low, high = HEAD_DIMS
    if not (low <= min(q.shape[-1], v.shape[-1]) and max(q.shape[-1], v.shape[-1]) <= high):
        reasons.append(f"head dims {q.shape[-1]} and {v.shape[-1]}: the fused backward takes {low} to {high}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if (problem := tma_problem(x)) is not None:
            reasons.append(f"{name}: {problem}, which the tensor memory accelerator needs")
    if deterministic:
        reasons.append("deterministic: the fused backward sums dQ in no fixed order")
    if not (needs.dq and (needs.dk or needs.dv)):
        reasons.append("gradients: the fused backward computes dq, dk and dv together")
    absent = {
        "varlen": varlen is not None,
        "mask": spec.mask is not None,
        "bias": spec.bias is not None,
        "key_log_weight": spec.key_log_weight is not None,
        "alibi_slopes": spec.alibi_slopes is not None,
        "softcap": spec.softcap > 0,
        "dropout_p": spec.dropout_p > 0,
    }
    reasons += [f"{name}: not in the fused backward" for name, given in absent.items() if given]
    ranges = spec.key_ranges
    if ranges is not None and ranges.dim() == 4 and ranges.shape[1] > 1 and q.shape[1] != k.shape[1]:
        reasons.append("key_ranges: the fused backward takes one range for all query heads of a KV head")
    return reasons


@_on_device
def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spec: Spec,
    needs: Needs, deterministic: bool, varlen: Varlen | None = None, configs: Configs | None = None,
) -> Gradients:  # fmt: skip
    """The gradients that ``needs`` names, for a call that ``unsupported_backward`` finds no reason against.

    ``configs={"bwd": Schedule(...)}`` overrides the schedule.
    """
    plan = plan_of(q, k, v, spec, varlen)
    if tma_problem(dout) is not None:
        dout = new_bshd(dout).copy_(dout)
    if out.stride(-1) != 1:
        out = out.contiguous()
    schedule = configs.get("bwd") if configs else None
    key = ("hopper-bwd", schedule, dout.stride(), out.stride(), None if dlse is None else (dlse.stride(), dlse.dtype))
    steps = plan.launches.get(key)
    if steps is None:
        steps = plan.launches[key] = _Steps(plan, q, k, v, dout, out, dlse, schedule)
    rows = lse.new_empty(steps.rows_shape)
    total = lse.new_empty_strided(*steps.total_layout)
    dq, dk, dv = new_bshd(q), new_bshd(k), new_bshd(v)
    dsink = None if spec.sinks is None else lse.new_empty(steps.rows_shape[:3])
    steps.rows([out, dout, lse, dlse, spec.sinks, rows, total, dsink])
    plans = steps.key_plans.run(spec.key_ranges, None)
    steps.main(
        [q, k, v, dout, total, dk, dv],
        [rows, spec.key_ranges, spec.key_log_weight, spec.alibi_slopes, spec.dropout_seed, plans, None],
    )
    steps.round([total, dq])
    return Gradients(
        dq,
        dk if needs.dk else None,
        dv if needs.dv else None,
        None,
        None,
        None if dsink is None or spec.sinks is None or not needs.dsinks else dsink.sum((0, 2)).to(spec.sinks.dtype),
    )


class _Steps:
    """The launches of one signature: what rows bring, the fused kernel, the rounding of dQ."""

    def __init__(
        self,
        plan: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dout: Tensor,
        out: Tensor,
        dlse: Tensor | None,
        schedule: Schedule | None,
    ):
        width, width_v = padded(plan.d), padded(plan.dv)
        schedule = schedule or SCHEDULES[max(width, width_v)]
        block = 64 * schedule.SUBS
        f = features(Config(block, KEYS, 4, 1), plan.d, plan.dv, plan.flags)
        blocks = -(-plan.sq // 128) * 2  # of 64 rows: a whole number of the largest tiles
        self.rows_shape = (plan.batch, plan.hq, blocks, 2, 64)
        s = (0, 0, 0) if dlse is None else dlse.stride()
        numbers = (*strides(out), *strides(dout), *s, plan.hq, plan.sq, blocks)
        grid = blocks * plan.hq * plan.batch
        self.rows = PortableLaunch(attn_bwd_hopper_rows, grid, numbers, (width, dlse is not None, f))

        self.total_layout = bshd_layout(q.shape, plan.d)
        total = torch.empty_strided(*self.total_layout, dtype=torch.float32, device="meta")
        columns = width if schedule.SUBS == 2 else width // 2
        described = [
            tiles(q, 64, width),
            tiles(k, KEYS, width),
            tiles(v, KEYS, width_v),
            tiles(dout, 64, width_v),
            tiles(total, 64, columns),
            tiles(new_bshd(k), KEYS, width),
            tiles(new_bshd(v), KEYS, width_v),
        ]
        count, grid = plan.grid(KEYS, plan.sk, plan.hkv)
        self.key_plans = _KeyPlans(plan, f)
        s = (*plan.ranges_strides, *self.key_plans.strides, *plan.other_strides[-3:])
        numbers = (*s, *plan.numbers()[-7:], count, blocks // 2, *plan.tail)
        constants = (f._replace(D=width, DV=width_v), schedule)
        self.main = Launch(attn_bwd_hopper_kernel, grid, described, numbers, constants)

        n = plan.batch * plan.hq * plan.sq * plan.d
        self.round = PortableLaunch(attn_bwd_hopper_round, -(-n // ROUND_BLOCK), (n, plan.scale), (ROUND_BLOCK,))
