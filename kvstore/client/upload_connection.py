"""Sends captured bytes to the daemon on the same host over its upload socket.

The path is derived from the daemon's gRPC socket, so a reply cannot redirect the bytes. It is checked like that socket:
see `trust`.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

from kvstore.client.trust import walk
from kvstore.core.unix_sockets import block_for, peer_uid
from kvstore.errors import DeadlineError, UnavailableError, UntrustedError

# IOV_MAX on Linux and macOS.
VECTORS_MAX = 1024
# Bytes of one sendmsg call: large enough that the cost of the call itself is negligible.
SEND_BYTES = 64 << 20
CONNECT_S = 5.0


class UploadConnection:
    """One upload's connection. One thread sends; any may cancel."""

    def __init__(self, path: str, upload_id: str, stall_s: float) -> None:
        """Connect and name the upload. Raises OSError if there is no socket, UntrustedError if another user owns it.

        Raises UnavailableError if the daemon does not answer. `stall_s`: longest wait of a send.
        """
        if walk(path) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(CONNECT_S)
            self._socket.connect(path)
            if (uid := peer_uid(self._socket)) not in (os.geteuid(), 0):
                raise UntrustedError(f"the process that listens at {path} is of user id {uid}; nothing is sent to it")
            self._is_taken = self._greet(upload_id)
            block_for(self._socket, stall_s)
        except BaseException as error:
            self._socket.close()
            if isinstance(error, TimeoutError):
                raise UnavailableError(f"the daemon does not answer at {path}") from error
            raise

    def _greet(self, upload_id: str) -> bool:
        """Send the upload_id. Returns whether the daemon accepts the upload."""
        try:
            self._socket.sendall(upload_id.encode())
            return bool(self._socket.recv(1))
        except (BrokenPipeError, ConnectionResetError):
            return False

    def send(self, views: Iterator[memoryview]) -> bool:
        """Send all views without copying. Returns whether the daemon received them; if not, CommitStore says why.

        Raises DeadlineError if the daemon reads nothing for `stall_s`.
        """
        batch, nbytes = list[memoryview](), 0
        if not self._is_taken:
            return False
        try:
            for view in views:
                batch.append(view)
                nbytes += view.nbytes
                if len(batch) == VECTORS_MAX or nbytes >= SEND_BYTES:
                    self._send_all(batch)
                    batch, nbytes = [], 0
            self._send_all(batch)
            self._socket.shutdown(socket.SHUT_WR)
            return bool(self._socket.recv(1))
        except BlockingIOError as error:
            raise DeadlineError("the daemon stopped reading the upload") from error
        except (BrokenPipeError, ConnectionResetError):
            return False

    def _send_all(self, views: list[memoryview]) -> None:
        pending = [view for view in views if view.nbytes]
        while pending:
            count = self._socket.sendmsg(pending)
            while pending and count >= pending[0].nbytes:
                count -= pending.pop(0).nbytes
            if count:
                pending[0] = pending[0][count:]

    def cancel(self) -> None:
        """Break off whatever the sending thread does. Any thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # not connected

    def close(self) -> None:
        """Close the descriptor. Sending thread only."""
        self._socket.close()
