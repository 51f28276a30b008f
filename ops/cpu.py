"""Attention on the CPU, exact and of linear memory.

Two ways, chosen per call:

- *Pieces*: where visibility is intervals and nothing else touches the logits, the rows fall into rectangles (all rows
  see the same keys) and triangles (each row sees one key more than the row above). Each goes to ATen's CPU flash
  kernel on slices of q, k and v, without any mask; rows in two pieces are merged by their lse. Plain, causal, cached
  decoding, padded batches and packed documents all end here, and NaN in keys that nobody sees is never read.
- *Tiles*: everything else (mask, bias, weights, ALiBi, softcap, dropout, sliding windows) in PyTorch, a block of rows
  by a block of keys at a time: online softmax forward, recomputation backward. Key blocks that no row sees are skipped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .cpu_tiles import Tiles, intervals, tiled_backward, tiled_forward
from .spec import Gradients, Needs, Spec, Varlen, accumulate_dtype, new_bshd, new_lse

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INF = float("inf")
_NO_BLOCKS = "impl='cpu' takes a block mask as a bool mask, as flash_attention gives it"

Piece = tuple[slice, slice, slice, slice, bool]  # batch, query heads, rows, keys, causal (square, top left)


def unsupported(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None = None) -> list[str]:
    """Why this back end cannot take the call; an empty list if it can."""
    reasons = []
    if any(x.device.type != "cpu" for x in (q, k, v)):
        reasons.append(f"impl='cpu' needs tensors on the CPU, got q on {q.device}, k on {k.device}, v on {v.device}")
    if q.dtype not in _DTYPES:
        reasons.append(f"impl='cpu' takes float16, bfloat16, float32 and float64, got {q.dtype}")
    if spec.block_rows is not None:
        reasons.append(_NO_BLOCKS)
    return reasons


def forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec, varlen: Varlen | None = None) -> tuple[Tensor, Tensor]:
    """Returns ``out`` ([B, Hq, Sq, Dv], or [Tq, Hq, Dv] packed) in q's dtype and ``lse`` ([B, Hq, Sq], or [Hq, Tq])."""
    if spec.block_rows is not None:
        raise NotImplementedError(_NO_BLOCKS)
    if varlen is None and (causal := _one_call(q, k, v, spec)) is not None:
        return _FLASH(*map(_rows, (q, k, v)), 0.0, causal, scale=_scale(q, spec))
    out, lse = new_bshd(q, v.shape[-1]), new_lse(q)
    if varlen is None:
        _forward(q, k, v, spec, out, lse)
        return out, lse
    out.zero_()
    lse.fill_(-_INF)
    for rows, keys, one in _sequences(q, k, spec, varlen):
        _forward(_dense(q, rows), _dense(k, keys), _dense(v, keys), one, _dense(out, rows), lse[None, :, rows])
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: Spec,
    needs: Needs,
    deterministic: bool,
    varlen: Varlen | None = None,
) -> Gradients:
    """The gradients that ``needs`` names. Always deterministic: sums run in a fixed order."""
    if varlen is None and dlse is None and (causal := _one_call(q, k, v, spec)) is not None:
        found = _FLASH_BACKWARD(*map(_rows, (dout, q, k, v, out)), lse, 0.0, causal, scale=_scale(q, spec))
        return Gradients(*(x if need else None for x, need in zip(found, needs[:3], strict=True)))
    work = accumulate_dtype(q.dtype)
    weight = spec.key_log_weight
    # summed in the accumulation dtype, cast once at the end
    dq, dk, dv = (
        x.new_zeros(x.shape, dtype=work) if need else None for x, need in zip((q, k, v), needs[:3], strict=True)
    )
    dbias = spec.bias.new_zeros(spec.bias.shape, dtype=work) if needs.dbias and spec.bias is not None else None
    dweight = weight.new_zeros(weight.shape, dtype=work) if needs.dkey_log_weight and weight is not None else None
    dsinks = spec.sinks.new_zeros(spec.sinks.shape, dtype=work) if needs.dsinks and spec.sinks is not None else None
    if varlen is None:
        sums = Gradients(dq, dk, dv, dbias, dweight, dsinks)
        _backward(dout, dlse, q, k, v, out, lse, spec, sums)
    else:
        for rows, keys, one in _sequences(q, k, spec, varlen):
            dweight_ = None if dweight is None else dweight[None, :, keys]
            dq_, dk_, dv_ = (None if x is None else _dense(x, at) for x, at in ((dq, rows), (dk, keys), (dv, keys)))
            sums = Gradients(dq_, dk_, dv_, None, dweight_, dsinks)
            dlse_ = None if dlse is None else dlse[None, :, rows]
            qkv = _dense(q, rows), _dense(k, keys), _dense(v, keys)
            _backward(_dense(dout, rows), dlse_, *qkv, _dense(out, rows), lse[None, :, rows], one, sums)
    return Gradients(
        None if dq is None else new_bshd(q).copy_(dq),
        None if dk is None else new_bshd(k).copy_(dk),
        None if dv is None else new_bshd(v).copy_(dv),
        None if dbias is None else dbias.to(spec.bias.dtype),  # type: ignore[union-attr]
        None if dweight is None else dweight.to(weight.dtype),  # type: ignore[union-attr]
        None if dsinks is None else dsinks.to(spec.sinks.dtype),  # type: ignore[union-attr]
    )


