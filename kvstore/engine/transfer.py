"""Blobs for another store: which ones, in which order, and their bytes, verified, piece by piece.

The store is used and evicts meanwhile. Each blob is leased while it is read, so that no eviction unlinks it. One that
was evicted or replaced before its turn is left out, with everything after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.blobs.protocol import Source
from kvstore.core.blocks import BLOCK_TOKENS, TOKEN_BYTES, Block
from kvstore.core.keys import NamespaceInfo
from kvstore.engine.check import recheck, verify_row
from kvstore.engine.listing import recent_keys
from kvstore.errors import CorruptDataError, InvalidRequestError, NotFoundError
from kvstore.index.children import is_covered
from kvstore.index.rows import Row, pack_row

if TYPE_CHECKING:
    from kvstore.engine.shared import Shared
    from kvstore.index.transaction import View

# Bytes of a blob that are read and handed over at once.
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Shipment:
    """Blobs to be handed over, aux blocks first, then parents before children, of one namespace, with its record.

    `nbytes`: of the blobs.
    """

    record: bytes
    keys: tuple[bytes, ...]
    nbytes: int


class Transfer:
    """What another store may have of this one, and what of another's is here already. Any thread may call."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    def plan(self, namespace_prefix: bytes = b"", key_prefix: bytes = b"") -> Shipment:
        """All blobs of the namespace whose id starts so, the latest used chains first; or one chain up to a key.

        With a chain go the checkpoints along it and what its recipes refer to. NotFoundError when nothing starts so;
        InvalidRequestError when several do, or when the namespace is encrypted or a tenant's: anyone who has
        what is moved can read it.
        """
        shared = self._shared
        if key_prefix:
            with shared.index.view() as view:
                row = _row_of(view, key_prefix)
                chain = _chain(view, row)
                needed = sorted({key for one in chain for key in view.references(one)})
                chain += [aux for key in needed if (aux := view.row(key)) is not None]
            return _shipment(shared, row.root, chain)
        roots = [root for root in list(shared.namespaces) if root.startswith(namespace_prefix)]
        if len(roots) != 1:
            raise _unclear("namespace", "id", namespace_prefix, roots)
        recent = recent_keys(shared, roots[0])
        with shared.index.view() as view:
            return _shipment(shared, roots[0], _parents_first(view, recent))

    def pieces(self, shipment: Shipment) -> Generator[tuple[int, bytes], None, None]:
        """The blobs of a shipment, each as one or more (its length with its first piece, else 0; bytes).

        Every blob is verified before its first piece. DirectoryError when the data directory is displaced meanwhile,
        CorruptDataError when a blob cannot be read to its end.
        """
        shared, shipped = self._shared, set[bytes]()
        for key in shipment.keys:
            shared.require_place()
            with shared.index.view() as view:
                row = view.row(key)
                needed = view.references(row) if row is not None else frozenset()
            if row is None or (row.parent != row.root and row.parent not in shipped) or not needed <= shipped:
                continue
            for number, piece in enumerate(_leased_pieces(shared, row)):
                yield (0 if number else row.blob_bytes), piece
                shipped.add(key)

    def chain(self, key: bytes) -> tuple[list[Row], int]:
        """The blocks up to a key and the checkpoints along them, parents first; none when it is gone.

        And how many of them come before the first that refers to an aux block. If a longer block replaced the one of
        this key, the chain ends with that. CorruptDataError when the index is damaged.
        """
        with self._shared.index.view() as view:
            row = self._row(view, key)
            try:
                chain = _chain(view, row) if row is not None else []
            except NotFoundError:  # it is being evicted
                chain = []
            return chain, next((at for at, one in enumerate(chain) if view.references(one)), len(chain))

    def blob(self, key: bytes) -> list[bytes]:
        """The bytes of a block's blob, verified, in pieces; none when it is gone, damaged or encrypted.

        If a longer block replaced it, that block's bytes. CorruptDataError when they cannot be read to their end.
        """
        shared, tried = self._shared, None
        while True:
            with shared.index.view() as view:
                row = self._row(view, key)
            if row is None or row.blob == tried or row.is_key_missing or shared.index.ring.key(row.root) is not None:
                return []
            if pieces := list(_leased_pieces(shared, row)):
                return pieces
            tried = row.blob  # a longer block may have replaced it since; if none did, it is gone

    def _row(self, view: View, key: bytes) -> Row | None:
        """The row of a key, or of the block that took its place."""
        now: bytes | None = key
        while now is not None and (row := view.row(now)) is None:
            now = self._shared.index.replaced.get(now)  # longer each time, so this ends
        return row

    def is_held(self, block: Block) -> bool:
        """Whether what is stored gives the tokens of this block, or the checkpoint, at no lower a rank."""
        with self._shared.index.view() as view:
            return is_covered(view, pack_row(block, 0, 0, 0))


