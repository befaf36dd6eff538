"""Build the lesson guests with gcc and binutils alone: ``python3 guests/build.py``. What is up to date stays.

``--install FOLDER`` then copies images and sources there: what a wheel carries.

Each ``NAME.S`` (with ``NAME.c``, if there is one) becomes ``build/guests/NAME.bin``, a flat image, or ``NAME.elf``.
The Mode line of its header decides which. The SMP guest is copied to ``guest.img`` in the checkout's root.
Standard library only: any python3 runs this, before kvmpy is installed.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "build" / "guests"
GUEST_IMAGE = HERE.parent / "guest.img"
IMAGE_LESSON = "smp"

TOOLS = {"gcc": "gcc", "ld": "binutils", "objcopy": "binutils"}
COMPILE = ["gcc", "-c", "-m64", f"-I{HERE}", "-Wall", "-Wextra"]
# A kernel's C: no red zone (interrupts), no SSE (nobody has enabled it), nothing that wants a run-time library.
FREESTANDING = [
    *("-O2", "-std=gnu11", "-march=x86-64", "-mgeneral-regs-only", "-mno-red-zone", "-ffreestanding", "-fno-builtin"),
    *("-fno-pic", "-fno-pie", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none"),
    "-fno-strict-aliasing",
]
LINK = ["ld", "-m", "elf_x86_64", "-static", "-nostdlib", "-z", "max-page-size=0x1000", "-z", "noexecstack"]


class Kind(NamedTuple):
    """How a lesson is linked, and what objcopy makes of it."""

    script: str
    suffix: str
    objcopy: str


FLAT = Kind("flat.ld", ".bin", "binary")
ELF32 = Kind("elf.ld", ".elf", "elf32-i386")
ELF64 = Kind("elf.ld", ".elf", "elf64-x86-64")
KINDS = {
    "real mode": FLAT,
    "boot sector": Kind("bootsector.ld", ".bin", "binary"),
    "bzImage": Kind("bzimage.ld", ".bin", "binary"),
    # Loaders of multiboot 1 and 2 want a 32-bit file, whatever the code in it becomes later.
    "multiboot 1": ELF32,
    "multiboot 2": ELF32,
    "ELF32": ELF32,
    "PVH": ELF64,
    "ELF64": ELF64,
}


def kind_of(source: Path) -> Kind:
    """Return how ``source`` is built: by the words of its Mode line before the first comma."""
    mode = re.search(r"^# Mode:\s+([^,\n]+)", source.read_text(), re.MULTILINE)
    if mode is None or mode[1] not in KINDS:
        sys.exit(f"{source}: its header has no Mode line that begins with one of: {', '.join(KINDS)}")
    return KINDS[mode[1]]


def lessons() -> list[Path]:
    """Return the sources of all lessons, by name."""
    return sorted(HERE.glob("*.S"))


def image(source: Path) -> Path:
    """Return where the built ``source`` lies."""
    return OUTPUT / (source.stem + kind_of(source).suffix)


def run(*command: str | Path) -> None:
    """Run a tool; what it says is shown, and its failure ends the build."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stderr}".rstrip())
    sys.stderr.write(result.stderr)


def build(source: Path) -> Path:
    """Make the image of ``source`` anew. A build that is interrupted leaves no half image."""
    kind = kind_of(source)
    target = image(source)
    objects = []
    for part in (source, source.with_suffix(".c")):
        if part.exists():
            objects.append(target.with_name(part.name + ".o"))
            run(*COMPILE, *(FREESTANDING if part.suffix == ".c" else []), part, "-o", objects[-1])
    linked = target.with_suffix(".linked")
    run(*LINK, "-T", HERE / kind.script, *objects, "-o", linked)
    finished = target.with_suffix(".new")
    run("objcopy", "-O", kind.objcopy, linked, finished)
    for left in (*objects, linked):
        left.unlink()
    os.replace(finished, target)
    return target


def is_stale(source: Path) -> bool:
    """Tell whether the image of ``source`` is missing or older than anything that it may be made of."""
    target = image(source)
    shared = [path for pattern in ("*.h", "*.inc", "*.ld", "build.py") for path in HERE.glob(pattern)]
    made_of = [source, *source.parent.glob(source.stem + ".c"), *shared]
    return not target.exists() or target.stat().st_mtime_ns < max(path.stat().st_mtime_ns for path in made_of)


def missing_tools() -> str | None:
    """Return one line that names what is missing and the command that installs it, or None."""
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            return f"{tool} is missing: apt install {package}"
    return None


def build_all() -> list[Path]:
    """Build what is out of date and return the images that were made."""
    stale = [source for source in lessons() if is_stale(source)]
    if stale:
        missing = missing_tools()
        if missing:
            sys.exit(missing)
        OUTPUT.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(build, stale))
    guest = image(HERE / f"{IMAGE_LESSON}.S")
    if not GUEST_IMAGE.exists() or GUEST_IMAGE.stat().st_mtime_ns < guest.stat().st_mtime_ns:
        shutil.copyfile(guest, GUEST_IMAGE)
        made.append(GUEST_IMAGE)
    return made


def install(target: Path) -> None:
    """Copy the built lessons, and their sources for the headers, to the folder ``target``, which is made anew."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for source in lessons():
        shutil.copyfile(source, target / source.name)
        shutil.copyfile(image(source), target / image(source).name)


def main(arguments: list[str]) -> None:
    for path in build_all():
        print(f"built {path.relative_to(HERE.parent)}")
    match arguments:
        case []:
            return
        case ["--install", target]:
            install(Path(target))
        case _:
            sys.exit("usage: build.py [--install FOLDER]")


if __name__ == "__main__":
    main(sys.argv[1:])
