"""The bytes of a .kvpack file: blobs of one namespace, to be moved to another store. Integers are little-endian.

    offset      size  what
    0              8  "kvpack", carriage return, line feed: a copy that was taken for text is noticed at once
    8              4  format version, that of the blobs
    12             4  N: length of the manifest, at most 1 MiB
    16             N  manifest: JSON, what is inside
    16 + N         8  xxh3_64 of everything before
    24 + N            the blobs, aux blocks first, parents before children, each as: 1 (one byte), its length L
                      (8 bytes), L bytes as in `kvstore.blobs.format`, never encrypted
    at the end     1  0
                   8  number of blobs
                   8  bytes of blobs
                  16  xxh3_128 of everything before
                      end of file, exactly

    manifest        {"kvstore": version, "created_s": seconds since 1970, "blobs": as planned, "bytes": as planned,
                     "namespace": {"id", "weights", "adapter" (hex), "layout" (base64), "dtype", "engine", "alias"}}

The checksums detect accidents, not forgery. What a blob says is believed no
more than what a worker sends (`kvstore.engine.transfer`). Reading and writing hold `PIECE_BYTES` at a time.
"""

from __future__ import annotations

import base64
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import xxhash

from kvstore.blobs.format import FORMAT_VERSION, NO_HEADER
from kvstore.core.keys import NamespaceInfo
from kvstore.core.layers import Layout
from kvstore.errors import CorruptDataError, KVStoreError, UnknownFormatError

SUFFIX = ".kvpack"
MAGIC = b"kvpack\r\n"
MANIFEST_BYTES_MAX = 1 << 20
PIECE_BYTES = 1 << 20
_HEAD_BYTES = len(MAGIC) + 4 + 4
_SUM_BYTES = 8
_BLOB, _END = b"\1", b"\0"
_LENGTH_BYTES = 8
_TRAILER_BYTES = 8 + 8 + 16


