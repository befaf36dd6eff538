"""The information that a multiboot 2 kernel receives: a list of tags, each at a multiple of 8.

::

    BOOT_INFO +0x00  total_size  reserved
              +0x08  type  size  payload, padded to 8 ...
              ...    type 0, size 8: the end

Served: command line, loader name, modules, memory sizes, memory map, the ACPI root pointer when the board has one,
and the load base of a relocatable kernel.

Source: Multiboot2 2.0 §3.4.
"""

from struct import Struct

from kvmpy.machine import layout
from kvmpy.machine.boot.multiboot import LOADER_NAME, memory_sizes
from kvmpy.machine.boot.place import c_string, read_rsdp
from kvmpy.machine.boot.plan import PlacedFile
from kvmpy.machine.memory import GuestMemory

END, CMDLINE, LOADER, MODULE, MEMORY_SIZES, BIOS_DEVICE, MEMORY_MAP, VBE, FRAMEBUFFER = range(9)
ELF_SECTIONS, APM, EFI32, EFI64, SMBIOS, ACPI_OLD, ACPI_NEW, NETWORK, EFI_MEMORY_MAP = range(9, 18)
EFI_BOOT_SERVICES, EFI32_IMAGE, EFI64_IMAGE, LOAD_BASE = range(18, 22)

UNDERSTOOD = frozenset(range(LOAD_BASE + 1)) - {ELF_SECTIONS}
"""What a kernel may demand. Of what this machine lacks (BIOS, EFI, a display) there is nothing to tell, which the
specification allows; ELF sections do exist, so a kernel that cannot do without them is refused."""

_HEADER = Struct("<II")
"""total_size reserved; and of a tag: type size"""
_MODULE = Struct("<II")
"""mod_start mod_end; the string follows"""
_MEMORY_SIZES = Struct("<II")
_MEMORY_MAP = Struct("<II")
"""entry_size entry_version; the entries follow"""
_MEMORY_MAP_ENTRY = Struct("<QQII")
"""base_addr length type reserved"""
_LOAD_BASE = Struct("<I")


def information(append: str, files: tuple[PlacedFile, ...], memory: GuestMemory, load_base: int | None) -> bytes:
    """Return the tag list for `layout.BOOT_INFO`.

    Raises:
        ValueError: it does not fit there: command lines or modules are too many.
    """
    tags = [_tag(CMDLINE, c_string(append)), _tag(LOADER, LOADER_NAME)]
    tags += [_tag(MODULE, _MODULE.pack(file.gpa, file.end) + c_string(file.cmdline)) for file in files]
    tags.append(_tag(MEMORY_SIZES, _MEMORY_SIZES.pack(*memory_sizes(memory))))
    entries = b"".join(_MEMORY_MAP_ENTRY.pack(*entry, 0) for entry in layout.memory_map(memory.size))
    tags.append(_tag(MEMORY_MAP, _MEMORY_MAP.pack(_MEMORY_MAP_ENTRY.size, 0) + entries))
    rsdp = read_rsdp(memory)
    if rsdp is not None:
        tags.append(_tag(ACPI_NEW, rsdp))
    if load_base is not None:
        tags.append(_tag(LOAD_BASE, _LOAD_BASE.pack(load_base)))
    tags.append(_tag(END, b""))
    body = b"".join(tags)
    total = _HEADER.size + len(body)
    if total > layout.BOOT_INFO_SIZE:
        raise ValueError(f"boot information of {total} bytes (command lines, modules): {layout.BOOT_INFO_SIZE} fit")
    return _HEADER.pack(total, 0) + body


def _tag(type_: int, payload: bytes) -> bytes:
    raw = _HEADER.pack(type_, _HEADER.size + len(payload)) + payload
    return raw + bytes(-len(raw) % 8)
