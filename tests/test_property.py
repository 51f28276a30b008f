"""Every back end against the float64 reference, over calls that hypothesis draws.

``HF_FLASH_MC_CASES`` sets the number of draws for each back end and ``HF_FLASH_MC_REPEATS`` how often each is run, with
other lengths and values: on a GPU a draw compiles some five kernels, and repeats share them. 3072 cases in 6 minutes:
``HF_FLASH_MC_CASES=128 HF_FLASH_MC_REPEATS=24 HF_FLASH_MC_SHARDS=16 pytest tests/test_property.py -o timeout=600 -n 16
-k triton``.
Of the draws for triton, those with an odd seed run on the general kernels alone (``shapes.ENABLED``).
The draws are deterministic; a failure prints the ``Case`` to run again with ``helpers.run_case``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import random

import pytest
import torch
from helpers import Case, run_case
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

CASES = {"reference": 60, "cpu": 150, "triton": 90, "hopper": 48}
SHARDS = int(os.environ.get("HF_FLASH_MC_SHARDS", "6"))  # tests that pytest-xdist can spread
REPEATS = int(os.environ.get("HF_FLASH_MC_REPEATS", "1"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
SIZES = [1, 2, 15, 17, 33, 63, 64, 65, 111, 129, *([257, 300, 513] if HAS_GPU else [])]
HEAD_DIMS = [16, 16, 16, 64, 64, 1, 2, 5, 8, 24, 37, 40, 72, 80, 96, 100, 128, 192, 256, 320, 512]  # mostly small
RANGES = ["causal", "full", "padded", "packed", "random", "empty", "hostile"]


def letters(of: str) -> st.SearchStrategy[str]:
    """Which dimensions are not broadcast."""
    return st.tuples(*(st.booleans() for _ in of)).map(
        lambda keep: "".join(x for x, k in zip(of, keep, strict=True) if k)
    )


def maybe(strategy: st.SearchStrategy, share: int = 4) -> st.SearchStrategy:
    """None, or one time in ``share`` a value."""
    return st.integers(1, share).flatmap(lambda n: strategy if n == share else st.none())


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], budget: float) -> Case:
    """Any call of the op contract, of at most ``budget`` tiles of 32 x 32 over all heads, of head dims up to 128."""
    key_heads, packed = draw(st.sampled_from([1, 2, 3])), draw(st.integers(0, 4)) == 0
    batch, heads, dims = ("", "h", "") if packed else ("b", "bh", "bhqk")
    minus = st.sampled_from(["", "", "-"])
    lengths = st.tuples(st.sampled_from([0, 1, 5, 33, 70]), st.sampled_from([0, 1, 7, 40, 66]))
    bound = st.one_of(st.none(), st.sampled_from([0, 1, 5, 40]))
    case = Case(
        dtype=draw(st.sampled_from(dtypes)),
        B=draw(st.sampled_from([1, 2, 3])),
        Hq=key_heads * draw(st.sampled_from([1, 2, 4])),
        Hkv=key_heads,
        Sq=draw(st.sampled_from(SIZES)),
        Sk=draw(st.sampled_from(SIZES)),
        D=draw(st.sampled_from(HEAD_DIMS)),
        Dv=draw(maybe(st.sampled_from([1, 16, 40, 80, 128]))),
        causal=draw(st.booleans()),
        window=draw(maybe(st.tuples(bound, bound))),
        key_ranges=draw(maybe(st.sampled_from(RANGES), 2)),
        ranges_shape=draw(letters(batch + "h")),
        mask=None if packed else draw(maybe(letters(dims))),
        bias=None if packed else draw(maybe(st.tuples(letters(dims), minus).map("".join))),
        key_log_weight=draw(maybe(st.tuples(letters(heads), minus).map("".join))),
        alibi=draw(maybe(st.sampled_from(["h", "bh"]))),
        softcap=draw(maybe(st.sampled_from([2.0, 10.0]))),
        sinks=draw(st.integers(0, 3)) == 0,
        scale=draw(maybe(st.sampled_from([0.05, 0.4]))),
        dropout_p=draw(maybe(st.sampled_from([0.1, 0.5]))) or 0.0,
        dropout_offsets=draw(st.sampled_from([(0, 0, 0, 0), (1, 2, 300, 37)])),
        dlse=draw(st.booleans()),
        strides=draw(st.sampled_from(["bhsd", "bshd", "sliced", "expanded", "lastdim"])),
        aux_fp32=draw(st.booleans()),
        poison=draw(st.booleans()),
        varlen=tuple(draw(st.lists(lengths, min_size=1, max_size=4))) if packed else None,
        deterministic=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    lengths = case.varlen if case.varlen is not None else ((case.Sq, case.Sk),)
    tiles = sum((sq // 32 + 1) * (sk // 32 + 1) for sq, sk in lengths) * max(1, case.D // 128)
    if case.B * case.Hq * tiles > budget:
        case = dataclasses.replace(case, B=1, Hkv=1, Hq=min(case.Hq // case.Hkv, max(1, int(budget / tiles))))
    return case


def redraw(case: Case, again: int) -> Case:
    """The same call with other lengths and values; what decides which kernels run stays.

    But for packed sequences of which one is long: their tiles are counted in another way (see ``items_of``).
    """
    pick = random.Random(f"{case.seed} {again}")
    sq, sk = pick.choice(SIZES), pick.choice(SIZES)
    if case.Sq == case.Sk:
        sk = sq
    varlen = None if case.varlen is None else tuple(pick.sample(case.varlen, len(case.varlen)))
    if varlen is not None and again % 3 == 2:
        varlen = (*varlen, (300, 290), *((n, n + 2) for n in range(1, 13)))
    return dataclasses.replace(
        case,
        seed=case.seed + 1000 * again,
        Sq=sq,
        Sk=sk,
        key_ranges=None if case.key_ranges is None else pick.choice(RANGES),
        poison=pick.random() < 0.5,
        varlen=varlen,
    )


def for_hopper(case: Case) -> Case:
    """The nearest call that the Hopper kernels take: no dense tiles, and rows of a multiple of 16 bytes."""
    d, dv = (None if n is None else min(-(-n // 8) * 8, 256) for n in (case.D, case.Dv))
    strides = case.strides if case.strides in ("bhsd", "bshd") else "bshd"
    lengths = case.varlen
    if lengths is not None and not all(
        map(sum, zip(*lengths, strict=True))
    ):  # no query or no key: ends above back ends
        lengths = (*lengths, (5, 7))
    return dataclasses.replace(case, D=d, Dv=dv, strides=strides, mask=None, bias=None, varlen=lengths)


def backends() -> list[str]:
    """What can run here: triton needs a GPU, or its interpreter; hopper a GPU of compute capability 9.0."""
    triton = (HAS_GPU or INTERPRETED) and all(
        importlib.util.find_spec(x) for x in ("triton", "hf_flash_mc.ops.portable", "hf_flash_mc.ops.portable.launch")
    )
    hopper = triton and HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
    return ["reference", "cpu", *(["triton"] if triton else []), *(["hopper"] if hopper else [])]


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("impl", backends())
def test_agrees_with_float64(impl: str, shard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, lse and all gradients, through the back end's functions and through autograd."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    drawn: list[Case] = []
    device = "cuda" if impl in ("triton", "hopper") and HAS_GPU else "cpu"
    dtypes = {"triton": dtypes, "hopper": dtypes[1:]}.get(impl, (*dtypes, torch.float64))

    @seed(shard)
    @settings(
        max_examples=1 + max(1, int(os.environ.get("HF_FLASH_MC_CASES", CASES[impl])) // SHARDS),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),  # shrinking in the interpreter takes minutes, and a Case is readable as it is
    )
    @given(case=cases(dtypes, 16 if impl == "triton" and INTERPRETED else math.inf), public=st.booleans())
    def check(case: Case, public: bool) -> None:
        drawn.append(case)
        if len(drawn) == 1 and shard:  # hypothesis begins with the simplest call of all, in every shard
            return
        if impl == "hopper":
            case = for_hopper(case)
        if impl == "triton":
            monkeypatch.setattr("hf_flash_mc.ops.portable.shapes.ENABLED", case.seed % 2 == 0)
        run_case(case, impl, device, public)
        for again in range(1, REPEATS):
            run_case(redraw(case, again), impl, device, public)

    check()
