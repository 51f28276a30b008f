"""The Hopper backward, run in the emulator: every gradient of every feature against float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from gluon_emulator import emulated
from helpers import Case, check_bound, exact_attention, make_inputs, naive_attention, poisoned_empty

from hf_flash_mc.ops.hopper import backward_launch
from hf_flash_mc.ops.hopper.backward import Schedule
from hf_flash_mc.ops.portable import launch as portable
from hf_flash_mc.ops.portable import plan
from hf_flash_mc.ops.spec import Needs

BF16 = {"dtype": torch.bfloat16, "B": 1, "Hq": 2, "Hkv": 1, "D": 64, "strides": "bshd"}


def run_backward(case: Case, schedule: Schedule | None = None, seed: int = 0) -> None:
    inputs = make_inputs(case)
    q, k, v, spec, varlen = inputs.q, inputs.k, inputs.v, inputs.spec, inputs.varlen
    needs = Needs(dkey_log_weight=spec.key_log_weight is not None, dsinks=spec.sinks is not None)
    assert not backward_launch.unsupported_backward(q, k, v, spec, needs, False, varlen)
    plan.forget()
    with emulated(backward_launch, "attn_bwd_hopper_kernel", seed=seed), poisoned_empty():
        out, lse = portable.forward(q, k, v, spec, varlen)
        configs = {"bwd": schedule} if schedule else None
        found = backward_launch.backward(
            inputs.dout, inputs.dlse, q, k, v, out, lse, spec, needs, False, varlen, configs
        )
    plan.forget()
    exact, (native, rounding) = exact_attention(inputs, case), naive_attention(inputs, case)
    for name, x in found._asdict().items():
        if x is not None:
            label = f"hopper: {case!r} {schedule}"
            check_bound(name, x, exact[name], native[name], case.dtype, label, rounding.get(name, 0.0))


CASES = [
    Case(**BF16, Sq=128, Sk=128),
    Case(**BF16, Sq=130, Sk=257),
    Case(**BF16, Sq=257, Sk=70, causal=True, poison=True),
    Case(**BF16, Sq=190, Sk=190, causal=True, dlse=True),
    Case(**{**BF16, "D": 128}, Sq=140, Sk=200, causal=True),
    Case(**{**BF16, "D": 128, "Hq": 1}, Sq=300, Sk=130),
    Case(**BF16, Sq=70, Sk=300, causal=True, window=(100, None), poison=True),
    Case(**BF16, Sq=200, Sk=200, causal=True, window=(30, None), poison=True),
    Case(**BF16, Sq=111, Sk=201, window=(40, 25), poison=True),
    Case(**BF16, Sq=1, Sk=1),
    Case(**{**BF16, "dtype": torch.float16, "Hkv": 2}, Sq=65, Sk=129, causal=True),
    Case(**{**BF16, "B": 2}, Sq=150, Sk=150, key_ranges="padded", ranges_shape="b", poison=True),
    Case(**{**BF16, "D": 128}, Sq=150, Sk=190, key_ranges="packed", causal=True, poison=True),
    Case(**{**BF16, "Hkv": 2}, Sq=150, Sk=150, key_ranges="random", ranges_shape="h", poison=True),
    Case(**BF16, Sq=140, Sk=140, key_ranges="empty", poison=True),
    Case(**BF16, Sq=70, Sk=140, key_ranges="hostile", ranges_shape="b", poison=True),
    Case(**BF16, Sq=130, Sk=130, causal=True, softcap=2.0),
    Case(**BF16, Sq=130, Sk=70, sinks=True, causal=True),
    Case(**{**BF16, "B": 2}, Sq=70, Sk=130, alibi="bh", causal=True),
    Case(**BF16, Sq=70, Sk=200, key_log_weight="h", causal=True),
    Case(**BF16, Sq=70, Sk=200, key_log_weight="b-", poison=True),
    Case(**BF16, Sq=70, Sk=130, dropout_p=0.3, dropout_offsets=(1, 2, 3, 20)),
    Case(**{**BF16, "strides": "sliced"}, Sq=70, Sk=130, causal=True),
    Case(**{**BF16, "strides": "bhsd", "B": 2}, Sq=70, Sk=130),
    Case(**{**BF16, "D": 72, "Dv": 40}, Sq=70, Sk=130, causal=True),
    Case(**{**BF16, "D": 96}, Sq=70, Sk=130),
    Case(**BF16, Sq=150, Sk=150, causal=True, key_ranges="packed", softcap=3.0, sinks=True, alibi="h",
         key_log_weight="h-", dropout_p=0.2, scale=0.3, poison=True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case) -> None:
    run_backward(case)
