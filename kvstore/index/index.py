"""The LMDB index: rows, children, and the table of `kvstore.index.table`. The only module that knows LMDB.

Databases:
    rows        key -> row value (`kvstore.index.rows`)
    children    entry (`kvstore.index.rows`) -> key
    retain      number of a chunk -> the chunk of the table, xxh3_64 of it; none for a chunk without a row
    templates   id -> the part of a run's record that many runs share (`kvstore.core.records`)
    namespaces  root -> number in the table, when its identity was last used, namespace record, xxh3_64 of all
    marks       number of a chunk -> marks of first touches (`kvstore.index.marks`), xxh3_64 of them
    meta        format version, next blob number, whether it is being rebuilt, where the scrub is, when it was written

Everything here can be rebuilt from blob headers. LMDB never gives free pages back to the volume; `Index.compact` does.

Threads: a `View` belongs to the thread that opened it. The engine's lock ensures that there is at most one `Edit` at a
time, and it protects the table.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb

from kvstore.blobs.format import FORMAT_VERSION
from kvstore.blobs.fs import Fs, taken_bytes, unlink_quietly
from kvstore.blobs.keyring import KeyRing
from kvstore.errors import CorruptDataError, DirectoryError, StoreFullError, UnknownFormatError
from kvstore.index.marks import Marks
from kvstore.index.rows import with_check, without_check
from kvstore.index.table import Table
from kvstore.index.transaction import DATABASES, Contents, Edit, View

# Set while the rows do not yet name all that the blobs hold: from the creation of an index until the end of a rebuild.
# An index that was emptied does not have it, so that what outlived an eviction does not return.
REBUILDING = "rebuilding"
MAP_BYTES = 64 << 30
READERS_MAX = 510
# A compact copy on its way; unlinked when the index is opened.
COPY = "data.mdb.compact"
# A match takes milliseconds; a reader of all rows is not waited for.
_DRAIN_S = 0.25
# The slowest disk that a copy is awaited on.
_TIMEOUT_S, _BYTES_PER_S = 10.0, 16 << 20
# In a process of its own, so that a fault in the file, or a copy that hangs, ends nothing but the copy.
# The index is named by its folder, since LMDB would keep MDB_NOSUBDIR in the copy; `lib_version` as in `Index`.
_PROGRAM = """
import sys, lmdb
lmdb.open(sys.argv[1], readonly=True, lock=False, lib_version=0).copyfd(1, compact=True)
"""
_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.PanicError)


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """LMDB's errors as ours: a full map or disk, a damaged file, anything else."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise StoreFullError(f"the index is full: {error}") from error
    except _DAMAGE as error:
        raise CorruptDataError(f"the index is damaged: {error}") from error
    except lmdb.Error as error:
        # A full disk surfaces as EIO as often as as ENOSPC; both pass when there is room again.
        full = getattr(error, "code", 0) in (errno.ENOSPC, errno.EIO, errno.EDQUOT) or isinstance(error, lmdb.DiskError)
        if full or "No space left" in str(error) or "Input/output error" in str(error):
            raise StoreFullError(f"the index cannot be written: {error}") from error
        raise DirectoryError(f"the index cannot be used: {error}") from error


class ReaderGate:
    """Gate for read transactions: waits until all readers have left and keeps new ones out meanwhile. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._is_closed = False

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Be a reader; first wait while readers are kept out."""
        with self._changed:
            while self._is_closed:
                self._changed.wait()
            self._count += 1
        try:
            yield
        finally:
            with self._changed:
                self._count -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def kept_out(self, timeout_s: float) -> Iterator[None]:
        """Keep readers out, one caller at a time. TimeoutError when those that are in do not leave."""
        try:
            with self._changed:
                self._is_closed = True
                if not self._changed.wait_for(lambda: not self._count, timeout_s):
                    raise TimeoutError("somebody reads the index for long")
            yield
        finally:
            with self._changed:
                self._is_closed = False
                self._changed.notify_all()


