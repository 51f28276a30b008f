"""A cell's tensors, and the right answer for a piece of them: the last batch entry and KV head (largest offsets)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_flash_mc.measure.cells import Cell
from hf_flash_mc.ops.reference import dropout_keep, reference_attention, visibility

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# the bound of the tests: 2 x the error of the same formula in the same dtype + this x max |exact|
TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-10}
NAMES = ("out", "dq", "dk", "dv")
_EXACT_PAIRS = 4096 * 8256  # of query and key, up to which the exact answer is in float64
_CHUNK = 2048


@dataclass
class Problem:
    """q, k, v as views of [B, S, H, D] memory, as transformers hands them over; packed: [T, H, D]."""

    cell: Cell
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    options: dict[str, Any]  # keyword arguments of flash_attention
    cu_seqlens: Tensor | None = None

    @property
    def packed(self) -> tuple[Any, ...]:
        """What flash_attention_varlen takes behind q, k and v."""
        return (self.cu_seqlens, self.cu_seqlens, self.cell.sq, self.cell.sk)

    def piece_of(self, x: Tensor, heads: int) -> Tensor:
        """[1, heads, S, D] of a tensor laid out like q (or k): the last sequence's last heads."""
        if self.cu_seqlens is None:
            return x[-1:, -heads:]
        return x[x.shape[0] - self.cell.lengths[-1] :, -heads:].transpose(0, 1)[None]


class Piece(NamedTuple):
    """q, dout [1, Hq / Hkv, Sq, D], k, v [1, 1, Sk, D], and the options of that part of the problem."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    options: dict[str, Any]


def make_problem(cell: Cell, device: torch.device, dtype: torch.dtype) -> Problem:
    """Normal values, seeded, drawn on the device."""
    generator = torch.Generator(device).manual_seed(0)
    packed = cell.feature == "packed"
    b, sq, sk = (1, sum(cell.lengths), sum(cell.lengths)) if packed else (cell.batch, cell.sq, cell.sk)
    sizes = [(sq, cell.q_heads), (sk, cell.kv_heads), (sk, cell.kv_heads), (sq, cell.q_heads)]
    tensors = [torch.randn(b, s, h, cell.head_dim, generator=generator, device=device, dtype=dtype) for s, h in sizes]
    if cell.feature == "times30":
        tensors[0] *= 30
    if packed:
        total = torch.tensor([0, *cell.lengths]).cumsum(0).to(torch.int32).to(device)
        q, k, v, dout = (x[0] for x in tensors)
        return Problem(cell, q, k, v, dout, {"causal": cell.causal}, total)
    q, k, v, dout = (x.transpose(1, 2) for x in tensors)
    return Problem(cell, q, k, v, dout, _options(cell, device, generator))


def _options(cell: Cell, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    options: dict[str, Any] = {"causal": cell.causal}
    if cell.feature == "ranges":  # that say causal
        last = torch.arange(cell.sk - cell.sq + 1, cell.sk + 1, device=device, dtype=torch.int32)
        options["key_ranges"] = torch.stack([torch.zeros_like(last), last], -1)[None, None]
    elif cell.feature == "weight":
        shape = (cell.batch, cell.kv_heads, cell.sk)
        options["key_log_weight"] = torch.randn(shape, generator=generator, device=device).requires_grad_()
    elif cell.feature == "sinks":
        options["sinks"] = torch.randn(cell.q_heads, generator=generator, device=device).requires_grad_()
    elif cell.feature == "softcap":
        options["softcap"] = 50.0
    elif cell.feature == "dropout":
        options |= {"dropout_p": 0.1, "dropout_seed": torch.tensor(12345678901, device=device)}
    return options


def piece(problem: Problem) -> Piece:
    cell, group = problem.cell, problem.cell.q_heads // problem.cell.kv_heads
    options = {n: x.detach() if isinstance(x, Tensor) else x for n, x in problem.options.items()}
    if "key_log_weight" in options:
        options["key_log_weight"] = options["key_log_weight"][-1:, -1:]
    if "sinks" in options:
        options["sinks"] = options["sinks"][-group:]
    if "dropout_p" in options:
        options["dropout_offsets"] = (cell.batch - 1, cell.q_heads - group, 0, 0)
    tensors = (problem.q, problem.k, problem.v, problem.dout)
    q, k, v, dout = (problem.piece_of(x, n) for x, n in zip(tensors, (group, 1, 1, group), strict=True))
    return Piece(q, k, v, dout, options)


def differentiate(attention: Attention, p: Piece, backward: bool = True) -> tuple[Tensor, ...]:
    """out, and with ``backward`` dq, dk and dv."""
    leaves = [x.detach().requires_grad_(backward) for x in (p.q, p.k, p.v)]
    out = attention(*leaves)
    return (out.detach(), *(torch.autograd.grad(out, leaves, p.dout.to(out.dtype)) if backward else ()))


def exact(p: Piece, backward: bool = True) -> tuple[Tensor, ...]:
    """out, dq, dk, dv by the definition in float64; in float32 and by chunks of rows for the longest plain pieces."""
    sq, sk = p.q.shape[2], p.k.shape[2]
    if sq * sk > _EXACT_PAIRS and not set(p.options) - {"causal"}:
        return _chunked(p) if backward else _chunked(p)[:1]
    wide = p._replace(**{n: getattr(p, n).double() for n in ("q", "k", "v", "dout")})
    return differentiate(lambda q, k, v: reference_attention(q, k, v, **p.options)[0], wide, backward)


def _chunked(p: Piece) -> tuple[Tensor, ...]:
    q, k, v, dout = (x.float() for x in p[:4])
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    sq, sk, scale = q.shape[2], k.shape[2], q.shape[3] ** -0.5
    column = torch.arange(sk, device=q.device)
    for start in range(0, sq, _CHUNK):
        rows = slice(start, min(start + _CHUNK, sq))
        logits = q[:, :, rows] @ k.transpose(-1, -2) * scale  # [1, H, rows, Sk]
        if p.options.get("causal"):
            row = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + sk - sq
            logits = logits.masked_fill(column > row, float("-inf"))
        weights = torch.softmax(logits, -1)
        out[:, :, rows] = weights @ v
        grad = dout[:, :, rows]
        dweights = grad @ v.transpose(-1, -2)
        delta = (weights * dweights).sum(-1, keepdim=True)
        dlogits = weights * (dweights - delta) * scale
        dq[:, :, rows] = dlogits @ k
        dk += (dlogits.transpose(-1, -2) @ q[:, :, rows]).sum(1, keepdim=True)
        dv += (weights.transpose(-1, -2) @ grad).sum(1, keepdim=True)
    return out, dq, dk, dv


def native(p: Piece, backward: bool = True) -> tuple[Tensor, ...]:
    """The textbook formula in the piece's own dtype: what rounding alone costs."""
    return differentiate(lambda q, k, v: _textbook(q, k, v, **p.options), p, backward)


