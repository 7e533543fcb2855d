"""Tables of what was used last: bounded by the number of entries, or by their bytes."""

from __future__ import annotations

import threading
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
