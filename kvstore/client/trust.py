"""Checks that the daemon behind a unix socket is ours, before each call: prompts and salts go to no one else.

As ssh does with its key files. Every directory on the way to the socket, and every link, must belong to us or to root,
so that no other user can put a socket of their own in its place:

    directories   not writable by group or others; above the socket's own directory a sticky one (/tmp) will do
    socket        ours or root's, not writable by group or others
    peer          the process that listens runs as us or as root: asked of the kernel through a connection of its own,
                  once for each socket

Which groups are trusted is not known here, so a directory that its group can write to is refused: chmod g-w, or listen
elsewhere. gRPC connects by itself, at any time, therefore the way to the socket is checked before every call: one
lstat for each name in the path.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
import threading
import time
from pathlib import Path

from kvstore.core.unix_sockets import peer_uid
from kvstore.errors import UnavailableError, UntrustedError

log = logging.getLogger(__name__)

LINKS_MAX = 40
PROBE_S = 0.05
# The same complaint is logged again after this; each fetch would repeat it.
COMPLAIN_EVERY_S = 60.0

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def not_responding(target: str) -> str:
    """Message for a daemon that exists but does not answer; another one is used if there is no daemon."""
    return f"the daemon at {target} is not responding: it is stopped, or its machine is very busy"


class SocketGuard:
    """Decides for one socket path whether calls may be made. Any thread may call; nothing blocks over `PROBE_S`."""

    def __init__(self, path: str, address: str = "") -> None:
        """`address`: what people know this socket by, if that is not the path."""
        self._path = path
        self._address = address or f"unix:{path}"
        self._lock = threading.Lock()
        self._probed: tuple[int, int, int] | None = None
        self._complained = ("", 0.0)

    @property
    def identity(self) -> tuple[int, int, int] | None:
        """Which socket was found good last: a daemon that was restarted has another. None before the first."""
        return self._probed

    def check(self) -> None:
        """Return when the socket and its daemon are trusted, or when there is no socket in a directory that is.

        Raises UntrustedError, logged as a warning, and UnavailableError if there is no socket to connect to.
        """
        try:
            found = walk(self._path)
            if found is not None and (identity := (found.st_dev, found.st_ino, found.st_ctime_ns)) != self._probed:
                self._probe()
                self._probed = identity
        except UntrustedError as error:
            self._complain(str(error))
            raise

    def _probe(self) -> None:
        """Ask the kernel who listens. The connection is closed again; nothing is sent over it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(PROBE_S)
            try:
                probe.connect(self._path)
                uid = peer_uid(probe)
            except (TimeoutError, BlockingIOError) as error:  # it listens, and takes no connections
                raise UnavailableError(not_responding(self._address)) from error
            except OSError as error:
                raise UnavailableError(f"no daemon at {self._address}; start it with: kvstore serve") from error
        if uid not in (os.geteuid(), 0):
            raise UntrustedError(f"the process that listens at {self._path} is of user id {uid}; nothing is sent to it")

    def _complain(self, message: str) -> None:
        with self._lock:
            last, at_s = self._complained
            if message == last and time.monotonic() < at_s + COMPLAIN_EVERY_S:
                return
            self._complained = message, time.monotonic()
        log.warning("the store is not used: %s", message)


def walk(path: str) -> os.stat_result | None:
    """Check everything on the way to a socket; what it is, or None when its directory is sound and has no such name.

    Follows links as the kernel does, since each of them, too, could be turned to elsewhere by its owner. Raises
    UntrustedError, and UnavailableError when a directory does not exist: another user might make it.
    """
    at, parent, links = "/", os.lstat("/"), 0
    names = [name for name in reversed(path.split("/")) if name not in ("", ".")]  # Path takes longer than the rest
    while names:
        _require_directory(at, parent, last=len(names) == 1)
        name = names.pop()
        here = f"{at}/{name}" if len(at) > 1 else f"/{name}"
        try:
            info = os.lstat(here)
        except FileNotFoundError:
            if names:
                raise UnavailableError(
                    f"no daemon at unix:{path}: there is no {here}; start it with: kvstore serve"
                ) from None
            return None
        except OSError as error:
            raise UnavailableError(f"no daemon at unix:{path}: {here}: {error.strerror}") from error
        if stat.S_ISLNK(info.st_mode):
            links += 1
            if links > LINKS_MAX:
                raise UntrustedError(f"{path} leads through more than {LINKS_MAX} links")
            _require_owner(here, info)
            target = Path(os.readlink(here))
            names.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
            if target.is_absolute():
                at, parent = "/", os.lstat("/")
        elif name == "..":
            at = os.path.dirname(at)
            parent = os.lstat(at)
        elif names:
            at, parent = here, info
        else:
            return _require_socket(here, info)
    raise UntrustedError(f"{path} is a directory, not a socket")


def _require_owner(path: str, info: os.stat_result) -> None:
    if info.st_uid not in (os.geteuid(), 0):
        raise UntrustedError(f"{path} belongs to user id {info.st_uid}, neither to {os.geteuid()} nor to root")


def _require_directory(path: str, info: os.stat_result, *, last: bool) -> None:
    """`last`: the socket itself is in it, so that other users may not even add names."""
    _require_owner(path, info)
    if info.st_mode & _OTHERS_WRITE and (last or not info.st_mode & stat.S_ISVTX):
        raise UntrustedError(
            f"other users can write to {path}, on the way to the socket; run: chmod go-w {path}, or use a socket in a "
            "directory of your own"
        )


def _require_socket(path: str, info: os.stat_result) -> os.stat_result:
    _require_owner(path, info)
    if not stat.S_ISSOCK(info.st_mode):
        raise UntrustedError(f"{path} is not a socket")
    if info.st_mode & _OTHERS_WRITE:
        raise UntrustedError(f"the socket {path} is open to other users; kvstore's own is 0600")
    return info
