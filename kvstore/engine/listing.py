"""Lists what is stored: blocks, sequences, and the counts of a moment. Sequences are computed from the table, in numpy.

A sequence is a block without children and all its ancestors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, replace

import numpy as np
import numpy.typing as npt

from kvstore.core.histogram import Distribution
from kvstore.core.keys import NamespaceInfo
from kvstore.engine.keep import Terms
from kvstore.engine.retain import levels, where
from kvstore.engine.shared import Shared
from kvstore.index.rows import Row
from kvstore.index.table import AUX, CHECKPOINT, LIVE, Rows, Table

SHOW_MAX = 100


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """A row, what its blob costs on disk, when it was last used, and where it lies.

    `error`: the relative error of its re-encoding; 0 where it was not re-encoded.
    `references`: of an aux block, how many blocks refer to it.
    """

    row: Row
    nbytes: int
    accessed_s: int
    path: str
    error: float = 0.0
    references: int = 0


@dataclass(frozen=True, slots=True)
class NamespaceUsage:
    """What one namespace holds. `blocks` and `tokens` do not count checkpoints and aux blocks; `disk_bytes` does.

    `used_s`: when a caller last named it, by wall clock; `orphaned`: that was more than ORPHAN_S ago.
    """

    info: NamespaceInfo
    blocks: int
    tokens: int
    disk_bytes: int
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    aux_blocks: int = 0
    aux_bytes: int = 0
    encrypted: bool = False
    used_s: int = 0
    orphaned: bool = False
    terms: Terms = Terms()

    @property
    def logical_bytes(self) -> int:
        """Raw size of the tokens held."""
        return self.tokens * self.info.layout.token_bytes


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts of now and since the engine was opened. Sizes are bytes on disk.

    `used_bytes` = `stored_bytes` (blobs) + `pending_bytes` (being written) + index + quarantine + keys.
    `blobs` are blocks and checkpoints; `stored_bytes` includes `checkpoint_bytes`.
    `evictions` are (blocks, bytes on disk) deleted since the start, by cause (`kvstore.engine.evictions`).
    `idle_s` is how long blocks had not been used when limits evicted them, `reuse_s` when a fetch used them.
    `degraded` says why nothing is written at present; empty when all is well. `scrubbed_s` is when the last full pass
    of the scrub ended, seconds since 1970, 0 if never; `damaged` counts blobs that it moved to quarantine since then.
    """

    used_bytes: int
    budget_bytes: int
    free_bytes: int
    free_floor_bytes: int
    blobs: int
    stored_bytes: int
    pending_bytes: int
    index_bytes: int
    quarantine_bytes: int
    quarantined: int
    written_bytes: int
    evictions: dict[str, tuple[int, int]]
    degraded: str
    namespaces: tuple[NamespaceUsage, ...]
    idle_s: Distribution
    reuse_s: Distribution
    checkpoints: int = 0
    checkpoint_bytes: int = 0
    scrubbed_s: int = 0
    damaged: int = 0


@dataclass(frozen=True, slots=True)
class StoredSequence:
    """One sequence, named by its last block.

    `nbytes` counts what it shares with others, `own_bytes` only blocks that no other sequence has, whose keys are
    `own`. Checkpoints count with the block that they stand after.
    """

    key: bytes
    root: bytes
    tokens: int
    nbytes: int
    own_bytes: int
    used_s: int
    created_s: int = 0
    own: tuple[bytes, ...] = ()


def _ordered(table: Table, roots: dict[int, bytes], limit: int) -> Iterator[StoredSequence]:
    rows = table.rows
    below, tokens, nbytes, own = _sums(rows)
    leaves = np.flatnonzero((below == 1) & _ends(rows) & np.isin(rows["namespace"], list(roots)))
    for slot in leaves[np.argsort(-rows["last_use"][leaves], kind="stable")][:limit].tolist():
        chain = [slot]
        while (above := int(rows["parent"][chain[-1]])) >= 0 and below[above] == 1:
            chain.append(above)
        yield StoredSequence(
            key=rows["key"][slot].tobytes(),
            root=roots[int(rows["namespace"][slot])],
            tokens=int(tokens[slot]),
            nbytes=int(nbytes[slot]),
            own_bytes=int(own[slot]),
            used_s=int(rows["used_s"][slot]),
            own=tuple(table.keys(chain)),
        )


def _blocks(rows: Rows) -> npt.NDArray[np.bool_]:
    """Live blocks, without checkpoints and aux blocks."""
    found: npt.NDArray[np.bool_] = (rows["flags"] & (LIVE | CHECKPOINT | AUX)) == LIVE
    return found


def _ends(rows: Rows) -> npt.NDArray[np.bool_]:
    """Blocks that no other block follows."""
    blocks = _blocks(rows)
    parents = rows["parent"][blocks]
    ends: npt.NDArray[np.bool_] = blocks & (np.bincount(parents[parents >= 0], minlength=len(rows)) == 0)
    return ends


