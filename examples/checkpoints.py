"""Checkpoints of a training run that may be killed at any moment, also while it writes one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator


def find_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint in a run's folder."""
    return max(out.glob("checkpoint-*"), default=None)


def save_checkpoint(accelerator: Accelerator, out: Path, step: int, settings: dict[str, str]) -> None:
    """Save accelerate's state after ``step`` steps: it appears whole, under its name; then the one before it goes."""
    part = out / "checkpoint.part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed while it wrote
        part.mkdir(parents=True)
        (part / "settings.json").write_text(json.dumps(settings))
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        former = list(out.glob("checkpoint-*"))
        part.rename(out / f"checkpoint-{step:08d}")
        for folder in former:
            shutil.rmtree(folder)


def load_checkpoint(accelerator: Accelerator, out: Path, settings: dict[str, str], **how: Any) -> int:
    """Load the newest checkpoint; the number of steps done, 0 where there is none. ``how`` goes to ``load_state``.

    Raises:
        ValueError: where it was written with other settings, each of which is named.
    """
    folder = find_checkpoint(out)
    accelerator.wait_for_everyone()  # all have looked before one writes
    if folder is None:
        return 0
    before = json.loads((folder / "settings.json").read_text())
    names = [name for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)]
    if names:
        changed = ", ".join(f"{name} {before.get(name)} -> {settings.get(name)}" for name in names)
        raise ValueError(f"resume: {folder} was written with other settings ({changed}); use those, or another folder")
    accelerator.load_state(str(folder), **how)
    return int(folder.name.split("-")[1])
