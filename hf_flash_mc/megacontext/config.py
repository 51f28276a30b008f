"""MegaContextConfig: every setting of a MegaContext, checked when it is made."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

BACKENDS = ("kv", "embedding")
POSITIONS = ("compressed", "absolute")

# smallest value of each whole number; the sizes of the base model may be None until a model is attached
_AT_LEAST = {
    "block_size": 2,
    "max_lod": 1,
    "w_max": 1,
    "sink_tokens": 0,
    "recent_tokens": 0,
    "refocus_interval": 1,
    "max_edits": 0,
    "cooldown": 0,
}
_BASE_SIZES = ("num_layers", "num_kv_heads", "head_dim", "hidden_size", "vocab_size", "max_position_embeddings")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass
class MegaContextConfig:
    """Settings of the history's tree, the working context, the allocator, the heads, and the base model's sizes.

    A node of level of detail (lod) ``l`` stands for ``block_size ** l`` tokens; lod 0 is the tokens themselves.

    Args:
        block_size: tokens of a block, and children of a node.
        max_lod: coarsest level of detail.
        w_max: budget of the working context in slots (a token or a gist costs one).
        sink_tokens: first tokens of the history, never collapsed.
        recent_tokens: last tokens of the history, never collapsed.
        backend: "kv" (gists are keys and values) or "embedding" (gists are input embeddings).
        positions: "compressed" (renumbered once the history is past the rotary range) or "absolute".
        refocus_interval: decoded tokens between two refocuses.
        max_edits: expansions of one refocus; each may be paid for by one collapse.
        tau: scores above ``tau`` ask for expansion, below ``-tau`` offer collapse.
        cooldown: refocuses during which an edit is not reversed.
        gist: fields of `KVGistSettings`, or of `EmbeddingGistSettings`, after the back end. lens: of `LensSettings`.
        base_model_name_or_path, revision, num_layers, ..., max_position_embeddings: the base model, None until known.

    Raises:
        ValueError: any setting is wrong; one message names all of them.
    """

    block_size: int = 32
    max_lod: int = 2
    w_max: int = 8192
    sink_tokens: int = 32
    recent_tokens: int = 128
    backend: Literal["kv", "embedding"] = "kv"
    positions: Literal["compressed", "absolute"] = "compressed"
    refocus_interval: int = 32
    max_edits: int = 4
    tau: float = 0.2
    cooldown: int = 2
    gist: dict[str, Any] = field(default_factory=dict)
    lens: dict[str, Any] = field(default_factory=dict)
    base_model_name_or_path: str | None = None
    revision: str | None = None
    num_layers: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        problems = self._problems()
        if problems:
            raise ValueError("MegaContextConfig: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        """What is wrong with single fields, or else with fields taken together."""
        found = []
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if not _is_int(value) or value < least:
                found.append(f"{name}: expected a whole number of at least {least}, got {value!r}")
        for name in _BASE_SIZES:
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                found.append(f"{name}: expected None or a whole number of at least 1, got {value!r}")
        for name, allowed in (("backend", BACKENDS), ("positions", POSITIONS)):
            if getattr(self, name) not in allowed:
                found.append(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not 0 <= self.tau <= 1:
            found.append(f"tau: expected a number from 0 to 1 (scores lie in [-1, 1]), got {self.tau!r}")
        for name in ("gist", "lens"):
            value = getattr(self, name)
            if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
                such = {"gist": {"pooling": "query"}, "lens": {"kind": "recency"}}[name]
                found.append(f"{name}: expected a dict with names as keys, such as {such}, got {value!r}")
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                found.append(f"{name}: expected None or a string, got {getattr(self, name)!r}")
        return found or self._joint_problems()

    def _joint_problems(self) -> list[str]:
        found = []
        if self.block_size > 65535:
            found.append(f"block_size: expected at most 65535 (a field of the file format), got {self.block_size}")
        if self.block_size**self.max_lod >= 2**48:
            found.append(
                f"max_lod: expected block_size ** max_lod < 2**48, got {self.block_size} ** {self.max_lod}; "
                f"lower max_lod"
            )
            return found
        least = self.fixed_cost + self.block_size
        if self.w_max < least:
            found.append(
                f"w_max: expected at least {least} (sink_tokens, recent_tokens and unfinished blocks hold up to "
                f"{self.fixed_cost} slots that no collapse frees, and a block of {self.block_size} must fit beside "
                f"them), got {self.w_max}; raise it or lower sink_tokens, recent_tokens or block_size"
            )
        if self.max_position_embeddings is not None and self.w_max > self.max_position_embeddings:
            found.append(
                f"w_max: expected at most max_position_embeddings = {self.max_position_embeddings} (every slot needs "
                f"a position of its own), got {self.w_max}; lower it"
            )
        return found

    def span(self, lod: int) -> int:
        """Tokens that a node of level ``lod`` stands for."""
        if not 0 <= lod <= self.max_lod:
            raise ValueError(f"lod: expected 0 to {self.max_lod} (max_lod), got {lod}")
        return self.block_size ** int(lod)  # an int8 of a lod array would overflow: 4 ** np.int8(4) is 0

    @property
    def fixed_cost(self) -> int:
        """The most slots that no collapse can free, beside one gist of ``max_lod`` for each of the other spans.

        Left: at each level the nodes that begin within the sink stay open. Right: the recent tokens, and at each level
        up to ``block_size - 1`` nodes whose parent is not complete before them.
        """
        k, left, inside = self.block_size, 0, 0
        for lod in range(1, self.max_lod + 1):
            opened = -(-self.sink_tokens // k**lod)
            left += k * opened - inside
            inside = opened
        return left + self.recent_tokens + (k - 1) * self.max_lod

    @property
    def max_history(self) -> int:
        """Tokens of history for which the working context is sure to fit ``w_max``."""
        return (self.w_max - self.fixed_cost) * self.block_size**self.max_lod

    @property
    def payload_shape(self) -> tuple[int, ...]:
        """Shape of one node's payload: [num_layers, 2, num_kv_heads, head_dim] (kv) or [hidden_size] (embedding)."""
        names = ("num_layers", "num_kv_heads", "head_dim") if self.backend == "kv" else ("hidden_size",)
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"MegaContextConfig: expected {', '.join(missing)} for the {self.backend} back end, got None; "
                f"attach a model or set them"
            )
        sizes = tuple(getattr(self, name) for name in names)
        return (sizes[0], 2, *sizes[1:]) if self.backend == "kv" else sizes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MegaContextConfig:
        """The inverse of ``to_dict``; unknown names raise, missing ones take their defaults."""
        if not isinstance(values, dict):
            raise TypeError(f"values: expected a dict, got {type(values).__name__}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(
                f"MegaContextConfig: expected only known settings, got {', '.join(unknown)}; "
                f"known are {', '.join(sorted(known))}"
            )
        return cls(**values)
