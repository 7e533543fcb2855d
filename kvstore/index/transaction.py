"""Read and write transactions on the index: rows, children, namespaces, templates, and the checksums of all values."""

from __future__ import annotations

import contextlib
import functools
import itertools
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from kvstore.blobs.keyring import KeyRing
from kvstore.core.blocks import TOKEN_BYTES, count_tokens
from kvstore.core.bounded import Bounded
from kvstore.core.keys import aux_key, checkpoint_key
from kvstore.core.records import TEMPLATES_MAX, parse_template
from kvstore.errors import CorruptDataError, KVStoreError
from kvstore.index.marks import Marks
from kvstore.index.rows import (
    AUX_MARK,
    CHECKPOINT_MARK,
    ENCRYPTED,
    ENCRYPTED_AT,
    HEAD_BYTES,
    Row,
    Templates,
    checkpoint_prefix,
    child_entries,
    decrypt_row,
    encrypt_row,
    lost_row,
    parse_row,
    with_check,
    without_check,
)
from kvstore.index.table import AUX, CHECKPOINT, Table

# Replaced tails that are remembered.
REPLACED_MAX = 8192
DATABASES = ("rows", "children", "retain", "templates", "namespaces", "marks", "meta")
_SPACE = struct.Struct("<IQ")
# The flags of the table that follow from the kind of a row.
KIND_FLAGS = (0, CHECKPOINT, AUX)


class Space(NamedTuple):
    """A namespace in the index: its number in the table, when a caller last named it (wall clock), and its record."""

    number: int
    used_s: int
    record: bytes

    def pack(self) -> bytes:
        """The value as stored in the index."""
        return _SPACE.pack(self.number, self.used_s) + self.record

    @classmethod
    def parse(cls, value: bytes) -> Space:
        """Inverse of `pack`."""
        number, used_s = _SPACE.unpack_from(value)
        return cls(number, used_s, value[_SPACE.size :])


@functools.lru_cache(maxsize=TEMPLATES_MAX)
def _refers(record: bytes) -> bool:
    return any(stack.recipe.references for stack in parse_template(record).stacks)


class Contents:
    """What the last commit left, in memory: the table, namespaces by root, templates by id, and marks.

    Two parts are in memory only. `held`: keys of aux rows that stores under way need, each with the number of these
    stores. `replaced`: keys of tails that a longer block replaced lately, each with the key of that block; written
    under the engine's lock, read by any thread.
    """

    def __init__(self) -> None:
        self.held: Counter[bytes] = Counter()
        self.replaced: Bounded[bytes, bytes] = Bounded(REPLACED_MAX)
        self.forget()

    def forget(self) -> None:
        """The state of an empty index."""
        self.table = Table()
        self.spaces: dict[bytes, Space] = {}
        self.templates: dict[bytes, bytes] = {}
        self.marks = Marks()


