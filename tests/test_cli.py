"""The commands check, bench, tune and env, and the cache that tune writes: on the CPU, in sizes that take no time."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_flash_mc import __version__
from hf_flash_mc.cli import app
from hf_flash_mc.measure import check, progress
from hf_flash_mc.ops.tuning import Config, cache

SHAPE = "d16-causal-b1-h2:1-q40-k40"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache."""
    monkeypatch.setenv("HF_FLASH_MC_CACHE", str(tmp_path))
    monkeypatch.delenv(cache.SETTING, raising=False)
    cache.forget()
    yield tmp_path
    cache.forget()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def call(**changes: Any) -> Any:
    """What a lookup looks at of a plan."""
    values = {"flags": (True, *[False] * 12), "packed": False, "dtype": torch.bfloat16, "d": 64, "dv": 64}
    return SimpleNamespace(**(values | {"max_q": 4000, "max_k": 4000} | changes))


def test_check_passes_on_the_cpu_with_every_case() -> None:
    result = run("check", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for case in check.CASES:
        assert re.search(rf"{re.escape(case.name)} .*  ok\n", result.output), case.name
    assert f"{len(check.CASES)} of {len(check.CASES)} cases within the error bound" in result.output


@pytest.mark.parametrize("case", check.CASES, ids=lambda c: c.name)
def test_a_wrong_back_end_fails_every_case(case: check.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of 3 % in one gradient, or in the output, is found."""
    from hf_flash_mc import ops

    for name in ("flash_attention", "flash_attention_varlen"):
        right = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda q, k, v, *a, right=right, **o: right(q, _gradient(k, 1.03), v, *a, **o))
    found = check.run_case((case, "cpu", "auto"))
    assert not found.ok
    assert found.worst[0] == "dk" or case.name == "float16"


def _gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x, whose gradient is multiplied."""
    return x + (factor - 1) * (x - x.detach())


def test_check_says_what_failed_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end that cannot take a case is no pass."""

    def broken(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError("flash_attention: 1 problem with this call\n  - q: that it is")

    monkeypatch.setattr("hf_flash_mc.ops.flash_attention", broken)
    result = run("check", "--device", "cpu", "--only", "softcap")
    assert result.exit_code == 1
    assert "NotImplementedError: flash_attention: 1 problem with this call - q: that it is" in result.output
    assert "0 of 1 cases within the error bound" in result.output
    assert "hf-flash-mc env" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--only", "nonesuch"], "hf-flash-mc check: only: expected a part of a case's name, got 'nonesuch'"),
        (["check", "--impl", "fa9"], "hf-flash-mc check: impl: expected one of auto, .*, got 'fa9'"),
        (["check", "--device", "cpu", "--impl", "hopper"], "check: impl='hopper': .* capability 9.0, got cpu"),
        (["check", "--device", "tpu9"], "hf-flash-mc check: device: expected cpu or cuda, got 'tpu9'"),
        (["tune", "d64"], "hf-flash-mc tune: shape: expected HEAD_DIM, .*, got 'd64'"),
        (["tune", SHAPE, "--dtype", "int8"], "hf-flash-mc tune: dtype: expected one of .*, got 'int8'"),
        (["tune", SHAPE, "--most", "0"], "hf-flash-mc tune: most: expected at least 1 configuration, got 0"),
        (["bench", "--only", "nonesuch"], "hf-flash-mc bench: only: expected a part .*, got 'nonesuch'"),
        (["bench", "--out", "x.json"], "hf-flash-mc bench: out: expected a file that ends in .csv, got 'x.json'"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, home: Path) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert re.search(message, result.output), result.output


@pytest.mark.parametrize(
    ("name", "first"), [("Llama", "llama: exact"), ("GPT-2", "gpt2: exact"), ("lasr", "lasr_ctc"), ("OLMo 2", "olmo2:")]
)
def test_models_are_found_by_letters_of_any_case(name: str, first: str) -> None:
    result = run("models", name)
    assert result.exit_code == 0
    assert any(line.startswith(first) for line in result.output.splitlines())


def test_models_of_no_name_and_the_version() -> None:
    assert run("models", "DeepSeek V2 and V3").output.startswith("deepseek_v2: exact")  # a family
    result = run("models", "nonesuch")
    assert result.exit_code == 1
    assert "no model type of the table has 'nonesuch' in its name" in result.output
    assert run("--version").output == f"hf-flash-mc {__version__}\n"


def test_no_gpu_is_said(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run("check", "--device", "cuda")
    assert result.exit_code == 2
    assert "it finds no GPU; use cpu, or install a CUDA build of torch" in result.output
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = run("tune", SHAPE, "--device", "cpu")
    assert result.exit_code == 2
    assert "the CPU back end has no tile sizes to tune" in result.output


def test_bench_passes_its_options_on(tmp_path: Path) -> None:
    out = tmp_path / "x.csv"
    result = run("bench", "--device", "cpu", "--only", "decode", "--implementations", "ours", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "d16-full-b2-h4:2-q1-k40" in out.read_text()
    assert "hf-flash-mc bench --device cpu" in out.read_text()


def test_progress_is_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.Progress("walking", 10) as bar:
        bar.step("one")
    assert re.fullmatch(r"\[ 1/10\] +\d+\.\d s  one\n", capsys.readouterr().err)


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.Progress("walking", 2) as bar:
        bar.step("one")
        assert bar._bar.tasks[0].completed == 1
        assert bar._bar.tasks[0].description == "walking: one"


# the cache


def test_rows_are_found_by_kernel_width_head_dim_mask_and_length(home: Path) -> None:
    key = cache.row_key("fwd", call())
    assert key == "fwd/half/d64/causal/4096"
    assert cache.tuned("fwd", call(), Config) is None
    cache.store({key: [32, 64, 2, 3]})
    assert cache.tuned("fwd", call(), Config) == Config(32, 64, 2, 3)
    assert cache.tuned("fwd", call(max_q=1, max_k=2049), Config) == Config(32, 64, 2, 3)
    for other in ({"max_k": 4097}, {"d": 128}, {"dtype": torch.float32}, {"packed": True}, {"flags": (False,) * 13}):
        assert cache.tuned("fwd", call(**other), Config) is None, other
    assert cache.tuned("dq", call(), Config) is None
    window = call(flags=(True, True, *[False] * 11))
    assert cache.row_key("fwd", window) is None
    cache.store({key: None})
    assert cache.tuned("fwd", call(), Config) is None


def test_rows_of_other_gpus_tritons_and_kernels_are_kept_and_not_used(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.store({"fwd/half/d64/causal/4096": [32, 64, 2, 3]})
    monkeypatch.setattr(cache, "source_hash", lambda: "other")
    cache.forget()
    assert cache.tuned("fwd", call(), Config) is None
    cache.store({"fwd/half/d64/causal/4096": [16, 16, 1, 1]})
    assert len(json.loads((home / "tuning.json").read_text())) == 2
    assert "interpreter | triton" in cache.owner() or torch.cuda.is_available()


def test_environment_variable_turns_the_cache_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store({"fwd/half/d64/causal/4096": [32, 64, 2, 3]})
    monkeypatch.setenv(cache.SETTING, "shipped")
    cache.forget()
    assert cache.tuned("fwd", call(), Config) is None
    monkeypatch.setenv(cache.SETTING, "off")
    cache.forget()
    with pytest.raises(ValueError, match='HF_FLASH_MC_TUNING: expected "user" or "shipped"'):
        cache.tuned("fwd", call(), Config)


def test_broken_cache_is_named_with_what_to_do(home: Path) -> None:
    cache.store({"fwd/half/d64/causal/4096": [32, 64, 2, 3, 4, 5, 6, 7]})
    with pytest.raises(
        ValueError, match=r"fwd/half/d64/causal/4096: expected the fields of Config, .* delete the file"
    ):
        cache.tuned("fwd", call(), Config)
    for text in ("{", "[]", '{"a": 1}'):
        (home / "tuning.json").write_text(text)
        cache.forget()
        with pytest.raises(ValueError, match="expected the JSON that hf-flash-mc tune writes"):
            cache.tuned("fwd", call(), Config)
    result = run("env")
    assert result.exit_code == 0
    assert "tuning cache: " in result.output
    assert "broken: " in result.output


def test_kernels_hash_covers_both_back_ends() -> None:
    folder = Path(cache.__file__).parent.parent
    names = {p.name for p in [*folder.glob("portable/*.py"), *folder.glob("hopper/*.py")]}
    assert {"forward.py", "backward.py", "few_keys.py", "shim.py"} <= names
    assert re.fullmatch("[0-9a-f]{12}", cache.source_hash())


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts on the interpreter's table")


@interpreted
def test_tune_finds_the_fastest_right_configuration_and_calls_use_it(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timing is made up: the first candidate takes half the time, the second is wrong and would take none."""
    from hf_flash_mc.measure import tune as search
    from hf_flash_mc.measure.problem import make_problem
    from hf_flash_mc.ops.portable import plan as plans
    from hf_flash_mc.ops.spec import Spec

    real = search.kernels

    def only_forward(problem: Any, plan: Any) -> list[search.Kernel]:
        (kernel,) = [k for k in real(problem, plan) if k.kind == "fwd"]
        wrong, run_ = kernel.candidates[1], kernel.run
        kernel.run = lambda c: tuple(x * 2 for x in run_(c)) if c == wrong else run_(c)
        times = {kernel.shipped: 1.0, kernel.candidates[0]: 0.5, wrong: 0.01}
        timed = iter([times[kernel.shipped], times[kernel.candidates[0]], *[1.0, 0.5] * 8])
        monkeypatch.setattr(search, "sample", lambda call, device, effort: [next(timed)])
        return [kernel]

    monkeypatch.setattr(search, "kernels", only_forward)
    shipped = Config(32, 32, 4, 1)
    result = run("tune", SHAPE, "--device", "cpu", "--dtype", "float32", "--most", "2", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "nothing stored" in result.output
    assert not (home / "tuning.json").exists()
    result = run("tune", SHAPE, "--device", "cpu", "--dtype", "float32", "--most", "2")
    assert result.exit_code == 0, result.output
    assert "1 of 1 kernels have a faster configuration" in result.output
    assert " 2.00 " in result.output
    assert " 2/3 " in result.output
    (rows,) = json.loads((home / "tuning.json").read_text()).values()
    (key,) = rows
    assert key == "fwd/wide/d16/causal/64"
    problem = make_problem(search.parse(SHAPE), torch.device("cpu"), torch.float32)
    plans.forget()
    plan = plans.plan_of(problem.q, problem.k, problem.v, Spec(causal=True), None)
    assert plan.variant("fwd")[1] == Config(*rows[key]) != shipped
    assert "1 rows hold here" in run("env").output
    assert "1 rows taken out" in run("tune", "--clear").output
    assert plan.variant("fwd")[1] == shipped
    assert "has no rows" in run("tune", "--clear").output


@interpreted
@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        (SHAPE, {"fwd", "dkdv", "dq"}),
        ("d16-full-b2-h2:2-q40-k8", {"few_keys_fwd/16", "few_keys_bwd/16"}),
        ("d16-full-b2-h2:2-q8-k80", {"few_queries_fwd/16", "few_queries_bwd/16"}),
    ],
)
def test_every_kernel_of_a_shape_has_candidates_that_are_right(shape: str, kinds: set[str]) -> None:
    """The search's own check, without timing: every kernel's first candidate passes the gate."""
    from hf_flash_mc.measure import tune as search
    from hf_flash_mc.measure.problem import Gate, make_problem
    from hf_flash_mc.ops.portable.plan import plan_of
    from hf_flash_mc.ops.spec import Spec

    problem = make_problem(search.parse(shape), torch.device("cpu"), torch.float32)
    plan, gate = plan_of(problem.q, problem.k, problem.v, Spec(**problem.options), None), Gate(problem)
    found = search.kernels(problem, plan)
    assert {k.kind for k in found} == kinds
    for kernel in found:
        assert len(set(kernel.candidates)) == len(kernel.candidates) > 3
        assert kernel.shipped not in kernel.candidates
        results = kernel.run(kernel.candidates[0])
        whole = results if len(results) == 1 else (search._whole(gate, gate.exact[0]), *results)
        assert gate.failures(whole) == []


def test_env_names_back_ends_peers_and_caches(home: Path) -> None:
    output = run("env").output
    assert "attention on cpu, float32, decode: cpu - CPU tensors run on the exact CPU back end" in output
    assert "peer FA3: " in output
    assert f"tuning cache: {home / 'tuning.json'}: 0 rows hold here" in output
    assert "compiled kernels: " in output


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_hopper_candidates_differ_from_the_table(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be tried on an H100; nothing runs."""
    pytest.importorskip("triton.experimental.gluon")
    from hf_flash_mc.measure import tune as search
    from hf_flash_mc.measure.problem import make_problem
    from hf_flash_mc.ops.hopper import launch
    from hf_flash_mc.ops.portable.plan import plan_of
    from hf_flash_mc.ops.spec import Spec

    monkeypatch.setattr(launch, "EMULATED", True)
    problem = make_problem(search.parse(f"d{dim}-causal-b1-h2:2-q128-k128"), torch.device("cpu"), torch.bfloat16)
    plan = plan_of(problem.q, problem.k, problem.v, Spec(causal=True), None)
    found = {k.kind: k for k in search._hopper(problem, plan, Spec(causal=True), lambda: None)}
    assert set(found) >= ({"hopper_fwd", "hopper_bwd"} if dim < 256 else {"hopper_fwd"})
    # forward: warpgroups, keys, stages, turns; backward: single changes of the schedule and pairs of them
    least = {"hopper_fwd": 7, "hopper_bwd": {64: 6, 128: 3}.get(dim)}
    for kind, kernel in found.items():
        assert kernel.shipped not in kernel.candidates
        assert len(set(kernel.candidates)) == len(kernel.candidates)
        if least.get(kind):
            assert len(kernel.candidates) >= least[kind]
        assert {type(c) for c in kernel.candidates} == {type(kernel.shipped)}
