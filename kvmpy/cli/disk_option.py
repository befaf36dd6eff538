"""The value of ``--disk``: ``PATH[,format=raw][,readonly][,cache=direct][,queues=2]...``, and ``,,`` for a comma."""

from collections.abc import Callable, Iterable
from typing import Any

from kvmpy.pc.disk import Cache, Disk, Engine
from kvmpy.storage.open import ALL_FORMATS
from kvmpy.units import parse_size

COMMA = "\0"
"""Stands for ``,,`` while the rest is split: no argument of a process holds a NUL."""


def parse_disk(text: str) -> Disk:
    """Read a disk.

    Raises:
        ValueError: a key is unknown, given twice or malformed, or its value is not allowed.
    """
    path, *options = (part.replace(COMMA, ",") for part in text.replace(",,", COMMA).split(","))
    if not path:
        raise ValueError(f"{text!r} is not PATH[,KEY=VALUE]...")
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in KEYS:
            raise ValueError(f"{key!r} is no key of a disk: {', '.join(KEYS)} are (a comma in a name is written ,,)")
        if key in given:
            raise ValueError(f"{key} is given twice")
        given[key] = KEYS[key](key, value if equals else None)
    return Disk(path, **given)


def _flag(key: str, value: str | None) -> bool:
    if value is not None:
        raise ValueError(f"{key} takes no value")
    return True


def _text(key: str, value: str | None) -> str:
    if not value:
        raise ValueError(f"{key} needs a value: {key}=...")
    return value


def _number(key: str, value: str | None) -> int:
    number = _text(key, value)
    if not (number.isascii() and number.isdecimal()):
        raise ValueError(f"{key}={number} is not a whole number")
    return int(number)


def _size(key: str, value: str | None) -> int:
    return parse_size(_text(key, value))


def _one_of(choices: Iterable[str]) -> Callable[[str, str | None], str]:
    allowed = list(choices)

    def read(key: str, value: str | None) -> str:
        word = _text(key, value)
        if word not in allowed:
            raise ValueError(f"{key}={word} is not one of {', '.join(allowed)}")
        return word

    return read


KEYS: dict[str, Callable[[str, str | None], object]] = {
    "format": _one_of(ALL_FORMATS),
    "readonly": _flag,
    "cache": _one_of(Cache),
    "queues": _number,
    "iops": _number,
    "bps": _size,
    "serial": _text,
    "engine": _one_of(Engine),
}
"""What may stand behind the path, and how its value is read: the fields of `Disk`."""
