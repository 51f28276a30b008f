"""generate_batch of a model patched with continuous_batching=True gives each request what generate gives it alone."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc

import pytest
import torch
import transformers
from patch_models import causal_model, twin
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import cache, continuous_api, initialization

from hf_flash_mc.patches import attention, continuous_batching, paged, patch_model, patch_report, unpatch_model

pytest.importorskip("psutil")  # transformers counts the memory of a CPU with it

NEW, TOKENS = 6, 24
LENGTHS = (1, 5, 33, 19, 7)  # 33 comes in chunks, beside other requests' tokens; windows are 6 or 8, pages 4
PAGE = "page_size" if "page_size" in {f.name for f in dataclasses.fields(ContinuousBatchingConfig)} else "block_size"


def prompts(lengths=LENGTHS) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(3, 97, (n,), generator=draw).tolist() for n in lengths]


def stock(family: str):
    model = causal_model(family)
    model.generation_config.eos_token_id = None
    return model


def ready(family: str):
    return patch_model(stock(family), continuous_batching=True)


def settings(**how):
    choice = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for name in ("num_return_sequences",):
        if name in how:
            setattr(choice, name, how.pop(name))
    plan = ContinuousBatchingConfig(**{PAGE: 4, "num_blocks": 64, "max_batch_tokens": TOKENS, **how})
    return {"generation_config": choice, "continuous_batching_config": plan}


def batch(model, asked=None, **how) -> list[list[int]]:
    results = model.generate_batch(asked or prompts(), **settings(**how)).values()
    assert not [r.error for r in results if r.error]
    return [r.generated_tokens for r in results]


def alone(model, asked=None) -> list[list[int]]:
    found = []
    for prompt in asked or prompts():
        ids = torch.tensor([prompt], device=model.device)
        found.append(model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist())
    return found


@functools.cache
def expected_of(family: str) -> list[list[int]]:
    return alone(stock(family))


def globals_of_transformers() -> list:
    names = [vars(m).get("is_flash_attention_requested") for m in (cache, continuous_api, initialization)]
    return [
        *names,
        initialization.ensure_decode_fast_path_is_available,
        vars(continuous_api.ContinuousBatchingManager)["switch_to_cb_friendly_attn"],
        dict(transformers.AttentionInterface._global_mapping),
    ]


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """A manager that stops collects garbage; most of the time went into looking at what imports made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_stays_wrapped():
    attention.register()
    before = globals_of_transformers()
    yield
    gc.collect()  # models that a test left patched
    assert globals_of_transformers() == before


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("tables", [True, False])
def test_tokens_and_logits(family, tables, monkeypatch):
    """GQA, windows in all layers or in some, softcap, sinks; with block tables where no layer has a window."""
    if not tables and family not in ("llama", "qwen3"):
        pytest.skip("the same calls: a cache of windows has no block table")
    expected_model, expected = stock(family), expected_of(family)
    by_table, rows = [], []
    read = paged.flash_attention_paged
    monkeypatch.setattr(paged, "flash_attention_paged", lambda *a, **k: by_table.append(1) or read(*a, **k))
    model = ready(family)
    model.register_forward_hook(lambda module, args, out: rows.append(out.logits[0].clone()))
    got = batch(model, **({} if tables else {"max_blocks_per_request": 0}))
    assert got == expected
    assert bool(by_table) == (tables and family in ("llama", "qwen3"))
    report = patch_report(model)
    assert not report.not_reached
    assert report.options["continuous_batching"] is True
    assert set(report.calls.values()) == {len(rows)}
    logits = torch.cat(rows)
    for prompt, new in zip(prompts(), expected, strict=True):
        with torch.no_grad():
            dense = expected_model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        nearest = (dense[:, None] - logits[None]).abs().amax(-1).amin(-1)  # rows of a batch are in no known order
        assert nearest.max() <= 3e-5


