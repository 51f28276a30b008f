"""Every kernel through the public functions, on small shapes and hostile values, to be watched by a sanitizer.

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m benchmarks.sanitize --quick
    TRITON_INSTRUMENTATION_MODE=consan python -m benchmarks.sanitize --shapes 4    # Triton's own, for mbarriers

    for i in $(seq 0 15); do compute-sanitizer ... python -m benchmarks.sanitize --shard $i/16 & done; wait

Hostile means key_ranges and cu_seqlens far outside the tensors, negative, reversed and not monotonic: the kernels must
clamp them. PYTORCH_NO_CUDA_MEMORY_CACHING=1 (set here) gives every tensor an allocation of its own, so that a step
outside is one the sanitizer sees.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hf_flash_mc.ops import explain_attention, flash_attention, flash_attention_varlen

LARGEST, SMALLEST = 2**31 - 1, -(2**31)
# B, Hq, Hkv, Sq, Sk; the last one has keys enough for the portable kernels to use the tensor memory accelerator
DENSE = [(1, 2, 1, 1, 1), (2, 4, 2, 63, 111), (1, 2, 2, 111, 63), (1, 4, 1, 257, 257), (1, 2, 1, 130, 530)]
HEAD_DIMS = [(16, 16), (64, 64), (80, 80), (128, 64), (256, 256)]
LENGTHS = [(5, 70, 0, 33), (9, 64, 12, 0)]  # of the packed sequences: queries, keys
INSTRUMENTED = bool(os.environ.get("TRITON_INSTRUMENTATION_MODE"))


def give_scratch(_: Any = None) -> None:
    """What instrumented kernels keep their notes in; Triton knows an allocator by thread, and autograd has its own."""
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def hostile_ranges(*shape: int, device: str) -> Tensor:
    """int32 [*shape, 2] of values that no kernel may believe."""
    wild = torch.tensor([SMALLEST, -1, 0, 1, 7, 64, 100000, LARGEST], dtype=torch.int32, device=device)
    count = 2 * torch.Size(shape).numel()
    return wild[(torch.arange(count, device=device) * 5 + 3) % len(wild)].reshape(*shape, 2).contiguous()


def dense_options(b: int, hq: int, hkv: int, sq: int, sk: int, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Named keyword arguments that between them switch every feature on."""
    weight = torch.zeros(b, hkv, sk, device=device)
    yield "plain", {}
    yield "causal", {"causal": True}
    yield "window", {"window": (5, 3)}
    yield "hostile ranges", {"key_ranges": hostile_ranges(b, 1, sq, device=device)}
    yield "hostile ranges by head, causal", {"key_ranges": hostile_ranges(1, hq, sq, device=device), "causal": True}
    yield "mask", {"mask": torch.ones(1, 1, sq, sk, dtype=torch.bool, device=device).tril()}
    yield "bias", {"bias": torch.zeros(1, hq, sq, sk, device=device, requires_grad=True)}
    yield "bias by key", {"bias": torch.zeros(1, hq, 1, sk, device=device, requires_grad=True)}
    yield "key_log_weight", {"key_log_weight": weight.index_fill(2, torch.tensor([0], device=device), -torch.inf)}
    yield "gradient of key_log_weight", {"key_log_weight": weight.clone().requires_grad_()}
    yield "ALiBi and softcap", {"alibi_slopes": torch.full((hq,), 0.1, device=device), "softcap": 20.0, "causal": True}
    yield "sinks and dropout", {"sinks": torch.zeros(hq, device=device, requires_grad=True), "dropout_p": 0.25}


def hostile_lengths(n: int, total: int, device: str) -> Iterator[tuple[str, Tensor]]:
    """Named cu_seqlens: a true one and, where nothing checks values before the kernels do, four that lie."""
    true = torch.linspace(0, total, n + 1).round()
    lies = {
        "true": true,
        "past the end": true * 1000,
        "negative": true - 2 * total,
        "falling": true.flip(0),
        "extreme": torch.tensor([SMALLEST, LARGEST - 64] * n, dtype=torch.float64)[: n + 1],
    }
    for name, values in lies.items():
        if name != "true" and device == "cpu":
            return
        yield name, values.to(torch.int32).to(device)


