"""patch_model and unpatch_model as promised: exact restore, idempotent, nothing global, refusals by name, reports."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from patch_models import ADAPTED, SMALL, build, causal_config, causal_model, padding, tokens, twin
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_flash_mc.patches import attention, patch_model, patch_report, patched, unpatch_model


def run(model, mask=None):
    with torch.no_grad():
        return model(tokens(), attention_mask=mask).logits


def build_vlm():
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64}
    text = {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=90, video_token_id=91, vision_start_token_id=92
    )
    return build(transformers.Qwen2_5_VLForConditionalGeneration, config)


def everything(model) -> dict:
    """All that unpatching has to bring back: attributes of every module, and every config object with its content."""
    return {
        name: {
            key: (id(value), dict(vars(value))) if isinstance(value, transformers.PreTrainedConfig) else id(value)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("family", ["gemma3", *ADAPTED])
def test_unpatching_restores_the_exact_former_state(family):
    model, mask = causal_model(family), padding("left")
    classes = [type(module) for module in model.modules()]
    before, expected, keys = everything(model), run(model, mask), list(model.state_dict())
    assert patch_model(model) is model
    assert model.config._attn_implementation == "mc_attention"
    assert list(model.state_dict()) == keys
    run(model, mask)
    assert unpatch_model(model) is model
    assert everything(model) == before
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model, mask), expected)
    with pytest.raises(ValueError, match="not patched"):
        unpatch_model(model)


def test_settings_changed_while_patched_survive():
    model = patch_model(causal_model("llama"))
    model.config.use_cache = False
    model.resize_token_embeddings(101)
    unpatch_model(model)
    assert model.config.use_cache is False
    assert model.config.vocab_size == 101


def test_another_implementation_set_while_patched_is_reported_and_survives():
    model = patch_model(causal_model("llama"))
    expected = run(causal_model("llama"))
    model.set_attn_implementation("eager")
    assert torch.equal(run(model), expected)
    skipped = patch_report(model).skipped
    assert set(skipped) == set(patch_report(model).calls)
    assert all("set to 'eager' after patching" in reason for reason in skipped.values())
    model.set_attn_implementation("sdpa")
    assert unpatch_model(model).config._attn_implementation == "sdpa"


def test_mpt_with_another_implementation_raises_while_patched():
    """Eager's mask as MptModel turns it into bool says the opposite of ours."""
    model, mask = patch_model(causal_model("mpt")), padding("left")
    model.config._attn_implementation = "eager"
    with pytest.raises(NotImplementedError, match="a patched MPT runs 'mc_attention' alone"):
        run(model, mask)
    unpatch_model(model)
    assert torch.equal(run(model, mask), run(causal_model("mpt"), mask))


class Overridden(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        return self.o_proj(self.q_proj(hidden_states)), None


class Calling(LlamaAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_subclass_that_overrides_the_attention_is_refused():
    """It counted as its base class, and got key ranges for a mask."""
    model = causal_model("llama")
    expected = run(model)
    model.model.layers[1].self_attn.__class__ = Overridden
    with pytest.raises(NotImplementedError, match="Overridden computes attention in its own code"):
        patch_model(model)
    model.model.layers[1].self_attn.__class__ = Calling
    assert len(patch_report(patch_model(model)).calls) == 2
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)


def test_patching_twice_is_a_no_op_and_other_options_are_refused():
    model = patch_model(causal_model("llama"))
    before = everything(model)
    assert patch_model(model) is model
    assert everything(model) == before
    with pytest.raises(ValueError, match="already patched"):
        patch_model(model, packing="position_ids")
    with pytest.raises(ValueError, match="belongs to a patched model"):
        patch_model(model.model.layers and model.model)


def test_models_that_share_a_config_are_patched_alone():
    config = causal_config("llama")
    one, other = causal_model("llama", config), causal_model("llama", config)
    assert one.config is other.config
    patch_model(one)
    assert (one.config._attn_implementation, other.config._attn_implementation) == ("mc_attention", "eager")
    patch_model(other)
    unpatch_model(one)
    assert (one.config._attn_implementation, other.config._attn_implementation) == ("eager", "mc_attention")
    unpatch_model(other)
    assert one.config is other.config is config


def test_nothing_global_changes_but_the_key():
    from transformers import AttentionInterface, AttentionMaskInterface

    def registered():
        return dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)

    before = registered()
    model = patch_model(causal_model("llama"))
    for old, new in zip(before, registered(), strict=True):
        assert {k: v for k, v in new.items() if k != attention.KEY} == {
            k: v for k, v in old.items() if k != attention.KEY
        }
    unpatch_model(model)


def test_context_manager_unpatches_after_an_error():
    model = causal_model("llama")

    def fail():
        with patched(model):
            assert patch_report(model).patched
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not patch_report(model).patched

    def unpatch_and_fail():
        with patched(model):
            unpatch_model(model)
            raise KeyError

    with pytest.raises(KeyError):
        unpatch_and_fail()
    patch_model(model)
    with patched(model):
        pass
    assert patch_report(model).patched


