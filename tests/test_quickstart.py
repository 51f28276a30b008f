"""The main jobs run end to end on a tiny random model, and their exit codes tell whether the checks passed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SABOTAGE = """
import runpy, sys
import hf_flash_mc.patches.attention as attention
real = attention.flash_attention
attention.flash_attention = lambda *args, **options: real(*args, **options) * 1.01
sys.argv = sys.argv[1:]
sys.path.insert(0, "examples")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


def test_every_check_passes_and_names_the_back_end(tiny_model: Path) -> None:
    result = run("examples/quickstart.py", "--model", str(tiny_model), "--tokens", "301", "--new-tokens", "17")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "All checks passed." in result.stdout
    for row in ("logits: error / largest", "mean NLL of 301 tokens", "17 greedy tokens", "torch.compile, fullgraph"):
        assert row in result.stdout
    assert "1 graph, 0 breaks" in result.stdout or "needs a C++ compiler" in result.stdout
    assert "cpu" in result.stdout.split("peak memory it adds")[1], "the back end that ran must be named"


def test_wrong_attention_fails_the_run(tiny_model: Path) -> None:
    """A check that cannot fail protects nothing: attention outputs off by 1 % must give exit code 1."""
    arguments = ("examples/quickstart.py", "--model", str(tiny_model), "--tokens", "65", "--new-tokens", "2")
    arguments += ("--no-compile",)
    result = run("-c", SABOTAGE, *arguments)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAILED: logits: error / largest" in result.stdout


def test_generate_batch_gives_each_question_its_own_answer(tiny_model: Path) -> None:
    result = run("examples/generate_batch.py", "--model", str(tiny_model), "--new-tokens", "7")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 attention modules run mc_attention, 2 of them reached" in result.stdout
