"""examples/needle.py and soak.py on a tiny model: what they write, and that a stopped run goes on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sections
from hf_flash_mc.megacontext.quality import needle_shares, needle_table

EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")


def script(name: str) -> Any:
    if EXAMPLES not in sys.path:
        sys.path.insert(0, EXAMPLES)
    return importlib.import_module(name)


def needle_arguments(model: Path, out: Path, *more: str) -> list[str]:
    arguments = ["--model", str(model), "--lengths", "1000", "1100", "--window", "448", "--lenses", "random"]
    return [*arguments, "--rounds", "1", "--digits", "2", "--device", "cpu", "--out", str(out / "needles.json"), *more]


def test_needles_are_written_with_where_and_how_and_a_stopped_run_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needle = script("needle")
    read: list[tuple[int, int]] = []
    real = needle.one_history

    def one_history(model: Any, tokenizer: Any, filler: Any, length: int, seed: int, options: Any) -> Any:
        if stop and read:
            raise KeyboardInterrupt
        read.append((length, seed))
        return real(model, tokenizer, filler, length, seed, options)

    monkeypatch.setattr(needle, "one_history", one_history)
    out = tmp_path / "new" / "needles.json"
    arguments = needle_arguments(tiny_model, out.parent, "--plot", str(out.with_suffix(".png")))
    stop = True
    with pytest.raises(KeyboardInterrupt):
        needle.main(arguments)
    assert not out.exists()
    stop = False
    needle.main(arguments)
    assert read == [(1100, 0), (1000, 0)], "each history is read once"
    assert [path.name for path in sorted(out.parent.iterdir())] == ["needles.json", "needles.png"]
    text = out.read_text()
    found = json.loads(text)
    assert str(tmp_path) not in text
    assert str(tiny_model.parent) not in text
    assert found["run"]["command"].startswith("python examples/needle.py --model tiny")
    assert {"device", "torch", "commit", "dtype", "threads"} <= found["run"].keys()
    assert found["ways"] == ["exact", "no refocus", "random"]
    cells = [(row["length"], row["depth"]) for row in found["results"]]
    assert cells == [(length, depth) for length in (1000, 1100) for depth in range(5)]
    table = needle_table(found["results"], found["ways"])
    assert table in capsys.readouterr().out
    assert table in sections.needles(found), "docs show it"


def test_workers_find_what_one_process_finds(tiny_model: Path, tmp_path: Path) -> None:
    needle = script("needle")
    for workers in ("1", "2"):
        needle.main(needle_arguments(tiny_model, tmp_path / workers, "--per-cell", "2", "--workers", workers))
    one, two = (json.loads((tmp_path / name / "needles.json").read_text()) for name in ("1", "2"))
    assert one["results"] == two["results"]
    assert [(row["length"], row["history"], row["depth"]) for row in two["results"]] == [
        (length, history, depth) for length in (1000, 1100) for history in (0, 1) for depth in range(5)
    ]


def test_a_history_too_short_for_its_needles_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--lengths: expected at least \d+ tokens, which hold 5 needles, got 200"):
        script("needle").main([*needle_arguments(tiny_model, tmp_path), "--lengths", "200"])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("needle", ["--lengths", "4096", "0"], "--lengths: expected at least 1, got [4096, 0]"),
        ("needle", ["--per-cell", "0"], "--per-cell: expected at least 1, got 0"),
        ("needle", ["--workers", "0"], "--workers: expected at least 1, got 0"),
        ("soak", ["--every", "0"], "--every: expected at least 1, got 0"),
        ("soak", ["--tokens", "-5"], "--tokens: expected at least 1, got -5"),
    ],
)
def test_wrong_arguments_are_named(
    name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script(name).main(arguments)
    assert message in capsys.readouterr().err


def test_needles_by_length_and_depth() -> None:
    results = [{"length": 10, "depth": d, "a": d > 0, "b": False} for d in (0, 1, 1, 2)]
    assert needle_table(results, ["a", "b"]).splitlines()[2] == "| 10 | 4 | 75% (0% 100% 100%) | 0% (0% 0% 0%) |"
    assert needle_shares(results, ["a"])["a"] == [(10, 0.75, pytest.approx((0.75 * 0.25 / 4) ** 0.5))]


def test_soak_is_written_with_where_and_how(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "soak.json"
    arguments = ["--model", str(tiny_model), "--tokens", "1200", "--window", "448", "--lens", "random", "--refocus"]
    arguments += ["--device", "cpu", "--out", str(out), "--plot", str(out.with_suffix(".png")), "--every", "400"]
    assert script("soak").main(arguments) == 0
    found = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    assert found["run"]["command"].startswith("python examples/soak.py --model tiny")
    assert [row["tokens"] for row in found["rows"]] == [400, 800, 1200]
    assert all(row["slots"] <= 448 for row in found["rows"])
    assert found["problems"] == []
    assert "| 1,200 |" in sections.soak(found), "docs show it"
    assert out.with_suffix(".png").exists()


def test_a_soak_that_is_stopped_leaves_what_it_measured(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soak, out = script("soak"), tmp_path / "soak.json"
    real = soak.describe

    def stopped(row: Any) -> Any:
        if row["tokens"] == 600:
            raise KeyboardInterrupt
        return real(row)

    monkeypatch.setattr(soak, "describe", stopped)
    arguments = ["--model", str(tiny_model), "--tokens", "900", "--window", "448", "--lens", "random", "--every", "300"]
    with pytest.raises(KeyboardInterrupt):
        soak.main([*arguments, "--device", "cpu", "--out", str(out)])
    found = json.loads(out.read_text())
    assert [row["tokens"] for row in found["rows"]] == [300]
    assert found["problems"] == ["stopped at 300 of 900 tokens"]
    assert found["telemetry"]["history_tokens"] == 300
