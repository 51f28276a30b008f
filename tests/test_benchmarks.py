"""The benchmark harness: wrong results are not timed, peers that cannot run are noted, tables come from the file."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import registry, report, run, sanitize
from benchmarks.registry import Cell

CPU = torch.device("cpu")
CELL = Cell("smoke", 16, True, 1, 4, 2, 33, 33)


@pytest.fixture(scope="module")
def stem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of the CPU smoke run."""
    path = tmp_path_factory.mktemp("results") / "attention-test"
    assert run.main(["--device", "cpu", "--out", str(path)]) == 0
    return path


def test_run_writes_one_line_per_shape_direction_and_implementation(stem: Path) -> None:
    with stem.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = [r for r in rows if r["group"] == "smoke"]
    assert len(timed) == len(registry.SMOKE) * 2 * len(registry.CPU_IMPLEMENTATIONS)
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]), row
    assert {r["direction"] for r in rows if r["group"] == "host"} == {"host forward", "host forward+backward"}
    meta = json.loads(stem.with_suffix(".json").read_text())
    assert meta["torch"] == torch.__version__
    assert meta["command"] == f"python -m benchmarks.run --device cpu --out {stem}"


@pytest.mark.parametrize("cell", registry.SMOKE, ids=lambda c: c.name)
def test_reference_slice_agrees_with_autograd(cell: Cell) -> None:
    """The gate's own formulas, against autograd through the plain definition."""
    inputs = registry.make_inputs(cell, CPU, torch.float32)
    group = cell.q_heads // cell.kv_heads
    small = [x[:, : group if i in (0, 3) else 1] for i, x in enumerate(inputs)]
    expected = run.differentiate(registry.sdpa(cell, run.SDPBackend.MATH), *small)
    for x, y in zip(registry.reference_slice(cell, *small), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_wrong_implementation_is_not_timed() -> None:
    right = registry.ours(CELL, "cpu")
    wrong = {"ours": lambda cell: lambda q, k, v: right(q, k, v) * 1.01, "sdpa": registry.CPU_IMPLEMENTATIONS["sdpa"]}
    lines = run.measure_cell(CELL, CPU, torch.float32, wrong)
    by_name = {x.implementation: x for x in lines if x.direction == "forward"}
    assert by_name["ours"].median_ms is None
    assert by_name["ours"].note.startswith("wrong: out")
    assert by_name["sdpa"].median_ms is not None


def test_peer_that_cannot_take_a_shape_is_noted() -> None:
    def refuse(cell: Cell) -> registry.Attention:
        raise NotImplementedError("no such head dim")

    lines = run.measure_cell(CELL, CPU, torch.float32, {"fa2": refuse})
    assert [x.note for x in lines] == ["not run: NotImplementedError: no such head dim"] * 2


def test_flops_count_visible_pairs() -> None:
    full = Cell("long", 128, False, 4, 16, 16, 4096, 4096)
    assert full.flops("forward") == 4 * 4 * 16 * 4096 * 4096 * 128
    assert full.flops("backward") == 2.5 * full.flops("forward")
    assert Cell("long", 128, True, 4, 16, 16, 4096, 4096).flops("forward") == full.flops("forward") / 2


def test_report_replaces_what_stands_between_the_markers(stem: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = [str(stem), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    rows, _ = report.read(stem)
    fastest = report.figure(rows, "ours", "host forward", "median_ms")
    assert fastest is not None
    assert f"| forward | {fastest * 1e3:.0f} | " in text


def test_ratio_says_how_many_times_as_fast() -> None:
    rows = [
        {"implementation": name, "direction": direction, "median_ms": time}
        for name, direction, time in (("ours", "forward", "2"), ("fa2", "forward", "3"), ("fa2", "backward", "5"))
    ]
    assert report.ratio(rows, "ours", "fa2") == "1.50 / -"


def test_plot_draws_png_and_svg(tmp_path: Path) -> None:
    lines = [
        run.line(cell, torch.bfloat16, direction, name, [1.0 + cell.sq / 1e4, 2.0, 3.0])
        for cell in registry.CELLS
        if cell.group == "long"
        for direction in ("forward", "backward")
        for name in registry.GPU_IMPLEMENTATIONS
    ]
    run.write(lines, {"device": "a GPU"}, tmp_path / "made-up")
    assert [p.suffix for p in report.plot(tmp_path / "made-up")] == [".png", ".svg"]
    assert all(p.stat().st_size > 5000 for p in tmp_path.glob("made-up.[ps]*g"))


def test_readme_is_what_the_result_file_says() -> None:
    assert report.main(["--check"]) == 0


def test_sanitizer_driver_runs_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    """On the back end that CI has; hostile key_ranges must be in it, whatever the clamps make of them."""
    ranges = sanitize.hostile_ranges(1, 1, 63, device="cpu")
    assert (int(ranges.min()), int(ranges.max())) == (sanitize.SMALLEST, sanitize.LARGEST)
    assert sanitize.main(["--quick", "--device", "cpu", "--impl", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert not torch.are_deterministic_algorithms_enabled()
    assert "hostile ranges by head, causal" in printed
    assert "calls, forward and backward, came back" in printed
