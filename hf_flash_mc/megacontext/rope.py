"""Rotary positions that can be undone, moved, and averaged over the tokens that a gist stands for.

Tables are laid out as transformers lays them out (Su et al., "RoFormer", 2021): `cos` and `sin` have R = 2 * number of
frequencies columns, and a head's first R of D dimensions are rotated (R < D: a partial rotary factor).
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor


def span_sigma(n: int | Tensor) -> Any:
    """The standard deviation of n consecutive positions: sqrt((n^2 - 1) / 12); 0 for one token, 9.23 for 32."""
    if isinstance(n, Tensor):
        return ((n.double().square() - 1) / 12).clamp(min=0).sqrt().float()
    return math.sqrt((n * n - 1) / 12)


def rope_tables(
    inv_freq: Tensor,
    positions: Tensor,
    attention_scaling: float | Tensor = 1.0,
    sigma: float | Tensor | None = None,
    *,
    span: int | Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """The cosine and sine tables of ``rotate``, in float32 (float64 where inv_freq or positions are float64).

    Without ``sigma`` and ``span`` these are transformers' own tables, bit for bit. With one of them the tables describe
    the mean of a rotation over the positions that an entry stands for, ``positions`` being the middle: frequencies
    whose wavelength is shorter than the entry fade ("Gaussian RoPE" in brandf/MegaContext's design notes).

    Args:
        inv_freq: ``[..., R / 2]``: rotary frequencies; leading dimensions (such as layers) follow those of positions.
        positions: ``[...]``, integers or floats; a span's middle may lie between two tokens.
        attention_scaling: the factor on both tables (YaRN); broadcasts to inv_freq's leading dimensions.
        sigma: standard deviation of the positions, broadcast to ``positions``: each frequency is multiplied by
            exp(-(sigma * w)^2 / 2), the mean over normally distributed positions. See ``span_sigma``.
        span: number n of consecutive positions, broadcast to ``positions``: sin(n w / 2) / (n sin(w / 2)), exact.
        interleaved: pairs are (0, 1), (2, 3), ... instead of (0, R / 2), (1, R / 2 + 1), ...

    Returns:
        (cos, sin): ``[*positions.shape, *inv_freq.shape[:-1], R]`` each.

    Raises:
        ValueError: both sigma and span are given.
    """
    if sigma is not None and span is not None:
        raise ValueError("sigma, span: expected one of them, got both; span is exact, sigma is its smooth stand-in")
    wide = torch.float64 if torch.float64 in (inv_freq.dtype, positions.dtype) else torch.float32
    frequencies = inv_freq.to(wide)
    angles = _outer(positions.to(wide), frequencies)  # [*positions, *layers, R / 2]
    factor: Any = attention_scaling
    if isinstance(factor, Tensor):
        factor = factor.to(angles)[..., None]
    damping = _damping(frequencies, positions, sigma, span)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if damping is not None:
        cos, sin = cos * damping, sin * damping
    if interleaved:
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def _outer(x: Tensor, frequencies: Tensor) -> Tensor:
    return x.reshape(*x.shape, *(1,) * frequencies.dim()) * frequencies


def _damping(w: Tensor, positions: Tensor, sigma: Any, span: Any) -> Tensor | None:
    """The factor on each frequency, ``[*positions (or 1s), *layers, R / 2]``."""
    if sigma is not None:
        sigma = torch.as_tensor(sigma, dtype=w.dtype, device=positions.device).expand(positions.shape)
        return torch.exp(-0.5 * _outer(sigma, w).square())
    if span is None:
        return None
    n = torch.as_tensor(span, dtype=w.dtype, device=positions.device).expand(positions.shape)
    half = 0.5 * w
    tiny = half.abs() < 1e-6  # sin(n x) / (n sin x) -> 1: also frequency 0, a layer without rotary positions
    bottom = torch.where(tiny, torch.ones_like(half), half.sin())
    n = n.reshape(*n.shape, *(1,) * w.dim())
    return torch.where(tiny, torch.sinc(n * half / math.pi), torch.sin(n * half) / (n * bottom))


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first R dimensions of each vector by its position.

    Args:
        x: ``[..., S, D]``.
        cos, sin: tables of ``rope_tables``, broadcastable to ``[..., S, R]`` with R <= D. Cast them to x's dtype first
            for the very bits of transformers' ``apply_rotary_pos_emb``; float32 tables give a float32 result.
        interleaved: as the tables.

    Returns:
        ``[..., S, D]`` in the common dtype of x and the tables.
    """
    size = cos.shape[-1]
    if size == x.shape[-1]:
        return x * cos + _quarter_turn(x, interleaved) * sin
    head, rest = x[..., :size], x[..., size:]
    turned = head * cos + _quarter_turn(head, interleaved) * sin
    return torch.cat((turned, rest.to(turned.dtype)), -1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Undo ``rotate`` with the same tables, their scaling included: unrotate(rotate(x)) == x up to rounding.

    Rounded tables are undone as they are, since each pair is divided by cos^2 + sin^2. Not for tables whose
    frequencies are damped to 0: what is gone cannot come back, and divides by 0.
    """
    power = cos.square() + sin.square()
    return rotate(x, cos / power, -sin / power, interleaved=interleaved)


def _quarter_turn(x: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class Rope(NamedTuple):
    """The rotary positions of a model's layers; one row stands for all layers where they agree.

    inv_freq: float32 ``[L or 1, R / 2]``, 0 in layers without rotary positions; attention_scaling: ``[L or 1]``.
    """

    inv_freq: Tensor
    attention_scaling: Tensor
    interleaved: bool = False

    def tables(self, positions: Tensor, *, sigma: Any = None, span: Any = None) -> tuple[Tensor, Tensor]:
        """``rope_tables`` for every layer: ``[*positions.shape, L or 1, R]`` each."""
        inv_freq, scaling = self.inv_freq.to(positions.device), self.attention_scaling.to(positions.device)
        return rope_tables(inv_freq, positions, scaling, sigma, span=span, interleaved=self.interleaved)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``rotate`` in this model's layout."""
        return rotate(x, cos, sin, interleaved=self.interleaved)

    def unrotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``unrotate`` in this model's layout."""
        return unrotate(x, cos, sin, interleaved=self.interleaved)


# Frequencies that change with the length of the input: a key rotated earlier could not be un-rotated later.
_CHANGING = ("dynamic", "longrope")
# Families whose attention rotates only in its sliding (or only in its full) layers, which no attribute says.
_PARTLY_ROTATED = ("afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone4_5", "exaone_moe", "flint", "kolibri1")


def rope_of(model: Any) -> Rope:
    """The rotary positions of a transformers decoder, read from its rotary module, layer by layer.

    The layout (halves or interleaved pairs) is found by comparing with the family's own ``apply_rotary_pos_emb``,
    so that no family is guessed: Llama, Qwen, SmolLM, Mistral and Gemma families, partial rotary factors, layers with
    frequencies of their own (Gemma 3) and layers without rotary positions (SmolLM 3).

    Args:
        model: a decoder-only model, with or without its language-modelling head.

    Raises:
        NotImplementedError: there is no rotary module, its frequencies change with the length, its positions have
            several axes, or its rotation is neither layout.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    decoder = model if decoder is None else decoder
    rotary, layers = getattr(decoder, "rotary_emb", None), getattr(decoder, "layers", None)
    if rotary is None or layers is None:
        raise NotImplementedError(
            f"model: expected a decoder with `rotary_emb` and `layers`, got {type(decoder).__name__} without; "
            "MegaContext needs rotary positions (Llama, Qwen, SmolLM, Mistral, Gemma families)"
        )
    if decoder.config.model_type in _PARTLY_ROTATED:
        raise NotImplementedError(
            f"model: model_type {decoder.config.model_type!r} rotates only in some of its layers, which cannot be read "
            "from the model; use a family that rotates in all of them"
        )
    types = getattr(decoder.config, "layer_types", None) or [None] * len(layers)
    rows: list[Tensor | None] = []
    scalings: list[float] = []
    probed: dict[str, bool] = {}
    for layer, kind in zip(layers, types, strict=True):
        attention = getattr(layer, "self_attn", None) or getattr(layer, "attention", None)
        own = kind is not None and hasattr(rotary, f"{kind}_inv_freq")
        prefix = f"{kind}_" if own else ""
        inv_freq = getattr(rotary, f"{prefix}inv_freq", None)
        if inv_freq is None or not getattr(attention, "use_rope", True):
            rows.append(None)  # no rotary positions: frequency 0
            scalings.append(1.0)
            continue
        _refuse_changing(rotary, kind if own else None)
        if prefix not in probed:
            probed[prefix] = _is_interleaved(rotary, attention, inv_freq, kind if own else None)
        rows.append(inv_freq.detach().float())
        scalings.append(float(getattr(rotary, f"{prefix}attention_scaling", 1.0)))
    found = [row for row in rows if row is not None]
    if not found or len({row.shape for row in found}) > 1 or len(set(probed.values())) > 1:
        raise NotImplementedError(
            f"model: expected rotary positions of one width and layout in its layers, got {len(found)} of {len(rows)} "
            f"layers with rotary positions, of widths {sorted({2 * row.shape[-1] for row in found})}"
        )
    inv_freq = torch.stack([torch.zeros_like(found[0]) if row is None else row for row in rows])
    scaling = torch.tensor(scalings, device=inv_freq.device)
    if bool((inv_freq == inv_freq[0]).all() and (scaling == scaling[0]).all()):
        inv_freq, scaling = inv_freq[:1], scaling[:1]
    return Rope(inv_freq, scaling, next(iter(probed.values())))


def _refuse_changing(rotary: Any, kind: str | None) -> None:
    rope_type = getattr(rotary, "rope_type", "default")
    rope_type = rope_type.get(kind, "default") if isinstance(rope_type, dict) else rope_type
    parameters = getattr(rotary.config, "rope_parameters", None) or {}
    parameters = parameters.get(kind, parameters) if kind is not None else parameters
    if rope_type in _CHANGING or "mrope_section" in parameters:
        what = f"rope_type {rope_type!r}" if rope_type in _CHANGING else "positions of several axes (mrope_section)"
        raise NotImplementedError(
            f"model: expected rotary frequencies that stay as they are, got {what}; use a fixed rope_type "
            "(default, linear, llama3, yarn)"
        )


@torch.no_grad()
def _is_interleaved(rotary: Any, attention: Any, inv_freq: Tensor, kind: str | None) -> bool:
    """Which layout the family's own function rotates."""
    function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if function is not None:
        size, device = 2 * inv_freq.shape[-1], inv_freq.device
        # float32 whatever torch's default dtype is, or what the model and so its frequencies were cast to
        x = torch.linspace(-1, 1, 7 * size, dtype=torch.float32, device=device).sin().reshape(1, 1, 7, size)
        positions = torch.arange(3, 10, device=device)
        theirs = function(x, x, *rotary(x, positions[None], *([] if kind is None else [kind])))[1]
        scaling = getattr(rotary, "attention_scaling" if kind is None else f"{kind}_attention_scaling", 1.0)
        for interleaved in (False, True):
            tables = rope_tables(inv_freq.float(), positions, scaling, interleaved=interleaved)
            if torch.allclose(rotate(x, *tables, interleaved=interleaved), theirs, rtol=1e-4, atol=1e-4):
                return interleaved
    raise NotImplementedError(
        f"model: expected rotary positions over halves or interleaved pairs, got those of {type(attention).__name__}; "
        "this family is not supported"
    )
