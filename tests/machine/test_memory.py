"""Guest memory: any size, a hole below 4 GiB, nothing populated before it is touched, no byte outside reached."""

import gc
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from guest_code import assemble, set_up
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmpy import GiB, GuestMemory, ImageError, KiB, Kvm, MiB
from kvmpy.errors import GuestMemoryError
from kvmpy.kvm import Hlt, MmioRead, MmioWrite, Vm
from kvmpy.machine import x86
from kvmpy.machine.layout import HOLE, HOLE_END

BIG = 3 * GiB + 512 * MiB


def populated(memory: GuestMemory) -> int:
    """Return how many bytes the host has given so far."""
    return os.fstat(memory.fd).st_blocks * 512


@pytest.fixture(scope="module")
def big():
    """3.5 GiB: a hole, and half a GiB above it."""
    with GuestMemory(BIG) as big:
        yield big


@pytest.mark.parametrize("size", [0, -MiB, 4 * KiB, MiB - 4 * KiB, MiB + 1, 2 * MiB - 1, 1 << 70])
def test_size_out_of_range_is_refused(size: int) -> None:
    with pytest.raises((ValueError, OverflowError, OSError)):
        GuestMemory(size)


def test_size_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"memory of 4097 bytes: allowed is a multiple of 4096 from 1 MiB"):
        GuestMemory(4097)


def test_mapping_that_the_host_refuses_leaves_no_descriptor() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"\[Errno"):
        GuestMemory(1 << 62)
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("size", [MiB, MiB + 4 * KiB, 64 * MiB, HOLE, HOLE + 4 * KiB, BIG, 16 * GiB])
def test_ram_lies_below_the_hole_and_above_it(size: int) -> None:
    """layout.py: RAM up to 3 GiB, the rest from 4 GiB; both ends are RAM, the byte behind each is not."""
    with GuestMemory(size) as memory:
        assert sum(region.size for region in memory.regions) == size
        for region in memory.regions:
            assert memory.contains(region.gpa, region.size)
            assert not memory.contains(region.gpa + region.size, 1)
            assert not memory.contains(region.gpa + region.size - 1, 2)
            assert region.hva == memory.regions[0].hva + region.offset - memory.regions[0].offset
        assert [region.gpa for region in memory.regions] == ([0] if size <= HOLE else [0, HOLE_END])
        assert memory.size == size


def test_nothing_is_populated_before_it_is_touched(big: GuestMemory) -> None:
    big.write(HOLE_END + 256 * MiB, b"x")
    assert big.read(HOLE_END + 256 * MiB, 2) == b"x\0"
    assert populated(big) < 1 * MiB


def test_memory_is_a_memfd_that_others_can_map(big: GuestMemory) -> None:
    """It can be snapshotted and cloned: what a region says of its offset is true of the file."""
    for region in big.regions:
        big.write(region.gpa + 0x5000, b"in the file")
        assert os.pread(big.fd, 11, region.offset + 0x5000) == b"in the file"
    assert os.readlink(f"/proc/self/fd/{big.fd}").startswith("/memfd:kvmpy-ram")
    assert big.backing == "memfd"


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (HOLE - 1, 2),
        (HOLE, 1),
        (HOLE_END - 1, 1),
        (HOLE_END - 1, 2),
        (0, HOLE + 1),
        (HOLE_END + 512 * MiB, 1),
        (HOLE_END + 512 * MiB - 1, 2),
        (-1, 1),
        (-1, 2),
        (0, -1),
        (5, 1 << 64),
        ((1 << 64) - 1, 2),
        (1 << 64, 1),
    ],
)
def test_access_that_is_not_all_ram_is_refused(big: GuestMemory, gpa: int, size: int) -> None:
    """Address and size are checked together: an access at the hole's edge, or that wraps, reads nothing."""
    for access in (big.read, big.view, big.fill, big.region_at):
        with pytest.raises(GuestMemoryError) as caught:
            access(gpa, size)
        assert (caught.value.gpa, caught.value.size) == (gpa, size)
    assert not big.contains(gpa, size)


def test_refusal_names_gpa_size_and_what_is_there() -> None:
    """As in ``gpa 0x100000000+512 is outside 64 MiB``."""
    with GuestMemory(64 * MiB) as memory, pytest.raises(GuestMemoryError, match=r"^gpa 0x100000000\+512 is outside 64"):
        memory.read(4 * GiB, 512)


