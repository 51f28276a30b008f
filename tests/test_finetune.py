"""examples/finetune.py: sdpa's training within rounding, kills that change nothing, adapters alone, two processes.

Runs are processes forked from one that has imported everything: a run takes seconds, and killing it harms nobody.
"""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import kills

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "examples" / "configs"
KILLS = int(os.environ.get("HF_FLASH_MC_TEST_TRAINING_KILLS", "2"))
LENGTH = 61
PROCESSES = multiprocessing.get_context("forkserver")
sys.path.append(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 documents of 5 to 700 characters."""
    folder = tmp_path_factory.mktemp("texts")
    for i, name in enumerate(sorted(topics)[:22]):
        (folder / f"{i:02}.txt").write_text(topics[name].strip()[: 5 + i * i * 3 // 2])
    return folder


def run_here(arguments: list[str], environment: dict[str, str], backend: str | None) -> None:
    """One run, in a process of its own."""
    os.environ.update({"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"} | environment)
    torch.set_num_threads(1)
    if backend:
        torch.compile = functools.partial(torch.compile, backend=backend)
    if "ACCELERATE_USE_FSDP" in environment:  # which accelerate grants to processes with GPUs only
        from accelerate import PartialState
        from accelerate.utils import DistributedType

        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    import finetune

    finetune.main(arguments)


def start(model: Path, data: Path, out: Path, *more: str, backend: str | None = None, **environment: str):
    """A run of 16 steps of two rows on its way."""
    arguments = ["--model", str(model), "--data", str(data), "--out", str(out), "--length", str(LENGTH)]
    arguments += ["--steps", "16", "--warmup", "3", "--lr", "1e-3", "--eval-every", "8", *more]
    PROCESSES.set_forkserver_preload(["finetune", "peft", "transformers.models.llama.modeling_llama"])
    if backend is None:
        arguments.append("--no-compile")
    process = PROCESSES.Process(target=run_here, args=(arguments, environment, backend))
    process.start()
    return process


def finish(*processes) -> None:
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def history(out: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def log_probabilities(out: Path) -> torch.Tensor:
    """Of a text's bytes, by the stock model that a run has saved."""
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([list(topics["assert"].encode()[:200])])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(out / "model").eval()(ids).logits
    return logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def parameters(out: Path) -> torch.Tensor:
    return torch.cat([x.flatten() for _, x in sorted(load_file(out / "model" / "model.safetensors").items())])


def test_training_equals_stock_sdpa_within_rounding(tiny_model, texts, tmp_path):
    """32 steps of packed rows: losses, log-probabilities and parameters as near to sdpa's as stock eager's are."""
    outs = {name: tmp_path / name for name in ("mc", "sdpa", "eager")}
    for name, out in outs.items():
        finish(start(tiny_model, texts, out, "--attention", name, "--batch", "2", "--steps", "32"))
    assert history(outs["sdpa"])[-1] < 0.9 * history(outs["sdpa"])[0], "it must learn, or the rest says little"
    figures = {
        name: (torch.tensor(history(out) + history(out, "eval_loss")), log_probabilities(out), parameters(out))
        for name, out in outs.items()
    }
    for ours, sdpa, eager in zip(*figures.values(), strict=True):
        rounding = (eager - sdpa).abs().max()
        assert 0 < rounding < 1e-2, "stock itself must stay within rounding for this to be a bound"
        assert (ours - sdpa).abs().max() <= 2 * rounding + 3e-5 * sdpa.abs().max()
    packed = (outs["mc"] / "model" / "config.json").read_text()
    assert "mc_attention" not in packed, "what is saved is a stock model"


def test_compiled_checkpointed_and_accumulated_steps_are_the_same(tiny_model, texts, tmp_path):
    """One full graph of model and loss; two rows at once or one after the other."""
    finish(start(tiny_model, texts, tmp_path / "a", "--batch", "2", "--steps", "3"))
    more = ("--accumulate", "2", "--checkpointing", "--steps", "3")
    finish(start(tiny_model, texts, tmp_path / "b", *more, backend="aot_eager"))
    for name in ("loss", "eval_loss", "gradient_norm"):
        assert history(tmp_path / "b", name) == pytest.approx(history(tmp_path / "a", name), rel=1e-5)


@pytest.mark.parametrize("name", ["finetune", "train_gist", "train_lens"])
def test_kills_change_nothing(name, tmp_path):
    """kill -9 at random moments, also within checkpoints: losses and weights of the resumed run are the unbroken one's.

    finetune.py with dropout in the adapters, whose random numbers must go on where they were.
    """
    kills.prepare(tmp_path)
    row = kills.measure(kills.SCRIPTS[name], tmp_path, KILLS)
    assert row["kills"] == KILLS
    assert row["same losses"], row
    assert row["same weights"], row
    (last,) = (tmp_path / f"{name}-killed").glob("checkpoint*")
    assert int(last.name.removeprefix("checkpoint-")) == 16


def test_a_difference_after_a_kill_is_seen(tmp_path):
    """A comparison that cannot fail protects nothing."""
    script = kills.SCRIPTS["train_gist"]
    for name, loss, weight in (("whole", 1.0, 2.0), ("loss", 1.5, 2.0), ("weight", 1.0, 2.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / script.log).write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
        save_file({"x": torch.tensor([weight])}, tmp_path / name / script.weights)
    rows = [kills.compared(script, tmp_path / "whole", tmp_path / name) for name in ("whole", "loss", "weight")]
    assert [row["same losses"] for row in rows] == [True, False, True]
    assert [row["same weights"] for row in rows] == [True, True, False]


def test_lines_from_after_a_checkpoint_come_again(tmp_path):
    from hf_flash_mc.megacontext.training import keep_lines

    log = tmp_path / "new" / "log.jsonl"
    assert keep_lines(log, 0) == []
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert keep_lines(log, 2) == [{"step": 1}, {"step": 2}]
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_lora_trains_adapters_alone(tiny_model, texts, tmp_path):
    finish(start(tiny_model, texts, tmp_path, "--lora", "4", "--steps", "2"))
    weights = load_file(tmp_path / "checkpoint-00000002" / "model.safetensors")
    assert len(weights) == 2 * 7 * 2, "two factors for each of seven projections in each of two layers"
    assert all("lora_" in name for name in weights)
    assert all(x.any() for name, x in weights.items() if "lora_B" in name), "they start at zero"
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert len(saved) == len(weights)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_like_one(kind, tiny_model, texts, tmp_path):
    """gloo; compiled layer by layer; resumed in between."""
    from accelerate.utils.other import get_free_port

    finish(start(tiny_model, texts, tmp_path / "one", "--batch", "4"))
    more = ("--accumulate", "2", "--checkpointing", "--save-every", "2", "--resume")
    environment = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    if kind == "fsdp2":
        settings = {"version": "2", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": "true"}
        settings |= {"state_dict_type": "SHARDED_STATE_DICT"}
        environment |= {"ACCELERATE_USE_FSDP": "true"} | {f"FSDP_{k.upper()}": v for k, v in settings.items()}
    out = tmp_path / "two"
    for backend in (None, "aot_eager"):
        environment["MASTER_PORT"] = str(get_free_port())
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        runs = [start(tiny_model, texts, out, *more, backend=backend, **environment, **rank) for rank in ranks]
        if backend is None:
            while not any(out.glob("checkpoint-*")) and runs[0].is_alive():
                time.sleep(0.01)
            for run in runs:
                run.kill()
                run.join()
        else:
            finish(*runs)
    for name in ("loss", "eval_loss", "gradient_norm"):
        assert history(out, name) == pytest.approx(history(tmp_path / "one", name), rel=1e-4)


WRONG = [
    (("--steps", "0"), "--steps: expected at least 1, got 0"),
    (("--lora", "0"), "--lora: expected at least 1, got 0"),
    (("--lora-dropout", "0.1"), "without --lora"),
    (("--lr", "nan"), "--lr: expected more than 0, got nan"),
    (("--clip", "-1"), "--clip: expected more than 0, got -1.0"),
    (("--weight-decay", "-3"), "--weight-decay: expected at least 0, got -3.0"),
    (("--lora", "4", "--lora-dropout", "2"), "--lora-dropout: expected 0 or more and less than 1, got 2.0"),
    (("--seed", "-1"), "--seed: expected at least 0, got -1"),
    (("--tracker", "paper"), "--tracker: expected one of"),
    (("--attention", "flash"), "invalid choice"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda x: "_".join(x) if isinstance(x, tuple) else "")
def test_wrong_arguments_are_named(arguments, message, capsys):
    import finetune

    with pytest.raises(SystemExit):
        finetune.parse_arguments(list(arguments))
    assert message in capsys.readouterr().err


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path, capsys):
    import checkpoints
    import finetune

    (tmp_path / "checkpoint-00000007").mkdir()
    (tmp_path / "checkpoint-00000007" / "settings.json").write_text(json.dumps({"lr": "0.1", "seed": "0"}))
    with pytest.raises(SystemExit):
        finetune.parse_arguments(["--out", str(tmp_path)])
    assert "add --resume" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"lr 0\.1 -> 0\.2"):
        checkpoints.load_checkpoint(finetune.Accelerator(cpu=True), tmp_path, {"lr": "0.2", "seed": "0"})


def test_sharding_that_accelerate_leaves_out_is_refused(monkeypatch):
    """Without GPUs accelerate makes DDP of FSDP, and says nothing."""
    import finetune

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP2 needs GPUs, got NO"):
        finetune.check_accelerator(finetune.Accelerator(cpu=True))


def test_packing():
    """Labels stay within documents, positions start anew with each and with each row; a pass takes every row once."""
    import packing

    rows = packing.pack([[1, 2, 3], [4], [5, 6, 7, 8, 9], [10]], 4)
    assert rows["input_ids"].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]], "the last two tokens fill no row"
    assert rows["position_ids"].tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert rows["labels"].tolist() == [[2, 3, -100, -100], [6, 7, 8, 9]]
    assert packing.pack([[1, 2, 3, 4, 5]], 2)["position_ids"].tolist() == [[0, 1], [0, 1]]
    with pytest.raises(ValueError, match="which fill no row"):
        packing.pack([[1, 2]], 3)
    with pytest.raises(ValueError, match=r"--length 3: the held-out text has 2 tokens .* more text or shorter rows"):
        packing.pack([[1, 2]], 3, "held-out text")
    taken = torch.cat([packing.rows_of_step(step, 3, 7, seed=5) for step in range(7)]).view(3, 7)
    assert all(sorted(part.tolist()) == list(range(7)) for part in taken)
    assert len({tuple(part.tolist()) for part in taken}) == 3


