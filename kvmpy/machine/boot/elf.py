"""ELF executables: the program headers read by our own few lines, and the plain boot of one at its entry point.

What an ELF file says is loaded at the physical address (p_paddr) of each PT_LOAD. The entry point is a virtual
address: it is translated through the segment that holds it, since the guest starts with memory mapped 1:1. ELF64
starts in long mode, ELF32 in protected mode, and nothing is handed over: no command line, no memory map. PVH and
multiboot use this reader too. Section headers are not looked at.

Source: System V ABI (gABI) 4.1, chapters 4 "ELF Header" and 5 "Program Header"; x86-64 psABI 1.0 §4.1.
"""

from struct import Struct
from typing import NamedTuple

from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.place import check_entry, check_segments, reach
from kvmpy.machine.boot.plan import BootOptions, CpuMode, Entry, Found, Plan, Segment
from kvmpy.machine.memory import GuestMemory

TITLE = "ELF"
SERVES = frozenset({"mode", "entry"})

MAGIC = b"\x7fELF"
ELFCLASS32, ELFCLASS64 = 1, 2
ELFDATA2LSB = 1
ET_EXEC, ET_DYN = 2, 3
EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4
PN_XNUM = 0xFFFF

# Offsets that are the same in both classes.
_EI_CLASS, _EI_DATA, _E_TYPE, _E_MACHINE, _E_ENTRY = 4, 5, 16, 18, 24


_MACHINES = {
    3: "i386",
    8: "MIPS",
    20: "PowerPC",
    21: "64-bit PowerPC",
    22: "S/390",
    40: "32-bit ARM",
    62: "x86-64",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
}


def _machine(number: int) -> str:
    name = _MACHINES.get(number)
    return f"{name} (e_machine {number})" if name else f"e_machine {number}"


class _Class(NamedTuple):
    """What differs between ELF32 and ELF64: layouts, and the offsets that errors name."""

    bits: int
    machine: int
    header: Struct
    """e_type e_machine e_version e_entry e_phoff e_shoff e_flags e_ehsize e_phentsize e_phnum"""
    program_header: Struct
    phoff_at: int
    phentsize_at: int
    phnum_at: int


_CLASSES = {
    ELFCLASS32: _Class(32, EM_386, Struct("<16xHHIIIIIHHH"), Struct("<IIIIIIII"), 28, 42, 44),
    ELFCLASS64: _Class(64, EM_X86_64, Struct("<16xHHIQQQIHHH"), Struct("<IIQQQQQQ"), 32, 54, 56),
}


class ProgramHeader(NamedTuple):
    """One program header; ``described_at`` is its own offset in the file."""

    type: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    described_at: int


class ElfFile(NamedTuple):
    """The ELF header, as far as loading needs it, and the program headers."""

    bits: int
    type: int
    machine: int
    entry: int
    headers: tuple[ProgramHeader, ...]
    phnum_at: int

    @property
    def mode(self) -> CpuMode:
        """The mode for which the code is made."""
        return CpuMode.LONG if self.bits == 64 else CpuMode.PROTECTED


def read_elf(image: ImageFile) -> ElfFile | None:
    """Return the headers, or None when the file has no ELF magic. Says nothing yet about who could run it.

    Raises:
        ImageError: a header is not readable: unknown class, not little-endian, or a table that leaves the file.
    """
    if image.head(4) != MAGIC:
        return None
    kind = _CLASSES.get(image.read(_EI_CLASS, 1)[0])
    if kind is None:
        raise image.error("ELF class is neither 1 (32 bits) nor 2 (64 bits)", _EI_CLASS)
    if image.read(_EI_DATA, 1)[0] != ELFDATA2LSB:
        raise image.error("ELF file is not little-endian (EI_DATA 1), as all for x86 are", _EI_DATA)
    type_, machine, _, entry, phoff, _, _, _, phentsize, phnum = image.unpack(kind.header, 0)
    if phnum == PN_XNUM:
        raise image.error(f"e_phnum 0x{PN_XNUM:x}: more program headers than kvmpy reads (65534)", kind.phnum_at)
    size = kind.program_header.size
    if phnum and phentsize != size:
        raise image.error(f"e_phentsize is {phentsize}: {size} is wanted", kind.phentsize_at)
    image.check_range(phoff, phnum * size, at=kind.phoff_at)
    table = image.read(phoff, phnum * size)
    headers = (
        _program_header(kind.bits, fields, phoff + i * size)
        for i, fields in enumerate(kind.program_header.iter_unpack(table))
    )
    return ElfFile(kind.bits, type_, machine, entry, tuple(headers), kind.phnum_at)


def _program_header(bits: int, fields: tuple[int, ...], described_at: int) -> ProgramHeader:
    if bits == 64:
        type_, _flags, offset, vaddr, paddr, filesz, memsz, _align = fields
    else:
        type_, offset, vaddr, paddr, filesz, memsz, _flags, _align = fields
    return ProgramHeader(type_, offset, vaddr, paddr, filesz, memsz, described_at)


