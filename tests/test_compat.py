"""FlashAttention's functions over our ops: layouts, windows, packed forms, caches; against the formula in float64."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_flash_mc.compat import flash_attn as fa2
from hf_flash_mc.compat import flash_attn_interface as fa3

BOTH = pytest.mark.parametrize("module", [fa2, fa3], ids=["fa2", "fa3"])


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, softcap: float = 0.0, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, Hq, D] and lse [B, Hq, Sq] of [B, S, H, D] tensors; ``seen`` broadcasts to [B, Hq, Sq, Sk]."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = (logits if bias is None else logits + bias).masked_fill(~seen, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def window_mask(sq: int, sk: int, causal: bool, window: tuple[int, int] = (-1, -1)) -> Tensor:
    i, j = torch.arange(sq)[:, None] + sk - sq, torch.arange(sk)
    left, right = window
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0 or causal:
        seen &= j <= i + (0 if causal else right)
    return seen


@BOTH
@pytest.mark.parametrize("window", [(-1, -1), (5, 3), (4, -1)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dense(module: Any, causal: bool, window: tuple[int, int]) -> None:
    q, k, v = rows(2, 17, 4, 8), rows(2, 23, 2, 8, seed=1), rows(2, 23, 2, 8, seed=2)
    for x in (q, k, v):
        x.requires_grad_()
    expected, lse = exact(q, k, v, window_mask(17, 23, causal, window), softcap=3.0)
    found = module.flash_attn_func(
        q, k, v, causal=causal, window_size=window, softcap=3.0, deterministic=True, return_attn_probs=True
    )
    assert len(found) == (3 if module is fa2 else 2)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], lse, check_dtype=False)
    grads = [torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (found[0], expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_arguments_and_defaults_are_those_of_each_version() -> None:
    """Every name in its place, as positional calls need them: flash_attn 2.8 and FlashAttention-3's interface."""
    window = "window_size=(-1, -1)"
    fa2_tail = (
        f"dropout_p=0.0 softmax_scale=None causal=False {window} softcap=0.0 alibi_slopes=None "
        "deterministic=False return_attn_probs=False"
    )
    scales = "q_descale=None k_descale=None v_descale=None"
    fa3_tail = (
        f"softmax_scale=None causal=False qv=None {scales} {window} attention_chunk=0 softcap=0.0 "
        "num_splits=1 pack_gqa=None deterministic=False sm_margin=0 return_attn_probs=False"
    )
    packed = "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    expected = {
        fa2.flash_attn_func: f"q k v {fa2_tail}",
        fa2.flash_attn_varlen_func: f"{packed} {fa2_tail} block_table=None",
        fa2.flash_attn_with_kvcache: "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None "
        "cache_seqlens=None cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False "
        f"{window} softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 return_softmax_lse=False",
        fa3.flash_attn_func: f"q k v {fa3_tail}",
        fa3.flash_attn_varlen_func: f"{packed} seqused_q=None seqused_k=None {fa3_tail}",
        fa3.flash_attn_qkvpacked_func: f"qkv softmax_scale=None causal=False {scales} {window} attention_chunk=0 "
        "softcap=0.0 deterministic=False num_heads_q=None sm_margin=0 return_attn_probs=False",
        fa3.flash_attn_with_kvcache: "q k_cache v_cache k=None v=None qv=None rotary_cos=None rotary_sin=None "
        "cache_seqlens=None cache_batch_idx=None cache_leftpad=None page_table=None cu_seqlens_q=None "
        f"cu_seqlens_k_new=None max_seqlen_q=None rotary_seqlens=None {scales} softmax_scale=None causal=False "
        f"{window} attention_chunk=0 softcap=0.0 rotary_interleaved=True scheduler_metadata=None num_splits=0 "
        "pack_gqa=None sm_margin=0 return_softmax_lse=False",
    }
    for function, arguments in expected.items():
        parameters = inspect.signature(function).parameters.values()
        assert " ".join(str(p.replace(annotation=p.empty)) for p in parameters) == arguments, function


