"""Encrypted blobs: a blob file, whole, in chunks of AES-256-GCM. Version 1:

    offset      size  what
         0       512  length and header, as of any safetensors file: one tensor of bytes; format, version, the block's
                      root and key, salt, the size of what is inside; padded with spaces
       512         M  chunks: 65,536 bytes of the blob inside (the last one fewer), each followed by its tag of 16 bytes

Each file has a key of its own, derived from the namespace's and 16 random bytes, the salt; the nonce of a chunk is its
number. AAD is the header, so that nothing of it can be changed and no chunk moved, left out or taken from another file.
A range is read by decrypting the chunks that it touches: a fetch reads a layer here as it does from a plain blob.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvstore.blocks import KEY_BYTES
from kvstore.engine.format import LENGTH_BYTES
from kvstore.engine.keyring import TAG_BYTES, KeyRing, NamespaceKey
from kvstore.errors import CorruptDataError, NotFoundError, UnknownFormatError
from kvstore.files import FileReader, FileSource

FORMAT = "kvstore-sealed"
FORMAT_VERSION = 1
HEADER_BYTES = 512
CHUNK_BYTES = 1 << 16
SALT_BYTES = 16
_MARK = b'{"__metadata__":{"format":"kvstore-sealed"'


def sealed_bytes(inner_bytes: int) -> int:
    """Size of the file that holds a blob of `inner_bytes`."""
    return HEADER_BYTES + inner_bytes + -(-inner_bytes // CHUNK_BYTES) * TAG_BYTES


def seal_blob(key: NamespaceKey, root: bytes, block: bytes, parts: Sequence[memoryview]) -> Iterator[memoryview]:
    """The file that holds the blob made of `parts`, piece by piece."""
    header = _header(root, block, os.urandom(SALT_BYTES), sum(map(len, parts)))
    cipher = key.blob_cipher(_salt(header))
    yield memoryview(header)
    for number, chunk in enumerate(_chunks(parts)):
        yield memoryview(cipher.encrypt(_nonce(number), chunk, header))


def is_sealed(first: bytes) -> bool:
    """Whether a file that starts so is an encrypted blob."""
    return first.startswith(_MARK, LENGTH_BYTES)


def open_blob(first: bytes, ring: KeyRing, pread: Callable[[int, int], bytes], file_bytes: int) -> bytes:
    """The blob inside, all of it in memory; `first`: HEADER_BYTES of the file.

    CorruptDataError unless every chunk is whole, NotFoundError when its key is not there, UnknownFormatError for a
    newer version.
    """
    root, _, inner_bytes = _parse_header(first)
    key = ring.key(root)
    if key is None:
        raise NotFoundError("the key of this encrypted blob is not there")
    if sealed_bytes(inner_bytes) != file_bytes:
        raise CorruptDataError("sealed blob: the file does not have the size that its header says")
    cipher = key.blob_cipher(_salt(first))
    out = bytearray()
    for number in range(-(-inner_bytes // CHUNK_BYTES)):
        size = min(CHUNK_BYTES, inner_bytes - number * CHUNK_BYTES) + TAG_BYTES
        data = pread(size, HEADER_BYTES + number * (CHUNK_BYTES + TAG_BYTES))
        out += _opened(cipher, number, data, first)
    return bytes(out)


def is_misnumbered(source: FileSource, key: NamespaceKey) -> bool:
    """Whether an encrypted blob that says that it is of a newer version opens as one of ours: the number is damaged."""
    stored = bytearray(min(source.file_bytes, HEADER_BYTES + CHUNK_BYTES + TAG_BYTES))
    with FileReader([replace(source, payload_offset=0)], 1) as reader:
        reader.readinto(0, 0, [memoryview(stored)])
    header = re.sub(rb'"version":"[0-9]+"', b'"version":"%d"' % FORMAT_VERSION, bytes(stored[:HEADER_BYTES]), count=1)
    try:
        _parse_header(header)
        _opened(key.blob_cipher(_salt(header)), 0, bytes(stored[HEADER_BYTES:]), header)
    except (CorruptDataError, UnknownFormatError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class SealedSource:
    """An encrypted blob as a reader sees it; `file.payload_offset` counts in the blob inside."""

    file: FileSource
    key: NamespaceKey
    block: bytes

    @property
    def inner_bytes(self) -> int:
        """Size of the blob inside."""
        stored = self.file.file_bytes - HEADER_BYTES
        return stored - -(-stored // (CHUNK_BYTES + TAG_BYTES)) * TAG_BYTES


class SealedReader:
    """A `RangeReader` over encrypted blobs, in the place of a FileReader. Any thread may read."""

    def __init__(self, sources: Sequence[SealedSource], open_max: int) -> None:
        self._sources = tuple(sources)
        self._files = FileReader([replace(source.file, payload_offset=0) for source in sources], open_max)
        self._lock = threading.Lock()
        self._ciphers: dict[int, tuple[AESGCM, bytes]] = {}

    def readinto(self, source: int, offset: int, views: Sequence[memoryview]) -> None:
        """See `RangeReader.readinto`. CorruptDataError also when a chunk does not pass its tag."""
        if not 0 <= source < len(self._sources) or offset < 0:
            raise CorruptDataError(f"no such range: source {source}, offset {offset}")
        pending = [view.cast("B") for view in views if view.nbytes]
        start = self._sources[source].file.payload_offset + offset
        plain = memoryview(self._plain(source, start, start + sum(map(len, pending))))
        for view in pending:
            view[:] = plain[: len(view)]
            plain = plain[len(view) :]

    def _plain(self, source: int, start: int, end: int) -> bytes:
        """Bytes `[start, end)` of the blob inside."""
        sealed = self._sources[source]
        if end > sealed.inner_bytes:
            raise CorruptDataError(f"{sealed.file.path}: a range ends beyond the file")
        if start == end:
            return b""
        cipher, header = self._cipher(source)
        first, last = start // CHUNK_BYTES, (end - 1) // CHUNK_BYTES
        step = CHUNK_BYTES + TAG_BYTES
        stored_end = min(HEADER_BYTES + (last + 1) * step, sealed.file.file_bytes)
        stored = bytearray(stored_end - HEADER_BYTES - first * step)
        self._files.readinto(source, HEADER_BYTES + first * step, [memoryview(stored)])
        view = memoryview(stored)
        chunks = [
            _opened(cipher, number, view[(number - first) * step : (number - first + 1) * step], header)
            for number in range(first, last + 1)
        ]
        skip = start - first * CHUNK_BYTES
        return b"".join(chunks)[skip : skip + end - start]

    def _cipher(self, source: int) -> tuple[AESGCM, bytes]:
        with self._lock:
            known = self._ciphers.get(source)
        if known is None:
            header = bytearray(HEADER_BYTES)
            self._files.readinto(source, 0, [memoryview(header)])
            _, block, _ = _parse_header(bytes(header))
            if block != self._sources[source].block:
                raise CorruptDataError(f"{self._sources[source].file.path}: the blob of another block")
            known = self._sources[source].key.blob_cipher(_salt(bytes(header))), bytes(header)
            with self._lock:
                self._ciphers[source] = known
        return known

    def close(self) -> None:
        """Close all files. No read may be in progress."""
        self._files.close()

    def __enter__(self) -> SealedReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _opened(cipher: AESGCM, number: int, data: bytes | memoryview, header: bytes) -> bytes:
    try:
        return cipher.decrypt(_nonce(number), data, header)
    except (InvalidTag, ValueError) as error:
        raise CorruptDataError(f"sealed blob: chunk {number} does not pass its tag") from error


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _chunks(parts: Sequence[memoryview]) -> Iterator[bytes]:
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


def _header(root: bytes, block: bytes, salt: bytes, inner_bytes: int) -> bytes:
    payload = sealed_bytes(inner_bytes) - HEADER_BYTES
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "root": root.hex(),
        "key": block.hex(),
        "salt": salt.hex(),
        "bytes": str(inner_bytes),
    }
    tensor = {"dtype": "U8", "shape": [payload], "data_offsets": [0, payload]}
    text = json.dumps({"__metadata__": metadata, "sealed": tensor}, separators=(",", ":")).encode("ascii")
    room = HEADER_BYTES - LENGTH_BYTES
    assert len(text) <= room
    return room.to_bytes(LENGTH_BYTES, "little") + text.ljust(room)


def _parse_header(header: bytes) -> tuple[bytes, bytes, int]:
    """(root, key of the block, bytes inside). CorruptDataError unless the header is exactly what `_header` makes."""
    try:
        metadata = json.loads(header[LENGTH_BYTES:])["__metadata__"]
        version, inner_bytes = int(metadata["version"]), int(metadata["bytes"])
        root, block, salt = (bytes.fromhex(metadata[name]) for name in ("root", "key", "salt"))
    except (ValueError, OverflowError, KeyError, TypeError, RecursionError) as error:
        raise CorruptDataError(f"sealed blob: {error!r}") from error
    if version > FORMAT_VERSION:
        raise UnknownFormatError(f"an encrypted blob of version {version}; this kvstore reads up to {FORMAT_VERSION}")
    sizes = (len(root), len(block), len(salt))
    if sizes != (KEY_BYTES, KEY_BYTES, SALT_BYTES) or not 0 < inner_bytes < 1 << 48:
        raise CorruptDataError("sealed blob: keys, salt or size out of range")
    if _header(root, block, salt, inner_bytes) != header:
        raise CorruptDataError("sealed blob: the header is not in its canonical form")
    return root, block, inner_bytes


def _salt(header: bytes) -> bytes:
    found = json.loads(header[LENGTH_BYTES:])["__metadata__"]["salt"]
    return bytes.fromhex(found)
