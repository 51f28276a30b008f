"""attach_megacontext and detach_megacontext: the add-on on a transformers model, once it is known to be exact there."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hf_flash_mc.patches import patch_model, unpatch_model
from hf_flash_mc.patches.api import find_root, hold, unpatch_held

from .config import MegaContextConfig
from .gistnet import build_gist
from .lensnet import build_lens
from .rope import Rope, rope_of

NAME = "megacontext"
DETACH = "detach_megacontext(model)"
PROBE_POSITION = 5  # where a key is compared with the one at position 0: turned by up to 5 radians
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest key; half precision: 3e-2


class MegaContext(nn.Module, ModelHubMixin):
    """The add-on: GistNet and LensNet of one base model, and the door to its sessions.

    It is a module of the base model, so it moves and trains with it, but its weights never enter the base model's state
    dict: they are saved by `save_pretrained` alone.

    Attributes:
        config: with the base model's name and sizes. gist, lens: modules. base: the model it is attached to.
    """

    def __init__(self, config: MegaContextConfig, rope: Rope | None = None) -> None:
        super().__init__()
        self.config = config
        self.gist = build_gist(config, rope)
        self.lens = build_lens(config)
        self.rope: Any = rope
        self._hold: tuple[Any, ...] = ()  # a tuple, so that the base model is not a submodule of its own submodule
        self._patched_here, self.enabled = False, True
        self._recall_heads: list[tuple[int, int]] | None = None
        self.register_load_state_dict_post_hook(_forgive_missing)

    @property
    def base(self) -> Any:
        """The model this is attached to; RuntimeError after `detach_megacontext`."""
        if not self._hold:
            raise RuntimeError("megacontext: it is attached to no model; call attach_megacontext or load_megacontext")
        return self._hold[0]

    def follow_base(self) -> None:
        """Take the rotary positions that the base model has now: a cast, as by ``.bfloat16()``, rounds frequencies."""
        self.rope = rope_of(self.base)
        if self.config.backend == "kv":
            self.gist.follow(self.rope)

    def session(self, folder: str | Path | None = None, **options: Any) -> Any:
        """A new, empty history; its tree in memory, or in files under ``folder``. See `MegaContextSession`."""
        from .session import MegaContextSession

        return MegaContextSession(self, folder, **options)

    def generate(self, sessions: Any, input_ids: Any = None, **options: Any) -> list[Tensor]:
        """Continue several sessions at once, the new token ids [1, n] of each; see `megacontext.batch.generate`."""
        from .batch import generate

        return generate(self, sessions, input_ids, **options)

    def recall_heads(self) -> list[tuple[int, int]]:
        """(layer, query head) of the heads that a `RecallIndex` keeps; found once, with a forward of random tokens."""
        if self._recall_heads is None:
            from .recall import find_heads

            self._recall_heads = find_heads(self)
        return self._recall_heads

    def load_session(self, folder: str | Path) -> Any:
        """A session that `MegaContextSession.save` wrote, as it was."""
        from .io import load_session

        return load_session(self, folder)

    @contextmanager
    def disable(self) -> Iterator[None]:
        """Within: the model as it was before it was attached, unpatched if it was; sessions raise where they run it."""
        if not self.enabled:  # within another one
            yield
            return
        if self._patched_here:
            unpatch_held(self.base, DETACH)
        self.enabled = False
        try:
            yield
        finally:
            if self._patched_here:
                patch_model(self.base)
                hold(self.base, DETACH)
            self.enabled = True

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **hub_options: Any
    ) -> Any:
        """Write the add-on alone into a folder: safetensors and JSON. The mixin's `push_to_hub` calls it.

        push_to_hub: also upload it, as ``repo_id`` (None: the folder's name), with the mixin's ``hub_options``.
        """
        from .io import save_addon

        # push_to_hub brings config and model_card_kwargs, None where nobody gave them
        given = [name for name, value in hub_options.items() if value is not None]
        if given and not push_to_hub:
            raise TypeError(f"save_pretrained: expected push_to_hub=True with {', '.join(given)}, got False")
        save_addon(self, save_directory)
        return self.push_to_hub(repo_id or Path(save_directory).name, **hub_options) if push_to_hub else None

    @classmethod
    def from_pretrained(cls, name: str | Path, *, model: nn.Module, **options: Any) -> MegaContext:  # type: ignore[override]
        """`load_megacontext`, in the words of huggingface_hub's mixin; ``model`` is the base model."""
        from .io import load_megacontext

        return load_megacontext(model, name, **options).megacontext

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        """Own weights; nothing where a parent asks, whose checkpoint must not change."""
        if prefix:
            return kwargs.get("destination")
        return super().state_dict(*args, prefix=prefix, **kwargs)


def _forgive_missing(module: nn.Module, keys: Any) -> None:
    """The base model's checkpoint has no weights of the add-on, and none are missing."""
    inside = tuple(f"{NAME}.{name}" for name, _ in [*module.named_parameters(), *module.named_buffers()])
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(inside)]


