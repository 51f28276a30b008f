"""Programs that take their work items from a counter: how many run at once, and idle counters for them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_counters: dict[torch.device, tuple[list[Tensor], Iterator[int]]] = {}
_COUNTERS = 1024


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the device; on a CPU, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def programs(total: int, device: torch.device, each: int = 1) -> int:
    """How many programs take ``total`` items, ``each`` on every multiprocessor; in the emulator three, in turns."""
    return min(total, multiprocessors(device) * each if device.type == "cuda" else 3)


def idle_counters(q: Tensor) -> Tensor:
    """Two int32 zeros that no running kernel uses; kernels leave them zero.

    In turn from a pool, since kernels of several streams may run at once; a graph that is being captured gets its own,
    because it may run beside anything.
    """
    if q.is_cuda and torch._C._cuda_isCurrentStreamCapturing():
        return torch.zeros(2, dtype=torch.int32, device=q.device)
    found = _counters.get(q.device)
    if found is None:
        # by a thread of its own: this one's memory may belong to a CUDA graph that is warming up, which wants it back
        with ThreadPoolExecutor(1) as thread:
            pool = thread.submit(_counter_pool, q.device).result()
        found = _counters[q.device] = list(pool.unbind()), itertools.cycle(range(_COUNTERS))
    return found[0][next(found[1])]


def _counter_pool(device: torch.device) -> Tensor:
    pool = torch.zeros(_COUNTERS, 4, dtype=torch.int32, device=device)  # 16 bytes apart, for aligned pointers
    if pool.is_cuda:
        torch.cuda.synchronize(device)  # other streams may be the first to use them
    return pool
