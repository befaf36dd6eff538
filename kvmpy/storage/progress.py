"""How something long tells how far it is: a call with the bytes done and the bytes in all.

It is called with ``done`` ascending, the last time with ``done == total``; never from another thread. What it raises
ends the work, which then leaves nothing half-done behind.
"""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""``progress(done, total)``, both in bytes."""
