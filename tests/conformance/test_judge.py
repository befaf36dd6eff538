"""The judge finds what a defective engine does, whatever the case expected. The engines are the twin with a defect."""

import logging
import os

import pytest

from kvmpy._shim import lib
from kvmpy.conformance.bench import Bench
from kvmpy.conformance.case import IGNORED, IOERR, OK, Variant, Verdict, needs_reset
from kvmpy.conformance.image import GUARD
from kvmpy.conformance.judge import judge
from kvmpy.devices.block_execute import Result
from kvmpy.devices.block_python import PythonBlock
from kvmpy.devices.virtqueue import Fault


def friendly(bench):
    bench.send(bench.read())


def write_past_the_end(bench):
    bench.send(bench.write(63, 2))


def broken_chain(bench):
    head = bench.add(bench.read())
    bench.ring.edit(head, 0, set_flags=8)
    bench.kick()


def raises(bench):
    raise RuntimeError("in the case")


def harmful(bench):
    bench.expect(0, "the case saw harm")


class Scribbler(PythonBlock):
    """Writes a byte of guest memory that nobody gave it."""

    def execute(self, request):
        self._memory.write(0x9000, b"x")
        return super().execute(request)


class Liar(PythonBlock):
    """Reads other data than the disk's."""

    def execute(self, request):
        result = super().execute(request)
        self._memory.write(request.command.data[0].gpa, b"x")
        return result


class Miscounter(PythonBlock):
    """Says that it has written more than it has."""

    def execute(self, request):
        return super().execute(request)._replace(data_written=4096)


class Wild(PythonBlock):
    """Writes a sector that nobody asked it to."""

    def execute(self, request):
        os.pwrite(self._image.table()[0].fd, b"x", GUARD + 1000)
        return super().execute(request)


class Outside(PythonBlock):
    """Writes a byte of the file that is not the disk's."""

    def execute(self, request):
        os.pwrite(self._image.table()[0].fd, b"x", GUARD - 1)
        return super().execute(request)


class Partial(PythonBlock):
    """Writes what fits, and then says that it does not fit."""

    def execute(self, request):
        os.pwrite(self._image.table()[-1].fd, b"x", GUARD + 31 * 512)
        return super().execute(request)


class Raiser(PythonBlock):
    def execute(self, request):
        raise RuntimeError("in the worker")


class Talker(PythonBlock):
    """Logs each byte."""

    def execute(self, request):
        for _ in range(100):
            logging.getLogger("kvmpy.devices").warning("a request")
        return super().execute(request)


class Forgetful(PythonBlock):
    """Consumes chains and never gives them back."""

    def open_queue(self, setup, interrupt, kick_fd):
        queue = super().open_queue(setup, interrupt, kick_fd)
        queue._ring.push = lambda chain, written: None
        return queue


class Exhausted(PythonBlock):
    """Opens one queue, and no more that live."""

    opened = 0

    def open_queue(self, setup, interrupt, kick_fd):
        queue = super().open_queue(setup, interrupt, kick_fd)
        if self.opened:
            queue.process = lambda: None
        self.opened += 1
        return queue


class Hasty(PythonBlock):
    """Answers a chain that it then finds broken."""

    def open_queue(self, setup, interrupt, kick_fd):
        queue = super().open_queue(setup, interrupt, kick_fd)
        memory, pop = self._memory, queue._ring.pop

        def hasty():
            status = memory.read(setup.descriptor_area + 32, 8)
            memory.write(int.from_bytes(status, "little"), b"\0")
            return pop()

        queue._ring.pop = hasty
        return queue


class Careless(PythonBlock):
    """Accepts everything."""

    def execute(self, request):
        return Result(lib.VIRTIO_BLK_S_OK)


def judged(run, make_engine, other, *, packed=False):
    return judge(Variant("", OK, run), make_engine, other, packed=packed)


@pytest.mark.parametrize(
    ("make_engine", "run", "verdict", "why"),
    [
        (Scribbler, friendly, Verdict.FAIL, "guest memory was written at gpa 0x9000"),
        (Liar, friendly, Verdict.FAIL, "a read of sector 0 got other data"),
        (Miscounter, friendly, Verdict.FAIL, "a read of 512 bytes reports 4097 written"),
        (Wild, friendly, Verdict.FAIL, "the disk does not hold what it must"),
        (Outside, friendly, Verdict.FAIL, "a byte around the disk was written"),
        (Partial, write_past_the_end, Verdict.FAIL, "the disk does not hold what it must"),
        (Careless, write_past_the_end, Verdict.FAIL, "the disk does not hold what it must"),
        (Raiser, friendly, Verdict.FAIL, "a worker raised RuntimeError: in the worker"),
        (Talker, friendly, Verdict.FAIL, "100 lines were logged"),
        (Forgetful, friendly, Verdict.WEDGED, "1 chains did not come back"),
        (Exhausted, friendly, Verdict.WEDGED, "no read is served after a reset"),
        (Hasty, broken_chain, Verdict.FAIL, "a status without a used entry"),
        (PythonBlock, raises, Verdict.FAIL, "it raised RuntimeError: in the case"),
        (PythonBlock, harmful, Verdict.FAIL, "the case saw harm"),
    ],
)
def test_planted_defect_is_judged(make_engine, run, verdict, why, other):
    """WEDGED and FAIL are what a defect of the device gets, and the detail says which."""
    judgement = judged(run, make_engine, other)
    assert judgement.verdict is verdict
    assert why in judgement.detail


def test_harm_to_another_disk_is_found(other):
    """A device that disturbs its neighbour fails, whatever it did to its own driver."""

    def disturb(bench):
        other.image.truncate(0)
        friendly(bench)

    judgement = judged(disturb, PythonBlock, other)
    assert judgement.verdict is Verdict.FAIL
    assert judgement.detail == "another disk no longer serves reads"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("run", "verdict", "answer"),
    [
        (friendly, Verdict.PASS, OK),
        (write_past_the_end, Verdict.REJECT, IOERR),
        (broken_chain, Verdict.REJECT, needs_reset(Fault.UNKNOWN_FLAGS)),
        (lambda bench: None, Verdict.PASS, IGNORED),
    ],
)
def test_sound_engine_is_judged_by_its_answer(run, verdict, answer, packed, other):
    assert judged(run, PythonBlock, other, packed=packed) == (verdict, answer, "")


def test_bench_gives_back_what_it_opened(other):
    """A thousand variants run in one process."""
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        judged(friendly, PythonBlock, other)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_engine_that_cannot_be_made_leaves_nothing_open():
    before = sorted(os.listdir("/proc/self/fd"))

    def refuse(memory, image, settings):
        raise OSError("no engine")

    with pytest.raises(OSError, match="no engine"):
        Bench(refuse, packed=False, world=Variant("", OK, friendly).world)
    assert sorted(os.listdir("/proc/self/fd")) == before
