"""The engine: blobs, and the index that names them.

Invariants, each with its tests:

1. A row never names a blob that is not complete. Write = tmp, length check, fsync, for each blob as it comes; then for
   the whole request the renames, one fsync of the folder and one index commit; only then is the request durable.
2. Delete = index commit, then unlink, then the folders synced; only then is an eviction acknowledged. What a crash
   leaves in between is a stray blob, never a dangling row. A deleted blob that stays on the disk, for a reader or
   because the disk keeps it, has a tombstone (`kvstore.engine.deletions`), so that no rebuild brings it back.
3. Blobs never change. A new one gets a new name, and its row replaces the old one's in one transaction.
4. A child is evicted before its parent, so every row can be reached from its root.
5. One counter of size (`Ledger`), in bytes on disk: files rounded up to 4096, plus index, quarantine and keys.
   It is compared with the budget when the engine opens and before every write.
6. Corrupt data goes to quarantine and is a miss. Wrong bytes are never served: readers verify every checksum, and a
   blob is verified here before it goes to quarantine.
7. Checkpoints are bounded along every chain and in all (`kvstore.engine.store`), in the commit that adds one.

Durability: `commit` (default) syncs blobs, directory and index commit; `full` also empties the drive's cache, once for
each request; `none`, for tests, syncs nothing, and the index is rebuilt from verified blobs after an unclean stop.

Threads: any thread may call anything. One lock serialises writers of the index; it is held over one commit of at most
1,024 rows, or the copy of a compaction, never while blobs are written, unlinked or the caller's iterator runs. One
thread at a time makes room. A store has its files synced on a thread that ends with it. `match` takes no lock but
LMDB's read transaction; `lease` and `touch` take one that is never held over I/O.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from kvstore.blobs.fs import Fs, sync_tree
from kvstore.blobs.keyring import NamespaceKey
from kvstore.blobs.protocol import BlobId, BlobReader, Blobs
from kvstore.blobs.ranges import OPEN_FILES_MAX
from kvstore.core.blocks import KEY_BYTES
from kvstore.core.keys import Chain, NamespaceInfo
from kvstore.engine import check as checking
from kvstore.engine import match as matching
from kvstore.engine.adopt import find_missing_keys
from kvstore.engine.check import CheckReport, Finding, Scrub, after_repair, recheck
from kvstore.engine.deletions import Lease
from kvstore.engine.directory import DirectoryLock, QualityFiles, claim
from kvstore.engine.evict import Evictor, EvictReport, Selection
from kvstore.engine.listing import BlockInfo, EngineStats, StoredSequence, list_blocks, sequences, show, stats
from kvstore.engine.match import Match, Nearest, Slice, checkpoint_at
from kvstore.engine.recover import recovered_index
from kvstore.engine.retain import VICTIMS_MAX
from kvstore.engine.shared import DISPLACED, EngineOptions, Place, Shared
from kvstore.engine.store import NewBlock, StoreReceipt, Writer
from kvstore.engine.transfer import Transfer
from kvstore.errors import CorruptDataError, DirectoryError, KVStoreError
from kvstore.index.index import Index
from kvstore.index.rows import Row
from kvstore.index.validate import digest

log = logging.getLogger(__name__)


class Engine:
    """See the module. Make one with `Engine.open`."""

    def __init__(self, shared: Shared, held: DirectoryLock) -> None:
        """Not for callers: `open` is."""
        self._shared = shared
        self._held = held
        self._evictor = Evictor(shared)
        self._writer = Writer(shared, self._evictor)
        self.quality = QualityFiles(shared.directory.quality, shared.fs, sync=shared.sync)
        self.transfer = Transfer(shared)
        self._scrub = Scrub(shared, self.recheck)
        self.nearest = Nearest(shared)
        self._closed = False

    @classmethod
    def open(
        cls,
        data_dir: Path,
        options: EngineOptions,
        fs: Fs | None = None,
        clock: Callable[[], float] = time.time,
        blobs: Blobs | None = None,
    ) -> Engine:
        """Take the directory and put it in order. `fs` and `clock` are seams for tests; `blobs` is where bytes
        lie, None: files in the directory.

        Raises DirectoryHeldError, DirectoryError, UnknownFormatError.
        """
        fs = fs or Fs()
        directory, held = claim(data_dir, options.keys_dir)
        index: Index | None = None
        try:
            place = Place(directory, held, options, fs, blobs)
            index = recovered_index(place)
            held.write(clean=False, durability=options.durability, socket=options.socket)
            shared = Shared(place, index, clock)
            find_missing_keys(shared.site)
            engine = cls(shared, held)
            after_repair(shared, place.dropped)
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
                if not self.is_displaced():
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

    def namespace(self, root: bytes) -> NamespaceInfo | None:
        """What is known of a namespace; None if nothing is stored in it."""
        return self._shared.namespaces.get(root)

    def match(
        self,
        chain: Chain,
        fidelity_min: int = 0,
        limit_tokens: int | None = None,
        exact: bool = False,
    ) -> Match:
        """The longest stored prefix of a prompt, at most `limit_tokens`, of blocks of `fidelity_min` or more.

        `exact`: the longest that ends at a checkpoint, likewise of `fidelity_min`; NO_CHECKPOINT when there are blocks
        for more. Plans from the index alone. CorruptDataError when the index is damaged: a miss.
        """
        return matching.match(self._shared, chain, fidelity_min, limit_tokens, exact)

    def checkpoint_at(self, chain: Chain) -> Row | None:
        """The checkpoint after exactly the last token. Whether there are blocks up to it, a match says."""
        with self._shared.index.view() as view:
            return checkpoint_at(view, chain)

    def mark_divergence(self, row: Row) -> None:
        """Note that a prompt went another way after this checkpoint, so that its chain keeps it. Written like `touch`.

        To be called when a fetch used the checkpoint of a match that says `diverged`.
        """
        self._shared.uses.mark(row.key)

    def path(self, row: Row) -> str | None:
        """The file of a row's blob; None where only this process can read it: then its bytes are streamed."""
        return self._shared.blobs.path(row.blob)

    def has_paths(self, root: bytes) -> bool:
        """Whether the blobs of a namespace have files that others can read."""
        return self._shared.blobs.path(BlobId(root, bytes(KEY_BYTES), 0)) is not None

    @staticmethod
    def templates(match: Match) -> dict[bytes, bytes]:
        """The templates that the runs of a match name, by id."""
        return matching.templates(match)

    def reader(self, slices: Sequence[Slice], open_max: int = OPEN_FILES_MAX) -> BlobReader:
        """A reader of the blocks of a plan, all of one namespace."""
        return self._shared.blobs.reader([part.row.source for part in slices], open_max)

    def first_unusable(self, slices: Sequence[Slice]) -> int | None:
        """Index of the first slice whose blob is gone, has another size than its row says, or breaks a rule."""
        return matching.first_unusable(self._shared, slices)

    def touch(self, slices: Iterable[Slice], *, fetched: bool = False) -> None:
        """Note that blocks were used. Kept in memory, written with the next commit or by `maintain`.

        `fetched`: for a fetch, so that the time since their last use counts as a reuse gap.
        """
        keys = tuple(part.row.key for part in slices)
        used_s = self._shared.index.table.value(keys[-1], "used_s") if fetched and keys else None
        self._shared.uses.touch(keys, used_s)

    def lease(self, rows: Iterable[Row]) -> Lease:
        """Protect the blobs of rows until they are open: evicted last, and those of replaced rows stay for now."""
        return self._shared.deletions.lease(tuple(rows), self._shared.index.ring)

    # -- encryption -----------------------------------------------------------------------------------------------

    def is_encrypted(self, root: bytes) -> bool:
        """Whether a namespace is encrypted."""
        return self._shared.index.ring.key(root) is not None or self._shared.is_key_missing(root)

    def encrypt(self, root: bytes) -> NamespaceKey | None:
        """The key that a namespace is encrypted with from now on; None, and it is not, when it holds anything plain.

        Hold it until `store` has it: before the first store it is nowhere else. KeyMissingError while the keys of what
        is stored are missing.
        """
        return self._shared.encrypt(root)

    def shred(self, namespace_prefix: bytes, dry_run: bool = False) -> int:
        """Drop the keys of the encrypted namespaces that start so; how many. Evict what they held afterwards.

        InvalidRequestError, having done nothing, when one of them is not encrypted, or there is none.
        """
        return self._shared.shred(namespace_prefix, dry_run)

    # -- storing --------------------------------------------------------------------------------------------------

    def store(
        self,
        namespace_record: bytes,
        blocks: Iterable[NewBlock],
        protect: Sequence[bytes] = (),
        encryption: NamespaceKey | None = None,
        since: int | None = None,
        agreed: Callable[[], None] = lambda: None,
    ) -> StoreReceipt:
        """Write blocks, parents before children, as one durable unit. `protect`: keys that must not make room for them.

        `encryption`: with this key or not at all; when it is not the namespace's (any more), DEPENDENCY_LOST.
        `since`: the `evictions` when the store began, None: now; EVICTED, and nothing of it stays, when the namespace
        was evicted later.
        `blocks` is pulled one at a time, as room is made: the bytes of a block are not needed when the next is asked
        for. `agreed` is called when all that will be stored is on the disk, under temporary names, before any of it is
        visible: it may wait for the caller's word. An exception out of either is raised again and nothing is stored.
        Stops early, and keeps what came before, with DEPENDENCY_LOST when a parent is gone and STORE_FULL when there is
        no room. Raises InvalidRequestError for blocks that cannot be, DirectoryError when the disk fails.
        """
        return self._writer.store(namespace_record, blocks, protect, encryption, since, agreed)

    @property
    def evictions(self) -> int:
        """How many evictions there were. A store that began before one of what it brings is evicted with it."""
        return self._shared.evictions.number

    def is_evicted(self, root: bytes, since: int, keys: Collection[bytes] = ()) -> bool:
        """Whether a namespace, or a sequence in it with these keys, was evicted after the `evictions` were so many."""
        return self._shared.evictions.covers(root, since, keys)

    def holds(self, key: bytes) -> bool:
        """Whether a block or checkpoint is stored."""
        return key in self._shared.index.table

    def await_durable(self) -> bool:
        """Wait until what a match finds now is as durable as was promised; False when the disk refuses."""
        return self._shared.drive.confirm()

    # -- room -----------------------------------------------------------------------------------------------------

    @property
    def used_bytes(self) -> int:
        """What the data directory costs on disk."""
        return self._shared.ledger.total

    @property
    def budget_bytes(self) -> int:
        """Most bytes that it may cost."""
        return self._shared.options.budget_bytes

    def limit(self, budget_bytes: int, free_floor_bytes: int) -> None:
        """Keep to these limits from now on, and at once."""
        shared = self._shared
        shared.options = replace(shared.options, budget_bytes=budget_bytes, free_floor_bytes=free_floor_bytes)
        self._keep_to_limits()

    def _keep_to_limits(self) -> None:
        self._evictor.announce()
        self._evictor.make_room(0)
        self._evictor.keep_checkpoint_share()
        self._shared.evictions.tell()
        self._shared.health.tell()

    @property
    def degraded(self) -> str:
        """Why nothing is stored at present; empty when all is well."""
        return self._shared.health.degraded

    def make_room(self, nbytes: int) -> bool:
        """Evict until `nbytes` more fit under budget and floor; False when they do not even then."""
        return self._evictor.make_room(nbytes)

    def could_make_room(self, nbytes: int) -> bool:
        """Whether there may be room for so many bytes, by evicting or not. Evicts nothing.

        When there is none, and not because they are too many for the budget, `degraded` says why until there is.
        """
        return self._evictor.shortage.has_room(nbytes)

    def evict(self, selection: Selection, dry_run: bool = False) -> EvictReport:
        """Remove what is selected, least recently used leaves first; `dry_run` reports the same and changes nothing.

        What it reports stays deleted, whatever happens afterwards. DirectoryError when the disk does not confirm that.
        """
        return self._evictor.evict(selection, dry_run)

    def maintain(self) -> None:
        """To be called every second or so: write the access order when due, keep to budget and floor.

        When the disk refused a write, see whether it takes one again. Raises nothing that a disk can do.
        """
        shared = self._shared
        shared.health.displaced = DISPLACED if self.is_displaced() else ""
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
            if not self.is_displaced():
                self._scrub.step()
        except (KVStoreError, OSError) as error:
            self._shared.health.disk_error = str(error)

    def is_displaced(self) -> bool:
        """Whether the data directory was deleted or replaced underneath. Then open another engine: none can heal it."""
        return self._shared.is_displaced()

    # -- care -----------------------------------------------------------------------------------------------------

    def recheck(self, key: bytes) -> bool:
        """Read a block's blob again; whether it was damaged and is in quarantine now, its descendants deleted.

        What is of another format version, what has no key and what is in a displaced directory stays.
        """
        return recheck(self._shared, key)

    def check(self, repair: bool = False) -> CheckReport:
        """Read and verify everything, while others go on. The same walk as `check_directory`."""
        shared = self._shared
        shared.require_place()
        if repair:
            with contextlib.suppress(OSError):  # `maintain` will tell
                shared.deletions.settle()
        walk = checking.Walk(shared.site, repair)
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

    def list_blocks(self, namespace_prefix: bytes = b"", limit: int = 1000) -> list[BlockInfo]:
        """Up to `limit` blocks and checkpoints of the namespaces that start so, most recently used first."""
        return list_blocks(self._shared, namespace_prefix, limit)

    def sequences(self, namespace_prefix: bytes = b"", limit: int = 1000) -> list[StoredSequence]:
        """Up to `limit` sequences of the namespaces that start so, the latest used first."""
        return sequences(self._shared, namespace_prefix, limit)

    def show(self, key_prefix: bytes) -> list[BlockInfo]:
        """Blocks and checkpoints whose key starts so, at most SHOW_MAX."""
        return show(self._shared, key_prefix)

    def stats(self) -> EngineStats:
        """Counts of this moment."""
        try:
            free_bytes = self._evictor.shortage.free_bytes()
        except OSError as error:
            self._shared.health.disk_error = f"the data directory cannot be reached: {error}"
            free_bytes = 0
        return replace(stats(self._shared, free_bytes), scrubbed_s=self._scrub.done_s, damaged=self._scrub.damaged)
