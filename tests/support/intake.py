"""The bytes of uploads: in this process, or by the upload socket of a daemon."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from kvstore.config.parsers import UPLOAD_SUFFIX
from kvstore.server.storing.store import StoreOutcome, StorePath
from kvstore.server.storing.upload_socket import CONFIRMED
from kvstore.server.storing.uploads import Upload


class BytesSource:
    """Bytes that are there, in calls of at most `step`."""

    def __init__(self, parts: Iterable[bytes | memoryview], step: int = 1 << 20) -> None:
        self._left = memoryview(b"".join(parts))
        self._step = step
        self.is_closed = self.is_confirmed = False

    def readinto(self, view: memoryview) -> int | None:
        """See `UploadSource`."""
        got = min(len(view), len(self._left), self._step)
        view[:got], self._left = self._left[:got], self._left[got:]
        return got

    def confirm(self) -> None:
        """See `UploadSource`."""
        self.is_confirmed = True

    def close(self) -> None:
        """See `UploadSource`."""
        self.is_closed = True


def carry_out(path: StorePath, upload: Upload) -> StoreOutcome:
    """Commit an upload whose bytes are there."""
    if not upload.intake.is_committed:
        upload.intake.commit()
    return path.carry_out(upload)


def connect(listen: str, upload_id: str) -> socket.socket:
    """A connection to the upload socket that has named an upload; what follows are bytes, if it was taken."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(60)
    connection.connect(listen.removeprefix("unix:") + UPLOAD_SUFFIX)
    connection.sendall(upload_id.encode())
    return connection


def taken(connection: socket.socket) -> bool:
    """Whether the daemon took the upload."""
    try:
        return connection.recv(1) == CONFIRMED
    except ConnectionResetError:
        return False


def send(listen: str, upload_id: str, data: bytes) -> None:
    """Hand over bytes as a worker of the same host does, be they enough or too many."""
    with connect(listen, upload_id) as connection:
        assert taken(connection)
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1)  # all was received, or the daemon wants no more
        except (BrokenPipeError, ConnectionResetError):
            return
