"""Train a model's GistNet: gists that the frozen model can use in place of the text they stand for.

    python examples/prepare_tokens.py --package python3.11-doc --name python-docs --out data
    accelerate launch examples/train_gist.py --train data/python-docs-train.npy \
        --held-out data/python-docs-held-out.npy --out heads/kv-32 --steps 2000 --batch 16   # SmolLM2-135M, one GPU
    ... --block-size 8 --out heads/kv-8                                 # gists of 8 tokens
    ... --backend embedding --out heads/embedding-32 --lr 3e-4          # gists as input embeddings

The base model is frozen, in bfloat16 on a GPU (leave accelerate's mixed_precision off). Each step reads windows once
(the teacher) and runs their last tokens over a random mixture of tokens, gists and gists of gists; the mixtures grow
coarser over the first half of the run. Every ``--save-every`` steps the heads and the optimizer are saved under
``--out``, and the same command goes on from there, with the same result as an unbroken run. What remains is ``--out``
itself, for `load_megacontext`, and ``log.jsonl``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from smollm2 import load_base
from torch import Tensor
from transformers.utils import logging as transformers_logging

from hf_flash_mc import MegaContextConfig, attach_megacontext
from hf_flash_mc.megacontext import training
from hf_flash_mc.megacontext.distill import GistTask, Layout, Lesson, Weights, recovered, recovery, teach
from hf_flash_mc.megacontext.losses import draw_levels, ratio_at


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train; the last line of the log."""
    options = parse_arguments(arguments)
    transformers_logging.set_verbosity_error()
    accelerator = Accelerator(log_with=options.tracker or None, project_dir=options.out)
    torch.manual_seed(options.seed)  # the same head in every process
    model = load(options, accelerator.device)
    layout = Layout.of(model.megacontext.config, options.context, options.horizon)
    task = GistTask(model, layout, Weights(options.kl, options.mass, options.output, options.separation))
    trainer = training.Trainer(model, task.gist, task, options, accelerator, ("loss", "kl", "recovered"))
    training.start_tracker(accelerator, "train_gist", options)
    windows = training.Windows(*options.train, length=options.context + options.horizon)
    held = training.Windows(options.held_out, length=options.context + options.horizon).apart(options.windows)
    inputs = partial(lessons, model, layout, windows, options, accelerator)
    line = trainer.run(inputs, options.mixtures, lambda: evaluate(task, held, options.batch, accelerator.device))
    accelerator.end_training()
    return line


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.add_arguments(parser, steps=2000, batch=16, lr=1e-3, every=200)
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a gist (default 32)")
    parser.add_argument("--sink", type=int, default=32)
    parser.add_argument("--recent", type=int, default=64, help="last tokens, never gists (default 64)")
    parser.add_argument("--backend", default="kv", choices=["kv", "embedding"])
    parser.add_argument("--gist", type=json.loads, help='settings of the head as JSON, such as {"rank": 64}')
    parser.add_argument("--mixtures", type=int, default=1, help="mixtures of levels for each window (default 1)")
    parser.add_argument("--ratios", type=float, nargs="+", help="tokens per slot, in order (default: up to block size)")
    parser.add_argument("--kl", type=float, default=1.0, help="weight of KL to the whole context's predictions")
    parser.add_argument("--mass", type=float, default=0.1, help="weight of matching attention's mass")
    parser.add_argument("--output", type=float, default=0.1, help="weight of matching attention's output")
    parser.add_argument("--separation", type=float, default=0.01, help="weight of keeping gists apart")
    options = parser.parse_args(arguments)
    training.check_arguments(parser, options, "mixtures")
    return options


def load(options: argparse.Namespace, device: torch.device) -> Any:
    """The base model with a fresh GistNet."""
    default = {"pooling": "query", "rank": 64} if options.backend == "kv" else {}
    config = MegaContextConfig(
        block_size=options.block_size,
        backend=options.backend,
        w_max=options.context + options.horizon,
        sink_tokens=options.sink,
        recent_tokens=options.recent,
        gist=default if options.gist is None else options.gist,
        lens={"kind": "gist_mass"},
    )
    return attach_megacontext(load_base(options.model, options.dtype, device), config)


def lessons(
    model: Any, layout: Layout, windows: training.Windows, options: argparse.Namespace, accelerator: Any, step: int
) -> Iterator[tuple[Lesson, Tensor]]:
    """Windows of a step, read once, with one mixture of levels after the other."""
    rank = accelerator.process_index
    ids = windows.draw(options.batch, options.seed, step, rank).to(accelerator.device)
    matching = options.backend == "kv" and bool(options.mass or options.output)
    lesson = teach(model, ids, layout, matching=matching)
    for mixture in range(options.mixtures):
        yield lesson, levels(options, layout, step, rank, mixture)


def levels(options: argparse.Namespace, layout: Layout, step: int, rank: int, mixture: int) -> Tensor:
    """The mixture of this step: coarser and coarser over the first half of the run."""
    ratios = options.ratios or [r for r in (4, 8, 16) if r < layout.block] + [layout.block]
    generator = training.drawn(options.seed, step, rank, mixture)
    coarse = 0
    if layout.groups and float(torch.rand((), generator=generator)) < options.coarse:
        coarse = int(torch.randint(1, len(layout.groups) + 1, (), generator=generator))
    ratio = ratio_at(step, max(1, options.steps // 2), ratios)
    return draw_levels(options.batch, layout.count, layout.block, ratio, generator, layout.groups, coarse)


def evaluate(task: GistTask, held: Tensor, batch: int, device: torch.device) -> dict[str, float]:
    """Nats above the whole context on the second half of the horizon, and the share recovered, on held-out windows."""
    rows: dict[str, list[Tensor]] = {}
    for part in held.split(batch):
        for name, x in recovery(task, part.to(device)).items():
            rows.setdefault(name, []).append(x)
    found = {name: torch.cat(parts) for name, parts in rows.items()}
    cost = {name: float((found[name] - found["whole"]).mean()) for name in ("drop", "gists")}
    return {"held_out_drop": cost["drop"], "held_out_gists": cost["gists"], "recovered": recovered(found)}


if __name__ == "__main__":
    main()
