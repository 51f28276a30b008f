"""Compiles the Hopper backward for sm_90 where there is no GPU; prints what each variant costs, a JSON line each.

A process of its own, because tests may have imported the portable kernels for the interpreter. The real launch code
runs on small CPU tensors (see benchmarks/compile_matrix.py); names of variants are the arguments.
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
from hf_flash_mc.ops.hopper import backward_launch
from hf_flash_mc.ops.hopper import plan as hopper_plan
from hf_flash_mc.ops.portable import plan
from hf_flash_mc.ops.spec import Needs, Spec, Varlen

B, H, S = 2, 4, 512
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "ranges": {"key_ranges": torch.zeros(B, 1, S, 2, dtype=torch.int32)},
    "window": {"causal": True, "window_left": 100},
    "softcap": {"causal": True, "softcap": 50.0},
    "alibi": {"causal": True, "alibi_slopes": torch.zeros(H)},
    "weight": {"causal": True, "key_log_weight": torch.zeros(B, 1, S)},
    "varlen": {"causal": True},
    "dropout": {"causal": True, "dropout_p": 0.1, "dropout_seed": torch.zeros(1, dtype=torch.int64)},
}


def costs(head_dim: int, feature: str) -> dict[str, Any]:
    """Registers, spills, shared memory, wgmma waits and named barriers of one variant of the fused kernel."""
    found = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found[self.__name__] = kernel
        return kernel

    q, k, v, dout, out = (torch.zeros(B, S, H, head_dim, dtype=torch.bfloat16).transpose(1, 2) for _ in range(5))
    lse, varlen = torch.zeros(B, H, S), None
    if feature == "varlen":
        q, k, v, dout, out = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, dout, out))
        cu = torch.arange(0, B * S + 1, S, dtype=torch.int32)
        lse, varlen = torch.zeros(H, B * S), Varlen(cu, cu, S, S)
    spec = Spec(**FEATURES[feature])
    needs = Needs(dkey_log_weight=spec.key_log_weight is not None)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(plan, "INTERPRETED", True),  # no second launch, by the compiled kernel itself
        mock.patch.object(hopper_plan, "_runner", return_value=None),
    ):
        backward_launch.backward(dout, None, q, k, v, out, lse, spec, needs, False, varlen)
    kernel = found["attn_bwd_hopper_kernel"]
    registers, spills, unset = cubin_resources(kernel.asm["cubin"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        code = subprocess.check_output([tools / "nvdisasm", "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    return {
        "variant": f"{head_dim}-{feature}",
        "triton": triton.__version__,
        "registers": registers,
        "spills": spills,
        "unset": unset,
        "shared": kernel.metadata.shared,
        "products": code.count("HGMMA"),
        "waits": code.count("WARPGROUP.DEPBAR"),
        "reduces": code.count("UTMAREDG"),
        "multiplies": len(re.findall(r"IMAD\.(?:HI|WIDE)", code)),  # of two halves: the generator's
        "barriers": sorted({int(n, 16) for n in re.findall(r"BAR\.(?:SYNC|ARV)\S* (0x[0-9a-f]+)", code)}),
    }


if __name__ == "__main__":
    triton.runtime.driver.set_active(OfflineDriver(GPUTarget("cuda", 90, 32), 0))
    for name in sys.argv[1:]:
        head_dim, feature = name.split("-")
        print(json.dumps(costs(int(head_dim), feature)), flush=True)
