"""Attention of a sequence spread over ranks (gloo processes) against the same op on the whole sequence."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import TOLERANCE
from ranks import gloo, on_ranks
from torch import Tensor

from hf_flash_mc.ops import flash_attention, ring, ring_attention, shard_sequence, ulysses_attention, unshard_sequence
from hf_flash_mc.ops.sequence import Place

INF = float("inf")


@dataclasses.dataclass
class Call:
    """An attention call of 24 rows and how it is spread; ``ranges`` draws key_ranges of that shape."""

    options: dict[str, Any]
    hq: int = 6
    hkv: int = 2
    length: int = 24
    ranges: tuple[int, int] | None = None
    sinks: bool = False
    dtype: torch.dtype = torch.float64
    hidden: bool = False  # NaN in a key that no row sees and in rows that see no key

    def draw(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor | None, Tensor | None]:
        """q, k, v; dout, dlse; key_ranges; sinks: the same on every rank."""
        gen = torch.Generator().manual_seed(self.length + self.hkv)
        draw = lambda *shape: torch.randn(shape, generator=gen, dtype=torch.float64).to(self.dtype)  # noqa: E731
        b, hq, hkv, s = 2, self.hq, self.hkv, self.length
        qkv, dout = [draw(b, hq, s, 8), draw(b, hkv, s, 8), draw(b, hkv, s, 5)], draw(b, hq, s, 5)
        ranges = None
        if self.ranges is not None:
            ranges = torch.randint(-3, s + 5, (*self.ranges, s, 2), generator=gen).int()
            ranges[..., 2, :] = torch.tensor([-(2**31), 2**31 - 1])
        if self.hidden:
            ranges = torch.tensor([3, s]).int().expand(1, 1, s, 2).contiguous()
            ranges[:, :, -2:] = 1
            for x in qkv[1:]:
                x[:, :, :3] = float("nan")
            qkv[0][:, :, -2:] = dout[:, :, -2:] = float("nan")
        sinks = draw(hq) if self.sinks else None
        return qkv, dout, draw(b, hq, s).to(torch.promote_types(self.dtype, torch.float32)), ranges, sinks


DROPOUT = {"dropout_p": 0.3, "dropout_seed": 5}
CALLS = [
    Call({"causal": True}),
    Call({"causal": True}, hkv=1, dtype=torch.float32),
    Call({}, hkv=6, sinks=True),
    Call({"window": (3, 0), "scale": 0.3}, length=48),
    Call({"window": (2, 4)}, hkv=3),
    Call({"causal": True, "window": (5, None), "softcap": 3.0}, sinks=True),
    Call({}, ranges=(2, 1), sinks=True),
    Call({"causal": True}, ranges=(1, 6)),
    Call({"softcap": 2.0}, hidden=True),
    Call({"causal": True, "dropout_offsets": (1, 2, 3, 7), **DROPOUT}, sinks=True),
    Call({"window": (6, 1), **DROPOUT}, hkv=1),
    Call(DROPOUT, dtype=torch.float32),
    Call({"causal": True}, hkv=6, dtype=torch.bfloat16),
]


def weighted(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor) -> Tensor:
    """A scalar whose gradients are dout and dlse, where there is something to differentiate."""
    seen = lse > -INF
    return (torch.where(seen[..., None], out, 0) * torch.where(seen[..., None], dout, 0)).sum() + (
        torch.where(seen, lse, 0) * torch.where(seen, dlse, 0)
    ).sum()


def check(attention: Callable[..., Any], layout: str | None, call: Call) -> None:
    """Values and gradients of this rank's shard against those of the whole sequence; layout None: all defaults."""
    (qkv, dout, dlse, ranges, sinks), made = call.draw(), []
    chosen = {} if layout is None else {"layout": layout}
    share = lambda x: shard_sequence(x, dim=2, **chosen)  # noqa: E731
    for spread in (False, True):
        part = share if spread else lambda x: x
        leaves = [part(x).clone().requires_grad_() for x in qkv]
        sink = None if sinks is None else sinks.clone().requires_grad_()
        ours = None if ranges is None else part(ranges)
        function, how = (attention, chosen) if spread else (flash_attention, {})
        out, lse = function(*leaves, key_ranges=ours, sinks=sink, return_lse=True, **call.options, **how)
        weighted(out, lse, part(dout), part(dlse)).backward()
        found = [out, lse, *(x.grad for x in leaves)]
        made.append([x.detach() if spread else share(x.detach()) for x in found])
        if sink is not None:
            if spread:
                dist.all_reduce(sink.grad)
            made[-1].append(sink.grad)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), made[1], made[0], strict=False):
        assert a.shape == b.shape
        assert torch.equal(a == -INF, b == -INF), name
        error, largest = ((x.nan_to_num(neginf=0).abs().max()) for x in (a - b.where(b > -INF, a), b))
        assert not a.isnan().any(), name
        assert error <= TOLERANCE[call.dtype] * max(1.0, largest), f"{attention.__name__} {layout} {call} {name}"


