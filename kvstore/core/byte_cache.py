"""Bytes that are kept by key, within a limit. Client and daemon each keep what recipes refer to in one."""

from __future__ import annotations

import threading
from collections import OrderedDict


class ByteCache:
    """The least recently used go first; what alone is over `limit_bytes` is not kept. Any thread; no I/O."""

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
