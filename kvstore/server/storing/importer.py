"""Import: the blobs of another store, as an admin sends them or a remote tier has them, become blobs of this one.

What a blob says is believed no more than what a worker sends: header, keys, namespace, rules of the layout and recipes
are checked before memory is taken for its payload, then every checksum; only then the engine stores it, as any other
block. Whether its values are what the model computed cannot be checked. So importing takes an admin, and a remote tier
is shared among those who trust each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kvstore.blobs import format as blob_format
from kvstore.codecs.byte_plan import check_block
from kvstore.core.blocks import Block, Reason
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.keys import NamespaceInfo
from kvstore.engine import Engine, NamespaceKey, NewBlock
from kvstore.engine.adopt import require_own_namespace
from kvstore.errors import CorruptDataError, InvalidRequestError, LimitError
from kvstore.wire.convert import namespace_from_message
from kvstore.wire.v1 import kvstore_pb2 as pb

# Limits on the blobs that are stored together, with one sync of the folder and one commit.
BATCH_BLOBS, BATCH_BYTES = 128, 32 << 20
# How long to wait for memory that others use.
MEMORY_S = 10.0


@dataclass
class Imported:
    """What came of an import so far: blobs that came, those of them that were here already, bytes newly on disk.

    `reason` is OK while everything that came is stored, else why the import ended early; `detail` says it to people.
    """

    blobs: int = 0
    held: int = 0
    new_bytes: int = 0
    reason: Reason = Reason.OK
    detail: str = ""

    @property
    def stored(self) -> int:
        """Blobs that were written."""
        return self.blobs - self.held


class _Incoming:
    """A blob on its way: its header until that is complete, then the block it describes and its payload."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.left = nbytes
        self.head = bytearray()
        self.block: Block | None = None
        self.payload: memoryview | None = None  # None: it is here already, so its bytes are of no use
        self.filled = 0


