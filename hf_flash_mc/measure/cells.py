"""What is measured: a cell is a shape with its mask and feature. The only registry: reports and goals refer to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch

BOTH = ("forward", "backward")
VARLEN_SEED, VARLEN_SHORTEST = 0, 16
TRAIN_LAYERS, TRAIN_HIDDEN, TRAIN_MLP, TRAIN_VOCABULARY = 8, 2048, 8192, 32000  # of the Llama-shaped model
TUNE_LAYERS = 16  # of the one with 1.1 billion parameters, whose step has an optimizer


@dataclass(frozen=True)
class Cell:
    """q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D]; group "varlen": B packed sequences of up to Sq tokens."""

    group: str
    head_dim: int
    causal: bool
    batch: int
    q_heads: int
    kv_heads: int
    sq: int
    sk: int
    # ranges, weight, sinks, softcap, dropout, recompute; packed; pageN (blocks); times30; llama, llama-1b
    feature: str = ""
    directions: tuple[str, ...] = BOTH

    @property
    def name(self) -> str:
        mask = "causal" if self.causal else "full"
        name = f"d{self.head_dim}-{mask}-b{self.batch}-h{self.q_heads}:{self.kv_heads}-q{self.sq}-k{self.sk}"
        return f"{name}-{self.feature}" if self.feature else name

    @cached_property
    def lengths(self) -> list[int]:
        """Of the packed sequences: uniform from 16 to ``sq``, the same in every run."""
        generator = torch.Generator().manual_seed(VARLEN_SEED)
        return torch.randint(min(VARLEN_SHORTEST, self.sq), self.sq + 1, (self.batch,), generator=generator).tolist()

    @property
    def page(self) -> int:
        """Keys in a block of the paged cache; 0 where there is none."""
        return int(self.feature[4:]) if self.feature.startswith("page") else 0

    def flops(self, direction: str) -> float:
        """Of the visible pairs alone: 4 B H Sq Sk D, half if causal; the backward counts 2.5 times that."""
        causal = self.causal or self.feature == "ranges"
        pairs: float = sum(n * n for n in self.lengths) if self.feature == "packed" else self.batch * self.sq * self.sk
        pairs *= 0.5 if causal and self.sq == self.sk else 1
        forward = 4 * self.q_heads * self.head_dim * pairs
        return forward if direction == "forward" else 2.5 * forward

    def bytes(self, direction: str, itemsize: int = 2) -> int:
        """Read and written at least: q, k, v, out; the backward twice that (and dout, dq, dk, dv)."""
        queries, keys = self.q_heads * self.sq, self.kv_heads * self.sk
        forward = 2 * self.batch * self.head_dim * itemsize * (queries + keys)
        return forward if direction == "forward" else 2 * forward


def parse(name: str) -> Cell:
    """The cell of a name such as "d128-causal-b4-h32:8-q4096-k4096".

    Raises:
        ValueError: where the name has another form.
    """
    found = re.fullmatch(r"d(\d+)-(full|causal)-b(\d+)-h(\d+):(\d+)-q(\d+)-k(\d+)", name)
    if found is None or 0 in (n := [int(x) for i, x in enumerate(found.groups()) if i != 1]) or n[2] % n[3]:
        raise ValueError(
            f"shape: expected HEAD_DIM, mask, batch, query and KV heads, queries and keys as in "
            f'"d128-causal-b4-h32:8-q4096-k4096" (query heads a multiple of KV heads), got {name!r}'
        )
    return Cell("given", n[0], found.group(2) == "causal", n[1], n[2], n[3], n[4], n[5])


def _long(head_dim: int, length: int) -> list[Cell]:
    """16384 tokens of 2048 channels, full and causal."""
    batch, heads = 16384 // length, 2048 // head_dim
    return [Cell("long", head_dim, causal, batch, heads, heads, length, length) for causal in (False, True)]


def _train(batch: int, length: int, feature: str = "llama") -> Cell:
    return Cell("train", 64, True, batch, 32, 8, length, length, feature, ("step",))


_FEATURES = ("ranges", "weight", "sinks", "softcap", "dropout")
# in the order in which they run: what a time limit cuts off comes last
CELLS = [
    *(cell for s in (4096, 16384) for d in (128, 64, 256) for cell in _long(d, s)),
    Cell("gqa", 128, True, 4, 32, 8, 4096, 4096),
    Cell("gqa", 128, False, 4, 32, 8, 4096, 4096),
    Cell("gqa", 64, True, 1, 32, 8, 16384, 16384),
    Cell("windows", 64, False, 8192, 8, 8, 32, 32),
    Cell("cross", 64, False, 256, 8, 8, 8192, 8),
    Cell("cross", 64, False, 256, 8, 8, 8, 8192),
    *(Cell("varlen", 128, causal, 128, 16, 16, 1023, 1023, "packed") for causal in (False, True)),
    Cell("decode", 128, False, 8, 32, 8, 1, 32768, directions=("forward",)),
    Cell("decode", 128, False, 1, 32, 8, 1, 131072, directions=("forward",)),
    *(Cell("paged", 128, False, b, 32, 8, 1, n, f"page{page}", ("forward",))
      for b, n in ((8, 32768), (1, 131072)) for page in (16, 256)),
    *(cell for s in (1024, 2048) for d in (128, 64, 256) for cell in _long(d, s)),
    *(Cell("features", 128, f != "ranges", 4, 16, 16, 4096, 4096, f) for f in _FEATURES),
    Cell("features", 128, True, 4, 16, 16, 4096, 4096, "recompute", ("backward",)),
    *(Cell("accuracy", d, True, 4, 2048 // d, 2048 // d, 4096, 4096, "times30", ("forward",)) for d in (64, 128)),
    Cell("context", 64, False, 4, 8, 8, 8192, 8192),  # a working context of 8192 entries against itself
    Cell("context", 64, True, 64, 8, 8, 64, 8256),  # 64 tokens ahead of a working context of 8192
    _train(1, 16384, "llama-1b"),
    _train(1, 16384),
    _train(8, 2048),
    _train(1, 65536),
]
SMOKE = [  # every kind of cell in a size that a CPU takes in no time
    *(Cell("long", 16, causal, 1, 4, 2, 33, 33 if causal else 65) for causal in (False, True)),
    Cell("windows", 16, False, 3, 2, 2, 8, 8),
    Cell("varlen", 16, True, 3, 2, 2, 19, 19, "packed"),
    Cell("decode", 16, False, 2, 4, 2, 1, 40, directions=("forward",)),
    Cell("paged", 16, False, 2, 4, 2, 1, 40, "page16", ("forward",)),
    *(Cell("features", 16, f != "ranges", 1, 2, 2, 24, 24, f) for f in _FEATURES),
    Cell("features", 16, True, 1, 2, 2, 24, 24, "recompute", ("backward",)),
    Cell("accuracy", 16, True, 1, 2, 2, 24, 24, "times30", ("forward",)),
]
RING = [  # one sequence spread over ranks: grouped heads as in Llama 3, and every head with keys of its own
    *(Cell("ring", 128, causal, 1, 32, 8, s, s) for s in (65536, 131072, 262144) for causal in (True, False)),
    *(Cell("ring", 128, causal, 1, 16, 16, 65536, 65536) for causal in (True, False)),
]
RING_SMOKE = [Cell("ring", 16, causal, 2, 4, 2, 96, 96) for causal in (True, False)]


def select(cells: list[Cell], patterns: list[str]) -> list[Cell]:
    """The cells of whose "group name" any of the regular expressions finds a part; all without patterns.

    Raises:
        ValueError: for a pattern that finds nothing, or is none.
    """
    chosen: set[Cell] = set()
    for pattern in patterns:
        try:
            found = [c for c in cells if re.search(pattern, f"{c.group} {c.name}")]
        except re.error as error:
            raise ValueError(f"only: expected regular expressions, got {pattern!r}: {error}") from None
        if not found:
            groups = ", ".join(dict.fromkeys(c.group for c in cells))
            raise ValueError(
                f"only: expected a part of a group's or cell's name, got {pattern!r}, which is in none. "
                f"Groups: {groups}; --list shows the cells"
            )
        chosen.update(found)
    return [c for c in cells if not patterns or c in chosen]
