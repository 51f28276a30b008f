"""What ``hf-flash-mc env`` prints: the machine and the choice of back end, as text."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import hf_flash_mc

PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft")
HEAD_DIM, LENGTH = 64, 128  # of the sample call whose back end is explained


def describe_environment() -> str:
    """One "name: value" line each: versions, Python, system, GPUs, environment variables, back ends and why."""
    lines = [f"hf-flash-mc: {hf_flash_mc.__version__}"]
    lines += [f"{name}: {installed_version(name)}" for name in PACKAGES]
    lines.append(f"python: {platform.python_version()} on {platform.platform()}")
    lines.append(f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    lines += gpu_lines()
    lines += [f"{name}={value}" for name, value in sorted(os.environ.items()) if is_setting(name)]
    for device, dtype in sample_calls():
        lines.append(f"attention on {device.type}, {str(dtype).removeprefix('torch.')}: {explanation(device, dtype)}")
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


def sample_calls() -> list[tuple[torch.device, torch.dtype]]:
    """The calls whose back end is explained: the CPU, and the GPU where there is one."""
    calls = [(torch.device("cpu"), torch.float32)]
    if torch.cuda.is_available():
        calls += [(torch.device("cuda"), torch.bfloat16)]
    return calls


def explanation(device: torch.device, dtype: torch.dtype) -> str:
    """What ``impl="auto"`` would choose for a small causal call, and why."""
    from hf_flash_mc.ops import explain_attention

    q, k, v = (torch.zeros(1, 4, LENGTH, HEAD_DIM, device=device, dtype=dtype) for _ in range(3))
    return " ".join(str(explain_attention(q, k, v, causal=True)).split())
