"""The quality table: every state is measured from the same history, and the statistics say what they should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from patch_models import VOCAB, causal_model

from hf_flash_mc.megacontext import evaluate as evaluation
from hf_flash_mc.megacontext.attach import attach_megacontext, cache_argument
from hf_flash_mc.megacontext.config import MegaContextConfig
from hf_flash_mc.megacontext.lensnet import OracleLens


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

    def nothing(config):
        return OracleLens(config, lambda context: -torch.ones(len(context.lod)))

    options = {"tail": 8, "sink": 4, "block": 4, "expansions": 99}
    lenses = {"all": everything, "none": nothing, "gist mass": evaluation.GistMassLens, "none again": nothing}
    rows = evaluation.evaluate(model, ids, **options, lenses=lenses)
    for row, losses in zip(rows, expected, strict=True):
        assert np.allclose(row["whole"], losses, atol=1e-4)
        assert np.allclose(row["all"], losses, atol=1e-4)
        assert np.allclose(row["none"], row["gists"], atol=1e-5)
        assert np.allclose(row["none again"], row["gists"], atol=1e-5)
        assert not np.allclose(row["drop"], row["gists"], atol=1e-4)
    assert not hasattr(model, "megacontext")


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

    lines, tests = evaluation.summarise([row(i) for i in range(200)])
    found = {line.name: line for line in lines}
    assert found["gist mass"].recovered == pytest.approx(0.5, abs=0.03)
    assert found["gist mass"].low < 0.5 < found["gist mass"].high
    assert found["drop"].recovered == 0
    assert tests["recency"] < 0.01
    assert "gist mass" in evaluation.table_of(lines, tests)
    same = [{**row(i), "recency": row(i)["gist mass"]} for i in range(200)]
    assert evaluation.summarise(same)[1]["recency"] > 0.5


def test_trained_heads_stand_beside_the_baselines(tmp_path) -> None:
    import json

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
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert {"drop", "gists", "recency", "random", "gist mass", "trained gists"} <= found["rows"][0].keys()
    assert found["rows"][0]["trained gists"] != found["rows"][0]["gists"]
    assert "trained gists" in found["table"]
    assert found["run"]["command"].startswith("hf-flash-mc evaluate --model")
    arguments[arguments.index("--block") + 1] = "8"
    wrong = CliRunner().invoke(app, arguments)
    assert wrong.exit_code == 2
    assert "heads: expected KV gists of 8 tokens" in wrong.output


def test_windows_do_not_overlap() -> None:
    documents = [torch.arange(100), torch.arange(1000, 1035), torch.arange(2000, 2009)]
    found = evaluation.sample_windows(documents, 10, 13)
    assert len(found.flatten().unique()) == 130
    assert bool((found.diff(dim=1) == 1).all())
    with pytest.raises(ValueError, match="at most 13"):
        evaluation.sample_windows(documents, 10, 14)
