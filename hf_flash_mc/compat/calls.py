"""FlashAttention's conventions in terms of ours: [B, S, H, D] layouts, -1 for no window, caches written in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_flash_mc.ops import flash_attention, flash_attention_paged, flash_attention_varlen

Result = tuple[Tensor, Tensor]  # out, lse


def options(scale: float | None, softcap: float, deterministic: bool, device: torch.device) -> dict[str, Any]:
    """Arguments that all our calls share. The portable kernels' backward sums in a fixed order, Hopper's does not."""
    impl = "triton" if deterministic and device.type == "cuda" else "auto"
    return {"scale": scale, "softcap": softcap or None, "return_lse": True, "impl": impl}


def visibility(causal: bool, window: tuple[int, int]) -> dict[str, Any]:
    """Our causal and window."""
    left, right = (None if w < 0 else w for w in sides(window))
    return {"causal": causal, "window": None if left is right is None else (left, right)}


def sides(window: tuple[int | None, int | None]) -> tuple[int, int]:
    """window_size as two integers; None, which FlashAttention-4 has for unbounded, is -1."""
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise TypeError(f"window_size: expected (left, right), -1 for unbounded, got {window!r}")
    left, right = (-1 if side is None else side for side in window)
    return left, right


def parts(name: str, x: Tensor, dim: int, count: int, layout: str) -> tuple[Tensor, ...]:
    """The tensors that ``x`` packs along a dimension."""
    if x.dim() != dim + 3 or x.shape[dim] != count:
        raise ValueError(f"{name}: expected {layout}, got {list(x.shape)}")
    return x.unbind(dim)


def dense(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Result:
    """q ``[B, Sq, Hq, D]``, k and v ``[B, Sk, Hkv, D]`` -> out ``[B, Sq, Hq, Dv]``, lse ``[B, Hq, Sq]``."""
    out, lse = flash_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **kwargs)
    return out.transpose(1, 2), lse


def packed(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **kwargs: Any
) -> Result:
    """q ``[Tq, Hq, D]``, k and v ``[Tk, Hkv, D]`` -> out ``[Tq, Hq, Dv]``, lse ``[Hq, Tq]``."""
    return flash_attention_varlen(q, k, v, cu_q, cu_k, int(max_q), int(max_k), **kwargs)


def refuse(function: str, **arguments: Any) -> None:
    """Raise for arguments that ask for something these ops lack; None and False ask for nothing."""
    asked = [name for name, value in arguments.items() if value is not None and value is not False]
    if asked:
        raise NotImplementedError(
            f"hf_flash_mc.compat: {function} does not take {', '.join(asked)}; leave out or use the flash_attn package"
        )


def check_chunk(chunk: int) -> int:
    """attention_chunk; 0 is none."""
    if chunk < 0:
        raise ValueError(f"attention_chunk: expected the length of a chunk, or 0 for none, got {chunk}")
    return chunk


def chunks(q: Tensor, k: Tensor, chunk: int, causal: bool) -> Tensor | None:
    """key_ranges ``[1, 1, Sq, 2]`` of FlashAttention-3's attention_chunk for ``[B, S, H, D]`` tensors; None without."""
    if not check_chunk(chunk):
        return None
    sq, sk = q.shape[1], k.shape[1]
    position = torch.arange(sk - sq, sk, device=q.device)[None]
    return _visible(position, position.new_full((1,), sk), None, chunk, causal, (-1, -1))[None]


