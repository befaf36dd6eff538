"""The XSAVE family, XGETBV, XSETBV, RDPKRU and WRPKRU on vCPUs: KVM's state in, KVM's state out, faults, memory."""

import random
import struct
from collections.abc import Iterator

import pytest
from assist_guest import COMPONENTS, NUMBERS, AssistedBench, assemble, complete, enable, fault_of

from kvmpy._shim import ffi, lib
from kvmpy.kvm import Vcpu
from kvmpy.kvm.cpuid_entry import CpuidEntry
from kvmpy.machine.assist import xsave, xstate
from kvmpy.machine.assist.context import GP, NM, PF, UD, Context, Refused
from kvmpy.machine.assist.native import host_features
from kvmpy.machine.assist.xsave import CR4_OSXSAVE, CR4_PKE, IA32_XSS
from kvmpy.machine.assist.xstate import COMPACTED, EXTENDED, HEADER, SSE, X87, Component
from kvmpy.machine.probe import tables
from kvmpy.machine.probe.bench import Done, Mode, Trap
from kvmpy.units import PAGE_SIZE, MiB

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif("xsave" not in host_features(), reason="this processor has no XSAVE"),
]

AREA = 0x18000
PAGE, FIRST, SECOND = 8 * MiB, 0x1A000, 0x1B000
PRESENT, WRITABLE = 1, 2
SAVES = {
    "xsave": 0,
    "xsave64": 0,
    "xsaveopt": 0,
    "xsaveopt64": 0,
    "xsavec": 1,
    "xsavec64": 1,
    "xsaves": 1,
    "xsaves64": 1,
}
"""1: in the compacted format."""
RESTORES = ("xrstor", "xrstor64", "xrstors", "xrstors64")
ALL = (*SAVES, *RESTORES)


@pytest.fixture
def vcpu(bench: AssistedBench) -> Iterator[Vcpu]:
    with bench.start(b"") as made:
        enable(made)
        yield made


def image_of(vcpu: Vcpu) -> bytes:
    return bytes(ffi.buffer(vcpu.get_state("XSAVE")))


def set_image(vcpu: Vcpu, image: bytes) -> None:
    state = ffi.new("struct kvm_xsave *")
    ffi.buffer(state)[:] = image
    vcpu.set_state("XSAVE", state)


def random_image(seed: int, vcpu: Vcpu, bitmap: int = COMPONENTS) -> bytes:
    """Return a state that a processor may be in; components out of ``bitmap`` are in their initial state."""
    draw, image = random.Random(seed), bytearray(4096)
    struct.pack_into("<HHBBHQQ", image, 0, 0x37F, 0x3800, 0xFF, 0, 0x123, 0x1234_5678_9ABC, 0x4321_8765_CBA9)
    struct.pack_into("<II", image, 24, 0x1FA0, 0xFFFF)
    image[32:160] = b"".join(draw.randbytes(10) + bytes(6) for _ in range(8))
    image[160:416] = draw.randbytes(256)
    for component in xsave._layout(context_of(vcpu)).values():
        image[component.offset : component.offset + component.size] = draw.randbytes(component.size)
    struct.pack_into("<Q", image, HEADER, bitmap)
    return bytes(image)


def context_of(vcpu: Vcpu) -> Context:
    context = Context.__new__(Context)
    context.vcpu = vcpu
    return context


# --- what a program does at CPL 3, a kernel does at CPL 0 ---------------------------------------------------------


# SSE is always in use: a hypervisor may have used a register before the guest's program runs.
@pytest.mark.parametrize("bitmap", [COMPONENTS, SSE, X87 | SSE, COMPONENTS & ~X87])
@pytest.mark.parametrize("code", ["xsave64", "xsaveopt64", "xsavec64", "xsave", "xsavec"])
def test_kernel_saves_what_a_program_saves(bench: AssistedBench, code: str, bitmap: int) -> None:
    """The same state, by the processor itself at CPL 3 and by whatever executes CPL 0: every byte of the area."""
    areas = []
    for mode in (Mode.CPL3, Mode.CPL0):
        bench.memory.write(AREA, random.Random(1).randbytes(4096))
        with bench.start(assemble(f"xor %edx, %edx; {code} (%rdi)"), mode, rax=COMPONENTS, rdi=AREA) as vcpu:
            enable(vcpu)
            set_image(vcpu, random_image(7, vcpu, bitmap))
            assert isinstance(bench.finish(vcpu), Done)
        areas.append(bench.memory.read(AREA, 4096))
    assert areas[0] == areas[1]


