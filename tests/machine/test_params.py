"""The parameter page: what the guest reads in it, what is refused, and what a hostile guest can do to it."""

import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmpy._shim import lib
from kvmpy.machine import layout, params
from kvmpy.machine.memory import GuestMemory
from kvmpy.machine.params import ParameterPage, Parameters
from kvmpy.units import GiB, MiB

ROOM = 0x1000 - 0x100
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
KEYS = TEXT.filter(lambda key: key != "" and "=" not in key)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(2 * MiB) as memory:
        yield memory


def page_of(memory: GuestMemory) -> bytes:
    return memory.read(layout.PARAMETER_PAGE, 0x1000)


def guest_pairs(page: bytes) -> list[tuple[str, str]]:
    """Read the pairs as a guest does: PAIRS_LEN bytes, each pair to its NUL, each key to its first '='."""
    (length,) = struct.unpack_from("<I", page, 0x7C)
    *pairs, rest = page[0x100 : 0x100 + length].split(b"\0")
    assert rest == b""
    split = (pair.partition(b"=") for pair in pairs)
    return [(key.decode(), value.decode()) for key, _, value in split]


def test_map_and_abi_agree_on_the_page() -> None:
    """guests/abi.h: KVMPY_PARAMS is where kvmpy's address map draws the page."""
    assert layout.PARAMETER_PAGE == lib.KVMPY_PARAMS
    assert lib.KVMPY_PARAMS_SIZE == 0x1000


def test_page_begins_with_the_magic(memory: GuestMemory) -> None:
    """guests/abi.h: "kvmpyPAG" in memory order, then the version and the number of vCPUs."""
    params.write(memory, 3, Parameters())
    assert page_of(memory)[:16] == b"kvmpyPAG" + struct.pack("<II", lib.KVMPY_PARAMS_VERSION, 3)


@pytest.mark.parametrize(
    ("size", "low", "high"),
    [(2 * MiB, 2 * MiB, 0), (3 * GiB, 3 * GiB, 0), (7 * GiB // 2, 3 * GiB, GiB // 2)],
)
def test_page_tells_the_ram_on_both_sides_of_the_hole(size: int, low: int, high: int) -> None:
    """guests/abi.h: RAM_LOW is bytes from gpa 0, RAM_HIGH bytes from gpa 4 GiB."""
    with GuestMemory(size) as memory:
        params.write(memory, 1, Parameters())
        assert struct.unpack_from("<QQ", page_of(memory), 0x60) == (low, high)


def test_default_id_is_a_random_uuid() -> None:
    """RFC 4122 §4.4: version 4 in the high bits of byte 6, variant 10 in those of byte 8."""
    ids = {Parameters().id for _ in range(64)}
    assert len(ids) == 64
    for identity in ids:
        assert len(identity) == 16
        assert identity[6] >> 4 == 4
        assert identity[8] >> 6 == 0b10


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=TEXT, identity=st.binary(min_size=16, max_size=16), pairs=st.dictionaries(KEYS, TEXT, max_size=8))
def test_what_is_accepted_the_guest_reads_back(
    memory: GuestMemory, name: str, identity: bytes, pairs: dict[str, str]
) -> None:
    """guests/abi.h: 16 bytes of id, a NUL-terminated name of 64 bytes, pairs each ended by NUL, in order."""
    name = name[:15]  # at most 60 bytes
    params.write(memory, 1, Parameters(name, identity, pairs))
    page = page_of(memory)
    assert page[0x10:0x20] == identity
    assert page[0x20:0x60].partition(b"\0")[0].decode() == name
    assert page[0x5F] == 0
    assert guest_pairs(page) == list(pairs.items())


def test_name_of_63_bytes_fits_and_of_64_does_not(memory: GuestMemory) -> None:
    """guests/abi.h: 64 bytes with the NUL, counted in UTF-8 and not in characters."""
    params.write(memory, 1, Parameters("x" * 63))
    assert page_of(memory)[0x20:0x60] == b"x" * 63 + b"\0"
    for name in ("x" * 64, "\u00e9" * 32):
        with pytest.raises(ValueError, match="name of 64 bytes"):
            params.write(memory, 1, Parameters(name))


def test_pairs_fill_the_page_to_its_last_byte(memory: GuestMemory) -> None:
    """guests/abi.h: pairs lie from 0x100 to the end of the page; one byte more is refused."""
    fits = {"k": "v" * (ROOM - 3)}
    params.write(memory, 1, Parameters(pairs=fits))
    assert guest_pairs(page_of(memory)) == list(fits.items())
    with pytest.raises(ValueError, match=f"{ROOM + 1} bytes: allowed is up to {ROOM}"):
        params.write(memory, 1, Parameters(pairs={"k": "v" * (ROOM - 2)}))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (Parameters("a\0b"), "NUL"),
        (Parameters("\udcff"), "not UTF-8"),
        (Parameters(id=b"short"), "id of 5 bytes"),
        (Parameters(pairs={"": "v"}), "key ''"),
        (Parameters(pairs={"a=b": "v"}), "key 'a=b'"),
        (Parameters(pairs={"a\0": "v"}), "NUL"),
        (Parameters(pairs={"a": "v\0"}), "NUL"),
        (Parameters(pairs={"a": "\udc80"}), "not UTF-8"),
        (Parameters(pairs={str(i): "v" * 100 for i in range(60)}), "do not|allowed is up to"),
    ],
)
def test_what_the_page_cannot_hold_is_refused_in_one_line(
    memory: GuestMemory, parameters: Parameters, message: str
) -> None:
    """guests/abi.h: names and pairs are NUL-terminated, and '=' ends a key. A refusal writes nothing."""
    with pytest.raises(ValueError, match=message) as refusal:
        params.write(memory, 1, parameters)
    assert "\n" not in str(refusal.value)
    assert page_of(memory) == bytes(0x1000)


