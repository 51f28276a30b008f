"""benchmarks.ring in two processes on gloo, started as torchrun starts it."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import socket
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from ranks import RANKS, gloo

from benchmarks import ring
from hf_flash_mc.measure.cells import RING, RING_SMOKE
from hf_flash_mc.ops import ring_attention


def run_rank(rank: int, port: int, folder: Path, arguments: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    off = lambda q, k, v: ring_attention(q, k, v, causal=True) * 1.001  # noqa: E731
    ring.WAYS["off"] = ring.Way("zigzag", lambda cell: off)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        code = ring.main(["--device", "cpu", "--sample-ms", "1", "--out", str(folder / "ring.csv"), *arguments])
    (folder / f"rank{rank}.txt").write_text(f"{code}\n{shown.getvalue()}")


def start(folder: Path, *arguments: str) -> list[str]:
    """The exit code and what was printed, of each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_rank, (port, folder, list(arguments)), nprocs=RANKS)
    return [(folder / f"rank{rank}.txt").read_text() for rank in range(RANKS)]


@gloo
def test_ranks_are_checked_then_timed(tmp_path: Path) -> None:
    """Every way and direction has figures; what is wrong has none, and both ranks say so in their exit code."""
    first, second = start(tmp_path)
    assert (first[0], second.split("\n", 1)) == ("1", ["1", ""])
    assert "wrong results, not timed:\noff d16-causal" in first
    assert first.splitlines()[-1].split()[:3] == [RING_SMOKE[-1].name, "backward", "off"], "the table ends it"
    with (tmp_path / "ring.csv").open() as file:
        lines = list(csv.DictReader(file))
    for cell in RING_SMOKE:
        for direction in ("forward", "backward"):
            found = {x["implementation"]: x for x in lines if (x["cell"], x["direction"]) == (cell.name, direction)}
            assert list(found) == [n for n in (ring.ONE, *ring.WAYS, "off") if cell.causal or n != "ring-contiguous"]
            for name, x in found.items():
                if name == "off":
                    assert x["note"].startswith("wrong: out is off by")
                elif name.startswith("torch"):
                    assert "back ends for GPUs only" in x["note"]
                else:
                    assert x["note"] == "runs on cpu"
                    p20, median, p80, one = (float(x[n]) for n in ("p20_ms", "median_ms", "p80_ms", "times_one"))
                    assert 0 < p20 <= median <= p80
                    assert float(x["tokens_per_s"]) == pytest.approx(1e3 * cell.batch * cell.sq / median, rel=1e-3)
                    assert one == pytest.approx(float(found[ring.ONE]["median_ms"]) / median, abs=1e-3)
                    assert (x["ranks"], x["backend"]) == ("1" if name == ring.ONE else "2", "gloo")
                assert (x["median_ms"] == "") == (name == "off" or name.startswith("torch"))
    assert lines[0]["command"].startswith("torchrun --nproc-per-node 2 -m benchmarks.ring --device cpu")
    assert str(tmp_path) not in lines[0]["command"]


def test_what_cannot_start_says_how_to(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ring.main(["--device", "cpu"]) == 2
    assert "start it by: torchrun --nproc-per-node 2 -m benchmarks.ring" in capsys.readouterr().err
    assert ring.main(["--device", "cpu", "--implementations", "star"]) == 2
    assert "expected some of one rank, ring" in capsys.readouterr().err
    assert ring.main(["--device", "cpu", "--list"]) == 0
    assert capsys.readouterr().out.split() == [cell.name for cell in RING_SMOKE]
    assert {cell.sq for cell in RING} == {65536, 131072, 262144}
