"""Validates an LMDB file before LMDB opens it. LMDB trusts every offset that it reads.

A damaged page would end the process (SIGSEGV, SIGBUS) or lead to another row. After an orderly stop the file is
compared with the digest that the stop wrote down; otherwise every page that LMDB would reach is walked. A changed byte
inside a value is not found here: the checksum of each row finds it (`kvstore.index.rows`).

The layout (LMDB 0.9, data version 1, little-endian, 64 bits), as far as it is needed here:

    page     0  8 page number, 2 pad, 2 flags, then 2 lower, 2 upper; of an overflow page 4 number of pages
            16  2 for each node: its offset in the page, in key order; free space from lower to upper, then the nodes
    node     0  4 size of the data, 2 flags (of a branch all 6 a page number), 2 size of the key; then key and data
    tree     0  4 pad, 2 flags, 2 depth, then 8 each: branch pages, leaf pages, overflow pages, entries, root
    meta    16  4 magic, 4 version, 8 address, 8 map size, tree of free pages, tree of trees, 8 last page, 8 transaction
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from kvstore.blobs.fs import opened
from kvstore.errors import CorruptDataError

_HEADER = struct.Struct("<QHHHH")
_NODE = struct.Struct("<HHHH")
_TREE = struct.Struct("<IHHQQQQQ")
_META = struct.Struct(f"<IIQQ{_TREE.size}s{_TREE.size}sQQ")
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _META_PAGE, _DIRTY = 1, 2, 4, 8, 16
_BIG, _SUBTREE = 1, 2
_INTEGER_KEYS = 8
_NO_PAGE = (1 << 64) - 1
_PAGE_SIZES = tuple(1 << power for power in range(9, 17))
_DEPTH_MAX = 32
# Two threads read and hash 6.7 GB, the index of a million blocks, in half a second from the page cache.
_CHUNK_BYTES = 4 << 20
_THREADS = 2
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


def digest(path: Path) -> str:
    """A checksum of the whole file, in hex; "" when there is none. OSError when it cannot be read."""
    try:
        with opened(path, _READ) as fd, ThreadPoolExecutor(_THREADS) as pool:
            size = os.fstat(fd).st_size
            parts = pool.map(lambda at: _digest_at(fd, at), range(0, size, _CHUNK_BYTES))
            return xxhash.xxh3_128_hexdigest(size.to_bytes(8, "little") + b"".join(parts))
    except FileNotFoundError:
        return ""


def _digest_at(fd: int, at: int) -> bytes:
    return xxhash.xxh3_128_digest(os.pread(fd, _CHUNK_BYTES, at))


@dataclass(frozen=True, slots=True)
class _Pages:
    """A B+tree as its descriptor says it is."""

    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int

    @classmethod
    def of(cls, data: bytes) -> _Pages:
        if len(data) != _TREE.size:
            raise CorruptDataError("index: a tree without its descriptor")
        return cls(*_TREE.unpack(data)[1:])


class _File:
    """Reads the pages of the newest transaction. A page that is referenced twice is an error."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._file_bytes = os.fstat(fd).st_size
        first = os.pread(fd, 4096, 0)
        if len(first) < _HEADER.size + _META.size:
            raise CorruptDataError("index: too short for a page")
        self.page_bytes = struct.unpack_from("<I", first, _HEADER.size + 24)[0]
        if self.page_bytes not in _PAGE_SIZES:
            raise CorruptDataError("index: no such page size")
        metas = [self._meta(0), self._meta(1)]
        _, free, main, self.last_page, _ = max(metas, key=lambda meta: meta[-1])
        self.free, self.main = _Pages.of(free), _Pages.of(main)
        self.seen: set[int] = {0, 1}

    def _meta(self, number: int) -> tuple[int, bytes, bytes, int, int]:
        page = os.pread(self._fd, self.page_bytes, number * self.page_bytes)
        if len(page) != self.page_bytes:
            raise CorruptDataError("index: a meta page is cut short")
        magic, version, _, map_bytes, free, main, last_page, txn = _META.unpack_from(page, _HEADER.size)
        pgno, _, flags, _, _ = _HEADER.unpack_from(page)
        page_bytes = struct.unpack_from("<I", free)[0]
        if (magic, version, pgno, flags & ~_DIRTY, page_bytes) != (
            _MAGIC,
            _VERSION,
            number,
            _META_PAGE,
            self.page_bytes,
        ):
            raise CorruptDataError("index: not a meta page")
        if not 1 <= last_page < (1 << 47) // self.page_bytes or map_bytes > 1 << 47:
            raise CorruptDataError("index: it would be larger than its map")
        return map_bytes, free, main, last_page, txn

    def take(self, number: int, count: int = 1) -> bytes:
        """The first page of `count`, all of which must be within the file and not have been come to before."""
        if not 2 <= number <= self.last_page or count < 1 or number + count - 1 > self.last_page:
            raise CorruptDataError(f"index: there is no page {number}")
        if (number + count) * self.page_bytes > self._file_bytes:
            raise CorruptDataError(f"index: the file ends before page {number}")
        pages = range(number, number + count)
        if not self.seen.isdisjoint(pages):
            raise CorruptDataError(f"index: two ways lead to page {number}")
        self.seen.update(pages)
        page = os.pread(self._fd, self.page_bytes, number * self.page_bytes)
        if len(page) != self.page_bytes or _HEADER.unpack_from(page)[0] != number:
            raise CorruptDataError(f"index: page {number} has another page's number")
        return page

    def read(self, number: int, at: int, length: int) -> bytes:
        """Bytes of an overflow page and those that follow it."""
        return os.pread(self._fd, length, number * self.page_bytes + at)


