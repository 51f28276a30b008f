"""RecallIndex: which old text the last queries ask for, found by the model's own copying heads among the exact keys.

Gists of mean keys do not say what their text holds: of 80 blocks of Python's documentation, the one that a question
asked for ranked 25th (median) by the attention its gist got. A few heads of every language model copy what followed the
same token before (induction heads: Olsson et al., "In-context learning and induction heads", 2022). By their attention
to exact keys that block ranked first in 24 of 24 questions, without rotation rather than with it (SmolLM2-135M, 2560
tokens, needles of 8 names). So the keys of these heads alone are kept for the whole history: 256 bytes a token there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import Rope
from .store import Store

if TYPE_CHECKING:
    from .attach import MegaContext

HEADS = 4  # query heads that look things up; 4, 8 and 16 found the same
REPEATED = 96  # random tokens, shown twice to find them
CHUNK = 2**16  # tokens scored at a time
MIRROR = 2**26  # bytes of keys that a GPU holds too, taken at once so that its memory does not grow; then the host's
NEIGHBOUR = 0.9  # of a block's mass counts for the blocks beside it: what is asked for may begin or end there
FILE = "recall.ctx"


class RecallIndex:
    """Un-rotated keys of a few heads, for every token of the tree.

    Args:
        heads: (layer, query head) pairs; groups: query heads per KV head.
        scaling: each layer's factor on q.k.
        store: records ``[P, D]``, float16: one key for each of `pairs`.
        device: where scores are computed.
    """

    def __init__(
        self,
        heads: list[tuple[int, int]],
        groups: int,
        scaling: list[float],
        rope: Rope,
        block_size: int,
        store: Store,
        device: torch.device,
    ) -> None:
        self.heads, self.scaling, self.rope, self.block_size, self.store = heads, scaling, rope, block_size, store
        tokens = 0 if device.type == "cpu" else MIRROR // (2 * store.shape[0] * store.shape[1])
        self._mirror = torch.empty(tokens // block_size * block_size, *store.shape, dtype=torch.float16, device=device)
        self._mirror[: len(store)] = store.read(slice(0, min(len(store), len(self._mirror)))).to(device)
        self.pairs = pairs_of(heads, groups)
        self.key_of = [self.pairs.index((layer, head // groups)) for layer, head in heads]

    def __len__(self) -> int:
        return len(self.store)

    def append(self, payload: Tensor, positions: Tensor) -> None:
        """Keys of new tokens: payloads ``[n, L, 2, Hkv, D]``, and the positions [n] that they are rotated at."""
        chosen = torch.stack([payload[:, layer, 0, head] for layer, head in self.pairs], 1)  # [n, P, D]
        keys = self._bare(chosen, positions, [layer for layer, _ in self.pairs]).half()
        held = self._mirror[len(self) : len(self) + len(keys)]
        held.copy_(keys[: len(held)])
        self.store.append(keys.cpu())

    @torch.no_grad()
    def mass(self, queries: Tensor, first: int, sink: int = 0) -> Tensor:
        """What share of a query's attention a whole block of the history gets, at most: float32 [blocks].

        The most over queries and heads, as a single token of a question may be the one that asks, and over the blocks
        beside it, at a discount.
        queries ``[L, Hq, n, D]``, rotated at positions ``first, first + 1, ...``; sink: first tokens, which get
        attention for nothing, and whose blocks count 0.
        """
        device, count = queries.device, queries.shape[2]
        blocks = len(self) // self.block_size
        if not blocks or not count:
            return torch.zeros(blocks, dtype=torch.float32, device=device)
        layers = [layer for layer, _ in self.heads]
        held = torch.stack([queries[layer, head] for layer, head in self.heads], 1)  # [n, P', D]
        bare = self._bare(held, torch.arange(first, first + count, device=device), layers)
        asked = torch.stack([bare[:, i] * self.scaling[layer] for i, layer in enumerate(layers)])  # [P', n, D]
        found = []
        for keys in self._chunks(blocks * self.block_size):
            known = keys.to(device, torch.float32)[:, self.key_of]  # [t, P', D]
            logits = torch.einsum("hnd,thd->hnt", asked, known)
            found.append(logits.unflatten(-1, (-1, self.block_size)).logsumexp(-1))
        mass = torch.cat(found, -1).softmax(-1).amax((0, 1))  # [P', n, blocks] -> [blocks]
        mass[: sink // self.block_size] = 0.0
        return torch.maximum(mass, NEIGHBOUR * F.max_pool1d(mass[None], 3, 1, 1)[0])

    def _chunks(self, stop: int) -> Iterator[Tensor]:
        """The first ``stop`` keys, from the device as far as it has them."""
        step, held = CHUNK // self.block_size * self.block_size, min(stop, len(self._mirror))
        for start in range(0, held, step):
            yield self._mirror[start : min(start + step, held)]
        for start in range(held, stop, step):
            yield self.store.read(slice(start, min(start + step, stop)))

    def _bare(self, x: Tensor, positions: Tensor, layers: list[int]) -> Tensor:
        """Vectors ``[n, P, D]`` of these layers [P] without their rotation, float32."""
        cos, sin = self.rope.tables(positions.to(x.device))  # [n, L or 1, R]
        if cos.shape[1] > 1:
            cos, sin = cos[:, layers], sin[:, layers]
        return self.rope.unrotate(x.float(), cos, sin)


def pairs_of(heads: list[tuple[int, int]], groups: int) -> list[tuple[int, int]]:
    """The (layer, KV head) pairs that these query heads read."""
    return sorted({(layer, head // groups) for layer, head in heads})


def entry_mass(blocks: np.ndarray, start: np.ndarray, span: np.ndarray, block_size: int) -> np.ndarray:
    """Mass of slots from that of blocks: the most within a gist's span; the median for tokens outside the tree."""
    out = np.full(len(start), np.median(blocks) if len(blocks) else 0.0, np.float32)
    first, last = start // block_size, (start + span - 1) // block_size
    known = last < len(blocks)
    single = known & (first == last)
    out[single] = blocks[first[single]]
    wide = np.flatnonzero(known & (first < last))
    if len(wide):
        bounds = np.stack((first[wide], last[wide] + 1), 1).ravel()
        padded = np.append(blocks, 0)  # reduceat takes no index past the end
        out[wide] = np.maximum.reduceat(padded, bounds)[::2]
    return out


