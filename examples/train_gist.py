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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from hf_flash_mc import MegaContextConfig, attach_megacontext
from hf_flash_mc.megacontext import training
from hf_flash_mc.megacontext.distill import GistTask, Layout, Weights, recovered, recovery, teach
from hf_flash_mc.megacontext.losses import draw_levels, ratio_at

WARMUP, CLIP, DECAY = 50, 1.0, 0.01
NOT_SETTINGS = ("out", "save_every", "evaluate_every", "windows", "tracker", "stop_after", "log_every")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train; the last line of the log."""
    options = parse_arguments(arguments)
    transformers_logging.set_verbosity_error()
    accelerator = Accelerator(log_with=options.tracker or None, project_dir=options.out)
    torch.manual_seed(options.seed)  # the same head in every process
    model = load(options, accelerator.device)
    layout = Layout.of(model.megacontext.config, options.context, options.horizon)
    weights = Weights(options.kl, options.mass, options.output, options.separation)
    task = GistTask(model, layout, weights)
    training.freeze_base(model, task.gist)
    optimizer: Any = torch.optim.AdamW(task.parameters(), options.lr, betas=(0.9, 0.95), weight_decay=DECAY)
    step_of: Any
    step_of, optimizer = accelerator.prepare(task, optimizer)
    if options.tracker:
        accelerator.init_trackers("train_gist", config={k: v for k, v in vars(options).items() if v is not None})
    first = 0
    if found := training.checkpoints(options.out):
        first = training.load_checkpoint(found[-1], model.megacontext, optimizer, settings(options, accelerator))
        accelerator.print(f"going on from {found[-1]}")
    line = run(step_of, task, optimizer, accelerator, options, first)
    accelerator.end_training()
    return line


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, nargs="+", help="tokens to learn from (prepare_tokens.py)")
    parser.add_argument("--held-out", required=True, help="tokens to evaluate on")
    parser.add_argument("--out", required=True, help="folder of the heads")
    parser.add_argument("--model", help="folder or hub name of a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--backend", default="kv", choices=["kv", "embedding"])
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a gist (default 32)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of history (default 2048)")
    parser.add_argument("--horizon", type=int, default=64, help="next tokens that are judged (default 64)")
    parser.add_argument("--sink", type=int, default=32)
    parser.add_argument("--recent", type=int, default=64, help="last tokens, never gists (default 64)")
    parser.add_argument("--gist", type=json.loads, help='settings of the head as JSON, such as {"rank": 64}')
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16, help="windows of a step and process (default 16)")
    parser.add_argument("--mixtures", type=int, default=1, help="mixtures of levels for each window (default 1)")
    parser.add_argument("--ratios", type=float, nargs="+", help="tokens per slot, in order (default: up to block size)")
    parser.add_argument("--coarse", type=float, default=0.25, help="share of steps with gists of gists (default 0.25)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--kl", type=float, default=1.0, help="weight of KL to the whole context's predictions")
    parser.add_argument("--mass", type=float, default=0.1, help="weight of matching attention's mass")
    parser.add_argument("--output", type=float, default=0.1, help="weight of matching attention's output")
    parser.add_argument("--separation", type=float, default=0.01, help="weight of keeping gists apart")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--evaluate-every", type=int, default=200)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of an evaluation (default 64)")
    parser.add_argument("--stop-after", type=int, help="end after so many steps of this call, as if interrupted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", help="of the base model (default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--tracker", help="of accelerate: tensorboard, wandb, ...")
    return parser.parse_args(arguments)


def settings(options: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """What a run must share to go on from a checkpoint."""
    kept = {k: v for k, v in vars(options).items() if k not in NOT_SETTINGS}
    return kept | {"processes": accelerator.num_processes}


def load(options: argparse.Namespace, device: torch.device) -> Any:
    """The base model with a fresh GistNet."""
    folder = options.model
    if folder is None:
        from smollm2 import smollm2_folder

        folder = str(smollm2_folder())
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)
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
    return attach_megacontext(model, config)


def run(
    step_of: Any, task: GistTask, optimizer: Any, accelerator: Accelerator, options: argparse.Namespace, first: int
) -> dict[str, Any]:
    """All steps from number ``first`` on."""
    layout, model = task.layout, task._hold[0]
    length = layout.context + layout.horizon
    windows = training.Windows(*options.train, length=length)
    held = training.Windows(options.held_out, length=length).apart(options.windows)
    about, main = settings(options, accelerator), accelerator.is_main_process
    last = options.steps if options.stop_after is None else min(options.steps, first + options.stop_after)
    line: dict[str, Any] = {}
    matching = options.backend == "kv" and bool(options.mass or options.output)
    bar = tqdm(range(first, last), initial=first, total=options.steps, disable=not main, unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate(step, options.steps, options.lr, min(WARMUP, options.steps // 4))
        rank = accelerator.process_index
        ids = windows.draw(options.batch, options.seed, step, rank).to(accelerator.device)
        lesson = teach(model, ids, layout, matching=matching)
        for mixture in range(options.mixtures):
            parts = step_of(lesson, levels(options, layout, step, rank, mixture))
            accelerator.backward(parts["loss"] / options.mixtures)
        norm = accelerator.clip_grad_norm_(task.parameters(), CLIP)
        if step == first:
            training.check_learning(task, optimizer, model)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if main and (done % options.log_every == 0 or done == last):
            line = {"step": done, "norm": float(norm), **{name: float(x) for name, x in parts.items()}}
            note(line, bar, accelerator, options)
        if main and (done % options.evaluate_every == 0 or done == options.steps):
            line = {"step": done, **evaluate(task, held, options.batch, accelerator.device)}
            note(line, bar, accelerator, options)
        if main and (done % options.save_every == 0 or done == last):
            training.save_checkpoint(options.out, done, model.megacontext, optimizer, about)
        accelerator.wait_for_everyone()
    if main and last == options.steps:
        model.megacontext.save_pretrained(options.out)
    return line


def levels(options: argparse.Namespace, layout: Layout, step: int, rank: int, mixture: int) -> Tensor:
    """The mixture of this step: coarser and coarser over the first half of the run."""
    ratios = options.ratios or [r for r in (4, 8, 16) if r < layout.block] + [layout.block]
    seed = np.random.SeedSequence((options.seed, step, rank, mixture)).generate_state(1)[0]
    generator = torch.Generator().manual_seed(int(seed))
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


def note(line: dict[str, Any], bar: Any, accelerator: Accelerator, options: argparse.Namespace) -> None:
    """To the bar, the log and the tracker."""
    bar.set_postfix({k: f"{v:.3g}" for k, v in line.items() if k in ("loss", "kl", "recovered")})
    Path(options.out).mkdir(parents=True, exist_ok=True)
    with (Path(options.out) / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    if options.tracker:
        accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])
    if "recovered" in line:
        bar.write(", ".join(f"{k} {v:.4g}" for k, v in line.items()))


if __name__ == "__main__":
    main()
