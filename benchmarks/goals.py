"""What the kernels are meant to reach on an H100, as data, and how far a result file is from it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import HERE, PEERS, Figures, matching

REASONS = HERE / "reasons.toml"  # written by hand: [goal id] of where a goal is missed and why
STOCK = ("sdpa", "sdpa-compiled")
SETTINGS = (*STOCK, "flex-compiled")  # all that transformers has
_S = "(4096|16384)"


@dataclass(frozen=True)
class Goal:
    """``ratio`` is the least of their time over ours; of "copy", of our bandwidth over a device copy's."""

    id: str
    text: str
    cells: str  # regular expression on "group name"
    direction: str
    ratio: float
    against: tuple[str, ...] = PEERS
    ours: str = "ours"
    average: float | None = None  # of the ratios of all its cells
    most_gib: float | None = None
    least_gib: bool = False  # and no more memory than any of ``against``
    error: bool = False  # compares errors of the output in place of times; ``against`` in order of preference


def _feature(feature: str, percent: int, directions: tuple[str, ...]) -> list[Goal]:
    text = {"ranges": "key_ranges that say causal", "weight": "key_log_weight"}.get(feature, feature)
    return [
        Goal(f"{feature}-{d}", f"{text}: at most {percent} % slower than without", f"features .*-{feature}", d,
             1 / (1 + percent / 100), ("plain",))
        for d in directions
    ]  # fmt: skip


