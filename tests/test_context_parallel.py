"""Patched models with their sequence spread over two ranks (gloo) against one process: losses and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from patch_models import CAUSAL, SMALL, VOCAB, causal_config, causal_model
from ranks import RANKS, gloo, on_ranks
from torch import Tensor, nn

from hf_flash_mc import ContextParallel, patch_model, patch_report, shard_batch, unpatch_model
from hf_flash_mc.patches.context_parallel import MODEL_TYPES

BATCH, LENGTH = 2, 32


def make_batch() -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=gen)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=gen) < 0.3, -100)  # shards of unequal numbers of labels
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def train_on_shards(model: nn.Module, batch: dict[str, Any], how: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a step as DDP takes them: the mean over the ranks."""
    model.zero_grad()
    loss = model(**shard_batch(batch, how)).loss
    loss.backward()
    found = [loss.detach(), *gradients(model).values()]
    for x in found:
        dist.all_reduce(x)
        x /= RANKS
    return found[0], gradients(model)


def check_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], name: str) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")
    assert found[1].keys() == expected[1].keys()
    largest = max(g.abs().max() for g in expected[1].values())
    for parameter, grad in found[1].items():
        assert (grad - expected[1][parameter]).abs().max() <= 2e-5 * largest, f"{name}: {parameter}"


def train_whole(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: g.clone() for n, g in gradients(model).items()}


def families_body(rank: int) -> None:
    """Every family that is let through, and both methods and layouts on two of them."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh, batch = init_device_mesh("cpu", (RANKS,)), make_batch()
    seen = set()
    for family in CAUSAL:
        config = causal_config(family)
        if config.model_type not in MODEL_TYPES:
            continue
        seen.add(config.model_type)
        model = causal_model(family, config)
        expected = train_whole(model, batch)
        ways: list[Any] = [mesh]
        if family in ("llama", "mistral"):
            ways += [ContextParallel(mesh, "ring", "contiguous"), ContextParallel(None, "ulysses", "contiguous")]
        if family in ("gpt_oss", "mistral"):
            ways += [ContextParallel(mesh, "ulysses")]
        for how in ways:
            patch_model(model, context_parallel=how)
            check_same(train_on_shards(model, batch, how), expected, f"{family}, {how}")
            assert not patch_report(model).not_reached
            unpatch_model(model)
        check_same(train_whole(model, batch), expected, f"{family} after unpatching")
    assert seen == MODEL_TYPES


def packed_body(rank: int) -> None:
    """Restarting position ids, which transformers honours where no mask is given."""
    batch = make_batch()
    del batch["attention_mask"]
    lengths = [[7, 20, 5], [16, 15, 1]]
    batch["position_ids"] = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    for family in ("llama", "mistral"):
        model = causal_model(family)
        expected = train_whole(model, batch)
        for how in (ContextParallel(), ContextParallel(method="ulysses", layout="contiguous")):
            patch_model(model, context_parallel=how, packing="position_ids")
            check_same(train_on_shards(model, batch, how), expected, f"packed {family}")
            unpatch_model(model)
    patch_model(model, context_parallel=how)
    with pytest.raises(ValueError, match='packing="position_ids"'):
        model(**shard_batch(batch, how))


def wrapped_body(rank: int) -> None:
    """FSDP2 on the same mesh, gradient checkpointing, a full graph, dropout."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, batch = init_device_mesh("cpu", (RANKS,)), make_batch()
    model = causal_model("mistral")
    expected = train_whole(model, batch)
    spread = patch_model(copy.deepcopy(model), context_parallel=mesh)
    spread.gradient_checkpointing_enable()
    spread.train()
    check_same(train_on_shards(spread, batch, mesh), expected, "gradient checkpointing")

    split = patch_model(copy.deepcopy(model), context_parallel=mesh)
    for layer in (*split.model.layers, split):
        fully_shard(layer, mesh=mesh)
    loss = split(**shard_batch(batch, mesh)).loss
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    check_same((loss / RANKS, {n: g.full_tensor() for n, g in gradients(split).items()}), expected, "FSDP2")

    compiled = patch_model(copy.deepcopy(model), context_parallel=mesh)
    batch.pop("attention_mask")
    graph = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    compiled.zero_grad()
    loss = graph(**shard_batch(batch, mesh)).loss
    loss.backward()
    for x in (loss := loss.detach(), *gradients(compiled).values()):
        dist.all_reduce(x)
        x /= RANKS
    check_same((loss, gradients(compiled)), expected, "compiled")

    torch.manual_seed(rank)
    config = causal_config("llama")
    config.attention_dropout = 0.25
    dropped = patch_model(causal_model("llama", config).train(), context_parallel=mesh)
    losses = []
    for _ in range(2):
        torch.manual_seed(rank)
        losses.append(train_on_shards(dropped, batch, mesh)[0])
    assert torch.equal(*losses)
    assert losses[0] != train_on_shards(dropped.eval(), batch, mesh)[0]


