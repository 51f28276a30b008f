"""The Triton kernels on calls that once went wrong, on both forms of the backward, and the launch plans around them.

Interpreted on the CPU, real on a GPU. The drawn cases are in test_property.py.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers import Case, check_results, make_inputs, run_case
from torch.nn.attention.flex_attention import create_block_mask

pytest.importorskip("triton")

from hf_flash_mc.ops import evaluate_block_mask, flash_attention, flash_attention_varlen
from hf_flash_mc.ops.portable import launch, plan, shapes
from hf_flash_mc.ops.portable.common import narrow_parts, split_head_dim
from hf_flash_mc.ops.spec import Needs, Spec
from hf_flash_mc.ops.tuning import Config, largest_head_dim, lookup
from hf_flash_mc.ops.tuning.tables import TABLE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not plan.INTERPRETED, reason="needs a GPU, or TRITON_INTERPRET=1 before triton is imported"
)
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def general_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those for special shapes, which would take most of these small calls: test_triton_shapes.py has them."""
    monkeypatch.setattr(shapes, "ENABLED", False)


ONCE_WRONG = {
    "softcap's slope of a NaN key reached dK": Case(
        dtype=FP16, Hq=4, Sq=2, Sk=15, D=37, causal=True, window=(5, None), softcap=2.0, sinks=True, dlse=True,
        strides="sliced", poison=True, seed=534,
    ),
    "a lone sink lost bits in lse, so its row was not known to be blind": Case(
        Sq=70, Sk=7, D=1, window=(40, 1), sinks=True, poison=True, seed=178
    ),
    "the same under a mask and dropout": Case(
        Sq=57, Sk=17, D=2, Dv=1, mask="bq", softcap=2.0, sinks=True, dropout_p=0.1, dropout_offsets=(1, 2, 300, 37),
        dlse=True, poison=True, seed=2055,
    ),
    "a hostile lower bound overflowed when rounded up to a tile": Case(
        dtype=BF16, B=3, Hq=4, Sq=2, Sk=1, D=24, Dv=1, key_ranges="hostile", ranges_shape="bh", softcap=10.0, dlse=True,
        strides="expanded", poison=True, seed=9100,
    ),
    "D 100 with Dv 40, held in parts, lost the first part on an H100": Case(
        dtype=BF16, Hq=4, Sq=1, Sk=66, D=100, Dv=40, key_log_weight="h-", strides="lastdim", poison=True, seed=95
    ),
    "ranges with holes between rows": Case(Sq=70, Sk=70, key_ranges="random", ranges_shape="h", poison=True, seed=5),
}  # fmt: skip


@pytest.mark.parametrize("case", ONCE_WRONG.values(), ids=ONCE_WRONG.keys())
def test_once_wrong(case: Case) -> None:
    run_case(case, "triton", DEVICE)


@pytest.mark.parametrize(
    "case",
    [
        Case(Hq=4, Sq=45, Sk=37, D=40, causal=True, dlse=True),
        Case(Hq=4, key_ranges="packed", ranges_shape="h", poison=True),
        Case(key_log_weight="h-", softcap=5.0, dropout_p=0.2, poison=True),
        Case(varlen=((5, 9), (0, 3), (33, 17)), causal=True, sinks=True, poison=True),
    ],
    ids=lambda c: f"{c.Sq}x{c.Sk}-{c.key_ranges or c.key_log_weight or c.varlen or 'causal'}",
)
def test_fused_backward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """dQ by atomics, which no table chooses, gives the same gradients."""
    monkeypatch.setenv("HF_FLASH_MC_BACKWARD", "fused")
    run_case(case, "triton", DEVICE)


BIG = [
    Case(dtype=BF16, Hkv=1, Sq=20, Sk=37, D=512, causal=True, dlse=True),
    Case(Sq=17, Sk=20, D=500, Dv=260, window=(9, None), softcap=5.0, sinks=True, strides="sliced", poison=True),
    Case(dtype=FP16, Sq=20, Sk=20, D=384, Dv=64, key_ranges="packed", bias="hqk", strides="lastdim"),
    Case(dtype=BF16, D=320, varlen=((5, 9), (0, 3), (20, 17)), causal=True, poison=True),
]