def attach_megacontext(model: Any, config: MegaContextConfig | None = None) -> Any:
    """Give a transformers decoder a MegaContext, as ``model.megacontext``; returns the model.

    The model is patched (`patch_model`) if it is not yet. Its weights, its outputs without a session and its state-dict
    keys stay as they are; `detach_megacontext` undoes everything.

    Args:
        model: a causal language model with rotary positions: Llama, Qwen, SmolLM, Mistral, Gemma families.
        config: settings; sizes that are None are read from the model. None: the defaults, with ``w_max`` at most the
            model's range of positions.

    Raises:
        ValueError: attached already; sizes in ``config`` that differ from the model's.
        NotImplementedError: a family that would not be exact, and why.
        TypeError: no transformers model.
    """
    root = find_root(model)
    if hasattr(root, NAME):
        raise ValueError(
            f"model: {type(root).__name__} has a megacontext already; call detach_megacontext(model) first"
        )
    if root.get_output_embeddings() is None:
        raise TypeError(
            f"model: expected a causal language model, got {type(root).__name__} without a language-modelling head; "
            "load it with AutoModelForCausalLM"
        )
    config = complete_config(root, config)
    layer_windows(root)
    rope = rope_of(root)
    patched_here = not hasattr(root, "_mc_state")
    if patched_here:
        patch_model(model)
    try:
        _check_rotation(root, config, rope)
        addon = MegaContext(config, rope)
    except BaseException:
        if patched_here:
            unpatch_model(model)
        raise
    device: torch.device = root.get_input_embeddings().weight.device  # type: ignore[assignment]
    addon = addon.to(device).train(root.training)
    addon._hold, addon._patched_here = (root,), patched_here
    hold(root, DETACH)
    root.add_module(NAME, addon)
    return model


def detach_megacontext(model: Any) -> Any:
    """Undo `attach_megacontext` exactly; returns the model.

    ValueError if nothing is attached, RuntimeError within `MegaContext.disable`.
    """
    root = find_root(model)
    addon = getattr(root, NAME, None)
    if addon is None:
        raise ValueError(f"model: {type(root).__name__} has no megacontext; call attach_megacontext(model) first")
    if not addon.enabled:
        raise RuntimeError("model: its megacontext is disabled; detach it outside of model.megacontext.disable()")
    if addon._patched_here:
        unpatch_held(model, DETACH)
    else:
        hold(root, "")
    delattr(root, NAME)
    addon._hold = ()
    return model


def complete_config(root: Any, config: MegaContextConfig | None) -> MegaContextConfig:
    """The config with the model's name and sizes; ValueError with every size that differs."""
    text = root.config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    if heads is None:
        raise NotImplementedError(
            f"model: expected attention, got {type(root).__name__} (its config has no num_attention_heads)"
        )
    sizes = {
        "num_layers": text.num_hidden_layers,
        "num_kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "max_position_embeddings": getattr(text, "max_position_embeddings", None),
    }
    if config is None:
        config = MegaContextConfig(w_max=min(8192, sizes["max_position_embeddings"] or 8192))
    if not isinstance(config, MegaContextConfig):
        raise TypeError(f"config: expected a MegaContextConfig, got {type(config).__name__}")
    given = {name: getattr(config, name) for name in sizes}
    wrong = [
        f"{name}: the model has {sizes[name]}, the config {value}"
        for name, value in given.items()
        if value is not None and value != sizes[name]
    ]
    if wrong:
        raise ValueError(
            f"config: it is for another base model ({config.base_model_name_or_path}) than {type(root).__name__}: "
            + "; ".join(wrong)
        )
    name = config.base_model_name_or_path or base_name(root)
    return dataclasses.replace(config, base_model_name_or_path=name, **sizes)


