"""The address that a daemon listens on: its sockets, the lock beside them, and who may reach them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc.aio

from kvstore.config import Config
from kvstore.config.credentials import CredentialFiles
from kvstore.config.private_files import require_private_directory
from kvstore.errors import DirectoryError, DirectoryHeldError
from kvstore.server.calls.authorize import tls_credentials
from kvstore.server.storing.upload_socket import UploadSocket
from kvstore.wire.convert import channel_options

# A connection that does not finish its handshakes, or that is idle, must not keep its place.
HANDSHAKE_MS = 10_000
IDLE_MS = 300_000


def socket_paths(config: Config) -> list[Path]:
    """The unix sockets of an address: that of workers, that on which admins always find a place, that for uploads."""
    address = config.address
    return [Path(address.path), Path(address.admin_path), Path(address.upload_path)] if address.path else []


def connection_options(config: Config, connections_max: int) -> list[tuple[str, int]]:
    """gRPC's own limits on messages, on connections to each address and on the calls of each connection."""
    return [
        *channel_options(config.limits.message_bytes_max),
        ("grpc.max_concurrent_streams", config.limits.connection_calls_max),
        ("grpc.max_allowed_incoming_connections", connections_max),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
    ]


def bind(server: grpc.aio.Server, config: Config, files: CredentialFiles) -> None:
    """Bind the address and, beside a unix socket, the one for admins. With TLS where there is a certificate.

    DirectoryError names an address that is taken.
    """
    tls = tls_credentials(files)
    for target in [f"unix:{path}" for path in socket_paths(config)[:2]] or [config.address.target]:
        try:
            port = server.add_secure_port(target, tls) if tls else server.add_insecure_port(target)
        except RuntimeError as error:
            raise DirectoryError(f"cannot listen on {target}: {error}") from error
        if not port:
            raise DirectoryError(f"cannot listen on {target}: the address is taken")


def receive_by_socket(receiving: UploadSocket, config: Config) -> UploadSocket:
    """Listen for uploads beside the unix socket, if there is one, once all sockets are closed to other users."""
    if config.address.path:
        receiving.bind(config.address.upload_path)
    close_sockets_to_others(config)
    receiving.listen()
    return receiving


def close_sockets_to_others(config: Config) -> None:
    """Give the sockets of an address mode 0600, and make sure of it; DirectoryError where the volume keeps no modes."""
    for path in socket_paths(config):
        with contextlib.suppress(FileNotFoundError):
            _close_to_others(path)


def _close_to_others(path: Path) -> None:
    os.chmod(path, 0o600)
    info = path.lstat()
    if not stat.S_ISSOCK(info.st_mode) or stat.S_IMODE(info.st_mode) != 0o600 or info.st_uid != os.geteuid():
        raise DirectoryError(f"the socket {path} cannot be closed to other users; listen on another volume")


@contextlib.contextmanager
def listening_place(config: Config) -> Iterator[None]:
    """Make the socket's directory safe, hold its lock, remove stale socket files, and clean up in the end.

    gRPC would bind over the socket of a running daemon without a word, so a lock beside it decides. Raises
    DirectoryHeldError when another daemon listens there, DirectoryError when the directory is open to others.
    """
    path = Path(config.address.path)
    if not config.address.path:
        yield
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_private_directory(path.parent, "listen in one of your own, such as unix:~/.kvstore/kvstore.sock")
    except OSError as error:
        raise DirectoryError(f"cannot make the socket directory {path.parent}: {error.strerror}") from error
    lock = Path(f"{path}.lock")
    fd = lock_socket(lock, config.listen)
    try:
        for one in socket_paths(config):
            if one.is_socket():
                one.unlink()
            elif one.exists() or one.is_symlink():
                raise DirectoryError(f"{one} is in the way and is not a socket; remove it or listen elsewhere")
        yield
        for one in socket_paths(config):
            one.unlink(missing_ok=True)
    finally:
        # While it is locked: a process that opened it before finds another file of this name, or none, and opens that.
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(fd)


def lock_socket(lock: Path, listen: str) -> int:
    """A descriptor of the locked file beside a socket. DirectoryHeldError while another daemon has it."""
    while True:
        try:
            fd = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DirectoryError(f"cannot open {lock}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise DirectoryHeldError(f"another daemon (pid {holder}) listens on {listen}") from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(lock)):
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
        os.close(fd)  # of a daemon that has just ended, and removed it
