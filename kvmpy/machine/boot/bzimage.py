"""bzImage: a Linux kernel by the 64-bit boot protocol, command line and initrd included.

The file is the setup code (512 bytes for the boot sector and for each of ``setup_sects``), which is not run here, and
the protected-mode kernel behind it. The kernel goes to its preferred address, or where it fits; it is entered in long
mode 0x200 bytes from its start with rsi = boot_params, the "zero page" at BOOT_INFO, which holds a copy of the setup
header and what `boot_params` fills in.

Source: Linux Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header", "64-bit Boot Protocol"),
Documentation/arch/x86/zero-page.rst.
"""

from struct import Struct
from typing import NamedTuple

from kvmpy.machine import layout
from kvmpy.machine.boot.image import ImageFile
from kvmpy.machine.boot.packed import LONGEST_MAGIC, Packing, recognise
from kvmpy.machine.boot.place import Arena, align_up, enough_memory, linux_cmdline, low_ram_end, place_files, read_rsdp
from kvmpy.machine.boot.plan import BootOptions, CpuMode, Entry, Found, PlacedFile, Plan, Segment
from kvmpy.machine.memory import GuestMemory
from kvmpy.units import format_size

TITLE = "bzImage"
SERVES = frozenset({"append", "initrd"})

SECTOR_SIZE = 512
DEFAULT_SETUP_SECTS = 4
PARAGRAPH = 16
ENTRY_64 = 0x200
BOOT_FLAG_MAGIC = 0xAA55
HEADER_MAGIC = int.from_bytes(b"HdrS", "little")
LEAST_VERSION = 0x020C
LOADED_HIGH = 1 << 0
XLF_KERNEL_64 = 1 << 0
UNDEFINED_LOADER = 0xFF
NORMAL_VIDEO_MODE = 0xFFFF
BOOT_PARAMS_SIZE = 4096
E820_ENTRY = Struct("<QQI")


class Field(NamedTuple):
    """A field of the setup header or the zero page: the same offset in the file and in boot_params."""

    offset: int
    size: int

    def get(self, raw: bytes | bytearray) -> int:
        """Return its value."""
        return int.from_bytes(raw[self.offset : self.offset + self.size], "little")

    def set(self, raw: bytearray, value: int) -> None:
        """Set its value."""
        raw[self.offset : self.offset + self.size] = value.to_bytes(self.size, "little")


ACPI_RSDP_ADDR = Field(0x070, 8)
EXT_RAMDISK_IMAGE = Field(0x0C0, 4)
EXT_RAMDISK_SIZE = Field(0x0C4, 4)
EXT_CMD_LINE_PTR = Field(0x0C8, 4)
E820_ENTRIES = Field(0x1E8, 1)
SETUP_SECTS = Field(0x1F1, 1)
SYSSIZE = Field(0x1F4, 4)
VID_MODE = Field(0x1FA, 2)
BOOT_FLAG = Field(0x1FE, 2)
JUMP_DISTANCE = Field(0x201, 1)
HEADER = Field(0x202, 4)
VERSION = Field(0x206, 2)
KERNEL_VERSION = Field(0x20E, 2)
TYPE_OF_LOADER = Field(0x210, 1)
LOADFLAGS = Field(0x211, 1)
CODE32_START = Field(0x214, 4)
RAMDISK_IMAGE = Field(0x218, 4)
RAMDISK_SIZE = Field(0x21C, 4)
CMD_LINE_PTR = Field(0x228, 4)
INITRD_ADDR_MAX = Field(0x22C, 4)
KERNEL_ALIGNMENT = Field(0x230, 4)
RELOCATABLE_KERNEL = Field(0x234, 1)
XLOADFLAGS = Field(0x236, 2)
CMDLINE_SIZE = Field(0x238, 4)
PAYLOAD_OFFSET = Field(0x248, 4)
PAYLOAD_LENGTH = Field(0x24C, 4)
PREF_ADDRESS = Field(0x258, 8)
INIT_SIZE = Field(0x260, 4)
E820_TABLE = 0x2D0

