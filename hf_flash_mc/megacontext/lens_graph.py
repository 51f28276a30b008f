"""GraphedLens: a lens's whole call as one CUDA graph, since launching its kernels takes longer than running them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lensnet import Lens, LensInput, OracleLens, RandomLens

_WARM_UP = 3


class GraphedLens:
    """``score`` of a lens from a CUDA graph over a fixed number of entries, the rest being padding.

    In eager mode the host needs 3 ms for the launches of a dual lens whose kernels run 0.3 ms. The graph is captured at
    the first call, and again where other inputs are given or they have other types. It reads the lens's weights where
    they lie: weights that are changed in place (an optimizer's step, ``load_state_dict``) count at the next call; after
    the lens is moved or cast make a new GraphedLens.

    Args:
        lens: on a GPU; not a lens that draws random numbers or calls back into Python.
        capacity: most entries, such as ``config.w_max``.
        compiled: run the lens through torch.compile (fewer kernels; the first call takes seconds).
    """

    def __init__(self, lens: Lens, capacity: int, *, compiled: bool = False):
        if isinstance(lens, RandomLens | OracleLens):
            raise ValueError(f"lens: expected one that a CUDA graph can hold, got {type(lens).__name__}; use it itself")
        self.lens, self.capacity = lens, capacity
        self._function: Any = torch.compile(lens.score, dynamic=False) if compiled else lens.score
        self._key: Any = None
        self._static: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}  # of these, as long as the entries are
        self._filled = (-1, -1)  # count and cursor, where they are known here
        self._graph: Any = None
        self._scores: Any = None

    @torch.no_grad()
    def score(self, context: LensInput) -> Tensor:
        """As ``Lens.score``; a new tensor ``[N]``.

        Raises:
            ValueError: tensors that are not on a GPU, more entries than the capacity, or a generator.
        """
        n, device = len(context.lod), context.lod.device
        if device.type != "cuda" or n > self.capacity or context.generator is not None or context.count is not None:
            raise ValueError(
                f"context: expected at most {self.capacity} entries on a GPU, without generator and count, got {n} on "
                f"{device}; use the lens itself"
            )
        names = ("entries", "start", "lod", "attention_mass", "tail")  # the longest copy first: it runs meanwhile
        given: dict[str, Tensor] = {name: x for name in names if (x := getattr(context, name)) is not None}
        key = (device, *((name, x.dtype, x.shape[name != "tail" :]) for name, x in given.items()))
        if key != self._key:
            self._allocate(key, given, device)
        self._fill(given, n, context.cursor)
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._scores[:n].clone()

    def _fill(self, given: dict[str, Tensor], n: int, cursor: int | Tensor) -> None:
        """Bring the inputs to where the graph reads them; the GPU waits for every call, so with few of them."""
        if n != self._filled[0]:
            self._static["count"].fill_(n)
            self._views = {name: x if name == "tail" else x[:n] for name, x in self._static.items() if x.dim()}
        for name, x in given.items():
            self._views[name].copy_(x, non_blocking=True)
        if isinstance(cursor, Tensor):
            self._static["cursor"].copy_(cursor, non_blocking=True)
        elif cursor != self._filled[1]:
            self._static["cursor"].fill_(cursor)
        self._filled = n, -1 if isinstance(cursor, Tensor) else cursor

    def _allocate(self, key: Any, given: dict[str, Tensor], device: torch.device) -> None:
        self._key, self._graph, self._filled = key, None, (-1, -1)
        self._static = {
            name: x.new_zeros(len(x) if name == "tail" else self.capacity, *x.shape[1:]) for name, x in given.items()
        }
        self._static["cursor"] = torch.zeros((), dtype=torch.int64, device=device)
        self._static["count"] = torch.zeros((), dtype=torch.int32, device=device)

    def _capture(self) -> None:
        context = LensInput(**self._static)  # type: ignore[arg-type]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._function(context)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._scores = self._function(context)
