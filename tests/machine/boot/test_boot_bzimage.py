"""bzImage: the zero page, the places of kernel and initrd, and headers that lie (boot.rst; hostile case 63)."""

import struct

import pytest
from boot_images import KERNEL_SIZE, SETUP, bzimage, patch

from kvmpy import GiB, ImageError, MiB
from kvmpy.machine import layout
from kvmpy.machine.boot import BootOptions, CpuMode, Module, boot
from kvmpy.machine.memory import GuestMemory

KERNEL = bzimage()[3 * 512 :]
PREFERRED = 0x100_0000


def refused(path: str, memory: GuestMemory, text: str, options: BootOptions | None = None) -> ImageError:
    """Boot, and return the error that must come."""
    with pytest.raises(ImageError, match=text) as caught:
        boot(path, memory, options or BootOptions(format="bzimage"))
    assert caught.value.offset is not None
    return caught.value


def zero_page(memory: GuestMemory, offset: int, size: int) -> int:
    """Return a field of boot_params."""
    return int.from_bytes(memory.read(layout.BOOT_INFO + offset, size), "little")


def test_the_kernel_starts_at_its_64_bit_entry(write, memory):
    """boot.rst, 64-bit boot protocol: start of the kernel plus 0x200, rsi = boot_params."""
    entry = boot(write(bzimage()), memory)
    registers = {"rsi": layout.BOOT_INFO}
    assert (entry.mode, entry.rip, dict(entry.registers)) == (CpuMode.LONG, PREFERRED + 0x200, registers)
    assert memory.read(PREFERRED, KERNEL_SIZE) == KERNEL


def test_the_zero_page_holds_a_copy_of_the_setup_header(write, memory):
    """boot.rst: the header at 0x1f1 is loaded into boot_params and examined; the rest is zero, the sentinel too."""
    image = bzimage()
    boot(write(image), memory)
    page = memory.read(layout.BOOT_INFO, 4096)
    written = [(0x1FA, 2), (0x210, 1), (0x214, 4), (0x218, 4), (0x21C, 4), (0x228, 4)]
    expected = bytearray(image[0x1F1:0x26C])
    for offset, size in written:
        expected[offset - 0x1F1 : offset - 0x1F1 + size] = page[offset : offset + size]
    assert page[0x1F1:0x26C] == expected
    assert page[0x1EF] == 0
    assert not any(page[0x26C:0x2D0])


def test_the_fields_that_a_loader_writes_are_written(write, memory):
    """boot.rst: type_of_loader 0xff (undefined), vid_mode 0xffff (normal), code32_start where the kernel lies."""
    boot(write(bzimage()), memory)
    fields = [zero_page(memory, *field) for field in ((0x210, 1), (0x1FA, 2), (0x214, 4))]
    assert fields == [0xFF, 0xFFFF, PREFERRED]
    assert [zero_page(memory, *field) for field in ((0x218, 4), (0x21C, 4), (0x0C0, 4), (0x0C4, 4), (0x70, 8))] == [
        0
    ] * 5


@pytest.mark.parametrize("size", [64 * MiB, 3 * GiB + 512 * MiB])
def test_the_memory_map_is_e820(write, size):
    """zero-page.rst: e820_entries and e820_table, 20 bytes an entry."""
    with GuestMemory(size) as memory:
        boot(write(bzimage()), memory)
        table = memory.read(layout.BOOT_INFO + 0x2D0, 20 * zero_page(memory, 0x1E8, 1))
        assert list(struct.iter_unpack("<QQI", table)) == layout.memory_map(size)


def test_the_command_line_is_where_cmd_line_ptr_says(write, memory):
    """boot.rst, cmd_line_ptr: NUL-terminated; an empty one is still there."""
    for text in ("console=ttyS0 quiet", ""):
        boot(write(bzimage()), memory, BootOptions(append=text))
        pointer = zero_page(memory, 0x228, 4)
        assert memory.read(pointer, len(text) + 1) == text.encode() + b"\0"