@pytest.mark.parametrize("form", ["split", "fused"])
@pytest.mark.parametrize("case", BIG, ids=lambda c: c.id)
def test_head_dims_above_256(case: Case, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_MC_BACKWARD", form)
    run_case(case, "triton", DEVICE)


def test_every_architecture_has_tiles_for_its_head_dims() -> None:
    """512, or in float32 what 99 KiB of shared memory hold; beyond, the error says so."""
    found = {arch: (largest_head_dim(arch, False), largest_head_dim(arch, True)) for arch in TABLE}
    assert found.pop("sm86") == (512, 384)
    assert set(found.values()) == {(512, 512)}
    q = torch.zeros(1, 1, 2, 512, device=DEVICE)
    with mock.patch.object(launch, "architecture", return_value="sm86"):
        assert launch.unsupported(q, q, q, Spec()) == [
            "head dim 512: the Triton kernels take up to 384 in torch.float32 on sm86"
        ]
    with pytest.raises(ValueError, match=r"head_dim: expected at most 384 .* on sm86 in float32, got 512; use"):
        lookup("dq", "sm86", True, 512)


def test_above_256_what_would_spill_takes_half_the_keys() -> None:
    q = torch.zeros(1, 1, 40, 512, dtype=BF16)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    keys = {}
    with mock.patch.object(plan, "architecture", return_value="sm90"):
        for name, spec in {"causal": Spec(causal=True), "softcap": Spec(softcap=5.0), "mask": Spec(mask=mask)}.items():
            made = plan.Plan(q, q, q, spec, None)
            keys[name] = [made.variant(kind)[0].BLOCK_N for kind in ("fwd", "dkdv", "dq")]
    assert keys == {"causal": [64, 32, 32], "softcap": [64, 16, 32], "mask": [32, 16, 32]}


def test_deterministic_backward_ignores_the_fused_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FLASH_MC_BACKWARD", "fused")
    monkeypatch.setattr(launch, "attn_bwd_finish", None)  # the fused form ends with it
    inputs = make_inputs(Case(), DEVICE)
    call = (inputs.q, inputs.k, inputs.v)
    out, lse = launch.forward(*call, inputs.spec)
    found = launch.backward(inputs.dout, None, *call, out, lse, inputs.spec, Needs(), True)
    assert found.dq is not None
    assert found.dq.isfinite().all()


@pytest.mark.parametrize(
    ("d", "parts"),
    [(1, (16,)), (40, (32, 16)), (80, (64, 16)), (96, (64, 32)), (112, (64, 32, 16)), (192, (128, 64)), (256, (256,)),
     (320, (256, 64)), (500, (512,))],
)  # fmt: skip
def test_head_dim_parts(d: int, parts: tuple[int, ...]) -> None:
    """Powers of two from 16 up that cover D, without padding to the next power."""
    assert split_head_dim(d) == parts


@pytest.mark.parametrize("d", [1, 16, 31, 33, 48, 80, 96, 100, 256, 500])
def test_float32_parts_cover_the_head_dim(d: int) -> None:
    """Parts of 32 and one of 16 at most, with less than 16 columns to spare."""
    parts = narrow_parts(d)
    assert set(parts[:-1]) <= {32}
    assert 0 <= sum(parts) - d < 16


def test_plans_follow_the_signature() -> None:
    """Equal signatures share a plan; other strides, numbers or a tensor more do not."""
    q = torch.randn(1, 2, 33, 16, device=DEVICE)
    first = plan.plan_of(q, q, q, Spec(causal=True), None)
    assert plan.plan_of(q.clone(), q, q, Spec(causal=True), None) is first
    others = [
        plan.plan_of(q.transpose(1, 2).contiguous().transpose(1, 2), q, q, Spec(causal=True), None),
        plan.plan_of(q, q, q, Spec(causal=True, scale=0.5), None),
        plan.plan_of(q, q, q, Spec(causal=True, sinks=torch.zeros(2, device=DEVICE)), None),
    ]
    assert all(p is not first for p in others)
    assert len({id(p) for p in others}) == 3


def test_any_tile_size_gives_the_same_values() -> None:
    """The table decides speed alone."""
    case = Case(Sq=45, Sk=70, D=24, causal=True, key_ranges="padded", dlse=True)
    inputs = make_inputs(case, DEVICE)
    call = (inputs.q, inputs.k, inputs.v)
    for m, n in ((16, 32), (64, 16)):
        config = Config(m, n, 4, 1)
        configs = dict.fromkeys(("fwd", "dkdv", "dq"), config)
        out, lse = launch.forward(*call, inputs.spec, configs=configs)
        found = launch.backward(inputs.dout, inputs.dlse, *call, out, lse, inputs.spec, Needs(), True, configs=configs)
        grads = {"dq": found.dq, "dk": found.dk, "dv": found.dv}
        check_results({"out": out, "lse": lse, **grads}, inputs, case, f"tiles {m} x {n}")


def test_misaligned_pointers_after_aligned_ones() -> None:
    """A kernel compiled for aligned pointers is kept, and must not run on others."""
    memory = torch.randn(4 * 33 * 16 + 1, device=DEVICE)
    for shift in (0, 0, 1):
        x = memory[shift : shift + 33 * 16].view(1, 1, 33, 16)
        out, _ = launch.forward(x, x, x, Spec())
        logits = (x.double() @ x.double().transpose(-1, -2)) * 16**-0.5
        torch.testing.assert_close(out.double(), logits.softmax(-1) @ x.double(), rtol=0, atol=1e-5)


def gapped(x: torch.Tensor) -> torch.Tensor:
    """The same values with something else between them."""
    return torch.stack([x, torch.full_like(x, 77)], -1)[..., 0]


@pytest.mark.parametrize("special", [False, True], ids=["general", "by-shape"])
@pytest.mark.parametrize("name", ["sinks", "alibi_slopes", "key_log_weight"])
def test_small_tensors_of_any_strides(name: str, special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink for each head was read as if sinks lay side by side."""
    monkeypatch.setattr(shapes, "ENABLED", special)
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 9, 16, generator=gen).to(DEVICE).requires_grad_() for _ in range(3))
    x = torch.randn((1, 4, 9) if name == "key_log_weight" else (4,), generator=gen).to(DEVICE)
    found = []
    for given in (x, gapped(x)):
        given = given.detach().requires_grad_(name != "alibi_slopes")
        wanted = (q, k, v, given) if given.requires_grad else (q, k, v)
        out, lse = flash_attention(q, k, v, **{name: given}, return_lse=True, impl="triton")
        found.append((out, lse, *torch.autograd.grad(out.sum() + lse.sum(), wanted)))
    for close, apart in zip(*found, strict=True):
        assert torch.equal(close, apart)


def test_lengths_of_any_strides() -> None:
    """Columns of a table of lengths, say."""
    q = torch.randn(7, 2, 16, device=DEVICE)
    cu = torch.tensor([0, 3, 7], dtype=torch.int32, device=DEVICE)
    for bounds in (cu, cu.long()):
        out = [flash_attention_varlen(q, q, q, x, x, 4, 4, impl="triton") for x in (bounds, gapped(bounds))]
        assert torch.equal(*out)


def test_bits_of_a_block_mask_may_be_strided() -> None:
    """Also where a call with the same mask on plain memory came before."""
    lists = evaluate_block_mask(create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 130, 130, DEVICE, BLOCK_SIZE=64))
    q = torch.randn(1, 2, 130, 16, device=DEVICE)
    plan.forget()
    out = [flash_attention(q, q, q, mask=x, impl="triton") for x in (lists, lists._replace(bits=gapped(lists.bits)))]
    assert torch.equal(*out)
