"""Blob files on disk: their names and the one durable write. `kvstore.engine.reading` reads them back.

`Fs` is the seam through which the engine changes the disk; tests replace it to fail, or to stop, at any call.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence

SUFFIX = ".safetensors"
TMP_SUFFIX = ".tmp"
# What a file costs on disk is counted in blocks of this size: APFS and ext4 both allocate 4 KiB units.
DISK_BLOCK_BYTES = 4096
_NAME = re.compile(r"([0-9a-f]{64})-(0|[1-9][0-9]{0,18})\.safetensors")


class Fs:
    """The system calls by which the engine changes the disk, one method each. Stateless."""

    def open(self, path: str, flags: int, mode: int) -> int:
        """os.open."""
        return os.open(path, flags, mode)

    def write(self, fd: int, data: memoryview) -> int:
        """os.write."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        """os.fsync."""
        os.fsync(fd)

    def rename(self, source: str, target: str) -> None:
        """os.rename."""
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        """os.unlink."""
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        """os.mkdir with mode 0700 under any umask."""
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)

    def fsync_dir(self, path: str) -> None:
        """fsync of a directory."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def flush_drive(self, path: str) -> None:
        """Empty the drive's own write cache, where fsync does not (macOS). It is slow: once per commit group."""
        if hasattr(fcntl, "F_FULLFSYNC"):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            finally:
                os.close(fd)

    def commit(self, commit: Callable[[], None]) -> None:
        """Run an index commit."""
        commit()

    def free_bytes(self, path: str) -> int:
        """Bytes that this user may still write on the volume."""
        info = os.statvfs(path)
        return info.f_bavail * info.f_frsize

    def free_names(self, path: str) -> int:
        """Files that this user may still create on the volume; many where it does not count them."""
        info = os.statvfs(path)
        return info.f_favail if info.f_files else 1 << 32


def disk_bytes(file_bytes: int) -> int:
    """What a file of this size costs on disk."""
    return -(-file_bytes // DISK_BLOCK_BYTES) * DISK_BLOCK_BYTES


def blob_name(key: bytes, seq: int) -> str:
    """File name of a blob. `seq` is never used twice, so a name means the same bytes forever."""
    return f"{key.hex()}-{seq}{SUFFIX}"


def parse_name(name: str) -> tuple[bytes, int] | None:
    """(key, seq) of a blob's file name; None for any other name."""
    found = _NAME.fullmatch(name)
    return (bytes.fromhex(found[1]), int(found[2])) if found else None


def write_durably(fs: Fs, path: str, parts: Sequence[memoryview], sync: bool) -> None:
    """The one way a file comes to be: tmp, length check, fsync, rename. The caller syncs the directory.

    After an exception neither the tmp file nor `path` exists, as far as the disk still lets itself be changed.
    `sync=False` leaves the fsync out. Raises OSError. Of a blob the writer does the two halves on two threads.
    """
    land(fs, path, write_unsynced(fs, path, parts), sync)


def write_unsynced(fs: Fs, path: str, parts: Sequence[memoryview]) -> int:
    """The first half: the tmp file, written in full. Its descriptor, for `land`."""
    tmp = path + TMP_SUFFIX
    fd = fs.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
        if hasattr(fcntl, "F_NOCACHE"):
            # The page cache belongs to the weights of the model that runs beside us.
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        for part in parts:
            _write_all(fs, fd, part)
        if os.fstat(fd).st_size != sum(map(len, parts)):
            raise OSError(f"{tmp}: the file is shorter than what was written to it")
    except BaseException:
        os.close(fd)
        _drop(fs, tmp)
        raise
    return fd


def land(fs: Fs, path: str, fd: int, sync: bool) -> None:
    """The second half: sync the tmp file, and give it its name. Closes the descriptor."""
    tmp = path + TMP_SUFFIX
    try:
        try:
            if sync:
                fs.fsync(fd)
        finally:
            os.close(fd)
        fs.rename(tmp, path)
    except BaseException:
        _drop(fs, tmp)
        raise


def abandon(fs: Fs, path: str, fd: int) -> None:
    """In place of the second half: close the tmp file and unlink it."""
    os.close(fd)
    _drop(fs, path + TMP_SUFFIX)


def _drop(fs: Fs, tmp: str) -> None:
    with contextlib.suppress(OSError):
        fs.unlink(tmp)


def _write_all(fs: Fs, fd: int, part: memoryview) -> None:
    done = 0
    while done < len(part):
        # No more than 1 GiB a call: macOS refuses 2 GiB.
        done += fs.write(fd, part[done : done + (1 << 30)])


def unlink_quietly(fs: Fs, paths: Iterable[str]) -> list[OSError]:
    """Unlink files; those that are gone already do not count. Returns what went wrong otherwise."""
    errors: list[OSError] = []
    for path in paths:
        try:
            fs.unlink(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            errors.append(error)
    return errors


def exclude_from_backups(folder: str) -> None:
    """Time Machine need not carry a cache. Best effort: only macOS has it."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["/usr/bin/tmutil", "addexclusion", folder], capture_output=True, timeout=10, check=False)
