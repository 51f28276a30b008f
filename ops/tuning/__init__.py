"""Tile sizes for the kernels, as data: one table, looked up in plain Python, never tuned while a user trains."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .cache import tuned
from .tables import TABLE

__all__ = ["Config", "architecture", "find", "largest_head_dim", "lookup", "tuned"]


class Config(NamedTuple):
    """How one kernel variant is cut and compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False  # read tiles through the tensor memory accelerator where strides allow
    max_registers: int | None = None  # per thread, so that one more program fits on a multiprocessor

    def options(self) -> dict[str, int]:
        """The keyword arguments of a Triton launch."""
        extra = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **extra}


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's row for a device: "sm80" (also 86, 89), "sm90", "sm100" (and later), "gfx942", "interpreter"."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":
        return "sm80"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 10:
        return "sm100" if major == 10 else "sm86"
    if major == 9:
        return "sm90"
    return "sm80" if (major, minor) == (8, 0) else "sm86"


@functools.cache
def lookup(kind: str, arch: str, wide: bool, head_dim: int, features: str = "") -> Config:
    """The configuration of kernel ``kind`` ("fwd", "dkdv", "fused", "dq", "dbias").

    ``wide`` is float32 input; ``head_dim`` the larger of D and Dv; ``features`` "tma" or "" (the pointer form).
    """
    table: dict[str, list[tuple[int, ...]]] = TABLE[arch]["wide" if wide else "half"]
    options = table.get(f"{kind}+{features}") if features else None
    options = options or table[kind]
    for limit, block_m, block_n, num_warps, num_stages, *registers in options:
        if head_dim <= limit:
            return Config(block_m, block_n, num_warps, num_stages, features == "tma", *registers)
    raise ValueError(
        f"head_dim: expected at most {options[-1][0]} for the portable kernels on {arch} in "
        f"{'float32' if wide else '16 bits'}, got {head_dim}; use impl='reference'"
    )


@functools.cache
def largest_head_dim(arch: str, wide: bool) -> int:
    """Up to which head dim every kernel of the general form has tiles; float32 needs twice the shared memory."""
    rows = TABLE[arch]["wide" if wide else "half"]
    return min(rows[kind][-1][0] for kind in ("fwd", "dkdv", "fused", "dq", "dbias"))


def find(kind: str, arch: str, wide: bool, head_dim: int) -> Config | None:
    """``lookup``, or None where the table has no row: shapes with kernels of their own are those that have one.

    Their kinds end in a size: "few_keys_fwd/32" serves up to 32 keys, "few_queries_bwd/16" up to 16 rows.
    """
    try:
        return lookup(kind, arch, wide, head_dim)
    except (KeyError, ValueError):
        return None
