"""What a compiled kernel may do wrong that no interpreter shows: SASS, read for registers written too early.

A product of Hopper's tensor cores (HGMMA, QGMMA) reads its left operand from registers some time after it was asked
for. Until the wait for its group (``WARPGROUP.DEPBAR``) nothing may be written there. Triton and ptxas see to that,
with known faults (``launch.settled`` names them).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(@!?U?P[T\d]+\s+)?([A-Z0-9_.]+)\s*(.*?);")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
PRODUCT = re.compile(r"[HQI]GMMA")
FIRST_REGISTER = re.compile(r"(?:U?P[T\d]+,\s*)*R(\d+)\b")
WRITES_NO_REGISTER = re.compile(
    r"(ST|STG|STS|STSM|RED|LDGSTS|LDGDEPBAR|BRA|BAR|DEPBAR|WARPGROUP|WARPSYNC|SYNCS|EXIT|UTM\w+|MEMBAR|[IFU]\w*SETP|"
    r"HSETP2|CCTL\w*|R2UR|PLOP3|NOP|BSSY|BSYNC|ERRBAR|FENCE|[HQI]GMMA)$"
)


class Instruction(NamedTuple):
    place: str
    always: bool
    """Whether no predicate guards it."""
    name: str
    operands: str


def disassembled(cubin: Path) -> str:
    import triton  # which has the disassembler; some machines have neither

    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    command = [str(disassembler), str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and where among them labels stand."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := LINE.search(line):
            instructions.append(Instruction(found[1], not found[2], found[3], found[4]))
    return instructions, labels


def written(instruction: Instruction) -> set[int]:
    """Registers that it writes to."""
    base, *suffixes = instruction.name.split(".")
    first = FIRST_REGISTER.match(instruction.operands)
    if first is None or WRITES_NO_REGISTER.match(base):
        return set()
    count = 1
    if base in ("HMMA", "IMMA", "QMMA") or "128" in suffixes or (base == "LDSM" and "4" in suffixes):
        count = 4
    elif {"64", "WIDE"} & {*suffixes} or base == "CS2R" or (base == "LDSM" and "2" in suffixes):
        count = 2
    return set(range(int(first[1]), int(first[1]) + count))


def register_products(sass: str) -> int:
    """Products whose left operand lies in registers."""
    return sum(_left(instruction) is not None for instruction in read(sass)[0])


def _left(instruction: Instruction) -> set[int] | None:
    """Registers of a product's left operand; None of everything else."""
    if not PRODUCT.match(instruction.name):
        return None
    left = re.match(r"R(\d+)", instruction.operands.split(",")[1].strip())
    return set(range(int(left[1]), int(left[1]) + 4)) if left else None


def overwritten(sass: str) -> list[str]:
    """A line for each product whose left operand is written to on some way from it to the wait for it."""
    instructions, labels = read(sass)
    faults = []
    for at, product in enumerate(instructions):
        if (registers := _left(product)) is not None:
            guilty = _first_writer(instructions, labels, at, registers)
            if guilty is not None:
                faults.append(
                    f"{product.place} {product.name} {product.operands}: "
                    f"{guilty.place} {guilty.name} {guilty.operands}"
                )
    return faults


def _first_writer(
    instructions: list[Instruction], labels: dict[str, int], product: int, registers: set[int]
) -> Instruction | None:
    """Follows every way from ``product``; a group of products ends with the one that has ``gsb0``."""
    ways, seen = [(product + 1, int("gsb0" in instructions[product].operands))], set()
    while ways:
        at, groups = ways.pop()
        while at < len(instructions) and (at, groups) not in seen:
            seen.add((at, groups))
            one = instructions[at]
            if one.name.startswith("WARPGROUP.DEPBAR") and groups > int(one.operands.split(",")[1], 16):
                break
            if PRODUCT.match(one.name):
                groups += "gsb0" in one.operands
            if written(one) & registers:
                return one
            if one.name == "EXIT" and one.always:
                break
            at += 1
            if one.name.startswith("BRA") and (target := re.search(r"\.L_x_\d+", one.operands)):
                if one.always:
                    at = labels[target[0]]
                else:
                    ways.append((labels[target[0]], groups))
    return None
