"""kvmpy.lessons: where the lessons are, and what is no header."""

from pathlib import Path

import pytest

from kvmpy import lessons

HEADER = """\
# toy.S -- a toy
#
# Teaches:   nothing
# Mode:      real mode, cs:ip = 0:0x1000
# Run:       --cores 2 --mem 1M
# Memory:    none
# Input:     a\\n\\x04\\\\
# Exits:     Hlt
# Exits:     Shutdown
# Prints:    one
# Prints:    tw\\x6f
# Status:    7
# Exercise:  none
#include "abi.h"
"""
TOY = Path("toy.S")


def test_all_fields_of_a_header_are_read() -> None:
    """guests/README.md, "The header"."""
    toy = lessons.parse(HEADER, source=TOY)
    assert (toy.name, toy.title, toy.teaches, toy.memory, toy.exercise) == ("toy", "a toy", "nothing", "none", "none")
    assert toy.options == ("--format", "flat", "--cores", "2", "--mem", "1M")
    assert toy.input == "a\n\x04\\"
    assert toy.exits == ("Hlt", "Shutdown")
    assert toy.prints == "one\ntwo\n"
    assert toy.status == 7
    assert toy.image.name == "toy.bin"


@pytest.mark.parametrize("field", lessons.FIELDS)
def test_header_without_a_field_is_refused(field: str) -> None:
    """Every lesson says what it teaches, does and prints, and sets an exercise."""
    text = "".join(line for line in HEADER.splitlines(keepends=True) if not line.startswith(f"# {field}:"))
    with pytest.raises(ValueError, match=rf"toy\.S: the header has no {field} line"):
        lessons.parse(text, source=TOY)


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ("# toy.S -- a toy", "# boy.S -- a toy", 1),
        ("# Memory:", "# Menory:", 6),
        ("# Memory:    none", "# and so on", 6),
        ("# Run:       --cores 2 --mem 1M", "# Mode:      real mode", 5),
    ],
)
def test_fault_in_a_header_is_named_with_file_and_line(before: str, after: str, line: int) -> None:
    """A misspelt field must not pass as a missing promise."""
    with pytest.raises(ValueError, match=rf"toy\.S:{line}: "):
        lessons.parse(HEADER.replace(before, after), source=TOY)


def test_empty_file_is_no_lesson() -> None:
    """Nor is anything else without a title line."""
    with pytest.raises(ValueError, match=r"toy\.S:1: "):
        lessons.parse("", source=TOY)


def test_status_that_is_no_number_is_refused() -> None:
    """The field is compared with an exit status."""
    with pytest.raises(ValueError, match="Status 'seven' is not a number"):
        lessons.parse(HEADER.replace("# Status:    7", "# Status:    seven"), source=TOY)


def test_find_returns_a_lesson_by_name() -> None:
    """The same object as in the list of all."""
    assert lessons.find("hello") in lessons.lessons()


@pytest.mark.parametrize("name", ["helo", "../guests/hello", "hello.S"])
def test_find_names_lessons_that_sound_alike(name: str) -> None:
    """A name is a word, never a path."""
    with pytest.raises(LookupError, match=r"did you mean .*hello"):
        lessons.find(name)


@pytest.mark.parametrize("name", ["", "zzz"])
def test_find_says_where_the_names_are_when_none_sounds_alike(name: str) -> None:
    """One line, not all the names."""
    with pytest.raises(LookupError, match=r"^no lesson '\w*': there are \d+, kvmpy lessons lists them$"):
        lessons.find(name)


def test_every_lesson_has_been_built() -> None:
    """`make guests` ran before the tests; the image is where `Lesson.image` says."""
    assert [lesson.name for lesson in lessons.lessons() if not lesson.image.is_file()] == []


def test_there_are_at_least_sixteen_lessons() -> None:
    """What the project promises."""
    assert len(lessons.lessons()) >= 16
