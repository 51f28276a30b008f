"""Patched models under others' parallelism (two gloo processes): transformers' and torch's tensor parallelism, and
accelerate's context parallelism, by hand and in transformers' Trainer. Losses and gradients are one process's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patch_models import VOCAB, causal_config, causal_model
from ranks import RANKS, gloo, on_ranks
from torch import Tensor, nn

from hf_flash_mc import patch_model, patch_report, shard_batch

BATCH, LENGTH, PADDED = 2, 32, 5


def make_batch(padded: int = 0) -> dict[str, Tensor]:
    """Labels of a part of the tokens; the first row begins with padding, which predicts nothing."""
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=gen)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=gen) < 0.3, -100)
    mask = torch.ones_like(ids)
    mask[0, :padded], labels[0, : padded + 1] = 0, -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def step(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss, and gradients with the shards of every rank put together."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in grads.items()}


def check_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], name: str) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")
    assert found[1].keys() == expected[1].keys(), name
    for key, grad in expected[1].items():
        difference = (found[1][key] - grad).abs().max()
        assert difference <= 2e-5 * grad.abs().max().clamp(min=1e-3), f"{name}: gradient of {key} differs"


def environment_body(rank: int) -> None:
    """What a launcher sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= {name: str(x) for name, x in names.items()}


# ---- tensor parallelism ----------------------------------------------------------------------------------------------


def transformers_plan_body(rank: int) -> None:
    """Heads, grouped ones too, go to the ranks by a model's own plan; rows are padded on the left."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    batch = make_batch(PADDED)
    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(folder)
    for family in ("llama", "mistral", "qwen3", "gemma2"):
        config = causal_config(family)
        config.vocab_size = VOCAB + 1  # transformers 5.17 splits no head of an odd size
        whole = causal_model(family, config)
        where = os.path.join(folder[0], family)
        if rank == 0:
            whole.save_pretrained(where)
        dist.barrier()
        patched = patch_model(AutoModelForCausalLM)
        split = patched.from_pretrained(where, distributed_config=DistributedConfig(tp_size=RANKS)).float()
        assert split.model.layers[0].self_attn.k_proj.weight.to_local().shape[0] * RANKS == 2 * split.config.head_dim
        check_same(step(split, batch), step(whole, batch), family)
        assert not patch_report(split).not_reached
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])


def torch_plan_body(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
    whole, split = causal_model("llama"), patch_model(causal_model("llama"))
    for layer in split.model.layers:
        parallelize_module(layer, init_device_mesh("cpu", (RANKS,)), plan)
    check_same(step(split, make_batch(PADDED)), step(whole, make_batch(PADDED)), "parallelize_module")


# ---- accelerate ------------------------------------------------------------------------------------------------------


def fsdp2_here() -> None:
    """FSDP2, which accelerate grants to processes with GPUs only."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}


def mean_over_ranks(found: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = found[0].clone()
    dist.all_reduce(loss)
    return loss / RANKS, found[1]


def accelerate_body(rank: int) -> None:
    """cp_size: batches cut by shard_batch, or by accelerate, whose order is that of our zigzag."""
    from accelerate import Accelerator, PartialState
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState

    os.environ["ACCELERATE_USE_CPU"] = "true"
    PartialState(cpu=True)
    fsdp2_here()
    accelerator = Accelerator(cpu=True, parallelism_config=ParallelismConfig(cp_size=RANKS))
    mesh, batch = accelerator.torch_device_mesh["cp"], make_batch()
    expected = step(causal_model("llama"), batch)
    model = patch_model(causal_model("llama"), context_parallel=mesh)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    check_same(mean_over_ranks(step(model, shard_batch(batch, mesh))), expected, "shard_batch")

    batch["shift_labels"] = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    batch["position_ids"] = torch.arange(LENGTH).repeat(BATCH, 1)
    items = (batch["shift_labels"] != -100).sum() / RANKS
    cut = list(batch.values())
    with accelerator.maybe_context_parallel(cut, [1] * len(cut), set(cut)):
        check_same(mean_over_ranks(step(model, {**batch, "num_items_in_batch": items})), expected, "accelerate's cut")

    alone, batch = patch_model(causal_model("llama"), fallback="sdpa"), make_batch()
    cut, advice = [batch["input_ids"]], r"own part of the keys.*patch_model\(model, context_parallel=mesh\)"
    with accelerator.maybe_context_parallel(cut, [1], set(cut)), pytest.raises(RuntimeError, match=advice):
        alone(batch["input_ids"])
    del os.environ["ACCELERATE_USE_FSDP"]
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer_body(rank: int) -> None:
    """Two steps of two batches each, as docs/distributed.md has it."""
    from accelerate.parallelism_config import ParallelismConfig
    from transformers import Trainer, TrainingArguments

    class SpreadTrainer(Trainer):
        def _prepare_context_parallel_inputs(self, model, inputs):
            return contextlib.nullcontext, shard_batch(inputs, self.accelerator.torch_device_mesh["cp"])

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(data)

    parts = [make_batch()["labels"].roll(i, 1) for i in range(4)]  # four batches of two rows
    rows = torch.cat(parts)
    data = [{"input_ids": row.clamp(min=5), "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
    options: dict[str, Any] = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 2, "max_steps": 2}
    options |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    options |= {"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    spread = ParallelismConfig(cp_size=RANKS)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(output_dir=folder, parallelism_config=spread, **options)
        _ = args.device  # accelerate's state is made here
        fsdp2_here()
        model = causal_model("llama")
        stock = Trainer(model=model, args=args, train_dataset=data)
        patch_model(model, context_parallel=stock.accelerator.torch_device_mesh["cp"])
        with pytest.raises(ValueError, match="only with SDPA attention, you are using mc_attention"):
            stock.train()
        trainer = SpreadTrainer(model=model, args=args, train_dataset=data)
        trainer.train()
    losses = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    whole = causal_model("llama").train()
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    for part, loss in zip(rows.chunk(2), losses, strict=True):
        batch = {"input_ids": part.clamp(min=5), "labels": part}
        torch.testing.assert_close(step(whole, batch)[0].item(), loss, rtol=1e-5, atol=1e-5)
        optimizer.step()
    for (name, p), expected in zip(trainer.model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@gloo
def test_patched_models_under_other_frameworks_parallelism() -> None:
    on_ranks(environment_body, transformers_plan_body, torch_plan_body, accelerate_body, trainer_body)
