"""One tidy CSV: a line per cell, direction and implementation, each with where and how it was measured."""

from __future__ import annotations

import csv
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

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
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
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


def cpu_name() -> str:
    """The processor by its maker's name where the system tells (Linux), else by its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"CPU ({name})"


def describe_command(
    device: torch.device, program: Sequence[str], arguments: Sequence[str], method: str, dtype: str
) -> dict[str, Any]:
    """Where and how, for a JSON file: `describe_run` of a command line, with dtype and threads."""
    run = describe_run(device, shlex.join([*program, *without_folders(list(arguments))]), method)
    return {**asdict(run), "dtype": dtype, "threads": torch.get_num_threads()}


def without_folders(value: Any) -> Any:
    """A value, or a list or dict of them, in which files have only names: where they lie here helps nobody."""
    if isinstance(value, dict):
        return {key: without_folders(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(x) for x in value]
    if not isinstance(value, str | Path):
        return value
    option, equals, path = str(value).rpartition("=") if str(value).startswith("--") else ("", "", str(value))
    return option + equals + (Path(path).name if Path(path).is_absolute() or ".." in Path(path).parts else path)


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
        measured = ["ops", "patches", "hf_flash_mc/measure", "hf_flash_mc/megacontext", "examples"]
        changed = subprocess.check_output(["git", "status", "--porcelain", *measured], cwd=ROOT, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.strip() + ("-dirty" if changed.strip() else "")


def write_json(found: Any, path: Path) -> None:
    """All at once, as `write`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(path)


def keep(found: Iterable[dict[str, Any]], run: dict[str, Any], out: str | None, show: Callable[..., str]) -> None:
    """Print each row as ``show`` puts it, and rewrite ``out`` with it: a run that is stopped leaves what it found."""
    rows = []
    for row in found:
        rows.append(row)
        print(show(row), flush=True)
        if out:
            write_json({"run": run, "rows": rows}, Path(out))


def in_words(row: dict[str, Any]) -> str:
    """A row as names and values."""
    return ", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())


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
