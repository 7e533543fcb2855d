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
import threading
from collections.abc import Callable

from kvstore.core.unix_sockets import block_for, peer_uid
from kvstore.errors import DirectoryError, KVStoreError
from kvstore.server.storing.uploads import Upload, Uploads

log = logging.getLogger(__name__)

# Sent to the worker over its connection: the upload is accepted; all bytes were received.
CONFIRMED = b"\1"
# A thread that waits for a worker wakes this often. Bytes received since the last time count as progress.
LOOK_UP_S = 1.0
# Upper bound of one receive call, so that progress is seen during a continuous upload too.
RECEIVE_BYTES = 4 << 20
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
                source = SocketSource(connection)
                upload.intake.open(source)
            except (OSError, TimeoutError, KVStoreError) as error:
                log.info("an upload's connection was closed: %s", error)
                return
            held.pop_all()
            source.confirm()
            # Also for a worker that has gone by now: an open upload never counts as idle, so its thread must end it.
            self._begin(upload)


class SocketSource:
    """A connection that has been greeted: from now on it carries only the upload's bytes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._is_reading = self._is_closed = False
        block_for(connection, LOOK_UP_S)

    def readinto(self, view: memoryview) -> int | None:
        """See `UploadSource`. OSError when the connection breaks."""
        with self._lock:
            self._is_reading = not self._is_closed
        if not self._is_reading:
            return 0
        try:
            return self._connection.recv_into(view[:RECEIVE_BYTES], 0, socket.MSG_WAITALL)
        except BlockingIOError:
            return None
        finally:
            with self._lock:
                self._is_reading = False
                if self._is_closed:
                    self._connection.close()

    def confirm(self) -> None:
        """See `UploadSource`. Also when the upload is accepted."""
        with contextlib.suppress(OSError):  # the worker has gone
            self._connection.send(CONFIRMED)

    def close(self) -> None:
        """See `UploadSource`. If a thread is reading, that thread closes the descriptor afterwards."""
        with self._lock:
            self._is_closed = True
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            if not self._is_reading:
                self._connection.close()
