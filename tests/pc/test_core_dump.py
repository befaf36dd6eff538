"""The ELF core of a guest: read by gdb and by pyelftools, sparse, and all or nothing."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from kvmpy import GiB, KvmError, MiB
from kvmpy.machine.memory import GuestMemory
from kvmpy.pc import Pc
from kvmpy.pc.core_dump import populated, write_core
from kvmpy.units import PAGE_SIZE

REGISTERS = """
    movq $0x1122334455667788, %rbx
    movl $0x600d, %r15d
    movl $0xdeadbeef, 0x3f0000
    xorb %al, %al ; outb %al, $0xf4
    hlt
"""


@pytest.fixture
def ended(make_pc: Callable[..., Pc]) -> Callable[..., Pc]:
    """Return a function that makes a PC and runs it to its end."""

    def ended(text: str = REGISTERS, **options: object) -> Pc:
        pc = make_pc(text, "long", **options)
        pc.run(timeout=10)
        return pc

    return ended


@pytest.mark.kvm
def test_gdb_reads_registers_and_memory(ended: Callable[..., Pc], tmp_path: Path) -> None:
    if shutil.which("gdb") is None:
        pytest.skip("gdb is not installed")
    pc = ended()
    write_core(pc, str(tmp_path / "core"))
    shown = gdb(tmp_path / "core", "info registers", "x/4xb 0x100000", "x/1xw 0x3f0000")
    assert "rbx            0x1122334455667788" in shown
    assert "r15            0x600d" in shown
    code = pc.memory.read(0x10_0000, 4)
    assert "0x100000:\t" + "\t".join(f"0x{byte:02x}" for byte in code) in shown
    assert "0x3f0000:\t0xdeadbeef" in shown


@pytest.mark.kvm
def test_gdb_sees_a_thread_for_each_vcpu(ended: Callable[..., Pc], tmp_path: Path) -> None:
    if shutil.which("gdb") is None:
        pytest.skip("gdb is not installed")
    write_core(ended(cores=3), str(tmp_path / "core"))
    shown = gdb(tmp_path / "core", "info threads")
    assert [f"LWP {number}" in shown for number in (1, 2, 3, 4)] == [True, True, True, False]


def gdb(core: Path, *commands: str) -> str:
    arguments = [argument for command in (f"target core {core}", *commands) for argument in ("-ex", command)]
    done = subprocess.run(["gdb", "-nx", "-batch", *arguments], capture_output=True, text=True, timeout=60)
    return done.stdout


@pytest.mark.kvm
def test_each_region_is_a_segment_at_its_gpa(ended: Callable[..., Pc], tmp_path: Path) -> None:
    """ELF gABI: p_vaddr and p_paddr are where the segment lies; here both are guest physical."""
    pc = ended(memory=3 * GiB + 512 * MiB)
    pc.memory.write(4 * GiB + 5 * PAGE_SIZE, b"high")
    write_core(pc, str(tmp_path / "core"))
    with (tmp_path / "core").open("rb") as file:
        elf = ELFFile(file)
        assert (elf["e_type"], elf["e_machine"]) == ("ET_CORE", "EM_X86_64")
        loads = [segment.header for segment in elf.iter_segments("PT_LOAD")]
        assert [(load.p_vaddr, load.p_paddr, load.p_memsz) for load in loads] == [
            (0, 0, 3 * GiB),
            (4 * GiB, 4 * GiB, 512 * MiB),
        ]
        assert all(load.p_filesz == load.p_memsz and load.p_offset % PAGE_SIZE == 0 for load in loads)
        file.seek(loads[1].p_offset + 5 * PAGE_SIZE)
        assert file.read(4) == b"high"
        file.seek(loads[0].p_offset + 0x3F_0000)
        assert file.read(4) == (0xDEADBEEF).to_bytes(4, "little")


@pytest.mark.kvm
def test_the_notes_are_threads_with_their_registers(ended: Callable[..., Pc], tmp_path: Path) -> None:
    """<sys/procfs.h>: 336 bytes, registers from 112 on in the order of struct user_regs_struct: r15 first, rbx 6th."""
    write_core(ended(cores=2), str(tmp_path / "core"))
    with (tmp_path / "core").open("rb") as file:
        (segment,) = ELFFile(file).iter_segments("PT_NOTE")
        notes = list(segment.iter_notes())
    assert [(note["n_name"], note["n_type"], note["n_descsz"]) for note in notes] == [("CORE", "NT_PRSTATUS", 336)] * 2
    status = notes[0]["n_descdata"]
    assert [int.from_bytes(status[112 + 8 * i :][:8], "little") for i in (0, 5)] == [0x600D, 0x1122334455667788]
    assert [int.from_bytes(note["n_descdata"][32:36], "little") for note in notes] == [1, 2]


@pytest.mark.kvm
@pytest.mark.parametrize("hugepages", [False, True])
def test_a_core_takes_no_more_disk_than_the_guest_touched(
    ended: Callable[..., Pc], tmp_path: Path, hugepages: bool
) -> None:
    pc = ended(memory=1 * GiB, hugepages=hugepages)
    write_core(pc, str(tmp_path / "core"))
    found = (tmp_path / "core").stat()
    assert found.st_size > 1 * GiB
    assert found.st_blocks * 512 < 1 * MiB


@pytest.mark.kvm
def test_a_core_replaces_the_one_before_and_is_the_owners_alone(ended: Callable[..., Pc], tmp_path: Path) -> None:
    (tmp_path / "core").write_bytes(b"old")
    write_core(ended(), str(tmp_path / "core"))
    assert (tmp_path / "core").read_bytes()[:4] == b"\x7fELF"
    assert (tmp_path / "core").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["core", "guest0.bin"]


@pytest.mark.kvm
def test_a_full_disk_leaves_what_was_there(ended: Callable[..., Pc], tmp_path: Path) -> None:
    pc = ended()
    (tmp_path / "core").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            write_core(pc, str(tmp_path / "core"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not isinstance(refused.value, KvmError)
    assert refused.value.filename == str(tmp_path / "core")
    assert (tmp_path / "core").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["core", "guest0.bin"]


@pytest.mark.kvm
def test_a_core_does_not_replace_a_device(ended: Callable[..., Pc], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="no regular file"):
        write_core(ended(), str(tmp_path / "fifo"))


def test_only_what_was_touched_is_populated() -> None:
    with GuestMemory(4 * GiB) as memory:
        memory.write(3 * MiB, b"low")
        memory.write(4 * GiB + 7 * PAGE_SIZE, b"high")
        low, high = memory.regions
        assert [offset <= 3 * MiB < offset + size for offset, size in populated(memory, low)] == [True]
        assert list(populated(memory, high)) == [(7 * PAGE_SIZE, PAGE_SIZE)]
        assert sum(size for _, size in populated(memory, low)) < 4 * MiB
