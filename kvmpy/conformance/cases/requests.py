"""Cases 47 to 57: block requests. The rings are sound."""

from functools import partial

from kvmpy._shim import lib
from kvmpy.conformance.bench import DATA, Bench, fresh_data
from kvmpy.conformance.case import IGNORED, IOERR, OK, UNSUPP, Variant, needs_reset
from kvmpy.conformance.cases.descriptors import LOW_END
from kvmpy.conformance.driver import HEADER
from kvmpy.conformance.layout import Buffer
from kvmpy.conformance.world import EVENT_IDX, FLUSH, SECTORS, World
from kvmpy.devices.virtqueue import Fault
from kvmpy.storage.disk import SECTOR_SIZE

IN, OUT, GET_ID = lib.VIRTIO_BLK_T_IN, lib.VIRTIO_BLK_T_OUT, lib.VIRTIO_BLK_T_GET_ID


def send(
    bench: Bench,
    type: int,
    sector: int = 0,
    *,
    data_out: bytes = b"",
    data_in: int = 0,
    readable: tuple[int, ...] | None = None,
    writable: tuple[int, ...] | None = None,
) -> None:
    """Send one request, whatever it is."""
    request = bench.request(type, sector, data_out=data_out, data_in=data_in, readable=readable, writable=writable)
    bench.send(request.buffers)


# --- 47 to 49: header and status --------------------------------------------------------------------------------


def header_only(bench: Bench) -> None:
    """Send a chain that has no room for a status: it comes back, with nothing written."""
    header, _, _ = bench.read()
    bench.send([header])


def status_only(bench: Bench) -> None:
    """Send a chain that has no header."""
    *_, status = bench.read()
    bench.send([status])


def header_writable(bench: Bench) -> None:
    """Let the device write where the header is: so it has none to read."""
    header, data, status = bench.read()
    bench.send([header._replace(writable=True), data, status])


def status_readable(bench: Bench) -> None:
    """Give the device the status byte to read."""
    header, status = bench.request(lib.VIRTIO_BLK_T_FLUSH).buffers
    bench.send([header, status._replace(writable=False)])


def status_empty(bench: Bench) -> None:
    """Have a status of no bytes: the last byte of the data is the status, and the data is no whole sector."""
    header, data, status = bench.read()
    bench.send([header, data, status._replace(size=0)])


def status_outside(bench: Bench) -> None:
    """Have the status where there is no RAM."""
    header, data, _ = bench.read()
    bench.send([header, data, Buffer(LOW_END, 1, True)])


def long_status(bench: Bench, type: int) -> None:
    """Have 16 bytes for the status: it is the last of them, and what is before it is data."""
    header, *_ = bench.request(type).buffers
    bench.memory.fill(DATA, 16, 0xEE)
    bench.send([header, Buffer(DATA, 16, True)])
    bench.expect(bench.memory.read(DATA, 15) == b"\xee" * 15, "another byte than the last was written")


# --- 50 to 55: reads, writes, flushes ---------------------------------------------------------------------------


def read_at(bench: Bench, sector: int, sectors: int) -> None:
    """Read there."""
    bench.send(bench.read(sector, sectors))


def write_at(bench: Bench, sector: int, sectors: int) -> None:
    """Write there."""
    send(bench, OUT, sector, data_out=fresh_data(0, sectors))


def both_ways(bench: Bench, type: int) -> None:
    """Have data in both directions."""
    send(bench, type, data_out=bytes(SECTOR_SIZE), data_in=SECTOR_SIZE)


def in_order(bench: Bench) -> None:
    """Send write, flush and read at once: the flush must not come back before the write."""
    heads = [bench.add(bench.write(3)), bench.add(bench.request(lib.VIRTIO_BLK_T_FLUSH).buffers)]
    heads.append(bench.add(bench.read(3)))
    bench.kick()
    bench.expect(bench.returned == heads, "they came back in another order")


