"""The public attention functions: arguments brought into one form, checked, and sent to the ops in library.py."""

from __future__ import annotations

import inspect
import os
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import checks, library, paged, repeat
from .spec import Paged, Spec, Varlen

_NO_OFFSETS = (0, 0, 0, 0)
_INF = float("inf")
# what "auto" is for tensors of a device type: "auto" again where ops/auto.py chooses call by call, below the op;
# a meta tensor's call only has a shape
_AUTO = {"cpu": "cpu", "cuda": "auto", "xpu": "triton", "meta": "reference"}
_DENSE = ("cpu", "reference")  # those for which a block mask becomes a bool mask
_SERVED = {("cpu", "cpu"), ("cuda", "auto"), ("cuda", "hopper"), ("cuda", "triton"), ("xpu", "triton")}


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_ranges: Tensor | None = None,
    mask: Any = None,
    bias: Tensor | None = None,
    key_log_weight: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    dropout_offsets: tuple[int, int, int, int] = _NO_OFFSETS,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    """softmax(scale * q k^T + ...) v, exactly, in memory linear in the sequence lengths.

    The logits are scale * q.k, soft-capped, plus ALiBi, bias and key_log_weight. The visibility rules (causal, window,
    key_ranges, mask) intersect. A row that sees no key gives out 0 and lse -inf (or its sink), and gradients of 0.
    A logit of -2.36e38 or less is -inf: the lowest number of float32 or bfloat16 as bias removes a key. (Not so
    float16's, -65504. On a GPU the gradients of rows whose keys are all at -1e9 or so are wrong, since lse cannot
    tell how many they are; as in torch's.)

    Args:
        q: ``[B, Hq, Sq, D]``, any strides; fp16, bf16 or fp32 (fp64 on the CPU). Under autocast q, k and v are cast.
        k: ``[B, Hkv, Sk, D]``; Hq must be a multiple of Hkv, query head h reads key head h // (Hq // Hkv).
        v: ``[B, Hkv, Sk, Dv]``.
        causal: row i sees keys up to i + Sk - Sq (aligned at the bottom right).
        window: ``(left, right)``: row i sees keys from i + Sk - Sq - left to i + Sk - Sq + right; None is unbounded.
        key_ranges: int32 ``[B or 1, Hq or 1, Sq, 2]``: row i sees keys lo <= j < hi, clamped to [0, Sk].
        mask: bool, True = seen, broadcastable to ``[B, Hq, Sq, Sk]``; or a flex_attention BlockMask of B or 1 times
            Hq or 1 masks, or what ``ops.evaluate_block_mask`` makes of one: on a GPU the cost follows its density.
        bias: broadcastable to ``[B, Hq, Sq, Sk]``; differentiable. It and the next four: fp32 or q's dtype.
        key_log_weight: ``[B or 1, Hkv or 1, Sk]``: the key weighs like exp(w) keys, -inf removes it; differentiable.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]``: adds -slope * |i + Sk - Sq - j|; no gradient.
        softcap: c * tanh(logits / c); None for no cap.
        sinks: ``[Hq]``: one more logit for each row, whose value is 0; differentiable.
        scale: None for D ** -0.5. A scale that is learned belongs into q.
        dropout_p: probability of dropping a weight, in steps of 1/256; applies whenever it is not 0.
        dropout_seed: an int, an int64 tensor of one element, or None to draw one on the device.
        dropout_offsets: global (batch, head, row, column) of this call's first element, for shards of one attention.
        return_lse: also return the log-sum-exp of each row's visible logits and sink; differentiable.
        impl: "auto", "hopper", "triton", "cpu" or "reference". A named one runs or raises.

    Returns:
        out ``[B, Hq, Sq, Dv]``, on memory ``[B, Sq, Hq, Dv]``; with return_lse also lse ``[B, Hq, Sq]``, fp32.

    Raises:
        ValueError, TypeError, NotImplementedError: with every reason why this call cannot run. Under torch.compile
            shapes, dtypes and Python numbers are checked just so, while tracing.

    Source: Dao, "FlashAttention-2" (2023). The definition in code: ``hf_flash_mc/ops/reference.py``.
    """
    compiling = torch.compiler.is_compiling()
    kind = q.device.type if isinstance(q, Tensor) else ""
    if not compiling and _autocast(kind):
        q, k, v = library.autocast_qkv(kind, q, k, v)
    signature: tuple[Any, ...] = ()
    if (
        not compiling
        and kind in repeat.KINDS
        and key_ranges is mask is bias is key_log_weight is alibi_slopes is sinks is None
        and dropout_offsets is _NO_OFFSETS
        and library.may_repeat(q, k, v)
    ):
        signature = repeat.signature(q, k, v, (causal, window, softcap, scale, dropout_p, impl))
        if (call := repeat.find(signature)) is not None:
            out, lse = library.repeated(call, q, k, v)
            return (out, lse) if return_lse else out
    if impl == "auto":
        impl = _AUTO.get(kind, "auto")
    left, right = (-1, -1) if window is None else _window(window)
    cap = 0.0 if softcap is None else _softcap(softcap)
    seed = _seed(dropout_seed, q) if dropout_p else None
    blocks: tuple[Tensor | None, ...] = (None, None, None)
    whole_mask, whole_bias = mask, bias
    if mask is not None:
        if not isinstance(mask, Tensor):
            mask, blocks = _read_mask(mask, q, k, impl)
        whole_mask = _four_dims(mask)
    if bias is not None:
        whole_bias = _four_dims(bias)
    options = (
        key_ranges, whole_mask, whole_bias, key_log_weight, alibi_slopes, sinks, seed, *blocks,
        scale, causal, left, right, cap, dropout_p, dropout_offsets,
    )  # fmt: skip
    if not compiling:  # there the fakes check
        _check(q, k, v, kind, impl, options, None, mask, bias)
    out, lse = library.attention(q, k, v, impl, *options)
    if signature and seed is None:
        library.keep(signature, q, k, v, impl, options)
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_ranges: Tensor | None = None,
    mask: None = None,
    bias: None = None,
    key_log_weight: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    dropout_offsets: tuple[int, int, int, int] = _NO_OFFSETS,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    """``flash_attention`` of sequences that are packed one after the other, without padding.

    Sequence i is rows ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]`` of q, and likewise of k and v. Arguments not
    listed mean what they mean in ``flash_attention``; positions count from the start of each sequence.

    Args:
        q: ``[Tq, Hq, D]``; k: ``[Tk, Hkv, D]``; v: ``[Tk, Hkv, Dv]``.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 ``[N + 1]``, rising from 0 to Tq and Tk. Their values are checked in
            eager on the CPU, and on a GPU with ``HF_FLASH_MC_CHECKS=1`` (a check waits for the device).
        max_seqlen_q, max_seqlen_k: at least the longest sequence; Python ints.
        key_ranges: int32 ``[Tq, 2]`` or ``[Hq, Tq, 2]``, local to the sequence.
        key_log_weight: ``[Hkv or 1, Tk]``. alibi_slopes: ``[Hq]`` or ``[N, Hq]``.
        mask, bias: raise; packed sequences take neither.

    Returns:
        out ``[Tq, Hq, Dv]``; with return_lse also lse ``[Hq, Tq]``.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``flash_attention``.
    """
    compiling = torch.compiler.is_compiling()
    kind = q.device.type if isinstance(q, Tensor) else ""
    if impl == "auto":
        impl = _AUTO.get(kind, "auto")
    if not compiling and _autocast(kind):
        q, k, v = library.autocast_qkv(kind, q, k, v)
    left, right = (-1, -1) if window is None else _window(window)
    cap = 0.0 if softcap is None else _softcap(softcap)
    seed = _seed(dropout_seed, q) if dropout_p else None
    if key_ranges is not None and isinstance(key_ranges, Tensor) and key_ranges.dim() == 2:
        key_ranges = key_ranges[None]
    cu_seqlens_q, cu_seqlens_k = _int32(cu_seqlens_q), _int32(cu_seqlens_k)
    packed = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = (
        key_ranges, mask, bias, key_log_weight, alibi_slopes, sinks, seed, None, None, None,
        scale, causal, left, right, cap, dropout_p, dropout_offsets,
    )  # fmt: skip
    if not compiling:
        _check(q, k, v, kind, impl, options, Varlen(*packed))
    out, lse = library.attention(q, k, v, *packed, impl, *options)
    return (out, lse) if return_lse else out


