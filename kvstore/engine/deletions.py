"""Deletes blobs whose rows are gone, or keeps them while a reader needs them. Also tombstones, and deletion records.

An eviction is acknowledged only when no crash can undo it: each file name is removed and synced, or, if a reader or the
disk still holds the file, a tombstone is written. Without a tombstone, an index that is rebuilt from the blobs would
contain the deleted blob again. `settings/tombstones` lists such blobs, one `<root in hex>/<name>` per line. A line is
written before the deletion is acknowledged, and removed when the file name is durably gone. At startup the listed blobs
are deleted before anything else reads the blob folders. Lines that name no blob are ignored.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from kvstore.blobs.fs import Fs, unlink_quietly, write_durably
from kvstore.blobs.keyring import KeyRing
from kvstore.blobs.protocol import TMP_SUFFIX, BlobId, Blobs, disk_bytes, parse_name, parse_root
from kvstore.engine.ledger import DriveCache, Ledger
from kvstore.index.rows import Row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Deletion:
    """Blobs whose rows are gone, with their bytes on disk, and those of them that a lease keeps."""

    costs: Mapping[BlobId, int] = field(default_factory=dict)
    leased: frozenset[BlobId] = frozenset()


class Deletions:
    """Any thread may call. Its lock is never held over I/O, so that leasing never waits for a disk."""

    def __init__(
        self,
        blobs: Blobs,
        tombstones: Tombstones,
        ledger: Ledger,
        drive: DriveCache,
        ring: KeyRing,
        is_displaced: Callable[[], bool],
    ) -> None:
        self._blobs = blobs
        self._tombstones = tombstones
        self._ledger = ledger
        self._drive = drive
        self._ring = ring
        self._is_displaced = is_displaced
        self._lock = threading.Lock()
        self._leases: Counter[bytes] = Counter()
        self._waiting: dict[bytes, list[BlobId]] = {}  # deleted, and kept for a lease, by key
        self._kept: dict[BlobId, int] = {blob: self._cost(blob) for blob in tombstones.blobs}  # bytes on disk
        self._deleting: set[BlobId] = set()  # some of `_kept`, which a thread is about to unlink
        self._unsynced: set[bytes] = set()  # namespaces from which names went
        self._book()

    def _cost(self, blob: BlobId) -> int:
        return self._blobs.stored_bytes(blob.root, self._blobs.size(blob) or 0)

    # -- leases ---------------------------------------------------------------------------------------------------

    def lease(self, rows: Iterable[Row]) -> Lease:
        """Protect the blobs of rows until readers have opened them: evicted last, not unlinked when replaced."""
        held = [(row.key, row.root) for row in rows]
        keys = tuple(key for key, _ in held)
        with self._lock:
            self._leases.update(keys)
        # A reader needs the keys of encrypted namespaces, even if the last row of one goes meanwhile.
        return Lease(self, keys, [self._ring.key(root) for root in {root for _, root in held}])

    def end_lease(self, keys: Iterable[bytes]) -> None:
        """End a lease, and delete the blobs that waited only for it."""
        with self._lock:
            self._leases.subtract(keys)
            over = [key for key in set(keys) if self._leases[key] <= 0]
            blobs = [blob for key in over for blob in self._waiting.pop(key, [])]
            for key in over:
                del self._leases[key]
        self._delete(blobs)

    def end_all_leases(self) -> None:
        """End every lease, and delete the blobs that waited for one."""
        with self._lock:
            blobs = [blob for waiting in self._waiting.values() for blob in waiting]
            self._waiting.clear()
            self._leases.clear()
        self._delete(blobs)

    def leased(self) -> frozenset[bytes]:
        """Keys with a lease now."""
        with self._lock:
            return frozenset(self._leases)

    def busy(self) -> frozenset[BlobId]:
        """Blobs that have no row for a good reason."""
        with self._lock:
            return self._tombstones.blobs.union(self._kept)

    # -- deleting -------------------------------------------------------------------------------------------------

    def begin(self, costs: Mapping[BlobId, int], spare_leased: bool = True) -> Deletion:
        """Note blobs, with their bytes on disk, whose rows were just removed; from now on they are no strays. No I/O.

        Call it before the engine's lock is free, and `finish` when it is. With `spare_leased` those with a lease stay
        until it ends.
        """
        with self._lock:
            leased = frozenset(blob for blob in costs if spare_leased and blob.key in self._leases)
            for blob in leased:
                self._waiting.setdefault(blob.key, []).append(blob)
            self._kept.update(costs)
            self._deleting.update(costs.keys() - leased)
        self._book()
        return Deletion(costs, leased)

    def finish(self, deletion: Deletion, *, dropped: bool = False) -> int:
        """Delete the blobs. Returns the bytes that stay on disk for now. Never call it under the engine's lock.

        Blobs that stay get a tombstone. Raises OSError if the tombstones cannot be written; then do not acknowledge the
        deletion. `dropped`: the blobs are already deleted, together with their folder.
        """
        costs, now = deletion.costs, [blob for blob in deletion.costs if blob not in deletion.leased]
        kept: list[BlobId] = []
        try:
            if not dropped:
                self._delete(now, costs)
            with self._lock:
                if dropped:
                    for blob in now:
                        self._kept.pop(blob, None)
                kept = [blob for blob in costs if blob in self._kept]
            if kept:
                self._bury(kept, list(deletion.leased))
        finally:
            with self._lock:
                self._deleting.difference_update(now)
            self._book()
        return sum(costs[blob] for blob in kept if blob in self._kept)

    def delete(self, costs: Mapping[BlobId, int]) -> int:
        """`begin` and `finish`, for a thread that does not hold the engine's lock."""
        return self.finish(self.begin(costs))

    def delete_later(self, costs: Mapping[BlobId, int]) -> Callable[[], None]:
        """`begin`; the function that is returned is `finish`, where what the disk refuses is a line in the log."""
        return functools.partial(self._finish_anyhow, self.begin(costs))

    def _finish_anyhow(self, deletion: Deletion) -> None:
        try:
            self.finish(deletion)
        except OSError as error:
            log.warning("blobs that were deleted may come back: %s", error)

    @property
    def deleting_bytes(self) -> int:
        """Bytes that pending deletions will free."""
        with self._lock:
            return sum(self._kept.get(blob, 0) for blob in self._deleting)

    def _bury(self, kept: Sequence[BlobId], leased: Sequence[BlobId]) -> None:
        try:
            self._tombstones.add(kept)
        except OSError as error:
            log.warning("no tombstone could be written, so readers lose the blobs that were deleted: %s", error)
            with self._lock:
                for blob in leased:
                    self._waiting.get(blob.key, [blob]).remove(blob)
            self._delete(leased)
            if any(blob in self._kept for blob in kept):
                raise

    def _delete(self, blobs: Sequence[BlobId], costs: Mapping[BlobId, int] | None = None) -> None:
        """Take the names away; none of a directory in which they may be another's."""
        if not blobs:
            return
        left = blobs if self._is_displaced() else self._blobs.delete(blobs)
        for blob in left:
            log.warning("the deleted blob %s is still on the disk; it will be deleted later", blob.name)
        with self._lock:
            for blob in blobs:
                if blob in left:
                    self._kept.setdefault(blob, (costs or {}).get(blob, 0))
                else:
                    self._kept.pop(blob, None)
            self._unsynced.update(blob.root for blob in blobs)
        self._book()

    def sync(self) -> None:
        """Make it durable that names are gone. Raises OSError; then call it again."""
        with self._lock:
            roots, self._unsynced = self._unsynced, set()
        try:
            for root in roots:
                self._blobs.sync(root)
            if roots:
                with self._drive.committing():
                    pass  # done above: the names wait in the drive's cache as a commit does
                self._drive.wait()
        except BaseException:
            with self._lock:
                self._unsynced |= roots
            raise

    def settle(self) -> None:
        """Sync deletions, delete what could not be before, drop the tombstones of what is gone. Raises OSError."""
        self.sync()
        with self._lock:
            waiting = {blob for blobs in self._waiting.values() for blob in blobs}
        self._tombstones.settle(waiting)
        with self._lock:
            self._kept = {
                blob: nbytes
                for blob, nbytes in self._kept.items()
                if blob in waiting or blob in self._deleting or blob in self._tombstones.blobs
            }
        self._book()

    def _book(self) -> None:
        with self._lock:
            self._ledger.set("kept", sum(self._kept.values()))
        self._ledger.set("settings", self._tombstones.disk_bytes())


