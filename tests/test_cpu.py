"""The CPU back end: which path a call takes, its traps one by one, and linear memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers import Case, make_inputs, run_case
from torch.utils._python_dispatch import TorchDispatchMode

from hf_flash_mc.ops import cpu, cpu_tiles, flash_attention
from hf_flash_mc.ops.reference import dropout_keep
from hf_flash_mc.ops.spec import Needs, Spec

CASES = [
    # the kernel aligns is_causal at the top left, we at the bottom right
    Case(causal=True, Sq=17, Sk=65),
    Case(causal=True, Sq=65, Sk=17, dlse=True, poison=True),
    Case(causal=True, Sq=5, Sk=300, dtype=torch.bfloat16, Hq=4),
    # it reads a strided last dimension wrongly, and wants equal head dims
    Case(strides="lastdim", causal=True),
    Case(D=40, Dv=24, dlse=True, Hq=4),
    Case(D=24, Dv=40, strides="sliced", dtype=torch.float16),
    # its lse of a row without keys is 0
    Case(key_ranges="empty", ranges_shape="b", B=2, poison=True, dlse=True),
    # padding and documents: pieces that differ between batch rows and heads
    Case(key_ranges="padded", ranges_shape="b", B=3, Sq=63, Sk=63, Hq=4, poison=True, strides="bshd"),
    Case(key_ranges="packed", ranges_shape="bh", B=2, Sq=111, Sk=111, Hq=4, poison=True),
    Case(key_ranges="full", ranges_shape="b", B=2, Sq=1, Sk=111, window=(30, None)),
    Case(key_ranges="hostile", Sq=1, Sk=64, B=5, ranges_shape="b", poison=True),
    Case(key_ranges="hostile", Sq=65, Sk=33, B=2, ranges_shape="bh", Hq=6, Hkv=3, poison=True),
    # sinks are added after the kernel; more than one tile of rows and of keys
    Case(sinks=True, causal=True, dlse=True, dtype=torch.float64),
    Case(sinks=True, key_ranges="empty", dlse=True, poison=True),
    Case(softcap=5.0, Sq=257, Sk=1100, causal=True, sinks=True),
    Case(window=(100, 3), Sq=300, Sk=700, Hq=4, dtype=torch.bfloat16),
    Case(mask="k", Sq=130, Sk=600, poison=True),
    Case(bias="hqk-", alibi="bh", key_log_weight="bh-", B=2, Sq=130, Sk=70, dropout_p=0.3, dlse=True, poison=True),
    Case(Sk=0, sinks=True, dlse=True),
    Case(Sk=0),
    Case(Sq=0),
    Case(varlen=((3, 0), (0, 4), (70, 70), (1, 9)), causal=True, Hq=4, dlse=True, poison=True, sinks=True),
    Case(varlen=()),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case) -> None:
    """Within the bound of the float64 reference."""
    run_case(case, "cpu")


@pytest.mark.parametrize(
    "case",
    [
        Case(causal=True, Sq=17, Sk=65, dlse=True),  # ATen's kernel
        Case(bias="hqk-", key_log_weight="bh-", sinks=True, B=2, Hq=4, Sq=13, Sk=70),  # tiles
        Case(varlen=((3, 0), (0, 4), (7, 9)), causal=True, key_log_weight="bh-", Hq=4, dlse=True),
    ],
    ids=str,
)
def test_a_gradient_asked_for_alone_is_the_one_asked_for_with_others(case: Case) -> None:
    inputs = make_inputs(case)
    q, k, v, spec, varlen = inputs.q, inputs.k, inputs.v, inputs.spec, inputs.varlen
    out, lse = cpu.forward(q, k, v, spec, varlen)
    there = (True, True, True, spec.bias is not None, spec.key_log_weight is not None, spec.sinks is not None)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) if case.dlse else None
    together = cpu.backward(dout, dlse, q, k, v, out, lse, spec, Needs(*there), False, varlen)
    for i in range(6):
        needs = Needs(*(there[j] and i == j for j in range(6)))
        for j, x in enumerate(cpu.backward(dout, dlse, q, k, v, out, lse, spec, needs, False, varlen)):
            assert (x is None) == (not needs[j])
            assert x is None or torch.equal(x, together[j])


def pieces(case: Case) -> list[tuple[int, int, int, int, bool]] | None:
    """First row, rows, first key, keys and causality of the pieces a case decomposes into."""
    inputs = make_inputs(case)
    found = cpu._pieces(inputs.q, inputs.k, inputs.spec)
    spans = lambda s: (s.start, s.stop - s.start)  # noqa: E731
    return None if found is None else [(*spans(rows), *spans(keys), causal) for _, _, rows, keys, causal in found]


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(), [(0, 33, 0, 33, False)]),
        (Case(causal=True), [(0, 33, 0, 33, True)]),
        (Case(key_ranges="causal"), [(0, 33, 0, 33, True)]),
        (Case(key_ranges="full"), [(0, 33, 0, 33, False)]),
        (Case(key_ranges="full", causal=True), [(0, 33, 0, 33, True)]),
        (Case(causal=True, Sq=5, Sk=20), [(0, 5, 0, 15, False), (0, 5, 15, 5, True)]),
        (Case(causal=True, Sq=20, Sk=5), [(15, 5, 0, 5, True)]),
        (Case(key_ranges="causal", Sq=1, Sk=64), [(0, 1, 0, 64, False)]),
        (Case(causal=True, Sq=1, Sk=64, window=(9, 0)), [(0, 1, 54, 10, False)]),
        (Case(window=(3, 3), Sq=65, Sk=65), None),
        (Case(softcap=1.0), None),
    ],
    ids=str,
)
def test_common_calls_reach_the_fast_kernel(case: Case, expected: list | None) -> None:
    """transformers' prefill and decode patterns, however they are said, are one or two calls of ATen's kernel."""
    assert pieces(case) == expected


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["kernel", "tiles"])
def test_a_sink_of_minus_infinity_beside_a_row_that_sees_nothing(options: dict[str, float]) -> None:
    """out and the gradients were NaN."""
    found = {}
    for impl in ("cpu", "reference"):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, n, 16, dtype=torch.float64).requires_grad_() for n in (9, 5, 5))
        sinks = torch.tensor([float("-inf"), 0.5], dtype=torch.float64, requires_grad=True)
        out, lse = flash_attention(q, k, v, causal=True, sinks=sinks, return_lse=True, impl=impl, **options)
        assert bool((lse[0, 0, :4] == float("-inf")).all())
        gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), (q, k, v, sinks))
        found[impl] = (out, lse, *gradients)
    torch.testing.assert_close(found["cpu"], found["reference"])


def test_gradient_of_lse_beyond_float16() -> None:
    """dlse is float32; rounded to float16 it was inf, and dq NaN."""
    found = []
    for impl in ("cpu", "reference"):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 9, 16, dtype=torch.float16).requires_grad_() for _ in range(3))
        _, lse = flash_attention(q, k, v, causal=True, return_lse=True, impl=impl)
        found.append(torch.autograd.grad(lse, (q, k), torch.full_like(lse, 1e5)))
    torch.testing.assert_close(*found, rtol=2e-3, atol=100)


@pytest.mark.parametrize("options", [{"causal": True}, {"softcap": 3.0, "window": (4, None), "dropout_p": 0.5}])
def test_the_default_device_changes_nothing(options: dict) -> None:
    """Tiles were made on it."""
    inputs = [torch.randn(2, 2, 9, 16).requires_grad_() for _ in range(3)]
    ranges, slopes = torch.tensor([1, 7], dtype=torch.int32).expand(2, 1, 9, 2), torch.ones(2)
    with torch.device("meta"):
        out = flash_attention(*inputs, key_ranges=ranges, alibi_slopes=slopes, dropout_seed=1, **options)
        gradients = torch.autograd.grad(out.sum(), inputs)
    assert all(x.device.type == "cpu" for x in (out, *gradients))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.5}], ids=str)
def test_a_call_of_one_piece_is_the_kernel_alone(options: dict) -> None:
    """No zeros, sums and copies around it: they took as long as the kernel where sequences are short."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            names.append(op.__name__)
            return op(*args, **(kwargs or {}))

    names: list[str] = []
    q, k, v, dout = (torch.randn(2, n, 9, 16) for n in (4, 2, 2, 4))
    with Seen():
        out, lse = cpu.forward(q, k, v, Spec(**options))
        call = (dout, None, q, k, v, out, lse.contiguous(), Spec(**options), Needs(True, False, True), False)
        found = cpu.backward(*call)
    kernels = ["_scaled_dot_product_flash_attention_for_cpu.default"]
    kernels += ["_scaled_dot_product_flash_attention_for_cpu_backward.default"]
    assert [name for name in names if name != "clone.default"] == kernels
    assert [x is None for x in found] == [False, True, False, True, True, True]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("window", [(sys.maxsize, None), (None, sys.maxsize), (2**70, sys.maxsize)], ids=str)
