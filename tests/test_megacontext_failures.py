"""What a session is after something failed, and in surroundings that it was not made for."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from patch_models import causal_model
from test_megacontext_session import CONFIG, attached, edits, history, logits_of
from transformers import BatchEncoding, MambaConfig, MambaForCausalLM

from hf_flash_mc import MegaContextConfig, attach_megacontext, detach_megacontext, patch_model, unpatch_model
from hf_flash_mc.megacontext.store import FileStore

TRAINED = {"width": 32, "head_dim": 16}
DUAL = dataclasses.replace(CONFIG, w_max=64, lens={"kind": "dual", **TRAINED})


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


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.ingest(history(60)),
        lambda s: s.generate(max_new_tokens=2),
        lambda s: s.refocus(),
        lambda s: s.reread(2),
        lambda s: s.apply(edits((-1, 4, 1))),
        lambda s: s.addon.generate([s], max_new_tokens=2),
        lambda s: s.scores(),
        lambda s: s.tokens(),
        lambda s: s.rewind(1),
        lambda s: s.restore(s.working_context),
        lambda s: s.check_invariants(),
    ],
)
def test_a_closed_session_says_so(use: Any, folder: bool, tmp_path: Path) -> None:
    session = attached("llama", DUAL).megacontext.session(tmp_path / "tree" if folder else None)
    session.ingest(history(100))
    session.close()
    session.close()
    with pytest.raises(RuntimeError, match="the session is closed"):
        use(session)


def test_a_model_that_was_cast_is_not_the_sessions() -> None:
    model = attached()
    session = model.megacontext.session()
    session.ingest(history(40))
    other = model.megacontext.session()
    other.ingest(history(40))
    model.bfloat16()
    with pytest.raises(RuntimeError, match=r"then torch\.float32 on cpu, now torch\.bfloat16 on cpu"):
        session.ingest(history(3))
    assert len(session) == 40
    with pytest.raises(RuntimeError, match="cast or moved"):
        model.megacontext.generate([session, other], max_new_tokens=2)
    model.float()
    session.ingest(history(3))


def test_a_cast_model_rotates_by_the_frequencies_that_it_has_then() -> None:
    """``.bfloat16()`` rounds rotary frequencies too; those from before it would turn keys by a wrong angle."""
    config = dataclasses.replace(CONFIG, lens={"kind": "recall"}, gist={"rank": 0})
    before, after = (causal_model("llama") for _ in range(2))
    attach_megacontext(before, config).bfloat16()
    attach_megacontext(after.bfloat16(), config)
    found = []
    for model in (before, after):
        session = model.megacontext.session(recall=[(0, 1), (1, 2)])
        session.ingest(history(300))
        found.append((session.memory.recall.store.read(slice(None)), session.recall_mass(), session.next_logits()))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_sessions_of_a_model_in_float64() -> None:
    """Whether loaded in it or cast to it; what is float32 in the heads stays so."""
    ids = history(100)
    wanted = logits_of(attached().double(), ids)
    for model in (attached().double(), attach_megacontext(causal_model("llama").double(), CONFIG)):
        session = model.megacontext.session()
        logits = session.ingest(ids, return_logits=True)
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-10)
        session.ingest(history(100, seed=2))
        assert (session.working_context.lod > 0).any()
        session.refocus(rounds=2, reread=3)
        assert session.generate(max_new_tokens=3).shape == (1, 3)
        session.check_invariants()


def test_ids_of_any_whole_dtype_and_no_other() -> None:
    ids = history(60)[0]
    wanted = attached().megacontext.session().ingest(ids, return_logits=True)
    for same in (ids.int(), ids.short(), ids.byte(), ids.numpy(), ids.numpy().astype(np.uint16), ids.tolist()):
        assert torch.equal(attached().megacontext.session().ingest(same, return_logits=True), wanted)
    session = attached().megacontext.session()
    for wrong in ("text", None, {"input_ids": ids}, BatchEncoding({"input_ids": ids[None]})):
        with pytest.raises(
            TypeError, match=rf"got {type(wrong).__name__}; of what a tokenizer returns give \.input_ids"
        ):
            session.ingest(wrong)
    with pytest.raises(TypeError, match=r"of what a tokenizer returns give \.input_ids"):
        session.generate({"input_ids": ids}, max_length=90)
    for wrong in (ids.float(), ids > 9, ids + 1j, 5):
        with pytest.raises(ValueError, match="expected whole numbers"):
            session.ingest(wrong)


def test_vocabulary_grows_with_the_model() -> None:
    model = attached()
    session = model.megacontext.session()
    with pytest.raises(ValueError, match="from 0 to 96"):
        session.ingest([97])
    model.resize_token_embeddings(100, mean_resizing=False)
    session.ingest([97, 99])
    assert session.tokens().tolist() == [97, 99]


def test_counts_that_are_none() -> None:
    session = attached().megacontext.session()
    session.ingest(history(60))
    for call in ({"reread": -1}, {"rounds": -1}, {"rounds": 1.5}, {"rounds": None}, {"max_edits": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(call))}: expected a whole number of at least 0"):
            session.refocus(**call)
    blind = session.addon.session(observe=0)
    blind.ingest(history(60))
    with pytest.raises(ValueError, match="observe of at least 1"):
        blind.refocus()
    with pytest.raises(ValueError, match="keep: expected a whole number"):
        session.scores(keep=-1)
    with pytest.raises(ValueError, match=r"count: expected 1 to \d+ .*got 1.5"):
        session.reread(1.5)
    assert session.tokens(50, 2).tolist() == []


@pytest.mark.parametrize("lens", ["gist_mass", "recall", "dual", "transformer"])
@pytest.mark.parametrize("max_lod", [1, 3])
@pytest.mark.parametrize("backend", ["kv", "embedding"])
def test_the_smallest_window_there_may_be(lens: str, max_lod: int, backend: str) -> None:
    if backend == "embedding" and lens == "recall":
        pytest.skip("refused when a session begins")
    roomy = dataclasses.replace(CONFIG, max_lod=max_lod, w_max=10**6)
    settings: dict[str, Any] = {"kind": lens} | ({} if lens in ("gist_mass", "recall") else TRAINED)
    gist = {} if backend == "kv" else {"layers": 1}
    config = dataclasses.replace(
        roomy, w_max=roomy.fixed_cost + roomy.block_size, lens=settings, backend=backend, gist=gist
    )
    session = attached("llama", config).megacontext.session(chunk_size=7)
    session.ingest(history(config.max_history))
    for _ in range(3):
        session.refocus(reread=3)
        session.generate(max_new_tokens=2, do_sample=False)
        session.check_invariants()
        assert len(session.working_context) <= config.w_max


@pytest.mark.parametrize("backend", ["kv", "embedding"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda session: pickle.loads(pickle.dumps(session))])
def test_a_copy_of_a_session_goes_its_own_way(backend: str, way: Any) -> None:
    gist = {} if backend == "kv" else {"layers": 1}
    session = attached("llama", dataclasses.replace(DUAL, backend=backend, gist=gist)).megacontext.session()
    session.ingest(history(100))
    before = shown(session)
    other = way(session)
    assert other.model is not session.model
    with torch.no_grad():
        for parameter in session.model.parameters():
            parameter.mul_(2.0)  # nothing of the copy may still run the first model
    tokens = other.generate(max_new_tokens=6, do_sample=False)
    other.check_invariants()
    assert all(np.array_equal(a, b) for a, b in zip(before, shown(session), strict=True))
    with torch.no_grad():
        for parameter in session.model.parameters():
            parameter.div_(2.0)
    assert torch.equal(session.generate(max_new_tokens=6, do_sample=False), tokens)


def test_what_cannot_be_copied_says_so(tmp_path: Path) -> None:
    session = attached().megacontext.session(tmp_path)
    session.ingest(history(40))
    with pytest.raises(TypeError, match=r"copy\.deepcopy"):
        copy.copy(session)
    with pytest.raises(TypeError, match="a file has one owner"):
        copy.deepcopy(session)
    session.ingest(history(3))


def test_a_lens_that_torch_compile_wrapped_scores_as_it_did() -> None:
    model = attached("llama", DUAL)
    session = model.megacontext.session()
    session.ingest(history(100))
    wanted = session.scores()
    model.megacontext.lens = torch.compile(model.megacontext.lens, backend="eager")
    assert torch.allclose(session.scores(), wanted, atol=1e-6)


def test_a_model_without_a_head_is_refused() -> None:
    model = causal_model("llama").model
    with pytest.raises(TypeError, match="LlamaModel without a language-modelling head"):
        attach_megacontext(model, CONFIG)
    assert not hasattr(model, "megacontext")


def test_a_family_without_attention_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=99))
    with pytest.raises(NotImplementedError, match="expected attention, got MambaForCausalLM"):
        attach_megacontext(model, CONFIG)


@pytest.mark.parametrize("patched_before", [False, True])
def test_sessions_of_a_detached_model_say_so_and_can_be_saved(patched_before: bool, tmp_path: Path) -> None:
    model = causal_model("llama")
    if patched_before:
        patch_model(model)
    config = dataclasses.replace(CONFIG, w_max=64)
    session = attach_megacontext(model, config).megacontext.session()
    session.ingest(history(100))
    detach_megacontext(model)
    for use in (lambda: session.ingest(history(3)), lambda: session.generate(max_new_tokens=2)):
        with pytest.raises(RuntimeError, match="detached from the model"):
            use()
    attach_megacontext(model, config)
    with pytest.raises(RuntimeError, match="detached from the model"):
        session.reread(2)
    session.check_invariants()
    session.save(tmp_path)
    again = model.megacontext.load_session(tmp_path)
    assert again.generate(max_new_tokens=2, do_sample=False).shape == (1, 2)


def test_sessions_of_a_compiled_model_go_as_without() -> None:
    model = attached("llama", DUAL)

    def tokens() -> torch.Tensor:
        session = model.megacontext.session()
        session.ingest(history(100))
        session.refocus(reread=2)
        return session.generate(max_new_tokens=4, do_sample=False)

    wanted = tokens()
    model.compile(backend="eager", dynamic=True)
    assert torch.equal(tokens(), wanted)
    assert model._compiled_call_impl is not None, "compiled in place"


def test_a_full_disk_leaves_a_session_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = attached(config=dataclasses.replace(CONFIG, w_max=64, lens={"kind": "recall"})), history(160)
    put, full = FileStore._put, [""]

    def failing(store: FileStore, offset: int, data: Any) -> None:
        if store.path.name == full[0]:
            raise OSError(28, "No space left on device")
        put(store, offset, data)

    monkeypatch.setattr(FileStore, "_put", failing)
    names = ("KV0.ctx", "LOD0.ctx", "LOD1.ctx", "positions.ctx", "recall.ctx")
    for name in names:
        session = model.megacontext.session(tmp_path / name, chunk_size=16)
        session.ingest(ids[:, :100])
        full[0] = name
        with pytest.raises(OSError, match="No space"):
            session.ingest(ids[:, 100:])
        full[0] = ""
        session.check_invariants()
        read, memory = len(session), session.memory
        assert memory.committed == len(memory.places) == len(memory.recall) == read - len(memory.tail)
        assert torch.equal(session.tokens(), ids[0, :read])
        session.ingest(ids[:, read:])
        session.save(session.folder)
        session.close()
        again = model.megacontext.load_session(tmp_path / name)
        assert torch.equal(again.tokens(), ids[0])
        index = again.memory.recall.store
        kept = index.read(slice(0, len(index)))
        again.close()
        index.path.unlink()  # made again from the tree
        made = model.megacontext.load_session(tmp_path / name).memory.recall.store
        assert torch.equal(kept, made.read(slice(0, len(made))))
    assert {path.name for path in (tmp_path / name).glob("*.ctx")} >= {*names}


def test_history_taken_back_to_the_tree_says_how_to_go_on() -> None:
    session = attached(config=dataclasses.replace(CONFIG, w_max=64)).megacontext.session(chunk_size=16)
    session.ingest(history(100))
    session.rewind(len(session.memory.tail))
    with pytest.raises(ValueError, match="give generate its input_ids"):
        session.generate(max_new_tokens=1)
    assert session.generate([5], max_new_tokens=1).shape == (1, 1)


@pytest.mark.parametrize("lens", ["recall", "gist_mass", "dual"])
def test_sessions_begun_or_read_in_inference_mode_go_on_outside(lens: str) -> None:
    settings: dict[str, Any] = {"kind": lens, **(TRAINED if lens == "dual" else {})}
    model = attached(config=dataclasses.replace(CONFIG, w_max=64, lens=settings))
    with torch.inference_mode():
        first, second = (model.megacontext.session(chunk_size=16) for _ in range(2))
        first.ingest(history(200))
        first.refocus()
        model.megacontext.generate([first, second], [[5], [6]], max_new_tokens=2)
    for session in (first, second):
        session.ingest(history(200))
        session.refocus(reread=2)
        assert session.generate(max_new_tokens=3).shape == (1, 3)
        session.check_invariants()


@pytest.mark.parametrize("lens", ["recall", "gist_mass", "dual"])
def test_autocast_reaches_the_model_alone(lens: str) -> None:
    settings: dict[str, Any] = {"kind": lens, **(TRAINED if lens == "dual" else {})}
    gist = {"pooling": "query", "rank": 4}
    model = attached(config=dataclasses.replace(CONFIG, w_max=64, lens=settings, gist=gist))
    torch.nn.init.normal_(model.megacontext.gist.up)
    with torch.autocast("cpu", torch.bfloat16):
        session = model.megacontext.session(chunk_size=16)
        session.ingest(history(200))
        scores = session.scores()
    assert torch.equal(session.scores(), scores)
    children = session.tree.payload(0, slice(0, 8)).unflatten(0, (2, 4))
    places = session.memory.places.read(slice(0, 8)).long().unflatten(0, (2, 4))
    gists = model.megacontext.gist.pool(children, lod=1, positions=places)
    torch.testing.assert_close(session.tree.payload(1, slice(0, 2)), gists)


def test_another_default_dtype_is_no_ones_weights() -> None:
    model = attached(config=dataclasses.replace(CONFIG, w_max=64))
    torch.set_default_dtype(torch.bfloat16)
    try:
        session = model.megacontext.session(chunk_size=16)
        session.ingest(history(200))
        session.refocus()
        tokens = session.generate(max_new_tokens=4, do_sample=False)
    finally:
        torch.set_default_dtype(torch.float32)
    again = model.megacontext.session(chunk_size=16)
    again.ingest(history(200))
    again.refocus()
    assert torch.equal(again.generate(max_new_tokens=4, do_sample=False), tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attached_under_another_default_dtype(dtype: torch.dtype) -> None:
    """As ``torch.set_default_dtype`` has it for who loads a model in that way."""
    torch.set_default_dtype(dtype)
    try:
        session = attach_megacontext(causal_model("llama").to(dtype), CONFIG).megacontext.session()
        session.ingest(history(200))
    finally:
        torch.set_default_dtype(torch.float32)
    session.check_invariants()
    assert (session.working_context.lod > 0).any()


def test_what_cannot_be_unpatched_stays_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while continuous batching runs on it: detaching stopped halfway, and disable() stayed disabled."""
    model = attached()
    ids = history(9)
    with monkeypatch.context() as patch:
        patch.setattr(model._mc_state, "claim", Mock(**{"end.side_effect": RuntimeError("still runs")}))
        with pytest.raises(RuntimeError, match="still runs"):
            detach_megacontext(model)
        with pytest.raises(RuntimeError, match="still runs"), model.megacontext.disable():
            pass
    with pytest.raises(RuntimeError, match="detach_megacontext"):
        unpatch_model(model)
    model.megacontext.session().ingest(ids)
    detach_megacontext(model)
    assert not hasattr(model, "_mc_state")