def _unclear(what: str, name: str, prefix: bytes, found: list[bytes]) -> NotFoundError | InvalidRequestError:
    if not found:
        return NotFoundError(f"no {what} has the {name} {prefix.hex()[:12] or '-'}, or one that starts so")
    some = ", ".join(one.hex()[:16] for one in found[:5])
    return InvalidRequestError(f"{len(found)} {what}s have a {name} that starts so ({some}): give more digits")


def _row_of(view: View, key_prefix: bytes) -> Row:
    found = [row for row, _ in zip(view.rows_of(key_prefix), range(6), strict=False)]
    if len(found) != 1:
        raise _unclear("block", "key", key_prefix, [row.key for row in found])
    return found[0]


def _chain(view: View, row: Row) -> list[Row]:
    """The blocks up to a row and the checkpoints along them; of a checkpoint also the tail that covers it."""
    chain = [row]
    while chain[-1].parent != row.root:
        above = view.row(chain[-1].parent)
        if above is None:
            raise NotFoundError("the blocks before this one are not stored any more")
        chain.append(above)
    chain.reverse()
    if row.is_checkpoint and row.n_tokens:
        siblings = (view.row(key) for key in view.children(row.parent))
        covering = (one for one in siblings if one and not one.is_checkpoint and one.tokens.startswith(row.tokens))
        chain[-1:] = [next(covering, row), row]
    found: dict[bytes, Row] = {}
    for one in chain:
        found[one.key] = one
        if not one.is_checkpoint:
            # At the end of a full block a checkpoint is a child of that block, and has no tokens of its own.
            inside = one.tokens[: (BLOCK_TOKENS - 1) * TOKEN_BYTES]
            found |= {mark.key: mark for mark in view.checkpoints(one.parent, inside) if mark.n_tokens}
            if one.n_tokens == BLOCK_TOKENS:
                found |= {mark.key: mark for mark in view.checkpoints(one.key, b"")}
    return list(found.values())


def _parents_first(view: View, keys: list[bytes]) -> list[Row]:
    """The rows of all keys of a namespace, in their order but each after its parent."""
    found: dict[bytes, Row] = {}
    for key in keys:
        chain: list[Row] = []
        while key not in found and (row := view.row(key)) is not None:
            chain.append(row)
            key = row.parent
        found |= {row.key: row for row in reversed(chain)}
    return list(found.values())


def _shipment(shared: Shared, root: bytes, rows: list[Row]) -> Shipment:
    space = shared.index.spaces.get(root)
    if space is None:
        raise NotFoundError(f"namespace {root.hex()[:12]} was evicted just now")
    info = NamespaceInfo.from_record(space.record)
    named = f"namespace {root.hex()[:12]} ({info.alias or '-'})"
    if shared.index.ring.key(root) is not None or any(row.is_key_missing for row in rows[:1]):
        raise InvalidRequestError(
            f"{named} is encrypted: it is not exported, since a pack is readable by all who have it"
        )
    if info.is_salted:
        raise InvalidRequestError(f"{named} is a tenant's (it has a salt): it is not exported, nor could others use it")
    rows = sorted((row for row in rows if not row.is_lost), key=lambda row: not row.is_aux)
    return Shipment(space.record, tuple(row.key for row in rows), sum(row.blob_bytes for row in rows))


def _leased_pieces(shared: Shared, row: Row) -> Iterator[bytes]:
    """The pieces of a blob, under a lease; none of one that is gone."""
    with shared.deletions.lease((row,)):
        with shared.index.view() as view:
            found = view.row(row.key)
            if found is None or found.number != row.number:
                return  # it went before it was leased; what took its place is of no use without its parent's
        yield from _pieces(shared, row)


def _pieces(shared: Shared, row: Row) -> Iterator[bytes]:
    """A blob, verified first; nothing of one that is damaged or gone."""
    with contextlib.closing(shared.blobs.reader([Source(row.blob, 0, row.blob_bytes)], 1)) as reader:
        for at in range(0, row.blob_bytes, PIECE_BYTES):
            piece = bytearray(min(PIECE_BYTES, row.blob_bytes - at))
            try:
                if not at:
                    verify_row(shared.site, row)
                # From here on the file is open, whatever becomes of its name.
                reader.readinto(0, at, [memoryview(piece)])
            except CorruptDataError:
                if at:
                    raise
                recheck(shared, row.key)
                return
            yield bytes(piece)
