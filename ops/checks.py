"""What makes an attention call wrong, as readable reasons. Shapes, dtypes, devices and Python numbers; never values."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from .spec import Spec, Varlen, dropout_threshold

Problem = tuple[type[Exception], str]

GPU_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALL_DTYPES = (*GPU_DTYPES, torch.float64)
# impl -> dtypes, largest head dim (None: any)
LIMITS: dict[str, tuple[tuple[torch.dtype, ...], int | None]] = {
    "hopper": ((torch.float16, torch.bfloat16), 256),
    "triton": (GPU_DTYPES, 512),
    "cpu": (ALL_DTYPES, None),
    "reference": (ALL_DTYPES, None),
}
IMPLS = ("auto", "hopper", "triton", "cpu", "reference")
MAX_LENGTH = 2**31 - 1
INTEGERS = (int, torch.SymInt)
NUMBERS = (int, float, torch.SymInt, torch.SymFloat)

_OPTIONAL = Spec._fields[:6]
_WAY_OUT = {"mask": "pass numbers to add as bias=", "bias": "pass it as mask="}  # of each in the other's dtype
_DTYPES = {"key_ranges": (torch.int32,), "mask": (torch.bool,)}  # of the others: fp32 or q's
# what is said of the shape, and the shapes that do: batch, heads, g key heads, query rows, keys; upper case is exact
_DENSE_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("[B or 1, Hq or 1, Sq, 2]", ("bhQ2",)),
    ("a shape that broadcasts to [B, Hq, Sq, Sk]", ("bhqk",)),
    ("a shape that broadcasts to [B, Hq, Sq, Sk]", ("bhqk",)),
    ("[B or 1, Hkv or 1, Sk]", ("bgK",)),
    ("[Hq] or [B, Hq]", ("H", "BH")),
    ("[Hq]", ("H",)),
)
_PACKED_RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("[Tq, 2] or [Hq, Tq, 2]", ("hQ2",)),
    ("", ()),
    ("", ()),
    ("[Hkv or 1, Tk]", ("gK",)),
    ("[Hq] or [N, Hq]", ("H", "BH")),
    ("[Hq]", ("H",)),
)


def raise_problems(problems: list[Problem], name: str = "flash_attention") -> NoReturn:
    """One exception with every reason: of their common type, else a ValueError."""
    types = {kind for kind, _ in problems}
    kind = types.pop() if len(types) == 1 else ValueError
    lines = "".join(f"\n  - {text}" for _, text in problems)
    raise kind(f"{name}: {len(problems)} problem{'s' * (len(problems) > 1)} with this call{lines}")


def find_problems(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    impl: str,
    spec: Spec,
    varlen: Varlen | None = None,
    given: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """Every reason why this call cannot run; arguments as the ops take them. Safe under tracing: looks at no value.

    ``given``: tensors as the user passed them, whose shapes are named instead.
    """
    problems: list[Problem] = []
    say = problems.append
    tensors: tuple[tuple[str, Any], ...] = (("q", q), ("k", k), ("v", v))
    for name, x in tensors:
        if not isinstance(x, Tensor):
            say((TypeError, f"{name}: expected a torch.Tensor, got {type(x).__name__}"))
        elif x.is_nested or x.layout != torch.strided:
            packed = "pass its values() and offsets() to flash_attention_varlen"
            kind, way_out = ("nested", packed) if x.is_nested else (x.layout, "use to_dense()")
            say((TypeError, f"{name}: expected a dense tensor, got a {kind} one; {way_out}"))
    if problems:
        return problems
    layout = "[B, H, S, D]" if varlen is None else "[T, H, D]"
    for name, x in tensors:
        if x.dim() != (4 if varlen is None else 3):
            say((ValueError, f"{name}: expected {layout}, got {x.dim()} dimensions, shape {_shape(x)}"))
    if not problems:
        _check_shapes(q, k, v, varlen, say)
    known = not problems  # what the optional tensors must look like follows from q, k and v
    _check_types(q, k, v, impl, say)
    _check_numbers(spec, say, k.shape[0 if varlen is not None else 2] if known else 0)
    if known:
        if varlen is not None:
            _check_varlen(q, varlen, say)
        _check_options(q, k, spec, varlen, say, given)
    return problems


def options_fit(q: Tensor, k: Tensor, spec: Spec, varlen: Varlen | None) -> bool:
    """Whether the optional tensors are right, where everything else is known to be."""
    problems: list[Problem] = []
    if varlen is not None:
        _check_varlen(q, varlen, problems.append)
    _check_options(q, k, spec, varlen, problems.append)
    return not problems


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, varlen: Varlen | None, say: Callable[[Problem], None]) -> None:
    heads = 1 if varlen is None else -2
    hq, hkv = q.shape[heads], k.shape[heads]
    if varlen is None and not q.shape[0] == k.shape[0] == v.shape[0]:
        say((ValueError, f"q, k, v: expected one batch size, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}"))
    if hkv != v.shape[heads]:
        say((ValueError, f"k, v: expected the same number of heads, got {hkv} and {v.shape[heads]}"))
    if hq % hkv if hkv else hq:
        say((ValueError, f"q, k: expected query heads to be a multiple of key heads, got {hq} and {hkv}"))
    length = 2 if varlen is None else 0
    if _known(k.shape[length] != v.shape[length]):
        say((ValueError, f"k, v: expected the same length, got {k.shape[length]} and {v.shape[length]}"))
    if q.shape[-1] != k.shape[-1]:
        say((ValueError, f"q, k: expected the same head dim, got {q.shape[-1]} and {k.shape[-1]}"))
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        say((ValueError, f"q, v: expected head dims of at least 1, got {q.shape[-1]} and {v.shape[-1]}"))
    for name, x in (("q", q), ("k", k)):
        if isinstance(x.shape[length], int) and x.shape[length] > MAX_LENGTH:
            say((ValueError, f"{name}: expected at most {MAX_LENGTH} rows, got {x.shape[length]}"))


def _check_types(q: Tensor, k: Tensor, v: Tensor, impl: str, say: Callable[[Problem], None]) -> None:
    if not q.dtype == k.dtype == v.dtype:
        got = f"{q.dtype}, {k.dtype} and {v.dtype}"
        say((TypeError, f"q, k, v: expected one dtype, got {got}; cast them, or call under torch.autocast"))
    if not q.device == k.device == v.device:
        say((ValueError, f"q, k, v: expected one device, got {q.device}, {k.device} and {v.device}"))
    if impl not in IMPLS:
        say((ValueError, f"impl: expected one of {', '.join(map(repr, IMPLS))}, got {impl!r}"))
        return
    for reason in impl_problems(q, v, impl):
        say((NotImplementedError, f"impl={impl!r}: {reason}"))
    if q.dtype not in ALL_DTYPES:  # which no back end takes, whether or not one was asked for
        expected = ", ".join(map(str, ALL_DTYPES if q.device.type == "cpu" else GPU_DTYPES))
        say((NotImplementedError, f"q, k, v: expected {expected}, got {q.dtype}; cast them"))


def impl_problems(q: Tensor, v: Tensor, impl: str) -> list[str]:
    """Why this back end cannot take tensors of this device, dtype and head dim, and the way out."""
    reasons, kind = [], q.device.type
    if impl == "auto" and kind == "cuda":
        impl = "triton"  # which takes whatever the Hopper kernels take
    if impl not in LIMITS:
        return [f"no back end serves {kind} tensors; use impl='reference', or move them to a CPU or GPU"]
    dtypes, head_dim = LIMITS[impl]
    if impl == "hopper" and (kind != "cuda" or torch.cuda.get_device_capability(q.device)[0] != 9):
        reasons.append(f"expected tensors on a GPU of compute capability 9.0, got {q.device}; use impl='auto'")
    if impl == "cpu" and kind not in ("cpu", "meta"):
        reasons.append(f"expected CPU tensors, got {kind}; use impl='auto' or impl='triton'")
    if impl == "triton" and kind == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append("expected GPU tensors, got cpu (only TRITON_INTERPRET=1 runs them there); use impl='auto'")
    if q.dtype in ALL_DTYPES and q.dtype not in dtypes:
        way_out = "cast them, or use impl='reference'"
        reasons.append(f"expected q, k and v in {', '.join(map(str, dtypes))}, got {q.dtype}; {way_out}")
    if head_dim is not None and q.dim() in (3, 4) and not (q.shape[-1] <= head_dim and v.shape[-1] <= head_dim):
        got = f"{q.shape[-1]} and {v.shape[-1]}"
        reasons.append(f"expected head dims up to {head_dim}, got {got}; use impl='reference'")
    return reasons


def _check_numbers(spec: Spec, say: Callable[[Problem], None], keys: int = 0) -> None:
    scale, softcap, p = spec.scale, spec.softcap, spec.dropout_p
    causal: Any = spec.causal
    if not isinstance(causal, bool):
        say((TypeError, f"causal: expected True or False, got {causal!r:.60}"))
    numbers: tuple[tuple[str, Any], ...] = (("scale", scale), ("softcap", softcap), ("dropout_p", p))
    for name, x in numbers:
        if not isinstance(x, NUMBERS) and not (name == "scale" and x is None):
            way_out = "; multiply q by a scale that is a tensor" if name == "scale" else ""
            say((TypeError, f"{name}: expected a Python number, got {type(x).__name__}{way_out}"))
            return
    if scale is not None and not 0 < scale < float("inf"):
        say((ValueError, f"scale: expected a finite number > 0, or None for D ** -0.5, got {scale}"))
    # what users may not pass comes from api.py less 1, since softcap 0 and window -1 are what None becomes
    if not 0 <= softcap < float("inf"):
        got = softcap + 1 if softcap < 0 else softcap
        say((ValueError, f"softcap: expected a finite number > 0, or None for no cap, got {float(got):g}"))
    for side, x in (("left", spec.window_left), ("right", spec.window_right)):
        if _known(x < -1):
            say((ValueError, f"window: expected at least 0 on the {side}, or None for unbounded, got {x + 1}"))
    if not 0 <= p < 1:
        say((ValueError, f"dropout_p: expected a probability in [0, 1), got {p}"))
    elif p and not 0 < dropout_threshold(p) < 256:
        step = "p is quantised to steps of 1/256, and this one rounds to"
        say((ValueError, f"dropout_p: {step} {dropout_threshold(p) // 256}, got {p}; use 0 or 1/256 to 255/256"))
    if p and spec.dropout_seed is None:
        say((ValueError, "dropout_seed: expected an int64 tensor of one element where dropout_p > 0, got None"))
    _check_offsets(spec.dropout_offsets, keys, say)


def _check_offsets(offsets: Any, keys: int, say: Callable[[Problem], None]) -> None:
    if (
        not isinstance(offsets, (tuple, list))
        or len(offsets) != 4
        or not all(isinstance(x, INTEGERS) and not _known(x < 0) and not _known(x > MAX_LENGTH) for x in offsets)
    ):
        expected = f"four ints from 0 to {MAX_LENGTH} (batch, head, row, column)"
        say((ValueError, f"dropout_offsets: expected {expected}, got {offsets!r}"))
    elif _known(offsets[3] > 0) and _known(offsets[3] + keys > MAX_LENGTH):  # of no offset: no guard on a length
        say((ValueError, f"dropout_offsets: expected columns up to {MAX_LENGTH}, got {offsets[3]} + {keys} keys"))


def _known(condition: Any) -> bool:
    """Whether a condition holds; of a number that torch.compile does not know, such as ``x.item()``, it does not."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(condition)


