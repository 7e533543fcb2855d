"""The data directory: whether it may be used, what lies where in it, and who holds it.

Prompts are readable in what we store, so the directory is ours alone (0700) or it is refused. A mount point whose
volume is away holds no store, so it is refused, too (`require_store`), and never filled beneath.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import stat
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kvstore.blobs.fs import Fs, entries, exclude_from_backups, taken_bytes, write_durably
from kvstore.blobs.protocol import TMP_SUFFIX, parse_root
from kvstore.config import default_data_dir
from kvstore.errors import CorruptDataError, DirectoryError, DirectoryHeldError
from kvstore.quality import Calibrated, Verdict

# Where macOS mounts volumes; a name below it without a volume is a plain folder on the boot disk.
VOLUMES = Path("/Volumes")
_CACHEDIR_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Written by kvstore; backups may skip this directory.\n"
_LOCK_BYTES_MAX = 4096


@dataclass(frozen=True)
class Directory:
    """Names inside a data directory, and where its keys are: outside."""

    root: Path
    keys_dir: Path | None = None

    @property
    def index(self) -> Path:
        """LMDB."""
        return self.root / "index"

    @property
    def ballast(self) -> Path:
        """See `kvstore.engine.ledger.Ballast`."""
        return self.index / "ballast"

    @property
    def blobs(self) -> Path:
        """Blobs, a folder a namespace; the suffix keeps Spotlight out."""
        return self.root / "blobs.noindex"

    @property
    def quarantine(self) -> Path:
        """Damaged blobs, kept for inspection."""
        return self.root / "quarantine"

    @property
    def keys(self) -> Path:
        """Wrapped keys of encrypted namespaces, so that no copy of the data directory holds them.

        A folder in `keys_dir` (without one, in `<name>.keys` beside the data directory), named by the directory's id.
        """
        home = self.keys_dir or self.root.with_name(f"{self.root.name}.keys")
        return home / (self.root / "id").read_text().strip()

    @property
    def settings(self) -> Path:
        """State that blobs do not contain and every index rebuild must obey: tombstones, pins, quotas, TTLs."""
        return self.root / "settings"

    @property
    def quality(self) -> Path:
        """Measured losses of profiles, one file per namespace."""
        return self.root / "quality"

    def own_bytes(self) -> int:
        """Bytes on disk of the directory itself: its folders except blob folders, the lock, the tag."""
        own = [self.root, self.index, self.quarantine, self.settings, self.quality]
        own += [self.root / "lock", self.root / "id", self.root / "CACHEDIR.TAG", self.settings / "traffic.json"]
        own += [self.root / "daemon.log", self.settings / "keep.json"]
        return taken_bytes(own)

    def put_in_quarantine(self, fs: Fs, path: Path, name: str = "") -> None:
        """Move a damaged file out of the way, under another name if given; nothing if it is gone already.

        Somebody may have deleted the folder: then it is made again. DirectoryError when something else is in its place.
        """
        with contextlib.suppress(FileExistsError):
            fs.mkdir(str(self.quarantine))
        _require_folder(self.quarantine)
        with contextlib.suppress(FileNotFoundError):
            fs.rename(str(path), str(self.quarantine / (name or path.name)))


class DirectoryLock:
    """The lock on a data directory, held until `close`. Says to others who holds it; remembers how the last one ended.

    `previous` is what the last holder wrote: {} for a fresh directory, `clean` true after an orderly stop.
    """

    def __init__(self, directory: Directory) -> None:
        """Take the lock; DirectoryHeldError naming the holder if another has it."""
        self._directory = directory
        self._path = path = directory.root / "lock"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DirectoryError(f"cannot open {path}: {error.strerror}") from error
        try:
            os.fchmod(self._fd, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = self._read()
            os.close(self._fd)
            where = f" listening on {holder['socket']}" if holder.get("socket") else ""
            raise DirectoryHeldError(
                f"{directory.root} is held by the kvstore process with pid {holder.get('pid', 'unknown')}{where}"
            ) from error
        except OSError as error:
            os.close(self._fd)
            raise DirectoryError(f"{path} cannot be locked: {error.strerror}; use a local volume") from error
        self.previous = self._read()

    def write(self, clean: bool, durability: str, socket: str = "", index: str | None = None) -> None:
        """Say who holds the directory now, or that it was left in order, with this digest of the index. Durable."""
        words = {"pid": os.getpid(), "socket": socket, "durability": durability, "clean": clean, "index": index}
        text = json.dumps(words).encode() + b"\n"
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))
        os.fsync(self._fd)

    def _read(self) -> dict[str, Any]:
        text = os.pread(self._fd, _LOCK_BYTES_MAX, 0)
        if not text:
            return {}
        try:
            words = json.loads(text)
        except ValueError:
            words = None
        # A torn write says nothing about how the last holder ran, so the worst is assumed.
        return words if isinstance(words, dict) else {"clean": False, "durability": "none"}

    def is_displaced(self) -> bool:
        """Whether what was claimed is no longer at its place: deleted, moved, unmounted, in whole or in parts.

        What the names lead to now says nothing about the blobs. False if that cannot be determined.
        """
        directory = self._directory
        try:
            is_other = not os.path.samestat(self._path.lstat(), os.fstat(self._fd))
            folders = [directory.blobs, directory.settings, directory.index]
            # Nothing that is served is in quarantine: where it is missing, it is made again when it is needed.
            if os.path.lexists(directory.quarantine):
                folders.append(directory.quarantine)
            # Links are not followed: their targets do not belong to the store and must not be moved or unlinked.
            is_whole = all(stat.S_ISDIR(path.lstat().st_mode) for path in folders)
            return is_other or not is_whole or not (directory.index / "data.mdb").exists()
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Give the directory back."""
        os.close(self._fd)

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def claim(data_dir: Path, keys_dir: Path | None = None) -> tuple[Directory, DirectoryLock]:
    """Check or create the data directory, take its lock, then make what belongs in it.

    Raises DirectoryError naming cause and fix, DirectoryHeldError when another process holds it.
    """
    root = Path(os.path.abspath(data_dir))
    try:
        created = _admit(root)
        directory = Directory(root, keys_dir)
        hold = DirectoryLock(directory)
    except OSError as error:
        raise DirectoryError(f"the data directory {root} cannot be used: {error}") from error
    try:
        _furnish(directory)
        if created:
            exclude_from_backups(str(root))
    except OSError as error:
        hold.close()
        raise DirectoryError(f"the data directory {root} cannot be used: {error}") from error
    except BaseException:
        hold.close()
        raise
    return directory, hold


