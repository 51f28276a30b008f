"""The benchmark harness: wrong results are not timed, peers that cannot run are noted, tables come from the file."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from benchmarks import figures as figures_
from benchmarks import goals, report, sanitize, sections
from benchmarks import run as command
from benchmarks.figures import Figures, cell_of
from hf_flash_mc.measure import cells, peers, problem, record, run, timing, training, warm
from hf_flash_mc.measure.cells import Cell

CPU = torch.device("cpu")
CELL = Cell("smoke", 16, True, 1, 4, 2, 33, 33)
EFFORT = timing.Effort(1, 1, 1)
META = record.Run("a GPU", None, None, "3", "2", "3", "5", "0", "abcdef", "2026-01-01", "method", "command")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result of the CPU smoke run."""
    path = tmp_path_factory.mktemp("results") / "attention-test.csv"
    assert command.main(["--device", "cpu", "--out", str(path)]) == 0
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def made_up(tmp_path: Path, ms: float = 1.0, skip: str = " ", gib: float = 50.0) -> Path:
    """A file with every cell of the registry: ours at ``ms`` and ``gib``, a copy, the cell without its feature, stock
    training."""
    lines = []
    for cell in cells.CELLS:
        names = ["ours", "copy", *(["plain"] if cell.group == "features" else [])]
        names += ["ours-compiled", "sdpa", "sdpa-compiled"] if cell.group == "train" else ["fa2", "cudnn"]
        names += ["varlen_attn"] if cell.group == "varlen" else []
        for direction in cell.directions:
            for name in names:
                time = ms if name.startswith("ours") else 1.0
                if skip not in cell.name:
                    peak = gib if name.startswith("ours") else 50.0
                    measured = {"peak_gib": peak, "rms_error": 1e-3 * time}
                    lines.append(record.line(cell, torch.bfloat16, direction, name, [time], **measured))
    path = tmp_path / "made-up.csv"
    record.write(lines, META, path)
    return path


def test_run_writes_one_line_per_shape_direction_and_implementation(result: Path) -> None:
    rows = rows_of(result)
    expected = {
        (c.name, d, n) for c in cells.SMOKE for d in c.directions for n in peers.CPU_DEFAULT if peers.applies(n, c)
    }
    timed = {(r["cell"], r["direction"], r["implementation"]) for r in rows if r["group"] != "host"}
    assert {k for k in timed if k[2] != "copy"} == expected
    assert {k[2] for k in timed} == {*peers.CPU_DEFAULT, "copy"}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"]), row
        assert row["torch"] == torch.__version__
        assert row["command"] == f"python -m benchmarks.run --device cpu --out {result.name}"
    assert {r["direction"] for r in rows if r["group"] == "host"} == {"host forward", "host forward+backward"}
    assert {r["note"] for r in rows if r["implementation"] == "ours" and r["group"] != "host"} == {"runs on cpu"}


@pytest.mark.parametrize("cell", cells.SMOKE, ids=lambda c: c.name)
def test_textbook_and_exact_answers_agree(cell: Cell) -> None:
    """What the gate compares with: two independent formulas, and a whole problem's piece is that piece of the whole."""
    p = problem.make_problem(cell, CPU, torch.float32)
    gate = problem.Gate(p)
    for x, y in zip(gate.native, gate.exact, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=2e-5)
    if not set(gate.piece.options) - {"causal"}:
        for x, y in zip(problem._chunked(gate.piece), gate.exact, strict=False):
            torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=2e-5)


def test_wrong_implementation_is_not_timed() -> None:
    def wrong(p: problem.Problem) -> problem.Attention:
        right = peers.ours(p)
        return lambda q, k, v: right(q, k, v) * 1.01

    lines = timing.measure_cell(CELL, CPU, torch.float32, {"ours": wrong, "fa2": peers.IMPLEMENTATIONS["fa2"]}, EFFORT)
    by_name = {x.implementation: x for x in lines if x.direction == "forward"}
    assert by_name["ours"].median_ms is None
    assert by_name["ours"].note.startswith("wrong: out")
    assert by_name["fa2"].median_ms is not None