def test_a_deep_copy_of_a_patched_model_stands_alone():
    model = patch_model(causal_model("llama"))
    other = copy.deepcopy(model)
    run(other)
    assert not patch_report(other).not_reached
    assert len(patch_report(model).not_reached) == 2
    unpatch_model(model)
    assert patch_report(other).patched
    unpatch_model(other)
    assert other.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_neo", "mpt"])
def test_modules_copied_while_patched_are_reported_and_unpatched(family):
    """Layers added to a model, or PEFT's modules_to_save; MPT's adapter would read stock's mask as its opposite."""
    models = [causal_model(family), patch_model(causal_model(family))]
    for model in models:
        layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
        layers.append(copy.deepcopy(layers[-1]))
        model.config.num_hidden_layers = len(layers)

    def scores(model):
        with torch.no_grad():
            return model(tokens(), attention_mask=padding("right"), use_cache=False).logits[padding("right").bool()]

    stock, ours = models
    expected = scores(stock)
    torch.testing.assert_close(scores(ours), expected, rtol=0, atol=1e-5)
    assert list(patch_report(ours).calls.values()) == [1, 1, 1]
    unpatch_model(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in stock.modules()]
    assert torch.equal(scores(ours), expected)
    patch_model(ours)
    torch.testing.assert_close(scores(ours), expected, rtol=0, atol=1e-5)
    assert not patch_report(ours).not_reached


def test_another_process_unpickles_a_patched_model(tmp_path):
    """Where nothing else of this package is imported, and so the key is not registered yet."""
    model = patch_model(causal_model("llama"))
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch, transformers\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "print(model(torch.arange(3, 24)[None]).logits.double().sum().item())"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.pt"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert found.returncode == 0, found.stderr[-500:]
    expected = model(torch.arange(3, 24)[None]).logits.double().sum().item()
    assert float(found.stdout) == pytest.approx(expected, abs=1e-4)


def test_wrappers_are_looked_into():
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

    model = causal_model("llama")
    wrapped = Wrapper(torch.compile(model, backend="eager"))
    assert patch_model(wrapped) is wrapped
    assert patch_report(model).attention_modules == 2
    unpatch_model(model)
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    expected = run(tuned, padding("left"))[padding("left").bool()]
    got = run(patch_model(tuned), padding("left"))[padding("left").bool()]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not patch_report(tuned).not_reached
    unpatch_model(tuned)
    assert tuned.config._attn_implementation == "eager"


