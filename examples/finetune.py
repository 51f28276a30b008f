"""Fine-tune a causal language model on packed text with hf-flash-mc's attention: all weights, or LoRA adapters.

    accelerate launch --config_file examples/configs/cpu.yaml examples/finetune.py --length 128 --steps 5
    accelerate launch --config_file examples/configs/one_gpu.yaml examples/finetune.py --model NAME --data FOLDER
    accelerate launch --config_file examples/configs/ddp.yaml examples/finetune.py ... --lora 16      # base frozen
    accelerate launch --config_file examples/configs/fsdp2.yaml examples/finetune.py ... --resume     # may be killed

Documents are packed into rows of --length tokens and kept apart by position ids that start anew with each. A step takes
--batch rows times --accumulate in every process; its loss is the mean over all of its tokens. In --out: metrics.jsonl,
the newest checkpoint, and at the end model/. A run that was killed goes on with --resume, and ends as if unbroken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed
from checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from packing import SUFFIXES, pack, read_documents, rows_of_step
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from hf_flash_mc import patch_model
from hf_flash_mc.megacontext.training import keep_lines

FREE = {"out", "resume", "save_every", "eval_every", "log_every", "tracker"}  # options that a resumed run may change
FREE |= {"attention", "no_compile", "checkpointing", "batch", "accumulate"}  # the rows of a step must remain


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train; the last loss in training ("loss") and on the held-out documents ("eval_loss"), in nats a token."""
    options = parse_arguments(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    accelerator = Accelerator(log_with=options.tracker, project_dir=options.out)
    check_accelerator(accelerator)
    set_seed(options.seed)
    with accelerator.main_process_first():  # a download
        tokenizer, model = load(options, accelerator.mixed_precision)
    longest = getattr(model.config, "max_position_embeddings", None) or options.length
    if options.length > longest:
        raise ValueError(f"--length: the model has {longest} positions, got {options.length}")
    documents = zip(read_documents(options.data, tokenizer), ("training text", "held-out text"), strict=True)
    train, held_out = (pack(part, options.length, name) for part, name in documents)
    model = make_trainable(model, options, accelerator.distributed_type == DistributedType.NO)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, options.lr, weight_decay=options.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(options.seed, device_specific=True)  # dropout differs between processes
    result = Run(accelerator, model, optimizer, options, train, held_out).train()
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.out / "model", state_dict=state)
        tokenizer.save_pretrained(options.out / "model")
    accelerator.end_training()
    return result


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or hub name of a causal language model (default: SmolLM2-135M)")
    add("--data", type=Path, help=f"folder of {', '.join(SUFFIXES)} files (default: Python's language reference)")
    add("--out", type=Path, default=Path("finetuned"), help="folder for checkpoints, metrics and the model")
    add("--length", type=int, default=1024, help="tokens of a packed row (default 1024)")
    add("--batch", type=int, default=1, help="rows of one forward in each process (default 1)")
    add("--accumulate", type=int, default=1, help="forwards of one step (default 1)")
    add("--steps", type=int, default=100)
    add("--lr", type=float, default=2e-5, help="highest learning rate (default 2e-5; LoRA likes 2e-4)")
    add("--warmup", type=int, default=10, help="steps of linear warmup, before a cosine down to a tenth (default 10)")
    add("--weight-decay", type=float, default=0.0)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default 1)")
    add("--lora", type=int, metavar="RANK", help="train LoRA adapters of this rank in all linear layers, base frozen")
    add("--lora-dropout", type=float, help="default 0; only with --lora")
    add("--attention", default="mc", choices=["mc", "sdpa", "eager"], help="mc: patched (default); or stock")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--checkpointing", action="store_true", help="recompute activations layer by layer: less memory, more time")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, or start where there is none")
    add("--save-every", type=int, default=50, help="steps between checkpoints (default 50)")
    add("--eval-every", type=int, default=50, help="steps between evaluations (default 50)")
    add("--log-every", type=int, default=1, help="steps between lines of metrics (default 1)")
    add("--tracker", help="tensorboard, wandb, ...: any that accelerate knows and finds installed")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    least = {"length": 2, "warmup": 0} | dict.fromkeys(("batch", "accumulate", "steps", "save_every", "eval_every"), 1)
    for name, low in (least | {"log_every": 1, "lora": 1, "weight_decay": 0, "seed": 0}).items():
        if (given := getattr(options, name)) is not None and not given >= low:
            parser.error(f"--{name.replace('_', '-')}: expected at least {low}, got {given}")
    for name in ("lr", "clip"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name}: expected more than 0, got {getattr(options, name)}")
    if not 0 <= (options.lora_dropout or 0) < 1:
        parser.error(f"--lora-dropout: expected 0 or more and less than 1, got {options.lora_dropout}")
    if options.lora is None and options.lora_dropout is not None:
        parser.error("--lora-dropout: given without --lora, so there is nothing that it could apply to")
    if options.tracker not in (None, *map(str, get_available_trackers())):
        parser.error(f"--tracker: expected one of {get_available_trackers()} (installed here), got {options.tracker}")
    if not options.resume and find_checkpoint(options.out) is not None:
        parser.error(f"--out: {options.out} holds a checkpoint; add --resume to go on from it, or name another folder")
    return options


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse what accelerate's configuration asks for and this script would not do."""
    kind, precision = accelerator.distributed_type, accelerator.mixed_precision
    supported = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if precision not in ("no", "bf16") or (kind not in supported and not accelerator.is_fsdp2):
        expected = "one process, DDP or FSDP2 (fsdp_version 2), and mixed_precision no or bf16"
        raise ValueError(f"accelerate's configuration: expected {expected}, got {kind.value} and {precision}")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not accelerator.is_fsdp2:
        raise ValueError(f"accelerate's configuration: FSDP2 needs GPUs, got {kind.value}; use DDP (configs/ddp.yaml)")
    if accelerator.gradient_accumulation_steps != 1 or accelerator.state.dynamo_plugin.backend.value != "NO":
        raise ValueError("accelerate's configuration: expected no accumulation and no dynamo; see --accumulate")


