"""Stores of fixed-size records, appended and never moved: in memory, or in a memory-mapped file that survives kills."""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows: two writers of one file are not noticed there
    fcntl = None  # type: ignore[assignment]

Index = Tensor | slice

# magic, format version, level, block size, dim, dtype, flags, records, gist version, model
HEADER = struct.Struct("<IHHHHHHQQ32s")
MAGIC = 0x4D434354
FORMAT = 2
COUNT_AT, VERSION_AT = 16, 24
# code 0 is "32-bit ids" in the format; ids stay below 2**31, so int32 reads the same bytes
DTYPES = {torch.int32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float32: 3, torch.int64: 4, torch.float64: 5}
_NAMES = {code: str(dtype).removeprefix("torch.") for dtype, code in DTYPES.items()}
JOURNAL = struct.Struct("<IIQQ")  # magic, crc32 of the rest, records, gist version; then indices, then records


class StoreError(ValueError):
    """A file is not what it is taken for: foreign, truncated, in use, or written for something else."""


@runtime_checkable
class Store(Protocol):
    """Records of one shape and dtype, addressed by their number. Not thread-safe."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    version: int  # how many times `write` changed records

    def append(self, records: Tensor) -> int:
        """Add records [n, *shape]; all or none. Returns the new length: then they are acknowledged."""

    def read(self, index: Index) -> Tensor:
        """A copy [n, *shape] on the CPU of the records at ``index`` (int64 [n] or a slice without step)."""

    def write(self, index: Index, records: Tensor) -> None:
        """Replace records (all or none) and raise ``version`` by one."""

    def truncate(self, length: int) -> None:
        """Forget the records from ``length`` on."""

    def __len__(self) -> int: ...

    def flush(self, durable: bool = False) -> None:
        """Hand everything to the operating system; ``durable``: and wait until it is on the disk."""

    def close(self) -> None: ...


class _Records:
    """What both stores check: records of the right shape and dtype, indices that exist."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape = tuple(int(size) for size in shape)
        if any(size < 1 for size in self.shape):
            raise ValueError(f"shape: expected sizes of at least 1, got {self.shape}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
        self.dtype = dtype
        self.version = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def _checked(self, records: Tensor, n: int | None = None) -> Tensor:
        """records on the CPU, contiguous; TypeError or ValueError where they do not fit this store."""
        if not isinstance(records, Tensor) or records.dtype != self.dtype:
            got = records.dtype if isinstance(records, Tensor) else type(records).__name__
            raise TypeError(f"records: expected a tensor of {self.dtype}, got {got}; convert it with .to(...)")
        if records.ndim != 1 + len(self.shape) or tuple(records.shape[1:]) != self.shape:
            raise ValueError(f"records: expected shape [n, {', '.join(map(str, self.shape))}], got {[*records.shape]}")
        if n is not None and len(records) != n:
            raise ValueError(f"records: expected one for each of {n} indices, got {len(records)}")
        return records.detach().to("cpu").contiguous()

    def _located(self, index: Index) -> slice | np.ndarray:
        """index as a plain slice or an int64 array, within the store."""
        if isinstance(index, slice):
            start = 0 if index.start is None else index.start
            stop = self._length if index.stop is None else index.stop
            if index.step not in (None, 1) or not 0 <= start <= stop <= self._length:
                raise IndexError(f"index: expected a slice of step 1 within 0:{self._length}, got {index}")
            return slice(start, stop)
        if not isinstance(index, Tensor) or index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise TypeError(f"index: expected a slice or a tensor of whole numbers [n], got {index!r}")
        where = index.detach().to("cpu", torch.int64).numpy()
        if where.size and (where.min() < 0 or where.max() >= self._length):
            raise IndexError(
                f"index: expected records 0 to {self._length - 1}, got values from {where.min()} to {where.max()}"
            )
        return where

    def _for_writing(self, index: Index) -> np.ndarray:
        where = self._located(index)
        if isinstance(where, slice):
            return np.arange(where.start, where.stop)
        if not np.diff(np.sort(where)).all():
            raise ValueError("index: expected each record once, got duplicates")
        return where

    def _checked_length(self, length: int) -> int:
        if not 0 <= length <= self._length:
            raise ValueError(f"length: expected 0 to {self._length}, got {length}")
        return length


class MemoryStore(_Records):
    """A store in host memory: a tensor that grows by doubling.

    Args:
        shape: of one record (may be empty).
        dtype: of the records.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._data = torch.empty((0, *self.shape), dtype=dtype)

    @torch.inference_mode(False)  # what grew within it could not be written to outside
    def append(self, records: Tensor) -> int:
        records = self._checked(records)
        length = self._length + len(records)
        if length > len(self._data):
            grown = torch.empty((max(length, 2 * len(self._data)), *self.shape), dtype=self.dtype)
            grown[: self._length] = self._data[: self._length]
            self._data = grown
        self._data[self._length : length] = records
        self._length = length
        return length

    def read(self, index: Index) -> Tensor:
        where = self._located(index)
        if isinstance(where, slice):
            return self._data[where].clone()
        breaks = np.flatnonzero(np.diff(where) != 1) + 1
        if 8 * (len(breaks) + 1) > len(where):
            return self._data.index_select(0, torch.from_numpy(where))
        # the tokens of a few gists: copies of whole runs take a tenth of the time of [where]
        return torch.cat([self._data[run[0] : run[-1] + 1] for run in np.split(where, breaks)])

    def write(self, index: Index, records: Tensor) -> None:
        where = self._for_writing(index)
        self._data[torch.from_numpy(where)] = self._checked(records, len(where))
        self.version += 1

    def truncate(self, length: int) -> None:
        self._length = self._checked_length(length)

    def flush(self, durable: bool = False) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Free the memory."""
        self._data, self._length = self._data[:0].clone(), 0


class FileStore(_Records):
    """A store in one file: a header of 64 bytes, then records of a fixed stride; ``create`` and ``open`` make one.

    Crash safety. An append first writes its records behind the last one, then the number of records in the header:
    eight aligned bytes, one system call, which a kill cannot tear. Only then does it return. So whatever moment a
    ``kill -9`` hits, the header counts exactly the appends that were completed; what lies behind them is dropped at the
    next opening. A write in place first leaves its records, with a checksum, in ``<file>.journal``; opening completes
    it from there, or discards a journal that is itself incomplete. ``durable`` waits for the disk after each of these
    steps, which extends the promise to a loss of power. One process at a time (the file is locked).

    The header's ``dim`` has 16 bits: elements of a record = dim << (flags & 31). The model field holds a hash of model
    id and record shape, and the id's last 24 bytes.
    """

    def __init__(self, path: Path, file: Any, shape: Sequence[int], dtype: torch.dtype, durable: bool) -> None:
        super().__init__(shape, dtype)
        self.path = path
        self.durable = durable
        self._file = file
        self._stride = prod(self.shape) * dtype.itemsize
        self._map: mmap.mmap | None = None
        self._view = np.empty((0, self._stride), np.uint8)  # [mapped records, stride]

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        level: int,
        block_size: int,
        model_id: str,
        durable: bool = False,
    ) -> FileStore:
        """A new, empty file (complete or absent after a kill); FileExistsError where there is one."""
        path = Path(path)
        _Records(shape, dtype)  # checks both
        header = HEADER.pack(MAGIC, FORMAT, *_identity(shape, dtype, level, block_size), 0, 0, _model(model_id, shape))
        if path.exists():
            raise FileExistsError(f"{path} exists; open it, or remove it first")
        fresh = path.with_name(path.name + ".new")
        with open(fresh, "wb") as file:
            file.write(header)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        journal = path.with_name(path.name + ".journal")
        journal.unlink(missing_ok=True)
        os.replace(fresh, path)
        if durable:
            sync_folder(path.parent)
        return cls.open(path, shape, dtype, level=level, block_size=block_size, model_id=model_id, durable=durable)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        level: int,
        block_size: int,
        model_id: str,
        durable: bool = False,
    ) -> FileStore:
        """An existing file; StoreError where it is foreign, truncated, in use, or holds something else."""
        path = Path(path)
        expected = (*_identity(shape, dtype, level, block_size), _model(model_id, shape))
        file = open(path, "r+b", buffering=0)  # noqa: SIM115 (kept open)
        try:
            store = cls(path, file, shape, dtype, durable)
            store._lock()
            store._recover(expected)
        except BaseException:
            file.close()
            raise
        return store

    def append(self, records: Tensor) -> int:
        data = self._checked(records)
        self._require_open()
        if not len(data):
            return self._length
        length = self._length + len(data)
        self._put(HEADER.size + self._length * self._stride, _bytes(data, self._stride))
        self._sync()
        self._put(COUNT_AT, struct.pack("<Q", length))
        self._sync()
        self._length = length
        return length

    def read(self, index: Index) -> Tensor:
        where = self._located(index)
        view = self._mapped()
        n = where.stop - where.start if isinstance(where, slice) else len(where)
        records = torch.empty((n, *self.shape), dtype=self.dtype)
        raw = _bytes(records, self._stride)
        if isinstance(where, slice):
            raw[:] = view[where]
        else:
            np.take(view, where, axis=0, out=raw, mode="clip")  # "raise" would buffer; all indices exist
        return records

    def write(self, index: Index, records: Tensor) -> None:
        where = self._for_writing(index)
        data = _bytes(self._checked(records, len(where)), self._stride)
        self._require_open()
        body = where.astype("<i8").tobytes() + data.tobytes()
        rest = struct.pack("<QQ", len(where), self.version + 1) + body
        with open(self._journal, "wb") as file:
            file.write(struct.pack("<II", MAGIC, zlib.crc32(rest)) + rest)
            if self.durable:
                file.flush()
                os.fsync(file.fileno())
        self._replace(where, data, self.version + 1)

    def truncate(self, length: int) -> None:
        length = self._checked_length(length)
        self._require_open()
        self._put(COUNT_AT, struct.pack("<Q", length))
        self._sync()
        self._length = length
        self._unmap()
        self._file.truncate(HEADER.size + length * self._stride)

    def flush(self, durable: bool = False) -> None:
        """Nothing is buffered in the process; ``durable`` waits for the disk."""
        self._require_open()
        if durable:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Release the file and its lock. What was appended stays."""
        self._unmap()
        if fcntl is not None and not self._file.closed:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_UN)  # a map that is still referenced would keep the lock
        self._file.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"{self.path}: a file has one owner and cannot be copied; save the session to another folder")

    @property
    def _journal(self) -> Path:
        return self.path.with_name(self.path.name + ".journal")

    def _require_open(self) -> None:
        if self._file.closed:
            raise ValueError(f"{self.path}: the store is closed; open it again")

    def _put(self, offset: int, data: Any) -> None:
        """All of data at offset. A system call may take less than it was given."""
        self._file.seek(offset)
        rest = memoryview(data).cast("B")
        while len(rest):
            rest = rest[self._file.write(rest) :]

    def _sync(self) -> None:
        if self.durable:
            os.fsync(self._file.fileno())

    def _mapped(self) -> np.ndarray:
        """All records as bytes [length, stride], mapped anew where the file has grown."""
        self._require_open()
        if len(self._view) < self._length:
            self._unmap()
            size = HEADER.size + self._length * self._stride
            self._map = mmap.mmap(self._file.fileno(), size)
            self._view = np.frombuffer(self._map, np.uint8, offset=HEADER.size).reshape(self._length, self._stride)
        return self._view

    def _unmap(self) -> None:
        self._view, self._map = np.empty((0, self._stride), np.uint8), None  # unmapped with its last reference

    def _replace(self, where: np.ndarray, data: np.ndarray, version: int) -> None:
        """The second half of a write: from the journal into the file. Doing it twice does no harm."""
        self._mapped()[where] = data
        if self.durable and self._map is not None:
            self._map.flush()
        self._put(VERSION_AT, struct.pack("<Q", version))
        self._sync()
        self.version = version
        self._journal.unlink()

    def _lock(self) -> None:
        if fcntl is not None:
            try:
                fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StoreError(f"{self.path}: in use by another store or process; close that one first") from error

    def _recover(self, expected: tuple[Any, ...]) -> None:
        """Check the header against ``expected``, drop what was never acknowledged, complete a write."""
        raw = self._file.read(HEADER.size)
        if len(raw) < HEADER.size:
            raise StoreError(f"{self.path}: expected a header of {HEADER.size} bytes, got {len(raw)}; it is truncated")
        magic, form, *got, count, version, model = HEADER.unpack(raw)
        if magic != MAGIC:
            raise StoreError(f"{self.path}: expected a MegaContext file, got another (magic {magic:#010x})")
        if form != FORMAT:
            raise StoreError(f"{self.path}: expected format {FORMAT}, got {form}; another release wrote it")
        _compare(self.path, (*got, model), expected)
        size, need = os.fstat(self._file.fileno()).st_size, HEADER.size + count * self._stride
        if size < need:
            raise StoreError(
                f"{self.path}: expected {need} bytes ({count} records of {self._stride}), got {size}; it is truncated: "
                f"restore it from a copy, or ingest the history again"
            )
        if size > need:  # of an append that did not return
            self._file.truncate(need)
        self._length, self.version = count, version
        self._complete_write()

    def _complete_write(self) -> None:
        if not self._journal.exists():
            return
        raw = self._journal.read_bytes()
        if len(raw) >= JOURNAL.size:
            magic, crc, n, version = JOURNAL.unpack_from(raw)
            whole = magic == MAGIC and zlib.crc32(raw[8:]) == crc
            if whole and version > self.version:
                where = np.frombuffer(raw, "<i8", n, JOURNAL.size).astype(np.int64)
                data = np.frombuffer(raw, np.uint8, offset=JOURNAL.size + 8 * n)
                if data.size != n * self._stride or (n and not 0 <= where.min() <= where.max() < self._length):
                    raise StoreError(f"{self._journal}: expected a write to {self.path.name}, got one to another file")
                self._replace(where, data.reshape(n, self._stride), version)
                return
        self._journal.unlink()  # of a write that did not return, or that was completed


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _bytes(records: Tensor, stride: int) -> np.ndarray:
    """records [n, *shape] as bytes [n, stride], without a copy."""
    n = len(records)
    return records.reshape(n, stride // records.dtype.itemsize).view(torch.uint8).numpy()


def _identity(shape: Sequence[int], dtype: torch.dtype, level: int, block_size: int) -> tuple[int, ...]:
    """The header's fields level, block size, dim, dtype, flags."""
    dim, shift = prod(shape), 0
    while dim > 65535:
        if dim % 2:
            raise ValueError(f"shape: expected elements of the form m * 2**s with m < 65536, got {prod(shape)}")
        dim, shift = dim // 2, shift + 1
    for name, value in (("level", level), ("block_size", block_size)):
        if not 0 <= value <= 65535:
            raise ValueError(f"{name}: expected 0 to 65535, got {value}")
    return (level, block_size, dim, DTYPES[dtype], shift)