@dataclass(frozen=True, slots=True)
class Manifest:
    """A pack's manifest. `blobs` and `nbytes` are as planned; blobs evicted meanwhile are missing."""

    namespace: NamespaceInfo
    blobs: int
    nbytes: int
    created_s: int = 0
    kvstore: str = ""

    def to_bytes(self) -> bytes:
        """JSON in UTF-8, as `from_bytes` takes it."""
        info = self.namespace
        about = {
            "id": info.root.hex(),
            "weights": info.weights.hex(),
            "adapter": info.adapter.hex(),
            "layout": base64.b64encode(info.layout.record).decode("ascii"),
            "dtype": info.dtype,
            "engine": info.engine,
            "alias": info.alias,
        }
        fields = {"kvstore": self.kvstore, "created_s": self.created_s, "blobs": self.blobs, "bytes": self.nbytes}
        return json.dumps({**fields, "namespace": about}, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_bytes(cls, text: bytes) -> Manifest:
        """Parse `to_bytes`; CorruptDataError when it is not one."""
        try:
            fields: Any = json.loads(text)
            about = fields["namespace"]
            root, weights, adapter = (bytes.fromhex(about[name]) for name in ("id", "weights", "adapter"))
            dtype, engine, alias = (str(about[name]) for name in ("dtype", "engine", "alias"))
            layout = Layout.from_record(base64.b64decode(about["layout"]))
            info = NamespaceInfo(root, weights, adapter, layout, dtype, engine, alias)
            blobs, nbytes, created_s = (int(fields[name]) for name in ("blobs", "bytes", "created_s"))
            return cls(info, blobs, nbytes, created_s, str(fields["kvstore"]))
        except (*NO_HEADER, KVStoreError) as error:
            raise CorruptDataError(f"the manifest is none: {error}") from error


def pack_pieces(manifest: Manifest, pieces: Iterable[tuple[int, bytes]]) -> Iterator[memoryview]:
    """The bytes of a pack, in pieces.

    `pieces`: the blobs, each as one or more (its length with its first piece, else 0; bytes). CorruptDataError when
    a blob does not have the length that was said.
    """
    text = manifest.to_bytes()
    head = MAGIC + FORMAT_VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
    whole = xxhash.xxh3_128()

    def noted(*parts: bytes) -> Iterator[memoryview]:
        for part in parts:
            whole.update(part)
            yield memoryview(part)

    yield from noted(head, _sum_of(head))
    count = total = left = 0
    for nbytes, piece in pieces:
        if nbytes:
            if left:
                break
            count, total, left = count + 1, total + nbytes, nbytes
            yield from noted(_BLOB, nbytes.to_bytes(_LENGTH_BYTES, "little"))
        left -= len(piece)
        yield from noted(piece)
    if left:
        raise CorruptDataError("a blob came with another length than was said")
    yield from noted(_END, count.to_bytes(8, "little"), total.to_bytes(8, "little"))
    yield memoryview(_sum_at_end(whole))


class PackFile:
    """An open .kvpack file. One thread at a time. `read` may be called any number of times, each reads all of it."""

    def __init__(self, path: str) -> None:
        """Open a file and read its manifest.

        Raises OSError, CorruptDataError for what is no such file, UnknownFormatError for another format version.
        """
        self.path = path
        # Not blocking: opening a FIFO would wait for a writer.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            info = os.fstat(self._fd)
            if not stat.S_ISREG(info.st_mode):
                raise CorruptDataError(f"{path} is not a regular file")
            self.nbytes = info.st_size
            self.manifest, self._start = self._read_manifest()
        except BaseException:
            os.close(self._fd)
            raise

    def _read_manifest(self) -> tuple[Manifest, int]:
        head = os.pread(self._fd, _HEAD_BYTES, 0)
        if head[: len(MAGIC)] != MAGIC:
            raise CorruptDataError(f"{self.path} is not a .kvpack file")
        version, length = int.from_bytes(head[8:12], "little"), int.from_bytes(head[12:16], "little")
        if version != FORMAT_VERSION:
            raise UnknownFormatError(f"{self.path} has format version {version}; this kvstore reads {FORMAT_VERSION}")
        rest = os.pread(self._fd, length + _SUM_BYTES, _HEAD_BYTES) if length <= MANIFEST_BYTES_MAX else b""
        if len(rest) != length + _SUM_BYTES or _sum_of(head + rest[:length]) != rest[length:]:
            raise self._damaged("its first part does not match its checksum")
        try:
            return Manifest.from_bytes(rest[:length]), _HEAD_BYTES + len(rest)
        except CorruptDataError as error:
            raise self._damaged(str(error)) from error

    def read(self) -> Iterator[tuple[int, bytes]]:
        """The blobs, in pieces as `pack_pieces` takes them. CorruptDataError where the file is damaged or cut short.

        What it says as a whole is known at the end only: read it once to the end before anything is done with it.
        """
        whole, at = xxhash.xxh3_128(), 0
        count = total = 0

        def take(nbytes: int) -> bytes:
            nonlocal at
            data = os.pread(self._fd, nbytes, at)
            if len(data) != nbytes:
                raise self._damaged("it is cut short")
            at += nbytes
            return data

        while at < self._start:
            whole.update(take(min(PIECE_BYTES, self._start - at)))
        while (kind := take(1)) == _BLOB:
            length = take(_LENGTH_BYTES)
            whole.update(kind + length)
            left = nbytes = int.from_bytes(length, "little")
            if not 0 < nbytes <= self.nbytes - at:
                raise self._damaged("it is cut short" if nbytes else "a blob in it is empty")
            count, total = count + 1, total + nbytes
            while left:
                piece = take(min(PIECE_BYTES, left))
                whole.update(piece)
                yield (nbytes if left == nbytes else 0), piece
                left -= len(piece)
        trailer = take(_TRAILER_BYTES)
        whole.update(kind + trailer[:16])
        said = tuple(int.from_bytes(trailer[i : i + 8], "little") for i in (0, 8))
        if kind != _END or _sum_at_end(whole) != trailer[16:] or said != (count, total) or at != self.nbytes:
            raise self._damaged("it does not match its checksum")

    def _damaged(self, why: str) -> CorruptDataError:
        return CorruptDataError(f"{self.path} is damaged: {why}; copy or export it again")

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def manifest_of(record: bytes, blobs: int, nbytes: int, kvstore: str) -> Manifest:
    """The manifest of a pack that is made now. `record`: of the namespace. CorruptDataError when it is none."""
    return Manifest(NamespaceInfo.from_record(record), blobs, nbytes, int(time.time()), kvstore)


def _sum_of(data: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(data).to_bytes(_SUM_BYTES, "little")


def _sum_at_end(whole: xxhash.xxh3_128) -> bytes:
    return whole.intdigest().to_bytes(16, "little")
