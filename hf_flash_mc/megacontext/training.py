"""What the training scripts share: windows of text, a learning rate, checkpoints of heads, and checks of the optimizer.

Everything that is random is drawn from (seed, step, process), so a run goes on from any checkpoint as if it had never
stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .evaluate import sample_windows
from .io import WEIGHTS, _check_weights, _read_tensors, _write_tensors

WARMUP, CLIP, DECAY = 50, 1.0, 0.01
NOT_SETTINGS = ("out", "save_every", "evaluate_every", "windows", "tracker", "stop_after", "log_every")
OPTIMIZER, PROGRESS, PREFIX = "optimizer.safetensors", "training.json", "checkpoint-"


class Windows:
    """Windows of ``length`` tokens from files of tokens, each inside one document.

    Args:
        paths: NAME.npy, token ids ``[n]``, with NAME.starts.npy beside it, where its documents begin (`save_tokens`).
    """

    def __init__(self, *paths: str | Path, length: int) -> None:
        files = [_read_tokens(Path(path)) for path in paths]
        offsets = np.cumsum([0] + [len(tokens) for tokens, _ in files])
        self.tokens, self.length = np.concatenate([tokens for tokens, _ in files]), length
        shifted = [starts + offset for (_, starts), offset in zip(files, offsets[:-1], strict=True)]
        self.bounds = np.append(np.concatenate(shifted), offsets[-1])
        counts = np.maximum(np.diff(self.bounds) - length + 1, 0)
        self._ends = counts.cumsum()  # of the numbered windows of each document
        if not len(counts) or not self._ends[-1]:
            names = ", ".join(map(str, paths))
            raise ValueError(f"{names}: expected a document of at least {length} tokens, got none; use shorter windows")

    def draw(self, count: int, *seed: int) -> Tensor:
        """``[count, length]`` int64, at random by ``seed`` (such as seed, step, process)."""
        numbers = np.random.default_rng(seed).integers(0, self._ends[-1], count)
        document = np.searchsorted(self._ends, numbers, side="right")
        first = self.bounds[document] + numbers - np.append(0, self._ends)[document]
        rows = self.tokens[first[:, None] + np.arange(self.length)]
        return torch.from_numpy(rows.astype(np.int64))

    def apart(self, count: int, seed: int = 0) -> Tensor:
        """``[count, length]``, none overlapping another; ValueError where the text has fewer."""
        return sample_windows(self._documents(), self.length, count, seed)

    def _documents(self) -> Iterator[Tensor]:
        for first, last in zip(self.bounds[:-1], self.bounds[1:], strict=True):
            yield torch.from_numpy(np.asarray(self.tokens[first:last]).astype(np.int64))


def _read_tokens(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a file, and where its documents begin."""
    tokens, starts = load_array(path), load_array(starts_path(path))
    if tokens.ndim != 1 or starts.ndim != 1 or (np.diff(np.append(starts, len(tokens))) < 0).any():
        raise ValueError(f"{path}: expected token ids [n] and rising starts, got {tokens.shape}")
    return tokens, starts


def load_array(path: str | Path) -> np.ndarray:
    """A file of numpy's, not read into memory. ValueError for what is none."""
    try:
        return np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path}: expected a .npy file of tokens (examples/prepare_tokens.py), got {error}") from None


def starts_path(path: Path) -> Path:
    """Where the documents of a token file begin: NAME.starts.npy."""
    return path.with_suffix(".starts.npy")


def save_tokens(path: str | Path, documents: Iterable[Tensor]) -> int:
    """Write documents as one token file; how many tokens."""
    path, parts = Path(path), list(documents)
    starts = np.cumsum([0] + [len(part) for part in parts])
    tokens = torch.cat(parts).numpy() if parts else np.empty(0, np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, tokens.astype(np.uint16 if tokens.max(initial=0) < 2**16 else np.uint32))
    np.save(starts_path(path), starts[:-1].astype(np.int64))
    return len(tokens)


def learning_rate(step: int, steps: int, peak: float, warmup: int, least: float = 0.01) -> float:
    """Linear to ``peak`` over ``warmup`` steps, then a cosine to ``least`` of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def freeze_base(model: Any, head: nn.Module) -> None:
    """Only ``head`` gets gradients; the model neither gets any nor drops out."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in head.parameters():
        parameter.requires_grad_(True)


