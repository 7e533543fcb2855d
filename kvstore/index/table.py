"""The table of blobs: one row for each blob, in memory, with all that eviction, listings and counters need.

    key, parent      the blob's key; the row number of its parent, -1 for the first block of a chain
    namespace        number of the namespace
    last_use         a sequence number, higher is later: the order never depends on a clock
    used_s           wall clock of the last use, in seconds since 1970: age, for `--idle`
    hits, depth, children, nbytes (on disk), n_tokens, mark (when a prompt last diverged here, in the sequence), flags
    error            relative error of its re-encoding; 0 for what was not re-encoded

The children of an aux block are the blocks that refer to it: so it stays as long as one of them.

The index loads it when it opens, and saves changed rows with its commits, CHUNK rows at a time (`changed`).
`kvstore.engine.retain` chooses from it what is evicted.

Threads: `Table` is not thread-safe. Hold the engine's lock to use it, for some rows at a time; `snapshot` needs none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from kvstore.core.blocks import Origin
from kvstore.errors import CorruptDataError

CHUNK = 64
LIVE, CHECKPOINT, PINNED, INTERIM = 1, 2, 4, 8
# The profile `auto` chose how it is encoded; it is not to be re-encoded (again). See `kvstore.engine.reencode`.
AUTO, SETTLED = 16, 32
# No block of KV, but what recipes refer to.
AUX = 64

COLUMNS = np.dtype(
    [
        ("key", "V32"),
        ("last_use", "<i8"),
        ("mark", "<i8"),
        ("nbytes", "<i8"),
        ("parent", "<i4"),
        ("namespace", "<u4"),
        ("used_s", "<u4"),
        ("hits", "<u4"),
        ("depth", "<u4"),
        ("children", "<u4"),
        ("n_tokens", "<u2"),
        ("flags", "<u2"),
        ("error", "<f4"),
    ]
)
Rows: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Usage:
    """Usage of one namespace or of all. Blocks and tokens exclude checkpoints and aux blocks; bytes on disk do not."""

    blocks: int = 0
    tokens: int = 0
    disk_bytes: int = 0
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    aux_blocks: int = 0
    aux_bytes: int = 0


class Table:
    """See the module."""

    def __init__(self) -> None:
        self._rows: Rows = np.zeros(CHUNK, COLUMNS)
        self._end = 0
        self._free: list[int] = []
        self._slots: dict[bytes, int] = {}
        self._usage: dict[int, list[int]] = {}
        self._changed: set[int] = set()
        self.sequence = 0

    # -- loading and saving ---------------------------------------------------------------------------------------

    @classmethod
    def load(cls, chunks: Iterable[tuple[int, bytes]]) -> Table:
        """A table of what `changed` gave. CorruptDataError when parents, children or keys do not fit together."""
        table = cls()
        parts = dict(chunks)
        if any(len(data) != CHUNK * COLUMNS.itemsize for data in parts.values()):
            raise CorruptDataError("the table of blobs has a chunk of another size")
        if parts:
            count = max(parts) + 1
            empty = bytes(CHUNK * COLUMNS.itemsize)
            joined = b"".join(parts.get(number, empty) for number in range(count))
            table._rows = np.frombuffer(bytearray(joined), COLUMNS)
            table._end = count * CHUNK
        table._index()
        return table

    def _index(self) -> None:
        rows = self._rows[: self._end]
        live = np.flatnonzero(rows["flags"] & LIVE)
        self._free = np.flatnonzero(~(rows["flags"] & LIVE).astype(bool))[::-1].tolist()
        keys = rows["key"][live].tobytes()
        self._slots = {keys[32 * at : 32 * at + 32]: slot for at, slot in enumerate(live.tolist())}
        parents = rows["parent"][live]
        linked = parents[parents >= 0]
        if len(self._slots) != len(live) or (len(linked) and not _all_live(rows, linked)):
            raise CorruptDataError("the table of blobs does not fit together")
        # Who refers to an aux block is in the rows; `check` counts them.
        counted = np.where(rows["flags"] & AUX, rows["children"], np.bincount(linked, minlength=self._end))
        if not np.array_equal(counted, rows["children"]):
            raise CorruptDataError("the table of blobs has wrong numbers of children")
        self.sequence = int(max(rows["last_use"].max(initial=0), rows["mark"].max(initial=0)))
        for namespace in np.unique(rows["namespace"][live]).tolist():
            self._usage[namespace] = _sums(rows[live][rows["namespace"][live] == namespace])

    def changed(self) -> dict[int, bytes]:
        """The chunks that changed since the last call, by number: to be saved in the commit that is under way."""
        changed, self._changed = self._changed, set()
        self._grow(-(-self._end // CHUNK) * CHUNK)
        return {number: self._rows[number * CHUNK : (number + 1) * CHUNK].tobytes() for number in sorted(changed)}

    # -- rows -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    def value(self, key: bytes, column: str) -> int:
        """One number of one blob; 0 when it is not there."""
        slot = self._slots.get(key, -1)
        return int(self._rows[column][slot]) if 0 <= slot < self._end else 0

    def error(self, key: bytes) -> float:
        """The relative error of a blob's re-encoding; 0 when it was not re-encoded."""
        slot = self._slots.get(key, -1)
        return float(self._rows["error"][slot]) if slot >= 0 else 0.0

    def slots(self, keys: Iterable[bytes]) -> list[int]:
        """Row numbers of keys; those that are not there are left out."""
        return [slot for key in keys if 0 <= (slot := self._slots.get(key, -1)) < self._end]

    def keys(self, slots: Sequence[int]) -> list[bytes]:
        """Keys of rows."""
        return [self._rows["key"][slot].tobytes() for slot in slots]

    def add(
        self,
        key: bytes,
        parent: bytes | None,
        namespace: int,
        *,
        depth: int,
        nbytes: int,
        n_tokens: int,
        flags: int = 0,
    ) -> None:
        """Add a blob, last used now by order and at no known time. `parent` None: the first block of a chain."""
        above = self._slots[parent] if parent is not None else -1
        assert key not in self._slots
        if self._free:
            slot = self._free.pop()
        else:
            slot, self._end = self._end, self._end + 1
            self._grow(self._end)
        self._rows[slot] = (
            np.void(key), self.next(), 0, nbytes, above, namespace, 0, 0, depth, 0, n_tokens, LIVE | flags, 0
        )  # fmt: skip
        self._slots[key] = slot
        if above >= 0:
            self._rows["children"][above] += 1
            self._changed.add(above // CHUNK)
        self._count(slot, +1)

    def remove(self, key: bytes) -> None:
        """Take a blob out; it has no children, which is asserted."""
        slot = self._slots[key]
        assert not self._rows["children"][slot]
        self._count(slot, -1)
        above = int(self._rows["parent"][slot])
        if above >= 0:
            self._rows["children"][above] -= 1
            self._changed.add(above // CHUNK)
        self._rows[slot] = np.zeros((), COLUMNS)
        del self._slots[key]
        self._free.append(slot)

    def refer(self, key: bytes, change: int) -> int:
        """Count `change` more blocks that refer to an aux block; how many there are now, never fewer than none."""
        slot = self._slots[key]
        count = max(0, int(self._rows["children"][slot]) + change)
        self._rows["children"][slot] = count
        self._changed.add(slot // CHUNK)
        return count

    def resize(self, key: bytes, nbytes: int) -> None:
        """Another blob lies in the place of this one; how it was encoded is not known yet."""
        slot = self._slots[key]
        self._count(slot, -1)
        self._rows["nbytes"][slot], self._rows["error"][slot] = nbytes, 0
        self._rows["flags"][slot] &= ~np.uint16(AUTO | SETTLED)
        self._count(slot, +1)

    def next(self) -> int:
        """The next number of the sequence."""
        self.sequence += 1
        return self.sequence

    def touch(self, keys: Iterable[bytes], used_s: int) -> None:
        """Note that blobs were used together, at this wall clock; one that was set back makes no use older.

        Keys that are not there do not count.
        """
        slots = self.slots(keys)
        if not slots:
            return
        self._rows["last_use"][slots] = self.next()
        # A burst within a second is one use, as that of sub-agents that begin with one prompt.
        before_s, hits = self._rows["used_s"][slots], self._rows["hits"][slots]
        self._rows["hits"][slots] = hits + ((before_s != used_s) | (hits == 0))
        self._rows["used_s"][slots] = np.maximum(before_s, used_s)
        self._changed.update(slot // CHUNK for slot in slots)

    def stamp(
        self, key: bytes, used_s: int, *, mark: int = 0, last_use: int = 0, flags: int = 0, error: float = 0.0
    ) -> None:
        """Set what a blob brings along: when it was used, mark, place in the order, flags, error of its re-encoding.

        0 leaves what is there.
        """
        slot = self._slots[key]
        self._rows["used_s"][slot] = used_s
        self._rows["flags"][slot] |= flags
        if error:
            self._rows["error"][slot] = error
        if mark:
            self._rows["mark"][slot] = mark
        if last_use:
            self._rows["last_use"][slot] = last_use
            self.sequence = max(self.sequence, last_use)
        self._changed.add(slot // CHUNK)

    def correct(self, key: bytes, namespace: int, *, depth: int, nbytes: int, n_tokens: int, flags: int) -> None:
        """Set what the row of a blob says; what is known of its use stays."""
        slot = self._slots[key]
        self._count(slot, -1)
        row = self._rows[slot]
        row["namespace"], row["depth"], row["nbytes"], row["n_tokens"] = namespace, depth, nbytes, n_tokens
        row["flags"] = LIVE | flags | (row["flags"] & (PINNED | INTERIM | AUTO | SETTLED))
        self._count(slot, +1)

    def link(self, key: bytes, parent: bytes) -> None:
        """Set the parent of a blob that has none here, if it is one."""
        slot, above = self._slots.get(key, -1), self._slots[parent]
        if slot >= 0 and self._rows["parent"][slot] < 0:
            self._rows["parent"][slot] = above
            self._rows["children"][above] += 1
            self._changed.update((slot // CHUNK, above // CHUNK))

    def drop(self, key: bytes) -> None:
        """Take out a blob whose row is lost; what came after it is the first of a chain now."""
        slot, rows = self._slots[key], self._rows[: self._end]
        below = np.flatnonzero(((rows["flags"] & LIVE) != 0) & (rows["parent"] == slot))
        rows["parent"][below] = -1
        rows["children"][slot] = 0
        self._changed.update((below // CHUNK).tolist())
        self.remove(key)

    def mark(self, key: bytes) -> None:
        """Note that a prompt diverged after a checkpoint. Keys of anything else do not count."""
        slot = self._slots.get(key, -1)
        if slot >= 0 and self._rows["flags"][slot] & CHECKPOINT:
            self._rows["mark"][slot] = self.next()
            self._changed.add(slot // CHUNK)

    def end(self, key: bytes) -> None:
        """A prompt ends at this checkpoint: it is no interim one any more."""
        for slot in self.slots([key]):
            self._rows["flags"][slot] &= ~np.uint16(INTERIM)
            self._changed.add(slot // CHUNK)

    def pin(self, keys: Iterable[bytes]) -> None:
        """These blobs are pinned, and no others."""
        flags = self._rows["flags"][: self._end]
        before, now = np.flatnonzero(flags & PINNED), self.slots(keys)
        flags[before] &= ~np.uint16(PINNED)
        flags[now] |= PINNED
        self._changed.update(slot // CHUNK for slot in [*before.tolist(), *now])

    def claim(self, keys: Iterable[bytes]) -> None:
        """Blobs that `auto` stored, and that somebody relies on who named a profile: they stay as they are."""
        slots = self.slots(keys)
        self._rows["flags"][slots] &= ~np.uint16(AUTO | SETTLED)
        self._changed.update(slot // CHUNK for slot in slots)

    def settle(self, key: bytes, error: float = 0.0) -> None:
        """A blob is not re-encoded from now on: it was, with this relative error, or it cannot be."""
        slot = self._slots[key]
        self._rows["flags"][slot] |= AUTO | SETTLED
        self._rows["error"][slot] = error
        self._changed.add(slot // CHUNK)

    def settle_clock(self, now_s: int) -> None:
        """Times in the future come from a clock that was ahead: they become now, and age from here on."""
        ahead = np.flatnonzero(self._rows["used_s"][: self._end] > now_s)
        if len(ahead):
            self._rows["used_s"][ahead] = now_s
            self._changed.update((ahead // CHUNK).tolist())

    # -- sums -----------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> Rows:
        """Every row, those that are not live among them; for reading."""
        return self._rows[: self._end]

    def snapshot(self) -> Table:
        """A copy to select rows from, made without the lock: copying 100,000 rows would hold the lock for too long.

        Of a row that changes during the copy, it has the old or the new values. Before acting on a selected row, take
        the lock and check the row again. Keys are not copied: look them up in the table itself.
        """
        copy = Table()
        rows = self._rows[: self._end].copy()
        rows["parent"][rows["parent"] >= len(rows)] = -1
        copy._rows, copy._end, copy._slots = rows, len(rows), self._slots
        return copy

    def usage(self, namespace: int | None = None) -> Usage:
        """Usage of one namespace; None: of all."""
        if namespace is not None:
            return Usage(*self._usage.get(namespace, ()))
        return Usage(*(sum(column) for column in zip(*self._usage.values(), strict=True)))

    @property
    def blobs(self) -> int:
        """How many rows name a blob: all but aux rows that are lost."""
        return int(((self.rows["flags"] & LIVE != 0) & (self.rows["nbytes"] > 0)).sum())

    @property
    def namespaces(self) -> list[int]:
        """Numbers of the namespaces that hold something."""
        return list(self._usage)

    def _count(self, slot: int, sign: int) -> None:
        namespace = int(self._rows["namespace"][slot])
        sums = self._usage.setdefault(namespace, [0] * 7)
        for at, number in enumerate(_sums(self._rows[slot : slot + 1])):
            sums[at] += sign * number
        if not any(sums):
            del self._usage[namespace]
        self._changed.add(slot // CHUNK)

    def _grow(self, end: int) -> None:
        if end > len(self._rows):
            more = max(CHUNK, len(self._rows), -(-(end - len(self._rows)) // CHUNK) * CHUNK)
            self._rows = np.concatenate([self._rows, np.zeros(more, COLUMNS)])

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._slots)


def origin_flags(origin: Origin | None) -> int:
    """The flags of what the header of a blob says of re-encoding."""
    return 0 if origin is None else (AUTO if origin.auto else 0) | (SETTLED if origin.settled else 0)


def _all_live(rows: Rows, slots: npt.NDArray[np.int32]) -> bool:
    return bool(slots.max() < len(rows) and (rows["flags"][slots] & LIVE).all())


def _sums(rows: Rows) -> list[int]:
    """Blocks, tokens, bytes, checkpoints, their bytes, aux blocks, their bytes."""
    checkpoints, aux = (rows["flags"] & CHECKPOINT) != 0, (rows["flags"] & AUX) != 0
    blocks = ~(checkpoints | aux)
    return [
        int(blocks.sum()),
        int(rows["n_tokens"][blocks].sum()),
        int(rows["nbytes"].sum()),
        int(checkpoints.sum()),
        int(rows["nbytes"][checkpoints].sum()),
        int(aux.sum()),
        int(rows["nbytes"][aux].sum()),
    ]
