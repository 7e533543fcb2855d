"""Identity of a model folder: a digest of its weights and configuration, computed in the background.

Names are not used: two fine-tunes of one base have the same shapes and often the same folder name. The digest is

    SHA-256(tag, for each file in order of name: (name, length-prefixed; SHA-256 of its content))

over the weight shards (`*.safetensors`), `config.json` in canonical form, and what else changes the computation: the
settings of an adapter, and Python files, also the one that the configuration names, wherever it lies. In a Hugging Face
snapshot a shard is a link to a blob that is named by its own SHA-256. The name is believed at first, and checked once
in the background; a blob that was overwritten loses the folder its identity. Elsewhere hashing 60 to 400 GB takes
minutes, so each shard's hash is kept in a small file of the user's cache directory, under the shard's path, inode, size
and times, and until all are known there is no digest: the store is bypassed.

Files are half of an identity. The other half is the fingerprint of the model in memory, which no file can replace:
`identify` puts both together.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from kvstore.core.keys import Namespace
from kvstore.core.layers import Layout
from kvstore.core.thread_priority import lower_thread_priority

log = logging.getLogger(__name__)

_TAG = b"kvstore/model/v1\0"
_WEIGHTS_TAG = b"kvstore/weights/v2\0"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CACHE_SCHEMA = 1
_CONFIGS = ("config.json", "hf_quant_config.json", "adapter_config.json")
CACHE_ENTRIES_MAX = 4096
# A file that changed this recently may change again without showing it. Times have a granularity, 2 s at worst (FAT);
# and a page of a mapped file that is dirty takes further writes unseen until the kernel has written it back, by default
# within 35 s on Linux and 30 s on macOS.
SETTLED_S = 60.0
# A folder that was known a moment ago is hashed again while the caller waits, if it is no larger than this: 0.1 s.
AT_ONCE_BYTES_MAX = 32 << 20

Signature = tuple[int, int, int, int]  # inode, size, mtime_ns, ctime_ns


@dataclass(frozen=True)
class FileState:
    """Stat of one file at the time of the pin. `sha256` is known only for blobs of a Hugging Face cache."""

    name: str
    path: str
    signature: Signature
    sha256: str = ""

    def is_settled(self, at_ns: int) -> bool:
        """Whether every change after `at_ns` shows in the signature."""
        return at_ns - max(self.signature[2:]) >= SETTLED_S * 1e9


@dataclass(eq=False)
class Pin:
    """A folder held at one state. `done` is set when the digest is known, or cannot be (then it stays None)."""

    path: str
    files: tuple[FileState, ...]
    done: threading.Event = field(default_factory=threading.Event)
    digest: bytes | None = None
    settled: bool = False  # whether any change since it was hashed would show
    withdrawn: bool = False  # it is not what was loaded, or not what it said: there is no digest, now or later

    @property
    def state(self) -> tuple[str, tuple[FileState, ...]]:
        """What was looked at; known at once, and equal for a folder that did not change."""
        return self.path, self.files

    def wait(self, timeout_s: float | None = None) -> bytes | None:
        """The digest, after waiting for it for at most `timeout_s` (None: as long as it takes); None if unknown."""
        self.done.wait(timeout_s)
        return None if self.withdrawn else self.digest

    def confirm(self) -> None:
        """Check the folder again after a model was loaded from it, and withdraw the digest if it has changed.

        A folder that was replaced during the load leaves unknown which weights were read.
        """
        if _look(self.path) != self.files:
            self.withdraw(f"{self.path} was replaced while it was loaded; load it again")

    def withdraw(self, why: str) -> None:
        """Invalidate the digest for good, and log why. Any thread."""
        self.withdrawn = True
        log.warning("the store is not used: %s", why)


class WeightsDigest:
    """Digests of model and adapter folders. Any thread may call; hashing happens on a background thread, one at a time.

    A digest describes the folder at the time when it was pinned: pin the folder when the model is loaded. If a file
    changes before it is hashed, there is no digest; otherwise weights in memory could get the identity of other weights
    on disk. A digest may be withdrawn later, so read it at each use.
    """

    def __init__(self, cache_path: Path | None = None) -> None:
        self._cache = _HashCache(cache_path or Path(platformdirs.user_cache_dir("kvstore", appauthor=False)))
        self._pins: dict[str, Pin] = {}
        self._lock = threading.Lock()
        self._hashing = threading.Lock()
        self._checking = threading.Lock()
        self._read: dict[tuple[str, Signature], str] = {}  # hashes of blobs that were believed by name

    def pin(self, folder: str | Path) -> Pin:
        """Record the current state of the folder, and start to hash it unless this state is known or being hashed.

        The pin keeps the digest of this state, even if the folder changes and is pinned again.
        """
        path = os.path.realpath(folder)
        files = _look(path)
        with self._lock:
            known = self._pins.get(path)
            is_known = known and known.files == files and not known.withdrawn
            if known and is_known and (known.settled or not known.done.is_set()):
                return known
            pin = self._pins[path] = Pin(path, files)
        if not any(file.name.endswith(".safetensors") for file in files):
            log.warning("%s has no safetensors files; the store is not used for it", path)
            pin.done.set()
        elif is_known and sum(file.signature[1] for file in files) <= AT_ONCE_BYTES_MAX:
            self._work(path, pin)
        elif all(self._known(file) for file in files if file.name.endswith(".safetensors")):
            self._work(path, pin)  # only small files are read
        else:
            log.info("hashing the weights in %s; the store is bypassed until that is done", path)
            threading.Thread(target=self._work_in_turn, args=(path, pin), name="kvstore-identity", daemon=True).start()
        return pin

    def wait(self, folder: str | Path, timeout_s: float | None = None) -> bytes | None:
        """The digest of the folder as pinned (now, if it was not), None while unknown.

        Waits for the hash for at most `timeout_s`; None: as long as it takes.
        """
        path = os.path.realpath(folder)
        if path not in self._pins:
            self.pin(path)
        return self._pins[path].wait(timeout_s)

    def _work_in_turn(self, path: str, pin: Pin) -> None:
        with self._hashing:
            self._work(path, pin)

    def _work(self, path: str, pin: Pin) -> None:
        """Hash what is not known of the files. An engine's thread may call it: it waits for no other folder's hash."""
        started_ns = time.time_ns()
        try:
            digest = hashlib.sha256(_TAG)
            for file in pin.files:
                name = file.name.encode()
                digest.update(len(name).to_bytes(4, "little") + name + self._hash(file))
            if _look(path) != pin.files:
                raise ValueError(f"{path} changed while it was hashed")
            pin.settled = all(file.is_settled(started_ns) for file in pin.files)
            pin.digest = digest.digest()
        except (OSError, ValueError) as error:
            log.warning("no identity for %s, so the store is not used for it: %s", path, str(error))
        finally:
            pin.done.set()
        unread = [file for file in pin.files if pin.digest and file.sha256 and not self._proven(file)]
        if unread:
            args = (path, pin, unread)
            threading.Thread(target=self._check, args=args, name="kvstore-identity-check", daemon=True).start()

    def _check(self, path: str, pin: Pin, files: Sequence[FileState]) -> None:
        """Read blobs that were believed by name, and withdraw the digest if one is not what its name says."""
        lower_thread_priority()
        for file in files:
            try:
                with self._checking:
                    found = self._proven(file) or self._read_hash(file)
            except (OSError, ValueError) as error:
                log.info("%s was not checked: %s", file.path, str(error))
                continue
            self._read[file.path, file.signature] = found
            if found != file.sha256:
                pin.withdraw(f"{file.path} is not what its name says; load {path} again")
                return

    def _proven(self, file: FileState) -> str:
        """The SHA-256 in hex of this state of the file as it was read once, "" if it was not."""
        return self._read.get((file.path, file.signature)) or self._cache.get(file)

    def _known(self, file: FileState) -> str:
        return self._proven(file) or file.sha256

    def _hash(self, file: FileState) -> bytes:
        return bytes.fromhex(self._known(file) or self._read_hash(file))

    def _read_hash(self, file: FileState) -> str:
        """The SHA-256 in hex of what the file holds, remembered for weights. ValueError if the file has changed."""
        started_ns = time.time_ns()
        with Path(file.path).open("rb") as stream:
            before = _signature(os.fstat(stream.fileno()))
            if file.name == "config.json":
                found = hashlib.sha256(_canonical(stream.read()))
            else:
                found = hashlib.file_digest(stream, "sha256")
            after = _signature(os.fstat(stream.fileno()))
        if not file.signature == before == after:
            raise ValueError(f"{file.path} changed after the model was loaded")
        if file.name.endswith(".safetensors"):
            self._cache.put(file, found.hexdigest(), started_ns)
        return found.hexdigest()


def _look(folder: str) -> tuple[FileState, ...]:
    """The files that decide what a model (or, without config.json, an adapter) computes, in order of name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ()
    if "config.json" in names:
        chosen = [n for n in names if n.endswith((".safetensors", ".py")) or n in _CONFIGS]
        chosen = sorted({*chosen, *_model_code(folder)})
    else:
        # Training leaves numbered checkpoints beside the adapter; they are not loaded.
        chosen = [n for n in names if n in ("adapters.safetensors", "adapter_config.json")]
    return tuple(state for name in chosen if (state := _file_state(folder, name)))