def test_write_that_does_not_fit_writes_nothing(big: GuestMemory) -> None:
    big.write(HOLE - 4, b"keep")
    with pytest.raises(GuestMemoryError):
        big.write(HOLE - 4, b"too long")
    assert big.read(HOLE - 4, 4) == b"keep"


def test_empty_access_is_allowed_at_the_very_end(big: GuestMemory) -> None:
    assert big.read(HOLE, 0) == b""
    big.write(HOLE, b"")
    big.fill(HOLE, 0)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_memory_is_what_was_written_last(big: GuestMemory, data: st.DataObject) -> None:
    """Any accesses near the edges: what is RAM holds what was written, what is not RAM is refused."""
    edges = st.sampled_from([0, HOLE, HOLE_END, HOLE_END + 512 * MiB])
    gpa = max(0, data.draw(edges) + data.draw(st.integers(-64, 64)))
    text = data.draw(st.binary(max_size=100))
    end = gpa + len(text)
    is_ram = end <= HOLE or (gpa >= HOLE_END and end <= HOLE_END + 512 * MiB)
    assert big.contains(gpa, len(text)) is is_ram
    if not is_ram:
        with pytest.raises(GuestMemoryError):
            big.write(gpa, text)
        return
    big.write(gpa, text)
    assert big.read(gpa, len(text)) == text
    fill = data.draw(st.integers(0, 255))
    big.fill(gpa, len(text), fill)
    assert big.read(gpa, len(text)) == bytes([fill]) * len(text)


def test_view_is_live(big: GuestMemory) -> None:
    with big.view(0x1000, 4) as view:
        big.write(0x1000, b"abcd")
        assert bytes(view) == b"abcd"
        view[:] = b"efgh"
    assert big.read(0x1000, 4) == b"efgh"


def test_populate_backs_all_of_it() -> None:
    with GuestMemory(4 * MiB) as memory:
        memory.populate()
        assert populated(memory) == 4 * MiB
        memory.lock()


def test_close_twice_is_harmless_and_ends_access() -> None:
    memory = GuestMemory(1 * MiB)
    memory.close()
    memory.close()
    with pytest.raises(ValueError, match="released"):
        memory.read(0, 1)


# --- files ------------------------------------------------------------------------------------------------------


def test_load_reads_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(range(256)) * 16)
    with GuestMemory(1 * MiB) as memory:
        assert memory.load(tmp_path / "image", gpa=1 * MiB - 4096) == 4096
        assert memory.read(1 * MiB - 4096, 4096) == bytes(range(256)) * 16


@pytest.mark.parametrize("gpa", [1 * MiB - 4095, 1 * MiB, 4 * GiB, -1])
def test_load_of_what_does_not_fit_is_refused(tmp_path: Path, gpa: int) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 4096)
    with GuestMemory(1 * MiB) as memory, pytest.raises(ImageError, match=re.escape(f"{path}: gpa 0x")):
        memory.load(path, gpa=gpa)


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "/dev/zero"])
def test_load_of_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    """A FIFO, a folder, /dev/zero: never read to the end."""
    path = Path(kind) if kind.startswith("/") else tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    expected = "No such file" if kind == "missing" else "not a regular file"
    with GuestMemory(1 * MiB) as memory, pytest.raises(ImageError, match=f"^{path}: {expected}"):
        memory.load(path, gpa=0)


def test_load_of_a_huge_file_does_not_read_it(tmp_path: Path) -> None:
    """A file of 4 TiB (all holes) is refused by its size."""
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(4 << 40)
    with GuestMemory(1 * MiB) as memory, pytest.raises(ImageError, match="outside 1 MiB"):
        memory.load(path, gpa=0)


# --- in a guest -------------------------------------------------------------------------------------------------