def _model(model_id: str, shape: Sequence[int]) -> bytes:
    """The header's model field: 8 bytes of a hash of id and record shape, 24 of the id."""
    key = f"{model_id}\0{tuple(int(size) for size in shape)}".encode()
    return hashlib.sha256(key).digest()[:8] + model_id.encode()[-24:].ljust(24, b"\0")


def _compare(path: Path, got: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """StoreError with every field of the header that differs."""
    problems = []
    for name, have, want in (("level", got[0], expected[0]), ("block_size", got[1], expected[1])):
        if have != want:
            problems.append(f"{name}: expected {want}, got {have}")
    have, want = got[2] << (got[4] & 31), expected[2] << expected[4]
    if have != want:
        problems.append(f"elements of a record: expected {want}, got {have}")
    if got[3] != expected[3]:
        problems.append(f"dtype: expected {_NAMES[expected[3]]}, got {_NAMES.get(got[3], f'code {got[3]}')}")
    names = [field[8:].rstrip(b"\0").decode(errors="replace") for field in (got[5], expected[5])]
    if names[0] != names[1]:
        problems.append(f"model: expected {names[1]!r}, got {names[0]!r}")
    elif got[5] != expected[5] and have == want:
        problems.append(f"model {names[0]!r}: expected the same name and record shape, got others (their hash differs)")
    if problems:
        raise StoreError(f"{path} was written for something else: {'; '.join(problems)}")