def refusals_body(rank: int) -> None:
    model, batch = causal_model("llama"), make_batch()
    patch_model(model, context_parallel=None, fallback="error")
    with pytest.raises(ValueError, match="already patched"):
        patch_model(model, context_parallel=ContextParallel())
    unpatch_model(model)
    patch_model(model, context_parallel=ContextParallel())
    shard = shard_batch(batch)
    model(shard["input_ids"])  # its own positions
    for wrong, error, match in (
        ({"labels": shard["labels"]}, ValueError, "shift_labels"),
        ({"use_cache": True}, NotImplementedError, "no caches"),
        ({"position_ids": torch.arange(LENGTH // RANKS)[None] + 1}, ValueError, "position_ids: expected those"),
        ({"attention_mask": torch.zeros_like(shard["input_ids"])}, NotImplementedError, "padding cannot be expressed"),
        ({"attention_mask": torch.ones(2, 1, 16, 16)}, NotImplementedError, "padding cannot be expressed"),
    ):
        with pytest.raises(error, match=match):
            model(shard["input_ids"], **wrong)
    with pytest.raises(NotImplementedError, match="padding cannot be expressed"):
        shard_batch({**batch, "attention_mask": batch["attention_mask"].tril()})
    with pytest.raises(ValueError, match="divisible by 4"):
        shard_batch({"input_ids": batch["input_ids"][:, :6]})
    for wrong, got in ((batch["input_ids"], "Tensor"), ({"labels": batch["labels"]}, "one of labels")):
        with pytest.raises(TypeError, match=f"batch: expected a dict with input_ids or inputs_embeds, got {got}"):
            shard_batch(wrong)
    with pytest.raises(TypeError, match="context_parallel: expected a ProcessGroup, a DeviceMesh or None, got bool"):
        patch_model(causal_model("qwen3"), context_parallel=True)
    with pytest.raises(ValueError, match="method"):
        ContextParallel(method="star")
    with pytest.raises(NotImplementedError, match="sees no other rank"):
        patch_model(causal_model("qwen3"), context_parallel=ContextParallel(), fallback="sdpa")
    for family in ("llama4", "gemma4", "bloom"):
        with pytest.raises(NotImplementedError, match="not among the families"):
            patch_model(causal_model(family), context_parallel=ContextParallel())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    dynamic = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, rope_parameters=rope))
    with pytest.raises(NotImplementedError, match="of type 'dynamic'"):
        patch_model(dynamic, context_parallel=ContextParallel())
    assert not patch_report(dynamic).patched
    patched = patch_model(transformers.AutoModelForCausalLM, context_parallel=ContextParallel())
    assert patch_report(patched.from_config(causal_config("llama"))).options["context_parallel"] == ContextParallel()


@gloo
def test_models_train_with_their_sequence_spread_as_in_one_process() -> None:
    on_ranks(families_body, packed_body, wrapped_body, refusals_body)


def test_masks_dropped_by_a_wrapper_are_rebuilt_from_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's Ulysses puts a function over ours that passes no mask, and position ids of the whole sequence."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from hf_flash_mc.patches.attention import KEY, mc_attention

    def without_mask(module, query, key, value, attention_mask, *args, **kwargs):
        return mc_attention(module, query, key, value, None, *args, **kwargs)

    batch = make_batch()
    del batch["attention_mask"]
    plain = torch.arange(LENGTH).expand(BATCH, -1)
    packed = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([7, 20, 5], [16, 15, 1])])
    for family in ("llama", "mistral", "gpt_oss"):
        for ids in (plain,) if family == "gpt_oss" else (plain, packed):  # stock makes its masks without ids
            model = causal_model(family)
            expected = train_whole(model, {**batch, "position_ids": ids})
            patch_model(model)
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, KEY, without_mask)
            check_same(train_whole(model, {**batch, "position_ids": ids}), expected, family)
            monkeypatch.undo()
