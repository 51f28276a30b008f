"""Training on patched models: packing, checkpointing, autocast, dropout and the Trainer give stock eager's losses."""

from __future__ import annotations

import pytest
import torch
import transformers
from patch_models import SMALL, assert_same, build, causal_model, outputs_and_gradients, padding, tokens, twin

from hf_flash_mc.patches import attention, patch_model, patch_report


def logits(out):
    return out.logits


LENGTHS = (5, 1, 9, 6)


def one_by_one(model) -> torch.Tensor:
    """Logits of the packed documents, each run alone: what packing must reproduce."""
    return torch.cat([model(part).logits for part in tokens(1).split(LENGTHS, 1)], 1)


def positions() -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in LENGTHS])[None]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("case", ["mask", "cache", "dense mask", "neither"])
def test_packing_holds_even_with_a_mask_or_a_cache(family, case):
    """Stock transformers mixes the documents in the first two cases, without a word."""
    model = causal_model(family)
    with torch.no_grad():
        expected = one_by_one(model)
        given = {"position_ids": positions(), "use_cache": case == "cache"}
        if case == "mask":
            given["attention_mask"] = torch.ones(1, 21, dtype=torch.long)
            assert (model(tokens(1), **given).logits - expected).abs().max() > 1e-2
        if case == "dense mask":
            given["attention_mask"] = torch.ones(21, 21, dtype=torch.bool).tril()[None, None]
            if family == "mistral":
                pytest.skip("a 4-D mask replaces the sliding window")
        patch_model(model, packing="position_ids")
        torch.testing.assert_close(model(tokens(1), **given).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_packing_continues_over_a_cache(cache):
    """Rows over a cache reach back to the start of their own document, also into the cache."""
    model = patch_model(causal_model("llama"), packing="position_ids")
    ids, where = tokens(1), positions()
    with torch.no_grad():
        expected = one_by_one(model)
        store = None if cache == "dynamic" else transformers.StaticCache(config=model.config, max_cache_len=32)
        got = []
        for a, b in ((0, 8), (8, 11), (11, 12), (12, 21)):
            out = model(ids[:, a:b], position_ids=where[:, a:b], past_key_values=store, use_cache=True)
            store = out.past_key_values
            got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-5)


def test_without_a_mask_the_arguments_decide():
    """Wrappers such as sequence parallelism drop the mask: causality, window and boundaries then come as arguments."""
    q = torch.randn(1, 4, 21, 16)
    module = torch.nn.Module()
    bounds = torch.tensor([0, 5, 6, 15, 21], dtype=torch.int32)

    def call(q, **how):
        return attention.mc_attention(module, q, q, q, None, **how)[0]

    alone = [call(part, is_causal=True, sliding_window=4) for part in q.split(LENGTHS, 2)]
    got = call(
        q, is_causal=True, sliding_window=4, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=9, max_length_k=9
    )
    torch.testing.assert_close(got, torch.cat(alone, 1), rtol=0, atol=1e-6)
    module.is_causal = False
    seen = (torch.arange(21)[:, None] - torch.arange(21)).abs() <= 3
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=seen).transpose(1, 2)
    torch.testing.assert_close(call(q, sliding_window=4), expected, rtol=0, atol=1e-6)


def small_llava() -> transformers.LlavaForConditionalGeneration:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=7)
    text = transformers.LlamaConfig(**sizes, vocab_size=97)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=96)
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("options", [{}, {"packing": "position_ids"}], ids=["plain", "packing"])
def test_boundaries_of_a_text_are_not_those_of_its_images(options):
    """LLaVA hands every keyword argument on to its vision tower, which cut the image at the text's boundaries; and
    with packing raised, as no position_ids come along."""
    model, ids = small_llava(), tokens(1, 40)
    ids[0, 12:28] = 96
    where = torch.cat([torch.arange(n) for n in (9, 31)])[None]
    bounds = torch.tensor([0, 9, 40], dtype=torch.int32)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28), "position_ids": where, "use_cache": False}
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 31, "max_length_k": 31}
    with torch.no_grad():
        expected = model(**inputs).logits
        patch_model(model, **options)
        torch.testing.assert_close(model(**inputs, **lengths).logits, expected, rtol=0, atol=1e-5)


