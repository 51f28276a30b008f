"""The definition of attention in this project: dense, obvious, any dtype up to float64. Imports nothing of ours.

Every back end is tested against these functions. They build the [Sq, Sk] matrix, so they are for tests, for
small inputs and for ``impl="reference"``; gradients come from torch's own autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
REMOVED = -float.fromhex("0x1.62e43p127")  # a logit of this or less is -inf: in base 2 float32 does not hold it
_LOW32 = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-7 (Salmon et al., SC 2011) on int64 tensors that hold unsigned 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        hi_a, lo_a = _mul_hi_lo(c0, 0xD2511F53)
        hi_b, lo_b = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi_b ^ c1 ^ k0, lo_b, hi_a ^ c3 ^ k1, lo_a
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return c0, c1, c2, c3


def _mul_hi_lo(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b without leaving int64: b is taken in two 16-bit halves."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)  # each below 2 ** 48
    total = low + ((high & 0xFFFF) << 16)
    return (total >> 32) + (high >> 16), total & _LOW32


def dropout_keep(seed: Tensor, p: float, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Which weights survive dropout, from global coordinates alone (all broadcast against each other).

    Counter (column // 16, row, head, batch), key the seed; byte column % 16 of the four words, kept if it is at
    least round(256 p).
    """
    seed = seed.reshape(()).to(torch.int64)
    counter = torch.broadcast_tensors(column // 16, row, head, batch)
    words = philox4x32(tuple(c & _LOW32 for c in counter), (seed & _LOW32, (seed >> 32) & _LOW32))
    byte = (column % 16).expand_as(words[0])
    word = torch.stack(words).gather(0, (byte // 4)[None])[0]
    return ((word >> (8 * (byte % 4))) & 0xFF) >= round(256 * p)


def visibility(
    batch: int,
    heads: int,
    sq: int,
    sk: int,
    *,
    causal: bool,
    window,
    key_ranges: Tensor | None,
    mask: Tensor | None,
    device,
) -> Tensor:
    """Bool [B or 1, Hq or 1, Sq, Sk]: which keys a query row may see. All rules intersect."""
    row = torch.arange(sq, device=device)[:, None] + (sk - sq)  # bottom-right aligned
    col = torch.arange(sk, device=device)[None, :]
    seen = torch.ones(1, 1, sq, sk, dtype=torch.bool, device=device)
    left, right = window if window is not None else (None, None)
    if causal:
        right = 0 if right is None else min(right, 0)
    if left is not None:
        seen = seen & (col >= row - left)
    if right is not None:
        seen = seen & (col <= row + right)
    if key_ranges is not None:
        seen = seen & (col >= key_ranges[..., 0:1]) & (col < key_ranges[..., 1:2])
    if mask is not None:
        seen = seen & mask
    return seen


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window=None,
    key_ranges: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_log_weight: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    dropout_offsets: tuple[int, ...] = (0, 0, 0, 0),
) -> tuple[Tensor, Tensor]:
    """Attention of ``q: [B, Hq, Sq, D]`` over ``k: [B, Hkv, Sk, D]``, ``v: [B, Hkv, Sk, Dv]``.

    Returns ``out: [B, Hq, Sq, Dv]`` in v's dtype and ``lse: [B, Hq, Sq]`` (natural log), computed in float32, or in
    float64 for float64 inputs. The arguments mean what they mean in ``flash_attention``.
    """
    b, hq, sq, d = q.shape
    hkv, sk = k.shape[1], k.shape[2]
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    seen = visibility(b, hq, sq, sk, causal=causal, window=window, key_ranges=key_ranges, mask=mask, device=q.device)
    if key_log_weight is not None:
        weight = key_log_weight.to(work).expand(-1, hkv, -1).repeat_interleave(hq // hkv, 1)[:, :, None, :]
        seen = seen & (weight != float("-inf"))
    seen = seen.expand(b, hq, sq, sk)
    # rows and keys that take no part may hold NaN or inf: they become zeros before any arithmetic
    row_used, group = seen.any(-1), seen.reshape(b, hkv, hq // hkv, sq, sk)
    key_used = group.any(3).any(2)
    q_, k_, v_ = (
        torch.where(used[..., None], x.to(work), torch.zeros((), dtype=work, device=q.device))
        for x, used in ((q, row_used), (k, key_used), (v, key_used))
    )
    k_, v_ = (x.repeat_interleave(hq // hkv, 1) for x in (k_, v_))

    logits = (q_ @ k_.transpose(-1, -2)) * (d**-0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if alibi_slopes is not None:
        distance = (torch.arange(sq, device=q.device)[:, None] + (sk - sq) - torch.arange(sk, device=q.device)).abs()
        logits = logits - alibi_slopes.to(work).reshape(-1, hq, 1, 1) * distance
    if bias is not None:
        logits = logits + bias.to(work)
    if key_log_weight is not None:
        logits = logits + torch.where(weight == float("-inf"), torch.zeros_like(weight), weight)
    logits = torch.where(seen & ~(logits <= REMOVED), logits, float("-inf"))  # NaN stays NaN

    columns = logits
    if sinks is not None:
        columns = torch.cat([logits, sinks.to(work).reshape(1, hq, 1, 1).expand(b, hq, sq, 1)], -1)
    top = (
        columns.detach().amax(-1, keepdim=True)
        if columns.shape[-1]
        else columns.new_full((b, hq, sq, 1), float("-inf"))
    )
    top = torch.where(top == float("-inf"), torch.zeros_like(top), top)
    weights = torch.exp(columns - top)
    total = weights.sum(-1, keepdim=True)
    alive = total != 0  # NaN stays NaN
    total = torch.where(alive, total, torch.ones_like(total))
    lse = torch.where(alive, top + torch.log(total), float("-inf"))
    p = weights[..., :sk] / total  # not exp(logits - lse): lse of large logits is rounded
    if dropout_p:
        assert dropout_seed is not None, "dropout_seed: expected an int64 tensor with dropout_p > 0, got None"
        ob, oh, om, on = dropout_offsets
        at = lambda n, o, shape: (torch.arange(n, device=q.device) + o).reshape(shape)  # noqa: E731
        keep = dropout_keep(
            dropout_seed,
            dropout_p,
            at(b, ob, (b, 1, 1, 1)),
            at(hq, oh, (1, hq, 1, 1)),
            at(sq, om, (1, 1, sq, 1)),
            at(sk, on, (1, 1, 1, sk)),
        )
        p = torch.where(keep, p * (256 / (256 - round(256 * dropout_p))), torch.zeros_like(p))
    out = torch.where(row_used[..., None], p @ v_, torch.zeros((), dtype=work, device=q.device))  # stops dout's NaN too
    return out.to(v.dtype), lse.squeeze(-1)


def reference_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    key_ranges: Tensor | None = None,
    key_log_weight: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_offsets: tuple[int, ...] = (0, 0, 0, 0),
    **options,
) -> tuple[Tensor, Tensor]:
    """The same over packed sequences: ``q: [Tq, Hq, D]``, ``k: [Tk, Hkv, D]``; one dense call for each sequence.

    Returns ``out: [Tq, Hq, Dv]`` and ``lse: [Hq, Tq]``. Rows outside every sequence come back as out 0, lse -inf.
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    outs, lses = [], []
    bq, bk = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(bq) - 1):
        rows, keys = slice(bq[i], bq[i + 1]), slice(bk[i], bk[i + 1])
        if bq[i] == bq[i + 1]:
            continue
        ranges = key_ranges
        if ranges is not None:
            ranges = (ranges if ranges.dim() == 3 else ranges[None])[None, :, rows]
        weight = None if key_log_weight is None else key_log_weight[None, :, keys]
        slopes = alibi_slopes[i] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        out, lse = reference_attention(
            *(x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])),
            key_ranges=ranges,
            key_log_weight=weight,
            alibi_slopes=slopes,
            dropout_offsets=(dropout_offsets[0] + i, *dropout_offsets[1:]),
            **options,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    first, used, total = (bq[0] if bq else 0), (bq[-1] if bq else 0), q.shape[0]
    gap = lambda n: (q.new_zeros(n, q.shape[1], v.shape[2]), q.new_full((q.shape[1], n), float("-inf"), dtype=work))  # noqa: E731
    head, tail = gap(first), gap(total - used)
    return (
        torch.cat([head[0].to(v.dtype), *outs, tail[0].to(v.dtype)]),
        torch.cat([head[1], *lses, tail[1]], 1),
    )