class Importer:
    """One import. One thread at a time; `close` it in any case. What was stored stays, whatever comes later.

    Memory: one batch, counted against `buffers`.
    """

    def __init__(
        self,
        engine: Engine,
        encryption: Callable[[bytes], NamespaceKey | None],
        buffers: ByteBudget,
        named: Callable[[Block], NamespaceInfo] | None = None,
        memory_s: float = MEMORY_S,
    ) -> None:
        """`encryption`: the key that blobs of a namespace are encrypted with here, None without. `named`: the namespace
        of a block, None: the one that it says, never a tenant's; raises CorruptDataError. `memory_s`: patience."""
        self._engine = engine
        self._encryption = encryption
        self._buffers = buffers
        self._named = named or _namespace
        self._memory_s = memory_s
        self._since = engine.evictions
        self._info: NamespaceInfo | None = None
        self._record = b""  # the last one that was found to say `_info`
        self._incoming: _Incoming | None = None
        self._batch: list[NewBlock] = []
        self._batch_bytes = 0
        self._ours: set[bytes] = set()  # what came, which must not make room for what comes
        self._held_bytes = 0
        self.done = Imported()

    def take(self, blob_bytes: int, data: bytes | memoryview) -> bool:
        """The next piece; with the first one of a blob the length of all. Whether more is wanted.

        Raises CorruptDataError, InvalidRequestError, UnknownFormatError for what is no sound blob of one namespace,
        LimitError when there is no memory for it, DirectoryError when the disk fails.
        """
        if blob_bytes:
            if self._incoming is not None:
                raise InvalidRequestError("a blob began before the last one was complete")
            self._incoming = _Incoming(blob_bytes)
        coming = self._incoming
        if coming is None or len(data) > coming.left:
            raise InvalidRequestError("more bytes than the blobs were said to have")
        coming.left -= len(data)
        rest = memoryview(data)
        if coming.block is None:
            rest = self._read_header(coming, data)
        if coming.payload is not None and len(rest):
            coming.payload[coming.filled : coming.filled + len(rest)] = rest
            coming.filled += len(rest)
        if not coming.left:
            self._incoming = None
            self._end_blob(coming)
        return self.done.reason is Reason.OK

    def _read_header(self, coming: _Incoming, data: bytes | memoryview) -> memoryview:
        """Take in bytes of the header; what comes after it."""
        coming.head += data
        head = coming.head
        if len(head) < min(blob_format.LENGTH_BYTES, coming.nbytes):
            return memoryview(b"")
        length = blob_format.header_length(bytes(head[: blob_format.LENGTH_BYTES]), coming.nbytes)
        if len(head) < length:
            return memoryview(b"")
        coming.block = self._admitted(blob_format.parse_header(bytes(head[:length]), coming.nbytes))
        if not self._is_here(coming.block):
            payload_bytes = coming.nbytes - length
            self._take_memory(payload_bytes)
            coming.payload = np.empty(payload_bytes, np.uint8).data
        rest, coming.head = bytes(head[length:]), bytearray()
        return memoryview(rest)

    def _admitted(self, block: Block) -> Block:
        """A block that may be stored, by all that its header says."""
        info = self._info
        if info is None or block.namespace != self._record:
            info = self._named(block)
            if self._info is not None and info.root != self._info.root:
                raise InvalidRequestError("an import is of one namespace")
            self._info, self._record = self._info or info, block.namespace
        elif info.root != block.root:
            raise CorruptDataError("the blob is not what its namespace says")
        if block.aux is not None:
            return block
        # Its rank may be higher than its parent's: that one was re-encoded later. A match takes the least of both.
        check_block(info.layout, block)
        return block

    def _is_here(self, block: Block) -> bool:
        return any(new.block.key == block.key for new in self._batch) or self._engine.transfer.is_held(block)

    def _take_memory(self, nbytes: int) -> None:
        if self._batch_bytes + nbytes > BATCH_BYTES:
            self._store_batch()
        if not self._buffers.try_acquire(nbytes):
            self._store_batch()  # it may be our own that is in the way
            if not self._buffers.acquire(nbytes, self._memory_s):
                words = f"a blob takes {nbytes} bytes of memory_bytes = {self._buffers.limit_bytes}, which are in use"
                raise LimitError(words, limit="memory_bytes")
        self._held_bytes += nbytes

    def _end_blob(self, coming: _Incoming) -> None:
        block = coming.block
        if block is None:
            raise CorruptDataError("not a blob: it ends within its header")
        if self.done.reason is not Reason.OK:
            return
        self.done.blobs += 1
        if coming.payload is None:
            self.done.held += 1
            self._ours.add(block.key)
            return
        blob_format.require_payload(block, coming.payload)
        # What another store may do to it says nothing here.
        own = replace(block, origin=None)
        self._batch.append(NewBlock(own, blob_format.payload_parts(block, coming.payload)))
        self._batch_bytes += coming.nbytes
        if len(self._batch) >= BATCH_BLOBS or self._batch_bytes >= BATCH_BYTES:
            self._store_batch()

    def _store_batch(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if not batch or self._info is None:
            return
        encryption = self._encryption(self._info.root)
        receipt = self._engine.store(self._info.to_record(), batch, tuple(self._ours), encryption, self._since)
        self._buffers.release(self._held_bytes)
        self._held_bytes = 0
        self.done.new_bytes += receipt.new_bytes
        self._ours.update(new.block.key for new in batch[: receipt.blocks])
        if receipt.blocks < len(batch):
            self.done.blobs -= len(batch) - receipt.blocks
            self.done.reason = receipt.reason
            self.done.detail = self._why(receipt.reason)

    def _why(self, reason: Reason) -> str:
        words = {
            Reason.STORE_FULL: self._engine.degraded
            or f"the rest does not fit in the budget of {self._engine.budget_bytes} bytes: raise budget_bytes",
            Reason.EVICTED: "the namespace was evicted meanwhile",
            Reason.NO_BASIS: "the basis of a codec that blocks refer to is neither in the pack nor in this store",
            Reason.DEPENDENCY_LOST: "a block that comes before others is neither in the pack nor in this store",
        }
        return words.get(reason, "")

    def drop(self) -> None:
        """Go on without the blob that came last, which `take` did not accept."""
        self._incoming = None

    def finish(self) -> Imported:
        """Store the remaining blobs; returns the result. InvalidRequestError if the last blob is incomplete."""
        if self._incoming is not None and self.done.reason is Reason.OK:
            raise InvalidRequestError("the last blob is not complete")
        self._store_batch()
        return self.done

    def close(self) -> None:
        """Let go of the memory. Idempotent."""
        held, self._held_bytes = self._held_bytes, 0
        self._batch, self._incoming = [], None
        self._buffers.release(held)


def _namespace(block: Block) -> NamespaceInfo:
    """The namespace of a block, checked as one that a worker sends. InvalidRequestError, CorruptDataError."""
    said = require_own_namespace(block)
    message = pb.Namespace(
        weights=said.weights,
        adapter=said.adapter,
        layout_digest=said.layout.digest,
        dtype=said.dtype,
        engine=said.engine,
        alias=said.alias,
    )
    info = namespace_from_message(message, said.layout.record)
    if info is None or info.root != block.root:
        raise InvalidRequestError("a tenant's blobs are not imported: the identity leaves out its salt")
    return info
