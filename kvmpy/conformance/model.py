"""A model of the disk: what it must hold, and what a completed request must have got, from the request's own bytes.

Source: virtio 1.2 §5.2.6.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvmpy._shim import lib
from kvmpy.conformance.driver import HEADER, NO_STATUS, SEGMENT
from kvmpy.conformance.layout import Buffer
from kvmpy.machine.memory import GuestMemory
from kvmpy.storage.disk import SECTOR_SIZE
from kvmpy.units import KiB

Expect = Callable[[object, str], None]
"""Notes harm, in words, where something that must hold does not."""
LARGEST = 64 * KiB
"""No request of ours that moves data has more of it."""


class Sent(NamedTuple):
    """A chain that was added: its buffers, and its readable bytes as they were then."""

    buffers: Sequence[Buffer]
    readable: bytes

    @property
    def status_gpa(self) -> int | None:
        """The last writable byte."""
        written = [buffer for buffer in self.buffers if buffer.writable and buffer.size]
        return written[-1].gpa + written[-1].size - 1 if written else None


class DiskModel:
    """``disk`` is what the disk must hold after all that was completed; what must hold besides goes to ``expect``."""

    def __init__(self, memory: GuestMemory, disk: bytes, serial: bytes, expect: Expect) -> None:
        self.disk = bytearray(disk)
        self._memory, self._expect = memory, expect
        self._serial = serial.ljust(lib.VIRTIO_BLK_ID_BYTES, b"\0")

    def sector(self, sector: int) -> bytes:
        """Return what a sector must hold."""
        return bytes(self.disk[sector * SECTOR_SIZE : (sector + 1) * SECTOR_SIZE])

    def complete(self, sent: Sent, written: int) -> int | None:
        """Take a chain that came back with ``written`` bytes in its used entry; return its status, if it has one."""
        if sent.status_gpa is None:
            self._expect(written == 0, f"a chain without a writable byte reports {written} written")
            return None
        status = self._memory.read(sent.status_gpa, 1)[0]
        if status == lib.VIRTIO_BLK_S_OK:
            self._take_effect(sent, written)
        else:
            self._expect(status != NO_STATUS, "a completed request has no status")
            self._expect(written == 1, f"a refused request reports {written} written bytes")
        return status

    def _take_effect(self, sent: Sent, written: int) -> None:
        type, _, sector = HEADER.unpack_from(sent.readable)
        data = sent.readable[HEADER.size :]
        start = sector * SECTOR_SIZE
        match type:
            case lib.VIRTIO_BLK_T_IN:
                got = self._data_in(sent)
                self._expect(got == self.disk[start : start + len(got)], f"a read of sector {sector} got other data")
                self._expect(written == len(got) + 1, f"a read of {len(got)} bytes reports {written} written")
            case lib.VIRTIO_BLK_T_OUT:
                self.disk[start : start + len(data)] = data
            case lib.VIRTIO_BLK_T_GET_ID:
                self._check_id(self._data_in(sent), written)
            case lib.VIRTIO_BLK_T_DISCARD | lib.VIRTIO_BLK_T_WRITE_ZEROES:
                for first, sectors, _ in SEGMENT.iter_unpack(data):
                    self.disk[first * SECTOR_SIZE : (first + sectors) * SECTOR_SIZE] = bytes(sectors * SECTOR_SIZE)

    def _data_in(self, sent: Sent) -> bytes:
        """Return the writable bytes without the status; of a vast chain as much as anybody may have written."""
        data = b""
        for buffer in sent.buffers:
            if buffer.writable and len(data) <= LARGEST:
                data += self._memory.read(buffer.gpa, min(buffer.size, LARGEST)) if buffer.size else b""
        return data[:-1]

    def _check_id(self, got: bytes, written: int) -> None:
        size = min(len(got), len(self._serial))
        rest = got[size:LARGEST]
        self._expect(got[:size] == self._serial[:size], "the serial number is another")
        self._expect(len(set(rest)) <= 1, "something was written behind the serial number")
        self._expect(written == size + 1, f"{size} bytes of a serial number are reported as {written} written")