HEADER_START = SETUP_SECTS.offset
HEADER_LEAST_END = INIT_SIZE.offset + INIT_SIZE.size
HEADER_LIMIT = 0x290
"""What lies behind belongs to another field of boot_params."""


class Kernel(NamedTuple):
    """A bzImage, checked: the setup header in its place in the first 0x290 bytes, and where the kernel proper lies."""

    raw: bytes
    offset: int
    size: int
    room: int
    """Bytes that the kernel needs from its load address before it can look at the memory map."""

    @property
    def relocatable(self) -> bool:
        """Whether it runs from another address than the one it prefers."""
        return bool(RELOCATABLE_KERNEL.get(self.raw))

    @property
    def candidates(self) -> tuple[int, ...]:
        """Where it may be loaded, the best place first."""
        preferred, alignment = PREF_ADDRESS.get(self.raw), KERNEL_ALIGNMENT.get(self.raw)
        if not self.relocatable:
            return (preferred,)
        # Linux, which names its version, moves itself up to the address that it prefers, and needs the room there.
        least = preferred if KERNEL_VERSION.get(self.raw) else layout.HIGH_MEMORY
        lowest = align_up(max(least, layout.HIGH_MEMORY), alignment)
        # From another address than an aligned one it would move itself: then there is nothing to prefer.
        return (preferred, lowest) if preferred % alignment == 0 and lowest != preferred else (lowest,)

    @property
    def least_end(self) -> int:
        """The lowest address at which it may end; out of reach when it may not lie above 1 MiB."""
        high = (gpa for gpa in self.candidates if gpa >= layout.HIGH_MEMORY)
        return min(high, default=layout.HOLE) + self.room


class Payload(NamedTuple):
    """The packed kernel in a bzImage: bytes of the file. ``packing`` is None when its magic is unknown."""

    offset: int
    size: int
    packing: Packing | None
    unpacked_size: int


def probe(image: ImageFile) -> Found | None:
    """Tell whether this is a bzImage. Raises ImageError when it is and cannot be booted."""
    kernel = parse(image)
    if kernel is None:
        return None
    gpa = PREF_ADDRESS.get(kernel.raw)
    notes = [f"needs 0x{kernel.room:x} bytes from its load address (init_size)"]
    if kernel.relocatable:
        notes.append(f"relocatable, aligned to 0x{KERNEL_ALIGNMENT.get(kernel.raw):x}")
    payload = find_payload(image, kernel)
    if payload is not None:
        packing = payload.packing.name if payload.packing else "something unknown"
        sizes = f"{payload.size} bytes at offset 0x{payload.offset:x}, unpacked {payload.unpacked_size}"
        notes.append(f"compressed with {packing}: {sizes}")
    return Found((_segment(kernel, gpa),), CpuMode.LONG, gpa + ENTRY_64, tuple(notes))


