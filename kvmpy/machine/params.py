"""The parameter page: how a guest learns its name and identity, hears requests, and shows that it lives.

``guests/abi.h`` draws the page. kvmpy fills it before the first instruction; afterwards it is RAM like any other, and
the guest may overwrite all of it at any moment. So `ParameterPage` copies each field once and believes nothing.

Source: guests/abi.h, "The parameter page"; RFC 4122 §4.4 (random ids). Floor: machine.
"""

import os
import struct
from collections.abc import Mapping, Sequence

from kvmpy._shim import lib
from kvmpy.machine import layout
from kvmpy.machine.layout import VirtioWindow
from kvmpy.machine.memory import GuestMemory

ID_SIZE = 16
PAIRS_ROOM = lib.KVMPY_PARAMS_SIZE - lib.KVMPY_PARAMS_OFF_PAIRS


def random_id() -> bytes:
    """Return a new random UUID as RFC 4122 §4.4 makes it: version 4 in byte 6, variant 10 in byte 8."""
    random = bytearray(os.urandom(ID_SIZE))
    random[6] = random[6] & 0x0F | 0x40
    random[8] = random[8] & 0x3F | 0x80
    return bytes(random)


class Parameters:
    """What a guest is told: its name (at most 63 bytes of UTF-8), its UUID (16 bytes), and key=value pairs."""

    def __init__(self, name: str = "kvmpy", id: bytes | None = None, pairs: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.id = random_id() if id is None else id
        self.pairs = dict(pairs or {})


def write(memory: GuestMemory, cores: int, parameters: Parameters, virtio: Sequence[VirtioWindow] = ()) -> None:
    """Fill the page in ``memory``; all of it, so that nothing of an earlier run stays.

    ``virtio``: the disks of the machine, in the order of `layout.virtio_windows`: its first devices.

    Raises:
        ValueError: the name, the id or a pair is not what `Parameters` allows, or the pairs do not fit; then nothing
            was written.
    """
    memory.write(layout.PARAMETER_PAGE, build(memory.size, cores, parameters, virtio))


def build(memory_size: int, cores: int, parameters: Parameters, virtio: Sequence[VirtioWindow] = ()) -> bytes:
    """Return the page of a machine with ``memory_size`` bytes of RAM.

    Raises:
        ValueError: as `write` says.
    """
    if len(parameters.id) != ID_SIZE:
        raise ValueError(f"an id of {len(parameters.id)} bytes: allowed is {ID_SIZE}")
    name, pairs = encode_name(parameters.name), encode_pairs(parameters.pairs)
    (_, low), *rest = layout.ram_ranges(memory_size)
    high = sum(size for _, size in rest)
    gsis = bytes(window.gsi for window in virtio)
    page = bytearray(lib.KVMPY_PARAMS_SIZE)
    for offset, layout_of_field, value in (
        (lib.KVMPY_PARAMS_OFF_MAGIC, "<Q", lib.KVMPY_PARAMS_MAGIC),
        (lib.KVMPY_PARAMS_OFF_VERSION, "<I", lib.KVMPY_PARAMS_VERSION),
        (lib.KVMPY_PARAMS_OFF_CORES, "<I", cores),
        (lib.KVMPY_PARAMS_OFF_ID, f"{ID_SIZE}s", parameters.id),
        (lib.KVMPY_PARAMS_OFF_NAME, f"{lib.KVMPY_PARAMS_NAME_SIZE}s", name),
        (lib.KVMPY_PARAMS_OFF_RAM_LOW, "<Q", low),
        (lib.KVMPY_PARAMS_OFF_RAM_HIGH, "<Q", high),
        (lib.KVMPY_PARAMS_OFF_STOP_GSI, "<I", lib.KVMPY_STOP_GSI),
        (lib.KVMPY_PARAMS_OFF_REQUEST, "<I", lib.KVMPY_REQUEST_NONE),
        (lib.KVMPY_PARAMS_OFF_PAIRS_LEN, "<I", len(pairs)),
        (lib.KVMPY_PARAMS_OFF_VIRTIO_COUNT, "<I", len(virtio)),
        (lib.KVMPY_PARAMS_OFF_VIRTIO_GSI, f"{lib.KVMPY_VIRTIO_MMIO_MAX}s", gsis),
        (lib.KVMPY_PARAMS_OFF_PAIRS, f"{PAIRS_ROOM}s", pairs),
    ):
        struct.pack_into(layout_of_field, page, offset, value)
    return bytes(page)


def encode_name(name: str) -> bytes:
    """Return ``name`` in UTF-8, with its NUL.

    Raises:
        ValueError: it is longer than 63 bytes, has a NUL, or is no text.
    """
    encoded = _encode("name", name)
    if len(encoded) >= lib.KVMPY_PARAMS_NAME_SIZE:
        raise ValueError(f"name of {len(encoded)} bytes: allowed is up to {lib.KVMPY_PARAMS_NAME_SIZE - 1}")
    return encoded + b"\0"


def encode_pairs(pairs: dict[str, str]) -> bytes:
    """Return ``key=value`` and a NUL for each pair, in the order given.

    Raises:
        ValueError: a key is empty or has a ``=``, either has a NUL or is no text, or all together do not fit.
    """
    for key in pairs:
        if not key or "=" in key:
            raise ValueError(f"key {key!r}: allowed is text that is not empty and has no '='")
    encoded = b"".join(_encode("key", key) + b"=" + _encode("value", value) + b"\0" for key, value in pairs.items())
    if len(encoded) > PAIRS_ROOM:
        raise ValueError(f"key=value pairs of {len(encoded)} bytes: allowed is up to {PAIRS_ROOM}")
    return encoded


def _encode(what: str, text: str) -> bytes:
    if "\0" in text:
        raise ValueError(f"{what} {text!r} has a NUL")
    try:
        return text.encode()
    except UnicodeEncodeError:
        # What the command line makes of bytes that are not UTF-8.
        raise ValueError(f"{what} {text!r} is not UTF-8 text") from None


class ParameterPage:
    """The page of a running guest. What is read here is whatever the guest put there: any number, at any time."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory

    @property
    def heartbeat(self) -> int:
        """The guest's own count, 0 to 2**64 - 1; only that it changes says anything."""
        return self._read(lib.KVMPY_PARAMS_OFF_HEARTBEAT, 8)

    @property
    def acknowledged(self) -> int:
        """The request that the guest says it has seen: KVMPY_REQUEST_*, or any other 32 bits."""
        return self._read(lib.KVMPY_PARAMS_OFF_ACK, 4)

    def request(self, code: int) -> None:
        """Put ``code``, one of KVMPY_REQUEST_*, into the mailbox. The caller then raises `KVMPY_STOP_GSI`.

        Raises:
            ValueError: ``code`` has more than 32 bits.
        """
        if not 0 <= code < 1 << 32:
            raise ValueError(f"request {code:#x}: allowed is 0 to 0xffffffff")
        self._memory.write(layout.PARAMETER_PAGE + lib.KVMPY_PARAMS_OFF_REQUEST, code.to_bytes(4, "little"))

    def _read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._memory.read(layout.PARAMETER_PAGE + offset, size), "little")
