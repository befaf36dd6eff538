"""The house rules that a machine can hold: sizes, names, the stub, the ABI, and what must stand nowhere."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import kvmpy
from kvmpy._shim import lib
from kvmpy.devices import reset
from kvmpy.machine import layout
from kvmpy.units import PAGE_SIZE

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kvmpy", "csrc", "guests", "benchmarks", "tests", "docs", ".ci")
SOURCE_FOLDERS = ("kvmpy", "csrc", "guests", "benchmarks")
GENERATED = ("__pycache__", "lessons_data", "_shim.pyi")
LONGEST_FILE = 400
LARGEST_CSRC = 2500


def files(*folders: str) -> Iterator[Path]:
    """Yield the text files of the repository in ``folders``; those that a build makes are left out."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix not in (".so", ".pyc") and not set(GENERATED) & set(path.parts):
                yield path


def everything() -> Iterator[Path]:
    yield from files(*FOLDERS)
    wanted = ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", "setup.py", ".gitignore")
    yield from (ROOT / name for name in wanted)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_source_file_is_longer_than_the_wall() -> None:
    """Files are one idea, about 150 lines, 400 the wall."""
    too_long = {
        name_of(path): lines
        for path in files(*SOURCE_FOLDERS, "tests")
        if (lines := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert too_long == {}


def test_csrc_stays_small() -> None:
    """csrc/ is at most 2,500 lines in all."""
    wanted = [path for path in files("csrc") if path.suffix in (".c", ".h", ".py", ".cdef")]
    assert sum(len(path.read_text().splitlines()) for path in wanted) <= LARGEST_CSRC


def test_nothing_is_called_utils() -> None:
    """A name says what is in a file: no utils, helpers, common, misc."""
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [name_of(path) for path in files(*FOLDERS) if vague & {path.stem.lower(), path.parent.name.lower()}] == []


def test_no_class_is_a_base_or_a_helper() -> None:
    found = re.compile(r"^\s*class (Base\w*|Abstract\w*|\w*(?:Helper|Manager|Util)s?)\b", re.MULTILINE)
    assert [
        (name_of(path), name)
        for path in files("kvmpy")
        if path.suffix == ".py"
        for name in found.findall(path.read_text())
        if (path.parent.name, name) != ("manager", "Manager")
    ] == []


def test_no_promise_is_left_open() -> None:
    """Nothing says that it will be done later."""
    later = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")) + r")\b")
    assert [name_of(path) for path in files(*FOLDERS) if later.search(path.read_text(errors="replace"))] == []


# What belongs to one machine or one network; written apart, that this file is none of those that it looks for.
ELSEWHERE = [
    "/" + "home/",
    "/" + "root/",
    "/" + "work/",
    "pypi" + ".",
    "python" + "hosted",
    "arti" + "factory",
    "j" + "frog",
]


@pytest.mark.parametrize("text", ELSEWHERE)
def test_nothing_names_a_machine_or_a_package_registry(text: str) -> None:
    found = [
        f"{name_of(path)}:{number}"
        for path in everything()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if text in line.lower()
    ]
    assert found == []


def test_every_name_that_a_user_imports_is_there() -> None:
    """``from kvmpy import ...``: names are loaded when they are first used, and each is."""
    for name in kvmpy.__all__:
        assert getattr(kvmpy, name) is not None
    assert sorted(set(kvmpy.__all__)) == sorted(kvmpy.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Qemu'"):
        _ = kvmpy.Qemu


# --- the shim and the ABI ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shim_builder() -> ModuleType:
    """csrc/build.py as a module."""
    spec = importlib.util.spec_from_file_location("shim_builder", ROOT / "csrc" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stub_is_what_the_declarations_say(shim_builder: ModuleType) -> None:
    """After a change of csrc/cdef or guests/abi.h: python csrc/build.py."""
    assert (ROOT / "kvmpy" / "_shim.pyi").read_text() == shim_builder.stub()


def test_shim_offers_all_that_the_stub_promises(shim_builder: ModuleType) -> None:
    names = re.findall(r"^    (?:def )?(\w+)[(:]", shim_builder.stub(), re.MULTILINE)
    assert len(names) > 200
    assert [name for name in names if not hasattr(lib, name)] == []


def test_abi_header_has_only_integers(shim_builder: ModuleType) -> None:
    """Read by the assembler, the compiler and cffi: comments, include nothing, ``#define NAME integer``."""
    text = re.sub(r"/\*.*?\*/", "", (ROOT / "guests" / "abi.h").read_text(), flags=re.DOTALL)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert [line for line in lines if not re.fullmatch(r"#define KVMPY_\w+\s+(0x[0-9a-f]+|\d+)", line)] == []
    for line in lines:
        _, name, value = line.split()
        assert getattr(lib, name) == int(value, 0)


def test_abi_agrees_with_the_address_map() -> None:
    """guests/abi.h tells guests what layout.py tells us."""
    assert lib.KVMPY_PARAMS == layout.PARAMETER_PAGE
    assert lib.KVMPY_PARAMS_SIZE == PAGE_SIZE
    assert int.from_bytes(b"kvmpyPAG", "little") == lib.KVMPY_PARAMS_MAGIC
    offsets = sorted(getattr(lib, name) for name in dir(lib) if name.startswith("KVMPY_PARAMS_OFF_"))
    assert len(set(offsets)) == len(offsets)
    assert offsets[-1] == lib.KVMPY_PARAMS_OFF_PAIRS < lib.KVMPY_PARAMS_SIZE
    assert lib.KVMPY_PARAMS_OFF_NAME + lib.KVMPY_PARAMS_NAME_SIZE <= lib.KVMPY_PARAMS_OFF_RAM_LOW


def test_abi_agrees_with_the_devices() -> None:
    base = reset.RESET_CONTROL_BASE
    assert base <= lib.KVMPY_PORT_RESET < base + reset.RESET_CONTROL_SIZE
    assert len({lib.KVMPY_IRQ_SERIAL, lib.KVMPY_IRQ_ACPI, lib.KVMPY_STOP_GSI}) == 3