def plan(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Plan:
    """Return the plan to start at the 64-bit entry point with the zero page.

    Raises:
        ImageError: the file is no bzImage with a 64-bit entry point, or it, the initrd or the command line do not fit.
        ValueError: the command line is too long for any kernel here.
    """
    return _plan(image, _demand(image), memory, options)


def _demand(image: ImageFile) -> Kernel:
    kernel = parse(image)
    if kernel is None:
        raise image.error("no bzImage: no HdrS at 0x202", HEADER.offset)
    return kernel


def _plan(image: ImageFile, kernel: Kernel, memory: GuestMemory, options: BootOptions) -> Plan:
    cmdline = linux_cmdline(options)
    limit = CMDLINE_SIZE.get(kernel.raw)
    if len(cmdline) - 1 > limit:
        message = f"command line of {len(cmdline) - 1} bytes{options.shares}: this kernel takes {limit}"
        raise image.error(message, CMDLINE_SIZE.offset)
    ceiling = min(INITRD_ADDR_MAX.get(kernel.raw) + 1, layout.HOLE)
    end, at = kernel.least_end, INITRD_ADDR_MAX.offset
    files = place_files(image, options.files, memory, kernel_end=end, ceiling=ceiling, at=at)
    gpa = _load_address(image, kernel, memory, files)
    strings = Arena(layout.COMMAND_LINES, layout.COMMAND_LINES_SIZE, "command line")
    params = boot_params(kernel, gpa, strings.put(cmdline), files, memory)
    entry = Entry(CpuMode.LONG, gpa + ENTRY_64, {"rsi": layout.BOOT_INFO})
    return Plan((_segment(kernel, gpa),), entry, files, ((layout.BOOT_INFO, params), *strings.tables))


def load(image: ImageFile, memory: GuestMemory, options: BootOptions) -> Entry:
    """Write kernel, initrd and zero page into the guest and return how to start.

    With ``options.unpack`` it is the unpacked kernel, where that can be: the entry's notes say which.

    Raises:
        ImageError, ValueError: as `plan` does; the packed kernel is damaged.
    """
    kernel = _demand(image)
    planned = _plan(image, kernel, memory, options)
    if not options.unpack:
        return planned.carry_out(image, memory)
    from kvmpy.machine.boot import unpack  # with three libraries that no other start needs

    return unpack.load_kernel(image, find_payload(image, kernel), memory, planned)


def parse(image: ImageFile) -> Kernel | None:
    """Return the kernel, or None when the file is no bzImage.

    Raises:
        ImageError: it is one, and is truncated, contradicts itself, or has no 64-bit entry point.
    """
    if HEADER.get(image.head(HEADER_LIMIT)) != HEADER_MAGIC:
        return None
    raw = image.read(0, HEADER_LIMIT)
    _check_protocol(image, raw)
    offset = (1 + (SETUP_SECTS.get(raw) or DEFAULT_SETUP_SECTS)) * SECTOR_SIZE
    image.check_range(0, offset, at=SETUP_SECTS.offset)
    size = SYSSIZE.get(raw) * PARAGRAPH
    image.check_range(offset, size, at=SYSSIZE.offset)
    if size <= ENTRY_64:
        raise image.error(f"kernel of {size} bytes (syssize): its entry is at 0x{ENTRY_64:x}", SYSSIZE.offset)
    alignment = KERNEL_ALIGNMENT.get(raw)
    if RELOCATABLE_KERNEL.get(raw) and (not alignment or alignment & (alignment - 1)):
        raise image.error(f"kernel_alignment 0x{alignment:x} is no power of two", KERNEL_ALIGNMENT.offset)
    return Kernel(raw, offset, size, max(size, INIT_SIZE.get(raw)))


def find_payload(image: ImageFile, kernel: Kernel) -> Payload | None:
    """Return where the packed kernel lies; None when the header names none, or one that leaves the file."""
    start, size = PAYLOAD_OFFSET.get(kernel.raw), PAYLOAD_LENGTH.get(kernel.raw)
    if size < LONGEST_MAGIC or start + size > kernel.size:
        return None
    offset = kernel.offset + start
    unpacked_size = int.from_bytes(image.read(offset + size - 4, 4), "little")
    return Payload(offset, size, recognise(image.read(offset, LONGEST_MAGIC)), unpacked_size)


def version_line(image: ImageFile) -> str:
    """Return what the kernel says of its version, as far as a possibly broken file tells it; often nothing."""
    raw = image.head(HEADER_LIMIT)
    pointer = KERNEL_VERSION.get(raw) if HEADER.get(raw) == HEADER_MAGIC else 0
    at = pointer + SECTOR_SIZE
    # 0: there is no such line.
    line = image.read(at, min(128, image.size - at)) if pointer and at < image.size else b""
    return "".join(chr(byte) for byte in line.partition(b"\0")[0] if 0x20 <= byte < 0x7F)


def version_text(image: ImageFile) -> str:
    """Return `version_line` and the boot protocol."""
    version = VERSION.get(image.head(HEADER_LIMIT))
    line = version_line(image) or "of unknown version"
    return f"{line}, boot protocol {version >> 8}.{version & 0xFF:02}"


def _check_protocol(image: ImageFile, raw: bytes) -> None:
    if BOOT_FLAG.get(raw) != BOOT_FLAG_MAGIC:
        raise image.error(f"boot_flag 0x{BOOT_FLAG.get(raw):x}: 0xaa55 is wanted", BOOT_FLAG.offset)
    version = VERSION.get(raw)
    if version < LEAST_VERSION:
        text = f"boot protocol {version >> 8}.{version & 0xFF:02}{_release(image)}"
        raise image.error(f"{text} has no 64-bit entry: 2.12 (Linux 3.8) or later is wanted", VERSION.offset)
    if not XLOADFLAGS.get(raw) & XLF_KERNEL_64:
        message = f"no 64-bit entry (XLF_KERNEL_64 is not set){_release(image)}: a 64-bit kernel is wanted"
        raise image.error(message, XLOADFLAGS.offset)
    if not LOADFLAGS.get(raw) & LOADED_HIGH:
        raise image.error("a zImage, loaded below 1 MiB: a bzImage is wanted", LOADFLAGS.offset)
    end = _header_end(raw)
    if not HEADER_LEAST_END <= end <= HEADER_LIMIT:
        message = f"setup header ends at 0x{end:x}: 0x{HEADER_LEAST_END:x} to 0x{HEADER_LIMIT:x} are possible"
        raise image.error(message, JUMP_DISTANCE.offset)


def _release(image: ImageFile) -> str:
    words = version_line(image).split(maxsplit=1)
    return f" of Linux {words[0]}" if words else ""


def _header_end(raw: bytes) -> int:
    return HEADER.offset + JUMP_DISTANCE.get(raw)


def _segment(kernel: Kernel, gpa: int) -> Segment:
    # Not `room`: the kernel clears its own bss, and it is large.
    return Segment(gpa, kernel.offset, kernel.size, kernel.size, PREF_ADDRESS.offset)


def _load_address(image: ImageFile, kernel: Kernel, memory: GuestMemory, files: tuple[PlacedFile, ...]) -> int:
    """Return the preferred address, or for a relocatable kernel the lowest aligned one that has room.

    Raises:
        ImageError: there is no room.
    """
    top = files[0].gpa if files else low_ram_end(memory)
    for gpa in kernel.candidates:
        if gpa >= layout.HIGH_MEMORY and gpa + kernel.room <= top:
            return gpa
    places = " or ".join(f"0x{gpa:x}" for gpa in kernel.candidates)
    message = f"no room for {format_size(kernel.room)} (init_size) at {places}: RAM is free from 1 MiB to 0x{top:x}"
    message += f" ({files[0].path})" if files else ""
    ceiling = INITRD_ADDR_MAX.get(kernel.raw) + 1 if files else layout.HOLE
    enough = enough_memory(kernel.least_end, [file.size for file in files], ceiling=ceiling)
    raise image.error(message + enough, PREF_ADDRESS.offset)


def boot_params(kernel: Kernel, gpa: int, cmdline: int, files: tuple[PlacedFile, ...], memory: GuestMemory) -> bytes:
    """Return the zero page: the setup header, what a loader must fill in, and the memory map."""
    params = bytearray(BOOT_PARAMS_SIZE)
    end = _header_end(kernel.raw)
    params[HEADER_START:end] = kernel.raw[HEADER_START:end]
    TYPE_OF_LOADER.set(params, UNDEFINED_LOADER)
    VID_MODE.set(params, NORMAL_VIDEO_MODE)
    CODE32_START.set(params, gpa)
    _set_split(params, CMD_LINE_PTR, EXT_CMD_LINE_PTR, cmdline)
    for initrd in files:
        _set_split(params, RAMDISK_IMAGE, EXT_RAMDISK_IMAGE, initrd.gpa)
        _set_split(params, RAMDISK_SIZE, EXT_RAMDISK_SIZE, initrd.size)
    if read_rsdp(memory):
        ACPI_RSDP_ADDR.set(params, layout.ACPI_TABLES)
    memory_map = layout.memory_map(memory.size)
    E820_ENTRIES.set(params, len(memory_map))
    for i, entry in enumerate(memory_map):
        E820_ENTRY.pack_into(params, E820_TABLE + i * E820_ENTRY.size, *entry)
    return bytes(params)


def _set_split(params: bytearray, low: Field, high: Field, value: int) -> None:
    low.set(params, value & 0xFFFF_FFFF)
    high.set(params, value >> 32)
