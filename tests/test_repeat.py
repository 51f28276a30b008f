"""Calls that were made before take a short way: it must give what the long way gives, and be left when it must be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.compiled_autograd
from torch import Tensor

pytest.importorskip("triton")

from gluon_emulator import emulated

from hf_flash_mc.ops import api, auto, checks, flash_attention, repeat
from hf_flash_mc.ops.hopper import backward_launch, launch
from hf_flash_mc.ops.portable import plan, shapes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not plan.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1")
Run = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    """Nothing kept, and CPU tensors keep calls as those of a GPU do."""
    plan.forget()
    with mock.patch.object(repeat, "KINDS", {DEVICE}):
        yield
    plan.forget()


def inputs(sq: int = 20, sk: int = 20, d: int = 16, dtype: torch.dtype = torch.bfloat16, h: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, h, sq, d), (1, h, sk, d), (1, h, sk, d)]
    return [torch.randn(s, dtype=torch.float32).to(DEVICE, dtype).requires_grad_() for s in shapes]


def run(qkv: list[Tensor], lse_too: bool = False, **options: Any) -> Run:
    """out, lse and the gradients."""
    out, lse = flash_attention(*qkv, **{"impl": "triton", **options}, return_lse=True)
    loss = out.float().square().sum() + (lse.sum() if lse_too else 0)
    return (out, lse, *torch.autograd.grad(loss, [x for x in qkv if x.requires_grad]))


def same(a: Run, b: Run) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.stride() == y.stride() and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def is_short(qkv: list[Tensor], **options: Any) -> bool:
    """Whether the call takes the short way: it is not checked."""
    with mock.patch.object(api, "_check", wraps=api._check) as check:
        flash_attention(*qkv, **{"impl": "triton", **options})
    return not check.called


NUMBERS: list[dict[str, Any]] = [{}, {"causal": True}, {"window": (3, 2)}, {"softcap": 2.0}, {"scale": 0.5}]


def test_a_repeated_call_is_not_checked_and_gives_the_same() -> None:
    qkv = inputs()
    first = [run(qkv, **numbers) for numbers in NUMBERS]
    for numbers, expected in zip(NUMBERS, first, strict=True):
        assert is_short(qkv, **numbers)
        assert same(run(qkv, **numbers), expected)
    assert len(repeat._kept) == len(NUMBERS)


def strided(x: Tensor) -> Tensor:
    return x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()


def misaligned(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x.detach())


@pytest.mark.parametrize(
    "change",
    [lambda x: x.half(), lambda x: x[:, :, :12], lambda x: x[..., :8], strided, misaligned],
    ids=["dtype", "length", "head dim", "strides", "alignment"],
)
def test_another_signature_is_another_call(change: Any) -> None:
    qkv = inputs()
    run(qkv)
    changed = [change(x.detach()).requires_grad_() for x in qkv]
    assert not is_short(changed)
    found = run(changed)
    plan.forget()
    assert same(run(changed), found)


@pytest.mark.parametrize(
    "options",
    [{"dropout_p": 1.5}, {"dropout_p": None}, {"window": (-3, 2)}, {"window": [-3, 2]}, {"softcap": 0.0},
     {"scale": -1.0}, {"scale": torch.ones(())}, {"impl": "nothing"}, {"dropout_offsets": (0, 0, 0, -1)}],
    ids=str,
)  # fmt: skip
def test_bad_numbers_raise_after_good_ones(options: dict[str, Any]) -> None:
    qkv = inputs()
    flash_attention(*qkv, impl="triton")
    with pytest.raises((TypeError, ValueError)):
        flash_attention(*qkv, **{"impl": "triton", **options})


def test_lists_run_and_are_not_kept() -> None:
    qkv = inputs()
    flash_attention(*qkv, impl="triton", window=[3, 2])
    assert not repeat._kept
    assert not is_short(qkv, window=[3, 2])


def test_what_needs_a_gradient_may_change_between_calls() -> None:
    qkv = inputs()
    with torch.no_grad():
        out = flash_attention(*qkv, impl="triton")
    expected = run(qkv)
    assert torch.equal(out, expected[0])
    for i in range(3):
        only = [x.detach().requires_grad_(i == j) for j, x in enumerate(qkv)]
        assert same(run(only), (*expected[:2], expected[2 + i]))
    assert flash_attention(*[x.detach() for x in qkv], impl="triton").grad_fn is None


def test_a_gradient_of_lse_is_not_lost() -> None:
    qkv = inputs()
    expected = run(qkv, lse_too=True)
    assert is_short(qkv)
    assert same(run(qkv, lse_too=True), expected)
    assert not same(run(qkv), expected)


def test_a_second_derivative_raises() -> None:
    qkv = inputs()
    run(qkv)
    assert is_short(qkv)
    out = flash_attention(*qkv, impl="triton")
    first = torch.autograd.grad(out.float().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first[0].float().sum().backward()


def test_saved_tensors_may_come_back_in_another_layout() -> None:
    qkv = [strided(x) for x in inputs()]
    expected = run(qkv)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.contiguous()):
        assert is_short(qkv)
        found = run(qkv)
    assert same(found, expected)


class Watch(torch.utils._python_dispatch.TorchDispatchMode):
    seen: list[str]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_mode_still_sees_the_op() -> None:
    qkv = inputs()
    run(qkv)
    with Watch() as watch:
        watch.seen = []
        run(qkv)
    assert any("attn_fwd" in name for name in watch.seen)
    assert any("attn_bwd" in name for name in watch.seen)


def test_autocast_casts_first() -> None:
    qkv = inputs()
    wide = [x.detach().float().requires_grad_() for x in qkv]
    flash_attention(*qkv, impl="triton")
    with torch.autocast(DEVICE, dtype=torch.float16):
        first = run(wide)
        assert is_short(wide)
        second = run(wide)
        cast = flash_attention(*qkv, impl="triton")
    assert first[0].dtype == torch.float16
    assert first[2].dtype == torch.float32
    assert same(first, second)
    assert cast.dtype == torch.float16


def test_functorch_goes_the_long_way() -> None:
    qkv = inputs()
    expected = run(qkv)
    grads = torch.func.grad(
        lambda *qkv: flash_attention(*qkv, impl="triton").float().square().sum(), argnums=(0, 1, 2)
    )(*[x.detach() for x in qkv])
    assert same(grads, expected[2:])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        flash_attention(torch.autograd.forward_ad.make_dual(qkv[0], qkv[0]), *qkv[1:], impl="triton")


@pytest.mark.parametrize("short", [False, True])
def test_compiled_autograd_sees_the_op(short: bool) -> None:
    """It traced into the kernels' launches."""
    qkv = inputs()
    expected = run(qkv)
    with mock.patch.object(repeat, "KINDS", {DEVICE} if short else set()):
        assert is_short(qkv) == short
        loss = flash_attention(*qkv, impl="triton").float().square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    assert all(torch.equal(x.grad, grad) for x, grad in zip(qkv, expected[2:], strict=True))