def test_a_window_of_maxsize_is_no_window(window: tuple, impl: str) -> None:
    """A position plus it overflowed: rows saw nothing."""
    q, k = torch.randn(1, 2, 70, 16), torch.randn(1, 2, 40, 16)
    torch.testing.assert_close(flash_attention(q, k, k, window=window, impl=impl), flash_attention(q, k, k, impl=impl))


def test_dropout_is_the_reference_mask() -> None:
    """Tile by tile, at offsets that are no multiples of 16 and past 32 bits of the seed."""
    batch, heads, rows, columns = 2, 3, 5, 40
    offsets, seed = (3, 1, 70000, 21), torch.tensor([-(2**40) + 12345])
    spec = Spec(dropout_seed=seed, dropout_p=0.3, dropout_offsets=offsets)
    q, k = torch.zeros(batch, heads, rows, 4), torch.zeros(batch, 1, columns, 4)
    tile = cpu_tiles.Tiles(q, k, k, spec).dropout(slice(1, 2), slice(2, 5), slice(7, 39))
    at = [torch.arange(n) + o for n, o in zip((batch, heads, rows, columns), offsets, strict=True)]
    keep = dropout_keep(seed, 0.3, at[0][:, None, None, None], at[1][:, None, None], at[2][:, None], at[3])
    expected = keep[1:2, :, 2:5, 7:39] * (256 / (256 - round(256 * 0.3)))
    assert torch.equal(tile.flatten(1, 2), expected.to(tile.dtype))


