"""Rotary positions: transformers' own bits, undoing, averages over spans, and models' layouts."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_flash_mc.megacontext.rope import Rope, rope_of, rope_tables, rotate, span_sigma, unrotate

INV_FREQ = 1e4 ** -(torch.arange(0, 64, 2).float() / 64)  # [32]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tiny(model_type: str, **more):
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes, eos_token_id=2, **more))


def brute_average(x: torch.Tensor, inv_freq: torch.Tensor, centre: float, n: int, interleaved: bool) -> torch.Tensor:
    """The mean of x rotated to n consecutive positions around centre, one by one."""
    positions = centre + torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    tables = rope_tables(inv_freq.double(), positions, interleaved=interleaved)
    return rotate(x.expand(n, -1), *tables, interleaved=interleaved).mean(0)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("n", [1, 2, 7, 32, 1024])
def test_span_tables_are_the_brute_force_average(n, interleaved):
    inv_freq = torch.cat((INV_FREQ, torch.zeros(1), torch.tensor([math.pi, 2.5]))).double()
    x = torch.randn(70, dtype=torch.float64)
    for centre in (0.0, 511.5, 8191.0):
        tables = rope_tables(inv_freq, torch.tensor(centre).double(), span=n, interleaved=interleaved)
        exact = brute_average(x, inv_freq, centre, n, interleaved)
        torch.testing.assert_close(rotate(x, *tables, interleaved=interleaved), exact, rtol=0, atol=1e-10)


def test_gaussian_damping_matches_the_average_to_second_order_and_keeps_the_right_bands():
    w = 1e4 ** -(torch.arange(0, 128, 2).double() / 128)  # 64 bands
    where = torch.zeros(3)
    cos, _ = rope_tables(w, where, sigma=torch.tensor([0.0, 32.0, 1024.0]))
    assert [(row[:64] > 0.5).sum().item() for row in cos] == [64, 41, 16]  # at sigma = span, the design notes' figures
    spans = torch.tensor([1, 32, 1024])
    gauss, _ = rope_tables(w, where, sigma=span_sigma(spans))
    exact, _ = rope_tables(w, where, span=spans)
    assert torch.equal(gauss[0], torch.ones(128).double())
    slow = (span_sigma(spans).double()[:, None] * w).repeat(1, 2)
    small = slow < 0.3
    assert small.sum() > 100
    assert ((gauss - exact).abs()[small] < 0.1 * slow[small] ** 4 + 1e-6).all()  # they differ from the 4th power on
    assert span_sigma(32) == pytest.approx(9.2331, abs=1e-4)
    assert span_sigma(1024) == pytest.approx(295.6, abs=0.1)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("size", [16, 10], ids=["full", "partial"])
def test_unrotate_undoes_rotate_with_scaling_and_rounded_tables(size, interleaved):
    x = torch.randn(2, 3, 5, 16)
    positions = torch.tensor([0, 1, 77, 8000, 1_000_000])
    tables = rope_tables(INV_FREQ[: size // 2], positions, attention_scaling=1.3, interleaved=interleaved)
    rounded = tuple(t.bfloat16().float() for t in tables)
    for pair in (tables, rounded):
        moved = rotate(x, *pair, interleaved=interleaved)
        assert not torch.allclose(moved[..., 1:, :size], x[..., 1:, :size], atol=0.1)
        torch.testing.assert_close(moved[..., size:], x[..., size:], rtol=0, atol=0)
        torch.testing.assert_close(unrotate(moved, *pair, interleaved=interleaved), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "smollm3", "phi", "glm"]
)
def test_keys_of_a_model_are_rotated_bit_for_bit_and_back(model_type):
    """Raw keys -> rope_of(model) -> the very keys in the model's cache, in every layer."""
    model = tiny(model_type).eval()
    rope, decoder, raw = rope_of(model), model.get_decoder(), {}
    for i, layer in enumerate(decoder.layers):
        name = "k_norm" if hasattr(layer.self_attn, "k_norm") else "k_proj"
        getattr(layer.self_attn, name).register_forward_hook(lambda m, a, out, i=i: raw.__setitem__(i, out))
    ids = torch.randint(3, 64, (1, 9))
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    cos, sin = rope.tables(torch.arange(9))  # [9, L or 1, R]
    for i, layer in enumerate(cache.layers):
        key = layer.keys[0]  # [Hkv, 9, D]
        own = raw[i].reshape(9, -1, key.shape[-1]) if raw[i].dim() == 3 else raw[i][0]
        own = own.transpose(0, 1) if own.shape[0] == 9 and key.shape[0] != 9 else own
        row = min(i, cos.shape[1] - 1)
        assert torch.equal(rope.rotate(own, cos[:, row], sin[:, row]), key), i
        torch.testing.assert_close(rope.unrotate(key, cos[:, row], sin[:, row]), own, rtol=1e-5, atol=1e-5)


def test_layers_differ_where_the_model_says_so():
    gemma = rope_of(tiny("gemma3_text"))
    assert gemma.inv_freq.shape[0] == 6
    assert not torch.equal(gemma.inv_freq[0], gemma.inv_freq[5])  # sliding and full layers
    smollm = rope_of(tiny("smollm3"))
    assert smollm.inv_freq[3].abs().max() == 0  # every fourth layer has no rotary positions
    assert smollm.inv_freq[0, 0] == 1
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    rope = rope_of(tiny("llama", rope_parameters=yarn, max_position_embeddings=256))
    assert rope.inv_freq.shape == (1, 8)
    assert rope.attention_scaling.item() == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("model_type", "more", "message"),
    [
        ("gpt2", {}, "rotary_emb"),
        ("cohere2", {}, "rotates only in some"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    ],
)
def test_what_cannot_be_undone_is_refused(model_type, more, message):
    with pytest.raises(NotImplementedError, match=message):
        rope_of(tiny(model_type, **more))


def test_sigma_and_span_together_raise():
    with pytest.raises(ValueError, match="sigma, span"):
        rope_tables(INV_FREQ, torch.arange(3), sigma=1.0, span=4)


def test_tables_of_layers_broadcast():
    inv_freq, scaling = torch.stack((INV_FREQ, INV_FREQ / 8)), torch.tensor([1.0, 1.2])
    cos, sin = Rope(inv_freq, scaling).tables(torch.arange(10).reshape(2, 5), span=torch.full((2, 1), 32))
    assert cos.shape == sin.shape == (2, 5, 2, 64)
    for layer in range(2):
        one = rope_tables(inv_freq[layer], torch.arange(10).reshape(2, 5), float(scaling[layer]), span=32)
        torch.testing.assert_close((cos[:, :, layer], sin[:, :, layer]), one)
