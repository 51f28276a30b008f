"""What ``hf-flash-mc env`` prints: the machine and the choice of back end, as text."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import hf_flash_mc

PACKAGES = ("triton", "transformers", "accelerate", "peft")
PEERS = (("FA3", "flash_attn_interface"), ("FA4-CuTe", "flash_attn.cute"))
# the calls whose back end is explained: name, head dim, queries, keys and the option beside
SAMPLE_CALLS: tuple[tuple[str, tuple[int, int, int, str]], ...] = (
    ("causal", (64, 1024, 1024, "causal")),
    ("windows of 32", (64, 32, 32, "causal")),
    ("decode", (128, 1, 1024, "causal")),
    ("boolean mask", (64, 128, 128, "mask")),
)


def describe_environment() -> str:
    """One "name: value" line each: versions, Python, system, GPUs, environment variables, back ends and why, caches."""
    # torch says itself for which CUDA it was built; the metadata of its wheels need not
    lines = [f"hf-flash-mc: {hf_flash_mc.__version__}", f"torch: {torch.__version__}"]
    lines += [f"{name}: {installed_version(name)}" for name in PACKAGES]
    lines.append(f"python: {platform.python_version()} on {platform.platform()}")
    lines.append(f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    lines += gpu_lines()
    lines += [f"{name}={value}" for name, value in sorted(os.environ.items()) if is_setting(name)]
    lines += [f"peer {name}: {module_state(module)}" for name, module in PEERS]
    for device, dtype in sample_devices():
        where = f"attention on {device.type}, {str(dtype).removeprefix('torch.')}"
        lines += [f"{where}, {name}: {explanation(device, dtype, call)}" for name, call in SAMPLE_CALLS]
    lines += cache_lines()
    return "\n".join(lines)


def installed_version(name: str) -> str:
    """The installed version of a distribution, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def gpu_lines() -> list[str]:
    """One line per GPU that torch can use; one that says so if there is none."""
    if not torch.cuda.is_available():
        return [f"gpu: none that torch {torch.__version__} can use"]
    lines = [f"cuda: {torch.version.cuda}" if torch.version.hip is None else f"hip: {torch.version.hip}"]
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        lines.append(f"gpu {index}: {p.name}, compute {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    return lines


def is_setting(name: str) -> bool:
    """Whether an environment variable can change which kernel runs."""
    return name.startswith(("HF_FLASH_MC_", "TRITON_", "TORCHINDUCTOR_")) or name in ("CUDA_VISIBLE_DEVICES",)


def module_state(name: str) -> str:
    """Whether a module could be imported; it is not."""
    try:
        return "installed" if importlib.util.find_spec(name) else "not installed"
    except ImportError:  # the package above it is missing
        return "not installed"


def sample_devices() -> list[tuple[torch.device, torch.dtype]]:
    """Where the back end is explained: the CPU, and the GPU where there is one."""
    devices = [(torch.device("cpu"), torch.float32)]
    if torch.cuda.is_available():
        devices += [(torch.device("cuda"), torch.bfloat16)]
    return devices


def explanation(device: torch.device, dtype: torch.dtype, call: tuple[int, int, int, str]) -> str:
    """What ``impl="auto"`` would choose for a call of 4 heads with one option, and why; nothing runs."""
    from hf_flash_mc.ops import explain_attention

    head_dim, queries, keys, option = call
    q, k, v = (
        torch.empty(1, n, 4, head_dim, device=device, dtype=dtype).transpose(1, 2) for n in (queries, keys, keys)
    )
    options: dict[str, Any] = (
        {"causal": True} if option == "causal" else {option: torch.ones(queries, keys, device=device) > 0}
    )
    return " ".join(str(explain_attention(q, k, v, **options)).split())


def cache_lines() -> list[str]:
    """Where tuned tile sizes and compiled kernels are kept, and what is there for this GPU."""
    from hf_flash_mc.ops.tuning import cache

    try:
        found = cache.read()
        use = "used" if cache.enabled() else f"not used: {cache.SETTING}=shipped"
        here = len(found.get(cache.owner(), {})) if found else 0
        state = f"{here} rows hold here, {sum(map(len, found.values())) - here} for other GPUs or versions; {use}"
    except ValueError as error:
        state = f"broken: {error}"
    compiled = os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")
    return [f"tuning cache: {cache.path()}: {state}", f"compiled kernels: {compiled}"]