def run(name: str, call: Callable[..., Any], qkv: tuple[Tensor, ...], options: dict[str, Any], split: bool) -> int:
    """Forward and backward (``split``: the deterministic form), through lse too; then wait.

    A call that the back end does not take is left out, and said so. Returns how many calls were made.
    """
    explained = explain_attention(*qkv, **options)
    if explained.impl is None:
        print(f"  {name}: left out: {'; '.join(explained.reasons)}", flush=True)
        return 0
    print(f"  {name}, {[tuple(x.shape) for x in qkv]}, {'split' if split else 'default'} backward", flush=True)
    torch.use_deterministic_algorithms(split)
    leaves = [x.detach().requires_grad_() for x in qkv]
    extra = [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
    out, lse = call(*leaves, **options, return_lse=True)
    if INSTRUMENTED:
        for x in (out, lse):
            x.register_hook(give_scratch)
    safe = torch.where(lse.isfinite(), lse, torch.zeros_like(lse))
    torch.autograd.grad((out.float().sum() + safe.sum()), [*leaves, *extra], allow_unused=True)
    if out.is_cuda:
        torch.cuda.synchronize()
    return 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape and two head dims")
    parser.add_argument("--shapes", type=int, nargs="+", metavar="I", help="of DENSE: only these")
    parser.add_argument("--head-dims", type=int, nargs="+", metavar="D", help="of q and k: only these")
    parser.add_argument("--shard", default="0/1", help="I/N: the I-th of every N kinds of call (default 0/1, all)")
    parser.add_argument("--impl", default="triton", help="the back end (default triton)")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    device, count = options.device, 0
    if device == "cuda":  # not on import: CUDA graphs need the cache, and tests import this module
        os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    mine, shards = (int(n) for n in options.shard.split("/"))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes, head_dims = (DENSE[1:2], HEAD_DIMS[1:3]) if options.quick else (DENSE, HEAD_DIMS)
    shapes = shapes if options.shapes is None else [DENSE[i] for i in options.shapes]
    head_dims = [x for x in head_dims if options.head_dims is None or x[0] in options.head_dims]
    if INSTRUMENTED:
        give_scratch()
    queries, keys = (sum(n) for n in LENGTHS)
    kinds = len(list(dense_options(*DENSE[0], device)))
    for n, (d, dv) in enumerate(head_dims):
        for b, hq, hkv, sq, sk in shapes:
            sizes = ((b, sq, hq, d), (b, sk, hkv, d), (b, sk, hkv, dv))
            qkv = tuple(torch.randn(*s, device=device, dtype=dtype).transpose(1, 2) for s in sizes)
            for i, (name, extra) in enumerate(dense_options(b, hq, hkv, sq, sk, device)):
                if (n * kinds + i) % shards != mine:  # a shard keeps its kernels for all shapes
                    continue
                for deterministic in (False, True):
                    count += run(name, flash_attention, qkv, {**extra, "impl": options.impl}, deterministic)
        sizes = ((queries, 4, d), (keys, 2, d), (keys, 2, dv))
        qkv = tuple(torch.randn(*s, device=device, dtype=dtype) for s in sizes)
        for i, extra in enumerate(({}, {"causal": True}, {"key_ranges": hostile_ranges(queries, device=device)})):
            if (n * 3 + i) % shards != mine:
                continue
            for (name, cu_q), (_, cu_k) in zip(
                hostile_lengths(4, queries, device), hostile_lengths(4, keys, device), strict=True
            ):
                packed = {
                    "cu_seqlens_q": cu_q,
                    "cu_seqlens_k": cu_k,
                    "max_seqlen_q": max(LENGTHS[0]),
                    "max_seqlen_k": 64,
                }
                call = {**packed, **extra, "impl": options.impl}
                count += run(name, flash_attention_varlen, qkv, call, name == "true")
        print(f"D{d}/{dv}: {count} calls", flush=True)
    torch.use_deterministic_algorithms(False)
    print(f"{count} calls, forward and backward, came back")
    return 0


if __name__ == "__main__":
    sys.exit(main())
