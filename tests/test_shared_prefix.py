"""Variants over a shared prefix: values and every gradient are those of the prefix repeated for each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import TOLERANCE
from torch import Tensor

from hf_flash_mc.ops import shared_prefix_attention
from hf_flash_mc.ops.reference import reference_attention

NAMES = ("q", "k", "v", "prefix_k", "prefix_v", "key_log_weight", "prefix_log_weight", "sinks")
CASES = {
    "plain": {},
    "window-and-softcap": {"window": (5, 0), "softcap": 3.0},
    "not-causal": {"causal": False, "scale": 0.3},
    "prefix-mask": {"masked": True},
}


def inputs(dtype: torch.dtype, masked: bool = False) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(0)
    b, v, hq, hkv, s, e, p, d, dv = 2, 3, 4, 2, 7, 12, 37, 16, 8

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

    found = {
        "q": draw(b * v, s, hq, d).transpose(1, 2),
        "k": draw(b * v, hkv, e, d),
        "v": draw(b * v, hkv, e, dv),
        "prefix_k": draw(b, p, hkv, d).transpose(1, 2),
        "prefix_v": draw(b, hkv, p, dv),
        "key_log_weight": draw(b * v, hkv, e),
        "prefix_log_weight": draw(b, hkv, p),
        "sinks": draw(hq),
    }
    found["key_log_weight"][1, :, 2] = -torch.inf
    found["prefix_log_weight"][0, 1, 5] = -torch.inf
    found["prefix_v"][0, 1, 5] = torch.nan  # nobody sees it
    if masked:
        found["prefix_mask"] = torch.rand(b * v, 1, s, p, generator=gen) < 0.6
    found["dout"], found["dlse"] = draw(b * v, hq, s, dv), draw(b * v, hq, s)
    return found


def repeated(call: Any, x: dict[str, Tensor], causal: bool = True, window: Any = None, **options: Any) -> Any:
    """One attention over [prefix repeated, own keys], its visibility as a mask."""
    variants, (rows, own) = x["q"].shape[0] // x["prefix_k"].shape[0], (x["q"].shape[2], x["k"].shape[2])
    offset = torch.arange(own)[None] - torch.arange(rows)[:, None] - (own - rows)
    seen = torch.ones(rows, own, dtype=torch.bool)
    seen = seen & (offset <= 0) if causal else seen
    seen = seen & (offset >= -window[0]) if window else seen
    before = x.get("prefix_mask", torch.ones(1, 1, rows, x["prefix_k"].shape[2], dtype=torch.bool))
    mask = torch.cat((before, seen.expand(before.shape[0], 1, -1, -1)), -1)
    joined = [torch.cat((x[f"prefix_{n}"].repeat_interleave(variants, 0), x[n]), 2) for n in ("k", "v")]
    weight = torch.cat((x["prefix_log_weight"].repeat_interleave(variants, 0), x["key_log_weight"]), 2)
    return call(x["q"], *joined, mask=mask, key_log_weight=weight, sinks=x["sinks"], **options)


def gradients(function: Any, x: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: x[name].detach().clone().requires_grad_() for name in NAMES}
    out, lse = function({**x, **leaves})[:2]
    wanted = torch.autograd.grad((out, lse), list(leaves.values()), (x["dout"].to(out.dtype), x["dlse"].to(lse.dtype)))
    return [out.detach(), lse.detach(), *wanted]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_prefix_repeated(name: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = dict(CASES[name])
    x = inputs(dtype, options.pop("masked", False))

    def shared(y: dict[str, Tensor]) -> Any:
        given = {n: t for n, t in y.items() if n not in ("q", "k", "v", "prefix_k", "prefix_v", "dout", "dlse")}
        return shared_prefix_attention(
            y["q"], y["k"], y["v"], y["prefix_k"], y["prefix_v"], return_lse=True, **given, **options
        )

    exact = {n: t.double() if t.is_floating_point() else t for n, t in x.items()}
    wanted = gradients(lambda y: repeated(reference_attention, y, **options), exact)
    native = gradients(lambda y: repeated(reference_attention, y, **options), x)
    for i, (got, reference, same) in enumerate(zip(gradients(shared, x), wanted, native, strict=True)):
        worst = reference.abs().nan_to_num(0.0, 0.0, 0.0).max()
        error, theirs = (got.double() - reference).abs().max(), (same.double() - reference).abs().max()
        bound = 2 * theirs + TOLERANCE[dtype] * worst
        assert error <= bound, f"{('out', 'lse', *NAMES)[i]}: {error:.2e} > {bound:.2e}"


def test_queries_of_transformers_layout_are_packed_without_a_copy() -> None:
    q = inputs(torch.float32)["q"]
    assert q.unflatten(0, (2, 3)).transpose(1, 2).flatten(2, 3).data_ptr() == q.data_ptr()


@pytest.mark.parametrize("change", [{"q": 5}, {"k": 4}, {"prefix_v": 1}], ids=str)
def test_sizes_that_do_not_fit_are_named(change: dict[str, int]) -> None:
    x = inputs(torch.float32)
    x = {name: x[name] for name in ("q", "k", "v", "prefix_k", "prefix_v")}
    for name, count in change.items():
        x[name] = x[name][:count]
    with pytest.raises(ValueError, match="expected \\[B \\* V, Hq, S, D\\]"):
        shared_prefix_attention(**x)
