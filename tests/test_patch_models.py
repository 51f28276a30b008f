"""A patched model gives the logits and gradients of stock eager attention, family by family, for every kind of mask."""

from __future__ import annotations

import pytest
import torch
import transformers
from patch_models import (
    BATCH,
    CAUSAL,
    ENCODER_DECODER,
    LENGTH,
    SMALL,
    VOCAB,
    assert_same,
    build,
    causal_model,
    outputs_and_gradients,
    padding,
    tokens,
    twin,
)

from hf_flash_mc.patches import patch_model, patch_report

PADDINGS = ("none", "left", "right", "holes", "whole row")


def compare(model, read, rows=None, **inputs):
    """Eager against patched; every attention module of the patched one must have run."""
    expected = outputs_and_gradients(model, read, rows, **inputs)
    ours = patch_model(twin(model))
    assert_same(outputs_and_gradients(ours, read, rows, **inputs), expected)
    assert not patch_report(ours).not_reached


def logits(out):
    return out.logits


@pytest.mark.parametrize("kind", PADDINGS)
@pytest.mark.parametrize("family", CAUSAL)
def test_causal_families_equal_eager(family, kind):
    mask = padding(kind)
    compare(causal_model(family), logits, mask, input_ids=tokens(), attention_mask=mask)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "bloom", "falcon_alibi"])
def test_packed_documents_stay_apart(family):
    positions = torch.cat([torch.arange(n) for n in (5, 1, 9, 6)])[None]
    compare(causal_model(family), logits, input_ids=tokens(1), position_ids=positions, use_cache=False)


@pytest.mark.parametrize("family", ["llama", "mpt", "gpt_neo"])  # MPT turns masks into bool itself
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_user_4d_masks_of_any_pattern(dtype, family):
    seen = torch.rand(BATCH, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.5
    seen = seen | torch.eye(LENGTH, dtype=torch.bool)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    model = causal_model(family)
    expected = outputs_and_gradients(model, logits, None, input_ids=tokens(), attention_mask=added)
    ours = patch_model(twin(model))
    got = outputs_and_gradients(
        ours, logits, None, input_ids=tokens(), attention_mask=seen if dtype == torch.bool else added
    )
    assert_same(got, expected)


def test_an_or_mask_of_the_user_is_exact():
    """or_mask_function makes any pattern: transformers asks for it with use_vmap, and it becomes a dense mask."""
    from transformers.masking_utils import create_causal_mask

    model = causal_model("llama")
    far = lambda b, h, q, k: (k % 5 == 0) & (q % 3 == 0)  # noqa: E731

    def forward(m):
        embedded = m.get_input_embeddings()(tokens())
        mask = create_causal_mask(m.config, embedded, padding("left"), None, or_mask_function=far)
        return m(inputs_embeds=embedded, attention_mask=mask).logits[padding("left").bool()]

    expected = forward(model)
    torch.testing.assert_close(forward(patch_model(model)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", PADDINGS)
def test_bert(kind):
    config = transformers.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = build(transformers.BertForMaskedLM, config)
    mask = padding(kind)
    compare(model, logits, mask, input_ids=tokens(), attention_mask=mask)


def test_vit_and_clip():
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 24,
        "patch_size": 8,
    }
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(4))
    config = transformers.ViTConfig(**vision, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    compare(build(transformers.ViTForImageClassification, config), logits, pixel_values=pixels)
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "eos_token_id": 2,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    model = build(transformers.CLIPModel, config)
    mask = padding("right")[:2]
    compare(model, lambda out: out.logits_per_text, input_ids=tokens(2), attention_mask=mask, pixel_values=pixels)


@pytest.mark.parametrize("side", ["left", "right"])
def test_paligemma_sees_its_prefix_both_ways(side):
    """A batch as its processor makes it: image and question of type 0, the answer of type 1, padding of type 0 too."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.PaliGemmaConfig(
        text_config={**SMALL, "head_dim": 24, "model_type": "gemma"},
        vision_config={**vision, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8},
        image_token_index=95,
        projection_dim=64,
    )
    model = build(transformers.PaliGemmaForConditionalGeneration, config).train()
    rows = [[95] * 4 + [5, 6, 7] + [8] * answer for answer in (2, 9)]
    types = [[0] * 7 + [1] * answer for answer in (2, 9)]
    spare = [[0] * (16 - len(row)) for row in rows]

    def pad(lists):
        return torch.tensor([s + x if side == "left" else x + s for s, x in zip(spare, lists, strict=True)])

    mask = pad([[1] * len(row) for row in rows])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    inputs = {"input_ids": pad(rows), "token_type_ids": pad(types), "pixel_values": pixels, "attention_mask": mask}
    compare(model, logits, mask, **inputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gemma3_reads_words_and_images_together(side):
    """Two images a row, whose tokens see each other both ways, in windows and whole; answers go on the same way."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3Config(
        text_config={**SMALL, "head_dim": 24, "sliding_window": 6, "num_hidden_layers": 3, "layer_types": layers},
        vision_config={**vision, "image_size": 28, "patch_size": 7},
        mm_tokens_per_image=4,
        image_token_id=95,
    )
    model = build(transformers.Gemma3ForConditionalGeneration, config).train()
    rows = [[2, *range(10, 10 + n), *[95] * 4, 3, 4, *[95] * 4, *range(20, 26)] for n in (3, 8)]
    spare = [[0] * (25 - len(row)) for row in rows]
    ids = torch.tensor([s + x if side == "left" else x + s for s, x in zip(spare, rows, strict=True)])
    mask = (ids != 0).long()
    pixels = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    inputs = {"input_ids": ids, "token_type_ids": (ids == 95).long(), "pixel_values": pixels, "attention_mask": mask}
    compare(model, logits, mask, **inputs)
    if side == "left":
        model.eval()
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(patch_model(twin(model)).generate(**inputs, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("kind", ["none", "right", "holes"])
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_decoders(family, kind):
    """Cross attention with Q != K, and T5's position bias, whose gradient must come back."""
    if family == "bart":
        model = build(transformers.BartForConditionalGeneration, transformers.BartConfig(**ENCODER_DECODER))
    else:
        sizes = {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        }
        model = build(transformers.T5ForConditionalGeneration, transformers.T5Config(vocab_size=VOCAB, **sizes))
    inputs = {"input_ids": tokens(), "attention_mask": padding(kind), "decoder_input_ids": tokens(BATCH, 13)}
    expected = outputs_and_gradients(model, logits, None, **inputs)
    ours = patch_model(twin(model))
    got = outputs_and_gradients(ours, logits, None, **inputs)
    assert_same(got, expected)
    biases = [n for n in got[1] if "relative_attention_bias" in n]
    assert len(biases) == (2 if family == "t5" else 0)
    assert all(got[1][n].abs().max() > 0 for n in biases)


def test_whisper():
    config = transformers.WhisperConfig(
        **ENCODER_DECODER, num_mel_bins=8, max_source_positions=15, max_target_positions=32
    )
    model = build(transformers.WhisperForConditionalGeneration, config)
    mels = torch.randn(2, 8, 30, generator=torch.Generator().manual_seed(5))
    compare(model, logits, input_features=mels, decoder_input_ids=tokens(2, 9))
