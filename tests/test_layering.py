"""Imports point one way. What each floor may import is the table here; anything else fails with file and line."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FREE = ("errors", "units")
BELOW_PC = (*FREE, "_shim", "kvm", "machine", "devices", "storage")
MAY_IMPORT = {
    "errors": (),
    "units": (),
    "lessons": ("errors",),
    "storage": (*FREE,),
    "kvm": (*FREE, "_shim"),
    "machine": (*FREE, "_shim", "kvm"),
    "devices": (*FREE, "_shim", "machine", "storage"),
    "pc": BELOW_PC,
    "conformance": (*BELOW_PC, "pc"),
    "lab": (*BELOW_PC, "pc"),
    "debug": (*BELOW_PC, "pc"),
    "manager": (*BELOW_PC, "pc", "debug"),
    "cli": (*BELOW_PC, "pc", "conformance", "lab", "debug", "manager", "lessons"),
    "__main__": ("cli",),
}
"""Floor -> the floors that it may import beside itself. ``kvmpy/__init__.py`` shows what a user types: it may all."""

PACKAGES = {"cffi", "elftools", "psutil"}
"""What the core may import that is not Python's own."""


def imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute name) of each import, also in functions and under TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            if base == "kvmpy":
                yield from ((node.lineno, f"kvmpy.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def wrong_imports(root: Path) -> list[str]:
    """Return ``file:line: what`` for each import under ``root``/kvmpy that the table does not allow."""
    wrong = []
    for path in sorted((root / "kvmpy").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        floor = parts[1]
        if floor == "__init__":
            continue
        allowed = {floor, *MAY_IMPORT.get(floor, ())}
        for line, name in imports(ast.parse(path.read_text()), ".".join(parts)):
            where = f"{path.relative_to(root)}:{line}: {floor}"
            top, _, rest = name.partition(".")
            if floor not in MAY_IMPORT:
                wrong.append(f"{where} is no floor of the table")
            elif top == "kvmpy" and rest.split(".")[0] not in allowed and (floor, rest) != ("cli", "__version__"):
                wrong.append(f"{where} may not import {name}")
            elif top != "kvmpy" and top not in sys.stdlib_module_names | PACKAGES:
                wrong.append(f"{where} may not import {name}: no package of the core")
    return wrong


def test_imports_point_one_way() -> None:
    """A module imports from its own floor and from those before it."""
    assert wrong_imports(ROOT) == []


def test_every_floor_of_the_tree_is_in_the_table() -> None:
    floors = {
        path.stem for path in (ROOT / "kvmpy").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert floors - {"__init__"} <= set(MAY_IMPORT)


def test_table_points_one_way_itself() -> None:
    """No two floors may import each other, also not by way of others."""

    def reach(floor: str, seen: tuple[str, ...] = ()) -> set[str]:
        assert floor not in seen, f"{' -> '.join((*seen, floor))} is a circle"
        below = MAY_IMPORT.get(floor, ())
        return set(below).union(*(reach(other, (*seen, floor)) for other in below))

    for floor in MAY_IMPORT:
        assert floor not in reach(floor)


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("machine/x.py", "import os\nimport kvmpy.pc.spec\n", "machine/x.py:2: machine may not import kvmpy.pc.spec"),
        ("machine/x.py", "from kvmpy.devices import rtc\n", "machine/x.py:1: machine may not import kvmpy.devices"),
        ("machine/x.py", "from kvmpy import pc\n", "machine/x.py:1: machine may not import kvmpy.pc"),
        ("kvm/x.py", "def f():\n    from kvmpy.machine import bus\n", "kvm/x.py:2: kvm may not import kvmpy.machine"),
        (
            "devices/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kvmpy.kvm import Vm\n",
            "devices/x.py:3: devices may not import kvmpy.kvm",
        ),
        ("storage/x.py", "from kvmpy._shim import lib\n", "storage/x.py:1: storage may not import kvmpy._shim"),
        ("machine/boot/x.py", "from ...pc import spec\n", "machine/boot/x.py:1: machine may not import kvmpy.pc"),
        ("pc/x.py", "from kvmpy.cli import main\n", "pc/x.py:1: pc may not import kvmpy.cli"),
        ("kvm/x.py", "from kvmpy import MiB\n", "kvm/x.py:1: kvm may not import kvmpy.MiB"),
        ("lessons.py", "from kvmpy.units import MiB\n", "lessons.py:1: lessons may not import kvmpy.units"),
        ("pc/x.py", "import numpy\n", "pc/x.py:1: pc may not import numpy: no package of the core"),
        ("network/x.py", "import os\n", "network/x.py:1: network is no floor of the table"),
    ],
)
def test_wrong_import_is_found_with_file_and_line(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    path = tmp_path / "kvmpy" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert wrong_imports(tmp_path) == [f"kvmpy/{complaint}"]


def test_right_imports_are_not_complained_of(tmp_path: Path) -> None:
    path = tmp_path / "kvmpy" / "devices" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import os\nfrom kvmpy.machine.bus import Bus\nfrom kvmpy.errors import KvmError\nfrom . import y\n"
    )
    assert wrong_imports(tmp_path) == []
