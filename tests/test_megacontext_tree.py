"""MegaContextTree: every level is what its children say, however the history came in, through kills and reopenings."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flash_mc.megacontext import (
    AllocatorState,
    FileStore,
    FocusAllocator,
    MegaContextConfig,
    MegaContextTree,
    MemoryStore,
    StoreError,
    WorkingContext,
)
from hf_flash_mc.megacontext.tree import TOKENS

BASE = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 2, "hidden_size": 4, "vocab_size": 1000}


def config_of(block=4, max_lod=2, backend="kv", **more) -> MegaContextConfig:
    small = {
        "sink_tokens": block,
        "recent_tokens": block,
        "w_max": 512,
        "base_model_name_or_path": "some/model",
        **BASE,
    }
    return MegaContextConfig(block_size=block, max_lod=max_lod, backend=backend, **{**small, **more})


class Mean:
    """Pools by the mean, in float64, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []  # lod, first, nodes

    def __call__(self, children: torch.Tensor, *, lod: int, first: int) -> torch.Tensor:
        self.calls.append((lod, first, len(children)))
        return children.double().mean(1) + lod


def history(n: int, shape=(1, 2, 1, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(n) * 7919 % 1000
    return ids, torch.sin(torch.arange(n * torch.Size(shape).numel(), dtype=torch.float32)).reshape(n, *shape)


def embed(ids: torch.Tensor) -> torch.Tensor:
    return torch.sin(ids[:, None] + torch.arange(4.0))


def expected_levels(leaves: torch.Tensor, block: int, max_lod: int) -> list[torch.Tensor]:
    """Each level from the one below, in one step over the whole history."""
    levels = [leaves]
    for lod in range(1, max_lod + 1):
        below, n = levels[-1], len(levels[-1]) // block
        levels.append((below[: n * block].reshape(n, block, *below.shape[1:]).double().mean(1) + lod).float())
    return levels


def check(tree: MegaContextTree, ids: torch.Tensor, leaves: torch.Tensor) -> None:
    assert torch.equal(tree.tokens(0, len(tree)), ids)
    levels = expected_levels(leaves, tree.config.block_size, tree.config.max_lod)
    for lod, want in enumerate(levels):
        assert tree.len_of(lod) == len(want)
        assert torch.equal(tree.payload(lod, slice(None)), want)


# ---------------------------------------------------------------------- defects not to repeat


def test_defect_08_append_does_not_pool_the_last_node_again_for_each_token():
    """Token by token, each node is pooled once, when it is complete: no 32-fold recomputation."""
    pool = Mean()
    tree = MegaContextTree(config_of(block=32, max_lod=2), pool=pool)
    ids, leaves = history(1024 + 40)
    for i in range(len(ids)):
        tree.append(ids[i : i + 1], leaves[i : i + 1])
    assert len(pool.calls) == 33 + 1
    assert [call for call in pool.calls if call[0] == 1] == [(1, node, 1) for node in range(33)]
    assert [call for call in pool.calls if call[0] == 2] == [(2, 0, 1)]
    check(tree, ids, leaves)


def test_defect_08_append_of_many_blocks_leaves_no_gist_zero():
    """append(128) makes all four gists in one call."""
    pool = Mean()
    tree = MegaContextTree(config_of(block=32, max_lod=2), pool=pool)
    ids, leaves = history(128)
    assert tree.append(ids, leaves) == {0: range(128), 1: range(4), 2: range(0)}
    assert pool.calls == [(1, 0, 4)]
    assert (tree.payload(1, slice(None)).abs().flatten(1).sum(1) > 0).all()
    check(tree, ids, leaves)


def test_defect_08_level_2_is_built_in_sessions_that_start_short():
    """A history that begins below 1024 tokens gets its level 2 nodes when they are complete."""
    tree = MegaContextTree(config_of(block=32, max_lod=2), pool=Mean())
    ids, leaves = history(2100)
    tree.append(ids[:100], leaves[:100])
    assert tree.append(ids[100:1023], leaves[100:1023])[2] == range(0)
    assert tree.append(ids[1023:2100], leaves[1023:2100])[2] == range(2)
    check(tree, ids, leaves)


def test_defect_06_a_prompt_longer_than_the_window_is_covered():
    """20 windows of prompt, then decoding: every token is covered, by gists and tokens, within the budget."""
    config = config_of(block=4, max_lod=4, w_max=64)
    tree, wc = MegaContextTree(config, pool=Mean()), WorkingContext(config)
    allocator, state = FocusAllocator(config), AllocatorState.initial()
    ids, leaves = history(20 * 64 + 99)
    at = 0
    while at < len(ids):
        n = 4 if at < 20 * 64 else 1
        edits, state = allocator.make_room(wc, None, n, state)
        wc.apply(edits)
        tree.append(ids[at : at + n], leaves[at : at + n])
        wc.append(len(ids[at : at + n]))
        wc.check_invariants(tree)
        at += n
    assert (wc.total, int(wc.span.sum())) == (len(ids), len(ids))
    assert (wc.lod > 0).sum() >= 8


# ---------------------------------------------------------------------- levels


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    block=st.sampled_from([2, 3, 4, 8]),
    max_lod=st.integers(1, 4),
    backend=st.sampled_from(["kv", "embedding"]),
    chunks=st.lists(st.integers(0, 50), max_size=12),
)
def test_levels_do_not_depend_on_how_the_history_came(block, max_lod, backend, chunks):
    config = config_of(block, max_lod, backend)
    pool = Mean()
    tree = MegaContextTree(config, pool=pool, embed=embed)
    ids, leaves = history(sum(chunks))
    done = 0
    for n in chunks:
        part = slice(done, done + n)
        calls = len(pool.calls)
        new = tree.append(ids[part], leaves[part] if backend == "kv" else None)
        assert new[0] == range(done, done + n)
        assert len(pool.calls) - calls == sum(1 for lod in range(1, max_lod + 1) if new[lod])
        done += n
    check(tree, ids, leaves if backend == "kv" else embed(ids))


def test_rounding_once_and_pooling_what_is_stored():
    """A gist of a coarser level is made of gists as stored, so chunking cannot change its bits."""
    config = config_of(block=2, max_lod=3)
    ids, leaves = history(64)
    trees = []
    for step in (64, 3):
        tree = MegaContextTree(config, pool=Mean(), payload_dtype=torch.bfloat16)
        for at in range(0, 64, step):
            tree.append(ids[at : at + step], leaves[at : at + step])
        trees.append(tree)
    for lod in range(4):
        got = [tree.payload(lod, slice(None)) for tree in trees]
        assert got[0].dtype == torch.bfloat16
        assert torch.equal(*got)


def test_relations():
    tree = MegaContextTree(config_of(block=4, max_lod=2), pool=Mean())
    tree.append(*history(37))
    assert tree.parent(0, torch.tensor([0, 35, 36])).tolist() == [0, 8, -1]
    assert tree.parent(1, 8).item() == -1
    assert tree.children(1, 8).tolist() == [32, 33, 34, 35]
    assert tree.children(2, torch.tensor([0, 1])).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert tree.ancestors(0, torch.tensor([5, 33, 36])).tolist() == [[1, 0], [8, -1], [-1, -1]]
    assert tree.ancestors(2, torch.tensor([0, 1])).shape == (2, 0)
    for lod, index in ((0, 37), (1, 9), (2, -1)):
        with pytest.raises(IndexError, match=f"of level {lod}"):
            tree.ancestors(lod, index)
    with pytest.raises(ValueError, match="the last level has no parents"):
        tree.parent(2, 0)
    with pytest.raises(ValueError, match="tokens have no children"):
        tree.children(0, 0)
    with pytest.raises(ValueError, match="lod: expected 0 to 2"):
        tree.payload(3, slice(None))


def test_refresh_bumps_the_version_and_marks_slots_stale():
    config = config_of(block=4, max_lod=2)
    tree, wc = MegaContextTree(config, pool=Mean()), WorkingContext(config)
    tree.append(*history(37))
    wc.append(37)
    wc.collapse(4, 1)
    wc.collapse(16, 2)
    wc.check_invariants(tree)
    tree.refresh(1, torch.tensor([1, 8]), torch.ones(2, 1, 2, 1, 2))
    assert tree.version == 1
    assert tree.version_of(1, torch.arange(9)).tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert (tree.payload(1, torch.tensor([8, 1])) == 1).all()
    assert wc.stale(tree).nonzero()[0].tolist() == [4]
    wc.mark_loaded(tree.version)
    wc.check_invariants(tree)
    tree.refresh(2, slice(1, 2), torch.zeros(1, 1, 2, 1, 2))
    assert (tree.version, tree.version_of(2, torch.tensor([0, 1])).tolist()) == (2, [0, 2])
    assert wc.stale(tree).nonzero()[0].tolist() == [int((wc.start == 16).nonzero()[0][0])]
    tree.append(*history(50))
    assert tree.version_of(1, torch.arange(21)).sum() == 2
    with pytest.raises(ValueError, match="tokens are never rewritten"):
        tree.refresh(0, torch.tensor([0]), torch.ones(1, 1, 2, 1, 2))


def test_truncate_returns_to_an_earlier_length(tmp_path):
    ids, leaves = history(60)
    for folder in (None, tmp_path):
        tree = MegaContextTree(config_of(), folder=folder, pool=Mean())
        tree.append(ids, leaves)
        tree.refresh(1, slice(8, 12), torch.ones(4, 1, 2, 1, 2))
        tree.truncate(37)
        assert tree.version_of(1, torch.arange(9)).tolist() == [0] * 8 + [1]
        tree.append(ids[37:], leaves[37:])
        assert tree.version_of(1, torch.arange(15)).tolist() == [0] * 8 + [1] + [0] * 6
        with pytest.raises(ValueError, match="total: expected 0 to 60 tokens, got 61"):
            tree.truncate(61)
        tree.truncate(0)
        tree.append(ids, leaves)
        check(tree, ids, leaves)
        tree.close()


# ---------------------------------------------------------------------- bad input


def fail(children, *, lod, first):
    raise RuntimeError("no gist today")


@pytest.mark.parametrize(
    ("ids", "payload", "error", "message"),
    [
        ([1.0], None, TypeError, r"token_ids: expected a tensor of whole numbers \[n\], got list"),
        (torch.ones(3), None, TypeError, "token_ids: .* got torch.float32"),
        (torch.ones(1, 3, dtype=torch.long), None, TypeError, r"got torch.int64 \[1, 3\]"),
        (torch.tensor([5, 1000, -1]), None, ValueError, "ids from 0 to 999, got 1000 at 1 .2 outside in all.; is this"),
        (torch.arange(3), None, TypeError, "payload0: expected a tensor of floating-point numbers"),
        (torch.arange(3), torch.ones(3, 1, 2, 1, 2, dtype=torch.int64), TypeError, "payload0: .* got torch.int64"),
        (
            torch.arange(3),
            torch.ones(2, 1, 2, 1, 2),
            ValueError,
            r"payload0: expected shape \[3, 1, 2, 1, 2\], got \[2, ",
        ),
    ],
)
def test_bad_appends_change_nothing(ids, payload, error, message):
    tree = MegaContextTree(config_of(), pool=Mean())
    tree.append(*history(7))
    with pytest.raises(error, match=message):
        tree.append(ids, payload)
    check(tree, *history(7))


def test_missing_or_failing_functions_change_nothing(tmp_path):
    ids, leaves = history(9)
    for folder in (None, tmp_path / "a"):
        tree = MegaContextTree(config_of(), folder=folder)
        tree.append(ids[:3], leaves[:3])
        with pytest.raises(
            ValueError, match=r"pool: expected a function that makes gists \(level 1 is due\), got None"
        ):
            tree.append(ids[3:], leaves[3:])
        tree.pool = fail
        with pytest.raises(RuntimeError, match="no gist today"):
            tree.append(ids[3:], leaves[3:])
        tree.pool = lambda children, lod, first: children
        with pytest.raises(ValueError, match=r"pool\(..., lod=1\): expected shape \[2, 1, 2, 1, 2\], got \[2, 4, 1, 2"):
            tree.append(ids[3:], leaves[3:])
        check(tree, ids[:3], leaves[:3])
        tree.pool = Mean()
        tree.append(ids[3:], leaves[3:])
        check(tree, ids, leaves)
        tree.close()
    tree = MegaContextTree(config_of(backend="embedding"), pool=Mean())
    with pytest.raises(ValueError, match="payload0: expected None"):
        tree.append(ids[:3], torch.ones(3, 4))
    with pytest.raises(ValueError, match="embed: expected a function from token ids to embeddings"):
        tree.append(ids)
    assert len(tree) == 0


def test_a_failing_store_rolls_an_append_back(monkeypatch):
    """The disk is full while level 2 is written: every level is as before, and the append can be tried again."""
    tree = MegaContextTree(config_of(), pool=Mean())
    ids, leaves = history(40)
    tree.append(ids[:10], leaves[:10])

    def full(records):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tree._stores[2], "append", full)
        with pytest.raises(OSError, match="No space left"):
            tree.append(ids[10:], leaves[10:])
    check(tree, ids[:10], leaves[:10])
    tree.append(ids[10:], leaves[10:])
    check(tree, ids, leaves)