def check_learning(module: nn.Module, optimizer: Any, model: Any) -> None:
    """After a backward: every parameter of ``module`` has a gradient and is in the optimizer, and nothing else is.

    Raises:
        RuntimeError: with the name of every parameter that would never be trained, or should not be.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = dict(module.named_parameters())
    mine = {id(p) for p in named.values()}
    problems = [f"{name} is not in the optimizer" for name, p in named.items() if id(p) not in held]
    problems += [f"{name} has no gradient" for name, p in named.items() if p.grad is None]
    problems += [f"{name} is frozen" for name, p in named.items() if not p.requires_grad]
    if held - mine:
        problems.append(f"{len(held - mine)} parameters in the optimizer are no part of what is trained")
    base = [(name, p) for name, p in model.named_parameters() if id(p) not in mine]
    problems += [f"{name} of the base model is not frozen" for name, p in base if p.requires_grad or p.grad is not None]
    if problems:
        raise RuntimeError("training: " + "; ".join(problems))


def save_checkpoint(folder: str | Path, step: int, addon: Any, optimizer: Any, about: dict[str, Any]) -> Path:
    """Write ``checkpoint-STEP`` (heads, optimizer, how far) under ``folder``, then remove older ones.

    It appears whole or not at all. ``about``: the settings that a run must share to go on from it.
    """
    folder = Path(folder)
    fresh, final = folder / f".new-{step}", folder / f"{PREFIX}{step}"
    shutil.rmtree(fresh, ignore_errors=True)
    addon.save_pretrained(fresh)
    state = optimizer.state_dict()["state"]
    flat = {f"{i}.{name}": torch.as_tensor(x) for i, values in state.items() for name, x in values.items()}
    _write_tensors(fresh / OPTIMIZER, flat)
    (fresh / PROGRESS).write_text(json.dumps({"step": step, "about": about}, indent=1, sort_keys=True) + "\n")
    if final.exists():
        shutil.rmtree(final)
    os.replace(fresh, final)
    for old in checkpoints(folder):
        if old != final:
            shutil.rmtree(old)
    return final


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints under a folder, oldest first."""
    found = [p for p in Path(folder).glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def load_checkpoint(folder: Path, addon: Any, optimizer: Any, about: dict[str, Any]) -> int:
    """Put a checkpoint into heads and optimizer; how many steps it has made.

    Raises:
        ValueError: other settings, or weights that do not fit.
    """
    progress = json.loads((folder / PROGRESS).read_text())
    kept, mine = progress["about"], json.loads(json.dumps(about))
    names = sorted(k for k in {*kept, *mine} if kept.get(k) != mine.get(k))
    if names:
        differ = "; ".join(f"{k}: {kept.get(k)!r}, now {mine.get(k)!r}" for k in names)
        raise ValueError(f"{folder}: it was made with other settings ({differ}); give those, or another folder")
    weights = _read_tensors(folder / WEIGHTS)
    _check_weights(folder / WEIGHTS, weights, addon.state_dict())
    addon.load_state_dict(weights)
    state: dict[int, dict[str, Tensor]] = {}
    for key, x in _read_tensors(folder / OPTIMIZER).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = x
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(progress["step"])


def keep_lines(log: Path, step: int) -> list[dict[str, Any]]:
    """Drop a log's lines from after a step, and a half one, of a run that was killed: they come again. Those kept."""
    log.parent.mkdir(parents=True, exist_ok=True)
    text = log.read_text() if log.exists() else ""
    kept = [x for x in text.splitlines(keepends=True) if x.endswith("\n") and json.loads(x)["step"] <= step]
    fresh = log.with_name(log.name + ".new")
    fresh.write_text("".join(kept))
    fresh.replace(log)
    return [json.loads(x) for x in kept]


# ---- the scripts' own parts ------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, *, steps: int, batch: int, lr: float, every: int) -> None:
    """What every training script takes."""
    parser.add_argument("--train", required=True, nargs="+", help="tokens to learn from (prepare_tokens.py)")
    parser.add_argument("--held-out", required=True, help="tokens to evaluate on")
    parser.add_argument("--out", required=True, help="folder of the heads")
    parser.add_argument("--model", help="folder or hub name of a causal language model (default: SmolLM2-135M)")
    parser.add_argument("--context", type=int, default=2048, help="tokens of history (default 2048)")
    parser.add_argument("--horizon", type=int, default=64, help="next tokens that are judged (default 64)")
    parser.add_argument("--coarse", type=float, default=0.25, help="share of steps with gists of gists (default 0.25)")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch, help=f"windows of a step and process (default {batch})")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--save-every", type=int, default=every)
    parser.add_argument("--evaluate-every", type=int, default=every)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of an evaluation (default 64)")
    parser.add_argument("--stop-after", type=int, help="end after so many steps of this call, as if interrupted")
    parser.add_argument("--seed", type=int, default=0)
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, help="of the base model (default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--tracker", help="of accelerate: tensorboard, wandb, ...")


def check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """End with an error that names the argument where a script would do nothing, or something else than asked.

    Args:
        names: further options that must be at least 1.
    """
    from accelerate.tracking import get_available_trackers  # type: ignore[import-untyped]

    counts = ("steps", "batch", "save_every", "evaluate_every", "log_every", "windows", "stop_after", *names)
    for name, low in (dict.fromkeys(counts, 1) | {"seed": 0}).items():
        if (given := getattr(options, name)) is not None and given < low:
            parser.error(f"--{name.replace('_', '-')}: expected at least {low}, got {given}")
    if not options.lr > 0:
        parser.error(f"--lr: expected more than 0, got {options.lr}")
    if not 0 <= options.coarse <= 1:
        parser.error(f"--coarse: expected a share of 0 to 1, got {options.coarse}")
    if Path(options.held_out) in map(Path, options.train):
        parser.error(f"--held-out: expected a file that is not learnt from, got {options.held_out}")
    if options.tracker not in (None, *map(str, get_available_trackers())):
        parser.error(f"--tracker: expected one of {get_available_trackers()} (installed here), got {options.tracker}")


