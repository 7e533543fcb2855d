"""Packs: what an Export call answers becomes a .kvpack file, and what is in one goes to an Import call.

The file is this process's, never the daemon's: it has the rights of the user who asks, also when the daemon is on
another host. Both ways hold a piece of 1 MiB at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kvstore import __version__
from kvstore.blobs.fs import Fs, unlink_quietly, write_pending
from kvstore.blobs.pack_file import PIECE_BYTES, Manifest, PackFile, manifest_of, pack_pieces
from kvstore.blobs.protocol import TMP_SUFFIX
from kvstore.core.keys import Namespace
from kvstore.errors import CorruptDataError, InvalidRequestError, KVStoreError
from kvstore.wire.convert import namespace_to_message
from kvstore.wire.v1 import kvstore_pb2 as pb

# Hears how many bytes of how many are done.
Tell = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Exported:
    """Result of an export: the manifest, number of blobs, their bytes, and blobs evicted before they were written."""

    manifest: Manifest
    blobs: int
    nbytes: int

    @property
    def skipped(self) -> int:
        """Blobs that were planned, and were evicted or found damaged before their turn."""
        return self.manifest.blobs - self.blobs


def write_pack(replies: Iterable[pb.ExportReply], path: str, tell: Tell, *, force: bool) -> Exported:
    """Write the answer of an Export call to `path`: to a temporary name, synced, then renamed.

    Readable by its owner only. InvalidRequestError when there is such a file and not `force`, OSError when it cannot be
    written; then nothing is left. A kill leaves `path` + ".tmp", which the next export to that name replaces.
    """
    _require_free(path, force=force)
    remaining = iter(replies)
    first = next(remaining, None)
    if first is None or not first.HasField("plan"):
        raise CorruptDataError("the daemon did not say what comes")
    manifest = manifest_of(first.plan.namespace, first.plan.blobs, first.plan.bytes, __version__)
    blobs = nbytes = 0

    def pieces() -> Iterator[tuple[int, bytes]]:
        nonlocal blobs, nbytes
        for reply in remaining:
            blobs += bool(reply.piece.blob_bytes)
            nbytes += len(reply.piece.data)
            tell(nbytes, manifest.nbytes)
            yield reply.piece.blob_bytes, reply.piece.data

    fs = Fs()
    unlink_quietly(fs, [path + TMP_SUFFIX])
    try:
        pending = write_pending(fs, path, pack_pieces(manifest, pieces()), sync=True)
        try:
            pending.sync()
            _require_free(path, force=force)
            pending.rename()
        finally:
            pending.abandon()
        fs.fsync_dir(os.path.dirname(os.path.abspath(path)))
    except OSError as error:  # it names the temporary file, of which the caller knows nothing
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, path) from error
    return Exported(manifest, blobs, nbytes)


def _require_free(path: str, *, force: bool) -> None:
    if os.path.isdir(path):
        raise InvalidRequestError(f"{path} is a folder; name the file to write")
    if os.path.lexists(path) and not force:
        raise InvalidRequestError(f"{path} exists; another name, or --force to replace it")


def verify_pack(pack: PackFile, tell: Tell) -> None:
    """Read a pack to its end. CorruptDataError where it is damaged or cut short."""
    done = 0
    for _, piece in pack.read():
        done += len(piece)
        tell(done, pack.nbytes)


def basis_pieces(namespace: Namespace, data: bytes) -> Iterator[pb.BasisPiece]:
    """A basis as PutBasis takes it."""
    yield pb.BasisPiece(namespace=namespace_to_message(namespace), layout=namespace.layout.record)
    for at in range(0, len(data), PIECE_BYTES):
        yield pb.BasisPiece(data=data[at : at + PIECE_BYTES])


def send_pack(send: Callable[[Iterator[pb.BlobPiece]], Any], pack: PackFile, tell: Tell) -> pb.ImportReply:
    """Send the blobs of a verified pack with `send`, an Import call; its reply. CorruptDataError as `verify_pack`."""
    failed: list[BaseException] = []

    def pieces() -> Iterator[pb.BlobPiece]:
        done = 0
        # gRPC runs this on a thread of its own, where an error would be a traceback in the log and no more.
        try:
            for blob_bytes, piece in pack.read():
                yield pb.BlobPiece(blob_bytes=blob_bytes, data=piece)
                done += len(piece)
                tell(done, pack.nbytes)
        except (KVStoreError, OSError) as error:
            failed.append(error)

    reply: pb.ImportReply = send(pieces())
    if failed:
        raise failed[0]
    return reply
