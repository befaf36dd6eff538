"""What pyelftools tells of an ELF file: its symbols, and a line about what it is. Not on the path of a boot.

The library trusts the file; here it is not trusted: tables are checked against the file's size before they are
walked, and whatever else it stumbles over becomes an ImageError.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvmpy.errors import ImageError, KvmpyError
from kvmpy.machine.boot.image import ImageFile

_TYPES = {"ET_EXEC": "executable", "ET_DYN": "position-independent executable", "ET_REL": "object file"}
_MACHINES = {"EM_386": "i386", "EM_X86_64": "x86-64"}
_NO_ADDRESS = ("STT_FILE", "STT_SECTION", "STT_TLS")


def symbols(path: str | os.PathLike[str]) -> dict[str, list[int]]:
    """Return the addresses of each symbol that the file defines: one name may stand for several.

    Raises:
        ImageError: the file is no ELF file, or its symbol table is damaged.
    """
    found: dict[str, list[int]] = {}
    with ImageFile(path) as image, _parsed(image) as elf:
        table = _symbol_table(image, elf)
        for symbol in table.iter_symbols() if table is not None else ():
            kind, section = symbol["st_info"]["type"], symbol["st_shndx"]
            if symbol.name and kind not in _NO_ADDRESS and section != "SHN_UNDEF":
                found.setdefault(symbol.name, []).append(symbol["st_value"])
    return found


def describe(image: ImageFile) -> str:
    """Return one line about an ELF file: class, type, machine, sections, symbols. Raises ImageError."""
    with _parsed(image) as elf:
        kind = _TYPES.get(elf["e_type"], str(elf["e_type"]))
        machine = _MACHINES.get(elf["e_machine"], str(elf["e_machine"]))
        table = _symbol_table(image, elf)
        symbols = f"{table.num_symbols()} symbols" if table is not None else "stripped"
        return f"ELF{elf.elfclass} {kind} for {machine}, {elf.num_sections()} sections, {symbols}"


@contextmanager
def _parsed(image: ImageFile) -> Iterator[Any]:
    """Open ``image`` with pyelftools; whatever that raises meanwhile comes out as an ImageError."""
    from elftools.elf.elffile import ELFFile

    with os.fdopen(os.dup(image.fileno()), "rb") as stream:
        stream.seek(0)
        try:
            yield ELFFile(stream)
        except KvmpyError:
            raise
        except Exception as error:
            # The library has no error of its own for most damage: struct, index, key and Unicode errors come too.
            message = f"no readable ELF file: {type(error).__name__}: {error}".splitlines()[0].strip()
            raise ImageError(message, path=image.path, offset=0) from error


def _symbol_table(image: ImageFile, elf: Any) -> Any | None:
    """Return the symbol table (a file has one at most: gABI chapter 4 "Sections"), or None when it is stripped.

    Raises:
        ImageError: the section headers or the symbol table leave the file, or their entries have a wrong size.
    """
    count = elf.num_sections()
    if count and elf["e_shentsize"] != elf.structs.Elf_Shdr.sizeof():
        raise image.error(f"section headers of {elf['e_shentsize']} bytes", elf["e_shoff"])
    image.check_range(elf["e_shoff"], count * elf["e_shentsize"], at=0)
    for i in range(count):
        section = elf.get_section(i)
        if section["sh_type"] == "SHT_SYMTAB":
            image.check_range(section["sh_offset"], section["sh_size"], at=section["sh_offset"])
            if section["sh_entsize"] != elf.structs.Elf_Sym.sizeof():
                raise image.error(f"symbol table with entries of {section['sh_entsize']} bytes", section["sh_offset"])
            return section
    return None
