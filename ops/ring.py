"""Ring attention: q, k and v stay spread over the ranks, and each rank meets the others' keys one rank after the other.

Two opaque ops, ``ring_attn_fwd`` and ``ring_attn_bwd``. At step t a rank has the keys of the rank t places before it,
while those of step t + 1 are on their way; only keys that some of its rows may see are sent at all, and they come from
their owner, so that nothing is passed on. Each meeting is a call of the attention op. Results are merged by their lse;
with the merged out and lse, the gradients of the meetings add up, and those of keys go back to their owner.

Memory beyond that of the shards is two peers' keys and values (forward and backward) and their gradients (backward),
of one group of heads at a time.

Source: Liu, Zaharia and Abbeel, "Ring Attention with Blockwise Transformers" (2023); the zigzag order: Zhu,
ring-flash-attention (2024).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks, library
from .lazy import when_imported
from .sequence import CHUNKS, Place, process_group
from .spec import Spec, accumulate_dtype, bshd_layout, new_bshd, new_lse

GROUP_ELEMENTS = 2**22  # of a shard's keys, at least, in one of up to four groups of heads


class Options(NamedTuple):
    """The arguments behind q, k, v, group, layout and impl, as the ops take them. Windows are -1 where unbounded."""

    key_ranges: Tensor | None  # int32 [B or 1, Hq or 1, S_local, 2], in global positions
    sinks: Tensor | None  # [Hq]
    dropout_seed: Tensor | None  # int64, one element
    scale: float | None
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    dropout_offsets: tuple[int, ...]

    @property
    def ranged(self) -> bool:
        """Whether visibility is more than causal."""
        return self.key_ranges is not None or max(self.window_left, self.window_right) >= 0


def spec_of(options: Options) -> Spec:
    """The same as a call of the attention op on the shard alone; for the checks."""
    return Spec(**options._asdict())


class Piece(NamedTuple):
    """One call of the attention op: some rows of this rank over some keys of another."""

    rows: slice  # of the rank's shard
    keys: slice  # of the other's
    row: int  # global position of the first row
    key_starts: tuple[int, ...]  # and of each chunk of the keys
    causal: bool
    diagonal: bool  # a rank's rows over its own keys: every row is in exactly one such piece


@functools.lru_cache(4096)
def plan_pieces(
    place: Place, length: int, rank: int, source: int, causal: bool, left: int, right: int, ranged: bool, split: bool
) -> tuple[Piece, ...]:
    """The calls for ``rank``'s rows over ``source``'s keys, the diagonal ones first.

    ``ranged``: key ranges say what is seen. ``split``: chunks go one by one, since dropout counts rows and columns.
    """
    starts, key_starts = place.starts(length, rank), place.starts(length, source)
    count = len(starts)
    chunk = length // count
    reach = 0 if causal else right

    def sees(i: int, j: int) -> bool:
        first, last = starts[i], starts[i] + chunk - 1
        far_left = left >= 0 and key_starts[j] + chunk - 1 < first - left
        return not far_left and (reach < 0 or key_starts[j] <= last + reach)

    def piece(i: int, end: int, j: int, stop: int) -> Piece:
        diagonal = rank == source and i == j
        rows, keys = slice(i * chunk, end * chunk), slice(j * chunk, stop * chunk)
        return Piece(rows, keys, starts[i], tuple(key_starts[j:stop]), causal and diagonal and not ranged, diagonal)

    pairs = [(i, j) for i in range(count) for j in range(count) if sees(i, j) or (rank == source and i == j)]
    if split:
        found = [piece(i, i + 1, j, j + 1) for i, j in pairs]
    elif rank == source or ranged or not causal:
        found = [piece(0, count, 0, count)] if pairs else []
    else:  # every chunk of rows sees some first chunks of keys, whole
        found, i = [], 0
        for seen, rows in itertools.groupby(sum(sees(i, j) for j in range(count)) for i in range(count)):
            end = i + len(list(rows))
            if seen:
                found.append(piece(i, end, 0, seen))
            i = end
    return tuple(sorted(found, key=lambda p: not p.diagonal))


class _Transfer(NamedTuple):
    """Tensors on their way, those that leave kept alive until they are there."""

    incoming: list[Tensor]
    outgoing: list[Tensor]
    works: list[Any]

    def wait(self) -> list[Tensor]:
        """What came, [B, H, n, D] each."""
        for work in self.works:
            work.wait()
        return [x.transpose(1, 2) for x in self.incoming]


class _Ring:
    """One call: its plan and its traffic."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, group: str, layout: str, impl: str, options: Options) -> None:
        self.group = process_group(group)
        self.place = Place(group, dist.get_rank(self.group), dist.get_world_size(self.group), layout)
        self.impl, self.options, self.length = impl, options, q.shape[2]
        self.rank, self.size, self.split = self.place.rank, self.place.size, options.dropout_p > 0
        self.ranges = self._global_ranges(q) if options.ranged else None
        self.steps = 1 + max(
            t for t in range(self.size) if not t or any(self.span(r, r - t) for r in range(self.size))
        )  # a window does not reach round the whole ring
        # the sum of two tensors needs no wider dtype than they have
        self.sum_dtype = accumulate_dtype(q.dtype) if self.steps > 2 or self.split else q.dtype
        groups = next(g for g in (4, 2, 1) if k.shape[1] % g == 0 and (g == 1 or k.numel() // g >= GROUP_ELEMENTS))
        self.heads = [
            tuple(slice(i * x.shape[1] // groups, (i + 1) * x.shape[1] // groups) for x in (q, k))
            for i in range(groups)
        ]

    def pieces(self, rank: int, source: int) -> tuple[Piece, ...]:
        o = self.options
        flags = (o.causal, o.window_left, o.window_right, o.ranged, self.split)
        return plan_pieces(self.place, self.length, rank % self.size, source % self.size, *flags)

    def span(self, rank: int, source: int) -> slice | None:
        """The keys of ``source`` that some of ``rank``'s rows may see."""
        pieces = self.pieces(rank, source)
        return slice(min(p.keys.start for p in pieces), max(p.keys.stop for p in pieces)) if pieces else None

    def _global_ranges(self, q: Tensor) -> Tensor:
        """All rules on visibility as key ranges in global positions: int64 [B or 1, Hq or 1, S_local, 2]."""
        o, total = self.options, self.length * self.size
        at = self.place.positions(self.length, q.device)
        lo, hi = torch.zeros_like(at), torch.full_like(at, total)
        if o.window_left >= 0:
            lo = at - o.window_left
        right = 0 if o.causal else o.window_right
        if right >= 0:
            hi = at + (right + 1)
        if o.key_ranges is not None:
            given = o.key_ranges.long()
            lo, hi = torch.maximum(lo, given[..., 0]), torch.minimum(hi, given[..., 1])
        ranges = torch.stack((lo, hi), -1).clamp_(0, total)
        return ranges if ranges.dim() == 4 else ranges[None, None]

    def spec(self, piece: Piece, heads: slice) -> Spec:
        o, ranges = self.options, None
        batch, head, row, column = o.dropout_offsets
        if self.ranges is not None:
            ranges = self.ranges[:, :, piece.rows]
            ranges = ranges[:, heads] if ranges.shape[1] > 1 else ranges
            chunk = self.length // CHUNKS[self.place.layout]
            # an interval of the sequence is one interval of the shard, whose chunks are in order
            ranges = torch.stack([(ranges - start).clamp(0, chunk) for start in piece.key_starts]).sum(0)
            ranges = ranges.to(torch.int32)
        return Spec(
            key_ranges=ranges,
            sinks=o.sinks[heads] if o.sinks is not None and piece.diagonal else None,
            dropout_seed=o.dropout_seed,
            scale=o.scale,
            causal=piece.causal,
            softcap=o.softcap,
            dropout_p=o.dropout_p,
            dropout_offsets=(batch, head + heads.start, row + piece.row, column + piece.key_starts[0]),
        )

    def exchange(self, shift: int, outgoing: list[Tensor], incoming: list[Tensor]) -> _Transfer:
        """Start sending to the rank ``shift`` places on and receiving from the one as far back.

        Tensors on the wire are [B, n, H, D]; both ends know which there are.
        """
        to, source = ((self.rank + s) % self.size for s in (shift, -shift))
        peer = functools.partial(dist.get_global_rank, self.group)
        ops = [dist.P2POp(dist.isend, x, peer(to), self.group) for x in outgoing]
        ops += [dist.P2POp(dist.irecv, x, peer(source), self.group) for x in incoming]
        return _Transfer(incoming, outgoing, dist.batch_isend_irecv(ops) if ops else [])

    def fetch(self, shift: int, k: Tensor, v: Tensor) -> _Transfer:
        """Ask for the keys and values of the rank ``shift`` places back (none where no row sees them)."""
        sent, got = self.span(self.rank + shift, self.rank), self.span(self.rank, self.rank - shift)
        outgoing = [] if sent is None else [x[:, :, sent].transpose(1, 2).contiguous() for x in (k, v)]
        return self.exchange(shift, outgoing, [] if got is None else [_new_wire(x, got) for x in (k, v)])

    def visit(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, tuple[Piece, ...], list[Tensor], int]]:
        """Each step's number and pieces, the keys and values at hand, and where in their owner's shard these begin."""
        coming = self.fetch(1, k, v) if self.steps > 1 else None
        yield 0, self.pieces(self.rank, self.rank), [k, v], 0
        for step in range(1, self.steps):
            assert coming is not None
            held = coming.wait()
            coming = self.fetch(step + 1, k, v) if step + 1 < self.steps else None
            pieces, span = self.pieces(self.rank, self.rank - step), self.span(self.rank, self.rank - step)
            yield step, pieces, held, span.start if span else 0

    def give_back(self, step: int, grads: list[Tensor], like: list[Tensor]) -> _Transfer:
        """Send gradients of the keys of ``step`` to their owner; ask for this rank's from the one that saw its keys."""
        user = self.rank + step
        got = self.span(user, self.rank)
        # the dtype of the op's own gradients, unless they are sums of several calls
        dtype = accumulate_dtype(like[0].dtype) if len(self.pieces(user, self.rank)) > 1 else None
        outgoing = [x.transpose(1, 2).contiguous() for x in grads]
        return self.exchange(-step, outgoing, [] if got is None else [_new_wire(x, got, dtype) for x in like])

    def take(self, coming: _Transfer | None, step: int, own: list[Tensor]) -> None:
        """Add the gradients that ``give_back`` of a step asked for."""
        span = self.span(self.rank + step, self.rank)
        for total, x in zip(own, coming.wait() if coming else [], strict=False):
            total[:, :, span] += x


def _new_wire(x: Tensor, rows: slice, dtype: torch.dtype | None = None) -> Tensor:
    b, h, _, d = x.shape
    return x.new_empty((b, rows.stop - rows.start, h, d), dtype=dtype)


def _shift(at: slice, by: int) -> slice:
    return slice(at.start - by, at.stop - by)


# ---- forward ---------------------------------------------------------------------------------------------------------


def _forward(
    q: Tensor, k: Tensor, v: Tensor, group: str, layout: str, impl: str, *options: Any
) -> tuple[Tensor, Tensor]:
    ring = _Ring(q, k, v, group, layout, impl, Options(*options))
    out = q.new_empty_strided(*bshd_layout(q.shape, v.shape[-1]), dtype=ring.sum_dtype)
    lse = new_lse(q)
    for heads, kv_heads in ring.heads:
        for _, pieces, kv, start in ring.visit(k[:, kv_heads], v[:, kv_heads]):
            for piece in pieces:
                keys, rows = _shift(piece.keys, start), piece.rows
                part, part_lse = library.FWD(
                    q[:, heads, rows], kv[0][:, :, keys], kv[1][:, :, keys], impl, *ring.spec(piece, heads)
                )
                total, total_lse = out[:, heads, rows], lse[:, heads, rows]
                if piece.diagonal:
                    total.copy_(part)
                    total_lse.copy_(part_lse)
                else:
                    _merge_(total, total_lse, part, part_lse)
    return out if out.dtype == q.dtype else new_bshd(q, v.shape[-1]).copy_(out), lse


def _merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge another part of the attention into out and lse, in float32 (float64 for float64), some rows at a time."""
    total = torch.logaddexp(lse, part_lse)
    share = torch.exp(part_lse - total).masked_fill_(total == float("-inf"), 0)[..., None]
    rows = max(1, 2**24 // (out.numel() // out.shape[2]))
    for i in range(0, out.shape[2], rows):
        at = slice(i, i + rows)
        block, added = out[:, :, at], part[:, :, at].to(lse.dtype)
        block.copy_(torch.lerp(block.to(lse.dtype), added, share[:, :, at]))
    lse.copy_(total)


# ---- backward --------------------------------------------------------------------------------------------------------


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, needs: list[bool],
    deterministic: bool, group: str, layout: str, impl: str, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq, dk, dv and this rank's share of dsinks; empty where not needed."""
    ring = _Ring(q, k, v, group, layout, impl, Options(*options))
    rows_needed, keys_needed, sinks = needs[0], needs[1] or needs[2], ring.options.sinks
    sums = [x.new_empty_strided(*bshd_layout(x.shape, x.shape[-1]), dtype=ring.sum_dtype) for x in (q, k, v)]
    dsinks = None if sinks is None or not needs[3] else torch.zeros_like(sinks, dtype=lse.dtype)
    for heads, kv_heads in ring.heads:
        held, own = [k[:, kv_heads], v[:, kv_heads]], [x[:, kv_heads] for x in sums[1:]]
        coming = None
        for step, pieces, kv, start in ring.visit(*held):
            block = own if not step else []
            if len(pieces) > 1 and step:
                block = [torch.zeros_like(x, dtype=accumulate_dtype(x.dtype)) for x in kv]
            for piece in pieces:
                rows, keys = piece.rows, _shift(piece.keys, start)
                call = (
                    dout[:, heads, rows],
                    None if dlse is None else dlse[:, heads, rows].contiguous(),
                    q[:, heads, rows],
                    *(x[:, :, keys] for x in kv),
                    out[:, heads, rows],
                    lse[:, heads, rows].contiguous(),
                )
                wants = [rows_needed, keys_needed, keys_needed, False, False, dsinks is not None and piece.diagonal]
                found = library.BWD(*call, wants, deterministic, impl, *ring.spec(piece, heads))
                if rows_needed:
                    _add_(sums[0][:, heads, rows], found[0], piece.diagonal)
                if dsinks is not None and piece.diagonal:
                    dsinks[heads] += found[5]
                if not block:
                    block = list(found[1:3])
                elif keys_needed:
                    for total, x in zip(block, found[1:3], strict=True):
                        _add_(total[:, :, keys], x, piece.diagonal)
            if step and keys_needed:  # what came meanwhile, before there is more
                ring.take(coming, step - 1, own)
                coming = ring.give_back(step, block, held)
        ring.take(coming, ring.steps - 1, own)
    grads = [
        q.new_empty(0) if not need else x if x.dtype == y.dtype else new_bshd(y).copy_(x)
        for x, y, need in zip(sums, (q, k, v), needs, strict=False)
    ]
    return (*grads, q.new_empty(0) if dsinks is None or sinks is None else dsinks.to(sinks.dtype))


def _add_(total: Tensor, x: Tensor, first: bool) -> None:
    """Every row and key is first met in a diagonal piece, so that sums need no zeros."""
    if first:
        total.copy_(x)
    else:
        total += x


# ---- ops -------------------------------------------------------------------------------------------------------------

_OPTIONS = (
    "str group, str layout, str impl, Tensor? key_ranges, Tensor? sinks, Tensor? dropout_seed, float? scale, "
    "bool causal, SymInt window_left, SymInt window_right, float softcap, float dropout_p, SymInt[4] dropout_offsets"
)
_NAME = f"{library.NAMESPACE}::ring_attn"
_lib = torch.library.Library(library.NAMESPACE, "FRAGMENT")
# traffic between ranks does not belong into a CUDA graph
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order, torch.Tag.cudagraph_unsafe)
_lib.define(f"ring_attn_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", tags=_TAGS)
_lib.define(
    "ring_attn_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor fwd_out, Tensor lse, "
    f"bool[4] needs, bool deterministic, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_ops = getattr(torch.ops, library.NAMESPACE)
RING_FWD, RING_BWD = _ops.ring_attn_fwd.default, _ops.ring_attn_bwd.default


def find_problems(q: Tensor, k: Tensor, v: Tensor, layout: str, impl: str, options: Options) -> list[checks.Problem]:
    """Every reason why a call cannot run; looks at no value."""
    problems = checks.find_problems(q, k, v, impl, spec_of(options))
    if problems:
        return problems
    if q.shape[2] != k.shape[2]:
        problems.append((ValueError, f"q, k: expected shards of one length, got {q.shape[2]} and {k.shape[2]}"))
    if q.shape[2] % CHUNKS[layout] or q.shape[2] == 0:
        text = f"q: expected rows in {CHUNKS[layout]} equal chunks (layout={layout!r}), got {q.shape[2]} rows"
        problems.append((ValueError, text))
    if impl == "reference" and not q.is_meta:
        text = "impl='reference': its backward knows its own softmax only, not that of all ranks; use impl='auto'"
        problems.append((NotImplementedError, text))
    return problems


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, group: str, layout: str, impl: str, *options: Any):
    if problems := find_problems(q, k, v, layout, impl, Options(*options)):
        checks.raise_problems(problems, "ring_attention")
    return new_bshd(q, v.shape[-1]), new_lse(q)


def _fake_backward(dout, dlse, q, k, v, out, lse, needs, deterministic, group, layout, impl, ranges, sinks, *rest):
    made = [new_bshd(x) if need else q.new_empty(0) for x, need in zip((q, k, v), needs, strict=False)]
    return (*made, sinks.new_empty(sinks.shape) if needs[3] else q.new_empty(0))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, group, layout, impl, ranges, sinks, seed, *numbers = inputs
    ctx.save_for_backward(q, k, v, *output, ranges, sinks, seed)
    ctx.call = (group, layout, impl), numbers
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    where, numbers = ctx.call
    needs = [*ctx.needs_input_grad[:3], ctx.needs_input_grad[7]]
    if dout is None:
        dout = torch.zeros_like(out)
    deterministic = torch.are_deterministic_algorithms_enabled()
    found = RING_BWD(dout, dlse, q, k, v, out, lse, needs, deterministic, *where, *tensors, *numbers)
    dq, dk, dv, dsinks = (x if need else None for x, need in zip(found, needs, strict=True))
    return dq, dk, dv, None, None, None, None, dsinks, *(None,) * (1 + len(numbers))


for _suffix, _body, _fake in (("fwd", _forward, _fake_forward), ("bwd", _backward, _fake_backward)):
    _lib.impl(f"ring_attn_{_suffix}", _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAME}_{_suffix}", _fake, lib=_lib)
torch.library.register_autograd(f"{_NAME}_fwd", _gradients, setup_context=_setup_context, lib=_lib)
torch.library.register_autograd(f"{_NAME}_bwd", library.no_double_backward, lib=_lib)


def _register_flops(flop_counter: Any) -> None:
    """This rank's share of the full count, causal or not: its rows over the keys of all ranks."""

    def pairs(q: Tensor, group: str) -> int:
        return q.shape[0] * q.shape[1] * q.shape[2] ** 2 * dist.get_world_size(process_group(group))

    def forward(q, k, v, group, *rest, out_val=None, **_):
        return 2 * pairs(q, group) * (q.shape[-1] + v.shape[-1])

    def backward(dout, dlse, q, k, v, out, lse, needs, deterministic, group, *rest, out_val=None, **_):
        return 2 * pairs(q, group) * (3 * q.shape[-1] + 2 * v.shape[-1])

    flop_counter.register_flop_formula(_ops.ring_attn_fwd, get_raw=True)(forward)
    flop_counter.register_flop_formula(_ops.ring_attn_bwd, get_raw=True)(backward)


when_imported("torch.utils.flop_counter", _register_flops)