@torch.no_grad()
def find_heads(addon: MegaContext, count: int = HEADS) -> list[tuple[int, int]]:
    """The heads that copy best, as (layer, query head).

    Random tokens are shown twice: a copying head's query of a repeated token looks at what followed its first showing.
    Layers with a sliding window are left out where others exist.
    """
    from .session import MegaContextSession

    config = addon.config
    repeated = min(REPEATED, config.w_max // 2, (config.max_position_embeddings or config.w_max) // 2)
    generator = torch.Generator().manual_seed(0)
    assert config.vocab_size is not None
    ids = torch.randint(config.vocab_size, (repeated,), generator=generator).repeat(2)
    session = MegaContextSession(addon, chunk_size=2 * repeated, observe=repeated, recall=False)
    session.ingest(ids)
    cache = session.cache
    queries = cache.last_queries()
    rows = torch.arange(repeated, device=queries.device)
    later = torch.arange(2 * repeated, device=queries.device)[None] > rows[:, None] + repeated
    layers = [i for i, window in enumerate(cache.windows) if window is None] or list(range(len(cache.layers)))
    scores: list[tuple[float, int, int]] = []
    for layer in layers:
        keys = cache.kv[0, layer, :, : 2 * repeated].float()
        grouped = queries[layer].float().unflatten(0, (keys.shape[0], -1))  # [Hkv, G, n, D]
        logits = torch.einsum("hgnd,htd->hgnt", grouped, keys) * session.scaling[layer]
        weights = logits.masked_fill(later, -torch.inf).softmax(-1).flatten(0, 1)
        for head, score in enumerate(weights[:, rows, rows + 1].mean(-1).tolist()):
            scores.append((score, layer, head))
    return sorted((layer, head) for _, layer, head in sorted(scores, reverse=True)[:count])


def open_store(config: Any, folder: Any, pairs: int, durable: bool = False) -> Store:
    """The index's records: float16 [pairs, D], in memory or in a file beside the tree."""
    from .store import FileStore, MemoryStore

    shape = (pairs, config.payload_shape[3])
    if folder is None:
        return MemoryStore(shape, torch.float16)
    path = folder / FILE
    about: dict[str, Any] = {"level": 0, "block_size": config.block_size, "model_id": config.base_model_name_or_path}
    about["durable"] = durable
    return (FileStore.open if path.exists() else FileStore.create)(path, shape, torch.float16, **about)
