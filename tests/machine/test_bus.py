"""The bus: every access reaches the device that owns it, whole or byte by byte; what nobody owns reads as ones."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy.machine.bus import Bus, Mode

SIZE = 64


class Bytes:
    """A device that is memory, and writes down how it was reached."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.seen: list[tuple[str, int, int]] = []

    def read(self, offset: int, size: int) -> bytes:
        self.seen.append(("read", offset, size))
        return bytes(self.data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        self.seen.append(("write", offset, len(data)))
        self.data[offset : offset + len(data)] = data


@pytest.fixture
def bus() -> Bus:
    return Bus("test", SIZE)


def test_access_arrives_with_its_offset_and_size(bus: Bus) -> None:
    device = Bytes(8)
    attached = bus.attach(16, 8, device, name="one")
    bus.write(18, b"abcd")
    assert bus.read(18, 4) == b"abcd"
    assert device.seen == [("write", 2, 4), ("read", 2, 4)]
    assert (attached.reads, attached.writes) == (1, 1)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_nobody_reads_as_all_ones_and_is_counted(bus: Bus, size: int) -> None:
    assert bus.read(3, size) == b"\xff" * size
    bus.write(3, bytes(size))
    assert (bus.unmapped_reads, bus.unmapped_writes) == (1, 1)


def test_access_across_two_devices_is_split(bus: Bus) -> None:
    """Each byte goes to its owner, also to nobody."""
    low, high = Bytes(2), Bytes(1)
    bus.attach(10, 2, low, name="low")
    bus.attach(12, 1, high, name="high")
    bus.write(11, b"abcd")
    assert (low.data, high.data) == (b"\0a", b"b")
    assert bus.unmapped_writes == 2
    assert bus.read(9, 8) == b"\xff\0ab\xff\xff\xff\xff"
    assert bus.unmapped_reads == 5


def test_access_that_leaves_the_bus_is_split_too(bus: Bus) -> None:
    """A port access at 0xffff of four bytes: the first byte is somebody's, the rest nobody's."""
    device = Bytes(1)
    bus.attach(SIZE - 1, 1, device, name="last")
    bus.write(SIZE - 1, b"abcd")
    assert (device.data, bus.unmapped_writes) == (b"a", 3)
    assert bus.read(SIZE - 1, 2) == b"a\xff"


@pytest.mark.parametrize(("base", "size"), [(0, 0), (0, -1), (-1, 2), (SIZE - 1, 2), (SIZE, 1), (0, SIZE + 1)])
def test_range_outside_the_bus_is_refused(bus: Bus, base: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"new: 0x-?[0-9a-f]+\+-?\d+ is outside the test bus \(0x40 bytes\)"):
        bus.attach(base, size, Bytes(8), name="new")
    assert list(bus) == []


@pytest.mark.parametrize(("base", "size"), [(16, 8), (15, 2), (23, 1), (20, 1), (0, 64)])
def test_overlap_is_refused_and_names_both(bus: Bus, base: int, size: int) -> None:
    """Overlapping device ranges are refused when attached."""
    bus.attach(16, 8, Bytes(8), name="old")
    with pytest.raises(ValueError, match=rf"^new: 0x{base:x}\+{size} overlaps old at 0x10\+8$"):
        bus.attach(base, size, Bytes(8), name="new")
    assert [owner.name for owner in bus] == ["old"]


def test_ranges_are_in_order_however_they_came(bus: Bus) -> None:
    for base in (32, 0, 48, 16):
        bus.attach(base, 1, Bytes(1), name=str(base), mode=Mode.PYTHON)
    assert [owner.name for owner in bus] == ["0", "16", "32", "48"]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_bus_is_what_a_plain_model_says(data: st.DataObject) -> None:
    """Any ranges, any accesses: the bytes are those of a flat array, all ones where nobody is."""
    bus, model, owned = Bus("test", SIZE), bytearray(b"\xff" * (SIZE + 8)), [False] * (SIZE + 8)
    for _ in range(data.draw(st.integers(0, 6))):
        base, size = data.draw(st.integers(0, SIZE - 1)), data.draw(st.integers(1, 12))
        if base + size > SIZE or any(owned[base : base + size]):
            with pytest.raises(ValueError, match=r"overlaps|outside"):
                bus.attach(base, size, Bytes(size), name="refused")
            continue
        bus.attach(base, size, Bytes(size), name=str(base))
        model[base : base + size] = bytes(size)
        owned[base : base + size] = [True] * size
    for _ in range(data.draw(st.integers(1, 20))):
        address, size = data.draw(st.integers(0, SIZE - 1)), data.draw(st.sampled_from([1, 2, 4, 8]))
        if data.draw(st.booleans()):
            text = data.draw(st.binary(min_size=size, max_size=size))
            bus.write(address, text)
            for i, byte in enumerate(text, address):
                model[i] = byte if owned[i] else 0xFF
        assert bus.read(address, size) == model[address : address + size]