def flash_attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    key_ranges: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    """``flash_attention`` over keys and values that lie in blocks of a pool, as vLLM and FlashAttention keep them.

    Key j of sequence b is row ``j % block_size`` of block ``block_table[b, j // block_size]``. Everything else counts
    from the sequence's own length: causal row i sees keys up to i + seqlens_k[b] - Sq. For inference: a backward
    through it raises. The number of launched programs follows from shapes alone, so one CUDA graph serves while
    lengths and tables change.

    Args:
        q: ``[B, Hq, Sq, D]``, any strides. Under autocast it is cast to the caches' dtype.
        k_cache: ``[blocks, block_size, Hkv, D]``, any block size; on a GPU the last dimension must be contiguous.
        v_cache: ``[blocks, block_size, Hkv, Dv]``.
        block_table: int32 or int64 ``[B, most blocks of a sequence]``; columns behind a sequence's end are not read.
        seqlens_k: int32 or int64 ``[B]``. Values of both are checked in eager on the CPU, and on a GPU with
            ``HF_FLASH_MC_CHECKS=1``; unchecked, lengths are clamped to what the table has room for, and the keys of a
            block whose number is outside the pool are seen by nobody.
        causal, window, alibi_slopes, softcap, sinks, scale, return_lse: as in ``flash_attention``.
        key_ranges: int32 ``[B or 1, Hq or 1, Sq, 2]``, local to the sequence.
        impl: "auto", "triton", "cpu" or "reference"; the last two gather the blocks.

    Returns:
        out ``[B, Hq, Sq, Dv]``, on memory ``[B, Sq, Hq, Dv]``; with return_lse also lse ``[B, Hq, Sq]``.

    Raises:
        ValueError, TypeError, NotImplementedError: as ``flash_attention``.

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).
    """
    compiling = torch.compiler.is_compiling()
    kind = q.device.type if isinstance(q, Tensor) else ""
    if impl == "auto":
        impl = "triton" if kind == "cuda" else _AUTO.get(kind, "auto")
    if not compiling and _autocast(kind) and isinstance(k_cache, Tensor):
        q = q.to(k_cache.dtype)
    left, right = (-1, -1) if window is None else _window(window)
    table = Paged(_int32(block_table), _int32(seqlens_k))
    cap = 0.0 if softcap is None else _softcap(softcap)
    options = (key_ranges, alibi_slopes, sinks, scale, causal, left, right, cap)
    if not compiling:  # there the fake checks
        problems = paged.find_problems(q, k_cache, v_cache, table, impl, paged.make_spec(options))
        if not problems and _may_read(table.block_table) and _may_read(table.seqlens_k):
            problems = paged.value_problems(k_cache, table)
        if problems:
            checks.raise_problems(problems, paged.NAME)
    out, lse = paged.attention(q, k_cache, v_cache, *table, impl, *options)
    return (out, lse) if return_lse else out


