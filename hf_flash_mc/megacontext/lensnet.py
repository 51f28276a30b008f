"""LensNet: a score for every entry of the working context; above 0 it asks for more detail, below 0 it offers some.

All lenses have one interface, ``Lens.score(LensInput) -> [N]`` in [-1, 1], and obey the same legality: a token cannot
be expanded (its score is at most 0) and a gist of the highest level cannot be collapsed (at least 0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MegaContextConfig
from .layers import (
    Attention,
    Block,
    Tables,
    check_settings,
    head_dim_of,
    init_linears,
    read_settings,
    rms_norm,
    rms_scale,
)
from .rope import rope_tables, span_sigma


@dataclass
class LensInput:
    """What a lens sees of a working context of N entries. Tensors of one device.

    Training scores B contexts of as many entries at once: then all tensors but ``cursor`` begin with B.

    start: int64 ``[N]``; lod: integers ``[N]``; cursor: length of the history (where the next
    token goes), an int or an int64 tensor of no dimension.
    entries: ``[N, d]``, an embedding of each entry; tail: ``[t, d]``, gists of the latest history in any order;
    attention_mass: ``[N]``, attention that the latest queries pay to each entry, summed or averaged over layers and
    heads, any scale; recall: ``[N]``, what a `RecallIndex` finds; generator: for random choices. None where a lens does
    not need it. count: int32 of no dimension where only the first entries are real and the rest is padding, whose
    score is 0 (for CUDA graphs: ``GraphedLens``).
    """

    start: Tensor
    lod: Tensor
    cursor: int | Tensor
    entries: Tensor | None = None
    tail: Tensor | None = None
    attention_mass: Tensor | None = None
    generator: torch.Generator | None = None
    count: Tensor | None = None
    recall: Tensor | None = None

    @classmethod
    def of(cls, context: Any, device: Any = "cpu", **more: Any) -> LensInput:
        """From a WorkingContext (its ``start``, ``lod`` and ``total``) and the other fields."""
        start = torch.tensor(context.start, dtype=torch.int64, device=device)
        return cls(start, torch.tensor(context.lod, dtype=torch.int64, device=device), int(context.total), **more)

    @property
    def real(self) -> Tensor | None:
        """Which entries are no padding: bool ``[N]``; None for all."""
        if self.count is not None and self.lod.dim() > 1:
            raise ValueError(f"count: expected None for {len(self.lod)} contexts at once, which have no padding")
        return None if self.count is None else torch.arange(len(self.lod), device=self.lod.device) < self.count

    def need(self, name: str, lens: Any) -> Tensor:
        """The field ``name``, or a ValueError that says which lens misses it."""
        value = getattr(self, name)
        shape = self.start.shape
        if value is None or (name != "tail" and value.shape[: len(shape)] != shape):
            got = None if value is None else list(value.shape)
            raise ValueError(
                f"{name}: {type(lens).__name__} expects one for each of {list(shape)} entries, got {got}; a session "
                'has it with observe of at least 1, for a lens whose reads is not "nothing"'
                if name != "tail"
                else f"tail: {type(lens).__name__} expects the gists of the latest history [t, d], got None"
            )
        return value


class Lens(nn.Module):
    """The interface. A lens implements ``forward``: scores ``[N]`` in [-1, 1] before legality.

    ``reads``: "recall" if it needs the field of that name, and so a session with a `RecallIndex`; "nothing" if it
    needs no `attention_mass` either; else "mass".
    """

    reads = "mass"

    def __init__(self, config: MegaContextConfig):
        super().__init__()
        self.block_size, self.max_lod = config.block_size, config.max_lod
        self.sink_tokens, self.recent_tokens = config.sink_tokens, config.recent_tokens

    def forward(self, context: LensInput) -> Tensor:
        """Scores ``[N]`` before legality."""
        raise NotImplementedError

    def score(self, context: LensInput) -> Tensor:
        """Legal scores: float32 ``[N]`` in [-1, 1]. Where legality clips a score its gradient is 0."""
        return self.legal(self(context), context)

    def legal(self, raw: Tensor, context: LensInput) -> Tensor:
        """What legality makes of a forward's scores ``[N]``."""
        score, lod = raw.float(), context.lod
        low = torch.where(lod == self.max_lod, 0.0, -1.0)
        score = torch.minimum(torch.maximum(score, low), torch.where(lod == 0, 0.0, 1.0))
        real = context.real
        return score if real is None else torch.where(real, score, 0.0)

    def span(self, lod: Tensor) -> Tensor:
        """Tokens that entries stand for: int64 ``[N]``."""
        span = torch.ones_like(lod, dtype=torch.int64)
        for level in range(1, self.max_lod + 1):  # pow of integers would be a kernel of its own in a compiled lens
            span = torch.where(lod == level, self.block_size**level, span)
        return span

    def middle(self, context: LensInput) -> Tensor:
        """The middle of each entry, in tokens back from the cursor: float32 ``[N]``, small where it matters."""
        return (context.cursor - context.start).float() - 0.5 * self.span(context.lod).float()


