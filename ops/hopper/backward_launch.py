"""The "hopper" back end's backward: from a call to launches of the fused kernel in backward.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..portable.launch import ALL, _KeyPlans, _on_device
from ..portable.outside import fill_outside
from ..portable.plan import Launch as PortableLaunch
from ..portable.plan import Plan, features, plan_of, strides
from ..spec import Gradients, Needs, Spec, Varlen, bshd_layout, new_bshd, new_strided
from ..tuning import Config, tuned
from .backward import attn_bwd_hopper_kernel
from .backward_rows import (
    attn_bwd_hopper_keys_seen,
    attn_bwd_hopper_round,
    attn_bwd_hopper_round_packed,
    attn_bwd_hopper_rows,
)
from .backward_tiles import Schedule
from .plan import Launch, cap_form, items_of, padded, strided, tiles, tma_problem
from .programs import idle_counters, multiprocessors, programs

HEAD_DIMS = (40, 256)  # below, padding to 64 wastes more than the fused form saves
NARROW = 64  # no form has a head dim up to this beside one above 128
ROUND_BLOCK = 2048
MIN_STEPS = 4  # of a program that shares a key tile
MAX_KEYS_IN_RANGES = 1 << 24  # the kernel compares them as float32
TOGETHER = 256, 16  # tiles and heads: see heads_together
# by padded head dim; AHEAD is 3 to 8 % faster at 128 on an H100, but with softcap, where it spills, 17 % slower
SCHEDULES = {64: Schedule(SUBS=2, K_REGS=True), 128: Schedule(AHEAD=True), 256: Schedule(WIDE=True)}
_ABSENT = (0,) * 11  # the addresses of what the fused kernel reads or writes where its features ask for it
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
    elif max(q.shape[-1], v.shape[-1]) > 128 and min(q.shape[-1], v.shape[-1]) <= NARROW:
        found = f"head dims {q.shape[-1]} and {v.shape[-1]}"
        reasons.append(f"{found}: the fused backward takes more than {NARROW} beside one above 128")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if (problem := tma_problem(x)) is not None:
            reasons.append(f"{name}: {problem}, which the tensor memory accelerator needs")
    if deterministic:
        reasons.append("deterministic: the fused backward sums dQ in no fixed order")
    if not (needs.dq and (needs.dk or needs.dv)):
        reasons.append("gradients: the fused backward computes dq, dk and dv together")
    masked = spec.mask is not None or spec.block_rows is not None
    ranges = spec.key_ranges
    absent = {
        "mask": masked, "bias": spec.bias is not None,
        "key_ranges of packed sequences": ranges is not None and varlen is not None,
    }  # fmt: skip
    reasons += [f"{name}: not in the fused backward" for name, given in absent.items() if given]
    if ranges is not None and varlen is None:
        if ranges.shape[1] > 1 and q.shape[1] != k.shape[1]:
            reasons.append("key_ranges: the fused backward takes one range for all query heads of a KV head")
        if k.shape[-2] > MAX_KEYS_IN_RANGES:
            reasons.append(f"key_ranges: the fused backward takes up to {MAX_KEYS_IN_RANGES} keys")
    return reasons + strided(spec)


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
    weighed = needs.dkey_log_weight and spec.key_log_weight is not None
    steps = _steps(plan, q, k, v, dout, out, dlse, weighed, schedule)
    return steps.run(dout, dlse, q, k, v, out, lse, spec, needs, varlen)


def _steps(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, dlse: Tensor | None = None,
    weighed: bool = False, schedule: Schedule | None = None,
) -> _Steps:  # fmt: skip
    """The launches of a signature, kept with the plan."""
    key = (
        "hopper-bwd", schedule, weighed, dout.stride(), out.stride(),
        None if dlse is None else (dlse.stride(), dlse.dtype),
    )  # fmt: skip
    steps = plan.launches.get(key)
    if steps is None:
        steps = plan.launches[key] = _Steps(plan, q, k, v, dout, out, dlse, weighed, schedule)
    return steps


@_on_device
def repeated(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Any
) -> tuple[Tensor | None, ...] | None:
    """dq, dk and dv of a ``hopper.launch.Call``; None where its tensors need a closer look."""
    key = dout.stride(), out.stride()
    steps = call.steps.get(key)
    if steps is None:
        if tma_problem(dout) is not None or out.stride(-1) != 1:
            return None
        steps = call.steps[key] = _steps(call.plan, q, k, v, dout, out)
    if steps.bare:
        return steps.run_bare(dout, q, k, v, out, lse)
    return steps.run(dout, None, q, k, v, out, lse, call.spec, ALL, None)[:3]


def _parts(items: int, walk: int, multiprocessors: int) -> int:
    """How many programs share the queries of one key tile: enough to fill the GPU, each with some steps to do."""
    return max(1, min(multiprocessors // items, walk // MIN_STEPS))


def shipped_schedule(plan: Plan) -> Schedule:
    """The table's schedule for a call. Measured on an H100."""
    found = SCHEDULES[max(padded(plan.d), padded(plan.dv))]
    if plan.softcap > 0:
        found = found._replace(AHEAD=False, CAP_FORM=cap_form(plan.dtype))
    return found


