"""Build Linux guests into ``build/linux``: ``python3 guests/linux/build.py``. What is up to date stays.

Kernels from Debian's source package by the fragments of this folder, initial root file systems and a disk from its
programs and Debian's busybox. ``SHA256SUMS`` has the checksum of every file (``sha256sum --check`` reads it), and
``made-from`` what each group of files was made from. A group whose line there is missing or old, or with a file that
is not what its checksum says, is made anew: files are moved to their places whole, and the line is written last.

Standard library only: any python3 runs this, before kvmpy is installed.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import debian
import kernel
import programs
import rootfs

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parents[1] / "build" / "linux"
SUMS, MADE_FROM = "SHA256SUMS", "made-from"

TOOLS = {
    "gcc": "gcc",
    "ld": "binutils",
    "make": "make",
    "bc": "bc",
    "bison": "bison",
    "flex": "flex",
    "lz4": "lz4",
    "tar": "tar",
    "xz": "xz-utils",
    "dpkg-deb": "dpkg",
    "mke2fs": "e2fsprogs",
    "debugfs": "e2fsprogs",
}
HEADERS = {"gelf.h": "libelf-dev", "stdlib.h": "libc6-dev", "asm/unistd.h": "linux-libc-dev"}


class Group(NamedTuple):
    """Files that are made together. ``made_from`` changes when they have to be made anew."""

    name: str
    outputs: tuple[str, ...]
    made_from: str
    make: Callable[[Path], None]


def say(words: str) -> None:
    print(f"linux-guest: {words}", flush=True)


def missing(tools: dict[str, str] = TOOLS, headers: dict[str, str] = HEADERS) -> str | None:
    """Return one line that names what is missing and the command that installs it, or None."""
    packages = [package for tool, package in tools.items() if not shutil.which(tool, path=rootfs.SYSTEM_PATH)]
    if "gcc" not in packages:
        packages += [package for header, package in headers.items() if not has_header(header)]
    names = " ".join(dict.fromkeys(packages))
    return f"missing: {names} -- install with: sudo apt install {names}" if names else None


def has_header(header: str) -> bool:
    command = ["gcc", "-fsyntax-only", "-x", "c", "-"]
    text = f"#include <{header}>\n"
    return subprocess.run(command, input=text, text=True, capture_output=True, check=False).returncode == 0


# --- what is finished -------------------------------------------------------------------------------------------


def read_lines(path: Path) -> dict[str, str]:
    """Return ``name: checksum`` of a file in the form of sha256sum; nothing where there is no file."""
    if not path.exists():
        return {}
    pairs = (line.split(maxsplit=1) for line in path.read_text().splitlines())
    return {name: checksum for checksum, name in pairs}


def write_lines(path: Path, lines: dict[str, str]) -> None:
    half = path.with_name(path.name + ".new")
    half.write_text("".join(f"{checksum}  {name}\n" for name, checksum in sorted(lines.items())))
    os.replace(half, path)


def is_finished(group: Group, output: Path) -> bool:
    """Tell whether the files of ``group`` are there, made from what they would be made from now, and unharmed."""
    if read_lines(output / MADE_FROM).get(group.name) != group.made_from:
        return False
    sums = read_lines(output / SUMS)
    paths = [output / name for name in group.outputs]
    return all(path.exists() and debian.sha256_of(path) == sums.get(path.name) for path in paths)


def finish(group: Group, output: Path) -> None:
    """Make the files of ``group`` and put them in their places; whenever this is cut short, they are not finished."""
    made_from = read_lines(output / MADE_FROM)
    made_from.pop(group.name, None)
    write_lines(output / MADE_FROM, made_from)
    scratch = output / "work" / group.name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    group.make(scratch)
    sums = read_lines(output / SUMS) | {name: debian.sha256_of(scratch / name) for name in group.outputs}
    for name in group.outputs:
        os.replace(scratch / name, output / name)
    write_lines(output / SUMS, {name: checksum for name, checksum in sums.items() if (output / name).exists()})
    write_lines(output / MADE_FROM, made_from | {group.name: group.made_from})


# --- the groups -------------------------------------------------------------------------------------------------


def digest(*parts: str | bytes) -> str:
    """Return one checksum of several things, none of which runs into the next."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(b"%d:" % len(data) + data)
    return whole.hexdigest()


def compiler() -> str:
    """Return the version of gcc; nothing without one: then no group is finished, and gcc is named as missing."""
    if shutil.which("gcc") is None:
        return ""
    return subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=False).stdout


def texts(*names: str) -> Iterable[bytes]:
    return ((HERE / name).read_bytes() for name in names)


def program_group(output: Path) -> Group:
    packages = output / "packages"
    busybox = debian.choose("busybox-static", packages)

    def make(scratch: Path) -> None:
        say("programs, initial root file systems, a disk")
        programs.make_all(scratch, debian.member(debian.fetch(busybox, packages), "./bin/busybox"))

    sources = texts("programs.py", "newc.py", "rootfs.py", "user.h", "init.sh", *(f"{n}.c" for n in programs.PROGRAMS))
    return Group("programs", programs.outputs(), digest(busybox.sha256, compiler(), *sources), make)


def kernel_groups(output: Path) -> list[Group]:
    packages, work = output / "packages", output / "work"
    source = debian.choose(kernel.SOURCE, packages)

    def group(variant: str) -> Group:
        def make(scratch: Path) -> None:
            deb = debian.fetch(source, packages)
            if not (work / kernel.SOURCE).exists():
                say(f"unpacking {source.name} {source.version}")
            unpacked = kernel.unpack(deb, work)
            say(f"vmlinux{variant}: a few minutes")
            kernel.build(variant, unpacked, work, scratch)

        asked = (f"{name}={value}" for name, value in sorted(kernel.wanted(variant).items()))
        made_from = digest(source.sha256, compiler(), *texts("kernel.py"), *asked)
        return Group(f"kernel{variant}", kernel.outputs(variant), made_from, make)

    return [group(variant) for variant in kernel.VARIANTS]


def build_all(groups: list[Group], output: Path) -> None:
    """Make what is not finished, the quick things first."""
    unfinished = [group for group in groups if not is_finished(group, output)]
    lacking = missing() if unfinished else None
    if lacking:
        sys.exit(lacking)
    for group in unfinished:
        started = time.monotonic()
        finish(group, output)
        say(f"{', '.join(group.outputs)} in {time.monotonic() - started:.0f} s")
    shutil.rmtree(output / "work", ignore_errors=True)


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (OUTPUT / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second build waits, then finds all done
        build_all([program_group(OUTPUT), *kernel_groups(OUTPUT)], OUTPUT)
    say(f"{len(read_lines(OUTPUT / SUMS))} files are up to date in {OUTPUT.relative_to(HERE.parents[1])}")


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit("usage: build.py")
    main()