@pytest.mark.parametrize("bitmap", [COMPONENTS, X87, SSE, COMPONENTS & ~SSE, 0])
@pytest.mark.parametrize("compacted", [0, COMPACTED | COMPONENTS])
@pytest.mark.parametrize("code", ["xrstor64", "xrstor"])
def test_kernel_restores_what_a_program_restores(bench: AssistedBench, code: str, compacted: int, bitmap: int) -> None:
    """As above: the state afterwards, as XSAVE at CPL 3 gives it."""
    areas = []
    for mode in (Mode.CPL3, Mode.CPL0):
        with bench.start(assemble(f"xor %edx, %edx; {code} (%rdi)"), mode, rax=COMPONENTS, rdi=AREA) as vcpu:
            enable(vcpu)
            set_image(vcpu, random_image(7, vcpu))
            area = bytearray(random_image(8, vcpu, bitmap))
            struct.pack_into("<Q", area, HEADER + 8, compacted)
            bench.memory.write(AREA, bytes(area))
            assert isinstance(bench.finish(vcpu), Done)
            image = image_of(vcpu)
        with bench.start(assemble("xor %edx, %edx; xsave64 (%rdi)"), Mode.CPL3, rax=COMPONENTS, rdi=AREA) as vcpu:
            enable(vcpu)
            set_image(vcpu, image)
            assert isinstance(bench.finish(vcpu), Done)
        areas.append(bench.memory.read(AREA, 4096))
    assert areas[0] == areas[1]


@pytest.mark.parametrize(
    ("save", "restore"), [("xsaves64", "xrstors64"), ("xsavec64", "xrstor64"), ("xsave", "xrstor")]
)
def test_two_states_take_turns(bench: AssistedBench, vcpu: Vcpu, save: str, restore: str) -> None:
    """A context switch there and back, without a pointer lost where REX.W has all of it."""
    images = [random_image(seed, vcpu) for seed in (1, 2)]
    set_image(vcpu, images[0])
    registers = {"rax": COMPONENTS, "rdi": AREA}
    bench.memory.write(AREA, bytes(4096))
    assert complete(xsave.find, bench.context(vcpu, f"{save} (%rdi)", **registers)) is None
    set_image(vcpu, images[1])
    assert complete(xsave.find, bench.context(vcpu, f"{restore} (%rdi)", **registers)) is None
    expected = bytearray(images[0])
    if save == "xsave":
        expected[12:16] = expected[20:24] = bytes(4)
    assert image_of(vcpu)[:HEADER] != images[1][:HEADER]
    assert image_of(vcpu)[: HEADER - 48] == expected[: HEADER - 48]
    assert image_of(vcpu)[EXTENDED:] == expected[EXTENDED:]


def test_xsaves_writes_what_xsavec_writes(bench: AssistedBench, vcpu: Vcpu) -> None:
    """SDM vol. 1 §13.11: with IA32_XSS = 0 and nothing optimized, the two are one."""
    areas = []
    set_image(vcpu, random_image(3, vcpu, COMPONENTS & ~X87))
    for code in ("xsaves64", "xsavec64"):
        bench.memory.write(AREA, random.Random(2).randbytes(4096))
        assert complete(xsave.find, bench.context(vcpu, f"{code} (%rdi)", rax=0xFF, rdx=5, rdi=AREA)) is None
        areas.append(bench.memory.read(AREA, 4096))
    assert areas[0] == areas[1]
    assert struct.unpack_from("<2Q", areas[0], HEADER) == (COMPONENTS & ~X87, COMPACTED | COMPONENTS)


