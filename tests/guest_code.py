"""Tiny guests for the tests: assembly text in, flat bytes out, by gcc and kept between runs of the suite."""

import hashlib
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from kvmpy.kvm import Vcpu
from kvmpy.machine import x86
from kvmpy.machine.memory import GuestMemory

ROOT = Path(__file__).resolve().parents[1]

REAL_ENTRY = 0x1000
HIGH_ENTRY = 0x10_0000

_BITS = {"real": 16, "protected": 32, "long": 64}
_ENTRIES = {"real": REAL_ENTRY, "protected": HIGH_ENTRY, "long": HIGH_ENTRY}
_folders: list[Path] = []


def keep_in(folder: Path) -> None:
    """Keep what is assembled in ``folder``, for this run of the tests and later ones."""
    _folders[:] = [folder]


def entry_of(mode: str) -> int:
    """Return where code for ``mode`` (real, protected, long) is loaded and starts."""
    return _ENTRIES[mode]


@cache
def assemble(text: str, mode: str = "real") -> bytes:
    """Return ``text``, GNU assembler with the names of guests/abi.h, as flat bytes for `entry_of` (``mode``)."""
    source = f'#include "abi.h"\n.code{_BITS[mode]}\n.globl _start\n_start:\n{text}\n'
    if not _folders:
        return _build(source, mode)
    digest = hashlib.sha256((source + (ROOT / "guests" / "abi.h").read_text()).encode()).hexdigest()
    kept = _folders[0] / f"{digest[:32]}-{mode}.bin"
    if not kept.exists():
        made = kept.with_suffix(f".{os.getpid()}")  # another run of the tests may be at the same one
        made.write_bytes(_build(source, mode))
        made.replace(kept)
    return kept.read_bytes()


def _build(source: str, mode: str) -> bytes:
    command = ["gcc", "-x", "assembler-with-cpp", f"-I{ROOT / 'guests'}", "-nostdlib", "-static", "-no-pie"]
    linker = [f"-Wl,-Ttext=0x{entry_of(mode):x}", "-Wl,--oformat=binary", "-Wl,--build-id=none", "-Wl,-N"]
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image"
        done = subprocess.run([*command, *linker, "-o", image, "-"], input=source, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{source}"
        return image.read_bytes()


def set_up(vcpu: Vcpu, memory: GuestMemory, code: bytes, mode: str) -> None:
    """Put ``code`` into the guest and let ``vcpu`` begin with it in ``mode``."""
    memory.write(entry_of(mode), code)
    if mode != "real":
        x86.write_boot_tables(memory, long=mode == "long")
    {"real": x86.real_mode, "protected": x86.protected_mode, "long": x86.long_mode}[mode](vcpu, entry_of(mode))
