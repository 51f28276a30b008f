"""The definition against what it must equal: torch's math attention, a loop over pairs, and published Philox values."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, Case, exact_attention, make_inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_flash_mc.ops import flash_attention, reference
from hf_flash_mc.ops.reference import REMOVED, dropout_keep, reference_attention, reference_attention_varlen
from hf_flash_mc.ops.spec import REMOVED as SPEC_REMOVED

DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("bias", [-1e4, -1e9, -2e38])
def test_weights_of_large_logits_sum_to_one(bias: float) -> None:
    """exp(logits - lse) lost what rounding took from lse: out was the sum of the values and not their mean."""
    q, k, v = (draw(1, 2, 5, 8, seed=i).float() for i in range(3))
    out, lse = reference_attention(q, k, v, bias=torch.full((1, 1, 5, 5), bias))
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, torch.full((5, 5), bias))
    torch.testing.assert_close(out, expected)
    assert bool((lse <= bias + 10).all())


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("by", ["bias", "key_log_weight"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_lowest_number_removes_a_key(impl: str, by: str, sinks: bool, dtype: torch.dtype, device: str) -> None:
    """Padding is made of it, as of -inf. In rows of nothing else the CPU gave the mean of the values, with gradients
    as many times too large as there are keys, and the Triton kernels gave 0."""
    _runs_here(impl, dtype, device)
    low = torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).min
    q, k, v, dout = (draw(2, 2, n, 16, seed=i) for i, n in enumerate((5, 70, 70, 5)))
    removed = draw(2, 1, 5, 70, seed=5) > 0.5
    removed[0, :, 1] = removed[1] = True
    bias = draw(2, 1, 5, 70, seed=6)
    if by == "key_log_weight":
        removed, bias = removed[:, :, -1], bias[:, :, -1]  # all of the second sample's keys
    sink = {"sinks": draw(2, seed=7)} if sinks else {}
    found = []
    for work, fill, on, how in ((torch.float64, -math.inf, "cpu", "reference"), (dtype, low, device, impl)):
        leaves = [x.to(dtype).to(on, work).requires_grad_() for x in (q, k, v)]
        added = bias.to(dtype).to(on, work).masked_fill(removed.to(on), fill).requires_grad_()
        options = {by: added} | {n: x.to(dtype).to(on, work).requires_grad_() for n, x in sink.items()}
        out, lse = flash_attention(*leaves, **options, return_lse=True, impl=how)
        leaves += options.values()
        gradients = torch.autograd.grad((out, lse), leaves, (dout.to(dtype).to(out), torch.ones_like(lse)))
        found.append([x.detach().cpu().double() for x in (out, lse, *gradients)])
    for expected, got in zip(*found, strict=True):
        bound = TOLERANCE[dtype] * expected[expected > -math.inf].abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_where_numbers_end_and_removal_begins(impl: str, device: str) -> None:
    """One number for all back ends: that which the Triton kernels, which compute in base 2, no longer hold."""
    _runs_here(impl, torch.float32, device)
    assert REMOVED == SPEC_REMOVED == torch.tensor(REMOVED).item()
    q, k, v = (torch.zeros(1, 1, n, 16, device=device) for n in (2, 3, 3))
    bias = torch.tensor([REMOVED * (1 - 1e-6), REMOVED], device=device)[:, None]
    out, lse = flash_attention(q, k, v + 1, bias=bias, return_lse=True, impl=impl)
    assert out[0, 0, :, 0].tolist() == [1, 0]
    assert lse[0, 0].isinf().tolist() == [False, True]


@pytest.mark.parametrize(("low", "sinks"), [(-300.0, True), (-1e5, False), (-1e9, False), (-2e38, False)])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradients_of_rows_far_below(low: float, sinks: bool, impl: str) -> None:
    """Beside a logit that all keys share lse has no room for the log of their number, and gradients were as many times
    too large as there are keys."""
    found = []
    for dtype in (DOUBLE, torch.float32):
        q = torch.zeros(1, 2, 5, 8, dtype=dtype, requires_grad=True)  # else float64 keeps what float32 cannot
        k, v = (draw(1, 2, 700, 8, seed=i).to(dtype).requires_grad_() for i in (1, 2))
        bias = torch.zeros(1, 1, 5, 700, dtype=dtype)
        bias[:, :, 1:3] = low
        bias[:, :, 2, 600:] += low / 8
        leaves = [q, k, v, bias.requires_grad_()]
        options = {}
        if sinks:
            leaves.append(torch.tensor([low, 0.5], dtype=dtype, requires_grad=True))
            options = {"sinks": leaves[-1]}
        out = flash_attention(*leaves[:3], bias=bias, **options, impl=impl if dtype == torch.float32 else "reference")
        dout = draw(*out.shape, seed=4).to(dtype)
        found.append([x.double() for x in (out, *torch.autograd.grad(out, leaves, dout))])
    for expected, got in zip(*found, strict=True):
        bound = TOLERANCE[torch.float32] * expected.detach().abs().max().item()
        torch.testing.assert_close(got, expected, rtol=0, atol=bound)


def _runs_here(impl: str, dtype: torch.dtype, device: str) -> None:
    if impl == "triton":
        pytest.importorskip("triton")
        if dtype == torch.float64 or (device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
            pytest.skip("the Triton kernels need a GPU or the interpreter, and take no float64")
    elif device != "cpu" and impl == "cpu":
        pytest.skip("for CPU tensors")


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_visible_inf_and_nan_spread_as_in_torch(value: float) -> None:
    q, k, v = (draw(1, 1, 3, 4, seed=i) for i in range(3))
    q[0, 0, 1, 2] = value
    assert reference_attention(q, k, v)[0].isnan().any(-1).flatten().tolist() == [False, True, False]


@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("kind", ["full", "causal", "mask", "bias"])
def test_equals_torch_math(heads: int, key_heads: int, kind: str) -> None:
    """Values and gradients in float64, grouped heads included."""
    leaves = [
        x.requires_grad_()
        for x in (draw(2, heads, 33, 8), draw(2, key_heads, 33, 8, seed=1), draw(2, key_heads, 33, 5, seed=2))
    ]
    mask, bias = draw(2, 1, 33, 33, seed=3) > -1, draw(1, heads, 33, 33, seed=4)
    mask[..., 0] = True  # torch gives NaN for a row without keys
    ours = {"full": {}, "causal": {"causal": True}, "mask": {"mask": mask}, "bias": {"bias": bias}}[kind]
    theirs = {"full": {}, "causal": {"is_causal": True}, "mask": {"attn_mask": mask}, "bias": {"attn_mask": bias}}[kind]
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(*leaves, **theirs, enable_gqa=True)
    out, _ = reference_attention(*leaves, **ours)
    dout = draw(*out.shape, seed=5)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def brute_force(q, k, v, case: Case, spec) -> tuple[torch.Tensor, torch.Tensor]:
    """One pair at a time, in Python floats: the contract read aloud."""
    (b, hq, sq, d), (_, hkv, sk, dv) = q.shape, v.shape
    out, lse = torch.zeros(b, hq, sq, dv, dtype=DOUBLE), torch.full((b, hq, sq), -math.inf, dtype=DOUBLE)
    left, right = case.window or (None, None)
    pick = lambda x, *at: x[tuple(min(i, n - 1) for i, n in zip(at, x.shape, strict=False))]  # noqa: E731
    for n, h, i in ((n, h, i) for n in range(b) for h in range(hq) for i in range(sq)):
        kv, stand, logits = h // (hq // hkv), i + sk - sq, {}
        for j in range(sk):
            hidden = case.causal and j > stand
            hidden |= left is not None and j < stand - left
            hidden |= right is not None and j > stand + right
            if spec.key_ranges is not None:
                lo, hi = pick(spec.key_ranges, n, h, i).tolist()
                hidden |= not lo <= j < hi
            if spec.mask is not None:
                hidden |= not bool(pick(spec.mask, n, h, i, j))
            if hidden:
                continue
            logit = sum(float(a) * float(c) for a, c in zip(q[n, h, i], k[n, kv, j], strict=True)) * d**-0.5
            logit = case.softcap * math.tanh(logit / case.softcap) if case.softcap else logit
            if spec.alibi_slopes is not None:
                logit -= float(spec.alibi_slopes[n, h]) * abs(stand - j)
            if spec.bias is not None:
                logit += float(pick(spec.bias, n, h, i, j))
            if spec.key_log_weight is not None:
                logit += float(pick(spec.key_log_weight, n, kv, j))
            logits[j] = logit
        total = sum(math.exp(x) for x in logits.values()) + (math.exp(float(spec.sinks[h])) if case.sinks else 0.0)
        if total:
            lse[n, h, i] = math.log(total)
            out[n, h, i] = sum(
                (math.exp(x) / total * v[n, kv, j] for j, x in logits.items()), torch.zeros(dv, dtype=DOUBLE)
            )
    return out, lse


SMALL = {"dtype": DOUBLE, "B": 2, "Hq": 4, "Hkv": 2, "D": 3, "Dv": 2}


@pytest.mark.parametrize(
    "case",
    [
        Case(**SMALL, Sq=7, Sk=11, causal=True),
        Case(**SMALL, Sq=11, Sk=7, causal=True, sinks=True),
        Case(**SMALL, Sq=9, Sk=9, window=(2, 1)),
        Case(**SMALL, Sq=5, Sk=9, window=(3, None), causal=True, alibi="bh"),
        Case(**SMALL, Sq=9, Sk=9, key_ranges="random", ranges_shape="bh", softcap=2.0),
        Case(**SMALL, Sq=9, Sk=9, key_ranges="hostile", ranges_shape="b", mask="bqk", sinks=True),
        Case(**SMALL, Sq=6, Sk=8, bias="hk-", key_log_weight="bh-", mask="k"),
        Case(**SMALL, Sq=6, Sk=8, softcap=3.0, bias="bq", key_log_weight="", alibi="bh", sinks=True, causal=True),
    ],
    ids=str,
)
def test_equals_a_loop_over_pairs(case: Case) -> None:
    """Windows, ranges, ALiBi, softcap, weights and sinks, singly and together."""
    inputs = make_inputs(case)
    out, lse = brute_force(inputs.q, inputs.k, inputs.v, case, inputs.spec)
    found = exact_attention(inputs, case)
    torch.testing.assert_close(found["out"], out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["lse"], lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_keys(sinks: bool) -> None:
    """out 0, lse -inf or the sink, gradients 0, the sink's gradient dlse."""
    case = Case(dtype=DOUBLE, key_ranges="empty", sinks=sinks, dlse=True, poison=True)
    inputs = make_inputs(case)
    found, blind = exact_attention(inputs, case), ~inputs.seen.any(-1)
    assert blind.any()
    assert not blind.all()
    assert (found["out"][blind] == 0).all()
    assert (found["dq"][blind] == 0).all()
    expected = inputs.spec.sinks[:, None].expand(2, 33)[blind[0]] if sinks else torch.tensor(-math.inf, dtype=DOUBLE)
    assert torch.equal(found["lse"][blind], expected.expand_as(found["lse"][blind]))
    if sinks:
        all_blind = make_inputs(Case(dtype=DOUBLE, Sk=0, sinks=True, dlse=True))
        gradient = exact_attention(all_blind, Case(dtype=DOUBLE, Sk=0, sinks=True, dlse=True))["dsinks"]
        torch.testing.assert_close(gradient, all_blind.dlse.sum((0, 2)))


