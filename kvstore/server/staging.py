"""Staging files: where a worker's bytes wait between BeginStore and the end of CommitStore.

The daemon creates each file (exclusively, 0600) and is told nothing about it that it does not check: it reads with
pread, never maps, from a descriptor opened O_NOFOLLOW that is a regular file of its own uid with one link and the exact
size.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from kvstore.blobs.ranges import VECTORS_MAX
from kvstore.errors import InvalidRequestError, NotFoundError, StoreFullError


class Veil:
    """AES-256-CTR under a key that is in memory only: what an encrypted namespace sends is not readable meanwhile.

    The bytes are the daemon's own and are read back by it alone, so nothing is authenticated. One key a file.
    """

    def __init__(self) -> None:
        self._key = os.urandom(32)

    def applied(self, data: memoryview, offset: int) -> bytes:
        """Bytes from `offset` of the file on, encrypted if they were plain, plain if they were encrypted."""
        blocks, skip = divmod(offset, 16)
        stream = Cipher(algorithms.AES(self._key), modes.CTR(blocks.to_bytes(16, "big"))).encryptor()
        stream.update(bytes(skip))
        return stream.update(data)


class StagingFile:
    """One staging file of `nbytes`. One thread at a time fills or reads it; any thread may remove it.

    `encrypted`: its bytes are not readable on disk; then only `append` may fill it. `cover(nbytes)` makes room on disk
    for the first `nbytes`, before they are written.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        nbytes: int,
        *,
        encrypted: bool = False,
        cover: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self.path = directory / name
        self.nbytes = nbytes
        self._veil = Veil() if encrypted else None
        self._cover = cover
        self.received_bytes = 0
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        with _room():
            self._write_fd = os.open(self.path, flags, 0o600)
        self._read_fd = -1
        # A worker that goes away has its file removed while its last chunk may still be on the way in.
        self._lock = threading.Lock()

    def append(self, parts: Sequence[bytes | memoryview]) -> None:
        """Write the next bytes of a streamed upload.

        Raises InvalidRequestError when there are more than were announced, NotFoundError when the upload was given up,
        StoreFullError when there is no room for them.
        """
        pending = [memoryview(part) for part in parts if len(part)]
        self._cover(min(self.nbytes, self.received_bytes + sum(map(len, pending))))
        with self._lock, _room():
            if self._write_fd < 0:
                raise NotFoundError("the upload was given up")
            if self.received_bytes + sum(map(len, pending)) > self.nbytes:
                raise InvalidRequestError(f"the upload is longer than the {self.nbytes} bytes that were asked for")
            if self._veil is not None:
                pending = [memoryview(self._veil.applied(memoryview(b"".join(pending)), self.received_bytes))]
            while pending:
                written = os.pwritev(self._write_fd, pending[:VECTORS_MAX], self.received_bytes)
                self.received_bytes += written
                while pending and written >= len(pending[0]):
                    written -= len(pending.pop(0))
                if written:
                    pending[0] = pending[0][written:]

    def progress(self) -> int:
        """Bytes in the file by now, whoever wrote them; 0 when it is gone."""
        try:
            return os.stat(self.path, follow_symlinks=False).st_size
        except OSError:
            return 0

    def finish(self) -> None:
        """Check what was handed over and make it readable with `read`.

        Raises InvalidRequestError for a file that is not exactly what the daemon created and asked for.
        """
        try:
            self._read_fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise NotFoundError("the staging file is gone") from error
        except OSError as error:
            raise InvalidRequestError(f"the staging file cannot be opened: {error.strerror}") from error
        info = os.fstat(self._read_fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or info.st_nlink != 1:
            raise InvalidRequestError("the staging file is not the regular file that the daemon created")
        if info.st_size != self.nbytes:
            raise InvalidRequestError(f"the upload has {info.st_size} bytes, {self.nbytes} were asked for")

    def read(self, offset: int, nbytes: int, into: memoryview | None = None) -> memoryview:
        """`nbytes` from `offset` of a finished file, in the first bytes of `into` or in memory of their own.

        InvalidRequestError if the file was cut short meanwhile.
        """
        whole = memoryview(bytearray(nbytes)) if into is None else into[:nbytes]
        assert len(whole) == nbytes
        view, at = whole, offset
        while view:
            got = os.preadv(self._read_fd, [view], at)
            if not got:
                raise InvalidRequestError("the staging file was cut short while it was read")
            view = view[got:]
            at += got
        if self._veil is not None:
            whole[:] = self._veil.applied(whole, offset)
        return whole

    def remove(self) -> None:
        """Close and unlink; safe to call twice."""
        with self._lock:
            for fd in (self._write_fd, self._read_fd):
                if fd >= 0:
                    os.close(fd)
            self._write_fd = self._read_fd = -1
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """A full volume as StoreFullError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFullError("no room on the volume for the staging file") from error
        raise
