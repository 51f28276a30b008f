"""THE attention function that transformers calls under the key "mc_attention", and its registration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.comptime import comptime
from transformers import AttentionInterface, AttentionMaskInterface

from hf_flash_mc.ops import flash_attention

from .context_parallel import ContextParallel, spread_attention
from .masks import check_length, document_bounds, key_range_mask, split_mask
from .paged import is_paged, paged_attention

KEY = "mc_attention"  # "flash", "sdpa", "flex" or "/" in the key would change how transformers treats it

# What reaches attention functions through **kwargs and says nothing that the mask does not say already. The last three
# come from MusicGen's generate: sound that is encoded by then, with its padding, and the scale of the logits' mixture.
IGNORED_KWARGS = frozenset({
    "position_ids", "cache_position", "num_items_in_batch", "seq_idx", "position_embeddings", "input_ids", "labels",
    "encoder_hidden_states", "token_type_ids", "mm_token_type_ids", "logits_to_keep", "shift_labels", "input_values",
    "padding_mask", "guidance_scale",
})  # fmt: skip


@dataclass(frozen=True)
class Options:
    """The keyword arguments of patch_model."""

    fallback: str = "error"
    packing: str | None = None
    continuous_batching: bool = False
    context_parallel: ContextParallel | None = None


@dataclass
class ModuleRecord:
    """What a patched attention module carries as `_mc_record`: its options and what happened to it."""

    name: str
    options: Options
    tower: bool = False  # of what a composite model sees or hears, beside its text
    calls: int = 0  # eager calls
    compiled: bool = False  # traced into a graph, where calls are not counted
    fallbacks: int = 0
    fallback_reason: str | None = None


_DEFAULT = Options()


def mc_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: Tensor | None = None,
    indices: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: ``query: [B, Hq, Q, D]``, ``key: [B, Hkv, K, D]``, ``value: [B, Hkv, K, Dv]``.

    ``attention_mask`` is what `key_range_mask` made (int32), a user's 4-D bool or float mask, or None. Returns
    ``[B, Q, Hq, Dv]``, contiguous, and None: attention weights are never formed. What cannot be expressed raises
    NotImplementedError, or with fallback="sdpa" runs transformers' own sdpa function and is counted.
    """
    refuse_weights(output_attentions)
    if torch.jit.is_tracing():
        raise NotImplementedError("torch.jit.trace: it would keep this call's mask for all; use torch.export")
    record: ModuleRecord | None = getattr(module, "_mc_record", None)
    options = _DEFAULT if record is None else record.options
    if record is not None:
        if torch.compiler.is_compiling():
            comptime(_note_traced, partial(_note, record))
        else:
            record.calls += 1
    if query.shape[0] != key.shape[0]:  # learned queries shared by the whole batch
        query = query.expand(key.shape[0], -1, -1, -1)
    q_length, kv_length = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if s_aux is not None and s_aux.dtype not in (query.dtype, torch.float32):
        s_aux = s_aux.float()
    if is_paged(kwargs):
        absent = {"attention_mask": attention_mask, "position_bias": position_bias, "indices": indices}
        shared = {"softcap": softcap, "sinks": s_aux, "scale": scaling}
        kwargs |= {"cu_seq_lens_q": cu_seq_lens_q, "cu_seq_lens_k": cu_seq_lens_k}
        kwargs |= {"max_length_q": max_length_q, "max_length_k": max_length_k}
        ready = options.continuous_batching
        return paged_attention(module, ready, query, key, value, sliding_window, kwargs, shared, absent), None
    _reject_unknown(kwargs)
    slots = getattr(key, "slots", None)  # keys of a MegaContextCache know what may be seen: they are in no order
    if slots is not None and hasattr(slots, "attend"):  # keys of several sessions, or only a part of what is seen
        given = {"position_bias": position_bias, "indices": indices, "cu_seq_lens_q": cu_seq_lens_q}
        names = [name for name, x in given.items() if x is not None]
        if names:
            raise NotImplementedError(f"{', '.join(names)}: not over a session's keys")
        options_here = {"softcap": softcap, "sinks": s_aux, "scale": scaling, "dropout_p": dropout}
        return slots.attend(query, key, value, attention_mask, **options_here).transpose(1, 2).contiguous(), None
    if options.context_parallel is not None:
        absent = {"position_bias": position_bias, "indices": indices, "cu_seq_lens_q": cu_seq_lens_q, "slots": slots}
        shared = {"softcap": softcap, "sinks": s_aux, "scale": scaling, "dropout_p": dropout}
        out = spread_attention(
            options.context_parallel, options.packing, query, key, value, attention_mask, position_ids, causal,
            sliding_window, shared, absent,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None
    if slots is None:
        visible = _read_mask(attention_mask, q_length, kv_length, causal, sliding_window)
    else:
        visible = slots.visibility(query, attention_mask)
    if indices is not None:
        if options.packing is not None:
            raise NotImplementedError(
                'packing="position_ids": this model\'s indexer chooses keys among those of all documents. Way out: '
                "leave packing out, and give position_ids, but neither mask nor cache"
            )
        visible = _select(visible, indices, q_length, kv_length)
    bias = _add_biases(visible.pop("bias", None), position_bias, query.dtype)
    described = _describe_this_call(module, record, attention_mask, causal, q_length == kv_length)
    if (
        described
        and cu_seq_lens_q is not None
        and (attention_mask is None or (options.packing is None and slots is None and q_length == kv_length))
    ):
        cu_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        if visible.get("window") is not None and q_length != kv_length:
            raise NotImplementedError("cu_seq_lens_q and cu_seq_lens_k that differ, together with a sliding window")
        _cut_to_sequences(visible, cu_seq_lens_q, cu_k, query.shape[0], q_length, kv_length)
    elif (
        described
        and slots is None
        and (
            options.packing == "position_ids"
            or (attention_mask is None and causal and position_ids is not None and q_length == kv_length)
        )
    ):  # without a mask (DeepSpeed's Ulysses drops it) packing is in the position ids alone
        visible["key_ranges"] = _ranges_of_positions(position_ids, visible, query.shape[0], q_length, kv_length)
    try:
        out = flash_attention(
            query, key, value, bias=bias, softcap=softcap, sinks=s_aux, scale=scaling, dropout_p=dropout, **visible
        )
    except NotImplementedError as reason:
        if slots is not None:
            raise  # sdpa knows neither gists' weights nor slots
        _check_fallback(reason, record, options, softcap, s_aux)
        return _sdpa(module, query, key, value, visible, bias, dropout, scaling)
    return out.transpose(1, 2).contiguous(), None


def _describe_this_call(
    module: nn.Module, record: ModuleRecord | None, mask: Tensor | None, causal: bool, square: bool
) -> bool:
    """Whether boundaries and positions that reach a call are those of its queries and keys.

    Composite models hand those of their text on to vision towers and cross attention, too.
    """
    if record is not None and record.tower:
        return False
    if causal or mask is not None:
        return True
    return square and "Cross" not in type(module).__name__ and not getattr(module, "is_cross_attention", False)


def _add_biases(bias: Tensor | None, position_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Of a mask and of positions, in a dtype that the ops take."""
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    return bias if bias is None or bias.dtype in (dtype, torch.float32) else bias.float()


def _check_fallback(
    reason: Exception, record: ModuleRecord | None, options: Options, softcap: float | None, sinks: Tensor | None
) -> None:
    """Count a call that sdpa takes over; NotImplementedError where it may or can not."""
    if options.fallback != "sdpa":
        raise NotImplementedError(
            f'{reason} (or patch_model(..., fallback="sdpa") to run such calls on torch\'s sdpa)'
        ) from reason
    if softcap is not None or sinks is not None:
        raise NotImplementedError(f"{reason}; sdpa cannot take over: it has neither softcap nor sinks") from reason
    if record is not None and not torch.compiler.is_compiling():
        record.fallbacks += 1
        record.fallback_reason = str(reason)


def _note(record: ModuleRecord) -> None:
    record.compiled = True


def _note_traced(context: Any) -> None:
    """Runs while dynamo traces `mc_attention`, on the record itself: the graph holds no trace of it.

    A traced assignment would be a side effect, which checkpointing forbids inside a layer; a counter would recompile
    at every call.
    """
    _note(context.get_local("record")._i_will_not_complain_if_bc_breaks_VariableTracker().value)


def refuse_weights(output_attentions: bool | None) -> None:
    """Raise NotImplementedError if attention weights are asked for."""
    if output_attentions:
        raise NotImplementedError(
            "output_attentions=True: mc_attention never forms the attention weights. Way out: unpatch_model(model) and "
            'model.set_attn_implementation("eager")'
        )


def _select(visible: dict[str, Any], indices: Tensor, q_length: int, kv_length: int) -> dict[str, Any]:
    """Visibility cut to the keys an indexer chose for each row, ``indices: [B, Q, chosen]``; dense, as in stock."""
    if indices.dim() != 3 or indices.shape[1] != q_length or not isinstance(visible.get("mask"), (Tensor, type(None))):
        raise NotImplementedError(
            f"indices: expected [B, {q_length}, chosen] with a dense mask, got {list(indices.shape)}"
        )
    chosen = indices.new_zeros((indices.shape[0], q_length, kv_length), dtype=torch.bool)
    chosen = chosen.scatter(-1, indices.long(), True)[:, None]
    mask = visible.get("mask")
    return {**visible, "mask": chosen if mask is None else mask & chosen}


def _reject_unknown(kwargs: dict[str, Any]) -> None:
    unknown = [
        name
        for name, given in kwargs.items()
        if isinstance(given, (Tensor, float)) and name not in IGNORED_KWARGS and not name.startswith("output_")
    ]
    if unknown:
        raise NotImplementedError(
            f"attention arguments {unknown}: mc_attention does not know them, and leaving them out could "
            "silently change the result. Expected only arguments it implements; way out: unpatch_model(model), and "
            "report the model"
        )


def _read_mask(mask: Any, q_length: int, kv_length: int, causal: bool, sliding_window: int | None) -> dict[str, Any]:
    """The visibility arguments of `flash_attention` that an attention mask of any kind stands for."""
    if mask is None:
        if causal and q_length > kv_length:
            raise NotImplementedError(
                f"attention_mask=None with {q_length} causal queries over {kv_length} keys: their alignment is "
                "undefined; pass a mask"
            )
        window = None if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
        return {"causal": causal, "window": window}
    if not isinstance(mask, Tensor):  # a BlockMask of flex attention
        return {"mask": mask}
    if mask.dim() != 4:
        raise ValueError(
            f"attention_mask: expected 4 dimensions [B, H, Q, K], got {list(mask.shape)}; 2-D padding goes to the model"
        )
    if mask.dtype == torch.int32:
        if not torch.compiler.is_compiling():
            check_length(mask, kv_length)
        ranges, weight = split_mask(mask, q_length, kv_length)
        return {"key_ranges": ranges, "key_log_weight": weight}
    if mask.dtype == torch.bool:
        return {"mask": mask}
    if mask.is_floating_point():
        return {"bias": mask}
    raise TypeError(
        f"attention_mask: expected bool (True = seen) or floating point (added to the scores), got {mask.dtype}"
    )


def _cut_to_sequences(visible: dict, cu_q: Tensor, cu_k: Tensor, batch: int, q_length: int, kv_length: int) -> None:
    """Cut what is visible to packed sequences with boundaries ``cu_q``, ``cu_k`` [N + 1], bottom-right causal.

    They count all rows of the batch, one after the other, as FlashAttention's do.
    """
    first = torch.arange(batch, device=cu_q.device)[:, None]
    row = first * q_length + torch.arange(q_length, device=cu_q.device)  # [B, Q]
    sequence = (torch.searchsorted(cu_q, row, right=True) - 1).clamp(0, cu_q.shape[0] - 2)
    lo, hi = cu_k[sequence].long(), cu_k[sequence + 1].long()
    if visible.pop("causal", False):
        hi = torch.maximum(lo, torch.minimum(hi, hi + row - cu_q[sequence + 1].long() + 1))
    lo, hi = lo - first * kv_length, hi - first * kv_length
    ranges = visible.get("key_ranges")  # [B or 1, H or 1, Q, 2]
    lo, hi = lo[:, None], hi[:, None]
    if ranges is not None:
        lo, hi = torch.maximum(lo, ranges[..., 0].long()), torch.minimum(hi, ranges[..., 1].long())
    visible["key_ranges"] = torch.stack((lo, hi), -1).to(torch.int32)


def _ranges_of_positions(
    position_ids: Tensor | None, visible: dict, batch: int, q_length: int, kv_length: int
) -> Tensor:
    """packing="position_ids": the call's key ranges cut to the documents that restarting position ids describe.

    A document starts wherever the ids do not go up by one. With a cache (Q < K) a row reaches back from its own key,
    the last of its causal range, to the document's start.
    """
    if position_ids is None or position_ids.dim() != 2:
        got = None if position_ids is None else list(position_ids.shape)
        raise NotImplementedError(
            f'packing="position_ids": the attention needs position_ids [B, Q] from the model, got {got}'
        )
    position_ids = position_ids.expand(batch, -1)
    breaks = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
    documents = breaks.long().cumsum(-1)
    start, end = document_bounds(documents)
    ranges = visible.get("key_ranges")
    if q_length != kv_length:
        if ranges is None:
            raise NotImplementedError(
                'packing="position_ids" over a cache needs a causal mask of key ranges, not a dense mask'
            )
        reach = (
            torch.arange(q_length, device=start.device) - start + torch.where(documents == 0, position_ids[:, :1], 0)
        )
        end = ranges[:, 0, :, 1].long()
        start = end - 1 - reach
    if ranges is not None:
        start = torch.maximum(start, ranges[:, 0, :, 0].long())
        end = torch.minimum(end, ranges[:, 0, :, 1].long())
    return torch.stack((start, end), -1).to(torch.int32)[:, None]


def _sdpa(module, query, key, value, visible: dict, bias: Tensor | None, dropout: float, scaling: float | None):
    """transformers' sdpa function with a dense mask of the same meaning."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q_length, kv_length = query.shape[2], key.shape[2]
    row = torch.arange(q_length, device=query.device)[:, None] + (kv_length - q_length)
    column = torch.arange(kv_length, device=query.device)[None]
    seen = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=query.device)
    left, right = visible.get("window") or (None, None)
    if visible.get("causal"):
        right = 0
    if left is not None:
        seen = seen & (column >= row - left)
    if right is not None:
        seen = seen & (column <= row + right)
    ranges, weight = visible.get("key_ranges"), visible.get("key_log_weight")
    if ranges is not None:
        seen = seen & (column >= ranges[..., :1]) & (column < ranges[..., 1:])
    if weight is not None:
        seen = seen & (weight == 0)[:, :, None]
    if visible.get("mask") is not None:
        seen = seen & visible["mask"]
    mask = seen if bias is None else torch.where(seen, bias.to(query.dtype), torch.finfo(query.dtype).min)
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=False)


def register() -> None:
    """Put both functions into transformers' registries; the only global change this package makes. Idempotent."""
    AttentionInterface.register(KEY, mc_attention)
    AttentionMaskInterface.register(KEY, key_range_mask)
