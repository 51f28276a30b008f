"""patch_model, unpatch_model, patched, patch_report: which models run on mc_attention, and what happened there."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from . import continuous_batching as batching
from .attention import KEY, ModuleRecord, Options, refuse_weights, register
from .context_parallel import add_hooks, check_spreadable, read_context_parallel
from .models import ADAPTED, adapter_of, uses_interface
from .packing import is_tower, refuse_recurrence
from .support import CAUSAL_BY_NAME, HARMLESS_CLASSES, REFUSED, wants_dense_masks

_READS_MASK = re.compile(r"(attention|causal)_mask\w*\.dtype\s*[!=]=\s*torch\.bool|causal_mask\w*\.to\(dtype")


@dataclass(frozen=True)
class PatchReport:
    """What patch_model did to a model and what ran since.

    ``calls``: eager calls of each attention module; ``compiled``: modules traced into a compiled graph (not counted
    there), with all layers of their stack, which may share it; ``not_reached``: modules that no forward reached yet;
    ``skipped``: modules left to transformers, with the reason; ``fallbacks``: calls handed to sdpa, with
    ``fallback_reasons``.
    """

    model: str
    patched: bool
    options: dict[str, Any] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    compiled: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    fallback_reasons: tuple[str, ...] = ()

    @property
    def attention_modules(self) -> int:
        return len(self.calls)

    @property
    def not_reached(self) -> tuple[str, ...]:
        return tuple(name for name, calls in self.calls.items() if not calls and name not in self.compiled)

    def __str__(self) -> str:
        if not self.patched:
            return f"{self.model}: not patched"
        ran = self.attention_modules - len(self.not_reached)
        lines = [f"{self.model}: {self.attention_modules} attention modules run {KEY}, {ran} of them reached so far"]
        if ran and self.not_reached:
            lines.append(f"  reached by no forward so far: {', '.join(self.not_reached)}")
        lines += [f"  left to transformers: {name}: {reason}" for name, reason in self.skipped.items()]
        if self.fallbacks:
            lines.append(
                f"  {sum(self.fallbacks.values())} calls fell back to sdpa: {'; '.join(self.fallback_reasons)}"
            )
        return "\n".join(lines)


@dataclass
class _State:
    """What unpatching needs; lies on the patched PreTrainedModel as `_mc_state`."""

    options: Options
    records: list[tuple[nn.Module, ModuleRecord]]
    skipped: dict[str, str]
    adapted: list[tuple[nn.Module, type]]  # modules whose class an adapter replaced, and their former class
    hooks: list[RemovableHandle]
    # former config object, the copy that replaced it, and the copy's attributes at that time
    configs: list[tuple[PreTrainedConfig, PreTrainedConfig, dict[str, Any]]]
    claim: batching.Claim | None  # with continuous_batching
    held_by: str = ""  # the call that must come before unpatching, as MegaContext stands on a patched model

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A patched model that another process unpickles (torch.load, spawned workers) finds its functions there."""
        register()
        vars(self).update(state)


