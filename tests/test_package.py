"""The package as users get it: wheel and sdist hold every module, importing costs little, the command line answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("ops", "patches")
TOP_FILES = ("pyproject.toml", "README.md", "LICENSE")
BUILD = "from setuptools import build_meta; import sys; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
IMPORT_MARGIN = 0.3  # seconds that `import hf_flash_mc` may take beyond `import transformers`


def expected_modules() -> set[str]:
    """Path inside the wheel of every module and data file that the source tree holds."""
    found = set()
    for folder in ("hf_flash_mc", *FOLDERS):
        prefix = "hf_flash_mc/" if folder in FOLDERS else ""
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".json") or path.name == "py.typed":
                found.add(prefix + path.relative_to(ROOT).as_posix())
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a copy of the source tree, and the wheel built from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in TOP_FILES:
        shutil.copy(ROOT / name, source)
    for name in ("hf_flash_mc", *FOLDERS):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    sdist = folder / build("build_sdist", folder, cwd=source)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return sdist, folder / build("build_wheel", folder, cwd=unpacked)


def build(hook: str, target: Path, cwd: Path) -> str:
    """Run a PEP 517 hook of setuptools in a process of its own; the name of the file it made."""
    result = subprocess.run([sys.executable, "-c", BUILD, hook, str(target)], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip().splitlines()[-1]


def run_python(code: str, path: Path | None = None) -> str:
    """Standard output of ``python -c code`` in an empty folder, with ``path`` in front of sys.path."""
    environment = {**os.environ, "PYTHONPATH": str(path) if path else ""}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_holds_every_module_of_linked_folders(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        infos = {i.filename: i for i in wheel.infolist()}
    assert expected_modules() - infos.keys() == set()
    assert "hf_flash_mc/ops/reference.py" in infos
    links = [name for name, info in infos.items() if (info.external_attr >> 16) & 0o170000 == 0o120000]
    assert links == []
    outside = {name.split("/")[0] for name in infos} - {"hf_flash_mc"}
    assert all(name.endswith(".dist-info") for name in outside), f"the wheel would install {outside}"


def test_sdist_holds_every_module_as_a_file(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as sdist:
        members = {m.name.split("/", 1)[1]: m for m in sdist.getmembers() if "/" in m.name}
    missing = {name for name in expected_modules() if name not in members or not members[name].isreg()}
    assert missing == set()
    assert "LICENSE" in members


def test_wheel_imports_without_torch_transformers_or_triton(built: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        wheel.extractall(tmp_path)
    heavy = "torch", "transformers", "triton"
    code = f"import hf_flash_mc, sys; print(hf_flash_mc.__file__, *[m for m in {heavy} if m in sys.modules])"
    file, *loaded = run_python(code, tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert loaded == []
    code = "import hf_flash_mc, sys; hf_flash_mc.flash_attention; print('triton' in sys.modules)"
    assert run_python(code, tmp_path).strip() == "False", "triton must be loaded by the first call on a GPU, not before"


def test_public_names_exist() -> None:
    import hf_flash_mc

    missing = [name for name in hf_flash_mc.__all__ if not hasattr(hf_flash_mc, name)]
    assert missing == []
    assert set(hf_flash_mc.__all__) <= set(dir(hf_flash_mc))
    with pytest.raises(AttributeError, match="no attribute 'flash_atention'"):
        _ = hf_flash_mc.flash_atention


def test_import_costs_at_most_a_little_more_than_transformers() -> None:
    code = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    ours, theirs = (
        min(float(run_python(code.format(name), ROOT)) for _ in range(3)) for name in ("hf_flash_mc", "transformers")
    )
    assert ours <= theirs + IMPORT_MARGIN


@pytest.mark.parametrize("folder", FOLDERS)
def test_second_copy_of_linked_folder_is_refused(folder: str) -> None:
    code = f"import {folder}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert f"import hf_flash_mc.{folder}" in result.stderr


def test_env_command_names_versions_and_back_end() -> None:
    import torch
    from typer.testing import CliRunner

    from hf_flash_mc.cli import app

    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0, result.output
    assert f"torch: {torch.__version__}" in result.output
    assert "attention on cpu, float32, causal: cpu" in result.output
    assert result.output.count("```") == 2


def test_models_command_says_what_is_refused() -> None:
    from typer.testing import CliRunner

    from hf_flash_mc.cli import app
    from hf_flash_mc.patches.support import FAMILIES

    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0, result.output
    for family in FAMILIES:
        assert f"{family.name}: " in result.output
        assert (family.refused or "") in result.output
