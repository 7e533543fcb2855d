"""Takes what recipes of a namespace are to refer to, such as the basis of a calibrated codec, from an admin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvstore.blobs.format import aux_block
from kvstore.core.blocks import Reason
from kvstore.core.byte_budget import ByteBudget
from kvstore.core.keys import NamespaceInfo
from kvstore.core.records import AUX_BYTES_MAX
from kvstore.engine import Engine, NamespaceKey, NewBlock
from kvstore.errors import InvalidRequestError, LimitError
from kvstore.wire.convert import namespace_from_message
from kvstore.wire.v1 import kvstore_pb2 as pb


@dataclass(frozen=True, slots=True)
class PutBasis:
    """The end of an intake: the digest of what is stored now, bytes newly on disk; else why not, and for people."""

    digest: bytes = b""
    new_bytes: int = 0
    reason: Reason = Reason.OK
    detail: str = ""


class BasisIntake:
    """One basis on its way, in memory that is counted against `buffers`. One thread at a time; `close` it in any case.

    The bytes are the caller's to vouch for: a basis that is none costs the blocks that are encoded with it, and codecs
    check what they read.
    """

    def __init__(self, engine: Engine, encryption: Callable[..., NamespaceKey | None], buffers: ByteBudget) -> None:
        """`encryption(root, isolated=...)`: the key that a namespace is encrypted with here, None without."""
        self._engine = engine
        self._encryption = encryption
        self._buffers = buffers
        self._info: NamespaceInfo | None = None
        self._isolated = False
        self._data = bytearray()

    def take(self, piece: pb.BasisPiece) -> None:
        """The next piece. InvalidRequestError for what cannot be one, LimitError when there is no memory for it."""
        if self._info is None:
            self._info = namespace_from_message(piece.namespace, piece.layout)
            self._isolated = bool(piece.namespace.salt)
            if self._info is None:
                raise InvalidRequestError("a basis comes with the layout of its model")
        if len(self._data) + len(piece.data) > AUX_BYTES_MAX:
            raise InvalidRequestError(f"a basis has at most {AUX_BYTES_MAX} bytes")
        if not self._buffers.try_acquire(len(piece.data)):
            words = f"memory_bytes = {self._buffers.limit_bytes} of buffers are in use; try again later"
            raise LimitError(words, limit="memory_bytes")
        self._data += piece.data

    def finish(self) -> PutBasis:
        """Store it, durably. InvalidRequestError when nothing came; KeyMissingError, DirectoryError."""
        info, data = self._info, bytes(self._data)
        if info is None or not data:
            raise InvalidRequestError("a basis has at least one byte")
        block = aux_block(info.root, data)
        assert block.aux is not None
        encryption = self._encryption(info.root, isolated=self._isolated)
        receipt = self._engine.store(info.to_record(), [NewBlock(block, [data])], encryption=encryption)
        if receipt.reason is not Reason.OK:
            words = f"a basis of {len(data)} bytes does not fit in the budget of {self._engine.budget_bytes} bytes"
            detail = self._engine.degraded or (words if receipt.reason is Reason.STORE_FULL else "")
            return PutBasis(reason=receipt.reason, detail=detail)
        return PutBasis(block.aux.digest, receipt.new_bytes)

    def close(self) -> None:
        """Let go of the memory. Idempotent."""
        self._buffers.release(len(self._data))
        self._data = bytearray()
