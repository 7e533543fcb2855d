"""Keys of encrypted namespaces, and the encryption of index rows: AES-256-GCM with the fixed fields as AAD.

Each namespace has one data key of 32 random bytes in `<root in hex>.json`, wrapped by the master key with the root as
AAD. These files are outside the data directory, so that copies of it contain no keys. The master key is never written.
Deleting a key file makes all data of its namespace unreadable for good, copies included. The key folder is created with
the first key. If it is missing although there are encrypted blobs, it was lost, and no new key replaces a lost one.

A key file exists only while its namespace holds data. Before the first commit, and after the commit that removes the
last row, the key is in memory only, for as long as it is referenced. Otherwise a worker that only sends queries could
fill the folder with keys.

    data key     HKDF-SHA256 of it, by purpose: rows, children, blobs
    row          nonce (12 random bytes), AES-GCM of tokens and runs; AAD: the block's key and the row's fixed fields,
                 which stay readable: sizes, file, parent
    children     8 bytes of HMAC over the first 32, 64 .. tokens: no order that tells of tokens, so up to 31 tokens may
                 not be found where prompts diverge
    blob         `kvstore.blobs.encrypted`
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import stat
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvstore.blobs.fs import Fs, exclude_from_backups, opened, unlink_quietly, write_durably
from kvstore.blobs.protocol import TMP_SUFFIX
from kvstore.errors import DirectoryError, KeyMissingError, NotFoundError

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
# A file of a key has less than 200.
_FILE_BYTES_MAX = 4096
FORMAT_VERSION = 1


class NamespaceKey:
    """The subkeys of one namespace. Any thread may use it."""

    def __init__(self, data_key: bytes, wrapped: bytes) -> None:
        """`wrapped`: what its file holds."""
        self.wrapped = wrapped
        self._blobs = _derived(data_key, b"kvstore/blobs/v1")
        self._children = _derived(data_key, b"kvstore/children/v1")
        self._rows = AESGCM(_derived(data_key, b"kvstore/rows/v1"))

    def encrypt(self, plain: bytes, bound: bytes) -> bytes:
        """nonce, ciphertext and tag of a row's secret part."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._rows.encrypt(nonce, plain, bound)

    def decrypt(self, encrypted: bytes, bound: bytes) -> bytes | None:
        """The plain bytes; None when `encrypted` is something else, was changed, or belongs to another key."""
        try:
            return self._rows.decrypt(encrypted[:NONCE_BYTES], encrypted[NONCE_BYTES:], bound)
        except (InvalidTag, ValueError):
            return None

    def child_head(self, tokens: bytes) -> bytes:
        """By which a child with these leading packed tokens is found: 8 bytes that tell nothing of them."""
        return hmac.digest(self._children, tokens, "sha256")[:8]

    def blob_cipher(self, salt: bytes) -> AESGCM:
        """The cipher of one blob: no two share a key, so its chunks may count their nonces."""
        return AESGCM(hmac.digest(self._blobs, salt, hashlib.sha256))


def _derived(key: bytes, purpose: bytes) -> bytes:
    return HKDF(hashes.SHA256(), KEY_BYTES, None, purpose).derive(key)


