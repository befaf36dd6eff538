"""Debian's stock kernel for clouds, out of its package: the kernel as it is, and the modules that a guest here needs.

Which package that is changes with each update, so none is pinned: it is what ``linux-image-cloud-amd64`` depends on,
with the checksum of apt's signed package lists.

A package has no ``modules.dep``: that is made where it is installed. But each module names those that it needs
itself (Linux, scripts/mod/modpost.c, ``depends=`` in its section ``.modinfo``).
"""

import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import debian

META = "linux-image-cloud-amd64"
WANTED = ("virtio_mmio", "virtio_blk", "virtio_rng", "ext4", "crc32c_generic")
"""What is no module of this kernel has to be built into it."""

DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


class Image(NamedTuple):
    """A kernel and modules by their names, each behind those that it needs."""

    release: str
    vmlinuz: bytes
    modules: dict[str, bytes]


def image_name(depends: str) -> str:
    """Return the package that the meta-package's line ``Depends`` names."""
    found = re.match(r"linux-image-[\w.-]+", depends)
    if found is None:
        sys.exit(f"{META}: it should depend on a kernel, and depends on {depends!r}")
    return found[0]


def newest() -> debian.Package:
    """Return the kernel's package that apt has now."""
    command = ["apt-cache", "--no-all-versions", "show", META]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        sys.exit("no apt-cache here: this needs Debian, or whatever has its package lists")
    depends = re.search(r"^Depends: (.*)$", shown, re.MULTILINE)
    offers = debian.offered(image_name(depends[1])) if depends else []
    if not offers:
        sys.exit(f"apt does not know {META}: sudo apt update, on Debian 12")
    return offers[0]


def module_name(path: str) -> str:
    """Return the name of the module in the file ``path``: in it there is no difference between - and _."""
    return Path(path).name.removesuffix(".ko").replace("-", "_")


def needed_by(module: bytes) -> list[str]:
    """Return the modules that a module's file names as its dependencies."""
    found = DEPENDS.search(module)
    names = found[1].decode().split(",") if found else []
    return [module_name(name) for name in names if name]


def in_order(wanted: Iterable[str], modules: Mapping[str, bytes], built_in: Iterable[str] = ()) -> list[str]:
    """Return ``wanted`` and all that they need, in an order in which they can be loaded, without what is built in."""
    order: list[str] = []
    known = set(built_in)

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in known or name in order:
            return
        if name not in modules:
            sys.exit(f"this kernel has no {name}, neither as a module nor built in")
        if name in above:
            sys.exit(f"modules need one another: {' '.join((*above, name))}")
        for other in needed_by(modules[name]):
            visit(other, (*above, name))
        order.append(name)

    for name in wanted:
        visit(name, ())
    return order


def unpack(deb: Path, wanted: Iterable[str] = WANTED) -> Image:
    """Return what a guest needs out of the kernel's package."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as packed:
        assert packed.stdout is not None
        files = dict(_files(packed.stdout))
    kernels = [path for path in files if path.startswith("boot/vmlinuz-")]
    lists = [data for path, data in files.items() if path.endswith("/modules.builtin")]
    if len(kernels) != 1 or len(lists) != 1:
        sys.exit(f"{deb.name}: {len(kernels)} kernels and {len(lists)} lists of what is built in, one each is wanted")
    built_in = [module_name(line) for line in lists[0].decode().split()]
    modules = {module_name(path): data for path, data in files.items() if path.endswith(".ko")}
    order = in_order(wanted, modules, built_in)
    return Image(kernels[0].removeprefix("boot/vmlinuz-"), files[kernels[0]], {name: modules[name] for name in order})


def _files(packed: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=packed, mode="r|") as tar:
        for member in tar:
            path = member.name.removeprefix("./").removeprefix("usr/")
            if member.isfile() and path.startswith(("boot/vmlinuz-", "lib/modules/")):
                file = tar.extractfile(member)
                assert file is not None
                yield path, file.read()
