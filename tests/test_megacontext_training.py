"""The training scripts on tiny models: they learn, they go on as if never stopped, and they notice what would not."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from patch_models import VOCAB, causal_model
from safetensors.torch import load_file

from hf_flash_mc.megacontext import training
from hf_flash_mc.megacontext.attach import detach_megacontext
from hf_flash_mc.megacontext.evaluate import TARGETS, evaluate
from hf_flash_mc.megacontext.io import WEIGHTS, load_megacontext

EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")
SIZES = ["--block-size", "4", "--context", "60", "--horizon", "8", "--sink", "4", "--recent", "8", "--batch", "4"]


def script(name: str) -> Any:
    if EXAMPLES not in sys.path:
        sys.path.insert(0, EXAMPLES)
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and texts in which the future repeats the past."""
    folder = tmp_path_factory.mktemp("data")
    causal_model("llama").save_pretrained(folder / "model")
    gen = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, VOCAB, (30,), generator=gen).repeat(9) for _ in range(6)]
    training.save_tokens(folder / "train.npy", documents[:4])
    training.save_tokens(folder / "held.npy", documents[4:])
    return folder


def gist_arguments(data: Path, out: Path, *more: str) -> list[str]:
    files = ["--model", str(data / "model"), "--train", str(data / "train.npy"), "--held-out", str(data / "held.npy")]
    return [*files, "--out", str(out), *SIZES, "--windows", "4", "--steps", "12", "--log-every", "1", *more]


@pytest.mark.parametrize("backend", ["kv", "embedding"])
def test_gists_train_and_a_resumed_run_equals_an_unbroken_one(data: Path, tmp_path: Path, backend: str) -> None:
    settings = '{"rank": 4}' if backend == "kv" else '{"layers": 1, "pooling": "cls"}'
    more = ["--backend", backend, "--gist", settings, "--lr", "1e-2", "--coarse", "0.5", "--mixtures", "2"]
    run = script("train_gist").main
    line = run(gist_arguments(data, tmp_path / "whole", *more, "--save-every", "5"))
    assert line["step"] == 12
    assert {"held_out_drop", "held_out_gists", "recovered"} <= line.keys()
    for stop in ("1", "6", "99"):
        run(gist_arguments(data, tmp_path / "broken", *more, "--save-every", "4", "--stop-after", stop))
    whole, broken = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    logs = [json.loads(row) for row in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logs if "loss" in row] == list(range(1, 13))
    assert [p.name for p in training.checkpoints(tmp_path / "whole")] == ["checkpoint-12"]
    model = causal_model("llama")
    model.config._name_or_path = str(data / "model")
    load_megacontext(model, tmp_path / "whole")
    assert not [n for n in whole if n.startswith("model.")], "heads only"
    with pytest.raises(ValueError, match="other settings"):
        run(gist_arguments(data, tmp_path / "whole", *more, "--seed", "5"))


def lens_arguments(data: Path, out: Path, *more: str) -> list[str]:
    files = ["--model", str(data / "model"), "--train", str(data / "train.npy"), "--held-out", str(data / "held.npy")]
    sizes = ["--context", "60", "--horizon", "8", "--batch", "4", "--windows", "4", "--steps", "8", "--log-every", "1"]
    lens = ["--lens", '{"kind": "dual", "width": 32, "head_dim": 16, "prior": "gist_mass"}', "--edits", "5"]
    return [*files, "--out", str(out), *sizes, *lens, *more]


