"""Blobs out of the remote store. What it holds is believed no more than what a stranger sends.

An object is a blob as `kvstore.blobs.format` describes it, never encrypted. Its name promises a block; the header must
be that of the block, and every byte must have its checksum. Anything else is CorruptDataError, and is never served.

`RemoteReader` reads ranges, for who wants layer after layer: one round trip for the headers, one for a layer's ranges.
`pull` reads whole blobs, for who keeps them. Both pin the ETags that were seen when the blocks were found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvstore.blobs import format as blob_format
from kvstore.core.blocks import Block
from kvstore.core.breaker import Deadline
from kvstore.core.keys import NamespaceInfo
from kvstore.core.rules import check_block
from kvstore.errors import CorruptDataError, KVStoreError
from kvstore.remote.finder import RemoteBlock
from kvstore.remote.object_store import ByteRange, ObjectStore, Wanted, whole

# Read of every blob to have its header at once. A block of 64 layers has one of some 20 KB: two checksums a layer in
# base64, its tokens, the record of its namespace.
HEADER_GUESS_BYTES = 64 << 10
# Two ranges that lie no further apart are read as one: on any link the bytes between take less time than a request.
GAP_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Pulled:
    """A blob that was read whole and verified. `blob`: all of its bytes; `payload`: those after its header."""

    block: Block
    blob: memoryview
    payload: memoryview


def require_block(block: Block, wanted: RemoteBlock, fidelity_min: int) -> Block:
    """The block of a header; CorruptDataError unless it is the one that was looked for, at this rank or a higher."""
    if (block.root, block.parent, block.key) != (wanted.root, wanted.parent, wanted.key):
        raise CorruptDataError(f"{wanted.name} holds another block than its name says")
    if block.tokens != wanted.tokens or block.start != wanted.start or block.is_checkpoint != wanted.is_checkpoint:
        raise CorruptDataError(f"{wanted.name} holds other tokens than its name says")
    if block.fidelity < fidelity_min:
        raise CorruptDataError(f"{wanted.name} holds a block of a lower rank than its name says")
    info = NamespaceInfo.from_record(block.namespace)
    if info.root != block.root:
        raise CorruptDataError(f"{wanted.name} says that it belongs to another namespace")
    check_block(info.layout, block)
    return block


def parse_blob(blob: memoryview) -> Pulled:
    """A whole blob, verified in itself.

    CorruptDataError, InvalidRequestError for values that no engine takes, UnknownFormatError for another version,
    NotFoundError for an encrypted one.
    """
    length = blob_format.header_length(bytes(blob[: blob_format.LENGTH_BYTES]), len(blob))
    block = blob_format.parse_header(bytes(blob[:length]), len(blob))
    blob_format.require_payload(block, blob[length:])
    return Pulled(block, blob, blob[length:])


def pull(
    store: ObjectStore, blocks: Sequence[RemoteBlock], fidelity_min: int, deadline: Deadline
) -> list[Pulled | KVStoreError]:
    """Blobs, whole and verified, in one batch. In the place of each that cannot be had stands why.

    That is RemoteError or DeadlineError for what is gone or did not come, any other for an object that is not what it
    should be. RemoteError and DeadlineError are raised, too, when nothing came at all.
    Memory: all of them at once, so batch them.
    """
    wanted = [Wanted(one.name, one.head.etag, whole(one.head)) for one in blocks]
    pulled: list[Pulled | KVStoreError] = []
    for one, answer in zip(blocks, store.read_all(wanted, deadline), strict=True):
        if isinstance(answer, KVStoreError):
            pulled.append(answer)
            continue
        try:
            found = parse_blob(answer[0] if answer else memoryview(b""))
            require_block(found.block, one, fidelity_min)
            pulled.append(found)
        except KVStoreError as error:
            pulled.append(error)
    return pulled


class RemoteReader:
    """Reads ranges of payloads of found blocks: `kvstore.blobs.ranges.RangeReader`, for verified assembly by layer.

    `open` reads and verifies the headers, `load` fetches ranges of many blocks in one round trip, `readinto` gives out
    what was loaded, and fetches what was not. One thread opens and loads; any thread may read what was loaded.
    """

    def __init__(
        self, store: ObjectStore, blocks: Sequence[RemoteBlock], fidelity_min: int, deadline: Deadline
    ) -> None:
        self._store, self._blocks, self._fidelity_min, self._deadline = store, tuple(blocks), fidelity_min, deadline
        self._payload_at: list[int] = []
        self._loaded: dict[int, list[tuple[ByteRange, memoryview]]] = {}

    def open(self) -> tuple[list[Block], KVStoreError | None]:
        """(the blocks up to the first whose header cannot be had or is wrong, why that is).

        One round trip, and another where a header is longer than expected. DeadlineError, RemoteError when the store
        does not answer at all.
        """
        guesses = [ByteRange(0, min(HEADER_GUESS_BYTES, one.head.nbytes)) for one in self._blocks]
        heads, reason = self._read(self._blocks, guesses)
        longer = [n for n, head in enumerate(heads) if self._header_bytes(n, head) > len(head)]
        if longer:
            blocks = [self._blocks[n] for n in longer]
            ranges = [ByteRange(0, self._header_bytes(n, heads[n])) for n in longer]
            again, why = self._read(blocks, ranges)
            if why is not None:
                heads, reason = heads[: longer[len(again)]], why
            for number, head in zip(longer, again, strict=False):
                heads[number] = head
        found: list[Block] = []
        for wanted, head in zip(self._blocks, heads, strict=False):
            try:
                length = blob_format.header_length(bytes(head[: blob_format.LENGTH_BYTES]), wanted.head.nbytes)
                block = blob_format.parse_header(bytes(head[:length]), wanted.head.nbytes)
                found.append(require_block(block, wanted, self._fidelity_min))
            except KVStoreError as error:
                reason = error
                break
            self._payload_at.append(length)
            self._loaded[len(found) - 1] = [(ByteRange(0, len(head) - length), head[length:])]
        return found, reason

    def _header_bytes(self, number: int, head: memoryview) -> int:
        """Of a block's header, 0 where it has none."""
        try:
            first = bytes(head[: blob_format.LENGTH_BYTES])
            return blob_format.header_length(first, self._blocks[number].head.nbytes)
        except CorruptDataError:
            return 0

    def _read(
        self, blocks: Sequence[RemoteBlock], ranges: Sequence[ByteRange]
    ) -> tuple[list[memoryview], KVStoreError | None]:
        """The first bytes of blocks up to the first that cannot be read, and why that is."""
        asked = [Wanted(one.name, one.head.etag, [at]) for one, at in zip(blocks, ranges, strict=True)]
        read: list[memoryview] = []
        for answer in self._store.read_all(asked, self._deadline):
            if isinstance(answer, KVStoreError):
                return read, answer
            read.append(answer[0])
        return read, None

    def load(self, ranges: Sequence[tuple[int, ByteRange]]) -> None:
        """Fetch payload ranges, each of a block by its number, in one round trip. What was loaded before is let go.

        CorruptDataError when one of them cannot be had: its block, and what follows, is not.
        """
        by_block: dict[int, list[ByteRange]] = {}
        for number, one in ranges:
            by_block.setdefault(number, []).append(one)
        merged = {number: list(_merged(some)) for number, some in by_block.items()}
        asked = [self._wanted(number, some) for number, some in merged.items()]
        loaded: dict[int, list[tuple[ByteRange, memoryview]]] = {}
        for (number, some), answer in zip(merged.items(), self._store.read_all(asked, self._deadline), strict=True):
            if isinstance(answer, KVStoreError):
                raise CorruptDataError(str(answer)) from answer
            loaded[number] = list(zip(some, answer, strict=True))
        self._loaded = loaded

    def _wanted(self, number: int, ranges: Sequence[ByteRange]) -> Wanted:
        block, at = self._blocks[number], self._payload_at[number]
        return Wanted(block.name, block.head.etag, [ByteRange(at + one.offset, one.nbytes) for one in ranges])

    def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
        """See `RangeReader.readinto`: also CorruptDataError when the store does not give the bytes in time."""
        nbytes = sum(view.nbytes for view in views)
        if not 0 <= source < len(self._payload_at) or offset < 0:
            raise CorruptDataError(f"no such range: source {source}, offset {offset}")
        data = next(
            (
                held[offset - one.offset : offset - one.offset + nbytes]
                for one, held in self._loaded.get(source, ())
                if one.offset <= offset and offset + nbytes <= one.offset + one.nbytes
            ),
            None,
        )
        if data is None:
            try:
                wanted = self._wanted(source, [ByteRange(offset, nbytes)])
                (data,) = self._store.read(*wanted, self._deadline)
            except KVStoreError as error:
                raise CorruptDataError(str(error)) from error
        at = 0
        for view in views:
            view.cast("B")[:] = data[at : at + view.nbytes]
            at += view.nbytes


def _merged(ranges: Sequence[ByteRange]) -> Iterator[ByteRange]:
    """The same bytes in fewer ranges, in order, with what lies between close ones."""
    start = end = -1
    for one in sorted(ranges):
        if start >= 0 and one.offset <= end + GAP_BYTES:
            end = max(end, one.offset + one.nbytes)
            continue
        if start >= 0:
            yield ByteRange(start, end - start)
        start, end = one.offset, one.offset + one.nbytes
    if start >= 0:
        yield ByteRange(start, end - start)