def with_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None,
    rotary_cos: Tensor | None, rotary_sin: Tensor | None,
    interleaved: bool, lengths: int | Tensor | None, batch_index: Tensor | None, left_pad: Tensor | None,
    pages: Tensor | None, chunk: int, alibi_slopes: Tensor | None, causal: bool, window: tuple[int, int], **kwargs: Any,
) -> Result:  # fmt: skip
    """Write k and v behind each sequence of the cache, in place, and attend to all of it.

    q ``[B, Sq, Hq, D]``; caches ``[Bc, Sc, Hkv, D]``, or ``[pages, page size, Hkv, D]`` with ``pages`` int32
    ``[B, most pages]``; k, v ``[B, Sn, Hkv, D]``. ``lengths``: how much of the cache was valid before, int or int32
    ``[B]``; None is all of it. Waits for no device value: on a GPU lengths are not checked.
    """
    batch, sq = q.shape[:2]
    rows = torch.arange(batch, device=q.device)
    capacity = k_cache.shape[1] * (1 if pages is None else pages.shape[1])
    before = _lengths(capacity if lengths is None else lengths, batch, q.device)
    window, after = sides(window), before
    check_chunk(chunk)
    if (k is None) != (v is None):
        raise ValueError("k and v: expected both or neither")
    if pages is not None and batch_index is not None:
        raise ValueError("cache_batch_idx: expected None with a paged cache, whose pages say where a sequence lies")
    _check_lengths(before, 0 if k is None else k.shape[1], capacity)
    rotary = _rotary(rotary_cos, rotary_sin, k, capacity)
    if k is not None and v is not None:
        if lengths is None:
            raise ValueError(
                "cache_seqlens: expected the valid lengths of the cache, since k and v go behind them; got None"
            )
        at = before[:, None] + torch.arange(k.shape[1], device=q.device)  # [B, Sn]
        if rotary is not None:
            k = rotate(k, *rotary, at, interleaved)
        after = before + k.shape[1]
        if pages is None:
            place = (rows if batch_index is None else batch_index.long())[:, None], at
        else:
            size = k_cache.shape[1]
            place = pages.long().gather(1, at // size), at % size
        k_cache.index_put_(place, k.to(k_cache.dtype))
        v_cache.index_put_(place, v.to(v_cache.dtype))
    moving = causal or max(window) >= 0
    if rotary is not None:
        steps = torch.arange(sq, device=q.device) if moving else torch.zeros(sq, device=q.device, dtype=torch.int64)
        q = rotate(q, *rotary, before[:, None] + steps, interleaved)
    position = after[:, None] - sq + torch.arange(sq, device=q.device)  # [B, Sq] of each row, among the keys
    ranges = _visible(position, after, left_pad, chunk, causal, window)[:, None].contiguous()
    if pages is not None:
        slopes = None if alibi_slopes is None else alibi_slopes.float()
        out, lse = flash_attention_paged(
            q.transpose(1, 2), k_cache, v_cache, pages, after, key_ranges=ranges, alibi_slopes=slopes, **kwargs
        )
        return out.transpose(1, 2), lse
    if batch_index is not None:
        k_cache, v_cache = (x[batch_index.long()] for x in (k_cache, v_cache))
    elif k_cache.shape[0] != batch:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    bias = None
    if alibi_slopes is not None:
        distance = (position[:, None, :, None] - torch.arange(k_cache.shape[1], device=q.device)).abs()
        bias = -alibi_slopes.float().reshape(-1, q.shape[2], 1, 1) * distance
    return dense(q, k_cache, v_cache, key_ranges=ranges, bias=bias, **kwargs)


def _lengths(given: int | Tensor, batch: int, device: torch.device) -> Tensor:
    """cache_seqlens as int64 [B]."""
    lengths = torch.as_tensor(given, device=device)
    if lengths.is_floating_point() or lengths.dtype == torch.bool or lengths.shape not in ((), (1,), (batch,)):
        raise ValueError(
            f"cache_seqlens: expected an int or integers [{batch}], got {lengths.dtype} {list(lengths.shape)}"
        )
    return lengths.to(torch.int64).expand(batch)


def _check_lengths(before: Tensor, new: int, capacity: int) -> None:
    """On a CPU, where looking at values costs nothing: a negative length would write at the other end of the cache."""
    if torch.compiler.is_compiling() or type(before) is not Tensor or before.device.type != "cpu" or not len(before):
        return
    low, high = (int(x) for x in before.aminmax())
    if low < 0 or high + new > capacity:
        behind = f", with {new} new tokens behind them" if new else ""
        raise ValueError(
            f"cache_seqlens: expected lengths from 0 to {capacity - new} in a cache for {capacity} tokens{behind}, got "
            f"{low} to {high}; make the cache longer"
        )


def _visible(
    position: Tensor, length: Tensor, left_pad: Tensor | None, chunk: int, causal: bool, window: tuple[int, int]
) -> Tensor:
    """int32 ``[B, Sq, 2]``: the keys of a cache that each row sees."""
    left, right = window
    low = torch.zeros_like(position) if left < 0 else position - left
    high = length[:, None].expand_as(position)
    if right >= 0 or causal:
        high = torch.minimum(high, position + (0 if causal else right) + 1)
    if left_pad is not None:
        low = torch.maximum(low, left_pad.long()[:, None])
    if chunk:  # counted from where the sequence begins
        start = torch.zeros_like(position) if left_pad is None else left_pad.long()[:, None]
        own = start + torch.div(position - start, chunk, rounding_mode="floor") * chunk
        low, high = torch.maximum(low, own), torch.minimum(high, own + chunk)
    return torch.stack((low.clamp(min=0), high), -1).to(torch.int32)


def _rotary(cos: Tensor | None, sin: Tensor | None, k: Tensor | None, capacity: int) -> tuple[Tensor, Tensor] | None:
    """Both tables or None, checked as FlashAttention does."""
    if cos is None or sin is None:
        if cos is not sin:
            raise ValueError("rotary_cos and rotary_sin: expected both or neither")
        return None
    if k is None:
        raise ValueError("rotary_cos: expected k and v too, since only appended keys are rotated; rotate q beforehand")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] < capacity or 2 * cos.shape[1] > k.shape[-1]:
        raise ValueError(
            f"rotary_cos and rotary_sin: expected [at least {capacity}, at most {k.shape[-1] // 2}] for a cache of "
            f"{capacity} tokens and head dim {k.shape[-1]}, got {list(cos.shape)} and {list(sin.shape)}"
        )
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al. 2021) of x ``[B, S, H, D]`` at ``position`` [B, S]; cos, sin ``[most, half]``."""
    half = cos.shape[-1]
    c, s = (t[position.clamp(max=t.shape[0] - 1)].unsqueeze(2).float() for t in (cos, sin))  # [B, S, 1, half]
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.split(half, -1)
    parts = (a * c - b * s, a * s + b * c)
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((turned.to(x.dtype), rest), -1)
