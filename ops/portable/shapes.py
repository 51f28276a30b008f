"""Calls whose shape has kernels of its own: a few keys, or a few queries over many keys. Chosen by shape alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import Gradients, Needs, Spec, new_strided
from ..tuning import Config, find, tuned
from .common import narrow_parts, split_head_dim
from .few_keys import few_keys_bwd_kernel, few_keys_fwd_kernel
from .few_queries import few_queries_bwd_kernel, few_queries_fwd_kernel
from .grouped import merge_splits_kernel, sum_splits_kernel
from .plan import FLAGS, Launch, Plan, features, strides

ENABLED = True  # False: the general kernels take every call
PROGRAMS = 2048  # work is split until a launch has about this many programs: 15 for each multiprocessor of an H100
TILES_PER_SPLIT = 4  # at least, so that the partial results stay small beside what is read
MAX_SPLITS = 128
MERGE_BLOCK = 64
SUM_BLOCK = 1024
_ABSENT = (0,) * 5  # the addresses of optional tensors
_MASK, _ALIBI, _PACKED = map(FLAGS.index, ("HAS_MASK", "HAS_ALIBI", "VARLEN"))  # the bias is next to the mask


def choose(plan: Plan, way: str) -> str | None:
    """The family of kernels ("few_keys", "few_queries") that takes the call ``way`` ("fwd", "bwd"); None: the general.

    They take every feature of the op but bias, masks and packed sequences. How many keys or rows, and which head
    dims, the tuning table says.
    """
    if not ENABLED or plan.packed or plan.flags[_MASK] or plan.flags[_MASK + 1] or plan.block[0]:
        return None
    found = plan.launches.get(way)
    if found is None:
        families = [f for f in ("few_keys", "few_queries") if _config(plan, f"{f}_{way}")]
        found = plan.launches[way] = families[0] if families else ""
    return found or None


def _power(n: int) -> int:
    """The power of two, at least 16, that holds n."""
    return max(16, 1 << (n - 1).bit_length())


def _config(plan: Plan, kind: str) -> Config | None:
    """The table's row for this call, cut down to the rows there are; None where the table has none."""
    rows = plan.sq * (plan.hq // plan.hkv)
    if kind.startswith("few_queries") and plan.sk <= rows:
        return None
    size = _power(plan.sk if kind.startswith("few_keys") else rows)
    config = tuned(f"{kind}/{size}", plan, Config)
    config = config or find(f"{kind}/{size}", plan.arch, plan.dtype == torch.float32, max(plan.d, plan.dv))
    costly = any(plan.flags[_ALIBI:_PACKED])  # ALiBi, softcap, sinks, dropout: half the tile, for their registers
    if config is None or (costly and size > 64):
        return None
    if kind.startswith("few_queries"):
        return config._replace(block_n=max(config.block_n // 2, 16)) if costly else config
    most = max(config.block_m // 2, 16) if costly else config.block_m
    block_m = min(most, _power(rows))
    # as many rows a warp as the table says; but gradients of the keys need registers whatever the rows
    warps = max(config.num_warps * block_m // most, 1)
    if kind.endswith("bwd"):
        warps = max(warps, min(config.num_warps, config.block_n * (plan.d + plan.dv) // 4096))
    registers = None if costly or rows > block_m else config.max_registers
    return config._replace(block_m=block_m, num_warps=warps, max_registers=registers)


class _Call:
    """One call: its variant, numbers and tensors."""

    def __init__(self, plan: Plan, kind: str, config: Config | None, weight_grad: bool = False):
        found = config or _config(plan, kind)
        assert found is not None
        self.plan, self.config = plan, found
        self.group = plan.hq // plan.hkv
        self.rows = plan.sq * self.group
        wide = plan.dtype == torch.float32
        tf32 = wide and torch.backends.cuda.matmul.allow_tf32
        cut = narrow_parts if wide and not tf32 else split_head_dim
        self.features = features(
            found, plan.d, plan.dv, plan.flags, weight_grad=weight_grad, cut=cut, precision="tf32" if tf32 else "ieee"
        )
        length, block = (self.rows, found.block_m) if kind.startswith("few_keys") else (plan.sk, found.block_n)
        self.tiles = -(-length // block)
        programs = plan.hkv * plan.batch
        most = min(-(-PROGRAMS // max(programs, 1)), self.tiles // TILES_PER_SPLIT, MAX_SPLITS)
        self.splits = max(1, most)
        self.per_split = -(-self.tiles // self.splits)
        self.splits = -(-self.tiles // self.per_split)  # none is empty
        shape = plan.ranges_shape
        self.gaps = shape is not None and (plan.sq > 1 or (shape[-3] > 1 and self.group > 1))

    def numbers(self, *middle: int) -> tuple:
        plan = self.plan
        return (
            *plan.ranges_strides, *plan.other_strides[8:], plan.scale, plan.softcap, plan.keep_scale, plan.hq, plan.sq,
            plan.sk, *middle, *plan.tail,
        )  # fmt: skip


def _inputs(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> list[Tensor | None]:
    return [q, k, v, spec.key_ranges, spec.key_log_weight, spec.alibi_slopes, spec.sinks, spec.dropout_seed]


def forward(
    family: str, plan: Plan, q: Tensor, k: Tensor, v: Tensor, spec: Spec, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse. ``config`` overrides the tuning table."""
    key = (family, "fwd", config)
    found = plan.launches.get(key)
    if found is None:
        found = plan.launches[key] = _plan_forward(family, _Call(plan, f"{family}_fwd", config))
    launch, merge, part = found
    out, lse = new_strided(q, plan.out_layout), new_strided(q, plan.lse_layout, torch.float32)
    if merge is None:
        launch([*_inputs(q, k, v, spec), out, lse])
        return out, lse
    parts = [lse.new_empty(n) for n in part]
    launch([*_inputs(q, k, v, spec), *parts])
    merge([*parts, spec.sinks, out, lse])
    return out, lse


def _plan_forward(family: str, call: _Call) -> tuple[Launch, Launch | None, tuple[int, ...]]:
    plan, f = call.plan, call.features
    layout = (*plan.qs, *plan.ks, *plan.vs)
    if family == "few_keys":
        numbers = (*layout, *call.numbers(call.tiles))
        grid = plan.hkv * call.tiles * plan.batch
        return Launch(few_keys_fwd_kernel, grid, numbers, (call.group, f), call.config), None, ()
    splits = call.splits
    constants = (splits > 1, call.gaps, call.group, f)
    grid = plan.hkv * splits * plan.batch
    launch = Launch(few_queries_fwd_kernel, grid, (*layout, *call.numbers(splits)), constants, call.config)
    if splits == 1:
        return launch, None, ()
    rows = plan.batch * plan.hq * plan.sq
    blocks = -(-plan.dv // MERGE_BLOCK)
    sizes = (plan.hq, plan.sq, splits)
    merge = Launch(merge_splits_kernel, (rows, blocks, 1), sizes, (1 << (splits - 1).bit_length(), MERGE_BLOCK, f))
    return launch, merge, (rows * splits * plan.dv, rows * splits)


def backward(
    family: str, plan: Plan, dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor, spec: Spec, needs: Needs, config: Config | None = None,
) -> Gradients:  # fmt: skip
    """The gradients that ``needs`` names, without atomics. dout and out have contiguous rows."""
    weight, sinks = spec.key_log_weight, spec.sinks
    weight_grad = needs.dkey_log_weight and weight is not None
    layout = (out.stride(), dout.stride(), None if dlse is None else (dlse.stride(), dlse.dtype))
    key = (family, "bwd", config, layout, weight_grad)
    found = plan.launches.get(key)
    if found is None:
        call = _Call(plan, f"{family}_bwd", config, weight_grad)
        steps = (*strides(out), *strides(dout), *((0, 0, 0) if dlse is None else dlse.stride()))
        found = plan.launches[key] = _plan_backward(family, call, steps, dlse is not None)
    launch, splits, sums = found
    dq, dk, dv = new_strided(q, plan.q_layout), new_strided(k, plan.k_layout), new_strided(v, plan.v_layout)
    dw = lse.new_empty((plan.batch, plan.hkv, plan.sk)) if weight_grad else None
    dsinks = None if sinks is None else torch.empty_like(lse)
    results: list[Tensor | None] = [dq, dk, dv, dw]
    parts = [t if t is None or i not in sums else lse.new_empty(splits * t.numel()) for i, t in enumerate(results)]
    launch([*_inputs(q, k, v, spec), out, dout, lse, dlse, *parts, dsinks])
    for i, add in sums.items():
        add([parts[i], results[i]])
    return Gradients(
        dq if needs.dq else None,
        dk if needs.dk else None,
        dv if needs.dv else None,
        None,
        None if dw is None or weight is None else dw.sum_to_size(weight.shape).to(weight.dtype),
        dsinks.sum((0, 2)).to(sinks.dtype) if needs.dsinks and dsinks is not None and sinks is not None else None,
    )


class OneLaunch:
    """A call on few keys without optional tensors that was made before: one launch each way, no address read twice.

    Such a call waits for the host, so every microsecond counts. Results are None where it must go the usual way.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.first: Launch = plan.launches["few_keys", "fwd", None][0]
        self.backwards: dict[Any, Launch] = {}  # by the strides of dout and out

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
        """out and lse; the tensors are aligned as they were."""
        plan, first = self.plan, self.first
        if first.runner is None:
            return None
        out, lse = new_strided(q, plan.out_layout), new_strided(q, plan.lse_layout, torch.float32)
        first.runner(q.data_ptr(), k.data_ptr(), v.data_ptr(), *_ABSENT, out.data_ptr(), lse.data_ptr(),
                     *first.numbers, *first.constants)  # fmt: skip
        return out, lse

    def learn(self, dout: Tensor, out: Tensor) -> None:
        """Keep the launch of a backward that has run."""
        layout = (out.stride(), dout.stride(), None)
        launch, splits, _ = self.plan.launches.get(("few_keys", "bwd", None, layout, False), (None, 0, None))
        if splits == 1 and launch.runner is not None:
            self.backwards[dout.stride(), out.stride()] = launch

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...] | None:
        """dq, dk and dv."""
        plan, launch = self.plan, self.backwards.get((dout.stride(), out.stride()))
        if launch is None or (q.stride(), k.stride(), v.stride()) != plan.inputs:
            return None
        q_at, k_at, v_at, out_at = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        dout_at, lse_at = dout.data_ptr(), lse.data_ptr()
        if (q_at | k_at | v_at | out_at | dout_at | lse_at) & 15:  # new memory is aligned
            return None
        dq, dk, dv = new_strided(q, plan.q_layout), new_strided(k, plan.k_layout), new_strided(v, plan.v_layout)
        launch.runner(q_at, k_at, v_at, *_ABSENT, out_at, dout_at, lse_at, 0, dq.data_ptr(), dk.data_ptr(),
                      dv.data_ptr(), 0, 0, *launch.numbers, *launch.constants)  # fmt: skip
        return dq, dk, dv


def _plan_backward(
    family: str, call: _Call, steps: tuple[int, ...], has_dlse: bool
) -> tuple[Launch, int, dict[int, Launch]]:
    """The launch, its splits, and the sums over them of results that every split adds to (dq, dk, dv, dw: 0 to 3)."""
    plan, f, splits = call.plan, call.features, call.splits
    layout: tuple[Any, ...] = (*plan.qs, *plan.ks, *plan.vs, *steps)
    grid = plan.hkv * splits * plan.batch
    if family == "few_keys":
        numbers = (*layout, *call.numbers(plan.batch, call.tiles, splits, call.per_split))
        constants = (has_dlse, call.per_split == 1, call.group, f)
        launch = Launch(few_keys_bwd_kernel, grid, numbers, constants, call.config)
        keys = plan.batch * plan.hkv * plan.sk
        counts = {1: keys * plan.d, 2: keys * plan.dv} | ({3: keys} if f.WEIGHT_GRAD else {})
    else:
        numbers = (*layout, *call.numbers(plan.batch, splits, call.per_split))
        constants = (has_dlse, call.gaps, call.group, f)
        launch = Launch(few_queries_bwd_kernel, grid, numbers, constants, call.config)
        counts = {0: plan.batch * plan.hq * plan.sq * plan.d}
    if splits == 1:
        return launch, 1, {}
    sums = {i: Launch(sum_splits_kernel, -(-n // SUM_BLOCK), (n, splits), (SUM_BLOCK,)) for i, n in counts.items()}
    return launch, splits, sums
