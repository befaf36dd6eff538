"""The Exits lines of a lesson's header, as a pattern that a run is held against. guests/README.md has the grammar."""

import re
from collections.abc import Iterable

from kvmpy import kvm
from kvmpy.kvm import Exit, IoIn, IoOut, MmioRead, MmioWrite

KEYS = ("port", "gpa", "size", "data")
_TOKEN = re.compile(r"\s*(?:([();|])|x(\d+|\*)(?!\w)|([A-Z]\w+(?: [a-z]+=0?x?[0-9a-f]+)*)(?![^\s)]))")
# In the kinds of a line's tokens (E: an exit, x: a count): two operands without a separator, and the like.
_MISPLACED = re.compile(r"[E)x][E(]|xx|[;|(][;|)x]|^[;|)x]|[;|(]$|^$")
_VCPU = re.compile(r"vcpu (\d+): ")


def described(exit: Exit) -> list[str]:
    """Return the exit in the words of a header, once for each element of string I/O."""
    match exit:
        case IoOut(port=port, size=size, data=data, count=count):
            elements = [data[i * size : (i + 1) * size] for i in range(count)]
            return [f"IoOut port=0x{port:x} size={size} data={_hex(element)}" for element in elements]
        case IoIn(port=port, size=size, count=count):
            return [f"IoIn port=0x{port:x} size={size}"] * count
        case MmioWrite(phys_addr=gpa, data=data):
            return [f"MmioWrite gpa=0x{gpa:x} size={len(data)} data={_hex(data)}"]
        case MmioRead(phys_addr=gpa, size=size):
            return [f"MmioRead gpa=0x{gpa:x} size={size}"]
        case _:
            return [type(exit).__name__]


def _hex(data: bytes) -> str:
    return hex(int.from_bytes(data, "little"))


def patterns(lines: Iterable[str]) -> dict[int, re.Pattern[str]]:
    """Return for each vCPU that the lines name a pattern of its exits, each of which ends with a semicolon.

    Raises:
        ValueError: a line is not what the grammar allows.
    """
    steps: dict[int, str] = {}
    for line in lines:
        vcpu = _VCPU.match(line)
        vcpu_id = int(vcpu[1]) if vcpu else 0
        steps[vcpu_id] = steps.get(vcpu_id, "") + _translate(line[vcpu.end() if vcpu else 0 :])
    try:
        return {vcpu_id: re.compile(pattern) for vcpu_id, pattern in steps.items()}
    except re.error as error:
        raise ValueError(f"{lines}: {error}") from error


def _translate(text: str) -> str:
    pattern, kinds, at = "", "", 0
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise ValueError(f"{text!r}: not understood from {text[at:]!r}")
        mark, times, exit = token.groups()
        if mark:
            pattern += {"(": "(?:", ")": ")", ";": "", "|": "|"}[mark]
        elif times:
            pattern += "+" if times == "*" else "{" + times + "}"
        else:
            pattern += _exit_pattern(exit)
        kinds += mark or ("x" if times else "E")
        at = token.end()
    if _MISPLACED.search(kinds):
        raise ValueError(f"{text!r}: a separator or an exit is missing ({kinds})")
    return pattern


def _exit_pattern(text: str) -> str:
    name, *pairs = text.split()
    if not hasattr(kvm, name):
        raise ValueError(f"{text!r}: no exit is called {name}")
    wanted = dict(pair.split("=", 1) for pair in pairs)
    if unknown := set(wanted) - set(KEYS):
        raise ValueError(f"{text!r}: an exit has no {', '.join(unknown)}")
    return f"(?:{name}" + "".join(rf" {k}={wanted[k]}" if k in wanted else rf"(?: {k}=\w+)?" for k in KEYS) + ";)"


def differences(lines: Iterable[str], seen: dict[int, list[str]]) -> list[str]:
    """Return what the run did otherwise than the lines say, one text for each vCPU; nothing when it did as they say.

    ``seen`` has for each vCPU its exits as `described` tells them.
    """
    expected = patterns(lines)
    wrong = []
    for vcpu_id in sorted(expected.keys() | seen.keys()):
        exits = "".join(exit + ";" for exit in seen.get(vcpu_id, []))
        if vcpu_id not in expected or not expected[vcpu_id].fullmatch(exits):
            wrong.append(f"vcpu {vcpu_id} did: {summary(seen.get(vcpu_id, []))}")
    return wrong


def summary(exits: list[str]) -> str:
    """Return the exits in the grammar of a header, equal neighbours counted; data are left out."""
    runs: list[tuple[str, int]] = []
    for exit in (re.sub(r" (size|data)=\w+", "", exit) for exit in exits):
        if runs and runs[-1][0] == exit:
            runs[-1] = (exit, runs[-1][1] + 1)
        else:
            runs.append((exit, 1))
    return " ; ".join(exit + (f" x{times}" if times > 1 else "") for exit, times in runs)