class Explanation(NamedTuple):
    """What ``impl="auto"`` would choose. ``impl`` is None where nothing would run."""

    impl: str | None
    reasons: list[str]

    def __str__(self) -> str:
        return "\n".join([self.impl or "no back end", *(f"  - {reason}" for reason in self.reasons)])


def explain_attention(q: Tensor, k: Tensor, v: Tensor, *, impl: str = "auto", **options: Any) -> Explanation:
    """Which back end the call with these arguments would run on, and why; runs nothing.

    Args:
        q, k, v, options: as for ``flash_attention``, or ``flash_attention_varlen`` where cu_seqlens_q is among them.

    Returns:
        Explanation: ``.impl`` and ``.reasons``; prints as a list.
    """
    function = flash_attention_varlen if "cu_seqlens_q" in options else flash_attention
    inspect.signature(function).bind(q, k, v, impl=impl, **options)  # raises as the call would
    kind = q.device.type if isinstance(q, Tensor) else ""
    chosen: str = _AUTO.get(kind, "auto") if impl == "auto" else impl
    reasons = [f"impl={impl!r} was asked for"] if impl != "auto" else []
    if _autocast(kind):
        q, k, v = library.autocast_qkv(kind, q, k, v)
    try:
        spec, varlen = _describe(q, k, options, chosen)
    except (TypeError, ValueError, NotImplementedError) as error:
        return Explanation(None, [*reasons, str(error)])
    if chosen in _DENSE and options.get("mask") is not None and spec.mask is None:
        reasons.append("mask: here a BlockMask becomes a dense mask of memory Sq * Sk; key_ranges would cost O(Sq)")
    found = checks.find_problems(q, k, v, chosen, spec, varlen, options)
    if varlen is not None and not found and _may_read(varlen.cu_seqlens_q) and _may_read(varlen.cu_seqlens_k):
        found = checks.cu_seqlens_problems(q, k, varlen)
    problems = [text for _, text in found]
    if not problems:
        back_end = library.back_end(chosen)
        problems = back_end.unsupported(q, k, v, spec, varlen)
        if chosen == "auto" and not problems:
            chosen, why_not = back_end.choose(q, k, v, spec, varlen)
            reasons += [f"not on hopper: {reason}" for reason in why_not]
        if chosen == "hopper" and not problems:
            reasons += library.back_end("hopper").notes(q, k, v, spec, varlen)
    if problems:
        return Explanation(None, reasons + problems)
    return Explanation(chosen, _WHY.get(chosen, []) + reasons if impl == "auto" else reasons)


