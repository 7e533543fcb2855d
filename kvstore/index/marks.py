"""Marks of first touches: which blocks were offered to the store and not written, so that a second offer is known.

65,536 marks of 16 bytes, in 1,024 chunks of 64; a block's hash says in which chunk its mark lies. In a full chunk the
mark touched longest ago gives way. Lost marks cost a hit each, so a rebuild starts without any.

    hash    8   the first bytes of the block's key
    last    4   wall clock of the last touch, in seconds since 1970
    by      3   number of the prompt that touched it last
    count   1   prompts that touched it, at most 255
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import numpy as np

CHUNKS, CHUNK_MARKS = 1024, 64
PROMPTS = 1 << 24
_MARK = np.dtype([("hash", "<u8"), ("last", "<u4"), ("by", "<u4")])
_COUNT_SHIFT, _COUNT_MAX = 24, 255


class Marks:
    """Any thread may call; `changed` is for the one that commits. A lock of its own is never held over I/O."""

    def __init__(self) -> None:
        self._marks = np.zeros((CHUNKS, CHUNK_MARKS), _MARK)
        self._changed: set[int] = set()
        self._lock = threading.Lock()

    @classmethod
    def load(cls, chunks: Iterable[tuple[int, bytes]]) -> Marks:
        """Inverse of `changed`. What is no chunk is left out."""
        made = cls()
        for number, data in chunks:
            if number < CHUNKS and len(data) == CHUNK_MARKS * _MARK.itemsize:
                made._marks[number] = np.frombuffer(data, _MARK)
        return made

    def touch(self, keys: Sequence[bytes], prompt: int, now_s: int) -> int:
        """Note that a prompt touched these blocks: how many, from the first to the last that another prompt touched."""
        seen = 0
        with self._lock:
            for number, key in enumerate(keys, 1):
                if self._touch(int.from_bytes(key[:8], "little"), prompt % PROMPTS, now_s):
                    seen = number
        return seen

    def _touch(self, hash_: int, prompt: int, now_s: int) -> bool:
        """Note one touch; whether another prompt touched the block, too."""
        place = hash_ % CHUNKS
        chunk = self._marks[place]
        found = np.flatnonzero(chunk["hash"] == hash_)
        known = bool(found.size and chunk["last"][found[0]])
        slot = int(found[0]) if known else int(chunk["last"].argmin())
        count, by = divmod(int(chunk["by"][slot]), PROMPTS) if known else (0, prompt)
        if not known or by != prompt:
            count = min(count + 1, _COUNT_MAX)
        chunk[slot] = (hash_, max(1, now_s), count << _COUNT_SHIFT | prompt)
        self._changed.add(place)
        return count > 1

    def changed(self) -> dict[int, bytes]:
        """Chunks that changed since the last call, for a commit."""
        with self._lock:
            numbers, self._changed = self._changed, set()
            return {number: self._marks[number].tobytes() for number in numbers}
