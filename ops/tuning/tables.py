"""Tile sizes, by architecture, input width and kernel.

A row is (largest head dim, BLOCK_M, BLOCK_N, num_warps, num_stages) and, where it pays, a cap on registers.

"half" is 16-bit input, "wide" float32 (whose dots run as FMAs). Keys ending in "+tma" are used where the tensor memory
accelerator can read the tiles. sm90 was measured on an H100; the other rows are sm80's shapes cut to fit and are
checked to compile within shared memory, without spills that the guard's table does not list. None of the rows above
head dim 256 was measured.
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
_SMALL: dict[str, list[tuple[int, ...]]] = {kind: [(512, 32, 32, 4, 1)] for kind in _WIDE}

# Shapes with kernels of their own (ops/portable/shapes.py): "/n" holds up to n keys ("few_keys") or n rows of a KV head
# ("few_queries"), at least half as many beyond 16. BLOCK_M of few_keys is the most rows a tile has; with fewer rows the
# warps shrink alike, and a cap on registers is for one tile of rows. BLOCK_M of few_queries may be more than the rows.
_FEW_HALF: dict[str, list[tuple[int, ...]]] = {
    "few_keys_fwd/16": [(128, 128, 16, 4, 1), (256, 64, 16, 4, 1)],
    "few_keys_fwd/32": [(128, 128, 32, 4, 1), (256, 64, 32, 4, 1)],
    "few_keys_fwd/64": [(64, 64, 64, 4, 1), (128, 64, 64, 4, 1)],
    "few_keys_fwd/128": [(64, 128, 128, 8, 1), (128, 64, 128, 8, 1)],
    "few_keys_bwd/16": [(64, 64, 16, 4, 1), (128, 64, 16, 8, 1), (256, 32, 16, 8, 1)],
    "few_keys_bwd/32": [(64, 64, 32, 8, 1), (128, 64, 32, 8, 1)],
    "few_keys_bwd/64": [(64, 64, 64, 4, 1, 168), (128, 32, 64, 8, 1)],
    "few_keys_bwd/128": [(64, 32, 128, 8, 1)],
    "few_queries_fwd/16": [(64, 16, 64, 4, 3), (128, 16, 64, 4, 3), (256, 16, 32, 4, 2)],
    "few_queries_fwd/32": [(64, 32, 64, 4, 3), (128, 32, 64, 4, 2), (256, 32, 32, 4, 2)],
    "few_queries_fwd/64": [(64, 64, 64, 4, 3), (128, 64, 64, 4, 2), (256, 64, 32, 8, 2)],
    "few_queries_bwd/16": [(64, 16, 32, 2, 3), (128, 16, 64, 4, 2), (256, 16, 32, 4, 1)],
    "few_queries_bwd/32": [(64, 32, 64, 4, 2), (128, 32, 64, 8, 2)],
    "few_queries_bwd/64": [(64, 64, 64, 4, 2), (128, 64, 32, 8, 2)],
    # over a paged cache; more rows than 64 take more tiles
    "paged_fwd/16": [(64, 16, 64, 4, 3), (128, 16, 64, 4, 3), (256, 16, 32, 4, 2)],
    "paged_fwd/32": [(64, 32, 64, 4, 3), (128, 32, 64, 4, 2), (256, 32, 32, 4, 2)],
    "paged_fwd/64": [(64, 64, 64, 4, 3), (128, 64, 64, 4, 2), (256, 64, 32, 8, 2)],
}
_FEW_SM80: dict[str, list[tuple[int, ...]]] = {  # whose matrix unit takes operands from registers
    "few_queries_bwd/16": [(64, 16, 32, 2, 3), (128, 16, 32, 4, 2), (256, 16, 32, 4, 1)],
    "few_queries_bwd/64": [(64, 64, 32, 4, 2), (128, 64, 32, 8, 2)],
}
_FEW_WIDE: dict[str, list[tuple[int, ...]]] = {
    "few_keys_fwd/16": [(128, 32, 16, 4, 1)],
    "few_keys_fwd/32": [(128, 32, 32, 4, 1)],
    "few_keys_bwd/16": [(128, 16, 16, 4, 1)],
    "few_keys_bwd/32": [(64, 16, 32, 8, 1)],
    "few_queries_fwd/16": [(128, 16, 32, 4, 1)],
    "few_queries_fwd/32": [(128, 32, 32, 4, 1)],
    "few_queries_bwd/16": [(128, 16, 32, 4, 1)],
    "paged_fwd/16": [(128, 16, 32, 4, 1), (256, 16, 16, 4, 1)],
}
# short lengths reach every family, and several splits
_FEW_SMALL: dict[str, list[tuple[int, ...]]] = {
    "few_keys_fwd/16": [(512, 16, 16, 4, 1)],
    "few_keys_fwd/32": [(512, 64, 32, 4, 1)],
    "few_keys_bwd/16": [(512, 16, 16, 4, 1)],
    "few_keys_bwd/32": [(512, 16, 32, 4, 1)],
    "few_queries_fwd/16": [(512, 16, 16, 4, 1)],
    "few_queries_fwd/32": [(512, 64, 32, 4, 1)],
    "few_queries_fwd/64": [(512, 64, 16, 4, 1)],
    "few_queries_bwd/16": [(512, 16, 16, 4, 1)],
    "few_queries_bwd/32": [(512, 32, 16, 4, 1)],
    "few_queries_bwd/64": [(512, 64, 16, 4, 1)],
    "paged_fwd/16": [(512, 16, 16, 4, 1)],
    "paged_fwd/64": [(512, 64, 16, 4, 1)],
}

# Head dims above 256: accumulators of 32 rows take half the registers of 8 warps; what is left decides the rest.
_BIG_HALF: dict[str, tuple[int, ...]] = {
    "fwd": (512, 32, 64, 8, 2),
    "dkdv": (512, 32, 32, 8, 1),
    "fused": (512, 16, 16, 8, 1),
    "dq": (512, 32, 32, 8, 2),
    "dbias": (512, 16, 32, 8, 1),
    "few_queries_fwd/16": (512, 16, 32, 8, 2),
    "few_queries_fwd/32": (512, 32, 32, 8, 2),
    "paged_fwd/16": (512, 16, 32, 8, 2),
    "paged_fwd/32": (512, 32, 32, 8, 2),
}
_BIG_WIDE: dict[str, tuple[int, ...]] = dict.fromkeys(
    ("fwd", "dkdv", "fused", "dq", "dbias", "paged_fwd/16"), (512, 16, 16, 8, 1)
)
_BIG: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {
    "sm80": {
        "half": _BIG_HALF | {"fwd": (512, 32, 32, 8, 2), "dkdv": (512, 16, 32, 8, 1), "dq": (512, 32, 32, 8, 1)},
        "wide": _BIG_WIDE,
    },
    "sm86": {  # 99 KiB of shared memory a program
        "half": _BIG_HALF | dict.fromkeys(("dkdv", "dq"), (512, 16, 16, 8, 1)) | {"fwd": (512, 32, 32, 8, 2)},
        "wide": {kind: (384, *tile) for kind, (_, *tile) in _BIG_WIDE.items()},
    },
    "sm90": {"half": _BIG_HALF, "wide": _BIG_WIDE},
    "sm100": {"half": _BIG_HALF, "wide": _BIG_WIDE},
    "gfx942": {  # whose registers are most for 4 warps, and whose shared memory is 64 KiB
        "half": {
            "fwd": (512, 64, 16, 8, 1),
            "dkdv": (512, 16, 32, 4, 1),
            "fused": (512, 16, 16, 4, 1),
            "dq": (512, 32, 16, 4, 1),
            "dbias": (512, 16, 32, 4, 1),
            "few_queries_fwd/16": (512, 16, 16, 4, 1),
            "paged_fwd/16": (512, 16, 16, 4, 1),
        },
        "wide": dict.fromkeys(_BIG_WIDE, (512, 16, 16, 4, 1)),
    },
    "interpreter": {},
}


def _extended(arch: str, width: str, rows: dict[str, list[tuple[int, ...]]]) -> dict[str, list[tuple[int, ...]]]:
    """``rows`` with those of head dims above 256 behind them."""
    more = _BIG[arch].get(width, {})
    return {kind: [*found, more[kind]] if kind in more else found for kind, found in rows.items()}


_UP_TO_256: dict[str, dict[str, dict[str, list[tuple[int, ...]]]]] = {
    "sm80": {"half": _HALF_SM80 | _FEW_HALF | _FEW_SM80, "wide": _WIDE | _FEW_WIDE},
    "sm86": {"half": _HALF_SM80 | _FEW_HALF | _FEW_SM80, "wide": _WIDE | _FEW_WIDE},
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
            **_FEW_HALF,
        },
        "wide": _WIDE | _FEW_WIDE,
    },
    "sm100": {"half": _HALF_SM80 | _FEW_HALF, "wide": _WIDE | _FEW_WIDE},
    "gfx942": {"half": _HALF_SM80 | _FEW_HALF | _FEW_SM80, "wide": _WIDE | _FEW_WIDE},
    "interpreter": {"half": _SMALL | _FEW_SMALL, "wide": _SMALL | _FEW_SMALL},
}
TABLE = {
    arch: {width: _extended(arch, width, rows) for width, rows in widths.items()} for arch, widths in _UP_TO_256.items()
}