# --- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ALL)
def test_faults_before_memory(bench: AssistedBench, vcpu: Vcpu, code: str) -> None:
    """SDM vol. 2, exceptions of each: #UD, #NM, #GP(0) for alignment and, of the S forms, for CPL."""
    bench.memory.write(AREA, bytes(4096))
    text = f"{code} (%rdi)"

    def fault(cr4: int = CR4_OSXSAVE, cr0: int = 0, cpl: int = 0, rdi: int = AREA) -> tuple[int, int | None] | None:
        context = bench.context(vcpu, text, cpl=cpl, rax=3, rdi=rdi)
        context.sregs.cr4, context.sregs.cr0 = context.sregs.cr4 & ~CR4_OSXSAVE | cr4, context.sregs.cr0 | cr0
        return fault_of(xsave.find, context)

    supervisor = code.removesuffix("64").endswith("s")
    if code in ("xrstors", "xrstors64"):
        bench.memory.write(AREA + HEADER, struct.pack("<QQ", 0, COMPACTED))
    assert fault() is None
    assert fault(cr4=0, cr0=lib.X86_CR0_TS) == (UD, None)
    assert fault(cr0=lib.X86_CR0_TS) == (NM, None)
    assert fault(cpl=3) == ((GP, 0) if supervisor else None)
    assert [fault(rdi=AREA + at) for at in (1, 16, 32, 63)] == [(GP, 0)] * 4
    assert fault(rdi=AREA + 64) == ((GP, 0) if code in ("xrstors", "xrstors64") else None)
    assert fault(rdi=1 << 47) == (GP, 0)
    assert fault(rdi=(1 << 47) - 512) == (GP, 0)
    assert fault(rdi=tables.MAPPED_64) == (PF, 2 if SAVES.get(code) else 0)


@pytest.mark.parametrize("code", [*(f"{name} (%rdi)" for name in ALL), "xgetbv", "xsetbv"])
def test_lock_is_undefined(bench: AssistedBench, vcpu: Vcpu, code: str) -> None:
    """SDM vol. 2: #UD if the LOCK prefix is used."""
    context = bench.context(vcpu, b"\xf0" + assemble(code), rdi=AREA)
    assert fault_of(xsave.find, context) == (UD, None)


@pytest.mark.parametrize("prefix", ["66", "f2", "f3"])
@pytest.mark.parametrize("code", ["0fae27", "0fae2f", "0fae37", "0fc71f", "0fc727", "0fc72f", "0f01d0", "0f01d1"])
def test_mandatory_prefix_makes_it_another_instruction(
    bench: AssistedBench, vcpu: Vcpu, prefix: str, code: str
) -> None:
    """SDM vol. 2: NP in the opcode column."""
    assert xsave.find(bench.context(vcpu, bytes.fromhex(code)).instruction) is not None
    assert xsave.find(bench.context(vcpu, bytes.fromhex(prefix + code)).instruction) is None


@pytest.mark.parametrize("code", ["0faee7", "0faeef", "0faef7", "0fc7df", "0fc7e7", "0fc7ef"])
def test_register_form_is_another_instruction(bench: AssistedBench, vcpu: Vcpu, code: str) -> None:
    """LFENCE and MFENCE, or undefined."""
    assert xsave.find(bench.context(vcpu, bytes.fromhex(code)).instruction) is None


@pytest.mark.parametrize("code", SAVES)
def test_save_across_a_page_that_is_not_there_changes_nothing(bench: AssistedBench, vcpu: Vcpu, code: str) -> None:
    """SDM vol. 3 §6.5: a fault leaves the state as before the instruction."""
    bench.map_page(PAGE, FIRST, PRESENT | WRITABLE)
    bench.map_page(PAGE + PAGE_SIZE, SECOND, 0)
    bench.memory.write(FIRST, bytes(range(256)) * 16)
    set_image(vcpu, random_image(1, vcpu))
    context = bench.context(vcpu, f"{code} (%rdi)", rax=3, rdi=PAGE + PAGE_SIZE - 192)
    fault = complete(xsave.find, context)
    assert fault is not None
    assert (fault.vector, fault.address) in {(PF, PAGE + PAGE_SIZE), (PF, PAGE + PAGE_SIZE + 320)}
    assert bench.memory.read(FIRST, PAGE_SIZE) == bytes(range(256)) * 16


