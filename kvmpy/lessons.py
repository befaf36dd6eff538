"""The lesson guests: where they are, and what their headers say.

A lesson is an assembly file whose first lines are a header (``guests/README.md`` has the grammar), and the image
that was built from it. In a checkout they lie in ``guests/`` and ``build/guests/``; an installed package has both in
``kvmpy/lessons_data/``. Not here: running one, and comparing what it did with its header. Free-standing: imports
nothing of kvmpy.
"""

import re
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
INSTALLED = PACKAGE / "lessons_data"
SOURCES = PACKAGE.parent / "guests"
IMAGES = PACKAGE.parent / "build" / "guests"

FIELDS = ("Teaches", "Mode", "Memory", "Exits", "Prints", "Exercise")
"""What every header has. Exits and Prints may stand on several lines."""
OPTIONAL_FIELDS = ("Run", "Disk", "Input", "Status")
REPEATABLE_FIELDS = ("Exits", "Prints")

STOP_REQUEST = "(stop request)"
"""The Input of a guest that waits to be asked to stop."""

_TITLE = re.compile(r"# (\w+)\.S -- (\S.*)")
_FIELD = re.compile(r"# (\w+):\s+(\S.*)")
_ESCAPE = re.compile(r"\\(n|\\|x[0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Lesson:
    """A guest with what its header promises.

    ``run`` has the options of ``kvmpy run`` that it needs beyond what ``mode`` implies (`options` has all).
    ``exits`` has the lines of that field; ``prints`` the exact text; ``input`` what is typed at COM1, or STOP_REQUEST.
    ``disk`` is the size of the blank disk that it needs, as a person types it, or empty. ``status`` is the exit status.
    ``image`` may not be built yet.
    """

    name: str
    title: str
    teaches: str
    mode: str
    run: tuple[str, ...]
    disk: str
    memory: str
    input: str
    exits: tuple[str, ...]
    prints: str
    status: int
    exercise: str
    source: Path
    image: Path

    @property
    def options(self) -> tuple[str, ...]:
        """The options of ``kvmpy run`` for this lesson: only a flat image does not say by itself what it is."""
        return (("--format", "flat") if self.mode.startswith("real mode") else ()) + self.run


def lessons() -> list[Lesson]:
    """Return all lessons, by name.

    Raises:
        ValueError: a header is not what guests/README.md says; the message names file and line.
    """
    return [_read(source) for source in sorted(_folder().glob("*.S"))]


def find(name: str) -> Lesson:
    """Return the lesson called ``name``.

    Raises:
        LookupError: there is none; the message names those that sound like it.
    """
    source = _folder() / f"{name}.S"
    if re.fullmatch(r"\w+", name) and source.is_file():
        return _read(source)
    from difflib import get_close_matches

    names = [path.stem for path in sorted(_folder().glob("*.S"))]
    near = get_close_matches(name, names, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {len(names)}, kvmpy lessons lists them"
    raise LookupError(f"no lesson {name!r}: {hint}")


def parse(text: str, *, source: Path) -> Lesson:
    """Return the lesson whose source file ``source`` begins with the header in ``text``.

    Raises:
        ValueError: a field is missing, twice there, or unknown; the message names file and line.
    """
    first, *rest = text.splitlines() or [""]
    title = _TITLE.fullmatch(first)
    if title is None or title[1] != source.stem:
        raise ValueError(f"{source.name}:1: wanted is '# {source.stem}.S -- one line', not {first!r}")
    fields = _fields(rest, source)
    for name in FIELDS:
        if name not in fields:
            raise ValueError(f"{source.name}: the header has no {name} line")
    single = {name: lines[0] for name, lines in fields.items()}
    if not single.get("Status", "0").isdecimal():
        raise ValueError(f"{source.name}: Status {single['Status']!r} is not a number")
    return Lesson(
        name=source.stem,
        title=title[2],
        teaches=single["Teaches"],
        mode=single["Mode"],
        run=tuple(single.get("Run", "").split()),
        disk=single.get("Disk", ""),
        memory=single["Memory"],
        input=_unescape(single.get("Input", "")),
        exits=tuple(fields["Exits"]),
        prints="".join(_unescape(line) + "\n" for line in fields["Prints"]),
        status=int(single.get("Status", "0")),
        exercise=single["Exercise"],
        source=source,
        image=_image(source, single["Mode"]),
    )


def _fields(lines: list[str], source: Path) -> dict[str, list[str]]:
    """Return the lines of each field of a header, which ends at the first line that is no comment."""
    fields: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 2):
        if not line.startswith("#") or line.startswith("#include"):
            break
        if line.rstrip() == "#":
            continue
        field = _FIELD.fullmatch(line)
        if field is None or field[1] not in FIELDS + OPTIONAL_FIELDS:
            raise ValueError(f"{source.name}:{number}: {line!r} is no field of a header")
        if field[1] in fields and field[1] not in REPEATABLE_FIELDS:
            raise ValueError(f"{source.name}:{number}: {field[1]} stands here twice")
        fields.setdefault(field[1], []).append(field[2])
    return fields


def _unescape(text: str) -> str:
    """Replace the three escapes of Input and Prints: newline, backslash, and a byte in hex."""
    special = {"n": "\n", "\\": "\\"}
    return _ESCAPE.sub(lambda found: special.get(found[1]) or chr(int(found[1][1:], 16)), text)


def _folder() -> Path:
    return INSTALLED if INSTALLED.is_dir() else SOURCES


def _image(source: Path, mode: str) -> Path:
    """Return where the image of ``source`` lies: guests/build.py puts flat ones into .bin, the others into .elf."""
    flat = mode.startswith(("real mode", "boot sector", "bzImage"))
    folder = INSTALLED if source.parent == INSTALLED else IMAGES
    return folder / (source.stem + (".bin" if flat else ".elf"))


def _read(source: Path) -> Lesson:
    return parse(source.read_text(), source=source)
