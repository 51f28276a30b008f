"""Training runs killed at random moments and resumed each time: do they end as an unbroken run does?

python -m benchmarks.kills --out benchmarks/results/training-kills-cpu.json     # 20 kills of each script, on a CPU

Each of finetune.py (LoRA with dropout), train_gist.py and train_lens.py of examples/ trains a tiny model, unbroken and
killed. Every loss that it logs and every weight that it ends with must be the same, bit for bit. A checkpoint is
written after every step, so that kills hit these, too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.tiny import save_tiny_model
from hf_flash_mc.measure.record import describe_command

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SPEED = "tokens_per_s"  # the one thing in a log that may differ
PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Script:
    """How a script is run, and where in its folder the log and the weights at the end are."""

    name: str
    arguments: tuple[str, ...]
    log: str
    weights: str


MEMORY = ("--block-size", "4", "--context", "60", "--horizon", "8", "--sink", "4", "--recent", "8", "--batch", "2")
MEMORY += ("--train", "train.npy", "--held-out", "held-out.npy", "--windows", "4", "--log-every", "1")
MEMORY += ("--save-every", "1", "--evaluate-every", "8", "--steps", "16")
LORA = ("--data", "texts", "--length", "61", "--steps", "16", "--warmup", "3", "--lr", "1e-3", "--eval-every", "8")
LORA += ("--save-every", "1", "--no-compile", "--lora", "4", "--lora-dropout", "0.3")
LENS = '{"kind": "dual", "width": 32, "head_dim": 16, "prior": "gist_mass"}'
SCRIPTS = {
    script.name: script
    for script in (
        Script("finetune", (*LORA, "--resume"), "metrics.jsonl", "model/adapter_model.safetensors"),
        Script("train_gist", (*MEMORY, "--gist", '{"rank": 4}'), "log.jsonl", "megacontext_model.safetensors"),
        Script("train_lens", (*MEMORY, "--lens", LENS, "--edits", "5"), "log.jsonl", "megacontext_model.safetensors"),
    )
}


def prepare(folder: Path) -> None:
    """What the scripts read: a model, texts, and token files."""
    from hf_flash_mc.megacontext.training import save_tokens

    save_tiny_model(folder / "model")
    (folder / "texts").mkdir()
    documents = [topics[name].strip()[: 300 + 40 * i] for i, name in enumerate(sorted(topics)[:22])]
    for i, text in enumerate(documents):
        (folder / "texts" / f"{i:02}.txt").write_text(text)
    tokens = [torch.tensor(list(text.encode())) for text in documents]
    save_tokens(folder / "train.npy", tokens[:18])
    save_tokens(folder / "held-out.npy", tokens[18:])


def start(script: Script, folder: Path, out: Path) -> Any:
    """A run on its way, in a process of its own that may be killed."""
    process = PROCESSES.Process(target=_run, args=(script, folder, out))
    process.start()
    return process


def _run(script: Script, folder: Path, out: Path) -> None:
    os.environ.update({"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"})
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.path.append(str(EXAMPLES))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
    importlib.import_module(script.name).main(["--model", "model", "--out", str(out), *script.arguments])


def finish(process: Any) -> None:
    process.join()
    if process.exitcode:
        raise RuntimeError(f"a run ended with exit code {process.exitcode}")


def measure(script: Script, folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill so many times, resume each time, and compare with an unbroken run: a row of the result file."""
    whole, killed, rng = folder / f"{script.name}-whole", folder / f"{script.name}-killed", random.Random(seed)
    PROCESSES.set_forkserver_preload([__name__, "accelerate", "peft", "transformers.models.llama.modeling_llama"])
    warm = PROCESSES.Process(target=int)  # so that the time of a run is not that of the server's start
    warm.start()
    warm.join()
    begun = time.monotonic()
    finish(start(script, folder, whole))
    seconds = time.monotonic() - begun
    done, cut, rows = 0, 0, [compared(script, whole, whole)]
    while done < kills:
        process = start(script, folder, killed)
        process.join(rng.uniform(0.1, 0.9) * seconds)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            done += 1
        process.join()
        cut += any(killed.glob("checkpoint.part")) or any(killed.glob(".new-*"))
        if process.exitcode == 0:  # nothing left to kill: from the start once more
            rows.append(compared(script, whole, killed))
            shutil.rmtree(killed)
    finish(start(script, folder, killed))
    rows.append(compared(script, whole, killed))
    return {"script": f"{script.name}.py", "kills": done, "kills within a checkpoint": cut, "runs": len(rows) - 1} | {
        name: all(row[name] for row in rows) for name in ("same losses", "same weights")
    } | {"final loss unbroken": rows[0]["final loss"], "final loss killed": rows[-1]["final loss"]}


def compared(script: Script, whole: Path, killed: Path) -> dict[str, Any]:
    """A finished run against the unbroken one."""
    logs, weights = [], []
    for out in (whole, killed):
        lines = [json.loads(line) for line in (out / script.log).read_text().splitlines()]
        logs.append([{k: x for k, x in line.items() if k != SPEED} for line in lines])
        weights.append(load_file(out / script.weights))
    same = all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
    losses = [line["loss"] for line in logs[1] if "loss" in line]
    return {
        "same losses": logs[0] == logs[1],
        "same weights": weights[0].keys() == weights[1].keys() and same,
        "final loss": losses[-1],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", choices=sorted(SCRIPTS), default=list(SCRIPTS))
    parser.add_argument("--kills", type=int, default=20, help="of each script (default 20)")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        for name in options.scripts:
            rows.append(measure(SCRIPTS[name], Path(scratch), options.kills))
            print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    if options.out:
        given = sys.argv[1:] if arguments is None else arguments
        how = "SIGKILL after 10 to 90 % of an unbroken run's time, at random"
        run = describe_command(torch.device("cpu"), ["python", "-m", "benchmarks.kills"], given, how, "float32")
        options.out.write_text(json.dumps({"run": run, "rows": rows}, indent=1) + "\n")
    return int(not all(row["same losses"] and row["same weights"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
