"""MegaContextConfig: what it refuses (everything at once), and the figures that others rely on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_flash_mc.megacontext import AllocatorState, BudgetError, FocusAllocator, MegaContextConfig, WorkingContext


def test_the_data_structures_need_neither_transformers_nor_triton():
    code = "import sys, hf_flash_mc.megacontext as m; m.MegaContextTree, m.FocusAllocator; print(*sys.modules)"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert not {"transformers", "triton"} & set(done.stdout.split())


def test_defaults_are_those_of_the_specification():
    config = MegaContextConfig()
    assert (config.block_size, config.max_lod, config.w_max) == (32, 2, 8192)
    assert (config.sink_tokens, config.recent_tokens) == (32, 128)
    assert (config.backend, config.positions) == ("kv", "compressed")
    assert (config.refocus_interval, config.max_edits, config.tau, config.cooldown) == (32, 4, 0.2, 2)
    assert [config.span(lod) for lod in range(3)] == [1, 32, 1024]
    # 32 + 31 around the sink, 128 + 2 * 31 at the end
    assert config.fixed_cost == 253
    assert config.max_history == (8192 - 253) * 1024


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 1}, "block_size: expected a whole number of at least 2, got 1"),
        ({"block_size": True}, "block_size"),
        ({"block_size": 32.0}, "block_size"),
        ({"block_size": 70000, "max_lod": 1, "w_max": 10**6}, "block_size: expected at most 65535"),
        ({"max_lod": 0}, "max_lod"),
        ({"max_lod": 10}, r"expected block_size \*\* max_lod < 2\*\*48, got 32 \*\* 10; lower max_lod"),
        ({"w_max": 284}, "w_max: expected at least 285 .*253 slots.*, got 284; raise it or lower"),
        ({"w_max": 8192, "max_position_embeddings": 2048}, "w_max: expected at most max_position_embeddings = 2048"),
        ({"sink_tokens": -1}, "sink_tokens"),
        ({"recent_tokens": None}, "recent_tokens"),
        ({"refocus_interval": 0}, "refocus_interval"),
        ({"max_edits": -1}, "max_edits"),
        ({"cooldown": -1}, "cooldown"),
        ({"tau": 1.5}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"tau": "0.2"}, "tau"),
        ({"backend": "tokens"}, "backend: expected one of kv, embedding, got 'tokens'"),
        ({"positions": "none"}, "positions: expected one of compressed, absolute, got 'none'"),
        ({"gist": None}, "gist"),
        ({"lens": {1: 2}}, "lens"),
        ({"num_layers": 0}, "num_layers"),
        ({"vocab_size": 1.0}, "vocab_size"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
        ({"revision": b"main"}, "revision"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MegaContextConfig(**settings)


def test_all_problems_are_in_one_error():
    with pytest.raises(ValueError, match=r"block_size: .*; backend: .*; tau: ") as caught:
        MegaContextConfig(block_size=0, tau=7, backend="disk")
    assert str(caught.value).count("expected") == 3


def test_round_trip_through_json():
    config = MegaContextConfig(block_size=8, w_max=512, gist={"pooling": "query"}, num_layers=2, vocab_size=100)
    again = MegaContextConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.gist is not config.gist


def test_from_dict_refuses_unknown_names():
    with pytest.raises(ValueError, match="expected only known settings, got blocksize, tua; known are backend"):
        MegaContextConfig.from_dict({"tua": 0.1, "blocksize": 3})
    with pytest.raises(TypeError, match="values: expected a dict, got list"):
        MegaContextConfig.from_dict([])  # type: ignore[arg-type]


def test_span_of_a_level_that_is_not():
    with pytest.raises(ValueError, match="lod: expected 0 to 2"):
        MegaContextConfig().span(3)


def test_span_of_a_level_out_of_a_lod_array():
    """lod arrays are int8, in which 32 ** 2 would be 0."""
    assert MegaContextConfig().span(np.array([2], np.int8)[0]) == 1024


def test_payload_shape():
    config = MegaContextConfig(num_layers=3, num_kv_heads=2, head_dim=16, hidden_size=96)
    assert config.payload_shape == (3, 2, 2, 16)
    assert MegaContextConfig(backend="embedding", hidden_size=96).payload_shape == (96,)
    with pytest.raises(ValueError, match="expected num_layers, head_dim for the kv back end, got None"):
        _ = MegaContextConfig(num_kv_heads=2).payload_shape


@pytest.mark.parametrize("chunk", [1, 5, 7])
@pytest.mark.parametrize(
    ("block", "max_lod", "sink", "recent"), [(2, 1, 0, 7), (2, 3, 5, 9), (3, 2, 4, 8), (4, 2, 4, 7), (4, 3, 0, 11)]
)
def test_max_history_fits(block, max_lod, sink, recent, chunk):
    """Any history up to max_history, in any chunks up to recent_tokens, can be made to fit; far longer ones cannot."""
    least = MegaContextConfig(block_size=block, max_lod=max_lod, sink_tokens=sink, recent_tokens=recent).fixed_cost
    config = MegaContextConfig(
        block_size=block, max_lod=max_lod, sink_tokens=sink, recent_tokens=recent, w_max=least + block
    )
    wc, allocator, state = WorkingContext(config), FocusAllocator(config), AllocatorState.initial()

    def ingest() -> None:
        nonlocal state
        edits, state = allocator.make_room(wc, None, chunk, state)
        wc.apply(edits)
        wc.append(chunk)

    while wc.total + chunk <= config.max_history:
        ingest()
        wc.check_invariants()
        assert (wc.lod[wc.start < sink] == 0).all()
        assert (wc.lod[wc.end > wc.total - recent] == 0).all()

    def ingest_too_much() -> None:
        while wc.total < config.max_history + (config.w_max + 1) * block**max_lod:
            ingest()

    with pytest.raises(BudgetError, match="raise w_max or max_lod"):
        ingest_too_much()
    wc.check_invariants()
