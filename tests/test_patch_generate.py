"""A patched model generates the tokens of stock eager attention, whatever the cache and the decoding method."""

from __future__ import annotations

import pytest
import torch
import transformers
from family_errors import built
from patch_models import ADAPTED, ENCODER_DECODER, SMALL, build, causal_model, tokens, twin

from hf_flash_mc.patches import patch_model, patch_report

NEW = 14
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def left_padded(batch: int = 2, length: int = 11):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :4] = 0
    return tokens(batch, length).masked_fill(mask == 0, 0), mask


def generate(model, ids, mask, **how):
    """Tokens and the logits behind them."""
    torch.manual_seed(0)
    out = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **{**GREEDY, **how}
    )
    return out.sequences, torch.stack(out.logits) if out.logits else None


def compare(family: str, ids, mask, **how):
    model = causal_model(family)
    try:
        expected = generate(model, ids, mask, **how)
    except TypeError as error:  # transformers 5.17 cannot make chunked masks for static caches
        pytest.skip(f"stock transformers fails: {error}")
    ours = patch_model(twin(model))
    got = generate(ours, ids, mask, **how)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=3e-5)
    assert not patch_report(ours).not_reached


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_oss", "llama4", "gpt2"])
def test_greedy_with_left_padding(family, cache):
    """Windows of 6 and chunks of 8 against 25 tokens: sliding caches wrap, static caches are longer than filled."""
    compare(family, *left_padded(), **({} if cache is None else {"cache_implementation": cache}))


@pytest.mark.parametrize("family", [*ADAPTED, "qwen2", "gemma4", "cohere2", "deepseek_v3", "gpt_neox", "opt"])
def test_greedy_of_more_families(family):
    compare(family, *left_padded())


def test_musicgen_with_guidance_and_a_prompt():
    """What it was asked to generate goes through to its attention as keyword arguments."""
    try:
        model, _ = built("musicgen", 0)
    except RuntimeError as error:  # transformers 5.17 takes no small config of it
        pytest.skip(str(error))
    ours, ids = patch_model(twin(model)), tokens(2, 7)
    prompt = {"input_values": torch.randn(2, 1, 4000), "padding_mask": torch.ones(2, 4000, dtype=torch.long)}
    for how in ({"guidance_scale": 3.0}, prompt):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, **how)
        torch.testing.assert_close(ours.generate(ids, max_new_tokens=6, do_sample=False, **how), expected)


def test_bidirectional_decoder():
    """Its mask is made without its cache, and for fewer keys than there are."""
    model = build(transformers.BertLMHeadModel, transformers.BertConfig(**SMALL))
    ids = tokens(2, 11)
    expected = generate(model, ids, torch.ones_like(ids))
    got = generate(patch_model(model), ids, torch.ones_like(ids))
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=3e-5)


def test_gpt_neo_over_a_static_cache():
    """Stock takes the windows of other rows there, counted from the cache's end; ours are those of a dynamic cache."""
    ids, mask = left_padded()
    ours = patch_model(causal_model("gpt_neo"))
    expected, got = generate(ours, ids, mask), generate(ours, ids, mask, cache_implementation="static")
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=3e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_without_padding(cache):
    compare(
        "gemma3",
        tokens(2, 11),
        torch.ones(2, 11, dtype=torch.long),
        **({} if cache is None else {"cache_implementation": cache}),
    )


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_right_padded_prompt(family):
    """The padding becomes a hole as soon as a token is generated behind it; the first comes from a row of padding."""
    ids, mask = left_padded()
    compare(family, ids.flip(1), mask.flip(1))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beam_search(family):
    ids, mask = left_padded()
    compare(family, ids, mask, num_beams=3)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_chunked_prefill(family):
    ids, mask = left_padded(2, 13)
    compare(family, ids, mask, prefill_chunk_size=5)


def test_prompt_lookup_and_assisted():
    """Several query rows over a longer cache: bottom-right alignment."""
    ids = tokens(1, 6).repeat(1, 3)
    model = causal_model("llama")
    expected = generate(model, ids, None)[0]
    ours, helper = patch_model(twin(model)), patch_model(causal_model("llama"))
    for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": helper}):
        assert torch.equal(ours.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **how), expected)


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_decoders(family):
    if family == "bart":
        model = build(transformers.BartForConditionalGeneration, transformers.BartConfig(**ENCODER_DECODER))
    else:
        sizes = {
            "vocab_size": 97,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        }
        model = build(transformers.T5ForConditionalGeneration, transformers.T5Config(**sizes))
    ids, mask = left_padded()
    ids, mask = ids.flip(1), mask.flip(1)
    for how in ({}, {"num_beams": 2}):
        expected = generate(model, ids, mask, **how)
        got = generate(patch_model(twin(model)), ids, mask, **how)
        assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_static_decoding(family):
    """Masks are made outside the graph; every decoding step must run in the graphs of the first few."""
    ids, mask = left_padded()
    model = causal_model(family)
    expected = generate(model, ids, mask)[0]
    ours = patch_model(twin(model))
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    ours.forward = torch.compile(ours.forward, fullgraph=True, backend=count)
    got = generate(ours, ids, mask, cache_implementation="static", disable_compile=True)[0]
    assert torch.equal(got, expected)
    assert len(graphs) <= (2 if family == "llama" else 4)  # prefill and decode; a sliding cache changes when it is full
