"""Test settings that must hold before a kernel is imported: Triton's interpreter without a GPU, one thread."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _folder = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="hf_flash_mc_inductor_")
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)
torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_patch

    interpreter_patch.apply()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device() -> str:
    """The device that back-end tests use: the GPU where there is one."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two Llama layers with grouped heads and a byte tokenizer, random weights."""
    from benchmarks.tiny import save_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder
