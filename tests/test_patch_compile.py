"""torch.compile of patched models: one graph, few compilations, and never a mask of [Q, K]."""

from __future__ import annotations

import pytest
import torch
import transformers
from patch_models import ADAPTED, SMALL, assert_same, build, causal_model, outputs_and_gradients, padding, tokens, twin
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from hf_flash_mc.patches import patch_model, patch_report


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(out):
    return out.logits


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "none"), ("llama", "holes"), ("gemma3", "left"), ("gpt_oss", "whole row")]
)
def test_full_graph_training_equals_eager(family, kind):
    model, mask = causal_model(family), padding(kind)
    inputs = {"input_ids": tokens(), "attention_mask": mask, "use_cache": False}
    expected = outputs_and_gradients(model, logits, mask, **inputs)
    ours = patch_model(twin(model))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    try:
        out, grads = outputs_and_gradients(compiled, logits, mask, **inputs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if "integrations/moe.py" in str(error):
            pytest.skip("transformers 5.17 cannot compile the backward of its experts on the CPU")
        raise
    assert_same((out, {n.removeprefix("_orig_mod."): g for n, g in grads.items()}), expected)
    assert not patch_report(compiled).not_reached
    assert len(patch_report(ours).compiled) == 2


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_checkpointing_compiles_in_full_graphs(layer_by_layer):
    """Checkpointing allows no side effects within a layer, and layers compiled one by one share one graph."""
    model, mask = causal_model("llama"), padding("holes")
    inputs = {"input_ids": tokens(), "attention_mask": mask, "use_cache": False}
    expected = outputs_and_gradients(model, logits, mask, **inputs)
    ours = patch_model(twin(model)).train()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    counter = AotCounter()
    for part in ours.model.layers if layer_by_layer else [ours]:
        part.forward = torch.compile(part.forward, fullgraph=True, backend=counter)
    assert_same(outputs_and_gradients(ours, logits, mask, **inputs), expected)
    assert counter.graphs == 1
    assert not patch_report(ours).not_reached
    assert len(patch_report(ours).compiled) == 2


class AotCounter:
    """The aot_eager backend, counting graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


@pytest.mark.parametrize("family", ADAPTED)
def test_adapters_compile_in_one_graph(family):
    model, mask = causal_model(family), padding("left")
    inputs = {"input_ids": tokens(), "attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        expected = model(**inputs).logits[mask.bool()]
        compiled = torch.compile(patch_model(model), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits[mask.bool()], expected, rtol=0, atol=1e-5)
    assert len(patch_report(model).compiled) == 2


@pytest.mark.parametrize(("family", "padded"), [("llama", False), ("gemma3", True)])
def test_eight_lengths_make_at_most_two_graphs(family, padded):
    model = patch_model(causal_model(family))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (17, 20, 33, 40, 41, 64, 77, 96):
        ids = tokens(2, length)
        mask = None
        if padded:
            mask = torch.ones_like(ids)
            mask[0, : length // 3] = 0
        compiled(ids, attention_mask=mask, use_cache=False)
    assert counter.frame_count <= 2


def largest_masks(shapes: list[torch.Size], q: int, k: int) -> list[torch.Size]:
    return [s for s in shapes if len(s) >= 2 and s[-2] == q and s[-1] == k]


def op_shapes(graph: torch.fx.GraphModule) -> list[torch.Size]:
    """Shapes of everything a graph makes outside the attention op itself."""
    shapes = []
    for node in graph.graph.nodes:
        value = node.meta.get("val", node.meta.get("example_value"))
        values = value if isinstance(value, (tuple, list)) else (value,)
        shapes += [v.shape for v in values if isinstance(v, torch.Tensor)]
    return shapes


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "none"), ("llama", "holes"), ("gemma3", "packed"), ("llama4", "left")]
)
def test_no_dense_mask_is_in_the_graph(family, kind):
    model = patch_model(causal_model(family))
    shapes: list[torch.Size] = []

    def keep_shapes(graph, inputs):
        shapes.extend(op_shapes(graph))
        return graph.forward

    inputs = {"input_ids": tokens(), "attention_mask": None if kind == "packed" else padding(kind)}
    if kind == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in (5, 9, 7)])[None].expand(3, -1)
    torch.compile(model, fullgraph=True, backend=keep_shapes, dynamic=False)(**inputs, use_cache=False)
    assert shapes
    assert not largest_masks(shapes, 21, 21)


class MaskWatch(TorchDispatchMode):
    """Notes every [*, Q, K] tensor made by anything but the attention op."""

    def __init__(self, q: int, k: int) -> None:
        super().__init__()
        self.q, self.k, self.seen = q, k, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() >= 2 and tuple(out.shape[-2:]) == (self.q, self.k):
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "llama4"])
def test_no_dense_mask_is_made_in_eager(family, kind, monkeypatch):
    """The attention op is replaced by one of linear memory, so that only transformers' and our mask code is watched."""
    from hf_flash_mc.patches import attention

    monkeypatch.setattr(attention, "flash_attention", lambda q, k, v, **how: q.new_empty(*q.shape[:3], v.shape[-1]))
    model = patch_model(causal_model(family))
    with torch.no_grad(), MaskWatch(21, 21) as watch:
        model(tokens(), attention_mask=padding(kind))
    assert not watch.seen


def test_bert_and_t5_compile_in_one_graph():
    bert = build(transformers.BertForMaskedLM, transformers.BertConfig(**SMALL))
    sizes = {
        "vocab_size": 97,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    t5 = build(transformers.T5ForConditionalGeneration, transformers.T5Config(**sizes))
    mask = padding("holes")
    for model, inputs in ((bert, {}), (t5, {"decoder_input_ids": tokens(3, 9), "use_cache": False})):
        rows = mask.bool() if model is bert else slice(None)
        expected = model(tokens(), attention_mask=mask, **inputs).logits[rows]
        compiled = torch.compile(patch_model(model), fullgraph=True, backend="aot_eager")
        got = compiled(tokens(), attention_mask=mask, **inputs).logits[rows]
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_inductor_compiles_the_probe():
    """As generated code, not only as a graph: steps that a compiler inlines into one another never finish compiling."""
    from transformers import masking_utils as hf

    from hf_flash_mc.patches import masks

    def ranges(numbers):
        function = hf.and_masks(hf.sliding_window_causal_mask_function(6), hf.packed_sequence_mask_function(numbers))
        batch, length = numbers.shape
        return masks.key_range_mask(batch_size=batch, q_length=length, kv_length=length, mask_function=function)

    numbers = torch.tensor([[0] * 5 + [1] * 9 + [2] * 7, [0] * 20 + [1]])
    for dynamic in (False, True):  # torch 2.11 wrote C++ for lengths of any size that did not compile
        compiled = torch.compile(ranges, fullgraph=True, dynamic=dynamic)
        for given in (numbers, numbers[:, 2:]):
            assert torch.equal(compiled(given), ranges(given))
