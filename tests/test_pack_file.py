"""The bytes of a .kvpack file: held still by a golden file; what was flipped, cut, or is something else is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blobs import pack_file
from kvstore.blobs.format import FORMAT_VERSION
from kvstore.blobs.pack_file import PackFile, pack_pieces
from kvstore.errors import CorruptDataError, KVStoreError, UnknownFormatError
from tests.support.packs import PACKED, small_pack, write_small_pack

GOLDEN = Path(__file__).parent / "golden" / "pack-v3.kvpack"
WHOLE = GOLDEN.read_bytes()


def test_the_bytes_of_a_pack_do_not_change() -> None:
    """A difference here is a new format version, not a new golden file."""
    assert small_pack() == WHOLE


def test_the_golden_pack_reads_back() -> None:
    """Its manifest tells the namespace, and its blobs are those that went in; reading twice gives the same."""
    with PackFile(str(GOLDEN)) as pack:
        assert pack.manifest.namespace == PACKED.info and pack.manifest.blobs == 3
        pieces = list(pack.read())
        assert pieces == list(pack.read())
        assert sum(nbytes for nbytes, _ in pieces) == sum(len(data) for _, data in pieces) == pack.manifest.nbytes
    assert b"".join(map(bytes, pack_pieces(pack.manifest, pieces))) == WHOLE


def refused(path: Path) -> KVStoreError:
    """Why a file is refused; it names the file."""
    with pytest.raises((CorruptDataError, UnknownFormatError)) as found, PackFile(str(path)) as pack:
        for _ in pack.read():
            pass
    assert str(path) in str(found.value) and "\n" not in str(found.value)
    return found.value


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(WHOLE) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(at: int, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Wherever it is: magic, version, manifest, a length, a blob, the trailer."""
    damaged = bytearray(WHOLE)
    damaged[at] ^= 1 << bit
    path = tmp_path_factory.getbasetemp() / "flipped.kvpack"
    path.write_bytes(damaged)
    refused(path)


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, len(WHOLE) - 1))
def test_any_file_that_is_cut_short_is_found(length: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also between two blobs, and one byte before the end."""
    path = tmp_path_factory.getbasetemp() / "short.kvpack"
    path.write_bytes(WHOLE[:length])
    refused(path)


def test_what_is_no_pack_says_so_in_a_line(tmp_path: Path) -> None:
    """Another file, a folder, a FIFO, a pack with bytes behind its end, one of another version."""
    other = tmp_path / "other.kvpack"
    for content in (b"", b"{}", b"kvpack\n" + WHOLE[8:]):
        other.write_bytes(content)
        assert "is not a .kvpack file" in str(refused(other))
    other.write_bytes(WHOLE + b"\0")
    assert "checksum" in str(refused(other))
    newer = bytearray(WHOLE)
    newer[8] = FORMAT_VERSION + 1
    other.write_bytes(newer)
    assert isinstance(refused(other), UnknownFormatError)
    fifo = tmp_path / "fifo.kvpack"
    os.mkfifo(fifo)
    assert "not a regular file" in str(refused(fifo))
    with pytest.raises(OSError, match="fo"):
        PackFile(str(tmp_path / "fo"))


def test_a_length_beyond_the_file_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest or a blob of exabytes is refused before anything is read."""
    huge = bytearray(WHOLE)
    huge[12:16] = b"\xff" * 4
    path = tmp_path / "huge.kvpack"
    path.write_bytes(huge)
    refused(path)
    read: list[int] = []
    pread = os.pread
    monkeypatch.setattr(pack_file.os, "pread", lambda fd, n, at: (read.append(n), pread(fd, n, at))[1])
    first = WHOLE.index(b"\1", 16 + int.from_bytes(WHOLE[12:16], "little") + 8)
    huge = bytearray(WHOLE)
    huge[first + 1 : first + 9] = (1 << 62).to_bytes(8, "little")
    path.write_bytes(huge)
    refused(path)
    assert max(read) <= pack_file.PIECE_BYTES


def test_a_blob_of_another_length_than_was_said_is_not_packed(tmp_path: Path) -> None:
    """A daemon that ends in the middle of a blob leaves no file that looks whole."""
    with PackFile(str(write_small_pack(tmp_path / "one.kvpack"))) as pack:
        manifest = pack.manifest
    for pieces in ([(10, b"short")], [(2, b"long"), (1, b"x")], [(5, b"12"), (3, b"abc")]):
        with pytest.raises(CorruptDataError):
            list(pack_pieces(manifest, pieces))
