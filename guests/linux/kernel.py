"""Build a Linux kernel from Debian's source package and configuration fragments of ours.

The same source, fragments and compiler give the same bytes: no time, no path and no name of a machine goes in.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = "linux-source-6.1"

# What is built, and of which fragments; a later one overrides.
VARIANTS = {
    "": ("fast",),
    "-smp": ("fast", "fast-smp"),
    "-full": ("fast", "fast-smp", "full"),
}

# Kbuild reads these in place of the clock, the user, the host and a count of builds.
SAME_EVERYWHERE = {
    "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
    "KBUILD_BUILD_USER": "kvmpy",
    "KBUILD_BUILD_HOST": "kvmpy",
    "KBUILD_BUILD_VERSION": "1",
    "LC_ALL": "C",
    "TZ": "UTC",
}
FOREIGN = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARCH", "CROSS_COMPILE", "LOCALVERSION", "KCFLAGS", "KCONFIG_CONFIG")
"""What a caller's environment, or the make that runs this, would change in the kernel's own make."""

LAST_LINES = 20


def outputs(variant: str) -> tuple[str, ...]:
    """Return the names of what `build` makes."""
    return (f"vmlinux{variant}", f"bzImage{variant}", f"config{variant}")


def options(text: str) -> dict[str, str]:
    """Return the options that a configuration sets; the last word counts. ``# CONFIG_X is not set`` is ``n``."""
    found = {}
    for line in text.splitlines():
        match line.removeprefix("# ").split(maxsplit=1):
            case [name, "is not set"] if name.startswith("CONFIG_"):
                found[name] = "n"
            case _ if line.startswith("CONFIG_"):
                name, _, value = line.partition("=")
                found[name] = value
    return found


def fragment(name: str) -> Path:
    return HERE / f"{name}.config"


def wanted(variant: str) -> dict[str, str]:
    """Return the options that the fragments of ``variant`` ask for."""
    return options("\n".join(fragment(name).read_text() for name in VARIANTS[variant]))


def dropped(asked: dict[str, str], built: dict[str, str]) -> list[str]:
    """Return what was asked for and is otherwise in the kernel's own configuration: for want of another option."""
    return [f"{name}={value}" for name, value in asked.items() if built.get(name, "n") != value]


def unpack(deb: Path, folder: Path) -> Path:
    """Unpack the kernel's source out of its package; half an unpacking never has the final name."""
    source = folder / SOURCE
    if source.exists():
        return source
    half = folder / "unpacking"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    tarball = f"./usr/src/{SOURCE}.tar.xz"
    pipe = f'dpkg-deb --fsys-tarfile "$1" | tar -xO {tarball} | tar -xJ -C "$2"'
    result = subprocess.run(["bash", "-o", "pipefail", "-c", pipe, "unpack", deb, half], check=False)
    if result.returncode:
        sys.exit(f"{deb.name}: {tarball} could not be unpacked")
    os.replace(half / SOURCE, source)
    half.rmdir()
    return source


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in FOREIGN} | SAME_EVERYWHERE


def make(source: Path, objects: Path, *arguments: str) -> None:
    """Run the kernel's make at low priority; what it said last is shown when it fails."""
    command = ["nice", "make", "-s", "-C", source, f"O={objects}", "ARCH=x86_64", *arguments]
    log = objects / "kvmpy.log"
    with log.open("wb") as file:
        result = subprocess.run(command, env=environment(), stdout=file, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        said = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        sys.exit("\n".join([*said, f"{' '.join(map(str, command))}: failed"]))


def build(variant: str, source: Path, work: Path, target: Path) -> None:
    """Build one kernel anew and put its outputs into the folder ``target``."""
    objects = work / f"objects{variant}"
    shutil.rmtree(objects, ignore_errors=True)
    objects.mkdir(parents=True)
    asked = wanted(variant)
    chosen = objects / "kvmpy.config"
    chosen.write_text("".join(f"{name}={value}\n" for name, value in asked.items()))
    make(source, objects, f"KCONFIG_ALLCONFIG={chosen}", "allnoconfig")
    lost = dropped(asked, options((objects / ".config").read_text()))
    if lost:
        sys.exit(f"vmlinux{variant}: this source takes otherwise: {', '.join(lost)}")
    make(source, objects, f"-j{os.cpu_count()}", "vmlinux", "bzImage")
    built = ("vmlinux", "arch/x86/boot/bzImage", ".config")
    for path, name in zip(built, outputs(variant), strict=True):
        shutil.copyfile(objects / path, target / name)
    shutil.rmtree(objects)