def calls_body(rank: int) -> None:
    for attention, layout, call in itertools.product(
        (ring_attention, ulysses_attention), ("zigzag", "contiguous", None), CALLS
    ):
        check(attention, layout, call)
    ring.GROUP_ELEMENTS = 1  # head groups, one after the other
    torch.use_deterministic_algorithms(True)  # which also fills what is allocated with NaN
    for call in CALLS[::3]:
        check(ring_attention, "zigzag", call)
    torch.use_deterministic_algorithms(False)
    ring.GROUP_ELEMENTS = 2**22


def three_ranks_body(rank: int) -> None:
    for call in (CALLS[0], CALLS[3], CALLS[5], CALLS[6], CALLS[9], CALLS[12]):
        for layout in ("zigzag", "contiguous"):
            check(ring_attention, layout, call)
            check(ulysses_attention, layout, call)


def helpers_body(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(24).reshape(3, 8)
    for layout, rows in (("zigzag", [[0, 1, 6, 7], [2, 3, 4, 5]]), ("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7]])):
        mine = shard_sequence(whole, mesh, layout=layout)
        assert torch.equal(mine, whole[:, rows[rank]])
        assert torch.equal(unshard_sequence(mine, mesh, layout=layout), whole)
        assert Place("", rank, 2, layout).positions(4).tolist() == rows[rank]
    x = torch.ones(1, 4, requires_grad=True)
    (unshard_sequence(x) * torch.arange(8.0)).sum().mul(rank + 1).backward()
    assert torch.equal(x.grad, 3 * shard_sequence(torch.arange(8.0)[None]))
    with pytest.raises(ValueError, match="divisible by 4"):
        shard_sequence(torch.zeros(1, 6))
    for function in (shard_sequence, unshard_sequence):
        with pytest.raises(ValueError, match=r"dim: expected from -2 to 1 for x of shape \(1, 8\), got 9"):
            function(torch.zeros(1, 8), dim=9)


def errors_body(rank: int) -> None:
    x = torch.randn(1, 3, 4, 8)
    for attention in (ring_attention, ulysses_attention):
        with pytest.raises(NotImplementedError, match="bias is not supported"):
            attention(x, x, x, bias=x)
        with pytest.raises(TypeError, match="unexpected keyword argument 'biass'"):
            attention(x, x, x, biass=x)
        with pytest.raises(ValueError, match="layout"):
            attention(x, x, x, layout="striped")
        with pytest.raises(TypeError, match="group: expected a ProcessGroup"):
            attention(x, x, x, group=3)
        with pytest.raises(ValueError, match=r"sinks: expected \[Hq\], got shape \(8,\)"):  # enough for every rank
            attention(x[:, :2], x[:, :2], x[:, :2], sinks=torch.zeros(8))
        with pytest.raises(TypeError, match=r"key_ranges: expected a .*, got list"):
            attention(x[:, :2], x[:, :2], x[:, :2], key_ranges=[[0, 4]])
        with pytest.raises(ValueError, match="dropout_offsets: expected four ints"):
            attention(x[:, :2], x[:, :2], x[:, :2], dropout_p=0.5, dropout_seed=1, dropout_offsets=(0, 0))
        for autocast in (False, True):
            with torch.autocast("cpu", enabled=autocast), pytest.raises(TypeError, match="k: expected a"):
                attention(x[:, :2], None, x[:, :2])
        with pytest.raises(NotImplementedError, match=r"torch\.func"):
            torch.func.grad(lambda y, attention=attention: attention(y, y, y).sum())(x)
    with pytest.raises(ValueError, match=r"divisible by 2 ranks.*ring_attention takes any"):
        ulysses_attention(x, x, x)
    with pytest.raises(ValueError, match="2 equal chunks"):
        ring_attention(*(x[:, :, :3],) * 3)
    with pytest.raises(ValueError, match="shards of one length"):
        ring_attention(x, x[:, :, :2], x[:, :, :2])
    with pytest.raises(NotImplementedError, match="own softmax only"):
        ring_attention(x, x, x, impl="reference")
    with pytest.raises(ValueError, match="key_ranges"):
        ring_attention(x, x, x, key_ranges=torch.zeros(1, 1, 8, 2, dtype=torch.int32))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ring_attention(leaf, leaf, leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def compiled_body(rank: int) -> None:
    """One graph, the same values and gradients; a seed drawn on one rank; autocast; FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(rank)  # seeds must not depend on it
    gen = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, h, 12, 8, generator=gen) for h in (4, 2, 2)]
    for attention in (ring_attention, ulysses_attention):
        call = lambda q, k, v, attention=attention: attention(  # noqa: E731
            q, k, v, causal=True, layout="zigzag", **DROPOUT
        ).sin()
        made = []
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            leaves = [shard_sequence(x, dim=2).requires_grad_() for x in qkv]
            out = function(*leaves)
            out.sum().backward()
            made.append([out.detach(), *(x.grad for x in leaves)])
        for a, b in zip(*made, strict=True):
            torch.testing.assert_close(a, b)
        ones = [shard_sequence(x, dim=2) for x in qkv]
        ones[2] = torch.ones_like(ones[2])
        drawn = attention(*ones, dropout_p=0.5, layout="zigzag")  # the number of survivors tells the masks apart
        torch.manual_seed(0)
        seed = torch.randint(2**63 - 1, ())
        torch.manual_seed(rank)
        assert torch.equal(drawn, attention(*ones, dropout_p=0.5, dropout_seed=seed, layout="zigzag"))
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            with torch.autocast("cpu", torch.bfloat16):
                assert function(*ones).dtype == torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        ring_attention(*[x.clone().requires_grad_() for x in ones], causal=True).sum().backward()
    assert counter.get_total_flops() == 2 * 4 * 6 * 12 * (8 + 8) + 2 * 4 * 6 * 12 * (3 * 8 + 2 * 8)


@gloo
def test_spread_attention_is_that_of_the_whole_sequence() -> None:
    on_ranks(calls_body, helpers_body, errors_body, compiled_body)


@gloo
def test_three_ranks() -> None:
    on_ranks(three_ranks_body, size=3)


def pairs_of(layout: str, size: int, length: int, options: tuple[Any, ...]) -> Tensor:
    """How often each (row, key) of the sequence is in a piece whose own rules show it."""
    count = torch.zeros(size * length, size * length, dtype=torch.int64)
    causal, left, right, ranged, split = options
    for rank, source in itertools.product(range(size), repeat=2):
        place = Place("", rank, size, layout)
        rows, keys = place.positions(length), Place("", source, size, layout).positions(length)
        for piece in ring.plan_pieces(place, length, rank, source, causal, left, right, ranged, split):
            r, c = rows[piece.rows], keys[piece.keys]
            assert r[0] == piece.row
            assert c[0] == piece.key_starts[0]
            seen = torch.ones(len(r), len(c)).tril().bool() if piece.causal else torch.ones(len(r), len(c)).bool()
            count[r[:, None], c[None]] += seen
    return count


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_pieces_meet_every_visible_pair_once(layout: str) -> None:
    for size, split in itertools.product((1, 2, 3, 4), (False, True)):
        n = 4 * size
        row, key = torch.arange(n)[:, None], torch.arange(n)[None]
        assert torch.equal(pairs_of(layout, size, 4, (True, -1, -1, False, split)), (key <= row).long())
        assert (pairs_of(layout, size, 4, (False, -1, -1, False, split)) == 1).all()
        count = pairs_of(layout, size, 4, (False, 2, 1, True, split))
        assert count.max() == 1
        assert (count[(key >= row - 2) & (key <= row + 1)] == 1).all()
    assert pairs_of("contiguous", 4, 4, (False, 2, 1, True, False)).sum() < 16 * 16  # the far corners are left out


def test_zigzag_gives_every_rank_the_same_work_under_causal() -> None:
    for rank in range(4):
        place = Place("", rank, 4, "zigzag")
        pieces = [ring.plan_pieces(place, 8, rank, s, True, -1, -1, False, False) for s in range(4)]
        work = [sum((p.rows.stop - p.rows.start) * (p.keys.stop - p.keys.start) for p in found) for found in pieces]
        assert work == [64 if source == rank else 32 for source in range(4)]
