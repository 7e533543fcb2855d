"""The LMDB index: rows, namespaces, children, access order, usage. The only module that knows LMDB.

Databases:
    rows        key -> row value (`kvstore.engine.rows`)
    children    parent, code of leading tokens, seq -> key
    order       stamp, inverted depth, key -> nothing: the order of eviction, children before parents
    checkpoints the entries of `order` that are of checkpoints
    access      key -> stamp and depth, i.e. where the row stands in `order`; of a checkpoint also its mark: when a
                prompt was last seen to diverge after it, 0 if never
    namespaces  root -> namespace record, xxh3_64 of it
    usage       root -> blocks, tokens, bytes on disk, checkpoints, their bytes; kept with every commit
    meta        format version, next seq, whether it is being rebuilt

Everything here can be rebuilt from blob headers. Threads: a `View` belongs to the thread that opened it; at most one
`Edit` at a time, which the engine's writer lock sees to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import lmdb

from kvstore.blocks import KEY_BYTES, TOKEN_BYTES, count_tokens
from kvstore.engine.blobs import Fs
from kvstore.engine.keyring import KeyRing
from kvstore.engine.rows import (
    CHECKPOINT_MARK,
    SEALED_AT,
    Row,
    checkpoint_code,
    child_entry,
    open_row,
    parse_row,
    seal_row,
)
from kvstore.engine.values import number_of, with_check, with_number_check, without_check
from kvstore.errors import CorruptDataError, DirectoryError, KVStoreError, StoreFullError, UnknownFormatError
from kvstore.keys import checkpoint_key

INDEX_VERSION = 3
# Set while the rows do not yet name all that the blobs hold: from the creation of an index until the end of a rebuild.
# An index that was emptied does not have it, so that what outlived an eviction does not return.
REBUILDING = "rebuilding"
MAP_BYTES = 64 << 30
READERS_MAX = 510
_DATABASES = ("rows", "children", "order", "checkpoints", "access", "namespaces", "usage", "meta")
_USAGE = struct.Struct("<QQQQQ")
_DEPTH_MAX = 0xFFFFFFFF
# Of an access entry: stamp and depth, which every row has.
_PLACE_BYTES = 12
_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.PanicError)


@dataclass(frozen=True, slots=True)
class Usage:
    """What one namespace, or all, hold. Blocks and tokens are without checkpoints, the bytes on disk with them."""

    blocks: int = 0
    tokens: int = 0
    disk_bytes: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0

    def plus(self, row: Row, sign: int) -> Usage:
        """With one row more (+1) or less (-1)."""
        nbytes = sign * row.disk_bytes
        one = (0, 0, nbytes, sign, nbytes) if row.is_checkpoint else (sign, sign * row.n_tokens, nbytes, 0, 0)
        return Usage(*(max(0, a + b) for a, b in zip(astuple(self), one, strict=True)))


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


class View:
    """A snapshot of the index, for the thread that opened it."""

    def __init__(self, txn: Any, databases: dict[str, Any], ring: KeyRing) -> None:
        self._txn = txn
        self._db = databases
        self.ring = ring
        # A row's bytes as they stand, by key. Rows are a transaction's default database: to name it costs a third.
        self.stored: Callable[[bytes], bytes | None] = txn.get

    def value(self, key: bytes) -> bytes | None:
        """A row's bytes, unparsed, decrypted where they are encrypted and can be."""
        found = self.stored(key)
        if found is None or len(found) <= SEALED_AT or not found[SEALED_AT]:
            return found
        return open_row(key, found, self.ring)

    def row(self, key: bytes) -> Row | None:
        """The row of a key."""
        found = self.value(key)
        return None if found is None else parse_row(key, found)

    def rows(self, prefix: bytes = b"") -> Iterator[Row]:
        """All rows whose key starts with `prefix`, in key order."""
        for key, value in self._from("rows", prefix):
            if not key.startswith(prefix):
                return
            yield parse_row(key, open_row(key, value, self.ring))

    def row_from(self, key: bytes) -> Row | None:
        """The first row whose key is `key` or comes after it."""
        found = next(self._from("rows", key), None)
        return None if found is None else self.row(found[0])

    def children(self, parent: bytes, code: bytes = b"", reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """(entry, key) of a parent's children from where `code` would stand: onwards, or backwards below it."""
        for entry, key in self._from("children", parent + code, reverse):
            if entry[:KEY_BYTES] != parent:
                return
            yield entry, key

    def has_children(self, key: bytes) -> bool:
        """Whether any row names `key` as its parent."""
        return next(self.children(key), None) is not None

    def checkpoint_tails(self, parent: bytes, at_most: int) -> Iterator[int]:
        """How many tokens after `parent` there are checkpoints: each number once, from `at_most` downwards."""
        while at_most >= 0:
            below = next(self.children(parent, checkpoint_code(at_most + 1), reverse=True), None)
            if below is None or not below[0].startswith(CHECKPOINT_MARK, KEY_BYTES):
                return
            found = int.from_bytes(below[0][KEY_BYTES + 1 : KEY_BYTES + 3], "big")
            yield found
            at_most = found - 1

    def checkpoints(self, parent: bytes, tokens: bytes) -> Iterator[Row]:
        """Checkpoints after `parent` and as many of the packed `tokens` as each has, longest first.

        By key, so however many siblings there are, it is one lookup for each length.
        """
        for n_tokens in self.checkpoint_tails(parent, count_tokens(tokens)):
            tail = tokens[: n_tokens * TOKEN_BYTES]
            row = self.row(checkpoint_key(parent, tail))
            if row is not None and row.is_checkpoint and not row.is_sealed and row.tokens == tail:
                yield row

    def tree(self, row: Row) -> list[Row]:
        """A row and all its descendants, parents first."""
        seen = [row]
        for parent in seen:
            keys = [key for _, key in self.children(parent.key)]
            seen.extend(child for key in keys if (child := self.row(key)) is not None)
        return seen

    def order(self, after: bytes = b"", checkpoints_only: bool = False) -> Iterator[tuple[bytes, int, bytes]]:
        """(entry, stamp, key), least recently used first, from just after the entry `after`."""
        for entry, _ in self._from("checkpoints" if checkpoints_only else "order", after + b"\0" if after else b""):
            yield entry, int.from_bytes(entry[:8], "big"), entry[12:]

    def newest(self) -> Iterator[tuple[int, bytes]]:
        """(stamp, key), most recently used first."""
        for entry, _ in self._from("order", b"\xff" * 12, reverse=True):
            yield int.from_bytes(entry[:8], "big"), entry[12:]

    def stamp(self, key: bytes) -> int:
        """When the row was last used, microseconds since 1970; 0 if it is not in the order."""
        found = self._txn.get(key, db=self._db["access"])
        return int.from_bytes(found[:8], "big") if found else 0

    def marked(self, key: bytes) -> int:
        """When a prompt was last seen to diverge after this checkpoint; 0 if never, or if it is none."""
        found = self._txn.get(key, db=self._db["access"])
        return int.from_bytes(found[_PLACE_BYTES:], "big") if found else 0

    def usage(self) -> dict[bytes, Usage]:
        """Usage of every namespace."""
        return {root: Usage(*_USAGE.unpack(value)) for root, value in self._from("usage", b"")}

    def namespaces(self) -> dict[bytes, bytes]:
        """Record of every namespace. CorruptDataError when one was changed."""
        return {root: without_check(root, stored) for root, stored in self._from("namespaces", b"")}

    def meta(self, name: str) -> int | None:
        """A number kept beside the rows. CorruptDataError when it was changed."""
        return number_of(name, self._txn.get(name.encode(), db=self._db["meta"]))

    def count(self, database: str = "rows") -> int:
        """How many entries a database has."""
        entries: int = self._txn.stat(self._db[database])["entries"]
        return entries

    def _from(self, name: str, start: bytes, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """Items from `start` on, or backwards from just below it. Do not change the database while iterating."""
        cursor = self._txn.cursor(db=self._db[name])
        found = cursor.set_range(start) if start else cursor.first()
        if not reverse:
            return iter(cursor.iternext()) if found else iter(())
        positioned = cursor.prev() if found else cursor.last()
        return iter(cursor.iterprev()) if positioned else iter(())


class Edit(View):
    """A write transaction: what it changes is seen by nobody until it is committed, and then all at once."""

    def put(self, row: Row, stamp: int, marked: int = 0) -> None:
        """Add a row, whose key must be free; a checkpoint perhaps with the mark of the one that it replaces."""
        if not self._txn.put(row.key, self._stored(row), db=self._db["rows"], overwrite=False):
            raise KVStoreError("index: this key has a row already")
        self._link(row, stamp, marked)

    def remove(self, row: Row) -> None:
        """Delete a row and everything that points to it. Its children, if any, stay: see `remove_tree`."""
        self._txn.delete(row.key, db=self._db["rows"])
        self._txn.delete(self._entry_of(row), db=self._db["children"])
        placed = self._txn.pop(row.key, db=self._db["access"])
        if placed:
            self._unplace(row.key, placed)
        self._count(row, -1)

    def remove_tree(self, row: Row) -> list[Row]:
        """Delete a row and all its descendants; returns them, children before parents."""
        rows = self.tree(row)[::-1]
        for each in rows:
            self.remove(each)
        return rows

    def touch(self, key: bytes, stamp: int) -> None:
        """Move a row to `stamp` in the access order, never backwards. A key without a row is ignored."""
        placed = self._txn.get(key, db=self._db["access"])
        if placed is None or int.from_bytes(placed[:8], "big") >= stamp:
            return
        self._unplace(key, placed)
        self._place(key, stamp.to_bytes(8, "big") + placed[8:])

    def mark(self, key: bytes, stamp: int) -> None:
        """Note that a prompt diverged after a checkpoint. A key that is of none is ignored."""
        placed = self._txn.get(key, db=self._db["access"])
        if placed is not None and len(placed) > _PLACE_BYTES:
            self._txn.put(key, placed[:_PLACE_BYTES] + stamp.to_bytes(8, "big"), db=self._db["access"])

    def put_namespace(self, root: bytes, record: bytes) -> None:
        """Remember a namespace. It is forgotten with its last row."""
        self._txn.put(root, with_check(root, record), db=self._db["namespaces"])

    def set_meta(self, name: str, value: int) -> None:
        """Keep a number beside the rows."""
        self._txn.put(name.encode(), with_number_check(name, value), db=self._db["meta"])

    def reindex(self) -> None:
        """Make children, order, access and usage anew from the rows; stamps and marks are kept where there are any."""
        places = [
            (row.key, self.stamp(row.key) or row.created_s * 1_000_000, self.marked(row.key)) for row in self.rows()
        ]
        # Without its key an encrypted row cannot say where it stands among its siblings; it stays where it stood.
        sealed = {row.key for row in self.rows() if row.is_sealed}
        entries = {key: entry for entry, key in self._from("children", b"") if key in sealed} if sealed else {}
        for name in ("children", "order", "checkpoints", "access", "usage"):
            self._txn.drop(self._db[name], delete=False)
        for key, stamp, marked in places:
            row = self.row(key)
            if row is not None:
                self._link(row, stamp, marked, entries.get(key))
        for root in self.namespaces().keys() - self.usage().keys():
            self._txn.delete(root, db=self._db["namespaces"])

    def clear(self) -> None:
        """Delete everything but the format version."""
        for name in _DATABASES:
            if name != "meta":
                self._txn.drop(self._db[name], delete=False)

    def _link(self, row: Row, stamp: int, marked: int, entry: bytes | None = None) -> None:
        self._txn.put(entry or child_entry(row, self.ring.key(row.root)), row.key, db=self._db["children"])
        placed = stamp.to_bytes(8, "big") + min(row.depth, _DEPTH_MAX).to_bytes(4, "big")
        self._place(row.key, placed + (marked.to_bytes(8, "big") if row.is_checkpoint else b""))
        self._count(row, +1)

    def _stored(self, row: Row) -> bytes:
        key = self.ring.key(row.root)
        return row.value if key is None or row.is_sealed else seal_row(row, key)

    def _entry_of(self, row: Row) -> bytes:
        """Where the row stands among its parent's children; without its key that can only be looked for."""
        if row.is_sealed and not row.is_checkpoint:
            for entry, key in self.children(row.parent):
                if key == row.key:
                    return entry
        return child_entry(row, self.ring.key(row.root))

    def _place(self, key: bytes, placed: bytes) -> None:
        self._txn.put(key, placed, db=self._db["access"])
        for name in _orders(placed):
            self._txn.put(_order_entry(placed, key), b"", db=self._db[name])

    def _unplace(self, key: bytes, placed: bytes) -> None:
        for name in _orders(placed):
            self._txn.delete(_order_entry(placed, key), db=self._db[name])

    def _count(self, row: Row, sign: int) -> None:
        found = self._txn.get(row.root, db=self._db["usage"])
        self._set_usage(row.root, (Usage(*_USAGE.unpack(found)) if found else Usage()).plus(row, sign))

    def _set_usage(self, root: bytes, usage: Usage) -> None:
        if usage == Usage():
            self._txn.delete(root, db=self._db["usage"])
            self._txn.delete(root, db=self._db["namespaces"])
            return
        packed = _USAGE.pack(*astuple(usage))
        self._txn.put(root, packed, db=self._db["usage"])


def _order_entry(placed: bytes, key: bytes) -> bytes:
    """Stamp, then deepest first, then key."""
    return placed[:8] + (_DEPTH_MAX - int.from_bytes(placed[8:_PLACE_BYTES], "big")).to_bytes(4, "big") + key


def _orders(placed: bytes) -> tuple[str, ...]:
    """The databases in which a row stands in the order of use."""
    return ("order", "checkpoints") if len(placed) > _PLACE_BYTES else ("order",)


class Index:
    """The environment. Open it only while holding the data directory's lock: LMDB's own locks are not relied on."""

    def __init__(self, path: Path, fs: Fs, ring: KeyRing, sync: bool = True, map_bytes: int = MAP_BYTES) -> None:
        """Open or create. UnknownFormatError for a newer version, CorruptDataError when LMDB cannot read it.

        `sync=False` (durability none): commits are not flushed; a crash of the machine may leave anything.
        """
        self.path = path
        self.ring = ring
        self._fs = fs
        with translated():
            self._env = lmdb.open(
                str(path),
                map_size=map_bytes,
                max_dbs=len(_DATABASES),
                max_readers=READERS_MAX,
                mode=0o600,
                sync=sync,
                metasync=sync,
                # writemap kills the process by SIGBUS on a full disk; lib_version pins the file format, which an
                # environment variable would change otherwise.
                writemap=False,
                lib_version=0,
            )
            try:
                for name in ("data.mdb", "lock.mdb"):
                    os.chmod(path / name, 0o600)
                self.was_short = self._fill_up()
                self._databases = self._open_databases()
            except BaseException:
                self._env.close()
                raise

    def _fill_up(self) -> bool:
        """Whether the file ended before its last page; then it is extended, sparsely.

        LMDB reads through a map, where a page beyond the end of the file kills the process. A page of zeros is an
        error instead, or, where it was never written because it is free, nobody's business.
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
            version = number_of("version", txn.get(b"version", db=meta)) or 0
            if version and version != INDEX_VERSION:
                advice = "use the newer kvstore, or another" if version > INDEX_VERSION else "delete this"
                raise UnknownFormatError(
                    f"{self.path} has format version {version}; this kvstore reads {INDEX_VERSION}: "
                    f"{advice} data directory"
                )
            if not version:
                for name, number in (("version", INDEX_VERSION), (REBUILDING, 1)):
                    txn.put(name.encode(), with_number_check(name, number), db=meta)
        return {name: self._env.open_db(name.encode()) for name in _DATABASES}

    @contextlib.contextmanager
    def view(self) -> Iterator[View]:
        """A read transaction."""
        with translated(), self._env.begin(self._databases["rows"]) as txn:
            yield View(txn, self._databases, self.ring)

    @contextlib.contextmanager
    def edit(self, dry_run: bool = False) -> Iterator[Edit]:
        """A write transaction, committed at the end unless the body raises or `dry_run` is set."""
        with translated():
            txn = self._env.begin(self._databases["rows"], write=True)
            try:
                yield Edit(txn, self._databases, self.ring)
                if not dry_run:
                    self._fs.commit(txn.commit)
            finally:
                txn.abort()

    def disk_bytes(self) -> int:
        """What the index's files cost on disk. The data file never shrinks."""
        return sum(os.stat(entry.path).st_blocks * 512 for entry in os.scandir(self.path))

    def sync(self) -> None:
        """Flush everything, also in an environment that does not sync."""
        with translated():
            self._env.sync(True)

    def close(self) -> None:
        """Close; no transaction may be open."""
        self._env.close()
