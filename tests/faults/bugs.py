"""Bugs that a store could have, seeded to see whether the harnesses find them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from kvstore.blobs.local import LocalBlobs
from kvstore.engine import Fs
from kvstore.engine.deletions import Deletions, Tombstones
from kvstore.engine.directory import DirectoryLock
from kvstore.engine.store import Writer
from kvstore.index.index import Index

Patch = Callable[[Callable[[], None]], "contextlib.AbstractContextManager[Fs]"]


class _NoFileSync(Fs):
    def fsync(self, fd: int) -> None:
        """Left out."""


class _NoDirectorySync(Fs):
    def fsync_dir(self, path: str) -> None:
        """Left out."""


class _RenameAfterCommit(Fs):
    def __init__(self) -> None:
        self._waiting: list[tuple[str, str]] = []

    def rename(self, source: str, target: str) -> None:
        if source.endswith(".tmp"):
            self._waiting.append((source, target))
        else:
            super().rename(source, target)

    def commit(self, commit: Callable[[], None]) -> None:
        super().commit(commit)
        while self._waiting:
            super().rename(*self._waiting.pop(0))


class _AckBeforeCommit(Fs):
    def __init__(self, acknowledge: Callable[[], None]) -> None:
        self._acknowledge = acknowledge

    def commit(self, commit: Callable[[], None]) -> None:
        self._acknowledge()
        super().commit(commit)


@contextlib.contextmanager
def _patched(owner: type, name: str, new: Any) -> Iterator[Fs]:
    with mock.patch.object(owner, name, new):
        yield Fs()


def _unlink_first(_: Callable[[], None]) -> contextlib.AbstractContextManager[Fs]:
    settle = Writer._settle

    def unlinks_too_early(self: Writer, edit: Any, batch: Any) -> Any:
        settled = settle(self, edit, batch)
        self._shared.deletions.delete(self._shared.costs(settled.replaced))
        return settled

    return _patched(Writer, "_settle", unlinks_too_early)


def _index_unsynced(_: Callable[[], None]) -> contextlib.AbstractContextManager[Fs]:
    opened = Index.__init__

    def without_sync(self: Index, path: Any, fs: Fs, ring: Any, sync: bool = True, *rest: Any) -> None:
        opened(self, path, fs, ring, False, *rest)

    return _patched(Index, "__init__", without_sync)


def _clean_too_early(_: Callable[[], None]) -> contextlib.AbstractContextManager[Fs]:
    write = DirectoryLock.write

    def says_clean(self: DirectoryLock, clean: bool, *rest: Any, **named: Any) -> None:
        write(self, True, *rest, **named)

    return _patched(DirectoryLock, "write", says_clean)


def _unfinished_kept(_: Callable[[], None]) -> contextlib.AbstractContextManager[Fs]:
    return _patched(LocalBlobs, "discard", lambda self, entry: None)


def _acknowledged_unsynced(_: Callable[[], None]) -> contextlib.AbstractContextManager[Fs]:
    return _patched(Deletions, "sync", lambda self: None)


def _dropped_unsynced(_: Callable[[], None]) -> contextlib.AbstractContextManager[Fs]:
    drop = LocalBlobs.drop

    def without_sync(self: LocalBlobs, root: bytes) -> None:
        with mock.patch.object(self, "_sync", False):
            drop(self, root)

    return _patched(LocalBlobs, "drop", without_sync)


def _no_tombstones(_: Callable[[], None]) -> contextlib.AbstractContextManager[Fs]:
    return _patched(Tombstones, "add", lambda self, blobs: None)


@dataclass(frozen=True)
class Bug:
    """`found_by`: the harnesses that find it. `script` and `calls`: where a kill shows it, to keep the proof short."""

    what: str
    patch: Patch
    found_by: frozenset[str]
    script: str = "store"
    calls: tuple[str, ...] = ("rename", "fdatasync", "write")


KILL, CUT = "kill", "power cut"
BUGS = {
    "blob unsynced": Bug("blobs are not synced", lambda ack: contextlib.nullcontext(_NoFileSync()), frozenset({CUT})),
    "folder unsynced": Bug(
        "blob folders are not synced", lambda ack: contextlib.nullcontext(_NoDirectorySync()), frozenset({CUT})
    ),
    "index unsynced": Bug("index commits are not synced", _index_unsynced, frozenset({CUT})),
    "commit before rename": Bug(
        "the index names blobs that have not got their name yet",
        lambda ack: contextlib.nullcontext(_RenameAfterCommit()),
        frozenset({KILL, CUT}),
    ),
    "unlink before commit": Bug(
        "what a store replaces is unlinked before the commit", _unlink_first, frozenset({KILL})
    ),
    "ack before commit": Bug(
        "acknowledged before the commit",
        lambda ack: contextlib.nullcontext(_AckBeforeCommit(ack)),
        frozenset({KILL, CUT}),
    ),
    "clean too early": Bug("a running store is marked as stopped in order", _clean_too_early, frozenset({KILL, CUT})),
    "deletion unsynced": Bug(
        "an eviction is acknowledged before its unlinks are synced",
        _acknowledged_unsynced,
        frozenset({CUT}),
        script="evict all",
    ),
    "drop unsynced": Bug(
        "a namespace is dropped, and the rename of its folder not synced",
        _dropped_unsynced,
        frozenset({CUT}),
        script="evict last",
    ),
    "no tombstones": Bug(
        "files that a reader still needs get no tombstone",
        _no_tombstones,
        frozenset({KILL, CUT}),
        script="evict all",
        calls=("openat", "write", "fdatasync"),
    ),
    "unfinished kept": Bug(
        "a start leaves blobs behind that were never finished", _unfinished_kept, frozenset({KILL, CUT}), script="start"
    ),
}


@contextlib.contextmanager
def seeded(bug: str, acknowledge: Callable[[], None]) -> Iterator[Fs]:
    """The disk as the engine is to see it; with a bug if one is named."""
    with BUGS[bug].patch(acknowledge) if bug else contextlib.nullcontext(Fs()) as fs:
        yield fs
