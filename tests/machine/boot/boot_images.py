"""Small valid images of every boot protocol, built byte by byte from the specifications and not from kvmpy's tables."""

import struct
from dataclasses import dataclass

ELF_HEADER = {64: "<16sHHIQQQIHHHHHH", 32: "<16sHHIIIIIHHHHHH"}
PROGRAM_HEADER = {64: "<IIQQQQQQ", 32: "<IIIIIIII"}
PT_LOAD, PT_INTERP, PT_NOTE = 1, 3, 4

# Offsets that tests overwrite (gABI, chapters 4 and 5).
E_TYPE, E_MACHINE = 16, 18
E_ENTRY = 24
E_PHOFF = {64: 32, 32: 28}
E_SHOFF = {64: 40, 32: 32}
E_PHENTSIZE = {64: 54, 32: 42}
E_PHNUM = {64: 56, 32: 44}
PHDR = {64: 64, 32: 52}
PHDR_SIZE = {64: 56, 32: 32}
P_OFFSET, P_VADDR, P_PADDR, P_FILESZ, P_MEMSZ = (
    {64: 8, 32: 4},
    {64: 16, 32: 8},
    {64: 24, 32: 12},
    {64: 32, 32: 16},
    {64: 40, 32: 20},
)

CODE = bytes(range(1, 65))
BANNER = CODE + b"\0Linux version 6.1.0-test (who@where) (gcc 12) #1\n\0"
"""Code with the line that Linux prints first in its data."""


@dataclass(frozen=True)
class Load:
    """A PT_LOAD of an ELF image that is to be built."""

    paddr: int
    data: bytes = CODE
    memsz: int | None = None
    vaddr: int | None = None


def patch(image: bytes, offset: int, value: int, size: int) -> bytes:
    """Return ``image`` with ``size`` bytes at ``offset`` set to ``value``."""
    return image[:offset] + value.to_bytes(size, "little") + image[offset + size :]


def elf(*loads: Load, bits: int = 64, entry: int | None = None, notes: bytes = b"", interp: bytes = b"") -> bytes:
    """Return an ELF executable: header, program headers, the notes, then the segments, each 16-aligned in the file."""
    contents = [(PT_LOAD, load.paddr, load.vaddr, load.data, load.memsz) for load in loads]
    contents += [(PT_NOTE, 0, None, notes, None)] if notes else []
    contents += [(PT_INTERP, 0, None, interp, None)] if interp else []
    offset = PHDR[bits] + len(contents) * PHDR_SIZE[bits]
    headers, body = b"", b""
    for kind, paddr, vaddr, data, memsz in contents:
        body += bytes(-(offset + len(body)) % 16)
        at = offset + len(body)
        vaddr = paddr if vaddr is None else vaddr
        memsz = len(data) if memsz is None else memsz
        if bits == 64:
            headers += struct.pack(PROGRAM_HEADER[64], kind, 7, at, vaddr, paddr, len(data), memsz, 16)
        else:
            headers += struct.pack(PROGRAM_HEADER[32], kind, at, vaddr, paddr, len(data), memsz, 7, 16)
        body += data
    ident = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    machine = 62 if bits == 64 else 3
    entry = loads[0].paddr if entry is None else entry
    sizes = (PHDR[bits], PHDR_SIZE[bits], len(contents), 0, 0, 0)
    header = struct.pack(ELF_HEADER[bits], ident, 2, machine, 1, entry, PHDR[bits], 0, 0, *sizes)
    return header + headers + body


def note(name: bytes, kind: int, desc: bytes) -> bytes:
    """Return one ELF note."""
    padded = name + bytes(-len(name) % 4) + desc + bytes(-len(desc) % 4)
    return struct.pack("<III", len(name), len(desc), kind) + padded


def pvh_note(entry: int, *, size: int = 8) -> bytes:
    """Return a PVH note behind others, one of them of odd sizes, as linkers lay them out."""
    others = note(b"GNU\0", 3, bytes(20)) + note(b"vendor\0", 1, b"12345") + note(b"Xen\0", 6, b"linux\0")
    return others + note(b"Xen\0", 18, entry.to_bytes(size, "little"))


def pvh(*, bits: int = 64, entry: int = 0x20_0010, code: bytes = CODE) -> bytes:
    """Return a PVH kernel at 2 MiB."""
    load = Load(0x20_0000, code, memsz=0x3000, vaddr=0xC000_0000)
    return elf(load, bits=bits, entry=0xC000_0000, notes=pvh_note(entry))


def multiboot1_header(flags: int = 3, *fields: int) -> bytes:
    """Return a header with a right checksum; ``fields`` follow it."""
    words = (0x1BADB002, flags, -(0x1BADB002 + flags) % 2**32, *fields)
    return struct.pack(f"<{len(words)}I", *words)


def multiboot1(*, bits: int = 32, flags: int = 3) -> bytes:
    """Return an ELF kernel at 1 MiB with a multiboot 1 header."""
    return elf(Load(0x10_0000, multiboot1_header(flags) + CODE, memsz=0x2000), bits=bits, entry=0x10_000C)


@dataclass(frozen=True)
class Kludge:
    """The address fields of a multiboot 1 kernel that is not ELF; the header is at ``at`` in the file."""

    at: int = 0x40
    flags: int = 0x10003
    header_addr: int = 0x10_0040
    load_addr: int = 0x10_0000
    load_end: int = 0
    bss_end: int = 0x10_4000
    entry: int = 0x10_0060


