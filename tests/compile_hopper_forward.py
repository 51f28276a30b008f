"""Compiles the Hopper forward for sm_90 where there is no GPU; prints what each variant costs, a JSON line each.

A process of its own, because tests may have imported the portable kernels for the interpreter. The real launch code
runs on small CPU tensors (see benchmarks/compile_matrix.py); names of variants are the arguments: 128-causal-4096.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.compile_matrix import OfflineDriver, cubin_resources
from hf_flash_mc.ops.hopper import launch
from hf_flash_mc.ops.hopper import plan as hopper_plan
from hf_flash_mc.ops.portable import plan
from hf_flash_mc.ops.spec import Spec, Varlen

B, H = 1, 2


def feature(name: str, s: int) -> tuple[dict[str, Any], bool]:
    """The options of a variant, and whether it is packed."""
    seed = torch.zeros(1, dtype=torch.int64)
    options: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"causal": True},
        "ranges": {"key_ranges": torch.zeros(B, 1, s, 2, dtype=torch.int32)},
        "window": {"causal": True, "window_left": 100},
        "softcap": {"causal": True, "softcap": 50.0},
        "alibi": {"causal": True, "alibi_slopes": torch.zeros(H)},
        "weight": {"key_log_weight": torch.zeros(B, 1, s)},
        "sinks": {"causal": True, "sinks": torch.zeros(H)},
        "dropout": {"causal": True, "dropout_p": 0.1, "dropout_seed": seed},
        "varlen": {"causal": True},
    }
    return options[name], name == "varlen"


def costs(head_dim: int, name: str, s: int) -> dict[str, Any]:
    """Registers, spills, shared memory, named barriers and the order of exponentials and waits of one variant."""
    found = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        found[self.__name__] = kernel = run(self, *args, grid=grid, warmup=True, **options)
        return kernel

    options, packed = feature(name, s)
    q, k, v = (torch.zeros(B, s, H, head_dim, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    varlen = None
    if packed:
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        cu = torch.tensor([0, s], dtype=torch.int32)
        varlen = Varlen(cu, cu, s, s)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "EMULATED", True),
        mock.patch.object(plan, "INTERPRETED", True),  # no second launch, by the compiled kernel itself
        mock.patch.object(hopper_plan, "_runner", return_value=None),
    ):
        spec = Spec(**options)
        launch.run_forward(plan.plan_of(q, k, v, spec, varlen), q, k, v, spec, varlen)
    kernel = found["attn_fwd_hopper_kernel"]
    registers, spills, unset = cubin_resources(kernel.asm["cubin"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        code = subprocess.check_output([tools / "nvdisasm", "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    return {
        "variant": f"{head_dim}-{name}-{s}",
        "triton": triton.__version__,
        "registers": registers,
        "spills": spills,
        "unset": unset,
        "shared": kernel.metadata.shared,
        "loops": loops(code),
        "multiplies": len(re.findall(r"IMAD\.(?:HI|WIDE)", code)),  # of two halves: the generator's
        "barriers": sorted({int(n, 16) for n in re.findall(r"BAR\.(?:SYNC|ARV)\S* (0x[0-9a-f]+)", code)}),
    }


def loops(code: str) -> list[tuple[int, int, int]]:
    """For each loop over tiles: matrix products, exponentials between its two waits for them, exponentials after."""
    lines, labels, found = code.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label.group(1)] = i
        back = re.search(r"BRA\S*\s+(?:\S+\s*,\s*)?`\((\.L_x_\d+)\)", line)
        if back is None or back.group(1) not in labels:
            continue
        body = lines[labels[back.group(1)] : i]
        waits = [j for j, text in enumerate(body) if "WARPGROUP.DEPBAR" in text]
        if len(waits) == 2:
            exps = [j for j, text in enumerate(body) if "MUFU" in text]
            between = sum(waits[0] < j < waits[1] for j in exps)
            found.append((sum("HGMMA" in text for text in body), between, sum(j > waits[1] for j in exps)))
    return [loop for loop in found if loop[1] + loop[2] >= 16]


if __name__ == "__main__":
    triton.runtime.driver.set_active(OfflineDriver(GPUTarget("cuda", 90, 32), 0))
    for argument in sys.argv[1:]:
        head_dim, name, length = argument.split("-")
        print(json.dumps(costs(int(head_dim), name, int(length))), flush=True)
