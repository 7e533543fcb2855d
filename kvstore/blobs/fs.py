"""The system calls by which kvstore changes the disk: the seam at which tests make them fail, or stop.

And the one way to look at files that another thread, process or person may have removed since they were listed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kvstore.blobs.protocol import NUMBER_END, TMP_SUFFIX, Room, disk_bytes


class Fs:
    """One method for each system call. Stateless; any thread."""

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

    def rmdir(self, path: str) -> None:
        """os.rmdir."""
        os.rmdir(path)

    def mkdir(self, path: str) -> None:
        """os.mkdir with mode 0700 under any umask."""
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)

    def fsync_dir(self, path: str) -> None:
        """fsync of a directory."""
        with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.fsync(fd)

    def flush_drive(self, path: str) -> None:
        """Empty the drive's own write cache, where fsync does not (macOS). It is slow: once per commit group."""
        if hasattr(fcntl, "F_FULLFSYNC"):
            with opened(path, os.O_RDONLY) as fd:
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)

    def commit(self, commit: Callable[[], None]) -> None:
        """Run an index commit."""
        commit()

    def room(self, path: str) -> Room:
        """Free bytes and files of the volume for this user. Some volumes do not count files."""
        info = os.statvfs(path)
        return Room(info.f_bavail * info.f_frsize, info.f_favail if info.f_files else NUMBER_END)


@contextlib.contextmanager
def opened(path: str | Path, flags: int) -> Iterator[int]:
    """The descriptor of a file that is there, closed at the end."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


class PendingFile:
    """A temporary file that is written in full. See `protocol.Pending`."""

    def __init__(self, fs: Fs, path: str, fd: int, sync: bool) -> None:
        self._fs = fs
        self._path = path
        self._fd = fd
        self._sync = sync

    def sync(self) -> None:
        """Sync the file and close it."""
        try:
            if self._sync:
                self._fs.fsync(self._fd)
        except BaseException:
            self.abandon()
            raise
        self._close()

    def rename(self) -> None:
        """Rename the file to its name. The directory is the caller's to sync."""
        try:
            self._fs.rename(self._path + TMP_SUFFIX, self._path)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Close the file and unlink it."""
        self._close()
        _drop(self._fs, self._path + TMP_SUFFIX)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def write_pending(fs: Fs, path: str, parts: Iterable[memoryview], sync: bool) -> PendingFile:
    """The first half of the one way in which a file comes to be: a temporary file, written in full, its length checked.

    After an exception the temporary file is gone, as far as the disk still lets itself be changed. Raises OSError.
    """
    tmp = path + TMP_SUFFIX
    fd = fs.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
        if hasattr(fcntl, "F_NOCACHE"):
            # The page cache belongs to the weights of the model that runs beside us.
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        expected = 0
        for part in parts:
            expected += len(part)
            _write_all(fs, fd, part)
        if os.fstat(fd).st_size != expected:
            raise OSError(f"{tmp}: the file is shorter than what was written to it")
    except BaseException:
        os.close(fd)
        _drop(fs, tmp)
        raise
    return PendingFile(fs, path, fd, sync)


def write_durably(fs: Fs, path: str, data: bytes, sync: bool) -> None:
    """A whole small file at once: temporary file, length check, fsync unless `sync` is False, rename. Raises OSError.

    Only this process writes it. The caller syncs the directory.
    """
    unlink_quietly(fs, [path + TMP_SUFFIX])  # of an attempt that a kill ended
    pending = write_pending(fs, path, [memoryview(data)], sync)
    pending.sync()
    pending.rename()


def replace_file(path: Path, data: bytes, sync: bool) -> None:
    """Replace a small file, folder synced; the old one stays if it fails. Raises OSError."""
    fs = Fs()
    write_durably(fs, str(path), data, sync)
    if sync:
        fs.fsync_dir(str(path.parent))


def entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """What is in a folder; nothing if there is no such folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as found:
        yield from found


def info_of(path: str | Path) -> os.stat_result | None:
    """lstat of a path; None if nothing is there, or not any more: a file may go after it was listed."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def still_there(paths: Iterable[str | Path]) -> Iterator[tuple[str, os.stat_result]]:
    """Each path with its `info_of`; paths at which nothing is are left out."""
    for path in paths:
        if (info := info_of(path)) is not None:
            yield str(path), info


def taken_bytes(paths: Iterable[str | Path]) -> int:
    """Bytes on disk of files, and of folders without what is in them. What is gone takes none."""
    return sum(info.st_blocks * 512 for path in paths if (info := info_of(path)) is not None)


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


def takes_writes(fs: Fs, path: str) -> bool:
    """Whether a file can be written here, synced and removed."""
    try:
        fd = fs.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fs.write(fd, memoryview(bytes(disk_bytes(1))))
            fs.fsync(fd)
        finally:
            os.close(fd)
            fs.unlink(path)
    except OSError:
        return False
    return True


def sync_tree(fs: Fs, top: str) -> None:
    """Sync every file and folder below `top`, of what was written without. Links are not followed. Raises OSError."""
    for folder, _, names in os.walk(top, topdown=False):
        for path, info in still_there(os.path.join(folder, name) for name in names):
            if not stat.S_ISREG(info.st_mode):
                continue
            with contextlib.suppress(FileNotFoundError), opened(path, os.O_RDONLY | os.O_NOFOLLOW) as fd:
                fs.fsync(fd)
        fs.fsync_dir(folder)


def exclude_from_backups(folder: str) -> None:
    """Time Machine need not carry a cache. Best effort: only macOS has it."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(["/usr/bin/tmutil", "addexclusion", folder], capture_output=True, timeout=10, check=False)


def _drop(fs: Fs, tmp: str) -> None:
    with contextlib.suppress(OSError):
        fs.unlink(tmp)


def _write_all(fs: Fs, fd: int, part: memoryview) -> None:
    done = 0
    while done < len(part):
        # No more than 1 GiB a call: macOS refuses 2 GiB.
        done += fs.write(fd, part[done : done + (1 << 30)])
