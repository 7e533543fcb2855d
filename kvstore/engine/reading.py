"""Reading blobs, plain or encrypted: whole and verified, by ranges for a fetch, and the header of one alone."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import xxhash

from kvstore.blocks import Block
from kvstore.engine import format as blob_format
from kvstore.engine import sealed
from kvstore.engine.blobs import blob_name
from kvstore.engine.directory import Directory
from kvstore.engine.keyring import KeyRing, NamespaceKey
from kvstore.engine.nouns import Slice
from kvstore.engine.rows import Row
from kvstore.engine.sealed import HEADER_BYTES, SealedReader, SealedSource, is_sealed, open_blob
from kvstore.errors import CorruptDataError, LimitError, NotFoundError, UnknownFormatError
from kvstore.files import FileReader, FileSource
from kvstore.keys import NamespaceInfo
from kvstore.records import RECORD_VERSION, block_to_record
from kvstore.rules import check_states

VERIFY_BYTES = 1 << 20
_VERSION = re.compile(rb'"version":"[0-9]+"')

# Bytes of a blob: how many, from where. Fewer come back at its end.
Pread = Callable[[int, int], bytes]


def read_block(path: Path, verify: bool, ring: KeyRing | None = None) -> tuple[Block, int, int]:
    """(block, payload offset, file bytes) of a blob, its payload checked against all checksums if `verify`.

    An encrypted blob is decrypted, in memory; its payload offset counts in the blob inside. Raises CorruptDataError,
    also when the file cannot be read; UnknownFormatError for a newer format; NotFoundError when it is encrypted and its
    key is not in the ring; LimitError when it is this process that lacks descriptors or memory, which says nothing
    about the file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise LimitError(f"{path} cannot be opened now: {error.strerror}") from error
        raise CorruptDataError(f"{path}: {error.strerror}") from error
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise CorruptDataError(f"{path}: not a regular file")
        pread, inner_bytes = _inside(fd, info.st_size, ring)
        length = blob_format.header_length(pread(blob_format.LENGTH_BYTES, 0), inner_bytes)
        block = blob_format.parse_header(pread(length, 0), inner_bytes)
        if inner_bytes == info.st_size and ring is not None and ring.key(block.root):
            raise CorruptDataError(f"{path}: a plain blob in an encrypted namespace")
        if verify:
            _verify_payload(pread, block, length)
        return block, length, info.st_size
    except OSError as error:
        raise CorruptDataError(f"{path}: {error.strerror}") from error
    finally:
        os.close(fd)


def _inside(fd: int, file_bytes: int, ring: KeyRing | None) -> tuple[Pread, int]:
    """The bytes of the blob, decrypted where they are not plain, and how many there are."""

    def pread(nbytes: int, offset: int) -> bytes:
        return os.pread(fd, nbytes, offset)

    first = pread(HEADER_BYTES, 0)
    if not is_sealed(first):
        return pread, file_bytes
    if ring is None:
        raise NotFoundError("this blob is encrypted")
    inner = open_blob(first, ring, pread, file_bytes)
    return lambda nbytes, offset: inner[offset : offset + nbytes], len(inner)


def _verify_payload(pread: Pread, block: Block, payload_offset: int) -> None:
    for offset, length, checksum in blob_format.checked_ranges(block):
        hasher = xxhash.xxh3_64()
        done = 0
        while done < length:
            data = pread(min(VERIFY_BYTES, length - done), payload_offset + offset + done)
            if not data:
                raise CorruptDataError("blob: the file ended early")
            hasher.update(data)
            done += len(data)
        if hasher.intdigest() != checksum:
            raise CorruptDataError(f"blob: bytes {offset} to {offset + length} do not match their checksum")


def sources_of(directory: Directory, slices: Iterable[Slice]) -> list[FileSource]:
    """Where a reader finds the payloads of a plan."""
    base = str(directory.blobs)
    rows = [part.row for part in slices]
    return [
        FileSource(f"{base}/{row.directory:02x}/{blob_name(row.key, row.seq)}", row.payload_offset, row.file_bytes)
        for row in rows
    ]


def open_reader(
    sources: Sequence[FileSource], slices: Sequence[Slice], key: NamespaceKey | None, open_max: int
) -> FileReader | SealedReader:
    """A reader of the blocks of a plan, all of one namespace; it decrypts with the key that the namespace may have."""
    if key is None:
        return FileReader(sources, open_max)
    return SealedReader(
        [SealedSource(source, key, part.row.key) for source, part in zip(sources, slices, strict=True)], open_max
    )


def demand_header(source: FileSource, row: Row, namespace: bytes, key: NamespaceKey | None) -> None:
    """CorruptDataError unless a file has its exact size and the header that its row makes.

    A fetch takes everything from row and payload, but a blob whose header is damaged is lost to a rebuild. `namespace`:
    the record that the index has; a blob that was stored under another alias is parsed. UnknownFormatError: see
    `read_block`.
    """
    header = _read_header(source, row, key)
    block = replace(row.block, namespace=namespace)
    if blob_format.build_header(block, block_to_record(block)) != header:
        demand_same(blob_format.parse_header(header, len(header) + blob_format.payload_bytes(block)), row)


def first_damaged(
    sources: Sequence[FileSource], slices: Sequence[Slice], namespace: NamespaceInfo | None, key: NamespaceKey | None
) -> int | None:
    """Index of the first slice whose file is gone, has not the size and the header that its row makes, or is of a
    checkpoint that breaks a rule.

    What a header leaves, the payload and the tensors of a block, the reader of the slice verifies.
    """
    record = namespace.to_record() if namespace else b""
    for number, source in enumerate(sources):
        row = slices[number].row
        try:
            demand_header(source, row, record, key)
            if row.is_checkpoint and namespace is not None:
                check_states(namespace.layout, row.block.states, row.block.end)
        except (CorruptDataError, UnknownFormatError):
            return number
    return None


def demand_same(block: Block, row: Row) -> None:
    """CorruptDataError unless a blob's block is that of the row."""
    if replace(block, namespace=b"") != row.block:
        raise CorruptDataError("not the block that the index says")


def is_misnumbered(source: FileSource, row: Row, key: NamespaceKey | None) -> bool:
    """Whether a blob that says that it is of a newer format is damaged: it is the row's, but for this number.

    No version is newer in nothing but its number.
    """
    try:
        if key is not None and sealed.is_misnumbered(source, key):
            return True
        number = b'"version":"%d"' % RECORD_VERSION
        header = _VERSION.sub(number, _read_header(source, row, key), count=1)
        demand_same(blob_format.parse_header(header, len(header) + blob_format.payload_bytes(row.block)), row)
    except (CorruptDataError, UnknownFormatError):
        return False
    return True


def _read_header(source: FileSource, row: Row, key: NamespaceKey | None) -> bytes:
    header = bytearray(row.payload_offset)
    with open_reader([replace(source, payload_offset=0)], [Slice(row, 0)], key, 1) as reader:
        reader.readinto(0, 0, [memoryview(header)])
    return bytes(header)
