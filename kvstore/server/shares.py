"""Divides a shared resource among callers."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable


class Shares:
    """Bytes under way, in all and by caller. Any thread may call.

    A single item may take the whole limit. Several items of one caller stay within its share, so that its uncommitted
    bytes displace only that much of what others have.
    """

    def __init__(self, limit_bytes: Callable[[], int], callers: int) -> None:
        """`limit_bytes` of all is asked each time: it follows the budget. One caller's share is 1/`callers` of it."""
        self._limit_bytes = limit_bytes
        self._callers = callers
        self._lock = threading.Lock()
        self._held: Counter[str] = Counter()

    def try_acquire(self, caller: str, nbytes: int) -> int | None:
        """Count bytes: None; or the limit in bytes that leaves no room for them, of all or of this caller."""
        limit = self._limit_bytes()
        with self._lock:
            held = self._held[caller]
            if held and held + nbytes > limit // self._callers:
                return limit // self._callers
            if self._held.total() + nbytes > limit:
                return limit
            self._held[caller] = held + nbytes
            return None

    def release(self, caller: str, nbytes: int) -> None:
        """Give back `nbytes` that the caller held."""
        with self._lock:
            self._held[caller] -= nbytes
            self._held = +self._held