def test_wrong_gradient_is_not_timed() -> None:
    def wrong(p: problem.Problem) -> problem.Attention:
        right = peers.ours(p)
        return lambda q, k, v: right(q, k + 0.01 * (k - k.detach()), v)  # the value of k, 1.01 times its gradient

    lines = timing.measure_cell(CELL, CPU, torch.float32, {"ours": wrong}, EFFORT)
    assert [x.median_ms for x in lines] == [None, None]
    assert all(x.note.startswith("wrong: dk") for x in lines)


def test_peer_without_a_backward_is_timed_forward_only() -> None:
    def forward_only(p: problem.Problem) -> problem.Attention:
        right = peers.ours(p)
        return lambda q, k, v: right(q.detach(), k.detach(), v.detach())

    forward, backward = timing.measure_cell(CELL, CPU, torch.float32, {"fa3": forward_only}, EFFORT)
    assert forward.median_ms is not None
    assert backward.median_ms is None
    assert backward.note.startswith("not run: RuntimeError")


def test_peer_that_is_not_installed_is_noted() -> None:
    lines = timing.measure_cell(CELL, CPU, torch.float32, {"fa3": peers.IMPLEMENTATIONS["fa3"]}, EFFORT)
    assert [x.note for x in lines] == ["not run: not installed: No module named 'flash_attn_interface'"] * 2


def test_flops_count_visible_pairs() -> None:
    full = Cell("long", 128, False, 4, 16, 16, 4096, 4096)
    assert full.flops("forward") == 4 * 4 * 16 * 4096 * 4096 * 128
    assert full.flops("backward") == 2.5 * full.flops("forward")
    assert Cell("long", 128, True, 4, 16, 16, 4096, 4096).flops("forward") == full.flops("forward") / 2
    packed = Cell("varlen", 16, False, 3, 2, 2, 19, 19, "packed")
    assert packed.flops("forward") == 4 * 2 * 16 * sum(n * n for n in packed.lengths)


def test_cells_have_names_of_their_own_that_can_be_parsed() -> None:
    names = [c.name for c in cells.CELLS]
    assert len(set(names)) == len(names)
    given = cells.parse("d128-causal-b4-h32:8-q4096-k8192")
    assert (given.head_dim, given.causal, given.batch, given.q_heads, given.kv_heads) == (128, True, 4, 32, 8)
    assert (given.sq, given.sk) == (4096, 8192)
    for wrong in ("128", "d128-causal-b4-h30:8-q4096-k4096", "d128-causal-b0-h8:8-q4096-k4096"):
        with pytest.raises(ValueError, match=re.escape(f"got {wrong!r}")):
            cells.parse(wrong)


def test_time_limit_ends_the_run_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cut.csv"
    assert run.main(["--device", "cpu", "--time-limit", "0", "--only", "decode", "windows", "--out", str(out)]) == 3
    printed = capsys.readouterr().out
    assert "missing (time limit, or the error beside it):\nd16-full-b3-h2:2-q8-k8\nd16-full-b2-h4:2-q1-k40\n" in printed
    assert not out.exists()


def test_cell_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = timing.measure_cell

    def measure(cell: Cell, *rest: object) -> list[record.Line]:
        if cell.group == "windows":
            raise MemoryError("no room")
        return real(cell, *rest)

    monkeypatch.setattr(timing, "measure_cell", measure)
    out = tmp_path / "x.csv"
    assert run.main(["--device", "cpu", "--only", "decode", "windows", "--out", str(out)]) == 3
    assert "d16-full-b3-h2:2-q8-k8: MemoryError: no room" in capsys.readouterr().out
    assert {r["cell"] for r in rows_of(out)} == {"d16-full-b2-h4:2-q1-k40"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonesuch"], "only: expected a part of a group's or cell's name, got 'nonesuch'"),
        (["--only", "("], r"only: expected regular expressions, got '\('"),
        (["--implementations", "fa9"], "implementations: expected some of ours, .*, got fa9"),
        (["--device", "tpu9"], "device: expected cpu or cuda, got 'tpu9'"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", "cpu", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_list_shows_cells_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", "cpu", "--list", "--only", "decode", "host"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]] == [
        ["host", "d64-causal-b1-h16:16-q128-k128"],
        ["decode", "d16-full-b2-h4:2-q1-k40"],
        ["These", "are"],  # the small cells of a CPU
    ]


