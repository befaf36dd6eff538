"""What has no header to speak of: boot sectors and flat images (hostile case 64)."""

import pytest
from boot_images import CODE, bootsector

from kvmpy import ImageError, MiB
from kvmpy.machine.boot import BootOptions, CpuMode, boot
from kvmpy.machine.memory import GuestMemory

FLAT = BootOptions(format="flat")


def test_a_boot_sector_starts_as_a_bios_would_start_it(write, memory):
    """BIOS Boot Specification §6.5.1: at 0:0x7c00 in real mode, dl = the drive."""
    entry = boot(write(bootsector()), memory)
    assert (entry.mode, entry.rip, dict(entry.registers)) == (CpuMode.REAL, 0x7C00, {"rdx": 0x80})
    assert memory.read(0x7C00, 512) == bootsector()


@pytest.mark.parametrize("size", [513, 1024, 0x9FC00 - 0x7C00])
def test_what_follows_the_sector_is_loaded_behind_it(write, memory, size):
    """No BIOS is there to read more: the whole file lies at 0x7c00."""
    image = bootsector().ljust(size, b"\x90")
    boot(write(image), memory)
    assert memory.read(0x7C00, size + 16) == image + bytes(16)


def test_a_boot_sector_in_a_file_that_is_too_long_is_refused(write, memory):
    """It must end below 0x9fc00."""
    with pytest.raises(ImageError, match="622592 fit") as caught:
        boot(write(bootsector().ljust(0x9FC00 - 0x7C00 + 1)), memory)
    assert caught.value.offset == 510


@pytest.mark.parametrize("image", [bootsector()[:511], bootsector()[:510] + b"\x55\xab", bytes(512)])
def test_a_sector_without_its_signature_is_not_one(write, memory, image):
    """Bytes 510 and 511 are 55 AA."""
    with pytest.raises(ImageError, match="no boot sector") as caught:
        boot(write(image), memory, BootOptions(format="bootsector"))
    assert caught.value.offset == 510


@pytest.mark.parametrize(
    ("mode", "address"), [(None, 0x1000), (CpuMode.REAL, 0x1000), (CpuMode.PROTECTED, MiB), (CpuMode.LONG, MiB)]
)
def test_a_flat_image_has_a_default_place_in_each_mode(write, memory, mode, address):
    """0x1000 in real mode, 1 MiB in the others; it starts at its first byte."""
    entry = boot(write(CODE), memory, FLAT._replace(mode=mode))
    assert (entry.mode, entry.rip) == (mode or CpuMode.REAL, address)
    assert memory.read(address, len(CODE)) == CODE


def test_a_flat_image_goes_where_the_user_says(write, memory):
    """Address and entry, page 0 included."""
    assert boot(write(CODE), memory, FLAT._replace(address=0)).rip == 0
    options = FLAT._replace(address=0x20_0000, entry=0x20_0010, mode=CpuMode.LONG)
    assert boot(write(CODE), memory, options).rip == 0x20_0010
    assert memory.read(0x20_0000, len(CODE)) == CODE


def test_an_empty_flat_image_is_refused(write, memory):
    """Case 64: empty."""
    with pytest.raises(ImageError, match="empty"):
        boot(write(b""), memory, FLAT)


def test_a_flat_image_may_end_exactly_at_the_end_of_ram(write):
    """Case 64: ends exactly at RAM; one byte more does not."""
    with GuestMemory(2 * MiB) as memory:
        options = FLAT._replace(mode=CpuMode.PROTECTED)
        assert boot(write(bytes(MiB - 1) + b"\xf4"), memory, options).rip == MiB
        assert memory.read(2 * MiB - 1, 1) == b"\xf4"
        with pytest.raises(ImageError, match="outside 2 MiB"):
            boot(write(bytes(MiB + 1)), memory, options)


def test_a_flat_image_larger_than_ram_is_refused_unread(write, memory, touched):
    """Case 64: larger than RAM; here by much, in a sparse file."""
    path = write(CODE)
    with open(path, "r+b") as file:
        file.truncate(2**42)
    with pytest.raises(ImageError, match="outside 64 MiB"):
        boot(path, memory, FLAT._replace(mode=CpuMode.LONG))
    assert touched() == 0


@pytest.mark.parametrize("address", [0x9FC00 - 63, 0x9FC00, 0xF_FFFF])
def test_a_flat_image_over_our_tables_is_refused(write, memory, address):
    """0x9fc00 to 1 MiB is ours."""
    with pytest.raises(ImageError, match="kept for boot tables"):
        boot(write(CODE), memory, FLAT._replace(address=address, mode=CpuMode.LONG))


def test_a_flat_image_may_end_at_our_tables(write, memory):
    """Everything below 0x9fc00 is free."""
    image = bytes(0x9FC00 - 0x1000)
    assert boot(write(image), memory, FLAT).rip == 0x1000


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"entry": 0xFFF}, "outside the image at 0x1000..0x103f"),
        ({"entry": 0x1040}, "outside the image"),
        ({"address": 0x1_0000}, "real mode starts below 0x10000"),
        ({"address": 2**32, "mode": CpuMode.LONG}, "long mode starts below 0x100000000"),
        ({"address": -1}, "0 or more"),
    ],
)
def test_an_entry_that_cannot_be_is_the_callers_mistake(write, memory, options, text):
    """The file says nothing: whoever typed the option is to blame."""
    with pytest.raises(ValueError, match=text):
        boot(write(CODE), memory, FLAT._replace(**options))
