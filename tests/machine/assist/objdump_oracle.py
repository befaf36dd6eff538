"""What binutils' objdump says of instructions: length, text, memory operand and registers, for many in one run.

Each instruction gets a slot of 32 bytes, the rest NOPs: whatever objdump makes of the first bytes, it is in step again
where the next slot begins. Prefixes that it prints as if they were instructions belong to the one that follows.
"""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

SLOT = 32
OPTIONS = {64: "-mi386:x86-64 -Mintel,intel64", 32: "-mi386 -Mintel", 16: "-mi386 -Mintel,i8086"}

_LOW, _HIGH = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di"), range(8, 16)
NAMES = {
    8: ["al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil", *(f"r{number}b" for number in _HIGH)],
    16: [*_LOW, *(f"r{number}w" for number in _HIGH)],
    32: [*(f"e{name}" for name in _LOW), *(f"r{number}d" for number in _HIGH)],
    64: [*(f"r{name}" for name in _LOW), *(f"r{number}" for number in _HIGH)],
}
HIGH_NAMES = ["ah", "ch", "dh", "bh"]
NUMBERS = {name: number for names in NAMES.values() for number, name in enumerate(names)}

_LINE = re.compile(r"^\s*([0-9a-f]+):\t((?:[0-9a-f]{2} )+)\s*(?:\t(.*))?$")
_PREFIX = re.compile(r"rex(\.[WRXB]+)?|data16|data32|addr16|addr32|repn?z|lock|[cdefgs]s|bnd|notrack|xacquire|xrelease")
_MEMORY = re.compile(r"(?:(\w\w):)?\[([^\]]*)\]|\b([cdefgs]s):(0x[0-9a-f]+)")


class Listing(NamedTuple):
    """One instruction as objdump has it; ``text`` begins with the prefixes that the mnemonic does not tell."""

    length: int
    text: str

    @property
    def is_bad(self) -> bool:
        return "(bad)" in self.text

    @property
    def registers(self) -> set[int | str]:
        """The general registers outside of the memory operand: numbers, and the names of ah to bh."""
        words = re.findall(r"\w+", _MEMORY.sub("", self.text))
        return {NUMBERS[word] for word in words if word in NUMBERS} | {word for word in words if word in HIGH_NAMES}

    @property
    def skeleton(self) -> str:
        """The text without prefixes that change only the address, and without addresses."""
        words = _MEMORY.sub("MEMORY", self.text).split()
        while words and re.fullmatch(r"rex(\.[WRXB]+)?|data16|addr32|[cdefgs]s", words[0]):
            del words[0]
        return " ".join(words)

    def memory(self) -> tuple[int | None, int | None, int, int, bool, str] | None:
        """Return base, index, scale, displacement, whether it is RIP-relative, and the segment if it is told."""
        found = _MEMORY.search(self.text)
        if not found:
            return None
        segment, terms = found[1] or found[3] or "", found[2] or found[4]
        base, index, scale, displacement, rip_relative = None, None, 1, 0, False
        for sign, term in re.findall(r"([+-]?)([^+-]+)", terms):
            if term.startswith("0x"):
                displacement = int(sign + term, 16)
            elif term in ("rip", "eip"):
                rip_relative = True
            elif "*" in term:
                name, factor = term.split("*")
                if name not in ("riz", "eiz"):  # "no index", written down
                    index, scale = NUMBERS[name], int(factor)
            elif base is None:
                base = NUMBERS[term]
            else:
                index = NUMBERS[term]
        return base, index, scale, displacement, rip_relative, segment


def disassemble(codes: Sequence[bytes], *, bits: int = 64) -> list[Listing]:
    """Return what objdump says of the first instruction in each of ``codes``, of at most 15 bytes."""
    assert all(len(code) <= 15 for code in codes)
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(code.ljust(SLOT, b"\x90") for code in codes))
        file.flush()
        command = ["objdump", "-D", "-z", "-b", "binary", "--insn-width=16", *OPTIONS[bits].split(), file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = {
        int(found[1], 16): (len(found[2].split()), (found[3] or "").partition("#")[0].strip())
        for found in map(_LINE.match, output.splitlines())
        if found
    }
    return [_listing(lines, at) for at in range(0, SLOT * len(codes), SLOT)]


def _listing(lines: dict[int, tuple[int, str]], start: int) -> Listing:
    at, texts = start, []
    while True:
        size, text = lines[at]
        at += size
        texts.append(text)
        if not all(_PREFIX.fullmatch(word) for word in text.split()):
            return Listing(at - start, " ".join(texts))
