"""RecallIndex: exact keys of a few heads point at old text, wherever it stands and however coarse it is shown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from patch_models import causal_model
from test_megacontext_session import CONFIG, attached, history

from hf_flash_mc.megacontext.attach import attach_megacontext
from hf_flash_mc.megacontext.lensnet import OracleLens
from hf_flash_mc.megacontext.recall import entry_mass, find_heads, pairs_of

RECALL = dataclasses.replace(CONFIG, w_max=64, tau=0.2, cooldown=0, lens={"kind": "recall"})


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])  # gemma3: layers rotate by frequencies of their own
def test_mass_is_the_largest_share_of_attention_over_bare_keys(family: str) -> None:
    model = attached(family, RECALL)
    session = model.megacontext.session(chunk_size=16, observe=5)
    session.ingest(history(150))
    session.scores()
    memory, rope = session.memory, model.megacontext.gist.rope
    count = memory.committed // 4 * 4
    payload, places = memory.tree.payload(0, slice(0, count))[:, :, 0], memory.places.read(slice(0, count))
    keys = rope.unrotate(payload, *(t[:, :, None] for t in rope.tables(places)))  # [T, L, Hkv, D]
    kept = torch.stack([keys[:, layer, head] for layer, head in memory.recall.pairs], 1)
    assert torch.equal(memory.recall.store.read(slice(0, count)), kept.half()), "bit for bit, whatever else is kept"
    queries = session.cache.last_queries().permute(2, 0, 1, 3)
    at = torch.arange(memory.numbering.next - 5, memory.numbering.next)
    queries = rope.unrotate(queries, *(t[:, :, None] for t in rope.tables(at)))
    expected = torch.zeros(count // 4)
    for layer, head in memory.recall.heads:
        logits = queries[:, layer, head] @ keys[:, layer, head // 2].T * session.scaling[layer]
        blocks = logits.softmax(-1).unflatten(-1, (-1, 4)).sum(-1)
        expected = torch.maximum(expected, blocks.amax(0))
    expected[0] = 0  # the sink
    beside = torch.nn.functional.pad(expected, (1, 1))
    expected = torch.maximum(expected, 0.9 * torch.maximum(beside[:-2], beside[2:]))
    got = memory.recall.mass(session.cache.last_queries(), memory.numbering.next - 5, sink=4)
    assert (got - expected).abs().max() <= 2e-3 * expected.max()  # keys are kept in float16


def test_blocks_give_their_mass_to_the_slots_that_show_them() -> None:
    blocks = np.array([0.1, 0.9, 0.2, 0.3, 0.0, 0.05], np.float32)
    start, span = np.array([0, 4, 5, 16, 20, 24]), np.array([4, 1, 1, 4, 4, 1])
    assert entry_mass(blocks, start, span, 4) == pytest.approx([0.1, 0.9, 0.9, 0.0, 0.05, 0.15])
    assert entry_mass(blocks, np.array([0, 16]), np.array([16, 8]), 4) == pytest.approx([0.9, 0.05])
    assert entry_mass(blocks[:0], start, span, 4).tolist() == [0] * 6


def test_heads_that_copy_are_found() -> None:
    """A head whose values do not matter, but whose attention does, is built to look where induction heads look."""
    model = attach_megacontext(causal_model("llama"), RECALL)
    heads = model.megacontext.recall_heads()
    assert len(heads) == 4
    assert heads == find_heads(model.megacontext), "the same every time"
    assert pairs_of([(1, 3), (0, 1), (1, 2)], 2) == [(0, 0), (1, 1)]


def test_text_that_is_asked_for_is_found_at_any_level(tmp_path: Path) -> None:
    """Layer 0 matches tokens by themselves here: the query of a token meets keys made from the same embedding."""
    model = attached("llama", dataclasses.replace(RECALL, w_max=96), max_position_embeddings=128)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():  # every query head asks for its own token
        wide = attention.k_proj.weight.unflatten(0, (2, 1, -1)).expand(-1, 2, -1, -1).flatten(0, 2)
        attention.q_proj.weight.copy_(8 * wide)
    model.megacontext._recall_heads = [(0, 0), (0, 3)]
    session = model.megacontext.session(tmp_path / "live", chunk_size=16, observe=4)
    ids = history(600)[0].clamp(max=60)
    needle = torch.tensor([90, 91, 92, 93])
    ids[208:212] = needle
    session.ingest(ids)
    wc = session.working_context
    shown = int(wc.lod[np.searchsorted(wc.start, 208, side="right") - 1])
    assert shown == 2, "the needle must have become coarse"
    session.ingest(needle)
    session.refocus(rounds=3, reread=4)
    session.check_invariants()
    wc = session.working_context
    assert [int(wc.lod[np.searchsorted(wc.start, t, side="right") - 1]) for t in range(208, 212)] == [0, 0, 0, 0]
    session.save(tmp_path / "copy")
    again = model.megacontext.load_session(tmp_path / "copy")
    assert again.memory.recall.heads == [(0, 0), (0, 3)]
    for length in (len(session.memory.recall), session.memory.committed):
        assert len(again.memory.recall) == length
    everything = slice(0, session.memory.committed)
    assert torch.equal(again.memory.recall.store.read(everything), session.memory.recall.store.read(everything))
    again.close()
    session.close()


def test_strong_requests_leave_the_recent_tokens_alone() -> None:
    model = attached("llama", dataclasses.replace(RECALL, w_max=64, max_edits=8, recent_tokens=12))
    ones = OracleLens(model.megacontext.config, lambda context: torch.where(context.lod > 0, 1.0, 0.5))
    session = model.megacontext.session(chunk_size=16, recall=False)
    session.ingest(history(150))
    model.megacontext.lens = ones
    for _ in range(3):
        session.refocus(reread=12)
        session.check_invariants()
        assert not session.working_context.lod[-12:].any()
    assert session.stats.expansions > 0


def test_a_session_without_an_index_says_so() -> None:
    session = attached("llama", RECALL).megacontext.session(recall=False)
    session.ingest(history(20))
    with pytest.raises(ValueError, match="keeps no index"):
        session.scores()
