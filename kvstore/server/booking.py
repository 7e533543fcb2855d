"""Room on disk for one upload, made as its bytes arrive: an announcement alone displaces nothing."""

from __future__ import annotations

import threading

from kvstore.engine import Engine
from kvstore.errors import NotFoundError, StoreFullError

# Room is made in steps of this, so that not every chunk asks for it. A multiple of any block size, so that the sizes of
# the steps add up to that of the file.
STEP_BYTES = 1 << 20


class Booking:
    """Staged bytes of one upload as the engine counts them. Any thread may call; `end` never waits for `cover`."""

    def __init__(self, engine: Engine, nbytes: int) -> None:
        self._engine = engine
        self._nbytes = nbytes
        self._booked = 0
        self._ended = False
        self._covering = threading.Lock()  # held while room is made, which may take long
        self._lock = threading.Lock()

    def cover(self, nbytes: int) -> None:
        """Make room until the first `nbytes` of the upload are counted. May evict; nothing when they are already.

        Raises StoreFullError when there is none, NotFoundError when the upload has ended meanwhile.
        """
        target = min(self._nbytes, -(-nbytes // STEP_BYTES) * STEP_BYTES)
        with self._covering:
            more = target - self._booked
            if more <= 0:
                return
            if not self._engine.reserve(more):
                raise StoreFullError("no room for the upload, within the budget and above the free floor")
            with self._lock:
                if not self._ended:
                    self._booked = target
                    return
            self._engine.add_usage(-more)
            raise NotFoundError("the upload was given up")

    def end(self) -> None:
        """The upload is over, and its file gone. Safe to call twice."""
        with self._lock:
            booked, self._booked, self._ended = self._booked, 0, True
        if booked:
            self._engine.add_usage(-booked)


class Shares:
    """Bytes of uploads under way by caller. Any thread may call.

    One upload may be of any size that all together may have; more than one of a caller stay within its share, so that
    what nobody has committed yet displaces at most so much of what others have stored.
    """

    def __init__(self, share_bytes: int) -> None:
        self.share_bytes = share_bytes
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}

    def try_acquire(self, caller: str, nbytes: int) -> bool:
        """Count an upload; False when the caller has others, and no room for this one in its share."""
        with self._lock:
            held = self._held.get(caller, 0)
            if held and held + nbytes > self.share_bytes:
                return False
            self._held[caller] = held + nbytes
            return True

    def release(self, caller: str, nbytes: int) -> None:
        """An upload has ended."""
        with self._lock:
            # An upload of no bytes of its own leaves no entry, and may end after others of its caller.
            left = self._held.pop(caller, 0) - nbytes
            if left:
                self._held[caller] = left