@pytest.mark.parametrize("lessons", [None, 3])
def test_lenses_train_on_trained_gists_and_resume_and_load_everywhere(
    data: Path, tmp_path: Path, lessons: int | None
) -> None:
    script("train_gist").main(gist_arguments(data, tmp_path / "gists", "--gist", '{"rank": 4}', "--lr", "1e-2"))
    run = script("train_lens").main
    more = ["--heads", str(tmp_path / "gists"), *([] if lessons is None else ["--lessons", str(lessons)])]
    line = run(lens_arguments(data, tmp_path / "whole", *more, "--save-every", "3"))
    assert line["step"] == 8
    assert {"lens", "gist_mass", "recency", "random", "oracle"} <= line.keys()
    for stop in ("1", "4", "99"):
        run(lens_arguments(data, tmp_path / "broken", *more, "--save-every", "2", "--stop-after", stop))
    whole, broken, gists = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "broken", "gists"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert {name.split(".")[0] for name in whole} == {"gist", "lens"}, "heads only"
    assert all(torch.equal(whole[name], x) for name, x in gists.items()), "the gists stay as they were"
    assert whole["lens.head.2.weight"].abs().sum() > 0, "the lens moved"
    logs = [json.loads(row) for row in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in logs if "loss" in row] == list(range(1, 9))
    # a session scores with it, and evaluate has a row of it
    model = causal_model("llama")
    model.config._name_or_path = str(data / "model")
    session = load_megacontext(model, tmp_path / "whole").megacontext.session()
    session.ingest(torch.arange(3, 63))
    assert session.scores().shape == (60,)
    detach_megacontext(model)
    ids = training.Windows(data / "held.npy", length=60 + TARGETS).apart(2)
    rows = evaluate(model, ids, block=4, tail=8, sink=4, expansions=(2,), heads=tmp_path / "whole", label="trained ")
    assert all("trained lens" in row for row in rows)


def test_lens_arguments_that_do_not_go_together(data: Path, tmp_path: Path) -> None:
    run = script("train_lens").main
    with pytest.raises(SystemExit, match="expected a kind that is trained"):
        run([*lens_arguments(data, tmp_path), *SIZES[:2], *SIZES[6:10], "--lens", '{"kind": "recency"}'])
    with pytest.raises(SystemExit):
        run(lens_arguments(data, tmp_path, "--heads", str(tmp_path), "--block-size", "8"))


def test_windows_stay_inside_documents_and_are_drawn_by_their_seed(data: Path) -> None:
    lines = [torch.arange(100), torch.arange(1000, 1007), torch.arange(2000, 2040)]
    assert training.save_tokens(data / "lines.npy", lines) == 147
    windows = training.Windows(data / "lines.npy", length=10)
    rows = windows.draw(3000, 3, 1)
    assert (rows.diff(dim=1) == 1).all()
    assert set(rows[:, 0].tolist()) == {*range(91), *range(2000, 2031)}
    assert torch.equal(rows, windows.draw(3000, 3, 1))
    assert not torch.equal(rows, windows.draw(3000, 3, 2))
    assert windows.apart(14).unique().numel() == 140
    with pytest.raises(ValueError, match="at least 101"):
        training.Windows(data / "lines.npy", length=101)


def test_windows_of_several_files(data: Path) -> None:
    training.save_tokens(data / "one.npy", [torch.arange(15), torch.arange(100, 105)])
    training.save_tokens(data / "two.npy", [torch.arange(200, 211)])
    windows = training.Windows(data / "one.npy", data / "two.npy", length=10)
    rows = windows.draw(300, 0)
    assert (rows.diff(dim=1) == 1).all()
    assert set(rows[:, 0].tolist()) == {*range(6), 200, 201}


def test_what_would_never_learn_is_named() -> None:
    model, head = causal_model("llama"), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    training.freeze_base(model, head)
    optimizer = torch.optim.SGD(head[0].parameters(), 0.1)
    head[0](torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match=r"1\.weight is not in the optimizer.*1\.weight has no gradient"):
        training.check_learning(head, optimizer, model)
    training.check_learning(head[0], optimizer, model)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"lm_head\.weight of the base model is not frozen"):
        training.check_learning(head[0], optimizer, model)


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [training.learning_rate(step, 100, 1.0, 10) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.01)


