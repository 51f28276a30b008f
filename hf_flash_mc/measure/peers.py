"""The implementations that are timed: ours by back end, and its peers where they are installed.

A maker takes a problem and returns a function of q, k, v that gives the output. It gets them as views of [B, S, H, D]
memory, as transformers hands them over, unless ``CONTIGUOUS`` names it: everything ours does with them is timed, and
peers get the layout they like best.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from hf_flash_mc.measure.cells import Cell
from hf_flash_mc.measure.problem import Attention, Problem

Maker = Callable[[Problem], Attention]
CONTIGUOUS = ("flex",)  # these take [B, H, S, D] memory
OURS = ("ours", "hopper", "triton")


class Unavailable(NotImplementedError):
    """The implementation is not installed here, or does not run on this device."""


def ours(problem: Problem, impl: str = "auto") -> Attention:
    from hf_flash_mc.ops import flash_attention, flash_attention_varlen

    options = {**problem.options, "impl": impl}
    if problem.cell.page:
        return paged(problem, **options)
    if problem.cu_seqlens is not None:
        return lambda q, k, v: flash_attention_varlen(q, k, v, *problem.packed, **options)
    if problem.cell.feature == "recompute":  # as gradient checkpointing does: the forward again in each backward
        return lambda q, k, v: checkpoint(partial(flash_attention, **options), q, k, v, use_reentrant=False)
    return partial(flash_attention, **options)


def paged(problem: Problem, **options: Any) -> Attention:
    """Ours over a pool of blocks in no order, filled outside the timing; the keys and values passed are not read."""
    from hf_flash_mc.ops import flash_attention_paged

    batch, heads, keys, _ = problem.k.shape
    columns, device = -(-keys // problem.cell.page), problem.k.device
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(batch * columns, generator=generator).reshape(batch, columns).to(device)
    pools = []
    for x in (problem.k, problem.v):
        rows = F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, columns * problem.cell.page - keys))
        pool = x.new_empty(batch * columns, problem.cell.page, heads, x.shape[-1])
        pool[table.flatten()] = rows.reshape(pool.shape)
        pools.append(pool)
    cache = (*pools, table.to(torch.int32), torch.full((batch,), keys, dtype=torch.int32, device=device))
    return lambda q, k, v: flash_attention_paged(q, *cache, **options)


def plain(problem: Problem) -> Attention:
    """Ours, causal, without the cell's feature: what the feature costs is the difference."""
    from hf_flash_mc.ops import flash_attention

    return partial(flash_attention, causal=True)


def sdpa(problem: Problem, backend: SDPBackend) -> Attention:
    """torch's scaled_dot_product_attention with its back end named: the default is not the fastest on every GPU."""
    cell = problem.cell
    options: dict[str, Any] = {"is_causal": cell.causal, "enable_gqa": cell.q_heads != cell.kv_heads}
    if cell.causal and cell.sq != cell.sk:  # SDPA's own causal is aligned at the top left
        from torch.nn.attention.bias import causal_lower_right

        options |= {"is_causal": False, "attn_mask": causal_lower_right(cell.sq, cell.sk)}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return attention


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """flex_attention compiled once for every shape; past the recompile limit it would silently run dense."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 512
    torch._functorch.config.donated_buffer = False  # the timed backward keeps its graph
    return torch.compile(flex_attention, dynamic=False)


def flex(problem: Problem) -> Attention:
    """With a block mask where causal; the mask is made once, outside the timing."""
    from torch.nn.attention.flex_attention import create_block_mask

    cell, mask = problem.cell, None
    if not problem.q.is_cuda:
        raise Unavailable("runs on a GPU here")
    if cell.causal:
        shift = cell.sk - cell.sq
        mask = create_block_mask(
            lambda b, h, q, k: q + shift >= k, None, None, cell.sq, cell.sk, device=str(problem.q.device)
        )
    return partial(_compiled_flex(), block_mask=mask, enable_gqa=cell.q_heads != cell.kv_heads)


def varlen_attn(problem: Problem) -> Attention:
    """torch's own attention of packed sequences (FlashAttention-2)."""
    if not problem.q.is_cuda:
        raise Unavailable("runs on a GPU")
    from torch.nn.attention.varlen import varlen_attn as function

    causal = problem.cell.causal
    names = inspect.signature(function).parameters
    options: dict[str, Any] = (
        {"is_causal": causal} if "is_causal" in names else {"window_size": (-1, 0 if causal else -1)}
    )
    return lambda q, k, v: _first(function(q, k, v, *problem.packed, **options))


def flash_package(problem: Problem, module: str) -> Attention:
    """FlashAttention-3 and the CuTe form of 4: functions of [B, S, H, D], bottom-right causal."""
    try:
        functions = importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from None
    causal = problem.cell.causal
    if problem.cu_seqlens is not None:
        cu, _, longest, _ = problem.packed
        lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
        return lambda q, k, v: _first(functions.flash_attn_varlen_func(q, k, v, **lengths, causal=causal))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = functions.flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
        return _first(out).transpose(1, 2)

    return attention


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


IMPLEMENTATIONS: dict[str, Maker] = {
    "ours": ours,
    "hopper": partial(ours, impl="hopper"),
    "triton": partial(ours, impl="triton"),
    "plain": plain,
    "fa2": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "cudnn": partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "efficient": partial(sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "math": partial(sdpa, backend=SDPBackend.MATH),
    "flex": flex,
    "varlen_attn": varlen_attn,
    "fa3": partial(flash_package, module="flash_attn_interface"),
    "fa4": partial(flash_package, module="flash_attn.cute"),
}
GPU_DEFAULT = ("ours", "plain", "fa2", "cudnn", "efficient", "flex", "varlen_attn", "fa3", "fa4")
GPU_QUICK = ("ours", "plain", "fa2", "cudnn", "varlen_attn", "fa3", "fa4")  # efficient and flex are never the fastest
CPU_DEFAULT = ("ours", "plain", "fa2", "math")
LABELS = {
    "ours": "ours",
    "hopper": "ours (Hopper kernels)",
    "triton": "ours (portable kernels)",
    "plain": "ours without the feature",
    "fa2": "FA2 (SDPA)",
    "cudnn": "cuDNN (SDPA)",
    "efficient": "efficient (SDPA)",
    "math": "SDPA math",
    "flex": "flex (compiled)",
    "varlen_attn": "varlen_attn (torch)",
    "fa3": "FA3",
    "fa4": "FA4-CuTe",
    "copy": "device copy",
    "sdpa": "SDPA (its own choice)",
    "sdpa-compiled": "SDPA, compiled",
    "ours-compiled": "ours, compiled",
}


def applies(name: str, cell: Cell) -> bool:
    """Whether the implementation can say what the cell asks for: features and paged caches only ours, packed
    sequences some."""
    if cell.group == "features":
        return name in (*OURS, "plain")
    if cell.page:
        return name in OURS
    if cell.feature == "packed":
        return name in (*OURS, "varlen_attn", "fa3", "fa4")
    return name not in ("plain", "varlen_attn")


def choose(names: list[str] | None, default: tuple[str, ...]) -> dict[str, Maker]:
    """The implementations of these names.

    Raises:
        ValueError: for a name that is none.
    """
    chosen = list(names or default)
    unknown = [n for n in chosen if n not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(
            f"implementations: expected some of {', '.join(IMPLEMENTATIONS)}, got {', '.join(unknown)}; "
            "without the option those that are installed run"
        )
    return {n: IMPLEMENTATIONS[n] for n in chosen}
