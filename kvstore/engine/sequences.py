"""Lists stored sequences: each is a block without children and all its ancestors. Computed from the table, in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from kvstore.engine.retain import CHECKPOINT, LIVE, Rows, Table
from kvstore.engine.shared import Shared

Slots = npt.NDArray[np.intp]


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


def sequences(shared: Shared, namespace_prefix: bytes, limit: int) -> list[StoredSequence]:
    """Up to `limit` sequences of the namespaces that start so, the latest used first."""
    with shared.lock:
        shared.uses.apply(shared.index.table)
        roots = {space.number: root for root, space in shared.index.spaces.items() if root.startswith(namespace_prefix)}
        table = shared.index.table.snapshot()
    found = list(_ordered(table, roots, limit))
    with shared.index.view() as view:
        rows = {one.key: view.row(one.key) for one in found}
    return [replace(one, created_s=row.block.created_s) for one in found if (row := rows[one.key]) is not None]


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
    """Live blocks, without checkpoints."""
    found: npt.NDArray[np.bool_] = (rows["flags"] & (LIVE | CHECKPOINT)) == LIVE
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
    levels = list(_levels(rows))
    for level in reversed(levels):
        np.add.at(below, rows["parent"][level], below[level])
    own = np.where(below == 1, nbytes, 0)
    for level in levels:
        parents = rows["parent"][level]
        tokens[level] += tokens[parents]
        nbytes[level] += nbytes[parents]
        own[level] += np.where(below[level] == 1, own[parents], 0)
    return below, tokens, nbytes, own


def _levels(rows: Rows) -> Iterator[Slots]:
    """Blocks with a parent, those of one depth at a time, the shallowest first."""
    linked = np.flatnonzero(_blocks(rows) & (rows["parent"] >= 0))
    linked = linked[np.argsort(rows["depth"][linked], kind="stable")]
    if len(linked):
        yield from np.split(linked, np.flatnonzero(np.diff(rows["depth"][linked])) + 1)
