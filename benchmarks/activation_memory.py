"""Activation memory of gist and lens training: our attention, and the same heads on eager attention.

python -m benchmarks.activation_memory --out activation-memory-h100.json      # on a GPU
python -m benchmarks.activation_memory --shape tiny --context 160 --batch 2 --block 8 --dtype float32   # on a CPU

A step of training over a random frozen model, as examples/train_gist.py and train_lens.py make it, in two parts:

- read: without gradients. Gists: the teacher reads whole windows. Lens: so does it, and then runs the horizon of 16
  edited variants of each window.
- learn: the head's loss, its backward and the optimizer's step.

Memory is the most that is allocated within a part above what was allocated before the step (weights, optimizer), so it
holds everything, logits over the vocabulary too. "kept" is what autograd keeps from the forward for the backward. Eager
attention is what transformers' own does: grouped keys repeated, all logits formed, softmax in float32; a prefix shared
by variants is repeated for each. Both ways must find the same loss.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.counterfactual import SHAPES, random_model
from hf_flash_mc import MegaContextConfig, attach_megacontext
from hf_flash_mc.measure import record
from hf_flash_mc.megacontext import prefix, training
from hf_flash_mc.megacontext.distill import GistTask, Layout, teach
from hf_flash_mc.megacontext.lens_task import LensTask
from hf_flash_mc.megacontext.losses import draw_levels

HEADS = ("gists, kv", "gists, embedding", "lens")
EDITS, HORIZON, SINK, RECENT = 16, 64, 32, 64
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-2}  # of the loss
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    given, method = sys.argv[1:] if arguments is None else arguments, "the second step of two"
    run = record.describe_command(
        device, ["python", "-m", "benchmarks.activation_memory"], given, method, options.dtype
    )
    record.keep(measured(options, device), run, options.out, record.in_words)
    return 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m", help="of the frozen model")
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 8192], help="tokens of a window")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 2], help="windows of a step, for each context")
    parser.add_argument("--block", type=int, default=32, help="tokens of a gist")
    parser.add_argument("--dtype", choices=TOLERANCE, default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="JSON file")
    options = parser.parse_args(arguments)
    if len(options.batch) != len(options.context):
        parser.error(f"--batch: expected one for each context, {len(options.context)}, got {len(options.batch)}")
    return options


def measured(options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """A row of each head, context and way of attention; out of memory is a result too."""
    for context, batch in zip(options.context, options.batch, strict=True):
        for head in HEADS:
            losses: dict[str, float] = {}
            for way in ("ours", "eager"):
                row = {"head": head, "context": context, "batch": batch, "attention": way}
                try:
                    row |= one_step(head, context, batch, way, options, device)
                    losses[way] = row["loss"]
                except torch.OutOfMemoryError:
                    row["note"] = "out of memory"
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                apart = abs(losses.get("eager", 0.0) - losses.get("ours", 0.0))
                if len(losses) == 2 and apart > TOLERANCE[options.dtype] * max(1.0, abs(losses["eager"])):
                    raise RuntimeError(f"{head}: expected the same loss on both ways, got {losses}")
                yield row


def one_step(
    head: str, context: int, batch: int, way: str, options: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """MiB of each part of the second step, and the first one's loss."""
    model = random_model(options.shape, context + 2 * HORIZON, getattr(torch, options.dtype), device)
    kv = {"pooling": "query", "rank": min(64, model.config.head_dim)}
    config = MegaContextConfig(
        block_size=options.block, backend="embedding" if head == "gists, embedding" else "kv", w_max=context + HORIZON,
        sink_tokens=SINK, recent_tokens=RECENT, gist={} if head == "gists, embedding" else kv,
        lens={"kind": "dual", "width": 256, "prior": "gist_mass"} if head == "lens" else {"kind": "gist_mass"},
    )  # fmt: skip
    torch.manual_seed(0)
    attach_megacontext(model, config)
    layout = Layout.of(config, context, HORIZON)
    task = LensTask(model, layout) if head == "lens" else GistTask(model, layout)
    training.freeze_base(model, task.lens if isinstance(task, LensTask) else task.gist)
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    vocabulary = SHAPES[options.shape][-1]
    ids = torch.randint(vocabulary, (batch, context + HORIZON), generator=training.drawn(0)).to(device)
    levels = draw_levels(batch, layout.count, layout.block, layout.block / 2, training.drawn(1), [], 0)

    def read() -> tuple[Any, ...]:
        if isinstance(task, LensTask):
            return (task.measure(ids, levels, task.draw_edits(levels, EDITS, training.drawn(2)), soft=True),)
        return teach(model, ids, layout, matching=config.backend == "kv"), levels

    found: dict[str, float] = {}
    with eager_attention() if way == "eager" else nullcontext():
        for _ in range(2):  # the first makes the optimizer's state and compiles kernels
            before = allocated(device)
            inputs = peak("read", read, before, found, device)
            loss = peak("learn", partial(learn, task, inputs, optimizer, found), before, found, device)
            del inputs
            found.setdefault("loss", loss)
    return found


def learn(task: Any, inputs: tuple[Any, ...], optimizer: torch.optim.Optimizer, found: dict[str, float]) -> float:
    """A step of the optimizer; ``found`` gets MiB of what the forward keeps for the backward."""
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in task._hold[0].parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = task(*inputs)["loss"]
    found["kept_mib"] = sum(kept.values()) / 2**20
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def peak(part: str, call: Callable[[], Any], before: int, found: dict[str, float], device: torch.device) -> Any:
    """What the call gives; on a GPU ``found`` gets the most MiB above ``before`` within it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    result = call()
    if device.type == "cuda":
        found[f"{part}_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
    return result


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@contextmanager
def eager_attention() -> Iterator[None]:
    """Within: caches of a window's keys attend as transformers' eager attention does."""
    with mock.patch.multiple(prefix, flash_attention=eager, shared_prefix_attention=eager_over_prefix):
        yield


def eager(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None, bias: Tensor | None = None, **none: Any
) -> Tensor:
    """Attention with all logits ``[N, Hq, S, K]``; the last rows and keys stand side by side."""
    if any(x for x in none.values()):
        raise NotImplementedError(f"eager: expected none of {', '.join(none)}, got {none}")
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    logits = torch.matmul(q, k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        logits = logits + torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    if bias is not None:
        logits = logits + bias.repeat_interleave(groups, 1)[:, :, None].to(logits.dtype)
    return torch.matmul(logits.softmax(-1, dtype=torch.float32).to(q.dtype), v)


def eager_over_prefix(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, *, prefix_log_weight: Tensor | None,
    key_log_weight: Tensor | None, **options: Any,
) -> Tensor:  # fmt: skip
    """The prefix repeated for each of its variants, before their own keys."""
    repeat = q.shape[0] // prefix_k.shape[0]

    def joined(held: Tensor, own: Tensor) -> Tensor:
        return torch.cat((held.repeat_interleave(repeat, 0), own), 2)

    weights = [
        k.new_zeros(x.shape[:3]) if weight is None else weight.expand(x.shape[0], -1, -1)
        for x, weight in ((prefix_k, prefix_log_weight), (k, key_log_weight))
    ]
    return eager(q, joined(prefix_k, k), joined(prefix_v, v), bias=joined(*weights), **options)


if __name__ == "__main__":
    sys.exit(main())