def _length(context: LensInput) -> Tensor:
    """The cursor as a float32 scalar on the device, at least 1, without waiting for the device."""
    cursor = context.cursor
    if not isinstance(cursor, Tensor):
        cursor = torch.full((), cursor, dtype=torch.int64, device=context.start.device)
    return cursor.float().clamp(min=1)


class RecencyLens(Lens):
    """Training-free: from -1 for the oldest text to 1 for the latest."""

    reads = "nothing"

    def forward(self, context: LensInput) -> Tensor:
        """2 x position / length - 1."""
        return 1 - 2 * self.middle(context) / _length(context)


class GistMassLens(Lens):
    """Training-free: attention mass m of an entry against the median m0 of its level, (m - m0) / (m + m0).

    A gist that draws more attention than other gists is worth expanding, tokens that draw less than other tokens are
    worth collapsing. Each level has a median of its own, because an untrained gist draws a hundredth of what a token
    does: against one median for all no gist would ever be expanded. The sink and the recent tokens draw far more than
    their share and can never change, so they are left out. On SmolLM2-135M at least as good as recency
    (2048 tokens, four expansions).
    """

    def forward(self, context: LensInput) -> Tensor:
        """Needs ``attention_mass``."""
        mass = context.need("attention_mass", self).float()
        return _compared(mass, self.usual(context, mass))

    def usual(self, context: LensInput, mass: Tensor) -> Tensor:
        """The median over the entries of the same level that may change, ``[N]``; NaN where there are none."""
        end = context.start + self.span(context.lod)
        fixed = (end <= self.sink_tokens) | (end > context.cursor - self.recent_tokens)
        if (real := context.real) is not None:
            fixed = fixed | ~real
        levels = torch.arange(self.max_lod + 1, device=mass.device)[:, None]
        mine = (context.lod.unsqueeze(-2) == levels) & ~fixed.unsqueeze(-2)
        counted = torch.where(mine, mass.unsqueeze(-2), torch.nan)
        return _median(counted).gather(-1, context.lod)