def _textbook(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: Any = None, key_ranges: Tensor | None = None,
    mask: Tensor | None = None, bias: Tensor | None = None, key_log_weight: Tensor | None = None,
    alibi_slopes: Tensor | None = None, softcap: float | None = None, sinks: Tensor | None = None,
    dropout_p: float = 0.0, dropout_seed: Tensor | None = None, dropout_offsets: tuple[int, ...] = (0, 0, 0, 0),
) -> Tensor:  # fmt: skip
    b, h, sq, d = q.shape
    group, sk, device = h // k.shape[1], k.shape[2], q.device
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * d**-0.5  # [B, H, Sq, Sk]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if alibi_slopes is not None:
        distance = (torch.arange(sq, device=device)[:, None] + (sk - sq) - torch.arange(sk, device=device)).abs()
        logits = logits - (alibi_slopes.double().reshape(-1, h, 1, 1) * distance).to(q.dtype)
    if bias is not None:
        logits = logits + bias.to(q.dtype)
    if key_log_weight is not None:
        logits = logits + key_log_weight.repeat_interleave(h // key_log_weight.shape[1], 1)[:, :, None].to(q.dtype)
    seen = visibility(
        b, h, sq, sk, causal=causal, window=window, key_ranges=key_ranges, mask=mask, device=device
    )  # fmt: skip
    logits = logits.masked_fill(~seen, float("-inf")).to(torch.promote_types(q.dtype, torch.float32))
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(logits.dtype).reshape(1, h, 1, 1).expand(b, h, sq, 1)], -1)
    p = torch.softmax(logits, -1)[..., :sk].to(q.dtype)
    if dropout_p and dropout_seed is not None:
        batch, head, row, column = (
            (torch.arange(n, device=device) + o).reshape([-1 if i == j else 1 for j in range(4)])
            for i, (n, o) in enumerate(zip((b, h, sq, sk), dropout_offsets, strict=True))
        )
        keep = dropout_keep(dropout_seed, dropout_p, batch, head, row, column)
        p = torch.where(keep, p * (256 / (256 - round(256 * dropout_p))), 0)
    return p @ v


def error_and_bound(
    actual: Tensor, exact: Tensor, native: Tensor, dtype: torch.dtype | None = None
) -> tuple[float, float]:
    """max |actual - exact| (inf where actual is not finite), and the most it may be in ``dtype`` (None: actual's)."""
    dtype = dtype or actual.dtype
    actual, exact, native = (x.detach().double() for x in (actual, exact, native))
    error = (actual - exact).abs().amax().item() if actual.isfinite().all() else float("inf")
    return error, 2 * (native - exact).abs().amax().item() + TOLERANCE[dtype] * exact.abs().amax().item()


class Gate:
    """What an implementation must pass before it is timed: the project's error bound on a piece of the problem."""

    def __init__(self, problem: Problem):
        self.problem, self.piece = problem, piece(problem)
        self.backward = problem.cell.directions != ("forward",)
        self.exact, self.native = exact(self.piece, self.backward), native(self.piece, self.backward)

    def rms_error(self, out: Tensor) -> float:
        """Root mean square error of the output's piece."""
        group = self.problem.cell.q_heads // self.problem.cell.kv_heads
        return (self.problem.piece_of(out, group).double() - self.exact[0].double()).square().mean().sqrt().item()

    def failures(self, results: tuple[Tensor, ...]) -> list[str]:
        """What misses the bound, of out (and dq, dk, dv) of the whole problem."""
        group = self.problem.cell.q_heads // self.problem.cell.kv_heads
        found = []
        for name, x, heads, right, plain in zip(NAMES, results, (group, group, 1, 1), self.exact, self.native):  # noqa: B905
            error, bound = error_and_bound(self.problem.piece_of(x, heads), right, plain)
            if not error <= bound:
                found.append(f"{name} is off by {error:.1e}, {bound:.1e} is allowed")
        return found