@dataclass(eq=False)
class Lease:
    """Keeps the blobs of some rows, and their keys, while they are being opened. Release it soon; idempotent."""

    deletions: Deletions
    keys: tuple[bytes, ...]
    encryption: Sequence[object] = field(repr=False)

    def release(self) -> None:
        """End the lease, and delete the blobs that waited only for it. Safe to call twice."""
        keys, self.keys = self.keys, ()
        if keys:
            self.deletions.end_lease(keys)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Tombstones:
    """The tombstones of one data directory. Any thread may call; a lock of its own is held over the I/O."""

    def __init__(self, settings: Path, blobs: Blobs, fs: Fs, *, sync: bool = True) -> None:
        """Read them. Raises OSError."""
        self._path = settings / "tombstones"
        self._blobs = blobs
        self._fs = fs
        self._sync = sync
        self._lock = threading.Lock()
        self.blobs = frozenset(self._read())

    def next_number(self) -> int:
        """A blob number above theirs: a new blob must not get the name of one of them."""
        return max((blob.number + 1 for blob in self.blobs), default=1)

    def disk_bytes(self) -> int:
        """Bytes on disk of the tombstone file."""
        return disk_bytes(sum(len(_line(blob)) for blob in self.blobs))

    def add(self, blobs: Iterable[BlobId]) -> None:
        """Make it durable that these blobs were deleted. Raises OSError, and then nothing is added."""
        with self._lock:
            self._write(self.blobs.union(blobs))

    def settle(self, busy: Collection[BlobId] = ()) -> None:
        """Delete the blobs that are not `busy`, and drop the tombstones of what is gone. Raises OSError."""
        if not self.blobs:
            return
        with self._lock:
            wanted = self.blobs.difference(busy)
            gone = wanted.difference(self._blobs.delete(wanted))
            for root in {blob.root for blob in gone}:
                self._blobs.sync(root)
            if gone:
                self._write(self.blobs - gone)

    def _write(self, blobs: frozenset[BlobId]) -> None:
        path = str(self._path)
        if blobs:
            write_durably(self._fs, path, b"".join(map(_line, sorted(blobs))), self._sync)
        else:
            unlink_quietly(self._fs, [path + TMP_SUFFIX])
            with contextlib.suppress(FileNotFoundError):
                self._fs.unlink(path)
        self.blobs = blobs
        if self._sync:
            self._fs.fsync_dir(str(self._path.parent))

    def _read(self) -> Iterator[BlobId]:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(fd, "rb") as file:
                for line in file.read().decode("latin-1").splitlines():
                    folder, _, name = line.partition("/")
                    root = parse_root(folder)
                    if root is not None and (blob := parse_name(root, name)) is not None:
                        yield blob


def _line(blob: BlobId) -> bytes:
    return f"{blob.root.hex()}/{blob.name}\n".encode()
