"""Moments, as page blobs record them: ticks of 100 ns since the year 1, which also make the ETags.

A moment is written like Azure's snapshot ids, ``2026-11-20T23:39:36.1234567Z``, and an ETag like Azure's,
``"0x8DE284CBA123456"`` (with the quotes). Both sort as the ticks do. Floor: storage.
"""

import time
from datetime import UTC, datetime

TICKS_PER_SECOND = 10_000_000
UNIX_EPOCH = 621_355_968_000_000_000
"""1970-01-01 in ticks."""
LAST = 3_155_378_975_999_999_999
"""The last tick of the year 9999."""


def now() -> int:
    """Return the host's clock in ticks."""
    return time.time_ns() // 100 + UNIX_EPOCH


def next_after(ticks: int) -> int:
    """Return now, or the tick after ``ticks`` where the clock is not past that: never the same twice."""
    return max(now(), ticks + 1)


def format_moment(ticks: int) -> str:
    """Return ``2026-11-20T23:39:36.1234567Z``."""
    seconds, fraction = divmod(ticks - UNIX_EPOCH, TICKS_PER_SECOND)
    year, month, day, hour, minute, second, *_ = time.gmtime(seconds)
    return f"{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{fraction:07}Z"


def parse_moment(text: str) -> int:
    """Return the ticks of what `format_moment` wrote, and of nothing else. Raises ValueError."""
    moment = datetime.fromisoformat(text[:19]).replace(tzinfo=UTC)
    ticks = UNIX_EPOCH + int(moment.timestamp()) * TICKS_PER_SECOND + int(text[20:27])
    if format_moment(ticks) != text:
        raise ValueError(f"{text!r} is no moment")
    return ticks


def format_etag(ticks: int) -> str:
    """Return ``"0x8DE284CBA123456"``."""
    return f'"0x{ticks:X}"'


def parse_etag(text: str) -> int:
    """Return the ticks of what `format_etag` wrote, and of nothing else. Raises ValueError."""
    ticks = int(text[3:-1], 16)
    if format_etag(ticks) != text or not 0 <= ticks <= LAST:
        raise ValueError(f"{text!r} is no ETag")
    return ticks
