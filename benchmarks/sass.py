"""What a kernel's machine code (SASS, as nvdisasm prints it) says about the compiler's work.

``unset_registers`` finds uniform registers that some path reads before anything wrote them. ptxas 12.8, which triton
3.6 brings, makes such code: where a loop's first iteration is peeled and two matrix operands share an address in shared
memory, it drops the copy of one operand's descriptor, and the matrix unit reads from wherever the register points.
"""

from __future__ import annotations

import re

_GUARD = re.compile(r"^@!?U?P\w+\s+")
_UNIFORM = re.compile(r"UR(\d+)")
_WIDE = {"UIADD3.64": 2, "ULDC.64": 2, "LDCU.64": 2, "LDCU.128": 4, "UIMAD.WIDE": 2, "CS2UR": 2}  # registers written
_WRITES_UNIFORM = ("R2UR", "S2UR", "CS2UR", "REDUX", "CREDUX", "VOTEU", "LDCU")
_WRITES_NOTHING = ("UTMA", "UBLK", "UCGABAR", "USETMAXREG", "UTCHMMA", "UTCQMMA")


def unset_registers(listing: str) -> list[str]:
    """The instructions of ``nvdisasm -c`` output that may read a uniform register which no instruction has set."""
    code, labels = _instructions(listing)
    if not code:
        return []
    known: list[frozenset[int] | None] = [None] * len(code)  # what is set before each instruction, on every path
    known[0] = frozenset()
    effects = [_effects(text) for text in code]
    work = [0]
    while work:
        i = work.pop()
        written, read = effects[i]
        set_here = known[i] or frozenset()
        after = set_here - written if _copies(code[i]) and read - set_here else set_here | written
        for j in _successors(i, code, labels):
            before = known[j]
            joined = after if before is None else before & after
            if joined != before:
                known[j] = joined
                work.append(j)
    return [
        text
        for text, k, (_, read) in zip(code, known, effects, strict=True)
        if k is not None and read - k and not _copies(text)
    ]


def _copies(text: str) -> bool:
    """Whether an instruction only moves a register or saves it: what nothing has set may be moved, not used."""
    return _GUARD.sub("", text).startswith(("UMOV", "MOV.SPILL"))


def _instructions(listing: str) -> tuple[list[str], dict[str, int]]:
    """The instructions in order, and where each label points."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label.group(1)] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            code.append(found.group(1).strip())
    return code, labels


def _effects(text: str) -> tuple[frozenset[int], frozenset[int]]:
    """Uniform registers written (a guarded write counts) and read by an instruction; URZ is neither."""
    body = _GUARD.sub("", text)
    name, _, rest = body.partition(" ")
    operands = [operand.strip() for operand in rest.split(",")]
    result = 1 if re.fullmatch(r"U?P[T\d]", operands[0]) else 0  # R2UR P0, UR10, R0 says what is equal among lanes
    writes = name.startswith(_WRITES_UNIFORM) or (name.startswith("U") and not name.startswith(_WRITES_NOTHING))
    written: set[int] = set()
    read: set[int] = set()
    for i, operand in enumerate(operands):
        for number in map(int, _UNIFORM.findall(operand)):
            if i == result and writes:
                wide = next((count for prefix, count in _WIDE.items() if name.startswith(prefix)), 1)
                written.update(range(number, number + wide))
            elif operand.startswith("gdesc[") and "GMMA" in name:  # two descriptors, or the upper one: A in registers
                both = operands[1].startswith("gdesc[")
                read.update(range(number if both else number + 2, number + 4))
            else:
                pair = operand.startswith(("desc[", "gdesc[")) or name == "UIADD3.64"
                read.update(range(number, number + (2 if pair else 1)))
    return frozenset(written), frozenset(read)


def _successors(i: int, code: list[str], labels: dict[str, int]) -> list[int]:
    body = _GUARD.sub("", code[i])
    guarded = body != code[i]
    name = body.split(" ", 1)[0]
    following = [i + 1] if i + 1 < len(code) else []
    if name.startswith(("EXIT", "RET")):
        return following if guarded else []
    if name.startswith(("BRA", "CALL", "BSYNC")) and (target := re.search(r"`\((\.L\w+)\)", body)):
        goal = [labels[target.group(1)]] if target.group(1) in labels else []
        stays = guarded or name.startswith("CALL") or re.search(r"^BRA\S*\s+!?U?P\d", body)
        return goal + (following if stays else [])
    return following