def _dense(x: Tensor, rows: slice) -> Tensor:
    """[1, H, n, D] view of one packed sequence in [T, H, D]."""
    return x[rows].transpose(0, 1)[None]


def _sequences(q: Tensor, k: Tensor, spec: Spec, varlen: Varlen) -> Iterator[tuple[slice, slice, Spec]]:
    """Rows, keys and the dense call's spec of every packed sequence that has rows."""
    starts_q, starts_k = varlen.cu_seqlens_q.tolist(), varlen.cu_seqlens_k.tolist()
    batch, *others = spec.dropout_offsets
    for i in range(len(starts_q) - 1):
        rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
        if rows.start >= rows.stop:
            continue
        ranges, weight, slopes = spec.key_ranges, spec.key_log_weight, spec.alibi_slopes
        yield (
            rows,
            keys,
            spec._replace(
                key_ranges=None if ranges is None else ranges[None, :, rows],
                key_log_weight=None if weight is None else weight[None, :, keys],
                alibi_slopes=slopes[i : i + 1] if slopes is not None and slopes.dim() == 2 else slopes,
                dropout_offsets=(batch + i, *others),
            ),
        )


def _forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec, out: Tensor, lse: Tensor) -> None:
    """Dense forward into ``out`` and ``lse``."""
    pieces = _pieces(q, k, spec)
    if pieces is None:
        tiled_forward(Tiles(q, k, v, spec), out, lse)
    else:
        _pieces_forward(q, k, v, spec, pieces, out, lse)
    if spec.sinks is not None:  # the sink only adds to the softmax's denominator
        total = torch.logaddexp(lse, spec.sinks.to(lse.dtype)[:, None])
        out.mul_(torch.exp(lse - total.masked_fill(total == -_INF, 0))[..., None])  # a sink may be -inf
        lse.copy_(total)


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: Spec,
    sums: Gradients,
) -> None:
    """Dense backward; adds to the tensors of ``sums``."""
    pieces = _pieces(q, k, spec)
    if pieces is None or sums.dsinks is not None:
        # A row that sees nothing has out == 0 exactly, and its dout may be NaN.
        delta = torch.where(out == 0, 0, dout.to(lse.dtype) * out).sum(-1)  # [B, Hq, Sq]
        if dlse is not None:
            delta -= dlse
    if sums.dsinks is not None:
        share = torch.exp(spec.sinks[:, None] - lse.masked_fill(lse == -_INF, _INF))  # type: ignore[index]
        sums.dsinks.sub_((share * delta).sum((0, 2)))
    if pieces is None:
        tiled_backward(Tiles(q, k, v, spec, dout), lse, delta, sums)
    else:
        _pieces_backward(dout, dlse, q, k, v, out, lse, spec, pieces, sums)


