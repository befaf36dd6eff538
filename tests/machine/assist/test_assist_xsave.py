"""XSAVE, XSAVEOPT, XSAVEC and XRSTOR on bytes: what ours writes and loads, the processor writes and loads too."""

import random
import struct

import pytest
from xsave_oracle import SIGSEGV, SIZE, USED, Answer, Operation, Request, XsaveOracle

from kvmpy.kvm.cpuid_entry import CpuidEntry
from kvmpy.machine.assist import xstate
from kvmpy.machine.assist.context import GP, Fault, Refused
from kvmpy.machine.assist.xstate import AVX, COMPACTED, EXTENDED, HEADER, PKRU_NUMBER, SSE, X87, Component, Layout

ROUNDS = 120
AMX = 3 << 17
SAVES = (Operation.XSAVE, Operation.XSAVE64, Operation.XSAVEOPT, Operation.XSAVEOPT64)
SAVES_COMPACTED = (Operation.XSAVEC, Operation.XSAVEC64)
RESTORES = (Operation.XRSTOR, Operation.XRSTOR64)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> XsaveOracle:
    return XsaveOracle(tmp_path_factory.mktemp("xsave"))


class Draw:
    """Random states and areas that a processor may meet."""

    def __init__(self, seed: int, processor: XsaveOracle) -> None:
        self.random, self.processor = random.Random(seed), processor
        self.used = processor.xcr0 & USED

    def requests(self, *operations: Operation) -> list[Request]:
        return [
            Request(operation, self.mask(), self.state(), self.area(operation in RESTORES))
            for _ in range(ROUNDS)
            for operation in operations
        ]

    def mask(self) -> int:
        return self.random.choice((self.random.getrandbits(64), self.random.getrandbits(3), (1 << 64) - 1)) & ~AMX

    def legacy(self) -> bytes:
        """Contents that a processor gives back unchanged, but for the padding of ST0..ST7."""
        bits = self.random.getrandbits
        x87 = struct.pack(
            "<HHBBHQQ", bits(13) & 0x1F3F | 0x40, bits(16) & 0x7F40, bits(8), 0, bits(11), bits(47), bits(47)
        )
        mxcsr = self.random.choice((xstate.INITIAL_MXCSR, bits(16)))
        return x87 + struct.pack("<II", mxcsr, bits(32)) + self.random.randbytes(HEADER - 32)

    def extended(self) -> bytes:
        data = bytearray(self.random.randbytes(SIZE - EXTENDED))
        if PKRU_NUMBER in self.processor.layout:
            data[self.processor.layout[PKRU_NUMBER].offset - EXTENDED] &= ~3  # our own memory
        return bytes(data)

    def state(self) -> bytes:
        bitmap = self.random.getrandbits(64) & self.used
        return self.legacy() + bitmap.to_bytes(8, "little") + bytes(56) + self.extended()

    def area(self, valid: bool) -> bytes:
        """``valid``: mostly one that XRSTOR takes."""
        header = self.random.randbytes(64)
        if valid and self.random.random() < 0.9:
            header = self.header()
        area = bytearray(self.legacy() + header + self.extended())
        if self.random.random() < 0.1:
            area[27] = 1  # a reserved bit of MXCSR
        if PKRU_NUMBER in self.processor.layout and header[15] & 0x80:
            area[EXTENDED:] = bytes(SIZE - EXTENDED)  # PKRU may be anywhere
        return bytes(area)

    def header(self) -> bytes:
        held = self.random.getrandbits(64) & self.processor.xcr0
        xstate_bv = held & self.random.getrandbits(64)
        xcomp_bv = self.random.choice((0, held | COMPACTED))
        reserved = bytearray(48)
        match self.random.randrange(8):
            case 0:
                reserved[self.random.randrange(48)] = 1
            case 1:
                xstate_bv |= 1 << self.random.randrange(63)
            case 2:
                xcomp_bv |= 1 << self.random.randrange(63)
        return struct.pack("<QQ", xstate_bv, xcomp_bv) + reserved


def as_kvm_has_it(answer: Answer) -> bytes:
    """Return the state before as KVM_GET_XSAVE would: the kernel saves it by XSAVES, which marks SSE for MXCSR."""
    image = bytearray(answer.image)
    if image[24:28] != xstate.INITIAL_MXCSR.to_bytes(4, "little"):
        image[HEADER] |= SSE
    return bytes(image)


def saved_by_us(processor: XsaveOracle, request: Request, answer: Answer) -> bytes:
    image, rfbm = as_kvm_has_it(answer), request.mask & processor.xcr0
    wide = bool(request.operation & 1)
    if request.operation in SAVES_COMPACTED:
        pieces = xstate.save_compacted(image, processor.layout, rfbm, wide=wide)
    else:
        (old_bv,) = struct.unpack_from("<Q", request.area, HEADER)
        optimized = request.operation in (Operation.XSAVEOPT, Operation.XSAVEOPT64)
        pieces = xstate.save(image, processor.layout, rfbm, old_bv, wide=wide, optimized=optimized)
    area = bytearray(request.area)
    for offset, data in pieces:
        area[offset : offset + len(data)] = data
    return bytes(area)


