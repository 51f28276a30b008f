"""run.py, the one-command set-up: never CUDA packages without a GPU, nothing to do the second time."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """run.py as a module, with its virtual environment in an empty folder; pip is recorded, not run."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    python = tmp_path / "venv" / "python"
    python.parent.mkdir()
    monkeypatch.setattr(module, "VENV", python.parent)
    monkeypatch.setattr(module, "PYTHON", python)
    monkeypatch.setattr(module, "STAMP", python.parent / "stamp.json")
    return module


def record_pip(module: ModuleType, monkeypatch: pytest.MonkeyPatch, requires: list[str]) -> list[tuple[str, ...]]:
    """Replace pip by one that would find a torch with these requirements; the list of its calls."""
    calls: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> None:
        calls.append(arguments)
        if "--report" in arguments:
            torch = {"metadata": {"version": "1.0", "requires_dist": requires}, "download_info": {"url": "file:///t"}}
            Path(arguments[arguments.index("--report") + 1]).write_text(json.dumps({"install": [torch]}))

    monkeypatch.setattr(module, "pip", pip)
    result = type("Result", (), {"returncode": 1, "stdout": ""})
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: result())  # no torch yet, no nvidia-smi
    return calls


@pytest.mark.skipif(sys.platform != "linux", reason="CUDA packages are Linux's")
@pytest.mark.parametrize("package", ["nvidia-cublas==13.1; platform_system == 'Linux'", "cuda-toolkit[cublas]==13.0"])
def test_cuda_build_is_refused_before_it_is_downloaded(
    bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    calls = record_pip(bootstrap, monkeypatch, ["filelock", package])
    with pytest.raises(SystemExit, match="no NVIDIA GPU"):
        bootstrap.install_cpu_torch()
    assert all("--dry-run" in call for call in calls)


def test_cpu_build_is_installed_alone(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_pip(bootstrap, monkeypatch, ["filelock", "sympy"])
    bootstrap.install_cpu_torch()
    assert ["--dry-run" in call for call in calls] == [True, False]
    assert all("--no-deps" in call and bootstrap.CPU_TORCH in call for call in calls)


def test_second_set_up_does_nothing(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record_pip(bootstrap, monkeypatch, [])
    bootstrap.PYTHON.touch()
    bootstrap.set_up()
    first = len(calls)
    assert first == 3
    bootstrap.set_up()
    assert len(calls) == first
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: True)  # the machine changed: set up again
    bootstrap.set_up()
    assert len(calls) == first + 1


def test_readme_and_ci_give_the_same_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "python run.py quickstart" in readme
    assert "python run.py test" in readme
    assert "run.py test" in (ROOT / ".ci" / "run").read_text()
