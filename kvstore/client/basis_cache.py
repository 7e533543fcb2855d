"""What recipes of plans refer to, fetched once for each digest and kept in memory, for all sessions of the process.

A basis has tens of MiB, and a fetch has a deadline: so it is fetched on a thread of its own, which goes on when the
fetch that needs it gives up, and the next one finds it.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, cast

import grpc

from kvstore.core.bounded import ByteCache
from kvstore.core.records import AUX_BYTES_MAX
from kvstore.errors import AuxMissingError, KVStoreError
from kvstore.wire.v1 import kvstore_pb2 as pb

# How long one is fetched: 256 MiB at 100 Mbit/s take 21 s.
FETCH_S = 30.0
log = logging.getLogger(__name__)

# Opens a FetchBasis call with a time limit in seconds.
Open = Callable[[bytes, float], Iterable[pb.BasisPiece]]


class BasisCache:
    """Any thread may call. At most AUX_BYTES_MAX bytes are kept, the least recently used dropped first."""

    def __init__(self, limit_bytes: int = AUX_BYTES_MAX) -> None:
        self._kept = ByteCache(limit_bytes)
        self._lock = threading.Lock()
        self._coming: dict[bytes, Future[bytes]] = {}

    def get(self, digests: Iterable[bytes], open_: Open, wait_s: float) -> Mapping[bytes, bytes]:
        """The bytes of these digests; `open_` is called for those that are not here.

        AuxMissingError for one that does not come within `wait_s`, that the daemon does not have, or whose bytes are
        not those of its digest.
        """
        return {digest: self._kept.get(digest) or self._fetched(digest, open_, wait_s) for digest in digests}

    def _fetched(self, digest: bytes, open_: Open, wait_s: float) -> bytes:
        with self._lock:
            coming = self._coming.get(digest)
            if coming is None:
                coming = self._coming[digest] = Future()
                arguments = (digest, open_, coming)
                thread = threading.Thread(target=self._fetch, args=arguments, name="kvstore-basis", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:  # no more threads; the next fetch tries again
                    del self._coming[digest]
                    raise AuxMissingError(digest) from error
        try:
            return coming.result(max(0.0, wait_s))
        except (FutureTimeoutError, AuxMissingError) as error:
            raise AuxMissingError(digest) from error

    def _fetch(self, digest: bytes, open_: Open, coming: Future[bytes]) -> None:
        """On a thread of its own."""
        data = None
        try:
            data = _received(digest, open_(digest, FETCH_S))
            self._kept.put(digest, data)
        except (KVStoreError, grpc.RpcError, ValueError) as error:  # ValueError: gRPC's for a channel that was closed
            log.info("a basis did not come: %s", error)
        finally:
            with self._lock:
                del self._coming[digest]
        # Only now: a caller that asks again at once must not find this end of it.
        if data is None:
            coming.set_exception(AuxMissingError(digest))
        else:
            coming.set_result(data)


def _received(digest: bytes, pieces: Iterable[pb.BasisPiece]) -> bytes:
    data = bytearray()
    for piece in pieces:
        data += piece.data
        if len(data) > AUX_BYTES_MAX:
            raise AuxMissingError(digest)
    if hashlib.sha256(data).digest() != digest:
        raise AuxMissingError(digest)
    return bytes(data)


def ask_basis(stub: Any, namespace: pb.Namespace, digest: bytes, timeout_s: float) -> Iterable[pb.BasisPiece]:
    """The pieces of a basis, from the daemon of a KVStore stub."""
    request = pb.FetchBasisRequest(namespace=namespace, digest=digest)
    return cast(Iterable[pb.BasisPiece], stub.FetchBasis(request, timeout=timeout_s))


BASES = BasisCache()
