"""The accuracy suite behind ``hf-flash-mc check``: fixed cases against float64, values and all gradients."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_flash_mc.measure import problem as problems
from hf_flash_mc.measure import warm
from hf_flash_mc.measure.problem import Piece, error_and_bound
from hf_flash_mc.measure.progress import Progress, text_table

HALF = "half"  # bfloat16 on a GPU, float32 on a CPU
IMPLS = ("auto", "hopper", "triton", "cpu", "reference")
SECONDS = 300.0  # after which a case that hangs is given up


@dataclass(frozen=True)
class Case:
    """One call: sizes (batch, query heads, KV heads, queries, keys, head dim), the options by name, and the dtype."""

    name: str
    sizes: tuple[int, int, int, int, int, int]
    options: tuple[str, ...] = ()
    dtype: str = HALF
    lengths: tuple[int, ...] = ()  # of packed sequences
    scale: float = 1.0  # of the queries


CASES = [
    Case("full, head dim 64", (2, 4, 4, 257, 257, 64)),
    Case("causal, head dim 64, GQA", (2, 4, 2, 257, 257, 64), ("causal",)),
    Case("full, head dim 128", (1, 4, 4, 190, 317, 128)),
    Case("causal, head dim 128, GQA", (1, 8, 2, 317, 317, 128), ("causal",)),
    Case("causal, head dim 256", (1, 2, 2, 200, 200, 256), ("causal",)),
    Case("causal, head dim 512", (1, 2, 1, 70, 90, 512), ("causal",)),
    Case("causal, head dim 80", (1, 2, 1, 130, 190, 80), ("causal",)),
    Case("logits times 30", (1, 2, 2, 257, 257, 64), ("causal",), scale=30.0),
    Case("float16", (1, 2, 2, 257, 257, 128), ("causal",), "float16"),
    Case("float32", (1, 2, 2, 111, 111, 64), ("causal",), "float32"),
    Case("sliding window", (1, 2, 2, 300, 300, 64), ("causal", "window")),
    Case("key_ranges (packed documents)", (2, 2, 2, 257, 257, 64), ("causal", "key_ranges")),
    Case("key_log_weight", (2, 4, 2, 70, 257, 64), ("key_log_weight",)),
    Case("sinks and window", (1, 4, 2, 257, 257, 64), ("causal", "window", "sinks")),
    Case("softcap", (1, 2, 2, 257, 257, 128), ("causal", "softcap")),
    Case("ALiBi", (1, 4, 4, 190, 190, 64), ("causal", "alibi_slopes")),
    Case("bias with gradient", (2, 2, 2, 111, 130, 64), ("bias",)),
    Case("boolean mask", (2, 2, 2, 111, 130, 64), ("mask",)),
    Case("dropout", (1, 2, 2, 190, 190, 64), ("causal", "dropout_p")),
    Case("packed sequences", (3, 2, 2, 190, 190, 64), ("causal",), lengths=(190, 1, 130)),
    Case("windows of 32", (64, 4, 4, 32, 32, 64)),
    Case("8 keys", (2, 4, 4, 600, 8, 64)),
    Case("8 queries", (2, 4, 4, 8, 600, 64)),
    Case("decode, GQA", (2, 8, 2, 1, 1111, 128)),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Errors and bounds by name ("out", "dq", ...); ``problem`` says why there are none."""

    case: Case
    dtype: str
    back_end: str
    errors: dict[str, tuple[float, float]]
    seconds: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and all(error <= bound for error, bound in self.errors.values())

    @property
    def worst(self) -> tuple[str, float]:
        """The largest share of its bound, and whose it is."""
        return max(((n, error / bound if bound else float(error > 0)) for n, (error, bound) in self.errors.items()),
                   key=lambda pair: pair[1], default=("", 0.0))  # fmt: skip


def run_case(job: tuple[Case, str, str]) -> Outcome:
    """One case on a device, by a back end."""
    case, device, impl = job
    start = time.monotonic()
    half = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    dtype = half if case.dtype == HALF else getattr(torch, case.dtype)
    label = str(dtype).removeprefix("torch.")
    back_end = impl
    try:
        tensors, options = make_case(case, torch.device(device), dtype)
        back_end, errors = _errors(case, tensors, options, impl)
        return Outcome(case, label, back_end, errors, time.monotonic() - start)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]  # one line: the reasons begin in the second
        return Outcome(case, label, back_end, {}, time.monotonic() - start, text)