def settings(options: argparse.Namespace, accelerator: Any) -> dict[str, Any]:
    """What a run must share to go on from a checkpoint."""
    kept = {k: v for k, v in vars(options).items() if k not in NOT_SETTINGS}
    return kept | {"processes": accelerator.num_processes}


def start_tracker(accelerator: Any, name: str, options: argparse.Namespace) -> None:
    """Begin a tracker's run, if one is wanted; settings go as text where trackers (TensorBoard) take no lists."""
    if options.tracker:
        config = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(options).items() if v is not None}
        accelerator.init_trackers(name, config=config)


def drawn(*seed: int) -> torch.Generator:
    """Random numbers of (seed, step, process, ...)."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))


class Trainer:
    """The loop of the training scripts: it learns, saves, goes on, evaluates and writes its log.

    Args:
        task: a module whose call gives the "loss" and its parts, and whose parameters are a head's alone.
        head: the module of ``model.megacontext`` that is trained; all else is frozen.
        options: of `add_arguments`.
        shown: parts of a line of the log that the progress bar shows.
    """

    def __init__(
        self, model: Any, head: nn.Module, task: nn.Module, options: argparse.Namespace, accelerator: Any,
        shown: Sequence[str],
    ) -> None:  # fmt: skip
        if accelerator.mixed_precision != "no":
            raise ValueError(
                f"accelerate's configuration: expected mixed_precision no, got {accelerator.mixed_precision}; heads "
                "are trained in float32, and --dtype is the base model's"
            )
        freeze_base(model, head)
        self.addon, self.model, self.task = model.megacontext, model, task
        self.options, self.accelerator = options, accelerator
        optimizer = torch.optim.AdamW(task.parameters(), options.lr, betas=(0.9, 0.95), weight_decay=DECAY)
        self.shown, self.about, self.first = shown, settings(options, accelerator), 0
        self.step_of, self.optimizer = accelerator.prepare(task, optimizer)
        if found := checkpoints(options.out):
            self.first = load_checkpoint(found[-1], self.addon, self.optimizer, self.about)
            accelerator.print(f"going on from {found[-1]}")
        self.log = Path(options.out) / "log.jsonl"
        if accelerator.is_main_process:
            keep_lines(self.log, self.first)

    def run(
        self, inputs: Callable[[int], Iterable[tuple[Any, ...]]], count: int, evaluate: Callable[[], dict[str, float]]
    ) -> dict[str, Any]:
        """All steps from the last checkpoint on; the last line of the log.

        Args:
            inputs: from the number of a step to the arguments of the task's ``count`` calls in it.
            evaluate: what is measured on held-out text.
        """
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        options, main = self.options, self.accelerator.is_main_process
        last = options.steps if options.stop_after is None else min(options.steps, self.first + options.stop_after)
        line: dict[str, Any] = {}
        steps = range(self.first, last)
        bar = tqdm(steps, initial=self.first, total=options.steps, disable=not main, unit="step")
        for step in bar:
            parts = self._learn(step, inputs(step), count)
            done = step + 1
            if main and (done % options.log_every == 0 or done == last):
                line = {"step": done, **{name: float(x.detach()) for name, x in parts.items()}}
                self._note(line, bar)
            if main and (done % options.evaluate_every == 0 or done == options.steps):
                line = {"step": done, **evaluate()}
                self._note(line, bar)
                bar.write(", ".join(f"{k} {v:.4g}" for k, v in line.items()))
            if main and (done % options.save_every == 0 or done == last):
                save_checkpoint(options.out, done, self.addon, self.optimizer, self.about)
            self.accelerator.wait_for_everyone()
        if main and last == options.steps:
            self.addon.save_pretrained(options.out)
        return line

    def _learn(self, step: int, inputs: Iterable[tuple[Any, ...]], count: int) -> dict[str, Any]:
        """One step of the optimizer; the parts of the last loss, and the gradient's norm."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr, min(WARMUP, options.steps // 4))
        parts: dict[str, Any] = {}
        for arguments in inputs:
            parts = self.step_of(*arguments)
            self.accelerator.backward(parts["loss"] / count)
        norm = self.accelerator.clip_grad_norm_(self.task.parameters(), CLIP)
        if step == self.first:
            check_learning(self.task, self.optimizer, self.model)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"norm": norm, **parts}

    def _note(self, line: dict[str, Any], bar: Any) -> None:
        """To the bar, the log and the tracker."""
        bar.set_postfix({k: f"{v:.3g}" for k, v in line.items() if k in self.shown})
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.options.tracker:
            self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])