def test_requests_that_come_later():
    model, asked = ready("gemma3"), prompts()
    expected = expected_of("gemma3")
    found = {}
    with model.continuous_batching_context_manager(**settings(), block=True) as manager:
        first = manager.add_request(asked[2], max_new_tokens=NEW, eos_token_id=-1, streaming=True)
        while not manager.get_result(timeout=5).generated_tokens:
            pass
        others = [manager.add_request(asked[i], max_new_tokens=NEW, eos_token_id=-1) for i in (0, 3)]
        while len(found) < 3:
            result = manager.get_result(timeout=5)
            if result.is_finished():
                found[result.request_id] = result.generated_tokens
    assert [found[i] for i in (first, *others)] == [expected[i] for i in (2, 0, 3)]


def test_shared_prefixes_and_several_sequences_of_a_request(monkeypatch):
    matched = []
    search = cache.PagedAttentionCache.search_prefix_match
    monkeypatch.setattr(
        cache.PagedAttentionCache, "search_prefix_match", lambda *a: matched.append(search(*a)) or matched[-1]
    )
    prefix = prompts([21])[0]
    asked = [prefix + p for p in prompts([3, 6, 1])]
    model, expected = ready("llama"), alone(stock("llama"), asked)
    results = model.generate_batch(asked, **settings(num_return_sequences=2, max_batch_tokens=25))
    assert len(results) in (3, 6)  # before 5.18 only one of the sequences is handed back
    for name, result in results.items():
        assert result.generated_tokens == expected[int(name.split("__")[0].removeprefix("req_"))]
    assert max(matched) >= 20


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padded_batches(family, monkeypatch):
    """Rows, keys and requests that fill a batch up, as CUDA graphs and torch.compile ask for it; none is made here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    seen = []
    read = paged.flash_attention_paged
    monkeypatch.setattr(paged, "flash_attention_paged", lambda *a, **k: seen.append(a[4].tolist()) or read(*a, **k))
    how = dict.fromkeys(("varlen_compile_config", "decode_compile_config"), CompileConfig())
    sizes = {"q_padding_interval_size": 8, "kv_padding_interval_size": 16, "max_requests_per_batch": 8}
    assert batch(ready(family), **sizes, **how) == expected_of(family)
    assert any(0 in lengths for lengths in seen) == (family == "llama")


def test_bfloat16_is_as_far_from_float32_as_stock():
    exact, model = stock("gemma3"), stock("gemma3").bfloat16()
    asked = [prompts()[2]]
    with torch.no_grad():
        ids = torch.tensor(asked)
        truth, rounded = exact(ids).logits[0, -1], model(ids).logits[0, -1].float()
    rows = []
    patch_model(model, continuous_batching=True)
    model.register_forward_hook(lambda module, args, out: rows.append(out.logits[0].float()))
    batch(model, asked)
    first = rows[1][-1]  # the second chunk ends the prompt
    assert (first - truth).abs().max() <= 2 * (rounded - truth).abs().max() + 1e-2 * truth.abs().max()


def test_ordinary_generation_before_and_after():
    model, expected = ready("gpt_oss"), expected_of("gpt_oss")
    assert alone(model) == expected
    assert batch(model) == expected
    assert model.config._attn_implementation == attention.KEY
    assert alone(model) == expected
    unpatch_model(model)
    assert alone(model) == expected


def test_the_last_model_out_restores_transformers():
    before = globals_of_transformers()
    one, other = ready("llama"), ready("gemma3")
    during = globals_of_transformers()
    assert all(a is not b for a, b in zip(before, during, strict=True))
    copied = copy.deepcopy(one)
    unpatch_model(one)
    assert globals_of_transformers() == during
    assert batch(other) == expected_of("gemma3")
    unpatch_model(other)
    assert globals_of_transformers() == during  # the copy's claim
    assert batch(copied) == expected_of("llama")
    del copied
    gc.collect()
    assert globals_of_transformers() == before


def test_what_others_wrap_meanwhile_stays(monkeypatch):
    model = ready("llama")
    theirs = lambda *a, **k: continuous_batching._wrapped and None  # noqa: E731
    ours = initialization.ensure_decode_fast_path_is_available
    initialization.ensure_decode_fast_path_is_available = theirs
    unpatch_model(model)
    assert initialization.ensure_decode_fast_path_is_available is theirs
    initialization.ensure_decode_fast_path_is_available = ours.__wrapped__


def test_models_of_other_attention_batch_as_before():
    keeps = ready("llama")
    other = stock("llama")
    other.set_attn_implementation("sdpa")
    assert batch(other) == alone(other)
    assert not set(patch_report(keeps).calls.values()) - {0}


def test_an_error_in_the_middle_leaves_a_model_that_works():
    model, expected = ready("llama"), expected_of("llama")
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyError("in the middle")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    results = model.generate_batch(prompts(), **settings())
    assert all("in the middle" in r.error for r in results.values())
    del results
    hook.remove()
    assert model.config._attn_implementation == attention.KEY
    assert alone(model) == expected
    assert batch(model) == expected
    unpatch_model(model)


def test_unpatching_waits_for_no_one_and_outlives_no_manager():
    model, expected = ready("llama"), expected_of("llama")
    results = model.generate_batch(prompts(), persistent_manager=True, **settings())
    assert [r.generated_tokens for r in results.values()] == expected
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        patch_model(unpatched_twin(model), continuous_batching=True)
    manager = model.init_continuous_batching()
    manager.start()
    with pytest.raises(RuntimeError, match=r"running.*manager\.stop"):
        unpatch_model(model)
    assert patch_report(model).patched
    manager.stop()
    unpatch_model(model)
    assert not hasattr(model, "_cached_continuous_batching_manager")
    for start in (manager.start, manager.warmup):
        with pytest.raises(RuntimeError, match="unpatched since"):
            start()
    assert alone(model) == expected


def unpatched_twin(model):
    other = stock("llama")
    other._cached_continuous_batching_manager = model._cached_continuous_batching_manager
    return other


def test_classes_and_saving(tmp_path):
    stock("llama").save_pretrained(tmp_path)
    model = patch_model(transformers.AutoModelForCausalLM, continuous_batching=True).from_pretrained(tmp_path)
    assert batch(model) == expected_of("llama")
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="LlamaModel does not generate"):
        patch_model(transformers.AutoModel, continuous_batching=True).from_pretrained(tmp_path)


def test_what_is_refused():
    model = patch_model(stock("llama"))
    with pytest.raises(NotImplementedError, match=r"patched without it.*continuous_batching=True"):
        model.generate_batch(prompts())
    unpatch_model(model)
    assert "init_continuous_batching" not in vars(model)
    keeps = ready("gemma3")
    model.config._attn_implementation = attention.KEY  # by hand, without options
    with pytest.raises(NotImplementedError, match="patched without it"):
        model.generate_batch(prompts())
    unpatch_model(keeps)
    with pytest.raises(NotImplementedError, match="without a paged cache: Bloom"):
        patch_model(causal_model("bloom"), continuous_batching=True)
    assert not continuous_batching._claims


def test_windows_run_without_graphs_and_asynchronous_batches():
    ready_models = [ready(family) for family in ("llama", "gemma3")]
    found = []
    for model in ready_models:
        plan = ContinuousBatchingConfig(use_cuda_graph=True, use_async_batching=True)
        initialization.ensure_decode_fast_path_is_available(model.config, plan, False)
        found.append((plan.cuda_graph_booleans, plan.use_async_batching))
        unpatch_model(model)
    assert found == [((True, True), True), ((False, False), False)]


def test_windows_that_the_cache_does_not_know_of_are_refused():
    model = ready("gemma3")
    model.model.layers[0].self_attn.sliding_window = 5
    results = model.generate_batch(prompts(), **settings())
    assert all("window of 6 for layer 0" in r.error and "generate" in r.error for r in results.values())
    unpatch_model(model)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_on_a_gpu_with_and_without_cuda_graphs(family, graphs):
    exact = stock(family).cuda()
    if family == "gpt_oss":
        exact.set_experts_implementation("batched_mm")  # in float32 the other one copies to the host: no graph takes it
    model = patch_model(twin(exact), continuous_batching=True)
    assert batch(model, use_cuda_graph=graphs, use_async_batching=graphs) == alone(exact)
