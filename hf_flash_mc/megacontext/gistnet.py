"""GistNet: one gist from the block_size children of a node, as keys and values or as an input embedding.

Both kinds pool whole batches of windows at once, see every child (nothing is causal), use the same weights at every
level of detail, and begin as something harmless: the mean of keys and values, or the last child's embedding. On an
untrained model these cost about as much as dropping the text, where a mean embedding costs nats more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_flash_mc.ops import flash_attention

from .config import MegaContextConfig
from .layers import Block, check_settings, head_dim_of, init_linears, read_settings, rms_norm, window_tables
from .rope import Rope

POOL_ELEMENTS = 2**27  # of children at a time in ``pool``: about a gigabyte with what is made of them
POOL_TOKENS = 2**17  # of a window batch at a time in ``EmbeddingGist.pool``


@dataclass
class KVGistSettings:
    """``MegaContextConfig.gist`` for the "kv" back end.

    pooling: "mean", or "query": a softmax over the children with one learned query for each layer and head.
    rotation: what is averaged: "centre", keys without their rotation; or "span", keys rotated relative to the middle of
        the block, which is the mean of the rotated keys and fades the fast frequencies. No measurable
        difference on SmolLM2-135M at 512 tokens.
    rank: of the learned residual; 0 for none.
    beta_init: start of the log weight of a gist of n tokens, in units of log n. On SmolLM2-135M at 2048 tokens,
        1 was worse than 0 by 0.13 to 0.23 nats.
    """

    pooling: str = "mean"
    rotation: str = "centre"
    rank: int = 16
    beta_init: float = 0.0

    def __post_init__(self) -> None:
        check_settings(
            "gist",
            {
                f"pooling: expected 'mean' or 'query', got {self.pooling!r}": self.pooling not in ("mean", "query"),
                f"rotation: expected 'centre' or 'span', got {self.rotation!r}": self.rotation
                not in ("centre", "span"),
                f"rank: expected an int >= 0, got {self.rank!r}": not isinstance(self.rank, int) or self.rank < 0,
            },
        )


class PooledKV(NamedTuple):
    """keys ``[n, L, Hkv, D]`` without rotation, values ``[n, L, Hkv, Dv]``; float32."""

    keys: Tensor
    values: Tensor


class KVGist(nn.Module):
    """A key and a value per layer and KV head for each block, and the log weight that gists have as keys.

    The pooled key has its rotation undone; it is rotated to the block's middle (start + span // 2) when it is put into
    a cache. Child j's features are down([key; value]) + place[j], through a GELU, averaged; up (zero at first) turns
    them into a residual of the pooled key and value. Both are in units of the children's root mean square, so that one
    learning rate serves layers of any scale.

    Args:
        config: needs num_layers, num_kv_heads and head_dim.
        rope: the model's rotary positions (``rope_of(model)``); needed where rotated keys are pooled.
    """

    def __init__(self, config: MegaContextConfig, rope: Rope | None = None):
        super().__init__()
        layers, _, heads, dim = _kv_shape(config)
        settings = self.settings = read_settings(KVGistSettings, config.gist, "gist")
        self.block_size, self.max_lod, self.head_dim = config.block_size, config.max_lod, dim
        self._rope = rope
        spans = torch.arange(1, config.max_lod + 1) * math.log(config.block_size)
        self.beta = nn.Parameter((settings.beta_init * spans).expand(layers, heads, -1).clone())  # [L, Hkv, max_lod]
        if settings.pooling == "query":
            self.query = nn.Parameter(torch.zeros(layers, heads, dim))  # zero: the mean
        if settings.rank:
            down = torch.randn(layers, heads, 2 * dim, settings.rank) / math.sqrt(2 * dim)
            self.down = nn.Parameter(down)
            self.place = nn.Parameter(0.02 * torch.randn(layers, heads, self.block_size, settings.rank))
            self.up = nn.Parameter(torch.zeros(layers, heads, settings.rank, 2 * dim))

    @property
    def rope(self) -> Rope | None:
        """The rotary positions, on this module's device; float32 whatever the module is cast to, hence no buffer."""
        rope, device = self._rope, self.beta.device
        if rope is not None and rope.inv_freq.device != device:
            rope = self._rope = rope._replace(
                inv_freq=rope.inv_freq.to(device), attention_scaling=rope.attention_scaling.to(device)
            )
        return rope

    def follow(self, rope: Rope) -> None:
        """Go on with these rotary positions."""
        self._rope = rope

    def forward(self, keys: Tensor, values: Tensor, *, lod: int, positions: Tensor | None = None) -> PooledKV:
        """Pool n windows at once, in float32.

        Args:
            keys: ``[n, K, L, Hkv, D]``; values: ``[n, K, L, Hkv, Dv]`` (Dv == D).
            lod: level of the gists that are made, 1 to max_lod.
            positions: ``[n, K]``, where the keys are rotated; None for keys without rotation, such as gists.

        Raises:
            ValueError: shapes or lod do not fit the config, or positions are given without a rope.
        """
        self._check(keys, values, lod, positions)
        dtype = keys.dtype
        keys = self._placed(keys, lod, positions)
        if self.settings.pooling == "query":
            scores = (keys * self.query.float()).sum(-1) / math.sqrt(keys.shape[-1])  # [n, K, L, Hkv]
            weights = scores.softmax(1)[..., None]
            pooled_key, pooled_value = (weights * keys).sum(1), (weights * values).sum(1)
        else:
            pooled_key, pooled_value = keys.mean(1), values.mean(1, dtype=torch.float32)
        if self.settings.rank:
            key_residual, value_residual = self._residual(keys, values, dtype)
            pooled_key, pooled_value = pooled_key + key_residual, pooled_value + value_residual
        return PooledKV(pooled_key, pooled_value)

    @torch.no_grad()
    def pool(self, children: Tensor, *, lod: int, positions: Tensor | None = None, first: int = 0) -> Tensor:
        """As ``forward``, for payloads: ``[m, K, L, 2, Hkv, D]`` -> ``[m, L, 2, Hkv, D]``, rounded once to their dtype.

        ``first`` (the index of the first gist) is not needed; the tree passes it. Memory does not grow with m.
        """
        out = children.new_empty(children.shape[0], *children.shape[2:])
        step = max(1, POOL_ELEMENTS // max(1, children[:1].numel()))
        device = self.beta.device
        for start in range(0, children.shape[0], step):
            part = children[start : start + step].to(device)
            placed = None if positions is None else positions[start : start + step].to(device)
            pooled = self(part[:, :, :, 0], part[:, :, :, 1], lod=lod, positions=placed)
            out[start : start + step] = torch.stack(pooled, 2)
        return out

    def log_weight(self, lod: Tensor) -> Tensor:
        """``key_log_weight`` of entries: lod ``[N]`` -> float32 ``[L, Hkv, N]``; 0 for tokens, beta for gists."""
        return F.pad(self.beta.float(), (1, 0))[..., lod.long()]

    def _placed(self, keys: Tensor, lod: int, positions: Tensor | None) -> Tensor:
        """The keys in float32, without rotation ("centre") or rotated relative to the block's middle ("span")."""
        rope, spread = self.rope, self.settings.rotation == "span"
        if positions is not None:
            assert rope is not None  # _check
            where = positions[:, :1] + self.block_size // 2 if spread else positions
            cos, sin = rope.tables(where)  # [n, K or 1, L or 1, R]
            # transformers rounds its tables to the keys' dtype; the same rounded tables undo them
            cos, sin = (table.to(keys.dtype).float()[..., None, :] for table in (cos, sin))
            return rope.unrotate(keys.float(), cos, sin)
        if spread and lod > 1:
            if rope is None:
                raise ValueError("rope: expected the model's rotary positions for rotation 'span', got None")
            span = self.block_size ** (lod - 1)
            middles = torch.arange(self.block_size, device=keys.device) * span + span // 2
            cos, sin = rope.tables(middles - span * self.block_size // 2)  # [K, L or 1, R]
            scaling = rope.attention_scaling[:, None]  # applied when the gist enters the cache, and only there
            return rope.rotate(keys.float(), (cos / scaling)[..., None, :], (sin / scaling)[..., None, :])
        return keys.float()

    def _residual(self, keys: Tensor, values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Low-rank residual of pooled key and value, ``[n, L, Hkv, D]`` each; products with down run in ``dtype``."""
        scales = _rms(keys), _rms(values)
        hidden = self.place.float().permute(2, 0, 1, 3)  # [K, L, Hkv, rank]
        for x, down, scale in zip((keys, values), self.down.to(dtype).chunk(2, 2), scales, strict=True):
            hidden = hidden + torch.einsum("nklhd,lhdr->nklhr", x.to(dtype), down).float() / scale[:, None]
        hidden = F.gelu(hidden).mean(1)  # [n, L, Hkv, rank]
        key, value = torch.einsum("nlhr,lhrd->nlhd", hidden, self.up.float()).chunk(2, -1)
        return key * scales[0], value * scales[1]

    def _check(self, keys: Tensor, values: Tensor, lod: int, positions: Tensor | None) -> None:
        layers, heads = self.beta.shape[:2]
        wanted = (self.block_size, layers, heads, self.head_dim)
        problems = {
            f"{name}: expected [n, {', '.join(map(str, wanted))}], got {list(x.shape)}": tuple(x.shape[1:]) != wanted
            for name, x in (("keys", keys), ("values", values))
        }
        problems[f"lod: expected 1 to {self.max_lod} (the level of the gist), got {lod}"] = not 1 <= lod <= self.max_lod
        if positions is not None:
            shape = [keys.shape[0], self.block_size]
            problems[f"positions: expected {shape}, got {list(positions.shape)}"] = list(positions.shape) != shape
            remedy = "positions: rotated keys need the model's rotary positions; build with rope=rope_of(model)"
            problems[remedy] = self._rope is None
        check_settings("KVGist", problems)


def _rms(x: Tensor) -> Tensor:
    """Root mean square over children and dimensions: ``[n, K, L, H, D]`` -> ``[n, L, H, 1]``; a constant, not 0."""
    wide = torch.promote_types(x.dtype, torch.float32)  # torch refuses to narrow float64 here
    norm = torch.linalg.vector_norm(x.detach(), dim=(1, 4), dtype=wide).float()
    return (norm / math.sqrt(x.shape[1] * x.shape[4])).clamp(min=1e-12)[..., None]


def _kv_shape(config: MegaContextConfig) -> tuple[int, int, int, int]:
    sizes = (config.num_layers, 2, config.num_kv_heads, config.head_dim)
    if not all(sizes):
        raise ValueError(f"config: expected num_layers, num_kv_heads and head_dim, got {sizes[0], sizes[2], sizes[3]}")
    return sizes  # type: ignore[return-value]


@dataclass
class EmbeddingGistSettings:
    """``MegaContextConfig.gist`` for the "embedding" back end.

    network: "transformer": blocks over the children, then pooling; "slots": one slot reads the children by cross
        attention, the children read the slot, and a second slot reads them (32 -> 1 -> 32 -> 1).
    layers: blocks (of each pass, for slots). width: None for the embedding's own (transformer) or 512 (slots).
    pooling (transformer): "mean", "query" (one learned query) or "cls" (one more learned token, which sees them all).
    head: "linear" or "mlp"; zero at first. base: what the head's output is added to: "last" child or "mean".
    """

    network: str = "transformer"
    layers: int = 2
    width: int | None = None
    head_dim: int | None = None
    pooling: str = "mean"
    head: str = "linear"
    base: str = "last"
    rope_theta: float = 1e4

    def __post_init__(self) -> None:
        allowed = {
            "network": ("transformer", "slots"),
            "pooling": ("mean", "query", "cls"),
            "head": ("linear", "mlp"),
            "base": ("last", "mean"),
        }
        problems = {
            f"{name}: expected one of {', '.join(values)}, got {getattr(self, name)!r}": getattr(self, name)
            not in values
            for name, values in allowed.items()
        }
        problems[f"layers: expected an int >= 1, got {self.layers!r}"] = (
            not isinstance(self.layers, int) or self.layers < 1
        )
        check_settings("gist", problems)


class EmbeddingGist(nn.Module):
    """A gist in the base model's input-embedding space: base (last child) + head(network(children)).

    Args:
        config: needs hidden_size.
    """

    def __init__(self, config: MegaContextConfig):
        super().__init__()
        if config.hidden_size is None:
            raise ValueError("config: expected hidden_size, got None")
        settings = self.settings = read_settings(EmbeddingGistSettings, config.gist, "gist")
        size, slots = config.hidden_size, settings.network == "slots"
        self.block_size, self.max_lod, self.hidden_size = config.block_size, config.max_lod, size
        width = settings.width or (min(512, size) if slots else size)
        self.head_dim = head_dim_of(width, settings.head_dim)
        self.project = nn.Identity() if width == size else nn.Linear(size, width, bias=False)
        self.body: nn.Module
        if slots:
            self.body = SlotNetwork(width, self.head_dim, settings.layers)
        else:
            self.body = WindowTransformer(width, self.head_dim, settings.layers, settings.pooling)
        last = nn.Linear(2 * width if settings.head == "mlp" else width, size, bias=False)
        if settings.head == "mlp":
            self.head = nn.Sequential(nn.Linear(width, 2 * width, bias=False), nn.ReLU(), last)
        else:
            self.head = nn.Sequential(last)
        init_linears(self)
        nn.init.zeros_(last.weight)

    def forward(self, children: Tensor, *, lod: int = 1) -> Tensor:
        """``[n, K, hidden_size]`` -> ``[n, hidden_size]``; the weights are the same at every lod."""
        wanted = (self.block_size, self.hidden_size)
        if tuple(children.shape[1:]) != wanted or not 1 <= lod <= self.max_lod:
            raise ValueError(
                f"children: expected [n, {wanted[0]}, {wanted[1]}], got {list(children.shape)}; "
                f"lod: expected 1 to {self.max_lod}, got {lod}"
            )
        base = children[:, -1] if self.settings.base == "last" else children.mean(1)
        tables = window_tables(self.block_size, self.head_dim, self.settings.rope_theta, children.device)
        pooled = self.body(self.project(rms_norm(children)), tables)  # [n, width]
        scale = children.detach().float().square().mean((1, 2)).sqrt()[:, None]  # the size of embeddings differs
        return base + self.head(rms_norm(pooled)) * scale.to(base.dtype)

    @torch.no_grad()
    def pool(self, children: Tensor, *, lod: int, first: int = 0) -> Tensor:
        """As ``forward``, in parts of bounded memory, from and to the dtype and device of ``children``."""
        weight = self.head[-1].weight
        step = max(1, POOL_TOKENS // self.block_size)
        parts = [self(part.to(weight), lod=lod).to(children) for part in children.split(step)]
        return torch.cat(parts) if parts else children.new_empty(0, self.hidden_size)


class WindowTransformer(nn.Module):
    """Non-causal blocks over windows, then one vector for each: the mean, a learned query's, or a further token's."""

    def __init__(self, width: int, head_dim: int, layers: int, pooling: str):
        super().__init__()
        self.pooling, self.head_dim = pooling, head_dim
        self.blocks = nn.ModuleList(Block(width, head_dim) for _ in range(layers))
        if pooling == "query":
            self.query = nn.Parameter(torch.zeros(width))  # zero: the mean
        if pooling == "cls":
            self.cls = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """``[n, K, W]`` -> ``[n, W]``."""
        if self.pooling == "cls":
            x = torch.cat((x, self.cls.to(x.dtype).expand(x.shape[0], 1, -1)), 1)
            still = torch.ones_like(tables[0][:1]), torch.zeros_like(tables[1][:1])  # the token has no position
            tables = torch.cat((tables[0], still[0])), torch.cat((tables[1], still[1]))
        for block in self.blocks:
            x = block(x, tables=tables)
        if self.pooling == "cls":
            return x[:, -1]
        if self.pooling == "mean":
            return x.mean(1)
        heads = rms_norm(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [n, H, K, D]
        query = self.query.to(x.dtype).reshape(1, -1, 1, self.head_dim).expand(x.shape[0], -1, -1, -1)
        return flash_attention(query, heads, x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)).flatten(1)


class SlotNetwork(nn.Module):
    """32 -> 1 -> 32 -> 1: blocks over the children, a slot that reads them, children that read the slot, and again.

    The children read the slot next to the vector it started from; one key alone would leave nothing to choose.
    """

    def __init__(self, width: int, head_dim: int, layers: int, passes: int = 2):
        super().__init__()
        self.slots = nn.Parameter(torch.randn(passes, 1, width))
        self.encode = nn.ModuleList(
            nn.ModuleList(Block(width, head_dim, gelu=True) for _ in range(layers)) for _ in range(passes)
        )
        self.read = nn.ModuleList(
            nn.ModuleList(Block(width, head_dim, cross=True, gelu=True) for _ in range(layers)) for _ in range(passes)
        )
        self.expand = nn.ModuleList(Block(width, head_dim, cross=True, gelu=True) for _ in range(passes - 1))

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """``[n, K, W]`` -> ``[n, W]``."""
        seen: list[Tensor] = []
        for i, (encode, read) in enumerate(zip(self.encode, self.read, strict=True)):
            if i:
                x = self.expand[i - 1](x, torch.cat(seen, 1), tables)
            for block in encode:  # type: ignore[attr-defined]
                x = block(x, tables=tables)
            slot = start = self.slots[i].to(x.dtype).expand(x.shape[0], 1, -1)  # [n, 1, W]
            for block in read:  # type: ignore[attr-defined]
                slot = block(slot, x, context_tables=tables)
            seen = [slot, start]
        return slot[:, 0]


def build_gist(config: MegaContextConfig, rope: Rope | None = None) -> Any:
    """The GistNet of the config's back end: ``KVGist`` (with the model's ``rope_of``) or ``EmbeddingGist``."""
    return KVGist(config, rope) if config.backend == "kv" else EmbeddingGist(config)