class Index(Contents):
    """The environment. Open it only while holding the data directory's lock: LMDB's own locks are not relied on.

    Its `Contents` are the engine's to read, under the engine's lock.
    """

    def __init__(self, path: Path, fs: Fs, ring: KeyRing, sync: bool = True, map_bytes: int = MAP_BYTES) -> None:
        """Open or create. UnknownFormatError for another version, CorruptDataError when it cannot be read.

        `sync=False` (durability none): commits are not flushed; a crash of the machine may leave anything.
        """
        super().__init__()
        self.path = path
        self._file = f"{path}/data.mdb"
        self.ring = ring
        self._fs = fs
        self._sync = sync
        self._map_bytes = map_bytes
        self._readers = ReaderGate()
        if (path / COPY).exists():
            unlink_quietly(fs, [str(path / COPY)])
        self._open()
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        with translated():
            self._env = lmdb.open(
                str(self.path),
                map_size=self._map_bytes,
                max_dbs=len(DATABASES),
                max_readers=READERS_MAX,
                mode=0o600,
                sync=self._sync,
                metasync=self._sync,
                # writemap kills the process by SIGBUS on a full disk; lib_version pins the file format, which an
                # environment variable would change otherwise.
                writemap=False,
                lib_version=0,
            )
            try:
                for name in ("data.mdb", "lock.mdb"):
                    os.chmod(self.path / name, 0o600)
                self.was_short = self._fill_up()
                self._databases = self._open_databases()
                self.is_open = True
            except BaseException:
                self._env.close()
                raise

    def compact(self, nbytes: int) -> None:
        """Put a copy without free pages, of about `nbytes`, in the file's place. Hold the engine's lock.

        Others read while it is made, and wait while it takes its place. Raises OSError, KVStoreError; then the file is
        as it was. Only if it cannot be opened again, or its name not be made durable, `is_open` is false from then on.
        """
        copy = str(self.path / COPY)
        try:
            copy_index(self._fs, self.path, self.path / COPY, nbytes, sync=self._sync)
            if self._sync:
                self._fs.flush_drive(copy)
            with self._readers.kept_out(_DRAIN_S):
                self.close()
                try:
                    self._fs.rename(copy, str(self.path / "data.mdb"))
                except BaseException:
                    self._open()
                    raise
                if self._sync:
                    self._fs.fsync_dir(str(self.path))
                self._open()
        except BaseException:
            unlink_quietly(self._fs, [copy])
            raise

    def _load(self) -> None:
        """Read what is kept in memory. CorruptDataError when the table and the rows do not have as many blobs."""
        with self.view() as view:
            self.templates, self.spaces = view.read_templates(), view.namespaces()
            self.table, self.marks = Table.load(view.chunks()), Marks.load(view.marks())
            rows = view.count()
        numbers = [space.number for space in self.spaces.values()]
        known = set(numbers)
        if len(self.table) != rows or not known.issuperset(self.table.namespaces) or len(known) < len(numbers):
            raise CorruptDataError("the index's table of blobs is not that of its rows")

    def _fill_up(self) -> bool:
        """Whether the file ended before its last page; then it is extended, sparsely.

        LMDB reads through a map, where a page beyond the end of the file kills the process. A page of zeros is an
        error instead, or, where it was never written because it is free, is read by nothing.
        """
        info, page_bytes = self._env.info(), self._env.stat()["psize"]
        wanted = (info["last_pgno"] + 1) * page_bytes
        path = self.path / "data.mdb"
        if path.stat().st_size >= wanted:
            return False
        os.truncate(path, wanted)
        return True

    def _open_databases(self) -> dict[str, Any]:
        meta = self._env.open_db(b"meta")
        with self._env.begin(write=True) as txn:
            stored = txn.get(b"version", db=meta)
            if stored is None:
                for name, number in ((b"version", FORMAT_VERSION), (REBUILDING.encode(), 1)):
                    txn.put(name, with_check(name, number.to_bytes(8, "little")), db=meta)
            elif (version := int.from_bytes(without_check(b"version", stored), "little")) != FORMAT_VERSION:
                raise UnknownFormatError(
                    f"{self.path} has format version {version}; this kvstore reads {FORMAT_VERSION}: "
                    "use the kvstore that wrote it, or another data directory"
                )
        return {name: self._env.open_db(name.encode()) for name in DATABASES}

    @contextlib.contextmanager
    def view(self) -> Iterator[View]:
        """A read transaction."""
        with self._readers.reading(), translated(), self._env.begin(self._databases["rows"]) as txn:
            yield View(txn, self._databases, self.ring, self.templates)

    @contextlib.contextmanager
    def edit(self) -> Iterator[Edit]:
        """A write transaction, committed at the end unless the body raises. Hold the engine's lock."""
        with translated():
            txn = self._env.begin(self._databases["rows"], write=True)
            edit = Edit(txn, self._databases, self.ring, self)
            try:
                yield edit
                edit.save()
                self._fs.commit(txn.commit)
            except BaseException:
                txn.abort()
                self._load()  # a commit that failed may have happened
                raise

    @property
    def is_there(self) -> bool:
        """Whether the data file is at its place. LMDB maps it: on a disk that was unplugged, touching the map kills."""
        return os.path.lexists(self._file)

    @property
    def file_bytes(self) -> int:
        """Size of the data file, which only `compact` makes smaller."""
        return (self.path / "data.mdb").stat().st_size

    def used_bytes(self) -> int:
        """How much of the file is not free: the size of a compact one. Two pages are LMDB's own."""
        with self.view() as view:
            trees = [self._env.stat(), *view.trees().values()]
        pages = sum(tree["branch_pages"] + tree["leaf_pages"] + tree["overflow_pages"] for tree in trees)
        return int((2 + pages) * trees[0]["psize"])

    def disk_bytes(self) -> int:
        """Bytes on disk of the index's files."""
        return taken_bytes(self.path / name for name in os.listdir(self.path))

    def sync(self) -> None:
        """Flush everything, also in an environment that does not sync."""
        with translated():
            self._env.sync(True)

    def close(self) -> None:
        """Close; no transaction may be open."""
        self.is_open = False
        self._env.close()


def copy_index(fs: Fs, folder: Path, copy: Path, nbytes: int, *, sync: bool) -> None:
    """Write a copy of about `nbytes` of the index in `folder`, which must not be written meanwhile. Raises OSError."""
    fd = fs.open(str(copy), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
        command = [sys.executable, "-P", "-c", _PROGRAM, str(folder)]
        timeout_s = _TIMEOUT_S + nbytes / _BYTES_PER_S
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=fd, stderr=subprocess.PIPE, timeout=timeout_s, check=True
        )
        if sync:
            fs.fsync(fd)
    except subprocess.SubprocessError as error:
        raise OSError(f"{error} {getattr(error, 'stderr', b'')!r}") from error
    finally:
        os.close(fd)
