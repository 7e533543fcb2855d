"""What bounds the memory of a process: tables of what was used last, and a budget of bytes."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Bounded(OrderedDict[K, V]):
    """A dictionary of at most `limit` entries: what is set becomes the newest, the oldest go. Lock it to change it."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self._limit = limit

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        while len(self) > self._limit:
            self.popitem(last=False)


class ByteCache:
    """Bytes by key. Client and daemon each keep what recipes refer to in one.

    The least recently used go first; what alone is over `limit_bytes` is not kept. Any thread; no I/O.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return self._nbytes

    def get(self, key: bytes) -> bytes | None:
        """The bytes of a key, None when they are not kept."""
        with self._lock:
            data = self._kept.get(key)
            if data is not None:
                self._kept.move_to_end(key)
        return data

    def put(self, key: bytes, data: bytes) -> None:
        """Keep these bytes."""
        with self._lock:
            self._nbytes += len(data) - len(self._kept.pop(key, b""))
            self._kept[key] = data
            while self._nbytes > self._limit_bytes:
                self._nbytes -= len(self._kept.popitem(last=False)[1])


class ByteBudget:
    """Counts bytes held in queues and buffers against `limit_bytes`; client and daemon have one each.

    Any thread may call; acquire and release need not be the same one.

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
                self._freed.wait(min(left_s, threading.TIMEOUT_MAX))
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
