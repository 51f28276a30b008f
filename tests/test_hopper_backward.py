"""The Hopper backward, run in the emulator: every gradient of every feature against float64, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import gluon_emulator
from gluon_emulator import emulated
from helpers import Case, check_bound, exact_attention, make_inputs, naive_attention, poisoned_empty

from hf_flash_mc.ops.hopper import backward, backward_launch, backward_wide
from hf_flash_mc.ops.hopper import plan as hopper_plan
from hf_flash_mc.ops.hopper.backward_tiles import Schedule
from hf_flash_mc.ops.portable import launch as portable
from hf_flash_mc.ops.portable import plan
from hf_flash_mc.ops.spec import Needs

BF16 = {"dtype": torch.bfloat16, "B": 1, "Hq": 2, "Hkv": 1, "D": 64, "strides": "bshd"}


WIDE = {**BF16, "D": 256}


def run_backward(case: Case, schedule: Schedule | None = None, seed: int = 0) -> None:
    """All gradients that the case has, with dlse where it says so."""
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
    Case(**BF16, Sq=130, Sk=257),
    Case(**BF16, Sq=257, Sk=70, causal=True, poison=True),
    Case(**BF16, Sq=190, Sk=190, causal=True, dlse=True),
    Case(**{**BF16, "D": 128, "B": 2, "strides": "bhsd"}, Sq=70, Sk=200, causal=True),
    Case(**{**BF16, "D": 128, "Hq": 1}, Sq=300, Sk=130),
    Case(**BF16, Sq=70, Sk=300, causal=True, window=(100, None), poison=True),
    Case(**BF16, Sq=111, Sk=201, window=(40, 25), poison=True),
    Case(**BF16, Sq=1, Sk=1),
    Case(**{**BF16, "dtype": torch.float16, "Hkv": 2}, Sq=65, Sk=129, causal=True),
    Case(**{**BF16, "B": 2}, Sq=150, Sk=150, key_ranges="padded", ranges_shape="b", poison=True),
    Case(**{**BF16, "D": 128}, Sq=150, Sk=190, key_ranges="packed", causal=True, poison=True),
    Case(**{**BF16, "Hkv": 2}, Sq=150, Sk=150, key_ranges="random", ranges_shape="h", poison=True),
    Case(**BF16, Sq=140, Sk=140, key_ranges="empty", poison=True),
    Case(**BF16, Sq=70, Sk=140, key_ranges="hostile", ranges_shape="b", poison=True),
    Case(**BF16, Sq=130, Sk=130, causal=True, softcap=2.0),
    Case(**BF16, Sq=130, Sk=70, sinks=True, causal=True, poison=True),
    Case(**{**BF16, "B": 2}, Sq=70, Sk=130, alibi="bh", causal=True),
    Case(**BF16, Sq=70, Sk=200, key_log_weight="b-", poison=True),
    Case(**{**BF16, "strides": "sliced"}, Sq=70, Sk=130, dropout_p=0.3, dropout_offsets=(1, 2, 3, 20)),
    Case(**{**BF16, "strides": "sliced"}, Sq=70, Sk=130, dropout_p=0.6, dropout_offsets=(1, 2, 3, 48)),
    Case(**{**BF16, "D": 72, "Dv": 40}, Sq=70, Sk=130, causal=True),
    Case(**BF16, Sq=150, Sk=150, causal=True, key_ranges="packed", softcap=3.0, sinks=True, alibi="h",
         key_log_weight="h-", dropout_p=0.2, scale=0.3, poison=True),
    Case(**{**BF16, "dtype": torch.float16}, Sq=70, Sk=130, causal=True, softcap=3.0),
    Case(**BF16, varlen=((70, 70), (0, 5), (130, 200), (1, 0), (30, 30)), dlse=True),
    Case(**{**BF16, "D": 128}, varlen=((70, 130), (130, 70), (65, 64)), causal=True, poison=True),
    Case(**BF16, varlen=((70, 130), (130, 70)), causal=True, window=(50, None), sinks=True, poison=True),
    Case(**{**BF16, "D": 72, "Dv": 40}, varlen=((70, 70), (90, 60)), key_log_weight="h-", softcap=3.0, alibi="bh",
         dropout_p=0.2, poison=True),
    Case(**WIDE, Sq=150, Sk=130, causal=True, poison=True),
    Case(**WIDE, Sq=70, Sk=200, dlse=True),
    Case(**WIDE, Sq=140, Sk=140, causal=True, window=(30, None), key_ranges="packed", key_log_weight="h-", sinks=True,
         softcap=3.0, poison=True),
    Case(**{**WIDE, "D": 192, "Dv": 128}, Sq=70, Sk=130, alibi="h", dropout_p=0.3, dropout_offsets=(0, 0, 0, 16)),
    Case(**{**WIDE, "D": 136, "dtype": torch.float16}, varlen=((70, 130), (0, 5), (130, 70)), causal=True, poison=True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Case) -> None:
    run_backward(case)


SCHEDULES = [
    Schedule(AHEAD=True, K_REGS=True),
    Schedule(SUBS=2, AHEAD=True, SPLIT=True),
    Schedule(SUBS=2, STAGES=3, K_REGS=True),
    Schedule(SPLIT=True),
]
LONG = Case(**{**BF16, "Hq": 1}, Sq=330, Sk=130, causal=True)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules(schedule: Schedule) -> None:
    run_backward(LONG, schedule, seed=1)


def test_key_tiles_of_several_heads_together() -> None:
    """Four heads in two sections."""
    with mock.patch.object(hopper_plan, "heads_together", return_value=2):
        run_backward(Case(**{**BF16, "Hq": 4, "Hkv": 4}, Sq=300, Sk=300, causal=True))


@pytest.mark.parametrize("schedule", [None, Schedule(SPLIT=True)])
def test_packed_tiles_behind_each_other(schedule: Schedule | None) -> None:
    """One long sequence among short and empty ones: see packed_tile."""
    lengths = ((290, 300), *((n + 2, n) for n in range(1, 13)), (3, 0), (0, 4), (0, 0), (1, 130))
    case = Case(**{**BF16, "Hq": 4, "Hkv": 2}, varlen=lengths, causal=schedule is None, poison=True)
    run_backward(case, schedule, seed=1)


def test_packed_sequences_whose_key_tiles_are_shared() -> None:
    run_backward(Case(**BF16, varlen=((70, 130), (130, 70)), causal=True, poison=True), Schedule(SPLIT=True))


# what a mistake would look like -> (in the source, instead)
MUTANTS = {
    "queries released before dK has read them": (
        "            ds16 = ds.to(dtype)\n",
        "            ds16 = ds.to(dtype)\n            bar_arrive(FREE + stage, 288)\n",
        "            dq = warpgroup_mma_wait(1, deps=(dq_t,))\n            bar_arrive(FREE + stage, 288)\n",
        "            dq = warpgroup_mma_wait(1, deps=(dq_t,))\n",
    ),
    "the producer does not wait": (
        "                if done >= STAGES:\n                    bar_sync(FREE + stage, 288)\n",
        "",
    ),
    "the producer does not wait for the keys": (
        "            if items > 0:\n                bar_sync(KEYS_FREE, 288)\n            record",
        "            record",
        "        bar_arrive(KEYS_FREE, 288)\n",
        "",
        "    if items > 0:\n        bar_sync(KEYS_FREE, 288)\n    record_s.store(pack_record((-1,)))",
        "    record_s.store(pack_record((-1,)))",
    ),
    "a consumer waits for the wrong phase": (
        "mbarrier.wait(do_full.index(stage), phase)",
        "mbarrier.wait(do_full.index(stage), phase ^ 1)",
    ),
    "warpgroups do not meet": ("            bar_sync(ALL, 256)\n            dq_t", "            dq_t"),
    "dK stored before both halves are written": (
        "        bar_sync(ALL, 256)\n        k_tile",
        "        k_tile",
    ),
    "a half taken before it was given": (
        "            bar_sync(GIVEN + t % 2 * 2 + 1 - CID, 256)\n",
        "            pass\n",
    ),
    "one slot for the logits' gradients": ("ds_slot = t % 2 * SUBS", "ds_slot = 0"),
    "keys overwritten while they are read": ("    bar_sync(ALL, 256)  # nobody", "    pass  # nobody"),
    "dQ overwritten before it was added": (
        "    tma_store_wait(0)\n    dq_out",
        "    dq_out",
    ),
    "no fence before dQ is added": (
        "    dq_out.store(dq)\n    fence_async_shared()\n",
        "    dq_out.store(dq)\n",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulator sees what goes wrong on a GPU only now and then."""
    mutant = altered(backward, MUTANTS[name], tmp_path)
    monkeypatch.setattr(gluon_emulator, "TIMEOUT", 2.0)
    with mock.patch.object(backward_launch, "attn_bwd_hopper_kernel", mutant.attn_bwd_hopper_kernel):
        expect_failure(LONG, Schedule(AHEAD="given" in name), name)


