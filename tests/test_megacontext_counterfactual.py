"""Counterfactuals through a shared prefix: equal to editing and running each variant, on real model families."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_megacontext_session import CONFIG, attached, edits, history

from benchmarks import counterfactual
from hf_flash_mc.megacontext.attach import layer_windows
from hf_flash_mc.megacontext.counterfactual import CounterfactualScorer
from hf_flash_mc.megacontext.evaluate import target_losses
from hf_flash_mc.megacontext.prefix import Keys, PrefixCache, read, run

VARIANTS = (
    [],
    [(1, 4, 1)],  # expansions
    [(1, 8, 1)],
    [(1, 16, 2)],
    [(-1, 40, 1)],  # a collapse
    [(1, 8, 1), (-1, 44, 1)],  # an expansion that is paid for
)


def collapsed(family: str):
    model = attached(family, **({"sliding_window": 66} if family == "mistral" else {}))
    gist = model.megacontext.gist
    with torch.no_grad():
        gist.beta.copy_(torch.randn(gist.beta.shape, generator=torch.Generator().manual_seed(3)))
    session = model.megacontext.session()
    session.ingest(history(70))
    session.apply(edits((-1, 16, 2), (-1, 4, 1), (-1, 8, 1), (-1, 36, 1)))
    session.apply(edits((1, 36, 1)))  # leaves free columns among those that are read
    return session


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss"])
def test_losses_are_those_of_the_edited_session(family: str) -> None:
    session, targets = collapsed(family), history(9, seed=5)[0]
    before = session.working_context.copy()
    wanted = []
    for variant in VARIANTS:
        session.apply(edits(*variant))
        wanted.append(torch.from_numpy(target_losses(session, targets)))
        session.restore(before)
    scorer = CounterfactualScorer(session)
    found = scorer.losses([edits(*variant) for variant in VARIANTS], targets, batch=4)
    assert found.shape == (len(VARIANTS), 9)
    assert (found - torch.stack(wanted)).abs().max() <= 1e-4
    assert (found[1:] - found[0]).abs().amax(1).min() > 1e-3, "every edit must matter"
    session.check_invariants()
    assert session.working_context.start.tolist() == before.start.tolist()
    longer = scorer.losses([edits(*VARIANTS[0])], targets, reread=3)
    assert longer.shape == (1, 9)


def test_gradients_are_those_of_full_forwards() -> None:
    model, gen = attached("llama"), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    cache, _ = read(model, history(20), observe=4, keep=1)
    ids, tokens = torch.randint(3, 90, (3, 5), generator=gen), torch.arange(24, 29)
    own_shape = (2, 3, 2, 4, cache.keys[0].shape[-1])
    leaves = [
        torch.stack(cache.keys),  # [L, 1, Hkv, 20, D]
        torch.stack(cache.values),
        torch.randn(2, 1, 2, 20, generator=gen),
        torch.randn(own_shape, generator=gen),
        torch.randn(own_shape, generator=gen),
        torch.randn(2, 3, 2, 4, generator=gen),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def logits(repeat: int) -> torch.Tensor:
        shared = Keys(*(leaf.repeat_interleave(repeat, 1) for leaf in leaves[:3]))
        held = PrefixCache(shared, Keys(*leaves[3:]), tokens, layer_windows(model))
        return run(model, held, tokens[None].expand(3, -1), 5, input_ids=ids)

    wanted, found = logits(3), logits(1)
    assert (wanted - found).abs().max() <= 1e-5
    dout = torch.randn(wanted.shape, generator=gen)
    for a, b in zip(torch.autograd.grad(wanted, leaves, dout), torch.autograd.grad(found, leaves, dout), strict=True):
        assert (a - b).abs().max() <= 3e-5 * a.abs().max()
        assert a.abs().max() > 0


def test_a_recorded_read_is_the_models_own() -> None:
    model, ids = attached("gemma3"), history(23)
    with torch.no_grad():
        expected = model(ids).logits
        cache, logits = read(model, ids, observe=6, keep=23)
    assert (logits - expected).abs().max() <= 1e-5
    assert cache.queries[0].shape[2] == 6
    assert cache.keys[0].shape[2] == 23


def test_what_cannot_be_scored_is_named() -> None:
    session, targets = collapsed("llama"), history(4, seed=5)[0]
    scorer = CounterfactualScorer(session)
    with pytest.raises(ValueError, match="run again"):
        scorer.losses([edits((-1, 60, 1))], targets, reread=8)
    with pytest.raises(ValueError, match="targets"):
        scorer.losses([edits((1, 4, 1))], targets[:0])
    with pytest.raises(ValueError, match="targets: expected ids from 0 to 96"):
        scorer.losses([edits((1, 4, 1))], targets + 97)
    for variants, batch in (([], 16), (edits((1, 4, 1)), 16), ([edits((1, 4, 1))], 0)):
        with pytest.raises(ValueError, match="variants, batch: expected a list of at least one Edits"):
            scorer.losses(variants, targets, batch=batch)
    embedding = dataclasses.replace(CONFIG, backend="embedding")
    with pytest.raises(NotImplementedError, match="kv"):
        CounterfactualScorer(attached("llama", embedding).megacontext.session())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_benchmark_checks_and_writes_what_it_measured(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "out.json"
    sizes = ["--shape", "tiny", "--variants", "3", "--prefix", "200", "--suffix", "16", "--dtype", dtype]
    assert counterfactual.main([*sizes, "--device", "cpu", "--out", str(path)]) == 0
    rows = {row["implementation"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"ours", "session", "full", "full-sdpa", "expanded-sdpa"}
    assert rows["ours"]["times_ours"] == 1
    assert all(row["median_ms"] > 0 for row in rows.values())
    worst = rows["ours"]["session_max_error"]
    assert 0 < worst < (1e-5 if dtype == "float32" else 1e-2), "the edited session itself, against stock transformers"


def test_the_benchmark_keeps_each_row_once_it_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = counterfactual.timing.spread

    def stopped(*args: Any, **options: Any) -> Any:
        if path.exists():
            raise KeyboardInterrupt
        return real(*args, **options)

    path = tmp_path / "out.json"
    monkeypatch.setattr(counterfactual.timing, "spread", stopped)
    sizes = ["--shape", "tiny", "--variants", "2", "--prefix", "200", "--suffix", "8", "--dtype", "float32"]
    with pytest.raises(KeyboardInterrupt):
        counterfactual.main([*sizes, "--device", "cpu", "--out", str(path)])
    assert [row["implementation"] for row in json.loads(path.read_text())["rows"]] == ["ours"]


@pytest.mark.parametrize("part", counterfactual.PARTS)
def test_one_layer_compiles_the_kernels_of_all(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, options = counterfactual.random_model, ["--variants", "2", "--prefix", "200", "--suffix", "8"]

    def calls(layers: int) -> list[list[int]]:
        """What attention of the first layer is given, while the model has so many."""
        seen: list[list[int]] = []

        def watched(*args: Any, **_: Any) -> Any:
            model = real(*args, layers=layers)
            model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, x, y: seen.append(list(y.shape)))
            return model

        monkeypatch.setattr(counterfactual, "random_model", watched)
        counterfactual.run_part(("tiny", part, counterfactual._options([*options, "--device", "cpu"])))
        return seen

    assert calls(1) == calls(2)
    assert len(calls(1)) > 1


@pytest.mark.parametrize(
    ("ours", "dtype", "fits"),
    [(1.1, "bfloat16", True), (1.3, "bfloat16", False), (1e-4, "float32", True), (0.1, "float32", False)],
)
def test_the_benchmark_holds_losses_to_the_edited_sessions_error(ours: float, dtype: str, fits: bool) -> None:
    noise = 0.01 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    if fits:
        assert counterfactual.check(ours * noise, noise, dtype)["session_max_error"] == float(noise.abs().max())
    else:
        with pytest.raises(SystemExit, match="more than rounding"):
            counterfactual.check(ours * noise, noise, dtype)
    outlier = noise.clone()
    outlier[0, 0] = 0.2  # one wrong token of many hides in a mean
    with pytest.raises(SystemExit, match="more than rounding"):
        counterfactual.check(outlier, noise, dtype)
