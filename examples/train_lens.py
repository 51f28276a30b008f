"""Train a model's LensNet: scores that say which gists are worth their text again, and which text is worth its slots.

    python examples/prepare_tokens.py --package python3.11-doc --name python-docs --out data
    accelerate launch examples/train_lens.py --train data/python-docs-train.npy \
        --held-out data/python-docs-held-out.npy --out heads/lens-32 --steps 300 --batch 8   # SmolLM2-135M, one GPU
    ... --heads heads/kv-32 --out heads/kv-lens-32                      # for trained gists, which stay as they are
    ... --lens '{"kind": "transformer", "layers": 2, "width": 256}'     # the other network

Base model and gists are frozen, in bfloat16 on a GPU (leave accelerate's mixed_precision off). Each step reads windows
once, shows some of their blocks as gists, and measures what ``--edits`` single edits of each window do to the next
tokens, all in one forward over what they share; the lens learns to rank them. With ``--lessons N`` the measurements of
the first N steps serve all later ones, for machines where measuring takes longer than learning.
Every ``--save-every`` steps heads and optimizer are saved under ``--out``, and the same command goes on from there,
with the same result as an unbroken run. What remains is ``--out`` itself, for `load_megacontext` and
``hf-flash-mc evaluate --heads``, and ``log.jsonl``: what the four gists that each lens would expand gain on held-out
text, in nats a token.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from smollm2 import load_base
from torch import Tensor
from transformers.utils import logging as transformers_logging

from hf_flash_mc import MegaContextConfig, attach_megacontext
from hf_flash_mc.megacontext import training
from hf_flash_mc.megacontext.distill import Layout
from hf_flash_mc.megacontext.io import load_gist
from hf_flash_mc.megacontext.lens_task import LensTask, LensWeights, Measured, ranking
from hf_flash_mc.megacontext.lensnet import GistMassLens, RecencyLens, TrainedLens
from hf_flash_mc.megacontext.losses import draw_levels
from hf_flash_mc.megacontext.states import heads_config

LENS = {"kind": "dual", "width": 256, "prior": "gist_mass"}
SIZES = {"block_size": "block_size", "sink": "sink_tokens", "recent": "recent_tokens", "max_lod": "max_lod"}
EXPANSIONS = 4  # that lenses are compared at


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train; the last line of the log."""
    options = parse_arguments(arguments)
    transformers_logging.set_verbosity_error()
    accelerator = Accelerator(log_with=options.tracker or None, project_dir=options.out)
    torch.manual_seed(options.seed)  # the same head in every process
    model = load(options, accelerator.device)
    layout = Layout.of(model.megacontext.config, options.context, options.horizon)
    task = LensTask(model, layout, LensWeights(options.rank, options.regression, options.budget))
    trainer = training.Trainer(model, task.lens, task, options, accelerator, ("loss", "rank", "lens"))
    training.start_tracker(accelerator, "train_lens", options)
    lessons = Lessons(task, options, accelerator)
    line = trainer.run(lessons.of_step, 1, lessons.evaluate)
    accelerator.end_training()
    return line


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.add_arguments(parser, steps=300, batch=8, lr=1e-3, every=50)
    parser.add_argument("--heads", help="folder of trained gists (train_gist.py), whose settings are taken over")
    parser.add_argument("--block-size", type=int, help="tokens of a gist (default 32)")
    parser.add_argument("--sink", type=int, help="first tokens, never gists (default 32)")
    parser.add_argument("--recent", type=int, help="last tokens, never gists (default 64)")
    parser.add_argument("--max-lod", type=int, help="coarsest level of detail (default 2)")
    parser.add_argument("--lens", type=json.loads, default=LENS, help=f"the lens as JSON (default {json.dumps(LENS)})")
    parser.add_argument("--edits", type=int, default=16, help="edits that are measured of each window (default 16)")
    parser.add_argument("--ratios", type=float, nargs="+", help="tokens per slot, by turns (default: block / 2, block)")
    parser.add_argument("--lessons", type=int, help="steps whose measurements serve all others (default: all)")
    parser.add_argument("--true-tokens", action="store_true", help="gains on true tokens, not the whole window's")
    parser.add_argument("--rank", type=float, default=1.0, help="weight of ranking edits (Bradley-Terry)")
    parser.add_argument("--regression", type=float, default=0.1, help="weight of predicting what an expansion gains")
    parser.add_argument("--budget", type=float, default=0.1, help="weight of asking for as much as is given")
    options = parser.parse_args(arguments)
    training.check_arguments(parser, options, "edits", "lessons")
    if options.heads and any(getattr(options, name) is not None for name in SIZES):
        parser.error("--heads: the sizes are theirs; leave --block-size, --sink, --recent and --max-lod out")
    return options


