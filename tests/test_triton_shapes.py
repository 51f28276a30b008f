"""The Triton kernels for a few keys (windows, cross attention) and for a few queries (decoding, cross attention).

Interpreted on the CPU, where the tile table sends up to 32 keys to the first family; real on a GPU.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import Case, make_inputs, run_case

pytest.importorskip("triton")

import triton
import triton.language as tl
from test_triton import BF16, DEVICE, FP16, ONCE_WRONG

from hf_flash_mc.ops.portable import launch, plan, shapes
from hf_flash_mc.ops.portable.common import LOG2E, softmax_end
from hf_flash_mc.ops.spec import Needs, Spec

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not plan.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before triton is imported"
)
EVERYTHING = {
    "causal": True, "window": (40, None), "key_ranges": "padded", "ranges_shape": "b", "key_log_weight": "bh-",
    "alibi": "bh", "softcap": 4.0, "sinks": True, "dropout_p": 0.2, "dropout_offsets": (1, 2, 300, 37), "dlse": True,
    "poison": True,
}  # fmt: skip
FEW_KEYS = [
    Case(B=3, Sq=32, Sk=32, dtype=BF16, strides="bshd"),
    Case(B=2, Hq=4, Sq=13, Sk=17, D=40, Dv=24, causal=True, dlse=True, poison=True),
    Case(B=2, Hq=6, Sq=7, Sk=31, dtype=FP16, strides="sliced", key_ranges="packed", ranges_shape="bh", poison=True),
    Case(Hq=4, Sq=1, Sk=1, D=5, dlse=True),
    Case(Sq=40, Sk=9, key_ranges="empty", sinks=True, dlse=True, poison=True),
    Case(B=2, Hq=4, Sq=40, Sk=8, dtype=BF16, strides="bshd", dlse=True, key_log_weight="h-", poison=True),
    Case(Hq=4, Hkv=1, Sq=63, Sk=3, strides="expanded", window=(60, 50)),
    # compiled, m - sink * LOG2E was an FMA: rows that saw the sink alone were not known for what they were
    Case(B=3, Hq=6, Hkv=3, Sq=63, Sk=1, D=64, dtype=FP16, causal=True, window=(1, 5), key_ranges="full",
         ranges_shape="b", sinks=True, dlse=True, strides="expanded", aux_fp32=False, poison=True, seed=11216),
    Case(B=2, Hq=4, Sq=20, Sk=20, **EVERYTHING),
    Case(B=2, Hq=4, Sq=33, Sk=11, dtype=BF16, strides="lastdim", **EVERYTHING),
]
FEW_QUERIES = [
    Case(Hq=8, Sq=1, Sk=257, dtype=BF16, causal=True),
    Case(Hq=4, Sq=1, Sk=200, key_ranges="padded", ranges_shape="b", strides="bshd", poison=True),
    Case(Hq=8, Sq=3, Sk=129, D=40, Dv=24, dtype=FP16, causal=True, window=(50, None), strides="sliced", poison=True),
    Case(B=2, Hq=2, Sq=8, Sk=111, dtype=BF16, strides="bshd", dlse=True),
    Case(Hq=4, Sq=5, Sk=150, key_ranges="random", ranges_shape="h", dlse=True, poison=True),
    Case(Hq=8, Sq=16, Sk=65, key_ranges="hostile", ranges_shape="bh", sinks=True, poison=True),
    Case(Hq=4, Sq=2, Sk=180, key_log_weight="bh-", sinks=True, dlse=True, aux_fp32=False, poison=True),
    Case(Hq=4, Hkv=1, Sq=1, Sk=70, D=320, Dv=500, dtype=BF16, key_ranges="padded", ranges_shape="b", poison=True),
    Case(B=2, Hq=4, Sq=6, Sk=100, **EVERYTHING),
    Case(B=2, Hq=8, Sq=9, Sk=77, dtype=BF16, strides="lastdim", **EVERYTHING),
]


@triton.jit
def _end_of_rows(m_ptr, l_ptr, sink_ptr, lse_ptr, SIZE: tl.constexpr, F: tl.constexpr):
    at = tl.arange(0, SIZE)
    lse, _ = softmax_end(tl.load(m_ptr + at), tl.load(l_ptr + at), tl.load(sink_ptr + at), F)
    tl.store(lse_ptr + at, lse)


def test_a_row_of_the_sink_alone_is_known_however_its_weight_was_rounded() -> None:
    sink = torch.tensor([-3.3, 0.7, 9.1, 40.3, 0.7, 9.1, 40.3, 0.7], device=DEVICE)
    m = sink * LOG2E.value
    rounding = (m.abs() * 2**-24).clamp(min=2**-24)  # of m: what an FMA leaves of m - sink * LOG2E
    l = 1 + rounding * torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0, 8.0, 1e3, 1e6], device=DEVICE)
    lse = torch.empty_like(m)
    few = plan_of(Case(Sq=1, Sk=1, D=16, sinks=True))
    _end_of_rows[(1,)](m, l, sink, lse, 8, shapes._Call(few, "few_keys_fwd", None).features)
    assert (lse == sink).tolist() == [True] * 5 + [False] * 3
    assert torch.allclose(lse, (m + l.log2()) / LOG2E.value)


def plan_of(case: Case) -> plan.Plan:
    inputs = make_inputs(case, DEVICE)
    return plan.plan_of(inputs.q, inputs.k, inputs.v, inputs.spec, inputs.varlen)


@pytest.mark.parametrize(
    ("family", "case"), [*(("few_keys", c) for c in FEW_KEYS), *(("few_queries", c) for c in FEW_QUERIES)], ids=str
)
def test_agrees_with_float64(family: str, case: Case) -> None:
    assert [shapes.choose(plan_of(case), way) for way in ("fwd", "bwd")] == [family, family]
    run_case(case, "triton", DEVICE)


@pytest.mark.parametrize("case", ONCE_WRONG.values(), ids=ONCE_WRONG.keys())
def test_calls_that_went_wrong_in_the_general_kernels(case: Case) -> None:
    run_case(case, "triton", DEVICE)


@pytest.mark.parametrize(
    "case",
    [
        Case(Hkv=1, Sq=1, Sk=70, causal=True, sinks=True, dlse=True),
        Case(Hkv=1, Sq=3, Sk=70, key_ranges="empty", sinks=True, dlse=True, poison=True),
        Case(Hkv=1, Sq=5, Sk=50, key_log_weight="bh-", dropout_p=0.3, dtype=BF16),
        Case(Hkv=1, Sq=40, Sk=20, key_log_weight="bh", dlse=True),
    ],
    ids=str,
)
def test_every_split_count_gives_the_same_values(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to one tile for each split, and twice the same bits."""
    monkeypatch.setattr(shapes, "TILES_PER_SPLIT", 1)
    inputs = make_inputs(case, DEVICE)
    call = (inputs.q, inputs.k, inputs.v)
    needs = Needs(dkey_log_weight=True, dsinks=True)
    try:
        for programs in (2, 1000):
            monkeypatch.setattr(shapes, "PROGRAMS", programs)
            plan.forget()
            run_case(case, "triton", DEVICE)
            both = []
            for _ in range(2):
                out, lse = launch.forward(*call, inputs.spec)
                both.append((out, lse, *launch.backward(inputs.dout, None, *call, out, lse, inputs.spec, needs, False)))
            assert all(torch.equal(a, b) for a, b in zip(*both, strict=True) if a is not None)
    finally:
        plan.forget()


