"""An ELF core of a guest: what gdb opens with ``target core``, registers of each vCPU and all of its RAM.

::

    ELF header      ET_CORE, EM_X86_64
    PT_NOTE         one NT_PRSTATUS for each vCPU: a thread to gdb, whose number is vcpu_id + 1
    PT_LOAD ...     one for each region of RAM; p_vaddr = p_paddr = gpa: gdb's addresses are physical
    contents        holes where the guest has touched nothing

Source: ELF gABI, chapters 4 and 5; <sys/procfs.h>, struct elf_prstatus; <sys/user.h>, struct user_regs_struct.
"""

import errno
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvmpy.kvm import Vcpu
from kvmpy.machine.memory import GuestMemory, MemoryRegion
from kvmpy.units import PAGE_SIZE, MiB

if TYPE_CHECKING:
    from kvmpy.pc.pc import Pc

# <elf.h>, which cffi is not given
ET_CORE, EM_X86_64, EV_CURRENT = 4, 62, 1
PT_LOAD, PT_NOTE = 1, 4
PF_RWX = 7
NT_PRSTATUS = 1
IDENT = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64-bit, little-endian, version 1

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III8s")
# siginfo, cursig, sigpend, sighold, pid ppid pgrp sid, four times, 27 registers, fpvalid
_PRSTATUS = struct.Struct("<3i h2x 2Q 4i 8q 27Q i4x")

_BEFORE_ORIG_RAX = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
    *("rax", "rcx", "rdx", "rsi", "rdi"),
)
NO_SYSTEM_CALL = (1 << 64) - 1
"""orig_rax of a thread that is in no system call."""

_CHUNK = 1 * MiB
_NOTHING, _NO_PAGE = bytes(_CHUNK), bytes(PAGE_SIZE)


def write_core(pc: "Pc", path: str) -> None:
    """Write the core of ``pc``, whose vCPUs are out of the guest, to ``path``: all of it, or no file.

    Raises:
        OSError: it cannot be written; what was at ``path`` is untouched.
    """
    notes = b"".join(_note(thread.vcpu_id, thread.call(prstatus_registers)) for thread in pc.machine.threads)
    check_path(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.tmp")
    try:
        # A guest's memory holds its secrets: for the owner alone.
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _write(fd, pc.memory, notes)
            os.rename(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        finally:
            os.close(fd)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, path) from error


def check_path(path: str) -> None:
    """See, before a long run, that a core could be written to ``path``: a regular file or none, in a folder of ours.

    Raises:
        OSError: it could not.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "is no regular file, which a core would replace", path)
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


def prstatus_registers(vcpu: Vcpu) -> list[int]:
    """Return the vCPU's registers in the order of ``struct user_regs_struct``; from the vCPU's thread."""
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    return [
        *(getattr(regs, name) for name in _BEFORE_ORIG_RAX),
        NO_SYSTEM_CALL,
        regs.rip,
        sregs.cs.selector,
        regs.rflags,
        regs.rsp,
        sregs.ss.selector,
        sregs.fs.base,
        sregs.gs.base,
        *(getattr(sregs, name).selector for name in ("ds", "es", "fs", "gs")),
    ]


def _note(vcpu_id: int, registers: list[int]) -> bytes:
    status = _PRSTATUS.pack(0, 0, 0, 0, 0, 0, vcpu_id + 1, 0, 0, 0, *[0] * 8, *registers, 0)
    return _NOTE.pack(len(b"CORE\0"), len(status), NT_PRSTATUS, b"CORE") + status


def _write(fd: int, memory: GuestMemory, notes: bytes) -> None:
    """Write headers, notes and what is there of each region; the rest stays a hole."""
    regions = memory.regions
    notes_at = _HEADER.size + _PROGRAM_HEADER.size * (1 + len(regions))
    contents_at = -(-(notes_at + len(notes)) // PAGE_SIZE) * PAGE_SIZE
    headers = [_PROGRAM_HEADER.pack(PT_NOTE, 0, notes_at, 0, 0, len(notes), 0, 4)]
    at = contents_at
    for region in regions:
        headers.append(_PROGRAM_HEADER.pack(PT_LOAD, PF_RWX, at, region.gpa, region.gpa, *[region.size] * 2, PAGE_SIZE))
        for offset, size in populated(memory, region):
            _copy(fd, memory, region.gpa + offset, size, at + offset)
        at += region.size
    elf = _HEADER.pack(
        IDENT, ET_CORE, EM_X86_64, EV_CURRENT, 0, _HEADER.size, 0, 0, _HEADER.size, _PROGRAM_HEADER.size, len(headers),
        0, 0, 0,
    )  # fmt: skip
    _write_at(fd, memoryview(elf + b"".join(headers) + notes), 0)
    os.ftruncate(fd, at)


def populated(memory: GuestMemory, region: MemoryRegion) -> Iterator[tuple[int, int]]:
    """Yield the (offset, size) of the parts of ``region`` that the host has backed; offsets from its start.

    Of anonymous memory, which has no such list, all of it: pages of zeros are left out when they are copied.
    """
    if memory.fd < 0:
        yield 0, region.size
        return
    at, end = region.offset, region.offset + region.size
    while at < end:
        try:
            start = os.lseek(memory.fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: no data behind
            return
        if start >= end:
            return
        at = min(os.lseek(memory.fd, start, os.SEEK_HOLE), end)
        yield start - region.offset, at - start


def _copy(fd: int, memory: GuestMemory, gpa: int, size: int, offset: int) -> None:
    """Write [gpa, gpa+size) at ``offset`` of the file, without its pages of zeros."""
    for at in range(0, size, _CHUNK):
        chunk = memory.read(gpa + at, min(_CHUNK, size - at))
        if chunk == _NOTHING[: len(chunk)]:
            continue
        for page in range(0, len(chunk), PAGE_SIZE):
            data = chunk[page : page + PAGE_SIZE]
            if data != _NO_PAGE:
                _write_at(fd, memoryview(data), offset + at + page)


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