def load(options: argparse.Namespace, device: torch.device) -> Any:
    """The base model with gists, trained or not, and a fresh lens."""
    sizes = {field: x for name, field in SIZES.items() if (x := getattr(options, name)) is not None}
    sizes |= {"w_max": options.context + options.horizon, "lens": options.lens}
    if options.heads:
        config = dataclasses.replace(heads_config(options.heads), **sizes)
    else:
        config = MegaContextConfig(**{"recent_tokens": 64, **sizes})
    model = attach_megacontext(load_base(options.model, options.dtype, device), config)
    if not isinstance(model.megacontext.lens, TrainedLens):
        raise SystemExit(f"--lens: expected a kind that is trained, dual or transformer, got {options.lens}")
    if options.heads:
        load_gist(model.megacontext, Path(options.heads))
    return model


class Lessons:
    """What the lens learns from and is judged by: windows of text, and measured edits of them."""

    def __init__(self, task: LensTask, options: argparse.Namespace, accelerator: Accelerator) -> None:
        length = options.context + options.horizon
        self.task, self.options, self.accelerator = task, options, accelerator
        self.windows = training.Windows(*options.train, length=length)
        self.held = training.Windows(options.held_out, length=length).apart(options.windows)
        self.kept: dict[int, Measured] = {}
        self.judged: list[Measured] = []

    def of_step(self, step: int) -> Iterator[tuple[Measured]]:
        """The measurements of a step."""
        options = self.options
        if not options.lessons or options.lessons >= options.steps:
            yield (self.measure(step),)
            return
        number = step % options.lessons
        if number not in self.kept:
            self.kept[number] = self.measure(number)
        yield (self.kept[number],)

    def measure(self, number: int) -> Measured:
        """Random edits of random working contexts of random windows."""
        options, task, rank = self.options, self.task, self.accelerator.process_index
        ids = self.windows.draw(options.batch, options.seed, number, rank).to(self.accelerator.device)
        generator = training.drawn(options.seed, number, rank)
        levels = self.levels(number, generator)
        edits = task.draw_edits(levels, options.edits, generator)
        return task.measure(ids, levels, edits, soft=not options.true_tokens)

    def levels(self, number: int, generator: torch.Generator) -> Tensor:
        """Of the working contexts of a step."""
        layout, options = self.task.layout, self.options
        ratios = options.ratios or [layout.block / 2, layout.block]
        groups = layout.groups if self.task.config.max_lod > 1 else []
        coarse = 0
        if groups and float(torch.rand((), generator=generator)) < options.coarse:
            coarse = int(torch.randint(1, len(groups) + 1, (), generator=generator))
        ratio = ratios[number % len(ratios)]
        return draw_levels(options.batch, layout.count, layout.block, ratio, generator, groups, coarse)

    def evaluate(self) -> dict[str, float]:
        """What the gists that each lens would expand gain on held-out windows, all of whose blocks are gists."""
        task, found = self.task, []
        lenses = {"lens": task.lens, "gist_mass": GistMassLens(task.config), "recency": RecencyLens(task.config)}
        if not self.judged:
            for ids in self.held.split(self.options.batch):
                levels = torch.ones(len(ids), task.layout.count, dtype=torch.int64)
                edits = task.draw_edits(levels, None)
                ids = ids.to(self.accelerator.device)
                self.judged.append(task.measure(ids, levels, edits, soft=not self.options.true_tokens))
        for measured in self.judged:
            found.append(ranking(task, measured, lenses, EXPANSIONS))
        return {name: float(torch.cat([x[name] for x in found]).mean()) for name in found[0]}


if __name__ == "__main__":
    main()
