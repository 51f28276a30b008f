"""What is measured: the shapes, and the implementations that run them.

An implementation is a function of q, k, v that are views of [B, S, H, D] memory, as transformers hands them over, and
returns the output. Everything it does with them is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Cell:
    """One shape: q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D]."""

    group: str
    head_dim: int
    causal: bool
    batch: int
    q_heads: int
    kv_heads: int
    sq: int
    sk: int

    @property
    def name(self) -> str:
        mask = "causal" if self.causal else "full"
        heads = f"{self.q_heads}:{self.kv_heads}"
        return f"d{self.head_dim}-{mask}-b{self.batch}-h{heads}-q{self.sq}-k{self.sk}"

    def flops(self, direction: str) -> float:
        """Of the visible pairs alone: 4 B H Sq Sk D, half if causal; the backward counts 2.5 times that."""
        forward = 4 * self.batch * self.q_heads * self.sq * self.sk * self.head_dim * (0.5 if self.causal else 1)
        return forward if direction == "forward" else 2.5 * forward


def _long(head_dim: int, batch: int, heads: int, length: int) -> list[Cell]:
    """Full and causal."""
    return [Cell("long", head_dim, causal, batch, heads, heads, length, length) for causal in (False, True)]


CELLS = [
    *(cell for b, s in ((16, 1024), (4, 4096), (1, 16384)) for cell in _long(64, b, 32, s)),
    *(cell for b, s in ((16, 1024), (4, 4096), (1, 16384)) for cell in _long(128, b, 16, s)),
    *(cell for b, s in ((16, 1024), (4, 4096), (1, 16384)) for cell in _long(256, b, 8, s)),
    Cell("long", 128, True, 4, 32, 8, 4096, 4096),
    Cell("long", 64, False, 4, 8, 8, 8192, 8192),
    Cell("windows", 64, False, 8192, 8, 8, 32, 32),
    Cell("windows", 64, False, 256, 8, 8, 8192, 8),
    Cell("windows", 64, False, 256, 8, 8, 8, 8192),
    Cell("decode", 128, False, 8, 32, 8, 1, 32768),
]
QUICK = [c for c in CELLS if c.group == "long" and c.sq == 4096 and c.head_dim in (64, 128)]
SMOKE = [Cell("smoke", 16, causal, 1, 4, 2, 33, 65 if not causal else 33) for causal in (False, True)]


def make_inputs(cell: Cell, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as transposed views of [B, S, H, D] memory, and dout laid out like the output; normal, seeded."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(cell.sq, cell.q_heads), (cell.sk, cell.kv_heads), (cell.sk, cell.kv_heads), (cell.sq, cell.q_heads)]
    q, k, v, dout = (
        torch.randn(cell.batch, s, h, cell.head_dim, generator=generator, device=device, dtype=dtype).transpose(1, 2)
        for s, h in sizes
    )
    return q, k, v, dout


def ours(cell: Cell, impl: str = "triton") -> Attention:
    from hf_flash_mc.ops import flash_attention

    return partial(flash_attention, causal=cell.causal, impl=impl)


def sdpa(cell: Cell, backend: SDPBackend) -> Attention:
    """torch's scaled_dot_product_attention with its back end named: the default is not the fastest on every GPU."""
    options: dict[str, Any] = {"is_causal": cell.causal, "enable_gqa": cell.q_heads != cell.kv_heads}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return attention


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """flex_attention compiled once for every shape; past the recompile limit it would silently run dense."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 512
    torch._functorch.config.donated_buffer = False  # the timed backward keeps its graph
    return torch.compile(flex_attention, dynamic=False)


def flex(cell: Cell) -> Attention:
    """With a block mask where causal; the mask is made once, outside the timing."""
    from torch.nn.attention.flex_attention import create_block_mask

    if cell.group != "long" or cell.sq < 4096:
        raise NotImplementedError("left out: it compiles for seconds a shape")
    mask = None
    if cell.causal:
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, cell.sq, cell.sk, device="cuda")
    return partial(compiled_flex(), block_mask=mask, enable_gqa=cell.q_heads != cell.kv_heads)


GPU_IMPLEMENTATIONS: dict[str, Callable[[Cell], Attention]] = {
    "ours": ours,
    "fa2": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "cudnn": partial(sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
}
CPU_IMPLEMENTATIONS: dict[str, Callable[[Cell], Attention]] = {
    "ours": partial(ours, impl="cpu"),
    "sdpa": partial(sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "math": partial(sdpa, backend=SDPBackend.MATH),
}
LABELS = {
    "ours": "ours",
    "fa2": "FA2 (SDPA)",
    "cudnn": "cuDNN (SDPA)",
    "flex": "flex (compiled)",
    "sdpa": "SDPA flash (CPU)",
    "math": "SDPA math",
}


def reference_slice(cell: Cell, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv in float32 of the first batch entry and KV head: [1, H, S, D], by plain formulas.

    Rows are taken in chunks, so that the longest shapes fit. dk and dv sum over the query heads of the KV head.
    """
    group = cell.q_heads // cell.kv_heads
    q, dout = (x[:1, :group].float() for x in (q, dout))
    k, v = (x[:1, :1].float() for x in (k, v))
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    scale, column = cell.head_dim**-0.5, torch.arange(cell.sk, device=q.device)
    for start in range(0, cell.sq, 2048):
        rows = slice(start, min(start + 2048, cell.sq))
        logits = q[:, :, rows] @ k.transpose(-1, -2) * scale
        if cell.causal:
            row = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + cell.sk - cell.sq
            logits = logits.masked_fill(column > row, float("-inf"))
        weights = torch.softmax(logits, -1)
        out[:, :, rows] = weights @ v
        grad = dout[:, :, rows]
        dweights = grad @ v.transpose(-1, -2)
        delta = (weights * dweights).sum(-1, keepdim=True)
        dlogits = weights * (dweights - delta) * scale
        dq[:, :, rows] = dlogits @ k
        dk += (dlogits.transpose(-1, -2) @ q[:, :, rows]).sum(1, keepdim=True)
        dv += (weights.transpose(-1, -2) @ grad).sum(1, keepdim=True)
    return out, dq, dk, dv