def altered(module: ModuleType, changes: tuple[str, ...], folder: Path) -> ModuleType:
    """The module, with every other text of ``changes`` in place of the one before it, which its source has once."""
    source = Path(module.__file__).read_text()
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    path = folder / "mutant.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("hf_flash_mc.ops.hopper.mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant


def expect_failure(case: Case, schedule: Schedule | None, name: str) -> None:
    for seed in range(32):  # a mistake shows in some orders of the warps only
        try:
            run_backward(case, schedule, seed)
        except AssertionError:  # of the emulator, or of the error bound
            return
    pytest.fail(f"not noticed: {name}")


WIDE_MUTANTS = {
    "products before both halves are written": ("        bar_sync(ALL, 256)\n        dv = ", "        dv = "),
    "no fence behind weights and gradients": (
        "        fence_async_shared()\n        bar_sync(ALL, 256)\n        dv",
        "        bar_sync(ALL, 256)\n        dv",
    ),
    "dout released before dV has read it": (
        "        dv = warpgroup_mma_wait(PASSES + 2, deps=(dv,))\n        bar_arrive(DO_FREE, 288)\n",
        "        bar_arrive(DO_FREE, 288)\n        dv = warpgroup_mma_wait(PASSES + 2, deps=(dv,))\n",
    ),
    "one slot for weights and gradients": ("slot = t % 2", "slot = 0"),
    "dQ overwritten before it was added": ("    tma_store_wait(0)\n    dq_out", "    dq_out"),
}


