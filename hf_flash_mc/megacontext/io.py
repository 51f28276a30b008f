"""Files: the add-on (safetensors and JSON, no base weights), and sessions that go on where they stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .allocator import AllocatorState
from .attach import MegaContext, attach_megacontext, base_name, detach_megacontext
from .config import MegaContextConfig
from .store import StoreError, sync_folder
from .working_context import InvariantError, WorkingContext

if TYPE_CHECKING:
    from .session import MegaContextSession

WEIGHTS, CONFIG = "megacontext_model.safetensors", "megacontext_config.json"
STATE = "session.safetensors"  # one file, replaced in one step: a save that is killed leaves the one before it
FORMAT = 1
_STATE = ("start", "lod", "position", "tail_ids", "tail_payload", "queries", "generator")
_SUMMARY = (
    "config",
    "committed",
    "next_position",
    "dtype",
    "allocation",
    "since_refocus",
    "chunk_size",
    "observe",
    "telemetry",
    "recall",
)


def save_addon(addon: MegaContext, folder: str | Path) -> None:
    """Write GistNet, LensNet and the config into ``folder``; never base weights."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder / WEIGHTS, addon.state_dict())
    _write_json(folder / CONFIG, {"format": FORMAT, **addon.config.to_dict()})


def load_megacontext(model: Any, name: str | Path, *, any_base: bool = False, **hub_options: Any) -> Any:
    """Attach a saved add-on to its base model; returns the model. Nothing is attached where anything is wrong.

    Args:
        model: the base model, without an add-on.
        name: a folder of `save_pretrained`, or the name of a repository on the hub.
        any_base: take a base model of another name if its sizes agree (a renamed copy, say).
        hub_options: of `huggingface_hub.snapshot_download`: revision, token, cache_dir, ...

    Raises:
        FileNotFoundError: the folder or a file is missing. ValueError: another base model, another format, missing or
            extra weights.
    """
    folder = Path(name)
    if not folder.is_dir():
        with asking_the_hub("name", name):
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(name), allow_patterns=[WEIGHTS, CONFIG], **hub_options))
    values = _read_json(folder / CONFIG, FORMAT)
    values.pop("format")
    try:
        config = MegaContextConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    weights = _read_tensors(folder / WEIGHTS)
    mine, theirs = base_name(model), config.base_model_name_or_path
    if mine != theirs and not any_base:
        raise ValueError(
            f"{folder}: it was made for the base model {theirs!r}, got {mine!r}; load it on that one, or pass "
            "any_base=True if this is the same model under another name"
        )
    attach_megacontext(model, config)  # checks the sizes
    addon = model.megacontext
    try:
        _check_weights(folder / WEIGHTS, weights, addon.state_dict())
        addon.load_state_dict(weights)
    except BaseException:
        detach_megacontext(model)
        raise
    return model


@contextmanager
def asking_the_hub(argument: str, name: str | Path) -> Iterator[None]:
    """Within, ``name`` may be looked up on the hub. FileNotFoundError where it was meant as a folder that is not there:
    at once if it can be no name on the hub, else if the hub fails; its complaint would be of network or form."""
    text, parent, missing = str(name), Path(name).parent, f"{argument}: no such folder: {str(name)!r}"
    if not Path(name).is_dir() and (text.startswith(("/", "./", "../", "~")) or text.count("/") > 1):
        raise FileNotFoundError(missing)
    try:
        yield
    except Exception as error:
        if Path(name).is_dir() or parent == Path() or not parent.is_dir():
            raise
        raise FileNotFoundError(f"{missing}; taken as a name on the hub: {error}") from error


def _check_weights(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    problems = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name}: expected {list(wanted[name].shape)}, got {list(found[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name].shape != found[name].shape
    ]
    if problems:
        raise ValueError(f"{path}: weights do not fit {CONFIG} beside it: {'; '.join(problems)}; nothing was loaded")


def load_gist(addon: MegaContext, folder: str | Path) -> None:
    """Put the GistNet of a saved add-on, of the same settings, into this one; the lens stays. ValueError if it does not
    fit."""
    path, prefix = Path(folder) / WEIGHTS, "gist."
    found = {name: x for name, x in _read_tensors(path).items() if name.startswith(prefix)}
    _check_weights(path, found, {name: x for name, x in addon.state_dict().items() if name.startswith(prefix)})
    addon.gist.load_state_dict({name.removeprefix(prefix): x for name, x in found.items()})


def save_session(session: MegaContextSession, folder: str | Path) -> None:
    """Write a session so that `load_session` gives it back as it is: history, working context, positions, state.

    Its own folder only gets what is not there yet; another folder gets a copy of the whole history, and must be empty.
    """
    folder = Path(folder)
    own = session.folder is not None and folder.resolve() == session.folder.resolve()
    if not own and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"folder: expected an empty one (or the session's own), got {folder} with files in it")
    folder.mkdir(parents=True, exist_ok=True)
    memory, wc, cache = session.memory, session.working_context, session.cache
    if own:
        memory.flush(durable=True)
    else:
        for files in memory.copy_history(folder):
            files.flush(True)
            files.close()
    tail = memory.slots[len(wc) - len(memory.tail) :]
    state = {
        "start": torch.from_numpy(wc.start.copy()),
        "lod": torch.from_numpy(wc.lod.copy()),
        "position": torch.from_numpy(memory.numbering.position.copy()),
        "tail_ids": memory.tail,
        "tail_payload": cache.read(tail).cpu(),
        "queries": cache.last_queries().cpu(),
        "generator": session.generator.get_state(),
    }
    if session._logits is not None:
        state["logits"] = session._logits.cpu()
    summary = {
        "format": FORMAT,
        "config": session.config.to_dict(),
        "committed": memory.committed,
        "next_position": memory.numbering.next,
        "dtype": str(memory.dtype).removeprefix("torch."),
        "allocation": session.allocation.to_dict(),
        "since_refocus": session._since_refocus,
        "chunk_size": session.chunk_size,
        "observe": cache.observe,
        "durable": session.durable,
        "telemetry": session.stats.to_dict(),
        "recall": None if memory.recall is None else memory.recall.heads,
    }
    _write_tensors(folder / STATE, state, {"session": json.dumps(summary)}, durable=True)  # as the history is by now