GOALS = [
    Goal("forward-long", "head dims 64 and 128, S 4096 and 16384, GQA", f"(long d(64|128)-.*-q{_S}-.*|gqa .*)",
         "forward", 1.0, average=1.03),
    Goal("forward-256", "head dim 256, S 4096 and 16384", f"long d256-.*-q{_S}-.*", "forward", 0.95),
    Goal("forward-short", "head dims 64 and 128, S 1024 and 2048", "long d(64|128)-.*-q(1024|2048)-.*", "forward", 1.0),
    Goal("backward-128", "head dim 128, S 4096 and 16384", f"(long|gqa) d128-.*-q{_S}-.*", "backward", 1.0),
    Goal("backward-64", "head dim 64, S 4096 and 16384", f"(long|gqa) d64-.*-q{_S}-.*", "backward", 0.97),
    Goal("backward-256", "head dim 256, S 4096 and 16384", f"long d256-.*-q{_S}-.*", "backward", 1.0),
    Goal("windows-forward", "8192 windows of 32", "windows .*", "forward", 2.7),
    Goal("windows-backward", "8192 windows of 32", "windows .*", "backward", 3.5),
    Goal("windows-copy-forward", "8192 windows of 32: bandwidth", "windows .*", "forward", 0.95, ("copy",)),
    Goal("windows-copy-backward", "8192 windows of 32: bandwidth", "windows .*", "backward", 0.95, ("copy",)),
    Goal("cross-forward", "cross attention, 8192 x 8, 8 x 8192: bandwidth", "cross .*", "forward", 0.90, ("copy",)),
    Goal("cross-backward", "cross attention, 8192 x 8, 8 x 8192: bandwidth", "cross .*", "backward", 0.75, ("copy",)),
    Goal("varlen-forward", "128 packed sequences of 16 to 1023", "varlen .*", "forward", 1.6, ("varlen_attn",)),
    Goal("varlen-backward", "128 packed sequences of 16 to 1023", "varlen .*", "backward", 1.4, ("varlen_attn",)),
    Goal("decode", "decode over 32k keys: bandwidth", "decode .*-k32768", "forward", 0.95, ("copy",)),
    Goal("paged", "decode over 32k keys in blocks: bandwidth", "paged .*-k32768-.*", "forward", 0.85, ("copy",)),
    Goal("paged-long", "decode over 128k keys in blocks: bandwidth", "paged .*-k131072-.*", "forward", 0.80, ("copy",)),
    Goal("train-eager", "training step, S 16384: eager", "train .*-q16384-.*-llama", "step", 1.05, ("sdpa",)),
    Goal("train-compiled", "training step, S 16384: compiled", "train .*-q16384-.*-llama", "step", 1.85,
         ("sdpa-compiled",), "ours-compiled"),
    Goal("train-fastest", "training step, S 16384: compiled, against the faster stock setting",
         "train .*-q16384-.*-llama", "step", 1.2, STOCK, "ours-compiled"),
    Goal("train-65536", "training step, S 65536: compiled, at most 57 GiB", "train .*-q65536-.*", "step", 1.3,
         ("sdpa-compiled",), "ours-compiled", most_gib=57.0),
    Goal("finetune-1b", "fine-tuning step of a 1.1B model, S 16384: compiled, against the fastest of sdpa, compiled "
         "sdpa and compiled flex, and no more memory than any of them", "train .*-llama-1b", "step", 1.15, SETTINGS,
         "ours-compiled", least_gib=True),
    Goal("accuracy", "RMS error of the output at most 1.1 times FA3's or cuDNN's", "long d(64|128)-.*-q4096-.*",
         "forward", 1 / 1.1, ("fa3", "cudnn"), error=True),
    Goal("accuracy-times30", "the same, logits times 30", "accuracy .*", "forward", 1 / 1.1, ("fa3", "cudnn"),
         error=True),
    *_feature("ranges", 3, ("forward", "both")),
    *_feature("weight", 5, ("forward",)),
    *_feature("weight", 12, ("both",)),
    *_feature("sinks", 3, ("forward", "both")),
    *_feature("softcap", 15, ("forward", "both")),
    *_feature("dropout", 30, ("forward", "both")),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One cell of a goal. None: not measured."""

    goal: Goal
    cell: str
    ours: str
    other: str
    ratio: float | None
    met: bool | None


def outcomes(figures: Figures, goal: Goal) -> list[Outcome]:
    """One for each of its cells, and one for the average where the goal has one."""
    found = [_outcome(figures, goal, cell) for cell in matching(goal.cells)]
    ratios = [x.ratio for x in found if x.ratio is not None]
    if goal.average is not None:
        mean = sum(ratios) / len(ratios) if len(ratios) == len(found) else None
        found.append(Outcome(goal, "average", "", "", mean, None if mean is None else mean >= goal.average))
    return found


def _outcome(figures: Figures, goal: Goal, cell: str) -> Outcome:
    ours = figures.get(cell, goal.direction, goal.ours)
    if ours is None:
        return Outcome(goal, cell, "not measured", "", None, None)
    unit = f"{ours.tflops:.0f} TFLOP/s" if ours.tflops and goal.against == PEERS else f"{ours.ms:.3f} ms"
    if goal.against == ("copy",):
        share = figures.copy_share(cell, goal.direction)
        text = f"{ours.gbps:.0f} GB/s", f"device copy {figures.copy_gbps or 0:.0f} GB/s"
        return Outcome(goal, cell, *text, share, None if share is None else share >= goal.ratio)
    if goal.error:
        return _error_outcome(figures, goal, cell)
    best = figures.best(cell, goal.direction, goal.against)
    if best is None:
        return Outcome(goal, cell, unit, "not measured", None, None)
    name, other = best
    theirs = f"{other.tflops:.0f} TFLOP/s" if other.tflops and goal.against == PEERS else f"{other.ms:.3f} ms"
    ratio = other.ms / ours.ms
    met = ratio >= goal.ratio
    if goal.most_gib is not None and ours.peak_gib is not None:
        unit, met = f"{unit}, {ours.peak_gib:.1f} GiB", met and ours.peak_gib <= goal.most_gib
    theirs = f"{name} {theirs}{'*' if other.anchor else ''}"
    if goal.least_gib and ours.peak_gib is not None:
        peaks = [f.peak_gib for n in goal.against if (f := figures.get(cell, goal.direction, n)) and f.peak_gib]
        least = min(peaks, default=float("inf"))
        unit, theirs = f"{unit}, {ours.peak_gib:.1f} GiB", f"{theirs}, least memory {least:.1f} GiB"
        met = met and ours.peak_gib <= least
    return Outcome(goal, cell, unit, theirs, ratio, met)


def _error_outcome(figures: Figures, goal: Goal, cell: str) -> Outcome:
    ours = figures.get(cell, goal.direction, goal.ours)
    error = None if ours is None else ours.rms_error
    for name in goal.against:
        other = figures.get(cell, goal.direction, name)
        if error and other is not None and other.rms_error:
            ratio = other.rms_error / error
            return Outcome(goal, cell, f"{error:.2e}", f"{name} {other.rms_error:.2e}", ratio, ratio >= goal.ratio)
    return Outcome(goal, cell, "not measured", "", None, None)


def reasons(path: Path = REASONS) -> dict[str, str]:
    """By goal: why it is missed, written by hand.

    Raises:
        ValueError: for a goal that does not exist.
    """
    found: dict[str, str] = tomllib.loads(path.read_text()) if path.exists() else {}
    unknown = set(found) - {g.id for g in GOALS}
    if unknown:
        raise ValueError(f"{path.name}: expected ids of goals (benchmarks/goals.py), got {', '.join(sorted(unknown))}")
    return found
