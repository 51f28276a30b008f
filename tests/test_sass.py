"""The reader of machine code finds what a compiler left unset, and nothing else."""

from __future__ import annotations

import pytest

from benchmarks.sass import unset_registers


def listing(*lines: str) -> str:
    """Like nvdisasm's: labels at the margin, an address before each instruction."""
    return "\n".join(x if x.endswith(":") else f"        /*{16 * i:04x}*/  {x} ;" for i, x in enumerate(lines))


# What ptxas 12.8 made of descriptor + 0x40 in a peeled iteration: UR26 and UR27 come from nowhere.
DROPPED_COPY = (
    "UMOV UR6, 0x200",
    "UMOV UR7, 0x80000020",
    "HGMMA.64x32x16.F32.BF16 R56, R24, gdesc[UR4].tnspB, R56",
    "UIADD3 UR26, UP0, UR26, 0x40, URZ",
    "UIADD3.X UR27, UR27, -0x7fffffe0, URZ, UP0, !UPT",
    "HGMMA.64x32x16.F32.BF16 R56, R28, gdesc[UR24].tnspB, R56",
    "EXIT",
)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        pytest.param(DROPPED_COPY, [3, 4], id="dropped-copy"),
        pytest.param(("UMOV UR26, UR6", *DROPPED_COPY[:4], *DROPPED_COPY[5:]), [4, 5], id="copy-of-unset"),
        pytest.param(("UMOV UR5, UR4", "MOV.SPILL R0, UR5", "EXIT"), [], id="moved-and-not-used"),
        pytest.param(("UMOV UR4, 0x1", "UIADD3 UR5, UR4, URZ, URZ", "EXIT"), [], id="set-then-read"),
        pytest.param(("ULDC.64 UR4, c[0x0][0x208]", "LDG.E R0, desc[UR4][R2.64]", "EXIT"), [], id="pair"),
        pytest.param(("ULDC UR4, c[0x0][0x208]", "LDG.E R0, desc[UR4][R2.64]", "EXIT"), [1], id="half-a-pair"),
        pytest.param(("LDCU.128 UR4, c[0x0][0x380]", "LEA R2, P4, R5, UR7, 0x1", "EXIT"), [], id="four"),
        pytest.param(
            ("LDCU.128 UR4, c[0x0][0x380]", "UTCHMMA gdesc[UR4], gdesc[UR8], tmem[UR5], tmem[UR6], idesc[UR7], UPT"),
            [1],
            id="blackwell-descriptor",
        ),
        pytest.param(("UMOV UR6, URZ", "UMOV UR7, URZ", "HGMMA R0, gdesc[UR4], RZ", "EXIT"), [2], id="two-descriptors"),
        pytest.param(
            ("@P0 BRA `(.L_x_0)", "UMOV UR4, 0x1", ".L_x_0:", "UIADD3 UR5, UR4, URZ, URZ", "EXIT"),
            [3],
            id="one-of-two-paths",
        ),
        pytest.param(
            ("UMOV UR4, URZ", ".L_x_1:", "UIADD3 UR4, UR4, 0x1, URZ", "@P0 BRA `(.L_x_1)", "EXIT"), [], id="loop"
        ),
        pytest.param(("BRA `(.L_x_2)", "IADD3 R0, R0, UR9, RZ", ".L_x_2:", "EXIT"), [], id="never-reached"),
    ],
)
def test_finds_reads_before_any_write(code: tuple[str, ...], expected: list[int]) -> None:
    assert unset_registers(listing(*code)) == [code[i] for i in expected]


def test_nothing_in_nothing() -> None:
    assert unset_registers("") == []