def require_store(data_dir: Path) -> None:
    """DirectoryError naming the fix when a directory holds no store, or when its volume is not mounted."""
    try:
        names = os.listdir(data_dir)
    except FileNotFoundError:
        names = []
    except OSError:
        return  # `claim` tells what is wrong with it
    if not {"id", "index", "blobs.noindex"}.intersection(names):
        if data_dir == default_data_dir():
            raise DirectoryError(f"no store at {data_dir}; start the daemon, which makes one: kvstore serve")
        raise DirectoryError(
            f"no store at {data_dir}; to make one: kvstore serve --create --data-dir {data_dir}; if there is one "
            "already, its volume is not mounted"
        )


def device_of(path: Path) -> int:
    """The device that a path is on, or would be on if it were made now."""
    found = Path(os.path.realpath(path))
    while True:
        try:
            return found.stat().st_dev
        except (FileNotFoundError, NotADirectoryError):
            found = found.parent


def _admit(root: Path) -> bool:
    """Refuse what is not safe, create what is missing; whether it was created."""
    _require_mounted(root)
    if root.exists():
        _require_private(root)
        return False
    if not root.parent.is_dir():
        home = Path(os.path.expanduser("~"))
        if not root.is_relative_to(home) or not home.is_dir():
            raise DirectoryError(
                f"{root.parent} does not exist: mount the volume that the data directory {root} is on, "
                f"or run: mkdir -p {root.parent}"
            )
        root.parent.mkdir(parents=True, exist_ok=True)
    Fs().mkdir(str(root))
    if stat.S_IMODE(root.stat().st_mode) != 0o700:
        root.rmdir()
        raise DirectoryError(_modeless(root))
    return True


def _require_mounted(root: Path) -> None:
    """On macOS, a path below /Volumes must be on a volume that is mounted now."""
    if root.is_relative_to(VOLUMES) and root != VOLUMES:
        volume = VOLUMES / root.relative_to(VOLUMES).parts[0]
        if not os.path.ismount(os.path.realpath(volume)):
            raise DirectoryError(f"the volume {volume} of the data directory {root} is not mounted: connect it first")


def _require_private(root: Path) -> None:
    info = root.stat()
    if not stat.S_ISDIR(info.st_mode):
        raise DirectoryError(f"{root} is not a directory")
    if info.st_uid != os.geteuid():
        raise DirectoryError(
            f"{root} belongs to user id {info.st_uid}, not to {os.geteuid()}: run kvstore as that user, "
            "or choose another data directory"
        )
    mode = stat.S_IMODE(info.st_mode)
    if mode & 0o077:
        raise DirectoryError(
            _modeless(root)
            if _keeps_no_modes(root)
            else f"{root} can be reached by other users (mode {mode:o}), and prompts are stored in it: "
            f"run: chmod 700 {root}"
        )


