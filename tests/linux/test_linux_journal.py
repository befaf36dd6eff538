"""What an ext4 guest has synced survives kill -9 of its machine: the journal recovers, and the file system is clean.

A guest writes files and says after each fsync which will be there whatever happens. Its process is killed somewhere.
The next boot finds every promised file whole, the journal replayed; and e2fsck has nothing to say to what it leaves.
"""

import os
import random
import re
import subprocess
from pathlib import Path

import linux_runs
from linux_runs import ext4, initramfs, kernel, run, started

from kvmpy.storage.convert import export_disk, import_disk

pytestmark = linux_runs.pytestmark

ROUNDS = 20 if linux_runs.CAMPAIGN else 1
MOST_FILES = 40
APPEND = "console=ttyS0 quiet panic=-1 reboot=k"
SYNCED = re.compile(rb"synced (\d+) ")


def write_and_kill(disk: str, initrd: Path, files: int) -> int:
    """Run the writer, kill it after ``files`` promises or a little later, and return the last promise heard."""
    last, heard = 0, b""
    with started(kernel("vmlinux"), "--initrd", initrd, "--disk", disk, append=APPEND) as process:
        assert process.stdout is not None
        first = None
        while first is None or last - first < files:
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            assert chunk, f"the guest ended: {heard!r}"
            heard += chunk
            promised = [int(number) for number in SYNCED.findall(heard)]
            if promised:
                first, last = promised[0], promised[-1]
    return last


def fsck(image: Path) -> None:
    """Check the file system in ``image`` without changing it: e2fsck finds nothing."""
    done = subprocess.run(
        [linux_runs.rootfs.tool("e2fsck"), "-f", "-n", image], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_synced_files_survive_kill_of_the_machine(tmp_path: Path) -> None:
    seed = int(os.environ.get("KVMPY_SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    choose = random.Random(seed)
    initrd = initramfs(tmp_path / "i.cpio", "ext4_writer")
    image, recovered = tmp_path / "disk.img", 0
    for number in range(ROUNDS):
        if number % 5 == 0:  # a new file system now and then; between them the old one goes on
            ext4(image)
            blob = tmp_path / f"disk{number}.blob"
            import_disk(str(image), str(blob), format="raw")
        disk = f"{image},format=raw" if number % 2 else str(blob)
        last = write_and_kill(disk, initrd, choose.randrange(1, MOST_FILES))
        verify = f"console=ttyS0 panic=-1 reboot=k -- verify {last}"
        checked = run(kernel("vmlinux"), "--initrd", initrd, "--disk", disk, append=verify)
        assert f"verified {last} of {last}" in checked.output, checked
        recovered += "recovery complete" in checked.output
        raw = image
        if not number % 2:
            raw = tmp_path / "check.img"
            raw.unlink(missing_ok=True)
            export_disk(str(blob), str(raw), format="raw")
        fsck(raw)
    print(f"{ROUNDS} kills, the journal was replayed after {recovered}")
    assert recovered