class View:
    """A snapshot of the index, for the thread that opened it."""

    def __init__(self, txn: Any, databases: dict[str, Any], ring: KeyRing, templates: Templates) -> None:
        self._txn = txn
        self._db = databases
        self.ring = ring
        self.templates = templates
        # A row's bytes as they stand, by key. Rows are a transaction's default database: to name it costs a third.
        self.stored: Callable[[bytes], bytes | None] = txn.get

    def value(self, key: bytes) -> bytes | None:
        """A row's bytes, unparsed, decrypted where they are encrypted and can be."""
        found = self.stored(key)
        if found is None or found[ENCRYPTED_AT : ENCRYPTED_AT + 1] != ENCRYPTED:
            return found
        return decrypt_row(key, found, self.ring)

    def row(self, key: bytes) -> Row | None:
        """The row of a key."""
        found = self.value(key)
        return None if found is None else parse_row(key, found, self.templates)

    def rows(self, start: bytes = b"") -> Iterator[Row]:
        """All rows whose key is `start` or comes after it, in key order."""
        for key, value in self._from("rows", start):
            yield parse_row(key, decrypt_row(key, value, self.ring), self.templates)

    def rows_of(self, prefix: bytes) -> Iterator[Row]:
        """All rows whose key starts so, in key order."""
        return itertools.takewhile(lambda row: row.key.startswith(prefix), self.rows(prefix))

    def entries(self, prefix: bytes, start: bytes = b"", reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """(entry, key) of the children whose entry begins so, from where `prefix + start` would stand.

        Onwards, or backwards from just below it.
        """
        for entry, key in self._from("children", prefix + start, reverse):
            if not entry.startswith(prefix):
                return
            yield entry, key

    def children(self, parent: bytes) -> Iterator[bytes]:
        """Keys of all children of a parent, each once: blocks, then checkpoints."""
        for prefix in (parent + bytes(1 + HEAD_BYTES), parent + CHECKPOINT_MARK):
            for _, key in self.entries(prefix):
                yield key

    def aux(self, root: bytes) -> Iterator[Row]:
        """The aux rows of a namespace, lost ones too."""
        return (row for _, key in self.entries(root + AUX_MARK) if (row := self.row(key)) is not None)

    def references(self, row: Row) -> frozenset[bytes]:
        """Keys of the aux rows that a row refers to. CorruptDataError when it does not parse.

        Rows are parsed only in an index with recipes that refer to anything.
        """
        if row.kind or row.is_key_missing or not any(map(_refers, row.templates.values())):
            return frozenset()
        return frozenset(aux_key(row.root, digest) for digest in row.block.references)

    def is_unreadable(self, root: bytes) -> bool | None:
        """Whether the rows of a namespace are encrypted and its key is not there: all of them or none. None without."""
        first = next(self.children(root), None) or next((key for _, key in self.entries(root + AUX_MARK)), None)
        row = self.row(first) if first else None
        return None if row is None else bool(row.is_key_missing)

    def checkpoints(self, parent: bytes, tokens: bytes) -> Iterator[Row]:
        """Checkpoints after `parent` and as many of the packed `tokens` as each has, longest first.

        By key, so however many siblings there are, it is one lookup for each length that any of them has.
        """
        prefix, at_most = parent + CHECKPOINT_MARK, count_tokens(tokens)
        while at_most >= 0:
            start = checkpoint_prefix(parent, at_most + 1)[len(prefix) :]
            below = next(self.entries(prefix, start, reverse=True), None)
            if below is None:
                return
            n_tokens = int.from_bytes(below[0][len(prefix) : len(prefix) + 2], "big")
            tail, at_most = tokens[: n_tokens * TOKEN_BYTES], n_tokens - 1
            row = self.row(checkpoint_key(parent, tail))
            if row is not None and row.is_checkpoint and not row.is_key_missing and row.tokens == tail:
                yield row

    def tree(self, row: Row) -> list[Row]:
        """A row and all its descendants, parents first."""
        seen = [row]
        for parent in seen:
            rows = (self.row(key) for key in self.children(parent.key))
            seen.extend(one for one in rows if one is not None and one.parent == parent.key)
        return seen

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """The table, for `Table.load`. CorruptDataError when a chunk was changed."""
        for number, stored in self._from("retain", b""):
            yield int.from_bytes(number, "big"), without_check(number, stored)

    def marks(self) -> Iterator[tuple[int, bytes]]:
        """Marks, for `Marks.load`, without chunks that were changed: nothing depends on them."""
        for number, stored in self._from("marks", b""):
            with contextlib.suppress(CorruptDataError):
                yield int.from_bytes(number, "big"), without_check(number, stored)

    def namespaces(self) -> dict[bytes, Space]:
        """Every namespace by its root. CorruptDataError when one was changed."""
        return {root: Space.parse(without_check(root, stored)) for root, stored in self._from("namespaces", b"")}

    def read_templates(self) -> dict[bytes, bytes]:
        """Every template by its id. CorruptDataError when one was changed."""
        return {name: without_check(name, stored) for name, stored in self._from("templates", b"")}

    def meta(self, name: str) -> int | None:
        """A number kept beside the rows. CorruptDataError when it was changed."""
        stored = self._txn.get(name.encode(), db=self._db["meta"])
        return None if stored is None else int.from_bytes(without_check(name.encode(), stored), "little")

    def count(self) -> int:
        """How many rows there are."""
        entries: int = self._txn.stat(self._db["rows"])["entries"]
        return entries

    def trees(self) -> dict[str, Any]:
        """LMDB's statistics for each database: pages and entries."""
        return {name: self._txn.stat(db) for name, db in self._db.items()}

    def _from(self, name: str, start: bytes, reverse: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """Items from `start` on, or backwards from just below it. Do not change the database while iterating."""
        cursor = self._txn.cursor(db=self._db[name])
        found = cursor.set_range(start) if start else cursor.first()
        if not reverse:
            return iter(cursor.iternext()) if found else iter(())
        positioned = cursor.prev() if found else cursor.last()
        return iter(cursor.iterprev()) if positioned else iter(())


class Edit(View):
    """A write transaction: readers see none of its changes until the commit, and then all at once.

    It counts how many blocks refer to each aux row. The last block takes the aux row with it: `released` lists those
    that went, whose blobs the caller deletes with the others. Those in `spared` stay, although nothing refers to them.
    """

    def __init__(self, txn: Any, databases: dict[str, Any], ring: KeyRing, contents: Contents) -> None:
        super().__init__(txn, databases, ring, contents.templates)
        self._contents = contents
        self.table = contents.table
        self.released: list[Row] = []
        self.spared: Collection[bytes] = contents.held

    def put(self, row: Row, nbytes: int) -> None:
        """Add a row, whose key must be free, its parent's row there and its namespace known; `nbytes` on disk."""
        key = self.ring.key(row.root)
        value = row.value if key is None or row.is_key_missing else encrypt_row(row, key)
        if not self._txn.put(row.key, value, db=self._db["rows"], overwrite=False):
            raise KVStoreError("index: this key has a row already")
        self._put_templates(row)
        for entry in child_entries(row, key):
            self._txn.put(entry, row.key, db=self._db["children"])
        self._add(row, nbytes)
        self._refer(row)

    def lacks_aux(self, row: Row) -> bool:
        """Whether a row refers to an aux block that is not there, or lost. Without it the row's block is a miss."""
        return any((aux := self.row(key)) is None or aux.is_lost for key in self.references(row))

    def _refer(self, row: Row) -> None:
        """Count a row's references. What it refers to and is not there gets a row that says so."""
        for key in self.references(row):
            if key not in self.table:
                digests = row.block.references
                self.put(lost_row(row.root, next(one for one in digests if aux_key(row.root, one) == key)), 0)
            self.table.refer(key, +1)

    def mend_references(self, row: Row, change: int) -> None:
        """Correct the count of an aux row. One that is missing is put: `row` is lost then."""
        if row.key not in self.table:
            self.put(row, 0)
        if not self.table.refer(row.key, change) and change < 0:
            self.remove(row)
            self.released.append(row)

    def _release(self, row: Row, references: Iterable[bytes]) -> None:
        """A row is gone: so are the aux rows that it was the last to refer to.

        What an encrypted row without its key refers to is not known. With the last such row all that it can have
        referred to goes.
        """
        last = [key for key in references if key in self.table and not self.table.refer(key, -1)]
        space = self._contents.spaces.get(row.root)
        if row.is_key_missing and not row.is_aux and space is not None and not self.table.usage(space.number).blocks:
            last = [aux.key for aux in self.aux(row.root)]
            for key in last:
                self.table.refer(key, -self.table.value(key, "children"))
        for key in last:
            aux = self.row(key)
            if aux is not None and key not in self.spared:
                self.remove(aux)
                self.released.append(aux)

    def _add(self, row: Row, nbytes: int) -> None:
        self.table.add(
            row.key,
            row.parent if row.parent in self.table else None,
            self._contents.spaces[row.root].number,
            depth=row.depth,
            nbytes=nbytes,
            n_tokens=row.n_tokens,
            flags=KIND_FLAGS[row.kind],
        )

    def replace(self, old: Row, new: Row, nbytes: int) -> None:
        """Put a row in the place of one with the same key; children stay. `nbytes` on disk."""
        key = self.ring.key(new.root)
        self._txn.put(new.key, new.value if key is None else encrypt_row(new, key), db=self._db["rows"])
        self._put_templates(new)
        for entry in self._entries_of(old):
            self._txn.delete(entry, db=self._db["children"])
        for entry in child_entries(new, key):
            self._txn.put(entry, new.key, db=self._db["children"])
        self.table.resize(new.key, nbytes)
        self._refer(new)
        self._release(old, self._referred(old))

    def _referred(self, row: Row) -> frozenset[bytes]:
        """As `references`, of a row that goes; none of one that does not parse, which leaves a count for `check`."""
        try:
            return self.references(row)
        except CorruptDataError:
            return frozenset()

    def _put_templates(self, row: Row) -> None:
        for name in row.templates.keys() - self._contents.templates.keys():
            self._txn.put(name, with_check(name, row.templates[name]), db=self._db["templates"])
            self._contents.templates[name] = row.templates[name]

    def remove(self, row: Row, by: Row | None = None) -> None:
        """Delete a row, which has no children, and everything that points to it. `by`: the row that takes its place."""
        if by is not None:
            self._contents.replaced[row.key] = by.key
        self._txn.delete(row.key, db=self._db["rows"])
        for entry in self._entries_of(row):
            self._txn.delete(entry, db=self._db["children"])
        self.table.remove(row.key)
        self._release(row, self._referred(row))

    def put_namespace(self, root: bytes, record: bytes, used_s: int) -> None:
        """Remember a namespace, before its first row. It is forgotten with its last.

        `used_s`: when a caller last named it, for one that is new. Without it, it would count as unused for years.
        """
        known = self._contents.spaces.get(root)
        if known is None:
            used = {space.number for space in self._contents.spaces.values()}
            number = next(number for number in range(len(used) + 1) if number not in used)
            self._put_space(root, Space(number, used_s, record))

    def use_namespace(self, root: bytes, used_s: int) -> None:
        """Note when a caller last named a namespace. One that is not known is ignored."""
        known = self._contents.spaces.get(root)
        if known is not None:
            self._put_space(root, known._replace(used_s=max(known.used_s, used_s)))

    def _put_space(self, root: bytes, space: Space) -> None:
        self._contents.spaces[root] = space
        self._txn.put(root, with_check(root, space.pack()), db=self._db["namespaces"])

    def set_meta(self, name: str, value: int) -> None:
        """Store a number in the `meta` database."""
        key = name.encode()
        self._txn.put(key, with_check(key, value.to_bytes(8, "little")), db=self._db["meta"])

    def mend(self, row: Row, nbytes: int) -> None:
        """Make children and table agree with a row that is there; what the table knows of its use stays.

        One whose parent is not in the table counts as the first of a chain. One of an unknown namespace stays as it is.
        """
        if row.root not in self._contents.spaces:
            return
        if not row.is_key_missing or row.kind:
            for entry in child_entries(row, self.ring.key(row.root)):
                self._txn.put(entry, row.key, db=self._db["children"])
        if row.key not in self.table:
            self._add(row, nbytes)
            for child in self.children(row.key):
                self.table.link(child, row.key)
        number, flags = self._contents.spaces[row.root].number, KIND_FLAGS[row.kind]
        self.table.correct(row.key, number, depth=row.depth, nbytes=nbytes, n_tokens=row.n_tokens, flags=flags)

    def clear(self) -> None:
        """Delete everything but the numbers of `meta`."""
        for name in DATABASES:
            if name != "meta":
                self._txn.drop(self._db[name], delete=False)
        self._contents.forget()
        self.table = self._contents.table

    def save(self) -> None:
        """Write what changed of the table, and forget the namespaces that hold nothing any more."""
        held = set(self.table.namespaces)
        for root in [root for root, space in self._contents.spaces.items() if space.number not in held]:
            self._txn.delete(root, db=self._db["namespaces"])
            del self._contents.spaces[root]
        for number, data in self.table.changed().items():
            name = number.to_bytes(4, "big")
            if data.strip(b"\0"):
                self._txn.put(name, with_check(name, data), db=self._db["retain"])
            else:
                self._txn.delete(name, db=self._db["retain"])
        for number, data in self._contents.marks.changed().items():
            name = number.to_bytes(4, "big")
            self._txn.put(name, with_check(name, data), db=self._db["marks"])

    def _entries_of(self, row: Row) -> list[bytes]:
        """The row's entries in the `children` database. Without the namespace key they can be found only by a scan."""
        if row.is_key_missing and not row.kind:
            return [entry for entry, key in self.entries(row.parent) if key == row.key]
        return child_entries(row, self.ring.key(row.root))