def test_the_root_pointer_of_acpi_is_passed(write, memory):
    """zero-page.rst: acpi_rsdp_addr at 0x70."""
    memory.write(layout.ACPI_TABLES, b"RSD PTR ".ljust(36, b"\0"))
    boot(write(bzimage()), memory)
    assert zero_page(memory, 0x70, 8) == layout.ACPI_TABLES


def test_the_initrd_lies_at_the_top_of_ram(write, memory):
    """boot.rst, ramdisk_image: as high in memory as possible; page-aligned."""
    boot(write(bzimage()), memory, BootOptions(initrd=write(b"r" * 5000, "initrd")))
    gpa, size = zero_page(memory, 0x218, 4), zero_page(memory, 0x21C, 4)
    assert (gpa, size) == (64 * MiB - 0x2000, 5000)
    assert memory.read(gpa, size) == b"r" * 5000


@pytest.mark.parametrize("last", [0x1FF_FFFF, 0x200_0000, 0x200_0FFE, 0x200_0FFF])
def test_the_initrd_respects_initrd_addr_max(write, memory, last):
    """boot.rst, initrd_addr_max: the address of the highest byte that it may occupy."""
    path = write(bzimage(initrd_addr_max=last))
    boot(path, memory, BootOptions(initrd=write(b"r" * 4096, "initrd")))
    assert zero_page(memory, 0x218, 4) == (0x200_0000 if last == 0x200_0FFF else 0x1FF_F000)


def test_the_initrd_stays_below_the_hole(write):
    """RAM above 4 GiB is out of its reach."""
    with GuestMemory(4 * GiB) as memory:
        path = write(bzimage(initrd_addr_max=2**32 - 1))
        boot(path, memory, BootOptions(initrd=write(b"r", "initrd")))
        assert zero_page(memory, 0x218, 4) == 3 * GiB - 0x1000


