"""What a function's results may depend on, as a value to compare: has anything that it reads changed?"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor

_CONSTANTS = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
_LIBRARIES = ("torch", "math", "operator", "functools", "builtins")


class _Unknown(Exception):
    """Something whose state cannot be told."""


def state_of(thing: Any) -> tuple[Any, ...] | None:
    """Equal for two calls only if nothing that ``thing`` reads has changed between them; None if that cannot be told.

    A thing is a constant, a tensor (its identity and version), a sequence or dict of things, or a Python function: its
    code, defaults, closure and the globals that it names. The state keeps what it was made from alive, so that
    identities stay unique.
    """
    found: list[Any] = []
    try:
        _walk(thing, found, set())
    except _Unknown:
        return None
    return tuple(found)


class _Same:
    """Compares by identity."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _walk(thing: Any, found: list[Any], known: set[int]) -> None:
    if isinstance(thing, _CONSTANTS):
        found += [type(thing), thing]
        return
    if not isinstance(thing, (tuple, list, dict)):  # of these the contents count
        found.append(_Same(thing))
    if id(thing) in known:
        return
    known.add(id(thing))
    if isinstance(thing, Tensor):
        if thing.is_inference():
            raise _Unknown
        found.append(thing._version)
    elif isinstance(thing, (tuple, list)):
        found.append(len(thing))
        for part in thing:
            _walk(part, found, known)
    elif isinstance(thing, dict):
        found.append(len(thing))
        for key, part in thing.items():
            _walk(key, found, known)
            _walk(part, found, known)
    elif isinstance(thing, types.FunctionType):
        _walk_function(thing, found, known)
    elif isinstance(thing, functools.partial):
        for part in (thing.func, thing.args, thing.keywords):
            _walk(part, found, known)
    elif not _from_library(thing):
        raise _Unknown


def _walk_function(function: types.FunctionType, found: list[Any], known: set[int]) -> None:
    # of torch's own, such as and_masks, the closure alone may change
    names = set() if _of_library(function.__module__) else _names(function.__code__)
    found.append(_Same(function.__code__))
    for part in (function.__defaults__, function.__kwdefaults__):
        _walk(part, found, known)
    for cell in function.__closure__ or ():
        try:
            _walk(cell.cell_contents, found, known)
        except ValueError:  # an empty cell
            found.append(None)
    for name in sorted(names & function.__globals__.keys()):
        _walk(function.__globals__[name], found, known)


def _names(code: types.CodeType) -> set[str]:
    """Global names (and attributes) that a function and those inside it name."""
    names = set(code.co_names)
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            names |= _names(part)
    return names


def _from_library(thing: Any) -> bool:
    """Modules, functions and classes of torch and of Python, which do not change."""
    module = thing.__name__ if isinstance(thing, types.ModuleType) else getattr(thing, "__module__", None)
    return isinstance(thing, (types.ModuleType, types.BuiltinFunctionType, type)) and _of_library(module)


def _of_library(module: str | None) -> bool:
    return str(module).split(".")[0] in _LIBRARIES