def _check_options(
    q: Tensor,
    k: Tensor,
    spec: Spec,
    varlen: Varlen | None,
    say: Callable[[Problem], None],
    given: Mapping[str, Any] | None = None,
) -> None:
    """The optional tensors: type, device, dtype and shape."""
    if varlen is None:
        (b, hq, sq, _), (_, hkv, sk, _), rules = q.shape, k.shape, _DENSE_RULES
    else:
        (sq, hq, _), (sk, hkv, _), rules = q.shape, k.shape, _PACKED_RULES
        cu = varlen.cu_seqlens_q
        b = cu.shape[0] - 1 if isinstance(cu, Tensor) and cu.dim() == 1 else 0
    sizes = {"b": b, "B": b, "h": hq, "H": hq, "g": hkv, "q": sq, "Q": sq, "k": sk, "K": sk, "2": 2, "1": 1}
    for name, x, (layout, shapes) in zip(_OPTIONAL, spec[:6], rules, strict=True):
        if x is None:
            continue
        if not shapes:
            way_out = "use key_ranges, or pad and use flash_attention"
            say((NotImplementedError, f"{name}: packed sequences take none; {way_out}"))
        elif (
            _is_tensor(name, x, q, _DTYPES.get(name) or (torch.float32, q.dtype), say)
            and not _fits(x, shapes[0], sizes)
            and not _fits(x, shapes[-1], sizes)
        ):
            padding = name in _WAY_OUT and _fits(x, "11BK", sizes)  # as tokenizers make masks, [B, Sk]
            way_out = f"; of [B, Sk] pass {name}[:, None, None]" if padding else ""
            got = f"{_shape((given or {}).get(name, x))} with q {_shape(q)}, k {_shape(k)}"
            say((ValueError, f"{name}: expected {layout}, got shape {got}{way_out}"))
    if spec.block_rows is not None:
        _check_blocks(q, spec, sizes, varlen, say)
    if isinstance(spec.alibi_slopes, Tensor) and spec.alibi_slopes.requires_grad:
        say(
            (
                ValueError,
                "alibi_slopes: expected requires_grad=False, they have no gradient; to learn them, pass a bias",
            )
        )
    seed = spec.dropout_seed
    if seed is not None and _is_tensor("dropout_seed", seed, q, (torch.int64,), say) and seed.numel() != 1:
        say((ValueError, f"dropout_seed: expected one element, got shape {_shape(seed)}"))