def _pieces(q: Tensor, k: Tensor, spec: Spec) -> list[Piece] | None:
    """The call as rectangles and triangles for ATen's kernel; None where it does not decompose (into few)."""
    optional = (spec.mask, spec.bias, spec.key_log_weight, spec.alibi_slopes)
    if spec.softcap or spec.dropout_p or any(x is not None for x in optional):
        return None
    (b, hq, sq, _), sk = q.shape, k.shape[2]
    if not b or not sq or not sk:
        return []
    regular = _regular_pieces(b, hq, sq, sk, spec)
    if regular is not None:
        return regular
    lo, hi = intervals(sq, sk, spec)  # type: ignore[misc]  # a call without intervals is regular
    pieces: list[Piece] = []
    for i in range(lo.shape[0]):
        for j in range(lo.shape[1]):
            batch = slice(i, i + 1) if lo.shape[0] > 1 else slice(0, b)
            heads = slice(j, j + 1) if lo.shape[1] > 1 else slice(0, hq)
            own = _decompose(lo[i, j], hi[i, j])
            if own is None:
                return None
            pieces += [(batch, heads, *piece) for piece in own]
    return pieces


def _regular_pieces(b: int, hq: int, sq: int, sk: int, spec: Spec) -> list[Piece] | None:
    """``_pieces`` where all rows see the same keys, or each row one more than the row above; None for other calls.

    These are the calls of every transformer, and a step of decoding is short: few tensor operations, no [Sq] arrays.
    """
    ranges, right = spec.key_ranges, spec.window_right >= 0 and not spec.causal
    if sq > 1 and (spec.window_left >= 0 or right or (spec.causal and ranges is not None)):
        return None
    growth, ends = int(spec.causal and sq > 1), [(0, sk - sq + 1 if spec.causal else sk)]
    if ranges is not None:
        if ranges.shape[1] > 1:
            return None
        growth, ends = 0, ranges[:, 0, 0].tolist()
        if sq > 1:
            steps = ranges.diff(dim=2)
            lo_step, growth = steps[0, 0, 0].tolist()
            if lo_step or growth not in (0, 1) or not bool((steps == steps[:1, :, :1]).all()):
                return None
    if any(growth and (lo < 0 or hi + sq - 1 > sk) for lo, hi in ends):  # clamping would bend them
        return None
    first = max(0, sk - 1 - spec.window_left) if spec.window_left >= 0 else 0
    ends = [(max(lo, first), min(hi, sk)) for lo, hi in ends]
    alike = ends.count(ends[0]) == len(ends)
    return [
        (slice(0, b) if alike else slice(i, i + 1), slice(0, hq), *piece)
        for i, (lo, hi) in enumerate(ends[:1] if alike else ends)
        for piece in _stack(0, sq, lo, hi, growth)
    ]


def _stack(first: int, end: int, lo: int, hi: int, growth: int) -> list[tuple[slice, slice, bool]]:
    """Pieces of rows that see keys from ``lo``: the first row up to ``hi``, each further row ``growth`` (0, 1) more."""
    if growth and hi <= lo:  # rows above the triangle's tip see nothing
        first, hi = first + lo - hi + 1, lo + 1
    rows = slice(first, end)
    if not growth:
        return [(rows, slice(lo, hi), False)] if lo < hi else []
    rectangle = [(rows, slice(lo, hi - 1), False)] if lo < hi - 1 else []
    return [*rectangle, (rows, slice(hi - 1, hi - 1 + end - first), True)] if first < end else []


def _decompose(lo: Tensor, hi: Tensor) -> list[tuple[slice, slice, bool]] | None:
    """Rows, keys and causality of the pieces of [Sq] intervals; None if they are too many to be worth it."""
    rows, step = len(lo), hi.diff()
    # how a row continues the one above: 0 the same keys, 1 one key more, 2 not at all
    kind = torch.where((lo.diff() == 0) & (step >= 0) & (step <= 1), step, 2)
    starts = kind == 2
    starts[1:] |= (kind[1:] != kind[:-1]) & (kind[:-1] != 2)
    cuts = [0, *(starts.nonzero()[:, 0] + 1).tolist(), rows]
    if len(cuts) > 8 + rows // 32:
        return None
    pieces = []
    for first, end in itertools.pairwise(cuts):
        start, stop, last = int(lo[first]), int(hi[first]), int(hi[end - 1])
        pieces += _stack(first, end, start, stop, int(stop != last))
    return pieces