def test_given_stores(tmp_path):
    record = ((1, 2, 1, 2), torch.float32)
    stores = {TOKENS: MemoryStore((), torch.int32), **{lod: MemoryStore(*record) for lod in range(3)}}
    tree = MegaContextTree(config_of(), stores=stores, pool=Mean())
    tree.append(*history(21))
    check(tree, *history(21))
    with pytest.raises(ValueError, match="expected one of them, got both"):
        MegaContextTree(config_of(), stores=stores, folder=tmp_path)
    with pytest.raises(ValueError, match=r"stores: expected the keys \[0, 1, 2, 'tokens'\], got"):
        MegaContextTree(config_of(), stores={k: v for k, v in stores.items() if k != 0})
    with pytest.raises(ValueError, match=r"stores\[0\]: expected records of"):
        MegaContextTree(config_of(), stores=stores, payload_dtype=torch.bfloat16)
    stores[1].truncate(2)
    with pytest.raises(StoreError, match="level 1: expected 5 records for 21 tokens, got 2"):
        MegaContextTree(config_of(), stores=stores)


# ---------------------------------------------------------------------- folders


@pytest.mark.parametrize("backend", ["kv", "embedding"])
def test_a_folder_is_reopened(tmp_path, backend):
    ids, leaves = history(75)
    for start, stop in ((0, 0), (0, 30), (30, 31), (31, 75), (75, 75)):
        tree = MegaContextTree(config_of(backend=backend), folder=tmp_path, pool=Mean(), embed=embed, durable=stop > 40)
        assert len(tree) == start
        tree.append(ids[start:stop], leaves[start:stop] if backend == "kv" else None)
        check(tree, ids[:stop], leaves[:stop] if backend == "kv" else embed(ids[:stop]))
        tree.flush(durable=True)
        tree.close()
    names = {"LOD0.ctx", "LOD1.ctx", "LOD2.ctx", "metadata.json"} | ({"KV0.ctx"} if backend == "kv" else set())
    assert {path.name for path in tmp_path.iterdir()} == names
    tree = MegaContextTree(config_of(backend=backend), folder=tmp_path)
    tree.refresh(1, slice(0, 1), torch.ones(1, *tree.payload_shape))
    tree.close()
    tree = MegaContextTree(config_of(backend=backend), folder=tmp_path)
    assert tree.version == 1
    tree.close()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "metadata.json").unlink(), "metadata.json: expected beside the .ctx files, got no such file"),
        (lambda f: (f / "metadata.json").write_text("{"), "metadata.json: expected JSON, got something else"),
        (lambda f: (f / "metadata.json").write_text("[]"), "metadata.json: expected a JSON object, got list"),
        (lambda f: (f / "LOD1.ctx").unlink(), "LOD1.ctx: expected beside LOD0.ctx, got no such file; restore it"),
        (
            lambda f: (f / "LOD0.ctx").unlink(),
            "LOD0.ctx: expected beside KV0.ctx, LOD1.ctx, LOD2.ctx",
        ),
        (lambda f: os.replace(f / "LOD1.ctx", f / "LOD2.ctx"), "LOD1.ctx: expected beside"),
        (
            lambda f: (f / "LOD2.ctx").write_bytes((f / "LOD1.ctx").read_bytes()),
            "LOD2.ctx was .* level: expected 2, got 1",
        ),
        (lambda f: os.truncate(f / "KV0.ctx", 100), "KV0.ctx: expected 544 bytes .30 records of 16., got 100"),
        (
            lambda f: set_count(f / "LOD1.ctx", 6),
            "level 1: expected 7 records for 30 tokens, got 6; the files do not belong",
        ),
    ],
    ids=[
        "no metadata",
        "no json",
        "json list",
        "missing",
        "missing tokens",
        "moved",
        "wrong level",
        "truncated",
        "too few",
    ],
)
def test_damaged_folders_are_named_and_can_be_opened_once_mended(tmp_path, damage, message):
    tree = MegaContextTree(config_of(), folder=tmp_path, pool=Mean())
    tree.append(*history(30))
    tree.close()
    good = {path: path.read_bytes() for path in tmp_path.iterdir()}
    damage(tmp_path)
    with pytest.raises(StoreError, match=message):
        MegaContextTree(config_of(), folder=tmp_path)
    assert (tmp_path / "KV0.ctx").stat().st_size in (100, len(good[tmp_path / "KV0.ctx"])), "nothing was cut off"
    for path, raw in good.items():
        path.write_bytes(raw)
    tree = MegaContextTree(config_of(), folder=tmp_path)  # nothing stayed locked
    check(tree, *history(30))
    tree.close()