_WHY = {
    "cpu": ["CPU tensors run on the exact CPU back end"],
    "hopper": ["tensors on a GPU of compute capability 9.0 run on the Hopper kernels"],
    "triton": ["tensors on this GPU run on the portable Triton kernels"],
    "reference": ["meta tensors only have shapes: nothing is computed"],
}


def _describe(q: Tensor, k: Tensor, options: dict[str, Any], impl: str) -> tuple[Spec, Varlen | None]:
    """The Spec of these keyword arguments; block masks are not evaluated, only stood in for. Raises as the call does
    where an argument has no place in a Spec."""
    options = dict(options)
    options.pop("return_lse", None)
    varlen = None
    if "cu_seqlens_q" in options:
        varlen = Varlen(*(options.pop(name) for name in Varlen._fields))
        varlen = varlen._replace(cu_seqlens_q=_int32(varlen.cu_seqlens_q), cu_seqlens_k=_int32(varlen.cu_seqlens_k))
        ranges = options.get("key_ranges")
        if isinstance(ranges, Tensor) and ranges.dim() == 2:
            options["key_ranges"] = ranges[None]
    window = options.pop("window", None)
    options["window_left"], options["window_right"] = (-1, -1) if window is None else _window(window)
    options["softcap"] = _softcap(options.get("softcap"))
    seed = options.get("dropout_seed")  # drawn anew only in calls: a description moves no generator
    options["dropout_seed"] = _seed(0 if seed is None else seed, q) if options.get("dropout_p") else None
    options["bias"] = _four_dims(options.get("bias"))
    mask = options.get("mask")
    if mask is not None and not isinstance(mask, Tensor):
        from .block_mask import stand_ins

        mask, blocks = stand_ins(mask, q, k, impl in _DENSE)
        options["block_rows"], options["block_columns"], options["block_bits"] = blocks
    options["mask"] = _four_dims(mask)
    return Spec(**options), varlen


def _check(
    q: Any,
    k: Any,
    v: Any,
    kind: str,
    impl: str,
    options: tuple[Any, ...],
    varlen: Varlen | None = None,
    mask_given: Any = None,
    bias_given: Any = None,
) -> None:
    """Raise every reason why an eager call cannot run; the usual call passes in two or three microseconds."""
    ranges, mask, bias, weight, slopes, sinks, seed, blocks, *_ = options
    problems = []
    if not (
        _is_plain(q, k, v, kind, impl, options, varlen)
        and (
            (varlen is None and ranges is mask is bias is weight is slopes is sinks is seed is blocks is None)
            or checks.options_fit(q, k, Spec(*options), varlen)
        )
    ):
        given = {"mask": mask_given, "bias": bias_given}
        problems = checks.find_problems(q, k, v, impl, Spec(*options), varlen, given)
    if varlen is not None and not problems and _may_read(varlen.cu_seqlens_q) and _may_read(varlen.cu_seqlens_k):
        problems = checks.cu_seqlens_problems(q, k, varlen)
    if problems:
        checks.raise_problems(problems, "flash_attention" if varlen is None else "flash_attention_varlen")