def _sums(rows: Rows) -> tuple[npt.NDArray[np.int64], ...]:
    """For each row: the sequences that have it; tokens, bytes and bytes of its own of the chain that ends with it."""
    below, tokens = _ends(rows).astype(np.int64), rows["n_tokens"].astype(np.int64)
    nbytes = np.where(_blocks(rows), rows["nbytes"], 0)
    checkpoints = np.flatnonzero(((rows["flags"] & (LIVE | CHECKPOINT)) == (LIVE | CHECKPOINT)) & (rows["parent"] >= 0))
    np.add.at(nbytes, rows["parent"][checkpoints], rows["nbytes"][checkpoints])
    steps = list(levels(rows, _blocks(rows)))
    for level in reversed(steps):
        np.add.at(below, rows["parent"][level], below[level])
    own = np.where(below == 1, nbytes, 0)
    for level in steps:
        parents = rows["parent"][level]
        tokens[level] += tokens[parents]
        nbytes[level] += nbytes[parents]
        own[level] += np.where(below[level] == 1, own[parents], 0)
    return below, tokens, nbytes, own


def recent_keys(shared: Shared, namespace_prefix: bytes) -> list[bytes]:
    """Keys of all blobs of the namespaces that start so, most recently used first."""
    spaces = list(shared.index.spaces.items())
    numbers = [space.number for root, space in spaces if root.startswith(namespace_prefix)]
    table = shared.index.table.snapshot()
    slots = np.flatnonzero(where(table, namespaces=numbers))
    order = np.argsort(-table.rows["last_use"][slots], kind="stable")
    return table.keys(slots[order].tolist())


class Listing:
    """Lists and counts of one engine. Any thread may call."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def list_blocks(self, namespace_prefix: bytes = b"", limit: int = 1000) -> list[BlockInfo]:
        """Up to `limit` blocks and checkpoints of the namespaces that start so, most recently used first."""
        keys = recent_keys(self._shared, namespace_prefix)[:limit]
        with self._shared.index.view() as view:
            return self._infos(row for key in keys if (row := view.row(key)) is not None)

    def show(self, key_prefix: bytes) -> list[BlockInfo]:
        """Blocks and checkpoints whose key starts so, at most SHOW_MAX."""
        with self._shared.index.view() as view:
            rows = [row for row, _ in zip(view.rows_of(key_prefix), range(SHOW_MAX), strict=False)]
        return self._infos(rows)

    def sequences(self, namespace_prefix: bytes = b"", limit: int = 1000) -> list[StoredSequence]:
        """Up to `limit` sequences of the namespaces that start so, the latest used first."""
        shared = self._shared
        spaces = list(shared.index.spaces.items())
        roots = {space.number: root for root, space in spaces if root.startswith(namespace_prefix)}
        table = shared.settled_table()
        found = list(_ordered(table, roots, limit))
        with shared.index.view() as view:
            rows = {one.key: view.row(one.key) for one in found}
        return [replace(one, created_s=row.block.created_s) for one in found if (row := rows[one.key]) is not None]

    def stats(self, free_bytes: int) -> EngineStats:
        """Counts of this moment."""
        shared = self._shared
        with shared.lock:
            table = shared.index.table
            usage = {root: table.usage(space.number) for root, space in shared.index.spaces.items()}
            total = table.usage()
        quarantined, ledger = 0, shared.ledger
        with contextlib.suppress(OSError):  # which `degraded` is about
            quarantined, _ = shared.blobs.quarantined()
        spaces = tuple(
            replace(
                NamespaceUsage(shared.namespaces[root], *astuple(use)),
                encrypted=shared.index.ring.key(root) is not None,
                used_s=shared.used_s(root),
                orphaned=shared.is_orphan(root),
                terms=shared.keep.terms.get(root, Terms()),
            )
            for root, use in usage.items()
            if root in shared.namespaces and root in shared.index.spaces
        )
        return EngineStats(
            used_bytes=ledger.total,
            budget_bytes=shared.options.budget_bytes,
            free_bytes=free_bytes,
            free_floor_bytes=shared.options.free_floor_bytes,
            blobs=total.blocks + total.checkpoints,
            stored_bytes=ledger.get("blobs"),
            pending_bytes=ledger.get("pending"),
            index_bytes=ledger.get("index"),
            quarantine_bytes=ledger.get("quarantine"),
            quarantined=quarantined,
            written_bytes=shared.health.written_bytes,
            evictions=shared.evictions.totals(),
            degraded=shared.health.degraded,
            namespaces=spaces,
            idle_s=shared.evictions.idle_s.snapshot(),
            reuse_s=shared.uses.reuse_s.snapshot(),
            checkpoints=total.checkpoints,
            checkpoint_bytes=total.checkpoint_bytes,
        )

    def _infos(self, rows: Iterable[Row]) -> list[BlockInfo]:
        table, blobs = self._shared.index.table, self._shared.blobs
        return [
            BlockInfo(
                row,
                table.value(row.key, "nbytes"),
                table.value(row.key, "used_s"),
                blobs.path(row.blob) or row.blob.name,
                table.error(row.key),
                table.value(row.key, "children") if row.is_aux else 0,
            )
            for row in rows
        ]
