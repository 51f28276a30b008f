"""Rows of packed tensors outside every sequence get the promised value, and no other row is touched."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import poisoned_empty
from torch import Tensor

pytest.importorskip("triton")

from hf_flash_mc.ops.portable import launch
from hf_flash_mc.ops.portable import plan as plans
from hf_flash_mc.ops.portable.outside import fill_outside
from hf_flash_mc.ops.spec import Needs, Spec, Varlen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not plans.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before triton is imported"
)
TOTAL, HEADS, D, KEPT = 300, 3, 24, 7.0


def held(bounds: list[int], longest: int) -> Tensor:
    """Which of TOTAL rows lie in a sequence, one by one."""
    inside = torch.zeros(TOTAL, dtype=torch.bool)
    for start, stop in itertools.pairwise(bounds):
        inside[start : min(stop, start + longest)] = True
    return inside


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("bounds", "longest"),
    [
        ([0, TOTAL], TOTAL), ([5, 290], TOTAL), ([0, 0, 0, 130, 130, 299], TOTAL), ([3, 3], TOTAL), ([0, 100, 300], 90),
        (list(range(0, 296, 5)), TOTAL), ([0], TOTAL),
    ],
    ids=["all", "a gap at both ends", "empty sequences", "nothing", "longer than promised", "60 sequences", "none"],
)  # fmt: skip
def test_only_what_no_sequence_holds(bounds: list[int], longest: int, dtype: torch.dtype) -> None:
    cu = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    q = torch.zeros(TOTAL, HEADS, D, dtype=dtype, device=DEVICE)
    plan = plans.Plan(q, q, q, Spec(), Varlen(cu, cu, longest, longest))
    inside = held(bounds, longest).to(DEVICE)
    for shape, value in (((TOTAL, HEADS, D), 0.0), ((HEADS, TOTAL), float("-inf"))):
        x = torch.full(shape, KEPT, dtype=dtype, device=DEVICE)
        fill_outside(plan, x, cu, longest, value)
        rows = x if x.dim() == 3 else x.T
        assert (rows[inside] == KEPT).all()
        assert (rows[~inside] == value).all()


def test_bounds_that_go_back_stay_in_memory() -> None:
    """Whatever cu_seqlens says, nothing beyond the tensor is written, and the call ends."""
    memory = torch.full((3 * TOTAL, HEADS, D), KEPT, device=DEVICE)
    x = memory[TOTAL : 2 * TOTAL]
    cu = torch.tensor([50, -7, 2**31 - 1, 20, -(2**31), 400], dtype=torch.int32, device=DEVICE)
    plan = plans.Plan(x, x, x, Spec(), Varlen(cu, cu, TOTAL, TOTAL))
    fill_outside(plan, x, cu, TOTAL, 0.0)
    assert (memory[:TOTAL] == KEPT).all()
    assert (memory[2 * TOTAL :] == KEPT).all()


def test_kernels_outside_sequences() -> None:
    """The op checks cu_seqlens where that is no sync; on a GPU the kernels must make do with what comes."""
    varlen = Varlen(*[torch.tensor([2, 9, 20], dtype=torch.int32, device=DEVICE)] * 2, 11, 11)
    q, k, v, dout = (torch.randn(26, 2, 16, device=DEVICE) for _ in range(4))
    spec = Spec(causal=True)
    with poisoned_empty():
        out, lse = launch.forward(q, k, v, spec, varlen)
        grads = launch.backward(dout, None, q, k, v, out, lse, spec, Needs(), False, varlen)
    for x in (out, grads.dq, grads.dk, grads.dv):
        assert (x[:2] == 0).all()
        assert (x[20:] == 0).all()
        assert x[2:20].isfinite().all()
        assert (x[2:20] != 0).any()
    assert (lse[:, :2] == float("-inf")).all()
    assert (lse[:, 20:] == float("-inf")).all()
    assert lse[:, 2:20].isfinite().all()
