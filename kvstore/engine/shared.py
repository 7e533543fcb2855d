"""What the parts of one engine share: index, lock, counters and notes of use; and what is told of it all."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.blobs.encrypted import EncryptedBlobs
from kvstore.blobs.fs import Fs, takes_writes
from kvstore.blobs.keyring import KeyRing, NamespaceKey
from kvstore.blobs.local import LocalBlobs
from kvstore.blobs.protocol import BlobId, Blobs
from kvstore.core.blocks import Block
from kvstore.core.histogram import AGE_BOUNDS_S, Histogram
from kvstore.core.keys import NamespaceInfo
from kvstore.core.layers import Layout
from kvstore.core.rules import check_block
from kvstore.engine.adopt import NEXT_NUMBER, Site, find_missing_keys
from kvstore.engine.deletions import Deletions, Tombstones
from kvstore.engine.directory import Directory, DirectoryLock
from kvstore.engine.evictions import Evictions, Lost
from kvstore.engine.keep import CLOCK_MIN_S, Keep, TtlClock
from kvstore.engine.ledger import Ballast, DiskHealth, DriveCache, Ledger
from kvstore.engine.retain import POLICIES
from kvstore.errors import ConfigError, CorruptDataError, DirectoryError, InvalidRequestError, KVStoreError
from kvstore.index.index import MAP_BYTES, Index
from kvstore.index.rows import Row
from kvstore.index.table import Table
from kvstore.index.transaction import Edit

# `none`, without any sync, is for tests: the configuration does not offer it.
DURABILITIES = ("commit", "full", "none")
# A namespace that no caller named for this long is an orphan: its model, adapter or engine was changed or is gone.
ORPHAN_S = 30 * 86_400
_DAY_S = 86_400
# In the index: the clock of times to live when it was last written.
_CLOCK_S = "clock_s"
# Notes of use that are kept while no commit takes them, as a multiple of what is written at once.
_UNWRITTEN_FACTOR = 16
DISPLACED = "the data directory was deleted or replaced, or its volume is away"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engine is to run.

    `budget_bytes` bounds what the data directory costs on disk; under `free_floor_bytes` of free disk nothing is
    written. `socket` is told to a second daemon that wants the same directory. `evicted_max` keys are remembered, so
    that a miss can say why. `ballast_bytes` (at most 1/64 of the budget) are kept on disk, to be given up when the disk
    is full. `master_key` (32 bytes, or none) opens the keys of encrypted namespaces, which lie in `keys_dir` (None:
    beside the data directory), never in the data directory.
    A tail that ends before `short_tokens` gives way to any longer block, others to those of no lower fidelity.
    What was not used for `ttl_s` is evicted, unless its namespace has a TTL of its own; 0: nothing is.
    Limits that would delete more than a tenth of what is stored wait for `deletion_wait_s`.
    `policy` is a name of `kvstore.engine.retain.POLICIES`.
    `rule` raises CorruptDataError for a block that no engine could go on from, see `kvstore.core.rules`.
    A pass of the scrub reads every blob again at `scrub_bytes_per_s` (0: never), `scrub_interval_s` after the last one.
    """

    budget_bytes: int
    free_floor_bytes: int = 0
    durability: str = "commit"
    map_bytes: int = MAP_BYTES
    socket: str = ""
    touches_max: int = 4096
    touches_age_s: float = 30.0
    evicted_max: int = 65_536
    quarantine_files_max: int = 64
    ballast_bytes: int = 1 << 20
    short_tokens: int = 0
    scrub_bytes_per_s: int = 0
    scrub_interval_s: float = 7 * 86_400.0
    master_key: bytes = field(default=b"", repr=False)
    rule: Callable[[Layout, Block], None] = field(default=check_block, repr=False)
    keys_dir: Path | None = None
    policy: str = "lru"
    ttl_s: int = 0
    deletion_wait_s: float = 0

    def __post_init__(self) -> None:
        if self.durability not in DURABILITIES:
            raise ConfigError(f"durability must be one of {', '.join(DURABILITIES)}, not {self.durability!r}")
        if self.budget_bytes < 0 or self.free_floor_bytes < 0:
            raise ConfigError("budget_bytes and free_floor_bytes cannot be negative")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")


