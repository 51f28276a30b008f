"""The embedding back end: a session is the model run over the embeddings of its slots, whatever was edited and when."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from patch_models import causal_model, twin
from test_megacontext_session import CONFIG, attached, edits, history, logits_of

from hf_flash_mc.megacontext.attach import attach_megacontext, detach_megacontext

EMBEDDING = dataclasses.replace(CONFIG, backend="embedding", gist={"width": 32, "head_dim": 16, "layers": 1})


@torch.no_grad()
def reference(model, session, new: torch.Tensor) -> torch.Tensor:
    """Stock attention over the slots' embeddings, all at once: logits of the new tokens."""
    stock, wc, memory = detach_megacontext(twin(model)), session.working_context, session.memory
    embeddings = torch.cat((memory.embeddings(wc, np.arange(len(wc))), stock.get_input_embeddings()(new[0])))
    first = memory.numbering.next
    positions = torch.cat((torch.from_numpy(memory.numbering.centres()), torch.arange(first, first + new.shape[1])))
    mask = torch.ones(1, len(positions), dtype=torch.long)  # without it, gaps in positions are taken for documents
    out = stock(inputs_embeds=embeddings[None], position_ids=positions[None], attention_mask=mask, use_cache=False)
    return out.logits[0, len(wc) :]


def test_history_within_the_window_is_the_base_model() -> None:
    ids, model = history(90), causal_model("gemma3")
    expected = logits_of(model, ids)
    tokens = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[:, 90:]
    attach_megacontext(model, EMBEDDING)
    session = model.megacontext.session(chunk_size=37)
    assert (session.ingest(ids, return_logits=True) - expected).abs().max() <= 1e-5
    assert torch.equal(session.generate(max_new_tokens=9, do_sample=False), tokens)


def test_edits_run_what_stands_behind_them_again() -> None:
    model = attached("llama", EMBEDDING)
    with torch.no_grad():
        for parameter in model.megacontext.gist.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    session = model.megacontext.session(chunk_size=16)
    session.ingest(history(100))
    before = session.cache.read(session.memory.slots[:40]).clone()
    session.apply(edits((-1, 40, 1), (-1, 48, 2), (-1, 80, 1)))
    assert torch.equal(session.cache.read(session.memory.slots[:40]), before), (
        "nothing before the first edit may change"
    )
    session.apply(edits((1, 48, 2)))
    session.check_invariants()
    for length in (7, 1):
        new = history(length, seed=length)
        expected = reference(model, session, new)
        assert (session.ingest(new, return_logits=True) - expected).abs().max() <= 1e-5
    session.apply(edits((1, 40, 1), (1, 80, 1), (1, 48, 1), (1, 52, 1), (1, 56, 1), (1, 60, 1)))
    assert not session.working_context.lod.any()
    plain = model.megacontext.session()
    plain.ingest(session.tokens())
    assert (session.next_logits() - plain.next_logits()).abs().max() <= 1e-5


def test_a_long_history_is_read_saved_and_continued(tmp_path: Path) -> None:
    config = dataclasses.replace(EMBEDDING, w_max=64)
    model = attached("llama", config, max_position_embeddings=128)
    session = model.megacontext.session(chunk_size=16)
    session.ingest(history(400), refocus=True)
    session.check_invariants()
    assert session.stats.renumberings > 0
    session.make_room(3)
    session.save(tmp_path)
    new = history(3, seed=3)
    expected = reference(model, session, new)
    again = model.megacontext.load_session(tmp_path)
    again.check_invariants()
    assert (again.ingest(new, return_logits=True) - expected).abs().max() <= 1e-5
    again.close()


def test_the_recall_lens_needs_keys() -> None:
    model = attached("llama", dataclasses.replace(EMBEDDING, lens={"kind": "recall"}))
    with pytest.raises(NotImplementedError, match='use the "kv" back end'):
        model.megacontext.session()
