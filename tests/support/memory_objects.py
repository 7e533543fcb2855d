"""An object store in a dict, which counts round trips and fails when it is told to."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence

from kvstore.core.breaker import Deadline
from kvstore.errors import KVStoreError, ObjectChangedError, RemoteError
from kvstore.remote.object_store import (
    MARKER,
    MARKER_TEXT,
    PAGE_NAMES_MAX,
    ByteRange,
    Head,
    Listed,
    Wanted,
    only,
    require_name,
    unmarked,
)


class MemoryStore:
    """Objects by name. `rounds` counts calls, `asked` the names that were asked for in batches of heads.

    `fail` is raised by the next calls while it is set; `delay_s` is how long each call takes.
    """

    def __init__(self, *, marked: bool = True) -> None:
        self.place = "memory"
        self.objects: dict[str, tuple[Head, bytes, float]] = {}
        self.rounds: list[str] = []
        self.asked = 0
        self.fail: Exception | None = None
        self.delay_s = 0.0
        self._etags = itertools.count(1)
        self._lock = threading.Lock()
        if marked:
            self.put(MARKER, MARKER_TEXT)

    def put(self, name: str, data: bytes, modified_s: float | None = None) -> None:
        """Set an object, whatever there was."""
        head = Head(f'"{next(self._etags)}"', len(data))
        self.objects[name] = head, data, time.time() if modified_s is None else modified_s

    def _call(self, what: str, deadline: Deadline) -> None:
        self.rounds.append(what)
        if self.delay_s:
            time.sleep(min(self.delay_s, deadline.left_s))
        deadline.check()
        if self.fail is not None:
            raise self.fail

    def create(self, name: str, parts: Sequence[memoryview], deadline: Deadline) -> bool:
        self._call("create", deadline)
        self.require_mark(deadline)
        with self._lock:
            if require_name(name) in self.objects:
                return False
            self.put(name, b"".join(parts))
            return True

    def head(self, names: Sequence[str], deadline: Deadline) -> list[Head | None]:
        self._call("head", deadline)
        self.asked += len(names)
        return [self.objects[name][0] if require_name(name) in self.objects else None for name in names]

    def read(self, name: str, etag: str, ranges: Sequence[ByteRange], deadline: Deadline) -> list[memoryview]:
        return only(self.read_all([Wanted(name, etag, ranges)], deadline))

    def read_all(self, wanted: Sequence[Wanted], deadline: Deadline) -> list[list[memoryview] | KVStoreError]:
        self._call("read", deadline)
        answers: list[list[memoryview] | KVStoreError] = []
        for one in wanted:
            try:
                answers.append(self._read(*one))
            except RemoteError as error:
                answers.append(error)
        return answers

    def _read(self, name: str, etag: str, ranges: Sequence[ByteRange]) -> list[memoryview]:
        head, data, _ = self.objects.get(require_name(name), (None, b"", 0.0))
        if head is None or head.etag != etag:
            raise ObjectChangedError(f"{name} is another object")
        if any(one.offset + one.nbytes > len(data) for one in ranges):
            raise RemoteError("beyond the end")
        return [memoryview(data)[one.offset : one.offset + one.nbytes] for one in ranges]

    def names(self, prefix: str, after: str, deadline: Deadline) -> list[Listed]:
        self._call("names", deadline)
        found = sorted(n for n in self.objects if n.startswith(prefix) and n > after and n != MARKER)
        return [Listed(n, self.objects[n][0], self.objects[n][2]) for n in found[:PAGE_NAMES_MAX]]

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        self._call("delete", deadline)
        for name in names:
            self.objects.pop(require_name(name), None)

    def mark(self, deadline: Deadline) -> bool:
        self._call("mark", deadline)
        if MARKER in self.objects:
            return False
        self.put(MARKER, MARKER_TEXT)
        return True

    def require_mark(self, deadline: Deadline) -> None:
        self._call("mark", deadline)
        if MARKER not in self.objects:
            raise unmarked(self.place)

    def sweep(self, older_s: float, deadline: Deadline) -> int:
        self._call("sweep", deadline)
        return 0