class _Walk:
    """One tree: every page, every node, the order of keys; counts what the descriptor counts."""

    def __init__(self, file: _File, tree: _Pages, known_flags: int) -> None:
        if tree.flags & ~known_flags:
            raise CorruptDataError("index: a tree of an unknown kind")
        self._file = file
        self._tree = tree
        self._integers = bool(tree.flags & _INTEGER_KEYS)
        self._counts = {"branch_pages": 0, "leaf_pages": 0, "overflow_pages": 0, "entries": 0}
        self._last: bytes | int | None = None

    def run(self) -> Iterator[tuple[bytes, int, int, bytes, int]]:
        """(key, node flags, size, data, overflow page or 0) of every entry, in order."""
        tree = self._tree
        if tree.root == _NO_PAGE:
            if tree.entries or tree.depth:
                raise CorruptDataError("index: a tree without a root has entries")
            return
        if not 1 <= tree.depth <= _DEPTH_MAX:
            raise CorruptDataError("index: a tree of impossible depth")
        yield from self._page(tree.root, tree.depth, None)
        if any(count != getattr(tree, name) for name, count in self._counts.items()):
            raise CorruptDataError("index: a tree is not what its descriptor says")

    def _page(
        self, number: int, levels: int, upper: bytes | int | None
    ) -> Iterator[tuple[bytes, int, int, bytes, int]]:
        page = self._file.take(number)
        is_leaf = levels == 1
        _, _, flags, lower, top = _HEADER.unpack_from(page)
        if flags & ~_DIRTY != (_LEAF if is_leaf else _BRANCH):
            raise CorruptDataError(f"index: page {number} is of another kind")
        size = self._file.page_bytes
        if not _HEADER.size <= lower <= top <= size or lower % 2:
            raise CorruptDataError(f"index: page {number} has impossible bounds")
        offsets = struct.unpack_from(f"<{(lower - _HEADER.size) // 2}H", page, _HEADER.size)
        if len(offsets) < (1 if is_leaf else 2) or min(offsets) < top or max(offsets) > size - _NODE.size:
            raise CorruptDataError(f"index: page {number} has impossible nodes")
        self._counts["leaf_pages" if is_leaf else "branch_pages"] += 1
        yield from (self._leaf if is_leaf else self._branch)(page, offsets, levels, upper)

    def _branch(
        self, page: bytes, offsets: tuple[int, ...], levels: int, upper: bytes | int | None
    ) -> Iterator[tuple[bytes, int, int, bytes, int]]:
        nodes: list[tuple[bytes | int, int]] = []
        for at in offsets:
            low, high, top, key_bytes = _NODE.unpack_from(page, at)
            key = self._key(page, at, key_bytes) if nodes else b""
            nodes.append((key, low | high << 16 | top << 32))
        for position, (key, number) in enumerate(nodes):
            # Every key below stands between its separator and the next one.
            if position and self._last is not None and not _is_less(self._last, key):
                raise CorruptDataError("index: keys are out of order")
            end = nodes[position + 1][0] if position + 1 < len(nodes) else upper
            if position and end is not None and not _is_less(key, end):
                raise CorruptDataError("index: keys are out of order")
            first = True
            for entry in self._page(number, levels - 1, end):
                if first and position and _is_less(self._compared(entry[0]), key):
                    raise CorruptDataError("index: keys are out of order")
                first = False
                yield entry

    def _leaf(
        self, page: bytes, offsets: tuple[int, ...], levels: int, upper: bytes | int | None
    ) -> Iterator[tuple[bytes, int, int, bytes, int]]:
        size = self._file.page_bytes
        for at in offsets:
            low, high, flags, key_bytes = _NODE.unpack_from(page, at)
            compared = self._key(page, at, key_bytes)
            if self._last is not None and not _is_less(self._last, compared):
                raise CorruptDataError("index: keys are out of order")
            self._last = compared
            data_at, data_bytes = at + _NODE.size + key_bytes, low | high << 16
            if flags not in (0, _BIG, _SUBTREE) or data_at + (8 if flags == _BIG else data_bytes) > size:
                raise CorruptDataError("index: a node passes the end of its page")
            self._counts["entries"] += 1
            key = page[at + _NODE.size : data_at]
            if flags == _BIG:
                yield key, flags, data_bytes, b"", self._overflow(page, data_at, data_bytes)
            else:
                yield key, flags, data_bytes, page[data_at : data_at + data_bytes], 0
        if upper is not None and self._last is not None and not _is_less(self._last, upper):
            raise CorruptDataError("index: keys are out of order")

    def _overflow(self, page: bytes, at: int, data_bytes: int) -> int:
        number: int = struct.unpack_from("<Q", page, at)[0]
        count = -(-(_HEADER.size + data_bytes) // self._file.page_bytes)
        first = self._file.take(number, count)
        _, _, flags, low, high = _HEADER.unpack_from(first)
        if flags & ~_DIRTY != _OVERFLOW or low | high << 16 != count:
            raise CorruptDataError(f"index: page {number} is of another kind")
        self._counts["overflow_pages"] += count
        return number

    def _key(self, page: bytes, at: int, key_bytes: int) -> bytes | int:
        if not 1 <= key_bytes <= 511 or at + _NODE.size + key_bytes > len(page):
            raise CorruptDataError("index: a key passes the end of its page")
        return self._compared(page[at + _NODE.size : at + _NODE.size + key_bytes])

    def _compared(self, key: bytes) -> bytes | int:
        if self._integers and len(key) != 8:
            raise CorruptDataError("index: a number of another size")
        return int.from_bytes(key, "little") if self._integers else key


def _is_less(a: bytes | int, b: bytes | int) -> bool:
    return a < b  # type: ignore[operator]  # both numbers in the tree of free pages, else both bytes


def require_whole(path: Path) -> None:
    """Walk all trees of the newest transaction; CorruptDataError unless LMDB can follow every one of them.

    An index that is not there, or has no bytes yet, is whole. OSError when it cannot be read. About 8 s for a million
    blocks.
    """
    try:
        with opened(path, _READ) as fd:
            if os.fstat(fd).st_size:
                _require_trees(_File(fd))
    except FileNotFoundError:
        return
    except struct.error as error:
        raise CorruptDataError(f"index: it cannot be read: {error}") from error


def _require_trees(file: _File) -> None:
    for _, flags, size, data, _ in _Walk(file, file.main, 0).run():
        if flags != _SUBTREE or size != _TREE.size:
            raise CorruptDataError("index: among the trees stands something else")
        for _, kind, *_ in _Walk(file, _Pages.of(data), 0).run():
            if kind == _SUBTREE:
                raise CorruptDataError("index: a tree inside a tree")
    free = list(_Walk(file, file.free, _INTEGER_KEYS).run())
    for _, _, size, data, number in free:
        _require_free(file, file.read(number, _HEADER.size, size) if number else data)


def _require_free(file: _File, data: bytes) -> None:
    """Validate a free list, the pages that LMDB writes to next: within the file, descending, and not in use."""
    count = int.from_bytes(data[:8], "little")
    if len(data) % 8 or not 0 <= count <= len(data) // 8 - 1:
        raise CorruptDataError("index: a list of free pages has another length")
    numbers = struct.unpack_from(f"<{count}Q", data, 8)
    if any(a <= b for a, b in zip(numbers, numbers[1:], strict=False)):
        raise CorruptDataError("index: a list of free pages is out of order")
    if numbers and not 2 <= numbers[-1] <= numbers[0] <= file.last_page:
        raise CorruptDataError("index: a free page outside the file")
    if not file.seen.isdisjoint(numbers):
        raise CorruptDataError("index: a free page is in use")
    file.seen.update(numbers)
