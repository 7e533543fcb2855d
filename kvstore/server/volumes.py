"""On which volume the data directory is, remembered outside of it, so that it is never made anew on the disk beneath.

A mount point without its volume is a plain folder, and often one that can be written to; all that could tell what is
missing there is on the volume. So a start that went well writes down, beside the socket, where the volume was mounted,
and a start that finds nothing mounted there refuses. A daemon that begins anew knows the device that it began on.

    <directory of the socket>/volumes.json   {data directory: mount point of its volume}, 0600, the newest last

Written down is only what is on another device than the record, which else would be gone together with it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvstore.config import KEYS, Config, parse_address
from kvstore.config.private_files import read_private, require_private_directory, write_private
from kvstore.errors import DirectoryError

RECORD = "volumes.json"
RECORDS_MAX = 64
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A device, and where it is mounted."""

    device: int
    volume: Path


def place_of(path: Path) -> Place:
    """Where a path is, or would be if it were made now."""
    found = Path(os.path.realpath(path))
    while not os.path.exists(found):
        found = found.parent
    device = _device(found)
    while not os.path.ismount(found):
        found = found.parent
    return Place(device, found)


def _device(path: Path) -> int:
    return os.stat(path).st_dev


def require_volume(config: Config, began: Place | None = None) -> None:
    """DirectoryError when the volume of the data directory is not mounted now. `began`: where this process had it."""
    data_dir = config.data_dir
    here = place_of(data_dir)
    # One that was plugged in again may have another number at the same place.
    if began is not None and here.device != began.device and here.volume != began.volume:
        raise DirectoryError(
            f"the volume {began.volume}, which the data directory {data_dir} was on, is no longer there: connect it"
        )
    record = _record_path(config)
    volume = _read(record).get(str(data_dir)) if record else None
    if volume is not None and not _is_mounted(volume):
        raise DirectoryError(
            f"the volume {volume}, which the data directory {data_dir} was on, is not mounted: connect it, or, if the "
            f"data directory shall be on another, delete {record}"
        )


def remember_volume(config: Config) -> Place:
    """Write down on which volume the data directory is, which must exist; where that fails, the log says so."""
    data_dir, record = config.data_dir, _record_path(config)
    place = place_of(data_dir)
    is_apart = record is None or place.device != place_of(record).device
    try:
        if record is None:
            raise DirectoryError("this user has no home directory")
        if is_apart or os.path.lexists(record):
            _note(record, str(data_dir), str(place.volume) if is_apart else None)
    except (OSError, DirectoryError) as error:
        log.warning("that %s is on the volume %s cannot be remembered: %s", data_dir, place.volume, error)
    return place


def _record_path(config: Config) -> Path | None:
    """Beside the socket; for a daemon on TCP where the socket is by default, which a user without a home has not."""
    socket = config.address.path
    with contextlib.suppress(ValueError):
        socket = socket or parse_address(KEYS["listen"].default).path
    return Path(socket).with_name(RECORD) if socket else None


def _is_mounted(volume: str) -> bool:
    with contextlib.suppress(OSError):
        os.stat(f"{volume}/.")  # has automatic mounts made
    return os.path.ismount(volume)


def _read(record: Path) -> dict[str, str]:
    if not os.path.lexists(record):
        return {}
    try:
        words = json.loads(read_private(record))
    except (ValueError, RecursionError):
        words = None
    if not isinstance(words, dict) or not all(isinstance(volume, str) for volume in words.values()):
        raise DirectoryError(
            f"{record} should say which data directories are on which volumes, and does not: delete it"
        )
    return words


def _note(record: Path, data_dir: str, volume: str | None) -> None:
    """Change one entry; those of directories that were deleted from the same volume go. Others may be long away."""
    folder = record.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    require_private_directory(folder, "listen on a socket in one of your own")
    with _locked(folder) as fd:
        known = _read(record)
        noted = {
            path: mount
            for path, mount in known.items()
            if path != data_dir and (mount != volume or os.path.lexists(path))
        }
        if volume is not None:
            noted[data_dir] = volume
        if noted != known:
            tmp = record.with_suffix(".tmp")
            tmp.unlink(missing_ok=True)
            write_private(tmp, json.dumps(dict(list(noted.items())[-RECORDS_MAX:])).encode())
            tmp.replace(record)
            os.fsync(fd)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """For this process alone: daemons with other sockets write here, too."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
    finally:
        os.close(fd)
