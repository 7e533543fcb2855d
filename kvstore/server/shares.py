"""What each caller may have under way of something that all share."""

from __future__ import annotations

import threading


class Shares:
    """Bytes under way by caller. Any thread may call.

    One thing may be of any size that all together may have; more than one of a caller stay within its share, so that
    what nobody has committed yet displaces at most so much of what others have.
    """

    def __init__(self, share_bytes: int) -> None:
        self.share_bytes = share_bytes
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}

    def try_acquire(self, caller: str, nbytes: int) -> bool:
        """Count bytes; False when the caller has others, and no room for these in its share."""
        with self._lock:
            held = self._held.get(caller, 0)
            if held and held + nbytes > self.share_bytes:
                return False
            self._held[caller] = held + nbytes
            return True

    def release(self, caller: str, nbytes: int) -> None:
        """So many have ended."""
        with self._lock:
            # An upload of no bytes of its own leaves no entry, and may end after others of its caller.
            left = self._held.pop(caller, 0) - nbytes
            if left:
                self._held[caller] = left