def test_files_are_split_by_name(data: Path, tmp_path: Path) -> None:
    prepare = script("prepare_tokens")
    (tmp_path / "sub").mkdir()
    for i in range(20):
        (tmp_path / "sub" / f"{i}.txt").write_text(f"{i} " + "word " * 100)
    (tmp_path / "short.txt").write_text("word")
    (tmp_path / "image.png").write_bytes(b"\x00" * 999)
    names = [name for name, _ in prepare.read_folder(tmp_path)]
    assert len(names) == 20
    sides = {name: prepare.held_out(name, 10) for name in names}
    assert sides == {name: prepare.held_out(name, 10) for name in reversed(names)}
    assert 0 < sum(prepare.held_out(str(i), 10) for i in range(1000)) < 200
    assert 150 < sum(prepare.held_out(str(i), 5) for i in range(1000)) < 250


def test_a_text_under_two_names_counts_once() -> None:
    assert script("prepare_tokens").distinct([("a", "x"), ("b", "y"), ("c", "x")]) == {"a": "x", "b": "y"}


WRONG = [
    (("--windows", "0"), "--windows: expected at least 1, got 0"),
    (("--save-every", "0"), "--save-every: expected at least 1, got 0"),
    (("--mixtures", "0"), "--mixtures: expected at least 1, got 0"),
    (("--seed", "-1"), "--seed: expected at least 0, got -1"),
    (("--lr", "0"), "--lr: expected more than 0, got 0.0"),
    (("--coarse", "5"), "--coarse: expected a share of 0 to 1, got 5.0"),
    (("--held-out", "a.npy"), "--held-out: expected a file that is not learnt from, got a.npy"),
    (("--tracker", "paper"), "--tracker: expected one of"),
    (("--dtype", "float7"), "invalid choice: 'float7'"),
]


@pytest.mark.parametrize(("more", "message"), WRONG, ids=lambda x: "_".join(x) if isinstance(x, tuple) else "")
def test_wrong_arguments_are_named(more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("train_gist").parse_arguments(["--train", "a.npy", "--held-out", "b.npy", "--out", "o", *more])
    assert message in capsys.readouterr().err


def test_a_loss_of_nothing_and_mixed_precision_are_refused(data: Path, tmp_path: Path) -> None:
    run = script("train_gist").main
    none = [part for name in ("kl", "mass", "output", "separation") for part in (f"--{name}", "0")]
    with pytest.raises(ValueError, match="weights: expected one above 0"):
        run(gist_arguments(data, tmp_path, *none))
    accelerator = type("Accelerator", (), {"mixed_precision": "bf16"})
    with pytest.raises(ValueError, match="expected mixed_precision no, got bf16"):
        training.Trainer(None, None, None, None, accelerator, ())  # type: ignore[arg-type]


def test_tokens_need_text_on_both_sides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = script("prepare_tokens")
    (tmp_path / "a.txt").write_text("too short")
    arguments = ["--text", str(tmp_path), "--name", "a", "--out", str(tmp_path)]
    monkeypatch.setattr(prepare.AutoTokenizer, "from_pretrained", lambda folder: None)
    with pytest.raises(SystemExit, match=r"on both sides, got 0 \(train\) and 0 \(held-out\)"):
        prepare.main([*arguments, "--model", "any"])
    assert not list(tmp_path.glob("*.npy"))
    for more, message in (
        (["--one-in", "1"], "--one-in: expected at least 2, got 1"),
        (["--text", "nowhere"], "--text: expected a folder, got nowhere"),
    ):
        with pytest.raises(SystemExit):
            prepare.main([*arguments, *more])
        assert message in capsys.readouterr().err


def test_a_tracker_gets_settings_that_it_can_take() -> None:
    """TensorBoard raises on the list of --train; the number of a step and its like stay numbers."""
    given: dict[str, Any] = {}

    class Accelerator:
        def init_trackers(self, name: str, config: dict[str, Any]) -> None:
            given.update(config, name=name)

    options = script("train_gist").parse_arguments(["--train", "a.npy", "c.npy", "--held-out", "b.npy", "--out", "o"])
    training.start_tracker(Accelerator(), "train_gist", options)
    assert not given, "none is wanted"
    options.tracker = "tensorboard"
    training.start_tracker(Accelerator(), "train_gist", options)
    assert all(isinstance(value, int | float | str) for value in given.values())
    assert (given["train"], given["steps"], given["name"]) == ("['a.npy', 'c.npy']", 2000, "train_gist")