def test_setup_sects_0_means_4(write, memory):
    """boot.rst, setup_sects: for backwards compatibility a 0 is a 4."""
    image = bzimage(setup_sects=0, syssize=(KERNEL_SIZE - 1024) // 16)
    boot(write(image), memory)
    assert memory.read(PREFERRED, KERNEL_SIZE - 1024) == KERNEL[1024:]


def test_a_kernel_that_does_not_fit_where_it_prefers_moves_when_it_can(write):
    """boot.rst, relocatable_kernel: any address that is a multiple of kernel_alignment."""
    with GuestMemory(8 * MiB) as memory:
        entry = boot(write(bzimage(kernel_version=0)), memory)
        assert entry.rip == 0x20_0200
        assert memory.read(0x20_0000, KERNEL_SIZE) == KERNEL
        assert zero_page(memory, 0x214, 4) == 0x20_0000
        refused(write(bzimage(relocatable_kernel=0)), memory, "no room for 1 MiB")


def test_linux_does_not_run_below_where_it_prefers(write):
    """It moves itself up to there (arch/x86/boot/compressed/head_64.S, LOAD_PHYSICAL_ADDR), whatever is there."""
    with GuestMemory(8 * MiB) as memory:
        refused(write(bzimage()), memory, "no room for 1 MiB")


def test_a_kernel_moves_from_under_its_initrd(write, memory):
    """Never overlapping: the kernel gives way when it can, and is refused when not."""
    options = BootOptions(initrd=write(bytes(48 * MiB), "initrd"))
    assert boot(write(bzimage(kernel_version=0)), memory, options).rip == 0x20_0200
    refused(write(bzimage(relocatable_kernel=0)), memory, "no room", options)


def test_init_size_is_room_and_not_cleared(write, memory, touched):
    """boot.rst, init_size: memory that the kernel needs; it clears its own."""
    boot(write(bzimage(init_size=32 * MiB)), memory)
    assert touched() < 64 * 1024


@pytest.mark.parametrize("keep", [0x206, 0x207, 0x264, 0x28F])
def test_a_truncated_header_is_refused(write, memory, keep):
    """The magic is there and the header is not."""
    refused(write(bzimage()[:keep]), memory, "truncated")


@pytest.mark.parametrize("keep", [0x290, 1024, 1535])
def test_a_file_shorter_than_its_setup_is_refused(write, memory, keep):
    """Case 63: datasz < setupsz (an underflow for the careless)."""
    assert refused(write(bzimage()[:keep]), memory, "truncated").offset == SETUP["setup_sects"][0]


def test_255_setup_sectors_in_a_small_file_are_refused(write, memory):
    """Case 63: setup_sects 255 > file."""
    assert refused(write(bzimage(setup_sects=255)), memory, "truncated").offset == SETUP["setup_sects"][0]


@pytest.mark.parametrize("syssize", [KERNEL_SIZE // 16 + 1, 2**31, 2**32 - 1])
def test_a_kernel_longer_than_the_file_is_refused(write, memory, syssize):
    """A truncated download: syssize is in paragraphs of 16 bytes."""
    assert refused(write(bzimage(syssize=syssize)), memory, "truncated").offset == SETUP["syssize"][0]


@pytest.mark.parametrize("syssize", [0, 1, 32])
def test_a_kernel_that_ends_before_its_entry_is_refused(write, memory, syssize):
    """The entry is 0x200 bytes from its start."""
    refused(write(bzimage(syssize=syssize)), memory, "its entry is at 0x200")


@pytest.mark.parametrize("version", [0x0000, 0x0200, 0x0205, 0x020B])
def test_an_old_boot_protocol_is_refused(write, memory, version):
    """Case 63: protocol < 2.06; the 64-bit entry came with 2.12."""
    error = refused(write(bzimage(version=version)), memory, "has no 64-bit entry")
    assert error.offset == SETUP["version"][0]


@pytest.mark.parametrize("flags", [0, 2, 0xFFFE])
def test_a_kernel_without_a_64_bit_entry_is_refused(write, memory, flags):
    """Case 63: xloadflags without XLF_KERNEL_64."""
    assert refused(write(bzimage(xloadflags=flags)), memory, "no 64-bit entry").offset == SETUP["xloadflags"][0]


def test_a_zimage_is_refused(write, memory):
    """boot.rst, loadflags bit 0, LOADED_HIGH."""
    refused(write(bzimage(loadflags=0)), memory, "a zImage")


@pytest.mark.parametrize("alignment", [0, 3, 0xFFFF_FFFF])
def test_an_alignment_that_is_none_is_refused(write, memory, alignment):
    """Case 63: kernel_alignment 0 or 3. It means nothing when the kernel does not move."""
    path = write(bzimage(kernel_alignment=alignment))
    assert refused(path, memory, "no power of two").offset == SETUP["kernel_alignment"][0]
    fixed = bzimage(kernel_alignment=alignment, relocatable_kernel=0)
    assert boot(write(fixed), memory).rip == PREFERRED + 0x200


@pytest.mark.parametrize("init_size", [64 * MiB, 2**31, 2**32 - 1])
def test_a_huge_init_size_is_refused(write, memory, init_size):
    """Case 63: init_size huge: it must fit in RAM before anything is loaded."""
    refused(write(bzimage(init_size=init_size)), memory, "no room")


@pytest.mark.parametrize("address", [0, 0x9_0000, 0xC_0000, 64 * MiB, 2**32, 2**63, 2**64 - 4096])
def test_a_preferred_address_out_of_ram_is_refused_or_given_up(write, memory, address):
    """Case 63: pref_address out of RAM, or under our tables."""
    refused(write(bzimage(pref_address=address, relocatable_kernel=0)), memory, "no room")
    assert boot(write(bzimage(pref_address=address, kernel_version=0)), memory).rip == 0x20_0200


@pytest.mark.parametrize(
    ("initrd_size", "fields"),
    [
        (0, {"pref_address": 0x9_0000}),
        (0, {"pref_address": 3 * GiB - 0x1000}),
        (0x2000, {"initrd_addr_max": 0x11F_FFFF, "init_size": 0x1F_F000}),
    ],
)
def test_more_memory_is_not_promised_where_it_would_not_do(write, initrd_size, fields):
    """Below 1 MiB and above 3 GiB nothing is loaded, and an initrd keeps its limit, on any machine."""
    options = BootOptions(initrd=write(bytes(initrd_size), "initrd") if initrd_size else None)
    path = write(bzimage(relocatable_kernel=0, **fields))
    for size in (64 * MiB, 4 * GiB):
        with GuestMemory(size) as memory:
            error = refused(path, memory, "no room", options)
            assert "would do" not in str(error)


def test_an_alignment_beyond_ram_is_refused(write, memory):
    """A kernel that may move, but to nowhere."""
    refused(write(bzimage(kernel_alignment=2**31)), memory, "no room")


@pytest.mark.parametrize("limit", [0, 1, 18])
def test_a_command_line_longer_than_cmdline_size_is_refused(write, memory, limit):
    """Case 63: cmdline longer than cmdline_size; a huge cmdline_size clears nothing."""
    path = write(bzimage(cmdline_size=limit))
    error = refused(path, memory, f"this kernel takes {limit}", BootOptions(append="console=ttyS0 quiet"))
    assert error.offset == SETUP["cmdline_size"][0]
    boot(write(bzimage(cmdline_size=19)), memory, BootOptions(append="console=ttyS0 quiet"))


def test_a_huge_cmdline_size_clears_nothing(write, memory, touched):
    """Case 63: cmdline_size is a limit, not a length."""
    boot(write(bzimage(cmdline_size=2**32 - 1)), memory, BootOptions(append="x"))
    assert touched() < 64 * 1024


@pytest.mark.parametrize("last", [0, 0xF_FFFF, 0x10_0FFE])
def test_an_initrd_that_has_no_room_below_initrd_addr_max_is_refused(write, memory, last):
    """Case 63: initrd above initrd_addr_max."""
    options = BootOptions(initrd=write(bytes(4096), "initrd"))
    assert refused(write(bzimage(initrd_addr_max=last)), memory, "do not fit", options).offset == 0x22C


def test_an_initrd_over_the_kernel_is_refused(write, memory):
    """Case 63: initrd over the kernel: no place is left for both."""
    options = BootOptions(initrd=write(bytes(62 * MiB), "initrd"))
    refused(write(bzimage()), memory, "no room", options)


@pytest.mark.parametrize("jump", [0, 0x61, 0x8F, 0xFF])
def test_a_setup_header_of_an_impossible_length_is_refused(write, memory, jump):
    """boot.rst: it ends at 0x202 plus the byte at 0x201; beyond 0x290 it would overwrite other fields."""
    assert refused(write(patch(bzimage(), 0x201, jump, 1)), memory, "setup header ends").offset == 0x201


def test_a_missing_boot_flag_is_refused(write, memory):
    """boot.rst: 0xaa55 at 0x1fe."""
    refused(write(bzimage(boot_flag=0)), memory, "0xaa55 is wanted")


def test_modules_are_refused(write, memory):
    """Linux knows one initrd and no modules."""
    with pytest.raises(ValueError, match="bzImage takes no modules"):
        boot(write(bzimage()), memory, BootOptions(modules=(Module("x"),)))


def test_a_command_line_that_does_not_fit_is_the_callers_mistake(write, memory):
    """64 KiB are set aside."""
    path = write(bzimage(cmdline_size=2**32 - 1))
    with pytest.raises(ValueError, match="command line of 65536 bytes: 65535 are allowed"):
        boot(path, memory, BootOptions(append="x" * 65536))
