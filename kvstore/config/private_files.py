"""Files that must be ours alone: keys and tokens are read and made here, and nowhere else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kvstore.errors import DirectoryError

SECRET_BYTES_MAX = 1 << 20


def read_private(path: Path | str) -> bytes:
    """The bytes of a file that only its owner can read and write.

    Raises DirectoryError, naming the fix, when it is missing, not a regular file, another user's, open to others, or
    longer than SECRET_BYTES_MAX. What is checked is what was opened, so a name that is swapped meanwhile gains nothing.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hold up the start
    except OSError as error:
        raise DirectoryError(f"cannot read {path}: {error.strerror}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise DirectoryError(f"{path} is not a regular file")
        if info.st_uid != os.geteuid():
            raise DirectoryError(f"{path} belongs to user id {info.st_uid}, not to {os.geteuid()}, who would use it")
        if stat.S_IMODE(info.st_mode) & 0o077:
            raise DirectoryError(f"{path} is open to other users; run: chmod 600 {path}")
        data = os.read(fd, SECRET_BYTES_MAX + 1)
    finally:
        os.close(fd)
    if len(data) > SECRET_BYTES_MAX:
        raise DirectoryError(f"{path} has more than {SECRET_BYTES_MAX} bytes, so it is no key and no list of tokens")
    return data


def write_private(path: Path, data: bytes) -> None:
    """A new file with these bytes, 0600 under any umask; DirectoryError when the name is taken."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DirectoryError(f"cannot make {path}: {error.strerror}") from error
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def require_private_directory(path: Path, elsewhere: str) -> None:
    """DirectoryError, naming the fix, when others could enter the directory. `elsewhere`: what else to do.

    A directory that is shared is not to be closed to those who share it, so then the way out is another place.
    """
    info = path.stat()
    if info.st_uid != os.geteuid() or info.st_mode & stat.S_ISVTX:
        raise DirectoryError(f"the directory {path} is shared with other users; {elsewhere}")
    if stat.S_IMODE(info.st_mode) & 0o077:
        raise DirectoryError(f"the directory {path} is open to other users; run: chmod 700 {path}, or {elsewhere}")
