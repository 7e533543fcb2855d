"""Encrypted blobs: a wrapper around another `Blobs`, for the namespaces that have a key. The stored bytes:

    offset      size  what
         0       512  length and header, as of any safetensors file: one tensor of bytes; format, version, the blob's
                      root and key, salt, the size of the blob inside; padded with spaces
       512         M  chunks: 65,536 bytes of the blob inside (the last one fewer), each followed by its tag of 16 bytes

Each blob has a key of its own, derived from the namespace's and 16 random bytes, the salt; the nonce of a chunk is its
number. AAD is the header, so that nothing of it can be changed and no chunk moved, left out or taken from another blob.
A range is read by decrypting the chunks that it touches. Sizes that this class takes and gives are those of the blob
inside; `path` is None, since another process cannot read what lies there.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvstore.blobs.format import ENCRYPTED_FORMAT, FORMAT_VERSION, LENGTH_BYTES, NO_HEADER, require_version
from kvstore.blobs.keyring import KeyRing, NamespaceKey
from kvstore.blobs.protocol import BlobId, BlobReader, Blobs, Entry, Pending, Source
from kvstore.errors import CorruptDataError

HEADER_BYTES = 512
CHUNK_BYTES = 1 << 16
SALT_BYTES = 16
TAG_BYTES = 16


class EncryptedBlobs:
    """See the module. A namespace without a key passes through unchanged."""

    def __init__(self, inner: Blobs, keys: KeyRing) -> None:
        self._inner = inner
        self._keys = keys
        self.sync = inner.sync
        self.delete = inner.delete
        self.write_identity = inner.write_identity
        self.drop = inner.drop
        self.clear = inner.clear
        self.discard = inner.discard
        self.quarantine = inner.quarantine
        self.quarantined = inner.quarantined
        self.trim_quarantine = inner.trim_quarantine
        self.room = inner.room

    def put(self, blob: BlobId, parts: Iterable[memoryview]) -> Pending:
        """The parts in chunks, each encrypted."""
        key = self._keys.key(blob.root)
        return self._inner.put(blob, parts if key is None else _encrypted(key, blob, list(parts)))

    def reader(self, sources: Sequence[Source], open_max: int) -> BlobReader:
        """Decrypts. CorruptDataError also for a blob that is not encrypted in a namespace that is."""
        key = self._keys.key(sources[0].blob.root) if sources else None
        if key is None:
            return self._inner.reader(sources, open_max)
        outer = [Source(one.blob, 0, stored_bytes(one.nbytes)) for one in sources]
        return _ChunkReader(key, sources, self._inner.reader(outer, open_max))

    def names(self, root: bytes | None = None) -> Iterator[Entry]:
        """Sizes are those inside."""
        for entry in self._inner.names(root):
            inside = entry.blob is not None and self._keys.key(entry.blob.root) is not None
            yield replace(entry, nbytes=plain_bytes(entry.nbytes)) if inside else entry

    def size(self, blob: BlobId) -> int | None:
        """Delegates to the blob inside."""
        size = self._inner.size(blob)
        return size if size is None or self._keys.key(blob.root) is None else plain_bytes(size)

    def stored_bytes(self, root: bytes, nbytes: int) -> int:
        """With header and tags."""
        return self._inner.stored_bytes(root, nbytes if self._keys.key(root) is None else stored_bytes(nbytes))

    def path(self, blob: BlobId) -> str | None:
        """None where it is encrypted."""
        return self._inner.path(blob) if self._keys.key(blob.root) is None else None

    @property
    def overhead_bytes(self) -> int:
        """As below."""
        return self._inner.overhead_bytes


def stored_bytes(nbytes: int) -> int:
    """Bytes that hold a blob of `nbytes`."""
    return HEADER_BYTES + nbytes + -(-nbytes // CHUNK_BYTES) * TAG_BYTES


def plain_bytes(nbytes: int) -> int:
    """Bytes of the blob inside `nbytes`; 0 when there is none."""
    chunks = max(0, nbytes - HEADER_BYTES)
    return max(0, chunks - -(-chunks // (CHUNK_BYTES + TAG_BYTES)) * TAG_BYTES)


class _ChunkReader:
    """A `RangeReader` over the chunks of another reader, whose sources begin at 0."""

    def __init__(self, key: NamespaceKey, sources: Sequence[Source], inner: BlobReader) -> None:
        self._key = key
        self._sources = tuple(sources)
        self._inner = inner
        self._lock = threading.Lock()
        self._ciphers: dict[int, tuple[AESGCM, bytes]] = {}

    def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
        """See `RangeReader`."""
        if not 0 <= source < len(self._sources) or offset < 0:
            raise CorruptDataError(f"no such range: source {source}, offset {offset}")
        pending = [view.cast("B") for view in views if view.nbytes]
        start = self._sources[source].payload_offset + offset
        plain = memoryview(self._plain(source, start, start + sum(map(len, pending))))
        for view in pending:
            view[:] = plain[: len(view)]
            plain = plain[len(view) :]

    def _plain(self, source: int, start: int, end: int) -> bytes:
        """Bytes `[start, end)` of the blob inside."""
        blob, _, nbytes = self._sources[source]
        if end > nbytes:
            raise CorruptDataError(f"{blob.name}: a range ends beyond the blob")
        if start == end:
            return b""
        cipher, header = self._cipher(source)
        first, last = start // CHUNK_BYTES, (end - 1) // CHUNK_BYTES
        step = CHUNK_BYTES + TAG_BYTES
        stored_end = min(HEADER_BYTES + (last + 1) * step, stored_bytes(nbytes))
        stored = bytearray(stored_end - HEADER_BYTES - first * step)
        self._inner.readinto(source, HEADER_BYTES + first * step, [memoryview(stored)])
        view = memoryview(stored)
        chunks = [
            _decrypted(cipher, number, view[(number - first) * step : (number - first + 1) * step], header)
            for number in range(first, last + 1)
        ]
        skip = start - first * CHUNK_BYTES
        return b"".join(chunks)[skip : skip + end - start]

    def _cipher(self, source: int) -> tuple[AESGCM, bytes]:
        with self._lock:
            known = self._ciphers.get(source)
        if known is None:
            header = bytearray(HEADER_BYTES)
            self._inner.readinto(source, 0, [memoryview(header)])
            blob, _, nbytes = self._sources[source]
            known = self._key.blob_cipher(_require_salt(bytes(header), blob, nbytes)), bytes(header)
            with self._lock:
                self._ciphers[source] = known
        return known

    def close(self) -> None:
        """Close all files. No read may be in progress."""
        self._inner.close()


def _encrypted(key: NamespaceKey, blob: BlobId, parts: Sequence[memoryview]) -> Iterator[memoryview]:
    """The stored bytes, piece by piece."""
    header = _header(blob, os.urandom(SALT_BYTES), sum(map(len, parts)))
    cipher = key.blob_cipher(_salt(header))
    yield memoryview(header)
    for number, chunk in enumerate(_chunks(parts)):
        yield memoryview(cipher.encrypt(_nonce(number), chunk, header))


def _decrypted(cipher: AESGCM, number: int, data: memoryview, header: bytes) -> bytes:
    try:
        return cipher.decrypt(_nonce(number), data, header)
    except (InvalidTag, ValueError) as error:
        raise CorruptDataError(f"encrypted blob: chunk {number} does not pass its tag") from error


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _chunks(parts: Iterable[memoryview]) -> Iterator[bytes]:
    gathered = bytearray()
    for part in parts:
        at = 0
        while at < len(part):
            take = min(CHUNK_BYTES - len(gathered), len(part) - at)
            gathered += part[at : at + take]
            at += take
            if len(gathered) == CHUNK_BYTES:
                yield bytes(gathered)
                gathered.clear()
    if gathered:
        yield bytes(gathered)


def _header(blob: BlobId, salt: bytes, nbytes: int) -> bytes:
    payload = stored_bytes(nbytes) - HEADER_BYTES
    metadata = {
        "format": ENCRYPTED_FORMAT,
        "version": str(FORMAT_VERSION),
        "root": blob.root.hex(),
        "key": blob.key.hex(),
        "salt": salt.hex(),
        "bytes": str(nbytes),
    }
    tensor = {"dtype": "U8", "shape": [payload], "data_offsets": [0, payload]}
    text = json.dumps({"__metadata__": metadata, "encrypted": tensor}, separators=(",", ":")).encode("ascii")
    room = HEADER_BYTES - LENGTH_BYTES
    assert len(text) <= room
    return room.to_bytes(LENGTH_BYTES, "little") + text.ljust(room)


def _require_salt(header: bytes, blob: BlobId, nbytes: int) -> bytes:
    """The salt of a header; CorruptDataError unless it is exactly what `_header` makes for this blob."""
    try:
        salt = _salt(header)
        require_version(json.loads(header[LENGTH_BYTES:])["__metadata__"])
    except NO_HEADER as error:
        raise CorruptDataError(f"encrypted blob: {type(error).__name__}: {error}") from error
    if len(salt) != SALT_BYTES or _header(blob, salt, nbytes) != header:
        raise CorruptDataError(f"{blob.name}: the header of another blob, or none")
    return salt


def _salt(header: bytes) -> bytes:
    return bytes.fromhex(json.loads(header[LENGTH_BYTES:])["__metadata__"]["salt"])