@pytest.mark.parametrize("first", ["hooks", "patch"])
def test_offloading_hooks_call_the_adapter_and_after_unpatching_the_stock_class(first):
    """GPT-Neo's attention has a buffer, so that accelerate hooks it and keeps its forward on the module."""
    accelerate = pytest.importorskip("accelerate")
    model, mask = causal_model("gpt_neo"), padding("left")
    expected = run(model, mask)
    if first == "patch":
        patch_model(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    patch_model(model)
    torch.testing.assert_close(run(model, mask)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    assert not patch_report(model).not_reached
    unpatch_model(model)
    assert torch.equal(run(model, mask), expected)


@pytest.mark.parametrize("base", [transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM])
def test_classes_load_patched_models(base, tmp_path):
    model = causal_model("llama")
    model.save_pretrained(tmp_path)
    methods = dict(vars(base))
    ours = patch_model(base)
    assert dict(vars(base)) == methods
    assert issubclass(ours, base)
    assert patch_model(ours) is ours
    assert unpatch_model(ours) is base
    loaded = ours.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert patch_report(loaded).attention_modules == 2
    torch.testing.assert_close(run(loaded), run(model), rtol=0, atol=1e-5)
    loaded, info = ours.from_pretrained(tmp_path, output_loading_info=True)
    assert patch_report(loaded).patched
    assert not info["missing_keys"]
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        ours.from_pretrained(tmp_path, attn_implementation="sdpa")
    if base is transformers.AutoModelForCausalLM:
        assert patch_report(ours.from_config(causal_config("llama"))).patched
    else:
        assert patch_report(ours(causal_config("llama"))).patched


@pytest.mark.parametrize(
    ("model_class", "config", "named"),
    [
        (
            "RoFormerForMaskedLM",
            {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32},
            "RoFormerSelfAttention compute attention",
        ),
        (
            "XGLMForCausalLM",
            {"d_model": 32, "ffn_dim": 32, "num_layers": 1, "attention_heads": 4},
            "XGLMAttention computes attention",
        ),
        (
            "MPNetForMaskedLM",
            {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32},
            "MPNet",
        ),
    ],
)
def test_families_with_their_own_attention_are_refused_by_name(model_class, config, named):
    cls = getattr(transformers, model_class)
    model = build(cls, cls.config_class(vocab_size=97, **config))
    before = everything(model)
    with pytest.raises(NotImplementedError, match=named):
        patch_model(model)
    assert everything(model) == before


def test_families_that_read_their_masks_are_refused_unless_they_get_dense_ones():
    model = causal_model("llama")
    model.config.model_type = "minimax_m3_vl_text"
    with pytest.raises(NotImplementedError, match=r"MiniMax M3.*sparse"):
        patch_model(model)
    config = transformers.ParakeetEncoderConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    encoder = build(transformers.ParakeetEncoder, config)
    encoder.config.model_type = "not in the table"  # Parakeet itself gets dense masks
    with pytest.raises(NotImplementedError, match=r"reads the attention mask itself.*dtype == torch.bool"):
        patch_model(encoder)


def test_bad_arguments():
    model = causal_model("llama")
    with pytest.raises(TypeError, match="context_parallel: expected a ProcessGroup"):
        patch_model(model, context_parallel="ring")
    with pytest.raises(ValueError, match="fallback"):
        patch_model(model, fallback="eager")
    with pytest.raises(ValueError, match="packing"):
        patch_model(model, packing=True)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        patch_model(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got str"):
        patch_model("meta-llama")
    with pytest.raises(TypeError, match="Auto class"):
        patch_model(torch.nn.Linear)
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(ValueError, match="nothing to patch"):
        patch_model(mamba)
    assert not patch_report(model).patched


@pytest.mark.parametrize("family", ["llama", "gpt2", *ADAPTED])
def test_attention_weights_are_an_error_not_an_empty_tuple(family):
    model = patch_model(causal_model(family))
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(tokens(), output_attentions=True)


def test_attention_weights_of_encoders_and_configs():
    model = patch_model(causal_model("llama"))
    bert = patch_model(build(transformers.BertForMaskedLM, transformers.BertConfig(**SMALL)))
    with pytest.raises(NotImplementedError, match="output_attentions"):
        bert(tokens(), output_attentions=True)
    unpatch_model(model)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        patch_model(model)


def test_unknown_tensor_arguments_raise():
    model = patch_model(causal_model("llama"))
    with pytest.raises(NotImplementedError, match=r"\['block_indices'\]"):
        model(tokens(), block_indices=torch.zeros(1))
    model(tokens(), num_items_in_batch=torch.tensor(3), some_flag=True)


def test_masks_of_the_wrong_length_raise_as_in_stock():
    bert = patch_model(build(transformers.BertForMaskedLM, transformers.BertConfig(**SMALL)))
    for mask in (torch.nn.functional.pad(padding("left"), (0, 4)), padding("right")[:, :-2]):
        with pytest.raises(ValueError, match=f"for the 21 keys of this attention, got one for {mask.shape[1]}"):
            run(bert, mask)
    longer = torch.ones(len(tokens()), 30, dtype=torch.long)  # hides nothing: no mask
    assert torch.equal(run(bert, longer), run(bert))


def test_tracing_raises():
    model = patch_model(causal_model("llama")).requires_grad_(False)
    with pytest.raises(NotImplementedError, match="it would keep this call's mask"):
        torch.jit.trace(lambda ids: model(ids, use_cache=False).logits, tokens(), check_trace=False)


def test_the_function_has_the_names_that_callers_pass():
    assert list(inspect.signature(attention.mc_attention).parameters)[:5] == [
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
    ]


def test_report_counts_calls_and_finds_modules_never_reached():
    model = patch_model(causal_model("llama"))
    assert len(patch_report(model).not_reached) == 2
    run(model)
    model.model.layers[0](torch.randn(1, 4, 64), position_embeddings=(torch.ones(1, 4, 16), torch.zeros(1, 4, 16)))
    report = patch_report(model)
    assert list(report.calls.values()) == [2, 1]
    assert not report.not_reached
    assert "2 attention modules" in str(report)


def test_report_names_modules_that_a_forward_passed_by():
    model = patch_model(build_vlm())
    assert "reached by no forward" not in str(patch_report(model))  # nothing has run yet
    with torch.no_grad():
        model(input_ids=tokens(2))
    report = patch_report(model)
    assert report.not_reached
    assert all("vision" in name or "visual" in name for name in report.not_reached)
    assert report.not_reached[0] in str(report)


def test_fallback_to_sdpa_is_exact_and_counted(monkeypatch):
    def cannot(*args, **kwargs):
        raise NotImplementedError("this kernel takes no head dim 16")

    monkeypatch.setattr(attention, "flash_attention", cannot)
    for family in ("llama", "mistral"):
        for kind in ("none", "left", "holes"):
            model, mask = causal_model(family), padding(kind)
            rows = slice(None) if mask is None else mask.bool()
            expected = run(model, mask)[rows]
            strict = patch_model(twin(model))
            with pytest.raises(NotImplementedError, match=r'head dim 16.*fallback="sdpa"'):
                run(strict, mask)
            patch_model(model, fallback="sdpa")
            torch.testing.assert_close(run(model, mask)[rows], expected, rtol=0, atol=1e-5)
            report = patch_report(model)
            assert list(report.fallbacks.values()) == [1, 1]
            assert report.fallback_reasons == ("this kernel takes no head dim 16",)
    gemma = patch_model(causal_model("gemma2"), fallback="sdpa")
    with pytest.raises(NotImplementedError, match="neither softcap nor sinks"):
        run(gemma)
