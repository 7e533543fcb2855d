"""zstd, with the contexts of this thread: each is a megabyte, and not to be shared."""

from __future__ import annotations

import threading

import zstandard

from kvstore.errors import CorruptDataError


class _Contexts(threading.local):
    """One compressor a level, and one that unpacks. Each thread has its own."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor()


_MINE = _Contexts()


def compressor(level: int) -> zstandard.ZstdCompressor:
    """For frames of this level."""
    if level not in _MINE.compressors:
        _MINE.compressors[level] = zstandard.ZstdCompressor(level=level)
    return _MINE.compressors[level]


def content(frame: memoryview | bytes, nbytes: int) -> bytes:
    """What a frame of any level holds. CorruptDataError unless that is `nbytes`.

    The size comes from the geometry, never from the frame, so that a small frame cannot ask for much memory.
    """
    try:
        if zstandard.frame_content_size(frame) != nbytes:
            raise CorruptDataError("packed data is not of the size that its geometry says")
        data = _MINE.decompressor.decompress(frame, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptDataError(f"packed data does not unpack: {error}") from error
    if len(data) != nbytes:
        raise CorruptDataError("packed data does not unpack to its size")
    return data
