"""What ``hf-flash-mc tune`` found on the user's own GPU: a JSON file that is looked up before the shipped tables.

Rows hold for one GPU, one Triton and one state of the kernels' source: any other keeps rows of its own. They are for
calls that are plain or causal and nothing else, by kernel, input width, head dim and length (to the power of two).
``HF_FLASH_MC_CACHE`` names the folder (default ~/.cache/hf-flash-mc); ``HF_FLASH_MC_TUNING=shipped`` ignores the file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch

FILE = "tuning.json"
SETTING = "HF_FLASH_MC_TUNING"
Rows = dict[str, list[Any]]
Made = TypeVar("Made")


def path() -> Path:
    """Where the file is, or would be."""
    folder = os.environ.get("HF_FLASH_MC_CACHE")
    if folder:
        return Path(folder) / FILE
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf-flash-mc" / FILE


def enabled() -> bool:
    """Whether the file is looked at.

    Raises:
        ValueError: where the environment variable says neither "user" nor "shipped".
    """
    asked = os.environ.get(SETTING, "user")
    if asked not in ("user", "shipped"):
        raise ValueError(f'{SETTING}: expected "user" or "shipped" (no user cache), got {asked!r}')
    return asked == "user"


@functools.cache
def source_hash() -> str:
    """Of the kernels and of what cuts their grids: rows measured on other code say nothing."""
    here, digest = Path(__file__).parent.parent, hashlib.sha256()
    for file in sorted([*here.glob("portable/*.py"), *here.glob("hopper/*.py")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def owner() -> str:
    """The key of the rows that hold here: the current GPU's name, Triton's version, the kernels' hash."""
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    return f"{gpu} | triton {triton.__version__} | kernels {source_hash()}"


def read() -> dict[str, Rows]:
    """The whole file, by owner; empty where there is none.

    Raises:
        ValueError: where it is no such file.
    """
    try:
        text = path().read_text()
    except FileNotFoundError:
        return {}
    try:
        found = json.loads(text)
        if not all(isinstance(row, list) for rows in found.values() for row in rows.values()):
            raise TypeError("rows that are no lists")
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path()}: expected the JSON that hf-flash-mc tune writes, got {error}; delete it or set {SETTING}=shipped"
        ) from None
    return found


@functools.cache
def rows_here() -> Rows:
    """The rows that hold here; read once in a process."""
    found = read() if enabled() else {}
    return found.get(owner(), {}) if found else {}


def store(rows: dict[str, list[Any] | None]) -> Path:
    """Put rows into the file (None takes one out); what other GPUs and versions found stays. Takes effect at once."""
    file, found = path(), read()
    mine = found.get(owner(), {}) | rows
    found[owner()] = {key: row for key, row in mine.items() if row is not None}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(file)
    forget()
    return file


def forget() -> None:
    """Read the file anew. Plans that are made already keep their configurations."""
    rows_here.cache_clear()


def row_key(kind: str, plan: Any) -> str | None:
    """The key of a call's row, None for calls that have none: packed ones, and those with more than causality."""
    causal, *rest = plan.flags
    if any(rest[:-1]) or plan.packed:
        return None
    width = "wide" if plan.dtype == torch.float32 else "half"
    length = 1 << (max(plan.max_q, plan.max_k, 16) - 1).bit_length()
    return f"{kind}/{width}/d{max(plan.d, plan.dv)}/{'causal' if causal else 'full'}/{length}"


def tuned(kind: str, plan: Any, make: type[Made]) -> Made | None:
    """The user's configuration of kernel ``kind`` for a call, as ``make`` of its row; None where there is none.

    ``plan`` is the call's Plan (ops/portable/plan.py).
    """
    rows = rows_here()
    key = row_key(kind, plan) if rows else None
    row = rows.get(key) if key else None
    if row is None:
        return None
    try:
        return make(*row)
    except TypeError as error:
        raise ValueError(
            f"{path()}: {key}: expected the fields of {make.__name__}, got {row} ({error}); delete the file, or set "
            f"{SETTING}=shipped"
        ) from None