@pytest.mark.parametrize("name", WIDE_MUTANTS)
def test_mistakes_with_wide_heads_are_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_emulator, "TIMEOUT", 2.0)
    mutant = altered(backward_wide, WIDE_MUTANTS[name], tmp_path)
    with mock.patch.object(backward, "consume_wide", mutant.consume_wide):
        expect_failure(Case(**{**WIDE, "Hq": 1}, Sq=330, Sk=70, causal=True), None, name)


VARIANTS = ("64-causal", "128-causal", "128-ranges", "128-dropout", "256-causal")
# what an item is, kept beside its walk: stored once an item, read in its steps twice at most by Triton 3.6's code
SPILLS = {
    ("64-causal", "3.9"): 17, ("128-causal", "3.6"): 50, ("128-causal", "3.9"): 154, ("128-ranges", "3.6"): 93,
    ("128-ranges", "3.9"): 175, ("128-dropout", "3.6"): 94, ("128-dropout", "3.9"): 238, ("256-causal", "3.6"): 118,
    ("256-causal", "3.9"): 186,
}  # fmt: skip


def test_compiles_for_sm90() -> None:
    """Within shared memory and the known spills, and ptxas did not put a wait behind every product."""
    command = [sys.executable, str(Path(__file__).with_name("compile_hopper_backward.py")), *VARIANTS]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(VARIANTS)
    for costs in found:
        assert costs["spills"] <= SPILLS.get((costs["variant"], costs["triton"][:3]), 0), costs
        assert costs["shared"] <= 232448, costs
        assert costs["registers"] <= 168, costs
        assert costs["unset"] == 0, costs
        assert costs["products"] >= 80, costs
        assert costs["multiplies"] <= 150, costs  # a call of dropout's generator for each two elements took 682
        assert costs["waits"] < costs["products"] / 4, costs
        wide = costs["variant"].startswith("256")
        assert costs["reduces"] == (4 if wide else 2), costs
        assert max(set(costs["barriers"]) - {7, 12, 13}) < 4, costs  # ours are 4 to 13


@pytest.mark.parametrize(
    ("change", "word"),
    [
        pytest.param({"dtype": torch.float32}, "dtype", id="float32"),
        pytest.param({"D": 264}, "head dims", id="wide"),
        pytest.param({"D": 160, "Dv": 64}, "beside one above 128", id="wide-and-narrow"),
        pytest.param({"mask": "bhqk"}, "mask", id="mask"),
        pytest.param({"bias": "hqk"}, "bias", id="bias"),
        pytest.param({"deterministic": True}, "deterministic", id="deterministic"),
        pytest.param({"strides": "lastdim"}, "contiguous", id="last-dimension"),
        pytest.param({"key_ranges": "random", "ranges_shape": "h"}, "key_ranges", id="ranges-by-head"),
    ],
)
def test_refusals_name_their_reason(change: dict, word: str) -> None:
    case = Case(**{**BF16, "Sq": 65, "Sk": 65, **change})
    x = make_inputs(case)
    reasons = backward_launch.unsupported_backward(x.q, x.k, x.v, x.spec, Needs(), case.deterministic, x.varlen)
    assert any(word in reason for reason in reasons), reasons