@pytest.mark.parametrize("code", SAVES)
def test_save_across_two_pages_apart_is_whole(bench: AssistedBench, vcpu: Vcpu, code: str) -> None:
    """The pages of an area need not be neighbours in guest memory."""
    bench.map_page(PAGE, SECOND, PRESENT | WRITABLE)
    bench.map_page(PAGE + PAGE_SIZE, FIRST, PRESENT | WRITABLE)
    set_image(vcpu, random_image(1, vcpu))
    data, first = random.Random(3).randbytes(4096), 704
    at = SECOND + PAGE_SIZE - first

    bench.memory.write(AREA, data)
    assert complete(xsave.find, bench.context(vcpu, f"{code} (%rdi)", rax=0xFF, rdi=AREA)) is None
    bench.memory.write(at, data[:first])
    bench.memory.write(FIRST, data[first:])
    context = bench.context(vcpu, f"{code} (%rdi)", rax=0xFF, rdi=PAGE + PAGE_SIZE - first)
    assert complete(xsave.find, context) is None
    whole = bench.memory.read(at, first) + bench.memory.read(FIRST, 4096 - first)
    assert whole == bench.memory.read(AREA, 4096) != data
    around = (AREA + PAGE_SIZE, FIRST), (FIRST + 4096 - first, at), (SECOND + PAGE_SIZE, SECOND + 2 * PAGE_SIZE)
    assert not any(any(bench.memory.read(start, end - start)) for start, end in around)


@pytest.mark.parametrize("code", ["xsaves", "xrstors"])
def test_supervisor_components_are_refused(
    bench: AssistedBench, vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr(vcpu, "get_msrs", lambda indices: {IA32_XSS: 1 << 8})
    with pytest.raises(Refused, match="IA32_XSS"):
        complete(xsave.find, bench.context(vcpu, f"{code} (%rdi)", rax=3, rdi=AREA))


def test_guest_gets_its_faults(bench: AssistedBench) -> None:
    """By its own handlers."""
    assert bench.run("xsave (%rdi)", rdi=AREA) == Trap(UD)
    assert bench.run("xsave (%rdi)", prepare=enable, rdi=AREA + 8) == Trap(GP)
    assert bench.run("mov $3, %eax; xor %edx, %edx; xrstors (%rdi)", prepare=enable, rdi=tables.DATA) == Trap(GP)


# --- XCR0, PKRU -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ecx", "cr4", "fault"),
    [
        (0, CR4_OSXSAVE, None),
        (1, CR4_OSXSAVE, None),
        (2, CR4_OSXSAVE, (GP, 0)),
        (1 << 31, CR4_OSXSAVE, (GP, 0)),
        (1 << 32, CR4_OSXSAVE, None),  # ECX alone counts
        (0, 0, (UD, None)),
    ],
)
def test_xgetbv_checks(
    bench: AssistedBench, vcpu: Vcpu, ecx: int, cr4: int, fault: tuple[int, int | None] | None
) -> None:
    """SDM vol. 2, XGETBV."""
    context = bench.context(vcpu, "xgetbv", rcx=ecx, rax=2**64 - 1, rdx=2**64 - 1)
    context.sregs.cr4 = context.sregs.cr4 & ~CR4_OSXSAVE | cr4
    assert fault_of(xsave.find, context) == fault
    if fault is None:
        expected = COMPONENTS if ecx != 1 else COMPONENTS & xstate.in_use(image_of(vcpu), {}, with_mxcsr=True)
        assert (context.registers[NUMBERS["rax"]], context.registers[NUMBERS["rdx"]]) == (expected, 0)


@pytest.mark.parametrize("xmm", [True, False])
@pytest.mark.parametrize("bitmap", [0, SSE, X87 | SSE, COMPONENTS])
def test_xgetbv_1_is_what_is_in_use(bench: AssistedBench, vcpu: Vcpu, bitmap: int, xmm: bool) -> None:
    """SDM vol. 1 §13.6; processors have SSE in use for MXCSR alone, too."""
    image = bytearray(random_image(1, vcpu, bitmap))
    if not xmm:
        image[160:416] = bytes(256)
    if not bitmap & SSE:
        struct.pack_into("<I", image, 24, xstate.INITIAL_MXCSR)
    set_image(vcpu, bytes(image))
    context = bench.context(vcpu, "xgetbv", rcx=1)
    assert complete(xsave.find, context) is None
    assert context.registers[NUMBERS["rax"]] == bitmap


