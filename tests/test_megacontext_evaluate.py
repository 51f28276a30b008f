"""The quality table: every state is measured from the same history, and the statistics say what they should."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from patch_models import VOCAB, causal_model

from benchmarks import sections
from hf_flash_mc.megacontext import evaluate as evaluation
from hf_flash_mc.megacontext import peers
from hf_flash_mc.megacontext.attach import attach_megacontext, cache_argument, detach_megacontext
from hf_flash_mc.megacontext.config import MegaContextConfig
from hf_flash_mc.megacontext.io import CONFIG
from hf_flash_mc.megacontext.lensnet import OracleLens
from hf_flash_mc.megacontext.quality import summarise, table_of
from hf_flash_mc.megacontext.states import Setting, measure_window
from hf_flash_mc.megacontext.training import save_tokens
from hf_flash_mc.megacontext.working_context import Edits


def windows(count: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(0))


def test_expanding_everything_is_the_whole_window_and_nothing_leaks_between_states() -> None:
    model = causal_model("llama")
    ids = windows(2, 100 + evaluation.TARGETS)
    with torch.no_grad():
        logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, 99:-1].transpose(1, 2), ids[:, 100:], reduction="none")

    def everything(config):
        return OracleLens(config, lambda context: torch.ones(len(context.lod)))

    def latest(config):
        return OracleLens(config, lambda context: context.start / context.cursor)

    options = {"tail": 8, "sink": 4, "block": 4}
    lenses = {"all": everything, "latest": latest, "gist mass": evaluation.LENSES["gist mass"], "latest again": latest}
    rows = evaluation.evaluate(model, ids, **options, expansions=(99, 0, 3), lenses=lenses)
    for row, losses in zip(rows, expected, strict=True):
        assert np.allclose(row["whole"], losses, atol=1e-4)
        assert np.allclose(row["all x99"], losses, atol=1e-4)
        assert np.allclose(row["latest x0"], row["gists"], atol=1e-5)
        assert not np.allclose(row["latest x3"], row["gists"], atol=1e-4)
        assert np.allclose(row["latest again x3"], row["latest x3"], atol=1e-5)
        assert not np.allclose(row["drop"], row["gists"], atol=1e-4)
    assert not hasattr(model, "megacontext")


def test_every_lens_expands_as_many_and_the_oracle_the_best_by_the_first_half() -> None:
    model, ids = causal_model("llama"), windows(1, 100 + evaluation.TARGETS)[0]
    setting = Setting(block=4, sink=4, tail=8, expansions=(1, 4), oracle=True, lenses={"never": never})
    setting.attach(model, len(ids))
    slots: dict[str, int] = {}
    found = measure_window(model, ids, setting, 0, slots)
    assert slots["never x1"] == slots["oracle x1"] == slots["gists"] + 3
    assert slots["never x4"] == slots["oracle x4"] == slots["gists"] + 12
    session = model.megacontext.session()
    session.ingest(ids[:100])
    evaluation.collapse_all(session)
    gists = session.working_context.start[session.working_context.lod > 0]
    costs = []
    before = session.working_context.copy()
    for start in gists:
        session.apply(Edits.of([(1, int(start), 1)]))
        costs.append(evaluation.target_losses(session, ids[100:]))
        session.restore(before)
    best = int(np.argmin([cost[:32].mean() for cost in costs]))
    assert np.allclose(found["oracle x1"], costs[best], atol=1e-4)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("backend", ["kv", "embedding"])
def test_lenses_see_what_the_whole_tail_attends_to(tmp_path: Path, backend: str, heads: bool) -> None:
    """Not what the targets attend to, which were run before, nor the last token alone."""
    model, ids = causal_model("llama"), windows(1, 60 + evaluation.TARGETS)[0]
    sizes = {"block_size": 4, "max_lod": 1, "w_max": 192, "sink_tokens": 4, "recent_tokens": 8}
    attach_megacontext(model, MegaContextConfig(**sizes, backend=backend, gist={}))
    session = model.megacontext.session(observe=8, recall=False)
    session.ingest(ids[:60])
    evaluation.collapse_all(session)
    queries = session.cache.last_queries()
    assert queries.shape[2] == 8
    evaluation.target_losses(session, ids[60:])  # reads the last token again, which now sees gists
    session.cache.set_queries(queries)
    wanted = session.attention_mass()
    model.megacontext.save_pretrained(tmp_path)
    detach_megacontext(model)
    seen = []

    def note(context):
        seen.append(context.attention_mass)
        return context.attention_mass

    def noting(config):
        return OracleLens(config, note)

    lenses = {"first": noting, "second": noting}
    options = {"block": 4, "sink": 4, "tail": 8, "lenses": lenses, "baselines": not heads}
    if heads or backend == "embedding":
        options["heads"] = tmp_path
    Setting(**options).attach(model, 60)
    measure_window(model, ids, Setting(**options), 0)
    assert len(seen) == 2
    for mass in seen:
        torch.testing.assert_close(mass, wanted)


def never(config):
    return OracleLens(config, lambda context: -torch.ones(len(context.lod)))


def test_dropping_is_the_base_model_without_that_text() -> None:
    model = causal_model("llama")
    ids = windows(1, 60 + evaluation.TARGETS)[0]
    kept = torch.cat((torch.arange(4), torch.arange(52, 60)))
    with torch.no_grad():
        cache = model(ids[None, :59], use_cache=True)
        cache = cache.get("cache") or cache.past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, kept[:-1]], layer.values[:, :, kept[:-1]]
        out = model(ids[None, 59:-1], position_ids=torch.arange(59, 123)[None], **{cache_argument(model): cache})
    expected = torch.nn.functional.cross_entropy(out.logits[0], ids[60:], reduction="none")
    config = MegaContextConfig(block_size=4, max_lod=1, w_max=256, sink_tokens=4, recent_tokens=8)
    attach_megacontext(model, config)
    session = model.megacontext.session()
    session.ingest(ids[:60])
    evaluation.collapse_all(session)
    assert session.working_context.lod.sum() == 12
    with evaluation.hidden_gists(session):
        assert np.allclose(evaluation.target_losses(session, ids[60:]), expected, atol=1e-4)
    assert len(session) == 60
    session.check_invariants()


def test_summary_tells_a_real_effect_from_noise() -> None:
    noise = np.random.default_rng(0).normal(size=(200, 4)) * 0.1

    def row(i: int) -> dict[str, list]:
        values = {"whole": 0.0, "drop": 1.0, "gists": 0.9, "recency": 0.6, "gist mass": 0.5}
        return {n: [v + (noise[i, k - 1] if k else 0.0)] * 64 for k, (n, v) in enumerate(values.items())}

    lines = summarise([row(i) for i in range(200)])
    found = {line.name: line for line in lines}
    assert found["gist mass"].recovered == pytest.approx(0.5, abs=0.03)
    assert found["gist mass"].low < 0.5 < found["gist mass"].high
    assert found["gist mass"].median_low < found["gist mass"].median < found["gist mass"].median_high
    assert found["drop"].recovered == 0
    assert found["gist mass"].p["recency"] < 0.01
    assert found["recency"].p["gist mass"] > 0.99
    assert found["recency"].p["drop"] < 0.01
    assert found["recency"].p["gists"] < 0.01
    assert found["gists"].p.keys() == {"drop", "recency", "gist mass"}
    assert "gist mass" in table_of(lines)
    same = [{**row(i), "recency": row(i)["gist mass"]} for i in range(200)]
    assert {line.name: line for line in summarise(same)}["gist mass"].p["recency"] > 0.5


def test_states_of_several_ratios_are_compared_with_their_own() -> None:
    generator = np.random.default_rng(0)
    costs = {"whole": 0.0, "8:1 drop": 1.0, "8:1 recency x4": 0.5, "8:1 gist mass x4": 0.4}
    costs |= {"32:1 drop": 2.0, "32:1 recency x4": 1.0, "32:1 gist mass x4": 1.5, "32:1 gist mass x12": 0.2}
    rows = [{name: list(value + generator.normal(size=64) * 0.1) for name, value in costs.items()} for _ in range(40)]
    found = {line.name: line for line in summarise(rows)}
    assert found["8:1 gist mass x4"].recovered == pytest.approx(0.6, abs=0.02)
    assert found["32:1 gist mass x4"].recovered == pytest.approx(0.25, abs=0.02)
    assert found["8:1 gist mass x4"].p["recency"] < 0.01
    assert found["32:1 gist mass x4"].p["recency"] > 0.99
    assert found["32:1 gist mass x12"].p.keys() == {"drop"}


def test_trained_heads_stand_beside_the_baselines(tmp_path, monkeypatch) -> None:
    from typer.testing import CliRunner

    from hf_flash_mc.cli.app import app

    model, ids = causal_model("llama"), windows(2, 100 + evaluation.TARGETS)
    model.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "ids.npy", ids.numpy())
    config = MegaContextConfig(block_size=4, max_lod=2, w_max=192, sink_tokens=4, recent_tokens=8, gist={"rank": 2})
    attach_megacontext(model, config)
    with torch.no_grad():
        model.megacontext.gist.beta.fill_(3.0)
    model.megacontext.save_pretrained(tmp_path / "heads")
    arguments = ["evaluate", "--model", str(tmp_path / "model"), "--tokens", str(tmp_path / "ids.npy")]
    arguments += ["--windows", "2", "--context", "100", "--tail", "8", "--block", "4", "--device", "cpu"]
    arguments += ["--out", str(tmp_path / "out.json"), "--heads", str(tmp_path / "heads")]
    arguments += ["--plot", str(tmp_path / "out.png")]
    monkeypatch.setattr(peers, "why_not", lambda model: "kvpress is not installed")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert {"drop", "gists", "recency", "random", "gist mass", "trained gists"} <= found["losses"].keys()
    assert len(found["losses"]["gists"]) == 2
    assert found["losses"]["trained gists"] != found["losses"]["gists"]
    assert "trained gists" in found["table"]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out.json.part").exists()
    assert found["run"]["dtype"] == "float32"
    assert found["table"] in sections.quality(found), "docs show it"
    assert str(tmp_path) not in json.dumps(found), "where files lie on this machine is nobody's business"
    assert found["run"]["command"].startswith("hf-flash-mc evaluate --model")
    assert "| SnapKV (kvpress) | | not run: kvpress is not installed |" in found["table"]
    arguments[arguments.index("--block") + 1] = "8"
    wrong = CliRunner().invoke(app, arguments)
    assert wrong.exit_code == 2
    assert "heads: expected gists of 8 tokens" in wrong.output


def test_windows_are_cut_from_prepared_tokens_and_do_not_overlap(tmp_path: Path) -> None:
    save_tokens(tmp_path / "held.npy", [torch.arange(500), torch.arange(1000, 1070)])
    command = ["--model", "", "--tokens", str(tmp_path / "held.npy"), "--context", "6", "--windows", "8"]
    evaluation.main([*command, "--save-tokens", str(tmp_path / "windows.npy")])
    cut = torch.from_numpy(np.load(tmp_path / "windows.npy").astype(np.int64))
    assert cut.shape == (8, 6 + evaluation.TARGETS)
    assert (cut.diff(dim=1) == 1).all()
    assert cut.unique().numel() == cut.numel()


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, ids = causal_model("llama"), windows(3, 60 + evaluation.TARGETS)
    setting = Setting(block=4, sink=4, tail=8, expansions=(1,), lenses={"never": never})
    whole = evaluation.Run(ids)
    whole.measure(model, "4:1", setting)
    part = tmp_path / "rows.part"

    def stop(name: str, done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.Run(ids, part).measure(model, "4:1", setting, stop)
    assert not hasattr(model, "megacontext")
    seen: list[int] = []
    later = evaluation.Run(ids, part)
    later.measure(model, "4:1", setting, lambda name, done: seen.append(done))
    assert seen == [3]
    assert later.rows() == whole.rows()
    assert later.slots == whole.slots
    assert not evaluation.Run(ids + 1, part).parts, "other windows begin anew"


def test_embedding_heads_stand_in_the_same_table(tmp_path: Path) -> None:
    model, ids = causal_model("llama"), windows(1, 60 + evaluation.TARGETS)
    sizes = {"block_size": 4, "max_lod": 1, "w_max": 128, "sink_tokens": 4, "recent_tokens": 8}
    heads = {"gist": {"layers": 1}, "lens": {"kind": "dual", "width": 64}}
    attach_megacontext(model, MegaContextConfig(**sizes, **heads, backend="embedding"))
    model.megacontext.save_pretrained(tmp_path)
    evaluation.detach_megacontext(model)
    options = {"block": 4, "sink": 4, "tail": 8, "expansions": (2,)}
    run = evaluation.Run(ids)
    run.measure(model, "plain", Setting(**options))
    run.measure(model, "heads", Setting(**options, heads=tmp_path, label="trained ", baselines=False))
    (row,) = run.rows()
    assert {"drop", "gists", "recall", "trained gists", "trained gist mass", "trained lens"} <= row.keys()
    assert "trained recall" not in row
    kept = torch.cat((torch.arange(4), torch.arange(52, 60)))
    with torch.no_grad():
        places = torch.cat((kept, torch.arange(60, 123)))
        mask = torch.ones(1, 75)  # without it, a jump in the positions could be read as a new text
        logits = model(ids[:, places], position_ids=places[None], attention_mask=mask).logits[0, 11:]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 60:], reduction="none")
    assert np.allclose(row["trained drop, read again"], expected, atol=1e-4)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"gist": {"layers": 2}}))
    with pytest.raises(ValueError, match="weights do not fit"):
        Setting(**options, heads=tmp_path).attach(model, 124)
    assert not hasattr(model, "megacontext")


def test_presses_of_kvpress_keep_as_many_keys_as_there_are_slots() -> None:
    pytest.importorskip("kvpress")
    model, ids = causal_model("llama"), windows(1, 100 + evaluation.TARGETS)[0]
    assert peers.why_not(model) is None
    with torch.no_grad():
        logits = model(ids[None]).logits[0, 99:-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[100:], reduction="none")
    for press in peers.PRESSES.values():
        whole, half = (peers.press_losses(model, ids[:100], ids[100:], press, n, 8) for n in (100, 40))
        assert np.allclose(whole, expected, atol=1e-4)
        assert not np.allclose(half, expected, atol=1e-3)


def test_windows_do_not_overlap() -> None:
    documents = [torch.arange(100), torch.arange(1000, 1035), torch.arange(2000, 2009)]
    found = evaluation.sample_windows(documents, 10, 13)
    assert len(found.flatten().unique()) == 130
    assert bool((found.diff(dim=1) == 1).all())
    with pytest.raises(ValueError, match="at most 13"):
        evaluation.sample_windows(documents, 10, 14)


WRONG = [
    (("--windows", "0"), "windows: expected at least 1, got 0"),
    (("--expansions", "4", "-1"), "expansions: expected at least 1, got [4, -1]"),
    (("--context", "100", "--windows", "1"), "context: expected at least 160 tokens"),
    (("--tokens", "x"), "text, tokens: expected one of them"),
    (("--device", "tpu"), "device: expected cpu or cuda, got 'tpu'"),
    (("--dtype", "float7"), "invalid choice: 'float7'"),
    (("--model", "no/such/folder"), "model: no such folder: 'no/such/folder'"),
    (("--model", "/nonesuch"), "model: no such folder: '/nonesuch'"),
]


@pytest.mark.parametrize(("more", "message"), WRONG, ids=lambda x: "_".join(x) if isinstance(x, tuple) else "")
def test_wrong_arguments_are_named(more: tuple[str, ...], message: str, tiny_model: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from hf_flash_mc.cli.app import app

    arguments = ["evaluate", "--model", str(tiny_model), "--text", str(tmp_path), "--device", "cpu", *more]
    (tmp_path / "a.txt").write_text("some text " * 100)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_help_has_texts_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluation.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("(default 32)", "expands (default 4)", "drawn (default 0)", "GPU where", "model (default float32)"):
        assert text in shown


def test_a_file_that_is_no_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text("some text")
    with pytest.raises(ValueError, match=r"a\.npy: expected a \.npy file of tokens"):
        evaluation.main(["--model", "none", "--tokens", str(tmp_path / "a.npy")])


def test_the_picture_compares_within_the_first_ratio_at_most_expansions(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from hf_flash_mc.megacontext.plots import plot_quality

    names = ["drop", "gists", "recency x1", "recency x12", "trained gists", "trained lens x12"]
    states = ["whole", *(ratio + name for ratio in ("8:1 ", "32:1 ") for name in names)]
    rows = [{name: [1.0 + i + j] * 64 for i, name in enumerate(states)} for j in range(3)]
    figure = plot_quality(summarise(rows), rows, tmp_path / "a.png")
    shares, curves = figure.axes
    assert "drop" not in " ".join(label.get_text() for label in shares.get_yticklabels())
    drawn = [line.get_label() for line in curves.lines if not line.get_label().startswith("_")]
    assert drawn == ["8:1 drop", "8:1 gists", "8:1 recency x12", "8:1 trained gists", "8:1 trained lens x12"]
