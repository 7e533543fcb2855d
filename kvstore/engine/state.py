"""What the engine's parts share: the transaction with its counters, unlinking under leases, what was used and lost."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from kvstore.blocks import TOKEN_BYTES, Reason
from kvstore.engine.blobs import DISK_BLOCK_BYTES, Fs, blob_name, unlink_quietly
from kvstore.engine.check import Site
from kvstore.engine.directory import Directory, Hold
from kvstore.engine.drive import DriveCache
from kvstore.engine.evictions import Evictions
from kvstore.engine.index import Edit, Index
from kvstore.engine.key_files import find_missing_keys, keys_to_keep
from kvstore.engine.ledger import Ballast, Ledger
from kvstore.engine.nouns import EngineOptions, Slice
from kvstore.engine.rows import Row
from kvstore.engine.tombstones import Tombstones
from kvstore.errors import DirectoryError, KVStoreError
from kvstore.keys import NamespaceInfo, block_key

# A miss is told "evicted" also when only the beginning of what was evicted is asked for.
HEAD_TOKENS = 16
HEAD_BYTES = HEAD_TOKENS * TOKEN_BYTES
DISPLACED = "the data directory was deleted or replaced"
log = logging.getLogger(__name__)


@dataclass
class Counts:
    """Plain counters since the engine was opened, and why nothing is written at present. Changed under the lock."""

    written_bytes: int = 0
    over_budget: str = ""
    under_floor: str = ""
    disk_error: str = ""
    displaced: str = ""

    @property
    def degraded(self) -> str:
        """Why nothing is written; empty when all is well."""
        return self.displaced or self.disk_error or self.under_floor or self.over_budget


class State:
    """Shared by the parts of one engine.

    `lock` serialises writers of the index; whoever changes rows holds it. `_memory` guards the tables of leases,
    touches and lost keys; it is never held over I/O, so leasing and touching never wait for a commit.
    """

    def __init__(
        self,
        directory: Directory,
        hold: Hold,
        index: Index,
        options: EngineOptions,
        fs: Fs,
        clock: Callable[[], float],
        tombstones: Tombstones,
    ) -> None:
        self.directory = directory
        self._hold = hold
        self.index = index
        self.options = options
        self.fs = fs
        self.clock = clock
        self.tombstones = tombstones
        self.sync = options.durability != "none"
        self.lock = threading.RLock()
        flush = functools.partial(fs.flush_drive, str(index.path / "data.mdb"))
        self.drive = DriveCache(flush if options.durability == "full" else None)
        self.ledger = Ledger()
        self.ballast = Ballast(directory.ballast, min(options.ballast_bytes, options.budget_bytes // 64))
        self.ballast.lay()
        self.counts = Counts()
        self.evictions = Evictions()
        self.in_flight: dict[str, int] = {}
        self.site = Site(directory, index, fs, self.lock, self.busy_names, self.skip_seq, options.rule)
        self._memory = threading.Lock()
        self._leases: Counter[bytes] = Counter()
        self._doomed: dict[bytes, list[Row]] = {}
        self._unsynced: set[int] = set()  # folders from which files went
        self._stuck: list[Row] = []  # files that the disk did not let go
        self._touches: dict[bytes, int] = {}
        self._marks: dict[bytes, int] = {}
        self._lost: OrderedDict[bytes, Reason] = OrderedDict()
        with index.view() as view:
            self.usage = view.usage()
            self.namespaces = {root: NamespaceInfo.from_record(r) for root, r in view.namespaces().items()}
            self.next_seq = max(view.meta("next_seq") or 1, tombstones.next_seq())
            self._stamp = next(view.newest(), (0, b""))[0]
        self._touched_at = self._stamp
        find_missing_keys(self.site)
        self._kept_keys = keys_to_keep(self.site)
        self._end_keys()
        self.measure()

    def is_displaced(self) -> bool:
        """Whether the data directory, or the folder of its keys, was deleted or replaced underneath."""
        return self._hold.is_displaced() or self.index.ring.is_gone()

    def demand_place(self) -> None:
        """DirectoryError when the data directory was displaced: names lead to files that are not ours, or to none."""
        if self.is_displaced():
            raise DirectoryError(f"{DISPLACED}: {self.directory.root}")

    # -- transactions -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def edit(self, dry_run: bool = False) -> Iterator[Edit]:
        """A write transaction, after which the counters agree with the index. Hold `lock`."""
        with self.index.edit(dry_run) as edit:
            yield edit
            usage = edit.usage()
        if not dry_run:
            self.usage = usage
            for root in self.namespaces.keys() - usage.keys():
                del self.namespaces[root]
            self._end_keys()
            self.ledger.set("blobs", sum(use.disk_bytes for use in usage.values()))
            self._measure_index()

    def _end_keys(self) -> None:
        """Unlink the keys of namespaces that hold nothing (any more); what refuses to go now goes with a later commit.

        A key that is gone cannot be made again, so rows are asked for, too, and blobs that this kvstore cannot read.
        """
        ring = self.index.ring
        unused = [root for root in ring.written_roots if root not in self.usage and root not in self._kept_keys]
        if unused:
            with self.index.view() as view:
                unused = [root for root in unused if next(view.children(root), None) is None]
            try:
                ring.unwrite(unused)
            except OSError as error:
                log.warning("the key of a namespace that holds nothing could not be unlinked: %s", error)

    def measure(self) -> None:
        """Take the counters from index and disk."""
        self.ledger.set("blobs", sum(use.disk_bytes for use in self.usage.values()))
        self._measure_index()
        with contextlib.suppress(OSError):
            self.ledger.set("quarantine", self.directory.quarantine_bytes())

    def _measure_index(self) -> None:
        # What was measured last stands while the folder cannot be read.
        with contextlib.suppress(OSError):
            self.ledger.set("index", self.index.disk_bytes())

    def sync_blobs(self) -> None:
        """Sync blobs, keys and folders: an orderly stop vouches for them, also where no store did. Raises OSError."""
        folders = set()
        for number, entry in self.directory.blob_files():
            if not entry.is_file(follow_symlinks=False):
                continue
            folders.add(number)
            fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                self.fs.fsync(fd)
            finally:
                os.close(fd)
        for path in [*map(self.directory.folder, folders), self.directory.blobs]:
            self.fs.fsync_dir(str(path))
        self.index.ring.sync()

    def is_in_step(self) -> bool:
        """Whether there are as many files as rows: what could not be unlinked is left to the next start."""
        with self.index.view() as view:
            return sum(1 for _ in self.directory.blob_files()) == view.count()

    def can_write(self) -> bool:
        """Whether the disk takes a file, synced, and lets it go again."""
        path = str(self.directory.staging / "probe")
        try:
            fd = self.fs.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self.fs.write(fd, memoryview(bytes(DISK_BLOCK_BYTES)))
                self.fs.fsync(fd)
            finally:
                os.close(fd)
                self.fs.unlink(path)
        except OSError:
            return False
        return True

    def now(self) -> int:
        """Wall clock in microseconds, always later: idle times survive restarts, the order survives a set clock."""
        with self._memory:
            self._stamp = max(self._stamp + 1, int(self.clock() * 1_000_000))
            return self._stamp

    def skip_seq(self, seq: int) -> None:
        """A file has this seq: later ones get others. Hold `lock`."""
        self.next_seq = max(self.next_seq, seq + 1)

    # -- what was used ------------------------------------------------------------------------------------------

    def touch(self, slices: Iterable[Slice]) -> bool:
        """Note that blocks were used; whether there is so much of it that it should be written."""
        stamp = self.now()
        with self._memory:
            for part in slices:
                self._touches[part.row.key] = stamp
            return self._has_many_notes()

    def mark(self, key: bytes) -> bool:
        """Note that a prompt diverged after a checkpoint; whether there is so much of it that it should be written."""
        stamp = self.now()
        with self._memory:
            self._marks[key] = stamp
            return self._has_many_notes()

    def _has_many_notes(self) -> bool:
        return len(self._touches) + len(self._marks) >= self.options.touches_max

    def touches_due(self) -> bool:
        """Whether notes have waited as long as they may."""
        age_us = self.now() - self._touched_at
        return bool(self._touches or self._marks) and age_us >= self.options.touches_age_s * 1_000_000

    def write_touches(self, edit: Edit) -> None:
        """Put what was noted in the access order, and the marks on their checkpoints."""
        with self._memory:
            touches, self._touches = self._touches, {}
            marks, self._marks = self._marks, {}
            self._touched_at = self._stamp
        _note(edit, touches, marks)

    def read_touches(self, edit: Edit) -> None:
        """As `write_touches`, for an edit that is not committed: what was noted stays noted."""
        with self._memory:
            touches, marks = dict(self._touches), dict(self._marks)
        _note(edit, touches, marks)

    def flush_touches(self) -> None:
        """A commit of its own for the access order. Losing it is no reason to fail."""
        try:
            with self.lock, self.edit() as edit:
                self.write_touches(edit)
        except (KVStoreError, OSError) as error:
            log.warning("the access order could not be written: %s", error)

    # -- what was lost ------------------------------------------------------------------------------------------

    def remember_lost(self, rows: Iterable[Row], reason: Reason) -> None:
        """Keep in mind, within bounds, why blocks are gone. A checkpoint that is gone costs no tokens of its own."""
        with self._memory:
            for row in rows:
                if row.is_checkpoint:
                    continue
                self._lost[row.key] = reason
                self._lost[block_key(row.parent, row.tokens[:HEAD_BYTES])] = reason
            while len(self._lost) > self.options.evicted_max:
                self._lost.popitem(last=False)

    def forget_lost(self, key: bytes) -> None:
        """It is here again."""
        with self._memory:
            self._lost.pop(key, None)

    def why_lost(self, key: bytes) -> Reason | None:
        """Why a block is gone, if that is remembered."""
        with self._memory:
            return self._lost.get(key)

    # -- leases and unlinking -----------------------------------------------------------------------------------

    def lease(self, keys: tuple[bytes, ...]) -> None:
        """Keep files of these keys."""
        with self._memory:
            self._leases.update(keys)

    def end_lease(self, keys: tuple[bytes, ...]) -> None:
        """Let go, and unlink what was kept only for that."""
        with self._memory:
            self._leases.subtract(keys)
            over = [key for key in set(keys) if self._leases[key] <= 0]
            doomed = [row for key in over for row in self._doomed.pop(key, [])]
            for key in over:
                del self._leases[key]
        self._unlink_doomed(doomed)

    def end_all_leases(self) -> None:
        """As if every lease had ended."""
        with self._memory:
            doomed = [row for rows in self._doomed.values() for row in rows]
            self._doomed.clear()
            self._leases.clear()
        self._unlink_doomed(doomed)

    def leased(self) -> frozenset[bytes]:
        """Keys with a lease now."""
        with self._memory:
            return frozenset(self._leases)

    def delete_files(self, rows: Sequence[Row], spare_leased: bool = True) -> int:
        """Unlink the files of rows that are gone from the index; how many bytes stay on the disk for now.

        With `spare_leased` files with a lease stay until it ends; others stay when the disk does not let them go. What
        stays gets a tombstone. Raises OSError when the disk takes none; then nobody may be told that it was deleted.
        """
        with self._memory:
            leased = [row for row in rows if spare_leased and row.key in self._leases]
            for row in leased:
                self._doomed.setdefault(row.key, []).append(row)
            # Before the lock goes: a lease that ends now takes the same bytes off again.
            self.ledger.add("doomed", sum(row.disk_bytes for row in leased))
        spared = {(row.key, row.seq) for row in leased}
        stuck = self.unlink([row for row in rows if (row.key, row.seq) not in spared])
        self.ledger.add("doomed", sum(row.disk_bytes for row in stuck))
        with self._memory:
            self._unsynced.update(row.directory for row in rows)
            self._stuck += stuck
        if not leased and not stuck:
            return 0
        try:
            self.tombstones.add(self.directory.path(row) for row in (*leased, *stuck))
        except OSError as error:
            log.warning("no tombstone could be written, so readers lose the files that were deleted: %s", error)
            self._end_doomed([row for row in leased if not self.unlink([row])])
            leased = [row for row in leased if os.path.lexists(self.directory.path(row))]
            if leased or stuck:
                raise
        self.ledger.set("settings", self.tombstones.disk_bytes())
        return sum(row.disk_bytes for row in (*leased, *stuck))

    def unlink(self, rows: Iterable[Row]) -> list[Row]:
        """Unlink files of rows that are gone from the index, none of a directory in which they may be another's.

        Returns the rows whose file the disk did not let go.
        """
        stuck = []
        for row in () if self.is_displaced() else rows:
            for error in unlink_quietly(self.fs, [str(self.directory.path(row))]):
                log.warning("a deleted blob could not be unlinked, and will be later: %s", error)
                stuck.append(row)
        return stuck

    def sync_deletions(self) -> None:
        """Sync the folders from which files went: then no crash brings one back. Raises OSError; then call it again."""
        with self._memory:
            folders, self._unsynced = self._unsynced, set()
        try:
            for number in folders if self.sync else ():
                with contextlib.suppress(FileNotFoundError):
                    self.fs.fsync_dir(str(self.directory.folder(number)))
            if folders:
                self.drive.begin()
                self.drive.end()
                self.drive.wait()
        except BaseException:
            with self._memory:
                self._unsynced |= folders
            raise

    def settle_deletions(self) -> None:
        """Sync what was unlinked, unlink what could not be before, and drop the tombstones of what is gone.

        Raises OSError.
        """
        self.sync_deletions()
        with self._memory:
            busy = [row for rows in self._doomed.values() for row in rows]
        self.tombstones.settle(self.directory.path(row) for row in busy)
        self.ledger.set("settings", self.tombstones.disk_bytes())
        with self._memory:
            gone = [row for row in self._stuck if not os.path.lexists(self.directory.path(row))]
            self._stuck = [row for row in self._stuck if row not in gone]
            self.ledger.add("doomed", -sum(row.disk_bytes for row in gone))

    def busy_names(self) -> set[str]:
        """Names of files that have no row for a good reason. Hold `lock`."""
        with self._memory:
            doomed = {blob_name(row.key, row.seq) for rows in self._doomed.values() for row in rows}
        return self.in_flight.keys() | doomed | self.tombstones.names()

    def _end_doomed(self, rows: Sequence[Row]) -> None:
        """Forget files that were kept for a lease: they are gone."""
        with self._memory:
            for row in rows:
                kept = self._doomed.get(row.key, [])
                if row in kept:
                    kept.remove(row)
                    self.ledger.add("doomed", -row.disk_bytes)

    def _unlink_doomed(self, doomed: list[Row]) -> None:
        stuck = self.unlink(doomed)
        with self._memory:
            self._stuck += stuck
            self._unsynced.update(row.directory for row in doomed)
            self.ledger.add("doomed", -sum(row.disk_bytes for row in doomed if row not in stuck))


class Lease:
    """Keeps the files of some rows from being unlinked while they are being opened. Release it soon; idempotent."""

    def __init__(self, state: State, rows: Sequence[Row]) -> None:
        self._state = state
        self._keys = tuple(row.key for row in rows)
        # Who reads them needs it, even if the last row of the namespace goes meanwhile.
        self._encryption = {state.index.ring.key(root) for root in {row.root for row in rows}}
        state.lease(self._keys)

    def release(self) -> None:
        """Let go."""
        keys, self._keys = self._keys, ()
        if keys:
            self._state.end_lease(keys)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def _note(edit: Edit, touches: dict[bytes, int], marks: dict[bytes, int]) -> None:
    for key, stamp in touches.items():
        edit.touch(key, stamp)
    for key, stamp in marks.items():
        edit.mark(key, stamp)
