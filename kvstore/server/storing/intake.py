"""Receives the bytes of one upload into buffers of the upload's thread.

A worker on this host sends them over a socket (`SocketSource`), any other worker as chunks of a gRPC stream
(`stream_in.ChunkSource`). The thread that encodes and writes the upload pulls them. So a worker that is
faster than the disk is slowed down, and a slow worker blocks only the thread of its own upload.
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

# Sent to the worker over its connection: the upload is accepted; all bytes were received.
TAKEN = RECEIVED = b"\1"
# A thread that waits for a worker wakes this often. Bytes received since the last time count as progress.
LOOK_UP_S = 1.0
# Upper bound of one receive call, so that progress is seen during a continuous upload too.
RECEIVE_BYTES = 4 << 20


class UploadSource(Protocol):
    """Where the bytes of an upload come from. One thread reads; any may close."""

    def readinto(self, view: memoryview) -> int | None:
        """Read into `view`. Returns the number of bytes; 0 at the end, None if nothing came for `LOOK_UP_S`."""

    def confirm(self) -> None:
        """Tell the worker that all bytes were received."""

    def close(self) -> None:
        """Accept no more bytes, tell the worker, and wake the reading thread. Safe to call twice."""


class SocketSource:
    """A connection that has been greeted: from now on it carries only the upload's bytes."""

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
        with contextlib.suppress(OSError):  # the worker has gone
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
        """See `Source`. If a thread is reading, that thread closes the descriptor afterwards."""
        with self._lock:
            self._is_closed = True
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            if not self._is_reading:
                self._connection.close()


class Intake:
    """The `nbytes` bytes of one upload. The upload's thread reads; any thread may call the other methods.

    Counts the received bytes and the time spent waiting for the worker. The rest of an upload's time is the daemon's.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.received_bytes = 0
        self._changed = threading.Condition()
        self._source: UploadSource | None = None
        self._error: KVStoreError | None = None
        self._committed = self._ended = False
        self._waited_s = 0.0
        self._waiting_since_s = self._moved_s = time.monotonic()

    # -- the worker's side ------------------------------------------------------------------------------------------

    def open(self, source: UploadSource) -> None:
        """Set the source of the bytes. Raises InvalidRequestError for a second source or if no bytes are wanted."""
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._source is not None or self._committed or not self.nbytes:
                raise InvalidRequestError("this upload takes no bytes")
            self._source = source
            self._stop_waiting()

    def commit(self) -> None:
        """The worker has sent everything and asks to store it. Raises InvalidRequestError if no source was opened."""
        with self._changed:
            if self.nbytes and self._source is None and self._error is None:
                raise InvalidRequestError(f"the upload has 0 bytes, {self.nbytes} were asked for")
            self._committed = True
            self._changed.notify_all()

    def give_up(self, error: KVStoreError | None = None) -> None:
        """End the upload with an error, which its thread raises. No effect once the upload has ended."""
        with self._changed:
            if self._ended or self._error is not None:
                return
            self._error = error or NotFoundError("the upload was given up")
            self._changed.notify_all()
        self._close_source()

    def cut_off(self) -> None:
        """Close the source, whether or not all bytes have come."""
        self._close_source()

    @property
    def error(self) -> KVStoreError | None:
        """The error of `give_up`; None before."""
        return self._error

    @property
    def idle_s(self) -> float:
        """Seconds without a byte while waiting for the worker; 0 while the daemon itself is at work."""
        since = self._waiting_since_s
        return time.monotonic() - max(since, self._moved_s) if since else 0.0

    @property
    def waited_s(self) -> float:
        """Total seconds spent waiting for the worker."""
        since = self._waiting_since_s
        return self._waited_s + (time.monotonic() - since if since else 0.0)

    # -- the upload's thread ----------------------------------------------------------------------------------------

    def fill(self, view: memoryview, idle_s: float) -> None:
        """Fill `view` with the next bytes.

        Raises InvalidRequestError if the upload ends early, DeadlineError if nothing comes for `idle_s`, and the error
        of `give_up`.
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
                    raise DeadlineError(f"no bytes of the upload for {idle_s:g} s; the worker may store again")

    def finish(self, idle_s: float) -> None:
        """Expect the end of the upload and confirm it to the worker. Raises InvalidRequestError if more bytes come."""
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
        """Wait for the worker's commit. Raises the error of `give_up` if the upload ends without one."""
        self._close_source()  # all bytes are here, or there is no room for the rest
        with self._waiting(), self._changed:
            self._changed.wait_for(lambda: self._committed or self._error is not None)
            if self._error is not None:
                raise self._error
            self._ended = True

    def close(self) -> None:
        """Mark the upload as over, committed or not."""
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
        if self._error is not None:  # given up during the read: 0 bytes are then not the end of the upload
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