def patch_model(
    model: Any,
    *,
    fallback: str = "error",
    packing: str | None = None,
    continuous_batching: bool = False,
    context_parallel: Any = None,
) -> Any:
    """Run a transformers model's attention on hf_flash_mc, in place; returns the model.

    ``model``: a model (also wrapped: DDP, FSDP, PEFT, torch.compile), or a class (AutoModelForCausalLM,
    LlamaForCausalLM, ...), of which a subclass comes back whose from_pretrained and from_config patch what they load.

    ``fallback``: what happens to a call that the ops cannot express: "error" raises, "sdpa" runs transformers' sdpa
    with an equivalent mask and counts it in the report. ``packing="position_ids"``: documents packed into a row are
    kept apart by their restarting position ids even where a mask or a cache is given, which transformers ignores
    (models with recurrent layers are refused: those would still mix documents).
    ``continuous_batching=True``: generate_batch runs on the ops too, over transformers' paged cache; without it, it
    raises. transformers decides by name which attention may batch continuously, so functions of it are wrapped while
    such a model is patched. For models of other attention they do what they did, and with the last one unpatched (or
    deleted) the originals are back. Calls that a CUDA graph replays are not in the report.
    ``context_parallel``: a 1-D DeviceMesh, a process group or a ``ContextParallel``: for training with the sequence
    spread over these ranks by ring attention (or Ulysses); ``shard_batch`` cuts batches.

    Nothing else global changes except that the key "mc_attention" is registered. The model gets copies of its config
    objects, so that another model built from the same config is left alone. Patching twice with the
    same options does nothing.

    Raises NotImplementedError for a family that would not be exact, naming it and why; ValueError if there is nothing
    to patch or the model is patched with other options; TypeError for what is no transformers model.
    """
    if fallback not in ("error", "sdpa"):
        raise ValueError(f'fallback: expected "error" or "sdpa", got {fallback!r}')
    if packing not in (None, "position_ids"):
        raise ValueError(f'packing: expected None or "position_ids", got {packing!r}')
    if context_parallel is not None:
        context_parallel = read_context_parallel(context_parallel)
        if continuous_batching:
            raise NotImplementedError("continuous_batching, context_parallel: the former generates, the latter trains")
        if fallback == "sdpa":
            raise NotImplementedError('fallback="sdpa", context_parallel: sdpa sees no other rank\'s keys')
    options = Options(fallback, packing, continuous_batching, context_parallel)
    register()
    if isinstance(model, type):
        return _patched_class(model, options)
    root = find_root(model)
    state: _State | None = getattr(root, "_mc_state", None)
    if state is not None:
        if state.options != options:
            raise ValueError(
                f"model: already patched with {state.options}, got {options}; call unpatch_model(model) first"
            )
        return model
    inside = [
        name for name, module in root.named_modules() if hasattr(module, "_mc_record") or hasattr(module, "_mc_state")
    ]
    if inside:
        raise ValueError(f"model: {inside[0]!r} inside it belongs to a patched model; unpatch that one first")
    _apply(model, root, options)
    return model


def unpatch_model(model: Any) -> Any:
    """Undo patch_model exactly; returns the model (or, for a patched class, the class it came from).

    Settings changed on the model's config while it was patched are kept. ValueError if it is not patched, RuntimeError
    if a MegaContext is attached or continuous batching still runs; managers that were made for it do not start again.
    """
    if isinstance(model, type):
        if "_mc_base" not in vars(model):
            raise ValueError(f"model: {model.__name__} is not a class that patch_model returned")
        return vars(model)["_mc_base"]
    root = find_root(model)
    state: _State | None = getattr(root, "_mc_state", None)
    if state is None:
        raise ValueError(f"model: {type(root).__name__} is not patched")
    if state.held_by:
        raise RuntimeError(f"model: {type(root).__name__} must stay patched; call {state.held_by} first")
    if state.claim is not None:
        state.claim.end(root)
    former = {id(ours): old for old, ours, _ in state.configs}
    for old, ours, before in state.configs:
        if KEY in str(ours._attn_implementation_internal):
            ours._attn_implementation_internal = old._attn_implementation_internal
        for name in before.keys() - vars(ours).keys():
            delattr(old, name)
        for name, now in vars(ours).items():
            if name not in before or before[name] is not now:
                vars(old)[name] = former.get(id(now), now)
    _swap_configs([model, root], former)
    for handle in state.hooks:
        handle.remove()
    _restore_copies([model, root], state)
    for module, cls in state.adapted:
        _change_class(module, cls)
    for module, _ in _records(root, state):
        vars(module).pop("_mc_record", None)
    vars(root).pop("init_continuous_batching", None)
    del root._mc_state
    return model


def hold(model: Any, by: str) -> None:
    """Let unpatch_model refuse until ``by``, a call, was made; an empty text lets go."""
    state: _State = find_root(model)._mc_state  # type: ignore[assignment]
    state.held_by = by


def unpatch_held(model: Any, by: str) -> None:
    """unpatch_model for whoever holds the model; where that fails, it is held as before."""
    hold(model, "")
    try:
        unpatch_model(model)
    except BaseException:
        hold(model, by)
        raise


@contextmanager
def patched(model: nn.Module, **options: Any) -> Iterator[nn.Module]:
    """``with patched(model): ...``: patch_model on entry, unpatch_model on exit, also after an exception.

    A model that is patched already stays so.
    """
    mine = getattr(find_root(model), "_mc_state", None) is None
    patch_model(model, **options)
    try:
        yield model
    finally:
        if mine and hasattr(find_root(model), "_mc_state"):  # the body may have unpatched it
            unpatch_model(model)