def set_count(path: Path, count: int) -> None:
    with open(path, "r+b") as file:
        file.seek(16)
        file.write(struct.pack("<Q", count))


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({"block": 8}, torch.float32, "block_size: expected 8, got 4"),
        ({"max_lod": 3}, torch.float32, "max_lod: expected 3, got 2"),
        (
            {"backend": "embedding"},
            torch.float32,
            r"backend: expected 'embedding', got 'kv'; payload_shape: expected \[4\]",
        ),
        ({"base_model_name_or_path": "other/model"}, torch.float32, "expected 'other/model', got 'some/model'"),
        ({"revision": "v2"}, torch.float32, "revision: expected 'v2', got None"),
        ({"num_layers": 2}, torch.float32, r"payload_shape: expected \[2, 2, 1, 2\], got \[1, 2, 1, 2\]"),
        ({}, torch.bfloat16, "payload_dtype: expected 'bfloat16', got 'float32'"),
    ],
    ids=str,
)
def test_folders_of_something_else_are_named(tmp_path, changes, dtype, message):
    MegaContextTree(config_of(), folder=tmp_path).close()
    with pytest.raises(StoreError, match="was written for something else: .*" + message):
        MegaContextTree(config_of(**changes), folder=tmp_path, payload_dtype=dtype)


