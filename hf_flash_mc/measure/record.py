"""One tidy CSV: a line per cell, direction and implementation, each with where and how it was measured."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import hf_flash_mc
from hf_flash_mc.measure.cells import Cell

ROOT = Path(hf_flash_mc.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Line:
    """One measurement; times in milliseconds. ``note`` says why there is none, or which back end ran."""

    group: str
    cell: str
    head_dim: int
    causal: bool
    batch: int
    q_heads: int
    kv_heads: int
    sq: int
    sk: int
    feature: str
    dtype: str
    direction: str
    implementation: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    peak_gib: float | None = None
    rms_error: float | None = None  # of out, against float64
    samples: int = 0
    note: str = ""


@dataclass(frozen=True)
class Run:
    """Where and how: the last columns of every line."""

    device: str
    driver: str | None
    cuda: str | None
    python: str
    torch: str
    triton: str | None
    transformers: str | None
    package: str
    commit: str | None
    date: str
    method: str
    command: str


def line(
    cell: Cell, dtype: torch.dtype, direction: str, name: str, samples: list[float], note: str = "",
    peak_gib: float | None = None, rms_error: float | None = None,
) -> Line:  # fmt: skip
    shape = {f.name: getattr(cell, f.name) for f in fields(Cell) if f.name != "directions"}
    head = {"cell": cell.name, **shape, "dtype": str(dtype)[6:], "direction": direction, "implementation": name}
    if not samples:
        return Line(**head, note=note)
    low, middle, high = (quantile(samples, q) for q in (0.2, 0.5, 0.8))
    attention = direction in ("forward", "backward")
    tflops = round(cell.flops(direction) / middle / 1e9, 1) if attention and name != "copy" else None
    gbps = round(cell.bytes(direction, dtype.itemsize) / middle / 1e6, 1) if attention else None
    times = [round(t, 6) for t in (middle, low, high)]
    return Line(
        **head, median_ms=times[0], p20_ms=times[1], p80_ms=times[2], tflops=tflops, gbps=gbps,
        peak_gib=None if peak_gib is None else round(peak_gib, 2), rms_error=rms_error, samples=len(samples), note=note,
    )  # fmt: skip


def quantile(samples: list[float], q: float) -> float:
    """Linear between the samples."""
    return torch.tensor(samples, dtype=torch.float64).quantile(q).item()


def describe_run(device: torch.device, command: str, method: str) -> Run:
    return Run(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        driver=_driver_version() if device.type == "cuda" else None,
        cuda=torch.version.cuda,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=installed("triton"),
        transformers=installed("transformers"),
        package=hf_flash_mc.__version__,
        commit=commit(),
        date=datetime.now(UTC).date().isoformat(),
        method=method,
        command=command,
    )


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True).splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def commit() -> str | None:
    """The checked-out commit, "-dirty" if files that are measured differ from it; None outside a repository.

    A copy of the tree without its repository says which commit it is in the environment variable BENCHMARK_COMMIT.
    """
    if os.environ.get("BENCHMARK_COMMIT"):
        return os.environ["BENCHMARK_COMMIT"]
    if not (ROOT / ".git").exists():
        return None
    try:
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True, stderr=subprocess.DEVNULL)
        measured = ["ops", "patches", "hf_flash_mc/measure", "hf_flash_mc/megacontext"]
        changed = subprocess.check_output(["git", "status", "--porcelain", *measured], cwd=ROOT, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("-dirty" if changed.strip() else "")


def write(lines: Sequence[Line], run: Run, path: Path) -> None:
    """All at once, so that whatever ends the process leaves the lines before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="") as file:
        columns = [f.name for f in (*fields(lines[0] if lines else Line), *fields(Run))]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({**asdict(x), **asdict(run)} for x in lines)
    temporary.replace(path)