def patch_report(model: nn.Module) -> PatchReport:
    """What is patched in this model, what was skipped and why, and how often each attention module was called."""
    root = find_root(model)
    state: _State | None = getattr(root, "_mc_state", None)
    if state is None:
        return PatchReport(model=type(root).__name__, patched=False)
    held = _records(root, state)
    records = [record for _, record in held]
    traced = {_stack(r.name) for r in records if r.compiled}
    now = {r.name: str(getattr(m.config, "_attn_implementation", KEY)) for m, r in held if uses_interface(type(m))}
    away = {
        name: f"attn_implementation was set to {key!r} after patching" for name, key in now.items() if KEY not in key
    }
    return PatchReport(
        model=type(root).__name__,
        patched=True,
        options={"fallback": state.options.fallback, "packing": state.options.packing}
        | {
            name: given
            for name in ("continuous_batching", "context_parallel")
            if (given := getattr(state.options, name))
        },
        calls={r.name: r.calls for r in records},
        compiled=tuple(r.name for r in records if _stack(r.name) in traced),
        skipped=state.skipped | away,
        fallbacks={r.name: r.fallbacks for r in records if r.fallbacks},
        fallback_reasons=tuple(sorted({r.fallback_reason for r in records if r.fallback_reason})),
    )


def _records(root: nn.Module, state: _State) -> list[tuple[nn.Module, ModuleRecord]]:
    """The modules patched by patch_model, and the copies made of them since: PEFT's modules_to_save, layers added."""
    known = {id(module) for module, _ in state.records}
    inside = [(name, m) for name, m in root.named_modules() if "_mc_record" in vars(m) and id(m) not in known]
    return state.records + [(m, replace(vars(m)["_mc_record"], name=name)) for name, m in inside]


def _restore_copies(parts: list[nn.Module], state: _State) -> None:
    """Copies of patched modules took the adapter's class along, and a config that stands for no former one."""
    former = {adapter_of(cls): cls for _, cls in state.adapted}
    for module in [m for part in parts for m in part.modules()]:
        if type(module) in former:
            _change_class(module, former[type(module)])
    implementations = {type(old): old._attn_implementation_internal for old, _, _ in state.configs}
    for config in _collect_configs(parts):
        if config._attn_implementation_internal == KEY and type(config) in implementations:
            config._attn_implementation_internal = implementations[type(config)]


def _stack(name: str) -> str:
    """A module's name without the number of its layer: layers compiled one by one share the graph of the first."""
    return re.sub(r"\d+", "#", name)


def find_root(model: Any) -> PreTrainedModel:
    """The one outermost PreTrainedModel inside a model or wrapper."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers model or model class, got {type(model).__name__}")
    roots: list[tuple[str, PreTrainedModel]] = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(name.startswith(f"{r}." if r else "") for r, _ in roots):
            roots.append((name, module))
    if len(roots) != 1:
        found = [type(m).__name__ for _, m in roots]
        raise TypeError(
            f"model: expected one transformers PreTrainedModel in {type(model).__name__}, found {found}; pass it itself"
        )
    return roots[0][1]


def _apply(model: nn.Module, root: PreTrainedModel, options: Options) -> None:
    """Check everything first, then change: a refusal leaves the model as it was."""
    attention = {name: m for name, m in root.named_modules() if runs_here(type(m))}
    targets = {id(m.config) for m in attention.values() if isinstance(getattr(m, "config", None), PreTrainedConfig)}
    targets.add(id(root.config))  # masks are made with it where parts share it, and it is where users look
    skipped = _check_family(root, attention, targets)
    if options.context_parallel is not None:
        check_spreadable(root)
    if options.packing is not None:
        refuse_recurrence(root)
    configs = _collect_configs([model, root])
    asked = [type(c).__name__ for c in configs if id(c) in targets and getattr(c, "output_attentions", False)]
    if asked:
        raise ValueError(
            f"config.output_attentions=True in {asked[0]}: mc_attention forms no attention weights; set it to False"
        )
    adapted = [(m, adapter) for m in root.modules() if (adapter := adapter_of(type(m))) is not None]
    claim = batching.claim(root, adapted, skipped) if options.continuous_batching else None
    copies = {id(c): copy.copy(c) for c in configs}
    for ours in copies.values():
        for name, held in vars(ours).items():
            if id(held) in copies:
                vars(ours)[name] = copies[id(held)]
    state = _State(
        options,
        [],
        skipped,
        [(m, type(m)) for m, _ in adapted],
        [m.register_forward_pre_hook(_refuse_weights, with_kwargs=True) for m in _parts_with(root, attention)],
        [(c, copies[id(c)], dict(vars(copies[id(c)]))) for c in configs],
        claim,
    )
    for config in configs:
        if id(config) in targets:
            copies[id(config)]._attn_implementation_internal = KEY
    _swap_configs([model, root], copies)
    for name, module in attention.items():
        module._mc_record = ModuleRecord(name, options, is_tower(module, root))
        state.records.append((module, module._mc_record))
    for module, adapter in adapted:
        _change_class(module, adapter)
    if options.context_parallel is not None:
        state.hooks += add_hooks(root, options.context_parallel, options.packing)
    if claim is None and hasattr(root, "init_continuous_batching"):
        vars(root)["init_continuous_batching"] = batching.refuse
    vars(root)["_mc_state"] = state


def _change_class(module: nn.Module, cls: type) -> None:
    """Also in the methods that hooks keep on the module itself: accelerate's offloading calls `_old_forward`."""
    former, module.__class__ = type(module), cls
    for name, held in vars(module).items():
        if isinstance(held, MethodType) and held.__func__ is getattr(former, held.__name__, None):
            vars(module)[name] = MethodType(getattr(cls, held.__name__), held.__self__)


