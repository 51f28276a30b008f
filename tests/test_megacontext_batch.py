"""Several sessions in one forward: each gets what it would get alone, and nothing is padded or copied at a step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from patch_models import VOCAB
from test_megacontext_session import CONFIG, attached, history
from torch import Tensor, nn

from hf_flash_mc.megacontext.config import MegaContextConfig

LENGTHS = (30, 170, 1, 77)
SMALL = dataclasses.replace(CONFIG, w_max=64, tau=0.2, cooldown=0, lens={"kind": "random"})


def weighted(family: str, config: MegaContextConfig = SMALL) -> nn.Module:
    """A model whose gists weigh something."""
    model = attached(family, config)
    with torch.no_grad():
        model.megacontext.gist.beta.normal_(generator=torch.Generator().manual_seed(3))
    return model


def opened(model: nn.Module, lengths: tuple[int, ...] = LENGTHS) -> list:
    observed = (64, 5, 1, 16)  # rings of queries of different sizes
    return [model.megacontext.session(chunk_size=16, observe=observed[i % 4]) for i in range(len(lengths))]


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [history(length, seed=length) for length in lengths]


def assert_same(one, other) -> None:
    assert torch.equal(one.tokens(), other.tokens())
    assert one.working_context.lod.tolist() == other.working_context.lod.tolist()
    assert (one.next_logits() - other.next_logits()).abs().max() <= 1e-5
    assert (one.cache.last_queries() - other.cache.last_queries()).abs().max() <= 1e-4
    other.check_invariants()


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])  # all keys, windows in all layers, sinks and both
def test_each_session_gets_what_it_would_get_alone(family: str) -> None:
    model = weighted(family)
    alone, together = opened(model), opened(model)
    settings = {"max_new_tokens": 13, "do_sample": False}
    expected = [session.generate(ids, **settings) for session, ids in zip(alone, texts(), strict=True)]
    found = model.megacontext.generate(together, texts(), **settings)
    for tokens, wanted in zip(found, expected, strict=True):
        assert torch.equal(tokens, wanted)
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)
        assert one.stats.expansions == other.stats.expansions
    assert max(session.stats.expansions for session in together) > 0
    new = history(9, seed=5)  # and each goes on alone, in the buffer they share
    for one, other in zip(alone, together, strict=True):
        assert (one.ingest(new, return_logits=True) - other.ingest(new, return_logits=True)).abs().max() <= 1e-5


def test_the_embedding_back_end_too() -> None:
    config = dataclasses.replace(SMALL, backend="embedding", refocus_interval=8)
    model = attached("llama", config)
    alone, together = opened(model)[:2], opened(model)[:2]
    expected = [s.generate(i, max_new_tokens=9, do_sample=False) for s, i in zip(alone, texts(), strict=False)]
    found = model.megacontext.generate(together, texts()[:2], max_new_tokens=9, do_sample=False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_sessions_end_by_themselves(family: str) -> None:
    model = weighted(family)
    free = [s.generate(i, max_new_tokens=12, do_sample=False)[0] for s, i in zip(opened(model), texts(), strict=True)]
    stop = int(free[1][3])
    alone, together = opened(model), opened(model)
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
    expected = [session.generate(ids, **settings) for session, ids in zip(alone, texts(), strict=True)]
    found = model.megacontext.generate(together, texts(), **settings)
    lengths = [tokens.shape[1] for tokens in found]
    assert min(lengths) < max(lengths)
    for tokens, wanted, one, other in zip(found, expected, alone, together, strict=True):
        assert torch.equal(tokens, wanted)
        assert_same(one, other)


def test_one_forward_a_step_and_no_copies() -> None:
    model = weighted("llama")
    sessions = opened(model)
    rows: list[int] = []
    model.model.register_forward_hook(lambda m, args, kwargs, out: rows.append(out[0].shape[1]), with_kwargs=True)
    model.megacontext.generate(sessions, texts(), max_new_tokens=5, do_sample=False, refocus=False)
    # chunks of 16 of what each has left, then a row of one token each
    chunks = [sum(min(16, max(0, n - 16 * i)) for n in LENGTHS) for i in range(11)]
    assert rows == [*(n for n in chunks if n), *[4] * 5]
    kv = sessions[0].cache.kv._base
    assert kv is not None
    assert all(session.cache.kv._base is kv for session in sessions)
    rows.clear()
    model.megacontext.generate(sessions, max_new_tokens=3, do_sample=False, refocus=False)
    assert all(session.cache.kv._base is kv for session in sessions)
    assert rows == [4] * 3
    some = [sessions[2], sessions[0]]  # another batch: another buffer
    before = [session.next_logits() for session in some]
    twin = [session.cache.read(session.memory.slots) for session in some]
    model.megacontext.generate(some, [[], None], max_new_tokens=1, do_sample=False)
    for session, held, logits in zip(some, twin, before, strict=True):
        session.rewind(1)
        assert torch.equal(session.cache.read(session.memory.slots), held)
        assert (session.next_logits() - logits).abs().max() <= 1e-5


def test_what_nobody_sees_may_hold_nan() -> None:
    model = weighted("llama")
    alone, together = opened(model), opened(model)
    for sessions in (alone, together):
        model.megacontext.generate(sessions, texts(), max_new_tokens=2, do_sample=False)
    for session in together:
        dead = torch.from_numpy(~session.cache.live)
        session.cache.kv[:, :, :, dead & (torch.arange(64) >= session.cache.end)] = torch.nan
    a, b = (model.megacontext.generate(s, max_new_tokens=6, do_sample=False) for s in (alone, together))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_settings_streams_and_criteria_are_each_ones_own() -> None:
    class Stream:
        def __init__(self) -> None:
            self.got: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.got.append(value.flatten())

        def end(self) -> None:
            self.got.append(torch.tensor([-1]))

    model = weighted("llama")
    sessions, streams = opened(model), [Stream(), None, Stream(), None]
    found = model.megacontext.generate(sessions, texts(), streamers=streams, max_length=175, do_sample=True, top_k=5)
    assert [tokens.shape[1] for tokens in found] == [175 - length for length in LENGTHS]
    whole = torch.cat(streams[0].got)
    assert torch.equal(whole, torch.cat((texts()[0][0], found[0][0], torch.tensor([-1]))))


def test_errors_change_nothing() -> None:
    model, other = weighted("llama"), weighted("llama")
    sessions, foreign = opened(model), opened(other)[0]
    generate = model.megacontext.generate
    for bad, reason in (
        ([], "a list of sessions"),
        ([sessions[0], sessions[0]], "got one twice"),
        ([sessions[0], foreign], "those of one model"),
        ([sessions[0], model], "a list of sessions"),
        ([foreign], "those of one model"),
    ):
        with pytest.raises(ValueError, match=reason):
            generate(bad, max_new_tokens=1)
    for ids, error, reason in (
        (texts()[:2], ValueError, "one for each of 4"),
        ([[1], [2], [VOCAB], [3]], ValueError, "vocabulary"),
        (None, ValueError, "history is empty"),
        ([[1], [2], [[1], [2]], [3]], NotImplementedError, "one batch"),
    ):
        with pytest.raises(error, match=reason):
            generate(sessions, ids, max_new_tokens=1)
    with pytest.raises(NotImplementedError, match="num_beams"):
        generate(sessions, texts(), num_beams=2)
    with pytest.raises(ValueError, match="streamers"):
        generate(sessions, texts(), streamer=object())
    assert [len(session) for session in sessions] == [0] * 4


def test_a_forward_that_fails_leaves_every_history_whole() -> None:
    model = weighted("llama")
    sessions = opened(model)
    model.megacontext.generate(sessions, texts(), max_new_tokens=2, do_sample=False)
    before = [session.tokens() for session in sessions]
    hook = model.model.layers[1].register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        model.megacontext.generate(sessions, texts(), max_new_tokens=2, do_sample=False)
    hook.remove()
    for session, tokens in zip(sessions, before, strict=True):
        session.check_invariants()
        assert len(session.memory.tail) > 0
        assert torch.equal(session.tokens(), tokens)
    model.megacontext.generate(sessions, max_new_tokens=2, do_sample=False)
