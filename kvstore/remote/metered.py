"""Counts what is asked of the remote store, and times it. The one seam at which requests and bytes are counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

from kvstore.core.breaker import Deadline
from kvstore.errors import DeadlineError, KVStoreError
from kvstore.remote.link import Link
from kvstore.remote.object_store import ByteRange, Head, Listed, ObjectStore, Wanted, only


@dataclass(slots=True)
class RequestCounts:
    """Requests and bytes since the start. `failed` and `late` count calls, which may be of many requests.

    A store that bills counts `lists` and `puts` as the expensive ones.
    """

    heads: int = 0
    reads: int = 0
    lists: int = 0
    puts: int = 0
    deletes: int = 0
    read_bytes: int = 0
    pushed_bytes: int = 0
    failed: int = 0
    late: int = 0


class MeteredStore:
    """An object store that counts and times the calls to another. Any thread may call."""

    def __init__(self, store: ObjectStore, link: Link, clock: Callable[[], float] = time.monotonic) -> None:
        self.place = store.place
        self._store, self._link, self._clock = store, link, clock
        self._lock = threading.Lock()
        self._requests = RequestCounts()

    @property
    def requests(self) -> RequestCounts:
        """The counters as they are now."""
        with self._lock:
            return RequestCounts(**{one.name: getattr(self._requests, one.name) for one in fields(RequestCounts)})

    @contextmanager
    def _counted(self, **counts: int) -> Iterator[None]:
        failed = late = 0
        try:
            yield
        except DeadlineError:
            late = 1
            raise
        except KVStoreError:
            failed = 1
            raise
        finally:
            self._add(**counts, failed=failed, late=late)

    def _add(self, **counts: int) -> None:
        with self._lock:
            for name, count in counts.items():
                setattr(self._requests, name, getattr(self._requests, name) + count)

    def create(self, name: str, parts: Sequence[memoryview], deadline: Deadline) -> bool:
        """A put, and its bytes whether they were taken or not: they were sent."""
        with self._counted(puts=1, pushed_bytes=sum(map(len, parts))):
            return self._store.create(name, parts, deadline)

    def head(self, names: Sequence[str], deadline: Deadline) -> list[Head | None]:
        """A round trip without bytes."""
        started_s = self._clock()
        with self._counted(heads=len(names)):
            heads = self._store.head(names, deadline)
        if names:
            self._link.measured(0, self._clock() - started_s)
        return heads

    def read(self, name: str, etag: str, ranges: Sequence[ByteRange], deadline: Deadline) -> list[memoryview]:
        """As `read_all`."""
        return only(self.read_all([Wanted(name, etag, ranges)], deadline))

    def read_all(self, wanted: Sequence[Wanted], deadline: Deadline) -> list[list[memoryview] | KVStoreError]:
        """A round trip with the bytes that came."""
        started_s = self._clock()
        asked = sum(one.nbytes for each in wanted for one in each.ranges)
        try:
            with self._counted(reads=sum(len(one.ranges) for one in wanted)):
                answers = self._store.read_all(wanted, deadline)
        except DeadlineError:
            self._link.measured(asked, self._clock() - started_s, given_up=True)
            raise
        came = sum(len(data) for answer in answers if not isinstance(answer, KVStoreError) for data in answer)
        late = sum(isinstance(answer, DeadlineError) for answer in answers)
        failed = sum(isinstance(answer, KVStoreError) for answer in answers) - late
        self._add(read_bytes=came, late=late, failed=failed)
        if asked and not failed:
            self._link.measured(came if late else asked, self._clock() - started_s, given_up=bool(late))
        return answers

    def names(self, prefix: str, after: str, deadline: Deadline) -> list[Listed]:
        """A listing."""
        with self._counted(lists=1):
            return self._store.names(prefix, after, deadline)

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        """Deletes."""
        with self._counted(deletes=len(names)):
            self._store.delete(names, deadline)

    def mark(self, deadline: Deadline) -> bool:
        """A put."""
        with self._counted(puts=1):
            return self._store.mark(deadline)

    def require_mark(self, deadline: Deadline) -> None:
        """A head."""
        with self._counted(heads=1):
            self._store.require_mark(deadline)

    def sweep(self, older_s: float, deadline: Deadline) -> int:
        """Counts nothing: only folders have leftovers."""
        with self._counted():
            return self._store.sweep(older_s, deadline)