def test_what_takes_no_part_may_be_nan() -> None:
    """Results of poisoned inputs equal those of clean ones, bit for bit."""
    options = {
        "key_ranges": "empty",
        "ranges_shape": "b",
        "B": 2,
        "Hq": 4,
        "Sk": 40,
        "mask": "bk",
        "key_log_weight": "bh-",
    }
    case = Case(**options, dtype=DOUBLE, sinks=True, dropout_p=0.2, dlse=True)
    poisoned = make_inputs(Case(**options, dtype=DOUBLE, sinks=True, dropout_p=0.2, dlse=True, poison=True))
    assert poisoned.k.isnan().any()
    assert poisoned.dout.isnan().any()
    clean, found = exact_attention(make_inputs(case), case), exact_attention(poisoned, case)
    for name in clean:
        assert torch.equal(found[name], clean[name]), name


def test_varlen_is_one_call_for_each_sequence() -> None:
    """Positions, ALiBi and dropout count from the start of each sequence; the batch coordinate is its index."""
    q, k, v = draw(9, 2, 4), draw(11, 2, 4, seed=1), draw(11, 2, 4, seed=2)
    options = {"causal": True, "dropout_p": 0.4, "dropout_seed": torch.tensor([9])}
    cu_q, cu_k = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 3, 5, 11])
    out, lse = reference_attention_varlen(q, k, v, cu_q, cu_k, alibi_slopes=torch.tensor([0.1, 0.3]), **options)
    rows, keys = slice(4, 9), slice(5, 11)
    one = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
    expected = reference_attention(*one, alibi_slopes=torch.tensor([0.1, 0.3]), dropout_offsets=(2, 0, 0, 0), **options)
    assert torch.equal(out[rows].transpose(0, 1), expected[0][0])
    assert torch.equal(lse[:, rows], expected[1][0])


