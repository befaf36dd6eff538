"""Build the C shim: cffi in API mode, so that the compiler fills in every constant and layout from the headers.

`ffibuilder` is what setup.py names. ``python csrc/build.py`` writes the typed stub ``kvmpy/_shim.pyi`` anew from the
declarations; a test fails when the stub is stale.
"""

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DECLARATIONS = sorted((HERE / "cdef").glob("*.cdef"))
ABI = ROOT / "guests" / "abi.h"
SOURCES = sorted(HERE.glob("*.c"))
STUB = ROOT / "kvmpy" / "_shim.pyi"

CONSTANT = re.compile(r"^#define\s+(\w+)\s", re.MULTILINE)
NAMES = re.compile(r"^#define (.+) \.\.\.$", re.MULTILINE)
FUNCTION = re.compile(r"^(?:[\w ]+?[ *]+)(\w+)\(([^;{]*)\);", re.MULTILINE)


def abi_names() -> list[str]:
    """Return the names that guests/abi.h defines."""
    return CONSTANT.findall(ABI.read_text())


def declarations() -> str:
    """Return all that cffi shall know: the .cdef files, and the ABI header's names."""
    text = NAMES.sub(_define_each, "\n".join(path.read_text() for path in DECLARATIONS))
    return text + "\n" + "\n".join(f"#define {name} ..." for name in abi_names())


def _define_each(line: re.Match[str]) -> str:
    """Return a ``#define`` for each name of a line that has several: our shorthand, cffi knows only one a line."""
    return "\n".join(f"#define {name} ..." for name in line[1].split())


def stub() -> str:
    """Return the text of kvmpy/_shim.pyi: each function and each constant by name, so that mypy knows a typo."""
    text = declarations()
    functions = [
        f"    def {name}({', '.join(['self', *_parameters(arguments)])}) -> Any: ..."
        for name, arguments in FUNCTION.findall(text)
    ]
    constants = [f"    {name}: int" for name in CONSTANT.findall(text)]
    return "\n".join(
        [
            '"""What the C shim offers, typed. Written by csrc/build.py from csrc/cdef/ and guests/abi.h."""',
            "",
            "from typing import Any",
            "",
            "class _Library:",
            *functions,
            *constants,
            "",
            "lib: _Library",
            "ffi: Any",
            "",
        ]
    )


def _parameters(arguments: str) -> list[str]:
    names = [re.findall(r"\w+", part)[-1] for part in arguments.split(",") if part.strip() not in ("", "void", "...")]
    return [f"{name}: Any" for name in names] + (["*rest: Any"] if "..." in arguments else [])


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "kvmpy._shim",
    '#include "kvmpy.h"\n#include "../guests/abi.h"\n',
    sources=[str(path.relative_to(ROOT)) for path in SOURCES],
    include_dirs=["csrc"],
    depends=[str(path.relative_to(ROOT)) for path in [*HERE.glob("*.h"), *DECLARATIONS, ABI]],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-sign-compare"],
)

if __name__ == "__main__":
    STUB.write_text(stub())
