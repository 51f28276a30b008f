"""Stores: what was appended is read back, files survive kills at any moment, and bad files are named."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hf_flash_mc.megacontext import FileStore, MemoryStore, Store, StoreError

FIELDS = {"level": 1, "block_size": 32, "model_id": "HuggingFaceTB/SmolLM2-135M-Instruct"}
SHAPE = (3, 2, 5)


def made(path: Path, shape=SHAPE, dtype=torch.float32, **changes) -> FileStore:
    return FileStore.create(path, shape, dtype, **{**FIELDS, **changes})


def opened(path: Path, shape=SHAPE, dtype=torch.float32, **changes) -> FileStore:
    return FileStore.open(path, shape, dtype, **{**FIELDS, **changes})


def numbered(first: int, n: int, shape=SHAPE, dtype=torch.float32) -> torch.Tensor:
    """Records first .. first + n: every element of a record differs from those of its neighbours."""
    size = torch.Size(shape).numel()
    return (torch.arange(first * size, (first + n) * size) % 251).reshape(n, *shape).to(dtype)


@pytest.fixture(params=["memory", "file"])
def new_store(request, tmp_path) -> Iterator[Callable[..., Store]]:
    made_stores: list[Store] = []

    def make(shape=SHAPE, dtype=torch.float32) -> Store:
        if request.param == "memory":
            made_stores.append(MemoryStore(shape, dtype))
        else:
            made_stores.append(made(tmp_path / f"{len(made_stores)}.ctx", shape, dtype))
        return made_stores[-1]

    yield make
    for store in made_stores:
        store.close()


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("shape", [(), (7,), SHAPE], ids=str)
def test_reads_what_was_appended(new_store, shape, dtype):
    store = new_store(shape, dtype)
    assert isinstance(store, Store)
    want = numbered(0, 111, shape, dtype)
    assert [store.append(want[:1]), store.append(want[1:64]), store.append(want[64:64])] == [1, 64, 64]
    torch.testing.assert_close(store.read(slice(0, 64)), want[:64], rtol=0, atol=0)
    assert store.append(want[64:]) == len(store) == 111
    index = torch.tensor([110, 0, 63, 64, 63])
    runs = torch.tensor([*range(40, 70), *range(69, 49, -1), *range(20), 5, *range(111)])
    for got, expected in (
        (store.read(slice(None)), want),
        (store.read(index), want[index]),
        (store.read(runs), want[runs]),
        (store.read(runs[:30]), want[40:70]),
        (store.read(index[:0]), want[:0]),
        (store.read(slice(5, 5)), want[:0]),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_read_is_a_copy(new_store):
    store = new_store()
    store.append(numbered(0, 3))
    for index in (slice(0, 3), torch.arange(3)):
        store.read(index).zero_()
    torch.testing.assert_close(store.read(slice(None)), numbered(0, 3))


def test_strided_records(new_store):
    store = new_store()
    turned = numbered(0, 4).permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    store.append(turned)
    torch.testing.assert_close(store.read(slice(None)), numbered(0, 4))


def test_write_replaces_and_counts(new_store):
    store = new_store()
    store.append(numbered(0, 9))
    store.write(torch.tensor([7, 2]), numbered(100, 2))
    store.write(slice(3, 4), numbered(50, 1))
    want = numbered(0, 9)
    want[torch.tensor([7, 2])], want[3] = numbered(100, 2), numbered(50, 1)[0]
    torch.testing.assert_close(store.read(slice(None)), want)
    assert store.version == 2


def test_truncate_then_append(new_store):
    store = new_store()
    store.append(numbered(0, 9))
    store.read(slice(None))
    store.truncate(4)
    assert len(store) == 4
    assert store.append(numbered(20, 7)) == 11
    torch.testing.assert_close(store.read(slice(None)), torch.cat([numbered(0, 4), numbered(20, 7)]))
    with pytest.raises(ValueError, match="length: expected 0 to 11, got 12"):
        store.truncate(12)


def test_bad_records_and_indices_change_nothing(new_store):
    store = new_store()
    store.append(numbered(0, 3))
    with pytest.raises(TypeError, match=r"records: expected a tensor of torch.float32, got torch.float64"):
        store.append(numbered(0, 1, dtype=torch.float64))
    with pytest.raises(TypeError, match="got list"):
        store.append([1.0])
    with pytest.raises(ValueError, match=r"records: expected shape \[n, 3, 2, 5\], got \[3, 2, 5\]"):
        store.append(numbered(0, 1)[0])
    with pytest.raises(ValueError, match="records: expected one for each of 2 indices, got 1"):
        store.write(torch.tensor([0, 1]), numbered(0, 1))
    with pytest.raises(ValueError, match="expected each record once"):
        store.write(torch.tensor([1, 1]), numbered(0, 2))
    for index in (torch.tensor([3]), torch.tensor([-1]), slice(0, 4), slice(2, 1), slice(-1, 2), slice(0, 2, 2)):
        with pytest.raises(IndexError, match="index: expected"):
            store.read(index)
    for index in (torch.tensor([0.0]), torch.tensor([True]), torch.tensor(1), 1):
        with pytest.raises(TypeError, match="index: expected a slice or a tensor of whole numbers"):
            store.read(index)
    torch.testing.assert_close(store.read(slice(None)), numbered(0, 3))
    assert store.version == 0


def test_shapes_and_dtypes_that_no_store_holds(tmp_path):
    for make in (MemoryStore, lambda shape, dtype: made(tmp_path / "x.ctx", shape, dtype)):
        with pytest.raises(ValueError, match=r"shape: expected sizes of at least 1, got \(3, 0\)"):
            make((3, 0), torch.float32)
        with pytest.raises(ValueError, match=r"dtype: expected one of .*, got torch.complex64"):
            make((3,), torch.complex64)
    with pytest.raises(ValueError, match="shape: expected elements of the form"):
        made(tmp_path / "x.ctx", (65537,))
    with pytest.raises(ValueError, match="level: expected 0 to 65535, got -1"):
        made(tmp_path / "x.ctx", level=-1)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- files


def test_header_is_the_documented_64_bytes(tmp_path):
    path = tmp_path / "LOD2.ctx"
    store = made(path, (32, 2, 8, 128), torch.bfloat16, level=2)  # 65536 elements: more than dim's 16 bits
    store.append(torch.zeros(5, 32, 2, 8, 128, dtype=torch.bfloat16))
    store.write(slice(0, 1), torch.zeros(1, 32, 2, 8, 128, dtype=torch.bfloat16))
    store.close()
    raw = path.read_bytes()
    assert len(raw) == 64 + 5 * 65536 * 2
    magic, version, level, block, dim, dtype, flags, entries, gist_version, model = struct.unpack(
        "<IHHHHHHQQ32s", raw[:64]
    )
    assert (magic, version, level, block, dtype, entries, gist_version) == (0x4D434354, 2, 2, 32, 2, 5, 1)
    assert dim << (flags & 31) == 65536
    assert model[8:] == b"ceTB/SmolLM2-135M-Instruct"[-24:]


def test_reopening_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "a.ctx"
    store = made(path, durable=True)
    store.append(numbered(0, 10))
    store.write(slice(4, 6), numbered(70, 2))
    store.flush(durable=True)
    store.close()
    store = opened(path)
    assert (len(store), store.version) == (10, 1)
    store.append(numbered(10, 3))
    want = numbered(0, 13)
    want[4:6] = numbered(70, 2)
    torch.testing.assert_close(store.read(slice(None)), want)
    store.close()
    store.close()
    for use in (lambda: store.read(slice(0, 1)), lambda: store.append(numbered(0, 1)), store.flush):
        with pytest.raises(ValueError, match="the store is closed; open it again"):
            use()


def change(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(b""), "expected a header of 64 bytes, got 0; it is truncated"),
        (lambda p: p.write_bytes(p.read_bytes()[:63]), "expected a header of 64 bytes, got 63"),
        (lambda p: p.write_bytes(b"GGUF" + bytes(200)), "expected a MegaContext file, got another .magic 0x46554747"),
        (lambda p: change(p, 4, b"\1\0"), "expected format 2, got 1; another release wrote it"),
        (
            lambda p: p.write_bytes(p.read_bytes()[:-1]),
            r"expected 1264 bytes \(10 records of 120\), got 1263; it is truncated",
        ),
        (lambda p: p.write_bytes(p.read_bytes()[:64]), "got 64; it is truncated: restore it"),
        (lambda p: change(p, 16, b"\xff" * 8), "it is truncated"),
        (lambda p: change(p, 12, b"\x09\0"), "dtype: expected float32, got code 9"),
    ],
    ids=["empty", "half header", "foreign", "format", "one byte short", "no records", "count", "dtype code"],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    path = tmp_path / "a.ctx"
    store = made(path)
    store.append(numbered(0, 10))
    store.close()
    damage(path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=message) as caught:
        opened(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"level": 2}, "level: expected 2, got 1"),
        ({"block_size": 16}, "block_size: expected 16, got 32"),
        ({"model_id": "other"}, "model: expected 'other', got 'TB/SmolLM2-135M-Instruct'"),
        ({"model_id": "X/HuggingFaceTB/SmolLM2-135M-Instruct"}, "expected the same name and record shape, got others"),
        ({"shape": (2, 3, 5)}, "expected the same name and record shape, got others"),
        ({"shape": (3, 2, 6)}, "elements of a record: expected 36, got 30"),
        ({"dtype": torch.bfloat16}, "dtype: expected bfloat16, got float32"),
        ({"level": 0, "block_size": 8, "dtype": torch.int32}, "level: .*; block_size: .*; dtype: "),
    ],
    ids=str,
)
def test_files_of_something_else_are_named(tmp_path, wanted, message):
    path = tmp_path / "a.ctx"
    made(path).close()
    with pytest.raises(StoreError, match=message):
        opened(path, **wanted)


def test_missing_existing_and_shared_files(tmp_path):
    path = tmp_path / "a.ctx"
    with pytest.raises(FileNotFoundError):
        opened(path)
    store = made(path)
    with pytest.raises(FileExistsError, match="open it, or remove it first"):
        made(path)
    with pytest.raises(StoreError, match="in use by another store or process"):
        opened(path)
    store.close()
    opened(path).close()


# ---------------------------------------------------------------------- crashes


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_in_each_system_call_of_an_append(tmp_path, monkeypatch):
    """Each call writes only a part, and everything after it is lost: the file is as before, or as after the append."""
    whole = FileStore._put
    for part in (0.0, 0.3, 1.0):
        for crash_at in range(4):
            path = tmp_path / f"{part}-{crash_at}.ctx"
            store = made(path)
            store.append(numbered(0, 5))
            calls = 0

            def put(self, offset, data, part=part, crash_at=crash_at):
                nonlocal calls
                calls += 1
                if calls <= crash_at:
                    return whole(self, offset, data)
                data = bytes(memoryview(data).cast("B"))
                if len(data) > 8 or part == 1.0:  # the kernel takes eight aligned bytes whole or not at all
                    whole(self, offset, data[: int(part * len(data))])
                raise Crash

            monkeypatch.setattr(FileStore, "_put", put)
            acknowledged = 5
            try:
                for n in (2, 9):
                    acknowledged = store.append(numbered(acknowledged, n))
            except Crash:
                pass
            assert calls == crash_at + 1
            monkeypatch.undo()
            store.close()
            store = opened(path)
            assert len(store) in {5: (5, 7), 7: (7, 16), 16: (16,)}[acknowledged]
            torch.testing.assert_close(store.read(slice(None)), numbered(0, len(store)))
            store.append(numbered(len(store), 3))
            torch.testing.assert_close(store.read(slice(None)), numbered(0, len(store)))
            store.close()


def test_a_crash_in_a_write_in_place(tmp_path, monkeypatch):
    """The journal cut anywhere: old records. The journal whole, the file half written: new records."""
    path, journal = tmp_path / "a.ctx", tmp_path / "a.ctx.journal"
    store = made(path)
    store.append(numbered(0, 20))
    where = torch.tensor([3, 17, 4])

    def crash(*_):
        raise Crash

    monkeypatch.setattr(FileStore, "_replace", crash)
    with pytest.raises(Crash):
        store.write(where, numbered(60, 3))
    monkeypatch.undo()
    store.close()
    old, new = numbered(0, 20), numbered(0, 20)
    new[where] = numbered(60, 3)
    whole = journal.read_bytes()
    for cut in (0, 1, 23, 24, 60, len(whole) - 1):
        journal.write_bytes(whole[:cut])
        store = opened(path)
        assert store.version == 0
        assert not journal.exists()
        torch.testing.assert_close(store.read(slice(None)), old)
        store.close()
    change(path, 64 + 17 * 120, b"\x7f" * 60)  # half of a record
    journal.write_bytes(whole)
    for _ in range(2):
        store = opened(path)
        assert store.version == 1
        assert not journal.exists()
        torch.testing.assert_close(store.read(slice(None)), new)
        store.close()
    journal.write_bytes(whole)  # one that was completed is not done again
    change(path, 64, numbered(90, 1).numpy().tobytes())
    store = opened(path)
    torch.testing.assert_close(store.read(slice(0, 1)), numbered(90, 1))
    store.close()


def test_a_journal_of_another_file_is_named(tmp_path, monkeypatch):
    long, short = made(tmp_path / "long.ctx"), made(tmp_path / "short.ctx")
    long.append(numbered(0, 20))
    short.append(numbered(0, 2))
    monkeypatch.setattr(FileStore, "_replace", lambda *_: None)
    long.write(slice(10, 12), numbered(0, 2))
    short.close()
    os.replace(tmp_path / "long.ctx.journal", tmp_path / "short.ctx.journal")
    with pytest.raises(StoreError, match=r"short.ctx.journal: expected a write to short.ctx, got one to another file"):
        opened(tmp_path / "short.ctx")