def _model_code(folder: str) -> list[str]:
    """Names, from `folder`, of the Python file that the configuration names as the model, and of those beside it."""
    try:
        named = json.loads((Path(folder) / "config.json").read_bytes())["model_file"]
        beside = os.path.dirname(named)
        found = [os.path.join(beside, one) for one in os.listdir(os.path.join(folder, beside)) if one.endswith(".py")]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # none is named, or what is named is not there; a configuration that is not JSON fails later
    return [*found, named]


def _file_state(folder: str, name: str) -> FileState | None:
    try:
        real = os.path.realpath(os.path.join(folder, name))
        status = os.stat(real)
    except (OSError, ValueError):  # a name that no file can have
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    parent, blob = os.path.split(real)
    is_blob = os.path.basename(parent) == "blobs" and _SHA256.fullmatch(blob) and name.endswith(".safetensors")
    return FileState(name, real, _signature(status), blob if is_blob else "")


def _signature(status: os.stat_result) -> Signature:
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _canonical(config: bytes) -> bytes:
    """The same bytes for the same configuration, however it was written. ValueError when it is not JSON."""
    return json.dumps(json.loads(config), sort_keys=True, separators=(",", ":")).encode()


class _HashCache:
    """Hashes of weight files in `identity.json`, replaced as a whole. Any thread; a lost update costs a hash."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "identity.json"
        self._lock = threading.Lock()

    def get(self, file: FileState) -> str:
        """The SHA-256 in hex that is on record for this very state of the file, "" when there is none."""
        signature, sha256 = self._read().get(file.path, (None, ""))
        return sha256 if signature == list(file.signature) else ""

    def put(self, file: FileState, sha256: str, started_ns: int) -> None:
        """Record a hash begun at `started_ns`, unless the file was so young then that a change might not show since.

        Failing to record is no failure.
        """
        if not file.is_settled(started_ns):
            return
        with self._lock:
            entries = self._read()
            entries.pop(file.path, None)
            entries[file.path] = (list(file.signature), sha256)
            kept = dict(list(entries.items())[-CACHE_ENTRIES_MAX:])
            try:
                self._write({"schema": _CACHE_SCHEMA, "files": kept})
            except OSError as error:
                log.info("cannot remember the hash of %s: %s", file.path, str(error))

    def _read(self) -> dict[str, tuple[list[int], str]]:
        try:
            stored = json.loads(self._path.read_bytes())
            if stored["schema"] != _CACHE_SCHEMA:
                return {}
            return {
                str(path): (list(signature), sha256)
                for path, (signature, sha256) in stored["files"].items()
                if _SHA256.fullmatch(sha256)
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # absent, or not ours: everything is hashed again

    def _write(self, content: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
        try:
            with os.fdopen(descriptor, "w") as stream:
                json.dump(content, stream)
            os.replace(name, self._path)
        except OSError:
            os.unlink(name)
            raise


@dataclass(frozen=True)
class Identity:
    """Digests of a model, its adapter and its draft model, as bytes; and the tenant's salt."""

    weights: bytes
    adapter: bytes
    salt: bytes
    alias: str

    def namespace(self, layout: Layout, engine: str) -> Namespace:
        """The namespace of these weights' KV in one layout, computed by `engine` (see `engine_of`)."""
        parts = [spec.part(name) for spec in layout.layers for name in ("keys", "values")]
        return Namespace(
            weights=self.weights,
            adapter=self.adapter,
            layout=layout,
            dtype="+".join(sorted({part.dtype for part in parts if part.width})),
            engine=engine,
            salt=self.salt,
            alias=self.alias,
        )


def identify(
    pins: Sequence[Pin | None],
    fingerprint: bytes | None,
    *,
    salt: bytes = b"",
    alias: str = "",
    timeout_s: float | None = 0.0,
) -> Identity | None:
    """The identity of a model from the pins of (model, adapter, draft model), the last two None if not there, and the
    fingerprint of what they became in memory.

    None while a digest or the fingerprint is unknown: files alone do not say what computes. Waits at most `timeout_s`
    for each digest, None: as long as it takes. The layers of a draft model lie in the same cache and were computed by
    its weights, so these belong to the identity.
    """
    digests = [pin.wait(timeout_s) if pin else b"" for pin in pins]
    found = [digest for digest in digests if digest is not None]
    if fingerprint is None or len(found) < len(pins) or not found[0]:
        return None
    model, adapter, draft = found
    weights = hashlib.sha256(_WEIGHTS_TAG + model + len(draft).to_bytes(1, "little") + draft + fingerprint).digest()
    return Identity(weights, adapter, salt, alias)
