"""Compile the portable kernels for GPUs that are not there, and hold them to a table of registers, spills and memory.

    python -m benchmarks.compile_matrix --write      # every case, every target; updates the table
    python -m benchmarks.compile_matrix --check      # the same, fails where the table is exceeded
    python -m benchmarks.compile_matrix --check --ci # a fixed subset for CI

The real launch code runs on small CPU tensors; only the driver below it is replaced, by one that names a target and
launches nothing. So what is compiled is what a call compiles: same argument types, same specialisation, same table of
tile sizes. Fails (exit code 1) where a kernel does not compile, needs more shared memory than the target has, or spills
more than its line in results/compile_matrix.csv says (no line: 0). Needs triton, no GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

from .sass import unset_registers

TABLE = Path(__file__).parent / "results" / "compile_matrix.csv"
TARGETS = {
    "sm80": ("cuda", 80, 32),
    "sm90": ("cuda", 90, 32),
    "sm100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm80": 166912, "sm90": 232448, "sm100": 232448, "gfx942": 65536}  # bytes a program can have


@dataclass(frozen=True)
class Case:
    """One attention call, forward and both forms of the backward; "pagedN": the forward over blocks of N keys."""

    dtype: str
    head_dims: tuple[int, int]
    feature: str
    lengths: tuple[int, int] = (512, 512)  # Sq, Sk: long enough for tensor-memory-accelerator variants

    @property
    def name(self) -> str:
        lengths = "" if self.lengths == (512, 512) else f"-{self.lengths[0]}:{self.lengths[1]}"
        return f"{self.dtype}-{self.head_dims[0]}x{self.head_dims[1]}-{self.feature}{lengths}"


@dataclass(frozen=True)
class Result:
    """A line of the table: what one kernel of one case costs on one target."""

    triton: str
    target: str
    case: str
    kernel: str
    registers: int
    spills: int
    shared: int
    unset: int = 0  # instructions that may read a register which nothing has set: see sass.py

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.triton, self.target, self.case, self.kernel


USUAL = ("plain", "causal", "ranges", "many")
RARER = ("window", "mask", "bias", "weight", "alibi", "softcap", "sinks", "dropout", "varlen", "varlen_causal",
         "blocks", "blocks_causal")  # fmt: skip
SPECIAL = ((16, 16), (32, 32), (64, 64), (2048, 8), (2048, 32), (8, 4096), (32, 4096), (1, 4096))
# rows of a KV head: 2, 16, 32, many
PAGED = (("paged16", (1, 4096)), ("paged256", (1, 4096)), ("paged16_many", (8, 4096)), ("paged256_many", (16, 4096)),
         ("paged16_causal", (512, 512)))  # fmt: skip
# Every row of the tile table is met: both widths and its three head-dim limits; every feature at the two usual sizes.
CASES = [
    *(Case(dtype, (d, d), feature) for dtype in ("bf16", "fp32") for d in (64, 128, 256) for feature in USUAL),
    *(Case("bf16", (d, d), feature) for d in (64, 128) for feature in RARER),
    *(Case("bf16", dims, "causal") for dims in ((80, 80), (96, 96), (192, 128))),
    *(Case("bf16", dims, "ranges") for dims in ((64, 32), (100, 40), (80, 80))),  # V narrower than K: see sass.py
    *(Case(dtype, (512, 512), feature) for dtype in ("bf16", "fp32") for feature in USUAL),
    *(Case("bf16", (512, 512), feature) for feature in RARER),
    *(Case("bf16", dims, "causal") for dims in ((320, 320), (384, 384), (500, 500), (512, 256), (256, 512))),
    *(Case("bf16", (512, 512), feature, n) for feature in ("plain", "many") for n in ((1, 4096), (8, 4096))),
    *(Case("bf16", (512, 512), feature, n) for feature, n in PAGED),
    Case("fp16", (128, 128), "causal"),
    # windows, many queries over few keys, few over many, decoding: kernels of their own
    *(Case("bf16", (d, d), feature, n) for d in (64, 128) for feature in ("plain", "many") for n in SPECIAL),
    *(Case("bf16", (d, d), feature, n) for d in (64, 128, 256) for feature, n in PAGED),
    *(Case("fp32", (d, d), feature, n) for d in (64, 128, 256) for feature, n in PAGED[1:3]),
]
CI = [
    ("sm80", Case("bf16", (64, 64), "causal")),
    ("sm90", Case("bf16", (128, 128), "ranges")),
    ("sm90", Case("bf16", (64, 32), "ranges")),
    ("sm90", Case("bf16", (64, 64), "plain", (32, 32))),
    ("sm90", Case("bf16", (64, 64), "plain", (8, 4096))),
    ("sm90", Case("bf16", (128, 128), "paged16", (1, 4096))),
    ("sm90", Case("bf16", (512, 512), "causal")),
    ("sm100", Case("bf16", (128, 128), "plain")),
    ("gfx942", Case("bf16", (64, 64), "causal")),
    ("gfx942", Case("bf16", (512, 512), "causal")),
]


def call_of(case: Case) -> dict[str, Any]:
    """The tensors and the description of the case's call."""
    import torch

    from hf_flash_mc.ops.spec import Spec, Varlen

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.dtype]
    b, hq, hkv = 2, 4, 2
    sq, sk = case.lengths
    d, dv = case.head_dims
    packed = case.feature.startswith("varlen")
    lead = ((2 * s, h) if packed else (b, s, h) for s, h in ((sq, hq), (sk, hkv), (sk, hkv)))
    q, k, v = (torch.zeros(*shape, n, dtype=dtype) for shape, n in zip(lead, (d, d, dv), strict=True))
    if not packed:  # as transformers gives them: [B, S, H, D] memory
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    cu = torch.tensor([0, sq, 2 * sq], dtype=torch.int32)
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window_left": 127},
        "ranges": {"key_ranges": torch.zeros(b, 1, sq, 2, dtype=torch.int32)},
        "mask": {"mask": torch.ones(b, 1, sq, sk, dtype=torch.bool)},
        "bias": {"bias": torch.zeros(1, hq, sq, sk, dtype=dtype)},
        "weight": {"key_log_weight": torch.zeros(b, 1, sk)},
        "alibi": {"causal": True, "alibi_slopes": torch.zeros(hq)},
        "softcap": {"causal": True, "softcap": 50.0},
        "sinks": {"causal": True, "window_left": 127, "sinks": torch.zeros(hq)},
        "dropout": {"causal": True, "dropout_p": 0.1, "dropout_seed": torch.zeros(1, dtype=torch.int64)},
        "blocks": {
            "block_rows": torch.zeros(b, 1, -(-sq // 128), -(-sk // 128) + 1, 2, dtype=torch.int32),
            "block_columns": torch.zeros(b, 1, -(-sk // 128), -(-sq // 128) + 1, 2, dtype=torch.int32),
            "block_bits": torch.zeros(1, 129, 4, dtype=torch.int32),
        },
        "varlen": {},
        "varlen_causal": {"causal": True},
    }
    many = [options[n] for n in ("ranges", "weight", "alibi", "softcap", "sinks", "dropout")]
    options["blocks_causal"] = options["blocks"] | options["causal"]
    options["many"] = {key: value for o in many for key, value in o.items()}
    options |= {f"paged{n}{kind}": paged_options(kind, options) for n in (16, 256) for kind in ("", "_causal", "_many")}
    return {
        "qkv": (q, k, v),
        "spec": Spec(**options[case.feature]),
        "varlen": Varlen(cu, cu, sq, sk) if packed else None,
    }


def paged_options(kind: str, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of a paged call: the features its kernel has, of those that are asked for."""
    names = {"": (), "_causal": ("causal",), "_many": ("ranges", "alibi", "softcap", "sinks")}[kind]
    return {key: value for n in names for key, value in options[n].items()}


def run_paged(case: Case, q: Any, k: Any, v: Any, spec: Any) -> None:
    """The case's call over a pool of blocks."""
    import torch

    from hf_flash_mc.ops.portable import paged_launch
    from hf_flash_mc.ops.spec import Paged

    page = int(re.findall(r"\d+", case.feature)[0])
    caches = (x.new_zeros(8, page, *x.shape[1::2]) for x in (k, v))
    table = torch.zeros(q.shape[0], -(-k.shape[2] // page), dtype=torch.int32)
    paged_launch.forget()
    paged_launch.forward(q, *caches, Paged(table, torch.zeros(q.shape[0], dtype=torch.int32)), spec)


class OfflineDriver:
    """Stands in for triton's GPU driver: names the target to compile for. ``device`` keys triton's kernel cache."""

    def __init__(self, target: Any, device: int):
        self.target, self.device = target, device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_case(target: str, case: Case) -> list[Result]:
    """Run the case's forward and backwards with nothing launched; what each kernel compiled on the way costs."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from hf_flash_mc.ops.portable import launch, plan
    from hf_flash_mc.ops.spec import Needs

    triton.runtime.driver.set_active(OfflineDriver(GPUTarget(*TARGETS[target]), list(TARGETS).index(target)))
    found: dict[str, Result] = {}  # by the hash of what was compiled: both forms of the backward share kernels
    run, form = JITFunction.run, ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in found:
            found[kernel.hash] = measure(kernel, target, case.name, self.__name__ + form, triton.__version__)
        return kernel

    call = call_of(case)
    (q, k, v), spec, varlen = call["qkv"], call["spec"], call["varlen"]
    needs = Needs(True, True, True, spec.bias is not None, spec.key_log_weight is not None, spec.sinks is not None)
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(plan, "architecture", return_value=target),
        mock.patch.object(plan, "INTERPRETED", True),  # no second launch, by the compiled kernel itself
    ):
        plan.forget()
        if case.feature.startswith("paged"):
            run_paged(case, q, k, v, spec)
            return list(found.values())
        out, lse = launch.forward(q, k, v, spec, varlen)
        for form in ("", " (fused)"):
            with mock.patch.object(launch, "use_fused", return_value=bool(form)):
                launch.backward(torch.zeros_like(out), None, q, k, v, out, lse, spec, needs, False, varlen)
    return list(found.values())


def measure(kernel: Any, target: str, case: str, name: str, version: str) -> Result:
    """Registers, spills and shared memory of a compiled kernel, from its machine code."""
    if "cubin" in kernel.asm:
        registers, spills, unset = cubin_resources(kernel.asm["cubin"])
    else:
        registers, spills = (gcn_number(kernel.asm["amdgcn"], key) for key in ("vgpr_count", "vgpr_spill_count"))
        unset = 0
    return Result(version, target, case, name, registers, spills, kernel.metadata.shared, unset)


def gcn_number(code: str, key: str) -> int:
    """A number from the metadata at the end of AMD assembly."""
    match = re.search(rf"\.{key}:\s+(\d+)", code)
    if match is None:
        raise ValueError(f"no .{key} in the kernel's assembly")
    return int(match.group(1))


def cubin_resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers a thread, spill stores (local-memory stores in the machine code) and reads of registers that nothing
    has set, by the tools triton ships."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output(
            [tools / "cuobjdump", "-res-usage", file.name], text=True, stderr=subprocess.DEVNULL
        )
        code = subprocess.check_output([tools / "nvdisasm", "-c", file.name], text=True, stderr=subprocess.DEVNULL)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise ValueError(f"no register count in what cuobjdump printed:\n{usage}")
    return int(registers.group(1)), len(re.findall(r"\bSTL(?:\.\w+)*\b", code)), len(unset_registers(code))


def failures(results: list[Result], table: list[Result]) -> list[str]:
    """What exceeds its limit: shared memory by the target's, spills by the table's line of the same triton.

    A triton that the table lacks is held to the largest spill count of that kernel over the versions it has.
    """
    exact = {r.key: r.spills for r in table}
    known: dict[tuple[str, ...], int] = {}
    for r in table:
        known[r.key[1:]] = max(known.get(r.key[1:], 0), r.spills)
    versions = {r.triton for r in table}
    found = []
    for r in results:
        where = f"{r.kernel} [{r.target}, {r.case}, triton {r.triton}]"
        if r.shared > SHARED_LIMIT[r.target]:
            found.append(f"{where}: {r.shared} bytes of shared memory, the limit is {SHARED_LIMIT[r.target]}")
        if r.unset:
            found.append(f"{where}: {r.unset} instructions may read a register that nothing has set")
        allowed = exact.get(r.key, 0) if r.triton in versions else known.get(r.key[1:], 0)
        if r.spills > allowed:
            found.append(f"{where}: {r.spills} spills, the table allows {allowed}")
    return found


def read_table(path: Path = TABLE) -> list[Result]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    number = {f.name for f in fields(Result) if f.type == "int"}
    return [Result(**{k: int(x) if k in number else x for k, x in row.items()}) for row in rows]


def write_table(results: list[Result], path: Path = TABLE) -> None:
    """Replace the lines of the same keys, keep the others (of other triton versions), sorted."""
    merged = {r.key: r for r in [*read_table(path), *results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(merged[key]) for key in sorted(merged))


def compile_all(work: list[tuple[str, Case]], jobs: int) -> Iterator[tuple[str, Case, list[Result] | Exception]]:
    """Results in the order they are done; a case that does not compile gives its exception."""
    os.environ.pop("TRITON_INTERPRET", None)  # inherited by the workers, which import the kernels
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(compile_case, *item): item for item in work}
        for future in as_completed(futures):
            error = future.exception()
            yield (*futures[future], error if isinstance(error, Exception) else future.result())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ci", action="store_true", help="only the fixed subset that CI runs")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--only", help="regular expression on the case's name")
    parser.add_argument("--check", action="store_true", help="fail where the table is exceeded")
    parser.add_argument("--write", action="store_true", help="put what is measured into the table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    work = CI if options.ci else [(t, c) for c in CASES for t in TARGETS]
    work = [(t, c) for t, c in work if t in options.targets and re.search(options.only or "", c.name)]
    results, problems = [], []
    for n, (target, case, outcome) in enumerate(compile_all(work, options.jobs), 1):
        if isinstance(outcome, Exception):
            problems.append(f"{case.name} [{target}]: does not compile: {type(outcome).__name__}: {outcome}")
            print(f"[{n}/{len(work)}] {target} {case.name}: FAILED", flush=True)
            continue
        results += outcome
        shown = ", ".join(f"{r.kernel} {r.registers} regs {r.spills} spills {r.shared} B" for r in outcome)
        print(f"[{n}/{len(work)}] {target} {case.name}: {shown}", flush=True)
    if options.check:
        problems += failures(results, read_table())
    if options.write:
        write_table(results)
    print("\n".join(problems) or f"{len(results)} kernels of {len(work)} cases compile within limits.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
