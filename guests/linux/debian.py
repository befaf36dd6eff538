"""Debian's packages that the guests are made of: found by apt, held against checksums of ours, unpacked without root.

``packages.sha256`` names one version of each package: the one that was tried. It is taken as long as apt offers it or
a copy lies here. When Debian has moved on, the version of its signed package lists is taken with the checksum that
stands there, and that is said.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("packages.sha256")


class Package(NamedTuple):
    """One version of a package, and the checksum of its file."""

    sha256: str
    name: str
    version: str
    architecture: str

    @property
    def file_name(self) -> str:
        """As apt names it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_{self.architecture}.deb"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pinned(name: str, table: Path = TABLE) -> Package:
    """Return what our table says of ``name``."""
    packages = [Package(*line.split()) for line in table.read_text().splitlines()]
    return next(package for package in packages if package.name == name)


def offered(name: str) -> list[Package]:
    """Return the versions that apt knows, newest first; none where there is no apt, or no package list."""
    if shutil.which("apt-cache") is None:
        return []
    shown = subprocess.run(["apt-cache", "show", name], capture_output=True, text=True, check=False).stdout
    paragraphs = (dict(re.findall(r"^([\w-]+): (.*)$", text, re.MULTILINE)) for text in shown.split("\n\n"))
    return [
        Package(fields["SHA256"], fields["Package"], fields["Version"], fields["Architecture"])
        for fields in paragraphs
        if "SHA256" in fields
    ]


def is_whole(package: Package, folder: Path) -> bool:
    """Tell whether ``folder`` has the package's file, as its checksum says."""
    path = folder / package.file_name
    return path.exists() and sha256_of(path) == package.sha256


def choose(
    name: str, folder: Path, *, table: Path = TABLE, offers: Callable[[str], list[Package]] = offered
) -> Package:
    """Return the version to build from: ours if ``folder`` or apt has it, else the newest that apt offers."""
    ours = pinned(name, table)
    if is_whole(ours, folder):
        return ours
    candidates = offers(name)
    if not candidates or ours in candidates:
        return ours
    newest = candidates[0]
    if newest.version == ours.version:
        sys.exit(f"{name} {ours.version}: apt's lists say sha256 {newest.sha256}, {table.name} says {ours.sha256}")
    print(
        f"{name}: apt no longer has {ours.version}; {newest.version} is taken, with the checksum of apt's signed lists"
    )
    return newest


def download(package: Package, folder: Path) -> None:
    """Let apt fetch the package's file into ``folder``, and check it against apt's own lists."""
    wanted = f"{package.name}={package.version}"
    # Without this root's apt warns that its own user may not write here.
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", wanted]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = " ".join(result.stderr.split()) or "no reason given"
        sys.exit(f"apt-get download {wanted}: {reason} (are the package lists there? sudo apt update)")


def fetch(package: Package, folder: Path, *, get: Callable[[Package, Path], None] = download) -> Path:
    """Return the package's file in ``folder``, after a download if it is not there; never one with a wrong checksum."""
    target = folder / package.file_name
    if is_whole(package, folder):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {package.name} {package.version}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        get(package, Path(scratch))
        files = list(Path(scratch).glob("*.deb"))
        if len(files) != 1:
            sys.exit(f"{package.name} {package.version}: the download left {len(files)} files in place of one")
        found = sha256_of(files[0])
        if found != package.sha256:
            sys.exit(f"{package.file_name}: its sha256 is {found}, expected {package.sha256}; not used")
        os.replace(files[0], target)
    return target


def member(deb: Path, name: str) -> bytes:
    """Return one file out of a package, by its path with a leading ``./``."""
    tar = ["tar", "--extract", "--to-stdout", name]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as packed:
        data = subprocess.run(tar, stdin=packed.stdout, capture_output=True, check=False).stdout
    if not data:
        sys.exit(f"{deb.name}: there is no {name} in it")
    return data
