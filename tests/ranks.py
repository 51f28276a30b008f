"""Running test bodies in several processes on gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


def launch(rank: int, size: int, port: int, bodies: tuple[Callable[[int], None], ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        for body in bodies:
            body(rank)
    finally:
        dist.destroy_process_group()


def on_ranks(*bodies: Callable[[int], None], size: int = RANKS) -> None:
    """Run the functions one after the other in each of several processes; starting them is what takes long."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(launch, (size, port, bodies), nprocs=size)