def base_name(model: Any) -> str:
    """What files call the base model: its name on the hub, its folder's name (which may move), or its class."""
    root = find_root(model)
    name = getattr(root.config, "_name_or_path", "") or type(root).__name__
    return Path(name).resolve().name if Path(name).is_dir() else name


def layer_windows(root: Any) -> list[int | None]:
    """Each layer's sliding window, None where it sees everything; NotImplementedError for other kinds of attention."""
    text = root.config.get_text_config(decoder=True)
    other = sorted({*(getattr(text, "layer_types", None) or [])} - {"full_attention", "sliding_attention"})
    windows: list[int | None] = []
    for layer in DynamicCache(config=root.config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        elif type(layer) is DynamicLayer:
            windows.append(None)
        else:
            other.append(type(layer).__name__)
    if other:
        raise NotImplementedError(
            f"model: expected layers with full or sliding attention, got {', '.join(other)} in {type(root).__name__}; "
            "a working context cannot stand in for their state"
        )
    return windows


@contextmanager
def evaluating(root: Any) -> Iterator[None]:
    """Within: the model neither drops anything out nor checkpoints, as a history is read once and kept."""
    training = [m for m in root.modules() if m.training] if root.training else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def cache_argument(root: Any) -> str:
    """What the model's forward calls its cache: "cache" in new versions of transformers, else "past_key_values"."""
    return "cache" if "cache" in inspect.signature(type(root).forward).parameters else "past_key_values"


@torch.no_grad()
def _check_rotation(root: Any, config: MegaContextConfig, rope: Rope) -> None:
    """Compare keys of one token at two positions with our rotation, in every layer.

    A token that sees itself alone has the same hidden states at any position, so its keys differ by the rotation only.
    Catches layers without rotary positions, norms after the rotation, and anything else that nobody thought of.
    """
    embedding = root.get_input_embeddings().weight
    if embedding.device.type == "meta":
        raise ValueError("model: expected weights, got a model on the meta device; load it first")
    training = root.training
    root.eval()
    try:
        still, moved = (_keys_of_one_token(root, position) for position in (0, PROBE_POSITION))
    finally:
        root.train(training)
    shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    if tuple(still[0].shape) != shape or tuple(still[1].shape) != shape:
        raise NotImplementedError(
            f"model: expected keys and values of {shape} [layers, KV heads, head dim] in the cache, got "
            f"{list(still[0].shape)} and {list(still[1].shape)}"
        )
    start, end = (rope.tables(torch.tensor(p, device=still[0].device)) for p in (0, PROBE_POSITION))
    bare = rope.unrotate(still[0].float(), *(table[:, None] for table in start))
    wanted = rope.rotate(bare, *(table[:, None] for table in end))
    error = (wanted - moved[0].float()).abs().amax((1, 2)) / moved[0].float().abs().amax((1, 2)).clamp(min=1e-6)
    bound = PROBE_TOLERANCE.get(still[0].dtype, 3e-2)
    if not bool((error <= bound).all()):
        worst = int(error.nan_to_num(torch.inf).argmax())
        raise NotImplementedError(
            f"model: keys of {type(root).__name__} depend on more than its rotary positions (layer {worst}: "
            f"{error[worst]:.1e} off, expected at most {bound:.0e}); gists cannot be moved exactly in this family"
        )


def _keys_of_one_token(root: Any, position: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[L, Hkv, D]`` of one token that stands at ``position``."""
    device = root.get_input_embeddings().weight.device
    cache = DynamicCache(config=root.config)
    ids = torch.tensor([[min(7, root.config.get_text_config(decoder=True).vocab_size - 1)]], device=device)
    where = torch.tensor([[position]], device=device)
    root(input_ids=ids, position_ids=where, use_cache=True, **{cache_argument(root): cache})
    layers: list[Any] = list(cache.layers)
    keys = [layer.keys[0, :, 0].to(device) for layer in layers]
    values = [layer.values[0, :, 0].to(device) for layer in layers]
    if len({k.shape for k in keys + values}) > 1:
        raise NotImplementedError(
            "model: expected keys and values of one size in all layers, got "
            f"{sorted({tuple(k.shape) for k in keys + values})}"
        )
    return torch.stack(keys), torch.stack(values)