def test_text_files_alone_are_read(tiny_model, tmp_path):
    """Not folders or broken links of such a name, nor empty files; bytes that are no UTF-8 are replaced."""
    import packing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"--data: .* got .*: 1 with text"):
        packing.read_documents(tmp_path, tokenizer)
    (tmp_path / "folder.txt" / "b.md").write_text("text")
    train, held_out = packing.read_documents(tmp_path, tokenizer)
    assert [len(d) for d in (*train, *held_out)] == [len("caf\N{REPLACEMENT CHARACTER}".encode()), 4]
    with pytest.raises(ValueError, match=r"got .*nowhere: no folder"):
        packing.read_documents(tmp_path / "nowhere", tokenizer)


@pytest.mark.parametrize("name", ["cpu", "one_gpu", "ddp", "fsdp2"])
def test_accelerate_takes_the_configuration(name):
    from accelerate.commands import launch

    parsed = launch.launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "finetune.py"])
    args = launch._validate_launch_command(parsed)[0]
    assert (args.use_cpu, args.multi_gpu, args.use_fsdp) == (name == "cpu", name == "ddp", name == "fsdp2")
    assert args.mixed_precision == ("no" if name == "cpu" else "bf16")
    assert args.num_processes == (2 if name in ("ddp", "fsdp2") else 1)
    assert name != "fsdp2" or (int(args.fsdp_version), args.fsdp_reshard_after_forward) == (2, True)


def test_accelerate_launches_it(tiny_model, texts, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    command += [str(CONFIGS / "cpu.yaml"), "examples/finetune.py", "--model", str(tiny_model), "--data", str(texts)]
    command += ["--out", str(tmp_path), "--length", "32", "--steps", "2", "--no-compile"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    assert "step 2: eval_loss" in result.stdout
    assert all(math.isfinite(x) for x in history(tmp_path))
