"""docs/ is filled from the JSON files that the commands write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from benchmarks import report, sections

RUN = {"device": "a GPU", "dtype": "float32", "torch": "2", "transformers": "5", "commit": "abcdef0123456789"}
RUN |= {"date": "2026-01-01", "command": "hf-flash-mc evaluate --windows 2"}
QUALITY = {
    "options": {"model": "small", "tokens": "docs-held-out.npy", "text": None, "context": 2048},
    "slots": {"gists": 96},
    "missing": ["SnapKV (kvpress): kvpress is not installed"],
    "losses": {"whole": [2.0, 3.0], "drop": [4.0, 5.0], "gists": [3.5, 4.5], "trained gists": [3.0, 4.0]},
}
NEEDLES = {
    "options": {"window": 2048, "rounds": 3, "edits": 4, "heads": None},
    "ways": ["exact", "recall"],
    "results": [{"length": 8192, "depth": depth, "exact": True, "recall": depth > 0} for depth in range(2)],
}
ROW = {"device_mib": 100.4, "host_mib": 50.0, "tokens_per_second": 1234.5, "slots": 512, "swap_rate": 0.1}
SOAK = {
    "options": {"window": 512},
    "rows": [{**ROW, "tokens": 5000}, {**ROW, "tokens": 10000}, {**ROW, "tokens": 20000, "device_mib": 101.0}],
    "history_mib": 234.5,
    "problems": [],
}
ACTIVATIONS = {
    "rows": [
        {"head": "lens", "context": 2048, "batch": 8, "attention": way, "read_mib": a, "learn_mib": b, "kept_mib": 7.0}
        for way, a, b in (("ours", 100.0, 250.0), ("eager", 1500.0, 250.0))
    ]
    + [{"head": "gists, kv", "context": 8192, "batch": 2, "attention": "eager", "note": "out of memory"}]
}
KILL = {"script": "finetune.py", "kills": 20, "kills within a checkpoint": 3, "runs": 9}
KILLS = {"rows": [KILL | {"same losses": True, "same weights": same} for same in (True, False)]}


def write(folder: Path, name: str, found: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps({"run": RUN, **found}))


def page(*names: str) -> str:
    return "before\n" + "".join(f"<!-- {n}:begin -->\nold\n<!-- {n}:end -->\nbetween\n" for n in names) + "after\n"


def test_pages_hold_what_the_files_say_and_only_between_markers(tmp_path: Path) -> None:
    write(tmp_path, "quality-docs.json", QUALITY)
    write(tmp_path, "quality-other.json", QUALITY)
    write(tmp_path, "needles-a.json", NEEDLES)
    write(tmp_path, "soak-a.json", SOAK)
    write(tmp_path, "training-kills-cpu.json", KILLS)
    (tmp_path / "needles-a.png").touch()
    text = sections.filled(page("quality", "needles", "soak", "kills"), tmp_path)
    assert sections.filled(text, tmp_path) == text, "filled twice is filled once"
    assert text.startswith("before\n<!-- quality:begin -->\nModel small, text docs-held-out, 2 windows of 2048 tokens.")
    assert text.endswith("<!-- kills:end -->\nbetween\nafter\n")
    assert "old" not in text
    assert text.count("leaves 2.500 nats a token") == 2
    line = "{} | {} | {:.3f} ± 0.000 | {:.3f} ({:.3f} to {:.3f}) | {} ({} to {}) | 0.0001 | {} |"
    assert line.format("| gists", 96, *[1.5] * 4, *["25%"] * 3, "") in text
    assert line.format("| trained gists", "", *[1.0] * 4, *["50%"] * 3, "0.0001") in text
    assert "| SnapKV (kvpress) | | not run: kvpress is not installed |" in text
    assert "a GPU, float32, torch 2, transformers 5, commit abcdef012345, 2026-01-01; `hf-flash-mc evaluate" in text
    assert "[quality-other.json](../benchmarks/results/quality-other.json)" in text
    assert "| 8192 | 2 | 100% (100% 100%) | 50% (0% 100%) |" in text
    assert text.count("![") == 1
    assert "![needles-a](../benchmarks/results/needles-a.png)" in text
    assert "| 10,000 | 512 of 512 | 100 | 50 | 1234 |" in text
    assert "| 20,000 | 512 of 512 | 101 | 50 | 1234 |" in text
    assert "5,000" not in text
    assert "every check passed" in text
    assert "| finetune.py | 20 | 3 | 9 | the unbroken run's, bit for bit |" in text
    assert "| finetune.py | 20 | 3 | 9 | **differ** |" in text


def test_what_is_not_measured_is_said(tmp_path: Path) -> None:
    write(tmp_path, "soak-a.json", {**SOAK, "problems": ["the budget was exceeded"]})
    text = sections.filled(page("quality", "soak"), tmp_path)
    assert "Not measured yet: no `benchmarks/results/quality-*.json`." in text
    assert "every check passed" not in text
    assert "MiB; the budget was exceeded." in text


def test_the_command_fills_and_checks_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in sections.PAGES:
        (tmp_path / name).write_text(page("needles"))
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    write(tmp_path, "needles-a.json", NEEDLES)
    files = [str(tmp_path / "none.csv"), "--readme", str(tmp_path / "README.md"), "--page", str(tmp_path / "p.md")]
    files += ["--docs", str(tmp_path), "--results", str(tmp_path)]
    assert report.main([*files, "--check"]) == 1
    assert report.main(files) == 0
    assert report.main([*files, "--check"]) == 0
    write(tmp_path, "needles-b.json", NEEDLES)
    capsys.readouterr()
    assert report.main([*files, "--check"]) == 1
    assert "out of date: megacontext.md, benchmarks.md" in capsys.readouterr().out


def test_attention_over_gpus_is_compared_with_one(tmp_path: Path) -> None:
    names = ["cell", "direction", "implementation", "sq", "causal", "median_ms", "peak_gib", "times_one", "ranks"]
    names += ["note", "q_heads", "kv_heads", "head_dim", *RUN]
    rows = [
        ["a", "forward", "one rank", 65536, True, 50.4, 4.0, 1.0, 1, "", 32, 8, 128, *RUN.values()],
        ["a", "forward", "ring", 65536, True, 28.0, 2.04, 1.8, 2, "", 32, 8, 128, *RUN.values()],
        ["a", "forward", "torch", 65536, True, "", "", "", 2, "wrong: dq", 32, 8, 128, *RUN.values()],
    ]
    (tmp_path / "ring-a.csv").write_text("\n".join(",".join(map(str, row)) for row in [names, *rows]))
    text = sections.filled(page("ring"), tmp_path)
    assert "2 GPUs; 32 query and 8 KV heads of 128." in text
    assert "| 65,536 | causal | forward | 50 ms, 4.0 GiB | 1.80 x, 2.0 GiB | wrong: dq |" in text
    assert "a GPU, float32, torch 2, transformers 5, commit abcdef012345, 2026-01-01" in text


def test_every_kind_has_its_place_in_docs() -> None:
    pages = "".join((report.ROOT / "docs" / name).read_text() for name in sections.PAGES)
    for name in sections.KINDS:
        assert pages.count(f"<!-- {name}:begin -->") == pages.count(f"<!-- {name}:end -->") == 1


def test_positions_are_compared_history_by_history(tmp_path: Path) -> None:
    rows = [{"absolute": x, "in 4096": x + 0.01, "in 2048": x + 0.02} for x in (1.0, 3.0)]
    write(tmp_path, "positions-a.json", {"run": RUN | {"method": "8000 tokens in 1024 slots"}, "rows": rows})
    text = sections.filled(page("positions"), tmp_path)
    assert "2 histories; 8000 tokens in 1024 slots." in text
    assert "| absolute | 2.0000 |  |" in text
    assert "| in 2048 | 2.0200 | +0.0200 (+0.0200 to +0.0200) |" in text


def test_memory_of_training_compares_the_fuller_parts(tmp_path: Path) -> None:
    write(tmp_path, "activation-memory-a.json", ACTIVATIONS)
    text = sections.filled(page("activations"), tmp_path)
    assert "| lens | 2,048 | 8 | 100 / 250 (7 kept) | 1,500 / 250 (7 kept) | 6.0 |" in text
    assert "| gists, kv | 8,192 | 2 | - | out of memory | - |" in text