def test_packed_tensors_are_the_parts() -> None:
    q, k, v = (rows(2, 9, 3, 8, seed=i) for i in range(3))
    expected = fa2.flash_attn_func(q, k, v, 0.0, None, True)
    assert torch.equal(fa2.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), causal=True), expected)
    assert torch.equal(fa2.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), causal=True), expected)
    assert torch.equal(fa3.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), causal=True), expected)
    assert torch.equal(fa3.flash_attn_qkvpacked_func(torch.cat((q, k, v), 2), causal=True, num_heads_q=3), expected)
    for heads in (None, 4, 9):
        with pytest.raises(ValueError, match="num_heads_q"):
            fa3.flash_attn_qkvpacked_func(torch.cat((q, k, v), 2), num_heads_q=heads)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    q, k, v = (x[0] for x in (q, k, v))
    expected = fa2.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, causal=True)
    assert torch.equal(
        fa2.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), cu, cu, 5, 5, causal=True), expected
    )
    assert torch.equal(fa2.flash_attn_varlen_qkvpacked_func(torch.stack((q, k, v), 1), cu, 5, causal=True), expected)


@BOTH
def test_packed_sequences(module: Any) -> None:
    lengths = [(4, 6), (5, 5), (0, 3), (1, 9)]
    cu_q, cu_k = (
        torch.tensor([0, *(sum(n[i] for n in lengths[: j + 1]) for j in range(4))], dtype=torch.int32) for i in (0, 1)
    )
    q, k, v = rows(10, 4, 8), rows(23, 2, 8, seed=1), rows(23, 2, 8, seed=2)
    out = module.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 9, causal=True, window_size=(3, 0))
    for i, (sq, sk) in enumerate(lengths):
        a, b = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        expected, _ = exact(q[None, a], k[None, b], v[None, b], window_mask(sq, sk, True, (3, 0)))
        torch.testing.assert_close(out[a], expected[0])


def test_alibi_and_dropout() -> None:
    q, k, v = rows(2, 7, 4, 8), rows(2, 9, 2, 8, seed=1), rows(2, 9, 2, 8, seed=2)
    slopes = rows(2, 4, seed=3).abs()
    distance = (torch.arange(7)[:, None] + 2 - torch.arange(9)).abs()
    expected, _ = exact(q, k, v, torch.ones(7, 9, dtype=torch.bool), bias=-slopes[..., None, None] * distance)
    found = fa2.flash_attn_func(q, k, v, alibi_slopes=slopes.float())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    torch.manual_seed(0)
    ones = torch.ones_like(v)
    kept = torch.stack([fa2.flash_attn_func(q, k, ones, dropout_p=0.5) for _ in range(200)]).mean()
    assert kept.item() == pytest.approx(1.0, abs=0.05)
    with pytest.raises(NotImplementedError, match="return_attn_probs"):
        fa2.flash_attn_func(q, k, v, dropout_p=0.5, return_attn_probs=True)


def test_attention_chunk() -> None:
    q, k, v = rows(1, 10, 2, 8), rows(1, 13, 2, 8, seed=1), rows(1, 13, 2, 8, seed=2)
    i, j = torch.arange(10)[:, None] + 3, torch.arange(13)
    for causal in (False, True):
        seen = (i // 4 == j // 4) & ((j <= i) | (not causal))
        expected, _ = exact(q, k, v, seen)
        torch.testing.assert_close(fa3.flash_attn_func(q, k, v, causal=causal, attention_chunk=4), expected)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, at: Tensor, interleaved: bool) -> Tensor:
    """By complex multiplication: x [S, H, D], at [S]."""
    half = cos.shape[1]
    turn = torch.complex(cos[at], sin[at])[:, None]
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = head.unflatten(-1, (half, 2)) if interleaved else torch.stack(head.split(half, -1), -1)
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    head = pairs.flatten(-2) if interleaved else torch.cat(pairs.unbind(-1), -1)
    return torch.cat((head, rest), -1)


# FlashAttention-3 has no ALiBi
FORMS = ["plain", "paged", "paged-leftpad", "paged-rotary", "paged-window", "batch_idx", "leftpad", "rotary",
         "rotary-halves", "window"]  # fmt: skip
CACHED = [*((fa2, form) for form in [*FORMS, "alibi", "paged-alibi"]), *((fa3, form) for form in FORMS)]


