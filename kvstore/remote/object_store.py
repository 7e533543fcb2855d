"""The protocol of an object store, the narrow waist of the remote tier: names to bytes, and nothing about blocks.

    create   write a whole object under a name that is free
    head     ETags and sizes of many objects, in one batch
    read     byte ranges of objects, each pinned to its ETag, in one batch
    names    a page of a listing, in the order of names
    delete   take objects away
    sweep    remove what interrupted writes left behind

Every call takes a deadline and raises one of four errors:

    DeadlineError        the call was not complete by its deadline
    RemoteFullError      the store has no room
    ObjectChangedError   the object is gone, or its ETag is not the pinned one
    RemoteError          any other failure

A store never retries a call: the caller decides whether a retry is worth its time. Stores are thread-safe, and calls
may run concurrently.

A store must hold a marker, an object that `mark` writes once. Nothing is written to a place without one: a folder whose
volume is not mounted, or a bucket that was named by mistake, stays empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvstore.core.breaker import Deadline
from kvstore.errors import InvalidRequestError, KVStoreError, RemoteFullError, UnmarkedError

# Of a listing. It is what S3 gives at once.
PAGE_NAMES_MAX = 1000
# Of a large object that is read side by side. Smaller ones cost requests, and a link with a round trip of 2 ms carries
# 2 MB in that time at 1 GB/s.
PART_BYTES = 4 << 20
# Limit of one call of a walk over all objects. No request waits for it.
CALL_S = 60.0
MARKER = "kvstore-remote.json"
MARKER_TEXT = b'{"format": "kvstore-remote", "version": 1}\n'
# What `honours_create` writes, and deletes unless it is killed.
PROBE = "probe/"
_NAME = re.compile(r"[a-z0-9_][a-z0-9._-]*(/[a-z0-9_][a-z0-9._-]*)*")
_NAME_BYTES_MAX = 512


class ByteRange(NamedTuple):
    """`nbytes` bytes of an object from `offset` on."""

    offset: int
    nbytes: int


class Head(NamedTuple):
    """Which object lies under a name: its ETag changes when the object does. `nbytes` is its exact size."""

    etag: str
    nbytes: int


class Wanted(NamedTuple):
    """Ranges of the object of this name that has this ETag."""

    name: str
    etag: str
    ranges: Sequence[ByteRange]


@dataclass(frozen=True, slots=True)
class Listed:
    """One object of a listing. `modified_s`: seconds since 1970 by the clock of the store."""

    name: str
    head: Head
    modified_s: float


class ObjectStore(Protocol):
    """See the module. `place` names the store in messages, without credentials."""

    place: str

    def create(self, name: str, parts: Sequence[memoryview], deadline: Deadline) -> bool:
        """Write an object, whole or not at all. False if there is one of this name, which then stays.

        Two calls at the same moment may both return True where the store does not do better; the object is then one of
        the two. RemoteError without the marker.
        """

    def head(self, names: Sequence[str], deadline: Deadline) -> list[Head | None]:
        """The objects of these names, None for each that is not there: one round trip for all."""

    def read(self, name: str, etag: str, ranges: Sequence[ByteRange], deadline: Deadline) -> list[memoryview]:
        """The bytes of these ranges of the object with this ETag, each of its exact length.

        Raises ObjectChangedError when the object is gone or has another ETag, RemoteError when bytes are missing.
        """

    def read_all(self, wanted: Sequence[Wanted], deadline: Deadline) -> list[list[memoryview] | KVStoreError]:
        """As `read`, of many objects: one round trip for all.

        The error of an object, a RemoteError or DeadlineError, stands in its place: what came is not lost.
        """

    def names(self, prefix: str, after: str, deadline: Deadline) -> list[Listed]:
        """Up to PAGE_NAMES_MAX objects whose names start with `prefix` and come after `after`, in the order of names.

        `prefix` is empty or ends with `/`. An empty page is the end. The marker is no object of a listing. Folders
        whose names have `-` or `.`, which sort before `/`, come in an order that differs by store: ours have none.
        """

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        """Take objects away; those that are gone already do not count."""

    def mark(self, deadline: Deadline) -> bool:
        """Write the marker, in a folder that is made if it is missing; False if the place is marked already."""

    def require_mark(self, deadline: Deadline) -> None:
        """UnmarkedError, naming the fix, when the place has no marker."""

    def sweep(self, older_s: float, deadline: Deadline) -> int:
        """Remove what writes that were interrupted at least this long ago left behind; how many."""


def every_object(store: ObjectStore, prefix: str = "") -> Iterator[Listed]:
    """All objects, page by page, each with a deadline of its own. RemoteError, DeadlineError."""
    after = ""
    while page := store.names(prefix, after, Deadline(CALL_S)):
        yield from page
        after = page[-1].name


def require_name(name: str) -> str:
    """The name; InvalidRequestError for one that an object cannot have on every store."""
    if not _NAME.fullmatch(name) or len(name) > _NAME_BYTES_MAX:
        raise InvalidRequestError(f"not a name of an object: {name[:80]!r}")
    return name


def is_name(name: str) -> bool:
    """Whether an object may have this name; file systems add names of their own (`._x`, `.DS_Store`)."""
    return len(name) <= _NAME_BYTES_MAX and _NAME.fullmatch(name) is not None


def unmarked(place: str) -> UnmarkedError:
    """What to say of a place without a marker."""
    return UnmarkedError(
        f"{place} holds no {MARKER}: it is not mounted, or was never set up; "
        "if it is the right place, run once: kvstore config remote-init"
    )


def full(place: str, why: str) -> RemoteFullError:
    """What to say of a place without room."""
    return RemoteFullError(f"{place} is full ({why}); make room there: kvstore evict --remote --older-than 30d")


def whole(head: Head) -> list[ByteRange]:
    """The range that is all of an object."""
    return [ByteRange(0, head.nbytes)] if head.nbytes else []


def parts(head: Head) -> list[ByteRange]:
    """The ranges of all of an object that are read side by side: one stream alone seldom fills a link."""
    return [ByteRange(at, min(PART_BYTES, head.nbytes - at)) for at in range(0, head.nbytes, PART_BYTES)]


def only(answers: Sequence[list[memoryview] | KVStoreError]) -> list[memoryview]:
    """The answer of a `read_all` of one object; its error is raised."""
    (answer,) = answers
    if isinstance(answer, KVStoreError):
        raise answer
    return answer