def check_kernel(image: ImageFile, elf: ElfFile) -> None:
    """Refuse an ELF file that no bare x86 machine can run: another machine, a PIE, an object, a hosted program.

    Raises:
        ImageError: it says which, and why.
    """
    wanted = EM_X86_64 if elf.bits == 64 else EM_386
    if elf.machine != wanted:
        names = f"{_machine(elf.machine)}: {_machine(wanted)} is wanted"
        raise image.error(f"ELF{elf.bits} for {names}", _E_MACHINE)
    if elf.type == ET_DYN:
        message = "position-independent (ET_DYN): nobody here relocates it; link it with -no-pie -static"
        raise image.error(message, _E_TYPE)
    if elf.type != ET_EXEC:
        raise image.error(f"ELF type {elf.type}: an executable (ET_EXEC, 2) is wanted", _E_TYPE)
    for header in elf.headers:
        if header.type == PT_INTERP:
            raise image.error("a program for an operating system: it names an interpreter", header.described_at)


def load_segments(image: ImageFile, elf: ElfFile) -> tuple[Segment, ...]:
    """Return what PT_LOAD says, at physical addresses. Their places in RAM are checked by `place.check_segments`.

    Raises:
        ImageError: this is no kernel, there is nothing to load, or a segment contradicts itself or the file.
    """
    check_kernel(image, elf)
    segments = []
    for header in elf.headers:
        if header.type != PT_LOAD or not header.memsz:
            continue
        if header.filesz > header.memsz:
            message = f"PT_LOAD has p_filesz 0x{header.filesz:x} above p_memsz 0x{header.memsz:x}"
            raise image.error(message, header.described_at)
        image.check_range(header.offset, header.filesz, at=header.described_at)
        segments.append(Segment(header.paddr, header.offset, header.filesz, header.memsz, header.described_at))
    if not segments:
        raise image.error("no PT_LOAD program header: there is nothing to load", elf.phnum_at)
    return tuple(segments)


def physical_entry(elf: ElfFile) -> int:
    """Return e_entry as a physical address; as it stands when no segment holds it as a virtual one."""
    for header in elf.headers:
        if header.type == PT_LOAD and header.vaddr <= elf.entry < header.vaddr + header.memsz:
            return elf.entry - header.vaddr + header.paddr
    return elf.entry


def check_elf_entry(image: ImageFile, rip: int, mode: CpuMode, segments: tuple[Segment, ...]) -> None:
    """Refuse an e_entry outside every segment, or beyond the reach of ``mode``. Raises ImageError."""
    check_entry(image, rip, mode, segments, at=_E_ENTRY)


def probe(image: ImageFile) -> Found | None:
    """Tell whether this is an ELF executable, and where it would load.

    Raises:
        ImageError: it is a broken one; or Linux, which would find nothing of what its entry point asks for.
    """
    from kvmpy.machine.boot.linux import linux_version  # which reads ELF files by this module

    elf = read_elf(image)
    if elf is None:
        return None
    segments = load_segments(image, elf)
    rip = physical_entry(elf)
    check_elf_entry(image, rip, elf.mode, segments)
    version = linux_version(image)
    if version is not None:
        message = f"Linux {version} does not start as a plain ELF file: its bzImage does, or a vmlinux with a PVH entry"
        raise image.error(f"{message} (CONFIG_PVH, Linux 5.0 or later)", _E_ENTRY)
    translated = (f"e_entry 0x{elf.entry:x} is virtual",) if rip != elf.entry else ()
    return Found(segments, elf.mode, rip, translated)


def plan(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Plan:
    """Return the plan to start at the entry point, or at ``options.entry`` in ``options.mode``.

    Raises:
        ImageError: the file is no ELF executable, or does not fit.
        ValueError: ``options.entry`` is in no segment, or the mode cannot reach it.
    """
    elf = read_elf(image)
    if elf is None:
        raise image.error("no ELF file: it does not begin with 7f 45 4c 46", 0)
    segments = load_segments(image, elf)
    check_segments(image, segments, memory)
    mode = options.mode or elf.mode
    if options.entry is None:
        rip = physical_entry(elf)
        check_elf_entry(image, rip, mode, segments)
    else:
        rip = options.entry
        if not any(segment.gpa <= rip < segment.end for segment in segments):
            raise ValueError(f"entry 0x{rip:x} is in no segment of {image.path}")
        if rip >= reach(mode):
            raise ValueError(f"entry 0x{rip:x} is out of reach: {mode} mode starts below 0x{reach(mode):x}")
    return Plan(segments, Entry(mode, rip))


def load(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Entry:
    """Write the segments into the guest and return how to start. Raises as `plan` does."""
    return plan(image, memory, options).carry_out(image, memory)