@pytest.mark.parametrize(("module", "form"), CACHED, ids=lambda x: x if isinstance(x, str) else x.__name__[-3:])
def test_cache(module: Any, form: str) -> None:
    batch, sq, capacity, page = 3, 2, 24, 4
    lengths = torch.tensor([5, 0, 17], dtype=torch.int32)
    q, new_k, new_v = rows(batch, sq, 4, 8), rows(batch, sq, 2, 8, seed=1), rows(batch, sq, 2, 8, seed=2)
    slots = 5 if form == "batch_idx" else batch
    k_cache, v_cache = rows(slots, capacity, 2, 8, seed=3), rows(slots, capacity, 2, 8, seed=4)
    kwargs: dict[str, Any] = {"causal": True}
    window, chosen, pad = (-1, -1), list(range(batch)), [0] * batch
    paged, form = form.startswith("paged"), form.removeprefix("paged").removeprefix("-")
    if form == "window":
        kwargs["window_size"] = window = (3, -1)
    if form == "batch_idx":
        chosen = [4, 0, 2]
        kwargs["cache_batch_idx"] = torch.tensor(chosen, dtype=torch.int32)
    if form == "leftpad":
        pad = [2, 0, 6]
        kwargs["cache_leftpad"] = torch.tensor(pad, dtype=torch.int32)
    cos = sin = None
    if form.startswith("rotary"):
        angle = rows(capacity + 8, 3, seed=5)
        cos, sin = kwargs["rotary_cos"], kwargs["rotary_sin"] = angle.cos(), angle.sin()
        kwargs["rotary_interleaved"] = form == "rotary"
    if form == "alibi":
        kwargs["alibi_slopes"] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    dense_k, dense_v = k_cache.clone(), v_cache.clone()
    if paged:
        table = torch.randperm(batch * capacity // page, generator=torch.Generator().manual_seed(0)).reshape(batch, -1)
        kwargs["block_table" if module is fa2 else "page_table"] = table.to(torch.int32)
        pools = []
        for dense in (dense_k, dense_v):
            pool = torch.empty(table.numel(), page, 2, 8, dtype=torch.float64)
            pool[table.flatten()] = dense.reshape(-1, page, 2, 8)
            pools.append(pool)
        k_cache, v_cache = pools
    out, lse = module.flash_attn_with_kvcache(
        q, k_cache, v_cache, new_k, new_v, cache_seqlens=lengths, return_softmax_lse=True, **kwargs
    )
    for b in range(batch):
        n, slot = int(lengths[b]), chosen[b]
        at = torch.arange(n, n + sq)
        qb, kb = q[b], new_k[b]
        if cos is not None:
            qb, kb = (rotated(x, cos, sin, at, form == "rotary") for x in (qb, kb))
        dense_k[slot, n : n + sq], dense_v[slot, n : n + sq] = kb, new_v[b]
        seen = window_mask(sq, n + sq, True, window) & (torch.arange(n + sq) >= pad[b])
        bias = None
        if form == "alibi":
            distance = (at[:, None] - torch.arange(n + sq)).abs()
            bias = -kwargs["alibi_slopes"].double()[:, None, None] * distance
        expected, expected_lse = exact(
            qb[None], dense_k[slot, None, : n + sq], dense_v[slot, None, : n + sq], seen, bias=bias
        )
        torch.testing.assert_close(out[b], expected[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(lse[b], expected_lse[0], atol=1e-6, rtol=1e-6, check_dtype=False)
    if paged:
        k_cache, v_cache = (pool[table.flatten()].reshape(batch, capacity, 2, 8) for pool in (k_cache, v_cache))
    torch.testing.assert_close(k_cache, dense_k, atol=1e-6, rtol=1e-6)  # written in place, and nowhere else
    assert torch.equal(v_cache, dense_v)


@pytest.mark.parametrize("draw", range(12))
@BOTH
def test_caches_with_everything_at_once(module: Any, draw: int) -> None:
    """Drawn calls, positional up to the cache's lengths, against the formula row by row."""
    pick = random.Random(draw)
    batch, sq, capacity, new = pick.randrange(1, 4), pick.randrange(1, 4), 17, pick.randrange(0, 4)
    q = rows(batch, sq, 4, 16)
    k_cache, v_cache = rows(batch + 2, capacity, 2, 16, seed=1), rows(batch + 2, capacity, 2, 16, seed=2)
    k, v = (rows(batch, new, 2, 16, seed=i) if new else None for i in (3, 4))
    lengths = [pick.randrange(4, capacity - 4) for _ in range(batch)]
    slots = pick.sample(range(batch + 2), batch)
    pad = [pick.randrange(0, 4) for _ in range(batch)]
    causal, window = pick.random() < 0.5, pick.choice([(-1, -1), (3, -1), (5, 2), (-1, 1)])
    chunk, softcap = pick.choice([0, 5]) if module is fa3 else 0, pick.choice([0.0, 2.0])
    angle = rows(capacity, pick.choice([4, 8]), seed=5)
    tables = (angle.cos(), angle.sin()) if new and pick.random() < 0.7 else (None, None)
    slopes = rows(batch, 4, seed=6).abs().float() if module is fa2 and pick.random() < 0.5 else None
    interleaved = pick.random() < 0.5
    more = {"alibi_slopes": slopes} if module is fa2 else {"attention_chunk": chunk}
    old_k, old_v = k_cache.clone(), v_cache.clone()
    out, lse = module.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, *([None] if module is fa3 else []), *tables, torch.tensor(lengths).int(),
        torch.tensor(slots).int(), torch.tensor(pad).int(), None, softmax_scale=0.3, causal=causal,
        window_size=window, softcap=softcap, rotary_interleaved=interleaved, return_softmax_lse=True, **more,
    )  # fmt: skip
    for b in range(batch):
        n, total, slot = lengths[b], lengths[b] + new, slots[b]
        qb = q[b]
        if new:
            kb, moving = k[b], causal or max(window) >= 0
            if tables[0] is not None:
                kb = rotated(kb, *tables, torch.arange(n, total), interleaved)
                qb = rotated(qb, *tables, n + torch.arange(sq) * moving, interleaved)
            old_k[slot, n:total], old_v[slot, n:total] = kb, v[b]
        i, j = torch.arange(sq)[:, None] + total - sq, torch.arange(total)
        seen = window_mask(sq, total, causal, window) & (j >= pad[b])
        if chunk:
            seen &= torch.div(i - pad[b], chunk, rounding_mode="floor") == (j - pad[b]) // chunk
        bias = None if slopes is None else -slopes[b].double()[:, None, None] * (i - j).abs()
        expected, expected_lse = exact(
            qb[None] * 0.3 * 4, old_k[slot, None, :total], old_v[slot, None, :total], seen, softcap, bias
        )
        torch.testing.assert_close(out[b], expected[0], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(lse[b], expected_lse[0], atol=1e-6, rtol=1e-6, check_dtype=False)
    torch.testing.assert_close(k_cache, old_k, atol=1e-6, rtol=1e-6)
    assert torch.equal(v_cache, old_v)


@BOTH
def test_cache_without_new_keys_and_lengths_is_all_of_it(module: Any) -> None:
    q, k, v = rows(2, 1, 4, 8), rows(2, 11, 2, 8, seed=1), rows(2, 11, 2, 8, seed=2)
    expected, _ = exact(q, k, v, torch.ones(1, 11, dtype=torch.bool))
    torch.testing.assert_close(module.flash_attn_with_kvcache(q, k, v), expected)
    short, _ = exact(q, k[:, :7], v[:, :7], torch.ones(1, 7, dtype=torch.bool))
    torch.testing.assert_close(module.flash_attn_with_kvcache(q, k, v, cache_seqlens=7, num_splits=3), short)


@BOTH
@pytest.mark.parametrize("window", [(0, 0), (0, -1), (-1, 0), (99, 99), (None, None), (3, None), [2, 1]], ids=str)
def test_windows_of_every_kind(module: Any, window: Any) -> None:
    """-1 and, as FlashAttention-4 writes it, None are unbounded; in every function alike."""
    q, k, v = rows(2, 5, 4, 8), rows(2, 7, 2, 8, seed=1), rows(2, 7, 2, 8, seed=2)
    cu_q, cu_k = torch.tensor([0, 5, 10]).int(), torch.tensor([0, 7, 14]).int()
    for causal in (False, True):
        seen = window_mask(5, 7, causal, tuple(-1 if side is None else side for side in window))
        expected, _ = exact(q, k, v, seen)
        kwargs = {"causal": causal, "window_size": window}
        torch.testing.assert_close(module.flash_attn_func(q, k, v, **kwargs), expected)
        torch.testing.assert_close(module.flash_attn_with_kvcache(q, k, v, **kwargs), expected)
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        out = module.flash_attn_varlen_func(*flat, cu_q, cu_k, 5, 7, **kwargs)
        torch.testing.assert_close(out, expected.flatten(0, 1))


@BOTH
@pytest.mark.parametrize("lengths", [[(0, 0), (3, 0), (2, 4)], [(3, 0)], [(0, 0)]], ids=str)
def test_sequences_without_queries_or_keys(module: Any, lengths: list[tuple[int, int]]) -> None:
    cu_q, cu_k = (torch.tensor([0, *(n[i] for n in lengths)]).cumsum(0).int() for i in (0, 1))
    q, k, v = rows(int(cu_q[-1]), 4, 8), rows(int(cu_k[-1]), 2, 8, seed=1), rows(int(cu_k[-1]), 2, 8, seed=2)
    for x in (q, k, v):
        x.requires_grad_()
    longest = [max(n[i] for n in lengths) for i in (0, 1)]
    out, lse, *_ = module.flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, causal=True, return_attn_probs=True)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    for i, (sq, sk) in enumerate(lengths):
        a, b = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        if sk:
            torch.testing.assert_close(
                out[a], exact(q[None, a], k[None, b], v[None, b], window_mask(sq, sk, True))[0][0]
            )
        else:
            assert not out[a].any()
            assert (lse[:, a] == float("-inf")).all()


def test_all_arguments_by_position() -> None:
    """As old code calls them; more queries than keys leave rows that see nothing: 0 and -inf."""
    q, k, v = rows(2, 9, 4, 8), rows(2, 6, 2, 8, seed=1), rows(2, 6, 2, 8, seed=2)
    slopes, seen = rows(2, 4, seed=3).abs().float(), window_mask(9, 6, True, (4, 2))
    distance = (torch.arange(9)[:, None] - 3 - torch.arange(6)).abs()
    bias = -slopes.double()[..., None, None] * distance
    expected, lse = exact(q * 0.5 * 8**0.5, k, v, seen, 3.0, bias)
    out = fa2.flash_attn_func(q, k, v, 0.0, 0.5, True, (4, 2), 3.0, slopes, True, True)
    torch.testing.assert_close(out[0], expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out[1], lse, atol=1e-6, rtol=1e-6, check_dtype=False)
    assert out[2] is None
    assert not out[0][:, :3].any()
    cu_q, cu_k = torch.tensor([0, 9, 18]).int(), torch.tensor([0, 6, 12]).int()
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = fa2.flash_attn_varlen_func(*flat, cu_q, cu_k, 9, 6, 0.0, 0.5, True, (4, 2), 3.0, slopes, True, True, None)
    torch.testing.assert_close(out[0], expected.flatten(0, 1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out[1], lse.transpose(0, 1).flatten(1), atol=1e-6, rtol=1e-6, check_dtype=False)
    expected, lse = exact(q * 0.5 * 8**0.5, k, v, seen, 3.0)
    out = fa3.flash_attn_func(q, k, v, 0.5, True, None, None, None, None, (4, 2), 0, 3.0, 1, None, True, 0, True)
    torch.testing.assert_close(out[0], expected)
    out = fa3.flash_attn_varlen_func(
        *flat, cu_q, cu_k, 9, 6, None, None, 0.5, True, None, None, None, None, (4, 2), 0, 3.0, 1, None, True, 0, True
    )
    torch.testing.assert_close(out[0], expected.flatten(0, 1))
    torch.testing.assert_close(out[1], lse.transpose(0, 1).flatten(1), check_dtype=False)


def test_wrong_shapes_and_windows_are_named() -> None:
    q, cu = rows(2, 3, 4, 8), torch.tensor([0, 3], dtype=torch.int32)
    for window in (3, (1, 2, 3)):
        with pytest.raises(TypeError, match=r"window_size: expected \(left, right\), -1 for unbounded, got"):
            fa2.flash_attn_func(q, q, q, window_size=window)
    with pytest.raises(ValueError, match=r"qkv: expected \[B, S, 3, H, D\], got \[2, 3, 4, 8\]"):
        fa2.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv: expected \[B, S, 2, H, D\]"):
        fa2.flash_attn_kvpacked_func(q, q[:, :, None].expand(2, 3, 3, 4, 8))
    with pytest.raises(ValueError, match=r"qkv: expected \[T, 3, H, D\]"):
        fa2.flash_attn_varlen_qkvpacked_func(q[:, :2], cu, 3)
    with pytest.raises(ValueError, match=r"kv: expected \[T, 2, H, D\]"):
        fa2.flash_attn_varlen_kvpacked_func(q[0], q, cu, cu, 3, 3)
    with pytest.raises(ValueError, match=r"qkv: expected \[B, S, 3, H, D\]"):
        fa3.flash_attn_qkvpacked_func(q[:, :, None])


def test_what_is_lacking_raises() -> None:
    q, cu = rows(2, 3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="qv, q_descale"):
        fa3.flash_attn_func(q, q, q, qv=q, q_descale=torch.ones(1))
    with pytest.raises(NotImplementedError, match="attention_chunk"):
        fa3.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 3, 3, attention_chunk=2)
    with pytest.raises(NotImplementedError, match="block_table"):
        fa2.flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 3, 3, block_table=cu)
    with pytest.raises(ValueError, match="cache_batch_idx"):
        fa2.flash_attn_with_kvcache(q, q, q, cache_batch_idx=cu[:1], block_table=cu[None])
    with pytest.raises(ValueError, match="k and v"):
        fa2.flash_attn_with_kvcache(q, q, q, k=q, cache_seqlens=1)
    with pytest.raises(ValueError, match="cache_seqlens"):
        fa2.flash_attn_with_kvcache(q, q, q, k=q, v=q)
    for lengths in (torch.ones(3).int(), torch.ones(2), 1.5):
        with pytest.raises(ValueError, match=r"cache_seqlens: expected an int or integers \[2\]"):
            fa2.flash_attn_with_kvcache(q, q, q, cache_seqlens=lengths)
    for call in (fa3.flash_attn_func, fa3.flash_attn_with_kvcache):
        with pytest.raises(ValueError, match="attention_chunk"):
            call(q, q, q, attention_chunk=-1)
    with pytest.raises(ValueError, match="cache_batch_idx"):
        fa2.flash_attn_with_kvcache(q, q, q, cache_batch_idx=cu, block_table=cu[None])
    table = torch.ones(3, 2)
    with pytest.raises(ValueError, match="rotary_cos and rotary_sin: expected both"):
        fa3.flash_attn_with_kvcache(q, q, q, q, q, rotary_cos=table, cache_seqlens=0)
    with pytest.raises(ValueError, match="rotary_cos: expected k and v too"):
        fa2.flash_attn_with_kvcache(q, q, q, rotary_cos=table, rotary_sin=table, cache_seqlens=0)
    with pytest.raises(ValueError, match=r"expected \[at least 3"):
        fa2.flash_attn_with_kvcache(q, q, q, q, q, table[:2], table[:2], cache_seqlens=0)


@pytest.mark.parametrize(("lengths", "new"), [(-1, 1), ([0, 3], 1), ([1, -2], 0), (4, 0)])
def test_lengths_that_do_not_fit_the_cache_leave_it_as_it_was(lengths: int | list[int], new: int) -> None:
    """A negative one wrote at the cache's other end, one too large ended in an IndexError that names no argument."""
    q = rows(2, 1, 2, 8)
    k_cache, v_cache = rows(2, 3, 2, 8, seed=1), rows(2, 3, 2, 8, seed=2)
    kept = k_cache.clone(), v_cache.clone()
    given = lengths if isinstance(lengths, int) else torch.tensor(lengths, dtype=torch.int32)
    appended = (q, q) if new else (None, None)
    with pytest.raises(ValueError, match=f"cache_seqlens: expected lengths from 0 to {3 - new} in a cache for 3"):
        fa2.flash_attn_with_kvcache(q, k_cache, v_cache, *appended, cache_seqlens=given)
    assert torch.equal(k_cache, kept[0])
    assert torch.equal(v_cache, kept[1])
