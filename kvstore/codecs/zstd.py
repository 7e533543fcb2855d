"""This thread's zstd contexts: each is a megabyte, and not to be shared."""

from __future__ import annotations

import threading

import zstandard


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


def decompressor() -> zstandard.ZstdDecompressor:
    """For frames of any level."""
    return _MINE.decompressor
