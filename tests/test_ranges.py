"""Reading ranges: from files that may be short, gone or many, and from a buffer that arrived by stream."""

from __future__ import annotations

import itertools
import os
import threading
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.blobs import ranges
from kvstore.blobs.ranges import BufferReader, FileReader, FileSource, Range
from kvstore.errors import CorruptDataError


def written(path: Path, data: bytes, payload_offset: int = 0) -> FileSource:
    """A file with this content."""
    path.write_bytes(data)
    return FileSource(str(path), payload_offset, len(data))


def test_a_range_is_spread_over_all_views_in_order(tmp_path: Path) -> None:
    """Views of any length, empty ones too, are filled one after the other from behind the header."""
    source = written(tmp_path / "a", b"head" + bytes(range(100)), 4)
    first, empty, second = bytearray(7), bytearray(), bytearray(20)
    with closing(FileReader([source])) as reader:
        reader.readinto(0, 10, [memoryview(first), memoryview(empty), memoryview(second)])
    assert bytes(first + second) == bytes(range(10, 37))


def test_short_reads_and_many_views_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little the system gives at once, and however many views there are, every byte arrives."""
    data = os.urandom(10_000)
    source = written(tmp_path / "a", data)
    real = os.preadv
    monkeypatch.setattr(ranges, "READ_BYTES_MAX", 999)
    monkeypatch.setattr(ranges, "VECTORS_MAX", 3)
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][: max(1, len(views[0]) // 2)]], at))
    buffer = bytearray(len(data))
    views = [memoryview(buffer)[at : at + 17] for at in range(0, len(buffer), 17)]
    with closing(FileReader([source])) as reader:
        reader.readinto(0, 0, views)
    assert bytes(buffer) == data


@pytest.mark.parametrize("size", [0, 9, 11])
def test_a_file_of_another_size_is_corrupt(tmp_path: Path, size: int) -> None:
    """Shorter or longer than the plan says: nothing is read from it."""
    (tmp_path / "a").write_bytes(bytes(size))
    with (
        closing(FileReader([FileSource(str(tmp_path / "a"), 0, 10)])) as reader,
        pytest.raises(CorruptDataError),
    ):
        reader.readinto(0, 0, [memoryview(bytearray(1))])


def test_a_missing_file_a_link_and_a_folder_are_corrupt(tmp_path: Path) -> None:
    """Only a regular file under exactly this name counts; the cause says what the system said."""
    source = written(tmp_path / "real", bytes(10))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("missing", "link", "."):
        sources = [FileSource(str(tmp_path / name), 0, source.file_bytes)]
        with closing(FileReader(sources)) as reader, pytest.raises(CorruptDataError):
            reader.readinto(0, 0, [memoryview(bytearray(1))])


def test_a_range_outside_the_file_or_plan_is_corrupt(tmp_path: Path) -> None:
    """Beyond the end, before the start, or of a block that the plan does not have."""
    with closing(FileReader([written(tmp_path / "a", bytes(10), 4)])) as reader:
        for source, offset, nbytes in ((0, 0, 7), (0, 6, 1), (0, -1, 1), (1, 0, 1), (-1, 0, 1)):
            with pytest.raises(CorruptDataError):
                reader.readinto(source, offset, [memoryview(bytearray(nbytes))])


def test_a_file_that_shrinks_while_open_is_corrupt(tmp_path: Path) -> None:
    """An end of file in the middle of a read is an error, not an endless loop."""
    source = written(tmp_path / "a", bytes(10))
    with closing(FileReader([source])) as reader:
        assert reader.open_all()
        os.truncate(source.path, 3)
        with pytest.raises(CorruptDataError, match="ended early"):
            reader.readinto(0, 0, [memoryview(bytearray(10))])


def test_at_most_so_many_files_are_open(tmp_path: Path) -> None:
    """The least recently used are closed; `all_open` says when names no longer matter."""
    sources = [written(tmp_path / str(number), bytes([number] * 8)) for number in range(9)]
    descriptors = len(os.listdir("/dev/fd"))
    with closing(FileReader(sources, open_max=4)) as reader:
        assert not reader.all_open and not reader.open_all()
        for number in (*range(9), *range(9)):
            buffer = bytearray(8)
            reader.readinto(number, 0, [memoryview(buffer)])
            assert buffer == bytes([number] * 8)
            assert len(os.listdir("/dev/fd")) <= descriptors + 4
    assert len(os.listdir("/dev/fd")) == descriptors
    with closing(FileReader(sources[:4], open_max=4)) as reader:
        assert reader.open_all() and reader.all_open
        for source in sources[:4]:
            os.unlink(source.path)
        reader.readinto(3, 0, [memoryview(bytearray(8))])


def test_threads_may_share_a_reader(tmp_path: Path) -> None:
    """More files than may be open, read by several threads at once: nobody's file is closed under him."""
    sources = [written(tmp_path / str(number), bytes([number] * 64)) for number in range(12)]
    wrong: list[int] = []
    with closing(FileReader(sources, open_max=2)) as reader:

        def read(shift: int) -> None:
            for step in range(300):
                number = (step * shift) % 12
                buffer = bytearray(64)
                reader.readinto(number, 0, [memoryview(buffer)])
                if bytes(buffer) != bytes([number] * 64):
                    wrong.append(number)

        threads = [threading.Thread(target=read, args=(shift,)) for shift in (1, 5, 7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20)), max_size=12), st.data())
def test_a_buffer_gives_back_what_arrived(spans: list[tuple[int, int]], data: st.DataObject) -> None:
    """Ranges of several sources, in parts of any length: what lies in a range is read, what lies in a gap is not."""
    ends = [0, 0, 0]
    ranges = []
    for source, nbytes in spans:
        ranges.append(Range(source, ends[source] + 3, nbytes))
        ends[source] += 3 + nbytes
    buffer = bytes((each.source * 100 + at) % 256 for each in ranges for at in range(each.offset, sum(each[1:])))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(buffer)), max_size=4)))
    reader = BufferReader([buffer[a:b] for a, b in itertools.pairwise([0, *cuts, len(buffer)])], ranges)
    for each in ranges:
        start = data.draw(st.integers(0, each.nbytes - 1))
        got = bytearray(each.nbytes - start)
        cut = len(got) // 2
        reader.readinto(each.source, each.offset + start, [memoryview(got)[:cut], memoryview(got)[cut:]])
        assert list(got) == [(each.source * 100 + at) % 256 for at in range(each.offset + start, sum(each[1:]))]
        for offset, nbytes in ((each.offset - 1, 1), (each.offset, each.nbytes + 1)):
            with pytest.raises(CorruptDataError):
                reader.readinto(each.source, offset, [memoryview(bytearray(nbytes))])


def test_a_buffer_that_is_cut_short_is_corrupt() -> None:
    """Bytes that were announced and did not arrive."""
    reader = BufferReader([b"abc"], [Range(0, 0, 2), Range(0, 2, 4)])
    got = bytearray(3)
    reader.readinto(0, 0, [memoryview(got)])
    assert got == b"abc"
    with pytest.raises(CorruptDataError):
        reader.readinto(0, 0, [memoryview(bytearray(4))])
