"""What a session is after something failed, and in surroundings that it was not made for."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from test_megacontext_session import CONFIG, attached, edits, history, logits_of

from hf_flash_mc import MegaContextConfig


class Failure(Exception):
    pass


def failing_after(model: Any, calls: int, layer: int = 1) -> Any:
    """From the call of this number on, the model fails at a layer, when earlier ones have written their keys."""
    seen = [0]

    def hook(module: Any, inputs: Any) -> None:
        seen[0] += 1
        if seen[0] > calls:
            raise Failure

    return model.model.layers[layer].register_forward_pre_hook(hook)


def shown(session: Any) -> list[Any]:
    """All that a session's next token depends on, in the order of its slots."""
    wc, cache, slots = session.working_context, session.cache, torch.from_numpy(session.memory.slots)
    memory = session.memory
    arrays = [wc.start, wc.lod, memory.numbering.position, memory.tail.numpy(), session.tokens().numpy()]
    tensors = [cache.kv[:, :, :, slots], cache.log_weight[:, :, slots], cache.token[slots], cache.last_queries()]
    return [x.copy() for x in arrays] + [x.numpy().copy() for x in tensors]


@pytest.mark.parametrize("backend", ["kv", "embedding"])
@pytest.mark.parametrize("calls", [0, 1])
def test_a_failed_reread_leaves_the_session_as_it_was(backend: str, calls: int) -> None:
    config = MegaContextConfig(**{**CONFIG.to_dict(), "backend": backend})
    model = attached(config=config)
    session = model.megacontext.session(chunk_size=5, observe=6)
    session.ingest(history(70))
    session.apply(edits((-1, 16, 2), (-1, 4, 1), (-1, 8, 1)))
    logits = session.next_logits().clone()
    before = shown(session)
    hook = failing_after(model, calls)
    with pytest.raises(Failure):
        session.reread(8)
    hook.remove()
    session.check_invariants()
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(shown(session), before, strict=True))
    assert torch.equal(session.next_logits(), logits)
    session.reread(8)
    again = session.next_logits()
    fresh = attached(config=config).megacontext.session(chunk_size=5, observe=6)
    fresh.ingest(history(70))
    fresh.apply(edits((-1, 16, 2), (-1, 4, 1), (-1, 8, 1)))
    fresh.reread(8)
    assert (again - fresh.next_logits()).abs().max() <= 1e-5
    assert (session.attention_mass() - fresh.attention_mass()).abs().max() <= 1e-5


def test_stale_logits_that_cannot_be_made_lose_no_token() -> None:
    model = attached()
    session = model.megacontext.session()
    session.ingest(history(40))
    session.apply(edits((-1, 8, 1)))
    before = shown(session)
    hook = failing_after(model, 0)
    with pytest.raises(Failure):
        session.next_logits()
    hook.remove()
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(shown(session), before, strict=True))
    assert len(session) == 40
    session.next_logits()
    session.check_invariants()


def test_queries_of_a_forward_that_failed_ask_nothing() -> None:
    model = attached()
    session = model.megacontext.session(observe=6)
    session.ingest(history(40))
    kept = session.cache.last_queries().clone()
    hook = failing_after(model, 0)
    with pytest.raises(Failure):
        session.ingest(history(4, seed=3))
    hook.remove()
    session.check_invariants()
    assert torch.equal(session.cache.last_queries(), kept[:, :, 4:])


@pytest.mark.parametrize("count", [0, -1, 41])
def test_a_wrong_count_changes_nothing(count: int) -> None:
    session = attached().megacontext.session()
    session.ingest(history(40))
    before = shown(session)
    with pytest.raises(ValueError, match="count: expected 1 to"):
        session.reread(count)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(shown(session), before, strict=True))


def test_sessions_of_a_model_in_training_drop_nothing_out() -> None:
    model, ids = attached(attention_dropout=0.5), history(30)
    model.eval()
    expected = logits_of(model, ids)
    model.train()
    model.model.layers[0].eval()
    checkpoint = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # 5.24: renamed
    checkpoint()
    modes = [module.training for module in model.modules()]
    session = model.megacontext.session()
    logits = session.ingest(ids, return_logits=True)
    assert (logits - expected).abs().max() <= 1e-5
    (batched,) = model.megacontext.generate([session], max_new_tokens=3, do_sample=False)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    other = model.megacontext.session()
    other.ingest(ids)
    assert torch.equal(other.generate(max_new_tokens=3, do_sample=False), batched)


def test_a_copy_of_the_model_has_an_addon_of_its_own() -> None:
    model, ids = attached(), history(30)
    session = model.megacontext.session()
    session.ingest(ids)
    other = copy.deepcopy(model)
    assert other.megacontext.base is other
    assert list(other.state_dict()) == list(model.state_dict())
    twin = other.megacontext.session()
    twin.ingest(ids)
    assert torch.equal(twin.next_logits(), session.next_logits())
    with torch.no_grad():
        other.lm_head.weight.zero_()
    again = model.megacontext.session()
    again.ingest(ids)
    assert torch.equal(session.next_logits(), again.next_logits())