def _median(x: Tensor) -> Tensor:
    """Over the last dimension, NaN left out; the lower one of two."""
    if not x.shape[-1]:  # a working context of no entries
        return x.new_full(x.shape[:-1], torch.nan)
    if not x.is_cuda:
        return x.nanmedian(-1).values
    # there nanmedian of one row waits for the device, and of several is not deterministic
    count = x.isnan().logical_not().sum(-1, keepdim=True)
    return x.sort(-1).values.gather(-1, ((count - 1) // 2).clamp(min=0)).squeeze(-1)  # NaN come last


def _compared(mass: Tensor, usual: Tensor) -> Tensor:
    """(m - m0) / (m + m0), 0 where both are 0 or one is unknown."""
    total = mass + usual
    return torch.where(total > 0, (mass - usual) / total, 0.0)


class RecallLens(GistMassLens):
    """Training-free, the default: attention mass m times the odds r of what a `RecallIndex` finds, against medians.

    (m r - m0 r0) / (m r + m0 r0). Where a question looks a fact up, r decides: nearly all of some query's attention
    goes to one block. Where text just goes on, both are about as good as recency.
    """

    reads = "recall"

    def forward(self, context: LensInput) -> Tensor:
        """Needs ``attention_mass`` and ``recall``."""
        mass, recall = (context.need(name, self).double() for name in ("attention_mass", "recall"))  # both may be tiny
        odds = recall / (1 - recall).clamp(min=1e-9)
        return _compared(mass * odds, self.usual(context, mass) * self.usual(context, odds)).float()


class RandomLens(Lens):
    """Uniform in [-1, 1], from ``generator``: the baseline that any lens must beat."""

    reads = "nothing"

    def forward(self, context: LensInput) -> Tensor:
        """Draws on the generator's device, so that the same seed gives the same edits on every device."""
        source = context.generator
        drawn = torch.rand(context.start.shape, generator=source, device=source.device if source else "cpu")
        return 2 * drawn.to(context.start.device) - 1


class OracleLens(Lens):
    """Scores from a function of the context, such as measured utilities; clipped to [-1, 1]."""

    def __init__(self, config: MegaContextConfig, function: Callable[[LensInput], Tensor]):
        super().__init__(config)
        self.function = function

    def forward(self, context: LensInput) -> Tensor:
        """The function's result."""
        return torch.as_tensor(self.function(context), device=context.start.device).float().clamp(-1, 1)


@dataclass
class LensSettings:
    """``MegaContextConfig.lens``. kind: "recall", "gist_mass", "recency", "random", "dual" or "transformer".

    The rest is for the trained kinds. width: d_lens. stacks: of the dual lens. layers: of the transformer.
    prior: "none", "recency" or "gist_mass", the lens that an untrained network equals (its head begins at zero); with
    "none" it scores 0. entry_dim: size of entries and tail, None for the base model's hidden_size.
    """

    kind: str = "recall"
    width: int = 512
    head_dim: int | None = 64
    stacks: int = 1
    layers: int = 2
    prior: str = "none"
    entry_dim: int | None = None
    rope_theta: float = 1e4

    def __post_init__(self) -> None:
        counts = {
            f"{name}: expected an int >= 1, got {getattr(self, name)!r}": not isinstance(getattr(self, name), int)
            or getattr(self, name) < 1
            for name in ("width", "stacks", "layers")
        }
        kind = f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}; an OracleLens is made from its function"
        prior = f"prior: expected one of {', '.join(PRIORS)}, got {self.prior!r}"
        check_settings("lens", counts | {kind: self.kind not in KINDS, prior: self.prior not in PRIORS})


class TrainedLens(Lens):
    """What both networks share: entries brought to the lens's width, features, and a head on top of a prior.

    score = tanh(atanh(prior) + head([network's output; features])).
    """

    def __init__(self, config: MegaContextConfig):
        super().__init__(config)
        settings = self.settings = read_settings(LensSettings, config.lens, "lens")
        size = settings.entry_dim or config.hidden_size
        if size is None:
            raise ValueError("config: expected hidden_size (or lens['entry_dim']), got None")
        self.head_dim, width = head_dim_of(settings.width, settings.head_dim), settings.width
        self.project = nn.Linear(size, width, bias=False)
        self.features = nn.Linear(self.max_lod + 6, width, bias=False)
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, 1))
        kind = PRIORS[settings.prior]
        self.prior = None if kind is None else kind(config)

    def finish(self) -> None:
        """Initialise; the last layer is zero, so that the untrained lens is its prior."""
        init_linears(self)
        last = self.head[-1]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]

    def describe(self, context: LensInput) -> Tensor:
        """Features of entries, all within [-1, 1]: ``[N, max_lod + 6]``.

        The level (one of max_lod + 1), the distance to the cursor, linear and logarithmic, the attention mass against
        its mean (a median costs 0.05 ms), whether it is known, and 1 (a bias: eight columns multiply twice as fast as
        seven).
        """
        levels = torch.arange(self.max_lod + 1, device=context.lod.device)
        level = (context.lod[..., None] == levels).float()
        away, length = self.middle(context).clamp(min=0), _length(context)
        columns = [away / length, torch.log1p(away) / torch.log1p(length)]
        if context.attention_mass is None:
            columns += [torch.zeros_like(away)] * 2
        else:
            mass, real, n = context.need("attention_mass", self).float(), context.real, context.count
            mean = mass.mean(-1, keepdim=True) if real is None or n is None else torch.where(real, mass, 0.0).sum() / n
            columns += [_compared(mass, mean), torch.ones_like(away)]
        columns.append(torch.ones_like(away))
        return torch.cat((level, torch.stack(columns, -1)), -1)

    def encode(self, name: str, context: LensInput) -> Tensor:
        """Entries or tail at the lens's width: ``[B, n, W]``, with B = 1 where the context has none."""
        x, size = context.need(name, self), self.project.in_features
        if x.dim() != context.start.dim() + 1 or x.shape[-1] != size:
            raise ValueError(f"{name}: expected [n, {size}] (hidden_size or lens['entry_dim']), got {list(x.shape)}")
        x = x.to(self.project.weight.dtype)
        # project(rms_norm(x)): the norm is a factor of each row, and rows are four times as narrow after the projection
        scale = rms_scale(x)
        return batched((self.project(x) * scale).to(x.dtype))

    def described(self, context: LensInput) -> tuple[Tensor, Tensor]:
        """`describe` in the weights' dtype, ``[B, N, max_lod + 6]``, and the features made of it, ``[B, N, W]``."""
        columns = batched(self.describe(context).to(self.features.weight.dtype))
        return columns, self.features(columns)

    def finished(self, x: Tensor, columns: Tensor, context: LensInput) -> Tensor:
        """Scores from the network's output ``[B, N, W]`` and what `described` found of the entries."""
        layers: Any = self.head
        first, activation, last = layers
        own, features = first.weight.split(x.shape[-1], 1)
        # the head of [output; features]: features are linear in few columns, which are multiplied in their place
        weight = torch.cat((own, features @ self.features.weight), 1)
        hidden = activation(F.linear(torch.cat((rms_norm(x), columns), -1), weight, first.bias))
        # one row of weights: a sum that a compiled lens takes as it makes the activations, which are never stored
        raw = (hidden.float() * last.weight[0].float()).sum(-1) + last.bias.float()
        raw = raw.reshape(context.start.shape)
        if self.prior is not None:
            raw = raw + self.prior(context).clamp(-0.999, 0.999).atanh()
        return raw.tanh()


