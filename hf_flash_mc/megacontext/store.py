"""Stores of fixed-size records, appended and never moved: in memory, or in a memory-mapped file that survives kills."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Index = Tensor | slice


class StoreError(ValueError):
    """A file is not what it is taken for: foreign, truncated, or written for something else."""


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


class MemoryStore:
    """A store in host memory: a tensor that grows by doubling."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self.version = 0

    def append(self, records: Tensor) -> int:
        raise NotImplementedError

    def read(self, index: Index) -> Tensor:
        raise NotImplementedError

    def write(self, index: Index, records: Tensor) -> None:
        raise NotImplementedError

    def truncate(self, length: int) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def flush(self, durable: bool = False) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class FileStore(MemoryStore):
    """A store in one file: a header of 64 bytes, then records of a fixed stride.

    ``durable``: appends and writes return only when the disk has them.
    """

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
        """A new, empty file; FileExistsError where there is one."""
        raise NotImplementedError

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
        """An existing file; StoreError where it is foreign, truncated or holds something else."""
        raise NotImplementedError
