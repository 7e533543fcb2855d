"""Reading a blob back whole, plain or encrypted, and verifying it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import xxhash

from kvstore.blocks import Block
from kvstore.engine import format as blob_format
from kvstore.engine.keyring import KeyRing
from kvstore.engine.sealed import HEADER_BYTES, is_sealed, open_blob
from kvstore.errors import CorruptDataError, LimitError, NotFoundError

VERIFY_BYTES = 1 << 20

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
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
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
