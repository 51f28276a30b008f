"""Sessions on tiny models: the plain path is the base model's, gists weigh what they should, detail comes back."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import check_bound
from patch_models import VOCAB, causal_config, causal_model, twin
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, TextStreamer

from hf_flash_mc.megacontext.attach import attach_megacontext, cache_argument, detach_megacontext, layer_windows
from hf_flash_mc.megacontext.config import MegaContextConfig
from hf_flash_mc.megacontext.lensnet import GistMassLens, LensInput, OracleLens
from hf_flash_mc.megacontext.working_context import BudgetError, Edits
from hf_flash_mc.patches import unpatch_model

CONFIG = MegaContextConfig(
    block_size=4,
    max_lod=2,
    w_max=128,
    sink_tokens=4,
    recent_tokens=8,
    refocus_interval=4,
    max_edits=2,
    tau=0.0,
    lens={"kind": "gist_mass"},
)
FAMILIES = ("llama", "mistral", "qwen3", "phi3", "gemma2", "gemma3", "gpt_oss")


def history(length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def attached(family: str = "llama", config: MegaContextConfig = CONFIG, **sizes: int) -> nn.Module:
    model_config = causal_config(family)
    for name, value in sizes.items():
        setattr(model_config, name, value)
    return attach_megacontext(causal_model(family, model_config), config)


def edits(*triples: tuple[int, int, int]) -> Edits:
    return Edits.of(list(triples))


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits[0]


@torch.no_grad()
def dense_logits(model: nn.Module, session, ids: Tensor) -> Tensor:
    """Stock eager attention over the working context in order, weights and windows as a dense mask: the definition."""
    stock, wc = twin(model), session.working_context
    detach_megacontext(stock)
    count, total = ids.shape[1], len(session)
    payload = session.cache.read(session.memory.slots)  # [N, L, 2, H, D]
    cache = DynamicCache(config=stock.config)
    for layer in range(payload.shape[1]):
        cache.layers[layer].keys, cache.layers[layer].values = payload[:, layer].permute(1, 2, 0, 3)[:, None].clone()
        cache.layers[layer].is_initialized = True
    groups = stock.config.num_attention_heads // stock.config.num_key_value_heads
    weight = session.addon.gist.log_weight(torch.from_numpy(wc.lod.astype(np.int64)))[0]  # layers agree in these tests
    weight = weight.repeat_interleave(groups, 0)[None, :, None].expand(1, -1, count, -1)
    own = torch.full((count, count), -torch.inf).triu(1).expand(1, weight.shape[1], -1, -1)
    first = session.memory.numbering.next
    out = stock(
        input_ids=ids,
        attention_mask=torch.cat((weight, own), -1),
        position_ids=torch.arange(first, first + count)[None],
        use_cache=True,
        **{cache_argument(stock): cache},
    )
    assert layer_windows(stock) == [None] * payload.shape[1]
    assert total == wc.total
    return out.logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_history_within_the_window_is_the_base_model(family: str) -> None:
    ids = history(90)
    model = causal_model(family)
    expected = logits_of(model, ids)
    tokens = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[:, 90:]
    attach_megacontext(model, CONFIG)
    session = model.megacontext.session(chunk_size=37)
    logits = session.ingest(ids, return_logits=True)
    assert (logits - expected).abs().max() <= 1e-5
    session.check_invariants()
    assert torch.equal(session.generate(max_new_tokens=16, do_sample=False), tokens)
    assert torch.equal(session.tokens(), torch.cat((ids, tokens), 1)[0])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_attach_and_detach_leave_no_trace(family: str) -> None:
    ids, model = history(21), causal_model(family)
    keys, before, config = list(model.state_dict()), logits_of(model, ids), model.config
    names, modules = [n for n, _ in model.named_parameters()], [n for n, _ in model.named_modules()]
    attach_megacontext(model, CONFIG)
    assert list(model.state_dict()) == keys
    assert (logits_of(model, ids) - before).abs().max() <= 1e-5
    incompatible = model.load_state_dict(model.state_dict())
    assert not incompatible.missing_keys
    assert not incompatible.unexpected_keys
    with model.megacontext.disable():
        assert torch.equal(logits_of(model, ids), before)
        with pytest.raises(RuntimeError, match="disable"):
            model.megacontext.session().ingest(ids)
        with pytest.raises(RuntimeError, match="outside of"):
            detach_megacontext(model)
    with pytest.raises(RuntimeError, match=r"call detach_megacontext\(model\) first"):
        unpatch_model(model)
    session = model.megacontext.session()
    session.ingest(ids)
    detach_megacontext(model)
    assert torch.equal(logits_of(model, ids), before)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == names
    assert [n for n, _ in model.named_modules()] == modules
    assert model.config is config
    with pytest.raises(ValueError, match="no megacontext"):
        detach_megacontext(model)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_gists_weigh_what_their_heads_say(family: str) -> None:
    model = attached(family)
    gist = model.megacontext.gist
    with torch.no_grad():
        gist.beta.copy_(
            torch.randn(gist.beta[:1].shape, generator=torch.Generator().manual_seed(3)).expand_as(gist.beta)
        )
    session = model.megacontext.session()
    session.ingest(history(70))
    session.apply(edits((-1, 16, 2), (-1, 4, 1), (-1, 40, 1), (-1, 32, 1)))
    session.apply(edits((1, 4, 1)))
    session.check_invariants()
    assert sorted(set(session.working_context.lod.tolist())) == [0, 1, 2]
    assert session.cache._holes, "free columns must be among those attended to"
    new = history(9, seed=5)
    expected = dense_logits(model, session, new)
    assert (session.ingest(new, return_logits=True) - expected).abs().max() <= 1e-5
    for seed in (6, 7):  # one token at a time goes into a hole
        new = history(1, seed=seed)
        expected = dense_logits(model, session, new)
        assert (session.ingest(new, return_logits=True) - expected).abs().max() <= 1e-5


def test_sliding_layers_count_tokens_not_columns() -> None:
    model = attached("mistral")  # a window of 6 tokens in every layer
    session = model.megacontext.session()
    ids, new = history(60), history(5, seed=2)
    plain = model.megacontext.session()
    plain.ingest(ids)
    expected = plain.ingest(new, return_logits=True)
    session.ingest(ids)
    session.apply(edits((-1, 8, 1), (-1, 32, 2), (-1, 16, 1)))  # nothing that the window still shows
    session.apply(edits((1, 16, 1)))
    assert (session.ingest(new, return_logits=True) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detail_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = attached().to(dtype)
    session = model.megacontext.session()
    session.ingest(history(100))
    before = session.cache.read(session.memory.slots)
    session.apply(edits((-1, 16, 2), (-1, 48, 1), (-1, 4, 1)))
    session.apply(edits((1, 4, 1), (1, 16, 2)))
    session.apply(edits((1, 16, 1), (1, 20, 1), (1, 24, 1), (1, 28, 1), (1, 48, 1)))
    assert not session.working_context.lod.any()
    assert torch.equal(session.cache.read(session.memory.slots), before)
    assert np.array_equal(session.memory.numbering.position, np.arange(100))
    session.check_invariants()


def test_a_gist_is_the_mean_in_the_middle() -> None:
    model = attached()
    session = model.megacontext.session()
    session.ingest(history(40))
    keys = session.cache.read(session.memory.slots)[16:20, :, 0]
    session.apply(edits((-1, 16, 1)))
    slot = session.memory.slots[16]
    rope = model.megacontext.gist.rope
    bare = rope.unrotate(keys, *(t[:, :, None] for t in rope.tables(torch.arange(16, 20))))
    middle = rope.rotate(bare.mean(0), *(t[:, None] for t in rope.tables(torch.tensor(18))))
    assert (session.cache.read(np.array([slot]))[0, :, 0] - middle).abs().max() <= 1e-5


@pytest.mark.parametrize("positions", ["compressed", "absolute"])
def test_a_history_longer_than_the_window_keeps_every_rule(positions: str) -> None:
    config = dataclasses.replace(CONFIG, w_max=64, positions=positions)
    model = attached(config=config, max_position_embeddings=128 if positions == "compressed" else 4096)
    session = model.megacontext.session(chunk_size=16)
    ids = history(500)[0]
    for start in range(0, 500, 50):
        session.ingest(ids[start : start + 50], refocus=True)
        session.check_invariants()
        assert session.memory.numbering.next <= model.config.max_position_embeddings
        assert (session.memory.numbering.width > 0).all()
    assert torch.equal(session.tokens(), ids)
    new = history(3, seed=9)
    logits = session.ingest(new, return_logits=True)
    session.rewind(3)
    assert (logits - dense_logits(model, session, new)).abs().max() <= 1e-5
    report = session.telemetry()
    assert report["history_tokens"] == 500
    assert report["collapses"] > 0
    assert (report["renumberings"] > 0) == (positions == "compressed")
    assert 0 < report["budget_use"] <= 1


def test_renumbered_keys_are_the_stored_ones_turned_once() -> None:
    config = dataclasses.replace(CONFIG, w_max=64)
    model = attached(config=config, max_position_embeddings=96)
    session = model.megacontext.session(chunk_size=16)
    session.ingest(history(400))
    assert session.stats.renumberings > 1
    wc, memory, rope = session.working_context, session.memory, model.megacontext.gist.rope
    centres = memory.numbering.centres()
    assert (np.diff(centres) > 0).all()
    held = np.flatnonzero(wc.end <= memory.committed)
    for slot in held.tolist():
        lod, node = int(wc.lod[slot]), torch.tensor([wc.start[slot] // wc.span[slot]])
        key = memory.tree.payload(lod, node)[0, :, 0]
        by = centres[slot] - (int(memory.places.read(node)) if lod == 0 else 0)
        turned = rope.rotate(key, *(t[:, None] for t in rope.tables(torch.tensor(by))))
        got = session.cache.read(memory.slots[slot : slot + 1])[0, :, 0]
        assert (got - turned).abs().max() <= 2e-5


def test_all_positions_may_shift_together() -> None:
    model = attached(max_position_embeddings=256)
    session = model.megacontext.session()
    ids, new = history(60), history(4, seed=2)
    session.ingest(ids)
    expected = session.ingest(new, return_logits=True)
    session.rewind(4)
    session.memory.numbering.position = session.memory.numbering.position + 30  # as if it had been read there
    session.memory.numbering.next += 30
    turned = session.memory._turned(session.cache.read(session.memory.slots), np.full(60, 30))
    session.cache.write(session.memory.slots, turned, np.arange(60))
    mass = session.attention_mass()
    session.memory.renumber(session.working_context, 4)
    assert session.memory.numbering.next == 60
    assert (session.ingest(new, return_logits=True) - expected).abs().max() <= 1e-5
    assert mass.shape == (60,)


def test_absolute_positions_raise_past_the_range_before_anything_changes() -> None:
    model = attached(config=dataclasses.replace(CONFIG, positions="absolute"), max_position_embeddings=128)
    session = model.megacontext.session()
    session.ingest(history(100))
    for act in (lambda: session.ingest(history(29)), lambda: session.generate(max_new_tokens=29)):
        with pytest.raises(ValueError, match="max_position_embeddings 128"):
            act()
    assert len(session) == 100
    session.ingest(history(28))
    session.check_invariants()


def test_reading_again_changes_nothing_when_nothing_changed() -> None:
    model = attached()
    session = model.megacontext.session()
    ids = history(60)
    logits = session.ingest(ids, return_logits=True)
    session.reread(20)
    assert (session.next_logits() - logits[-1]).abs().max() <= 1e-5
    assert torch.equal(session.tokens(), ids[0])
    session.check_invariants()
    with pytest.raises(ValueError, match="expected 1 to 60"):
        session.reread(61)
    shown = list(session.working_context.entries)
    with pytest.raises(ValueError, match="reread: expected 1 to 60"):
        session.refocus(reread=61)
    assert list(session.working_context.entries) == shown, "before an edit is made"


def test_attention_mass_is_the_attention_of_the_last_query() -> None:
    model = causal_model("llama")
    ids = history(50)
    with torch.no_grad():
        expected = torch.stack(model(ids, output_attentions=True).attentions)[:, 0, :, -1].mean((0, 1))
    attach_megacontext(model, CONFIG)
    session = model.megacontext.session(observe=1)
    session.ingest(ids)
    assert (session.attention_mass() - expected).abs().max() <= 1e-6
    session.apply(edits((-1, 16, 1)))
    assert session.attention_mass().sum() == pytest.approx(1.0, abs=1e-5)
    several = model.megacontext.session(observe=7)
    for start in range(0, 50, 10):
        several.ingest(ids[:, start : start + 10])
    session.rewind(3)
    queries = several.cache.last_queries()
    several.rewind(2)
    assert torch.equal(several.cache.last_queries(), queries[:, :, :5])


def test_lenses_that_need_no_attention_mass_do_not_pay_for_it() -> None:
    config = dataclasses.replace(CONFIG, lens={"kind": "random"})
    session = attached(config=config).megacontext.session()
    session.ingest(torch.randint(3, VOCAB, (100,)))
    with mock.patch.object(session, "attention_mass", side_effect=AssertionError("asked for")):
        session.refocus()
        session.addon.lens = GistMassLens(config)
        with pytest.raises(AssertionError, match="asked for"):
            session.refocus()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_mass_is_the_mean_of_the_weights(dtype: torch.dtype, device: str) -> None:
    """Of all heads, layers and last queries, against float64 from the same keys."""
    model = attached().to(device, dtype)
    session = model.megacontext.session()
    session.ingest(torch.randint(3, VOCAB, (60,)))
    cache, end = session.cache, session.cache.end
    queries, keys = cache.last_queries().double(), cache.kv[0, :, :, :end].double()
    scaling = torch.tensor(session.scaling, device=device)[:, None, None, None, None]
    grouped = queries.unflatten(1, (keys.shape[1], -1)) * scaling
    keys, weight = keys[:, :, None].transpose(-1, -2), cache.log_weight[:, :, None, None, :end]

    def mean(x: Tensor) -> Tensor:
        return (x + weight).softmax(-1).mean((0, 1, 2, 3))

    native = mean((grouped.to(dtype) @ keys.to(dtype)).float())
    with torch.inference_mode():  # where nothing can be recorded
        mass = cache.attention_mass(session.scaling)
    check_bound("mass", mass, mean(grouped @ keys), native, dtype, "attention mass")


def test_refocus_follows_the_lens_and_generation_refocuses() -> None:
    model = attached(config=dataclasses.replace(CONFIG, w_max=64, tau=0.2, cooldown=0))
    wanted = 8

    def only(context: LensInput) -> Tensor:
        return torch.where((context.start == wanted) & (context.lod > 0), 1.0, -0.5)

    model.megacontext.lens = OracleLens(model.megacontext.config, only)
    session = model.megacontext.session(chunk_size=16)
    session.ingest(history(200))
    rounds = session.refocus(rounds=3)
    wc = session.working_context
    assert {0} == {int(lod) for start, lod in zip(wc.start, wc.lod, strict=True) if wanted <= start < wanted + 4}
    assert any((kind, start) == (1, wanted) for e in rounds for kind, start in zip(e.kind, e.start, strict=True))
    session.check_invariants()
    before = session.stats.refocuses
    session.generate(max_new_tokens=13, do_sample=False)
    assert session.stats.refocuses >= before + 3
    assert len(session) == 213
    session.check_invariants()


@pytest.mark.parametrize("kind", ["dual", "transformer"])
def test_trained_lenses_are_shown_what_slots_are_about(kind: str) -> None:
    lens = {"kind": kind, "width": 32, "head_dim": 16, "prior": "recency"}
    model = attached(config=dataclasses.replace(CONFIG, w_max=64, lens=lens))
    session = model.megacontext.session(chunk_size=16)
    session.ingest(history(20))
    assert session.lens_input().tail.shape == (3, 64)
    session.ingest(history(220, seed=2), refocus=True)
    session.check_invariants()
    wc, context = session.working_context, session.lens_input()
    table, ids = model.get_input_embeddings().weight.detach(), session.tokens()
    for slot, (start, end) in enumerate(zip(wc.start.tolist(), wc.end.tolist(), strict=True)):
        assert (context.entries[slot] - table[ids[start:end]].mean(0)).abs().max() <= 2e-3
    assert context.tail.shape == (6, 64)
    middle = (wc.start + wc.span / 2) / wc.total
    low, high = torch.from_numpy((wc.lod < 2) * -1.0), torch.from_numpy((wc.lod > 0) * 1.0)
    expected = torch.from_numpy(2 * middle - 1).clamp(low, high)
    assert (session.scores() - expected).abs().max() <= 2e-3, "untrained, a lens is its prior"
    session.rewind(3)
    session.ingest(history(9, seed=3))
    assert len(session.lens_input().entries) == len(session.working_context)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 11},
        {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.3},
        {"do_sample": False, "no_repeat_ngram_size": 2, "min_new_tokens": 12},
        {"do_sample": True, "encoder_repetition_penalty": 4.0},
        {"do_sample": True, "encoder_no_repeat_ngram_size": 1},
        {"eos_token_id": list(range(3, VOCAB)), "min_length": 40, "min_new_tokens": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_sampling_is_transformers_own(options: dict) -> None:
    model, ids = causal_model("llama"), history(30)
    torch.manual_seed(5)
    expected = model.generate(ids, max_new_tokens=24, pad_token_id=0, **options)[:, 30:]
    attach_megacontext(model, CONFIG)
    torch.manual_seed(5)
    assert torch.equal(model.megacontext.session().generate(ids, max_new_tokens=24, **options), expected)


def test_lengths_count_the_whole_history() -> None:
    session = attached(config=dataclasses.replace(CONFIG, w_max=64)).megacontext.session()
    session.ingest(history(300))
    ends = {"eos_token_id": list(range(1, VOCAB)), "do_sample": False}
    assert session.generate(max_new_tokens=8, min_length=290, **ends).shape == (1, 1)
    assert session.generate(max_new_tokens=8, min_length=305, **ends).shape == (1, 5)
    longest = GenerationConfig(max_length=310)
    assert session.generate(generation_config=longest).shape == (1, 4)
    with pytest.raises(ValueError, match="max_length: expected more than the 310 tokens"):
        session.generate(generation_config=longest)
    assert session.generate(generation_config=longest, max_new_tokens=2).shape == (1, 2)
    session.model.generation_config.max_length = 256  # its range, as hubs' models say
    assert session.generate().shape == (1, 20)


@pytest.mark.parametrize(
    "options",
    [
        {"token_healing": True},
        {"use_mtp": True},
        {"force_words_ids": [[5]]},
        {"prompt_lookup_num_tokens": 1},
        {"penalty_alpha": 1.0, "top_k": 4},
        {"return_dict_in_generate": True},
        {"output_attentions": True},
        {"output_hidden_states": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_settings_that_ask_for_more_are_refused(options: dict) -> None:
    session = attached().megacontext.session()
    with pytest.raises(NotImplementedError, match=next(iter(options))):
        session.generate(history(20), **options)
    assert len(session) == 0


def test_settings_that_are_wrong_read_no_prompt() -> None:
    session = attached().megacontext.session()
    session.ingest(history(20))
    with pytest.raises(ValueError, match="tokenizer"):
        session.generate([5, 6], stop_strings=["a"])
    with pytest.raises(ValueError, match=r"fields of a GenerationConfig, got \['temprature'\]"):
        session.generate([5, 6], temprature=0.5)
    assert len(session) == 20
    assert session.generate(max_new_tokens=1, output_attentions=False).shape == (1, 1)


def test_generation_streams_and_stops() -> None:
    class Words:
        def decode(self, ids, **_) -> str:
            return "".join(f"{i} " for i in ids)

    shown: list[str] = []
    streamer = TextStreamer(Words(), skip_prompt=True)  # type: ignore[arg-type]
    streamer.on_finalized_text = lambda text, stream_end=False: shown.append(text)  # type: ignore[method-assign]
    model = attached()
    session = model.megacontext.session()
    tokens = session.generate(history(20), max_new_tokens=6, do_sample=False, streamer=streamer)
    assert "".join(shown).split() == [str(t) for t in tokens[0].tolist()]
    put: list[list[int]] = []
    plain = mock.Mock(put=lambda ids: put.append(list(ids.shape)))
    model.megacontext.session().generate(history(20), max_new_tokens=2, do_sample=False, streamer=plain)
    assert put == [[1, 20], [1], [1]]  # as transformers' generate puts them
    again = model.megacontext.session()
    stop = int(tokens[0, 2])
    got = again.generate(history(20), max_new_tokens=6, do_sample=False, eos_token_id=stop)
    assert torch.equal(got, tokens[:, : 1 + tokens[0].tolist().index(stop)])
    rest = again.generate(max_new_tokens=2, do_sample=False)
    assert torch.equal(again.tokens(), torch.cat((history(20), got, rest), 1)[0])
    forced = LogitsProcessorList([lambda seen, scores: scores.index_fill(1, torch.tensor([9]), 1e9)])
    assert again.generate(max_length=len(again) + 3, logits_processor=forced).tolist() == [[9, 9, 9]]


def test_sessions_of_one_model_do_not_mix() -> None:
    model = attached()
    first, second, ids = model.megacontext.session(), model.megacontext.session(), history(60)
    expected = model.megacontext.session().ingest(ids, return_logits=True)
    parts = []
    for start in range(0, 60, 20):
        parts.append(first.ingest(ids[:, start : start + 20], return_logits=True))
        second.ingest(history(20, seed=start + 3))
    assert (torch.cat(parts) - expected).abs().max() <= 1e-5


def test_an_earlier_working_context_can_be_shown_again() -> None:
    model = attached(config=dataclasses.replace(CONFIG, w_max=64, cooldown=0))
    session = model.megacontext.session(chunk_size=16)
    session.ingest(history(300))
    earlier, contents = session.working_context.copy(), session.cache.read(session.memory.slots)
    session.ingest(history(5, seed=2))
    session.refocus(rounds=3)
    assert not np.array_equal(session.working_context.start[: len(earlier)], earlier.start)
    session.rewind(5)
    session.restore(earlier)
    session.check_invariants()
    assert np.array_equal(session.working_context.start, earlier.start)
    assert torch.equal(session.cache.read(session.memory.slots), contents)
    session.restore(earlier)
    session.rewind(2)
    with pytest.raises(ValueError, match="at most 298 tokens"):
        session.restore(earlier)


def test_a_failed_forward_leaves_the_session_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached()
    session, ids = model.megacontext.session(), history(40)
    session.ingest(ids[:, :20])

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            session.ingest(ids[:, 20:])
    session.check_invariants()
    rest = session.ingest(ids[:, 20:], return_logits=True)
    assert (rest - logits_of(model, ids)[20:]).abs().max() <= 1e-5


def test_wrong_use_is_named() -> None:
    model = attached()
    session = model.megacontext.session()
    with pytest.raises(ValueError, match=f"ids from 0 to {VOCAB - 1}"):
        session.ingest([1, VOCAB])
    with pytest.raises(NotImplementedError, match="a session for each"):
        session.ingest(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="history is empty"):
        session.generate()
    with pytest.raises(NotImplementedError, match="num_beams=2"):
        session.generate([5], num_beams=2)
    with pytest.raises(ValueError, match="nonsense"):
        session.generate([5], nonsense=1)
    with pytest.raises(ValueError, match="has a megacontext already"):
        attach_megacontext(model, CONFIG)
    with pytest.raises(ValueError, match="complete node"):
        session.apply(edits((-1, 0, 1)))
    with pytest.raises(TypeError, match=r"edits: expected Edits\.of\(.*, got list"):
        session.apply([1])
    assert len(session) == 0
    detach_megacontext(model)
    with pytest.raises(ValueError, match="head_dim: the model has 16, the config 24"):
        attach_megacontext(model, dataclasses.replace(CONFIG, head_dim=24))
    with pytest.raises(NotImplementedError, match="chunked_attention"):
        attach_megacontext(causal_model("llama4"), CONFIG)
    with pytest.raises(NotImplementedError, match="rotary"):
        attach_megacontext(causal_model("gpt2"), CONFIG)


def test_a_budget_that_cannot_hold_the_history_says_so() -> None:
    model = attached(config=dataclasses.replace(CONFIG, max_lod=1, w_max=40))
    session = model.megacontext.session(chunk_size=8)
    with pytest.raises(BudgetError):
        session.ingest(history(400))
    session.check_invariants()


def test_sdpa_never_stands_in_for_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take gists for keys that are not there."""
    from hf_flash_mc import patch_model
    from hf_flash_mc.patches import attention

    def refuse(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("no kernel")

    model = attach_megacontext(patch_model(causal_model("llama"), fallback="sdpa"), CONFIG)
    session = model.megacontext.session()
    monkeypatch.setattr(attention, "flash_attention", refuse)
    with pytest.raises(NotImplementedError, match="no kernel"):
        session.ingest(history(9))
    assert len(session) == 0


def test_nothing_to_read_is_no_error_and_the_last_token_stays() -> None:
    session = attached(config=dataclasses.replace(CONFIG, w_max=64)).megacontext.session(chunk_size=16)
    for nothing in ([], [[]], torch.empty(1, 0, dtype=torch.int64)):
        session.ingest(nothing)
    assert len(session) == 0
    with pytest.raises(ValueError, match="history is empty"):
        session.generate([], max_new_tokens=1)
    session.ingest(history(64)[0].to(torch.int32))
    session.make_room(16)  # more than recent_tokens: everything old enough after them may go, but not the last token
    session.apply(edits((-1, 4, 1)) if session.working_context.lod[4] == 0 else edits((1, 4, 1)))
    assert session.next_logits().isfinite().all()
    session.check_invariants()
    with pytest.raises(ValueError, match="recent_tokens"):
        attached(config=dataclasses.replace(CONFIG, recent_tokens=1)).megacontext.session()


def test_reading_by_single_chunks_refocuses_too() -> None:
    session = attached(config=dataclasses.replace(CONFIG, w_max=64)).megacontext.session(chunk_size=16)
    for part in history(160)[0].split(16):
        session.ingest(part, refocus=True)
    assert session.stats.refocuses == 9
    session.check_invariants()


@pytest.mark.parametrize("lens", ["gist_mass", "recall", "dual"])
def test_a_first_chunk_larger_than_the_window(lens: str) -> None:
    settings = {"width": 32, "head_dim": 16} if lens == "dual" else {}
    session = attached("llama", dataclasses.replace(CONFIG, w_max=32, lens={"kind": lens, **settings})).megacontext
    session = session.session()
    session.ingest(history(100))
    assert len(session) == 100
    session.check_invariants()


@pytest.mark.parametrize("lens", ["recall", "gist_mass", "random"])
def test_a_question_longer_than_the_recent_tokens_stays_one(lens: str) -> None:
    session = attached("llama", dataclasses.replace(CONFIG, w_max=64, lens={"kind": lens})).megacontext.session()
    session.ingest(history(150))
    session.ingest(history(30, seed=2))  # recent_tokens is 8
    edited = session.refocus(rounds=3, reread=30)
    assert any(len(round_) for round_ in edited)
    assert not session.working_context.lod[-30:].any()
    session.check_invariants()
    before, expansions = session.working_context.copy(), session.telemetry()["expansions"]
    with pytest.raises(ValueError, match=r"reread: expected 1 to \d+ .*got 120"):
        session.refocus(reread=120)
    assert np.array_equal(before.start, session.working_context.start)
    assert session.telemetry()["expansions"] == expansions
    full = attached("llama", dataclasses.replace(CONFIG, w_max=64, lens={"kind": lens})).megacontext.session()
    full.ingest(history(150))
    full.ingest(history(40, seed=2))
    full.refocus(rounds=3, reread=len(full.memory.tail))
    full.check_invariants()