class KeyRing:
    """The keys of one data directory. Any thread may read keys; to change them, hold the writer's lock."""

    def __init__(self, folder: Path, fs: Fs, master: bytes = b"", *, sync: bool = True) -> None:
        """Open every wrapped key. `master`: 32 bytes, or none; DirectoryError when it is not the one they need."""
        self.folder = folder
        self._fs = fs
        self._master = AESGCM(master) if master else None
        self._sync = sync
        self._lock = threading.Lock()
        self._keys: dict[bytes, NamespaceKey] = {}
        self._unwritten: weakref.WeakValueDictionary[bytes, NamespaceKey] = weakref.WeakValueDictionary()
        # Whose file may be there, in part, or not: writing or erasing it has not ended well.
        self._unsure: set[bytes] = set()
        self.has_folder = folder.is_dir()
        self.is_missing = False  # set where encrypted blobs are found without a key folder
        if self.has_folder:
            _require_private(folder)
        for path in sorted(folder.iterdir()) if self.has_folder else ():
            if path.name.endswith(TMP_SUFFIX):
                unlink_quietly(fs, [str(path)])
            elif path.suffix == ".json":
                self._load(path)

    def key(self, root: bytes) -> NamespaceKey | None:
        """The key of a namespace; None when it is not encrypted, or its key was dropped."""
        # Asked twice, for one that is written between.
        return self._keys.get(root) or self._unwritten.get(root) or self._keys.get(root)

    @property
    def roots(self) -> list[bytes]:
        """The namespaces that have a key, also if it is in memory only, or in a file that could not be removed."""
        return list({*self._keys, *self._unwritten.keys(), *self._unsure})

    @property
    def written_roots(self) -> list[bytes]:
        """The namespaces whose key has a file, or may have one."""
        return list({*self._keys, *self._unsure})

    def make(self, root: bytes) -> NamespaceKey:
        """The key of a namespace, a new one if it has none. A new key is forgotten when its last holder drops it.

        NotFoundError without a master key, KeyMissingError while the folder of keys is missing.
        """
        if self.is_missing:
            raise KeyMissingError(f"the keys of what is stored encrypted are missing: restore {self.folder}")
        if self._master is None:
            raise NotFoundError("no encryption key is configured")
        with self._lock:
            key = self.key(root)
            if key is None:
                data_key, nonce = os.urandom(KEY_BYTES), os.urandom(NONCE_BYTES)
                wrapped = self._master.encrypt(nonce, data_key, root)
                words = {"version": FORMAT_VERSION, "nonce": nonce.hex(), "wrapped": wrapped.hex()}
                key = self._unwritten[root] = NamespaceKey(data_key, json.dumps(words).encode())
            return key

    def write(self, root: bytes, key: NamespaceKey) -> None:
        """Make the key of a namespace durable, if it is not and this is the one. Raises OSError."""
        with self._lock:
            if self.key(root) is not key or (root in self._keys and root not in self._unsure):
                return
            self._make_folder()
            path = str(self._path(root))
            self._unsure.add(root)
            self._keys[root] = key
            self._unwritten.pop(root, None)
            write_durably(self._fs, path, key.wrapped, self._sync)
            self._sync_folder()
            self._unsure.discard(root)

    def unwrite(self, roots: Iterable[bytes]) -> None:
        """Unlink the key files of namespaces that no longer store anything. The keys stay in memory. Raises OSError."""
        with self._lock:
            for root in roots:
                self._erase(root)
                key = self._keys.get(root)
                if key is not None:
                    self._unwritten[root] = key
                    del self._keys[root]

    def drop(self, root: bytes) -> bool:
        """Forget a namespace's key for good, also one that was not written yet; whether there was one.

        Raises OSError when the file does not go: then it is to be dropped again.
        """
        with self._lock:
            known = [keys.pop(root, None) for keys in (self._keys, self._unwritten)]
            if not any(known) and root not in self._unsure and not self._path(root).exists():
                return False
            self._erase(root)
            return True

    def _erase(self, root: bytes) -> None:
        """Overwrite the file, and unlink it.

        On flash and copy-on-write volumes old blocks may outlive that; what they hold is still wrapped by the master
        key.
        """
        path = self._path(root)
        self._unsure.add(root)
        with contextlib.suppress(FileNotFoundError):
            with opened(path, os.O_WRONLY | os.O_NOFOLLOW) as fd:
                os.pwrite(fd, bytes(os.fstat(fd).st_size), 0)
                os.fsync(fd)
            self._fs.unlink(str(path))
        if self.has_folder:
            self._sync_folder()
        self._unsure.discard(root)

    def is_gone(self) -> bool:
        """Whether the folder was deleted or replaced since it was seen."""
        return self.has_folder and (self.folder.is_symlink() or not self.folder.is_dir())

    def _make_folder(self) -> None:
        if self.has_folder:
            return
        for folder in (self.folder.parent, self.folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self._fs.mkdir(str(folder))
                exclude_from_backups(str(folder))
            if self._sync:
                self._fs.fsync_dir(str(folder.parent))
        self.has_folder = True

    def sync(self) -> None:
        """Sync every file of a key, also where `write` did not; what somebody has deleted cannot be. Raises OSError."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            for root in self._keys:
                with opened(self._path(root), os.O_RDONLY | os.O_NOFOLLOW) as fd:
                    self._fs.fsync(fd)
            if self._keys:
                self._fs.fsync_dir(str(self.folder))

    def _sync_folder(self) -> None:
        if self._sync:
            self._fs.fsync_dir(str(self.folder))

    def _load(self, path: Path) -> None:
        if self._master is None:
            raise DirectoryError(
                f"{path} belongs to an encrypted namespace and no encryption key is configured: set encryption_key, or "
                "delete that file, and with it all that the namespace holds"
            )
        try:
            text = _read(path)
            if not text.strip(b"\0"):
                self._fs.unlink(str(path))  # dropped, when the machine stopped before the name was gone
                return
            words = json.loads(text)
            root = bytes.fromhex(path.stem)
            nonce, wrapped = bytes.fromhex(words["nonce"]), bytes.fromhex(words["wrapped"])
            if words["version"] != FORMAT_VERSION:
                raise DirectoryError(f"{path} was written by a newer kvstore")
            self._keys[root] = NamespaceKey(self._master.decrypt(nonce, wrapped, root), text)
        except InvalidTag:
            raise DirectoryError(
                f"{path} was not made with the configured encryption key: configure the one it was made with, or "
                "delete that file, and with it all that the namespace holds"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DirectoryError(f"{path} cannot be read: {error}") from error

    def _path(self, root: bytes) -> Path:
        return self.folder / f"{root.hex()}.json"


def _require_private(folder: Path) -> None:
    info = folder.lstat()
    if stat.S_IMODE(info.st_mode) & 0o077 or info.st_uid != os.geteuid():
        raise DirectoryError(f"{folder} holds keys and can be reached by other users: run: chmod 700 {folder}")


def _read(path: Path) -> bytes:
    """A small file; of a link, a folder or a pipe that somebody put there an OSError, or nothing."""
    with opened(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as fd:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError("it is not a file")
        return os.read(fd, _FILE_BYTES_MAX)
