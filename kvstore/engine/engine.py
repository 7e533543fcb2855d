"""The engine: blobs, and the index that names them.

Invariants, each with its tests:

1. A row never names a blob that is not complete. Write = tmp, length check, fsync, for each blob as it comes; then for
   the whole request the renames, one fsync of the folder and one index commit; only then is the request durable.
2. Delete = index commit, then unlink, then the folders synced; only then is an eviction acknowledged. What a crash
   leaves in between is a stray blob, never a dangling row. A deleted blob that stays on the disk, for a reader or
   because the disk keeps it, has a tombstone (`kvstore.engine.deletions`), so that no rebuild brings it back.
3. Blobs never change. A new one gets a new name, and its row replaces the old one's in one transaction; so does a
   re-encoded one, of a lower rank (`kvstore.engine.reencode`).
4. A child is evicted before its parent, so every row can be reached from its root.
5. One counter of size (`Ledger`), in bytes on disk: files rounded up to 4096, plus index, quarantine and keys.
   It is compared with the budget when the engine opens and before every write.
6. Corrupt data goes to quarantine and is a miss. Wrong bytes are never served: readers verify every checksum, and a
   blob is verified here before it goes to quarantine.
7. What a block's recipes refer to is stored before it and stays as long as any block refers to it; where it is damaged,
   the blocks stay, and are misses (`kvstore.engine.bases`).
8. Checkpoints that hardly save anything go in the commit that adds one after them (`kvstore.engine.retain`).

Durability: `commit` (default) syncs blobs, directory and index commit; `full` also empties the drive's cache, once for
each request; `none`, for tests, syncs nothing, and the index is rebuilt from verified blobs after an unclean stop.

Threads: any thread may call anything. One lock serialises writers of the index; it is held over one commit of at most
1,024 rows, or the copy of a compaction, never while blobs are written, unlinked or the caller's iterator runs. One
thread at a time makes room. A store has its files synced on a thread that ends with it. `match` takes no lock but
LMDB's read transaction; `lease` and `touch` take one that is never held over I/O.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from kvstore.blobs.fs import Fs, sync_tree
from kvstore.blobs.protocol import BlobId, BlobReader, Blobs
from kvstore.blobs.ranges import OPEN_FILES_MAX
from kvstore.core.blocks import KEY_BYTES
from kvstore.core.bounded import ByteCache
from kvstore.core.keys import aux_key
from kvstore.core.records import AUX_BYTES_MAX
from kvstore.engine import bases
from kvstore.engine import check as checking
from kvstore.engine.adopt import find_missing_keys
from kvstore.engine.check import CheckReport, Finding, Scrub, after_repair, recheck
from kvstore.engine.directory import DirectoryLock, QualityFiles, claim
from kvstore.engine.evict import Evictor
from kvstore.engine.listing import EngineStats, Listing
from kvstore.engine.match import Matcher, Nearest, Slice
from kvstore.engine.recover import recovered_index
from kvstore.engine.reencode import Reencoder
from kvstore.engine.retain import VICTIMS_MAX
from kvstore.engine.shared import DISPLACED, EngineOptions, Place, Shared
from kvstore.engine.store import Writer
from kvstore.engine.terms import Keeper
from kvstore.engine.transfer import Transfer
from kvstore.errors import AuxMissingError, CorruptDataError, DirectoryError, KVStoreError
from kvstore.index.index import Index
from kvstore.index.rows import Row
from kvstore.index.validate import digest

log = logging.getLogger(__name__)


class Engine:
    """See the module. Make one with `Engine.open`.

    Verbs that one part carries out alone are that part's methods, bound here and documented there.
    """

    def __init__(self, shared: Shared, held: DirectoryLock) -> None:
        """Not for callers: `open` is."""
        self._shared = shared
        self._held = held
        self._closed = False
        self._evictor = evictor = Evictor(shared)
        self.quality = QualityFiles(shared.directory.quality, shared.fs, sync=shared.sync)
        self.transfer = Transfer(shared)
        self.keeper = Keeper(shared, evictor.begin_limits)
        # STORE
        self.store = Writer(shared, evictor).store
        self.is_encrypted, self.encrypt, self.shred = shared.is_encrypted, shared.encrypt, shared.shred
        self.reencoder = Reencoder(shared, evictor)
        self.is_evicted = shared.evictions.covers
        self.await_durable = shared.drive.confirm
        # FETCH
        matcher = Matcher(shared)
        self.match, self.checkpoint_at = matcher.match, matcher.checkpoint_at
        self.first_unusable = matcher.first_unusable
        self.nearest = Nearest(shared)
        self.path, self.lease = shared.blobs.path, shared.deletions.lease
        # Room
        self.evict, self.make_room = evictor.evict, evictor.make_room
        self.could_make_room = evictor.shortage.has_room
        # Care
        self.is_displaced = shared.is_displaced
        self.recheck = functools.partial(recheck, shared)
        # What recipes refer to
        self._aux = ByteCache(AUX_BYTES_MAX)
        self.has_aux = functools.partial(bases.is_there, shared.site)
        self._scrub = Scrub(shared)
        # Looking
        self.namespace = shared.namespaces.get  # what is known of one; None if nothing is stored in it
        self._listing = listing = Listing(shared)
        self.list_blocks, self.show, self.sequences = listing.list_blocks, listing.show, listing.sequences

    @classmethod
    def open(
        cls,
        data_dir: Path,
        options: EngineOptions,
        fs: Fs | None = None,
        clock: Callable[[], float] = time.time,
        blobs: Blobs | None = None,
        steady: Callable[[], float] = time.monotonic,
        *,
        is_limited: bool = True,
    ) -> Engine:
        """Take the directory and put it in order. `fs`, `clock` and `steady`, which no one sets, are seams for tests;
        `blobs` is where bytes lie, None: files in the directory. Without `is_limited` limits delete nothing before the
        caller puts them in force with `limit`.

        Raises DirectoryHeldError, DirectoryError, UnknownFormatError.
        """
        fs = fs or Fs()
        directory, held = claim(data_dir, options.keys_dir)
        index: Index | None = None
        try:
            place = Place(directory, held, options, fs, blobs, clock, steady)
            index = recovered_index(place)
            held.write(clean=False, durability=options.durability, socket=options.socket)
            shared = Shared(place, index, clock)
            find_missing_keys(shared.site)
            engine = cls(shared, held)
            after_repair(shared, place.dropped)
            if is_limited:
                engine._keep_to_limits()
            return engine
        except BaseException as error:
            if index is not None:
                index.close()
            held.close()
            if isinstance(error, OSError):
                raise DirectoryError(f"the data directory {directory.root} cannot be used: {error}") from error
            raise

    def close(self) -> None:
        """Write the access order, mark the stop as clean if it is, give the directory back. Idempotent.

        A directory that was displaced is let go as it is, as by a crash.
        """
        with self._shared.lock:
            if self._closed:
                return
            self._closed = True
            try:
                if not self._shared.is_displaced():
                    self._leave_in_order()
            finally:
                self._shared.index.close()
                self._held.close()

    def _leave_in_order(self) -> None:
        shared = self._shared
        shared.evictions.tell()
        shared.deletions.end_all_leases()
        shared.deletions.settle()
        shared.flush_uses()
        self._scrub.save()
        if not shared.sync:
            # `clean` in the lock file says that everything before it is on the disk.
            sync_tree(shared.fs, str(shared.directory.root))
            shared.index.ring.sync()
        shared.index.sync()
        left = digest(shared.index.path / "data.mdb")
        self._held.write(clean=shared.is_in_step(), durability=shared.options.durability, index=left)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- finding --------------------------------------------------------------------------------------------------

    def mark_divergence(self, row: Row) -> None:
        """Note that a prompt went another way after this checkpoint, so that its chain keeps it. Written like `touch`.

        To be called when a fetch used the checkpoint of a match that says `diverged`.
        """
        self._shared.uses.mark(row.key)

    def mark_end(self, row: Row) -> None:
        """Note that a prompt ends at this checkpoint: it is no interim one any more. Written with the next commit."""
        with self._shared.lock:
            self._shared.index.table.end(row.key)
        self._shared.uses.remind()

    def has_paths(self, root: bytes) -> bool:
        """Whether the blobs of a namespace have files that others can read."""
        return self.path(BlobId(root, bytes(KEY_BYTES), 0)) is not None

    def reader(self, slices: Sequence[Slice], open_max: int = OPEN_FILES_MAX) -> BlobReader:
        """A reader of the blocks of a plan, all of one namespace."""
        return self._shared.blobs.reader([part.row.source for part in slices], open_max)

    def aux(self, root: bytes, digests: Iterable[bytes]) -> Mapping[bytes, bytes]:
        """The bytes that recipes of a namespace refer to by these digests, verified; read once and kept in memory.

        AuxMissingError for one that is not there. What is damaged goes to quarantine. Waits for the disk.
        """
        site, found = self._shared.site, dict[bytes, bytes]()
        for name in digests:
            data = self._aux.get(name)
            if data is not None:
                data = data if bases.is_there(site, root, [name]) else None
            else:
                try:
                    data = bases.read(site, root, name)
                except CorruptDataError as error:
                    log.warning("a basis cannot be read: %s", error)
                    self.recheck(aux_key(root, name))
            if data is None:
                raise AuxMissingError(name)
            self._aux.put(name, data)
            found[name] = data
        return found

    def touch(self, slices: Iterable[Slice], *, fetched: bool = False) -> None:
        """Note that blocks were used. Kept in memory, written with the next commit or by `maintain`.

        `fetched`: for a fetch, so that the time since their last use counts as a reuse gap.
        """
        keys = tuple(part.row.key for part in slices)
        used_s = self._shared.index.table.value(keys[-1], "used_s") if fetched and keys else None
        self._shared.uses.touch(keys, used_s)

    def has_leases(self) -> bool:
        """Whether any reader has one."""
        return bool(self._shared.deletions.leased())

    # -- storing --------------------------------------------------------------------------------------------------

    def mark(self, keys: Sequence[bytes], prompt: int) -> int:
        """Note that a prompt offered these blocks of a chain: how many, from the first to the last that another did.

        Kept in memory, written as `touch`. A rebuild of the index loses it.
        """
        seen = self._shared.index.marks.touch(keys, prompt, int(self._shared.clock()))
        self._shared.uses.remind()
        return seen

    @property
    def evictions(self) -> int:
        """How many evictions there were. A store that began before one of what it brings is evicted with it."""
        return self._shared.evictions.number

    def holds(self, key: bytes) -> bool:
        """Whether a block or checkpoint is stored."""
        return key in self._shared.index.table

    # -- room -----------------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """Bytes on disk of the data directory."""
        return self._shared.ledger.total

    @property
    def put_bytes(self) -> int:
        """What was written for blobs since the engine was opened, those that came to nothing among them."""
        return self._shared.health.put_bytes

    @property
    def budget_bytes(self) -> int:
        """Most bytes that it may cost."""
        return self._shared.options.budget_bytes

    def limit(self, budget_bytes: int, free_floor_bytes: int, ttl_s: int = 0, *, at_once: bool = False) -> None:
        """Keep to these limits from now on.

        Where they delete more than a tenth of what is stored, nothing goes for `deletion_wait_s`, unless `at_once`:
        other limits save it. Until then nothing is stored that needs room.
        """
        shared = self._shared
        shared.options = replace(
            shared.options, budget_bytes=budget_bytes, free_floor_bytes=free_floor_bytes, ttl_s=ttl_s
        )
        self._keep_to_limits(at_once)

    def _keep_to_limits(self, at_once: bool = False) -> None:
        self._evictor.begin_limits(at_once)
        self._evictor.make_room(0)
        self._shared.evictions.tell()
        self._shared.health.tell()

    @property
    def degraded(self) -> str:
        """Why nothing is stored at present; empty when all is well."""
        return self._shared.health.degraded

    def maintain(self) -> None:
        """To be called every second or so: write the access order when due, keep to budget and floor.

        When the disk refused a write, see whether it takes one again. Raises nothing that a disk can do.
        """
        shared = self._shared
        shared.health.displaced = DISPLACED if shared.is_displaced() else ""
        if shared.health.displaced:
            shared.health.tell()
            return
        try:
            if shared.uses.due():
                shared.flush_uses()
            shared.deletions.settle()
            if shared.blobs.clear(VICTIMS_MAX):  # of namespaces whose eviction a stop cut short
                with shared.lock:
                    shared.measure()
            self._evictor.keep_to_limits()
            self._evictor.keep_terms()
            shared.evictions.tell()
            shared.ballast.lay()
            if shared.health.disk_error and shared.can_write():
                shared.health.disk_error = ""
        except (KVStoreError, OSError) as error:
            shared.health.disk_error = str(error)
        finally:
            shared.health.tell()

    def scrub(self) -> None:
        """To be called every second or so, always on one thread at a time: verify some blobs, as many as are due.

        Raises nothing that a disk can do.
        """
        try:
            if not self._shared.is_displaced():
                self._scrub.step()
        except (KVStoreError, OSError) as error:
            self._shared.health.disk_error = str(error)

    # -- care -----------------------------------------------------------------------------------------------------

    def check(self, repair: bool = False, tell: checking.Tell = lambda done, total: None) -> CheckReport:
        """Read and verify everything, while others go on. The same walk as `check_directory`.

        `tell` hears how many blobs of about how many are done.
        """
        shared = self._shared
        shared.require_place()
        if repair:
            with contextlib.suppress(OSError):  # `maintain` will tell
                shared.deletions.settle()
        walk = checking.Walk(shared.site, repair, tell)
        try:
            walk.run()
        except CorruptDataError as error:
            advice = f"{error}; stop the daemon and run: kvstore check --repair"
            walk.report.findings.append(Finding("row", str(shared.index.path), advice))
        after_repair(shared, walk.removed)
        if repair:
            with contextlib.suppress(OSError):
                shared.deletions.settle()
        return walk.report

    # -- looking --------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counts and sizes now. A directory that cannot be reached has 0 free bytes, and `disk_error` says so."""
        try:
            free_bytes = self._evictor.shortage.free_bytes()
        except OSError as error:
            self._shared.health.disk_error = f"the data directory cannot be reached: {error}"
            free_bytes = 0
        counted = self._listing.stats(free_bytes)
        return replace(counted, scrubbed_s=self._scrub.done_s, damaged=self._scrub.damaged)