def test_there_is_a_bound_on_what_is_kept() -> None:
    qkv = inputs()
    with mock.patch.object(repeat, "KEPT", 2):
        for scale in (0.1, 0.2, 0.3, 0.4, 0.5):
            flash_attention(*qkv, impl="triton", scale=scale)
            assert len(repeat._kept) <= 2


@pytest.fixture
def hopper() -> Iterator[None]:
    """CPU tensors are on an emulated GPU of compute capability 9.0."""
    with ExitStack() as stack:
        for module in (auto, plan, launch):
            stack.enter_context(mock.patch.object(module, "architecture", return_value="sm90"))
        stack.enter_context(mock.patch.object(launch, "EMULATED", True))
        stack.enter_context(mock.patch.object(shapes, "ENABLED", False))
        stack.enter_context(mock.patch.dict(api._AUTO, {"cpu": "auto"}))
        stack.enter_context(mock.patch.dict(checks.LIMITS, {"auto": checks.LIMITS["triton"]}))
        stack.enter_context(mock.patch.object(backward_launch, "multiprocessors", return_value=3))
        stack.enter_context(emulated(launch, "attn_fwd_hopper_kernel"))
        stack.enter_context(emulated(backward_launch, "attn_bwd_hopper_kernel"))
        yield


@pytest.mark.skipif(DEVICE == "cuda", reason="emulates another")
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("sq", [70, 66], ids=["square", "more keys than queries"])
def test_hopper_repeats_itself(sq: int) -> None:
    qkv = inputs(sq, 70, 64, h=1)
    expected = run(qkv, causal=True, impl="auto")
    assert is_short(qkv, causal=True, impl="auto")
    steps = backward_launch._Steps
    with mock.patch.object(steps, "run_bare", autospec=True, side_effect=steps.run_bare) as bare:
        assert same(run(qkv, causal=True, impl="auto"), expected)
    assert bare.called == (sq == 70)