V = Variant
NO_STATUS = (V("header only", IGNORED, header_only), V("status only", IOERR, status_only))
HEADERS = (
    V("15 bytes", IOERR, partial(send, type=IN, data_in=SECTOR_SIZE, readable=(15,))),
    V("8 and 8", OK, partial(send, type=IN, data_in=SECTOR_SIZE, readable=(8, 8))),
    V("1 and 15", OK, partial(send, type=IN, data_in=SECTOR_SIZE, readable=(1, 15))),
    V("with the data", OK, partial(send, type=OUT, data_out=fresh_data(0, 1), readable=(HEADER.size + SECTOR_SIZE,))),
    V("and half the data", OK, partial(send, type=OUT, data_out=fresh_data(0, 1), readable=(7, 265, 256))),
    V("writable", IOERR, header_writable),
)
STATUSES = (
    V("readable", IGNORED, status_readable),
    V("of no bytes", IOERR, status_empty),
    V("with the data", OK, partial(send, type=IN, data_in=SECTOR_SIZE, writable=(SECTOR_SIZE + 1,))),
    V("16 bytes", OK, partial(long_status, type=lib.VIRTIO_BLK_T_FLUSH)),
    V("16 bytes of a read", IOERR, partial(long_status, type=IN)),
    V("outside RAM", needs_reset(Fault.BUFFER_ADDRESS), status_outside),
)
PLACES = (("2^64-1", 2**64 - 1, 1), ("2^55", 2**55, 1), ("at the end", SECTORS, 1), ("past it", SECTORS - 1, 2))
POSITIONS = (
    *(V(f"read {name}", IOERR, partial(read_at, sector=at, sectors=n)) for name, at, n in PLACES),
    *(V(f"write {name}", IOERR, partial(write_at, sector=at, sectors=n)) for name, at, n in PLACES),
    V("read of the last", OK, partial(read_at, sector=SECTORS - 1, sectors=1)),
    V("write of the last", OK, partial(write_at, sector=SECTORS - 1, sectors=1)),
    V("nothing at the end", OK, partial(send, type=IN, sector=SECTORS)),
    V("nothing behind it", IOERR, partial(send, type=IN, sector=SECTORS + 1)),
)
LENGTHS = (
    *(V(f"read of {n}", IOERR, partial(send, type=IN, data_in=n)) for n in (1, 511, 513)),
    *(V(f"write of {n}", IOERR, partial(send, type=OUT, data_out=bytes(n))) for n in (1, 511, 513)),
    V("write of 0", OK, partial(send, type=OUT)),
)
DIRECTIONS = (V("read", IOERR, partial(both_ways, type=IN)), V("write", IOERR, partial(both_ways, type=OUT)))
READ_ONLY = World(readonly=True)
ON_READ_ONLY = (
    V("write", IOERR, partial(write_at, sector=0, sectors=1), READ_ONLY),
    V("discard", UNSUPP, partial(send, type=lib.VIRTIO_BLK_T_DISCARD, data_out=bytes(16)), READ_ONLY),
    V("write zeroes", UNSUPP, partial(send, type=lib.VIRTIO_BLK_T_WRITE_ZEROES, data_out=bytes(16)), READ_ONLY),
    V("flush", OK, partial(send, type=lib.VIRTIO_BLK_T_FLUSH), READ_ONLY),
    V("read", OK, partial(read_at, sector=0, sectors=1), READ_ONLY),
)
UNKNOWN = tuple(
    V(name, UNSUPP, partial(send, type=type, data_in=SECTOR_SIZE))
    for name, type in (
        ("SCSI", lib.VIRTIO_BLK_T_SCSI_CMD),
        ("SCSI out", lib.VIRTIO_BLK_T_SCSI_CMD | OUT),
        ("BARRIER", lib.VIRTIO_BLK_T_BARRIER),
        ("BARRIER, write", lib.VIRTIO_BLK_T_BARRIER | OUT),
        ("SECURE ERASE", lib.VIRTIO_BLK_T_SECURE_ERASE),
        ("7", 7),
        ("2^32-1", 2**32 - 1),
    )
)
FLUSHES = (
    V("with data", OK, partial(send, type=lib.VIRTIO_BLK_T_FLUSH, data_out=bytes(512), data_in=512)),
    V("sector 1", IOERR, partial(send, type=lib.VIRTIO_BLK_T_FLUSH, sector=1)),
    V("not negotiated", UNSUPP, partial(send, type=lib.VIRTIO_BLK_T_FLUSH), World(without=FLUSH | EVENT_IDX)),
    V("behind a write", OK, in_order),
)
IDS = (
    *(V(f"{n} bytes", OK, partial(send, type=GET_ID, data_in=n)) for n in (0, 19, 20, 21, 4096)),
    V("scattered", OK, partial(send, type=GET_ID, data_in=30, writable=(1, 7, 0, 5, 10, 7, 1))),
    V("with readable data", IOERR, partial(send, type=GET_ID, data_out=bytes(4), data_in=20)),
)
