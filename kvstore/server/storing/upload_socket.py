"""The unix socket over which workers on this host send the bytes of stores. It lies beside the gRPC socket.

    worker   the upload_id of a BeginStoreReply, 32 bytes
    daemon   one byte, when it accepts the upload
    worker   the bytes in token order, then the end of its side
    daemon   one byte, when it has received all of them, then the end

An upload_id cannot be guessed, and the connecting process must run as the daemon's user or as root. CommitStore returns
the outcome, including why a connection was closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable

from kvstore.core.unix_sockets import peer_uid
from kvstore.errors import DirectoryError, KVStoreError
from kvstore.server.storing.intake import TAKEN, SocketSource
from kvstore.server.storing.uploads import Upload, Uploads

log = logging.getLogger(__name__)

UPLOAD_ID_BYTES = 32
# A connection that has not named its upload by then is closed.
GREETING_S = 5.0
# Pause after the system refused to accept a connection.
PAUSE_S = 1.0


class UploadSocket:
    """Listens, and opens the upload that a connection names. Event loop only, which reads no more than the names.

    `begin(upload)` starts the upload's thread. `greetings_max`: how many connections may be about to name an upload.
    """

    def __init__(self, uploads: Uploads, begin: Callable[[Upload], object], greetings_max: int) -> None:
        self._uploads = uploads
        self._begin = begin
        self._greetings_max = greetings_max
        self._greetings: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._listener: socket.socket | None = None

    def bind(self, path: str) -> None:
        """Create the socket. The caller sets its mode before `listen`. Raises DirectoryError if that fails."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        try:
            self._listener.bind(path)
        except OSError as error:
            self.close()
            raise DirectoryError(f"cannot listen on {path}: {error.strerror}") from error

    def listen(self) -> None:
        """Start to accept connections. Does nothing without `bind`, when the daemon listens on TCP."""
        if self._listener is not None:
            self._listener.listen(self._greetings_max)
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Accept no more connections. Uploads that have begun go on. Safe to call twice."""
        listener, self._listener = self._listener, None
        if listener is not None:
            self._loop.remove_reader(listener.fileno())
            listener.close()
        for greeting in self._greetings:
            greeting.cancel()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # gone already
            return
        except OSError as error:  # no descriptor is free: without a pause the loop would only retry this
            log.warning("an upload's connection was not accepted: %s", error)
            self._loop.remove_reader(self._listener)
            self._loop.call_later(PAUSE_S, self.listen)
            return
        connection.setblocking(False)
        try:
            uid = peer_uid(connection)
        except OSError:
            uid = -1
        if uid not in (os.geteuid(), 0) or len(self._greetings) >= self._greetings_max:
            log.warning("an upload's connection of user id %d was refused", uid)
            connection.close()
            return
        greeting = self._loop.create_task(self._greet(connection))
        self._greetings.add(greeting)
        greeting.add_done_callback(self._greetings.discard)

    async def _greet(self, connection: socket.socket) -> None:
        """Read the upload_id and pass the connection to that upload's thread."""
        with contextlib.ExitStack() as held:
            held.callback(connection.close)
            name = bytearray()
            try:
                async with asyncio.timeout(GREETING_S):
                    while len(name) < UPLOAD_ID_BYTES:
                        part = await self._loop.sock_recv(connection, UPLOAD_ID_BYTES - len(name))
                        if not part:
                            return
                        name += part
                upload = self._uploads.get(name.decode("ascii", "replace"))
                upload.intake.open(SocketSource(connection))
                connection.send(TAKEN)
            except (OSError, TimeoutError, KVStoreError) as error:
                log.info("an upload's connection was closed: %s", error)
                return
            held.pop_all()
            self._begin(upload)