def _is_plain(q: Any, k: Any, v: Any, kind: str, impl: str, options: tuple[Any, ...], varlen: Varlen | None) -> bool:
    """Whether q, k, v, impl and the numbers are right, in one pass; False also where that takes a closer look."""
    try:
        if not q.layout is k.layout is v.layout is torch.strided:
            return False
        if varlen is None:
            bq, hq, sq, dq = q.shape
            bk, hk, sk, dk = k.shape
            bv, hv, sv, dv = v.shape
        else:
            (sq, hq, dq), (sk, hk, dk), (sv, hv, dv) = q.shape, k.shape, v.shape
            bq = bk = bv = 1
    except (AttributeError, ValueError, RuntimeError):  # a nested tensor has no shape
        return False
    scale, causal, left, right, cap, dropout_p, offsets = options[10:]
    dtype, device = q.dtype, q.device
    return (
        bq == bk == bv
        and hk == hv
        and sk == sv
        and dq == dk
        and 0 < dq <= 256
        and 0 < dv <= 256
        and hk > 0
        and hq % hk == 0
        and sq <= checks.MAX_LENGTH >= sk
        and dtype == k.dtype == v.dtype
        and dtype in checks.GPU_DTYPES
        and device == k.device == v.device
        and (kind, impl) in _SERVED
        and dropout_p == 0
        and offsets is _NO_OFFSETS
        and type(causal) is bool
        and left >= -1 <= right
        and (type(cap) is float and 0 <= cap < _INF)
        and (scale is None or (type(scale) is float and 0 < scale < _INF))
    )


def _autocast(kind: str) -> bool:
    return kind not in ("", "meta") and torch.is_autocast_enabled(kind)  # torch raises for these two


def _window(window: Any) -> tuple[int, int]:
    """(left, right) with -1 for unbounded; a negative number less 1, which the checks refuse. No sequence is longer
    than MAX_LENGTH, and a position plus sys.maxsize would overflow."""
    if (
        not isinstance(window, (tuple, list))
        or len(window) != 2
        or not all(x is None or (isinstance(x, checks.INTEGERS) and not isinstance(x, bool)) for x in window)
    ):
        raise TypeError(f"window: expected (left, right), each an int >= 0 or None for unbounded, got {window!r}")
    left, right = window
    return (
        -1 if left is None else min(left, checks.MAX_LENGTH) if left >= 0 else left - 1,
        -1 if right is None else min(right, checks.MAX_LENGTH) if right >= 0 else right - 1,
    )


def _softcap(softcap: Any) -> Any:
    """0 for no cap; what is no cap less 1, which the checks refuse."""
    if softcap is None:
        return 0.0
    number = isinstance(softcap, checks.NUMBERS)
    return softcap - 1.0 if number and not softcap > 0 else softcap


def _seed(seed: Any, q: Tensor) -> Any:
    """The seed as a tensor: drawing and filling happen on the device, in the graph where there is one."""
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)
    if isinstance(seed, Tensor):
        return seed
    if not isinstance(seed, checks.INTEGERS):
        raise TypeError(f"dropout_seed: expected an int, an int64 tensor or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"dropout_seed: expected an int of 64 bits, from -2**63 to 2**63 - 1, got {seed}")
    return torch.full((), cast(int, seed), dtype=torch.int64, device=q.device)


def _four_dims(x: Any) -> Any:
    """Leading dimensions of size 1 until there are four; what is no tensor is left to the checks."""
    return x[(None,) * (4 - x.dim())] if isinstance(x, Tensor) and x.dim() < 4 else x


def _read_mask(mask: Any, q: Tensor, k: Tensor, impl: str) -> tuple[Any, tuple[Tensor | None, ...]]:
    from .block_mask import read_mask

    return read_mask(mask, q, k, impl in _DENSE)


def _int32(x: Any) -> Any:
    """Lengths and tables as the ops take them; a list of lengths also without gaps, which kernels do not expect."""
    if not isinstance(x, Tensor):
        return x
    x = x.to(torch.int32) if x.dtype == torch.int64 else x
    return x.contiguous() if x.dim() == 1 else x


def _may_read(cu_seqlens: Tensor) -> bool:
    """Whether values may be looked at: plain tensors, and on a GPU only if asked, because reading waits for it."""
    if type(cu_seqlens) is not Tensor or torch._C._are_functorch_transforms_active():
        return False
    if cu_seqlens.device.type == "cpu":
        return True
    return not cu_seqlens.is_meta and os.environ.get("HF_FLASH_MC_CHECKS") == "1"
