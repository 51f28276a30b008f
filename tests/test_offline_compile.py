"""The kernels compile for GPUs that are not here, within shared memory and without spills that the table lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.compile_matrix import CI, SHARED_LIMIT, TARGETS, Result, failures, read_table, write_table

ROOT = Path(__file__).resolve().parent.parent
LINE = Result("3.9.0", "sm90", "bf16-64x64-causal", "attn_fwd_kernel", 200, 2, 65536)


@pytest.mark.parametrize("targets", [("sm80", "sm90"), ("sm100", "gfx942")], ids="+".join)
def test_fixed_subset_compiles_within_limits(targets: tuple[str, ...]) -> None:
    """In a process of its own: here kernels may have been imported for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "benchmarks.compile_matrix",
        "--check",
        "--ci",
        "--jobs",
        "1",
        "--targets",
        *targets,
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    cases = sum(target in targets for target, _ in CI)
    assert f"kernels of {cases} cases compile within limits" in result.stdout
    for kernel in ("attn_fwd_kernel", "attn_bwd_dkdv_kernel", "attn_bwd_dkdv_kernel (fused)", "attn_bwd_dq_kernel"):
        assert result.stdout.count(f" {kernel} ") >= len(targets), f"{kernel} was not compiled for each of {targets}"


def test_subset_meets_every_target() -> None:
    assert {target for target, _ in CI} == set(TARGETS)


@pytest.mark.parametrize(
    ("measured", "count"),
    [
        pytest.param(LINE, 0, id="as-the-table-says"),
        pytest.param(replace(LINE, spills=1), 0, id="fewer"),
        pytest.param(replace(LINE, spills=3), 1, id="more"),
        pytest.param(replace(LINE, triton="3.10.0"), 0, id="newer-triton-as-many"),
        pytest.param(replace(LINE, triton="3.10.0", spills=3), 1, id="newer-triton-more"),
        pytest.param(replace(LINE, case="bf16-64x64-plain", spills=1), 1, id="no-line-spills"),
        pytest.param(replace(LINE, unset=1), 1, id="reads-what-nothing-set"),
        pytest.param(replace(LINE, shared=SHARED_LIMIT["sm90"] + 1), 1, id="too-much-shared-memory"),
    ],
)
def test_guard_fails_where_the_table_is_exceeded(measured: Result, count: int) -> None:
    assert len(failures([measured], [LINE])) == count


def test_table_keeps_lines_of_other_versions(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    older = replace(LINE, triton="3.6.0", spills=7)
    write_table([LINE, older], path)
    write_table([replace(LINE, spills=0)], path)
    assert read_table(path) == [older, replace(LINE, spills=0)]
