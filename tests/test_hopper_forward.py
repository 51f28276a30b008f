"""The Hopper forward, run in the emulator: values and lse of every feature against float64, and what it refuses."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from gluon_emulator import emulated
from helpers import Case, check_bound, exact_attention, make_inputs, naive_attention, poisoned_empty

from hf_flash_mc.ops.hopper import launch
from hf_flash_mc.ops.hopper.plan import HopperConfig
from hf_flash_mc.ops.portable import plan

BF16 = {"dtype": torch.bfloat16, "B": 1, "Hq": 2, "Hkv": 1, "D": 64, "strides": "bshd"}
TWO, THREE = HopperConfig(2, 64, 2, True), HopperConfig(3, 64, 2, False)


def run_forward(case: Case, config: HopperConfig | None = TWO, seed: int = 0) -> None:
    inputs = make_inputs(case)
    plan.forget()
    with (
        emulated(launch, "attn_fwd_hopper_kernel", seed=seed),
        mock.patch.object(launch, "EMULATED", True),
        poisoned_empty(),
    ):
        out, lse = launch.forward(
            inputs.q, inputs.k, inputs.v, inputs.spec, inputs.varlen, {"fwd": config} if config else None
        )
    plan.forget()
    exact, (native, _) = exact_attention(inputs, case), naive_attention(inputs, case)
    for name, found in (("out", out), ("lse", lse)):
        check_bound(name, found, exact[name], native[name], case.dtype, f"hopper: {case!r}")


CASES = [
    Case(**BF16, Sq=128, Sk=128),
    Case(**BF16, Sq=130, Sk=257),
    Case(**BF16, Sq=257, Sk=70, causal=True),
    Case(**BF16, Sq=190, Sk=190, causal=True),
    Case(**BF16, Sq=70, Sk=300, causal=True, poison=True),
    Case(**BF16, Sq=200, Sk=200, causal=True, window=(30, None), poison=True),
    Case(**BF16, Sq=111, Sk=201, window=(40, 25), poison=True),
    Case(**BF16, Sq=1, Sk=1),
    Case(**{**BF16, "dtype": torch.float16, "Hkv": 2}, Sq=65, Sk=129, causal=True),
    Case(**{**BF16, "B": 2}, Sq=150, Sk=150, key_ranges="padded", ranges_shape="b", poison=True),
    Case(**BF16, Sq=150, Sk=190, key_ranges="packed", causal=True, poison=True),
    Case(**BF16, Sq=150, Sk=150, key_ranges="random", ranges_shape="h", poison=True),
    Case(**BF16, Sq=140, Sk=140, key_ranges="empty", poison=True),
    Case(**BF16, Sq=70, Sk=140, key_ranges="hostile", ranges_shape="bh", poison=True),
    Case(**BF16, Sq=130, Sk=130, causal=True, softcap=2.0),
    Case(**BF16, Sq=130, Sk=70, sinks=True, causal=True),
    Case(**{**BF16, "B": 2}, Sq=70, Sk=130, alibi="bh", causal=True),
    Case(**BF16, Sq=70, Sk=200, key_log_weight="h", causal=True),
    Case(**BF16, Sq=70, Sk=200, key_log_weight="b-", poison=True),
    Case(**BF16, Sq=70, Sk=130, dropout_p=0.3, dropout_offsets=(1, 2, 3, 20)),
    Case(**{**BF16, "strides": "sliced"}, Sq=70, Sk=130, causal=True),
    Case(**{**BF16, "strides": "bhsd", "B": 2}, Sq=70, Sk=130),
    Case(**{**BF16, "D": 72, "Dv": 40}, Sq=70, Sk=130, causal=True),
    Case(**{**BF16, "D": 40, "Dv": 96}, Sq=70, Sk=70),
    Case(**{**BF16, "D": 128}, Sq=140, Sk=140, causal=True),
    Case(**{**BF16, "D": 256}, Sq=70, Sk=100, causal=True),
    Case(**BF16, varlen=((70, 70), (0, 5), (130, 200), (1, 0), (30, 30))),
    Case(**BF16, varlen=((70, 130), (130, 70)), causal=True, window=(50, None), poison=True),
    Case(**BF16, varlen=((70, 70), (90, 60)), key_ranges="packed", key_log_weight="h", sinks=True, alibi="bh"),
    Case(**BF16, Sq=150, Sk=150, causal=True, key_ranges="packed", softcap=3.0, sinks=True, alibi="h",
         key_log_weight="h-", dropout_p=0.2, scale=0.3, poison=True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case) -> None:
    run_forward(case)


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[5], CASES[11], CASES[26]], ids=str)
def test_three_warpgroups_and_other_timing(case: Case) -> None:
    run_forward(case, THREE, seed=1)
    run_forward(case, HopperConfig(2, 32, 3, False, split=False), seed=2)


def test_the_table_itself() -> None:
    """The tile sizes that users get."""
    run_forward(Case(**{**BF16, "D": 128}, Sq=300, Sk=300, causal=True), None)
    run_forward(dataclasses.replace(CASES[5], Sq=300, Sk=300), None)
