"""Wrong calls: each names the argument, what was expected, what came and the way out, all reasons at once.

That the same checks run while torch.compile traces is tested in test_library_compile.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask

from hf_flash_mc.ops import explain_attention, flash_attention, flash_attention_varlen
from hf_flash_mc.ops.reference import reference_attention

F32 = torch.float32


def z(*shape: int, dtype: torch.dtype = F32, **options: Any) -> Tensor:
    return torch.zeros(shape, dtype=dtype, **options)


def dense(**changes: Any) -> dict[str, Any]:
    """A right call of flash_attention: B 2, Hq 4, Hkv 2, Sq 5, Sk 7, D 8; with changes."""
    return {"q": z(2, 4, 5, 8), "k": z(2, 2, 7, 8), "v": z(2, 2, 7, 8), **changes}


def packed(**changes: Any) -> dict[str, Any]:
    """A right call of flash_attention_varlen: two sequences, Tq 5, Tk 7; with changes."""
    right = {
        "q": z(5, 4, 8), "k": z(7, 2, 8), "v": z(7, 2, 8), "max_seqlen_q": 3, "max_seqlen_k": 4,
        "cu_seqlens_q": torch.tensor([0, 2, 5]), "cu_seqlens_k": torch.tensor([0, 4, 7]),
    }  # fmt: skip
    return {**right, **changes}


JAGGED = torch.nested.nested_tensor([z(5, 4, 8), z(3, 4, 8)], layout=torch.jagged).transpose(1, 2)
WRONG = [
    # q, k, v
    ({"q": [1.0]}, TypeError, "q: expected a torch.Tensor, got list"),
    ({"q": z(4, 5, 8)}, ValueError, r"q: expected \[B, H, S, D\], got 3 dimensions, shape \(4, 5, 8\)"),
    ({"k": z(3, 2, 7, 8)}, ValueError, "one batch size, got 2, 3 and 2"),
    ({"v": z(2, 1, 7, 8)}, ValueError, "k, v: expected the same number of heads, got 2 and 1"),
    ({"k": z(2, 3, 7, 8), "v": z(2, 3, 7, 8)}, ValueError, "a multiple of key heads, got 4 and 3"),
    ({"k": z(2, 0, 7, 8), "v": z(2, 0, 7, 8)}, ValueError, "a multiple of key heads, got 4 and 0"),
    ({"v": z(2, 2, 6, 8)}, ValueError, "k, v: expected the same length, got 7 and 6"),
    ({"k": z(2, 2, 7, 9)}, ValueError, "same head dim, got 8 and 9"),
    ({"q": z(2, 4, 5, 0), "k": z(2, 2, 7, 0)}, ValueError, "head dims of at least 1, got 0 and 8"),
    ({"k": z(2, 2, 7, 8).half()}, TypeError, "one dtype, got torch.float32, torch.float16 and .*autocast"),
    ({"k": z(2, 2, 7, 8, device="meta")}, ValueError, "one device, got cpu, meta and cpu"),
    (dict.fromkeys("qkv", z(2, 4, 5, 8).int()), NotImplementedError, "- q, k, v: expected .* got torch.int32; cast"),
    ({"q": z(2, 4, 5, 8).to_sparse()}, TypeError, "q: expected a dense tensor, got a torch.sparse_coo one; use to_d"),
    ({"q": JAGGED}, TypeError, "q: expected a dense tensor, got a nested one; .* flash_attention_varlen"),
    # numbers
    ({"causal": "no"}, TypeError, "causal: expected True or False, got 'no'"),
    ({"causal": None}, TypeError, "causal: expected True or False, got None"),
    ({"causal": torch.tensor(True)}, TypeError, r"causal: expected True or False, got tensor\(True\)"),
    ({"scale": 0.0}, ValueError, "scale: expected a finite number > 0, or None .* got 0.0"),
    ({"scale": -1}, ValueError, "scale: .* got -1"),
    ({"scale": float("nan")}, ValueError, "scale: .* got nan"),
    ({"scale": float("inf")}, ValueError, "scale: .* got inf"),
    ({"scale": torch.tensor(0.5)}, TypeError, "scale: expected a Python number, got Tensor; multiply q"),
    ({"softcap": "50"}, TypeError, "softcap: expected a Python number, got str"),
    ({"dropout_p": torch.tensor(0.5)}, TypeError, "dropout_p: expected a Python number, got Tensor"),
    ({"dropout_p": None}, TypeError, "dropout_p: expected a Python number, got NoneType"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a finite number > 0, or None for no cap, got 0$"),
    ({"softcap": -2.5}, ValueError, "softcap: .* got -2.5$"),
    ({"softcap": float("nan")}, ValueError, "softcap: .* got nan"),
    ({"window": (-1, 0)}, ValueError, "window: expected at least 0 on the left, or None for unbounded, got -1$"),
    ({"window": (None, -2)}, ValueError, "window: expected at least 0 on the right, .* got -2$"),
    ({"window": 5}, TypeError, r"window: expected \(left, right\)"),
    ({"window": (1, 2, 3)}, TypeError, r"window: expected \(left, right\)"),
    ({"window": (1.5, 2)}, TypeError, r"window: expected \(left, right\)"),
    ({"window": (True, 0)}, TypeError, r"window: expected \(left, right\)"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability"),
    ({"dropout_p": 0.001}, ValueError, "dropout_p: p is quantised to steps of 1/256, and this one rounds to 0"),
    ({"dropout_p": 0.999}, ValueError, "dropout_p: .* rounds to 1"),
    ({"dropout_p": 0.5, "dropout_offsets": (0, 0, -1, 0)}, ValueError, "dropout_offsets: expected"),
    ({"dropout_p": 0.5, "dropout_offsets": (0, 0)}, ValueError, "dropout_offsets: expected"),
    ({"dropout_p": 0.5, "dropout_offsets": (0, 0.5, 0, 0)}, ValueError, "dropout_offsets: expected four .* got .*0.5"),
    ({"dropout_p": 0.5, "dropout_offsets": 3}, ValueError, "dropout_offsets: expected four ints .* got 3"),
    ({"dropout_p": 0.5, "dropout_offsets": (2**31, 0, 0, 0)}, ValueError, "dropout_offsets: .* from 0 to 2147483647"),
    # kernels count columns in 32 bits: the mask behind 2^31 was another than on the CPU
    ({"dropout_p": 0.5, "dropout_offsets": (0, 0, 0, 2**31 - 7)}, ValueError, "columns up to 2147483647, got .* 7 k"),
    ({"dropout_offsets": (0, 0, 0, -1)}, ValueError, "dropout_offsets: expected"),  # without dropout too
    ({"dropout_p": 0.5, "dropout_seed": z(1)}, TypeError, "dropout_seed: expected torch.int64"),
    ({"dropout_p": 0.5, "dropout_seed": torch.tensor([1, 2])}, ValueError, "dropout_seed: expected one element"),
    ({"dropout_p": 0.5, "dropout_seed": 0.5}, TypeError, "dropout_seed: expected an int"),
    ({"dropout_p": 0.5, "dropout_seed": 2**63}, ValueError, "dropout_seed: expected an int of 64 bits, .* got 92233"),
    # tensors
    ({"key_ranges": z(2, 1, 5, 2, dtype=torch.int64)}, TypeError, "key_ranges: expected torch.int32, got torch.int64"),
    ({"key_ranges": z(2, 1, 7, 2, dtype=torch.int32)}, ValueError, r"key_ranges: expected \[B or 1, Hq or 1, Sq, 2\]"),
    ({"key_ranges": z(5, 2, dtype=torch.int32)}, ValueError, "key_ranges: expected"),
    ({"mask": z(5, 7)}, TypeError, "mask: expected torch.bool, got torch.float32; pass numbers to add as bias="),
    ({"mask": z(5, 7).long()}, TypeError, "mask: expected torch.bool, got torch.int64$"),
    ({"mask": z(5, 6, dtype=torch.bool)}, ValueError, r"mask: .* broadcasts to .* got shape \(5, 6\) with .* 8\)$"),
    ({"mask": z(2, 7, dtype=torch.bool)}, ValueError, r"mask: .* got shape \(2, 7\) .* pass mask\[:, None, None\]"),
    ({"mask": z(1, 2, 2, 5, 7, dtype=torch.bool)}, ValueError, "mask: expected a shape that broadcasts"),
    ({"mask": "causal"}, TypeError, "mask: expected a torch.Tensor, got str"),
    ({"bias": z(2, 3, 5, 7)}, ValueError, "bias: expected a shape that broadcasts"),
    ({"bias": z(2, 7)}, ValueError, r"bias: .* got shape \(2, 7\) .* of \[B, Sk\] pass bias\[:, None, None\]"),
    ({"bias": z(5, 7, dtype=torch.bool)}, TypeError, "bias: expected torch.float32, got torch.bool; pass it as mask="),
    ({"bias": z(5, 7).half()}, TypeError, "bias: expected torch.float32, got torch.float16"),
    ({"bias": 1.0}, TypeError, "bias: expected a torch.Tensor, got float"),
    ({"key_log_weight": z(2, 4, 7)}, ValueError, r"key_log_weight: expected \[B or 1, Hkv or 1, Sk\]"),
    ({"alibi_slopes": z(3)}, ValueError, r"alibi_slopes: expected \[Hq\] or \[B, Hq\]"),
    ({"alibi_slopes": z(1, 4)}, ValueError, r"alibi_slopes: expected \[Hq\] or \[B, Hq\]"),
    ({"alibi_slopes": z(4, requires_grad=True)}, ValueError, "alibi_slopes: expected requires_grad=False.* bias"),
    ({"sinks": z(2)}, ValueError, r"sinks: expected \[Hq\], got shape \(2,\)"),
    ({"sinks": z(4, device="meta")}, ValueError, "sinks: expected it on cpu with q, got meta"),
    # impl
    ({"impl": "fast"}, ValueError, "impl: expected one of 'auto', 'hopper', 'triton', 'cpu', 'reference', got 'fast'"),
    ({"impl": "hopper"}, NotImplementedError, "a GPU of compute capability 9.0, got cpu"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG, ids=lambda x: str(x)[:50] if isinstance(x, str) else "")
def test_wrong_dense_call(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        flash_attention(**dense(**changes))


WRONG_PACKED = [
    ({"q": z(1, 5, 4, 8)}, ValueError, r"q: expected \[T, H, D\], got 4 dimensions"),
    ({"k": z(7, 3, 8), "v": z(7, 3, 8)}, ValueError, "a multiple of key heads, got 4 and 3"),
    ({"v": z(6, 2, 8)}, ValueError, "k, v: expected the same length, got 7 and 6"),
    ({"mask": z(5, 7, dtype=torch.bool)}, NotImplementedError, "mask: packed sequences take none; use key_ranges"),
    ({"bias": z(5, 7)}, NotImplementedError, "bias: packed sequences take none"),
    ({"key_ranges": z(3, 5, 2, dtype=torch.int32)}, ValueError, r"key_ranges: expected \[Tq, 2\] or \[Hq, Tq, 2\]"),
    ({"key_log_weight": z(7)}, ValueError, r"key_log_weight: expected \[Hkv or 1, Tk\]"),
    ({"alibi_slopes": z(3, 4)}, ValueError, r"alibi_slopes: expected \[Hq\] or \[N, Hq\]"),
    ({"cu_seqlens_q": z(3)}, TypeError, "cu_seqlens_q: expected torch.int32, got torch.float32"),
    ({"cu_seqlens_q": [0, 2, 5]}, TypeError, "cu_seqlens_q: expected a torch.Tensor, got list"),
    ({"cu_seqlens_q": torch.tensor([[0, 5]])}, ValueError, r"cu_seqlens_q: expected \[N \+ 1\]"),
    ({"cu_seqlens_k": torch.tensor([0, 7])}, ValueError, r"one length N \+ 1, got 3 and 2"),
    ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: expected at least 0, got -1"),
    ({"max_seqlen_k": torch.tensor(4)}, TypeError, "max_seqlen_k: expected an int, got Tensor"),
    ({"max_seqlen_k": 4.0}, TypeError, "max_seqlen_k: expected an int, got float"),
    # values, which are looked at on the CPU
    ({"cu_seqlens_q": torch.tensor([0, 6, 5])}, ValueError, r"cu_seqlens_q: .* from 0 to 5, .*\[0, 6, 5\]"),
    ({"cu_seqlens_q": torch.tensor([1, 2, 5])}, ValueError, "cu_seqlens_q: expected to rise from 0 to 5"),
    ({"cu_seqlens_k": torch.tensor([0, 2, 6])}, ValueError, "cu_seqlens_k: expected to rise from 0 to 7"),
    ({"max_seqlen_q": 2}, ValueError, "max_seqlen_q: expected at least 3, the longest sequence, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kind", "message"), WRONG_PACKED, ids=lambda x: str(x)[:50] if isinstance(x, str) else ""
)
def test_wrong_packed_call(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        flash_attention_varlen(**packed(**changes))


def test_all_reasons_come_at_once() -> None:
    with pytest.raises(ValueError, match="4 problems") as error:
        flash_attention(**dense(scale=-1.0, window=(0, -3), sinks=z(3), key_ranges=z(1, 1, 5, 2)))
    for reason in ("scale: ", "window: ", "sinks: ", "key_ranges: expected torch.int32"):
        assert reason in str(error.value)


def test_float64_and_large_head_dims_on_the_gpu_kernels_name_the_way_out() -> None:
    # meta tensors stand in for a GPU: the check looks at shapes and dtypes alone
    q = torch.empty(1, 2, 3, 520, dtype=torch.float64, device="meta")
    with pytest.raises(
        NotImplementedError, match=r"2 problems.*\n.*got torch.float64; .*\n.*up to 512, got 520.*reference"
    ):
        flash_attention(q, q, q, impl="triton")


def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match=r"expected GPU tensors, got cpu .* use impl='auto'"):
        flash_attention(**dense(impl="triton"))


@pytest.mark.gpu
def test_cpu_back_end_refuses_gpu_tensors_and_cu_seqlens_are_read_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in dense().items()}
    with pytest.raises(NotImplementedError, match="expected CPU tensors, got cuda"):
        flash_attention(**on_gpu, impl="cpu")
    wrong = packed(cu_seqlens_q=torch.tensor([0, 6, 5]))
    wrong = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in wrong.items()}
    monkeypatch.delenv("HF_FLASH_MC_CHECKS", raising=False)
    flash_attention_varlen(**wrong)  # clamped
    monkeypatch.setenv("HF_FLASH_MC_CHECKS", "1")
    with pytest.raises(ValueError, match="cu_seqlens_q: expected to rise"):
        flash_attention_varlen(**wrong)


def test_key_ranges_beyond_the_keys_are_clamped_not_refused() -> None:
    ranges = torch.tensor([[-9, 99], [5, 2], [7, 9], [0, 0], [-(2**31), 2**31 - 1]], dtype=torch.int32)[None, None]
    out, lse = flash_attention(**dense(key_ranges=ranges), return_lse=True)
    assert lse[0, 0].isfinite().tolist() == [True, False, False, False, True]
    assert not out[:, :, 1:4].any()


def test_mixed_dtypes_are_right_under_autocast_alone() -> None:
    call = dense(k=z(2, 2, 7, 8).bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flash_attention(**call).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="one dtype"):
        flash_attention(**call)


def test_masks_and_biases_of_fewer_dimensions_broadcast_as_in_torch() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(x.shape) for x in dense().values())
    for shape in ((7,), (5, 1), (4, 1, 7), (2, 1, 5, 7)):
        mask, bias = torch.rand(shape) > 0.2, torch.randn(shape)
        found = flash_attention(q, k, v, mask=mask, bias=bias)
        torch.testing.assert_close(found, reference_attention(q, k, v, mask=mask, bias=bias)[0])


# ---- BlockMask -------------------------------------------------------------------------------------------------------


def test_block_mask_shows_what_flex_attention_shows() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 8) for n in (150, 200, 200))
    late = lambda b, h, i, j: j >= 20 * b + 10 * h  # noqa: E731
    block_mask = create_block_mask(
        and_masks(lambda b, h, i, j: i + 50 >= j, late), 2, 2, 150, 200, device="cpu", BLOCK_SIZE=32
    )
    row, key = torch.arange(150)[:, None], torch.arange(200)
    start = 20 * torch.arange(2)[:, None] + 10 * torch.arange(2)
    seen = (row + 50 >= key) & (key >= start[..., None, None])
    torch.testing.assert_close(flash_attention(q, k, v, mask=block_mask), flash_attention(q, k, v, mask=seen))


def test_block_mask_of_listed_blocks_hides_the_others_and_shows_full_ones_whole() -> None:
    counts, indices = torch.tensor([[[1, 1]]], dtype=torch.int32), torch.tensor([[[[1, 0], [0, 1]]]], dtype=torch.int32)
    full = torch.tensor([[[1, 0]]], dtype=torch.int32), torch.tensor([[[[0, 1], [0, 1]]]], dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(
        counts, indices, *full, BLOCK_SIZE=4, mask_mod=lambda b, h, i, j: j % 2 == 0, seq_lengths=(8, 8)
    )
    seen = torch.zeros(8, 8, dtype=torch.bool)
    seen[:4, :4] = True  # full
    seen[:4, 4::2] = True  # partial: where mask_mod says so
    seen[4:, 0:4:2] = True
    q, k, v = (torch.randn(1, 1, 8, 4) for _ in range(3))
    torch.testing.assert_close(flash_attention(q, k, v, mask=block_mask), flash_attention(q, k, v, mask=seen))


def test_block_mask_of_other_sizes_is_refused() -> None:
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 128, 128, device="cpu")
    with pytest.raises(
        ValueError, match=r"mask: expected a BlockMask for 5 queries and 7 keys, got one for \(128, 128\)"
    ):
        flash_attention(**dense(mask=block_mask))


# ---- explain_attention -----------------------------------------------------------------------------------------------


def test_explanation_names_the_back_end_and_why() -> None:
    explanation = explain_attention(**dense(causal=True, window=(3, None), dropout_p=0.5, return_lse=True))
    assert explanation.impl == "cpu"
    assert str(explanation).startswith("cpu\n  - ")
    assert explain_attention(**dense(impl="reference")).impl == "reference"
    assert explain_attention(**dense(dropout_seed=5)).impl == "cpu"  # without dropout the seed is not looked at
    assert explain_attention(**packed()).impl == "cpu"
    assert explain_attention(**{n: x.to("meta") for n, x in dense().items()}).impl == "reference"


def test_explanation_of_a_call_that_would_raise() -> None:
    explanation = explain_attention(**dense(impl="hopper", scale=-1.0))
    assert explanation.impl is None
    assert any("compute capability 9.0" in reason for reason in explanation.reasons)
    assert any(reason.startswith("scale: ") for reason in explanation.reasons)
    assert "no back end" in str(explanation)
    assert explain_attention(**dense(scale=-1.0)).reasons == ["scale: expected a finite number > 0, or None for D ** "
                                                              "-0.5, got -1.0"]  # fmt: skip


def test_explanation_says_what_a_block_mask_costs() -> None:
    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 5, 7, device="cpu")
    explanation = explain_attention(**dense(mask=block_mask))
    assert explanation.impl == "cpu"
    assert any("dense mask of memory Sq * Sk" in reason for reason in explanation.reasons)


@pytest.mark.parametrize(
    "call",
    [*(dense(**wrong[0]) for wrong in WRONG), *(packed(**wrong[0]) for wrong in WRONG_PACKED), dense(window=())],
    ids=lambda call: "",
)
def test_explanation_of_every_wrong_call(call: dict[str, Any]) -> None:
    """A function as mask, an empty window or wrong cu_seqlens would run, it said; what is no tensor broke it."""
    explanation = explain_attention(**call)
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as error:
        (flash_attention_varlen if "cu_seqlens_q" in call else flash_attention)(**call)
    assert explanation.impl is None
    assert any(reason in str(error.value) for reason in explanation.reasons)


def test_explanation_of_arguments_that_are_none() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'casual'"):
        explain_attention(**dense(casual=True))
    call = packed()
    del call["cu_seqlens_k"]
    with pytest.raises(TypeError, match="missing a required argument: 'cu_seqlens_k'"):
        explain_attention(**call)