def runs(ours: bytes, theirs: bytes) -> list[int]:
    """Return where the two differ."""
    return [at for at in range(len(theirs)) if ours[at : at + 1] != theirs[at : at + 1]]


@pytest.mark.parametrize("operation", [*SAVES, *SAVES_COMPACTED], ids=lambda operation: operation.name.lower())
def test_what_is_saved_is_what_the_processor_saves(processor: XsaveOracle, operation: Operation) -> None:
    """SDM vol. 1 §13.7, §13.9, §13.10: every byte of the area, those that are not written too."""
    requests = Draw(operation, processor).requests(operation)
    for request, answer in zip(requests, processor.run(requests), strict=True):
        assert answer.signal == 0
        differences = runs(saved_by_us(processor, request, answer), answer.area)
        if processor.saves_selectors and not operation & 1:
            differences = [at for at in differences if at not in (12, 13, 20, 21)]
        assert differences == []


@pytest.mark.parametrize("operation", RESTORES, ids=lambda operation: operation.name.lower())
def test_what_is_restored_is_what_the_processor_restores(processor: XsaveOracle, operation: Operation) -> None:
    """SDM vol. 1 §13.8: the state after it, XINUSE, and #GP for a bad header or MXCSR."""
    requests, faults = Draw(operation, processor).requests(operation), 0
    for request, answer in zip(requests, processor.run(requests), strict=True):
        after = restored_by_us(processor, request, answer)
        assert (after is None) == (answer.signal == SIGSEGV)
        if after is None:
            faults += 1
            continue
        assert [at for at in runs(after, answer.after) if not HEADER <= at < HEADER + 8] == []
        (theirs,) = struct.unpack_from("<Q", answer.after, HEADER)
        assert xstate.in_use(after, processor.layout, with_mxcsr=False) == theirs
    assert 0 < faults < len(requests) / 2


def restored_by_us(processor: XsaveOracle, request: Request, answer: Answer) -> bytes | None:
    """Return the state after it; None: it raises #GP(0)."""
    image, rfbm = as_kvm_has_it(answer), request.mask & processor.xcr0
    try:
        asked = xstate.parse_header(request.area, processor.layout, processor.xcr0, rfbm, supervisor=False)
        area = request.area[: asked.size]
        return bytes(xstate.restore(image, processor.layout, asked, area, wide=bool(request.operation & 1)))
    except Fault as fault:
        if (fault.vector, fault.error_code) != (GP, 0):
            raise
        return None


def test_xinuse_is_what_xgetbv_says(processor: XsaveOracle) -> None:
    """SDM vol. 1 §13.6."""
    requests = Draw(99, processor).requests(Operation.XSAVE64)
    for answer in processor.run(requests):
        if answer.signal == 0:
            assert xstate.in_use(as_kvm_has_it(answer), processor.layout, with_mxcsr=True) == answer.xinuse & ~AMX


# --- what no oracle tells ---------------------------------------------------------------------------------------

LAYOUT: Layout = {2: Component(576, 256, False), 9: Component(2688, 8, True)}


def image(bitmap: int = 0, mxcsr: int = xstate.INITIAL_MXCSR, pkru: int = 0) -> bytes:
    made = bytearray(SIZE)
    struct.pack_into("<I", made, 24, mxcsr)
    struct.pack_into("<I", made, 2688, pkru)
    struct.pack_into("<Q", made, HEADER, bitmap)
    return bytes(made)


def test_leaf_0xd_gives_the_layout_without_supervisor_components() -> None:
    """SDM vol. 2, CPUID leaf 0DH: EAX size, EBX offset, ECX[0] supervisor, ECX[1] aligned."""
    rows = [(0, 7, 0, 0), (1, 0xF, 0, 0), (2, 256, 576, 0), (8, 128, 0, 1), (9, 8, 2688, 2), (10, 0, 0, 0)]
    cpuid = [CpuidEntry(0xD, index, 1, eax, ebx, ecx, 0) for index, eax, ebx, ecx in rows]
    assert xstate.layout_of([*cpuid, CpuidEntry(7, 2, 1, 1, 1, 0, 0)]) == LAYOUT


def test_an_aligned_component_begins_at_the_next_multiple_of_64_when_compacted() -> None:
    """SDM vol. 1 §13.4.3."""
    layout = {2: Component(576, 100, False), 3: Component(1000, 8, True), 4: Component(2000, 8, False)}
    assert xstate.places(layout, 0b11111, compacted=True) == {2: (576, 100), 3: (704, 8), 4: (712, 8)}
    assert xstate.places(layout, 0b10011, compacted=True) == {4: (576, 8)}
    assert xstate.places(layout, 0b11011, compacted=False) == {3: (1000, 8), 4: (2000, 8)}


