"""Make an ext4 file system in a file, with what is wanted in it: no root rights, no mount, nothing but e2fsprogs.

The entries are those of an initramfs (``newc.Entry``), so that one list serves both. Device nodes are left out: a
kernel mounts devtmpfs on /dev. The same entries and options give the same bytes.
"""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from newc import Entry

MiB = 1 << 20
BLOCK_SIZE = 4096
UUID = "6b766d70-7900-4000-8000-000000000001"
# mke2fs takes neither a time nor an owner; a file system without them is the same whoever makes it.
TIMES = ("atime", "ctime", "mtime", "crtime")
SYSTEM_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def tool(name: str) -> str:
    """Return where ``name`` of e2fsprogs is: in a folder that a user's PATH may lack."""
    found = shutil.which(name, path=SYSTEM_PATH)
    if found is None:
        sys.exit(f"{name} is missing: apt install e2fsprogs")
    return found


def stage(entries: Iterable[Entry], root: Path) -> list[str]:
    """Lay ``entries`` out below ``root`` and return their names."""
    names = []
    for entry in entries:
        path = root / entry.name
        match stat.S_IFMT(entry.mode):
            case stat.S_IFDIR:
                path.mkdir()
            case stat.S_IFREG:
                path.write_bytes(entry.data)
            case stat.S_IFLNK:
                path.symlink_to(entry.data.decode())
            case _:
                continue
        if not stat.S_ISLNK(entry.mode):
            path.chmod(stat.S_IMODE(entry.mode))
        names.append(entry.name)
    return names


def run(*command: str | Path, script: str | None = None) -> None:
    """Run a tool. debugfs ends with 0 whatever became of its script: what it says after its version is a failure."""
    # E2FSPROGS_FAKE_TIME is what e2fsprogs takes for now.
    environment = os.environ | {"E2FSPROGS_FAKE_TIME": "1", "TZ": "UTC"}
    result = subprocess.run(command, input=script, env=environment, capture_output=True, text=True, check=False)
    if result.returncode or (script and len(result.stderr.splitlines()) > 1):
        sys.exit(f"{' '.join(map(str, command))}\n{result.stderr}".rstrip())


def make_ext4(
    target: Path, entries: Iterable[Entry] = (), *, size: int = 16 * MiB, journal: bool = True, features: str = ""
) -> None:
    """Write a file system of ``size`` bytes to ``target``: 4 KiB blocks, all tables zeroed, owned by root.

    ``features`` is what ``mke2fs -O`` takes, for example ``^metadata_csum``.
    """
    wanted = ",".join(filter(None, ("has_journal" if journal else "^has_journal", features)))
    extended = f"root_owner=0:0,hash_seed={UUID},lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        names = ["/", *stage(entries, root)]
        target.unlink(missing_ok=True)
        command = [tool("mke2fs"), "-q", "-F", "-t", "ext4", "-b", str(BLOCK_SIZE), "-U", UUID, "-O", wanted]
        run(*command, "-E", extended, "-d", root, target, f"{size // 1024}k")
    changes = [f'sif "{name}" {field} 0' for name in names for field in ("uid", "gid")]
    changes += [f'sif "{name}" {field} @1' for name in [*names, "/lost+found"] for field in TIMES]
    changes += [f'sif "{name}" {field}_extra 0' for name in [*names, "/lost+found"] for field in TIMES]
    run(tool("debugfs"), "-w", "-f", "-", target, script="\n".join(changes))
