"""What tests share about Linux guests: where the built ones lie, and the modules of guests/linux that build them.

A test that needs a kernel takes it from the folder that ``KVMPY_TEST_LINUX`` names, else from ``build/linux``
(``make linux-guest``), and is skipped with the reason where neither has it.
"""

import importlib.util
import lzma
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "guests" / "linux"
BUILT = ROOT / "build" / "linux"
UNPACKED = ROOT / "build" / "linux-unpacked"
VARIABLE = "KVMPY_TEST_LINUX"


def module(name: str) -> ModuleType:
    """Return the module ``name`` of guests/linux. They import one another, as when they run from their folder."""
    if str(SOURCES) not in sys.path:
        sys.path.append(str(SOURCES))
    full_name = name if name != "build" else "linux_build"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, SOURCES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[full_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[full_name])
    return sys.modules[full_name]


def folder() -> Path:
    return Path(os.environ.get(VARIABLE) or BUILT)


def file(name: str) -> Path:
    """Return the built file ``name``, unpacked if only ``name.xz`` is there; without it the test is skipped."""
    path = folder() / name
    if path.exists():
        return path
    packed = path.with_name(name + ".xz")
    if not packed.exists():
        pytest.skip(f"no Linux guest: {name} is not in {folder()} (make linux-guest, or {VARIABLE}=FOLDER)")
    target = UNPACKED / name
    if not target.exists() or target.stat().st_mtime_ns < packed.stat().st_mtime_ns:
        UNPACKED.mkdir(parents=True, exist_ok=True)
        half = target.with_name(f"{name}.{os.getpid()}")
        half.write_bytes(lzma.decompress(packed.read_bytes()))
        os.replace(half, target)
    return target