def test_long_calls_are_split() -> None:
    """By their shapes alone, into no more parts than make up the programs wanted."""
    q, k = torch.zeros(1, 8, 1, 16, device=DEVICE), torch.zeros(1, 2, 4096, 16, device=DEVICE)
    decode = shapes._Call(plan.plan_of(q, k, k, Spec(), None), "few_queries_fwd", None)
    assert 16 <= decode.splits <= shapes.MAX_SPLITS
    assert decode.splits * decode.per_split >= decode.tiles > (decode.splits - 1) * decode.per_split
    many = plan.plan_of(
        q.expand(2000, -1, -1, -1), k.expand(2000, -1, -1, -1), k.expand(2000, -1, -1, -1), Spec(), None
    )
    assert shapes._Call(many, "few_queries_bwd", None).splits == 1


@pytest.mark.parametrize("sizes", [(8, 8), (40, 8), (4, 200)], ids=str)
def test_a_window_keeps_its_nan(sizes: tuple[int, int]) -> None:
    """NaN in what rows of one batch entry see reaches neither outputs nor gradients of the others."""
    inputs = make_inputs(Case(B=3, Sq=sizes[0], Sk=sizes[1]), DEVICE)
    call = [x.clone() for x in (inputs.q, inputs.k, inputs.v)]
    for x in call:
        x[1] = float("nan")
    out, lse = launch.forward(*call, inputs.spec)
    found = launch.backward(inputs.dout, None, *call, out, lse, inputs.spec, Needs(), True)
    for x in (out, lse, *found[:3]):
        assert x is not None
        assert x[[0, 2]].isfinite().all()
        assert x[1].isnan().any()


@pytest.mark.parametrize(
    "case",
    [Case(Sk=8, mask="q"), Case(Sk=8, bias="hk"), Case(varlen=((5, 9), (3, 3))), Case(Sq=33, Sk=65, Hq=8)],
    ids=["mask", "bias", "packed", "many rows and keys"],
)
def test_the_rest_goes_to_the_general_kernels(case: Case) -> None:
    assert shapes.choose(plan_of(case), "fwd") is None
    assert shapes.choose(plan_of(case), "bwd") is None


def test_forward_and_backward_may_come_from_different_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They meet in out and lse alone."""
    case = Case(Sq=20, Sk=20, sinks=True, dlse=True, causal=True)
    choose = shapes.choose
    for way in ("fwd", "bwd"):
        monkeypatch.setattr(shapes, "choose", lambda p, w, way=way: choose(p, w) if w == way else None)
        run_case(dataclasses.replace(case, dtype=BF16), "triton", DEVICE)