@pytest.mark.kvm
def test_guest_of_3_5_gib_costs_what_it_touches(kvm: Kvm) -> None:
    """One word below the hole, one at its other side, one in it: two pages of RAM, and an exit."""
    code = f"""
        movl ${HOLE - 8}, %edi
        movl $0x11223344, (%rdi)
        movl $5, 16(%rdi)                       # in the hole
        hlt
    """
    with GuestMemory(BIG) as memory, kvm.create_vm() as vm:
        memory.map_into(vm)
        vcpu = vm.create_vcpu(0)
        set_up(vcpu, memory, assemble(code, "long"), "long")
        assert vcpu.next_exit() == MmioWrite(HOLE + 8, b"\x05\0\0\0")
        assert vcpu.next_exit() == Hlt()
        assert memory.read(HOLE - 8, 4) == b"\x44\x33\x22\x11"
        assert populated(memory) < 1 * MiB


@pytest.mark.kvm
def test_guest_reaches_ram_above_4_gib(kvm: Kvm) -> None:
    """The boot tables map 4 GiB; a fifth page directory, in the guest's own hands, maps the rest."""
    code = f"""
        movl $0x81 | 2, 0x9000                  # a page directory at 0x9000: its first 2 MiB are gpa 4 GiB
        movl $1, 0x9004
        movl $0x9003, {0xC_9000 + 4 * 8}
        movq %cr3, %rax
        movq %rax, %cr3
        movq ${HOLE_END + 0x1234}, %rdi
        movl (%rdi), %eax
        incl %eax
        movl %eax, (%rdi)
        hlt
    """
    with GuestMemory(BIG) as memory, kvm.create_vm() as vm:
        memory.map_into(vm)
        memory.write(HOLE_END + 0x1234, (41).to_bytes(4, "little"))
        vcpu = vm.create_vcpu(0)
        set_up(vcpu, memory, assemble(code, "long"), "long")
        assert vcpu.next_exit() == Hlt()
        assert memory.read(HOLE_END + 0x1234, 4) == (42).to_bytes(4, "little")


def with_user_pages(tables: bytes) -> bytes:
    """Return page tables whose entries also allow CPL 3."""
    entries = (int.from_bytes(tables[i : i + 8], "little") for i in range(0, len(tables), 8))
    return b"".join((entry | x86.USER if entry else 0).to_bytes(8, "little") for entry in entries)


@pytest.mark.kvm
def test_hugepages_become_2_mib_pages_of_the_guest(vm: Vm) -> None:
    """KVM's statistic pages_2m counts them. The guest runs at CPL 3: a page is mapped when code really uses it."""
    code = "movl $0x200000, %edi\n 1: movb $1, (%rdi)\n addl $4096, %edi\n cmpl $0x2000000, %edi\n jb 1b\n" + (
        "movl $0xd0000000, %edi\n movl (%rdi), %eax"
    )
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    if "[never]" in modes:
        pytest.skip("this host gives no transparent huge pages")
    with GuestMemory(32 * MiB, hugepages=True) as memory:
        assert memory.backing.endswith(", 2 MiB pages")
        assert all(region.hva % (2 * MiB) == region.gpa % (2 * MiB) for region in memory.regions)
        memory.populate()
        memory.map_into(vm)
        vcpu = vm.create_vcpu(0)
        set_up(vcpu, memory, assemble(code, "long"), "long")
        memory.write(0xC_8000, with_user_pages(x86.page_tables(0xC_8000)))
        with vcpu.edit_sregs() as sregs:
            for register, selector in ((sregs.cs, 0x33), (sregs.ss, 0x2B)):
                register.dpl, register.selector = 3, selector
        assert isinstance(vcpu.next_exit(), MmioRead)
        assert vm.get_stats()["pages_2m"] > 0
        vm.close()


@pytest.mark.parametrize("hugepages", [False, True])
def test_all_of_the_memory_is_there(hugepages: bool, make_memory: Callable[..., GuestMemory]) -> None:
    memory = make_memory(4 * MiB, hugepages=hugepages)
    memory.write(0, b"first")
    memory.write(4 * MiB - 4, b"last")
    assert (memory.read(0, 5), memory.read(4 * MiB - 4, 4)) == (b"first", b"last")


@pytest.fixture
def make_memory():
    made: list[GuestMemory] = []

    def make(size: int, **options: bool) -> GuestMemory:
        made.append(GuestMemory(size, **options))
        return made[-1]

    yield make
    for memory in made:
        memory.close()


def test_memory_that_nobody_closes_leaves_no_descriptor_behind() -> None:
    """A memfd keeps its pages as long as it is open."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        GuestMemory(1 * MiB).write(0, b"x")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