def multiboot1_kludge(kludge: Kludge | None = None, *, size: int = 0x200) -> bytes:
    """Return an image with load addresses instead of program headers."""
    k = kludge or Kludge()
    header = multiboot1_header(k.flags, k.header_addr, k.load_addr, k.load_end, k.bss_end, k.entry)
    start = bytes(i & 0x7F for i in range(k.at)) + header
    return start + bytes(i & 0x7F for i in range(size - len(start)))


def tag(kind: int, payload: bytes = b"", *, optional: bool = False, size: int | None = None) -> bytes:
    """Return a multiboot 2 header tag, padded to 8 bytes."""
    raw = struct.pack("<HHI", kind, int(optional), 8 + len(payload) if size is None else size) + payload
    return raw + bytes(-len(raw) % 8)


END_TAG = tag(0)


def words(*values: int) -> bytes:
    """Return 32-bit words."""
    return struct.pack(f"<{len(values)}I", *values)


def multiboot2_header(*tags: bytes, architecture: int = 0, length: int | None = None) -> bytes:
    """Return a header with a right checksum. The end tag is the caller's."""
    body = b"".join(tags)
    length = 16 + len(body) if length is None else length
    checksum = -(0xE85250D6 + architecture + length) % 2**32
    return words(0xE85250D6, architecture, length, checksum) + body


def multiboot2(*tags: bytes, bits: int = 64, end: bytes = END_TAG) -> bytes:
    """Return an ELF kernel at 1 MiB with a multiboot 2 header of ``tags``; it starts behind the header."""
    header = multiboot2_header(*tags, end)
    return elf(Load(0x10_0000, header + CODE, memsz=0x2000), bits=bits, entry=0x10_0000 + len(header))


def multiboot2_addressed(*more: bytes, header_addr: int = 0x10_0000, load_addr: int = 0x10_0000) -> bytes:
    """Return an image that is not ELF, with address and entry tags; the header is at its start."""
    address = tag(2, words(header_addr, load_addr, 0, 0x10_4000))
    return multiboot2_header(address, tag(3, words(0x10_0080)), *more, END_TAG) + bytes(range(200))


def multiboot2_relocatable(low: int, high: int, alignment: int, preference: int) -> bytes:
    """Return an ELF kernel linked at 1 MiB that may move."""
    return multiboot2(tag(10, words(low, high, alignment, preference)))


# offset and size in the file, as Documentation/arch/x86/boot.rst lists them
SETUP = {
    "setup_sects": (0x1F1, 1),
    "syssize": (0x1F4, 4),
    "boot_flag": (0x1FE, 2),
    "jump": (0x200, 2),
    "header": (0x202, 4),
    "version": (0x206, 2),
    "kernel_version": (0x20E, 2),
    "loadflags": (0x211, 1),
    "initrd_addr_max": (0x22C, 4),
    "kernel_alignment": (0x230, 4),
    "relocatable_kernel": (0x234, 1),
    "xloadflags": (0x236, 2),
    "cmdline_size": (0x238, 4),
    "payload_offset": (0x248, 4),
    "payload_length": (0x24C, 4),
    "pref_address": (0x258, 8),
    "init_size": (0x260, 4),
}
KERNEL_SIZE = 0x800


def bzimage(*, payload: bytes = b"", **fields: int) -> bytes:
    """Return a 64-bit bzImage of protocol 2.15 with two setup sectors; ``fields`` overwrites fields of its header.

    ``payload`` is the packed kernel in it.
    """
    kernel = bytes(i * 7 & 0xFF for i in range(KERNEL_SIZE)) + payload + bytes(-len(payload) % 16)
    values = {
        "setup_sects": 2,
        "syssize": len(kernel) // 16,
        "boot_flag": 0xAA55,
        "jump": 0x6AEB,
        "header": int.from_bytes(b"HdrS", "little"),
        "version": 0x020F,
        "kernel_version": 0x280 - 0x200 + 0x80,
        "loadflags": 1,
        "initrd_addr_max": 0x7FFF_FFFF,
        "kernel_alignment": 0x20_0000,
        "relocatable_kernel": 1,
        "xloadflags": 1,
        "cmdline_size": 2047,
        "pref_address": 0x100_0000,
        "init_size": 0x10_0000,
        "payload_offset": KERNEL_SIZE if payload else 0,
        "payload_length": len(payload),
    } | fields
    setup = bytearray(3 * 512)
    setup[0x300:0x310] = b"6.1.0-kvmpy-test"
    image = bytes(setup) + kernel
    for name, value in values.items():
        offset, size = SETUP[name]
        image = patch(image, offset, value, size)
    return image


def bootsector(*, sectors: int = 1) -> bytes:
    """Return a signed boot sector and more sectors behind it."""
    return (b"\xf4" * 510 + b"\x55\xaa").ljust(512 * sectors, b"\x90")


EVERY_IMAGE = {
    "bzimage": (bzimage(),),
    "pvh": (pvh(), pvh(bits=32)),
    "multiboot2": (
        multiboot2(),
        multiboot2(tag(1, words(1, 3, 6), optional=False), tag(4, words(2)), tag(6), tag(5, bytes(12), optional=True)),
        multiboot2_addressed(),
        multiboot2_relocatable(0x20_0000, 0x2FF_FFFF, 0x1000, 2),
    ),
    "multiboot1": (multiboot1(), multiboot1(bits=64), multiboot1_kludge()),
    "elf": (
        elf(Load(0x10_0000), Load(0x20_0000, memsz=0x5000)),
        elf(Load(0x10_0000, memsz=0x100), bits=32),
        elf(Load(0x1000, vaddr=0xFFFF_FFFF_8000_1000), entry=0xFFFF_FFFF_8000_1010),
    ),
    "bootsector": (bootsector(), bootsector(sectors=9)),
    "flat": (CODE,),
}
"""Valid images by the protocol that boots them."""