@pytest.mark.parametrize("feature", ["llama", "llama-1b"])
def test_training_step_runs_stock_and_ours(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell("train", 16, True, 1, 4, 2, 24, 24, feature, ("step",))
    monkeypatch.setattr(training, "_NAMES", ("ours", "sdpa"))
    monkeypatch.setattr(training, "TRAIN_VOCABULARY", 50)
    seen: list[record.Line] = []
    lines, missing = training.measure(cell, CPU, lambda: 1e9, seen.extend, layers=1, hidden=64)
    assert missing == []
    assert seen == lines
    assert [(x.implementation, x.samples) for x in lines] == [("ours", 7), ("sdpa", 7)]
    losses = [float(x.note.removeprefix("loss ").split(";")[0]) for x in lines]
    for x in lines:
        spent = dict(part.split()[:2] for part in x.note.split("; ")[1].split(", "))
        assert list(spent) == ["attention", "matmul", *(["optimizer"] if feature == "llama-1b" else []), "other"]
        assert all(float(ms) > 0 for ms in spent.values()), "each kind was recognised"
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert training.measure(cell, CPU, lambda: 1.0)[1] == [f"{cell.name} ours", f"{cell.name} sdpa"]


def square_or_fail(x: int) -> int:
    if x == 3:
        raise ZeroDivisionError("three")
    return x * x


def test_parallel_jobs_return_results_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    found = warm.in_parallel("squares", square_or_fail, {"two": 2, "three": 3}, 60)
    assert found["two"] == 4
    assert "ZeroDivisionError: three" in str(found["three"])
    assert "[2/2]" in capsys.readouterr().err


def test_report_replaces_what_stands_between_the_markers(result: Path, tmp_path: Path) -> None:
    readme, page = tmp_path / "README.md", tmp_path / "performance.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for name in sections.PAGES:
        (tmp_path / name).write_text("a page without markers\n")
    arguments = [str(result), "--readme", str(readme), "--page", str(page), "--docs", str(tmp_path)]
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    host = Figures(result).get("d64-causal-b1-h16:16-q128-k128", "host forward", "ours")
    assert host is not None
    assert f"| forward | {host.ms * 1e3:.0f} | " in text


def test_page_says_where_a_training_step_spends_its_time(tmp_path: Path) -> None:
    cell = next(c for c in cells.CELLS if c.feature == "llama-1b")
    note = "loss 10.5000; attention 20.500 ms, matmul 100.250 ms, optimizer 5.000 ms, other 30.000 ms"
    lines = [record.line(cell, torch.bfloat16, "step", n, [200.0], note, 60.0) for n in ("ours-compiled", "sdpa")]
    path = tmp_path / "tune.csv"
    record.write([*lines, record.line(cell, torch.bfloat16, "step", "flex-compiled", [], "not run: full")], META, path)
    page = report.performance([path])
    assert "| ours, compiled | 1 | 16384 | 20.5 | 100.2 | 5.0 | 30.0 |" in page
    assert "200 ms, 60.0 GiB" in page
    assert "not run" not in page


def test_missing_peer_counts_with_its_marked_anchor(tmp_path: Path) -> None:
    figures = Figures(made_up(tmp_path))
    name = "d128-causal-b4-h16:16-q4096-k4096"
    best = figures.best(name, "forward")
    assert best is not None
    assert (best[0], best[1].anchor, round(best[1].tflops or 0)) == ("fa3", True, 674)
    assert figures.ratio(name, "forward") == pytest.approx(best[1].ms / 1.0)
    row = next(r for r in figures.rows if r["cell"] == name)
    assert report.pair(figures, row, "fa3", "tflops") == "674* / -"
    assert "*" not in report.pair(figures, row, "fa2", "tflops")
    measured = figures.get(name, "forward", "fa2")
    assert measured is not None
    assert not measured.anchor


def test_of_several_files_the_last_one_that_has_a_cell_counts(tmp_path: Path) -> None:
    first = made_up(tmp_path)
    host, other = timing.HOST_CELL, next(c for c in cells.CELLS if c.group == "accuracy")
    later = tmp_path / "later.csv"
    record.write([record.line(c, torch.bfloat16, "forward", "ours", [7.0]) for c in (host, other)], META, later)
    figures = Figures(first, later)
    rows = [r for r in figures.rows if r["cell"] == other.name]
    assert [(r["implementation"], r["median_ms"]) for r in rows] == [("ours", "7.0")]
    assert figures.get(other.name, "forward", "fa2") is None, "figures of two runs share no cell"
    assert figures.files[first] == [r for r in rows_of(first) if r["cell"] != other.name]
    earlier, last = report.origin(figures, "results").split("\n\n")
    assert "(results/made-up.csv)" in earlier
    assert last.startswith("host, accuracy: ")


def test_every_anchor_and_goal_names_cells_of_the_registry() -> None:
    for cell, _, name in figures_.read_anchors(figures_.ANCHORS):
        assert cell_of(cell).name == cell
        assert name in peers.LABELS
    for goal in goals.GOALS:
        assert figures_.matching(goal.cells), goal.id
    assert len({g.id for g in goals.GOALS}) == len(goals.GOALS)


def test_goals_are_met_missed_or_open(tmp_path: Path) -> None:
    def outcome(ms: float, goal: str, skip: str = " ", gib: float = 50.0) -> list[bool | None]:
        found = next(g for g in goals.GOALS if g.id == goal)
        return [x.met for x in goals.outcomes(Figures(made_up(tmp_path, ms, skip, gib)), found)]

    assert outcome(0.5, "varlen-forward") == [True, True]
    assert outcome(0.7, "varlen-forward") == [False, False]
    assert outcome(1.02, "ranges-both") == [True]
    assert outcome(1.04, "ranges-both") == [False]
    assert outcome(0.5, "decode", skip="k32768") == [None]
    assert outcome(0.5, "train-65536") == [True]
    assert outcome(0.86, "finetune-1b") == [True]
    assert outcome(0.88, "finetune-1b") == [False]
    assert outcome(0.86, "finetune-1b", gib=50.1) == [False], "no more memory than the best"
    assert outcome(1.09, "accuracy-times30") == [True, True]
    assert outcome(1.11, "accuracy-times30") == [False, False]
    assert outcome(0.01, "forward-long")[-1] is True  # the average
    assert outcome(9.0, "forward-long")[-1] is False


def test_page_shows_reasons_of_missed_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "reasons.toml"
    written.write_text('dropout-both = "Philox needs integer units."\n')
    monkeypatch.setattr(goals, "reasons", lambda: goals.tomllib.loads(written.read_text()))
    page = report.performance([made_up(tmp_path, ms=9.0)])
    assert "Philox needs integer units." in page
    assert "| **no** |" in page
    assert "recompute" in page
    written.write_text('nonesuch = "text"\n')
    monkeypatch.undo()
    with pytest.raises(ValueError, match="nonesuch"):
        goals.reasons(written)


def test_plots_are_png_and_svg(tmp_path: Path) -> None:
    from benchmarks.plots import plot

    written = plot(made_up(tmp_path))
    assert [p.name for p in written] == [f"made-up{n}.{k}" for n in ("", "-ratios") for k in ("png", "svg")]
    assert all(p.stat().st_size > 5000 for p in written)


def test_readme_and_page_are_what_the_result_file_says() -> None:
    assert report.main(["--check"]) == 0


def test_gate_has_the_bound_of_the_tests() -> None:
    from helpers import TOLERANCE

    assert problem.TOLERANCE == TOLERANCE


def test_sanitizer_driver_runs_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    """On the back end that CI has; hostile key_ranges must be in it, whatever the clamps make of them."""
    ranges = sanitize.hostile_ranges(1, 1, 63, device="cpu")
    assert (int(ranges.min()), int(ranges.max())) == (sanitize.SMALLEST, sanitize.LARGEST)
    assert sanitize.main(["--quick", "--device", "cpu", "--impl", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert not torch.are_deterministic_algorithms_enabled()
    assert "hostile ranges by head, causal" in printed
    assert "calls, forward and backward, came back" in printed


def test_parts_of_megacontext_are_timed(tmp_path: Path) -> None:
    from benchmarks import megacontext

    sizes = ["--shape", "tiny", "--entries", "64", "--size", "64", "--window", "320", "--dtype", "float32"]
    assert megacontext.main([*sizes, "--device", "cpu", "--out", str(tmp_path / "out.json")]) == 0
    rows = {row["part"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert len(rows) == 7
    assert all(row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in rows.values())
    assert rows["refocus, random lens"]["edits"] > 0
    assert rows["refocus, random lens"]["slots"] <= 320
    refocus, step = rows["refocus, recall lens"], rows["decoding step, static cache, compiled"]
    assert refocus["overhead"] == pytest.approx(refocus["median_ms"] / step["median_ms"] / refocus["interval"])


def test_chosen_parts_of_megacontext_are_kept_once_they_are_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import megacontext

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(megacontext, "decode_step", stopped)
    sizes = ["--shape", "tiny", "--entries", "64", "--size", "64", "--window", "320", "--dtype", "float32"]
    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        megacontext.main([*sizes, "--device", "cpu", "--out", str(out), "--only", "refocus", "decoding"])
    parts = [row["part"] for row in json.loads(out.read_text())["rows"]]
    assert parts == ["refocus, recall lens", "refocus, random lens"]


def test_positions_are_measured_in_the_same_slots(tmp_path: Path, tiny_model: Path) -> None:
    from benchmarks import positions
    from hf_flash_mc.megacontext.training import save_tokens

    generator = torch.Generator().manual_seed(0)
    save_tokens(tmp_path / "a.npy", [torch.randint(256, (1200,), generator=generator)])
    sizes = ["--context", "440", "--window", "140", "--block", "4", "--ranges", "400", "210", "--windows", "2"]
    files = ["--model", str(tiny_model), "--tokens", str(tmp_path / "a.npy"), "--out", str(tmp_path / "out.json")]
    assert positions.main([*sizes, *files, "--device", "cpu"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [list(row) for row in rows] == [["absolute", "in 400", "in 210"]] * 2
    assert len({x for row in rows for x in row.values()}) == 6, "each numbering is another one"
    with pytest.raises(SystemExit):
        positions.main([*sizes, *files, "--device", "cpu", "--ranges", "150"])


def test_memory_of_training_is_counted_on_both_ways_of_attention(tmp_path: Path) -> None:
    from benchmarks import activation_memory

    sizes = ["--shape", "tiny", "--context", "256", "--batch", "2", "--block", "8", "--dtype", "float32"]
    assert activation_memory.main([*sizes, "--device", "cpu", "--out", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["head"], row["attention"]) for row in rows] == [
        (head, way) for head in activation_memory.HEADS for way in ("ours", "eager")
    ]
    for ours, eager in zip(rows[::2], rows[1::2], strict=True):
        assert eager["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        if ours["head"] == "lens":  # which learns from what was measured without gradients
            assert eager["kept_mib"] == ours["kept_mib"]
        else:
            assert eager["kept_mib"] > 1.3 * ours["kept_mib"]