# Random123's known answers for philox4x32-7 (kat_vectors): counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected) -> None:
    """The generator is the published one."""
    words = reference.philox4x32(tuple(torch.tensor(x) for x in counter), tuple(torch.tensor(x) for x in key))
    assert tuple(int(w) for w in words) == expected


def test_dropout_statistics_and_coordinates() -> None:
    """The share kept is the quantised one, bytes are taken in the documented order, offsets shift the mask."""
    at = lambda n, o=0: torch.arange(n) + o  # noqa: E731

    def mask(o: int = 0) -> torch.Tensor:
        batch, head = at(2)[:, None, None, None], at(3)[:, None, None]
        return dropout_keep(torch.tensor([77]), 0.3, batch, head, at(64, o)[:, None], at(99, o))

    keep = mask()
    share, expected = keep.double().mean().item(), 1 - round(256 * 0.3) / 256
    assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / keep.numel())
    assert torch.equal(mask(5)[..., :-5, :-5], keep[..., 5:, 5:])
    words = reference.philox4x32(tuple(torch.tensor(x) for x in (2, 7, 1, 0)), (torch.tensor(77), torch.tensor(0)))
    column = 2 * 16 + 13  # byte 13: the second of the fourth word
    assert bool(keep[0, 1, 7, column]) == (((int(words[3]) >> 8) & 0xFF) >= round(256 * 0.3))


def test_philox_agrees_with_triton() -> None:
    """Triton's generator, which the kernels use, gives the same four words."""
    tl = pytest.importorskip("triton.language")
    triton = pytest.importorskip("triton")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU or Triton's interpreter")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    @triton.jit
    def kernel(out_ptr, seed, N: tl.constexpr):
        i = tl.arange(0, N)
        words = tl.philox(seed, i.to(tl.uint32), (i * 7).to(tl.uint32), (i + 3).to(tl.uint32), (i * i).to(tl.uint32), 7)
        for n in tl.static_range(4):
            tl.store(out_ptr + n * N + i, words[n].to(tl.int64))

    seed, out = 0x123456789ABCDEF, torch.zeros(4, 16, dtype=torch.int64, device=device)
    kernel[(1,)](out, seed, 16)
    i = torch.arange(16)
    key = torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)
    assert torch.equal(out.cpu() & 0xFFFFFFFF, torch.stack(reference.philox4x32((i, i * 7, i + 3, i * i), key)))
