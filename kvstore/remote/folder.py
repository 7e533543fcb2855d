"""An object store in a folder, which is usually a mounted share.

    <folder>/kvstore-remote.json                 the marker
    <folder>/<name>                              an object; `/` in its name makes folders
    <folder>/<name>.<16 hex digits>.tmp          being written; `names` never gives it, `sweep` removes it

The folder is opened by every call, and everything below it is reached through that descriptor. Where the marker is not
in the folder that was opened nothing is written: a share that is unmounted in the middle of a call fails, and the empty
mount point is not filled.

An object gets its name by rename. Creation by hard link would refuse an existing name atomically, but SMB and exFAT
have no hard links. So the check for an existing object comes before the rename: of two writers of one name at the same
moment the later one stays, and both were told that theirs was created.

The system cannot cancel a call on a share that hangs. Calls therefore run on `THREADS_MAX` threads. A call that passes
its deadline keeps its thread until the system returns; when all are held so, calls fail at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

from kvstore.blobs.protocol import TMP_SUFFIX
from kvstore.blobs.readers import Readers
from kvstore.core.breaker import Deadline
from kvstore.errors import KVStoreError, ObjectChangedError, RemoteError
from kvstore.remote.object_store import (
    MARKER,
    MARKER_TEXT,
    PAGE_NAMES_MAX,
    ByteRange,
    Head,
    Listed,
    Wanted,
    full,
    is_name,
    only,
    require_name,
    unmarked,
)

THREADS_MAX = 4
# No more than 1 GiB a call: macOS refuses 2 GiB.
_IO_BYTES_MAX = 1 << 30
_OPEN_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
# Who else may read is up to the share, its accounts and the umask; those outside the group never may.
_FILE_MODE, _FOLDER_MODE = 0o660, 0o770

T = TypeVar("T")


class FolderStore:
    """See the module. `readers` are the threads; tests give their own."""

    def __init__(self, folder: str, readers: Readers | None = None) -> None:
        self.place = f"the remote folder {folder}"
        self._folder = folder
        self._readers = readers or Readers(THREADS_MAX, "kvstore-remote")

    @property
    def stuck(self) -> int:
        """Threads that are held by calls which do not return."""
        return self._readers.stuck

    def create(self, name: str, parts: Sequence[memoryview], deadline: Deadline) -> bool:
        """A temporary file, written and synced, then renamed."""
        require_name(name)
        return self._run(lambda root: self._create(root, name, parts), deadline)

    def head(self, names: Sequence[str], deadline: Deadline) -> list[Head | None]:
        """stat."""

        def heads(root: int) -> list[Head | None]:
            found = [_head_of(_stat(root, require_name(name))) for name in names]
            if not any(found):
                self._require_mark(root)  # nothing is there: of a mount point that says nothing of the share
            return found

        return self._run(heads, deadline)

    def read(self, name: str, etag: str, ranges: Sequence[ByteRange], deadline: Deadline) -> list[memoryview]:
        """As `read_all`."""
        return only(self.read_all([Wanted(name, etag, ranges)], deadline))

    def read_all(self, wanted: Sequence[Wanted], deadline: Deadline) -> list[list[memoryview] | KVStoreError]:
        """pread, of several objects and of parts of large ones side by side on the threads."""
        for one in wanted:
            require_name(one.name)
        deadline.check()
        self._readers.require_free()
        begun = [
            [self._readers.start(self._opened(self._reading(one, ranges, deadline))) for ranges in _spread(one.ranges)]
            for one in wanted
        ]
        return [self._read_by(jobs, deadline) for jobs in begun]

    def _reading(
        self, wanted: Wanted, ranges: Sequence[ByteRange], deadline: Deadline
    ) -> Callable[[int], list[memoryview]]:
        def read(root: int) -> list[memoryview]:
            deadline.check()
            return self._read(root, wanted._replace(ranges=ranges))

        return read

    def _read_by(self, jobs: Sequence[Future[list[memoryview]]], deadline: Deadline) -> list[memoryview] | KVStoreError:
        """What these read of one object; each is waited for, or given up."""
        found: list[memoryview] = []
        failed: KVStoreError | None = None
        for job in jobs:
            try:
                self._readers.wait(job, deadline.left_s)
                found += job.result()
            except KVStoreError as error:
                failed = failed or error
        return found if failed is None else failed

    def names(self, prefix: str, after: str, deadline: Deadline) -> list[Listed]:
        """Walk of the folders that the page can lie in."""

        def page(root: int) -> list[Listed]:
            found: list[Listed] = []
            for one in _walk(root, "", prefix, after):
                found.append(one)
                if len(found) == PAGE_NAMES_MAX:
                    break
            if not found:
                self._require_mark(root)
            return found

        return self._run(page, deadline)

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        """Unlink, and remove the folders that are empty then."""

        def unlink(root: int) -> None:
            self._require_mark(root)
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(require_name(name), dir_fd=root)
            for folder in sorted({name.rpartition("/")[0] for name in names}, reverse=True):
                with contextlib.suppress(OSError):
                    while folder:
                        os.rmdir(folder, dir_fd=root)
                        folder = folder.rpartition("/")[0]

        self._run(unlink, deadline)

    def mark(self, deadline: Deadline) -> bool:
        """The folder is made if it is missing; the folder above it is not."""

        def make(root: int) -> bool:
            if _stat(root, MARKER) is not None:
                return False
            _write(root, MARKER, [memoryview(MARKER_TEXT)])
            return True

        return self._run(make, deadline, create=True)

    def require_mark(self, deadline: Deadline) -> None:
        """stat of the marker."""
        self._run(self._require_mark, deadline)

    def sweep(self, older_s: float, deadline: Deadline) -> int:
        """Unlink temporary files by their times."""

        def unlink(root: int) -> int:
            self._require_mark(root)
            before_s, gone = time.time() - older_s, 0
            for path in list(_leftovers(root, "")):
                with contextlib.suppress(FileNotFoundError):
                    if os.stat(path, dir_fd=root, follow_symlinks=False).st_mtime <= before_s:
                        os.unlink(path, dir_fd=root)
                        gone += 1
            return gone

        return self._run(unlink, deadline)

    def _run(self, work: Callable[[int], T], deadline: Deadline, create: bool = False) -> T:
        deadline.check()
        return self._readers.run(self._opened(work, create), deadline.left_s)

    def _opened(self, work: Callable[[int], T], create: bool = False) -> Callable[[], T]:
        """`work` with the folder opened, for a thread of ours; what the system raises becomes ours."""

        def opened() -> T:
            try:
                root = _open_folder(self._folder, create)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise (self._not_made(error) if create else unmarked(self.place)) from error
            except OSError as error:
                raise self._failed(error) from error
            try:
                return work(root)
            except OSError as error:
                raise self._failed(error) from error
            finally:
                os.close(root)

        return opened

    def _not_made(self, error: OSError) -> RemoteError:
        """Why the folder cannot be marked. What is above it is not made: it may be a share that is not mounted."""
        if isinstance(error, NotADirectoryError):
            return RemoteError(f"{self.place}: it, or what is above it, is a file; name a folder in `remote`")
        above = os.path.dirname(self._folder)
        return RemoteError(f"{self.place}: there is no folder {above}; mount the share, or make that folder first")

    def _failed(self, error: OSError) -> RemoteError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return full(self.place, os.strerror(error.errno))
        return RemoteError(f"{self.place}: {error.strerror or error}")

    def _require_mark(self, root: int) -> None:
        if _stat(root, MARKER) is None:
            raise unmarked(self.place)

    def _create(self, root: int, name: str, parts: Sequence[memoryview]) -> bool:
        self._require_mark(root)
        if _stat(root, name) is not None:
            return False
        folder = ""
        for step in name.split("/")[:-1]:
            folder = f"{folder}{step}/"
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, _FOLDER_MODE, dir_fd=root)
        return _write(root, name, parts)

    def _read(self, root: int, wanted: Wanted) -> list[memoryview]:
        name = wanted.name
        try:
            fd = os.open(name, _OPEN_READ, dir_fd=root)
        except (FileNotFoundError, NotADirectoryError) as error:
            self._require_mark(root)
            raise ObjectChangedError(f"{self.place}: {name} is gone") from error
        try:
            head = _head_of(os.fstat(fd))
            if head is None or head.etag != wanted.etag:
                raise ObjectChangedError(f"{self.place}: {name} is another object by now")
            return [_pread(fd, one, head.nbytes, name) for one in wanted.ranges]
        finally:
            os.close(fd)


def _spread(ranges: Sequence[ByteRange]) -> list[Sequence[ByteRange]]:
    """The ranges of an object in order, in as many groups as there are threads."""
    size = -(-len(ranges) // THREADS_MAX) or 1
    return [ranges[at : at + size] for at in range(0, len(ranges), size)] or [[]]


def _open_folder(folder: str, create: bool) -> int:
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, _FOLDER_MODE)
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _stat(root: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=root, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _head_of(info: os.stat_result | None) -> Head | None:
    """Size and time of change tell objects of one name apart. Inode numbers do not: some shares make them up."""
    if info is None or not stat.S_ISREG(info.st_mode):
        return None
    return Head(f"{info.st_size:x}-{info.st_mtime_ns:x}", info.st_size)


def _write(root: int, name: str, parts: Sequence[memoryview]) -> bool:
    """Write a file and give it its name, unless that is taken by then; whether it got it. Nothing else stays."""
    tmp = f"{name}.{secrets.token_hex(8)}{TMP_SUFFIX}"
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE, dir_fd=root)
    try:
        try:
            for part in parts:
                done = 0
                while done < len(part):
                    done += os.write(fd, part[done : done + _IO_BYTES_MAX])
            if os.fstat(fd).st_size != sum(map(len, parts)):
                raise OSError(errno.EIO, "the file is shorter than what was written to it")
            os.fsync(fd)
        finally:
            os.close(fd)
        if _stat(root, name) is not None:
            os.unlink(tmp, dir_fd=root)
            return False
        os.rename(tmp, name, src_dir_fd=root, dst_dir_fd=root)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(tmp, dir_fd=root)
        raise
    return True


def _pread(fd: int, one: ByteRange, file_bytes: int, name: str) -> memoryview:
    if one.offset < 0 or one.nbytes < 0 or one.offset + one.nbytes > file_bytes:
        raise RemoteError(f"{name}: a range ends beyond the object")
    data = memoryview(bytearray(one.nbytes))
    done = 0
    while done < one.nbytes:
        count = os.preadv(fd, [data[done : done + _IO_BYTES_MAX]], one.offset + done)
        if not count:
            raise ObjectChangedError(f"{name} became shorter while it was read")
        done += count
    return data


def _entries(root: int, folder: str) -> list[tuple[str, os.DirEntry[str]]]:
    """(path below the root, with a slash at its end for a folder; entry), in the order of names."""
    try:
        fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        with os.scandir(fd) as entries:
            found = [
                (f"{folder}{one.name}/" if one.is_dir(follow_symlinks=False) else folder + one.name, one)
                for one in entries
            ]
    finally:
        os.close(fd)
    return sorted(found, key=lambda pair: pair[0])


def _walk(root: int, folder: str, prefix: str, after: str) -> Iterator[Listed]:
    for path, _ in _entries(root, folder):
        if path.endswith("/"):
            is_wanted = path.startswith(prefix) or prefix.startswith(path)
            if is_wanted and (path > after or after.startswith(path)) and is_name(path[:-1]):
                yield from _walk(root, path, prefix, after)
        elif path.startswith(prefix) and path > after and is_name(path) and path != MARKER:
            if path.endswith(TMP_SUFFIX):
                continue
            info = _stat(root, path)
            head = _head_of(info)
            if info is not None and head is not None:
                yield Listed(path, head, info.st_mtime)


def _leftovers(root: int, folder: str) -> Iterator[str]:
    for path, _ in _entries(root, folder):
        if path.endswith("/") and is_name(path[:-1]):
            yield from _leftovers(root, path)
        elif path.endswith(TMP_SUFFIX) and is_name(path):
            yield path
