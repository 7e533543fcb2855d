"""The bytes of one upload: the next so many of them into this buffer, wherever they come from.

A worker of this host sends them over a socket (`SocketSource`), any other one in chunks of a gRPC stream
(`kvstore.server.stream_in.ChunkSource`). The thread that encodes and writes an upload pulls them, and so a worker that
is faster than the disk finds itself held up, and one that is slower holds up nobody but its own thread.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from kvstore.core.unix_sockets import block_for
from kvstore.errors import DeadlineError, InvalidRequestError, KVStoreError, NotFoundError

# What a worker hears over its connection: the upload is taken, and all of it was received.
TAKEN = RECEIVED = b"\1"
# How often a thread that waits for a worker looks up. What it has received by then counts as progress.
LOOK_UP_S = 1.0
# Most bytes of one call: so progress is seen even of an upload that is never out of bytes.
RECEIVE_BYTES = 4 << 20


class Source(Protocol):
    """Where the bytes of an upload come from. One thread reads; any may close."""

    def readinto(self, view: memoryview) -> int | None:
        """Bytes put at the beginning of `view`: 0 at the end, None when nothing came for `LOOK_UP_S`."""

    def confirm(self) -> None:
        """All bytes are here: let the worker know."""

    def close(self) -> None:
        """Take no more bytes, and let the worker know. Whoever reads is woken. Safe to call twice."""


class SocketSource:
    """A connection of which all that follows is the upload's bytes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._is_reading = self._is_closed = False
        block_for(connection, LOOK_UP_S)

    def readinto(self, view: memoryview) -> int | None:
        """See `Source`. OSError when the connection breaks."""
        if not self._enter():
            return 0
        try:
            return self._connection.recv_into(view[:RECEIVE_BYTES], 0, socket.MSG_WAITALL)
        except BlockingIOError:
            return None
        finally:
            self._leave()

    def confirm(self) -> None:
        """See `Source`."""
        with contextlib.suppress(OSError):  # a worker that does not want to hear it
            self._connection.send(RECEIVED)

    def _enter(self) -> bool:
        with self._lock:
            self._is_reading = not self._is_closed
            return self._is_reading

    def _leave(self) -> None:
        with self._lock:
            self._is_reading = False
            if self._is_closed:
                self._connection.close()

    def close(self) -> None:
        """See `Source`. A descriptor is not closed under a thread that reads from it, which closes it then."""
        with self._lock:
            self._is_closed = True
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            if not self._is_reading:
                self._connection.close()


class Intake:
    """The `nbytes` of one upload. The upload's thread pulls; any thread may open, commit, give up, or look.

    Bytes in are counted, and so is the time spent waiting for the worker: the rest of an upload's time is the daemon's.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.received_bytes = 0
        self._changed = threading.Condition()
        self._source: Source | None = None
        self._error: KVStoreError | None = None
        self._committed = self._ended = False
        self._waited_s = 0.0
        self._waiting_since_s = self._moved_s = time.monotonic()

    # -- the worker's side ------------------------------------------------------------------------------------------

    def open(self, source: Source) -> None:
        """Bytes come from here. InvalidRequestError for a second source, or where none are wanted."""
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._source is not None or self._committed or not self.nbytes:
                raise InvalidRequestError("this upload takes no bytes")
            self._source = source
            self._stop_waiting()

    def commit(self) -> None:
        """The worker has sent everything and wants it stored. InvalidRequestError when it never began to send."""
        with self._changed:
            if self.nbytes and self._source is None and self._error is None:
                raise InvalidRequestError(f"the upload has 0 bytes, {self.nbytes} were asked for")
            self._committed = True
            self._changed.notify_all()

    def give_up(self, error: KVStoreError | None = None) -> None:
        """Nothing comes of the upload any more; its thread gets the error. Without effect once it has ended."""
        with self._changed:
            if self._ended or self._error is not None:
                return
            self._error = error or NotFoundError("the upload was given up")
            self._changed.notify_all()
        self._close_source()

    def cut_off(self) -> None:
        """No more bytes will come, be there enough of them or not."""
        self._close_source()

    @property
    def error(self) -> KVStoreError | None:
        """What it was given up with."""
        return self._error

    @property
    def idle_s(self) -> float:
        """For how long the worker has been waited for in vain; 0 while the daemon itself is at work."""
        since = self._waiting_since_s
        return time.monotonic() - max(since, self._moved_s) if since else 0.0

    @property
    def waited_s(self) -> float:
        """For how long the worker was waited for in all."""
        since = self._waiting_since_s
        return self._waited_s + (time.monotonic() - since if since else 0.0)

    # -- the upload's thread ----------------------------------------------------------------------------------------

    def fill(self, view: memoryview, idle_s: float) -> None:
        """The next `len(view)` bytes into it.

        Raises InvalidRequestError when there are no more, DeadlineError when nothing comes for `idle_s`, and what the
        upload was given up with.
        """
        with self._waiting():
            while view:
                got = self._read(view)
                if got:
                    self._moved_s = time.monotonic()
                    self.received_bytes += got
                    view = view[got:]
                elif got is not None:
                    raise InvalidRequestError(
                        f"the upload has {self.received_bytes} bytes, {self.nbytes} were asked for"
                    )
                elif self.idle_s >= idle_s:
                    raise DeadlineError(f"nothing came of the upload for {idle_s:g} s")

    def finish(self, idle_s: float) -> None:
        """After the last byte: InvalidRequestError when there is another one, else the worker hears of it."""
        if self._source is None:
            return
        with self._waiting():
            while (got := self._read(memoryview(bytearray(1)))) is None:
                if self.idle_s >= idle_s:
                    raise DeadlineError(f"the upload was not ended for {idle_s:g} s")
        if got:
            raise InvalidRequestError(f"the upload is longer than the {self.nbytes} bytes that were asked for")
        self._source.confirm()

    def await_commit(self) -> None:
        """Wait until the worker wants it stored, or the upload is given up, which then is raised."""
        self._close_source()  # all is here, or there is no room for the rest
        with self._waiting(), self._changed:
            self._changed.wait_for(lambda: self._committed or self._error is not None)
            if self._error is not None:
                raise self._error
            self._ended = True

    def close(self) -> None:
        """The upload is over, one way or the other."""
        self._ended = True
        self._close_source()

    def _read(self, view: memoryview) -> int | None:
        if self._error is not None:
            raise self._error
        if self._source is None:
            return 0
        try:
            got = self._source.readinto(view)
        except OSError as error:
            got = 0
            self.give_up(InvalidRequestError(f"the worker's connection broke: {error.strerror}"))
        if self._error is not None:  # meanwhile: what ended the source is no end of the bytes
            raise self._error
        return got

    def _close_source(self) -> None:
        if self._source is not None:
            self._source.close()

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waiting_since_s = time.monotonic()
        try:
            yield
        finally:
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        since, self._waiting_since_s = self._waiting_since_s, 0.0
        if since:
            self._waited_s += time.monotonic() - since