def load(options: argparse.Namespace, precision: str) -> tuple[Any, Any]:
    """Tokenizer and model: float32 weights, which bf16 casts as it goes; a frozen base in bfloat16 is kept so."""
    folder = options.model
    if folder is None:
        from smollm2 import smollm2_folder

        folder = str(smollm2_folder())
    dtype = torch.bfloat16 if options.lora and precision == "bf16" else torch.float32
    stock = "sdpa" if options.attention == "mc" else options.attention
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=stock)
    if options.attention == "mc":
        patch_model(model, packing="position_ids")
    return AutoTokenizer.from_pretrained(folder), model


def make_trainable(model: Any, options: argparse.Namespace, alone: bool) -> Any:
    """Adapters, checkpointing and compilation. Afterwards ``model(input_ids, position_ids, labels)`` is the loss's sum.

    One process compiles model and loss into one graph, whose logits never leave it. Several (not ``alone``) compile
    each layer into one graph, so that what they exchange goes on between layers.
    """
    base, layers = model, [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if options.lora:
        from peft import LoraConfig, get_peft_model

        how = {"target_modules": "all-linear", "lora_dropout": options.lora_dropout or 0.0}
        model = get_peft_model(model, LoraConfig(r=options.lora, lora_alpha=2 * options.lora, **how))
    if options.checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        base.disable_input_require_grads()  # only the reentrant kind needs them, and torch 2.11 cannot compile the hook
    forward, loss = model.forward, summed_loss
    if not options.no_compile and not alone:
        loss = torch.compile(loss, fullgraph=True)
        for layer in layers:
            layer.forward = torch.compile(layer.forward, fullgraph=True)

    def forward_to_loss(input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        return loss(forward(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits, labels)

    whole = alone and not options.no_compile
    model.forward = torch.compile(forward_to_loss, fullgraph=True) if whole else forward_to_loss
    return model.train()


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of ``logits: [B, S, V]`` in float32, summed over the tokens that have a label (not -100)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


class Run:
    """The loop with its checkpoints; everything it needs is a function of the step, or in the checkpoint."""

    def __init__(self, accelerator, model, optimizer, options, train, held_out) -> None:
        self.accelerator, self.model, self.optimizer, self.options = accelerator, model, optimizer, options
        self.train_rows, self.held_out = train, held_out
        self.rows = options.batch * options.accumulate * accelerator.num_processes  # of one step
        self.settings = {k: str(v) for k, v in vars(options).items() if k not in FREE}
        self.settings |= {"rows a step": str(self.rows), "training rows": str(len(train["labels"]))}
        self.settings["precision"] = accelerator.mixed_precision
        self.metrics = options.out / "metrics.jsonl"
        self.result: dict[str, float] = {}  # the last value of everything logged
        trained = {name for name, p in model.named_parameters() if p.requires_grad}

        def keep_trained(models: list[Any], weights: list[dict[str, Tensor]], folder: str) -> None:
            for state in weights if options.lora else []:  # a frozen base is not in checkpoints
                for name in set(state) - trained:
                    del state[name]

        accelerator.register_save_state_pre_hook(keep_trained)

    def train(self) -> dict[str, float]:
        options, main = self.options, self.accelerator.is_main_process
        first = self.resume()
        if options.tracker:
            self.accelerator.init_trackers("finetune", config=self.settings)
        bar = tqdm(total=options.steps, initial=first, disable=not (main and sys.stderr.isatty()), unit="step")
        clock = None
        for step in range(first, options.steps):
            since, begun = clock = clock or (step, time.perf_counter())
            loss, norm = self.step(step)
            done, last = step + 1, step + 1 == options.steps
            if last or done % options.log_every == 0:
                mean = self.accelerator.reduce(loss, "sum").item()
                speed = (done - since) * self.rows * options.length / (time.perf_counter() - begun)
                self.log(done, loss=mean, gradient_norm=float(norm), lr=self.rate(step), tokens_per_s=speed)
                bar.set_postfix(loss=f"{mean:.4f}")
                clock = None
            if last or done % options.eval_every == 0:
                self.log(done, eval_loss=self.evaluate())
                clock = None
            if last or done % options.save_every == 0:
                save_checkpoint(self.accelerator, options.out, done, self.settings)
                clock = None
            bar.update()
        bar.close()
        return self.result

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """One update; this process's part of the mean loss over the step's tokens, and the gradient's norm."""
        options, accelerator = self.options, self.accelerator
        chosen = rows_of_step(step, self.rows, len(self.train_rows["labels"]), options.seed)
        tokens = (self.train_rows["labels"][chosen] != -100).sum().clamp(min=1).item()
        mine = chosen.chunk(accelerator.num_processes)[accelerator.process_index].split(options.batch)
        total = torch.zeros((), device=accelerator.device)
        for i, part in enumerate(mine):
            batch = {name: x[part].to(accelerator.device) for name, x in self.train_rows.items()}
            with contextlib.nullcontext() if i == len(mine) - 1 else accelerator.no_sync(self.model):
                loss = self.model(**batch) / tokens
                accelerator.backward(loss * accelerator.num_processes)  # processes average their gradients
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), options.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, norm

    def rate(self, step: int) -> float:
        """Learning rate of a step: linear warmup, then a cosine down to a tenth."""
        warmup, steps = self.options.warmup, self.options.steps
        if step < warmup:
            return self.options.lr * (step + 1) / warmup
        return self.options.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss over the held-out tokens; processes share the rows and make equally many calls."""
        accelerator, size = self.accelerator, self.options.batch
        self.model.eval()
        count = len(self.held_out["labels"])
        total = torch.zeros((), device=accelerator.device)
        for first in range(0, count, size * accelerator.num_processes):
            rows = torch.arange(size) + first + accelerator.process_index * size
            batch = {name: x[rows.clamp(max=count - 1)] for name, x in self.held_out.items()}
            batch["labels"] = batch["labels"].masked_fill(rows[:, None] >= count, -100)
            total += self.model(**{name: x.to(accelerator.device) for name, x in batch.items()})
        self.model.train()
        return accelerator.reduce(total, "sum").item() / max((self.held_out["labels"] != -100).sum().item(), 1)

    def log(self, step: int, **values: float) -> None:
        self.result |= values
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.metrics.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            if not sys.stderr.isatty():
                print(f"step {step}: " + ", ".join(f"{k} {v:.6g}" for k, v in values.items()), flush=True)

    def resume(self) -> int:
        """Load the newest checkpoint, if asked to; the step to go on with. Metrics from after it are dropped."""
        step, how = 0, {"strict": False} if self.options.lora else {}
        if self.options.resume:
            step = load_checkpoint(self.accelerator, self.options.out, self.settings, **how)
        if self.accelerator.is_main_process:
            for line in keep_lines(self.metrics, step):
                self.result |= line
        return step


if __name__ == "__main__":
    main()