def load_session(addon: MegaContext, folder: str | Path) -> MegaContextSession:
    """The session that `save_session` wrote into ``folder``, which becomes its own folder.

    Tokens that were read after it was saved are forgotten. ValueError, StoreError or FileNotFoundError where the files
    are another model's, other settings', damaged, or in use.
    """
    from .session import MegaContextSession

    folder = Path(folder)
    if not (folder / STATE).is_file():
        raise FileNotFoundError(f"{folder / STATE}: no such file; expected a folder that session.save(folder) wrote")
    state, summary = _read_state(folder / STATE)
    mine, theirs = addon.config.to_dict(), summary["config"]
    for values in (mine, theirs):
        values.pop("lens")  # scores are made anew: any lens may go on with a history
    differ = [f"{k}: expected {mine[k]!r}, got {theirs.get(k)!r}" for k in mine if mine[k] != theirs.get(k)]
    dtype = str(addon.base.dtype).removeprefix("torch.")
    if dtype != summary["dtype"]:
        differ.append(f"dtype: expected {dtype}, got {summary['dtype']}")
    if differ:
        raise ValueError(f"{folder}: the session belongs to another add-on or model: {'; '.join(differ)}")
    try:
        wc = WorkingContext.from_arrays(addon.config, state["start"].numpy(), state["lod"].numpy())
        if wc.total != summary["committed"] + len(state["tail_ids"]):
            raise InvariantError("tree", f"{wc.total} tokens, expected {summary['committed']} in the tree and the tail")
    except InvariantError as error:
        raise StoreError(f"{folder / STATE}: its parts do not belong together: {error}") from error
    # without a recall index: one is made if the lens reads one
    options = {name: summary[name] for name in ("chunk_size", "observe", "recall")}
    options["durable"] = summary.get("durable", False)  # not in files of before
    session = MegaContextSession(addon, folder, resume=summary["committed"], **options)
    try:
        _restore(session, wc, state, summary)
    except BaseException:
        session.close()
        raise
    return session


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and summary of a saved session, with all that belongs to them."""
    state = _read_tensors(path)
    with safe_open(path, "pt") as file:
        summary = json.loads((file.metadata() or {}).get("session", "{}"))
    _check_format(path, summary, FORMAT)
    missing = [name for name in _SUMMARY if name not in summary] + [name for name in _STATE if name not in state]
    if missing:
        raise ValueError(f"{path}: expected {', '.join(missing)}, got none; it was written by another version")
    return state, summary


def _restore(
    session: MegaContextSession, wc: WorkingContext, state: dict[str, Tensor], summary: dict[str, Any]
) -> None:
    memory, cache = session.memory, session.cache
    wc.mark_loaded(memory.tree.version)
    try:
        wc.check_invariants(memory.tree)
    except InvariantError as error:
        raise StoreError(f"{STATE} does not belong to these files: {error}") from error
    session.working_context = wc
    memory.numbering.position = state["position"].numpy().astype(np.int64)
    memory.numbering.next = summary["next_position"]
    memory.tail = state["tail_ids"]
    memory.restore(wc, state["tail_payload"])
    cache.tokens_seen = wc.total
    cache.set_queries(state["queries"])
    session.generator.set_state(state["generator"])
    session._logits = state["logits"].to(session.device) if "logits" in state else None
    session.allocation = AllocatorState.from_dict(summary["allocation"])
    session._since_refocus = summary["since_refocus"]
    session.stats.load_dict(summary["telemetry"])


def _check_format(path: Path, values: Any, known: int) -> None:
    if not isinstance(values, dict) or values.get("format") != known:
        got = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise ValueError(
            f"{path}: expected format {known}, got {got}; it was written by another version, or is foreign"
        )


def _write_json(path: Path, values: dict[str, Any]) -> None:
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    os.replace(fresh, path)


def _read_json(path: Path, known: int) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a folder that was saved by this package")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error})") from error
    _check_format(path, values, known)
    return values


def _write_tensors(
    path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None, durable: bool = False
) -> None:
    fresh = path.with_name(path.name + ".new")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, fresh, about)
    if durable:  # before it takes the place of the one before it
        with open(fresh, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(fresh, path)
    if durable:
        sync_folder(path.parent)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected it beside the JSON file")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected safetensors, got a damaged or foreign file ({error})") from error