def _check_blocks(
    q: Tensor, spec: Spec, sizes: dict[str, int], varlen: Varlen | None, say: Callable[[Problem], None]
) -> None:
    """The lists and bits of a block mask."""
    rows, columns, bits = spec.block_rows, spec.block_columns, spec.block_bits
    if varlen is not None:
        say((NotImplementedError, "mask: packed sequences take none; use key_ranges, or pad and use flash_attention"))
    elif spec.mask is not None or rows is None or columns is None or bits is None:
        say((ValueError, "mask: expected a bool mask or all three tensors of a block mask, got some of both"))
    elif all(_is_tensor("mask", x, q, (torch.int32,), say) for x in (rows, columns, bits)):
        cq, ck = (bits.shape[1] - 1, bits.shape[2] * 32) if bits.dim() == 3 else (0, 0)
        if cq not in (64, 128) or ck not in (64, 128):
            say((ValueError, f"mask: expected bits of blocks 64 or 128 long, got shape {_shape(bits)}"))
            return
        m, n = -(-sizes["q"] // cq), -(-sizes["k"] // ck)
        for x, shape in ((rows, (m, n + 1, 2)), (columns, (n, m + 1, 2))):
            planes = zip(x.shape, (sizes["b"], sizes["h"]), strict=False)
            if x.dim() != 5 or x.shape[2:] != shape or any(have != all_ and have != 1 for have, all_ in planes):
                say(
                    (
                        ValueError,
                        f"mask: expected a block mask of B or 1 times Hq or 1 planes of {m} x {n} blocks of {cq} x "
                        f"{ck}, got lists of shape {_shape(x)} with q {_shape(q)}",
                    )
                )


def _check_varlen(q: Tensor, varlen: Varlen, say: Callable[[Problem], None]) -> None:
    lengths = []
    for name, cu in (("cu_seqlens_q", varlen.cu_seqlens_q), ("cu_seqlens_k", varlen.cu_seqlens_k)):
        if _is_tensor(name, cu, q, (torch.int32,), say):
            if cu.dim() != 1:
                say((ValueError, f"{name}: expected [N + 1], got shape {_shape(cu)}"))
            else:
                lengths.append(cu.shape[0])
    if len(lengths) == 2 and (lengths[0] != lengths[1] or lengths[0] < 1):
        say((ValueError, f"cu_seqlens_q, cu_seqlens_k: expected one length N + 1, got {lengths[0]} and {lengths[1]}"))
    longest: tuple[tuple[str, Any], ...] = (
        ("max_seqlen_q", varlen.max_seqlen_q),
        ("max_seqlen_k", varlen.max_seqlen_k),
    )
    for name, n in longest:
        if not isinstance(n, INTEGERS):
            say((TypeError, f"{name}: expected an int, got {type(n).__name__}"))
        elif _known(n < 0):
            say((ValueError, f"{name}: expected at least 0, got {n}"))


def cu_seqlens_problems(q: Tensor, k: Tensor, varlen: Varlen) -> list[Problem]:
    """What is wrong with the values of cu_seqlens. Reads them: on a GPU this waits for the device."""
    problems: list[Problem] = []
    for side, cu, total, longest in (
        ("q", varlen.cu_seqlens_q, q.shape[0], varlen.max_seqlen_q),
        ("k", varlen.cu_seqlens_k, k.shape[0], varlen.max_seqlen_k),
    ):
        at = cu.tolist()
        steps = [b - a for a, b in itertools.pairwise(at)]
        if at[0] != 0 or at[-1] != total or any(n < 0 for n in steps):
            got = at if len(at) < 9 else [*at[:4], "...", *at[-4:]]
            text = f"expected to rise from 0 to {total}, the number of rows, got {got}"
            problems.append((ValueError, f"cu_seqlens_{side}: {text}"))
        elif max(steps, default=0) > longest:
            text = f"expected at least {max(steps)}, the longest sequence, got {longest}"
            problems.append((ValueError, f"max_seqlen_{side}: {text}"))
    return problems


def _is_tensor(name: str, x: Any, q: Tensor, dtypes: tuple[torch.dtype, ...], say: Callable[[Problem], None]) -> bool:
    if not isinstance(x, Tensor):
        say((TypeError, f"{name}: expected a torch.Tensor, got {type(x).__name__}"))
        return False
    if x.dtype not in dtypes:
        expected = " or ".join(map(str, dict.fromkeys(dtypes)))
        swapped = x.dtype == torch.bool if name == "bias" else x.is_floating_point()
        way_out = f"; {_WAY_OUT[name]}" if name in _WAY_OUT and swapped else ""
        say((TypeError, f"{name}: expected {expected}, got {x.dtype}{way_out}"))
    if x.device != q.device:
        say((ValueError, f"{name}: expected it on {q.device} with q, got {x.device}"))
    return True


def _fits(x: Tensor, shape: str, sizes: dict[str, int]) -> bool:
    """Whether each dimension has its size; one that the shape writes in lower case may also be 1."""
    if x.dim() != len(shape):
        return False
    for n, letter in zip(x.shape, shape, strict=True):
        # the size first: between equal symbols that is known without a guard
        other = n != sizes[letter]
        if other is not False and _known(other) and (n != 1 or letter.isupper()):
            return False
    return True


def _shape(x: Tensor) -> str:
    return str(tuple(x.shape))
