"""One training step of a Llama-shaped model: stock sdpa, flex and ours, eager and compiled.

Forward, loss and backward; "llama-1b" has twice the layers, and AdamW's step.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from hf_flash_mc.measure.cells import TRAIN_HIDDEN, TRAIN_LAYERS, TRAIN_MLP, TRAIN_VOCABULARY, TUNE_LAYERS, Cell
from hf_flash_mc.measure.record import Line, line

STEPS = 7
LONGEST_EAGER = 32768  # tokens, above which eager activations fill an 80 GiB card
COMPILE_SECONDS = 60.0  # that a compiled variant is given at least, under a time limit
# Parts of kernels' names: ours, FlashAttention's, cuDNN's and flex's; cuBLAS's, CUTLASS's and the CPU's; AdamW's
_KINDS = {
    "attention": ("attn", "attention", "flash", "fmha", "sdpa", "few_keys", "few_queries"),
    "matmul": ("gemm", "matmul", "cutlass", "nvjet", "cublas", "aten::mm", "aten::bmm", "aten::addmm"),
    "optimizer": ("adam",),
}
_FUSED = ("triton_poi", "triton_red", "triton_per")  # torch.compile's own, named after whatever they are fused from
_NAMES = (
    "ours", "sdpa", "ours-compiled", "sdpa-compiled", "flex-compiled",
    "ours-compiled-checkpointed", "sdpa-compiled-checkpointed",
)  # fmt: skip


def variants(cell: Cell) -> list[str]:
    """What is measured at this length: checkpointing where memory is what counts, eager where it fits."""
    long = cell.sq > LONGEST_EAGER
    return [n for n in _NAMES if (("compiled" in n) if long else ("checkpointed" not in n))]


def make_model(cell: Cell, device: torch.device, layers: int = TRAIN_LAYERS, hidden: int = TRAIN_HIDDEN) -> Any:
    """Random weights in bfloat16 (float32 on a CPU), stock sdpa attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=TRAIN_MLP * hidden // TRAIN_HIDDEN, num_hidden_layers=layers,
        num_attention_heads=cell.q_heads, num_key_value_heads=cell.kv_heads, head_dim=cell.head_dim,
        vocab_size=TRAIN_VOCABULARY, max_position_embeddings=cell.sq, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).train()


def measure(
    cell: Cell, device: torch.device, left: Callable[[], float], report: Callable[[list[Line]], None] | None = None,
    **sizes: int,
) -> tuple[list[Line], list[str]]:  # fmt: skip
    """Lines of every variant, one after the other (two do not fit side by side); the names of those left out in time.

    The loss of the first step must agree with stock sdpa's, which runs eagerly (or compiled, where eager does not fit).
    ``report`` is given each line as soon as it is there.
    """
    lines, missing, losses = [], [], {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if cell.feature == "llama-1b":
        sizes.setdefault("layers", TUNE_LAYERS)
    for name in variants(cell):
        if left() < (COMPILE_SECONDS if "compiled" in name else 15.0):
            missing.append(f"{cell.name} {name}")
            continue
        try:
            times, peak, losses[name], spent = _measure(cell, device, name, left, sizes)
            note = f"loss {losses[name]:.4f}; {spent}"
        except Exception as error:  # out of memory is a result
            times, peak, note = [], None, f"not run: {type(error).__name__}: {str(error).splitlines()[0]}"[:200]
        stock = next((losses[n] for n in ("sdpa", "sdpa-compiled") if n in losses), None)
        if name in losses and stock is not None and abs(losses[name] - stock) > 2e-3 * abs(stock):
            times, note = [], f"wrong: loss {losses[name]:.5f}, stock sdpa has {stock:.5f}"
        lines.append(line(cell, dtype, "step", name, times, note, peak))
        if report is not None:
            report(lines[-1:])
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return lines, missing


def breakdown(step: Callable[[], object], gpu: bool) -> str:
    """Where one step's time goes, by the names of kernels (of operators, on a CPU), as a note in milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as recorded:
        step()
        if gpu:
            torch.cuda.synchronize()
    spent = dict.fromkeys((*_KINDS, "other"), 0.0)
    for event in recorded.key_averages():
        name = event.key.lower()
        kinds = {} if name.startswith(_FUSED) else _KINDS
        kind = next((k for k, parts in kinds.items() if any(part in name for part in parts)), "other")
        spent[kind] += (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3
    return ", ".join(f"{kind} {ms:.3f} ms" for kind, ms in spent.items() if ms)


def _measure(
    cell: Cell, device: torch.device, name: str, left: Callable[[], float], sizes: dict[str, int]
) -> tuple[list[float], float | None, float, str]:
    """Milliseconds of steps, peak GiB, the first loss, and the breakdown of one more step."""
    from hf_flash_mc.patches import patch_model

    model = make_model(cell, device, **sizes)
    if name.startswith("ours"):
        patch_model(model)
    if name.startswith("flex"):
        model.set_attn_implementation("flex_attention")
    if name.endswith("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    run = torch.compile(model) if "compiled" in name else model
    tunes = cell.feature == "llama-1b"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if tunes else None
    ids = torch.randint(TRAIN_VOCABULARY, (cell.batch, cell.sq), generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss.detach()

    first = step().item()
    step()
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < STEPS and (len(times) < 3 or left() > 10):
        start = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    return times, peak, first, breakdown(step, gpu)