def batched(x: Tensor) -> Tensor:
    """``[n, W]`` as a batch of one; ``[B, n, W]`` as it is."""
    return x if x.dim() == 3 else x[None]


class DualLens(TrainedLens):
    """Two cross attentions a stack: tail gists read all entries, then entries read the tail gists.

    The cost is linear in N: entries meet only the few gists that say what the text is about now.

    Source: brandf/MegaContext's design notes, LensNet.
    """

    def __init__(self, config: MegaContextConfig):
        super().__init__(config)
        width, stacks = self.settings.width, self.settings.stacks
        self.gather = nn.ModuleList(Block(width, self.head_dim, cross=True) for _ in range(stacks))
        self.spread = nn.ModuleList(Attention(width, self.head_dim, cross=True) for _ in range(stacks))
        self.finish()

    def forward(self, context: LensInput) -> Tensor:
        """Needs ``entries`` and ``tail``."""
        tail, x = self.encode("tail", context), self.encode("entries", context)
        columns, features = self.described(context)
        x = x + features
        for gather, spread in zip(self.gather, self.spread, strict=True):
            tail = gather(tail, x, count=context.count)
            x = x + spread(rms_norm(x), rms_norm(tail))
        return self.finished(x, columns, context)


class TransformerLens(TrainedLens):
    """Non-causal blocks over the entries, placed by rotary positions as wide as the entries.

    Positions count back from the cursor; a gist's fast frequencies are damped by the spread of its tokens.
    """

    def __init__(self, config: MegaContextConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(self.settings.width, self.head_dim) for _ in range(self.settings.layers))
        self.finish()

    def tables(self, context: LensInput) -> Tables:
        """Rotary tables ``[..., N, head_dim]`` with Gaussian damping."""
        exponents = torch.arange(0, self.head_dim, 2, device=context.start.device) / self.head_dim
        sigma = span_sigma(self.span(context.lod))
        return rope_tables(self.settings.rope_theta**-exponents, self.middle(context), sigma=sigma)

    def forward(self, context: LensInput) -> Tensor:
        """Needs ``entries``."""
        x, tables = self.encode("entries", context), self.tables(context)
        columns, features = self.described(context)
        x = x + features
        for block in self.blocks:
            x = block(x, tables=tables, count=context.count)
        return self.finished(x, columns, context)


KINDS: dict[str, type[Lens]] = {
    "recall": RecallLens,
    "gist_mass": GistMassLens,
    "recency": RecencyLens,
    "random": RandomLens,
    "dual": DualLens,
    "transformer": TransformerLens,
}
PRIORS: dict[str, type[Lens] | None] = {"none": None, "recency": RecencyLens, "gist_mass": GistMassLens}


def build_lens(config: MegaContextConfig) -> Lens:
    """The lens of ``config.lens["kind"]``."""
    return KINDS[read_settings(LensSettings, config.lens, "lens").kind](config)