@pytest.mark.parametrize("compacted", [True, False])
def test_a_component_that_cpuid_does_not_tell_of_is_refused(compacted: bool) -> None:
    with pytest.raises(Refused, match="component 5"):
        xstate.places(LAYOUT, 1 << 5, compacted=compacted)


def restored(before: bytes, rfbm: int, header: tuple[int, int], supervisor: bool = False, **fields: int) -> bytearray:
    area = bytearray(image(header[0], **fields))
    struct.pack_into("<Q", area, HEADER + 8, header[1])
    request = xstate.parse_header(area, LAYOUT, X87 | SSE | AVX | xstate.PKRU, rfbm, supervisor=supervisor)
    return xstate.restore(before, LAYOUT, request, bytes(area), wide=True)


def test_pkru_is_always_marked_for_the_kernel() -> None:
    """KVM_SET_XSAVE leaves PKRU as it is where its bit is clear; to initialize it is to load 0."""
    after = restored(image(pkru=0x55555554), xstate.PKRU, (0, 0))
    assert struct.unpack_from("<I", after, 2688) == (0,)
    assert after[HEADER + 1] & 2
    kept = restored(image(pkru=0x55555554), X87, (0, 0))
    assert struct.unpack_from("<I", kept, 2688) == (0x55555554,)
    assert kept[HEADER + 1] & 2


def test_pkru_is_in_use_when_it_is_not_0_whatever_the_mark() -> None:
    """The kernel has PKRU apart from the rest of the state."""
    assert xstate.in_use(image(0, pkru=4), LAYOUT, with_mxcsr=False) == xstate.PKRU
    assert xstate.in_use(image(xstate.PKRU, pkru=0), LAYOUT, with_mxcsr=False) == 0


def test_mxcsr_marks_sse_for_the_kernel() -> None:
    """KVM_SET_XSAVE loads MXCSR with the SSE component."""
    after = restored(image(), SSE, (0, 0), mxcsr=0x1FA0)
    assert struct.unpack_from("<I", after, 24) == (0x1FA0,)
    assert after[HEADER] & SSE


SUPERVISOR_FAULTS: dict[str, tuple[int, int]] = {
    "standard format": (0, 0),
    "a component that is not enabled": (0, COMPACTED | 1 << 5),
    "in use, but not held": (AVX, COMPACTED | X87),
}


@pytest.mark.parametrize("header", SUPERVISOR_FAULTS.values(), ids=SUPERVISOR_FAULTS.keys())
def test_xrstors_faults_on_a_header(header: tuple[int, int]) -> None:
    """SDM vol. 2, XRSTORS, protected-mode exceptions."""
    with pytest.raises(Fault) as caught:
        restored(image(), X87, header, supervisor=True)
    assert (caught.value.vector, caught.value.error_code) == (GP, 0)


@pytest.mark.parametrize("at", range(16, 64))
def test_xrstors_faults_on_a_reserved_byte(at: int) -> None:
    """SDM vol. 2, XRSTORS: bytes 63:16 of the header are zero."""
    area = bytearray(image())
    area[HEADER + 15], area[HEADER + at] = 0x80, 1
    with pytest.raises(Fault):
        xstate.parse_header(area, LAYOUT, X87, X87, supervisor=True)


@pytest.mark.parametrize("held", [0, X87, SSE, AVX, X87 | SSE, SSE | AVX, X87 | SSE | AVX])
def test_xrstors_takes_what_xsaves_gave(held: int) -> None:
    """SDM vol. 1 §13.11 and §13.12: saved and restored, the state is as before; what was not saved is initial."""
    draw = random.Random(held)
    before = bytearray(image(held, mxcsr=0x1FA0))
    before[32:416] = b"".join(draw.randbytes(10) + bytes(6) for _ in range(24))
    before[576:832] = draw.randbytes(256)
    area = bytearray(SIZE)
    for offset, data in xstate.save_compacted(bytes(before), LAYOUT, X87 | SSE | AVX, wide=True):
        area[offset : offset + len(data)] = data
    request = xstate.parse_header(area, LAYOUT, X87 | SSE | AVX, X87 | SSE | AVX, supervisor=True)
    after = xstate.restore(image(), LAYOUT, request, bytes(area[: request.size]), wide=True)
    assert after[24:28] == before[24:28]
    assert after[32:160] == (before[32:160] if held & X87 else bytes(128))
    assert after[160:416] == before[160:416]  # MXCSR alone has SSE saved
    assert after[576:832] == (before[576:832] if held & AVX else bytes(256))