def _keeps_no_modes(root: Path) -> bool:
    """Whether the volume ignores modes: try it on a folder of our own."""
    probe = tempfile.mkdtemp(prefix=".probe-", dir=root)
    try:
        return bool(stat.S_IMODE(os.stat(probe).st_mode) & 0o077)
    finally:
        os.rmdir(probe)


def _modeless(root: Path) -> str:
    return (
        f"the volume of {root} does not keep file modes (FAT or exFAT), so other users could read prompts: "
        "put the data directory on APFS, ext4 or another volume with permissions"
    )


def _furnish(directory: Directory) -> None:
    fs = Fs()
    folders = (
        directory.index,
        directory.blobs,
        directory.quarantine,
        directory.quality,
        directory.settings,
    )
    for path in folders:
        with contextlib.suppress(FileExistsError):
            fs.mkdir(str(path))
        _require_folder(path)
    for entry in entries(str(directory.blobs)):
        if parse_root(entry.name) is not None and not entry.is_dir(follow_symlinks=False):
            raise DirectoryError(f"{entry.path} is not a directory")
    name = directory.root / "id"
    if not name.exists():
        write_durably(fs, str(name), os.urandom(16).hex().encode(), sync=True)
        fs.fsync_dir(str(directory.root))
    tag = directory.root / "CACHEDIR.TAG"
    if not tag.exists():
        tag.write_bytes(_CACHEDIR_TAG)
        tag.chmod(0o600)


def _require_folder(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        raise DirectoryError(f"{path} is not a directory")


log = logging.getLogger(__name__)

_NOTHING = Calibrated()


class QualityFiles:
    """`<root in hex>.json` in a folder of the data directory, all read at the start. Any thread may call.

    Nothing is remembered of a namespace that was not measured: callers may ask for as many as they can name.
    """

    def __init__(self, folder: Path, fs: Fs, *, sync: bool) -> None:
        self._folder = folder
        self._fs = fs
        self._sync = sync
        self._lock = threading.Lock()
        self._known: dict[bytes, Calibrated] = {}
        for path in folder.glob(f"*{TMP_SUFFIX}"):
            fs.unlink(str(path))
        for path in folder.glob("*.json"):
            with contextlib.suppress(ValueError):  # not a name of ours
                self._known[bytes.fromhex(path.stem)] = self._read(path)

    def results(self, root: bytes) -> dict[str, Verdict]:
        """Results of a namespace by profile. A file that cannot be read counts as none."""
        with self._lock:
            return dict(self._known.get(root, _NOTHING).results)

    def all(self, prefix: bytes = b"") -> dict[bytes, Calibrated]:
        """What was measured in every namespace whose root starts with `prefix`."""
        with self._lock:
            return {root: one for root, one in sorted(self._known.items()) if one.results and root.startswith(prefix)}

    def record(self, root: bytes, verdict: Verdict, alias: str = "", engine: str = "") -> None:
        """Keep a result in the place of the profile's last one. Durable on return; OSError if it cannot be written."""
        with self._lock:
            before = self._known.get(root, _NOTHING)
            self._write(root, Calibrated(alias, engine, before.results).with_result(verdict))

    def forget(self, prefix: bytes, profile: str = "") -> int:
        """Drop the results of `profile` (empty: of all) in namespaces whose root starts with `prefix`; how many.

        Durable on return; OSError if it cannot be written.
        """
        forgotten = 0
        with self._lock:
            for root, before in list(self._known.items()):
                after = before.without(profile)
                if root.startswith(prefix) and len(after.results) < len(before.results):
                    self._write(root, after)
                    forgotten += len(before.results) - len(after.results)
        return forgotten

    def _write(self, root: bytes, calibrated: Calibrated) -> None:
        """Replace a namespace's file, or remove it when nothing is left. The caller holds the lock."""
        path = self._folder / f"{root.hex()}.json"
        if calibrated.results:
            write_durably(self._fs, str(path), calibrated.to_json().encode(), self._sync)
        else:
            self._fs.unlink(str(path))
        if self._sync:
            self._fs.fsync_dir(str(self._folder))
        if calibrated.results:
            self._known[root] = calibrated
        else:
            del self._known[root]

    @staticmethod
    def _read(path: Path) -> Calibrated:
        try:
            return Calibrated.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, CorruptDataError) as error:
            log.warning("%s is not used: %s", path, error)
            return _NOTHING
