"""kill -9 of a writer at random moments: everything acknowledged is there after it, and no half record or append."""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_flash_mc.megacontext import FileStore, MegaContextConfig, MegaContextTree

KILLS = int(os.environ.get("HF_FLASH_MC_TEST_KILLS", "40"))
RECORD = (16384,)  # 64 KiB
WRITTEN = 6  # records of one write in place
CONFIG = MegaContextConfig(
    block_size=4, max_lod=3, sink_tokens=4, recent_tokens=4, num_layers=8, num_kv_heads=1, head_dim=256
)  # 16 KiB a token

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.timeout(3600),
]


def size_of_append(length: int) -> int:
    """How many records the append at this length has: a history can only have the lengths of this chain."""
    return 1 + length * 2654435761 % 41


class Lengths:
    """Checks that a length found after a kill is that of whole appends, and at most one past the acknowledged."""

    def __init__(self, first: int) -> None:
        self.last = first

    def check(self, found: int, acknowledged: int) -> None:
        assert found in (acknowledged, acknowledged + size_of_append(acknowledged))
        while self.last < found:
            self.last += size_of_append(self.last)
        assert self.last == found, "a part of an append"


def killed(work: Callable[[Callable[[int, int], None]], None], delay: float, watched: Path | None) -> tuple[int, int]:
    """Run work(report) in a child and kill -9 it ``delay`` seconds after its first report; returns the last one.

    ``watched``: a file that the child appends to; the kill then waits until it is seen to grow, to hit within a call.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            work(lambda *numbers: os.write(write, struct.pack("<QQ", *numbers)))  # type: ignore[arg-type]
        finally:
            os._exit(1)
    os.close(write)
    reports = os.read(read, 16)
    time.sleep(delay)
    if watched is not None:
        size, end = watched.stat().st_size, time.monotonic() + 0.05
        while watched.stat().st_size == size and time.monotonic() < end:
            pass
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    while more := os.read(read, 1 << 16):
        reports += more
    os.close(read)
    assert os.WIFSIGNALED(status), "the writer failed by itself"
    length, version = struct.unpack("<QQ", reports[-16:])
    return length, version


# ---------------------------------------------------------------------- one file


def rows_of_write(version: int) -> torch.Tensor:
    return torch.randperm(8, generator=torch.Generator().manual_seed(version))[:WRITTEN]


def constant(values: torch.Tensor) -> torch.Tensor:
    """Records of one value each: a torn record shows."""
    return values.to(torch.float32)[:, None].expand(-1, *RECORD)


def open_store(path: Path) -> FileStore:
    make = FileStore.open if path.exists() else FileStore.create
    return make(path, RECORD, torch.float32, level=1, block_size=32, model_id="some/model")


def write_store(path: Path, report: Callable[[int, int], None]) -> None:
    """Append and rewrite for ever, and report length and version after each call that returned."""
    store = open_store(path)
    report(len(store), store.version)
    while True:
        store.append(constant(torch.arange(len(store), len(store) + size_of_append(len(store)))))
        report(len(store), store.version)
        version = store.version + 1
        store.write(rows_of_write(version), constant(torch.full((WRITTEN,), -version)))
        report(len(store), store.version)


def test_kills_lose_no_acknowledged_record(tmp_path):
    """Kills within appends of up to 2.6 MB and within writes in place, one file.

    Every second kill waits until the file is seen to grow, so that many fall within an append.
    """
    rng = random.Random(0)
    cut_appends = cut_writes = 0
    for kill in range(KILLS):
        if kill % 20 == 0:  # a new file
            path, verified, lengths = tmp_path / f"{kill}.ctx", 8, Lengths(8)
            store = open_store(path)
            store.append(constant(torch.arange(8)))
            store.close()
        watched = path if kill % 2 else None
        delay = rng.uniform(0, 0.02)
        length, version = killed(lambda report, path=path: write_store(path, report), delay, watched)
        cut_writes += path.with_name(path.name + ".journal").exists()
        size = path.stat().st_size
        store = open_store(path)
        cut_appends += size > path.stat().st_size
        lengths.check(len(store), length)
        assert version <= store.version <= version + 1
        want = torch.arange(len(store))
        for past in range(1, store.version + 1):
            want[rows_of_write(past)] = -past
        for part in (slice(0, 8), slice(max(8, verified - 8), len(store))):
            assert torch.equal(store.read(part), constant(want[part]))
        verified = len(store)
        store.close()
        if kill % 20 == 19:
            path.unlink()
    print(f"{KILLS} kills, {cut_appends} within an append, {cut_writes} within a write in place")


# ---------------------------------------------------------------------- all files of a history


def mean(children: torch.Tensor, *, lod: int, first: int) -> torch.Tensor:
    return children.double().mean(1) + lod


def history(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(start, stop)
    return ids, (ids % 4096).float()[:, None, None, None, None].expand(-1, 8, 2, 1, 256)


def write_tree(folder: Path, report: Callable[[int, int], None]) -> None:
    """Append for ever, and report the length after each append that returned."""
    tree = MegaContextTree(CONFIG, folder=folder, pool=mean)
    report(len(tree), 0)
    while True:
        tree.append(*history(len(tree), len(tree) + size_of_append(len(tree))))
        report(len(tree), 0)


def test_kills_lose_no_acknowledged_append(tmp_path):
    """Kills within appends of up to 0.7 MB and their gists: every level is there, to the last, and right."""
    rng = random.Random(1)
    cut = 0
    for kill in range(KILLS):
        if kill % 10 == 0:  # a new history
            folder, verified, lengths = tmp_path / str(kill), 0, Lengths(0)
            MegaContextTree(CONFIG, folder=folder).close()
        watched = folder / ("KV0.ctx", "LOD1.ctx")[kill // 2 % 2] if kill % 2 else None
        delay = rng.uniform(0, 0.02)
        length, _ = killed(lambda report, folder=folder: write_tree(folder, report), delay, watched)
        sizes = [path.stat().st_size for path in folder.glob("*.ctx")]
        tree = MegaContextTree(CONFIG, folder=folder)
        cut += sizes != [path.stat().st_size for path in folder.glob("*.ctx")]
        lengths.check(len(tree), length)
        first = verified // CONFIG.span(3) * CONFIG.span(3)
        ids, want = history(first, len(tree))
        assert torch.equal(tree.tokens(first, len(tree)), ids)
        for lod in range(CONFIG.max_lod + 1):
            if lod:
                want = want[: len(want) // 4 * 4].unflatten(0, (-1, 4)).double().mean(1).float() + lod
            assert torch.equal(tree.payload(lod, slice(first // CONFIG.span(lod), None)), want)
        verified = len(tree)
        tree.close()
        if kill % 10 == 9:
            for path in folder.iterdir():
                path.unlink()
    print(f"{KILLS} kills, {cut} within an append")