@pytest.mark.parametrize("count", [0, 1, 16])
def test_page_tells_the_virtio_devices_and_their_interrupts(memory: GuestMemory, count: int) -> None:
    """guests/abi.h: a u32 of how many, and a byte for each with its GSI."""
    windows = layout.virtio_windows(count)
    params.write(memory, 1, Parameters(pairs={"k": "v"}), windows)
    page = page_of(memory)
    assert struct.unpack_from("<I", page, 0x88) == (count,)
    assert list(page[0x90:0xA0]) == [window.gsi for window in windows] + [0] * (16 - count)
    assert guest_pairs(page) == [("k", "v")]


def test_writing_again_leaves_nothing_of_before(memory: GuestMemory) -> None:
    """A machine that starts anew hears no request of its earlier life and has no heartbeat yet."""
    memory.fill(layout.PARAMETER_PAGE, 0x1000, 0xA5)
    params.write(memory, 1, Parameters("n", bytes(16)))
    page = page_of(memory)
    assert page[0x74:0x7C] == bytes(8)
    assert page[0x80:0x88] == bytes(8)
    assert page[0x88:] == bytes(0x1000 - 0x88)


def test_request_reaches_the_mailbox_and_the_guest_answers(memory: GuestMemory) -> None:
    """guests/abi.h: REQUEST is host to guest, ACK guest to host, HEARTBEAT the guest's counter, STOP_GSI the wire."""
    params.write(memory, 1, Parameters())
    page = ParameterPage(memory)
    assert (page.heartbeat, page.acknowledged) == (0, lib.KVMPY_REQUEST_NONE)
    page.request(lib.KVMPY_REQUEST_STOP)
    assert struct.unpack_from("<II", page_of(memory), 0x70) == (lib.KVMPY_STOP_GSI, lib.KVMPY_REQUEST_STOP)
    memory.write(layout.PARAMETER_PAGE + 0x78, struct.pack("<I", lib.KVMPY_REQUEST_STOP))
    memory.write(layout.PARAMETER_PAGE + 0x80, struct.pack("<Q", 7))
    assert (page.heartbeat, page.acknowledged) == (7, lib.KVMPY_REQUEST_STOP)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=0x100, max_size=0x100))
def test_page_overwritten_by_the_guest_is_read_without_harm(memory: GuestMemory, junk: bytes) -> None:
    """The page is RAM: whatever the guest leaves there is a number of 32 or 64 bits, and never an exception."""
    memory.write(layout.PARAMETER_PAGE, junk)
    page = ParameterPage(memory)
    assert page.heartbeat == int.from_bytes(junk[0x80:0x88], "little")
    assert page.acknowledged == int.from_bytes(junk[0x78:0x7C], "little")
    page.request(lib.KVMPY_REQUEST_STOP)
    assert page_of(memory)[:0x100] == junk[:0x74] + struct.pack("<I", lib.KVMPY_REQUEST_STOP) + junk[0x78:]


@pytest.mark.parametrize("code", [-1, 1 << 32])
def test_request_beyond_32_bits_is_refused(memory: GuestMemory, code: int) -> None:
    """guests/abi.h: the mailbox is a u32."""
    with pytest.raises(ValueError, match="request"):
        ParameterPage(memory).request(code)
