"""From a paged call to kernel launches: what a signature comes down to is worked out once and kept (see plan.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spec import Paged, Spec, bshd_layout, lse_layout, new_strided
from ..tuning import Config, find
from . import plan as plans
from .common import narrow_parts, split_head_dim
from .grouped import merge_splits_kernel
from .launch import _on_device
from .paged import paged_fwd_kernel
from .plan import FLAGS, Launch, features, strides
from .shapes import MAX_SPLITS, MERGE_BLOCK, PROGRAMS, TILES_PER_SPLIT

MAX_ROWS = 64  # of query rows times query heads of a KV head that one tile holds
Plan = tuple[Launch, Launch | None, tuple[int, ...], Any, Any]  # launch, merge, sizes of the parts, layouts
_kept: dict[tuple, Plan] = {}


def config_of(rows: int, arch: str, wide: bool, head_dim: int, costly: bool) -> Config | None:
    """The table's tile for ``rows`` packed rows of a KV head; None where these head dims have none."""
    size = min(max(16, 1 << (rows - 1).bit_length()), MAX_ROWS)
    config = None
    while config is None and size >= 16:
        config = find(f"paged_fwd/{size}", arch, wide, head_dim)
        size //= 2
    if config is None or not costly:
        return config
    return config._replace(block_n=max(config.block_n // 2, 16))  # ALiBi, softcap and sinks need registers


def unsupported(q: Tensor, v_cache: Tensor) -> list[str]:
    """Why these kernels cannot take tensors of these head dims."""
    arch, wide = plans.architecture(q.device), q.dtype == torch.float32
    head_dim = max(q.shape[-1], v_cache.shape[-1])
    if config_of(1, arch, wide, head_dim, False) is None:
        return [f"head dim {head_dim}: there is no paged kernel of {q.dtype} for it; gather the blocks"]
    return []


def _plan(q: Tensor, k_cache: Tensor, v_cache: Tensor, paged: Paged, spec: Spec) -> Plan:
    batch, hq, sq, d = q.shape
    pool, page, hkv, _ = k_cache.shape
    dv, columns, group = v_cache.shape[-1], paged.block_table.shape[1], hq // k_cache.shape[2]
    rows, wide = sq * group, q.dtype == torch.float32
    tf32 = wide and torch.backends.cuda.matmul.allow_tf32
    ranges, slopes = spec.key_ranges, spec.alibi_slopes
    given = {
        "CAUSAL": spec.causal,
        "HAS_LEFT": spec.window_left >= 0,
        "HAS_RIGHT": spec.window_right >= 0,
        "HAS_RANGES": ranges is not None,
        "HAS_ALIBI": slopes is not None,
        "HAS_SOFTCAP": spec.softcap > 0,
        "HAS_SINKS": spec.sinks is not None,
    }
    costly = given["HAS_ALIBI"] or given["HAS_SOFTCAP"] or given["HAS_SINKS"]
    config = config_of(rows, plans.architecture(q.device), wide, max(d, dv), costly)
    if config is None:
        raise NotImplementedError(f"flash_attention_paged: {unsupported(q, v_cache)[0]}")
    f = features(
        config, d, dv, tuple(given.get(name, False) for name in FLAGS),
        cut=narrow_parts if wide and not tf32 else split_head_dim, precision="tf32" if tf32 else "ieee",
    )  # fmt: skip
    row_tiles = -(-rows // config.block_m)
    programs, tiles = row_tiles * hkv * batch, -(-columns * page // config.block_n)
    splits = max(1, min(-(-PROGRAMS // programs), tiles // TILES_PER_SPLIT, MAX_SPLITS))
    gaps = ranges is not None and (sq > 1 or (ranges.shape[1] > 1 and group > 1))
    numbers = (
        *strides(q),
        *(stride for x in (k_cache, v_cache) for stride in strides(x.transpose(1, 2))),
        paged.block_table.stride(0),
        *plans._ranges_strides(ranges, False),
        plans._small(None, slopes)[2],
        d**-0.5 if spec.scale is None else spec.scale,
        spec.softcap,
        hq, sq, pool, columns, row_tiles, splits,
        *(min(n, plans._LARGE) for n in (spec.window_left, spec.window_right)),
    )  # fmt: skip
    launch = Launch(paged_fwd_kernel, programs * splits, numbers, (page, splits > 1, gaps, group, f), config)
    layouts = bshd_layout(q.shape, dv), lse_layout(q.shape)
    if splits == 1:
        return launch, None, (), *layouts
    all_rows, sizes = batch * hq * sq, (hq, sq, splits)
    constants = (1 << (splits - 1).bit_length(), MERGE_BLOCK, f)
    merge = Launch(merge_splits_kernel, (all_rows, -(-dv // MERGE_BLOCK), 1), sizes, constants)
    return launch, merge, (all_rows * splits * dv, all_rows * splits), *layouts


@_on_device
def forward(q: Tensor, k_cache: Tensor, v_cache: Tensor, paged: Paged, spec: Spec) -> tuple[Tensor, Tensor]:
    """out and lse. The caches' last dimension is contiguous; nothing else is asked of strides."""
    q = q if q.stride(-1) == 1 or q.shape[-1] == 1 else q.contiguous()
    table, lengths = (x if x.stride(-1) == 1 else x.contiguous() for x in paged)
    small = {n: x.contiguous() for n in ("key_ranges", "alibi_slopes", "sinks") if (x := getattr(spec, n)) is not None}
    spec, paged = spec._replace(**small), Paged(table, lengths)
    key = (
        q.shape, q.stride(), q.dtype, q.device, k_cache.shape, k_cache.stride(), v_cache.shape, v_cache.stride(),
        table.shape, table.stride(), spec[10:], torch.backends.cuda.matmul.allow_tf32,
        tuple([(n, x.shape, x.dtype) for n, x in small.items()]),
    )  # fmt: skip
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= plans._PLANS_KEPT:
            forget()
        found = _kept[key] = _plan(q, k_cache, v_cache, paged, spec)
    launch, merge, part, out_layout, lse_shape = found
    out, lse = new_strided(q, out_layout), new_strided(q, lse_shape, torch.float32)
    inputs = [q, k_cache, v_cache, table, lengths, spec.key_ranges, spec.alibi_slopes, spec.sinks]
    if merge is None:
        launch([*inputs, out, lse])
        return out, lse
    parts = [lse.new_empty(n) for n in part]
    launch([*inputs, *parts])
    merge([*parts, spec.sinks, out, lse])
    return out, lse


def forget() -> None:
    """Drop all plans, so that the next calls compile (or look up) their kernels anew."""
    _kept.clear()