def _parts_with(root: PreTrainedModel, attention: dict[str, nn.Module]) -> list[PreTrainedModel]:
    """The PreTrainedModels in ``root``, itself included, that hold one of the attention modules."""
    parts = [(f"{n}." if n else "", m) for n, m in root.named_modules() if isinstance(m, PreTrainedModel)]
    return [m for prefix, m in parts if any(n.startswith(prefix) for n in attention)]


def _refuse_weights(part: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward: not every family tells its attention that weights are asked for, and would return none."""
    refuse_weights(kwargs.get("output_attentions"))


def runs_here(cls: type) -> bool:
    """Whether a patched model calls mc_attention from modules of this class: by the interface or by an adapter."""
    return uses_interface(cls) or (adapter_of(cls) is not None and not issubclass(cls, PreTrainedModel))


def _check_family(root: PreTrainedModel, attention: dict[str, nn.Module], targets: set[int]) -> dict[str, str]:
    """Raise for a model that would not be exact; returns what is left to transformers, module name -> reason."""
    name = type(root).__name__
    owners: dict[str, PreTrainedModel] = {n: m for n, m in root.named_modules() if isinstance(m, PreTrainedModel)}
    for owner in owners.values():
        row = REFUSED.get(getattr(owner.config, "model_type", ""))
        if row is not None:
            raise NotImplementedError(f"{name}: the {row.name} family is refused: {row.refused}")
    for module in root.modules():
        if type(module).__name__ in CAUSAL_BY_NAME and any(getattr(x, "is_causal", False) for x in module.children()):
            raise NotImplementedError(
                f"{name} is refused: attention in {type(module).__name__} calls itself causal and passes no mask, so "
                "stock eager and sdpa differ too; a newer transformers corrects it"
            )
    bypassing, skipped = [], {}
    for path, module in root.named_modules():
        if not _computes_own_attention(path, module, attention):
            continue
        holder = max((n for n in owners if path == n or path.startswith(f"{n}." if n else "")), key=len)
        config = getattr(module, "config", None)
        config = config if isinstance(config, PreTrainedConfig) else owners[holder].config
        harmless = type(module).__name__ in HARMLESS_CLASSES or not _takes_mask(type(module))
        if harmless or id(config) not in targets:
            skipped[path] = f"{type(module).__name__} computes attention itself"
        else:
            bypassing.append(type(module).__name__)
    if not attention:
        bypassing += [reason.split()[0] for reason in skipped.values()]
    if bypassing:
        classes = sorted(set(bypassing))
        own = "computes attention in its own code" if len(classes) == 1 else "compute attention in their own code"
        raise NotImplementedError(
            f"{name} is refused: {', '.join(classes)} {own}, not through transformers' attention interface, and would "
            "misread our masks; keep the stock implementation"
        )
    if not attention:
        raise ValueError(
            f"model: nothing to patch, {name} has no attention modules that use transformers' attention interface"
        )
    unplaced = [
        n
        for n, m in attention.items()
        if adapter_of(type(m)) is None and not isinstance(getattr(m, "config", None), PreTrainedConfig)
    ]
    if unplaced:
        raise NotImplementedError(f"{name} is refused: attention module {unplaced[0]!r} carries no config to switch")
    readers = [m for m in [*owners.values(), *attention.values()] if id(getattr(m, "config", None)) in targets]
    readers = [m for m in readers if not wants_dense_masks(m.config)]
    _check_sources(name, [m for m in readers if type(m).__module__ not in {source for source, _ in ADAPTED}])
    return skipped


def _computes_own_attention(path: str, module: nn.Module, attention: dict[str, nn.Module]) -> bool:
    """An attention class that neither uses the interface itself nor has a part or a parent that does."""
    bases = [base.__name__ for base in type(module).__mro__ if not base.__module__.startswith("torch.")]
    if type(module).__module__.startswith("torch.") or not any("Attention" in name for name in bases):
        return False
    if path in attention or next(module.parameters(), None) is None:
        return False
    return not any(p.startswith(path + ".") or path.startswith(p + ".") for p in attention)


def _takes_mask(cls: type[nn.Module]) -> bool:
    """Whether a mask can reach a module: by an argument named so, or by **kwargs."""
    parameters = inspect.signature(cls.forward).parameters.values()
    return any("mask" in p.name or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


def _check_sources(name: str, modules: list[nn.Module]) -> None:
    """Refuse modeling code that looks into the mask it made: it would read key ranges as a bool or float mask."""
    for source_name in sorted({type(m).__module__ for m in modules}):
        try:
            source = inspect.getsource(sys.modules[source_name])
        except (KeyError, OSError, TypeError):
            continue  # code typed into a notebook: nothing to read
        found = _READS_MASK.search(source)
        if found:
            raise NotImplementedError(
                f"{name} is refused: {source_name} reads the attention mask itself ({found.group(0)!r}), "
                "and would misread key ranges"
            )


def _collect_configs(parts: list[nn.Module]) -> list[PreTrainedConfig]:
    """Every config object that the modules hold, with the configs nested in them, each once."""
    found: dict[int, PreTrainedConfig] = {}
    queue = [
        held
        for part in parts
        for m in part.modules()
        for held in vars(m).values()
        if isinstance(held, PreTrainedConfig)
    ]
    while queue:
        config = queue.pop()
        if id(config) not in found:
            found[id(config)] = config
            queue += [held for held in vars(config).values() if isinstance(held, PreTrainedConfig)]
    return list(found.values())


def _swap_configs(parts: list[nn.Module], replacement: dict[int, PreTrainedConfig]) -> None:
    for part in parts:
        for module in part.modules():
            for name, held in vars(module).items():
                if isinstance(held, PreTrainedConfig) and id(held) in replacement:
                    vars(module)[name] = replacement[id(held)]


def _patched_class(base: type, options: Options) -> type:
    """A subclass of an Auto class or a PreTrainedModel class whose constructors return patched models of ``base``."""
    if "_mc_base" in vars(base):
        if vars(base)["_mc_options"] != options:
            raise ValueError(f"model: {base.__name__} patches with {vars(base)['_mc_options']}, got {options}")
        return base
    if not issubclass(base, (_BaseAutoModelClass, PreTrainedModel)):
        raise TypeError(f"model: expected a PreTrainedModel or Auto class, got {base.__name__}")

    def build(constructor: str):
        def construct(cls, *args: Any, attn_implementation: Any = None, **kwargs: Any):
            if attn_implementation not in (None, KEY):
                raise ValueError(
                    f"attn_implementation={attn_implementation!r}: the patched {base.__name__} runs {KEY!r}; leave the "
                    f"argument out, or load with transformers' own {base.__name__}"
                )
            loaded = getattr(base, constructor)(*args, **kwargs)
            if isinstance(loaded, tuple):  # output_loading_info=True
                return (patch_model(loaded[0], **vars(options)), *loaded[1:])
            return patch_model(loaded, **vars(options))

        construct.__name__ = constructor
        return classmethod(construct)

    body: dict[str, Any] = {
        "_mc_base": base,
        "_mc_options": options,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    for constructor in ("from_pretrained", "from_config", "_from_config"):
        if hasattr(base, constructor):
            body[constructor] = build(constructor)
    if issubclass(base, PreTrainedModel):
        # a plain model of the base class comes back, so __init__ of this subclass never runs
        body["__new__"] = lambda cls, *args, **kwargs: patch_model(base(*args, **kwargs), **vars(options))
    metaclass: Any = type(base)
    return metaclass(base.__name__, (base,), body)
