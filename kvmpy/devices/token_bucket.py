"""A rate limit: a bucket of tokens that fills at a steady rate, and may be overdrawn once.

::

    level   burst |''''\\        /''''''
                0 |-----\\------/---------   a request passes while the level is not below 0 ...
                  |      \\    /             ... and then pays its whole price, so that one that costs
             debt |       \\__/              more than the bucket holds passes too, and the next one waits

Integers all the way: the level is counted in tokens times 1e9, so that a nanosecond is worth ``rate`` and nothing is
ever rounded away. Waiting is the business of whoever asks. Floor: devices.
"""

import time
from threading import Lock

NANOSECONDS = 10**9
BURSTS_IN_A_SECOND = 100
"""A `RateLimit` lets as much through at once as it does in 10 ms."""


class TokenBucket:
    """``rate`` tokens a second, at most ``burst`` of them saved up. Full at first. One thread at a time.

    Raises:
        ValueError: the rate is not positive, or the burst negative.
    """

    def __init__(self, rate: int, burst: int) -> None:
        if rate <= 0 or burst < 0:
            raise ValueError(f"rate {rate}, burst {burst}: allowed is a rate above 0 and a burst of 0 and more")
        self._rate = rate
        self._full = burst * NANOSECONDS
        self._level = self._full
        self._filled_ns: int | None = None

    def take(self, cost: int, now_ns: int) -> int:
        """Take ``cost`` tokens and return 0; or take none, and return how many nanoseconds to wait before asking again.

        ``now_ns`` is of a clock that never goes back.
        """
        if self._filled_ns is not None:
            self._level = min(self._full, self._level + self._rate * (now_ns - self._filled_ns))
        self._filled_ns = now_ns
        if self._level < 0:
            return -(self._level // self._rate)
        self._level -= cost * NANOSECONDS
        return 0


class RateLimit:
    """``rate`` units a second by the host's clock, with 10 ms worth saved up; for any thread."""

    def __init__(self, rate: int) -> None:
        self._bucket = TokenBucket(rate, rate // BURSTS_IN_A_SECOND)
        self._lock = Lock()

    def take(self, cost: int) -> int:
        """As `TokenBucket.take`, now."""
        with self._lock:
            return self._bucket.take(cost, time.monotonic_ns())