class Place:
    """A claimed data directory with all that is needed to open its index."""

    def __init__(
        self,
        directory: Directory,
        held: DirectoryLock,
        options: EngineOptions,
        fs: Fs,
        blobs: Blobs | None = None,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read the keys and the tombstones. `blobs` None: files in the directory. Raises DirectoryError, OSError."""
        self.directory = directory
        self.held = held
        self.options = options
        self.fs = fs
        self.clock, self.steady = clock, steady
        self.sync = options.durability != "none"
        self.ring = KeyRing(directory.keys, fs, options.master_key, sync=self.sync)
        local = LocalBlobs(directory.blobs, directory.quarantine, fs, sync=self.sync) if blobs is None else blobs
        # Without a master key there are no keys, and none can be made.
        self.blobs: Blobs = EncryptedBlobs(local, self.ring) if options.master_key else local
        self.tombstones = Tombstones(directory.settings, self.blobs, fs, sync=self.sync)
        self.dropped: list[Row] = []  # by the sweep

    def site(self, index: Index) -> Site:
        """For a walk over it."""
        delete = functools.partial(functools.partial, self._delete)
        return Site(self.blobs, index, lambda: self.tombstones.blobs, delete, rule=self.options.rule, clock=self.clock)

    def _delete(self, blobs: Collection[BlobId]) -> None:
        """Unlink all pending names: there are no readers yet. A name that cannot be unlinked gets a tombstone."""
        try:
            left = self.blobs.delete(blobs)
            if left:
                self.tombstones.add(left)
            for root in {blob.root for blob in blobs}:
                self.blobs.sync(root)
        except OSError as error:
            log.warning("blobs that were deleted may come back: %s", error)

    def open_index(self) -> Index:
        """Open or create the index. Raises CorruptDataError, UnknownFormatError."""
        return Index(self.directory.index, self.fs, self.ring, self.sync, self.options.map_bytes)


class Shared:
    """`lock` serialises writers of the index: hold it to change rows or the table of blobs.

    It is held over one commit of at most 1,024 rows, and never while blobs are read, written or unlinked. `in_flight`
    are blobs that are being written, with their bytes on disk; it changes under the lock. `Uses` and `Deletions` have
    locks of their own, never held over I/O: touching and leasing never wait for a commit.
    """

    def __init__(self, place: Place, index: Index, clock: Callable[[], float]) -> None:
        self.directory, self._held, self.options = place.directory, place.held, place.options
        self.blobs, self.fs, self.sync = place.blobs, place.fs, place.sync
        self.index, self.clock = index, clock
        self.lock = threading.RLock()
        flush = functools.partial(self.fs.flush_drive, str(index.path / "data.mdb"))
        self.drive = DriveCache(flush if self.options.durability == "full" else None)
        self.ledger = Ledger()
        self.health = DiskHealth()
        self.evictions = Evictions()
        self.ballast = Ballast(self.directory.ballast, min(self.options.ballast_bytes, self.options.budget_bytes // 64))
        self.ballast.lay()
        self.deletions = Deletions(self.blobs, place.tombstones, self.ledger, self.drive, index.ring, self.is_displaced)
        self.keep = Keep(self.directory.settings, self.fs, sync=self.sync)
        index.table.pin(self.keep.pins)
        self.lost = Lost(self.options.evicted_max)
        self.uses = Uses(self.options.touches_max, self.options.touches_age_s, clock)
        self.in_flight: dict[BlobId, int] = {}
        # Of these, what the volume has not been given yet: its free space does not show it. Any thread may take out.
        self.unwritten: dict[BlobId, int] = {}
        self.site = Site(
            self.blobs,
            index,
            self.busy,
            self.deletions.delete_later,
            self.lock,
            self.skip_number,
            self.options.rule,
            self.require_reach,
            clock,
        )
        with index.view() as view:
            self.next_number = max(view.meta(NEXT_NUMBER) or 1, place.tombstones.next_number())
            seen_s = view.meta(_CLOCK_S) or int(index.table.rows["used_s"].max(initial=0))
        self.steady = place.steady
        self.ttl_clock = TtlClock(clock, place.steady, seen_s)
        self.namespaces: dict[bytes, NamespaceInfo] = {}
        self.measure()

    def is_displaced(self) -> bool:
        """Whether the data directory, or the folder of its keys, was deleted or replaced, or the index was lost.

        Then open another engine: none can heal it.
        """
        return not self.index.is_open or self._held.is_displaced() or self.index.ring.is_gone()

    def require_place(self) -> None:
        """DirectoryError when the data directory was displaced: names lead to files that are not ours, or to none."""
        if self.is_displaced():
            raise DirectoryError(f"{DISPLACED}: {self.directory.root}")

    def can_write(self) -> bool:
        """Whether the data directory takes writes."""
        return takes_writes(self.fs, str(self.directory.root / "probe"))

    def require_reach(self, error: CorruptDataError | None = None) -> None:
        """DirectoryError when the directory was displaced, or a read failed (`error`) on a disk that takes no write.

        A single file that a sound disk cannot read is damaged. A disk that was unplugged fails every read.
        """
        self.require_place()
        cause = error.__cause__ if error is not None else None
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError) and not self.can_write():
            self.health.disk_error = f"the disk of {self.directory.root} does not answer: {cause}"
            raise DirectoryError(self.health.disk_error) from error

    @contextlib.contextmanager
    def edit(self) -> Iterator[Edit]:
        """A write transaction that also saves noted uses and updates the counters. Hold `lock`."""
        with self.index.edit() as edit:
            yield edit
            self.uses.write(edit)
        self._follow_index()

    def settled_table(self) -> Table:
        """The table of blobs and what was noted of their use, to choose from without the lock: `Table.snapshot`."""
        with self.lock:
            self.uses.apply(self.index.table)
        return self.index.table.snapshot()

    def flush_uses(self) -> None:
        """A commit of its own for what was used. Losing it is no reason to fail."""
        try:
            with self.lock, self.edit() as edit:
                if (now_s := int(self.clock())) >= CLOCK_MIN_S:
                    edit.table.settle_clock(now_s)
                edit.set_meta(_CLOCK_S, int(self.ttl_clock.seen_s))
        except (KVStoreError, OSError) as error:
            log.warning("the access order could not be written: %s", error)

    def is_key_missing(self, root: bytes) -> bool:
        """Whether a namespace holds encrypted blocks whose keys are not where they should be."""
        if not self.index.ring.is_missing:
            return False
        with self.index.view() as view:
            return bool(view.is_unreadable(root))

    def is_encrypted(self, root: bytes) -> bool:
        """Whether a namespace is encrypted."""
        return self.index.ring.key(root) is not None or self.is_key_missing(root)

    def encrypt(self, root: bytes) -> NamespaceKey | None:
        """The key that a namespace is encrypted with from now on; None, and it is not, when it holds anything plain.

        Hold it until `store` has it: before the first store it is nowhere else. KeyMissingError while the keys of what
        is stored are missing.
        """
        ring = self.index.ring
        if ring.is_missing:
            find_missing_keys(self.site)  # what needs them may be evicted by now
        with self.lock:
            with self.index.view() as view:
                # Rows that cannot be read are those whose key was dropped.
                is_plain = view.is_unreadable(root) is False
            return ring.key(root) if is_plain else ring.make(root)

    def shred(self, namespace_prefix: bytes, dry_run: bool = False) -> int:
        """Drop the keys of the encrypted namespaces that start so; how many. Evict what they held afterwards.

        InvalidRequestError, having done nothing, when one of them is not encrypted, or there is none.
        """
        ring = self.index.ring
        with self.lock:
            self.require_place()
            roots = [root for root in ring.roots if root.startswith(namespace_prefix)]
            held = [root for root in self.namespaces if root.startswith(namespace_prefix)]
            with self.index.view() as view:
                plain = [root for root in held if root not in roots and not view.is_unreadable(root)]
            if plain or not (roots or held):
                named = f"namespace {plain[0].hex()[:12]} is" if plain else "no namespace that starts so is"
                raise InvalidRequestError(f"{named} not encrypted, so there is no key to shred: evict without --shred")
            return len(roots) if dry_run else sum(ring.drop(root) for root in roots)

    def costs(self, rows: Iterable[Row]) -> dict[BlobId, int]:
        """The blobs of rows, and what they cost on disk."""
        return {row.blob: self.site.cost(row) for row in rows if not row.is_lost}

    def used_s(self, root: bytes) -> int:
        """When a caller last named a namespace."""
        space = self.index.spaces.get(root)
        return max(space.used_s if space is not None else 0, self.uses.named_s(root))

    def is_orphan(self, root: bytes) -> bool:
        """Whether no caller named this namespace for long."""
        return self.used_s(root) < self.clock() - ORPHAN_S

    def _follow_index(self) -> None:
        """Namespaces and counters as the index has them now."""
        spaces = self.index.spaces
        for root in self.namespaces.keys() - spaces.keys():
            del self.namespaces[root]
        for root in spaces.keys() - self.namespaces.keys():
            self.namespaces[root] = NamespaceInfo.from_record(spaces[root].record)
        unused = [root for root in self.index.ring.written_roots if root not in spaces]
        if unused:
            # A key that is gone cannot be made again; what refuses to go now goes with a later commit.
            try:
                self.index.ring.unwrite(unused)
            except OSError as error:
                log.warning("the key of a namespace that holds nothing could not be unlinked: %s", error)
        self.ledger.set("blobs", self.index.table.usage().disk_bytes)
        # While a folder cannot be read, its last measured size is used.
        with contextlib.suppress(OSError):
            self.ledger.set("index", self.index.disk_bytes())
        with contextlib.suppress(OSError):
            self.ledger.set("folders", self.blobs.overhead_bytes + self.directory.own_bytes())

    def measure(self) -> None:
        """Take the counters from index and disk."""
        self._follow_index()
        with contextlib.suppress(OSError):
            self.ledger.set("quarantine", self.blobs.quarantined()[1])

    def is_in_step(self) -> bool:
        """Whether there are as many blobs as rows: what could not be deleted is left to the next start."""
        return sum(1 for _ in self.blobs.names()) == self.index.table.blobs

    def take_number(self) -> int:
        """A number for a new blob."""
        with self.lock:
            self.next_number += 1
            return self.next_number - 1

    def skip_number(self, number: int) -> None:
        """A blob has this number: later ones get others. Hold `lock`."""
        self.next_number = max(self.next_number, number + 1)

    def busy(self) -> frozenset[BlobId]:
        """Blobs that have no row for a good reason. Hold `lock`."""
        return self.deletions.busy().union(self.in_flight)


class Uses:
    """Which blobs were used, and which checkpoints a prompt diverged after, until a commit takes it. Any thread."""

    def __init__(self, count_max: int, age_s: float, clock: Callable[[], float]) -> None:
        self._count_max = count_max
        self._age_s = age_s
        self._clock = clock
        self._lock = threading.Lock()
        # How long blocks had not been used when a fetch used them: by its last block, which decides how far it reached.
        self.reuse_s = Histogram(AGE_BOUNDS_S)
        self._touches: dict[tuple[bytes, ...], int] = {}
        self._marks: dict[bytes, None] = {}
        self._named: dict[bytes, int] = {}  # when namespaces were last named
        self._newly_named: dict[bytes, int] = {}
        self._count = 0
        self._written_s = clock()

    def touch(self, keys: tuple[bytes, ...], used_s: int | None = None) -> None:
        """Note that blobs were used together. Of notes that no commit takes the oldest are dropped.

        `used_s`, for a fetch: when the table says that the last of them was used before.
        """
        now_s = int(self._clock())
        with self._lock:
            before_s = self._touches.pop(keys, used_s or 0)
            self._touches[keys] = now_s
            self._count += len(keys)
            while self._count > _UNWRITTEN_FACTOR * self._count_max and self._touches:
                oldest = next(iter(self._touches))
                del self._touches[oldest]
                self._count -= len(oldest)
        if before_s and used_s is not None:
            self.reuse_s.observe(now_s - before_s)

    def mark(self, key: bytes) -> None:
        """Note that a prompt diverged after a checkpoint; as `touch`."""
        with self._lock:
            self._marks.pop(key, None)
            self._marks[key] = None
            self._count += 1

    def name(self, root: bytes) -> None:
        """Note that a caller named a namespace that holds something: its identity is in use.

        Only the first time in a day makes a commit due. The time of the last is in memory until a commit takes it.
        """
        now_s = int(self._clock())
        with self._lock:
            self._count += self._named.get(root, 0) // _DAY_S != now_s // _DAY_S
            self._named[root] = self._newly_named[root] = now_s

    def named_s(self, root: bytes) -> int:
        """When a caller last named a namespace; 0 if none did since the start."""
        return self._named.get(root, 0)

    def remind(self) -> None:
        """Note that something else waits for a commit, too."""
        with self._lock:
            self._count += 1

    def due(self) -> bool:
        """Whether there are many notes, or old ones; a clock that was set back makes them due, too."""
        is_old = not 0 <= self._clock() - self._written_s < self._age_s
        return self._count >= self._count_max or (bool(self._count) and is_old)

    def write(self, edit: Edit) -> None:
        """Take all notes into the table, in their order; the commit of this edit writes them."""
        with self._lock:
            named, self._newly_named = self._newly_named, {}
            self._count, self._written_s = 0, self._clock()
        self.apply(edit.table)
        for root, used_s in named.items():
            edit.use_namespace(root, used_s)

    def apply(self, table: Table) -> None:
        """Take all notes into the table in memory. They are due to be written as before. Hold the engine's lock."""
        with self._lock:
            touches, self._touches = self._touches, {}
            marks, self._marks = self._marks, {}
        for keys, used_s in touches.items():
            table.touch(keys, used_s)
        for key in marks:
            table.mark(key)