def test_disable_within_disable() -> None:
    model, ids = causal_model("llama"), history(9)
    before = logits_of(model, ids)
    attach_megacontext(model, CONFIG)
    with model.megacontext.disable():
        with model.megacontext.disable():
            assert torch.equal(logits_of(model, ids), before)
        assert torch.equal(logits_of(model, ids), before)
        assert not model.megacontext.enabled
    model.megacontext.session().ingest(ids)


@pytest.mark.parametrize("heads", [[(2, 0)], [(0, 4)], [(0, -1)], []])
def test_recall_heads_that_the_model_has_not(heads: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="2 layers with 4 heads"):
        attached().megacontext.session(recall=heads)


def test_a_closed_session_is_not_saved(tmp_path: Path) -> None:
    session = attached().megacontext.session()
    session.ingest(history(200))
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_logits_written_into_are_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_five(seen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:] = -1e9
        scores[:, 5] = 0.0
        return scores

    session = attached().megacontext.session()
    wanted = session.ingest(history(30), return_logits=True)[-1]
    session.next_logits().zero_()
    assert torch.equal(session.next_logits(), wanted)
    with monkeypatch.context() as patch:
        patch.setattr(type(session), "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.generate(max_new_tokens=1, do_sample=False, logits_processor=[only_five])
    assert torch.equal(session.next_logits(), wanted)


def test_errors_say_what_a_user_did(tmp_path: Path) -> None:
    session = attached().megacontext.session(tmp_path / "never_saved")
    session.ingest(history(40))
    with pytest.raises(FileNotFoundError, match=r"expected a folder that session\.save\(folder\) wrote"):
        session.addon.load_session(tmp_path / "never_saved")
    session.apply(edits((-1, 36, 1)))
    with pytest.raises(ValueError, match="its end was collapsed by hand"):
        session.generate(max_new_tokens=1)
    session.generate([5], max_new_tokens=1)
    session.check_invariants()