def _rounding(count: int, scale: float) -> PortableLaunch:
    return PortableLaunch(attn_bwd_hopper_round, -(-count // ROUND_BLOCK), (count // 8, scale), (ROUND_BLOCK,))


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
        weighed: bool,
        schedule: Schedule | None,
    ):
        width, width_v = padded(plan.d), padded(plan.dv)
        schedule = schedule or tuned("hopper_bwd", plan, Schedule) or shipped_schedule(plan)
        block, keys = 64 * schedule.SUBS, 64 if schedule.WIDE else 128
        f = features(Config(block, keys, 4, 1), plan.d, plan.dv, plan.flags, weight_grad=weighed)
        # a packed sequence's last tile reads its neighbour's rows, which may be NaN
        f = f._replace(SANITIZE=f.SANITIZE or plan.packed, CAP_FORM=schedule.CAP_FORM)
        self.plan, self.weighed, self.sanitize = plan, weighed, f.SANITIZE
        units = -(-plan.max_q // 128) * 2  # of 64 rows: a whole number of the largest tiles
        # packed sequences begin at such a number, whatever cu_seqlens says: see first_unit
        all_units = (-(-plan.sq // 128) + plan.batch) * 2 if plan.packed else units
        self.units_shape = (plan.hq, all_units) if plan.packed else (plan.batch, plan.hq, units)
        self.sinks_shape = (plan.batch, plan.hq, units)
        rows = all_units * 64 if plan.packed else plan.sq
        self.own_rows = [bshd_layout((1, plan.hq, rows, 0), n) for n in (plan.d, plan.dv)]  # of packed sequences
        self.row_values = 4 * 64 if f.HAS_RANGES else 2 * 64
        s = (0, 0, 0) if dlse is None else (0, *dlse.stride()) if plan.packed else dlse.stride()
        numbers = (*strides(out), *strides(dout), *plan.qs, *s, *plan.ranges_strides, plan.hq, plan.sq, plan.sk, units,
                   *plan.tail[:2], plan.max_q, all_units)  # fmt: skip
        grid = units * plan.hq * plan.batch
        self.rows = PortableLaunch(attn_bwd_hopper_rows, grid, numbers, (width, dlse is not None, f))

        seen_strides: tuple[int, ...] = (0, 0)
        self.key_plans, self.keys_seen = _KeyPlans(plan, f), None
        items = items_of(plan, f, f.BLOCK_N, plan.sk, plan.max_k, plan.hkv, *TOGETHER)
        if plan.ranges_shape is not None:
            planes = plan.ranges_shape[0] * plan.ranges_shape[1]
            self.seen_shape = (planes, items.tiles * f.BLOCK_N)
            seen_strides = tuple(n * f.BLOCK_N for n in self.key_plans.strides)
            numbers = (plan.sq * 2, 2, plan.sq, plan.sk, *plan.tail[:2])
            self.keys_seen = PortableLaunch(attn_bwd_hopper_keys_seen, (items.tiles, planes, 1), numbers, (f,))

        self.total_layout = self.own_rows[0] if plan.packed else bshd_layout(q.shape, plan.d)
        total = torch.empty_strided(*self.total_layout, dtype=torch.float32, device="meta")
        columns = 64 if schedule.WIDE else width if schedule.SUBS == 2 else width // 2
        described = [
            tiles(q, 64, width),
            tiles(k, f.BLOCK_N, width),
            tiles(v, f.BLOCK_N, width_v),
            tiles(dout, 64, width_v),
            tiles(self.clean(q, 0), 64, width),
            tiles(self.clean(dout, 1), 64, width_v),
            tiles(total, 64, columns),
            tiles(new_bshd(k), f.BLOCK_N, width),
            tiles(new_bshd(v), f.BLOCK_N, width_v),
        ]
        walk = plan.hq // plan.hkv * -(-plan.max_q // block)  # steps of one key tile
        split = schedule.SPLIT
        self.parts = _parts(items.total, walk, multiprocessors(q.device)) if split is None else 1 + 2 * split
        items = items_of(plan, f, f.BLOCK_N, plan.sk, plan.max_k, plan.hkv * self.parts, *TOGETHER)
        schedule = schedule._replace(SPLIT=self.parts > 1, STACKED=items.stacked)
        numbers = (*seen_strides, *self.key_plans.strides, *plan.other_strides[-3:], *plan.numbers()[-7:],
                   items.tiles, all_units, *plan.tail, self.parts, items.section, plan.d, plan.dv, plan.max_q,
                   plan.max_k, plan.batch, items.total)  # fmt: skip
        constants = (f._replace(D=width, DV=width_v), schedule)
        self.main = Launch(attn_bwd_hopper_kernel, programs(items.total, q.device), described, numbers, constants)

        rows_k = (1 if plan.packed else plan.batch) * plan.hkv * plan.sk
        self.sizes = rows_k * plan.d, rows_k * plan.dv
        self.round = _rounding(plan.batch * plan.hq * plan.sq * plan.d, plan.scale)
        if plan.packed:
            counts = (plan.hq, plan.sq, units, plan.max_q)
            grid = units * plan.hq * plan.batch
            self.round = PortableLaunch(attn_bwd_hopper_round_packed, grid, (*counts, plan.scale), (plan.d, width))
        self.round_k = _rounding(self.sizes[0], plan.scale)
        self.round_v = _rounding(self.sizes[1], plan.keep_scale)

        self.bare = self.parts == 1 and not (plan.packed or self.sanitize or self.weighed or f.HAS_RANGES or f.HAS_SINKS
                                             or f.HAS_ALIBI or f.HAS_DROPOUT)  # fmt: skip
        self.rows_layout = (math.prod(self.units_shape) * self.row_values,), (1,)

    def run_bare(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...] | None:
        """``run`` where nothing but q, k, v and dout is read; None for unaligned tensors.

        In a small call every microsecond of the host counts: each address is asked for once.
        """
        plan = self.plan
        rows, total = new_strided(lse, self.rows_layout), new_strided(lse, self.total_layout)
        dq, dk, dv = new_strided(q, plan.q_layout), new_strided(k, plan.k_layout), new_strided(v, plan.v_layout)
        first, main, last = self.rows, self.main, self.round
        tensors = [q, k, v, dout, q, dout, total, dk, dv]
        at = tuple([x.data_ptr() for x in tensors])
        q_at, k_at, v_at, dout_at, _, _, total_at, *_ = at
        out_at, lse_at, rows_at = out.data_ptr(), lse.data_ptr(), rows.data_ptr()
        if (q_at | k_at | v_at | dout_at | out_at | lse_at) & 15:  # new memory is aligned
            return None
        if first.runner is None or main.runner is None or last.runner is None:
            first([out, dout, q, lse, None, None, None, rows, None, q, dout, total, None, None])
            main(tensors, [rows, *(None,) * len(_ABSENT), idle_counters(q)])
            last([total, dq])
            return dq, dk, dv
        first.runner(out_at, dout_at, q_at, lse_at, 0, 0, 0, rows_at, 0, q_at, dout_at, total_at, 0, 0,
                     *first.numbers, *first.constants)  # fmt: skip
        main.runner(tensors, (rows_at, *_ABSENT, idle_counters(q).data_ptr()), at)
        last.runner(total_at, dq.data_ptr(), *last.numbers, *last.constants)
        return dq, dk, dv

    def clean(self, x: Tensor, which: int) -> Tensor:
        """Memory for the units of q (0) or dout (1) that hold rows of no use, cleaned."""
        return new_strided(x, self.own_rows[which]) if self.plan.packed else new_bshd(x)

    def run(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spec: Spec,
        needs: Needs,
        varlen: Varlen | None,
    ) -> Gradients:
        """All gradients of one call."""
        plan, ranges, weight, sinks = self.plan, spec.key_ranges, spec.key_log_weight, spec.sinks
        rows = lse.new_empty((*self.units_shape, self.row_values))
        total = new_strided(lse, self.total_layout)
        dq, dk, dv = new_strided(q, plan.q_layout), new_strided(k, plan.k_layout), new_strided(v, plan.v_layout)
        dsinks = None if sinks is None else lse.new_empty(self.sinks_shape)
        cu_q, cu_k = (None, None) if varlen is None else varlen[:2]
        if varlen is not None:
            fill_outside(plan, dq, varlen.cu_seqlens_q, plan.max_q, 0.0)
            for x in (dk, dv):
                fill_outside(plan, x, varlen.cu_seqlens_k, plan.max_k, 0.0)
        clean_q, clean_dout, dirty = q, dout, None
        if self.sanitize:  # dq is written last: until then its memory serves
            clean_q, clean_dout = self.clean(q, 0) if plan.packed else dq, self.clean(dout, 1)
            dirty = lse.new_empty(self.units_shape, dtype=torch.int32)
        self.rows([out, dout, q, lse, dlse, sinks, ranges, rows, dirty, clean_q, clean_dout, total, dsinks, cu_q])
        plans = seen = dw = None
        if ranges is not None and self.keys_seen is not None:
            plans = self.key_plans.run(ranges, None)
            seen = ranges.new_empty(self.seen_shape)
            self.keys_seen([ranges.contiguous(), plans, seen])
        if self.weighed:
            dw = lse.new_zeros((plan.hkv, plan.sk) if plan.packed else (plan.batch, plan.hkv, plan.sk))
        sum_k, sum_v = (dk, dv) if plan.packed else (None, None)
        if self.parts > 1:
            sum_k, sum_v = lse.new_zeros(sum(self.sizes)).split(self.sizes)
        self.main(
            [q, k, v, dout, clean_q, clean_dout, total, dk, dv],
            [
                rows,
                dirty,
                seen,
                weight,
                spec.alibi_slopes,
                spec.dropout_seed,
                plans,
                dw,
                sum_k,
                sum_v,
                cu_q,
                cu_k,
                idle_counters(q),
            ],
        )
        self.round([total, dq, cu_q] if plan.packed else [total, dq])
        if self.parts > 1:
            self.round_k([sum_k, dk])
            self.round_v([sum_v, dv])
        return Gradients(
            dq,
            dk if needs.dk else None,
            dv if needs.dv else None,
            None,
            None if dw is None or weight is None else dw.sum_to_size(weight.shape).to(weight.dtype),
            dsinks.sum((0, 2)).to(sinks.dtype) if dsinks is not None and sinks is not None and needs.dsinks else None,
        )