def test_packing_refuses_recurrent_layers():
    """Their state went from document to document without a word."""
    config = transformers.Lfm2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    model = transformers.Lfm2ForCausalLM(config)
    with pytest.raises(NotImplementedError, match="recurrent layers, which would mix the documents"):
        patch_model(model, packing="position_ids")
    assert not patch_report(model).patched
    assert patch_report(patch_model(model)).patched


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2"])
@pytest.mark.parametrize("rows", [1, 2])
def test_boundaries_keep_documents_apart_beside_a_mask(family, rows):
    """cu_seq_lens of FlashAttention, counted over the whole batch, where the model made a mask that knows no documents;
    position ids go on, as they may where boundaries are given."""
    if family == "bert":
        model = build(transformers.BertModel, transformers.BertConfig(**SMALL))
    else:
        model = causal_model(family).model
    ids, where = tokens(1, 40).view(rows, -1), torch.arange(40 // rows)
    bounds = [0, 9, 40] if rows == 1 else [0, 9, 20, 31, 40]
    given = torch.tensor(bounds, dtype=torch.int32)
    lengths = {"cu_seq_lens_q": given, "cu_seq_lens_k": given, "max_length_q": 31, "max_length_k": 31}
    sizes = given.diff().tolist()
    parts = list(zip(ids.view(-1).split(sizes), where.repeat(rows).split(sizes), strict=True))
    with torch.no_grad():
        alone = [model(part[None], position_ids=at[None]).last_hidden_state[0] for part, at in parts]
        patch_model(model)
        found = model(ids, position_ids=where.expand(rows, -1), use_cache=False, **lengths).last_hidden_state
    torch.testing.assert_close(found.flatten(0, 1), torch.cat(alone), rtol=0, atol=1e-5)


def test_packing_refuses_keys_chosen_by_an_indexer():
    """It ranks the keys of all documents: those of another took the places of a document's own."""
    module, q = torch.nn.Module(), torch.randn(1, 2, 6, 8)
    module._mc_record = attention.ModuleRecord("layer", attention.Options(packing="position_ids"))
    given = {"indices": torch.zeros(1, 6, 2, dtype=torch.int32), "position_ids": torch.arange(6)[None] % 3}
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    with pytest.raises(NotImplementedError, match="indexer chooses keys among those of all documents"):
        attention.mc_attention(module, q, q, q, mask, **given)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gradient_checkpointing(family, reentrant):
    model, mask = causal_model(family), padding("holes")
    inputs = {"input_ids": tokens(), "attention_mask": mask, "use_cache": False}
    expected = outputs_and_gradients(model, logits, mask, **inputs)
    ours = patch_model(twin(model)).train()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(outputs_and_gradients(ours, logits, mask, **inputs), expected)
    assert max(patch_report(ours).calls.values()) == 2  # forward and recomputation


def test_dropout_is_the_same_when_checkpointing_recomputes():
    config = transformers.GPT2Config(
        n_embd=64, n_head=4, n_layer=2, vocab_size=97, attn_pdrop=0.3, resid_pdrop=0, embd_pdrop=0
    )
    torch.manual_seed(0)
    model = patch_model(transformers.GPT2LMHeadModel(config)).train()
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        results.append(outputs_and_gradients(model, logits, None, input_ids=tokens(), use_cache=False))
    assert_same(results[1], results[0])
    model.eval()
    assert torch.equal(model(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_autocast_mixes_dtypes(family):
    """fp32 weights under bf16 autocast hand over q and k in fp32 and v in bf16."""
    model, mask = causal_model(family), padding("left")
    inputs = {"input_ids": tokens(), "attention_mask": mask, "use_cache": False}
    exact = outputs_and_gradients(model, logits, mask, **inputs)[0]

    def error(m):
        with torch.autocast("cpu", torch.bfloat16):
            out, grads = outputs_and_gradients(m, lambda out: out.logits.float(), mask, **inputs)
        assert all(g.isfinite().all() for g in grads.values())
        return (out - exact).abs().max()

    stock = error(model)
    ours = patch_model(twin(model))
    assert error(ours) <= 2 * stock + 1e-3
    assert not patch_report(ours).not_reached


def train(model, data, collator, tmp_path, **settings) -> list[float]:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-2,
        seed=0,
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def pad(features: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(f["input_ids"]) for f in features)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for f in features:
        n = longest - len(f["input_ids"])
        batch["input_ids"].append(f["input_ids"] + [0] * n)
        batch["attention_mask"].append([1] * len(f["input_ids"]) + [0] * n)
        batch["labels"].append(f["input_ids"] + [-100] * n)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


@pytest.mark.parametrize("way", ["padding", "flattening", "flattening with lengths"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_trainer(family, way, tmp_path):
    generator = torch.Generator().manual_seed(3)
    data = [{"input_ids": torch.randint(3, 97, (n,), generator=generator).tolist()} for n in (7, 15, 4, 11, 9, 13)]
    collator = pad
    if way != "padding":
        collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs="lengths" in way)
    model = causal_model(family)
    ours = patch_model(twin(model))
    assert train(ours, data, collator, tmp_path) == pytest.approx(train(model, data, collator, tmp_path), abs=2e-4)
    assert not patch_report(ours).not_reached
