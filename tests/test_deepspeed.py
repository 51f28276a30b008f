"""DeepSpeed's Ulysses over our attention, where DeepSpeed is installed (a CPU will do: DS_BUILD_OPS=0 pip install
--no-build-isolation deepspeed). test_context_parallel.py imitates its call for the runs without it.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patch_models import causal_model
from ranks import RANKS, gloo, on_ranks
from test_spread_frameworks import BATCH, LENGTH, check_same, environment_body, make_batch, mean_over_ranks, step
from torch import Tensor, nn

from hf_flash_mc import patch_model, unpatch_model
from hf_flash_mc.compat.flash_attn import flash_attn_func
from hf_flash_mc.patches.attention import KEY

pytest.importorskip("deepspeed")
pytestmark = gloo
PLAIN = torch.arange(LENGTH).expand(BATCH, -1)
PACKED = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([7, 20, 5], [16, 15, 1])])


def start_body(rank: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def shard(batch: dict[str, Any], rank: int) -> dict[str, Any]:
    """Half of the sequence, with labels shifted before they are cut and their number over the ranks."""
    rows = slice(rank * LENGTH // RANKS, (rank + 1) * LENGTH // RANKS)
    shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    cut = {n: x[:, rows].contiguous() for n, x in (batch | {"shift_labels": shifted}).items()}
    return cut | {"num_items_in_batch": (shifted != -100).sum() / RANKS}


def distributed_attention_body(rank: int) -> None:
    """DistributedAttention with flash_attn's function, which it calls on [B, S, H / ranks, D]."""
    from deepspeed.sequence.layer import DistributedAttention

    gen = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, 12, h, 8, generator=gen, dtype=torch.float64) for h in (4, 2, 2, 4)]
    rows = slice(rank * 6, rank * 6 + 6)
    made = []
    for spread in (True, False):
        leaves = [(x[:, rows] if spread else x).clone().requires_grad_() for x in whole[:3]]
        attention = flash_attn_func
        if spread:
            wrapped = DistributedAttention(flash_attn_func, dist.group.WORLD, scatter_idx=2, gather_idx=1)
            attention = lambda q, k, v, wrapped=wrapped, **how: wrapped(q, k, v, 0, **how)  # noqa: E731
        out = attention(*leaves, causal=True, window_size=(5, 0))
        out.backward(whole[3][:, rows] if spread else whole[3])
        made.append([x if spread else x[:, rows] for x in (out.detach(), *(x.grad for x in leaves))])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b)


def transformers_body(rank: int) -> None:
    """UlyssesSPAttentionHF: it drops the mask and passes the position ids of the whole sequence."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    registered = False
    for family in ("llama", "mistral"):
        for ids in (PLAIN, PACKED):
            model, batch = causal_model(family), make_batch() | {"position_ids": ids}
            expected = step(model, {n: x for n, x in batch.items() if n != "attention_mask"})
            patch_model(model)
            if not registered:  # it counts heads, which these families have alike
                sizes = {"sequence_parallel_size": RANKS, "micro_batch_size": BATCH}
                UlyssesSPAttentionHF.register_with_transformers(model, KEY, **sizes)
                registered = True
            loss, grads = mean_over_ranks(step(model, shard(batch, rank)))
            for grad in grads.values():
                dist.all_reduce(grad)
                grad /= RANKS
            check_same((loss, grads), expected, f"{family}, {'packed' if ids is PACKED else 'plain'}")
            unpatch_model(model)
    sinks = patch_model(causal_model("gpt_oss"))  # whose sinks it does not share out
    with pytest.raises(ValueError, match=r"sinks: expected \[Hq\], got shape \(4,\)"):
        sinks(**shard(make_batch() | {"position_ids": PLAIN}, rank), use_cache=False)
    del ALL_ATTENTION_FUNCTIONS[KEY]  # its wrapper


def accelerate_body(rank: int) -> None:
    """accelerate's sp_size: one step of SGD under ZeRO-2."""
    from accelerate import Accelerator, PartialState
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import DeepSpeedPlugin, DeepSpeedSequenceParallelConfig, DistributedType

    with pytest.raises(ValueError, match="Invalid sp_attn_implementation: mc_attention"):
        DeepSpeedSequenceParallelConfig(sp_attn_implementation=KEY)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED  # it grants that to GPUs only
    how = DeepSpeedSequenceParallelConfig()
    how.sp_attn_implementation = KEY  # as docs/distributed.md says
    config = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "gradient_clipping": 1e9}
    config |= {"train_micro_batch_size_per_gpu": BATCH, "gradient_accumulation_steps": 1}
    config |= {"communication_data_type": "fp32"}
    accelerator = Accelerator(
        parallelism_config=ParallelismConfig(sp_size=RANKS, sp_handler=how),
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
    )
    batch = make_batch() | {"position_ids": PACKED}
    del batch["attention_mask"]
    whole = causal_model("mistral").train()
    loss = step(whole, batch)[0]
    torch.optim.SGD(whole.parameters(), 0.1).step()
    rows = [{n: x[i] for n, x in batch.items()} for i in range(BATCH)] * RANKS
    loader = torch.utils.data.DataLoader(rows, batch_size=BATCH)  # type: ignore[arg-type]
    model = patch_model(causal_model("mistral").train())
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader)
    part = next(iter(loader))
    assert part["input_ids"].shape == (BATCH, LENGTH // RANKS)
    items = (nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100).sum()
    logits: Tensor = model(part["input_ids"], position_ids=part["position_ids"], use_cache=False).logits
    total = nn.functional.cross_entropy(logits.flatten(0, 1), part["shift_labels"].flatten(), reduction="sum")
    accelerator.backward(total / items)  # it adds up the gradients of the ranks of one sequence
    optimizer.step()
    total = total.detach() / items
    dist.all_reduce(total)
    torch.testing.assert_close(total, loss)
    trained = accelerator.unwrap_model(model)
    for (name, p), expected in zip(trained.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_its_attention_classes_run_ours() -> None:
    on_ranks(start_body, distributed_attention_body, transformers_body)


def test_accelerate_trains_through_it() -> None:
    on_ranks(environment_body, start_body, accelerate_body)
