"""GistNet: harmless before training, sees every child, learns, and pools batches as it pools single windows."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_flash_mc.megacontext.config import MegaContextConfig
from hf_flash_mc.megacontext.gistnet import EmbeddingGist, KVGist, build_gist
from hf_flash_mc.megacontext.rope import Rope, rope_tables, rotate

L, H, D, K = 3, 2, 16, 8
ROPE = Rope(1e4 ** -(torch.arange(0, D, 2).float() / D)[None], torch.tensor([1.0]))
PER_LAYER = Rope(
    torch.stack([ROPE.inv_freq[0], ROPE.inv_freq[0] / 8, torch.zeros(D // 2)]), torch.tensor([1.0, 1.3, 1])
)
KV = [
    pytest.param({"pooling": pooling, "rotation": rotation, "rank": rank}, id=f"{pooling}-{rotation}-{rank}")
    for pooling, rotation, rank in itertools.product(("mean", "query"), ("centre", "span"), (0, 4))
]
EMBEDDING = [
    {"network": "transformer", "pooling": "mean", "head": "mlp"},
    {"network": "transformer", "pooling": "query", "width": 32},
    {"network": "transformer", "pooling": "cls"},
    {"network": "slots", "layers": 2, "width": 32},
    {"network": "slots", "layers": 1, "head": "mlp", "base": "mean"},
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def config(backend: str = "kv", **gist) -> MegaContextConfig:
    sizes = {"num_layers": L, "num_kv_heads": H, "head_dim": D, "hidden_size": 48}
    sizes |= {"block_size": K, "w_max": 512, "sink_tokens": 8, "recent_tokens": 16}
    return MegaContextConfig(backend=backend, gist=gist, **sizes)


def raw_window(n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(n, K, L, H, D), torch.randn(n, K, L, H, D)


def rotated(keys: torch.Tensor, positions: torch.Tensor, rope: Rope = ROPE) -> torch.Tensor:
    cos, sin = rope.tables(positions)
    return rope.rotate(keys, cos[..., None, :], sin[..., None, :])


def shake(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from its start, as training would."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("rope", [ROPE, PER_LAYER], ids=["one-rope", "rope-per-layer"])
@pytest.mark.parametrize("settings", KV)
def test_untrained_kv_gist_is_the_plain_mean(settings, rope):
    keys, values = raw_window()
    positions = torch.tensor([[0], [8], [800], [8000], [1_000_000]]) + torch.arange(K)
    net = KVGist(config(**settings), rope)
    pooled = net(rotated(keys, positions, rope), values, lod=1, positions=positions)
    torch.testing.assert_close(pooled.values, values.mean(1), rtol=1e-6, atol=1e-6)
    if settings["rotation"] == "centre":
        torch.testing.assert_close(pooled.keys, keys.mean(1), rtol=1e-4, atol=1e-5)
    else:  # put at its middle, it is the mean of the keys as they stand in the cache
        middle = rotated(pooled.keys, positions[:, 0] + K // 2, rope)
        torch.testing.assert_close(middle, rotated(keys, positions, rope).mean(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", KV)
def test_identical_tokens_pool_to_themselves(settings):
    """A gist of equal tokens is that token, but for the damping of frequencies faster than the block."""
    key, value = torch.randn(1, 1, L, H, D).expand(2, K, -1, -1, -1), torch.randn(1, 1, L, H, D)
    positions = torch.tensor([[40], [400]]) + torch.arange(K)
    net = KVGist(config(**settings), ROPE)
    pooled = net(rotated(key, positions), value.expand(2, K, -1, -1, -1), lod=1, positions=positions)
    torch.testing.assert_close(pooled.values, value[0].expand(2, -1, -1, -1), rtol=1e-6, atol=1e-6)
    expected = key[:, 0]
    if settings["rotation"] == "span":  # the mean position lies half a token before start + K // 2
        tables = rope_tables(ROPE.inv_freq[0], torch.tensor(-0.5), span=K)
        expected = rotate(expected, *tables)
    torch.testing.assert_close(pooled.keys, expected, rtol=1e-4, atol=1e-4)


def test_span_gist_of_gists_is_the_mean_of_all_tokens_where_they_stand():
    net, n = KVGist(config(rotation="span"), PER_LAYER), K * K
    keys, values = torch.randn(1, n, L, H, D), torch.randn(1, n, L, H, D)
    positions = 512 + torch.arange(n)[None]
    cached = rotated(keys, positions, PER_LAYER)
    first = net(*(x.unflatten(1, (K, K))[0] for x in (cached, values)), lod=1, positions=positions.reshape(K, K))
    second = net(first.keys[None], first.values[None], lod=2)
    middle = rotated(second.keys, torch.tensor([512 + n // 2]), PER_LAYER)
    torch.testing.assert_close(middle, cached.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second.values, values.mean(1), rtol=1e-4, atol=1e-5)


def test_log_weight_is_zero_for_tokens_and_learned_for_gists():
    net = KVGist(config(beta_init=0.5), ROPE)
    lod = torch.tensor([0, 1, 2, 1, 0], dtype=torch.int8)
    weight = net.log_weight(lod)
    assert weight.shape == (L, H, 5)
    log_n = torch.tensor([0.0, 1, 2, 1, 0]) * torch.tensor(float(K)).log()
    torch.testing.assert_close(weight, (0.5 * log_n).expand(L, H, -1))
    weight.sum().backward()
    assert torch.equal(net.beta.grad, torch.tensor([2.0, 1.0]).expand(L, H, 2))
    assert KVGist(config(), ROPE).log_weight(lod).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", KV[3:6])
def test_pool_of_payloads_equals_window_by_window_and_rounds_once(settings, dtype, monkeypatch):
    monkeypatch.setattr("hf_flash_mc.megacontext.gistnet.POOL_ELEMENTS", 2 * K * L * 2 * H * D)  # two windows at a time
    net = shake(KVGist(config(**settings), ROPE))
    keys, values = raw_window(5)
    positions = torch.arange(5 * K).reshape(5, K)
    children = torch.stack((rotated(keys, positions), values), 3).to(dtype)  # [5, K, L, 2, H, D]
    pooled = net.pool(children, lod=1, positions=positions, first=3)
    assert pooled.shape == (5, L, 2, H, D)
    assert pooled.dtype == dtype
    for i in range(5):
        one = net(children[i : i + 1, :, :, 0], children[i : i + 1, :, :, 1], lod=1, positions=positions[i : i + 1])
        torch.testing.assert_close(pooled[i, :, 0], one.keys[0].to(dtype), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pooled[i, :, 1], one.values[0].to(dtype), rtol=1e-5, atol=1e-5)
    assert net.pool(children[:0], lod=1, positions=positions[:0]).shape == (0, L, 2, H, D)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("settings", EMBEDDING, ids=str)
def test_embedding_batch_equals_window_by_window(settings, n, monkeypatch):
    monkeypatch.setattr("hf_flash_mc.megacontext.gistnet.POOL_TOKENS", 2 * K)
    net, children = shake(EmbeddingGist(config("embedding", **settings))), torch.randn(n, K, 48)
    together = net(children)
    torch.testing.assert_close(together, torch.cat([net(x[None]) for x in children]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.pool(children, lod=2), together, rtol=1e-4, atol=1e-5)
    assert net.pool(children[:0], lod=1).shape == (0, 48)


@pytest.mark.parametrize("settings", EMBEDDING, ids=str)
def test_untrained_embedding_gist_is_its_base(settings):
    children = torch.randn(3, K, 48)
    base = children.mean(1) if settings.get("base") == "mean" else children[:, -1]
    assert torch.equal(EmbeddingGist(config("embedding", **settings))(children), base)


@pytest.mark.parametrize("settings", EMBEDDING, ids=str)
def test_embedding_gist_sees_every_child_and_their_order(settings):
    """Under a causal mask a first-token summary is constant: max |gist(A) - gist(B)| = 0."""
    net = shake(EmbeddingGist(config("embedding", **settings)))
    children = torch.randn(1, K, 48, requires_grad=True)
    residual = net(children) - (children.mean(1) if settings.get("base") == "mean" else children[:, -1])
    (gradient,) = torch.autograd.grad((residual * torch.randn(48)).sum(), children)
    sizes = gradient[0].norm(dim=-1)
    assert (sizes > 1e-3 * sizes.max()).all(), sizes
    with torch.no_grad():
        for j in range(K):
            other = children.clone()
            other[:, j] = torch.randn(48)
            assert (net(other) - net(children)).abs().max() > 1e-4, j
        swapped = children[:, [1, 0, *range(2, K)]]
        assert (net(swapped) - net(children)).abs().max() > 1e-5


@pytest.mark.parametrize("settings", KV[1::2], ids=lambda s: f"{s['pooling']}-{s['rotation']}")
def test_kv_residual_sees_every_child_and_their_order(settings):
    net = shake(KVGist(config(**settings), ROPE))
    keys, values = (x.requires_grad_() for x in raw_window(1))
    pooled = net(keys, values, lod=1)
    for x in torch.autograd.grad((pooled.keys * torch.randn(D)).sum() + pooled.values.square().sum(), (keys, values)):
        sizes = x[0].flatten(1).norm(dim=-1)
        assert (sizes > 1e-3 * sizes.max()).all(), sizes
    order = [1, 0, *range(2, K)]
    swapped = net(keys[:, order], values[:, order], lod=1)
    assert (swapped.values - pooled.values).abs().max() > 1e-5


def networks():
    yield from ((config(**s.values[0]), s.id) for s in KV)
    yield from ((config("embedding", **s), str(s)) for s in EMBEDDING)


@pytest.mark.parametrize("cfg", [pytest.param(c, id=name) for c, name in networks()])
def test_training_reaches_every_parameter_and_lowers_the_loss(cfg):
    """No parameter is left without a gradient, and no loss is a constant: a target that the untrained net misses."""
    torch.manual_seed(0)
    net = build_gist(cfg, ROPE)
    children = torch.randn(16, K, L, 2, H, D) if cfg.backend == "kv" else torch.randn(16, K, 48)
    weights = torch.linspace(0.1, 1, K).softmax(0)
    target = torch.tensordot(children.tanh(), weights, ([1], [0]))

    def loss():
        if cfg.backend == "embedding":
            return (net(children) - target).square().mean()
        pooled = net(children[:, :, :, 0], children[:, :, :, 1], lod=1)
        beta = net.log_weight(torch.tensor([1, 2]))
        return (torch.stack(pooled, 2) - target).square().mean() + 0.01 * (beta - 1).square().mean()

    optimizer, start = torch.optim.AdamW(net.parameters(), lr=3e-3), loss().item()
    moved = set()
    for step in range(20):
        optimizer.zero_grad()
        loss().backward()
        for name, p in net.named_parameters():
            assert p.grad is not None, f"{name} has no gradient in step {step}"
            if p.grad.abs().max() > 0:
                moved.add(name)
        optimizer.step()
    assert moved == {name for name, _ in net.named_parameters()}
    assert loss().item() < 0.98 * start
    again = build_gist(cfg, ROPE)
    again.load_state_dict(net.state_dict())  # nothing that matters lives outside the state dict


def test_casting_the_module_leaves_the_rotation_exact():
    keys, values = raw_window(2)
    positions = torch.tensor([[5000], [9000]]) + torch.arange(K)
    pooled = KVGist(config(), ROPE).to(torch.bfloat16)(rotated(keys, positions), values, lod=1, positions=positions)
    torch.testing.assert_close(pooled.keys, keys.mean(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["kv", "embedding"])
def test_wrong_settings_and_inputs_say_what_is_wrong(backend):
    with pytest.raises(ValueError, match=r"gist: expected settings among .* got \['rnak'\]"):
        build_gist(config(backend, rnak=3))
    with pytest.raises(ValueError, match="pooling: expected"):
        build_gist(config(backend, pooling="max"))
    net = build_gist(config(backend))
    children = torch.zeros(2, K - 1, L, 2, H, D) if backend == "kv" else torch.zeros(2, K - 1, 48)
    with pytest.raises(ValueError, match=f"expected \\[n, {K}"):
        net.pool(children, lod=1)
    full = torch.zeros(2, K, L, 2, H, D) if backend == "kv" else torch.zeros(2, K, 48)
    with pytest.raises(ValueError, match="lod: expected 1 to 2"):
        net.pool(full, lod=3)
    if backend == "kv":
        with pytest.raises(ValueError, match="rope_of"):
            net.pool(full, lod=1, positions=torch.zeros(2, K))
        with pytest.raises(ValueError, match="num_layers"):
            KVGist(MegaContextConfig())
    else:
        with pytest.raises(ValueError, match="head_dim"):
            EmbeddingGist(MegaContextConfig(backend="embedding", hidden_size=300, gist={"head_dim": 64}))


def test_embedding_gist_compiles_as_one_graph():
    net, children = shake(EmbeddingGist(config("embedding"))), torch.randn(6, K, 48)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(children), net(children), rtol=1e-4, atol=1e-5)
