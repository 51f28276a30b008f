"""Tile sizes, by architecture, input width and kernel.

A row is (largest head dim, BLOCK_M, BLOCK_N, num_warps, num_stages) and, where it pays, a cap on registers.

"half" is 16-bit input, "wide" float32 (whose dots run as FMAs). Keys ending in "+tma" are used where the tensor memory
accelerator can read the tiles. sm90 was measured on an H100; the other rows are sm80's shapes cut to fit and are
checked to compile within shared memory, without spills that the guard's table does not list.
"""

_HALF_SM80: dict[str, list[tuple[int, ...]]] = {
    "fwd": [(64, 128, 64, 4, 3), (128, 128, 64, 8, 2), (256, 64, 32, 4, 2)],
    "dkdv": [(64, 64, 64, 4, 2), (128, 64, 64, 8, 2), (256, 32, 32, 4, 1)],
    "fused": [(64, 64, 64, 4, 2), (128, 64, 64, 8, 1), (256, 32, 32, 4, 1)],
    "dq": [(64, 64, 64, 4, 2), (128, 64, 64, 8, 2), (256, 32, 32, 4, 1)],
    "dbias": [(64, 64, 64, 4, 1), (128, 64, 64, 8, 1), (256, 32, 32, 4, 1)],
}
_WIDE: dict[str, list[tuple[int, ...]]] = {
    "fwd": [(64, 32, 32, 4, 1), (128, 32, 32, 4, 1), (256, 16, 32, 4, 1)],
    "dkdv": [(64, 32, 32, 4, 1), (128, 16, 32, 4, 1), (256, 16, 16, 4, 1)],
    "fused": [(64, 32, 32, 4, 1), (128, 16, 32, 4, 1), (256, 16, 16, 4, 1)],
    "dq": [(64, 32, 32, 4, 1), (128, 16, 32, 4, 1), (256, 16, 16, 4, 1)],
    "dbias": [(64, 32, 32, 4, 1), (128, 16, 32, 4, 1), (256, 16, 16, 4, 1)],
}
_SMALL: dict[str, list[tuple[int, ...]]] = {kind: [(256, 32, 32, 4, 1)] for kind in _WIDE}

TABLE: dict[str, dict[str, dict[str, list[tuple[int, ...]]]]] = {
    "sm80": {"half": _HALF_SM80, "wide": _WIDE},
    "sm86": {"half": _HALF_SM80, "wide": _WIDE},
    "sm90": {
        "half": {
            "fwd": [(64, 64, 64, 4, 3), (128, 64, 64, 4, 3), (256, 128, 64, 8, 2)],
            "fwd+tma": [(64, 64, 128, 4, 2, 168), (128, 64, 64, 4, 3), (256, 128, 64, 8, 2)],
            "dkdv": [(64, 64, 64, 4, 3), (128, 64, 64, 4, 2), (256, 64, 64, 8, 2)],
            "dkdv+tma": [(64, 128, 64, 4, 2), (128, 64, 64, 4, 2), (256, 64, 64, 8, 2)],
            "fused": [(64, 32, 64, 4, 2), (128, 64, 64, 8, 2), (256, 32, 32, 4, 1)],
            "dq": [(64, 64, 64, 4, 3), (128, 128, 64, 8, 3), (256, 64, 32, 4, 1)],
            "dq+tma": [(64, 64, 64, 4, 3, 128), (128, 128, 64, 8, 3), (256, 128, 32, 8, 2)],
            "dbias": [(64, 64, 64, 4, 1), (128, 64, 64, 8, 1), (256, 32, 32, 4, 1)],
        },
        "wide": _WIDE,
    },
    "sm100": {"half": _HALF_SM80, "wide": _WIDE},
    "gfx942": {"half": _HALF_SM80, "wide": _WIDE},
    "interpreter": {"half": _SMALL, "wide": _SMALL},
}