def _one_call(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> bool | None:
    """``causal`` for ATen's kernel where the plain call is one piece, as most are; None for other calls."""
    (b, hq, sq, d), sk = q.shape, k.shape[2]
    if d != v.shape[-1] or 0 in (b, hq, sq, sk) or spec.softcap or any(x is not None for x in spec[:7]):
        return None
    pieces = _regular_pieces(b, hq, sq, sk, spec)
    if pieces is None or len(pieces) != 1:
        return None
    _, _, rows, keys, causal = pieces[0]
    return causal if (rows.start, rows.stop, keys.start, keys.stop) == (0, sq, 0, sk) else None


def _scale(q: Tensor, spec: Spec) -> float:
    return q.shape[-1] ** -0.5 if spec.scale is None else spec.scale


def _rows(x: Tensor) -> Tensor:
    """x with a last dimension of stride 1: the kernel reads any other wrongly, silently."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(x: Tensor, head_dim: int) -> Tensor:
    """x with a last dimension of ``head_dim`` and of stride 1."""
    if x.shape[-1] == head_dim:
        return _rows(x)
    wide = x.new_zeros(*x.shape[:-1], head_dim)
    wide[..., : x.shape[-1]] = x
    return wide


def _key_heads(heads: slice, hq: int, hkv: int) -> slice:
    """The key heads that a piece's query heads read: all, or one."""
    if heads.stop - heads.start == hq:
        return slice(0, hkv)
    group = hq // hkv
    return slice(heads.start // group, heads.start // group + 1)


def _cut(x: Tensor, *at: slice) -> Tensor:
    """x[at] with no work where nothing is cut off."""
    for dim, part in enumerate(at):
        if part.stop - part.start != x.shape[dim]:
            x = x.narrow(dim, part.start, part.stop - part.start)
    return x


def _pieces_forward(q: Tensor, k: Tensor, v: Tensor, spec: Spec, pieces: list[Piece], out: Tensor, lse: Tensor) -> None:
    (d, dv), scale = (q.shape[-1], v.shape[-1]), _scale(q, spec)
    q, k, v = (_padded(x, max(d, dv)) for x in (q, k, v))
    apart = [p[:3] for i, p in enumerate(pieces) if i == 0 or p[:3] != pieces[i - 1][:3]]
    if sum(math.prod(x.stop - x.start for x in at) for at in apart) < lse.numel():
        out.zero_()  # some rows see nothing
        lse.fill_(-_INF)
    before: tuple[slice, ...] = ()
    for batch, heads, rows, keys, causal in pieces:
        at, kv = (batch, heads, rows), (batch, _key_heads(heads, q.shape[1], k.shape[1]), keys)
        part, part_lse = _FLASH(_cut(q, *at), _cut(k, *kv), _cut(v, *kv), 0.0, causal, scale=scale)
        part, out_, lse_ = part[..., :dv], _cut(out, *at), _cut(lse, *at)
        if at == before:  # the triangle under a rectangle: merge
            total = torch.logaddexp(lse_, part_lse)
            part = out_ * torch.exp(lse_ - total)[..., None] + part * torch.exp(part_lse - total)[..., None]
            part_lse = total
        out_.copy_(part)
        lse_.copy_(part_lse)
        before = at


def _pieces_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    spec: Spec,
    pieces: list[Piece],
    sums: Gradients,
) -> None:
    """Each piece by itself: with the final out and lse, the gradients of the pieces add up."""
    (d, dv), hq = (q.shape[-1], v.shape[-1]), q.shape[1]
    scale = _scale(q, spec)
    width = max(d, dv) + (dlse is not None)
    q, k, v, dout, out = (_padded(x if dlse is None else x.to(dlse.dtype), width) for x in (q, k, v, dout, out))
    if dlse is not None:
        # One more column, where q, k and v are 0: the kernel's own rowsum(dout * out) then comes out as delta - dlse.
        # In dlse's dtype, since float16 does not hold all that float32 does.
        dout[..., -1] = 1
        out[..., -1] = -dlse
    for batch, heads, rows, keys, causal in pieces:
        at, kv = (batch, heads, rows), (batch, _key_heads(heads, hq, k.shape[1]), keys)
        rows_ = _cut(dout, *at), _cut(q, *at), _cut(k, *kv), _cut(v, *kv), _cut(out, *at), _cut(lse, *at)
        dq, dk, dv_ = _FLASH_BACKWARD(*rows_, 0.0, causal, scale=scale)
        parts = (sums.dq, at, dq[..., :d]), (sums.dk, kv, dk[..., :d]), (sums.dv, kv, dv_[..., :dv])
        for total, where, part in parts:
            if total is not None:
                total[where] += part