def make_case(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v, dout on [B, S, H, D] memory and the options of the call; drawn on the CPU: the same everywhere."""
    b, hq, hkv, sq, sk, d = case.sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def grad(x: Tensor) -> Tensor:
        return x.float().to(device).requires_grad_()

    tensors = [draw(b, s, h, d).transpose(1, 2) for s, h in ((sq, hq), (sk, hkv), (sk, hkv), (sq, hq))]
    tensors[0] = tensors[0] * case.scale
    makers: dict[str, Callable[[], Any]] = {
        "causal": lambda: True,
        "window": lambda: (63, 0),
        "key_ranges": lambda: _documents(sk)[None, None].expand(b, 1, sq, 2).contiguous().to(device),
        "key_log_weight": lambda: grad(draw(b, hkv, sk)),
        "sinks": lambda: grad(draw(hq)),
        "softcap": lambda: 20.0,
        "alibi_slopes": lambda: (draw(hq).abs() * 0.1).float().to(device),
        "bias": lambda: grad(draw(1, hq, sq, sk)),
        "mask": lambda: (draw(b, 1, sq, sk) > -0.6).to(device),
        "dropout_p": lambda: 0.25,
    }
    options = {name: makers[name]() for name in case.options}
    if "dropout_p" in options:
        options["dropout_seed"] = torch.tensor(12345678901, device=device)
    return [x.to(dtype).to(device) for x in tensors], options


def _documents(length: int) -> Tensor:
    """int32 [length, 2]: three documents, each row sees its own."""
    ends = torch.tensor([length // 4, length // 4 + 70, length])
    row = torch.arange(length)
    at = torch.searchsorted(ends, row, right=True)
    return torch.stack([torch.cat([torch.zeros(1, dtype=torch.int64), ends])[at], ends[at]], -1).to(torch.int32)


def _errors(
    case: Case, tensors: list[Tensor], options: dict[str, Any], impl: str
) -> tuple[str, dict[str, tuple[float, float]]]:
    """Which back end ran, and the errors of out and every gradient."""
    from hf_flash_mc.ops import explain_attention, flash_attention, flash_attention_varlen

    q, k, v, dout = tensors
    extra = {n: x for n, x in options.items() if isinstance(x, Tensor) and x.requires_grad}
    names = ("out", "dq", "dk", "dv", *(f"d{n}" for n in extra))
    if case.lengths:
        parts = [[x[i : i + 1, :, :n] for x in tensors] for i, n in enumerate(case.lengths)]
        q, k, v, dout = (torch.cat([p[j][0].transpose(0, 1) for p in parts]) for j in range(4))
        cu = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32).to(q.device)
        packed: dict[str, Any] = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 190, "max_seqlen_k": 190}
        call = partial(flash_attention_varlen, **packed, **options, impl=impl)
        found = _differentiate(call, q, k, v, dout, [])
        explained = explain_attention(q, k, v, impl=impl, **packed, **options)
        pieces = [Piece(p[0], p[1], p[2], p[3], options) for p in parts]
        exact, native = (_joined([f(p) for p in pieces]) for f in (problems.exact, problems.native))
    else:
        leaves = list(extra.values())
        found = _differentiate(lambda *x: flash_attention(*x, **options, impl=impl), q, k, v, dout, leaves)
        explained = explain_attention(q, k, v, impl=impl, **options)
        q_, k_, v_, dout_ = (x.double() for x in tensors)
        exact = _differentiate(lambda *x: problems.reference_attention(*x, **options)[0], q_, k_, v_, dout_, leaves)
        native = _differentiate(lambda *x: problems._textbook(*x, **options), q, k, v, dout, leaves)
    errors = {n: error_and_bound(x, e, t, q.dtype) for n, x, e, t in zip(names, found, exact, native, strict=True)}
    return explained.impl or "none", errors


def _joined(results: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """[1, H, S, D] of each sequence, by result, one after the other as [T, H, D]."""
    return [torch.cat([x[0].transpose(0, 1) for x in of_all]) for of_all in zip(*results, strict=True)]


def _differentiate(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, extra: list[Tensor]
) -> list[Tensor]:
    """out, dq, dk, dv and the gradients of ``extra``."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [*leaves, *extra], dout)]


def run_suite(device: str, impl: str = "auto", pattern: str = "") -> list[Outcome]:
    """Every case whose name holds ``pattern``; on a GPU in parallel processes, because each compiles for seconds.

    Raises:
        ValueError: where no case has such a name, or no back end, or this one does not run on such a device.
    """
    from hf_flash_mc.ops import explain_attention

    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    probe = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
    explained = explain_attention(probe, probe, probe, impl=impl)
    if explained.impl is None:
        raise ValueError("; ".join(explained.reasons[impl != "auto" :]))  # behind that it was asked for
    cases = [c for c in CASES if pattern.lower() in c.name.lower()]
    if not cases:
        raise ValueError(
            f"only: expected a part of a case's name, got {pattern!r}; the cases: {'; '.join(c.name for c in CASES)}"
        )
    jobs = {c.name: (c, device, impl) for c in cases}
    if torch.device(device).type == "cuda":
        found = warm.in_parallel("checking", run_case, jobs, SECONDS, warm.STALL)
        late = "no result: the process ended or ran into the time limit"
        return [_outcome(found.get(c.name, late), c) for c in cases]
    outcomes = []
    with Progress("checking", len(jobs)) as bar:
        for name, job in jobs.items():
            outcomes.append(run_case(job))
            bar.step(name)
    return outcomes


def _outcome(found: Any, case: Case) -> Outcome:
    return found if isinstance(found, Outcome) else Outcome(case, case.dtype, "none", {}, 0.0, str(found))


def report(outcomes: list[Outcome]) -> str:
    """One table: the errors of out and of the worst tensor as shares of their bounds, and the verdict."""
    rows = []
    for x in outcomes:
        name, share = x.worst
        out = x.errors.get("out", (float("nan"), 1.0))
        verdict = "ok" if x.ok else x.problem or f"FAILED: {name}"
        shown = [f"{out[0]:.1e}", f"{share:.2f} ({name})"] if x.errors else ["-", "-"]
        rows.append([x.case.name, x.dtype, x.back_end, *shown, f"{x.seconds:.1f}", verdict])
    return text_table(["case", "dtype", "back end", "error of out", "worst, of its bound", "s", "result"], rows)
