"""What the MegaContext networks are made of: pre-norm blocks whose attention is ours and never causal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_flash_mc.ops import flash_attention

from .rope import rope_tables, rotate

Settings = TypeVar("Settings")
Tables = tuple[Tensor, Tensor]


def read_settings(kind: type[Settings], given: Mapping[str, Any] | None, name: str) -> Settings:
    """The dataclass ``kind`` from a dict of settings; ``name`` is the argument that errors speak of."""
    given = dict(given or {})
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(given) - fields):
        raise ValueError(f"{name}: expected settings among {sorted(fields)}, got {unknown}; remove or rename them")
    return kind(**given)


def check_settings(name: str, problems: Mapping[str, bool]) -> None:
    """Raise ValueError with every problem that is there."""
    found = [text for text, wrong in problems.items() if wrong]
    if found:
        raise ValueError(f"{name}: " + "; ".join(found))


def head_dim_of(width: int, head_dim: int | None) -> int:
    """The head dim of a network: as given, else 128 for widths from 1024 and 64 below, where they divide the width."""
    if head_dim is None:
        wanted = (128, 64, 32) if width >= 1024 else (64, 32)
        head_dim = next((d for d in wanted if width % d == 0), width if width <= 256 else 0)
    if head_dim <= 0 or head_dim > 256 or head_dim % 2 or width % head_dim:
        raise ValueError(
            f"head_dim: expected an even divisor of the width {width}, at most 256, got {head_dim or None}; set it"
        )
    return head_dim


def rms_norm(x: Tensor) -> Tensor:
    """Root-mean-square norm over the last dimension, without parameters."""
    return F.rms_norm(x, (x.shape[-1],))


def rms_scale(x: Tensor) -> Tensor:
    """What `rms_norm` multiplies each row by, in float32 (float64 for float64): ``[..., 1]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return torch.rsqrt(norm.square() / x.shape[-1] + torch.finfo(wide).eps)


class Attention(nn.Module):
    """Multi-head attention, non-causal, with normalised queries and keys; self (``context`` None) or cross.

    Queries and keys are normalised before they are rotated: a norm after it would undo damped tables.
    """

    def __init__(self, width: int, head_dim: int, *, cross: bool = False):
        super().__init__()
        self.head_dim, self.heads = head_dim, width // head_dim
        if cross:
            self.query = nn.Linear(width, width, bias=False)
            self.key_value = nn.Linear(width, 2 * width, bias=False)
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        tables: Tables | None = None,
        context_tables: Tables | None = None,
        count: Tensor | None = None,
    ) -> Tensor:
        """x ``[B, S, W]`` attends to itself, or to context ``[B, Sk, W]`` -> ``[B, S, W]``.

        tables, context_tables: rotary tables ``[S, D]`` or ``[B, S, D]`` of the queries and of the context's keys; None
        for no rotation.
        count: int32, no dimension: only so many keys are seen, the rest is padding; None for all.
        """
        if context is None:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)  # [B, S, H, D] each
            context_tables = tables
        else:
            q = self.query(x).unflatten(-1, (self.heads, self.head_dim))
            k, v = self.key_value(context).unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)
        q, k = _placed(rms_norm(q), tables), _placed(rms_norm(k), context_tables)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, S, D]
        out = flash_attention(q, k, v, key_ranges=_up_to(count, q.shape[2]))
        return self.out(out.transpose(1, 2).flatten(2))


def _placed(x: Tensor, tables: Tables | None) -> Tensor:
    """Rotate ``[B, S, H, D]`` by tables ``[S, D]`` or ``[B, S, D]``."""
    if tables is None:
        return x
    cos, sin = (table.to(x.dtype)[..., None, :] for table in tables)
    return rotate(x, cos, sin)


def _up_to(count: Tensor | None, rows: int) -> Tensor | None:
    """key_ranges ``[1, 1, rows, 2]``: keys before ``count``."""
    if count is None:
        return None
    high = count.reshape(1, 1, 1).expand(1, 1, rows)
    return torch.stack((torch.zeros_like(high), high), -1)


class MLP(nn.Module):
    """up, squared ReLU (or GELU), down."""

    def __init__(self, width: int, *, gelu: bool = False):
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(F.gelu(x) if self.gelu else F.relu(x).square())


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals; ``cross`` blocks attend to a context instead of to themselves."""

    def __init__(self, width: int, head_dim: int, *, cross: bool = False, gelu: bool = False):
        super().__init__()
        self.attention = Attention(width, head_dim, cross=cross)
        self.mlp = MLP(width, gelu=gelu)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        tables: Tables | None = None,
        context_tables: Tables | None = None,
        count: Tensor | None = None,
    ) -> Tensor:
        """As ``Attention``: ``[B, S, W]`` -> ``[B, S, W]``."""
        seen = None if context is None else rms_norm(context)
        x = x + self.attention(rms_norm(x), seen, tables, context_tables, count)
        return x + self.mlp(rms_norm(x))


def init_linears(module: nn.Module) -> None:
    """Normal weights of variance 1 / inputs in every linear layer (biases 0); zeros are set by their owners after."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=1 / math.sqrt(part.in_features))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def window_tables(length: int, head_dim: int, base: float, device: Any) -> Tables:
    """Rotary tables ``[length, head_dim]`` of positions 0, 1, ..."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return rope_tables(base**-exponents, torch.arange(length, device=device))
