"""Attention on the CPU in tiles of plain PyTorch: every feature, forward and backward, in linear memory.

A block of query rows meets a block of keys at a time: online softmax forward, recomputation backward, float32 sums
for half-precision inputs. Blocks of keys that no row of a block may see are skipped. See ``cpu.py`` for when it runs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .spec import REMOVED, Gradients, Spec, accumulate_dtype, dropout_threshold

_INF = float("inf")
_LOG2E = 1.4426950408889634
_LOW32 = 0xFFFFFFFF
_LSE_ERROR = 2.0**-15  # relative error of a weight up to which the backward takes it from lse
_TILE_ELEMENTS = 1 << 18  # logits of a tile over all its heads: 1 MiB in float32 stays in the cache
_TILE_ROWS = 128
_TILE_KEYS = 512


def intervals(sq: int, sk: int, spec: Spec) -> tuple[Tensor, Tensor] | None:
    """First visible key and the one past the last, each int64 [B or 1, Hq or 1, Sq]; None: every key is visible.

    Says all of ``causal``, the window and ``key_ranges``; a row that sees nothing is (sk, 0).
    """
    right = 0 if spec.causal else spec.window_right
    if spec.key_ranges is None:
        if spec.window_left < 0 and right < 0:
            return None
        lo, hi = torch.zeros(1, 1, sq, dtype=torch.int64, device="cpu"), torch.full((1, 1, sq), sk, device="cpu")
    else:
        ranges = spec.key_ranges
        for dim in (0, 1):  # heads and batch rows that agree become one
            if ranges.shape[dim] > 1 and bool((ranges == ranges.narrow(dim, 0, 1)).all()):
                ranges = ranges.narrow(dim, 0, 1)
        lo, hi = ranges.long().clamp(0, sk).unbind(-1)
    stand = torch.arange(sk - sq, sk, device="cpu")  # the key that a row stands at
    if spec.window_left >= 0:
        lo = torch.maximum(lo, stand - spec.window_left)
    if right >= 0:
        hi = torch.minimum(hi, stand + 1 + right)
    empty = lo >= hi
    return lo.masked_fill(empty, sk), hi.masked_fill(empty, 0)


class Tiles:
    """A dense call seen tile by tile: query heads viewed as [Hkv, G], optional tensors 5-D with broadcast dims 1."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, spec: Spec, dout: Tensor | None = None) -> None:
        (self.batch, self.hq, self.sq, d), (_, self.hkv, self.sk, _) = q.shape, k.shape
        self.spec, self.work = spec, accumulate_dtype(q.dtype)
        self.scale = d**-0.5 if spec.scale is None else spec.scale
        found = intervals(self.sq, self.sk, spec)
        self.ends = None if found is None else tuple(self.split(x[..., None]) for x in found)
        self.mask = None if spec.mask is None else self.split(spec.mask)
        self.bias = None if spec.bias is None else self.split(spec.bias)
        slopes, weight = spec.alibi_slopes, spec.key_log_weight
        self.slopes = None if slopes is None else self.split(slopes.to(self.work).reshape(-1, self.hq, 1, 1))
        self.weight = None if weight is None else weight[:, :, None, None, :]
        if dout is None:
            dout = q.new_zeros(()).expand(*q.shape[:3], v.shape[-1])
        self.q, self.k, self.v, self.dout = self.split(q), k, v, self.split(dout)
        # what takes no part may be NaN or inf, and 0 * NaN would spread it
        if not all(bool(x.sum(dtype=self.work).isfinite()) for x in (q, k, v, dout)):
            row_used, key_used = (x[..., None] for x in self._used())
            self.q, self.dout = (torch.where(row_used, x, 0) for x in (self.q, self.dout))
            self.k, self.v = (torch.where(key_used, x, 0) for x in (self.k, self.v))

    def split(self, x: Tensor) -> Tensor:
        """[B, Hq or 1, ...] viewed as [B, Hkv or 1, G or 1, ...]."""
        return x.unflatten(1, (self.hkv, -1)) if x.shape[1] == self.hq else x.unsqueeze(1)

    def __iter__(self) -> Iterator[tuple[slice, slice, list[slice]]]:
        """Batch rows, query rows, and the blocks of keys that some of these rows may see."""
        rows = min(self.sq, _TILE_ROWS)
        columns = max(64, min(self.sk, _TILE_KEYS, _TILE_ELEMENTS // max(1, self.hq * rows)))
        batch = max(1, _TILE_ELEMENTS // max(1, self.hq * rows * columns))
        for b in range(0, self.batch, batch):
            for r in range(0, self.sq, rows):
                block = slice(b, min(b + batch, self.batch)), slice(r, min(r + rows, self.sq))
                first, last = 0, self.sk
                if self.ends is not None:
                    first, last = (int(self.cut(x, *block).aminmax()[i]) for i, x in enumerate(self.ends))
                yield *block, [slice(c, min(c + columns, last)) for c in range(first, last, columns)]

    @staticmethod
    def cut(x: Tensor, b: slice, r: slice, c: slice = slice(None)) -> Tensor:
        """The tile of a 5-D tensor whose dimensions of size 1 broadcast."""
        every = slice(None)
        return x[b if x.shape[0] > 1 else every, :, :, r if x.shape[3] > 1 else every, c if x.shape[4] > 1 else every]

    def seen(self, b: slice, r: slice, c: slice) -> Tensor | None:
        """Bool, broadcastable to the tile; None where every row sees every key."""
        seen = None if self.mask is None else self.cut(self.mask, b, r, c)
        if self.ends is not None:
            lo, hi = (self.cut(x, b, r) for x in self.ends)
            if int(lo.amax()) > c.start or int(hi.amin()) < c.stop:
                column = torch.arange(c.start, c.stop, device="cpu")
                inside = (column >= lo) & (column < hi)
                seen = inside if seen is None else seen & inside
        return seen

    def _used(self) -> tuple[Tensor, Tensor]:
        """Bool [B, Hkv, G, Sq] and [B, Hkv, Sk]: the rows and keys of at least one visible pair."""
        group = self.hq // self.hkv
        rows = torch.zeros(self.batch, self.hkv, group, self.sq, dtype=torch.bool, device="cpu")
        keys = torch.zeros(self.batch, self.hkv, self.sk, dtype=torch.bool, device="cpu")
        for b, r, columns in self:
            for c in columns:
                seen = self.seen(b, r, c)
                if self.weight is not None:
                    there = self.cut(self.weight, b, r, c) != -_INF
                    seen = there if seen is None else seen & there
                shape = (b.stop - b.start, self.hkv, group, r.stop - r.start, c.stop - c.start)
                tile = (torch.ones((), dtype=torch.bool, device="cpu") if seen is None else seen).expand(shape)
                rows[b, :, :, r] |= tile.any(-1)
                keys[b, :, c] |= tile.any(3).any(2)
        return rows, keys

    def queries(self, x: Tensor, b: slice, r: slice) -> Tensor:
        """A block of rows of a [B, Hkv, G, Sq, D] tensor as [b, Hkv, G * r, D], in the accumulation dtype."""
        return x[b, :, :, r].to(self.work).flatten(2, 3)

    def keys(self, x: Tensor, b: slice, c: slice) -> Tensor:
        """A block of keys or values, [b, Hkv, c, D], in the accumulation dtype."""
        return x[b, :, c].to(self.work)

    def logits(self, query: Tensor, key: Tensor, b: slice, r: slice, c: slice) -> tuple[Tensor, Tensor | None]:
        """Logits [b, Hkv, G, r, c] of scaled queries, -inf where unseen; and the softcap's tanh, for its derivative."""
        logits, tanh = (query @ key.transpose(-1, -2)).unflatten(2, (-1, r.stop - r.start)), None
        if self.spec.softcap:
            tanh = logits.div_(self.spec.softcap).tanh_()
            logits = tanh * self.spec.softcap
        if self.slopes is not None:
            row, column = torch.arange(r.start, r.stop, device="cpu"), torch.arange(c.start, c.stop, device="cpu")
            distance = (row[:, None] + (self.sk - self.sq) - column).abs().to(self.work)
            logits.addcmul_(self.cut(self.slopes, b, r, c), distance, value=-1)
        if self.bias is not None:
            logits += self.cut(self.bias, b, r, c)
        if self.weight is not None:
            logits += self.cut(self.weight, b, r, c)
        seen = self.seen(b, r, c)
        return (logits if seen is None else logits.masked_fill_(~seen, -_INF)), tanh

    def softmax_step(
        self, query: Tensor, b: slice, r: slice, c: slice, top: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weights of one more block of keys, exp(logits - top); the new top and total; the factor for sums so far."""
        logits, _ = self.logits(query, self.keys(self.k, b, c), b, r, c)
        higher = torch.maximum(top, logits.amax(-1, keepdim=True))
        safe = higher.masked_fill(higher <= REMOVED, 0)  # then no key of the row weighs anything
        p = _exp_(logits.sub_(safe))
        shrink = torch.exp(top - safe)
        return p, higher, total * shrink + p.sum(-1, keepdim=True), shrink

    def dropout(self, b: slice, r: slice, c: slice) -> Tensor:
        """The factor on each weight, [b, Hkv, G, r, c]: 0, or one over the kept share."""
        batch0, head0, row0, column0 = self.spec.dropout_offsets
        threshold, seed = dropout_threshold(self.spec.dropout_p), int(self.spec.dropout_seed)  # type: ignore[arg-type]
        start, stop = c.start + column0, c.stop + column0
        words = _philox(
            torch.arange(start // 16, (stop + 15) // 16, device="cpu"),
            torch.arange(r.start + row0, r.stop + row0, device="cpu")[:, None],
            torch.arange(head0, head0 + self.hq, device="cpu").reshape(self.hkv, -1, 1, 1),
            torch.arange(b.start + batch0, b.stop + batch0, device="cpu").reshape(-1, 1, 1, 1, 1),
            seed,
        )
        # byte i of the four words, little-endian, belongs to column i of the sixteen
        drawn = torch.stack(words, -1).to(torch.int32).view(torch.uint8).flatten(-2)
        keep = drawn[..., start % 16 : start % 16 + stop - start] >= threshold
        return keep.to(self.work).mul_(256 / (256 - threshold))


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int) -> tuple[Tensor, ...]:
    """Philox4x32-7 on int64; the counters broadcast, so the first rounds run on small tensors."""
    c0, c1, c2, c3 = (x & _LOW32 for x in (c0, c1, c2, c3))
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(7):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2 ** 64: the right bits, whatever the sign
        c0, c1, c2, c3 = (b >> 32) & _LOW32 ^ c1 ^ k0, b & _LOW32, (a >> 32) & _LOW32 ^ c3 ^ k1, a & _LOW32
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return torch.broadcast_tensors(c0, c1, c2, c3)


def _exp_(x: Tensor) -> Tensor:
    """exp in place, without subnormal results, which make the matmul after it several times as slow.

    ``torch.exp`` itself takes 20 to 200 times as long where the result underflows, as at every -inf.
    """
    return torch.threshold_(x.mul_(_LOG2E), -126.0, -_INF).exp2_()


def tiled_forward(tiles: Tiles, out: Tensor, lse: Tensor) -> None:
    """Writes ``out`` [B, Hq, Sq, Dv] and ``lse`` [B, Hq, Sq], both without the sinks."""
    out, lse = tiles.split(out), tiles.split(lse)
    for b, r, columns in tiles:
        query = tiles.queries(tiles.q, b, r) * tiles.scale
        shape = lse[b, :, :, r].shape
        top, total = query.new_full((*shape, 1), -_INF), query.new_zeros((*shape, 1))
        acc = query.new_zeros((*shape, out.shape[-1]))
        for c in columns:
            p, top, total, shrink = tiles.softmax_step(query, b, r, c, top, total)
            if tiles.spec.dropout_p:
                p *= tiles.dropout(b, r, c)
            update = (p.flatten(2, 3) @ tiles.keys(tiles.v, b, c)).view_as(acc)
            acc = acc.mul_(shrink).add_(update)
        blind = total == 0
        out[b, :, :, r] = acc / total.masked_fill(blind, 1)
        lse[b, :, :, r] = (top + total.log()).masked_fill(blind, -_INF)[..., 0]


def _normaliser(
    tiles: Tiles, query: Tensor, lse: Tensor, b: slice, r: slice, columns: list[slice]
) -> tuple[Tensor, Tensor | None]:
    """What makes a block's logits weights: exp(logits - first) * second, or without a second, by lse alone.

    Beside a large logit that all keys share (a row of padding at -1e9) lse has no room for the log of their number:
    then the sums of the forward are made again.
    """
    largest = float(lse.masked_fill(lse.isinf(), 0).abs().amax())
    if not largest * torch.finfo(lse.dtype).eps > _LSE_ERROR:
        return lse, None
    top, sinks = torch.full_like(lse, -_INF), tiles.spec.sinks
    if sinks is not None:
        top = tiles.split(sinks.to(tiles.work).reshape(1, -1, 1, 1)).expand_as(lse)
    total = (top > REMOVED).to(lse.dtype)
    for c in columns:
        _, top, total, _ = tiles.softmax_step(query, b, r, c, top, total)
    blind = total == 0
    return top.masked_fill(blind, _INF), total.masked_fill_(blind, 1).reciprocal_()


def tiled_backward(tiles: Tiles, lse: Tensor, delta: Tensor, sums: Gradients) -> None:
    """Adds to every tensor of ``sums``; ``delta`` [B, Hq, Sq] is rowsum(dout * out) - dlse."""
    lse, delta, spec = tiles.split(lse), tiles.split(delta), tiles.spec
    lse = lse.masked_fill(lse == -_INF, _INF)[..., None]  # a row that sees nothing gets P = 0
    dq, dk, dv = None if sums.dq is None else tiles.split(sums.dq), sums.dk, sums.dv
    dbias = None if sums.dbias is None else tiles.split(sums.dbias)
    dweight = None if sums.dkey_log_weight is None else sums.dkey_log_weight[:, :, None, None, :]
    for b, r, columns in tiles:
        query = tiles.queries(tiles.q, b, r) * tiles.scale
        dout = tiles.queries(tiles.dout, b, r)
        shift, share = _normaliser(tiles, query, lse[b, :, :, r], b, r, columns)
        for c in columns:
            key, value = tiles.keys(tiles.k, b, c), tiles.keys(tiles.v, b, c)
            logits, tanh = tiles.logits(query, key, b, r, c)
            p = _exp_(logits.sub_(shift))
            if share is not None:
                p *= share
            dp = (dout @ value.transpose(-1, -2)).view_as(p)
            dropped = p
            if spec.dropout_p:
                factor = tiles.dropout(b, r, c)
                dropped = p * factor
                dp *= factor
            if dv is not None:
                dv[b, :, c] += dropped.flatten(2, 3).transpose(-1, -2) @ dout
            ds = dp.sub_(delta[b, :, :, r, None]).mul_(p)
            for total in (dbias, dweight):
                if total is not None:
                    tile = tiles.cut(total, b, r, c)
                    tile += ds.sum_to_size(tile.shape)
            if tanh is not None:
                ds *= 1 - tanh.square()
            ds = ds.flatten(2, 3)
            if dq is not None:
                dq[b, :, :, r] += (ds @ key).mul_(tiles.scale).view_as(dq[b, :, :, r])
            if dk is not None:
                dk[b, :, c] += ds.transpose(-1, -2) @ query