@pytest.mark.parametrize(
    ("value", "ecx", "cpl", "cr4", "fault"),
    [
        *((value, 0, 0, CR4_OSXSAVE, None) for value in (1, 3, COMPONENTS)),
        *((value, 0, 0, CR4_OSXSAVE, (GP, 0)) for value in (0, 2, 5, 1 << 62, 1 << 63 | 3)),
        (3, 1, 0, CR4_OSXSAVE, (GP, 0)),
        (3, 0, 3, CR4_OSXSAVE, (GP, 0)),
        (3, 0, 0, 0, (UD, None)),
    ],
)
def test_xsetbv_checks(
    bench: AssistedBench, vcpu: Vcpu, value: int, ecx: int, cpl: int, cr4: int, fault: tuple[int, int | None] | None
) -> None:
    """SDM vol. 2, XSETBV: bit 0 is 1, AVX needs SSE, no reserved bit; XCR0 alone; CPL 0."""
    context = bench.context(vcpu, "xsetbv", cpl=cpl, rcx=ecx, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
    context.sregs.cr4 = context.sregs.cr4 & ~CR4_OSXSAVE | cr4
    assert fault_of(xsave.find, context) == fault
    assert vcpu.get_state("XCRS").xcrs[0].value == (COMPONENTS if fault else value)


def test_leaf_0xd_follows_xcr0(bench: AssistedBench) -> None:
    """SDM vol. 2, CPUID leaf 0DH: sizes for what XCR0 has enabled, in both formats, as a kernel checks them."""

    def leaf(index: int) -> CpuidEntry:
        seen = []

        def inspect(vcpu: Vcpu) -> None:
            regs = vcpu.get_regs()
            seen.append(CpuidEntry(0xD, index, 1, regs.rax, regs.rbx, regs.rcx, regs.rdx))

        text = f"xor %ecx, %ecx; xor %edx, %edx; mov ${COMPONENTS}, %eax; xsetbv"
        bench.run(f"{text}; mov $0xd, %eax; mov ${index}, %ecx; cpuid", prepare=lambda v: enable(v, 1), inspect=inspect)
        return seen[0]

    layout = xstate.layout_of(leaf(index) for index in range(2, 20))
    assert leaf(0).eax & COMPONENTS == COMPONENTS
    assert leaf(0).ebx == max(sum(place) for place in xstate.places(layout, COMPONENTS, compacted=False).values())
    if leaf(1).eax & 0b1010:
        assert leaf(1).ebx == max(sum(place) for place in xstate.places(layout, COMPONENTS, compacted=True).values())


@pytest.mark.parametrize("code", ["rdpkru", "wrpkru"])
def test_pkru_checks(bench: AssistedBench, vcpu: Vcpu, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """SDM vol. 2, RDPKRU and WRPKRU: #UD without CR4.PKE, #GP(0) for ECX and, written, EDX."""

    def fault(cr4: int, **registers: int) -> tuple[int, int | None] | None:
        context = bench.context(vcpu, code, **registers)
        context.sregs.cr4 |= cr4
        return fault_of(xsave.find, context)

    monkeypatch.setitem(xsave._layouts, vcpu, {xstate.PKRU_NUMBER: Component(2688, 8, False)})
    taken: list[bytes] = []
    monkeypatch.setattr(xsave, "_set_image", lambda context, image: taken.append(bytes(image)))
    assert fault(0) == (UD, None)
    assert fault(CR4_PKE, rcx=1) == (GP, 0)
    assert fault(CR4_PKE, rdx=1) == ((GP, 0) if code == "wrpkru" else None)
    assert fault(CR4_PKE, rax=0x5555_5554, rcx=1 << 32) is None
    assert fault(CR4_PKE, rax=0) is None
    values = [struct.unpack_from("<I", image, 2688)[0] for image in taken]
    assert values == ([0x5555_5554, 0] if code == "wrpkru" else [])
    assert all(image[HEADER + 1] & 2 for image in taken), "KVM takes no PKRU that is not marked"
