"""Aux blocks: what recipes of a namespace refer to by digest, such as the basis of a calibrated codec.

An aux block is stored like any other, before the first block that refers to it. The index counts the blocks that refer
to it, in their transactions, and the last one takes it along. One that no block refers to yet is evicted like any leaf,
and after UNUSED_S in any case.

One that is damaged goes to quarantine, and its blocks stay: they are misses (NO_BASIS) until the same bytes are put
again, since they may be all that is lost. Its row says so (`Row.is_lost`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

import numpy as np

from kvstore.blobs.protocol import Source
from kvstore.core.keys import aux_key
from kvstore.engine.adopt import Site, quarantine
from kvstore.errors import CorruptDataError
from kvstore.index.rows import Row, lost_row
from kvstore.index.table import AUX

# Two weeks: a model that was calibrated on a Friday and is used on the Monday after the next one finds its basis.
UNUSED_S = 14 * 86_400
log = logging.getLogger(__name__)


def is_there(site: Site, root: bytes, digests: Iterable[bytes]) -> bool:
    """Whether a namespace has all of these, by its index. Any thread."""
    with site.index.view() as view:
        rows = [view.row(aux_key(root, digest)) for digest in digests]
    return all(row is not None and not row.is_lost for row in rows)


def read(site: Site, root: bytes, digest: bytes) -> bytes | None:
    """The bytes of an aux block, None when it is not there. Any thread that may wait for the disk.

    CorruptDataError when they are damaged or cannot be read: `recheck` it.
    """
    with site.index.view() as view:
        row = view.row(aux_key(root, digest))
    if row is None or row.is_lost or row.is_key_missing or row.block.aux is None:
        return None
    data = bytearray(row.block.aux.nbytes)
    with contextlib.closing(site.blobs.reader([Source(row.blob, row.payload_offset, row.blob_bytes)], 1)) as reader:
        reader.readinto(0, 0, [memoryview(data)])
    if hashlib.sha256(data).digest() != digest:
        raise CorruptDataError("an aux block does not have its digest")
    return bytes(data)


def hold(site: Site, held: set[bytes], needed: AbstractSet[bytes]) -> None:
    """Keep aux blocks, by key, although room for a store may take the last block that refers to them.

    `held` are the store's own so far, to be passed to `let_go`.
    """
    if new := needed - held:
        with site.lock:
            site.index.held.update(new)
        held |= new


def let_go(site: Site, held: set[bytes]) -> None:
    """The store has ended. What nothing refers to now goes like any that is unused."""
    with site.lock:
        site.index.held -= Counter(held)


def lose(site: Site, row: Row, *, keep_blob: bool) -> list[Row]:
    """Take out an aux block that is damaged or gone; with `keep_blob` its blob goes to quarantine.

    Blocks that refer to it stay, and its row says that it is lost; of an encrypted one without its key there is no row
    any more, and `recount` makes one when the key is back. Returns the row, if it was still there.
    """
    with site.lock:
        with site.index.edit() as edit:
            current = edit.row(row.key)
            if current is None or current.number != row.number:
                return []
            blocks = edit.table.value(row.key, "children")
            if blocks and not row.is_key_missing and row.block.aux is not None:
                edit.replace(current, lost_row(row.root, row.block.aux.digest), 0)
            else:
                edit.table.refer(row.key, -blocks)
                edit.remove(current)
        moved = keep_blob and quarantine(site, row.blob)
        finish = site.delete({} if keep_blob else {row.blob: site.cost(row)})
    finish()
    where = "it is in quarantine" if moved else "it is gone"
    words = "a basis of namespace %s is damaged, %s: %d blocks are misses until it is stored again"
    log.warning(words, row.root.hex()[:12], where, blocks)
    return [row]


def recount(site: Site, repair: bool) -> list[str]:
    """Compare the counts of references with the rows, all of one moment; a repair puts right what differs. In words."""
    with contextlib.ExitStack() as held:
        with site.lock:
            table = site.index.table
            slots = np.flatnonzero((table.rows["flags"] & AUX) != 0).tolist()
            told = dict(zip(table.keys(slots), table.rows["children"][slots].tolist(), strict=True))
            view = held.enter_context(site.index.view())
        counted, aux, unknown = Counter[bytes](), dict[bytes, Row](), set[bytes]()
        for row in view.rows():
            if row.is_key_missing:
                unknown.add(row.root)
            elif row.is_aux:
                aux[row.key] = row
            elif view.references(row):
                for digest in row.block.references:
                    one = lost_row(row.root, digest)
                    counted[one.key] += 1
                    aux.setdefault(one.key, one)
    wrong = {key: counted[key] - told.get(key, 0) for key, row in aux.items() if row.root not in unknown}
    wrong = {key: change for key, change in wrong.items() if change}
    if wrong and repair:
        _correct(site, {aux[key]: change for key, change in wrong.items()})
    return [f"the count of what refers to {key.hex()[:12]} is off by {-change}" for key, change in wrong.items()]


def _correct(site: Site, changes: dict[Row, int]) -> None:
    """What was stored or deleted since the count was taken changed both sides alike."""
    with site.lock:
        with site.index.edit() as edit:
            for row, change in changes.items():
                edit.mend_references(row, change)
        finish = site.delete({row.blob: site.cost(row) for row in edit.released if not row.is_lost})
    finish()
