"""Leases: one writer across all processes, and the kernel says who is alive."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest
from blob_engine import contents, pages

from kvmpy.errors import BlobError, LeaseError
from kvmpy.storage import files
from kvmpy.storage.blob import PageBlob
from kvmpy.storage.lease import LeaseState, acquire, lease_state
from kvmpy.storage.lock import WriterLock, holder, is_locked

HOLD = """
import sys
from kvmpy.storage import files
from kvmpy.storage.blob import PageBlob
blob = PageBlob.open(sys.argv[1])
blob.write(0, b"h" * 512)
print("open", flush=True)
sys.stdin.read()
"""
FORK = """
import os, sys
from kvmpy.storage import files
from kvmpy.storage.blob import PageBlob
blob = PageBlob.open(sys.argv[1])
if os.fork() == 0:
    sys.stdin.read()
    try:
        blob.write(0, b"c" * 512)
    except Exception as error:
        os.write(1, type(error).__name__.encode())
    blob.close()
    os.write(1, b" closed")
    os._exit(0)
print("open", flush=True)
os.kill(os.getpid(), 9)
"""


def started(program: str, path: Path) -> subprocess.Popen[str]:
    """Run ``program`` until it has the blob open."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


@pytest.fixture
def closed(path):
    PageBlob.create(path, 4096).close()
    return path


def test_second_writer_is_refused_while_the_first_lives_and_then_takes_over(closed):
    """Two processes never both write one blob; a dead holder's lease is taken at once."""
    with started(HOLD, closed) as process:
        for attempt in (lambda: PageBlob.open(closed), lambda: acquire(closed)):
            with pytest.raises(LeaseError, match=rf"process {process.pid} on .+ has it open for writing, since 20"):
                attempt()
        state = lease_state(closed)
        assert (state.leased, state.pid, state.host) == (True, process.pid, os.uname().nodename)
        assert contents(closed)[:512] == pages("h")
        process.kill()
        process.wait(10)
        assert lease_state(closed) == LeaseState(False)
        with PageBlob.open(closed) as blob:
            assert blob.read(0, 512) == pages("h")


def test_child_of_a_writer_holds_nothing(closed):
    """fork() copies descriptors, not the right to write: when the parent dies the lease is free."""
    with started(FORK, closed) as process:
        process.wait(10)
        with PageBlob.open(closed) as blob:
            output, _ = process.communicate("", timeout=10)
            assert output == "LeaseError closed"
            blob.write(0, pages("p"))
    assert contents(closed)[:512] == pages("p")


def test_two_opens_in_one_process_are_refused_too(closed):
    with PageBlob.open(closed), pytest.raises(LeaseError, match=f"process {os.getpid()} "):
        PageBlob.open(closed)
    PageBlob.open(closed).close()


def test_readers_need_no_lease(closed):
    with acquire(closed), PageBlob.open(closed, readonly=True) as one, PageBlob.open(closed, readonly=True) as two:
        assert one.read(0, 512) == two.read(0, 512)


def test_lease_can_be_held_for_its_own_sake(closed):
    with acquire(closed) as lease:
        assert lease.held
        assert lease_state(closed).pid == os.getpid()
        assert f"lease {lease.id}" in (closed / "lock").read_text()
        with pytest.raises(LeaseError):
            PageBlob.open(closed)
    assert not lease.held
    lease.close()
    PageBlob.open(closed).close()


def test_lease_that_is_lost_ends_the_writing(closed):
    """Hostile case 68: somebody removed the lock and opened the blob; we touch nothing any more."""
    blob = PageBlob.open(closed)
    blob.write(0, pages("a"))
    (closed / "lock").unlink()
    with pytest.raises(LeaseError, match="the lease is lost"):
        blob.write(0, pages("b"))
    (closed / "lock").touch()
    before = (closed / "meta").read_bytes()
    for change in (lambda: blob.map(0, 1, write=True), lambda: blob.clear(0, 512), blob.snapshot, blob.close):
        with pytest.raises(LeaseError, match="the lease is lost"):
            change()
    assert (closed / "meta").read_bytes() == before
    with PageBlob.open(closed) as other:
        assert other.read(0, 512) == pages("a")


def test_lock_that_is_no_file_is_refused(closed, tmp_path):
    lock, other = closed / "lock", tmp_path / "other"
    other.write_bytes(b"mine")
    lock.unlink()
    for make in (lambda: lock.mkdir(), lambda: os.mkfifo(lock), lambda: lock.symlink_to(other), lambda: None):
        make()
        for use in (lambda: PageBlob.open(closed), lambda: lease_state(closed), lambda: acquire(closed)):
            with pytest.raises(BlobError, match="lock"):
                use()
        if lock.is_dir():
            lock.rmdir()
        elif os.path.lexists(lock):
            lock.unlink()
    assert other.read_bytes() == b"mine"


def test_what_the_lock_says_is_not_believed(closed):
    """It is for people: neither does a dead process's note keep anybody out, nor is it printed as it is."""
    (closed / "lock").write_bytes(b"pid 1\nhost \x1b[2J\nsince \xff\n" + b"x" * 10_000_000)
    assert lease_state(closed) == LeaseState(False)
    with PageBlob.open(closed):
        assert lease_state(closed).pid == os.getpid()
        (closed / "lock").write_bytes(f"pid {os.getpid()}\nhost \x1b[2J\n".encode())
        assert lease_state(closed) == LeaseState(True, os.getpid())
        (closed / "lock").write_bytes(b"pid 1\nhost elsewhere\n")
        assert lease_state(closed) == LeaseState(True, os.getpid())
        with pytest.raises(LeaseError, match=f": process {os.getpid()} has it open for writing$"):
            PageBlob.open(closed)


# --- the lock itself, which raw disks and VHDs have too ---


def test_lock_excludes_and_names_its_holder(tmp_path):
    file = tmp_path / "disk.raw"
    file.write_bytes(b"pid 1\nhost guest\n")
    with file.open("r+b") as one:
        lock = WriterLock(one.fileno(), str(file))
        assert holder(one.fileno()) == os.getpid()
        with pytest.raises(LeaseError, match=f"disk.raw: process {os.getpid()} has it open for writing"):
            WriterLock(one.fileno(), str(file))
        lock.close()
        lock.close()
        assert holder(one.fileno()) is None
        WriterLock(one.fileno(), str(file)).close()
    assert file.read_bytes() == b"pid 1\nhost guest\n"


def test_who_only_asks_is_in_nobodys_way(tmp_path):
    """Also where /proc/locks does not show the holder, who is in another container: then the lock itself is asked."""
    with (tmp_path / "disk.raw").open("w+b") as one:
        assert not is_locked(one.fileno())
        asking = files.reopen(one.fileno(), os.O_RDONLY)
        fcntl.flock(asking, fcntl.LOCK_SH)
        end = Timer(0.001, os.close, [asking])
        end.start()
        lock = WriterLock(one.fileno(), "disk.raw")
        end.join()
        assert is_locked(one.fileno())
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr("kvmpy.storage.lock.holder", lambda fd: None)
            assert is_locked(one.fileno())
            with pytest.raises(LeaseError, match="another process has it open for writing"):
                WriterLock(one.fileno(), "disk.raw")
        lock.close()
