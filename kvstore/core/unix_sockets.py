"""Unix sockets beyond the standard library: the peer's user id, and calls that block for a limited time.

A socket with a timeout of Python's is polled before each call, which moves at most what the socket buffers, 200 KiB.
These block with a timeout in the kernel: one call moves megabytes, and the interpreter's lock is free meanwhile.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
import sys

# From macOS's sys/un.h and sys/ucred.h, missing in Python: cr_version, cr_uid, cr_ngroups, 16 groups.
_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED = 0, 1, struct.Struct("=IIh2x16I")
_UCRED = struct.Struct("=iII")  # Linux: pid, uid, gid
# The default buffer of a unix socket on macOS is 8 KiB.
_BUFFER_BYTES = 1 << 20


def peer_uid(connection: socket.socket) -> int:
    """User id of the process at the other end of a unix connection. OSError when the system does not say.

    The one place that knows how: SO_PEERCRED on Linux, LOCAL_PEERCRED on macOS.
    """
    if sys.platform == "darwin":
        packed = connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, _XUCRED.size)
        return int(_XUCRED.unpack(packed)[1])
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(packed)[1])


def block_for(connection: socket.socket, timeout_s: float) -> None:
    """Have calls block, and raise BlockingIOError when nothing moved for `timeout_s`. Enlarges the buffers."""
    connection.setblocking(True)
    fraction, seconds = math.modf(timeout_s)
    timeout = struct.pack("@ll", int(seconds), int(fraction * 1e6))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
