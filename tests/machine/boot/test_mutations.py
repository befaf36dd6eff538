"""Ten thousand damaged images through every loader: each loads cleanly or is refused with an offset, nothing else.

``KVMPY_CAMPAIGN=1`` runs all of them, otherwise a fiftieth runs; ``KVMPY_SEED`` repeats a run.
"""

import os
import random

import pytest
from boot_images import EVERY_IMAGE, bzimage
from packed_images import PACK, payload

from kvmpy import ImageError, MiB
from kvmpy.machine import layout
from kvmpy.machine.boot import BootOptions, CpuMode, Module, boot
from kvmpy.machine.boot.inspection import inspect
from kvmpy.machine.memory import GuestMemory

CAMPAIGN = 10_000
ROUNDS = CAMPAIGN if os.environ.get("KVMPY_CAMPAIGN") == "1" else CAMPAIGN // 50
INTERESTING = (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
HEADERS = 0x290
"""Most damage falls on these first bytes: behind them the images have little to misread."""

ORIGINALS = [(name, image) for name, images in EVERY_IMAGE.items() for image in images]
KERNELS = [(name, image) for name, image in ORIGINALS if name in ("pvh", "elf")]
WRITTEN = ((layout.BOOT_INFO, layout.BOOT_INFO_SIZE), (layout.COMMAND_LINES, layout.COMMAND_LINES_SIZE))
"""What a loader may write between 0x9fc00 and 1 MiB."""


def position(rng: random.Random, size: int) -> int:
    """Choose an offset in an image, mostly in its headers."""
    return rng.randrange(min(size, HEADERS) if rng.random() < 0.9 else size)


def flip(rng: random.Random, image: bytearray) -> None:
    """Flip a few bits."""
    for _ in range(rng.randint(1, 8)):
        image[position(rng, len(image))] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, image: bytearray) -> None:
    """Set a field, or one a little off it, to a value at the edge of something."""
    size = rng.choice((1, 2, 4, 8))
    at = position(rng, len(image)) // size * size
    value = (rng.choice(INTERESTING) + rng.choice((0, 0, 0, -1, 1))) % 2 ** (8 * size)
    image[at : at + size] = value.to_bytes(size, "little")


def truncate(rng: random.Random, image: bytearray) -> None:
    """Cut the end off, down to nothing at all."""
    del image[position(rng, len(image)) :]


def splice(rng: random.Random, image: bytearray) -> None:
    """Put a piece of another image somewhere, or a piece of this one."""
    other = rng.choice(ORIGINALS)[1] if rng.random() < 0.5 else bytes(image)
    start = rng.randrange(len(other))
    piece = other[start : start + rng.randint(1, 64)]
    at = position(rng, len(image))
    image[at : at + rng.choice((0, len(piece)))] = piece


MUTATIONS = (flip, flip, overwrite, overwrite, overwrite, truncate, splice)


def mutate(rng: random.Random, original: bytes) -> bytes:
    """Return ``original`` damaged in one to four ways."""
    image = bytearray(original)
    for _ in range(rng.randint(1, 4)):
        if image:
            rng.choice(MUTATIONS)(rng, image)
    return bytes(image)


def damaged(rng: random.Random) -> tuple[str, bytes]:
    """Return a damaged image, and the protocol that it offered when it was whole."""
    name, original = rng.choice(ORIGINALS)
    return (name, mutate(rng, original)) if rng.random() < 0.6 else damaged_and_packed(rng)


def damaged_and_packed(rng: random.Random) -> tuple[str, bytes]:
    """Return a packed file, or a bzImage with a packed kernel, damaged before it was packed or behind."""
    packing, (name, kernel) = rng.choice(list(PACK)), rng.choice(KERNELS)
    inside = rng.random() < 0.5
    kernel = mutate(rng, kernel) if inside else kernel
    if rng.random() < 0.5:
        packed = PACK[packing](kernel)
        return name, packed if inside else mutate(rng, packed)
    packed = payload(packing, kernel)
    return "bzimage", bzimage(payload=packed if inside else mutate(rng, packed))


def options_for(rng: random.Random, name: str, module: str) -> BootOptions:
    """Return what the protocol serves, or next to nothing and detection."""
    if rng.random() < 0.5:
        return BootOptions(unpack=True)
    options = BootOptions(format=name)
    if name in ("pvh", "multiboot1", "multiboot2"):
        return options._replace(append="a=b", initrd=module, modules=(Module(module, "line"),))
    if name == "bzimage":
        return options._replace(append="a=b", initrd=module, unpack=rng.random() < 0.8)
    if name == "flat":
        return options._replace(mode=rng.choice(list(CpuMode)))
    return options


def reserved(memory: GuestMemory) -> list[bytes]:
    """Return the bytes between 0x9fc00 and 1 MiB that no loader may write."""
    found, start = [], layout.LOW_RAM_END
    for gpa, size in WRITTEN:
        found.append(memory.read(start, gpa - start))
        start = gpa + size
    return [*found, memory.read(start, layout.HIGH_MEMORY - start)]


def try_to_boot(path: str, memory: GuestMemory, options: BootOptions, where: str) -> ImageError | None:
    """Boot and return the refusal, or None after a clean load; any other exception fails the test."""
    try:
        entry = boot(path, memory, options)
    except ImageError as error:
        return error
    except Exception as error:
        raise AssertionError(where) from error
    assert memory.contains(entry.rip, 1), where
    return None


def look(path: str, where: str) -> None:
    """Inspect the file, which only fails when it is empty."""
    if not os.path.getsize(path):
        return
    try:
        inspect(path)
    except Exception as error:
        raise AssertionError(where) from error


@pytest.mark.timeout(1800)
def test_damaged_images_load_cleanly_or_are_refused_with_an_offset(tmp_path, capsys):
    """A damaged image gives an ImageError that names the offset or a clean load, nothing else; our tables stay ours."""
    seed = int(os.environ.get("KVMPY_SEED") or random.SystemRandom().randrange(2**32))
    rng = random.Random(seed)
    path, module = str(tmp_path / "image"), str(tmp_path / "module")
    (tmp_path / "module").write_bytes(bytes(5000))
    loaded = 0
    with GuestMemory(64 * MiB) as memory:
        memory.fill(layout.LOW_RAM_END, layout.HIGH_MEMORY - layout.LOW_RAM_END, 0xA5)
        untouched, descriptors = reserved(memory), len(os.listdir("/proc/self/fd"))
        for round_ in range(ROUNDS):
            name, image = damaged(rng)
            (tmp_path / "image").write_bytes(image)
            options = options_for(rng, name, module)
            where = f"seed {seed}, round {round_}: {name}, {options}"
            if round_ % 10 == 0:
                look(path, where)
            refusal = try_to_boot(path, memory, options, where)
            if refusal is None:
                loaded += 1
            else:
                assert refusal.offset is not None, where
                assert refusal.path.removesuffix(" (unpacked)") == path, where
            assert reserved(memory) == untouched, where
            assert len(os.listdir("/proc/self/fd")) == descriptors, where
    with capsys.disabled():
        print(f"\n{ROUNDS} damaged images, seed {seed}: {loaded} loaded, {ROUNDS - loaded} refused")
    assert 0 < loaded < ROUNDS
