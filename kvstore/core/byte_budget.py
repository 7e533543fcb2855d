"""Limit on the bytes that one process holds in queues and buffers. Client and daemon have one each."""

from __future__ import annotations

import threading
import time

from kvstore.core.interrupts import turn_s


class ByteBudget:
    """Counts bytes held against `limit_bytes`. Any thread may call; acquire and release need not be the same one.

    Waiting requests are served in no particular order, so small requests may overtake a large one. Therefore callers
    either do not wait, or wait with a timeout.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise ValueError(f"a budget of {limit_bytes} bytes")
        self.limit_bytes = limit_bytes
        self._used_bytes = 0
        self._freed = threading.Condition()

    @property
    def used_bytes(self) -> int:
        """Bytes held now."""
        with self._freed:
            return self._used_bytes

    def try_acquire(self, nbytes: int) -> bool:
        """Take `nbytes` if they are free now. More than the limit is never free."""
        return self.acquire(nbytes, 0.0)

    def acquire(self, nbytes: int, timeout_s: float) -> bool:
        """Take `nbytes`, waiting up to `timeout_s` for room; False if there was none, at once if over the limit."""
        if nbytes < 0:
            raise ValueError(f"{nbytes} bytes")
        if nbytes > self.limit_bytes:
            return False
        give_up_at = time.monotonic() + timeout_s
        with self._freed:
            while self._used_bytes + nbytes > self.limit_bytes:
                left_s = give_up_at - time.monotonic()
                if left_s <= 0:
                    return False
                self._freed.wait(min(turn_s(left_s), threading.TIMEOUT_MAX))
            self._used_bytes += nbytes
            return True

    def charge(self, nbytes: int) -> None:
        """Count bytes that are held already, whether or not there is room; acquiring then waits until there is."""
        with self._freed:
            self._used_bytes += nbytes

    def release(self, nbytes: int) -> None:
        """Give back what was acquired. ValueError when it is more than is held: that is a bug of the caller."""
        with self._freed:
            if not 0 <= nbytes <= self._used_bytes:
                raise ValueError(f"release of {nbytes} bytes while {self._used_bytes} are held")
            self._used_bytes -= nbytes
            self._freed.notify_all()
