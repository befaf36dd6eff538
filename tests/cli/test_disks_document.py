"""The commands in docs/disks.md do what stands there."""

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "disks.md"

VARIES = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{7})?Z"  # a time, and so a snapshot's ID
    r'|"0x[0-9A-F]+"'  # an ETag
    r"|(?<=unique id:            )[0-9a-f]{32}"
    r"|(?<=allocated:)( +).*"  # depends on the file system
)

Blob = Callable[..., "subprocess.CompletedProcess[str]"]


def session() -> list[tuple[str, str]]:
    """Return each command of the document's example, and what it prints."""
    text = DOCUMENT.read_text().partition("```console\n")[2].partition("```")[0]
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def test_the_example_of_the_document_is_what_happens(blob: Blob) -> None:
    """Times, ETags and identities are others each time; a snapshot's ID is used as it was printed."""
    same: dict[str, str] = {}
    for command, expected in session():
        for written, real in same.items():
            command = command.replace(written, real)
        program, *arguments = shlex.split(command)
        if program == "kvmpy":
            assert arguments[0] == "blob"
            done = blob(*arguments[1:])
            shown = done.stdout + done.stderr
        else:
            shown = subprocess.run(command, shell=True, check=True, text=True, capture_output=True).stdout
        assert VARIES.sub("~", shown) == VARIES.sub("~", expected), command
        found = (VARIES.finditer(text) for text in (expected, shown))
        same |= {written[0]: real[0] for written, real in zip(*found, strict=True)}


def test_every_command_of_the_document_has_its_help_and_no_other(blob: Blob) -> None:
    text = DOCUMENT.read_text()
    table = text.partition("| command | what it does |\n")[2].partition("\n\n")[0]
    documented = list(dict.fromkeys(re.findall(r"^\| `(\w+) ", table, re.MULTILINE)))
    assert documented == re.findall(r"^  ([a-z]+) ", blob("--help").stdout, re.MULTILINE)
    for name, row in re.findall(r"^\| `(\w+) (.*?)` \|", table, re.MULTILINE):
        text = blob(name, "--help").stdout
        assert [option for option in re.findall(r"--\w+", row) if option not in text] == []