def test_only_the_gradients_asked_for() -> None:
    """The others are None."""
    inputs = make_inputs(Case(bias="k", sinks=True))
    args = inputs.q, inputs.k, inputs.v
    out, lse = cpu.forward(*args, inputs.spec)
    gradients = cpu.backward(inputs.dout, None, *args, out, lse, inputs.spec, Needs(True, False, False), False)
    assert [x is not None for x in gradients] == [True, False, False, False, False, False]


def test_unsupported_names_device_and_dtype() -> None:
    """A call it cannot take is refused with every reason."""
    q = torch.zeros(1, 1, 1, 8, device="meta", dtype=torch.int32)
    assert len(cpu.unsupported(q, q, q, Spec())) == 2
    q = torch.zeros(1, 1, 1, 8)
    assert cpu.unsupported(q, q, q, Spec()) == []


MEMORY = """
import resource, torch
from hf_flash_mc.ops import cpu
from hf_flash_mc.ops.spec import Needs, Spec
torch.set_num_threads(1)
S = 16384
q, k, v, dout = (torch.randn(1, 1, S, 64) for _ in range(4))
row = torch.arange(S, dtype=torch.int32)
spec = Spec({spec})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
def step(n):
    qkv = q[:, :, :n], k[:, :, :n], v[:, :, :n]
    small = spec if n == S else Spec()
    out, lse = cpu.forward(*qkv, small)
    cpu.backward(dout[:, :, :n], None, *qkv, out, lse, small, Needs(), False)
step(256)
before = peak()
step(S)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource.getrusage")
@pytest.mark.parametrize(
    "spec",
    [
        "causal=True",
        "key_ranges=torch.stack([row - row % 1000, row + 1], -1)[None, None]",
        "causal=True, window_left=1023, softcap=30.0, key_log_weight=torch.zeros(1, 1, S)",
    ],
    ids=["causal", "documents", "tiles"],
)
def test_memory_is_linear(spec: str) -> None:
    """16384 tokens, forward and backward: far below 1 GiB, which one S x S matrix of float32 is."""
    run = subprocess.run([sys.executable, "-c", MEMORY.format(spec=spec)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 300, f"{run.stdout.strip()} MiB of extra memory"
