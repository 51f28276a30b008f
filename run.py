"""Set-up in one command, with nothing but Python and pip: makes .venv, installs what is lacking, then runs.

    python run.py quickstart [arguments of examples/quickstart.py]
    python run.py test       [arguments of pytest]
    python run.py lint
    python run.py setup

Standard library only. Without an NVIDIA GPU it installs a CPU build of torch and refuses to pull CUDA packages.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "hf-flash-mc-setup.json"
EXTRAS = "test"  # holds the other extras
CPU_TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_PREFIXES = ("nvidia-", "cuda-")


def main(arguments: list[str]) -> int:
    """Set up, then run the command that ``arguments`` name; returns its exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036  (this file runs before pip has looked at requires-python)
        raise SystemExit(f"run.py: Python 3.11 or newer is needed; {sys.executable} is {platform.python_version()}")
    command, rest = (arguments[0] if arguments else "help"), arguments[1:]
    if command == "quickstart":
        steps = [["examples/quickstart.py", *rest]]
    elif command == "test":
        steps = [["-m", "pytest", *test_workers(rest), *rest]]
    elif command == "lint":
        steps = [["-m", "ruff", "check", "."], ["-m", "mypy"]]
    elif command == "setup":
        steps = []
    else:
        print(__doc__)
        return 0 if command in ("help", "-h", "--help") else 2
    set_up()
    codes = [subprocess.call([str(PYTHON), *step], cwd=ROOT) for step in steps]
    return max(codes, key=abs, default=0)


def test_workers(arguments: list[str]) -> list[str]:
    """pytest-xdist's -n, unless the user gave one: tests are bound by one thread each."""
    given = any(a.startswith(("-n", "--numprocesses", "-p")) for a in arguments)
    return [] if given else ["-n", str(min(os.cpu_count() or 1, 8))]


def set_up() -> None:
    """Make .venv and install what is lacking; does nothing when the same set-up was finished before."""
    gpu = has_nvidia_gpu()
    wanted = {
        "project": hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(),
        "python": platform.python_version(),
        "root": str(ROOT),
        "gpu": gpu,
        "torch": "torch" if gpu else CPU_TORCH,
    }
    if PYTHON.exists() and STAMP.exists() and json.loads(STAMP.read_text()) == wanted:
        return
    if not PYTHON.exists():
        make_venv()
    print(f"Setting up {VENV} ({'NVIDIA GPU found' if gpu else 'no NVIDIA GPU: CPU build of torch'}) ...", flush=True)
    if not gpu:
        install_cpu_torch()
    pip("install", "--editable", f"{ROOT}[{EXTRAS}]")
    STAMP.write_text(json.dumps(wanted, indent=1))


def make_venv() -> None:
    """A virtual environment with pip, also where Python comes without ensurepip (Debian, Ubuntu)."""
    print(f"Making {VENV} ...", flush=True)
    if subprocess.call([sys.executable, "-m", "venv", str(VENV)], stdout=subprocess.DEVNULL) == 0:
        return
    shutil.rmtree(VENV, ignore_errors=True)
    subprocess.check_call([sys.executable, "-m", "venv", "--without-pip", str(VENV)])
    subprocess.check_call([sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "--quiet", "pip"])


def pip(*arguments: str) -> None:
    """Run .venv's pip quietly; its own message and exit code end the program if it fails."""
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    code = subprocess.call(command)
    if code != 0:
        raise SystemExit(f"run.py: this failed with exit code {code}:\n  {' '.join(command)}")


def install_cpu_torch() -> None:
    """Install torch's CPU build, unless a torch is there already; stop before anything CUDA is downloaded.

    PyTorch's index of CPU builds is offered beside the usual one: its +cpu version sorts first. Where it cannot be
    reached, pip warns and takes what it has, so what it would take is looked at before it is taken.
    """
    probe = "import importlib.metadata as m; print(m.version('torch'))"
    if subprocess.run([str(PYTHON), "-c", probe], capture_output=True).returncode == 0:
        return
    source = [CPU_TORCH, "--no-deps", "--extra-index-url", CPU_INDEX, "--timeout", "15", "--retries", "1"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        pip("install", "--dry-run", "--report", str(report), *source)
        found = json.loads(report.read_text())["install"][0]
    requirements = found["metadata"].get("requires_dist", [])
    # Wheels for macOS and Windows name CUDA packages too, under a marker that only holds on Linux.
    if sys.platform == "linux" and any(r.startswith(CUDA_PREFIXES) for r in requirements):
        raise SystemExit(
            f"run.py: this machine has no NVIDIA GPU, but pip would install a CUDA build of torch\n"
            f"  ({found['download_info']['url']}, several GB with what it needs).\n"
            f"Either make {CPU_INDEX} reachable, or install a CPU build yourself and run this again:\n"
            f"  {PYTHON} -m pip install PATH_TO_TORCH_CPU_WHEEL"
        )
    print(f"Installing torch {found['metadata']['version']} ...", flush=True)
    pip("install", *source)


def has_nvidia_gpu() -> bool:
    """True if the driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    result = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return result.returncode == 0 and "GPU" in result.stdout


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