def test_a_folder_half_made_is_completed(tmp_path):
    """A kill while the files of a new history are created: at whichever of them, the next opening makes the rest."""
    MegaContextTree(config_of(), folder=tmp_path / "whole").close()
    order = ["metadata.json", "KV0.ctx", "LOD1.ctx", "LOD2.ctx", "LOD0.ctx"]
    for made in range(len(order)):
        folder = tmp_path / str(made)
        folder.mkdir()
        for name in order[:made]:
            (folder / name).write_bytes((tmp_path / "whole" / name).read_bytes())
        (folder / (order[made] + ".new")).write_bytes(b"half")
        tree = MegaContextTree(config_of(), folder=folder, pool=Mean())
        tree.append(*history(17))
        check(tree, *history(17))
        tree.close()
    assert json.loads((tmp_path / "0" / "metadata.json").read_text())["block_size"] == 4


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_between_any_two_files(tmp_path, monkeypatch):
    """An append stops after each of its system calls: the history is as before it, or as after it, on every level."""
    whole, ids, leaves = FileStore._put, *history(60)
    for crash_at in range(9):
        folder = tmp_path / str(crash_at)
        tree = MegaContextTree(config_of(), folder=folder, pool=Mean())
        tree.append(ids[:30], leaves[:30])
        calls = 0

        def put(self, offset, data, crash_at=crash_at):
            nonlocal calls
            calls += 1
            if calls > crash_at:
                raise Crash  # and from then on: no rollback either
            whole(self, offset, data)

        monkeypatch.setattr(FileStore, "_put", put)
        try:
            tree.append(ids[30:], leaves[30:])
        except Crash:
            assert crash_at < 8
        else:
            assert crash_at == 8  # four files, records and count each
        monkeypatch.undo()
        tree.close()
        tree = MegaContextTree(config_of(), folder=folder, pool=Mean())
        assert len(tree) == (60 if crash_at == 8 else 30)
        check(tree, ids[: len(tree)], leaves[: len(tree)])
        tree.append(ids[len(tree) :], leaves[len(tree) :])
        check(tree, ids, leaves)
        tree.close()
