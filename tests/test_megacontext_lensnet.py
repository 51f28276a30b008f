"""Lenses: legal scores, the right order of entries, permutations, gradients, and long contexts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hf_flash_mc.megacontext import lensnet
from hf_flash_mc.megacontext.config import MegaContextConfig
from hf_flash_mc.megacontext.layers import Attention, rms_norm
from hf_flash_mc.megacontext.lens_graph import GraphedLens
from hf_flash_mc.megacontext.lensnet import (
    DualLens,
    GistMassLens,
    Lens,
    LensInput,
    OracleLens,
    RandomLens,
    RecencyLens,
    TransformerLens,
    build_lens,
)
from hf_flash_mc.ops.reference import reference_attention

SIZE = 24
TRAINED = ["dual", "transformer"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def config(kind: str = "gist_mass", **lens) -> MegaContextConfig:
    small = {"kind": kind, "width": 32, "head_dim": 16} if kind in TRAINED else {"kind": kind}
    sizes = {"block_size": 4, "max_lod": 2, "w_max": 256, "sink_tokens": 4, "recent_tokens": 8}
    return MegaContextConfig(hidden_size=SIZE, lens=small | lens, **sizes)


def context(coarse: int = 6, middle: int = 20, fine: int = 40, seed: int = 0) -> LensInput:
    """Entries of all levels in order; the first ``fine // 4`` tokens are exact, as a sink is."""
    g = torch.Generator().manual_seed(seed)
    lod = torch.tensor([0] * (fine // 4 // 4 * 4) + [2] * coarse + [1] * middle + [0] * fine)
    span = 4**lod
    start, n = span.cumsum(0) - span, len(lod)
    entries, tail = torch.randn(n, SIZE, generator=g), torch.randn(6, SIZE, generator=g)
    return LensInput(start, lod, int(span.sum()), entries, tail, torch.rand(n, generator=g), g)


def shaken(cfg: MegaContextConfig) -> Lens:
    torch.manual_seed(7)
    lens = build_lens(cfg)
    with torch.no_grad():
        for p in lens.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return lens


def permuted(x: LensInput, order: torch.Tensor) -> LensInput:
    rows = {name: getattr(x, name)[order] for name in ("start", "lod", "entries", "attention_mass")}
    return dataclasses.replace(x, **rows)


def every_lens():
    yield from (shaken(config(kind, prior=prior)) for kind in TRAINED for prior in ("none", "recency", "gist_mass"))
    yield from (build_lens(config(kind)) for kind in ("gist_mass", "recency", "random"))
    yield OracleLens(config(), lambda x: 50 * x.entries[:, 0])


@pytest.mark.parametrize("lens", list(every_lens()), ids=lambda lens: type(lens).__name__)
def test_scores_are_legal_and_in_range(lens):
    for seed in range(5):
        x = context(seed=seed)
        score = lens.score(x)
        assert score.shape == x.start.shape
        assert score.dtype == torch.float32
        assert score.isfinite().all()
        assert score.abs().max() <= 1
        assert (score[x.lod == 0] <= 0).all()
        assert (score[x.lod == 2] >= 0).all()
        free = lens(context(seed=seed))
        assert torch.equal(score[x.lod == 1], free[x.lod == 1].float())  # either way is legal
        assert (score[(x.lod == 0) & (free < 0)] < 0).all()
    assert (score != 0).any()


def test_recency_prefers_what_is_recent():
    x, lens = context(), RecencyLens(config())
    free = lens(x)
    assert (free[1:] > free[:-1]).all()
    assert -1 <= free[0] < -0.9 < 0.9 < free[-1] <= 1


def test_medians_of_a_gpu_are_those_of_the_cpu():
    class OnGPU(torch.Tensor):
        is_cuda = True

    x = torch.rand(4, 51, dtype=torch.float64)
    x[0, ::3], x[1], x[2, 0] = torch.nan, torch.nan, torch.nan
    assert torch.equal(lensnet._median(x.as_subclass(OnGPU)).nan_to_num(-1), lensnet._median(x).nan_to_num(-1))
    assert lensnet._median(x).isnan().tolist() == [False, True, False, False]


def test_gist_mass_compares_with_the_median_of_what_may_change():
    x, lens = context(), GistMassLens(config())
    mass = torch.full_like(x.attention_mass, 2.0)
    mass[x.start < 4], mass[x.start >= x.cursor - 8] = 900.0, 700.0  # sink and tail take the most, and may not count
    gists = (x.lod == 1).nonzero()[:, 0]
    mass[gists[3]], mass[gists[5]] = 6.0, 1.0
    score = lens.score(dataclasses.replace(x, attention_mass=mass))
    assert score[gists[3]] == pytest.approx(0.5)  # (6 - 2) / (6 + 2)
    assert score[gists[5]] == pytest.approx(-1 / 3)
    assert score[gists[4]] == 0
    scaled = lens.score(dataclasses.replace(x, attention_mass=1e-3 * mass))
    torch.testing.assert_close(scaled, score)
    nothing = lens.score(dataclasses.replace(x, attention_mass=0 * mass))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_random_lens_follows_its_generator():
    lens, x = RandomLens(config()), context()
    seeded = [dataclasses.replace(x, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    a, b, c = (lens(s) for s in seeded)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize(("prior", "plain"), [("none", None), ("recency", RecencyLens), ("gist_mass", GistMassLens)])
def test_untrained_lens_is_its_prior(kind, prior, plain):
    x = context()
    score = build_lens(config(kind, prior=prior)).score(x)
    wanted = torch.zeros_like(score) if plain is None else plain(config()).score(x)
    torch.testing.assert_close(score, wanted, rtol=0, atol=2e-3)  # the prior is clipped at 0.999


@pytest.mark.parametrize("kind", TRAINED)
def test_scores_follow_their_entries_under_permutation(kind):
    lens, x = shaken(config(kind)), context()
    order = torch.randperm(len(x.lod))
    torch.testing.assert_close(lens.score(permuted(x, order)), lens.score(x)[order], rtol=1e-4, atol=1e-5)
    if kind == "dual":  # the tail is a set
        other = dataclasses.replace(x, tail=x.tail[torch.randperm(6)])
        torch.testing.assert_close(lens.score(other), lens.score(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", TRAINED)
def test_every_entry_is_heard_by_every_other(kind):
    """Non-causal: the first entry's score depends on the last entry, and the other way round."""
    lens, x = shaken(config(kind)), context()
    gists = (x.lod == 1).nonzero()[:, 0]
    x.entries.requires_grad_()
    for source in (gists[0], gists[-1]):
        (gradient,) = torch.autograd.grad(lens(x)[source], x.entries)
        assert (gradient.norm(dim=1) > 0).all()


def test_transformer_lens_damps_fast_frequencies_of_wide_entries():
    lens = build_lens(config("transformer"))
    x = context()
    amplitude = torch.stack(lens.tables(x)).square().sum(0).sqrt()  # [N, head_dim]
    assert torch.allclose(amplitude[x.lod == 0], torch.ones(1))
    assert amplitude[x.lod == 1][0, 0] == pytest.approx(np.exp(-0.5 * (4**2 - 1) / 12), rel=1e-4)
    assert (amplitude[x.lod == 2][:, 0] < 1e-3).all()
    assert (amplitude[:, -1] > 0.9).all()


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("prior", ["none", "gist_mass"])
def test_training_reaches_every_parameter_and_lowers_the_loss(kind, prior):
    torch.manual_seed(0)
    lens = build_lens(config(kind, prior=prior))
    samples = [context(seed=s) for s in range(3)]
    utility = [(x.entries[:, 0] * x.entries[:, 1]).tanh() for x in samples]

    def loss():
        return sum((lens.score(x) - u).square()[x.lod == 1].mean() for x, u in zip(samples, utility, strict=True))

    optimizer, start, moved = torch.optim.AdamW(lens.parameters(), lr=1e-2), loss().item(), set()
    for step in range(30):
        optimizer.zero_grad()
        loss().backward()
        for name, p in lens.named_parameters():
            assert p.grad is not None, f"{name} has no gradient in step {step}"
            if p.grad.abs().max() > 0:
                moved.add(name)
        optimizer.step()
    assert moved == {name for name, _ in lens.named_parameters()}
    assert loss().item() < 0.5 * start
    again = build_lens(config(kind, prior=prior))
    again.load_state_dict(lens.state_dict())
    assert torch.equal(again.score(samples[0]), lens.score(samples[0]))


def test_legality_stops_the_gradient():
    x = context()
    x.attention_mass.requires_grad_()
    lens = OracleLens(config(), lambda c: c.attention_mass)  # above 0 everywhere
    lens.score(x).sum().backward()
    assert torch.equal(x.attention_mass.grad, (x.lod > 0).float())


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("sizes", [(750, 1442, 4800), (0, 0, 1)], ids=["8192", "1"])
def test_long_and_short_contexts(kind, sizes):
    """8192 entries of all levels, and a single one."""
    lens, x = shaken(config(kind, layers=1)), context(*sizes)
    score = lens.score(x)
    assert score.shape == ((8192,) if sizes[0] else (1,))
    assert score.isfinite().all()
    if sizes[0]:
        assert (score != 0).sum() > len(score) // 4
        parts = permuted(x, torch.arange(len(score) // 2))
        assert not torch.allclose(lens.score(parts), score[: len(score) // 2], atol=1e-4)  # the far half matters


def written_out(lens: Lens, x: LensInput) -> torch.Tensor:
    """The formula as LensSettings and the design notes have it: norm, then project; the head reads all features."""

    def encoded(name: str) -> torch.Tensor:
        return lens.project(rms_norm(getattr(x, name).to(lens.project.weight.dtype)))[None]

    features = lens.features(lens.describe(x).to(lens.project.weight.dtype))[None]
    out = encoded("entries") + features
    if isinstance(lens, DualLens):
        tail = lens.gather[0](encoded("tail"), out)
        out = out + lens.spread[0](rms_norm(out), rms_norm(tail))
    else:
        for block in lens.blocks:
            out = block(out, tables=lens.tables(x))
    return lens.legal(lens.head(torch.cat((rms_norm(out), features), -1))[0, :, 0].tanh(), x)


@pytest.mark.parametrize("kind", TRAINED)
def test_short_cuts_change_the_formula_by_rounding_alone(kind):
    lens, x = shaken(config(kind)), context()
    x.entries *= torch.logspace(-5, 2, len(x.lod))[:, None]  # rows whose norm meets the epsilon, too
    with torch.no_grad():
        exact = written_out(lens.double(), x)
        torch.testing.assert_close(lens.score(x), exact, rtol=1e-6, atol=1e-6)
        for dtype in (torch.float32, torch.bfloat16):
            lens = lens.to(dtype)
            theirs, ours = ((s - exact).square().mean().sqrt() for s in (written_out(lens, x), lens.score(x)))
            assert ours <= 1.5 * theirs
            assert theirs > 0, "a score of exact zeros would compare nothing"


def test_attention_of_the_networks_is_attention_with_its_padding_unseen():
    net, x, far = Attention(32, 16, cross=True).double(), torch.randn(1, 5, 32).double(), torch.randn(1, 9, 32).double()
    far[:, 7:] = torch.inf
    q = rms_norm(net.query(x).unflatten(-1, (2, 16)))
    k, v = net.key_value(far[:, :7]).unflatten(-1, (2, 2, 16)).unbind(2)
    out, _ = reference_attention(q.transpose(1, 2), rms_norm(k).transpose(1, 2), v.transpose(1, 2))
    seen = net(x, far, count=torch.tensor(7, dtype=torch.int32))
    torch.testing.assert_close(seen, net.out(out.transpose(1, 2).flatten(2)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", TRAINED)
def test_cursor_may_be_a_tensor_and_a_graph_is_whole(kind):
    lens, x = shaken(config(kind, prior="gist_mass")), context()
    moved = dataclasses.replace(x, cursor=torch.tensor(x.cursor))
    assert torch.equal(lens.score(moved), lens.score(x))
    compiled = torch.compile(lens.score, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(moved), lens.score(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gist_mass", "recency", *TRAINED])
@pytest.mark.parametrize("pad", [3, 1200], ids="pad{}".format)
def test_padding_changes_nothing(kind, pad):
    lens, x = shaken(config(kind, **({"prior": "gist_mass"} if kind in TRAINED else {}))), context()
    n, wanted = len(x.lod), lens.score(x)
    rows = {name: getattr(x, name) for name in ("start", "lod", "entries", "attention_mass")}
    rows = {name: torch.cat((v, 5 * torch.ones_like(v[:1]).expand(pad, *v.shape[1:]))) for name, v in rows.items()}
    rows["lod"][n:] = 1
    score = lens.score(dataclasses.replace(x, **rows, count=torch.tensor(n, dtype=torch.int32)))
    torch.testing.assert_close(score[:n], wanted, rtol=1e-4, atol=1e-5)
    assert not score[n:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gist_mass", *TRAINED])
def test_graphed_lens_equals_the_lens_as_entries_and_weights_change(kind):
    lens = shaken(config(kind)).cuda()
    graphed = GraphedLens(lens, capacity=256)
    for sizes in ((6, 20, 40), (9, 30, 60), (3, 8, 40)):
        x = context(*sizes)
        rows = ("start", "lod", "entries", "tail", "attention_mass")
        x = dataclasses.replace(x, generator=None, **{name: getattr(x, name).cuda() for name in rows})
        torch.testing.assert_close(graphed.score(x), lens.score(x).detach(), rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            for p in lens.parameters():
                p.mul_(0.9)
    with pytest.raises(ValueError, match="at most 256 entries"):
        graphed.score(dataclasses.replace(x, start=x.start.repeat(9), lod=x.lod.repeat(9)))


def test_a_graph_reads_what_was_given_last():
    """Without the graph, which needs a GPU: its inputs, as their number, the cursor and its type change."""
    lens = shaken(config("dual"))
    graphed = GraphedLens(lens, capacity=256)
    for sizes in ((6, 20, 40), (9, 30, 60), (9, 30, 61), (3, 8, 40)):
        x = dataclasses.replace(context(*sizes, seed=sizes[2]), generator=None)
        given = {name: getattr(x, name) for name in ("start", "lod", "entries", "attention_mass", "tail")}
        if not graphed._static:
            graphed._allocate("key", given, torch.device("cpu"))
        for cursor in (x.cursor, torch.tensor(x.cursor + 9), x.cursor):
            graphed._fill(given, len(x.lod), cursor)
            wanted = lens.score(dataclasses.replace(x, cursor=cursor))
            found = lens.score(LensInput(**graphed._static))
            torch.testing.assert_close(found[: len(x.lod)], wanted, rtol=1e-4, atol=1e-5)
            assert not found[len(x.lod) :].any()


def test_graphed_lens_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="RandomLens"):
        GraphedLens(RandomLens(config()), capacity=256)
    with pytest.raises(ValueError, match="on a GPU"):
        GraphedLens(GistMassLens(config()), capacity=256).score(dataclasses.replace(context(), generator=None))


def test_input_of_a_working_context():
    class Context:
        start, lod, total = np.array([0, 4, 8], dtype=np.int64), np.array([1, 1, 0], dtype=np.int8), 9

    x = LensInput.of(Context(), attention_mass=torch.ones(3))
    assert (x.start.dtype, x.lod.tolist(), x.cursor) == (torch.int64, [1, 1, 0], 9)
    assert GistMassLens(config()).score(x).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("cfg", "missing", "message"),
    [
        (config("gist_mass"), "attention_mass", "attention_mass: GistMassLens"),
        (config("dual"), "entries", "entries: DualLens"),
        (config("dual"), "tail", "tail: DualLens"),
        (config("transformer"), "entries", "entries: TransformerLens"),
        (config("transformer", prior="gist_mass"), "attention_mass", "attention_mass: (GistMass|Transformer)Lens"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_missing_or_wrong_inputs_are_named(cfg, missing, message):
    lens, x = build_lens(cfg), context()
    with pytest.raises(ValueError, match=message):
        lens.score(dataclasses.replace(x, **{missing: None}))
    if missing != "tail":
        with pytest.raises(ValueError, match=message):
            lens.score(dataclasses.replace(x, **{missing: getattr(x, missing)[1:]}))


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="kind: expected one of"):
        build_lens(config("oracle"))
    with pytest.raises(ValueError, match=r"lens: expected settings among .* got \['depth'\]"):
        build_lens(config("dual", depth=3))
    with pytest.raises(ValueError, match="head_dim"):
        build_lens(config("dual", head_dim=24))
    with pytest.raises(ValueError, match="hidden_size"):
        DualLens(MegaContextConfig(lens={"kind": "dual"}))
    with pytest.raises(ValueError, match=r"entries: expected \[n, 5\]"):
        TransformerLens(config("transformer", entry_dim=5)).score(context())
